"""The cost of a model, from its shapes and settings alone: parameters, FLOPs, key/value cache and memory.

Conventions (Kaplan et al. 2001.08361, PaLM 2204.02311, appendix B). A weight used in a matrix product costs 2
FLOPs per token forward and 4 backward, so 6 in training; an embedding lookup costs none, nor do experts that
the token did not choose. Attention compares each query with the keys it may see: per layer and key 2 * H * D
FLOPs for the scores and as many for the weighted sum, each with its own D in latent attention; three times
that in training. A causal query sees T / 2 keys on average; published numbers often count all T.
Recomputation does not count (these are model FLOPs, as in MFU). Latent attention is counted in its expanded
form, that of training and prefill. Multi-token prediction counts in training only, and is never active.

Memory is the sum of weights, gradients, optimizer, activations and a chunk of logits. Not all exist at the
same time: gradients appear as activations are freed. Allocators and libraries come on top.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from utils.activations import MicroBatch, head_bytes, head_widths, kept_bytes, recompute_bytes

FP32, BF16 = 4, 2  # bytes per number
PARTS = {  # a word in the name of a parameter -> its part of the model; the first match counts
    "mtp.": "mtp", "embed_tokens": "embedding", "norm": "norms", "self_attn": "attention",
    "shared_expert": "shared experts", "experts": "routed experts", ".gate.": "router",
    "mlp": "feed-forward", "lm_head": "head",
}  # fmt: skip


@dataclass
class Group:
    """Parameter counts of one part of the model, summed over layers."""

    total: int = 0
    active: int = 0  # used for one token; less than `total` with a mixture of experts
    multiplied: int = 0  # used for one token in matrix products, which cost FLOPs
    adam: int = 0  # trained by Adam under Muon: gains, biases, vectors and tables of them


@dataclass
class CostCard:
    """The numbers; `lines()` formats them for printing."""

    groups: dict[str, Group]
    layers: int
    attention_width: int  # query heads times (head dim of queries and keys + head dim of values)
    sequence_length: int
    keys_seen: list[float]  # by a query of each layer, on average; the last may be that of MTP
    kv_cache_numbers: int  # per token and layer
    kv_cache_tokens: list[float]  # the most that each layer has to keep; infinite without a window
    batch_tokens: int
    state_bytes: dict[str, int]  # weights, gradients, optimizer
    activation_bytes: int  # kept for the backward pass, or computed again in it (utils/activations.py)
    peak_bytes: int  # of all tensors

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
        return 2 * (self.matmul_parameters + self.attention_width * sum(self.keys_seen[: self.layers]))

    def mtp_flops(self) -> float:
        """Return the FLOPs per token that multi-token prediction adds to the forward pass of training."""
        attention = self.attention_width * sum(self.keys_seen[self.layers :])
        return 2 * (self.groups["mtp"].multiplied + attention)

    def train_flops(self) -> float:
        """Return the FLOPs per token of a training step: forward, and twice as many backward."""
        return 3 * (self.forward_flops() + self.mtp_flops())

    def kv_cache_bytes(self, bytes_per_number: int = BF16, tokens: int = 1) -> int:
        """Return the bytes of a row's first tokens in the cache (of latents, in latent attention).

        A layer with a window keeps no more than the window and the sinks, and here no slots to spare.
        """
        kept = sum(min(tokens, most) for most in self.kv_cache_tokens)
        return kept * self.kv_cache_numbers * bytes_per_number

    def lines(self) -> list[str]:
        """Return the lines of the card."""
        parts = ", ".join(f"{name} {group.total:,}" for name, group in self.groups.items() if group.total)
        state = ", ".join(f"{name} {size(count)}" for name, count in self.state_bytes.items())
        active = f", {self.active_parameters:,} active" if self.active_parameters != self.parameters else ""
        text, windows = self.sequence_length, any(most < math.inf for most in self.kv_cache_tokens)
        row = f", {size(self.kv_cache_bytes(BF16, text))} for {text:,} tokens in bf16" if windows else ""
        extra = f"{self.groups['mtp'].total:,} parameters, {flops(3 * self.mtp_flops())} per token"
        return [
            f"parameters  {self.parameters:,}{active} ({parts})",
            f"compute     {flops(self.train_flops())} per token to train, "
            + f"{flops(self.forward_flops())} forward (causal, sequences of {self.sequence_length})",
            *([f"mtp         {extra}: in training only"] if self.groups["mtp"].total else []),
            f"kv cache    {size(self.kv_cache_bytes(BF16))} per token in bf16, "
            + f"{size(self.kv_cache_bytes(FP32))} in fp32{row}",
            f"memory      {size(self.peak_bytes)} to train ({state}, "
            + f"activations of {self.batch_tokens:,} tokens {size(self.activation_bytes)})",
        ]


def cost_card(
    model: nn.Module, batch_tokens: int, sequence_length: int | None = None, optimizer: str = "adamw",
    dtype: torch.dtype = torch.float32, device: str = "cpu", checkpointed: bool = False,
) -> CostCard:  # fmt: skip
    """Return the cost of training `model`, which may be on the meta device, its weights in fp32.

    `batch_tokens` is the size of a micro-batch; `sequence_length` defaults to the maximum of the model;
    products are in `dtype`, on a `device` of this kind; `checkpointed`: with train.gradient_checkpointing.
    """
    config, groups = model.config, parameter_groups(model)
    length = sequence_length or config.max_position_embeddings
    layers = range(config.num_hidden_layers + (config.mtp == "sequential"))
    reach = [config.layer_reach(layer, length) for layer in layers]
    total = sum(group.total for group in groups.values())
    # Adam keeps two moments of each parameter; Muon one of each matrix in the blocks, and Adam the rest
    adam = sum(group.adam for group in groups.values())
    moments = total + (adam if optimizer == "muon" else total)
    scores, values, cached = head_widths(config)
    state = {"weights": FP32 * total, "gradients": FP32 * total, "optimizer": FP32 * moments}
    rows, wide = max(1, batch_tokens // length), dtype.itemsize
    batch = MicroBatch(rows, min(batch_tokens, length), wide, device, checkpointed)
    kept, again = (count(config, batch, matrices=total - adam) for count in (kept_bytes, recompute_bytes))
    return CostCard(
        groups=groups,
        layers=config.num_hidden_layers,
        attention_width=config.num_attention_heads * (scores + values),
        sequence_length=length,
        keys_seen=[most - most**2 / (2 * length) for most in reach],  # length / 2 if a query sees all
        kv_cache_numbers=cached,
        kv_cache_tokens=[config.layer_reach(n, math.inf) for n in range(config.num_hidden_layers)],
        batch_tokens=batch_tokens,
        state_bytes=state,
        activation_bytes=max(kept, again),
        peak_bytes=sum(state.values()) + max(kept + head_bytes(config, batch), again),
    )


def parameter_groups(model: nn.Module) -> dict[str, Group]:
    """Return the parameters of each part of the model. The bias of a router is none: no gradient moves it."""
    config, groups = model.config, {part: Group() for part in PARTS.values()}
    for name, parameter in model.named_parameters():
        part = next(part for word, part in PARTS.items() if word in name)
        group, count = groups[part], parameter.numel()
        routed, table = ".experts." in name, any(word in name for word in ("embed", "lm_head", "gate."))
        chosen = count * config.num_experts_per_tok // config.n_routed_experts if routed else count
        group.total += count
        group.active += 0 if part == "mtp" else chosen
        group.multiplied += chosen if parameter.dim() > 1 and part != "embedding" else 0
        group.adam += count if parameter.dim() < 2 or table else 0
    table = model.lm_head.weight.numel()
    groups["head"].multiplied = table  # also if it is tied: its product is computed all the same
    groups["mtp"].multiplied += 0 if config.mtp == "none" else table  # it uses the output head again
    return groups


def size(count: float) -> str:
    """Format bytes with the unit that leaves one to four digits before the point."""
    power = min(int(math.log2(max(count, 1))) // 10, 4)
    return f"{count / 1024**power:.4g} {['bytes', 'KiB', 'MiB', 'GiB', 'TiB'][power]}"


def flops(count: float) -> str:
    """Format FLOPs with the unit that leaves one to three digits before the point."""
    power = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**power:.4g} {['', 'k', 'M', 'G', 'T'][power]}FLOP"
