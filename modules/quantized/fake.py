"""Quantisation-aware training (QAT): compute with rounded weights, and train the exact ones behind them.

    w' = s q        q = clamp(round(w / s), low, high)        low = -2^(b-1), high = 2^(b-1) - 1

    weight (.., out, in)  ->  w' (.., out, in), with a scale s for each group of a row: (.., out, groups)

Rounding has the slope zero nearly everywhere, so the exact gradient would be zero. The straight-through
estimate takes that of the identity: dw'/dw = 1 within the range, 0 where a code is cut off. The exact weight
collects small steps until its code changes.

    ste     s = max|w| / half, from the weights of each step (modules/quantized/integers.py)
    lsq     s is trained as well:  dw'/ds = q - w/s, or q where it is cut off,  times 1 / sqrt(N high)

N is the number of weights that share s; without the factor, s moves faster than its weights. The paper begins
with s = 2 mean|w| / sqrt(high), for whole layers. That is twice the best step for a group of 32 weights;
here s begins as in ste.
What is trained is log s: s stays above zero, and a step of Adam changes it in proportion to its size.

Papers: straight-through, Bengio et al., arXiv 1308.3432; LSQ, Esser et al., arXiv 1902.08153; log s: Jain et
al., arXiv 1903.08066. Trap: scales of groups are stored in fp16, so training rounds them too.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.moe import Experts, run_experts
from modules.quantized.integers import TINY, codes_of, grouped, scales_and_zeros
from modules.quantized.layers import QuantExperts, QuantLinear
from modules.quantized.stored import StoredIntegers


class FakeQuantize(torch.autograd.Function):
    """Round to codes and back, with the gradients above."""

    @staticmethod
    def forward(ctx, groups, scales, bits: int):
        """groups (.., g), scales (..) -> w' (.., g)."""
        codes, ctx.high = codes_of(groups, scales, None, bits), 2 ** (bits - 1) - 1
        ctx.save_for_backward(groups, scales, codes)
        return codes.to(groups.dtype) * scales[..., None]

    @staticmethod
    def backward(ctx, grad):
        """grad (.., g) -> gradients of the groups (.., g) and of the scales (..)."""
        groups, scales, codes = ctx.saved_tensors
        exact = groups * (1.0 / scales)[..., None]
        inside = codes == exact.round()
        slope = codes - exact * inside  # dw'/ds
        factor = (groups.shape[-1] * ctx.high) ** -0.5
        return grad * inside, (grad * slope).sum(dim=-1) * factor, None


class RoundScales(torch.autograd.Function):
    """Round scales to the dtype of a store. The gradient is that of the identity and is not rounded."""

    @staticmethod
    def forward(ctx, scales, dtype):
        """(..) -> (..)."""
        return scales.clamp(min=max(TINY, torch.finfo(dtype).tiny)).to(dtype).to(scales.dtype)

    @staticmethod
    def backward(ctx, grad):
        """(..) -> (..)."""
        return grad, None


class FakeLayer(nn.Module):
    """A layer that computes with rounded weights, in the place of the plain one whose parameters it uses.
    With `lsq` each matrix gets a parameter `<matrix>_log_scale`, a vector: no weight decay, no Muon."""

    MATRICES = ("weight",)

    def __init__(self, layer: nn.Module, bits: int, group_size: int | None, kind: str):
        super().__init__()
        self.bits, self.group_size, self.kind = bits, group_size, kind
        self._parameters.update(layer._parameters)
        for matrix in self.MATRICES:
            groups = grouped(getattr(layer, matrix).detach(), group_size)  # (.., out, groups, g)
            self.scale_dtype = self.blank_store(matrix).scale_dtype
            if kind == "lsq":
                start, _ = scales_and_zeros(groups, bits, symmetric=True)
                self.register_parameter(f"{matrix}_log_scale", nn.Parameter(start.log().flatten()))
        self.train(layer.training)

    def groups_and_scales(self, matrix: str):
        """Return one exact matrix in groups (.., out, groups, g), and their scales (.., out, groups) as they
        will be stored."""
        groups = grouped(getattr(self, matrix), self.group_size)
        if self.kind == "ste":
            scales, _ = scales_and_zeros(groups.detach(), self.bits, True, self.scale_dtype)
            return groups, scales.to(groups.dtype)
        learned = getattr(self, f"{matrix}_log_scale").exp().view(groups.shape[:-1])
        return groups, RoundScales.apply(learned, self.scale_dtype)

    def rounded(self, matrix: str):
        """Return w' of one matrix (.., out, in)."""
        return FakeQuantize.apply(*self.groups_and_scales(matrix), self.bits).flatten(-2)

    def blank_store(self, matrix: str) -> StoredIntegers:
        """Return an empty store for one matrix. Raise `ValueError` for a group size that does not fit."""
        return StoredIntegers(getattr(self, matrix).shape, self.bits, self.group_size)

    @torch.no_grad()
    def store(self, matrix: str) -> StoredIntegers:
        """Return one matrix as codes, those of training."""
        groups, scales = self.groups_and_scales(matrix)
        codes = codes_of(groups, scales, None, self.bits).flatten(-2)
        return self.blank_store(matrix).to(codes.device).put(codes, scales.to(self.scale_dtype))


class FakeLinear(FakeLayer):
    """`nn.Linear` with a rounded weight: x (.., in) -> (.., out)."""

    def forward(self, x):
        """Multiply by w'."""
        return F.linear(x, self.rounded("weight"), self.bias)

    def quantized(self) -> QuantLinear:
        """Return the layer on codes."""
        return QuantLinear(self.store("weight"), self.bias)


class FakeExperts(FakeLayer):
    """`Experts` with rounded weights."""

    MATRICES = ("gate_up_proj", "down_proj")

    def __init__(self, layer: Experts, *form):
        super().__init__(layer, *form)
        self.implementation = layer.implementation

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C)."""
        return run_experts(self.implementation, x, indices, weights, *map(self.rounded, self.MATRICES))

    def quantized(self) -> QuantExperts:
        """Return the experts on codes."""
        return QuantExperts(*map(self.store, self.MATRICES), self.implementation)


def lesson():
    """Train a rounded matrix towards the output of an exact one, with both kinds of scale."""
    torch.manual_seed(0)
    # inputs that depend on each other: one weight's error can be made good by another's
    x = torch.randn(512, 64) @ torch.randn(64, 64) / 8
    exact = torch.randn(64, 64).div_(8).mul_(torch.rand(64, 64) ** 2)
    wanted = F.linear(x, exact)
    error = lambda y: ((y - wanted).norm() / wanted.norm()).item()  # noqa: E731
    print("error of the output of a rounded matrix before and after training, scales from the largest weight"
          " or learned")  # fmt: skip
    for bits, group in ((4, 16), (4, 64)):
        found = []
        for kind in ("ste", "lsq"):
            linear = nn.Linear(64, 64, bias=False)
            linear.weight.data.copy_(exact)
            fake = FakeLinear(linear, bits, group, kind)
            found.append(f"{kind} {error(fake(x)):6.2%}")
            optimizer = torch.optim.Adam(fake.parameters())
            for step in range(150):
                optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 150)
                loss = (fake(x) - wanted).square().mean()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
            found[-1] += f" -> {error(fake(x)):6.2%}"
        print(f"  {bits} bits, groups of {group}   ", "   ".join(found))


if __name__ == "__main__":
    lesson()
