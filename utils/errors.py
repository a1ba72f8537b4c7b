"""Errors that teach: one clear line on standard error and exit code 2, never a traceback.

`UserError` is for what a person can fix (a wrong flag, a missing file, a broken checkpoint). Its message
says what is wrong, where, and the way out. Anything else that goes wrong is a bug of ours and keeps its
traceback.
"""

import argparse
import re
import signal
import sys


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where, and how to fix it."""


class Parser(argparse.ArgumentParser):
    """An argument parser that shows a script's docstring as help, and whose errors are one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        """Instead of argparse's two lines."""
        raise UserError(f"{message}; --help lists the flags")


def end_cleanly() -> None:
    """Let SIGTERM end the program as an exception does, so that a half-written file does not stay."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def run_main(main) -> None:
    """Run `main()`; a `UserError` becomes one line on standard error and exit code 2."""
    try:
        code = main()
    except UserError as error:
        line = " ".join(str(error).split())
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        way_out = "lower train.batch_size (raise train.accumulation_steps by as much) or data.sequence_length"
        print(f"error: out of memory: {way_out}, or take a smaller model", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)
