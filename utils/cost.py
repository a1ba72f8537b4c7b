"""The cost of a model, from its settings alone: parameters, FLOPs, key/value cache and memory.

Conventions (Kaplan et al. 2001.08361, PaLM 2204.02311, appendix B). A weight used in a matrix product costs 2
FLOPs per token forward and 4 backward, so 6 in training; an embedding lookup costs none, nor do experts that
the token did not choose. Attention compares each query with the keys it may see: per layer and key 2 * H * D
FLOPs for the scores and as many for the weighted sum, each with its own D in latent attention; three times
that in training. A causal query sees T / 2 keys on average. Published numbers often count all T, which
`full_attention=True` gives. Recomputation does not count (these are model FLOPs, as in MFU). Latent attention
is counted in its expanded form, that of training and prefill.

Multi-token prediction has parameters and training FLOPs; a forward pass and the active parameters are those
of the model without it.
"""

from dataclasses import dataclass

from config.model import ModelConfig
from utils.parameter_groups import Group, head_widths, parameter_groups

FP32, BF16 = 4, 2  # bytes per number


@dataclass
class CostCard:
    """The numbers; `lines()` formats them for printing."""

    groups: dict[str, Group]
    layers: int
    mtp_layers: int  # with attention, in training only
    attention_width: int  # query heads times (head dim of queries and keys + head dim of values)
    sequence_length: int
    keys_seen: float  # by a query, on average
    kv_cache_numbers: int  # per token
    batch_tokens: int
    state_bytes: dict[str, int]  # weights, gradients, optimizer
    activation_bytes: int  # rough

    @property
    def parameters(self) -> int:
        """Count all parameters; tied embeddings count once."""
        return sum(group.total for group in self.groups.values())

    @property
    def active_parameters(self) -> int:
        """Count the parameters used for one token in a forward pass."""
        return sum(group.active for group in self.groups.values())

    @property
    def matmul_parameters(self) -> int:
        """Count the weights in matrix products for one token in a forward pass, the output head included."""
        return sum(group.multiplied for name, group in self.groups.items() if name != "mtp")

    def forward_flops(self, full_attention: bool = False) -> float:
        """Return the FLOPs per token of a forward pass over full sequences, causal or `full_attention`."""
        return 2 * self.matmul_parameters + self.attention_flops(self.layers, full_attention)

    def mtp_flops(self, full_attention: bool = False) -> float:
        """Return the FLOPs per token that multi-token prediction adds to the forward pass of training."""
        return 2 * self.groups["mtp"].multiplied + self.attention_flops(self.mtp_layers, full_attention)

    def attention_flops(self, layers: int, full_attention: bool) -> float:
        """Return the forward FLOPs per token of scores and weighted sums in this many layers."""
        keys = self.sequence_length if full_attention else self.keys_seen
        return 2 * layers * self.attention_width * keys

    def train_flops(self, full_attention: bool = False) -> float:
        """Return the FLOPs per token of a training step: forward, and twice as many backward."""
        return 3 * (self.forward_flops(full_attention) + self.mtp_flops(full_attention))

    def kv_cache_bytes(self, bytes_per_number: int = BF16) -> int:
        """Return the bytes of one token in the cache (of latents, in latent attention)."""
        return self.kv_cache_numbers * bytes_per_number

    def train_bytes(self) -> int:
        """Return the bytes to train: weights, gradients, optimizer and activations (rough) of a batch."""
        return sum(self.state_bytes.values()) + self.activation_bytes

    def lines(self) -> list[str]:
        """Return the lines of the card."""
        parts = ", ".join(f"{name} {group.total:,}" for name, group in self.groups.items() if group.total)
        state = ", ".join(f"{name} {size(count)}" for name, count in self.state_bytes.items())
        active = f", {self.active_parameters:,} active" if self.active_parameters != self.parameters else ""
        mtp = self.groups["mtp"].total
        second = f"mtp         {mtp:,} parameters, {flops(3 * self.mtp_flops())} per token: in training only"
        return [
            f"parameters  {self.parameters:,}{active} ({parts})",
            f"compute     {flops(self.train_flops())} per token to train, "
            + f"{flops(self.forward_flops())} forward (causal, sequences of {self.sequence_length})",
            *([second] if mtp else []),
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
    """Return the cost of training `config` on micro-batches of `batch_tokens` tokens.

    `config.vocab_size` must be set. `sequence_length` defaults to the maximum of the model. Weights,
    gradients and optimizer state are fp32; under mixed precision activations have 2 bytes per number.
    """
    length = sequence_length or config.max_position_embeddings
    groups = parameter_groups(config)
    total = sum(group.total for group in groups.values())
    # Adam keeps two moments of each parameter; Muon one of each matrix in the blocks, and Adam the rest
    moments = total + (sum(group.adam for group in groups.values()) if optimizer == "muon" else total)
    scores, values, cached = head_widths(config)
    return CostCard(
        groups=groups,
        layers=config.num_hidden_layers,
        mtp_layers=1 if config.mtp == "sequential" else 0,
        attention_width=config.num_attention_heads * (scores + values),
        sequence_length=length,
        keys_seen=keys_seen(length, config.sliding_window),
        kv_cache_numbers=config.num_hidden_layers * cached,
        batch_tokens=batch_tokens,
        state_bytes={"weights": FP32 * total, "gradients": FP32 * total, "optimizer": FP32 * moments},
        activation_bytes=batch_tokens * activation_numbers(config) * activation_bytes_per_number,
    )


def keys_seen(length: int, window: int | None) -> float:
    """Return the average number of keys that a causal query sees: T/2, or less in a sliding window."""
    if window is None or window >= length:
        return length / 2
    return window - window**2 / (2 * length)


def activation_numbers(config: ModelConfig) -> int:
    """Return roughly how many numbers per token are kept for the backward pass; kernels differ.

    Per layer: two norms keep input and output; attention keeps its output, and its projections before and
    after norm and rotation; SwiGLU keeps gate, up, SiLU and product. Each chosen expert keeps the same, and
    its rows of input and output. Then come logits and their probabilities, once per head.
    """
    C, H, L = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    width, values, cached = head_widths(config)
    if config.attention_kind == "mla":
        latents = 2 * (config.q_lora_rank or 0) + config.kv_lora_rank + cached
        attention = latents + 2 * H * width + H * (config.qk_nope_head_dim + values) + H * values
    else:
        keys = config.num_key_value_heads * width
        attention = (3 if config.qk_norm else 2) * (H * width + keys) + keys + H * width

    F, K = config.moe_intermediate_size, config.num_experts_per_tok
    experts = K * (2 * C + 4 * F) + 4 * config.n_shared_experts * F + 2 * config.n_routed_experts
    dense = 4 * config.intermediate_size
    layers = range(L + (config.mtp == "sequential"))
    blocks = sum(4 * C + attention + (experts if config.is_moe_layer(n) else dense) for n in layers)
    heads = 1 if config.mtp == "none" else 2
    extra = {"none": 0, "parallel": 4 * C, "sequential": 8 * C}[config.mtp]
    return blocks + extra + heads * 2 * config.vocab_size


def size(count: float) -> str:
    """Format bytes with a unit."""
    return scaled(count, 1024, ["bytes", "KiB", "MiB", "GiB", "TiB"])


def flops(count: float) -> str:
    """Format FLOPs with a unit."""
    return scaled(count, 1000, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"])


def scaled(count: float, base: int, units: list[str]) -> str:
    """Format `count` with the unit that leaves one to four digits before the point."""
    unit = 0
    while count >= base and unit < len(units) - 1:
        count, unit = count / base, unit + 1
    return f"{count:.4g} {units[unit]}"
