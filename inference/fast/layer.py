"""The parts of a decoder layer, prepared for one new token in each row (inference/fast/decoder.py).

    hidden (B, C) += attention(norm(hidden))        hidden (B, C) += feed_forward(norm(hidden))

Each part owns the memory for its intermediate results and all views of it, which `hold(B)` makes. Matrices
with the same input are stored as one, (in, out), with the gain of the preceding norm multiplied in, or as a
`QuantMatrix`, if they are quantised and large (inference/fast/quantized.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from inference.fast.quantized import each_product, quantized_experts, quantized_linears
from modules.attention.grouped_query import scores_of, weighted_sum
from modules.experts.grouped import products, sort_rows, take_rows
from modules.experts.router import choose_experts


class FastNorm:
    """RMSNorm into `out` (..., C), without the gain and C^0.5, which are in the next matrix."""

    def __init__(self, out, eps: float):
        self.out, self.lengths = out, out.new_empty(*out.shape[:-1], 1)
        self.root = torch.tensor((out.shape[-1] * eps) ** 0.5, dtype=out.dtype)

    def __call__(self, x):
        """Return x / (|x|^2 + C eps)^0.5; `hypot` is the root of a sum of squares."""
        torch.linalg.vector_norm(x, 2, -1, True, out=self.lengths)
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
    found = quantized_linears(linears, dtype, None if norm is None else gain(norm, dtype))
    if found is not None:
        return found
    return prepared(torch.cat([linear.weight for linear in linears]), dtype, norm)


def biases(linears, dtype):
    """Return their biases as one vector (sum of outs,), or None if they have none."""
    vectors = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(vectors).to(dtype) if vectors else None


def product(x, matrix, bias, out):
    """Write x (B, in) times matrix (in, out), plus the bias (out,) if there is one, into `out` (B, out)."""
    if not isinstance(matrix, torch.Tensor):
        out.copy_(matrix(x)) if bias is None else torch.add(matrix(x), bias, out=out)
    elif bias is None:
        torch.mm(x, matrix, out=out)
    else:
        torch.addmm(bias, x, matrix, out=out)


def add_product(hidden, x, matrix, alpha: float = 1.0):
    """Add x (B, in) times matrix (in, out) times alpha to `hidden` (B, out)."""
    if isinstance(matrix, torch.Tensor):
        hidden.addmm_(x, matrix, alpha=alpha)
    else:
        hidden.add_(matrix(x), alpha=alpha)


class Place(NamedTuple):
    """The place of the new token of each row, the same in all layers. One row needs the first two alone."""

    cos: torch.Tensor  # (D,) for one row, or (B, 1, D)
    sin: torch.Tensor
    slots: torch.Tensor | None = None  # (n*2*G,), of new keys and values in `store`, for n rows that go on
    rows: torch.Tensor | None = None  # (n,), those rows; None: all
    bias: torch.Tensor | None = None  # (B, 1, 1, S), 0 for a row's own tokens, -inf for other slots


class FastAttention:
    """Grouped-query attention. `partner` (D,): with which channel each one rotates."""

    def __init__(self, attention, norm, config, dtype, partner):
        self.H, self.G, self.D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        linears, last = [attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]
        self.qkv, self.qkv_bias = joined(linears, dtype, norm), biases(linears, dtype)
        self.out, self.out_bias, self.partner = joined(last, dtype), biases(last, dtype), partner
        self.eps, self.gains, self.dtype = config.rms_norm_eps, None, dtype
        if config.qk_norm:
            gains = [gain(attention.q_norm, dtype)] * self.H + [gain(attention.k_norm, dtype)] * self.G
            self.gains = torch.stack(gains)  # (H+G, D)

    def hold(self, B: int) -> None:
        """Make the memory for B rows."""
        H, G, D = self.H, self.G, self.D
        heads = torch.empty(B, H + 2 * G, D, dtype=self.dtype)
        self.rows, self.turned_rows = heads.view(-1, D), torch.empty_like(heads).view(-1, D)
        self.heads, self.q = heads.view(B, -1), heads[:, :H, None]  # (B, H, 1, D)
        self.qk, self.turned = heads[:, : H + G], self.turned_rows.view_as(heads)[:, : H + G]
        self.kv = heads[:, H:].unflatten(1, (2, G))  # (B, 2, G, D)
        self.norm = FastNorm(self.qk, self.eps)

    def add(self, hidden, normed, place: Place, store, seen):
        """Add the output for `normed` to `hidden`, both (B, C).

        store: for one row, the slot (1, 2, G, D) of its new key and value; for several, all slots of the
        layer, (slots, D). seen (2, B, G, S, D): keys and values to attend to, the new ones included. With a
        quantised cache, store is its `append`, which returns them, and seen is None.
        """
        product(normed, self.qkv, self.qkv_bias, self.heads)
        if self.gains is not None:
            self.norm(self.qk).mul_(self.gains)
        torch.index_select(self.rows, 1, self.partner, out=self.turned_rows)
        self.qk.mul_(place.cos).addcmul_(self.turned, place.sin)
        if seen is None:
            seen = store(*self.kv[:, :, :, None].unbind(1))  # (B, G, 1, D) -> (B, G, S, D) each
        elif place.bias is None:
            store.copy_(self.kv)
        else:
            new = self.kv if place.rows is None else self.kv.index_select(0, place.rows)
            store.index_copy_(0, place.slots, new.reshape(-1, self.D).to(store.dtype))
        keys, values = (part.to(hidden.dtype) for part in seen)  # (B, G, S, D) each
        if place.bias is None:
            attended = F.scaled_dot_product_attention(self.q, keys, values, enable_gqa=True)
        else:
            scores = scores_of(self.q, keys, self.D**-0.5).add_(place.bias)  # (B, H, 1, S)
            attended = weighted_sum(scores.softmax(dim=-1), values)
        add_product(hidden, attended.view(len(hidden), -1), self.out)  # (B, H, 1, D) -> (B, H*D)
        if self.out_bias is not None:
            hidden.add_(self.out_bias)


class FastMLP:
    """SwiGLU. `gate`: the layer that scales the output of shared experts, which have no biases."""

    def __init__(self, mlp, norm, dtype, gate=None):
        linears, last = [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
        self.gate_up, self.bias = joined(linears, dtype, norm), biases(linears, dtype)  # (C, 2F), (2F,)
        self.down, self.down_bias = joined(last, dtype), biases(last, dtype)
        self.factor = None if gate is None else joined([gate], dtype, norm)  # (C, 1)
        self.width, self.dtype = mlp.gate_proj.out_features, dtype

    def hold(self, B: int) -> None:
        """Make the memory for B rows."""
        self.both = torch.empty(B, 2 * self.width, dtype=self.dtype)
        self.gate, self.up = self.both.chunk(2, dim=1)

    def add(self, hidden, normed):
        """Add the output for `normed` to `hidden`, both (B, C)."""
        product(normed, self.gate_up, self.bias, self.both)
        inner = F.silu(self.gate, inplace=True).mul_(self.up)  # (B, F)
        if self.factor is not None:
            inner.mul_(torch.mm(normed, self.factor).sigmoid_())
        add_product(hidden, inner, self.down)
        if self.down_bias is not None:
            hidden.add_(self.down_bias)


class FastMoE:
    """Mixture of experts: for many rows one product of all experts, or one of each as in training.

    For one row, each expert is two products, with the router's weight as the factor of the second, and
    experts are chosen in plain Python: sorting E numbers takes less time than PyTorch's calls.
    """

    def __init__(self, moe, norm, config, dtype):
        self.config, self.chosen = config, config.num_experts_per_tok
        self.router = prepared(moe.gate.weight, dtype, norm)  # (C, E)
        self.bias = moe.gate.e_score_correction_bias.clone()
        self.bias_list = self.bias.tolist()
        self.quantized = quantized_experts(moe.experts, dtype, gain(norm, dtype))
        self.gate_up, self.down = self.quantized or (
            prepared(moe.experts.gate_up_proj, dtype, norm),  # (E, C, 2F)
            prepared(moe.experts.down_proj, dtype),  # (E, F, C)
        )
        self.each = list(zip(self.gate_up, self.down, strict=True))
        gate, shared = moe.shared_expert_gate, moe.shared_experts
        self.shared = FastMLP(shared, norm, dtype, gate) if shared is not None else None
        both = torch.empty(self.chosen, 2 * config.moe_intermediate_size, dtype=dtype)
        self.gate, self.up = both.chunk(2, dim=1)
        self.rows, self.gate_rows = both.split(1), self.gate.split(1)

    def hold(self, B: int) -> None:
        """Make the memory for B rows."""
        if self.shared is not None:
            self.shared.hold(B)

    def route(self, normed) -> list[tuple[int, float]]:
        """Return (expert, weight) K times for one row, chosen as in modules/experts/router.py."""
        logits, config = torch.mm(normed, self.router), self.config
        scores = (logits.softmax(1) if config.scoring_func == "softmax" else logits.sigmoid())[0].tolist()
        choice = [score + bias for score, bias in zip(scores, self.bias_list, strict=True)]
        best = sorted(range(len(scores)), key=choice.__getitem__, reverse=True)[: self.chosen]
        total = sum([scores[expert] for expert in best]) + 1e-20 if config.norm_topk_prob else 1.0
        return [(expert, scores[expert] / total * config.routed_scaling_factor) for expert in best]

    def add(self, hidden, normed):
        """Add the output for `normed` to `hidden`, both (1, C)."""
        routes = self.route(normed)
        if self.shared is not None:
            self.shared.add(hidden, normed)
        for row, (expert, _) in zip(self.rows, routes, strict=True):
            product(normed, self.each[expert][0], None, row)
        F.silu(self.gate, inplace=True).mul_(self.up)
        for row, (expert, weight) in zip(self.gate_rows, routes, strict=True):
            add_product(hidden, row, self.each[expert][1], weight)

    def add_many(self, hidden, normed):
        """Add the output for `normed` to `hidden`, both (B, C); return the `Routing`."""
        routing = choose_experts(torch.mm(normed, self.router), self.bias, self.config)
        if self.shared is not None:
            self.shared.add(hidden, normed)
        even = None if self.quantized else even_rows(routing.indices, len(self.each))
        if even is not None:
            position, token = even
            rows = F.embedding(token, normed)  # (E, M, C)
            gate, up = torch.bmm(rows, self.gate_up).chunk(2, dim=2)  # (E, M, F) each
            out = torch.bmm(F.silu(gate, inplace=True).mul_(up), self.down).flatten(0, 1)  # (E*M, C)
        else:
            position, *_, sizes = rows = sort_rows(routing.indices, len(self.each))
            multiply = each_product if self.quantized else products
            gate, up = multiply(take_rows(normed, rows), self.gate_up, sizes).chunk(2, dim=1)  # (P, F) each
            out = multiply(F.silu(gate, inplace=True).mul_(up), self.down, sizes)
        hidden.add_(F.embedding_bag(position, out, mode="sum", per_sample_weights=routing.weights))
        return routing


def even_rows(indices, experts: int):
    """Give each expert as many rows as the busiest, M, so that one batched product does them all.

    indices (N, K) -> position (N, K) of each assignment among the E*M rows, and token (E, M) of each row, 0
    for blank ones. None if experts are idle anyway, or if the busiest has far more rows than the mean.
    """
    (N, K), flat = indices.shape, indices.flatten()
    mean, mine = N * K / experts, flat[:, None]  # (), (N*K, 1)
    rank = flat.new_zeros(N * K, experts).scatter_(1, mine, 1).cumsum(0).gather(1, mine)[:, 0]  # from 1
    M = min(-(-int(rank.max()) // 8) * 8, N)  # a multiple of 8: oneDNN prepares a kernel for each shape
    if mean < 1 or 3 * mean + 8 < M:
        return None
    position = rank.add_(flat, alpha=M).sub_(1)
    token = flat.new_zeros(experts * M).scatter_(0, position, torch.arange(N * K) // K)
    return position.view(N, K), token.view(experts, M)
