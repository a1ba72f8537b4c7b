"""Look a name of Python's standard library up in its docstrings: what it is for, and how it is called.

Only files that training may read are open. What is held out for scoring stays unknown here too: a question
about it would otherwise be answered from the very text that it is scored against.
"""

from functools import cache

from inference.tools.calculator import ToolError
from load_data.corpora.sources import TRAIN
from load_data.skills.docstrings import entries

MOST = 5  # suggestions


@cache
def known(val_fraction: float) -> dict[str, str]:
    """Return what is said about each name; the first reading takes some seconds."""
    return {name: " ".join(filter(None, (call or name, "-" * bool(sentence), sentence)))
            for name, sentence, call in entries(val_fraction)[TRAIN]}  # fmt: skip


def look_up(name: str, val_fraction: float) -> str:
    """Return one line about `name`, such as `textwrap.dedent`. Raises `ToolError`."""
    found, name = known(val_fraction), name.strip()
    if name in found:
        return found[name]
    similar = [one for one in found if one.endswith(f".{name}")][:MOST] if name else []
    raise ToolError(f"no such name; there is {', '.join(similar)}" if similar else "no such name")
