"""Grouped-query attention (GQA): H query heads share G key/value heads, H/G to each.

    attention(q, k, v) = softmax(q k^T / sqrt(D) + mask) v

G = H is classic multi-head attention, G = 1 is multi-query attention; in between, the cache shrinks by H/G at
little loss. Query head h reads key/value head h // (H/G): neighbours share (`repeat_interleave`, not `tile`).

    x: (B, T, C) -> q: (B, H, T, D), k, v: (B, G, T, D) -> (B, H, T, D) -> (B, T, H*D) -> (B, T, C)

QK-norm (arXiv 2010.04245, Qwen3): RMSNorm over the D channels of every head of q and k, before the rotation.
It bounds the scores, so that training tolerates a larger learning rate.

Vaswani et al., arXiv 1706.03762; Ainslie et al., "GQA", arXiv 2305.13245. Names as in `Qwen3Attention`.
Four paths compute the same: `eager_attention` is the formula, `sdpa_attention` calls PyTorch's kernel,
`modules/attention/blocked.py` works by blocks of queries, and `modules/attention/flash.py` by tiles of both.
`attend` chooses one of them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from modules.attention.blocked import blocked_attention
from modules.attention.context import AttentionContext, build_context
from modules.attention.flash import flash_attention
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, apply_rotary

LONG = 2**21  # numbers in a mask: rows of 1,449 tokens


def eager_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Compute the formula of the paper. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D), the D of v."""
    return average(scores_of(q, k, scale), v, context, dropout)


def scores_of(q, k, scale: float):
    """q (B, H, T, D), k (B, G, S, D) -> scale * q k^T, (B, H, T, S).

    The H/G query heads of a group are stacked as rows of one matrix: each group is a single product with its
    keys, and the keys need no copies.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    rows = (q * scale).reshape(B * G, H // G * T, D)  # (B*G, H/G*T, D)
    return torch.bmm(rows, k.reshape(B * G, S, D).transpose(1, 2)).view(B, H, T, S)


def average(scores, v, context: AttentionContext, dropout: float = 0.0):
    """Average values by the softmax of scores (B, H, T, S). v (B, G, S, D) -> (B, H, T, D)."""
    bias = context.bias(scores.dtype)
    if bias is not None:
        scores = scores + bias  # -inf where a query may not attend
    return weighted_sum(F.dropout(scores.softmax(dim=-1), dropout), v)


def weighted_sum(weights, v):
    """weights (B, H, T, S), v (B, G, S, D) -> (B, H, T, D)."""
    B, H, T, S = weights.shape
    G = v.shape[1]
    return torch.bmm(weights.view(B * G, H // G * T, S), v.reshape(B * G, S, -1)).view(B, H, T, -1)


class GroupedQueryAttention(nn.Module):
    """Self-attention of one layer: `forward(x, context, rotary, cache)`, (B, T, C) -> (B, T, C).

    Args:
        config: reads hidden_size, num_attention_heads, num_key_value_heads, head_dim, qk_norm, rms_norm_eps,
            attention_bias, out_bias, attention_dropout, attn_implementation, rope_interleaved.
        layer: this layer's number, which is its place in the cache.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.interleaved, self.implementation = config.rope_interleaved, config.attn_implementation
        self.attention_dropout, self.scale = config.attention_dropout, config.head_dim**-0.5
        queries = config.num_attention_heads * config.head_dim  # H*D
        keys = config.num_key_value_heads * config.head_dim  # G*D
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, context: AttentionContext, rotary, cache=None):
        """x (B, T, C); rotary = (cos, sin), each (B or 1, T, D), or None; cache: a `KVCache` or None."""
        B, T, _ = x.shape
        q, k, v = self.project(x)
        if rotary is not None:
            q, k = [apply_rotary(part, *rotary, self.interleaved) for part in (q, k)]
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        out = attend(self.implementation, q, k, v, context, self.scale, self.dropout)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*D) -> (B, T, C)

    def project(self, x):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, G, T, D), not rotated yet."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        return q, k, v

    @property
    def dropout(self) -> float:
        """The share of attention weights to drop: none outside of training."""
        return self.attention_dropout if self.training else 0.0


def attend(name: str, q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Run attention by the path that `attn_implementation` names; `auto` takes the fastest one measured.

    On a CPU: blocks of queries for causal rows. With a mask, PyTorch's kernel, or plain products where it is
    slow: it leaves bf16 units idle, and it multiplies so small blocks that oneDNN (utils/products.py) takes
    longer to begin than to multiply; for `LONG` masks, tiles (flash.py), which skip what is hidden. On other
    devices: PyTorch's kernel, but on GPUs the one of flash_triton.py for a mask with shared keys, which
    PyTorch would repeat. The numbers are in docs/experiments.md, 36 and 40. Shapes as in `eager_attention`.
    """
    if name == "auto" and q.is_cuda and context.rules is not None and k.shape[1] < q.shape[1] and not dropout:
        from modules.attention.flash_triton import takes, triton_attention  # only GPUs need Triton

        if takes(q, k, v):
            return triton_attention(q, k, v, context, scale)
    triangle = context.is_causal and not dropout
    if name == "auto" and q.device.type == "cpu":
        onednn = q.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        masked = "eager" if onednn or q.dtype == torch.bfloat16 else "sdpa"
        masked = "flash" if q.shape[2] * k.shape[2] >= LONG else masked
        name = "blocked" if triangle else masked
    if name == "blocked" and triangle:
        return blocked_attention(q, k, v, scale)
    paths = {"auto": sdpa_attention, "sdpa": sdpa_attention, "flash": flash_attention}
    path = paths.get(name, eager_attention)
    return path(q, k, v, context, scale, dropout)


def sdpa_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Compute the same with `F.scaled_dot_product_attention`. Shapes as in `eager_attention`.

    Its kernels store no (T, S) scores, except on GPUs the only one that takes both a mask and shared keys.
    With a mask, keys and values are therefore repeated for each query head there, which needs little memory
    in comparison. The CPU kernel takes both.
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and context.mask is not None and q.device.type != "cpu":
        k, v, shared = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1), 1
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=context.mask, dropout_p=dropout, is_causal=context.is_causal, scale=scale,
        enable_gqa=shared > 1,
    )  # fmt: skip


def lesson():
    """Print the softmax weights of one head over a short row, and what shared keys save in the cache."""
    torch.manual_seed(0)
    T, D, context = 6, 16, build_context(6, "cpu")
    q, k = (apply_rotary(x, *RotaryEmbedding(D)(context.positions)) for x in torch.randn(2, 1, 1, T, D))
    identity = torch.eye(T)[None, None]  # with these values the output is the weights
    print("GQA: weights of one head (each row is a query and sums to 1; the future is zero)")
    for row in eager_attention(q, k, identity, context, D**-0.5)[0, 0]:
        print("  ", *[f"{weight:5.2f}" for weight in row.tolist()])
    q = torch.randn(1, 8, T, D)
    for groups in (8, 4, 2, 1):
        k, v = torch.randn(2, 1, groups, T, D)
        gap = eager_attention(q, k, v, context, 0.25) - sdpa_attention(q, k, v, context, 0.25)
        print(f"  8 heads on {groups} key/value heads: {2 * k.numel():5d} numbers cached; "
              f"eager - sdpa: {gap.abs().max():.0e}")  # fmt: skip


if __name__ == "__main__":
    lesson()
