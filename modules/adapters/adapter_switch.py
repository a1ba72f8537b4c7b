"""Select among several adapters on one base, for all rows of a batch or for each row.

    rows     0  1  2  3         name by name: the rows that use it go through the layer together
    names    b  -  c  b   ->    b: rows 0 and 3    the base alone: row 1    c: row 2   ->   rows 0 1 2 3

    x: (B, T, C), or (N, C) with the N = B*T tokens of all rows one after the other

The base is stored once and adapters are small, so one server can give every user an adapter of their own in
one batch. All adapted layers of a model share the same `AdapterSwitch`: one call selects for all of them, and
no forward needs another argument. Each row gives the same result as it would alone.

S-LoRA (arXiv 2311.03285) serves many adapters with kernels in place of the loop over names. In peft the
argument is called `adapter_names`.
"""

import torch

from config.adapters import LoraConfig
from utils.errors import UserError


class AdapterSwitch:
    """The settings of all adapters and the selection, shared by the adapted layers of one model.

    A plain object, not a module: `copy.deepcopy(model)` gives the copy its own switch, shared by its layers.
    """

    def __init__(self):
        self.configs: dict[str, LoraConfig] = {}
        self.choice: str | list[str | None] | None = None
        self.merged: str | None = None

    @property
    def active(self) -> str | list[str | None] | None:
        """The selection in force; None while an adapter is merged into the weights."""
        return None if self.merged is not None else self.choice

    def use(self, choice: str | list[str | None] | None) -> None:
        """Select the base (None), an adapter by name, or a list with one of these per row of the batch.

        Raises `UserError` for an unknown name, an empty list, or while an adapter is merged.
        """
        if choice == []:
            raise UserError("no adapter for any row: give one name, or one per row of the batch")
        for name in choice if isinstance(choice, list) else [choice]:
            self.check(name)
        self.choice = list(choice) if isinstance(choice, list) else choice

    def check(self, name: str | None) -> None:
        """Raise `UserError` if an adapter is merged, or `name` is neither None nor the name of an adapter."""
        if self.merged is not None:
            raise UserError(f"adapter {self.merged!r} is merged into the weights: unmerge it first")
        if name is not None and name not in self.configs:
            raise UserError(f"no adapter {name!r} in this model; it has {', '.join(self.configs) or 'none'}")

    def by_rows(self, run, x, *others):
        """Call `run(name, x, *others)` for the adapter in use; name is None for the base alone.

        With one adapter per row, call it once per adapter, on its rows. x and others (B, .., ..) have one row
        per name, or are flattened tokens (N, ..) with N = B*T, row after row: token n is in row n // (N / B).
        Raises `UserError` if the batch does not fit the names.
        """
        if not isinstance(self.active, list):
            return run(self.active, x, *others)
        B = len(self.choice)
        if len(x) % B or (x.dim() > 2 and len(x) != B):
            raise UserError(f"{B} adapters for a batch of {len(x)}: name one for each of its rows")
        results = [None] * B
        for name in dict.fromkeys(self.choice):
            rows = [row for row in range(B) if self.choice[row] == name]
            part = run(name, *(t.unflatten(0, (B, -1))[rows].flatten(0, 1) for t in (x, *others)))
            for row, result in zip(rows, part.chunk(len(rows)), strict=True):
                results[row] = result
        return torch.cat(results)


@torch.no_grad()
def lesson():
    """Run two adapters and the base in one batch; compare each row with the same row alone."""
    from modules.adapters.lora_model import add_lora

    torch.manual_seed(0)
    model, rows = torch.nn.Sequential(torch.nn.Linear(64, 64)), ["b", None, "c", "b"]
    x = torch.randn(4, 8, 64)
    base = model(x)
    for name, rank in (("b", 8), ("c", 16)):
        add_lora(model, LoraConfig(r=rank, target_modules=["0"]), name)
        model[0].lora_B[name].normal_(std=0.02)
    model[0].switch.use(rows)
    together = model(x)
    print("one batch of 4 rows, each with its own choice of adapter")
    for row, name in enumerate(rows):
        model[0].switch.use(name)
        gap = (model(x[row : row + 1])[0] - together[row]).norm() / together[row].norm()
        change = (together[row] - base[row]).norm() / base[row].norm()
        print(f"  row {row}: {name or '-'}   output changed by {change:4.0%}   difference to alone {gap:.0e}")


if __name__ == "__main__":
    lesson()
