"""Dialogues as token ids. Special tokens mark the speakers, and only the template writes them.

    tinyseek   System：{text}\\nUser：{question}\\nAssistant：{answer}<|im_end|>\\nUser：{question}\\n ...
    chatml     <|im_start|>system\\n{text}<|im_end|>\\n<|im_start|>user\\n{question}<|im_end|>\\n ...
    own        the markers of a Hugging Face chat template (load_data/tokenization/turns.py)

A system message comes first or not at all. Only the assistant's text is supervised: its answers, and the
`<|im_end|>` (or other token) that ends each of them.

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
forge a turn. Only markers that are text themselves (Llama-2's `[INST]`) can be typed by anyone.

Soft tokens are for prompt tuning (Lester et al., arXiv 2104.08691): n ids beyond the vocabulary follow each
marker, different ones for each role. Their embeddings are trained and represent no text.
"""

import json
import re
from collections.abc import Iterable

from load_data.chat.records import ROLES
from load_data.tokenization.tokenizer import PART_TOKENS, SPECIAL_TOKENS, Tokenizer
from utils.errors import UserError

Message = dict[str, str | list]
Messages = list[Message]
END = "<|im_end|>"
THINK, END_THINK, CALL, END_CALL, RESULT, END_RESULT = PART_TOKENS


MARKERS = {  # of the kinds `tinyseek` and `chatml`, in the form of load_data/tokenization/turns.py
    "tinyseek": {
        "before": {role: f"{role.capitalize()}：" for role in ROLES},
        "after": {"system": "\n", "user": "\n", "assistant": f"{END}\n"},
        "prompt": "Assistant：",
    },
    "chatml": {
        "before": {role: f"<|im_start|>{role}\n" for role in ROLES},
        "after": dict.fromkeys(ROLES, f"{END}\n"),
        "prompt": "<|im_start|>assistant\n",
    },
}


