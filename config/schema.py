"""Every choice of a run, as dataclasses that check themselves.

A run has one `RunConfig` with sections: `model`, `tokenizer`, `data`, `optim`, `train`, `balance`, and one
for each stage with settings of its own: `lora`, `mixlora`, `prefix`, `gate`.
Presets (JSON files in `config/presets/`) and the command line fill it in; `config/load.py` does the filling.
Field names follow Hugging Face where Hugging Face has the field, so that a reader meets known words.

Each section checks types and single-field limits through the field's metadata (`at_least`, `above`,
`choices`), and relations between fields in its `check()`. A violation is a `UserError` that names the field,
the value and the rule.
"""

import math
import types
import typing
from dataclasses import dataclass, field, fields

from utils.errors import UserError


def option(default, **limits):
    """A dataclass field with limits: `at_least`, `above`, `at_most`, `below` (numbers) or `choices`."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=limits)
    return field(default=default, metadata=limits)


@dataclass
class ModelConfig:
    """The shape of a TinySeek decoder. Names as in Hugging Face's `Dots1Config` and `DeepseekV3Config`."""

    vocab_size: int = option(0, at_least=0)  # 0: as many as the tokenizer has
    hidden_size: int = option(256, at_least=1)
    num_hidden_layers: int = option(4, at_least=1)
    num_attention_heads: int = option(8, at_least=1)
    num_key_value_heads: int = option(4, at_least=1)
    head_dim: int | None = option(None, at_least=2)  # None: hidden_size / num_attention_heads
    intermediate_size: int = option(768, at_least=1)
    max_position_embeddings: int = option(512, at_least=1)
    rms_norm_eps: float = option(1e-6, above=0)
    qk_norm: bool = True
    attention_bias: bool = False  # on q, k, v and o
    sliding_window: int | None = option(None, at_least=1)  # tokens seen, the query's own included
    rope_theta: float = option(10000.0, above=1)  # raising it is ABF, arXiv 2309.16039
    rope_scaling: dict | None = None  # old or new Hugging Face spelling, see modules/rope_scaling.py
    rope_interleaved: bool = False  # pairs (0,1),(2,3).. instead of (0,D/2),(1,D/2+1)..
    tie_word_embeddings: bool = True
    dropout: float = option(0.0, at_least=0, below=1)  # on embeddings and on each block's two outputs
    attention_dropout: float = option(0.0, at_least=0, below=1)
    final_logit_softcapping: float | None = option(None, above=0)  # None keeps the Hugging Face twin exact
    initializer_range: float = option(0.02, above=0)
    zero_init_residual: bool = False  # o_proj and down_proj start at zero: each block starts as the identity
    attn_implementation: str = option("auto", choices=("auto", "sdpa", "eager", "blocked"))

    # mixture of experts (modules/experts/moe.py); n_routed_experts = 0 is a dense model
    n_routed_experts: int = option(0, at_least=0)
    num_experts_per_tok: int = option(4, at_least=1)
    n_shared_experts: int = option(2, at_least=0)  # one MLP of that many times the width
    moe_intermediate_size: int = option(128, at_least=1)  # width of one expert
    first_k_dense_replace: int = option(0, at_least=0)  # the first layers keep a dense feed-forward
    scoring_func: str = option("sigmoid", choices=("sigmoid", "softmax"))
    norm_topk_prob: bool = True  # the weights of the chosen experts add up to 1
    routed_scaling_factor: float = option(1.0, above=0)
    n_group: int = option(1, at_least=1)  # experts come in groups, and a token
    topk_group: int = option(1, at_least=1)  # chooses from its best groups only
    router_jitter_noise: float = option(0.0, at_least=0, below=1)  # in training: router input times 1 +- this
    moe_implementation: str = option("auto", choices=("auto", "grouped", "loop"))

    # multi-head latent attention (modules/attention/latent.py) in place of grouped-query attention
    attention_kind: str = option("gqa", choices=("gqa", "mla"))
    q_lora_rank: int | None = option(None, at_least=1)  # None: queries are not compressed
    kv_lora_rank: int = option(64, at_least=1)  # what the cache holds of keys and values
    qk_nope_head_dim: int = option(32, at_least=1)
    qk_rope_head_dim: int = option(16, at_least=2)
    v_head_dim: int = option(32, at_least=1)

    # multi-token prediction (modules/mtp.py)
    mtp: str = option("none", choices=("none", "parallel", "sequential"))

    def check(self):
        """Fill in `head_dim` and check that heads, groups and experts fit."""
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise UserError(
                    f"model.hidden_size={self.hidden_size} does not divide by model.num_attention_heads="
                    f"{self.num_attention_heads}: change one, or set model.head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd: rotary embeddings turn pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"model.num_attention_heads={self.num_attention_heads} does not divide by "
                f"model.num_key_value_heads={self.num_key_value_heads}: each key/value head serves the same "
                "number of query heads"
            )
        if self.n_routed_experts:
            self.check_experts()
        if self.attention_kind == "mla":
            self.check_latent()

    @property
    def rotary_dim(self) -> int:
        """How many channels of a head the rotary embedding turns."""
        return self.qk_rope_head_dim if self.attention_kind == "mla" else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer number `layer` has experts; one beyond the last is that of sequential MTP."""
        return self.n_routed_experts > 0 and layer >= self.first_k_dense_replace

    def check_experts(self):
        """What a router cannot do."""
        experts, chosen = self.n_routed_experts, self.num_experts_per_tok
        if chosen > experts:
            raise UserError(
                f"model.num_experts_per_tok={chosen} is more than model.n_routed_experts={experts}: "
                "lower the first or raise the second"
            )
        if chosen == 1 and self.norm_topk_prob:
            raise UserError(
                "model.num_experts_per_tok=1 with model.norm_topk_prob=true makes every weight 1, so "
                "that the router gets no gradient from the language-model loss: set "
                "model.norm_topk_prob=false, or use two experts or more"
            )
        if experts % self.n_group:
            raise UserError(
                f"model.n_routed_experts={experts} does not divide by model.n_group={self.n_group}"
            )
        if self.topk_group > self.n_group:
            raise UserError(
                f"model.topk_group={self.topk_group} is more than model.n_group={self.n_group}: lower it"
            )
        if chosen > self.topk_group * experts // self.n_group:
            raise UserError(
                f"model.num_experts_per_tok={chosen} experts are not in model.topk_group={self.topk_group} "
                f"groups of {experts // self.n_group}: raise model.topk_group"
            )
        if self.n_group > 1 and experts // self.n_group < 2:
            raise UserError(
                f"model.n_group={self.n_group} leaves one expert in a group, and groups are ranked by two"
            )

    def check_latent(self):
        """What latent attention cannot do."""
        if self.qk_rope_head_dim % 2:
            raise UserError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} is odd: rotary embeddings turn pairs"
            )
        if self.sliding_window is not None:
            raise UserError(
                "model.sliding_window goes with model.attention_kind=gqa only: leave it out, or use gqa"
            )


@dataclass
class TokenizerConfig:
    """How text becomes ids."""

    kind: str = option("bpe", choices=("bpe", "char"))
    vocab_size: int = option(4096, at_least=300)  # bpe only, special tokens included
    train_bytes: int = option(16_000_000, at_least=1)  # bpe reads at most this much text to learn its merges


@dataclass
class DataConfig:
    """Which text, and how it is cut."""

    paths: list[str] = option(["python"])  # files, folders, `python`, or for chat stages `skills`
    sequence_length: int = option(512, at_least=2)
    val_fraction: float = option(0.05, above=0, below=1)
    worked_examples: int = option(20_000, at_least=0)  # `>>> expression` and its value, with `python` only
    limit: int | None = option(None, at_least=1)  # at most this many documents
    cache_dir: str = "out/cache"  # relative to the repository
    # chat stages
    template: str = option("tinyseek", choices=("tinyseek", "chatml"))
    packing: bool = True  # several dialogues in one row, which do not see each other
    skill_samples: int = option(40_000, at_least=1)  # dialogues of one epoch, with `skills` only


@dataclass
class OptimConfig:
    """The optimizer and the course of its learning rate."""

    optimizer: str = option("adamw", choices=("adam", "adamw", "muon"))
    lr: float = option(1e-3, above=0)
    muon_lr: float = option(0.02, above=0)  # for matrices, when optimizer is muon
    muon_momentum: float = option(0.95, at_least=0, below=1)
    beta1: float = option(0.9, at_least=0, below=1)
    beta2: float = option(0.95, at_least=0, below=1)
    eps: float = option(1e-8, above=0)
    weight_decay: float = option(0.1, at_least=0)  # matrices only
    grad_clip: float = option(1.0, at_least=0)  # largest gradient norm; 0 switches clipping off
    schedule: str = option("wsd", choices=("cosine", "exponential", "wsd"))
    warmup_steps: int = option(50, at_least=0)
    decay_fraction: float = option(0.5, above=0, at_most=1)  # wsd: the last part of the run, spent decaying
    min_lr_ratio: float = option(0.0, at_least=0, at_most=1)  # where the decay ends, as a share of lr

    def check(self):
        """An exponential never reaches zero."""
        if self.schedule == "exponential" and self.min_lr_ratio == 0:
            raise UserError("optim.schedule=exponential needs optim.min_lr_ratio above 0, for example 0.01")


@dataclass
class TrainConfig:
    """How long, how much at a time, and how often to look."""

    batch_size: int = option(8, at_least=1)  # sequences in one micro-batch of one process
    accumulation_steps: int = option(1, at_least=1)  # micro-batches per optimizer step and process
    max_steps: int | None = option(None, at_least=1)
    max_seconds: float | None = option(None, above=0)
    log_every: int = option(10, at_least=1)
    eval_every: int = option(250, at_least=1)
    eval_batches: int = option(16, at_least=1)  # on the way; the last evaluation always reads all of it
    save_every: int = option(250, at_least=1)
    dtype: str = option("auto", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = False
    device: str = option("auto", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, at_least=0)
    mtp_weight: float | None = option(None, at_least=0)  # None: 1 for parallel, 0.3 for sequential prediction

    def check(self):
        """A run needs an end."""
        if self.max_steps is None and self.max_seconds is None:
            raise UserError("a run needs an end: set train.max_steps or train.max_seconds")


@dataclass
class BalanceConfig:
    """How experts are kept equally busy, see modules/experts/balance.py. Of no effect in a dense model."""

    weight: float = option(0.0, at_least=0)  # of the balance loss; 0 switches it off
    form: str = option("switch", choices=("switch", "kl"))
    measure: str = option("hard", choices=("hard", "soft"))
    scope: str = option("global", choices=("sequence", "batch", "global"))
    statistics: str = option("running", choices=("running", "exact"))  # for scope global with accumulation
    z_loss: float = option(0.0, at_least=0)  # weight of the router z-loss
    bias_rate: float = option(0.0, at_least=0)  # step of DeepSeek's loss-free bias; 0 switches it off


@dataclass
class LoraConfig:
    """Low-rank adapters, see modules/adapters/lora.py. Names as in `peft`'s `LoraConfig` where it has
    them."""

    r: int = option(8, at_least=1)  # rank
    lora_alpha: float = option(16.0, above=0)  # what the adapter adds is multiplied by lora_alpha / r
    lora_dropout: float = option(0.0, at_least=0, below=1)
    # groups (attention, dense, shared, experts), or the last part of any linear layer's name (q_proj)
    target_modules: list[str] = option(["attention", "dense", "shared"])
    use_rslora: bool = False  # lora_alpha / sqrt(r) instead
    use_dora: bool = False  # direction and magnitude learn apart

    def check(self):
        """Experts get their adapter as part of their weights, where dropout of the input has no place."""
        if "experts" in self.target_modules and self.lora_dropout:
            raise UserError("lora.lora_dropout must be 0 when lora.target_modules names experts")
        if not self.target_modules:
            raise UserError("lora.target_modules is empty: nothing would learn; name attention, for example")


@dataclass
class MixLoraConfig:
    """A mixture of LoRA experts over one frozen feed-forward, see modules/adapters/mixlora.py. Its adapters
    on attention are described by the section `lora`."""

    num_experts: int = option(8, at_least=2)  # of one alone the router has nothing to learn: that is LoRA
    num_experts_per_tok: int = option(2, at_least=1)
    r: int = option(8, at_least=1)
    lora_alpha: float = option(16.0, above=0)
    lora_dropout: float = option(0.0, at_least=0, below=1)
    shared_expert: bool = False  # one more LoRA expert that every token uses
    attention: bool = True  # plain LoRA on attention beside it, that of a second head (MTP) included

    def check(self):
        """What a router cannot do."""
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"mixlora.num_experts_per_tok={self.num_experts_per_tok} is more than mixlora.num_experts="
                f"{self.num_experts}: lower the first or raise the second"
            )
        if self.num_experts_per_tok == 1:
            raise UserError(
                "mixlora.num_experts_per_tok=1 makes every weight 1, so the router gets no gradient from "
                "the language-model loss: use two experts or more"
            )


@dataclass
class PrefixConfig:
    """Learned keys and values, or learned embeddings, before and within the text
    (modules/adapters/prefix.py)."""

    kind: str = option("prefix", choices=("prefix", "prompt"))
    length: int = option(16, at_least=1)  # keys and values per layer; or embeddings after each role marker


@dataclass
class SelectorConfig:
    """Which adapter answers, see modules/adapters/selector.py."""

    candidates: list[str] = option([])  # checkpoints; `base` is the base without an adapter
    width: int = option(64, at_least=0)  # hidden units; 0: a linear gate


@dataclass
class RunConfig:
    """All sections of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    mixlora: MixLoraConfig = field(default_factory=MixLoraConfig)
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    gate: SelectorConfig = field(default_factory=SelectorConfig)

    def validate(self) -> "RunConfig":
        """Check every field of every section; returns itself. Raises `UserError` on the first violation."""
        for section in fields(self):
            validate_section(section.name, getattr(self, section.name))
        return self


def validate_section(name: str, section) -> None:
    """Types, single-field limits, then the section's own `check()`."""
    hints = typing.get_type_hints(type(section))
    for item in fields(section):
        value = getattr(section, item.name)
        setattr(section, item.name, checked(f"{name}.{item.name}", value, hints[item.name], item.metadata))
    if hasattr(section, "check"):
        section.check()


def checked(key: str, value, hint, limits) -> object:
    """`value` if it has the type and keeps to the limits (an int is taken where a float is meant)."""
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    kinds = tuple(typing.get_origin(kind) or kind for kind in allowed if kind is not type(None))
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(kind.__name__ for kind in kinds) + (" or null" if type(None) in allowed else "")
        raise UserError(f"{key} must be {names}, not {value!r} ({type(value).__name__})")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value} must be a finite number")
    if list in kinds and not all(isinstance(part, str) for part in value):
        raise UserError(f"{key} must be a list of strings, not {value!r}")
    rules = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
        "choices": lambda bound: value in bound,
    }
    for rule, bound in limits.items():
        if not rules[rule](bound):
            words = f"one of {', '.join(bound)}" if rule == "choices" else f"{rule.replace('_', ' ')} {bound}"
            raise UserError(f"{key}={value!r} must be {words}")
    return value
