"""What a model costs, from its settings alone: parameters, FLOPs, key/value cache and memory.

Conventions (Kaplan et al. 2001.08361, PaLM 2204.02311, appendix B). A weight used in a matrix product costs 2
FLOPs per token forward and 4 backward, so 6 in training; an embedding is looked up and costs none. Attention
compares each query with the keys it may see: per layer and key 2 * H * D FLOPs for the scores and as many for
the weighted sum, 12 * H * D in training. A causal query sees T / 2 keys on average. Published numbers often
count all T: the card gives that too (`full_attention=True`). Recomputation does not count (that is model
FLOPs, as in MFU).
"""

from dataclasses import dataclass

from config.schema import ModelConfig

FP32, BF16 = 4, 2  # bytes per number


@dataclass
class Group:
    """One part of the model, all layers together. Numbers of parameters."""

    total: int
    active: int  # used for one token; less than `total` with a mixture of experts
    multiplied: int  # used for one token in matrix products: these cost FLOPs


@dataclass
class CostCard:
    """The numbers, and `lines()` to print them."""

    groups: dict[str, Group]
    layers: int
    attention_width: int  # H * D, query heads times head dim
    sequence_length: int
    keys_seen: float  # by a query, on average
    kv_cache_numbers: int  # per token
    batch_tokens: int
    state_bytes: dict[str, int]  # weights, gradients, optimizer
    activation_bytes: int  # rough

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return sum(group.total for group in self.groups.values())

    @property
    def active_parameters(self) -> int:
        """Parameters used for one token."""
        return sum(group.active for group in self.groups.values())

    @property
    def matmul_parameters(self) -> int:
        """Weights used in matrix products for one token, the output head included."""
        return sum(group.multiplied for group in self.groups.values())

    def forward_flops(self, full_attention: bool = False) -> float:
        """FLOPs per token of a forward pass over full sequences; causal attention unless `full_attention`."""
        keys = self.sequence_length if full_attention else self.keys_seen
        return 2 * self.matmul_parameters + 4 * self.layers * self.attention_width * keys

    def train_flops(self, full_attention: bool = False) -> float:
        """FLOPs per token of a training step: forward, and twice as many backward."""
        return 3 * self.forward_flops(full_attention)

    def kv_cache_bytes(self, bytes_per_number: int = BF16) -> int:
        """Bytes that one token takes in the key/value cache."""
        return self.kv_cache_numbers * bytes_per_number

    def train_bytes(self) -> int:
        """Memory to train: weights, gradients, optimizer state and (rough) activations of a micro-batch."""
        return sum(self.state_bytes.values()) + self.activation_bytes

    def lines(self) -> list[str]:
        """The card, ready to print."""
        parts = ", ".join(f"{name} {group.total:,}" for name, group in self.groups.items() if group.total)
        state = ", ".join(f"{name} {size(count)}" for name, count in self.state_bytes.items())
        active = f", {self.active_parameters:,} active" if self.active_parameters != self.parameters else ""
        return [
            f"parameters  {self.parameters:,}{active} ({parts})",
            f"compute     {flops(self.train_flops())} per token to train, "
            + f"{flops(self.forward_flops())} forward (causal, sequences of {self.sequence_length})",
            f"kv cache    {size(self.kv_cache_bytes(BF16))} per token in bf16, "
            + f"{size(self.kv_cache_bytes(FP32))} in fp32",
            f"memory      {size(self.train_bytes())} to train ({state}, activations of {self.batch_tokens:,} "
            + f"tokens about {size(self.activation_bytes)})",
        ]


def cost_card(
    config: ModelConfig,
    batch_tokens: int,
    sequence_length: int | None = None,
    optimizer: str = "adamw",
    activation_bytes_per_number: int = FP32,
) -> CostCard:
    """The cost of training `config` on micro-batches of `batch_tokens` tokens.

    `config.vocab_size` must be filled in. `sequence_length` defaults to the longest the model takes. Weights,
    gradients and optimizer state are fp32; under mixed precision the activations have 2 bytes per number.
    """
    length = sequence_length or config.max_position_embeddings
    groups = parameter_groups(config)
    blocks = groups["attention"].multiplied + groups["feed-forward"].multiplied
    total = sum(group.total for group in groups.values())
    # Adam keeps two moments of each parameter; Muon one of each matrix in the blocks, and Adam the rest
    moments = 2 * total - (blocks if optimizer == "muon" else 0)
    return CostCard(
        groups=groups,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * config.head_dim,
        sequence_length=length,
        keys_seen=keys_seen(length, config.sliding_window),
        kv_cache_numbers=2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
        batch_tokens=batch_tokens,
        state_bytes={"weights": FP32 * total, "gradients": FP32 * total, "optimizer": FP32 * moments},
        activation_bytes=batch_tokens * activation_numbers(config) * activation_bytes_per_number,
    )


def parameter_groups(config: ModelConfig) -> dict[str, Group]:
    """Parameters by part of the model: embedding, attention, feed-forward, norms, head."""
    C, L, V, D = config.hidden_size, config.num_hidden_layers, config.vocab_size, config.head_dim
    HD, GD = config.num_attention_heads * D, config.num_key_value_heads * D
    attention = L * (C * HD + 2 * C * GD + HD * C)
    biases = L * (HD + 2 * GD + C) if config.attention_bias else 0
    feed_forward = L * 3 * C * config.intermediate_size
    norms = L * (2 * C + (2 * D if config.qk_norm else 0)) + C
    head = V * C  # tied, its weights are those of the embedding; the product has to be done all the same
    own_head = 0 if config.tie_word_embeddings else head
    return {
        "embedding": Group(V * C, V * C, 0),
        "attention": Group(attention + biases, attention + biases, attention),
        "feed-forward": Group(feed_forward, feed_forward, feed_forward),
        "norms": Group(norms, norms, 0),
        "head": Group(own_head, own_head, head),
    }


def keys_seen(length: int, window: int | None) -> float:
    """How many keys a causal query sees on average over a sequence: T/2, or less within a sliding window."""
    if window is None or window >= length:
        return length / 2
    return window - window**2 / (2 * length)


def activation_numbers(config: ModelConfig) -> int:
    """Numbers per token that are kept for the backward pass, roughly: which ones a kernel keeps differs.

    Per layer: two norms keep input and output, attention keeps its projections before and after norm and
    rotation and its output, SwiGLU keeps gate, up, SiLU and product. Then logits and their probabilities.
    """
    HD = config.num_attention_heads * config.head_dim
    GD = config.num_key_value_heads * config.head_dim
    norms = 4 * config.hidden_size
    attention = (3 if config.qk_norm else 2) * (HD + GD) + GD + HD
    feed_forward = 4 * config.intermediate_size
    return config.num_hidden_layers * (norms + attention + feed_forward) + 2 * config.vocab_size


def size(count: float) -> str:
    """Bytes with a unit."""
    return scaled(count, 1024, ["bytes", "KiB", "MiB", "GiB", "TiB"])


def flops(count: float) -> str:
    """FLOPs with a unit."""
    return scaled(count, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"])


def scaled(count: float, base: int, units: list[str]) -> str:
    """`count` with the unit that leaves one to four digits before the point."""
    unit = 0
    while count >= base and unit < len(units) - 1:
        count, unit = count / base, unit + 1
    return f"{count:.4g} {units[unit]}"
