"""LoRA: adapt a frozen matrix by a trainable product of two thin ones.

    y = W x + b + s B A dropout(x)        s = lora_alpha / r, with rsLoRA lora_alpha / sqrt(r)

    x: (.., in)   W: (out, in)   A: (R, in)   B: (out, R)   ->   y: (.., out)

The change B A has rank R at most: R * (out + in) numbers are trained in place of out * in. B starts at zero,
so training begins with the model as it is; A is random, or both would stay zero. DoRA
(modules/adapters/dora.py) also trains the length of each row of W + s B A. Several adapters may share one
base (modules/adapters/adapter_switch.py); stacked experts have theirs in modules/adapters/lora_experts.py.

    names = add_lora(model, config, "default")      freeze_all_but(model, names)      ... train ...
    switch_of(model).use("default")                 select the adapter in use (see adapted_layer.py)
    merge(model, "default"), unmerge(model)         into the weights and back
    fold(model, "default")                          a plain model with the adapter in its weights

Paper: Hu et al., arXiv 2106.09685. Names as in `peft`; parameters are called `<layer>.lora_A.<adapter>`, and
those of the base keep their names.
Traps: without s the learning rate depends on the rank. The output head cannot be adapted, since the loss
reads its weight directly and the embedding may share it.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from config.adapters import LoraConfig
from modules.adapters.adapted_layer import Adapted, adapted_layers, effective_weight, replace_layer, scaling
from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.dora import dora_factor
from modules.adapters.lora_experts import LoraExperts
from modules.experts.moe import Experts
from utils.errors import UserError

GROUPS = ("attention", "dense", "shared", "experts")
REFUSED = {
    "lm_head": "the loss reads its weight directly, and the embedding may share it",
    "gate": "a router is trained as a whole or not at all",
}


class LoraLinear(Adapted):
    """`nn.Linear` with adapters: `forward(x)`, (B, .., in) or (N, in) -> the same with out."""

    MATRICES = ("weight",)
    empty_store = nn.ParameterDict

    def empty_layer(self) -> nn.Linear:
        """Return a plain layer of the same shape."""
        out, width = self.weight.shape
        return nn.Linear(width, out, bias=self.bias is not None)

    def stores(self, matrix: str):
        """Return A, B and m of the weight, each a dictionary by adapter."""
        return self.lora_A, self.lora_B, self.lora_magnitude_vector

    def forward(self, x):
        """Multiply all rows by W at once, then add what each row's adapter gives."""
        return self.switch.by_rows(self.adapted, x, F.linear(x, self.weight, self.bias))

    def adapted(self, name, x, base):
        """Add one adapter to base = W x + b (None, or one that is not here: return base)."""
        if name not in self.lora_A:
            return base
        A, B, magnitude = (store.get(name) for store in self.stores("weight"))
        config = self.switch.configs[name]
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)  # factors in fp32 on a base in bf16
        x = F.dropout(x, config.lora_dropout, self.training)
        low = F.linear(F.linear(x, A) * scaling(config), B)
        if magnitude is not None:
            with torch.no_grad():
                whole = effective_weight(self.weight, A, B, scaling(config))
            plain = base if self.bias is None else base - self.bias
            if config.lora_dropout and self.training:
                plain = F.linear(x, self.weight.to(x.dtype))  # as in peft: dropout also where m acts on W x
            factor = dora_factor(magnitude, whole)
            low = (factor - 1) * plain + factor * low
        return (base + low).to(base.dtype)


