"""The comparison of what students learn from text: what is run, what is not run twice, and the table."""

import sys
from pathlib import Path

import pytest

from inference.evaluate import Score
from train.lab import compare_students
from utils.errors import UserError

RIGHT = {"labels": 0.0, "teacher": 50.0, "solutions": 25.0}  # percent, at once; with thinking 20 more


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Run the command with trainings that only leave a result, and scores by kind and seed."""
    for name in ("student.pkl", "teacher.pkl"):
        (tmp_path / name).write_bytes(b"")

    def run(*arguments):
        commands = []

        def train(command, output, where):
            commands.append(command)
            output.parent.mkdir(parents=True)
            (output.parent / "TinySeek_Distill_final.pkl").write_bytes(b"")

        def score(path, name, request, count):
            percent = RIGHT[path.parts[-3]] + int(path.parts[-2].removeprefix("seed")) + 20 * request.thinking
            return Score(1, count, percent, None, 4.0 + 8 * request.thinking)

        monkeypatch.setattr(compare_students, "train_run", train)
        monkeypatch.setattr(compare_students, "score", score)
        monkeypatch.setattr(compare_students, "load_full", lambda path, device: path)
        given = ["--init", tmp_path / "student.pkl", "--teacher", tmp_path / "teacher.pkl"]
        given += ["--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["compare_students.py", *map(str, given)])
        compare_students.main()
        return commands, (tmp_path / "out" / "table.md").read_text(encoding="utf-8")

    return run


def test_every_kind_and_seed_once_with_the_same_steps(compared, tmp_path):
    commands, text = compared("--steps", "45", "--set", "distill.questions=9")
    assert [command[command.index("--seed") + 1] for command in commands] == [*"000111222"]
    for command, kind in zip(commands, ["labels", "teacher", "solutions"] * 3, strict=True):
        assert Path(command[1]).name == "distill_train.py"
        assert command[command.index("--max-steps") + 1] == "45" and "distill.questions=9" in command
        assert f"distill.answers={kind}" in command and "distill.logits=none" in command
        assert f"distill.teacher={tmp_path / 'teacher.pkl'}" in command
    assert text.splitlines() == [
        "| arithmetic | at once | with thinking | tokens |", "| --- | ---: | ---: | ---: |",
        "| labels | 1.0 (0.0 to 2.0) |  | 4.0 |",
        "| teacher | 51.0 (50.0 to 52.0) |  | 4.0 |",
        "| solutions | 26.0 (25.0 to 27.0) | 46.0 (45.0 to 47.0) | 12.0 |",
    ]  # fmt: skip
    again, same = compared("--steps", "45", "--set", "distill.questions=9")
    assert again == [] and same == text
    with pytest.raises(UserError, match="holds runs of .*student.pkl --data skills:arithmetic --steps 45"):
        compared("--steps", "90")


def test_what_cannot_be_compared_is_one_line(compared, tmp_path):
    with pytest.raises(UserError, match="--steps and --count must be at least 1"):
        compared("--steps", "0")
    (tmp_path / "teacher.pkl").unlink()
    with pytest.raises(UserError, match="teacher.pkl: no such file; train/distill_train.py makes a student"):
        compared()
