"""Turn texts into vectors: a text-embedding model, its tokenizer, and batches with little padding."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch

from config.schema import RunConfig
from inference.index.passages import Passage
from load_data.embed_data import read_as
from load_data.items import padded
from load_data.tokenization.tokenizer import Tokenizer
from utils.checkpoint import weights_digest

BATCH = 4096  # tokens, padding included


@dataclass
class TextReader:
    """A text-embedding model that is ready to read."""

    model: torch.nn.Module  # ids (B, T) and padding mask -> unit vectors (B, C)
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
        """Return the vectors of rows of ids, (N, C) fp32 on the CPU. Rows of similar length share a batch."""
        rows = [self.tokenizer.framed(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        device = next(self.model.parameters()).device
        vectors, first = [], 0
        while first < len(order):
            longest = len(rows[order[first]])
            batch = [rows[number] for number in order[first : first + max(1, BATCH // longest)]]
            ids, real = padded(batch, self.tokenizer.pad_id)
            vectors.append(self.model(ids.to(device), padding_mask=real.to(device)).float().cpu())
            first += len(batch)
        return torch.cat(vectors)[torch.tensor(order).argsort()]