def add_lora(model: nn.Module, config: LoraConfig, name: str = "default") -> list[str]:
    """Add an adapter to the layers that `config.target_modules` names, and use it. Freeze nothing.

    A target is a group: `attention` (linear layers under `self_attn`), `dense` (the plain feed-forwards
    `mlp`), `shared` and `experts` (of mixtures); or the last part of a linear layer's name, as `q_proj`.

    Returns the names of the new parameters. Raises `UserError`, and leaves the model unchanged, for a target
    that matches nothing, the output head or the router, an empty list of targets, an adapter name that is
    taken or invalid, a merged model, dropout on experts, or DoRA on a weight with a row of zeros.
    """
    config.check()
    targets, adapted = find_targets(model, config.target_modules), adapted_layers(model)
    switch = adapted[0].switch if adapted else AdapterSwitch()
    if name in switch.configs:
        raise UserError(f"the model has an adapter {name!r} already: choose another name")
    if not name or "." in name or hasattr(nn.ParameterDict(), name):
        raise UserError(f"an adapter cannot be called {name!r}: use letters and digits, no dot")
    if switch.merged is not None:
        raise UserError(f"adapter {switch.merged!r} is merged into the weights: unmerge it to add another")
    if config.use_dora:
        for path, layer in targets.items():
            weights = [w for w in layer.parameters(recurse=False) if w.dim() > 1]  # without adapters' B
            if not all(w.any(dim=-1).all() for w in weights):
                raise UserError(f"{path} has a row of zeros, which has no direction: set lora.use_dora=false")
    before = {key for key, _ in model.named_parameters()}
    for path, layer in targets.items():
        if not isinstance(layer, Adapted):
            layer = (LoraLinear if isinstance(layer, nn.Linear) else LoraExperts)(layer, switch)
            replace_layer(model, path, layer)
        layer.add(name, config)
    switch.configs[name] = replace(config)
    switch.use(name)
    return [key for key, _ in model.named_parameters() if key not in before]


def find_targets(model: nn.Module, wanted: list[str]) -> dict[str, nn.Module]:
    """Return the layers that `target_modules` names, by path. Errors as in `add_lora`."""
    labels, layers = {}, {}
    for path, layer in model.named_modules():
        kind, parts = type(layer), path.split(".")
        if kind in (Experts, LoraExperts):
            labels[path] = {"experts"}
        elif kind in (nn.Linear, LoraLinear) and parts[-1] not in REFUSED:
            labels[path] = {parts[-1]}
            if "self_attn" in parts:
                labels[path].add("attention")
            elif parts[-2:-1] == ["shared_experts"]:
                labels[path].add("shared")
            elif parts[-2:-1] == ["mlp"] and parts[-1] in ("gate_proj", "up_proj", "down_proj"):
                labels[path].add("dense")
        layers[path] = layer
    there = set().union(*labels.values())
    offer = f"this model has {', '.join(sorted(there)) or 'no linear layer'}"
    for target in wanted:
        if target in REFUSED:
            raise UserError(f"lora.target_modules: no adapter on {target}, {REFUSED[target]}")
        if target not in there and target not in GROUPS:
            raise UserError(f"lora.target_modules: nothing is called {target!r}; {offer}")
    found = {path: layers[path] for path, names in labels.items() if names & set(wanted)}
    if not found:
        raise UserError(f"lora.target_modules={wanted} matches nothing in this model; {offer}")
    return found


def freeze_all_but(model: nn.Module, names: list[str]) -> None:
    """Make only the named parameters trainable. Raise `UserError` for an unknown name."""
    parameters = dict(model.named_parameters())
    if missing := sorted(set(names) - parameters.keys()):
        raise UserError(f"the model has no parameter {missing[0]!r} to train ({len(missing)} such names)")
    for key, parameter in parameters.items():
        parameter.requires_grad_(key in names)


def lesson():
    """Fit changes of a matrix, of rank 1 to full rank, by factors of small rank; print the error left."""
    torch.manual_seed(0)
    size, ranks = 64, (1, 4, 16)
    print(f"LoRA on {size} x {size}: error left, as a share of the change (the least possible)")
    for true in (1, 4, 64):
        change = torch.randn(size, true) @ torch.randn(true, size)
        change *= 8 / change.norm()
        model, texts = nn.Sequential(nn.Linear(size, size)), []
        goal = model[0].weight.detach() + change
        for rank in ranks:
            names = add_lora(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), f"r{rank}")
            freeze_all_but(model, names)
            optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
            for _ in range(120):
                learned = model(torch.eye(size)) - model[0].bias  # (in, out)
                loss = (learned.T - goal).square().sum()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
            least = torch.linalg.svdvals(change)[rank:].norm() / change.norm()
            texts.append(f"r = {rank}: {loss.sqrt() / change.norm():4.0%} ({least:.0%})")
        print(f"  change of rank {true:2d}   ", "   ".join(texts))
    for rank in ranks:
        print(f"  rank {rank:2d} on 2048 x 2048: {rank * 4096:6,} trainable numbers, {rank / 1024:.2%} of W")


if __name__ == "__main__":
    lesson()
