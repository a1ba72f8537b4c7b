"""The objectives of the stages beyond the decoder: masked tokens, spans, and embeddings of texts."""

from dataclasses import dataclass

from config.checks import option
from utils.errors import UserError


@dataclass
class MLMConfig:
    """Masked language modelling: the share of tokens to predict, and what the model reads in their place."""

    mask_ratio: float = option(0.15, above=0, below=1)  # 0.3 learns more per step (arXiv 2202.08005)
    replaced_by_mask: float = option(0.8, at_least=0, at_most=1)
    replaced_by_random: float = option(0.1, at_least=0, at_most=1)  # the rest stays as it is

    def check(self):
        """Require shares that are at most 1 together."""
        if self.replaced_by_mask + self.replaced_by_random > 1:
            raise UserError(
                f"mlm.replaced_by_mask={self.replaced_by_mask} and mlm.replaced_by_random="
                f"{self.replaced_by_random} are more than 1 together: lower one"
            )


@dataclass
class SpanConfig:
    """The task of an encoder-decoder: spans of plain text, or pairs of a question and an answer."""

    task: str = option("spans", choices=("spans", "docstrings", "lists"))
    noise_density: float = option(0.15, above=0, below=1)  # spans: the share of tokens that are taken out
    mean_span_length: float = option(3.0, at_least=1)
    target_length: int = option(128, at_least=2)  # tokens to write, at most


@dataclass
class EmbedConfig:
    """A text-embedding model: how tokens become one vector, and how pairs are told apart."""

    base: str = option("encoder", choices=("encoder", "decoder"))  # the body; decided by --init
    pooling: str = option("mean", choices=("mean", "last", "cls", "attention"))
    words: bool = False  # read words alone: identifiers split, lower case, no punctuation
    matryoshka: list[int] | None = None  # smaller widths that must work too (arXiv 2205.13147)
    temperature: float = option(0.05, above=0)  # scores are cosines divided by it
    query_length: int = option(64, at_least=2)  # tokens
    document_length: int = option(192, at_least=2)

    def check(self):
        """Require widths in order."""
        widths = self.matryoshka or []
        if sorted(set(widths)) != widths or any(width < 1 for width in widths):
            raise UserError(f"embed.matryoshka={widths} must be ascending widths of at least 1")
