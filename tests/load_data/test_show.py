"""The script that shows samples: its text and its table say what the model gets."""

import io
import os
import subprocess
import sys

import pytest

from load_data import show
from load_data.chat.records import message, question_key
from load_data.corpora.reserved import unit_hash
from tests.inference.tools import write_checkpoint
from utils.errors import run_main

TALKS = [
    [message("user", "hi"), message("assistant", "你")],
    [
        message("user", "long question"),
        message("assistant", "no"),
        message("user", "z"),
        message("assistant", "y"),
    ],
]


def run(monkeypatch, capsys, *args):
    """(exit code, standard output, standard error) of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["show.py", *map(str, args)])
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as ended:
        run_main(show.main)
    return (ended.value.code, *capsys.readouterr())


@pytest.fixture
def data(write, monkeypatch, tmp_path):
    """A file with the dialogues of `TALKS` first among those for training, and no checkpoint in the way."""
    monkeypatch.setattr(show, "OUT", tmp_path / "out")
    filler = [[message("user", f"question {number}"), message("assistant", "a")] for number in range(100)]
    return write("a.jsonl", [{"messages": messages} for messages in TALKS + filler])


HAND_MADE = """\
dialogue 0: 9 positions

User：hi
Assistant：⟦你<|im_end|>⟧

position  input token                 label
       0      3 User：                -100
       1     78 'h'                   -100
       2     79 'i'                   -100
       3    205 '\\n'                  -100
       4      4 Assistant：             167 b'\\xe4'
       5    167 b'\\xe4'                 128 b'\\xbd'
       6    128 b'\\xbd'                 261 b'\\xa0'
       7    261 b'\\xa0'                   2 <|im_end|>
       8      2 <|im_end|>            -100
"""


def test_a_dialogue_by_hand(data, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "--data", data, "--index", 0)
    assert (code, err) == (0, "")
    assert out.startswith("no checkpoint: every byte is a token; template tinyseek; ")
    assert out.split("\n\n", 1)[1] == HAND_MADE


@pytest.mark.parametrize("short", ["SFT", "Pre"])
def test_the_tokenizer_and_settings_of_a_checkpoint(short, data, monkeypatch, capsys):
    """Of fine-tuning before that of pre-training; `--template` wins over the checkpoint's."""
    path = write_checkpoint(show.OUT / f"TinySeek_{short}_final.pkl", short)
    if short == "SFT":
        write_checkpoint(show.OUT / "TinySeek_Pre_final.pkl")
    out = run(monkeypatch, capsys, "--data", data, "--template", "chatml", "--index", 1)[1]
    assert out.startswith(f"{path}; template chatml; ")
    assert "<|im_start|>assistant\n⟦no<|im_end|>⟧\n<|im_start|>user\nz<|im_end|>\n" in out
    assert out.count("-100") == sum(line.endswith("-100") for line in out.splitlines()) > 20
    assert sum(not line.endswith("-100") for line in out.split("label\n")[1].splitlines()) == 5


def test_by_default_there_are_three(data, write, monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--data", data)[1]
    assert [line for line in out.splitlines() if line.startswith("dialogue ")] == [
        "dialogue 0: 9 positions", "dialogue 1: 26 positions", "dialogue 2: 15 positions"
    ]  # fmt: skip
    few = write("few.jsonl", [{"messages": TALKS[0]}, {"messages": held_out()}, {"messages": []}])
    code, out, err = run(monkeypatch, capsys, "--data", few)
    assert code == 0 and err.startswith("skipped records: 1\n")
    assert "1 dialogues for training" in out and out.count("dialogue 0") == 1 and "dialogue 1" not in out
    three = write("three.jsonl", [{"messages": talk} for talk in (*TALKS, TALKS[0])])  # none held out (D17)
    assert "3 dialogues for training" in run(monkeypatch, capsys, "--data", three)[1]
    code, _, err = run(monkeypatch, capsys, "--data", write("none.jsonl", [{"messages": held_out()}]))
    assert code == 2 and "every dialogue is held out" in err


def test_as_many_dialogues_of_a_skill_as_needed(data, monkeypatch, capsys):
    monkeypatch.setattr(show, "FEWEST", 5)
    out = run(monkeypatch, capsys, "--data", "skills:lists", "--index", 6, 0)[1]
    assert "; 7 dialogues for training" in out and out.index("dialogue 6") < out.index("dialogue 0")


def held_out():
    """One dialogue that is for validation."""
    questions = (f"question {number}" for number in range(1000))
    question = next(one for one in questions if unit_hash(question_key(one)) < 0.05)
    return [message("user", question), message("assistant", "a")]


def test_packed_rows_say_where_each_dialogue_begins(data, monkeypatch, capsys):
    out = run(monkeypatch, capsys, "--data", data, "--packed", "--index", 0, 1)[1]
    rows = out.split("\nrow ")[1:]
    assert [row[:2] for row in rows] == ["0:", "1:"]
    for row in rows:
        used, dialogues = int(row.split()[1]), int(row.split(", ")[1].split()[0])
        lines = [line.split() for line in row.split("label\n")[1].splitlines()]
        padding = lines.pop() if lines[-1][0] == "then" else ["then", "0"]
        assert used == len(lines) == 512 - int(padding[1])
        assert [line[0] for line in lines if line[1] == "0"] == [str(n) for n in range(dialogues)]
        assert all(line[3] == "User：" for line in lines if line[1] == "0")
        assert row.count("⟦") >= dialogues > 3


def test_colours_are_for_terminals(data, monkeypatch, capsys):
    class Terminal(io.StringIO):
        isatty = lambda self: True  # noqa: E731
        reconfigure = lambda self, **_: None  # noqa: E731

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal := Terminal())
        patch.setattr(sys, "argv", ["show.py", "--data", str(data), "--index", "0"])
        show.main()
    assert "\033[32m你<|im_end|>\033[0m" in terminal.getvalue()


@pytest.mark.parametrize("args, problem", [
    (["--index", "500"], "--index 500: there are dialogues 0 to "),
    (["--index", "-1"], "--index -1: there are dialogues 0 to "),
    (["--packed", "--index", "70"], "--index 70: there are rows 0 to "),
    (["--checkpoint", "nothing.pkl"], "nothing.pkl"),
    (["--tempalte", "chatml"], "unrecognized arguments"),
])  # fmt: skip
def test_errors_are_one_line(args, problem, data, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "--data", data, *args)
    assert code == 2 and err.startswith("error: ") and problem in err and err.count("\n") == 1


@pytest.mark.slow
def test_it_starts_from_anywhere(data, tmp_path):
    """In a process of its own, from another folder, with a console that speaks another encoding."""
    done = subprocess.run(
        [sys.executable, show.__file__, "--data", "skills:lists", "--index", "3"],
        cwd=tmp_path, capture_output=True, timeout=120, env=dict(os.environ, PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "dialogue 3: " in done.stdout.decode("utf-8") and "⟦" in done.stdout.decode("utf-8")
