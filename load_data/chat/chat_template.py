"""Dialogues as token ids. Special tokens mark the speakers, and only the template writes them.

    tinyseek   System：{text}\\nUser：{question}\\nAssistant：{answer}<|im_end|>\\nUser：{question}\\n ...
    chatml     <|im_start|>system\\n{text}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n ...

A system message comes first or not at all. Only the assistant's text is supervised: its answers, and the
`<|im_end|>` that ends each of them.

Trap: equal text can have different ids. So markers and contents are encoded separately, in training and at
inference alike, and a prompt followed by an answer has exactly the ids of the dialogue. Contents are encoded
as plain text, in which `Assistant：` or `<|im_end|>` are ordinary characters: no user and no data set can
forge a turn.

Soft tokens are for prompt tuning (Lester et al., arXiv 2104.08691): n ids beyond the vocabulary follow each
marker, different ones for each role. Their embeddings are trained and represent no text.
"""

from collections.abc import Iterable

from load_data.chat.records import ROLES
from load_data.tokenization.tokenizer import Tokenizer

Messages = list[dict[str, str]]
END = "<|im_end|>"


class ChatTemplate:
    """Encode messages (`{"role", "content"}`) as ids.

    Attributes:
        before, after: ids before and after the content of a message, by role.
        end_of_turn: ids that follow an answer.
        stop_ids: ids that end an answer when the model writes one of them.
    """

    def __init__(
        self, tokenizer: Tokenizer, kind: str = "tinyseek", soft_tokens: int = 0, vocab_size: int = 0
    ):
        """`kind`: `tinyseek` or `chatml`; `soft_tokens`: n. `vocab_size`: the model's, where soft tokens
        begin; 0 if the model has no more ids than its tokenizer."""
        self.tokenizer, self.kind = tokenizer, kind
        special, newline = tokenizer.special_ids, tokenizer.encode("\n")
        self.end_of_turn = [special[END], *newline]
        self.stop_ids = frozenset({special[END], tokenizer.eos_id})
        if kind == "tinyseek":
            self.before = {role: [special[f"{role.capitalize()}："]] for role in ROLES}
            self.after = {"system": newline, "user": newline, "assistant": self.end_of_turn}
        else:
            self.before = {role: [special["<|im_start|>"], *tokenizer.encode(f"{role}\n")] for role in ROLES}
            self.after = dict.fromkeys(ROLES, self.end_of_turn)
        for number, role in enumerate(ROLES):
            first = (vocab_size or tokenizer.vocab_size) + number * soft_tokens
            self.before[role] += range(first, first + soft_tokens)

    def turn(self, message: dict[str, str]) -> tuple[list[int], list[bool]]:
        """Return the ids of one message, and which of them are supervised."""
        role, content = message["role"], self.tokenizer.encode(message["content"])
        before, after = self.before[role], self.after[role]
        supervised = [role == "assistant"] * (len(content) + 1)  # <|im_end|> is the first id after an answer
        targets = [False] * len(before) + supervised + [False] * (len(after) - 1)
        return [*before, *content, *after], targets

    def dialogue(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Return the ids of a dialogue, and which of them are supervised."""
        return joined(self.turn(message) for message in messages)

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids up to where the assistant begins to write. The last message must be the user's."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("a prompt ends with a message of the user")
        return self.dialogue(messages)[0] + self.before["assistant"]


def joined(turns: Iterable[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """Concatenate turns."""
    turns = list(turns)
    return [one for ids, _ in turns for one in ids], [one for _, targets in turns for one in targets]


def fit_turns(template: ChatTemplate, messages: Messages, room: int) -> Messages:
    """Drop the oldest turns so that `messages` take at most `room` ids: as a prompt if the last message is
    the user's, otherwise as a dialogue.

    A turn is a question with its answer. A system message stays, and so does the last turn, which may be
    longer than `room` by itself (see `cut_turn`).
    """
    system = sum(message["role"] == "system" for message in messages[:1])
    sizes = [len(template.turn(message)[0]) for message in messages]
    if messages[-1]["role"] == "user":
        sizes.append(len(template.before["assistant"]))
    free = room - sum(sizes[:system])
    later = [n for n, message in enumerate(messages) if message["role"] == "user" and n > system]
    start = next((n for n in [system, *later] if sum(sizes[n:]) <= free), later[-1] if later else system)
    return messages[:system] + messages[start:]


def cut_turn(template: ChatTemplate, messages: Messages, room: int) -> tuple[list[int], list[bool]]:
    """Cut one turn, perhaps with a system message and perhaps without its answer, to `room` ids.

    The question loses its beginning, then the answer its end, each down to a quarter of the room; then the
    system message its end. Markers stay, even if they alone take more than `room`.
    """
    parts = {message["role"]: template.turn(message) for message in messages}
    if "assistant" not in parts:  # a prompt
        parts["assistant"] = template.before["assistant"][:], [False] * len(template.before["assistant"])
    over, least = sum(len(ids) for ids, _ in parts.values()) - room, max(1, room // 4)
    for role, keep in {"user": least, "assistant": least, "system": 0}.items():
        if role in parts:
            before, after = len(template.before[role]), len(template.after[role])
            if role == "assistant":
                after = 0  # a cut answer has no end marker
            ids, targets = parts[role]
            count = max(0, min(over, len(ids) - before - after - keep))
            start = before if role == "user" else len(ids) - after - count
            del ids[start : start + count], targets[start : start + count]
            over -= count
    return joined(parts.values())
