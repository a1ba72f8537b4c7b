"""GPTQ: round a matrix column by column, and correct the columns to come for each error.

    the output's error      sum over tokens of |(w - w') x|^2 = 1/2 (w - w') H (w - w')^T        H = 2 X^T X
    column i rounded to q   err = (w_i - q) / U_ii        w_j -= err U_ij  for all j > i         H^-1 = U^T U

The second line is the least squares solution: the values of the columns to come that make the error smallest
while the columns up to i stay as they are. U is the upper Cholesky factor. Without correlation between inputs
H and U are diagonal, and GPTQ is plain rounding.

    weight (out, in), H (in, in), inputs x (tokens, in)  ->  `Codes` of (out, in), columns in their own order

Act order: columns with large inputs go first, while most others can still be corrected. The columns of a
group then come at different times, so its scale is found at the start, in the original weights ("static
groups": no index of groups has to be stored). Without act order it is found when the group's first column
comes, in the weights as corrected by then.
Lazy batches: an error is passed on at once within a batch of columns, and to the rest by one product per
batch. The result is the same but for the last bits.

Paper: Frantar et al., arXiv 2210.17323. The damping of 1 % is the paper's. An input that is always zero has
no part in any error: damping gives it a diagonal, and its weights are rounded plainly.

Trap: with fewer tokens than inputs, or inputs that repeat each other, H has no inverse. Hence damping, and
fp64 inside.
Trap: a batch that ended within a group would find its scale in weights that are out of date.
"""

import torch

from modules.quantized.integers import Codes, codes_of, dequantize, grouped, quantize, scales_and_zeros

BATCH = 128  # columns


def add_inputs(hessian, x) -> None:
    """Add 2 x^T x to H (in, in) in place. x (tokens, in): real tokens only, padding is no input."""
    x = x.to(hessian.dtype)
    hessian.addmm_(x.T, x, alpha=2)


def inverse_factor(hessian, damp: float):
    """Return the upper U in fp64 with U^T U = H^-1 after damping. Raise `ValueError` if there is none."""
    mean = hessian.diagonal().double().mean()
    step = damp * mean if mean > 0 else mean + 1  # without any input: plain rounding
    hessian = hessian.double() + step * torch.eye(len(hessian), device=hessian.device)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed or not factor.isfinite().all():
        raise ValueError("the matrix of the inputs has no inverse: it is not finite, or damped too little")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)


@torch.no_grad()
def gptq(
    weight,
    hessian,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    act_order: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    damp: float = 0.01,
) -> Codes:
    """Round weight (out, in) for inputs with H (in, in).

    Args:
        bits, group_size, symmetric, scale_dtype: the format, as in `integers.quantize`.
        act_order: largest diagonal of H first.
        damp: share of the diagonal's mean that is added to the diagonal.
    """
    width = weight.shape[1]
    groups = grouped(weight.float(), group_size)  # (out, groups, g)
    size, static = groups.shape[-1], act_order or groups.shape[1] == 1
    scales, zeros = scales_and_zeros(groups, bits, symmetric, scale_dtype)
    order = torch.arange(width, device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_factor(hessian[order][:, order], damp)
    left = weight.double().T[order].contiguous()  # (in, out): the columns to come, as they are by now
    codes = torch.empty(weight.shape, dtype=torch.int8 if symmetric else torch.uint8, device=weight.device)
    batch = BATCH if static else max(BATCH // size, 1) * size  # no batch ends within a group
    for start in range(0, width, batch):
        stop = min(start + batch, width)
        errors = torch.empty_like(left[start:stop])
        for i, column in enumerate(order[start:stop].tolist(), start):
            group = column // size
            if not static and i % size == 0:
                numbers = left[i : i + size].float().T
                scales[:, group], zero = scales_and_zeros(numbers, bits, symmetric, scale_dtype)
                if zeros is not None:
                    zeros[:, group] = zero
            scale, zero = scales[:, group], None if zeros is None else zeros[:, group]  # (out,)
            code = codes_of(left[i, :, None].float(), scale, zero, bits)  # (out, 1)
            rounded = dequantize(code, scale[:, None], None if zero is None else zero[:, None], left.dtype)
            codes[:, column], errors[i - start] = code[:, 0], (left[i] - rounded[:, 0]) / upper[i, i]
            left[i + 1 : stop] -= torch.outer(upper[i, i + 1 : stop], errors[i - start])
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return Codes(codes, scales, zeros)


def lesson():
    """Print the error of the output for GPTQ and plain rounding, and where GPTQ's gain comes from."""
    torch.manual_seed(0)
    weight, mix = torch.randn(64, 96), torch.randn(24, 96)
    inputs = {"independent": torch.randn(2048, 96)}
    inputs["correlated"] = torch.randn(2048, 24) @ mix + 0.3 * torch.randn(2048, 96)
    inputs["the same, some large"] = inputs["correlated"] * (1 + 9 * (torch.arange(96) % 16 == 0))
    print("error of the output, relative; 4 bits, groups of 32       plain     GPTQ     in act order")
    for name, x in inputs.items():
        hessian, texts = torch.zeros(96, 96), []
        add_inputs(hessian, x)
        rounded = [quantize(weight, 4, 32)]
        rounded += [gptq(weight, hessian, 4, 32, act_order=order) for order in (False, True)]
        for codes in rounded:
            error = (dequantize(*codes) - weight) @ x.T
            texts.append(f"{error.norm() / (weight @ x.T).norm():8.2%}")
        print(f"  inputs {name:45s}", *texts)
    change = (dequantize(*rounded[2]) - weight).norm() / (dequantize(*rounded[0]) - weight).norm()
    print(f"GPTQ's weights are {change:.1f} times as far from the true ones: errors cancel in the output")


if __name__ == "__main__":
    lesson()
