"""The grid: what its cells change, what it trains and what not, and the arithmetic of its table.

Most tests write the results of runs by hand; the slow one trains, and is stopped in the middle twice.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config.load import DEFAULT_PRESET, load_config, to_dict
from model.tinyseek import TinySeek
from tests.train.engine.kill_and_resume import wait_for
from tests.train.tools import ROOT, environment, run
from train.lab import ablate, ablation_report
from utils.checkpoint import find_checkpoints, save_checkpoint
from utils.errors import UserError, run_main
from utils.log import RunLog, read_log

EXPERTS = [
    "model.n_routed_experts=16", "model.num_experts_per_tok=4", "model.n_shared_experts=2",
    "model.moe_intermediate_size=128", "model.intermediate_size=700", "model.num_hidden_layers=3",
    "model.first_k_dense_replace=0", "balance.weight=0.0", "balance.bias_rate=0.001",
]  # fmt: skip
EVERY_CELL = ["dense", "fine", "no_shared", "no_balance", "bias_only", "loss_only", "mtp_parallel",
              "mtp_sequential", "mla", "mha"]  # fmt: skip


def pretend(out, cell, seed, bpb, steps=None, milliseconds=(100.0, 300.0, 200.0), vio=(), **evaluation):
    """Write what a finished run leaves: 64 tokens a step, a log line for each of `milliseconds`."""
    folder = out / cell.name / f"seed{seed}"
    steps = steps or cell.config.train.max_steps
    config = to_dict(cell.config)
    config["train"]["seed"], config["model"]["vocab_size"] = seed, 1000
    log = RunLog(folder / "pre_train" / "log.txt")
    log.write({"step": 0, "tokens": 0, "val_loss": 7.0})
    for number, value in enumerate(milliseconds, start=1):
        load = {"max_vio": vio[number - 1]} if vio else {}
        log.write({"step": number, "tokens": 64 * number, "loss": 1.0, **load, "step_ms": value})
    log.write({"step": 2, "tokens": 128, "val_loss": 2 * bpb})
    log.write({"step": steps, "tokens": 64 * steps, "val_loss": bpb, "val_bpb": bpb})
    log.close()
    final = {"config": config, "step": steps, "tokens": 64 * steps, "data_digest": "digest",
             "evaluation": {"val_loss": bpb, "val_bpb": bpb, **evaluation}}  # fmt: skip
    save_checkpoint(folder / "TinySeek_Pre_final.pkl", final)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Calls the command within this process, with the runs of tiny models; returns the exit code."""

    def call(*arguments):
        words = ["ablate.py", "--config", "tiny", "--out", str(tmp_path / "grid"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as caught:
            run_main(ablate.main)
        return caught.value.code

    return call


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Stands in for training: writes results by hand, and keeps each command as a dictionary."""
    commands = []

    def train_run(command, output, where):
        flags = {key: value for key, value in zip(command, command[1:]) if key.startswith("--")}
        flags["settings"] = [value for key, value in zip(command, command[1:]) if key == "--set"]
        commands.append(flags)
        if len(commands) == trained.stop_at:
            raise KeyboardInterrupt
        name, seed = output.parts[-3], int(flags["--seed"])
        cells, _ = ablate.plan("tiny", flags["settings"][:2], int(flags["--max-steps"]), [name])
        pretend(tmp_path / "grid", cells[-1], seed, 2.0 + 0.1 * seed + (0.5 if name == "mha" else 0))

    def trained():
        return [(flags["--seed"], Path(flags["--out"]).parent.name) for flags in commands]

    trained.stop_at, trained.commands = None, commands
    monkeypatch.setattr(ablate, "train_run", train_run)
    for draw in ("plot_losses", "plot_results"):  # takes longer than all else, and has tests of its own
        monkeypatch.setattr(ablate, draw, lambda results, png: None)
    return trained


# -------------------------------------------------------------------------------------------------- the cells


def test_a_base_with_experts_has_nine_other_cells_and_each_changes_what_it_says():
    cells, left_out = ablate.plan(DEFAULT_PRESET, EXPERTS, 240)
    assert [cell.name for cell in cells] == ["base", *(name for name in EVERY_CELL if name != "bias_only")]
    assert left_out == ["bias_only (balanced by the bias alone): that is base"]
    base, changed = to_dict(cells[0].config), {}
    for cell in cells[1:]:
        assert cell.config == load_config(
            DEFAULT_PRESET, EXPERTS + cell.settings, flags={"train": {"max_steps": 240, "max_seconds": None}}
        )
        sections = to_dict(cell.config)
        changed[cell.name] = {
            key: value
            for section, values in sections.items()
            for key, value in values.items()
            if value != base[section][key]
        }
    assert changed == {
        "dense": {"n_routed_experts": 0, "intermediate_size": 6 * 128},
        "fine": {"n_routed_experts": 32, "num_experts_per_tok": 8, "n_shared_experts": 4,
                 "moe_intermediate_size": 64},
        "no_shared": {"n_routed_experts": 18, "num_experts_per_tok": 6, "n_shared_experts": 0},
        "no_balance": {"bias_rate": 0.0},
        "loss_only": {"weight": 0.01, "bias_rate": 0.0},
        "mtp_parallel": {"mtp": "parallel"},
        "mtp_sequential": {"mtp": "sequential"},
        "mla": {"attention_kind": "mla"},
        "mha": {"num_key_value_heads": 6},
    }  # fmt: skip


def test_the_default_preset_has_at_most_ten_cells():
    cells, _ = ablate.plan(DEFAULT_PRESET, [], 240)
    assert 4 <= len(cells) <= 10 and cells[0].name == "base"


def test_a_token_passes_through_as_many_feed_forward_weights_in_every_cell():
    """Counted in the tensors of real models: of the stacked experts the chosen share, of others all. The
    router is left out: it grows with the number of experts."""
    small = ["model.hidden_size=16", "model.num_attention_heads=2", "model.num_key_value_heads=1",
             "model.vocab_size=32", "model.head_dim=8"]  # fmt: skip
    cells, _ = ablate.plan(DEFAULT_PRESET, EXPERTS + small, 240)
    used, held = {}, {}
    for cell in cells:
        model = cell.config.model
        weights = {name: tensor.numel() for name, tensor in TinySeek(model).named_parameters()
                   if ".mlp." in name and ".mlp.gate." not in name and "mtp." not in name}  # fmt: skip
        chosen = model.num_experts_per_tok / max(1, model.n_routed_experts)
        used[cell.name] = sum(count * (chosen if ".experts." in name else 1)
                              for name, count in weights.items())  # fmt: skip
        held[cell.name] = sum(weights.values())
    assert set(used.values()) == {3 * 3 * 16 * 6 * 128}
    assert {count for name, count in held.items() if name != "dense"} == {3 * 3 * 16 * 18 * 128}


def test_a_shared_expert_of_another_width_counts_with_its_own():
    """4 of 16 experts of width 128, and 100 channels of the shared one."""
    cells, _ = ablate.plan(
        DEFAULT_PRESET, [*EXPERTS, "model.shared_expert_intermediate_size=100"], 240, ["dense"]
    )
    assert cells[1].config.model.intermediate_size == 4 * 128 + 100


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        (["balance.bias_rate=0.0"], "no_balance"),
        (["balance.bias_rate=0.05"], "bias_only"),
        (["balance.bias_rate=0.0", "balance.weight=0.003", "balance.scope=global"], "loss_only"),
    ],
)
def test_the_cell_that_is_the_base_is_left_out(settings, same):
    cells, left_out = ablate.plan(DEFAULT_PRESET, EXPERTS + settings, 240)
    assert [cell.name for cell in cells[1:]] == [name for name in EVERY_CELL if name != same]
    assert [line.split()[0] for line in left_out] == [same]


def test_a_base_of_one_kind_of_head_or_without_experts_has_fewer_cells():
    dense = ["model.n_routed_experts=0", "model.num_key_value_heads=6", "model.num_attention_heads=6"]
    cells, left_out = ablate.plan(DEFAULT_PRESET, dense, 240)
    assert [cell.name for cell in cells] == ["base", "mtp_parallel", "mtp_sequential", "mla"]
    assert [line.split()[0] for line in left_out] == ["mha"]


def test_cells_are_trained_in_the_order_asked_for_and_the_base_always():
    cells, left_out = ablate.plan(DEFAULT_PRESET, EXPERTS, 240, ["mla", "base", "bias_only", "dense", "mla"])
    assert [cell.name for cell in cells] == ["base", "mla", "dense"] and len(left_out) == 1


@pytest.mark.parametrize(
    ("settings", "cell"),
    [
        ("model.moe_intermediate_size=65", "fine"),  # half of it is 32, and 12 x 32 are not 6 x 65
        ("model.first_k_dense_replace=1", "dense"),  # that layer had another width
    ],
)
def test_a_cell_that_would_change_the_active_width_is_refused(settings, cell):
    with pytest.raises(UserError, match=f"cell {cell} changes the feed-forward widths"):
        ablate.plan(DEFAULT_PRESET, [*EXPERTS, settings], 240, [cell])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cells", "mha", "moa"], "--cells moa: no such cell of tiny; it has base, mtp_parallel"),
        (["--cells", "dense"], "--cells dense: no such cell of tiny"),
        (["--max-steps", "0"], "must be above 0"),
        (["--seeds", "0", "-1"], "--seeds at least 0"),
        (["--minutes", "0"], "must be above 0"),
        (["--set", "model.hidden=3"], "unknown setting"),
        (["--config", "tidy"], "no such preset"),
    ],
)
def test_what_cannot_be_is_one_line(command, trained, tmp_path, capsys, arguments, words):
    assert command("--set", "model.n_routed_experts=0", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not trained() and not (tmp_path / "grid").exists()


# -------------------------------------------------------------------------------------------- what is trained


def test_seeds_are_the_outer_loop_and_every_run_gets_its_settings(command, trained, tmp_path):
    assert command("--cells", "mha", "--seeds", 3, 4, "--max-steps", 60, "--minutes", 8) == 0
    assert trained() == [("3", "base"), ("3", "mha"), ("4", "base"), ("4", "mha")]
    for flags in trained.commands:
        heads = ["model.num_key_value_heads=4"] if Path(flags["--out"]).parent.name == "mha" else []
        assert flags["settings"] == ["train.eval_every=9", "train.log_every=2", *heads]
        assert "--resume" in flags and flags["--config"] == "tiny" and flags["--max-steps"] == "60"
        assert float(flags["--max-seconds"]) == 8 * 60 / 4 - ablate.START_SECONDS


def test_a_finished_grid_is_not_trained_again(command, trained, capsys):
    assert command("--cells", "mha", "--max-steps", 9) == 0
    assert len(trained()) == 6
    capsys.readouterr()
    assert command("--cells", "mha", "--max-steps", 9, "--set", "train.eval_every=2") == 0
    assert len(trained()) == 6
    assert "6 runs of 9 steps, 0 to do" in capsys.readouterr().out


def test_an_interrupted_grid_goes_on_where_it_was(command, trained, tmp_path):
    """Stopped in the third run of six: the first seed is reported, and two runs are not trained again."""
    trained.stop_at = 3
    assert command("--cells", "mha", "--max-steps", 9) == 130
    table = (tmp_path / "grid" / "table.md").read_text(encoding="utf-8")
    assert "seeds 0;" in table and "+0.5000 (one seed)" in table
    assert command("--cells", "mha", "--max-steps", 9) == 0
    assert trained()[2:] == [("1", "base"), ("1", "base"), ("1", "mha"), ("2", "base"), ("2", "mha")]
    assert "seeds 0, 1, 2;" in (tmp_path / "grid" / "table.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("change", [["--max-steps", 10], ["--set", "optim.lr=0.5"]])
def test_runs_with_other_settings_are_not_mixed(command, trained, capsys, change):
    assert command("--cells", "mha", "--seeds", 0, "--max-steps", 9) == 0
    capsys.readouterr()
    assert command("--cells", "mha", "--seeds", 1, 0, "--max-steps", 9, *change) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "base/seed0 holds a run with " in line and "write to another --out" in line
    assert len(trained()) == 2  # said before anything is trained


def test_an_unfinished_run_goes_on_with_its_own_settings_only(tmp_path):
    """It has a checkpoint on the way; more steps would be another schedule from its first step on."""
    nine, ten = (ablate.plan("tiny", [], steps, ["mha"])[0][0] for steps in (9, 10))
    pretend(tmp_path, nine, 0, 1.0)
    assert ablate.is_finished(tmp_path, 0, nine)
    folder = tmp_path / "base" / "seed0"
    (folder / "TinySeek_Pre_final.pkl").rename(folder / "TinySeek_Pre1_0.pkl")
    assert not ablate.is_finished(tmp_path, 0, nine) and not ablate.is_finished(tmp_path, 1, nine)
    with pytest.raises(UserError, match="train.max_steps=9, this grid says 10"):
        ablate.is_finished(tmp_path, 0, ten)


def test_a_seed_that_a_setting_takes_away_is_noticed(tmp_path):
    cells, _ = ablate.plan("tiny", ["train.seed=7"], 9, ["mha"])
    pretend(tmp_path, cells[0], 7, 1.0)
    (tmp_path / "base" / "seed7").rename(tmp_path / "base" / "seed1")
    with pytest.raises(UserError, match="train.seed=7, this grid says 1"):
        ablate.read_run(tmp_path, 1, cells[0])


def test_runs_on_different_data_are_not_compared(tmp_path):
    cells, _ = ablate.plan("tiny", [], 9, ["mha"])
    for cell in cells:
        pretend(tmp_path, cell, 0, 1.0)
    path = tmp_path / "mha" / "seed0" / "TinySeek_Pre_final.pkl"
    save_checkpoint(path, ablate.load_checkpoint(path) | {"data_digest": "another"})
    with pytest.raises(UserError, match="different data"):
        ablate.report(tmp_path, cells, [0], "command")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("print('error: early'); print('error: the disk is full'); exit(2)", "run 1: the disk is full"),
        ("raise ZeroDivisionError", "run 1: ended with code 1, see "),
    ],
)
def test_the_error_of_a_run_is_passed_on_in_one_line(tmp_path, code, words):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError) as caught:
        ablate.train_run([sys.executable, "-c", code], tmp_path / "new" / "output.txt", "run 1")
    assert str(caught.value).startswith(words)
    assert signal.getsignal(signal.SIGTERM) is handler


# ------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.3, 1.5, 1.4], "+0.3500"),  # apart, and by more than the base's range of 0.2
        ([0.7, 0.5, 0.6], "-0.4500"),
        ([1.1, 1.6, 1.5], "+0.4500 indistinguishable"),  # a seed as good as the worst of the base
        ([0.9, 0.5, 0.4], "-0.5500 indistinguishable"),  # a seed as bad as the best
        ([1.0, 1.02, 1.01], "-0.0400 indistinguishable"),  # within
        ([0.2, 1.2, 1.8], "+0.1500 indistinguishable"),  # around
        ([1.11, 1.25, 1.2], "+0.1500 indistinguishable"),  # apart, but by less than the base's own seeds
        ([0.89, 0.86, 0.86], "-0.1900 indistinguishable"),
        ([1.4], "+0.3500 (one seed)"),
    ],
)
def test_what_is_told_apart(values, words):
    """The base: 0.9 to 1.1, median 1.05."""
    assert ablation_report.against([1.05, 0.9, 1.1], values) == words


def test_one_seed_of_the_base_decides_nothing():
    assert ablation_report.against([1.0], [2.0, 2.1]) == "+1.0500 (one seed)"


def test_the_table_holds_medians_ranges_and_costs(tmp_path):
    """All numbers by hand: tiny has 2 layers with 2 key/value heads of 8 channels, and 4 query heads."""
    cells, _ = ablate.plan("tiny", ["train.accumulation_steps=2"], 50, ["mha"])
    base, mha = cells
    for seed, bpb in enumerate((1.10, 1.00, 1.03)):
        times, loads = (100, 900, 200 + 10 * seed), (9.0, 8.0, seed + 1.0)
        pretend(tmp_path, base, seed, bpb, milliseconds=times, vio=loads)
    for seed, bpb in enumerate((1.50, 1.42, 1.44)):
        pretend(tmp_path, mha, seed, bpb, vio=(9.0, 8.0, 7.0), val_max_vio=0.25 * seed)
    pretend(tmp_path, mha, 1, 1.42, steps=40, val_max_vio=0.25)
    ablate.report(tmp_path, cells, [0, 1, 2], "the command")

    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()
                      if line.startswith("|")]  # fmt: skip
    base_row, mha_row = (dict(zip(head, row, strict=True)) for row in rows)
    embedding, norms, mlp = 1000 * 32, 2 * (2 * 32 + 2 * 8) + 32, 2 * 3 * 32 * 64
    weights = {"base": 2 * 32 * (32 + 16 + 16 + 32), "mha": 2 * 32 * 4 * 32}
    flops = {name: 6 * (count + mlp + embedding) + 12 * 2 * 32 * 32 for name, count in weights.items()}
    total = {name: f"{embedding + norms + mlp + count:,}" for name, count in weights.items()}
    assert base_row == {
        "cell": "base", "what changes": "the base, tiny", "parameters": total["base"],
        "active": total["base"], "MFLOP per token": f"{flops['base'] / 1e6:.2f}", "val_bpb": "1.0300",
        "min to max": "1.0000 to 1.1000", "against base": "", "tokens/s": f"{64 / 0.21:,.0f}",
        "seconds": "10.5", "max_vio": "2.00", "cache bytes per token": "128",
    }  # fmt: skip
    assert mha_row["cell"] == "mha*" and "ended by --minutes" in text  # one run had 40 steps of 50
    assert (mha_row["val_bpb"], mha_row["against base"]) == ("1.4400", "+0.4100")
    assert (mha_row["parameters"], mha_row["cache bytes per token"]) == (total["mha"], "256")
    assert mha_row["MFLOP per token"] == f"{flops['mha'] / 1e6:.2f}"
    assert (mha_row["max_vio"], mha_row["seconds"]) == ("0.25", "10.0")  # of 10, 8 and 10 seconds
    assert "2 / 20 = 10.0%" in text and "- mha: `model.num_key_value_heads=4`" in text
    assert "50 steps (3,200 tokens)" in text and "`the command`" in text

    raw = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [run["val_bpb"] for run in raw["cells"]["mha"]["runs"]] == [1.50, 1.42, 1.44]
    assert [run["steps"] for run in raw["cells"]["mha"]["runs"]] == [50, 40, 50]
    assert raw["cells"]["base"]["runs"][1]["curve"] == [[0, 7.0], [128, 2.0]]  # less the last, on other data
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "bpb.png"))


def test_a_whole_table_has_no_star_and_no_load_without_experts(tmp_path):
    cells, _ = ablate.plan("tiny", [], 50, ["mha"])
    for cell in cells:
        pretend(tmp_path, cell, 0, 1.0)
    ablate.report(tmp_path, cells, [0], "command")
    text = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "*" not in text.replace("*indistinguishable*", "") and "| - | 128 |" in text


# --------------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_a_real_grid_is_stopped_twice_goes_on_and_is_finished_once(tmp_path):
    """Ctrl-C in the first run, SIGTERM in the second, each sent to the grid alone. The run at hand saves a
    checkpoint and ends; the same command goes on from it."""
    text = tmp_path / "text.txt"  # quicker to read than the standard library
    text.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    settings = ["train.device=cpu", f"data.cache_dir={tmp_path / 'cache'}", "train.save_every=1000"]
    settings += [f"data.paths={json.dumps([str(text)])}", "tokenizer.kind=char"]
    words = [sys.executable, ROOT / "train" / "lab" / "ablate.py", "--config", "tiny", "--cells", "mha",
             "--seeds", "0", "--max-steps", "200", "--out", tmp_path / "grid",
             *(word for setting in settings for word in ("--set", setting))]  # fmt: skip
    words = list(map(str, words))
    for name, number in (("base", signal.SIGINT), ("mha", signal.SIGTERM)):
        folder = tmp_path / "grid" / name / "seed0"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        grid = subprocess.Popen(words, env=environment(), **pipes)
        log = folder / "pre_train" / "log.txt"
        wait_for(grid, lambda log=log: log.exists() and log.read_bytes().count(b"\n") > 3, 60)
        grid.send_signal(number)
        output, _ = grid.communicate(timeout=60)
        assert grid.returncode == 128 + number, output
        assert f"{name}, seed 0: stopping; run the same command" in output and "Traceback" not in output
        assert "stopped by SIGTERM at step" in (folder / "output.txt").read_text(encoding="utf-8")
        assert find_checkpoints(folder, "Pre") and not (folder / "TinySeek_Pre_final.pkl").exists()
    done = run(*words[1:])
    assert done.returncode == 0, done.stderr
    assert "2 runs of 200 steps, 1 to do" in done.stdout  # the base was finished before the second stop
    assert "resuming from " in (folder / "output.txt").read_text(encoding="utf-8")
    for name in ("base", "mha"):
        folder = tmp_path / "grid" / name / "seed0"
        assert [path.name for path in folder.glob("*.pkl")] == ["TinySeek_Pre_final.pkl"]
        rows = read_log(folder / "pre_train" / "log.txt")
        assert rows[-1]["step"] == 200 and sum("val_loss" in row for row in rows) == 1 + 6 + 1
        assert f"| {name} |" in done.stdout
