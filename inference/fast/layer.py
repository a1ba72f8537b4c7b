"""One decoder layer of `inference/fast/decoder.py`, prepared for n tokens of one row.

    hidden (n, C) += attention(norm(hidden))        hidden (n, C) += feed_forward(norm(hidden))

A `Workspace`, shared by all layers, holds memory for every intermediate result. Matrices with the same input
are stored as one, (in, out), multiplied by the gain of the norm before them.

Each pair of a token and one of its experts is two products: gate and up into a row of their own, then the
down matrix from there into the token's row of `hidden`, with the router's weight as the factor of `addmm_`.
One product for all tokens of an expert was no faster with 2 to 5 tokens. Experts are chosen in plain Python:
sorting E numbers takes less time than PyTorch's calls.
"""

import math

import torch
import torch.nn.functional as F

from modules.experts.moe import MoE


class Workspace:
    """Preallocated memory for every intermediate result of n tokens, with all views into it.

    Args:
        config: the `ModelConfig`.
        n: the number of tokens that are read at a time.
        dtype: the dtype of the computation.
    """

    def __init__(self, config, n: int, dtype):
        H, G, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.dtype, self.halves = dtype, {}
        self.hidden, self.normed = self.place(n, config.hidden_size), self.place(n, config.hidden_size)
        self.hidden_rows, self.normed_rows = self.hidden.split(1), self.normed.split(1)  # n times (1, C)
        self.norms, self.head_norms = self.place(n, 1), self.place(n, H + G, 1)
        root = math.sqrt(config.rms_norm_eps)
        self.root_eps = torch.tensor(root * config.hidden_size**0.5, dtype=dtype)
        self.head_root_eps = torch.tensor(root * D**0.5, dtype=dtype)

        self.qkv, turned = self.place(n, (H + 2 * G) * D), self.place(n, H + 2 * G, D)
        heads = self.qkv.view(n, H + 2 * G, D)
        self.q = heads[None, :, :H].transpose(1, 2)  # (1, H, n, D)
        self.qk, self.turned = heads[:, : H + G], turned[:, : H + G]  # (n, H+G, D)
        self.kv = heads[:, H:].view(n, 2, G, D).permute(1, 2, 0, 3)  # (2, G, n, D)
        self.rows, self.turned_rows = self.qkv.view(-1, D), turned.view(-1, D)  # (n*(H+2G), D)
        # The last of n tokens attends to all keys, the one before it to all but one: whatever the number of
        # keys, the mask is the right end of this.
        self.mask = torch.zeros(n, n + config.max_position_embeddings, dtype=dtype)
        self.mask[:, -n:] = torch.full((n, n), -torch.inf).triu(1)

    def place(self, *shape):
        """Return memory for one result."""
        return torch.empty(shape, dtype=self.dtype)

    def gate_up(self, rows: int, width: int):
        """Return memory (rows, 2F), its halves gate and up (rows, F), and the whole and gate row by row."""
        if (rows, width) not in self.halves:
            both = self.place(rows, 2 * width)
            gate, up = both.chunk(2, dim=1)
            self.halves[rows, width] = both, gate, up, both.split(1), gate.split(1)
        return self.halves[rows, width]

    def normalise(self):
        """Write `hidden` / (its norm^2 + C eps)^0.5 to `normed`: RMSNorm without gain and sqrt(C), which are
        in the next matrix. `hypot` is the root of a sum of squares."""
        torch.linalg.vector_norm(self.hidden, 2, 1, True, out=self.norms)
        torch.div(self.hidden, self.norms.hypot_(self.root_eps), out=self.normed)


def joined(linears, dtype, norm=None):
    """Return linear layers (out, in) with one input as a matrix (in, sum of outs) with the gain of `norm`."""
    return prepared(torch.cat([linear.weight.to(dtype) for linear in linears]), norm)


def prepared(weight, norm=None):
    """Return weight (.., out, in) as (.., in, out), with the factors that `Workspace.normalise` omits."""
    if norm is not None:
        weight = weight * gain(norm, weight.dtype)
    return weight.mT.contiguous()


def gain(norm, dtype):
    """Return (C,), the gain of a norm times the factor sqrt(C) that `Workspace.normalise` omits."""
    return norm.weight.to(dtype) * len(norm.weight) ** 0.5


