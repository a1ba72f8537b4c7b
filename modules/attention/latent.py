"""Multi-head latent attention (MLA): the keys and values of all heads are expanded from one short latent.

    c_kv = norm(W_dkv x)        k_r = RoPE(W_kr x), one for all heads        kept in the cache: [c_kv | k_r]
    per head:  k = [W_uk c_kv | k_r]      v = W_uv c_kv      q = [q_nope | RoPE(q_r)]
    attention = softmax(q k^T * scale) v       scale = (nope + rope)^-1/2: the width of a key, not of c_kv

    x: (B, T, C) -> q: (B, H, T, nope + rope), latents: (B, 1, S, R + rope) -> (B, H, T, Dv) -> (B, T, C)

R is kv_lora_rank, Dv v_head_dim. There are two ways to compute the same result:

  expanded   Keys and values are computed for all S tokens. Best for training and prompts, where S new queries
             share the work of expanding S keys.
  absorbed   W_uk moves to the query's side and W_uv behind the sum, since matrix products are associative:
                 q_nope . (W_uk c) = (W_uk^T q_nope) . c        sum_s a_s (W_uv c_s) = W_uv (sum_s a_s c_s)
             Every head then attends to the latents themselves, as if they were one shared key and value head
             (multi-query attention), and the past is never expanded. Best for decoding.

W_uk c must not contain the position: a rotation between W_uk and the query would differ for every pair of
tokens, and nothing could be absorbed. That is why RoPE has its own few channels, q_r and k_r.

Paper: DeepSeek-V2, arXiv 2405.04434. Names as in Hugging Face's `DeepseekV3Attention`.
Traps: the rows of kv_b_proj are grouped by head, [keys | values] of head 0, then of head 1; the norms of the
latents have eps 1e-6 whatever the configuration says; c_kv is cached after its norm, k_r has none.
"""

import math

import torch
from torch import nn

from config.model import ModelConfig
from modules.attention.grouped_query import attend, eager_attention
from modules.attention.context import AttentionContext
from modules.attention.latent_cache import LatentCache
from modules.norm import RMSNorm
from modules.rope import apply_rotary
from modules.rope_scaling import read_scaling

EPS = 1e-6  # of the latents' norms; not configurable


def softmax_scale(config) -> float:
    """Return (nope + rope)^-1/2; with DeepSeek's YaRN times m^2, m = 0.1 * mscale_all_dim * ln(factor) + 1.

    YaRN's temperature usually multiplies cos and sin. Here they reach only some of the channels, so it
    multiplies the whole score (and if `mscale` is given, `rope_scaling.py` divides it out of the tables).
    """
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if not config.rope_scaling:
        return scale
    rule, _, p = read_scaling(config.rope_scaling, config.rope_theta)
    if rule == "yarn":  # without mscale_all_dim m is 1
        factor = p["factor"] or config.max_position_embeddings / p["original_max_position_embeddings"]
        scale *= (0.1 * p["mscale_all_dim"] * math.log(max(factor, 1.0)) + 1) ** 2
    return scale


