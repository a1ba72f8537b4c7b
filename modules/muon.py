"""Muon: momentum, with each matrix replaced by the nearest orthogonal one before it is applied.

    buffer <- mu * buffer + (1 - mu) * gradient;      u = (1 - mu) * gradient + mu * buffer       (Nesterov)
    U S V^T = u;   update = U V^T                     (all singular values become about 1)
    W <- W - lr * wd * W - lr * sqrt(max(1, rows / columns)) * update

A gradient has a few large singular values that drown its many small directions; Muon gives every direction
the same step. Five Newton-Schulz steps of three matrix products each replace the singular value
decomposition. They push singular values to between 0.7 and 1.2 (exactness buys nothing) and tolerate bf16,
which is used where the processor multiplies it natively; elsewhere fp32 is faster.

Muon is for matrices of hidden layers only: embeddings, the output head, gains and biases go to AdamW.
Matrices of equal shape are orthogonalized together as one batch (1.4 to 5 times faster than one by one for
small models on a CPU); a stack of experts (E, rows, columns) is a batch by itself, each expert a matrix of
its own.

Source: Keller Jordan, "Muon" (2024, kellerjordan.github.io/posts/muon); Moonlight, arXiv 2502.16982. Equal to
`torch.optim.Muon` slice by slice, with one difference.
Trap: the update has full size however small the momentum is. An expert without tokens would keep moving at
full speed along an old direction, so a matrix whose gradient is all zeros stays where it is.
"""

from collections import defaultdict

import torch

from utils.device import multiplies_bf16

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, steep at zero
STEPS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for parameters of shape (rows, columns) or (experts, rows, columns).

    Args:
        params: matrices or stacks of them; anything else is an error.
        lr: step size; one update changes a square matrix by about lr in every direction.
        momentum: mu.
        weight_decay: wd, decoupled, scaled by lr.
        parts: the number of matrices stacked in the rows of each parameter of a group, such as gate and up
            in an expert's `gate_up_proj`. Each is a map of its own; treating them as one matrix costs more.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, parts=1):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": parts}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    shape = tuple(parameter.shape)
                    raise ValueError(f"Muon takes matrices and stacks of matrices, not shape {shape}")

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            batches = defaultdict(list)  # (rows, columns) with rows <= columns -> parameters
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = sorted((parameter.shape[-2] // group["parts"], parameter.shape[-1]))
                    batches[rows, columns, parameter.device].append(parameter)
            settings = {key: group[key] for key in ("lr", "momentum", "weight_decay", "parts")}
            for parameters in batches.values():
                self.update(parameters, **settings)

    def update(self, parameters, lr, momentum, weight_decay, parts):
        """Update parameters whose matrices have one shape, up to transposition."""
        directions, moving = [], []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - momentum)
            ahead = matrices_of(parameter.grad.lerp(buffer, momentum), parts)
            directions.append(ahead.mT if ahead.shape[-2] > ahead.shape[-1] else ahead)
            lengths = matrices_of(parameter.grad, parts).flatten(1).norm(dim=1)  # (matrices,)
            moving.append(lengths != 0)  # numbers below 1e-23, whose squares vanish, count as zeros
        orthogonal = orthogonalize(torch.cat(directions))  # (all matrices, rows, columns)
        orthogonal *= torch.cat(moving)[:, None, None]
        counts = [len(moves) for moves in moving]
        for parameter, part, moves in zip(parameters, orthogonal.split(counts), moving, strict=True):
            weights = matrices_of(parameter, parts)
            rows, columns = weights.shape[-2:]
            if weight_decay:
                weights.mul_(1 - lr * weight_decay * moves[:, None, None])
            weights.sub_(part.mT if rows > columns else part, alpha=lr * max(1.0, rows / columns) ** 0.5)


def matrices_of(tensor, parts: int):
    """(.., parts * rows, columns) -> (matrices, rows, columns)."""
    return tensor.view(-1, tensor.shape[-2] // parts, tensor.shape[-1])


def orthogonalize(matrices):
    """(N, rows, columns), rows <= columns -> the same shape, singular values near 1, in bf16 or fp32.

    X <- P X with P = a I + b A + c A^2 and A = X X^T acts on each singular value as a x + b x^3 + c x^5.
    """
    x = matrices.to(torch.bfloat16 if multiplies_bf16(matrices.device.type) else torch.float32)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # Frobenius: all singular values now at most 1
    if x.dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]:
        return through_gram(x)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


def through_gram(x):
    """Orthogonalize wide fp32 matrices with the small A (rows, rows) alone: a third to half less work.

    All P are polynomials of the first A, so they commute: A <- P A P, and the result is their product times
    X. Trap: A squares the singular values, and rounding drowns those below 1e-4 (nearly all in bf16).
    """
    a, b, c = COEFFICIENTS
    gram, product = x @ x.mT, None
    for step in range(STEPS):
        polynomial = (gram @ gram).mul_(c).add_(gram, alpha=b)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < STEPS - 1:
            gram = polynomial @ gram @ polynomial
    return product @ x


def lesson():
    """Print the singular values of a gradient-like matrix and of its update, and the share of the largest."""
    torch.manual_seed(0)
    spectrum = torch.logspace(0, -2, 8)
    u, v = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(16, 8))[0]
    gradient = u @ torch.diag(spectrum) @ v.T
    update = orthogonalize(gradient[None])[0].float()
    for name, matrix in (("gradient", gradient), ("Muon's update", update)):
        values = torch.linalg.svdvals(matrix)
        share = values[0] ** 2 / values.square().sum()
        print(f"{name:14s} values", *[f"{s:5.2f}" for s in values.tolist()], f" largest: {share:.0%}")
    cosine = torch.nn.functional.cosine_similarity(update.flatten(), (u @ v.T).flatten(), dim=0)
    print(f"cosine between the update and the exact U V^T: {cosine:.3f}")


if __name__ == "__main__":
    lesson()
