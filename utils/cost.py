"""The cost of a model, from its shapes and settings alone: parameters, FLOPs, key/value cache and memory.

Conventions (Kaplan et al. 2001.08361, PaLM 2204.02311, appendix B). A weight used in a matrix product costs 2
FLOPs per token forward and 4 backward, so 6 in training; an embedding lookup costs none, nor do experts that
the token did not choose. Attention compares each query with the keys it may see: per layer and key 2 * H * D
FLOPs for the scores and as many for the weighted sum, each with its own D in latent attention; three times
that in training. A causal query sees T / 2 keys on average; published numbers often count all T.
Recomputation does not count (these are model FLOPs, as in MFU). Latent attention is counted in its expanded
form, that of training and prefill. Multi-token prediction adds parameters and training FLOPs only, no active
parameters.
"""

import math
from dataclasses import dataclass

from torch import nn

from config.model import ModelConfig

FP32, BF16 = 4, 2  # bytes per number
PARTS = {  # of the model, each by a word in the names of its parameters; the first that fits
    "mtp.": "mtp", "embed_tokens": "embedding", "norm": "norms", "self_attn": "attention",
    "shared_experts": "shared experts", "experts": "routed experts", ".gate.": "router",
    "mlp": "feed-forward", "lm_head": "head",
}  # fmt: skip


@dataclass
class Group:
    """Parameter counts of one part of the model, summed over layers."""

    total: int = 0
    active: int = 0  # used for one token; less than `total` with a mixture of experts
    multiplied: int = 0  # used for one token in matrix products, which cost FLOPs
    adam: int = 0  # trained by Adam under Muon: gains, biases, tables of vectors


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

    def forward_flops(self) -> float:
        """Return the FLOPs per token of a forward pass over full sequences."""
        return 2 * self.matmul_parameters + 2 * self.layers * self.attention_width * self.keys_seen

    def mtp_flops(self) -> float:
        """Return the FLOPs per token that multi-token prediction adds to the forward pass of training."""
        attention = self.mtp_layers * self.attention_width * self.keys_seen
        return 2 * (self.groups["mtp"].multiplied + attention)

    def train_flops(self) -> float:
        """Return the FLOPs per token of a training step: forward, and twice as many backward."""
        return 3 * (self.forward_flops() + self.mtp_flops())

    def kv_cache_bytes(self, bytes_per_number: int = BF16) -> int:
        """Return the bytes of one token in the cache (of latents, in latent attention)."""
        return self.kv_cache_numbers * bytes_per_number

    def lines(self) -> list[str]:
        """Return the lines of the card."""
        parts = ", ".join(f"{name} {group.total:,}" for name, group in self.groups.items() if group.total)
        state = ", ".join(f"{name} {size(count)}" for name, count in self.state_bytes.items())
        active = f", {self.active_parameters:,} active" if self.active_parameters != self.parameters else ""
        extra = f"{self.groups['mtp'].total:,} parameters, {flops(3 * self.mtp_flops())} per token"
        return [
            f"parameters  {self.parameters:,}{active} ({parts})",
            f"compute     {flops(self.train_flops())} per token to train, "
            + f"{flops(self.forward_flops())} forward (causal, sequences of {self.sequence_length})",
            *([f"mtp         {extra}: in training only"] if self.groups["mtp"].total else []),
            f"kv cache    {size(self.kv_cache_bytes(BF16))} per token in bf16, "
            + f"{size(self.kv_cache_bytes(FP32))} in fp32",
            f"memory      {size(sum(self.state_bytes.values()) + self.activation_bytes)} to train ({state}, "
            + f"activations of {self.batch_tokens:,} tokens about {size(self.activation_bytes)})",
        ]


def cost_card(
    model: nn.Module, batch_tokens: int, sequence_length: int | None = None, optimizer: str = "adamw"
) -> CostCard:
    """Return the cost of training `model`, which may be on the meta device, with all numbers in fp32.

    `batch_tokens` is the size of a micro-batch; `sequence_length` defaults to the maximum of the model.
    """
    config, groups = model.config, parameter_groups(model)
    length = sequence_length or config.max_position_embeddings
    window = min(config.sliding_window or length, length)
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
        keys_seen=window - window**2 / (2 * length),  # without a window: length / 2
        kv_cache_numbers=config.num_hidden_layers * cached,
        batch_tokens=batch_tokens,
        state_bytes={"weights": FP32 * total, "gradients": FP32 * total, "optimizer": FP32 * moments},
        activation_bytes=FP32 * batch_tokens * activation_numbers(config),
    )


def parameter_groups(model: nn.Module) -> dict[str, Group]:
    """Return the parameters of each part of the model. The bias of a router is none: no gradient moves it."""
    config, groups = model.config, {part: Group() for part in PARTS.values()}
    for name, parameter in model.named_parameters():
        part = next(part for word, part in PARTS.items() if word in name)
        group, count = groups[part], parameter.numel()
        routed, table = ".experts." in name, any(word in name for word in ("embed", "lm_head", ".gate."))
        chosen = count * config.num_experts_per_tok // config.n_routed_experts if routed else count
        group.total += count
        group.active += 0 if part == "mtp" else chosen
        group.multiplied += chosen if parameter.dim() > 1 and part != "embedding" else 0
        group.adam += count if parameter.dim() < 2 or table else 0
    table = model.lm_head.weight.numel()
    groups["head"].multiplied = table  # also if it is tied: its product is computed all the same
    groups["mtp"].multiplied += 0 if config.mtp == "none" else table  # it uses the output head again
    return groups


def head_widths(config: ModelConfig) -> tuple[int, int, int]:
    """Return head dim of queries and keys, head dim of values, and numbers per token in one layer's cache."""
    if config.attention_kind == "mla":
        scores = config.qk_nope_head_dim + config.qk_rope_head_dim
        return scores, config.v_head_dim, config.kv_lora_rank + config.qk_rope_head_dim
    return config.head_dim, config.head_dim, 2 * config.num_key_value_heads * config.head_dim


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
    """Format bytes with the unit that leaves one to four digits before the point."""
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    return f"{count / 1024**power:.4g} {['bytes', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def flops(count: float) -> str:
    """Format FLOPs with the unit that leaves one to three digits before the point."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:.4g} {['', 'k', 'M', 'G', 'T'][power]}FLOP"
