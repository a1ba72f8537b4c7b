"""Linear layers and experts whose weights are codes, turned back into numbers when they are used.

    y = F.linear(x * a, dequantize(codes)) + b

AWQ and SmoothQuant store the columns of the weight divided by a (in,), and multiply the input by it; other
methods have no a. With `activations`, x is rounded too, each token to 8 bits with a scale of its own (W8A8),
so that the product is one of integers.

The layers replace `nn.Linear` and `Experts` and have the same attributes: `weight`, or `gate_up_proj` and
`down_proj`, computed on demand. No matrix is kept in full precision, not even for the backward pass, which
dequantises it again.

    x (.., in), codes (out, in)  ->  (.., out)
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.moe import run_experts
from modules.quantized import integers


class DequantizedLinear(torch.autograd.Function):
    """x W'^T with the gradient of x, which is all that a frozen matrix needs. With `activations`, x is
    rounded, and the gradient goes straight through: rounding itself has slope zero."""

    @staticmethod
    def forward(ctx, x, store, activations=False):
        """x (.., in) -> (.., out)."""
        ctx.store, x = store, rounded(x) if activations else x
        return F.linear(x, store.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        """grad (.., out) -> (.., in)."""
        return grad @ ctx.store.dequantize().to(grad.dtype), None, None


def ones(size: int):
    """Return ones (size,). On the device `meta` only their shape exists (model/blank.py)."""
    return torch.empty(size).fill_(1.0)


def acting(store, scale):
    """Return the matrix (.., out, in) in fp32 that acts on the input x, given its `scale` a (in,) or None."""
    weight = store.dequantize()
    return weight if scale is None else weight * scale


def rounded(x):
    """Round each token x (.., in) to 8 bits, symmetric, and return the numbers that its codes stand for.

    As `integers.quantize` rounds a row, bit for bit. Decoding runs this for each matrix and token, so it is
    written with the fewest operations.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / 127.5).clamp_(min=integers.TINY)  # (.., 1)
    return (wide * scales.reciprocal()).round_().clamp_(-128, 127).mul_(scales).to(x.dtype)


class QuantLinear(nn.Module):
    """`nn.Linear` on a store (modules/quantized/stored.py) in place of a weight.

    Args:
        store: the matrix (out, in).
        bias: (out,) or None.
        scaled: the layer has an `input_scale` a (in,), ones until it is set.
        activations: round the input too.
    """

    def __init__(self, store: nn.Module, bias=None, scaled: bool = False, activations: bool = False):
        super().__init__()
        self.store, self.activations = store, activations
        self.out_features, self.in_features = store.shape
        own = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", own)
        self.register_buffer("input_scale", ones(self.in_features) if scaled else None)

    @property
    def weight(self):
        """The matrix (out, in) in fp32 that acts on the input x, computed now."""
        return acting(self.store, self.input_scale)

    def forward(self, x):
        """x (.., in) -> (.., out)."""
        if torch.is_autocast_enabled(x.device.type):  # products run in its dtype, as in F.linear
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x if self.input_scale is None else x * self.input_scale.to(x.dtype)
        y = DequantizedLinear.apply(x, self.store, self.activations)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantExperts(nn.Module):
    """`Experts` on two stores, (E, 2F, C) and (E, C, F), whose inputs are never rounded.

    scaled: there is an `input_scale` (C,) and an `inner_scale` (F,), of the input of `down`, for all experts.
    """

    def __init__(self, gate_up, down, implementation: str, scaled: bool = False):
        super().__init__()
        self.gate_up, self.down, self.implementation = gate_up, down, implementation
        self.register_buffer("input_scale", ones(gate_up.shape[-1]) if scaled else None)
        self.register_buffer("inner_scale", ones(down.shape[-1]) if scaled else None)

    @property
    def gate_up_proj(self):
        """(E, 2F, C) in fp32, computed now."""
        return acting(self.gate_up, self.input_scale)

    @property
    def down_proj(self):
        """(E, C, F) in fp32, computed now."""
        return acting(self.down, self.inner_scale)

    def forward(self, x, indices, weights):
        """x (N, C), indices and weights (N, K) -> (N, C)."""
        matrices = {name: getattr(self, name).to(x.dtype) for name in ("gate_up_proj", "down_proj")}
        names = {(matrix.data_ptr(), matrix.shape): name for name, matrix in matrices.items()}

        def kept(tensor):  # for the backward pass: a matrix by its name
            return names.get((tensor.data_ptr(), tensor.shape), tensor)

        def needed(kept):
            return getattr(self, kept).to(x.dtype) if isinstance(kept, str) else kept

        with torch.autograd.graph.saved_tensors_hooks(kept, needed):
            return run_experts(self.implementation, x, indices, weights, *matrices.values())


def lesson():
    """Print what rounding the weights changes in a layer's output, and what rounding the input adds."""
    from modules.quantized.stored import StoredIntegers

    torch.manual_seed(0)
    x, weight = torch.randn(64, 256), torch.randn(128, 256)
    true = F.linear(x, weight)
    for bits, group in ((8, None), (4, 32)):
        store = StoredIntegers(weight.shape, bits, group).round(weight)
        for inputs in (32, 8):
            found = QuantLinear(store, activations=inputs == 8)(x)
            error = (found - true).norm() / true.norm()
            print(f"weights of {bits} bits, inputs of {inputs:2d}: error of the output {error:.2%}")


if __name__ == "__main__":
    lesson()