class FastAttention:
    """Grouped-query attention; `forward` adds its output to `work.hidden`."""

    def __init__(self, attention, norm, config, dtype):
        self.qkv = joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, norm)
        self.out = joined([attention.o_proj], dtype)
        self.gains = None
        if config.qk_norm:  # (H+G, D)
            queries = gain(attention.q_norm, dtype).expand(config.num_attention_heads, -1)
            keys = gain(attention.k_norm, dtype).expand(config.num_key_value_heads, -1)
            self.gains = torch.cat([queries, keys])

    def forward(self, work: Workspace, rotary, slot, seen):
        """Attend.

        rotary: partners (D,), cos and sin (n, 1, D); slot (2, G, n, D): memory for the new keys and values;
        seen (2, 1, G, S, D): all keys and values, the new ones included.
        """
        partner, cos, sin = rotary
        work.normalise()
        torch.mm(work.normed, self.qkv, out=work.qkv)
        if self.gains is not None:
            torch.linalg.vector_norm(work.qk, 2, 2, True, out=work.head_norms)
            work.qk.div_(work.head_norms.hypot_(work.head_root_eps)).mul_(self.gains)
        # Values are permuted too, in vain: rows of a matrix are three times as fast as three dimensions.
        torch.index_select(work.rows, 1, partner, out=work.turned_rows)
        work.qk.mul_(cos).addcmul_(work.turned, sin)
        slot.copy_(work.kv)
        keys, values = seen.to(work.dtype)  # (1, G, S, D) each
        mask = work.mask[:, -keys.shape[2] :] if len(work.hidden) > 1 else None
        attended = F.scaled_dot_product_attention(work.q, keys, values, mask, enable_gqa=True)  # (1, H, n, D)
        work.hidden.addmm_(attended.transpose(1, 2).reshape(len(work.hidden), -1), self.out)


class FastMLP:
    """SwiGLU; `forward` adds its output for `work.normed` to `work.hidden`."""

    def __init__(self, mlp, norm, dtype):
        self.gate_up = joined([mlp.gate_proj, mlp.up_proj], dtype, norm)
        self.down = joined([mlp.down_proj], dtype)

    def forward(self, work: Workspace):
        """Compute three products as two."""
        both, gate, up, _, _ = work.gate_up(len(work.hidden), len(self.down))
        torch.mm(work.normed, self.gate_up, out=both)
        work.hidden.addmm_(F.silu(gate, inplace=True).mul_(up), self.down)


class FastMoE:
    """Mixture of experts; `forward` adds its output for `work.normed` to `work.hidden`."""

    def __init__(self, moe, norm, config, dtype):
        self.softmax, self.normed = config.scoring_func == "softmax", config.norm_topk_prob
        self.chosen, self.factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.router = prepared(moe.gate.weight.to(dtype), norm)  # (C, E)
        self.bias = moe.gate.e_score_correction_bias.tolist()
        self.gate_up = prepared(moe.experts.gate_up_proj.to(dtype), norm).unbind()  # E times (C, 2F)
        self.down = prepared(moe.experts.down_proj.to(dtype)).unbind()  # E times (F, C)
        self.shared = FastMLP(moe.shared_experts, norm, dtype) if moe.shared_experts is not None else None

    def route(self, normed):
        """Return n*K times (token, expert, weight) for (n, C), chosen as in modules/experts/router.py."""
        logits, pairs = torch.mm(normed, self.router), []
        scores = logits.softmax(1) if self.softmax else logits.sigmoid()
        for token, row in enumerate(scores.tolist()):
            choice = [score + bias for score, bias in zip(row, self.bias, strict=True)]
            best = sorted(range(len(row)), key=choice.__getitem__, reverse=True)[: self.chosen]
            total = sum([row[expert] for expert in best]) + 1e-20 if self.normed else 1.0
            pairs += [(token, expert, row[expert] / total * self.factor) for expert in best]
        return pairs

    def forward(self, work: Workspace):
        """Compute two products for each pair of token and expert."""
        pairs = self.route(work.normed)
        if self.shared is not None:
            self.shared.forward(work)
        _, gate, up, rows, gate_rows = work.gate_up(len(pairs), len(self.down[0]))
        for row, (token, expert, _) in zip(rows, pairs, strict=True):
            torch.mm(work.normed_rows[token], self.gate_up[expert], out=row)
        F.silu(gate, inplace=True).mul_(up)
        for row, (token, expert, weight) in zip(gate_rows, pairs, strict=True):
            work.hidden_rows[token].addmm_(row, self.down[expert], alpha=weight)


class FastLayer:
    """A `DecoderLayer`; arguments of `forward` as for `FastAttention`."""

    def __init__(self, layer, config, dtype):
        self.attention = FastAttention(layer.self_attn, layer.input_layernorm, config, dtype)
        norm = layer.post_attention_layernorm
        if isinstance(layer.mlp, MoE):
            self.mlp = FastMoE(layer.mlp, norm, config, dtype)
        else:
            self.mlp = FastMLP(layer.mlp, norm, dtype)

    def forward(self, work: Workspace, rotary, slot, seen):
        """Add the outputs of both blocks to `work.hidden`."""
        self.attention.forward(work, rotary, slot, seen)
        work.normalise()
        self.mlp.forward(work)
