"""All settings of a run, as dataclasses that validate themselves.

A run has one `RunConfig` with the sections `model` (config/model.py), `tokenizer`, `data`, `optim`, `train`
and `balance`, and one per stage that has its own settings: `lora`, `mixlora`, `prefix` and `gate`
(config/adapters.py), `extend`, `dpo` and `pairs` (config/preference.py), `rl` (config/rl.py), `mlm`, `span`
and `embed` (config/objectives.py), `distill` (config/distill.py), and `quant` and `qat` of quantised models
(config/quant.py). Where the model is no decoder, its section is `encoder` (config/encoder.py) or `seq2seq`
(config/seq2seq.py). Presets (JSON files in config/presets/) and the command line set them (config/load.py).
"""

from dataclasses import dataclass, field, fields

from config.adapters import LoraConfig, MixLoraConfig, PrefixConfig, SelectorConfig
from config.checks import option, validate_section
from config.distill import DistillConfig
from config.encoder import EncoderConfig
from config.extension import METHODS
from config.model import ModelConfig
from config.objectives import EmbedConfig, MLMConfig, SpanConfig
from config.preference import DPOConfig, PairsConfig
from config.quant import QATConfig, QuantConfig
from config.rl import RLConfig
from config.seq2seq import Seq2SeqConfig
from utils.errors import UserError


@dataclass
class TokenizerConfig:
    """The conversion of text to ids."""

    kind: str = option("bpe", choices=("bpe", "char", "hf"))
    path: str | None = None  # hf only: a folder with the tokenizer.json of any tokenizer
    vocab_size: int = option(4096, at_least=300)  # bpe only, special tokens included
    train_bytes: int = option(16_000_000, at_least=1)  # bpe trains on at most this much text

    def check(self):
        """Require a path for the kind that reads one, and for no other."""
        if self.kind == "hf" and not self.path:
            raise UserError("tokenizer.kind=hf needs tokenizer.path, a folder with a tokenizer.json")
        if self.kind != "hf" and self.path:
            raise UserError(f"tokenizer.path is for tokenizer.kind=hf only, and the kind is {self.kind}")


@dataclass
class DataConfig:
    """The text, its split, and how it is cut into rows."""

    paths: list[str] = option(["python"])  # files, folders, `python`, or for chat stages `skills`
    sequence_length: int = option(512, at_least=2)
    start_length: int | None = option(None, at_least=2)  # pre-training: rows start this long or longer
    val_fraction: float = option(0.05, above=0, below=1)
    # Split of dialogues: `folded` ignores case, width, punctuation and spaces of a question; `exact` is the
    # rule of older checkpoints, inherited by runs that start from them.
    same_question: str = option("folded", choices=("folded", "exact"))
    worked_examples: int = option(20_000, at_least=0)  # `>>> expression` and its value, with `python` only
    limit: int | None = option(None, at_least=1)  # at most this many documents
    cache_dir: str = "out/cache"  # relative to the repository
    # chat stages
    template: str = option("tinyseek", choices=("tinyseek", "chatml", "own"))
    packing: bool = True  # several dialogues in one row, not attending to each other
    skill_samples: int = option(40_000, at_least=1)  # dialogues of one epoch, with `skills` only


@dataclass
class OptimConfig:
    """The optimizer and its learning-rate schedule."""

    optimizer: str = option("adamw", choices=("adam", "adamw", "muon"))
    lr: float = option(1e-3, above=0)
    muon_lr: float = option(0.02, above=0)  # for matrices, when optimizer is muon
    muon_momentum: float = option(0.95, at_least=0, below=1)
    beta1: float = option(0.9, at_least=0, below=1)
    beta2: float = option(0.95, at_least=0, below=1)
    eps: float = option(1e-8, above=0)
    weight_decay: float = option(0.1, at_least=0)  # matrices only
    grad_clip: float = option(1.0, at_least=0)  # largest gradient norm; 0 disables clipping
    schedule: str = option("wsd", choices=("cosine", "exponential", "wsd"))
    warmup_steps: int = option(50, at_least=0)
    decay_fraction: float = option(0.5, above=0, at_most=1)  # wsd: the last part of the run
    min_lr_ratio: float = option(0.0, at_least=0, at_most=1)  # final rate, as a share of lr

    def check(self):
        """Reject an exponential decay to a rate of zero, which it cannot reach."""
        if self.schedule == "exponential" and self.min_lr_ratio == 0:
            raise UserError("optim.schedule=exponential needs optim.min_lr_ratio above 0, for example 0.01")


@dataclass
class TrainConfig:
    """Duration, batch sizes, and intervals of logging, evaluation and saving."""

    batch_size: int = option(8, at_least=1)  # sequences in one micro-batch of one process
    accumulation_steps: int = option(1, at_least=1)  # micro-batches per optimizer step and process
    max_steps: int | None = option(None, at_least=1)
    max_seconds: float | None = option(None, above=0)
    log_every: int = option(10, at_least=1)
    eval_every: int = option(250, at_least=1)
    eval_batches: int = option(16, at_least=1)  # during training; the last evaluation always reads everything
    save_every: int = option(250, at_least=1)
    dtype: str = option("auto", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = False
    gradient_checkpointing: bool = False  # modules/checkpointing.py: less memory, a third more work
    device: str = option("auto", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = option(0, at_least=0)
    mtp_weight: float | None = option(None, at_least=0)  # None: 1 for parallel, 0.3 for sequential prediction

    def check(self):
        """Require a bound on steps or time."""
        if self.max_steps is None and self.max_seconds is None:
            raise UserError("a run needs a bound: set train.max_steps or train.max_seconds")


@dataclass
class BalanceConfig:
    """Load balancing of experts, see modules/experts/balance.py. No effect on a dense model."""

    weight: float = option(0.0, at_least=0)  # of the balance loss; 0 disables it
    form: str = option("switch", choices=("switch", "kl"))
    measure: str = option("hard", choices=("hard", "soft"))
    scope: str = option("global", choices=("sequence", "batch", "global"))
    statistics: str = option("running", choices=("running", "exact"))  # for scope global with accumulation
    z_loss: float = option(0.0, at_least=0)  # weight of the router z-loss
    bias_rate: float = option(0.0, at_least=0)  # step of DeepSeek's loss-free bias; 0 disables it


@dataclass
class ExtendConfig:
    """The extension of a trained context (config/extension.py)."""

    method: str = option("abf", choices=METHODS)
    times: int = option(4, at_least=2)  # the new context, in trained lengths


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
    extend: ExtendConfig = field(default_factory=ExtendConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    seq2seq: Seq2SeqConfig = field(default_factory=Seq2SeqConfig)
    mlm: MLMConfig = field(default_factory=MLMConfig)
    span: SpanConfig = field(default_factory=SpanConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    qat: QATConfig = field(default_factory=QATConfig)

    def validate(self) -> "RunConfig":
        """Check every field of every section and return self. Raises `UserError` for the first violation."""
        for section in fields(self):
            validate_section(section.name, getattr(self, section.name))
        return self
