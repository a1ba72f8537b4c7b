"""Dialogues as token ids: who speaks is said by special tokens that nobody but the template writes.

    tinyseek   System：{text}\\nUser：{question}\\nAssistant：{answer}<|im_end|>\\nUser：{question}\\n ...
    chatml     <|im_start|>system\\n{text}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n ...

A system message comes first or not at all. Only what the assistant writes is learned: its answers, and the
`<|im_end|>` that ends each of them.

Trap: an apparently equal text can have other ids. So markers and contents are encoded apart, in training and
at inference alike, and a prompt followed by an answer has the very ids of the dialogue. Contents are encoded
as plain text, in which `Assistant：` or `<|im_end|>` are some letters like others: no user, and no data set,
can forge a turn.

Soft tokens are for prompt tuning (Lester et al., arXiv 2104.08691): after each marker stand n ids beyond the
vocabulary, n for each role, whose embeddings are learned and stand for no text.
"""

from collections.abc import Iterable

from load_data.chat.records import ROLES
from load_data.tokenization.tokenizer import Tokenizer

Messages = list[dict[str, str]]
END = "<|im_end|>"


class ChatTemplate:
    """Messages (`{"role", "content"}`) to ids.

    Attributes:
        before, after: the ids that stand before and after the content of a message, by role.
        end_of_turn: the ids that follow an answer.
        stop_ids: the ids that end an answer when the model writes one of them.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        kind: str = "tinyseek",
        soft_tokens: int = 0,
        vocab_size: int | None = None,
    ):
        """`kind`: `tinyseek` or `chatml`; `soft_tokens`: n. `vocab_size`: of the model, where soft tokens
        begin; None where it has no more ids than its tokenizer."""
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
        """The ids of one message, and which of them are learned."""
        role, content = message["role"], self.tokenizer.encode(message["content"])
        before, after = self.before[role], self.after[role]
        learned = [role == "assistant"] * (len(content) + 1)  # <|im_end|> is the first id after an answer
        targets = [False] * len(before) + learned + [False] * (len(after) - 1)
        return [*before, *content, *after], targets

    def dialogue(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """The ids of a dialogue, and which of them are learned."""
        return joined(self.turn(message) for message in messages)

    def prompt(self, messages: Messages) -> list[int]:
        """The ids up to where the assistant begins to write. The last message must be the user's."""
        if not messages or messages[-1]["role"] != "user":
            raise ValueError("a prompt ends with a message of the user")
        return self.dialogue(messages)[0] + self.before["assistant"]


def joined(turns: Iterable[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """Turns in a row, as one."""
    turns = list(turns)
    return [one for ids, _ in turns for one in ids], [one for _, targets in turns for one in targets]


def fit_turns(template: ChatTemplate, messages: Messages, room: int) -> Messages:
    """`messages` less their oldest turns, so that they take at most `room` ids: as a prompt where the last
    message is the user's, otherwise as a dialogue.

    A turn is a question with its answer. A system message stays, and so does the last turn, which may be
    longer than `room` by itself.
    """
    system = sum(message["role"] == "system" for message in messages[:1])
    sizes = [len(template.turn(message)[0]) for message in messages]
    if messages[-1]["role"] == "user":
        sizes.append(len(template.before["assistant"]))
    free = room - sum(sizes[:system])
    later = [n for n, message in enumerate(messages) if message["role"] == "user" and n > system]
    start = next((n for n in [system, *later] if sum(sizes[n:]) <= free), later[-1] if later else system)
    return messages[:system] + messages[start:]
