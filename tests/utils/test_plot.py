"""Curves are drawn from real logs, one or several."""

import sys

import pytest
from matplotlib.figure import Figure

from utils.errors import UserError
from utils.log import RunLog
from utils.plot import main, plot_curves, run_names


def write_log(path, experts=False):
    log = RunLog(path)
    for step in range(1, 40):
        row = {"step": step, "loss": 5 / step, "ppl": 2.7 ** (5 / step), "lr": 1e-3, "tok_s": 1000.0 + step}
        log.write(row | ({"max_vio": 1 / step} if experts else {}))
        if step % 10 == 0:
            log.write({"step": step, "val_loss": 6 / step, "val_ppl": 2.7 ** (6 / step)})
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))
    return figures


def test_panels_hold_what_the_log_holds(tmp_path, drawn):
    plot_curves(write_log(tmp_path / "log.txt"), tmp_path / "deep" / "curves.png")
    assert (tmp_path / "deep" / "curves.png").read_bytes().startswith(b"\x89PNG")
    axes = {panel.get_title(): panel for panel in drawn[0].axes}
    assert list(axes) == ["Loss", "Perplexity", "Learning rate", "Throughput"]
    train, val = axes["Loss"].get_lines()
    assert train.get_xydata()[3].tolist() == [4, 1.25]
    assert val.get_xydata().tolist() == [[10, 0.6], [20, 0.3], [30, 0.2]]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in axes.values())
    assert [text.get_text() for text in axes["Loss"].get_legend().get_texts()] == ["training", "validation"]


def test_experts_get_a_panel_and_several_logs_a_legend(tmp_path, drawn):
    logs = [write_log(tmp_path / name / "log.txt", experts=name == "b") for name in "ab"]
    plot_curves(logs, tmp_path / "c.png")
    axes = {panel.get_title(): panel for panel in drawn[0].axes}
    assert len(axes["Loss"].get_lines()) == 4
    assert len(axes["Expert load, worst layer"].get_lines()) == 1
    assert axes["Throughput"].get_legend().get_texts()[0].get_text() == "a"
    assert run_names([str(log) for log in logs]) == ["a", "b"]


def test_reinforcement_learning_has_panels_of_its_own(tmp_path, monkeypatch):
    """One for each thing it logs, beside loss and throughput; every curve has the numbers of its key."""
    drawn, keys = [], ["reward", "right", "no_signal", "length", "truncated", "kl", "entropy", "clip_frac",
                       "rollout_tok_s", "update_tok_s", "val_reward", "val_greedy", "val_pass1", "val_pass8",
                       "val_length"]  # fmt: skip
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    log = RunLog(tmp_path / "log.txt")
    for step in (10, 20):
        trained = {key: step + n for n, key in enumerate(keys) if not key.startswith("val")}
        log.write({"step": step, "loss": 0.5, "tok_s": 9.0, **trained})
        log.write({"step": step, **{key: step + n for n, key in enumerate(keys) if key.startswith("val")}})
    plot_curves(tmp_path / "log.txt", tmp_path / "c.png")
    axes = {panel.get_title(): panel for panel in drawn[0].axes}
    shown = {title: [line.get_label() for line in panel.get_lines()] for title, panel in axes.items()}
    assert shown.pop("Throughput") and shown.pop("Loss") == ["training"]
    assert axes["Loss"].get_ylabel() == "loss of the stage"  # which are not nats of a token
    assert shown == {
        "Reward": ["training", "validation"], "Right answers": ["training", "greedy", "pass@1", "pass@8"],
        "Distance to the reference": ["_child0"], "Entropy of the policy": ["_child0"],
        "Length of answers": ["training", "validation"],
        "Lost signal": ["groups without signal", "clipped tokens", "answers cut"],
        "Rollouts and updates": ["rollouts", "updates"],
    }  # fmt: skip
    lines = [line for title in shown for line in axes[title].get_lines()]
    numbers = {tuple(line.get_ydata() - line.get_xdata()) for line in lines}
    assert numbers == {(n, n) for n in range(len(keys))}
    right = axes["Right answers"].get_lines()
    assert len({line.get_color() for line in right}) == 4
    assert [line.get_marker() for line in right] == ["None", "o", "o", "o"]
    both = [tmp_path / "log.txt", write_log(tmp_path / "other" / "log.txt")]
    plot_curves(both, tmp_path / "c.png")  # of several runs the curves of a panel have different strokes
    right = {panel.get_title(): panel for panel in drawn[1].axes}["Right answers"].get_lines()
    assert len({line.get_linestyle() for line in right}) == 4
    assert len({line.get_color() for line in right}) == 1


def test_over_seconds_a_run_of_slow_steps_reaches_further(tmp_path, drawn):
    """Lines of steps 10 and 20, of 100 and 300 ms a step: 1 and 4 seconds. An evaluation takes no time."""
    log = RunLog(tmp_path / "log.txt")
    for step, took in ((10, 100.0), (20, 300.0)):
        log.write({"step": step, "loss": 1.0, "step_ms": took})
        log.write({"step": step, "val_loss": 2.0})
    plot_curves(tmp_path / "log.txt", tmp_path / "c.png", seconds=True)
    train, val = drawn[0].axes[0].get_lines()
    assert train.get_xdata().tolist() == val.get_xdata().tolist() == [1.0, 4.0]
    assert drawn[0].axes[0].get_xlabel() == "seconds of training steps"


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        plot_curves(tmp_path / "log.txt", tmp_path / "c.png")
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(UserError, match="no step is logged"):
        plot_curves(tmp_path / "log.txt", tmp_path / "c.png")
    (tmp_path / "log.txt").write_text("step=1  other=2\n")
    with pytest.raises(UserError, match="none of the keys"):
        plot_curves(tmp_path / "log.txt", tmp_path / "c.png")


def test_some_of_the_panels(tmp_path, drawn):
    log = write_log(tmp_path / "log.txt")
    plot_curves(log, tmp_path / "some.png", words=("perplex", "LOSS"))
    assert [panel.get_title() for panel in drawn[0].axes] == ["Loss", "Perplexity"]
    with pytest.raises(UserError, match="--panels reward: in no title; Loss, Perplexity[^R]*$"):
        plot_curves(log, tmp_path / "none.png", words=("reward",))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", str(write_log(tmp_path / "run" / "log.txt"))])
    main()
    assert (tmp_path / "run" / "curves.png").is_file()


def test_the_command_without_a_log(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plot.py", "nowhere.txt"])
    with pytest.raises(UserError, match="^nowhere.txt: cannot read the log"):
        main()
