"""Run a Hugging Face chat template in Jinja's sandbox, and read off its markers (turns.py).

The template came with a model, perhaps from a stranger: its size, its output, its steps and its time are
bounded, its memory too where the system can do that (Linux), and it sees nothing but the messages and the
names of special tokens.
"""

import json
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from load_data.tokenization.turns import Refused, Render, check_against, derived

LONGEST = 2**17  # characters of a template, and of what it writes
MOST_LINES = 200_000  # lines of Python that one rendering may run
MOST_SECONDS = 5  # of one rendering, which takes a thousandth of one
MEMORY = 2**26  # bytes; one line can ask for any number of them


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, without products of texts, which can be of any size."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context, operator, left, right):
        """Multiply numbers."""
        if operator == "**" or not all(isinstance(one, int | float) for one in (left, right)):
            raise SecurityError(f"{operator} is not allowed")
        return super().call_binop(context, operator, left, right)


def read_turns(source: str, names: dict[str, str], special: Collection[str]) -> dict:
    """Return the markers of the template `source`, or {"refused": why}. `names`: the special tokens by their
    role (`bos_token`); `special`: all of them, one of which must end an answer."""
    try:
        with little_memory():
            render = renderer(source, names)
            turns = derived(render)
            if not any(name in turns["after"]["assistant"] for name in special):
                raise Refused("no special token ends an answer")
            check_against(render, turns)
        return turns
    except Refused as error:
        return {"refused": f"its chat template is not understood: {error}"}


def renderer(source: str, names: dict[str, str]) -> Render:
    """Return the function (messages, whether to ask for an answer) -> text. It raises `Refused` for all that
    goes wrong in the template, and for one that does not come to an end."""

    def raise_exception(message):
        raise TemplateError(message)

    if len(source) > LONGEST:
        raise Refused(f"it is longer than {LONGEST:,} characters")
    # {% generation %} marks the answers for `transformers`, and writes nothing.
    source = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", source)
    source = re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", source)
    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = lambda value, **form: json.dumps(value, **{"ensure_ascii": False} | form)
    sandbox.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    try:
        template = sandbox.from_string(source)
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from None

    def render(messages: list[dict], prompt: bool) -> str:
        given = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
        text, before = "", sys.gettrace()
        sys.settrace(line_counter())
        try:
            for piece in template.generate(**names, **given):
                text += piece
                if len(text) > LONGEST:
                    raise Refused(f"it writes more than {LONGEST:,} characters")
        except Exception as error:
            if isinstance(error, Refused):
                raise
            raise Refused(f"{type(error).__name__}: {error}") from None
        finally:
            sys.settrace(before)
        return text

    return render


@contextmanager
def little_memory() -> Iterator[None]:
    """Within this context more than `MEMORY` beside what is in use is a `MemoryError`, where that can be."""
    try:
        import resource  # Unix only

        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MEMORY
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    smallest = min(one for one in (size, *before) if one != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (smallest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def line_counter() -> Callable:
    """Return a trace function that stops a program after `MOST_LINES` lines of Python, or `MOST_SECONDS`."""
    left, end = MOST_LINES, time.monotonic() + MOST_SECONDS

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left < 0 or time.monotonic() > end:
            raise Refused(f"it does not end within {MOST_LINES:,} steps and {MOST_SECONDS} seconds")
        return count

    return count
