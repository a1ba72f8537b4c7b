"""The forms that a record of a `.jsonl` file may have, and what they say as text or as a conversation."""

from utils.errors import UserError

ROLES = ("system", "user", "assistant")
FORMS = (
    '{"text"}, {"conversations": [{"role", "content"}]}, {"messages": [{"role", "content"}]}, '
    '{"instruction", "input", "output"}, {"prompt", "chosen", "rejected"}'
)


def as_text(record: dict, where: str) -> str:
    """The record as plain text: its `text`, or the contents of its messages joined by line breaks.

    `where` ("FILE, line N") begins the `UserError` for a record of no known form.
    """
    if "text" in record:
        return string(record, "text", where)
    return "\n".join(message["content"] for message in as_messages(record, where))


def as_messages(record: dict, where: str) -> list[dict[str, str]]:
    """The record as a conversation: `{"role", "content"}` for each message, roles as in `ROLES`.

    Of a preference record (`prompt`, `chosen`, `rejected`) the conversation is the prompt and the chosen
    answer. `where` ("FILE, line N") begins the `UserError` for a record that is no conversation.
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
        return as_turns(record, "prompt", "user", where) + as_turns(record, "chosen", "assistant", where)
    found = ", ".join(map(str, record)) or "none"
    raise UserError(f"{where}: a record of unknown form (its keys: {found}); known forms: {FORMS}")


def first_question(record: dict, where: str) -> str | None:
    """What the user says first, if the record is a conversation: it decides on which side of the split the
    record is, so that the same question is never on both, in pre-training or later."""
    messages = [] if "text" in record else as_messages(record, where)
    return next((one["content"] for one in messages if one["role"] == "user"), None)


def as_turns(record: dict, key: str, role: str, where: str) -> list[dict[str, str]]:
    """`record[key]`, which may be one text said by `role` or a list of messages."""
    if isinstance(record[key], list):
        return checked_messages(record[key], key, where)
    return [message(role, string(record, key, where))]


def checked_messages(messages, key: str, where: str) -> list[dict[str, str]]:
    """A list of messages, each with a known role and a text; other keys are left out."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where}: {key} must be a list of at least one message, not {shortened(messages)}")
    for number, item in enumerate(messages, start=1):
        if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
            raise UserError(
                f'{where}: message {number} of {key} must be {{"role": ..., "content": ...}}, '
                f"not {shortened(item)}"
            )
        if item["role"] not in ROLES:
            role = shortened(item["role"])
            raise UserError(
                f"{where}: message {number} of {key} has role {role}; known roles: {', '.join(ROLES)}"
            )
        string(item, "content", f"{where}, message {number} of {key}")
    return [message(item["role"], item["content"]) for item in messages]


def message(role: str, content: str) -> dict[str, str]:
    """One message."""
    return {"role": role, "content": content}


def string(record: dict, key: str, where: str) -> str:
    """`record[key]`, which must be a text."""
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key} must be a text, not {shortened(record[key])}")
    return record[key]


def shortened(value) -> str:
    """The beginning of a value, for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
