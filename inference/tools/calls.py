"""Run the calls that a model writes: `{"name": "calculator", "arguments": {"expression": "12 * 34"}}`.

Whatever the model wrote, the answer is a text that it can read. What went wrong begins with `error: `.
"""

import json

from inference.tools.calculator import ToolError, calculate
from inference.tools.lookup import look_up
from load_data.skills import HELD_OUT
from utils.errors import UserError

LONGEST_CALL, LONGEST_RESULT = 1000, 300  # characters
TOOLS = {  # name -> its one argument, a text, and the function
    "calculator": ("expression", lambda expression, _: calculate(expression)),
    "lookup": ("name", look_up),
}


def run_call(text: str, val_fraction: float = HELD_OUT) -> str:
    """Return the result of the call in `text`. `val_fraction`: the part of the standard library that the
    model's training held out."""
    try:
        name, argument = parsed(text)
        result = TOOLS[name][1](argument, val_fraction)
    except (ToolError, UserError) as error:  # `UserError`: an installation without the library's source
        result = f"error: {error}"
    return result if len(result) <= LONGEST_RESULT else result[: LONGEST_RESULT - 3] + "..."


def parsed(text: str) -> tuple[str, str]:
    """Return the name of a tool and its argument. Raises `ToolError`."""
    form = '{"name": ..., "arguments": {...}}'
    if len(text) > LONGEST_CALL:
        raise ToolError(f"a call has at most {LONGEST_CALL} characters")
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        raise ToolError(f"not JSON; a call is {form}") from None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
        raise ToolError(f"a call is {form}")
    name, arguments = call["name"], call["arguments"]
    if not isinstance(name, str) or name not in TOOLS:
        raise ToolError(f"no such tool; tools: {', '.join(TOOLS)}")
    key = TOOLS[name][0]
    if not isinstance(arguments, dict) or [*arguments] != [key] or not isinstance(arguments[key], str):
        raise ToolError(f'the arguments of {name} are {{"{key}": a text}}')
    return name, arguments[key]
