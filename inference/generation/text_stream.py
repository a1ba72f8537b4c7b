"""Decode tokens to text that can be shown at once: whole characters only, and no part of a stop string."""

import codecs

from load_data.chat.chat_template import CALL, END_CALL, END_THINK, THINK, Message
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


class AnswerStream:
    """Decode the tokens of an answer, sorted into its parts: `thinking`, `content` and `call`.

    Stop strings count in the content only. `part` is that of the next token, unless it marks another part;
    `stopped` is True after a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, thinking: bool = False, stop: tuple[str, ...] = ()):
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self.texts = []  # (part, text) from marker to marker
        self.begin("thinking" if thinking else "content")

    def begin(self, part: str) -> None:
        """Begin a part."""
        self.part = part
        self.stream = TextStream(self.tokenizer, self.stop if part == "content" else ())
        self.texts.append([part, ""])

    def push(self, token: int) -> tuple[str, str]:
        """Return a part and the text in it that can be shown after `token`; the text may be empty."""
        special, part = self.tokenizer.special_ids, self.part
        new = None
        if token == special.get(END_THINK) and part == "thinking" or token == special.get(END_CALL):
            new = "content"
        elif token == special.get(THINK) and self.texts == [["content", ""]]:
            new = "thinking"  # unasked, which is Qwen3's way
        elif token == special.get(CALL):
            new = "call"
        text = self.stream.push(token) if new is None else self.stream.finish()
        self.texts[-1][1] += text
        self.stopped = self.stream.stopped
        if new:
            self.begin(new)
        return part, text

    def finish(self) -> tuple[str, str]:
        """Return the part and the text that were still held back when the tokens ended."""
        text = self.stream.finish()
        self.texts[-1][1] += text
        return self.part, text

    def message(self) -> Message:
        """Return what was written as a message of the template."""
        content = "".join(text for part, text in self.texts if part == "content")
        message = {"role": "assistant", "content": content}
        if self.texts[0][0] == "thinking":
            message["thinking"] = self.texts[0][1]
        if calls := [text for part, text in self.texts if part == "call"]:
            message["tool_calls"] = calls
        return message
