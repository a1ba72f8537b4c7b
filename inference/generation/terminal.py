"""The terminal of a chat: whole messages in, harmless text out.

The text of the model goes to standard output, remarks and errors to standard error. Colours appear on a
terminal only, and never where the environment sets `NO_COLOR` (https://no-color.org).
"""

import contextlib
import os
import select
import sys

# Trap: a model can write anything. A terminal obeys some control characters: they move the cursor, rename the
# window or type for the user. All of them but newline and tab are shown as \x1b and the like.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
DIM, RED = "2", "31"
PASTE = 0.03  # seconds within which the next line of a paste is there


def open_streams() -> None:
    """Use UTF-8 on all three streams (a Windows pipe does not); replace closed ones with the null device."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        if hasattr(getattr(sys, name), "reconfigure"):  # a notebook's streams have no encoding to change
            getattr(sys, name).reconfigure(encoding="utf-8", errors="replace")


@contextlib.contextmanager
def closed_pipe_ends():
    """End quietly when nobody reads the output any more, as in `| head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):  # Python flushes both once more at exit
            os.dup2(nowhere, number)


def harmless(text: str) -> str:
    """Return `text` with its control characters written out."""
    return text.translate(VISIBLE)


def show(piece: str) -> None:
    """Write text of the model to standard output at once."""
    sys.stdout.write(harmless(piece))
    sys.stdout.flush()


def tell(line: str, colour: str = DIM, end: str = "\n") -> None:
    """Write a remark to standard error, in full or (with another `end`) a piece of it."""
    line = harmless(line)
    windows = os.name == "nt" and "WT_SESSION" not in os.environ  # an old console would print the codes
    plain = windows or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if sys.stderr.isatty() and not plain and line:
        line = f"\x1b[{colour}m{line}\x1b[0m"
    print(line, end=end, file=sys.stderr, flush=True)


def murmur(piece: str) -> None:
    """Write text of the model that is not its answer, such as thinking: to standard error, dimmed."""
    tell(piece, end="")


def edit_lines() -> None:
    """Give `input` arrow keys, a history and multi-line paste where Python has readline and a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    with contextlib.suppress(ImportError):  # Windows consoles edit lines themselves
        import readline

        if "libedit" not in (readline.__doc__ or ""):
            readline.parse_and_bind("set enable-bracketed-paste on")


def read_message(prompt: str = "> ") -> str:
    """Return the next message; raises `EOFError` at the end of the input.

    In piped input, each line is a message. On a terminal, lines pasted together are one message: readline
    returns them together; without readline, all lines that are already waiting are read.
    """
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n")
    if not sys.stdout.isatty():  # keeps the prompt out of a redirected answer
        sys.stderr.write(prompt)
        sys.stderr.flush()
        prompt = ""
    lines = [input(prompt)]
    with contextlib.suppress(EOFError):
        while is_waiting():
            lines.append(input())
    return "\n".join(lines)


def is_waiting() -> bool:
    """Return True if the terminal already has more to read."""
    if os.name == "nt":
        import msvcrt

        return msvcrt.kbhit()
    return bool(select.select([sys.stdin], [], [], PASTE)[0])
