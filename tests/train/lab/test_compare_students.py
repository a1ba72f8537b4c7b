"""The comparison of students: what is run, for how long, what is not run twice, and the tables."""

import sys
from pathlib import Path

import pytest
import torch

from inference.evaluate import Score
from train.lab import compare_students
from utils.errors import UserError

RIGHT = {"labels": 0.0, "teacher": 50.0, "solutions": 25.0}  # percent, at once; with thinking 20 more
STEP_MS = {"alone": 100, "hidden": 250}  # of steps that have warmed up


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Run the command with trainings that only leave a result, and scores by kind and seed."""
    for name in ("student.pkl", "teacher.pkl"):
        (tmp_path / name).write_bytes(b"")

    def run(*arguments):
        commands = []

        def train(command, output, where):
            commands.append(command)
            (output.parent / "distill_train").mkdir(parents=True)
            (output.parent / "TinySeek_Distill_final.pkl").write_bytes(b"")
            kind = "hidden" if "hidden" in str(output.parent) else "alone"
            ms = STEP_MS[kind]  # of a step; one is slow because of another program
            rows = [(0, 0), (5, 9999), (10, ms), (15, 7777), (20, ms)]
            lines = [f"step={step}  step_ms={ms}\n" for step, ms in rows]
            (output.parent / "distill_train" / "log.txt").write_text("".join(lines))
            scores = "lists  before=0.00  after=40.00\narithmetic  before=1.00  after=60.00\n"
            (output.parent / "distill_train" / "scores.txt").write_text(scores)

        def score(path, name, request, count):
            percent = RIGHT[path.parts[-3]] + int(path.parts[-2].removeprefix("seed")) + 20 * request.thinking
            return Score(1, count, percent, None, 4.0 + 8 * request.thinking)

        def checkpoint(path):  # a smaller loss with each seed; wide ones are better; a tied head
            seed = path.parent.name.removeprefix("seed")
            loss = 3.0 - 0.1 * int(seed if seed.isdigit() else 0) - ("-64" in str(path))
            table = torch.zeros(7, 3)
            return {"weights": {"table": table, "head": table}, "evaluation": {"val_bpb": loss}}

        monkeypatch.setattr(compare_students, "train_run", train)
        monkeypatch.setattr(compare_students, "score", score)
        monkeypatch.setattr(compare_students, "load_full", lambda path, device: path)
        monkeypatch.setattr(compare_students, "load_checkpoint", checkpoint)
        given = ["--teacher", tmp_path / "teacher.pkl", "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", ["compare_students.py", *map(str, given)])
        compare_students.main()
        return commands, (tmp_path / "out" / "table.md").read_text(encoding="utf-8")

    return run


def value(command: list[str], flag: str) -> str:
    """Return what a command gives for `flag`."""
    return command[command.index(flag) + 1]


def test_every_kind_gets_the_steps_that_fit_into_the_seconds(compared, tmp_path):
    """The first rows of a log are not the time of a step; every size has a time of its own."""
    asked = ("--kinds", "alone", "hidden", "--seconds", "1", "4", "--seeds", "0", "1", "--widths", "32", "64")
    commands, text = compared(*asked)
    paces, runs = commands[:4], commands[4:]
    assert {value(one, "--max-steps") for one in paces} == {"35"} and len(runs) == 16
    found = [(Path(value(one, "--out")).parent.name, value(one, "--max-steps")) for one in runs[:8]]
    assert found == [
        ("alone-32-1", "10"), ("alone-32-4", "40"), ("alone-64-1", "10"), ("alone-64-4", "40"),
        ("hidden-32-1", "4"), ("hidden-32-4", "16"), ("hidden-64-1", "4"), ("hidden-64-4", "16"),
    ]  # fmt: skip
    assert [value(one, "--seed") for one in runs] == 8 * ["0"] + 8 * ["1"]
    wide = next(one for one in runs if "alone-64-1" in value(one, "--out"))
    assert {"model.hidden_size=64", "model.num_attention_heads=2", "model.num_key_value_heads=2",
            "model.intermediate_size=192", "distill.logits=none", "train.max_seconds=null",
            f"distill.teacher={tmp_path / 'teacher.pkl'}"} <= {*wide}  # fmt: skip
    assert text.splitlines()[:6] == [
        "| student | parameters | seconds | steps | bits per byte |", "| --- | ---: | ---: | ---: | ---: |",
        "| alone | 21 | 1 | 10 | 2.950 (2.900 to 3.000) |",
        "| hidden | 21 | 1 | 4 | 2.950 (2.900 to 3.000) |",
        "| alone | 21 | 1 | 10 | 1.950 (1.900 to 2.000) |",
        "| hidden | 21 | 1 | 4 | 1.950 (1.900 to 2.000) |",
    ]  # fmt: skip
    assert (tmp_path / "out" / "students.png").stat().st_size > 1000
    assert compared(*asked) == ([], text)


def test_dialogues_have_scores_and_go_on_with_a_student(compared, tmp_path):
    given = ("--task", "dialogues", "--init", tmp_path / "student.pkl", "--steps", "9", "--seeds", "0", "1")
    commands, text = compared(*given, "--kinds", "alone", "stored", "--set", "data.limit=5")
    assert len(commands) == 4 and {value(one, "--max-steps") for one in commands} == {"9"}
    assert {value(one, "--config") for one in commands} == {"skills"}
    assert all("data.limit=5" in one for one in commands)
    assert "distill.store_logits=true" in commands[1] and "distill.store_logits=true" not in commands[0]
    assert text.splitlines()[0].endswith("| steps | bits per byte | lists | arithmetic |")
    assert text.splitlines()[2] == "| alone | 21 |  | 9 | 2.950 (2.900 to 3.000) | 40.0 | 60.0 |"


def test_answers_are_learned_for_the_same_steps(compared, tmp_path):
    given = ("--task", "answers", "--init", tmp_path / "student.pkl")
    commands, text = compared(*given, "--steps", "45", "--set", "distill.questions=9")
    assert [value(command, "--seed") for command in commands] == [*"000111222"]
    for command, kind in zip(commands, ["labels", "teacher", "solutions"] * 3, strict=True):
        assert Path(command[1]).name == "distill_train.py"
        assert value(command, "--max-steps") == "45" and "distill.questions=9" in command
        assert f"distill.answers={kind}" in command and "distill.logits=none" in command
    assert text.splitlines() == [
        "| arithmetic | at once | with thinking | tokens |", "| --- | ---: | ---: | ---: |",
        "| labels | 1.0 (0.0 to 2.0) |  | 4.0 |",
        "| teacher | 51.0 (50.0 to 52.0) |  | 4.0 |",
        "| solutions | 26.0 (25.0 to 27.0) | 46.0 (45.0 to 47.0) | 12.0 |",
    ]  # fmt: skip
    again, same = compared(*given, "--steps", "45", "--set", "distill.questions=9")
    assert again == [] and same == text
    with pytest.raises(UserError, match="holds runs of .*student.pkl .* --data skills:arithmetic --steps 45"):
        compared(*given, "--steps", "90")


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "0"], "--seconds, --steps and --count must be at least 1"),
    (["--kinds", "teacher"], "--kinds teacher: --task text has alone, logits"),
    (["--widths", "48"], "--widths are multiples of 32"),
    (["--task", "dialogues"], "goes on with a student"),
    (["--init", "nowhere.pkl"], "nowhere.pkl: no such file; train/distill_train.py makes a student"),
])  # fmt: skip
def test_what_cannot_be_compared_is_one_line(flags, message, compared):
    with pytest.raises(UserError, match=message):
        compared(*flags)
