"""QLoRA: an adapter beside a matrix that is kept as codes of 4 bits.

    y = dequantize(codes) x + s B A x        codes, frozen: (out, in) in NF4        A: (R, in)   B: (out, R)

Training a full matrix takes 16 bytes per number in fp32: weight, gradient and Adam's two moments. LoRA leaves
the weight, 4 bytes. A frozen matrix needs no precise numbers, since no small step is ever added to it, and
A and B learn to correct some of the rounding: NF4 with double quantisation (modules/quantized/nf4.py) leaves
0.52 bytes. The matrix in full exists during one product only; the backward pass computes it once more.

Paper: Dettmers et al., arXiv 2305.14314. As `peft` on a `bitsandbytes.nn.Linear4bit`.
Trap: the factors are trained beside the rounded matrix. Beside or merged into the exact one they give other
numbers: use them on codes again, or merge them into what the codes stand for.
"""

import torch

from modules.adapters.adapter_switch import AdapterSwitch
from modules.adapters.lora import LoraLinear
from modules.quantized.layers import QuantLinear
from utils.errors import UserError


class LoraQuantLinear(LoraLinear):
    """`QuantLinear` with adapters, whose buffers it uses. `weight` (out, in) is computed on demand."""

    weight = QuantLinear.weight
    product = QuantLinear.forward

    def __init__(self, layer: QuantLinear, switch: AdapterSwitch):
        super().__init__(layer, switch)
        self._buffers.update(layer._buffers)
        self._modules.update(layer._modules)
        self.activations = layer.activations

    def merge(self, name: str) -> None:
        """Raise `UserError`: codes of 4 bits cannot take up a small change."""
        raise UserError("an adapter is not merged into codes: merge it into a base in full precision")


def lesson():
    """Print the memory of a rounded matrix, and the error before and after training adapters beside it."""
    from config.adapters import LoraConfig
    from modules.adapters.lora_model import add_lora
    from modules.quantized.stored import StoredNF4

    torch.manual_seed(0)
    size, x = 128, torch.randn(512, 128)
    exact = torch.randn(size, size) / size**0.5
    base = QuantLinear(StoredNF4(exact.shape, double_quant=True).round(exact))
    held = sum(part.nbytes for part in base.buffers())
    print(f"W has {exact.nbytes:,} bytes in fp32 and {held:,} as NF4")
    wanted = x @ (exact + 2 * torch.randn(size, 4) @ torch.randn(4, size) / size).T
    print("a new task of rank 4: error of the output in percent, before and after training A and B")
    for r in (2, 4, 16, 64):
        model = torch.nn.Sequential(base)
        add_lora(model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
        optimizer, errors = torch.optim.Adam(model.parameters(), lr=0.01), []
        for _ in range(200):
            loss = (model(x) - wanted).square().mean()
            errors.append(100 * (loss.item() / wanted.square().mean().item()) ** 0.5)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        print(f"  rank {r:2d}   {errors[0]:5.2f} -> {errors[-1]:5.2f}")
    print("codes unchanged:", torch.equal(base.weight, model[0].weight))


if __name__ == "__main__":
    lesson()
