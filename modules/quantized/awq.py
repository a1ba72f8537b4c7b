"""AWQ: make the columns of a matrix that meet large inputs larger before rounding, and the inputs smaller.

    y = W x = (W s)(x / s)      s_j = m_j^alpha / sqrt(max * min of those)      m_j = mean over tokens |x_j|

The error of a rounded weight is up to half a step of its group, whether the weight is large or small. If
column j is multiplied by s_j before rounding and divided afterwards, its error is 1 / s_j of that, as long as
the group's largest weight stays the same. So the columns that matter most are protected without more bits.
alpha is searched from 0 (no scaling) to 0.95 by the error of the output. For an error e of the weight that is
the sum over tokens of |e x|^2 = sum of e * (e X^T X): the tokens are needed only once, for X^T X.

    weight (out, in) or a stack of experts (E, out, in), inputs (tokens, in) of each matrix  ->  s (in,),
    which is one for all experts

A layer stores the codes of W s, and multiplies its input by a = 1 / s.

Paper: Lin et al., arXiv 2306.00978. As in torchao, weights are not clipped, and powers are at least 1e-4.
Trap: mean |x| over padding. Inputs are those of real tokens.
"""

import torch

GRID = [step / 20 for step in range(20)]  # alpha


@torch.no_grad()
def awq_scales(weight, inputs, round):
    """Return s (in,), ones if there are no inputs.

    Args:
        weight: (out, in), or a stack (E, out, in).
        inputs: (tokens, in) of each of its matrices, a list of 1 or E; numbers of tokens may differ.
        round: a function from a weight to the rounded weight, of the same shape.
    """
    inputs = [x.to(weight.dtype) for x in inputs]
    best, least = weight.new_ones(weight.shape[-1]), float("inf")
    means = torch.cat(inputs).abs().mean(dim=0)  # NaN without any input: alpha = 0 stays the best
    moments = torch.stack([x.T @ x for x in inputs])  # (E, in, in)
    for alpha in GRID:
        scales = means.pow(alpha).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        wrong = round(weight * scales) / scales - weight  # as weight
        error = float((wrong * (wrong @ moments)).sum())  # (out, in) @ (1, in, in) is a stack too
        if error < least:
            best, least = scales, error
    return best


def lesson():
    """Print which columns AWQ protects, and the error of the output for each alpha of a few."""
    from modules.quantized.integers import dequantize, quantize

    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    x = torch.randn(512, 128) * (1 + 29 * (torch.arange(128) % 32 == 5))  # 4 of 128 inputs are large
    round = lambda matrix: dequantize(*quantize(matrix, 4, 32))  # noqa: E731
    for name, inputs in (("4 large inputs", x), ("none", torch.randn(512, 128))):
        scales = awq_scales(weight, [inputs], round)
        true, errors = inputs @ weight.T, []
        for s in (torch.ones(128), scales):
            errors.append(float((inputs @ (round(weight * s) / s).T - true).norm() / true.norm()))
        print(f"{name:14s}: error of the output {errors[0]:.2%} -> {errors[1]:.2%}")
        columns = (round(weight * scales) / scales - weight).norm(dim=0)
        columns /= (round(weight) - weight).norm(dim=0)
        near = " ".join(f"{one:.2f}" for one in columns[:10].tolist())
        print(f"  scales {scales.min():.2f} .. {scales.max():.2f}; error of columns 0 .. 9, was 1: {near}")


if __name__ == "__main__":
    lesson()
