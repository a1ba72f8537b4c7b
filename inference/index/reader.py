"""Turn texts into vectors: a text-embedding model with its tokenizer."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from config.schema import RunConfig
from inference.index.passages import Passage
from load_data.embed_data import read_as
from load_data.items import padded
from load_data.tokenization.tokenizer import Tokenizer
from model.embedder import Embedder, embed_by_length
from utils.checkpoint import weights_digest


@dataclass
class TextReader:
    """A text-embedding model that is ready to read."""

    model: Embedder
    tokenizer: Tokenizer
    config: RunConfig

    @cached_property
    def identity(self) -> str:
        """A hash of all that decides the vector of a passage."""
        sections = (self.config.embed, self.config.encoder, self.config.model)
        parts = (weights_digest(self.model.state_dict()), self.tokenizer.digest, *map(str, sections))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    @cached_property
    def width(self) -> int:
        """The channels of a vector."""
        return len(self.query("width"))

    @property
    def limit(self) -> int:
        """The number of tokens that a passage may have, those that frame it aside."""
        return self.config.embed.document_length - len(self.tokenizer.framed([]))

    def sizes(self, texts: list[str]) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(ids) for ids in self.encode(texts)]

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, in the form that the model was trained on."""
        return self.tokenizer.encode_batch([read_as(text, self.config.embed) for text in texts])

    def query(self, text: str) -> torch.Tensor:
        """Return the vector of a question, (C,)."""
        room = self.config.embed.query_length - len(self.tokenizer.framed([]))
        return self.vectors([self.encode([text])[0][:room]])[0]

    def passages(self, passages: list[Passage]) -> torch.Tensor:
        """Return the vector of each passage, (N, C). A long heading gives way to the text."""
        headings = self.encode([f"{one.heading}\n" for one in passages])
        texts = self.encode([one.text for one in passages])
        pairs = zip(headings, texts, strict=True)
        return self.vectors([(head[: self.limit // 2] + text)[: self.limit] for head, text in pairs])

    @torch.inference_mode()
    def vectors(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the vectors of rows of ids, (N, C) in fp32 on the CPU."""
        ids, real = padded([self.tokenizer.framed(row) for row in rows], self.tokenizer.pad_id)
        device = next(self.model.parameters()).device
        return embed_by_length(self.model, ids.to(device), real.to(device)).float().cpu()
