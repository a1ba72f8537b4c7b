"""Grouped-query attention (GQA): H query heads share G key/value heads, H/G to each.

    attention(q, k, v) = softmax(q k^T / sqrt(D) + mask) v

G = H is classic multi-head attention, G = 1 multi-query attention; between them the cache shrinks by H/G and
little is lost. Query head h reads key/value head h // (H/G): neighbours share (`repeat_interleave`, not
`tile`).

    x: (B, T, C) -> q: (B, H, T, D), k, v: (B, G, T, D) -> (B, H, T, D) -> (B, T, H*D) -> (B, T, C)

QK-norm (arXiv 2010.04245, Qwen3): RMSNorm over the D channels of every head of q and k, before the rotation.
It bounds the scores, so that training stands a larger learning rate.

Vaswani et al., arXiv 1706.03762; Ainslie et al., "GQA", arXiv 2305.13245. Names as in `Qwen3Attention`.
Three paths compute the same: `eager_attention` in plain products, `sdpa_attention` with PyTorch's kernel, and
`modules/attention/blocked.py` by blocks of queries; `attend` chooses.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.attention.context import AttentionContext, build_context
from modules.attention.blocked import blocked_attention
from modules.norm import RMSNorm
from modules.rope import RotaryEmbedding, apply_rotary


def eager_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Attention as written in the paper. q (B, H, T, D), k and v (B, G, S, D) -> (B, H, T, D), the D of v.

    The H/G query heads of one group stand one below the other, as more rows of one matrix: then every group
    is a single product with its keys, and keys need no copies.
    """
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    rows = (q * scale).reshape(B * G, H // G * T, D)  # (B*G, H/G*T, D)
    scores = torch.bmm(rows, k.reshape(B * G, S, D).transpose(1, 2)).view(B, H, T, S)
    mask = context.mask
    if context.is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # Finite: with -inf, a row with nothing to attend to would be 0/0 = NaN, forward and backward.
        # Half of the lowest: with a negative score on top, fp16 must not come out at -inf after all.
        bias = torch.zeros(mask.shape, dtype=scores.dtype, device=q.device)
        scores = scores + bias.masked_fill_(~mask, torch.finfo(scores.dtype).min / 2)
    probs = scores.softmax(dim=-1)
    if dropout:
        probs = F.dropout(probs, dropout)
    out = torch.bmm(probs.view(B * G, H // G * T, S), v.reshape(B * G, S, -1)).view(B, H, T, -1)
    # Rows with nothing to attend to become zeros; a product with (T, S) before would be kept for backward.
    return out if context.mask is None else out * context.mask.any(dim=-1, keepdim=True)


def sdpa_attention(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """The same through `F.scaled_dot_product_attention`, which stores no (T, S) scores. Shapes as above."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return sdpa_in_products(q, k, v, context, scale, dropout)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=context.mask, dropout_p=dropout, is_causal=context.is_causal, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    if context.mask is not None:
        # Some kernels average the values in a row with nothing to attend to; ours is zero on every device.
        out = out * context.mask.any(dim=-1, keepdim=True)
    return out


def sdpa_in_products(q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """PyTorch's function on a CPU in bf16, told to use matrix products: its own choice there, a fused kernel,
    leaves the processor's bf16 units idle. The plain triangle goes by blocks of queries, without most of its
    empty half. Shapes as above."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    block = 128 if context.is_causal else T
    triangle = torch.ones(T, S, dtype=torch.bool, device=q.device).tril() if context.is_causal else None
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # named after CUDA, read on CPUs too
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # else the products are done in fp32
    parts = []
    try:
        with sdpa_kernel(SDPBackend.MATH):
            for start in range(0, T, block):
                stop = min(start + block, T)
                seen = stop if context.is_causal else S
                mask = triangle[start:stop, :stop] if context.is_causal else context.mask
                if mask is not None:  # (.., n, S) -> (.., H/G*n, S): the heads of one group read it in turn
                    mask = mask.repeat(*[1] * (mask.dim() - 2), H // G, 1)
                rows = q[:, :, start:stop].reshape(B, G, -1, D)  # (B, G, H/G*n, D), as in `eager_attention`
                part = F.scaled_dot_product_attention(
                    rows, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, dropout_p=dropout, scale=scale
                )
                parts.append(part.view(B, H, stop - start, -1))
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    out = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return out if context.mask is None else out * context.mask.any(dim=-1, keepdim=True)


def attend(name: str, q, k, v, context: AttentionContext, scale: float, dropout: float = 0.0):
    """Attention by the path that `attn_implementation` names, or for `auto` by the one measured fastest.

    On a CPU that is by blocks where the plain triangle is the only rule, and with a mask the plain products
    in bf16 (PyTorch's kernel does not use the processor's bf16 units there) and PyTorch's kernel in fp32.
    docs/experiments.md has the numbers. Shapes as above.
    """
    on_cpu = q.device.type == "cpu"
    if name == "blocked" or (name == "auto" and on_cpu):
        if context.is_causal and not dropout:
            return blocked_attention(q, k, v, scale)
        name = "eager" if name == "blocked" or q.dtype == torch.bfloat16 else "sdpa"
    path = eager_attention if name == "eager" else sdpa_attention
    return path(q, k, v, context, scale, dropout)


class GroupedQueryAttention(nn.Module):
    """Self-attention of one layer: `forward(x, context, rotary, cache)`, (B, T, C) -> (B, T, C).

    Args:
        config: reads hidden_size, num_attention_heads, num_key_value_heads, head_dim, qk_norm, rms_norm_eps,
            attention_bias, attention_dropout, attn_implementation, rope_interleaved.
        layer: this layer's number, its place in the cache.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.interleaved, self.implementation = config.rope_interleaved, config.attn_implementation
        self.attention_dropout = config.attention_dropout
        queries = config.num_attention_heads * config.head_dim  # H*D
        keys = config.num_key_value_heads * config.head_dim  # G*D
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x, context: AttentionContext, rotary, cache=None):
        """x (B, T, C); rotary = (cos, sin), each (B or 1, T, D); cache: of `cache.py`, or None."""
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, H, T, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim)).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        q = apply_rotary(q, *rotary, self.interleaved)
        k = apply_rotary(k, *rotary, self.interleaved)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, G, S, D)
        dropout = self.attention_dropout if self.training else 0.0  # the kernel does not look at eval mode
        out = attend(self.implementation, q, k, v, context, self.head_dim**-0.5, dropout)  # (B, H, T, D)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*D) -> (B, T, C)


def lesson():
    """One head looks back over a short row: softmax weights per query, and what sharing keys saves."""
    torch.manual_seed(0)
    T, D = 6, 16
    q, k = torch.randn(2, 1, 1, T, D)
    cos, sin = RotaryEmbedding(D)(torch.arange(T)[None])
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    identity = torch.eye(T)[None, None]  # values that name their own token: the output is the weights
    weights = eager_attention(q, k, identity, build_context(T, "cpu"), D**-0.5)[0, 0]
    print("GQA: weights of one head (each row is a query and sums to 1; the future is zero)")
    for row in weights:
        print("  ", *[f"{w:5.2f}" for w in row.tolist()])
    q = torch.randn(1, 8, T, D)
    for groups in (8, 4, 2, 1):
        k, v = torch.randn(2, 1, groups, T, D)
        context = build_context(T, "cpu")
        gap = eager_attention(q, k, v, context, 0.25) - sdpa_attention(q, k, v, context, 0.25)
        stored = k.numel() + v.numel()
        gap = f"{gap.abs().max():.0e}"
        print(f"  8 heads on {groups} key/value heads: {stored:5d} numbers cached; eager - sdpa: {gap}")


if __name__ == "__main__":
    lesson()
