"""Decode tokens to text that can be shown at once: whole characters only, and no part of a stop string."""

import codecs

from load_data.tokenization.tokenizer import Tokenizer


class TextStream:
    """Decode one token at a time; `stopped` is True after a stop string.

    Text that may be the beginning of a stop string is held back until the next tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stop = tuple(filter(None, stop))
        self.waiting, self.stopped = "", False

    def push(self, token: int) -> str:
        """Return the text that can be shown after `token`; it may be empty."""
        if self.stopped or token >= self.tokenizer.vocab_size:
            return ""  # a model may have more ids than its tokenizer
        self.waiting += self.decoder.decode(self.tokenizer.id_to_bytes[token])
        places = [(self.waiting.find(stop), len(stop)) for stop in self.stop]
        found = [(place + length, place) for place, length in places if place >= 0]
        if found:  # the first to be completed
            text, self.waiting, self.stopped = self.waiting[: min(found)[1]], "", True
            return text
        text, cut = self.waiting, 0
        while not any(stop.startswith(text[cut:]) for stop in self.stop) and cut < len(text):
            cut += 1
        self.waiting = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """Return the text that was still held back when the tokens ended."""
        text = "" if self.stopped else self.waiting + self.decoder.decode(b"", final=True)
        self.waiting = ""
        return text
