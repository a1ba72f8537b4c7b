"""Dialogues as token ids. Special tokens mark the speakers, and only the template writes them.

    tinyseek   System：{text}\\nUser：{question}\\nAssistant：{answer}<|im_end|>\\nUser：{question}\\n ...
    chatml     <|im_start|>system\\n{text}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n ...

A system message comes first or not at all. Only the assistant's text is supervised: its answers, and the
`<|im_end|>` that ends each of them.

An answer may have parts (the names are those of Qwen3; both templates write them alike):

    Assistant：<think>{thinking}</think>{answer}<|im_end|>\n
    Assistant：<tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\n
    <tool_response>{result}</tool_response>\nAssistant：{answer}<|im_end|>\n

The request decides whether the model thinks: a prompt with thinking ends in `<think>`, one without is what it
always was. So nothing marks the absence of thinking (Qwen3 writes an empty block), and models that never
think pay no token for it. Thinking and calls are supervised, but not the `<think>` of the request, nor
results of tools. A message of the assistant may have `thinking`, a text, and `tool_calls`, a list of
{"name", "arguments"} or of texts as a model wrote them; a message of the role `tool` is a result.

Trap: equal text can have different ids. So markers and contents are encoded separately, in training and at
inference alike, and a prompt followed by an answer has exactly the ids of the dialogue. Contents are encoded
as plain text, in which `Assistant：` or `<|im_end|>` are ordinary characters: no user and no data set can
forge a turn.

Soft tokens are for prompt tuning (Lester et al., arXiv 2104.08691): n ids beyond the vocabulary follow each
marker, different ones for each role. Their embeddings are trained and represent no text.
"""

import json
from collections.abc import Iterable

from load_data.chat.records import ROLES
from load_data.tokenization.tokenizer import PART_TOKENS, Tokenizer
from utils.errors import UserError

Message = dict[str, str | list]
Messages = list[Message]
END = "<|im_end|>"
THINK, END_THINK, CALL, END_CALL, RESULT, END_RESULT = PART_TOKENS


class ChatTemplate:
    """Encode messages (`{"role", "content"}`, see above for more) as ids.

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
        if RESULT in special:
            header = [] if kind == "tinyseek" else [special["<|im_start|>"], *tokenizer.encode("user\n")]
            self.before["tool"] = [*header, special[RESULT]]
            self.after["tool"] = [special[END_RESULT], *(self.end_of_turn if header else newline)]

    def part(self, name: str) -> int:
        """Return the id of a part token. Raises `UserError` if the tokenizer is older than these."""
        if name not in self.tokenizer.special_ids:
            raise UserError(
                f"the tokenizer of this model has no {name}, so the model can neither think nor use tools: "
                "train a new one, beginning with python train/pre_train.py"
            )
        return self.tokenizer.special_ids[name]

    def opening(self, thinking: bool) -> list[int]:
        """Return the ids with which a prompt asks for thinking."""
        return [self.part(THINK)] if thinking else []

    def turn(self, message: Message) -> tuple[list[int], list[bool]]:
        """Return the ids of one message, and which of them are supervised."""
        role, encode, written = message["role"], self.tokenizer.encode, []
        if role == "tool":
            self.part(RESULT)
        before, after = self.before[role] + self.opening("thinking" in message), self.after[role]
        if "thinking" in message:
            written += [*encode(message["thinking"]), self.part(END_THINK)]
        written += encode(message["content"])
        for call in message.get("tool_calls", ()):
            text = call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
            written += [self.part(CALL), *encode(text), self.part(END_CALL)]
        supervised = [role == "assistant"] * (len(written) + 1)  # <|im_end|> is the first id after an answer
        targets = [False] * len(before) + supervised + [False] * (len(after) - 1)
        return [*before, *written, *after], targets

    def dialogue(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Return the ids of a dialogue, and which of them are supervised."""
        return joined(self.turn(message) for message in messages)

    def prompt(self, messages: Messages, thinking: bool = False) -> list[int]:
        """Return the ids up to where the assistant begins to write, or to think. The last message must be the
        user's, or a result of a tool."""
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("a prompt ends with a message of the user, or a result of a tool")
        return self.dialogue(messages)[0] + self.before["assistant"] + self.opening(thinking)

    def reply(self, results: list[str], thinking: bool = False) -> list[int]:
        """Return the ids between the `<|im_end|>` of calls and the next answer: the tools' `results`."""
        messages = [{"role": "tool", "content": result} for result in results]
        return self.end_of_turn[1:] + self.prompt(messages, thinking)


def joined(turns: Iterable[tuple[list[int], list[bool]]]) -> tuple[list[int], list[bool]]:
    """Concatenate turns."""
    turns = list(turns)
    return [one for ids, _ in turns for one in ids], [one for _, targets in turns for one in targets]


def fit_turns(template: ChatTemplate, messages: Messages, room: int) -> Messages:
    """Drop the oldest turns so that `messages` take at most `room` ids: as a dialogue if the last message is
    the assistant's, otherwise as a prompt.

    A turn is a question with all that answers it. A system message stays, and so does the last turn, which
    may be longer than `room` by itself (see `cut_turn`).
    """
    system = sum(message["role"] == "system" for message in messages[:1])
    sizes = [len(template.turn(message)[0]) for message in messages]
    if messages[-1]["role"] != "assistant":
        sizes.append(len(template.before["assistant"]))
    free = room - sum(sizes[:system])
    later = [n for n, message in enumerate(messages) if message["role"] == "user" and n > system]
    start = next((n for n in [system, *later] if sum(sizes[n:]) <= free), later[-1] if later else system)
    return messages[:system] + messages[start:]


def cut_turn(template: ChatTemplate, messages: Messages, room: int) -> tuple[list[int], list[bool]]:
    """Cut one turn, perhaps with a system message and perhaps without its answer, to `room` ids.

    The question loses its beginning, then the answer its end, then results of tools theirs, each down to a
    quarter of the room; then the system message its end. Markers and calls stay, even if they alone take more
    than `room`.
    """
    parts = [(message["role"], *template.turn(message)) for message in messages]
    if messages[-1]["role"] != "assistant":  # a prompt
        marker = template.before["assistant"]
        parts.append(("assistant", marker[:], [False] * len(marker)))
    over, least = sum(len(ids) for _, ids, _ in parts) - room, max(1, room // 4)
    for role, keep in {"user": least, "assistant": least, "tool": least, "system": 0}.items():
        for ids, targets in [part[1:] for part in parts if part[0] == role]:
            if role == "assistant" and ids is not parts[-1][1]:
                continue  # calls
            before, after = len(template.before[role]), len(template.after[role])
            if role == "assistant":
                after = 0  # a cut answer has no end marker
            count = max(0, min(over, len(ids) - before - after - keep))
            start = before if role == "user" else len(ids) - after - count
            del ids[start : start + count], targets[start : start + count]
            over -= count
    return joined(part[1:] for part in parts)
