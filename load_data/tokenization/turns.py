"""The markers of a Hugging Face chat template: the text before and after what each role says.

A chat template is a Jinja program that came with a model. It runs once, at import (jinja_sandbox.py), on
dialogues made up for the purpose, and the markers are read off its output. They must then reproduce its
output for other dialogues, character by character; otherwise the template is refused.

    first           text that begins a dialogue (BOS)
    before, after   text around a content, by role; without "system" if the template has no place of its own
                    for system messages (Llama-2 writes them into the first question)
    prompt          text after a question with which the answer is asked for
    default_system  the system message of a dialogue without one (Qwen2.5), or null

What the markers leave out: a template may strip white space from contents (the ones here have none to strip);
a date in it stays that of the import; and the empty thinking block that Qwen3 writes in the last answer only
(load_data/chat/chat_template.py says why).
"""

import re
from collections.abc import Callable, Collection

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
PROBES = ["Probe0Q", "Probe1A", "Probe2Q", "Probe3S"]
CHECKS = ["First question: 12 or 7?", "An answer.", "第二个问题", "Noch eine Antwort", "?", "42", "Be kind."]

Render = Callable[[list[dict], bool], str]


class Refused(Exception):
    """The reason why a chat template cannot be used."""


def check_turns(turns: dict | None) -> dict | None:
    """Return `turns` if they have the form above; they may come from a stranger's checkpoint."""
    if turns is not None and "refused" not in turns:
        texts = [turns["first"], turns["prompt"], turns["default_system"] or ""]
        for side in ("before", "after"):
            texts += [turns[side]["user"], turns[side]["assistant"], turns[side].get("system", "")]
        roles = turns["before"].keys()
        if not all(isinstance(text, str) for text in texts) or roles != turns["after"].keys():
            raise ValueError("turns of another form")
    return turns


def derived(render: Render) -> dict:
    """Return the markers that explain what the template writes for the probes."""
    question, answer, again, system = PROBES
    start, to_answer, to_question, after_user = gaps(render, (question, answer, again))
    ending = gaps(render, (question, answer, again), prompt=True)[-1]
    after_answer = gaps(render, (question, answer))[-1]
    before_user = rest(to_question, after_answer, "what follows an answer depends on its place")
    before_answer = rest(to_answer, after_user, "what follows a question depends on its place")
    prompt = rest(ending, after_user, "it asks for an answer before the question ends")
    other = f"it asks for an answer with {prompt!r}, and answers begin with {before_answer!r}"
    if rest(before_answer, prompt, other).strip(" "):
        raise Refused(other)
    if not start.endswith(before_user):
        raise Refused(f"the first question follows {start!r}, a later one {before_user!r}")
    start = start.removesuffix(before_user)
    turns = {"first": start, "prompt": prompt, "default_system": None}
    turns["before"] = {"user": before_user, "assistant": before_answer}
    turns["after"] = {"user": after_user, "assistant": after_answer}
    try:
        head, between, _ = gaps(render, (system, question), first="system")
    except Refused:
        return turns  # for example "System role not supported"
    after_system = between.removesuffix(before_user)
    if not between.endswith(before_user):
        return turns
    if head.startswith(start):
        turns["before"]["system"] = head.removeprefix(start)
    elif start.startswith(head) and start.removeprefix(head).endswith(after_system):
        turns["first"], turns["before"]["system"] = "", head
        turns["default_system"] = start.removeprefix(head).removesuffix(after_system)
    else:
        return turns
    turns["after"]["system"] = after_system
    return turns


def gaps(render: Render, contents: tuple[str, ...], prompt: bool = False, first: str = "user") -> list[str]:
    """Return the text before, between and after `contents` as the template writes them."""
    text = render(dialogue(contents, first), prompt)
    found = re.fullmatch("(.*?)" + "(.*?)".join(map(re.escape, contents)) + "(.*)", text, re.DOTALL)
    if not found or any(text.count(content) != 1 for content in contents):
        raise Refused("it changes, leaves out or repeats a message")
    return list(found.groups())


def rest(text: str, beginning: str, problem: str) -> str:
    """Return `text` without its `beginning`."""
    if not text.startswith(beginning):
        raise Refused(problem)
    return text.removeprefix(beginning)


def dialogue(contents: Collection[str], first: str = "user") -> list[dict]:
    """Return messages: perhaps of the system, then of the user and the assistant in turn."""
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents)]


def written(turns: dict, messages: list[dict], prompt: bool) -> str:
    """Return a dialogue in these markers."""
    if turns["default_system"] is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": turns["default_system"]}, *messages]
    text = "".join(
        turns["before"][one["role"]] + one["content"] + turns["after"][one["role"]] for one in messages
    )
    return turns["first"] + text + turns["prompt"] * prompt


def check_against(render: Render, turns: dict) -> None:
    """Raise `Refused` if the template writes other dialogues in another way than `turns` do."""
    *contents, system = CHECKS
    for length in range(1, len(contents) + 1):
        for first in ("user", "system")[: len(turns["before"]) - 1]:
            messages = dialogue([system] * (first == "system") + contents[:length], first)
            prompt = bool(length % 2)
            for asked in {False, prompt}:
                theirs, ours = render(messages, asked), written(turns, messages, asked)
                if theirs != ours and (prompt or theirs.replace(EMPTY_THOUGHT, "") != ours):
                    place = next((n for n, (a, b) in enumerate(zip(theirs, ours)) if a != b), len(ours))
                    raise Refused(
                        f"in a dialogue of {len(messages)} messages it writes "
                        f"{theirs[place : place + 40]!r} where {ours[place : place + 40]!r} is expected"
                    )