class LatentAttention(nn.Module):
    """Self-attention of one layer: `forward(x, context, rotary, cache)`, (B, T, C) -> (B, T, C).

    Args:
        config: reads hidden_size, num_attention_heads, q_lora_rank, kv_lora_rank, qk_nope_head_dim,
            qk_rope_head_dim, v_head_dim, attention_bias, attention_dropout, attn_implementation,
            rope_interleaved and, for the scale, rope_scaling, rope_theta, max_position_embeddings.
        layer: this layer's number, which is its place in the cache.
    """

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.heads, self.rank = layer, config.num_attention_heads, config.kv_lora_rank
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.interleaved, self.implementation = config.rope_interleaved, config.attn_implementation
        self.attention_dropout, self.scale = config.attention_dropout, softmax_scale(config)
        width, bias, self.q_rank = config.hidden_size, config.attention_bias, config.q_lora_rank
        queries = self.heads * (self.nope + self.rope)
        if self.q_rank is None:
            self.q_proj = nn.Linear(width, queries, bias=False)
        else:  # saves weights and activations in training; queries are never cached
            self.q_a_proj = nn.Linear(width, self.q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(self.q_rank, EPS)
            self.q_b_proj = nn.Linear(self.q_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, self.rank + self.rope, bias=bias)  # W_dkv and W_kr
        self.kv_a_layernorm = RMSNorm(self.rank, EPS)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)  # W_uk, W_uv
        self.o_proj = nn.Linear(self.heads * self.v_dim, width, bias=bias)

    def forward(self, x, context: AttentionContext, rotary, cache: LatentCache | None = None):
        """x (B, T, C); rotary = (cos, sin), each (B or 1, T, rope)."""
        B, T, _ = x.shape
        if self.q_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, nope + rope)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        q_rope = apply_rotary(q_rope, *rotary, self.interleaved)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split([self.rank, self.rope], dim=-1)
        k_rope = apply_rotary(k_rope, *rotary, self.interleaved)
        latents = torch.cat([self.kv_a_layernorm(latent), k_rope], dim=-1)  # (B, 1, T, R + rope)
        if cache is not None:
            latents = cache.append(self.layer, latents)  # (B, 1, S, R + rope)
        layer = self.kv_b_proj  # an active adapter adds to what the weight alone computes
        plain = type(layer) is nn.Linear or getattr(layer, "idle", False)
        absorb = cache is not None and plain and self.absorbing_pays(T, latents.shape[2])
        form = self.absorbed if absorb else self.expanded
        out = form(q_nope, q_rope, latents, context)  # (B, H, T, Dv)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, H*Dv) -> (B, T, C)

    def absorbing_pays(self, tokens: int, keys: int) -> bool:
        """Return whether T queries on S keys take fewer multiplications if absorbed. Per head:

          expanded   S R (nope + Dv)  to expand the past  +  T S (nope + rope + Dv)  to attend
          absorbed   T R (nope + Dv)  for both ends       +  T S (R + rope + R)      on the wider latents
        """
        ends = self.rank * (self.nope + self.v_dim)
        wider = 2 * self.rank - self.nope - self.v_dim
        return tokens * (ends + keys * wider) < keys * ends

    def expanded(self, q_nope, q_rope, latents, context: AttentionContext):
        """Attend to keys and values in full.

        q_nope (B, H, T, nope), q_rope (B, H, T, rope), latents (B, 1, S, R + rope) -> (B, H, T, Dv)
        """
        B, _, S, _ = latents.shape
        latent, k_rope = latents.split([self.rank, self.rope], dim=-1)
        both = self.kv_b_proj(latent).view(B, S, self.heads, -1).transpose(1, 2)  # (B, H, S, nope + Dv)
        k_nope, v = both.split([self.nope, self.v_dim], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1, -1)], dim=-1)  # (B, H, S, nope + rope)
        q = torch.cat([q_nope, q_rope], dim=-1)
        return attend(self.implementation, q, k, v, context, self.scale, self.dropout)

    def absorbed(self, q_nope, q_rope, latents, context: AttentionContext):
        """Attend to the latents themselves, one key/value head for all. Shapes as in `expanded`.

        Always by plain products, where all heads are rows of one matrix: PyTorch's kernel would copy the
        shared latents for every head, and the scores of a few new tokens are small.
        """
        weight = self.kv_b_proj.weight.view(self.heads, self.nope + self.v_dim, self.rank)
        w_uk, w_uv = weight.split([self.nope, self.v_dim], dim=1)  # (H, nope, R), (H, Dv, R)
        q_latent = torch.einsum("bhtn,hnr->bhtr", q_nope, w_uk)  # (B, H, T, R)
        q = torch.cat([q_latent, q_rope], dim=-1)  # (B, H, T, R + rope)
        values = latents[..., : self.rank]  # (B, 1, S, R)
        out = eager_attention(q, latents, values, context, self.scale, self.dropout)  # (B, H, T, R)
        return torch.einsum("bhtr,hdr->bhtd", out, w_uv)  # (B, H, T, Dv)

    @property
    def dropout(self) -> float:
        """The share of attention weights to drop: none outside of training."""
        return self.attention_dropout if self.training else 0.0


@torch.no_grad()
def lesson():
    """Print the numbers cached per token, and the work of both forms for one new token."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    H, R, nope, rope, v_dim = 8, 64, 32, 16, 32
    config = ModelConfig(
        num_attention_heads=H, kv_lora_rank=R, qk_nope_head_dim=nope, qk_rope_head_dim=rope,
        v_head_dim=v_dim, attn_implementation="eager",
    )  # fmt: skip
    layer = LatentAttention(config, 0)
    print("MLA: numbers cached per token and layer, for 8 heads of 32:")
    print(f"  MHA {2 * H * 32}   GQA with 4 key/value heads {2 * 4 * 32}   MLA with rank {R} {R + rope}")
    print("One new token after a past of n tokens: FLOPs of attention, expanded and absorbed")
    for past in (0, 1, 15, 255, 4095):
        latents = torch.randn(1, 1, past + 1, R + rope)
        inputs = torch.randn(1, H, 1, nope), torch.randn(1, H, 1, rope), latents
        context, work, outs = AttentionContext(torch.tensor([[past]]), None, False), [], []
        for form in (layer.expanded, layer.absorbed):
            with FlopCounterMode(display=False) as counter:
                outs.append(form(*inputs, context))
            work.append(counter.get_total_flops())
        gap = f"{(outs[0] - outs[1]).abs().max():.0e}"
        chosen = "absorbed" if layer.absorbing_pays(1, past + 1) else "expanded"
        print(f"  {past:5d}  {work[0]:12,}  {work[1]:12,}   difference of outputs {gap}   chosen: {chosen}")


if __name__ == "__main__":
    lesson()
