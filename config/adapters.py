"""Settings of the adapters: one section for each stage that trains one."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


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
