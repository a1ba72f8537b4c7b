"""The forms that a record of a `.jsonl` file may have, read as text or as a conversation."""

import unicodedata

from load_data.corpora.reserved import unit_hash
from utils.errors import UserError

ROLES = ("system", "user", "assistant")
# Other names of the same roles (ShareGPT, OpenAI, Gemini); what a tool returns is read like a question.
ALIASES = {"human": "user", "gpt": "assistant", "model": "assistant", "developer": "system"}
ALIASES |= dict.fromkeys(("tool", "function", "observation"), "user")
FORMS = (
    '{"text"}, {"conversations": [{"role", "content"}]}, {"messages": [{"role", "content"}]}, '
    '{"instruction", "input", "output"}, {"prompt", "chosen", "rejected"}'
)


def as_text(record: dict, where: str) -> str:
    """Return the record as plain text: its `text`, or the contents of its messages joined by line breaks.

    `where` ("FILE, line N") begins the `UserError` for a record of unknown form.
    """
    if "text" in record:
        return string(record, "text", where)
    return "\n".join(message["content"] for message in as_messages(record, where))


def as_messages(record: dict, where: str) -> list[dict[str, str]]:
    """Return the record as a conversation: `{"role", "content"}` for each message, roles as in `ROLES`.

    The conversation of a preference record (`prompt`, `chosen`, `rejected`) is the prompt and the chosen
    answer. `where` ("FILE, line N") begins the `UserError` for a record that is not a conversation.
    """
    for key in ("conversations", "messages"):
        if key in record:
            return checked_messages(record[key], key, where)
    if {"instruction", "output"} <= record.keys():
        question = string(record, "instruction", where)
        if record.get("input"):
            question += "\n" + string(record, "input", where)
        return [message("user", question), message("assistant", string(record, "output", where))]
    if {"prompt", "chosen", "rejected"} <= record.keys():
        prompt = as_turns(record, "prompt", "user", where)
        chosen = as_turns(record, "chosen", "assistant", where)
        repeated = chosen[: len(prompt)] == prompt  # UltraFeedback's `chosen` begins with the prompt
        return chosen if repeated else prompt + chosen
    found = ", ".join(map(str, record)) or "none"
    raise UserError(f"{where}: a record of unknown form (its keys: {found}); known forms: {FORMS}")


def as_pair(record: dict, where: str) -> tuple[list[dict[str, str]], str, str]:
    """Return a preference record as the messages of the prompt, the chosen answer and the rejected one.

    Both may begin with the prompt, as in UltraFeedback. `where` as in `as_messages`.
    """
    if missing := [key for key in ("prompt", "chosen", "rejected") if key not in record]:
        raise UserError(f'{where}: a pair has "prompt", "chosen" and "rejected"; no {", ".join(missing)}')
    prompt, answers = as_turns(record, "prompt", "user", where), []
    for key in ("chosen", "rejected"):
        turns = as_turns(record, key, "assistant", where)
        turns = turns[len(prompt) :] if turns[: len(prompt)] == prompt else turns
        if [one["role"] for one in turns] != ["assistant"]:
            raise UserError(f"{where}: {key} must be one answer of the assistant to the prompt")
        answers.append(turns[0]["content"])
    if answers[0] == answers[1]:
        raise UserError(f"{where}: chosen and rejected are the same answer")
    return prompt, *answers


def split_key(messages: list[dict[str, str]], same_question: str = "folded") -> str | None:
    """Return the text whose hash decides the side of a conversation; None if the user says nothing.

    It is the question with the lowest hash: a conversation is held out if any of its questions is, so no
    conversation to train on contains a held-out question, in pre-training or later. (`exact`: the first one.)
    """
    keys = [question_key(one["content"], same_question) for one in messages if one["role"] == "user"]
    return min(keys if same_question == "folded" else keys[:1], key=unit_hash, default=None)


def question_key(question: str, same_question: str = "folded") -> str:
    """Return `question` without case, white space, punctuation and width (NFKC); `exact`: as it is."""
    if same_question == "exact":
        return question
    folded = unicodedata.normalize("NFKC", question).casefold()
    return "".join(one for one in folded if unicodedata.category(one)[0] not in "ZPC") or folded


def scored_answers(messages: list[dict[str, str]], val_fraction: float, same_question: str) -> list[int]:
    """Return the indices of the answers of a held-out dialogue whose own question no training has seen.

    The questions of other turns may also occur in dialogues to train on. A single question is always scored:
    skills have splits of their own."""
    answers = [n for n in range(1, len(messages)) if messages[n]["role"] == "assistant"]
    keys = {n: unit_hash(question_key(messages[n - 1]["content"], same_question)) for n in answers}
    return [n for n in answers if keys[n] < val_fraction or len(answers) == 1]


def as_turns(record: dict, key: str, role: str, where: str) -> list[dict[str, str]]:
    """Return `record[key]` as messages; it may be a list of them, or one text written by `role`."""
    if isinstance(record[key], list):
        return checked_messages(record[key], key, where)
    return [message(role, string(record, key, where))]


def checked_messages(messages, key: str, where: str) -> list[dict[str, str]]:
    """Return messages with known roles and texts, other keys left out; `from` and `value` (ShareGPT) are
    read as `role` and `content`."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {key} must be a list of at least one message, not {shortened(messages)}")
    checked = []
    for number, item in enumerate(messages, start=1):
        if isinstance(item, dict) and {"from", "value"} <= item.keys():
            item = message(item["from"], item["value"])
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise UserError(
                f'{where}: message {number} of {key} must be {{"role": ..., "content": ...}}, '
                f"not {shortened(item)}"
            )
        role = item["role"]
        role = ALIASES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise UserError(
                f"{where}: message {number} of {key} has role {shortened(role)}; known roles: "
                f"{', '.join((*ROLES, *ALIASES))}"
            )
        checked.append(message(role, string(item, "content", f"{where}, message {number} of {key}")))
    return checked


def message(role: str, content: str) -> dict[str, str]:
    """Return one message."""
    return {"role": role, "content": content}


def string(record: dict, key: str, where: str) -> str:
    """Return `record[key]`, which must be a text."""
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key} must be a text, not {shortened(record[key])}")
    return record[key]


def shortened(value) -> str:
    """Return the beginning of a value, for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
