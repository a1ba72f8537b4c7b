"""Causal attention by blocks of queries: the lower triangle is computed, the upper one is not.

`eager_attention` computes all T x T scores and discards half of them. Here queries are taken `BLOCK` at a
time; a block that ends at token e reads keys 0..e only. With many blocks half of the work remains, and the
scores of one block stay in the processor's cache. FlashAttention (Dao et al., arXiv 2205.14135) goes one step
further and also cuts the keys into blocks.

The backward pass is derived by hand, with S = scale * Q K^T, P = softmax(S), O = P V and the gradient dO:

    dV = P^T dO    dP = dO V^T    dS = P * (dP - rowsum(dP * P))    dQ = scale * dS K    dK = scale * dS^T Q

    q: (B, H, T, D)   k, v: (B, G, T, D)   ->   (B, H, T, D), the D of v

On CPUs this is the fastest path for long rows, in bf16 and in fp32: see docs/experiments.md.
Trap: dK and dV are sums over all blocks. In bf16 each addition would round the sum, so they are fp32.
"""

import torch
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries


def blocked_attention(q, k, v, scale: float):
    """Causal attention of whole rows, T queries on the same T keys. q (B, H, T, D), k and v (B, G, T, D)."""
    return BlockedAttention.apply(q, k, v, scale, torch.is_grad_enabled())


class BlockedAttention(torch.autograd.Function):
    """The R = H/G query heads of a group are stacked as rows of one matrix, as in `eager_attention`."""

    @staticmethod
    def forward(ctx, q, k, v, scale, training):
        """(B, H, T, D), 2 x (B, G, T, D) -> (B, H, T, D)."""
        B, H, T, D = q.shape
        G, R = k.shape[1], H // k.shape[1]
        q = (q * scale).reshape(B * G, R, T, D)
        k, v = k.reshape(B * G, T, D), v.reshape(B * G, T, -1)
        out = q.new_empty(B * G, R, T, v.shape[-1])
        future = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=q.device).triu(1)
        bias = torch.zeros(BLOCK, BLOCK, dtype=q.dtype, device=q.device)
        bias.masked_fill_(future, torch.finfo(q.dtype).min)
        kept, keep = [], training and any(ctx.needs_input_grad)
        for start in range(0, T, BLOCK):
            stop = min(start + BLOCK, T)
            n = stop - start
            rows = q[:, :, start:stop].reshape(B * G, R * n, D)
            scores = torch.bmm(rows, k[:, :stop].mT)  # (B*G, R*n, stop)
            scores.view(B * G, R, n, stop)[..., start:] += bias[:n, :n]  # only the last square has a future
            probs = scores.softmax(dim=-1)
            out[:, :, start:stop] = torch.bmm(probs, v[:, :stop]).view(B * G, R, n, -1)
            if keep:  # all blocks together: half the size of all scores
                kept.append(probs)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale = scale
        return out.view(B, H, T, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """(B, H, T, D) -> gradients of q, k, v."""
        q, k, v, *kept = ctx.saved_tensors  # q is scaled already
        N, R, T, D = q.shape  # N = B*G
        B, H = grad.shape[:2]
        grad = grad.reshape(N, R, T, -1)
        wide = torch.promote_types(q.dtype, torch.float32)
        grad_q, *sums = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for probs, start in zip(kept, range(0, T, BLOCK), strict=True):
            stop = min(start + BLOCK, T)
            n = stop - start
            grad_out = grad[:, :, start:stop].reshape(N, R * n, -1)
            sums[1][:, :stop] += torch.bmm(probs.mT, grad_out)
            grad_probs = torch.bmm(grad_out, v[:, :stop].mT)  # (N, R*n, stop)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_q[:, :, start:stop] = torch.bmm(grad_scores, k[:, :stop]).view(N, R, n, D)
            sums[0][:, :stop] += torch.bmm(grad_scores.mT, q[:, :, start:stop].reshape(N, R * n, D))
        grad_q *= ctx.scale
        grad_k, grad_v = (total.to(q.dtype).view(B, H // R, T, -1) for total in sums)
        return grad_q.view(B, H, T, D), grad_k, grad_v, None, None


def lesson():
    """Print how many scores are computed with and without blocks, and that the results agree."""
    import torch.nn.functional as F

    print("causal attention: scores computed per head")
    for T in (64, 256, 1024, 4096):
        blocks = sum(BLOCK * min(start + BLOCK, T) for start in range(0, T, BLOCK))
        share, needed = blocks / T**2, T * (T + 1) // 2
        print(f"  {T:5d} tokens: all {T * T:10,}   by blocks {blocks:10,} ({share:.0%})   needed {needed:9,}")
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 8, 200, 32), torch.randn(2, 4, 200, 32), torch.randn(2, 4, 200, 32)
    gap = blocked_attention(q, k, v, 0.2) - F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.2, enable_gqa=True
    )
    print(f"largest difference from PyTorch's kernel on 200 tokens: {gap.abs().max():.1e}")


if __name__ == "__main__":
    lesson()
