"""Parameter counts of a model, part by part, from its settings alone.

Names and shapes are those of Hugging Face's Qwen3, Dots1 and DeepSeek-V3. The bias of the router is not a
parameter: counting moves it, not a gradient.
"""

from dataclasses import dataclass, fields

from config.model import ModelConfig


@dataclass
class Group:
    """Parameter counts of one part of the model, summed over layers."""

    total: int = 0
    active: int = 0  # used for one token; less than `total` with a mixture of experts
    multiplied: int = 0  # used for one token in matrix products, which cost FLOPs
    adam: int = 0  # trained by Adam under Muon: gains, biases, tables of vectors

    def __add__(self, other: "Group") -> "Group":
        return Group(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(Group)))


def matrices(count: int) -> Group:
    """Count weights of a matrix product that every token passes."""
    return Group(count, count, count)


def vectors(count: int) -> Group:
    """Count gains and biases."""
    return Group(count, count, 0, count)


def head_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return head dim of queries and keys, head dim of values, and numbers per token in one layer's cache."""
    if config.attention_kind == "mla":
        scores = config.qk_nope_head_dim + config.qk_rope_head_dim
        return scores, config.v_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    return config.head_dim, config.head_dim, 2 * config.num_key_value_heads * config.head_dim


def parameter_groups(config: ModelConfig) -> dict[str, Group]:
    """Return the parameters of each part of the model, summed over layers."""
    C, table = config.hidden_size, config.vocab_size * config.hidden_size
    names = ["attention", "feed-forward", "shared experts", "routed experts", "router", "mtp", "norms"]
    groups = {"embedding": Group(table, table, 0, table), **{name: Group() for name in names}}
    for layer in range(config.num_hidden_layers):
        for name, group in layer_groups(config, layer).items():
            groups[name] += group
    groups["norms"] += vectors(C)
    groups["mtp"] = mtp_group(config)
    own_head = 0 if config.tie_word_embeddings else table
    # a tied head shares the weights of the embedding, but its product is computed all the same
    return groups | {"head": Group(own_head, own_head, table, own_head)}


def layer_groups(config: ModelConfig, layer: int) -> dict[str, Group]:
    """Return the parameters of one decoder layer."""
    C, E = config.hidden_size, config.n_routed_experts
    attend = latent_attention if config.attention_kind == "mla" else grouped_attention
    attention, gains = attend(config)
    groups = {"attention": attention, "norms": vectors(2 * C + gains)}
    if not config.is_moe_layer(layer):
        return groups | {"feed-forward": matrices(3 * C * config.intermediate_size)}
    expert = 3 * C * config.moe_intermediate_size
    chosen = config.num_experts_per_tok * expert
    return groups | {
        "shared experts": matrices(config.n_shared_experts * expert),
        "routed experts": Group(E * expert, chosen, chosen),
        "router": Group(E * C, E * C, E * C, E * C),  # a vector for each expert
    }


def grouped_attention(config: ModelConfig) -> tuple[Group, int]:
    """Return one layer's projections, and the number of gains of QK-norm."""
    C, D = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * D, config.num_key_value_heads * D
    biases = queries + 2 * keys + C if config.attention_bias else 0
    return matrices(2 * C * queries + 2 * C * keys) + vectors(biases), 2 * D if config.qk_norm else 0


def latent_attention(config: ModelConfig) -> tuple[Group, int]:
    """Return one layer's projections, and the number of gains of the norms of the latents."""
    C, H = config.hidden_size, config.num_attention_heads
    rank, q_rank = config.kv_lora_rank, config.q_lora_rank or 0
    width, values, cached = head_widths(config)
    queries = (C + H * width) * q_rank if q_rank else C * H * width
    weights = queries + C * cached + rank * H * (config.qk_nope_head_dim + values) + H * values * C
    biases = q_rank + cached + C if config.attention_bias else 0
    return matrices(weights) + vectors(biases), q_rank + rank


def mtp_group(config: ModelConfig) -> Group:
    """Count the second head: used in training only, where it also uses the output head again."""
    C = config.hidden_size
    block = Group()
    if config.mtp == "parallel":
        block = matrices(C * C) + vectors(C)
    if config.mtp == "sequential":
        layer = layer_groups(config, config.num_hidden_layers).values()
        block = sum(layer, matrices(2 * C * C) + vectors(3 * C))
    head = config.vocab_size * C if config.mtp != "none" else 0
    return Group(block.total, 0, block.multiplied + head, block.adam)
