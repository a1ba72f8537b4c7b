"""DoRA: train a weight's magnitude and its direction separately.

    V = W + s B A        W' = m * V / ||V||        ||V||: the length of each row, one row per output channel

    W, V: (out, in)   A: (R, in)   B: (out, R)   m, ||V||: (out,)

m starts as ||W||, so W' = W at first. LoRA turns and stretches a row with the same few numbers. Full
fine-tuning does the two nearly independently, and so does DoRA: m alone stretches, and B A sets the direction
of the row. Stretching every row by its own factor is a change of full rank, out of reach for B A, yet m does
it with one number per row.

The length is a constant for the gradient (section 4.3 of the paper): this saves the memory of a second matrix
and changes accuracy little. The bias stays outside. In factored form, for a layer that already has W x,

    W' x = W x + (m/||V|| - 1) W x + m/||V|| s B A x

Paper: Liu et al., arXiv 2402.09353. Names as in `peft`, whose `lora_magnitude_vector` is m.
Trap: a row of zeros has no direction, and 0/0 is NaN; modules/adapters/lora.py refuses such a weight.
"""

import torch


def row_norms(weight):
    """Return the length of every row, (.., out, in) -> (.., out)."""
    return torch.linalg.vector_norm(weight, dim=-1)


def dora_factor(magnitude, whole):
    """Return m / ||V|| (.., out) with gradient for m only. magnitude m (.., out), whole V (.., out, in)."""
    return magnitude / row_norms(whole.detach())


def lesson():
    """Fit three changes of a matrix by LoRA and by DoRA of the same rank; print the error left."""
    torch.manual_seed(0)
    size, rank = 48, 4
    W = torch.randn(size, size) / size**0.5
    turn = torch.randn(size, rank) @ torch.randn(rank, size) / size
    stretch = 0.5 + torch.rand(size, 1)
    print(f"a {size} x {size} matrix, rank {rank}: LoRA has {2 * size * rank} numbers, DoRA {size} more")
    goals = {"stretched": stretch * W, "turned": W + turn, "stretched and turned": stretch * (W + turn)}
    for name, goal in goals.items():
        cosine = torch.cosine_similarity(W, goal, dim=1).mean()
        change, left = (row_norms(goal) / row_norms(W) - 1).abs().mean(), []
        for dora in (False, True):
            A, B = torch.randn(rank, size) / size**0.5, torch.zeros(size, rank)
            learned = [t.requires_grad_() for t in (A, B, row_norms(W))]
            optimizer = torch.optim.Adam(learned, lr=0.03)
            for _ in range(150):
                V = W + learned[1] @ learned[0]
                out = V * dora_factor(learned[2], V)[:, None] if dora else V
                loss = (out - goal).square().sum()
                optimizer.zero_grad(), loss.backward(), optimizer.step()
            left.append((out - goal).norm() / (goal - W).norm())
        print(f"  {name:21s} lengths change by {change:4.0%}, cosine {cosine:.2f};   "
              f"left over: LoRA {left[0]:6.1%}   DoRA {left[1]:6.1%}")  # fmt: skip


if __name__ == "__main__":
    lesson()
