"""Predict activation memory: the bytes that the forward pass keeps for the backward pass, kernel by kernel.

Hand-written kernels keep what they pass to `save_for_backward`; PyTorch's kernels keep the inputs that their
derivatives need. The residual stream, the statistics and the router are fp32; products have the autocast
dtype, `wide` bytes per number. A test compares the sum with what autograd keeps. `torch.compile` keeps less.

With gradient checkpointing (modules/checkpointing.py) a layer keeps its input. Memory is then largest either
at the end of the forward pass, in the output head, or while the backward pass runs a layer once more: by then
what the head kept is gone, and the layer's own gradients, small beside all layers, count beside one.
"""

from typing import NamedTuple

from config.model import ModelConfig

FP32, INT64 = 4, 8  # bytes per number
BLOCK = 64  # queries, as in modules/attention/blocked.py
LONG = 2**21  # numbers in a mask, as in modules/attention/grouped_query.py
CHUNK_BLOCK = 128  # the same in modules/attention/dual_chunk.py
CHUNK = {"cpu": 256, "cuda": 4096}  # as in modules/cross_entropy.py: tokens whose logits are held at a time


class MicroBatch(NamedTuple):
    """The shape of a forward pass's input, the bytes per number in its products, the kind of device, and
    whether layers are recomputed."""

    rows: int
    length: int
    wide: int = FP32
    device: str = "cpu"
    checkpointed: bool = False


def head_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return the head dim of queries and keys, that of values, and the numbers cached per token and layer."""
    if config.attention_kind == "mla":
        scores = config.qk_nope_head_dim + config.qk_rope_head_dim
        return scores, config.v_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    return config.head_dim, config.head_dim, 2 * config.num_key_value_heads * config.head_dim


def kept_bytes(config: ModelConfig, batch: MicroBatch, matrices: float, heads: int = 2) -> int:
    """Return the bytes that a forward pass with labels keeps. `matrices`: the numbers in all matrices;
    `heads`: of the output heads that the model has, count so many."""
    C, wide = config.hidden_size, batch.wide
    heads = min(heads, 1 if config.mtp == "none" else 2)
    mtp = {"none": 0, "parallel": 3 * C * wide + FP32, "sequential": INT64 + FP32 * (C + 3) + 4 * C * wide}
    per_token = {
        "ids": INT64,
        "layers": sum(layer_bytes(config, batch, n) for n in layers(config)),
        "final norm, and gradients of the heads' inputs": (heads > 0) * FP32 * (C + 1) + heads * C * wide,
        "inputs of multi-token prediction, and their norms": (heads > 0) * mtp[config.mtp],
    }
    once = {
        "cos and sin": 2 * FP32 * batch.length * config.rotary_dim * kept_chunks(config, batch.length)[2],
        "gradients of the heads": heads * FP32 * config.vocab_size * C,
        "matrices in the dtype of autocast": wide * matrices if wide < FP32 else 0,
    }
    return int(batch.rows * batch.length * sum(per_token.values()) + sum(once.values()))


def recompute_bytes(config: ModelConfig, batch: MicroBatch, matrices: float) -> int:
    """Return the bytes that exist while the backward pass runs the largest layer again; 0 if it runs none.

    By then it has used what the head keeps, or the second head if its layer (sequential MTP) is run again.
    """
    if not batch.checkpointed:
        return 0
    again = max(sum(layer_table(config, batch, n).values()) + gradients(config, batch, n)
                for n in layers(config))  # fmt: skip
    held = kept_bytes(config, batch, matrices / len(layers(config)), heads=config.mtp == "sequential")
    return held + int(batch.rows * batch.length * again)


def gradients(config: ModelConfig, batch: MicroBatch, layer: int) -> float:
    """Return the bytes per token of gradients while most of the layer is kept: those of the residual stream
    and inside the feed-forward, or of scores if they are many, when the feed-forward's are gone."""
    C, F, K, wide = config.hidden_size, config.intermediate_size, config.num_experts_per_tok, batch.wide
    stream, inner, kept = (FP32 + wide) * C, 2 * F, 4 * F
    if config.is_moe_layer(layer):
        F = config.moe_intermediate_size
        inner, kept = K * (C + 2 * F), 4 * (K * F + config.shared_width)
    keys = kept_keys(config, batch, layer)
    scores = 2 * config.num_attention_heads * keys if keys == batch.length else 0  # blocks need few at a time
    return stream + wide * max(inner, scores - kept)


def layers(config: ModelConfig) -> range:
    """Return the numbers of all layers, the sequential MTP block last."""
    return range(config.num_hidden_layers + (config.mtp == "sequential"))


def layer_bytes(config: ModelConfig, batch: MicroBatch, layer: int) -> float:
    """Return the bytes per token that a layer keeps: of all its kernels, or with gradient checkpointing its
    input, and the router's scores, which the balance loss reads."""
    if not batch.checkpointed:
        return sum(layer_table(config, batch, layer).values())
    width = FP32 if layer < config.num_hidden_layers else batch.wide
    return width * config.hidden_size + FP32 * config.n_routed_experts * config.is_moe_layer(layer)


