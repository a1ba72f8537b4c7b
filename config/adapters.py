"""Settings of adapters and of the selector over them: one section per stage."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


@dataclass
class LoraConfig:
    """Low-rank adapters (modules/adapters/lora.py). Names as in `peft`'s `LoraConfig`, if it has them."""

    r: int = option(8, at_least=1)  # rank
    lora_alpha: float = option(16.0, above=0)  # the adapter's output is multiplied by lora_alpha / r
    lora_dropout: float = option(0.0, at_least=0, below=1)
    # groups (attention, dense, shared, experts), or the last part of any linear layer's name (q_proj)
    target_modules: list[str] = option(["attention", "dense", "shared"])
    use_rslora: bool = False  # lora_alpha / sqrt(r) instead
    use_dora: bool = False  # train direction and magnitude separately
    base: str = option("full", choices=("full", "nf4"))  # nf4: beside codes of 4 bits (QLoRA)

    def check(self):
        """Refuse dropout and codes for experts, whose adapter is part of their weights, and no target."""
        if "experts" in self.target_modules and self.lora_dropout:
            raise UserError("lora.lora_dropout must be 0 when lora.target_modules names experts")
        if "experts" in self.target_modules and self.base != "full":
            raise UserError(
                f"lora.base={self.base}: an adapter of experts is part of their weights, and codes stay as "
                "they are: take experts out of lora.target_modules, or leave lora.base out"
            )
        if not self.target_modules:
            raise UserError("lora.target_modules is empty: add a target, for example attention")


@dataclass
class MixLoraConfig:
    """A mixture of LoRA experts over one frozen feed-forward (modules/adapters/mixlora.py). Its
    adapters on attention use the settings in section `lora`."""

    num_experts: int = option(8, at_least=2)  # a single one needs no router: that is LoRA
    num_experts_per_tok: int = option(2, at_least=1)
    r: int = option(8, at_least=1)
    lora_alpha: float = option(16.0, above=0)
    lora_dropout: float = option(0.0, at_least=0, below=1)
    shared_expert: bool = False  # one more LoRA expert that every token uses
    attention: bool = True  # plain LoRA on attention as well, including that of a second head (MTP)

    def check(self):
        """Refuse numbers of experts that the router cannot choose or learn from."""
        K, E = self.num_experts_per_tok, self.num_experts
        if K > E:
            raise UserError(f"mixlora.num_experts_per_tok={K} is more than mixlora.num_experts={E}: lower it")
        if K == 1:
            raise UserError(
                "mixlora.num_experts_per_tok=1 makes every weight 1, so the router gets no gradient from "
                "the language-model loss: use two experts or more"
            )


@dataclass
class PrefixConfig:
    """Trained keys and values before the text, or embeddings within it (modules/adapters/prefix.py)."""

    kind: str = option("prefix", choices=("prefix", "prompt"))
    length: int = option(16, at_least=1)  # keys and values per layer; or embeddings after each role marker


@dataclass
class SelectorConfig:
    """The selector that chooses which adapter answers (modules/adapters/selector.py)."""

    candidates: list[str] = option([])  # checkpoints; `base` is the base without an adapter
    width: int = option(64, at_least=0)  # hidden units; 0: a linear selector
