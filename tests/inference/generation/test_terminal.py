"""The terminal: what reaches it is harmless, what comes from it is a message."""

import io
import os
import sys
import unicodedata

import pytest

from inference.generation import terminal
from inference.generation.terminal import RED, closed_pipe_ends, harmless, open_streams, read_message, tell


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_control_characters_are_written_out():
    """All that Unicode calls control characters, but newline and tab; no other character changes."""
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    for one in text:
        control = unicodedata.category(one) == "Cc" and one not in "\n\t"
        assert harmless(one) == (f"\\x{ord(one):02x}" if control else one)
    assert harmless("\x1b]0;owned\x07\x9b2J") == "\\x1b]0;owned\\x07\\x9b2J"


@pytest.mark.parametrize(
    "stream, settings, coloured",
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": ""}, True),  # the convention: empty is as good as absent
        (Terminal, {"NO_COLOR": "1"}, False),
        (Terminal, {"TERM": "dumb"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_colours_are_for_terminals(monkeypatch, stream, settings, coloured):
    for name, value in ({"TERM": "xterm", "NO_COLOR": "", "WT_SESSION": "1"} | settings).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream())
    tell("error: \x1b[5m", RED)
    assert sys.stderr.getvalue() == ("\x1b[31m%s\x1b[0m\n" if coloured else "%s\n") % "error: \\x1b[5m"


def test_the_prompt_is_not_written_into_a_redirected_answer(monkeypatch):
    """`chat.py > log` with a person at the keyboard."""
    monkeypatch.setattr(sys, "stdin", Terminal("hello\n"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(terminal, "is_waiting", lambda: False)
    assert read_message() == "hello"
    assert sys.stdout.getvalue() == "" and sys.stderr.getvalue() == "> "
    with pytest.raises(EOFError):
        read_message()


def test_waiting_lines_of_a_terminal_are_one_message_and_those_of_a_pipe_are_not(monkeypatch):
    for stream, messages in ((Terminal, ["a\n\nb"]), (io.StringIO, ["a", "", "b"])):
        monkeypatch.setattr(sys, "stdin", stream("a\n\nb\n"))
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(terminal, "is_waiting", lambda: True)
        assert [read_message() for _ in messages] == messages


def test_a_closed_pipe_ends_quietly(monkeypatch):
    """`chat.py | head -c 3`: neither now nor when Python flushes its streams at the end."""
    redirected = []
    monkeypatch.setattr(os, "dup2", lambda old, new: redirected.append(new))
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", closefd=False) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with closed_pipe_ends():
            terminal.show("a")
            raise AssertionError("not reached")
        assert redirected == [1, 2]
        monkeypatch.undo()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, writing)
        os.close(nowhere)
    os.close(writing)


def test_closed_streams_are_nowhere(monkeypatch):
    """`chat.py <&-`: Python has None for a stream that was closed."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    open_streams()
    terminal.show("a"), tell("b")
    with pytest.raises(EOFError):
        read_message()
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()