def layer_table(config: ModelConfig, batch: MicroBatch, layer: int) -> dict[str, float]:
    """Return the bytes per token of each kernel of a layer, in order; both norms share one entry."""
    C, H, G, wide = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, batch.wide
    scores, values, latents = head_widths(config)
    keys = kept_keys(config, batch, layer)
    residual = FP32 if layer < config.num_hidden_layers else wide  # the sequential MTP block's is not
    table = {"norms: input, statistic, output": 2 * (C * residual + FP32 + C * wide)}
    if config.attention_kind == "mla":
        rank = config.q_lora_rank or 0
        stored = values if keys else config.qk_nope_head_dim + values  # keys and values may be one tensor
        table["latents before and after their norms"] = 2 * wide * (rank + latents) + FP32 * (1 + bool(rank))
        table["queries, keys, values, output"] = wide * H * (2 * scores + stored + values)
    else:
        table["QK-norm: input, statistic"] = config.qk_norm * (H + G) * (wide * scores + FP32)
        table["queries, keys, values, output"] = wide * 2 * (H + G) * scores
    table["probabilities, or the sums of their rows"] = H * (wide * keys or FP32)
    if config.dual_chunk_attention_config:
        keys, parts, _ = kept_chunks(config, batch.length)
        table["probabilities, or the sums of their rows"] = H * keys * (FP32 + wide * (wide < FP32))
        table["queries for further chunks"] = wide * H * scores * (parts - 1)
        table["partial outputs, before and after division, and sums"] = H * parts * (wide + FP32) * scores
        table["partial sums, shares"] = H * parts * 2 * FP32
    fused = not keys and attention_path(config, batch, layer)[0] != "flash"  # PyTorch's keep the whole mask
    if fused and config.layer_reach(layer, batch.length) < batch.length:
        table["mask"] = wide * batch.length / batch.rows
    if not config.is_moe_layer(layer):
        return table | {"gate, up, SiLU, their product": 4 * wide * config.intermediate_size}
    F, E, K = config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok
    return table | {
        "router: input, scores": (FP32 * C if wide < FP32 else 0) + FP32 * E,
        "chosen experts, rows, weights": 3 * INT64 * K + K * wide + FP32 * (K + 1) * config.norm_topk_prob,
        "routed: gate, up, SiLU, their product": K * 4 * wide * F,
        "shared: gate, up, SiLU, their product": 4 * wide * config.shared_width,
        "shared: output and its factor": config.shared_expert_gate * wide * (C + 1),
    }


def kept_keys(config: ModelConfig, batch: MicroBatch, layer: int) -> float:
    """Return how many keys per query the layer keeps probabilities for: 0 in fused kernels and flash.py."""
    name, whole = attention_path(config, batch, layer)
    length, cpu = batch.length, batch.device == "cpu"
    if name == "blocked" and whole:
        stops = [min(start + BLOCK, length) for start in range(0, length, BLOCK)]
        return sum(stop * ((stop - 1) % BLOCK + 1) for stop in stops) / length
    scores, values, _ = head_widths(config)
    plain = cpu and scores != values and name != "flash"  # the fused CPU kernel needs them equal
    return length if name in ("eager", "blocked") or plain else 0


def attention_path(config: ModelConfig, batch: MicroBatch, layer: int) -> tuple[str, bool]:
    """Return the path of `attend` (grouped_query.py), and whether the layer sees whole rows."""
    name, length = config.attn_implementation, batch.length
    whole = config.layer_reach(layer, length) >= length
    if name == "auto" and batch.device == "cpu":
        short = "eager" if batch.wide < FP32 else "sdpa"
        name = "blocked" if whole else short if length**2 < LONG else "flash"
    return name, whole


def kept_chunks(config: ModelConfig, length: int) -> tuple[float, float, int]:
    """Return the keys per query, and the partial attentions per query on average and at most, in dual chunk
    attention; another kind is one chunk."""
    sizes = config.dual_chunk_attention_config
    stride = sizes["chunk_size"] - sizes["local_size"] if sizes else length
    start = keys = parts = 0
    while start < length:
        chunk = start // stride
        stop, merged = min(length, chunk * stride + stride, start + CHUNK_BLOCK), min(chunk + 1, 3)
        keys += (stop - start) * stop
        parts += (stop - start) * merged
        start = stop
    return keys / length, parts / length, merged


def head_bytes(config: ModelConfig, batch: MicroBatch) -> int:
    """Return the extra bytes that the output head needs: a chunk of logits as computed, in fp32 and as
    log-probabilities, the previous chunk's gradients, and hidden states and weights cast for the products."""
    tokens, cast = batch.rows * batch.length, batch.wide < FP32
    chunk, V = min(tokens, CHUNK.get(batch.device, CHUNK["cuda"])), config.vocab_size
    per_logit = batch.wide + FP32 + cast * FP32 + (FP32 + cast * batch.wide) * (chunk < tokens)
    return chunk * V * per_logit + batch.wide * config.hidden_size * (tokens + cast * V)