class Markers(dict):
    """Ids by role. Asking for a role without markers is a `UserError`."""

    problem = "the chat template of this model has no place for a system message: leave it out"

    def __missing__(self, role):
        raise UserError(self.problem)


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
        """`kind`: `tinyseek`, `chatml` or `own`; `soft_tokens`: n. `vocab_size`: the model's, where soft
        tokens begin; 0 if the model has no more ids than its tokenizer.

        A tokenizer may lack the markers, since its model can still continue texts: using them is then a
        `UserError`.
        """
        self.tokenizer, self.kind, special = tokenizer, kind, tokenizer.special_ids
        self.before, self.after, self.beside = Markers(), Markers(), {}
        self.first, self.default, self.end_of_turn = [], [], []
        self.stop_ids = frozenset(tokenizer.eos_ids)
        if problem := why_not(tokenizer, kind):
            self.before.problem = self.after.problem = problem
            return
        turns = tokenizer.turns if kind == "own" else MARKERS[kind]
        self.read_markers(turns)
        self.end_of_turn = self.after["assistant"]
        self.stop_ids |= {self.end_of_turn[0]}
        header = [] if kind == "tinyseek" else self.before["user"]
        for number, role in enumerate(ROLES):
            start = (vocab_size or tokenizer.vocab_size) + number * soft_tokens
            if role in self.before:
                self.before[role] = [*self.before[role], *range(start, start + soft_tokens)]
        if RESULT in special:
            self.before["tool"], self.beside["tool"] = [*header, special[RESULT]], ("", "", True)
            self.after["tool"] = [special[END_RESULT], *self.after["user"]]
        if turns.get("default_system") is not None:
            self.default = self.turn({"role": "system", "content": turns["default_system"]})[0]

    def read_markers(self, turns: dict) -> None:
        """Turn the texts of markers into ids.

        Spaces at the end of a marker are encoded with the content that follows, as one word begins with them:
        `beside` has them by role, with the text between an answer and the token that ends it, and whether
        the content follows a special token.
        """
        first, ends = turns.get("first", ""), turns["after"]
        self.first, begun = marker_ids(self.tokenizer, first, True)
        opens = {role: marker_ids(self.tokenizer, text, False)[1] for role, text in ends.items()}
        opens = {"system": begun, "user": opens["assistant"], "assistant": opens["user"]}
        for role, text in turns["before"].items():
            body = turns["prompt"] if role == "assistant" else text.rstrip(" ")
            self.before[role], follows = marker_ids(self.tokenizer, body, opens[role])
            tail = special_pattern(self.tokenizer).split(ends[role])[0] if role == "assistant" else ""
            self.after[role] = marker_ids(self.tokenizer, ends[role].removeprefix(tail), False)[0]
            self.beside[role] = (text.removeprefix(body), tail, follows)

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
        role, encode, written = message["role"], self.tokenizer.encode_section, []
        if role == "tool":
            self.part(RESULT)
        before, after = self.before[role] + self.opening("thinking" in message), self.after[role]
        if "thinking" in message:
            written += [*encode(message["thinking"]), self.part(END_THINK), *encode(message["content"])]
        else:
            written += self.content(role, message["content"])
        for call in message.get("tool_calls", ()):
            text = call if isinstance(call, str) else json.dumps(call, ensure_ascii=False)
            written += [self.part(CALL), *encode(text), self.part(END_CALL)]
        learned = role == "assistant"
        targets = [False] * len(before) + [learned] * len(written)
        targets += [learned and not place for place in range(len(after))]  # the first one ends an answer
        return [*before, *written, *after], targets

    def content(self, role: str, text: str) -> list[int]:
        """Return the ids of a content, with the spaces that the template writes beside it. A text that a
        model wrote may bring them along."""
        lead, tail, opens = self.beside[role]
        if role == "assistant":
            opens = opens and bool(lead or not text.startswith(" "))
            lead = "" if text.startswith(" ") else lead
            tail = "" if text.endswith(tail) else tail
        encode = self.tokenizer.encode_section if opens else self.tokenizer.encode_inside
        return encode(lead + text + tail)

    def start(self, messages: Messages) -> list[int]:
        """Return the ids before the first message: BOS, and the system message of a dialogue without one."""
        given = messages[0]["role"] == "system"
        return self.first if given else [*self.first, *self.default]

    def dialogue(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Return the ids of a dialogue, and which of them are supervised."""
        start = self.start(messages)
        return joined([(start, [False] * len(start)), *map(self.turn, messages)])

    def prompt(self, messages: Messages, thinking: bool = False) -> list[int]:
        """Return the ids up to where the assistant begins to write, or to think. The last message must be the
        user's, or a result of a tool."""
        if not messages or messages[-1]["role"] not in ("user", "tool"):
            raise ValueError("a prompt ends with a message of the user, or a result of a tool")
        return self.dialogue(messages)[0] + self.before["assistant"] + self.opening(thinking)

    def reply(self, results: list[str], thinking: bool = False) -> list[int]:
        """Return the ids between the `<|im_end|>` of calls and the next answer: the tools' `results`."""
        turns = [self.turn({"role": "tool", "content": result}) for result in results]
        ids = [*self.end_of_turn[1:], *joined(turns)[0], *self.before["assistant"]]
        return ids + self.opening(thinking)


def why_not(tokenizer: Tokenizer, kind: str) -> str:
    """Return the reason why a tokenizer cannot write a template, and the way out; empty if it can."""
    special = tokenizer.special_ids
    if kind == "own" and not tokenizer.turns:
        lacks = [f"markers of its own: {tokenizer.refused}"]
    elif kind == "own":
        ends = special_pattern(tokenizer).search(tokenizer.turns["after"]["assistant"])
        lacks = [] if ends else ["token that ends an answer"]
    else:
        written = "".join((*MARKERS[kind]["before"].values(), *MARKERS[kind]["after"].values()))
        lacks = [name for name in (*SPECIAL_TOKENS, END) if name in written and name not in special]
    if not lacks:
        return ""
    others = ["own"] * bool(tokenizer.turns) + ["chatml"] * ({"<|im_start|>", END} <= special.keys())
    way_out = f"choose data.template={others[0]}" if others else "it can continue texts, but not answer"
    return f"data.template={kind}: the tokenizer of this model has no {lacks[0]}; {way_out}"


def special_pattern(tokenizer: Tokenizer) -> re.Pattern:
    """Return the pattern of all special tokens, the longest first."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, names))})")


def marker_ids(tokenizer: Tokenizer, text: str, opens: bool) -> tuple[list[int], bool]:
    """Return the ids of a marker, in which names of special tokens are those tokens, and whether one of them
    comes last. `opens`: whether one precedes the text."""
    ids, pieces = [], special_pattern(tokenizer).split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            ids, opens = [*ids, tokenizer.special_ids[piece]], True
            continue
        if number and tokenizer.strips.get(pieces[number - 1], (False, False))[1]:
            piece = piece.lstrip()
        if number + 1 < len(pieces) and tokenizer.strips.get(pieces[number + 1], (False, False))[0]:
            piece = piece.rstrip()
        if piece:
            ids += (tokenizer.encode_section if opens else tokenizer.encode_inside)(piece)
            opens = False
    return ids, opens


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
    free = room - len(template.start(messages)) - sum(sizes[:system])
    later = [n for n, message in enumerate(messages) if message["role"] == "user" and n > system]
    start = next((n for n in [system, *later] if sum(sizes[n:]) <= free), later[-1] if later else system)
    return messages[:system] + messages[start:]


def cut_turn(template: ChatTemplate, messages: Messages, room: int) -> tuple[list[int], list[bool]]:
    """Cut one turn, perhaps with a system message and perhaps without its answer, to `room` ids.

    The question loses its beginning, then the answer its end, then results of tools theirs, each down to a
    quarter of the room; then the system message its end. Markers and calls stay, even if they alone take more
    than `room`.
    """
    start = template.start(messages)
    parts = [("start", start[:], [False] * len(start))]
    parts += [(message["role"], *template.turn(message)) for message in messages]
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
