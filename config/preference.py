"""Settings of learning from preferences: the loss on pairs of answers, and pairs of a model's own samples."""

from dataclasses import dataclass

from config.checks import option

BETAS = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1}  # the papers' choices


@dataclass
class DPOConfig:
    """Direct preference optimisation (train/dpo_train.py), see modules/alignment/preference.py."""

    kind: str = option("dpo", choices=tuple(BETAS))
    beta: float | None = option(None, above=0)  # None: the choice of `BETAS`
    margin: float = option(1.0, at_least=0)  # simpo only
    lora: bool = False  # train an adapter by the settings in section `lora`, beside a frozen base
    likelihood: float = option(0.0, at_least=0)  # weight of the chosen answer's likelihood (arXiv 2404.19733)

    @property
    def strength(self) -> float:
        """The beta to use."""
        return BETAS[self.kind] if self.beta is None else self.beta


@dataclass
class PairsConfig:
    """Pairs from answers that the model of --init samples to the skills in `data.paths`
    (train/engine/sampled_pairs.py); pairs from files need none of this."""

    prompts: int = option(2400, at_least=1)  # questions to train on
    samples: int = option(4, at_least=2)  # answers to each
    temperature: float = option(1.0, at_least=0.1)  # colder, all samples of a question are the same
    max_new_tokens: int = option(48, at_least=1)
