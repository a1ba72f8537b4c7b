"""The parts of a decoder layer, prepared for one token at a time (inference/fast/decoder.py).

    hidden (1, C) += attention(norm(hidden))        hidden (1, C) += feed_forward(norm(hidden))

Each part owns the memory for its intermediate results and all views of it. Matrices with the same input are
stored as one, (in, out), with the gain of the preceding norm multiplied in.
"""

import torch
import torch.nn.functional as F


class FastNorm:
    """RMSNorm of n vectors into `out` (n, C), without the gain and C^0.5, which are in the next matrix."""

    def __init__(self, out, eps: float):
        self.out, self.lengths = out, out.new_empty(len(out), 1)
        self.root = torch.tensor((out.shape[1] * eps) ** 0.5, dtype=out.dtype)

    def __call__(self, x):
        """Return x / (|x|^2 + C eps)^0.5; `hypot` is the root of a sum of squares."""
        torch.linalg.vector_norm(x, 2, 1, True, out=self.lengths)
        return torch.div(x, self.lengths.hypot_(self.root), out=self.out)


def gain(norm, dtype):
    """Return (C,), the gain of a norm times the factor C^0.5 that `FastNorm` omits."""
    return norm.weight.to(dtype) * len(norm.weight) ** 0.5


def prepared(weight, dtype, norm=None):
    """Return a copy of weight (.., out, in) as (.., in, out), with the factors that `FastNorm` omits."""
    weight = weight.to(dtype) if norm is None else weight.to(dtype) * gain(norm, dtype)
    return weight.mT.clone(memory_format=torch.contiguous_format)


def joined(linears, dtype, norm=None):
    """Return linear layers (out, in) with the same input as one matrix (in, sum of outs)."""
    return prepared(torch.cat([linear.weight for linear in linears]), dtype, norm)


class FastAttention:
    """Grouped-query attention."""

    def __init__(self, attention, norm, config, dtype):
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, norm)
        self.out = joined([attention.o_proj], dtype)
        heads = torch.empty(H + 2 * G, D, dtype=dtype)
        self.heads, self.q = heads.view(1, -1), heads[:H].view(1, H, 1, D)
        self.qk, self.kv = heads[: H + G], heads[H:].view(2, G, D)
        self.turned = torch.empty_like(self.qk)
        self.norm = None
        if config.qk_norm:
            self.norm = FastNorm(self.qk, config.rms_norm_eps)
            gains = [gain(attention.q_norm, dtype).expand(H, -1), gain(attention.k_norm, dtype).expand(G, -1)]
            self.gains = torch.cat(gains)  # (H+G, D)

    def add(self, hidden, normed, rotary, slot, seen):
        """Add the output for `normed` to `hidden`, both (1, C).

        rotary: partners, cos and sin (D,) each; slot (2, G, D): memory for the new key and value;
        seen (2, 1, G, S, D): all keys and values, the new ones included.
        """
        partner, cos, sin = rotary
        torch.mm(normed, self.qkv, out=self.heads)
        if self.norm is not None:
            self.norm(self.qk).mul_(self.gains)
        torch.index_select(self.qk, 1, partner, out=self.turned)
        self.qk.mul_(cos).addcmul_(self.turned, sin)
        slot.copy_(self.kv)
        keys, values = seen.to(hidden.dtype)  # (1, G, S, D) each
        attended = F.scaled_dot_product_attention(self.q, keys, values, enable_gqa=True)  # (1, H, 1, D)
        hidden.addmm_(attended.view(1, -1), self.out)


class FastMLP:
    """SwiGLU."""

    def __init__(self, mlp, norm, dtype):
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], dtype, norm)  # (C, 2F)
        self.down = joined([mlp.down_proj], dtype)
        self.both = torch.empty(1, self.gate_up.shape[1], dtype=dtype)
        self.gate, self.up = self.both.chunk(2, dim=1)

    def add(self, hidden, normed):
        """Add the output for `normed` to `hidden`, both (1, C)."""
        torch.mm(normed, self.gate_up, out=self.both)
        hidden.addmm_(F.silu(self.gate, inplace=True).mul_(self.up), self.down)


class FastMoE:
    """Mixture of experts; each is two products, with the router's weight as the factor of the second.

    They are chosen in plain Python: sorting E numbers takes less time than PyTorch's calls.
    """

    def __init__(self, moe, norm, config, dtype):
        self.softmax, self.normed = config.scoring_func == "softmax", config.norm_topk_prob
        self.chosen, self.factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.router = prepared(moe.gate.weight, dtype, norm)  # (C, E)
        self.bias = moe.gate.e_score_correction_bias.tolist()
        self.gate_up = prepared(moe.experts.gate_up_proj, dtype, norm).unbind()  # E times (C, 2F)
        self.down = prepared(moe.experts.down_proj, dtype).unbind()  # E times (F, C)
        self.shared = FastMLP(moe.shared_experts, norm, dtype) if moe.shared_experts is not None else None
        both = torch.empty(self.chosen, self.gate_up[0].shape[1], dtype=dtype)
        self.gate, self.up = both.chunk(2, dim=1)
        self.rows, self.gate_rows = both.split(1), self.gate.split(1)

    def route(self, normed) -> list[tuple[int, float]]:
        """Return (expert, weight) K times, chosen as in modules/experts/router.py."""
        logits = torch.mm(normed, self.router)
        scores = (logits.softmax(1) if self.softmax else logits.sigmoid())[0].tolist()
        choice = [score + bias for score, bias in zip(scores, self.bias, strict=True)]
        best = sorted(range(len(scores)), key=choice.__getitem__, reverse=True)[: self.chosen]
        total = sum([scores[expert] for expert in best]) + 1e-20 if self.normed else 1.0
        return [(expert, scores[expert] / total * self.factor) for expert in best]

    def add(self, hidden, normed):
        """Add the output for `normed` to `hidden`, both (1, C)."""
        routes = self.route(normed)
        if self.shared is not None:
            self.shared.add(hidden, normed)
        for row, (expert, _) in zip(self.rows, routes, strict=True):
            torch.mm(normed, self.gate_up[expert], out=row)
        F.silu(self.gate, inplace=True).mul_(self.up)
        for row, (expert, weight) in zip(self.gate_rows, routes, strict=True):
            hidden.addmm_(row, self.down[expert], alpha=weight)
