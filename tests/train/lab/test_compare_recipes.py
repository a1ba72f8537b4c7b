"""The comparison of recipes: what is run, what is not run twice, and the table, checked by hand."""

import sys
from pathlib import Path

import pytest

from train.lab import compare_recipes
from utils.errors import UserError

# pass@1 at the end of the runs, by recipe and seed
ENDS = {"grpo": [0.5, 0.75, 0.625], "ppo": [0.25, 0.25, 0.25], "rft": [0.875, 0.0, 0.5]}


@pytest.fixture
def compared(monkeypatch, tmp_path):
    """Run the command with trainings that only write what a run leaves; return their commands."""
    (tmp_path / "base.pkl").write_bytes(b"")

    def run(*arguments, skills=("",)):
        commands = []

        def train(command, output, where):
            commands.append(command)
            recipe, seed = output.parts[-3], int(output.parts[-2].removeprefix("seed"))
            stage = "ppo" if recipe == "ppo" else "grpo"
            lora = "rl.lora=true" in command
            log = output.parent / f"{stage}_train{'_lora' * lora}" / "log.txt"
            log.parent.mkdir(parents=True)
            keys = [(place, f"val_{key}{skill}") for place, skill in enumerate(skills)
                    for key in ("greedy", "pass1", "pass8")]  # fmt: skip
            ends = [(key, ENDS[recipe][seed] - place / 10) for place, key in keys]
            end = "  ".join(f"{key}={value}" for key, value in ends)
            start = "  ".join(f"{key}=0.125" for key, _ in ends)
            log.write_text(f"step=0  {start}\nstep=1  right=0.25  step_ms=2000\nstep=7  {end}\n")
            (output.parent / f"TinySeek_{stage.upper()}{'Lora' * lora}_final.pkl").write_bytes(b"")

        monkeypatch.setattr(compare_recipes, "train_run", train)
        given = ["--init", str(tmp_path / "base.pkl"), "--out", str(tmp_path / "out"), *arguments]
        monkeypatch.setattr(sys, "argv", ["compare_recipes.py", *given])
        compare_recipes.main()
        return commands, (tmp_path / "out" / "table.md").read_text(encoding="utf-8")

    return run


def test_every_recipe_and_seed_once_with_the_same_seconds(compared, tmp_path):
    commands, text = compared("--recipes", "grpo", "ppo", "rft", "--seconds", "45", "--set", "rl.prompts=3")
    seen = [(Path(command[1]).name, command[command.index("--seed") + 1]) for command in commands]
    scripts = ["grpo_train.py", "ppo_train.py", "grpo_train.py"]
    assert seen == [(script, seed) for seed in "012" for script in scripts]
    for command, recipe in zip(commands, ["grpo", "ppo", "rft"] * 3):
        assert command[command.index("--max-seconds") + 1] == "45"
        assert f"rl.recipe={recipe}" in command and "rl.prompts=3" in command
    assert (tmp_path / "out" / "right.png").stat().st_size > 10_000
    assert text.splitlines() == [
        "| recipe | greedy | pass@1 | pass@8 | steps |", "| --- | ---: | ---: | ---: | ---: |",
        "| base | 12.5 | 12.5 | 12.5 | 0 |",
        "| grpo | 62.5 (50.0 to 75.0) | 62.5 (50.0 to 75.0) | 62.5 (50.0 to 75.0) | 7 |",
        "| rft | 50.0 (0.0 to 87.5) | 50.0 (0.0 to 87.5) | 50.0 (0.0 to 87.5) | 7 |",
        "| ppo | 25.0 | 25.0 | 25.0 | 7 |",
    ]  # fmt: skip
    given = ["--seconds", "45", "--set", "rl.prompts=3"]
    again, same = compared("--recipes", "grpo", "ppo", "rft", *given)
    assert again == [] and same == text
    for other in (given[:2], ["--seconds", "90", *given[2:]], [*given, "--data", "skills:lists"]):
        with pytest.raises(UserError, match="holds runs of .*base.pkl --data skills:sums --seconds 45"):
            compared("--recipes", "grpo", *other)


def test_adapters_are_found_by_the_names_of_their_stages(compared):
    for wanted in (6, 0):
        commands, text = compared("--recipes", "grpo", "ppo", "--set", "rl.lora=true")
        assert len(commands) == wanted and "| grpo | 62.5" in text


def test_steps_without_signal_take_time_too(monkeypatch, tmp_path):
    """A rollout of equal rewards is sampled, logged without `right`, and not free: here 5 of 8 seconds."""
    drawn = []
    monkeypatch.setattr(compare_recipes, "save_figure", lambda figure, png: drawn.append(figure))
    monkeypatch.setattr(compare_recipes, "POINTS", 2)
    log = [{"step": 0, "val_greedy": 0.5}, {"step": 1, "step_ms": 5000.0},
           {"step": 2, "right": 0.25, "step_ms": 3000.0}]  # fmt: skip
    other = [{"step": 1, "right": 0.5, "step_ms": 1000.0}, {"step": 2, "right": 0.75, "step_ms": 6000.0}]
    compare_recipes.plot({"rft": [log, other]}, tmp_path / "right.png")
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_xydata().tolist() == [[2.0, 0.5], [6.0, 0.5]]  # halves of 8 seconds; 0.25 and 0.75 in one



def test_several_skills_have_a_table_each(compared):
    _, text = compared("--recipes", "grpo", "--seeds", "0", skills=("", "_lists", "_sums"))
    first, second = text.strip().split("\n\n")
    assert first.startswith("| lists |") and "| grpo | 40.0 |" in first
    assert second.startswith("| sums |") and "| grpo | 30.0 |" in second


@pytest.mark.parametrize("arguments, words", [
    (["--recipes", "grpo", "magic"], "--recipes magic: no such recipe"),
    (["--seconds", "0"], "--seconds must be at least 1"),
    (["--init", "missing.pkl"], "missing.pkl: no such file"),
    (["--out", __file__], "is a file; name a folder"),
])  # fmt: skip
def test_what_cannot_be_is_one_line(compared, arguments, words):
    with pytest.raises(UserError, match=words):
        compared(*arguments)
