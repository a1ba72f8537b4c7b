"""Fine-tuning from the command line: what each stage trains, saves and refuses, and that two processes equal
one."""

import json
import os
import sys

import pytest
import torch

from inference.fast.decoder import refusal
from inference.generation.load import load_adapter, load_full
from load_data.chat import chat_data
from tests.inference.tools import byte_tokenizer, write_checkpoint
from tests.processes import fork, without_pictures
from tests.train.tools import largest_difference, same_bits, without_timing
from train import gate_train, lora_train, mixlora_train, prefix_train, sft_train
from train.engine.command import parse_command
from train.engine.trainer import Trainer
from utils.checkpoint import find_checkpoints, load_checkpoint, weights_digest
from utils.errors import UserError
from utils.log import read_log

SCRIPTS = {"SFT": sft_train, "Lora": lora_train, "MixLora": mixlora_train, "Prefix": prefix_train}


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A file of short dialogues of one or two turns, some of which are tables."""
    path = tmp_path_factory.mktemp("data") / "dialogues.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(60):
            turns = [("user", f"say {number}"), ("assistant", f"|{number}|one|好|")]
            if number % 3 == 0:
                turns += [("user", "again"), ("assistant", f"|{number}|two|好|")]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Few scores: they would take longer than training."""
    monkeypatch.setattr("train.engine.fine_tuning.SCORED_DIALOGUES", 2)


SETTINGS = (
    "data.sequence_length=48", "prefix.length=16", "train.batch_size=4", "train.dtype=fp32",
    "data.val_fraction=0.2",
    "optim.optimizer=adamw", "optim.lr=0.01", "optim.warmup_steps=0", "train.log_every=1",
    "balance.statistics=exact",
)  # fmt: skip


def arguments(out, dialogues, init, *settings, steps=14):
    """Flags of a short run."""
    flags = ["--data", dialogues, "--init", init, "--out", out, "--device", "cpu", "--max-steps", steps]
    for setting in (*SETTINGS, f"data.cache_dir={dialogues.parent / 'cache'}", *settings):
        flags += ["--set", setting]
    return [str(flag) for flag in flags]


def call(monkeypatch, script, flags):
    """The script's main in this process."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


def base_in(folder, kind="dense", short="SFT"):
    """A random model of `kind`, as training would leave it."""
    from tests.inference.tools import run_config, tiny_model

    changes = {"dense": {}, "moe": MOE, "mtp": MOE | {"mtp": "sequential"}}[kind]
    model = tiny_model(seed=5, **changes)
    changes = {"weights": model.state_dict(), "config": run_config(model)}
    return write_checkpoint(folder / f"TinySeek_{short}_final.pkl", short, **changes)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("short", SCRIPTS)
def test_a_stage_from_the_command_line(short, kind, dialogues, tmp_path, monkeypatch, capsys):
    """What it saves is what it trained, and nothing of the base has changed."""
    base = base_in(tmp_path, kind)
    out = tmp_path / "run"
    call(monkeypatch, SCRIPTS[short], arguments(out, dialogues, base))
    said = capsys.readouterr().out
    words = f"--out {out} --prompt" if short == "SFT" else f"--adapter {out}/TinySeek_{short}_final.pkl"
    assert said.splitlines()[-1].startswith(f"next: python inference/chat.py {words}")
    saved = load_checkpoint(out / f"TinySeek_{short}_final.pkl")
    before = load_checkpoint(base)["weights"]
    assert "gradients proven" in said and "weights proven" in said and "exact" in said and "items" in said
    assert "data: read and tokenized in " in said
    log = read_log(out / saved["stage"] / "log.txt")
    assert sum("val_loss" in row for row in log) >= 3  # before, after each epoch, at the end
    if short == "SFT":
        assert saved["base"] is None and saved["weights"].keys() == before.keys()
        moved = [name for name in before if not torch.equal(before[name], saved["weights"][name])]
        assert {name for name, tensor in before.items() if tensor.dim() > 1} <= set(moved)
        return
    assert saved["base"] == {"digest": weights_digest(before), "path": str(base)}
    assert saved["weights"] and not saved["weights"].keys() & before.keys()
    full = load_full(base)
    adapted = load_adapter(out / f"TinySeek_{short}_final.pkl", full)
    assert same_bits(before, full.model.state_dict())
    if short == "Lora":  # folded into the weights, for the fast decoder
        assert not refusal(adapted.model) and adapted.model.state_dict().keys() == before.keys()
    else:
        own = {name: part for name, part in adapted.model.state_dict().items() if name in saved["weights"]}
        assert same_bits(own, saved["weights"])
    ids = torch.tensor([byte_tokenizer().encode("hello")])
    assert not torch.equal(full.model(ids).logits, adapted.model(ids).logits)
    assert same_bits(before, load_checkpoint(base)["weights"])


# --- stopped and resumed ----------------------------------------------------------------------------------


class Stop(Exception):
    """Stands in for a crash."""


def call_until(monkeypatch, script, flags, stop):
    """The script's main, which crashes before step `stop`."""

    def one_step(self, *arguments):
        if self.step + 1 == stop:
            raise Stop
        whole(self, *arguments)

    whole = Trainer.one_step
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Trainer, "one_step", one_step)
        call(patch, script, flags)


RESUMED = {
    "SFT": ("model.dropout=0.1", "optim.optimizer=muon"),
    "Lora": ("lora.lora_dropout=0.2", "lora.use_dora=true"),
    "MixLora": ("mixlora.lora_dropout=0.1", "mixlora.shared_expert=true", "balance.weight=0.01"),
    "Prefix": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("short", ["SFT", "Lora", "MixLora", "Prefix"])
def test_a_stage_that_was_stopped_ends_as_if_it_were_not(short, dialogues, tmp_path, monkeypatch):
    """With dropout; 16 steps of which 9 make an epoch; stopped in both, each time some steps after a
    checkpoint."""
    base, script = base_in(tmp_path), SCRIPTS[short]
    settings = (*RESUMED[short], "train.save_every=3", "train.eval_every=5")
    flags = {name: arguments(tmp_path / name, dialogues, base, *settings, steps=16) for name in "ab"}
    call(monkeypatch, script, flags["a"])
    call_until(monkeypatch, script, flags["b"], 6)
    call_until(monkeypatch, script, [*flags["b"], "--resume"], 12)
    call(monkeypatch, script, [*flags["b"], "--resume"])
    one, two = (load_checkpoint(tmp_path / name / f"TinySeek_{short}_final.pkl") for name in "ab")
    assert same_bits(one.pop("weights"), two.pop("weights")) and one == two
    logs = [read_log(tmp_path / name / one["stage"] / "log.txt") for name in "ab"]
    assert without_timing(logs[0]) == without_timing(logs[1])
    assert max(row["epoch"] for row in logs[0] if "epoch" in row) > 1.5
    one, two = (load_checkpoint(find_checkpoints(tmp_path / name, short)[-1]) for name in "ab")
    assert same_bits(one["weights"], two["weights"]) and one["training"].keys() == two["training"].keys()
    if short != "SFT":
        assert not one["weights"].keys() & load_checkpoint(base)["weights"].keys()
        assert one["weights"].keys() == one["training"]["best"]["weights"].keys()
    states = [saved["training"]["optimizers"] for saved in (one, two)]
    assert repr(states[0]) == repr(states[1])


def test_an_adapter_resumes_on_its_own_base_with_its_own_settings_only(dialogues, tmp_path, monkeypatch):
    base = base_in(tmp_path)
    flags = arguments(tmp_path, dialogues, base, "train.save_every=2")
    call_until(monkeypatch, lora_train, flags, 4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = write_checkpoint(tmp_path.parent / f"{tmp_path.name}_other.pkl", "SFT", seed=9)
    wrong = arguments(tmp_path, dialogues, other, "train.save_every=2")
    with pytest.raises(UserError, match=f"adapts {base} .*this command starts from {other} .*--init"):
        call(monkeypatch, lora_train, [*wrong, "--resume"])
    for setting, words in (("r=4", "r=8, .* says 4"), ('target_modules=["dense"]', "target_modules="),
                           ("lora_alpha=8", "lora_alpha=16.0")):  # fmt: skip
        with pytest.raises(UserError, match=f"was trained with lora.{words}"):
            call(monkeypatch, lora_train, [*flags, "--resume", "--set", f"lora.{setting}"])
    with pytest.raises(UserError, match="unfinished run of lora_train: resume it with --resume"):
        call(monkeypatch, lora_train, flags)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("short", ["Lora", "MixLora"])
def test_one_step_is_enough_for_the_proof(short, dialogues, tmp_path, monkeypatch, capsys):
    """A gets no gradient while B is zero: in the first step it does not move, and nothing is wrong."""
    call(monkeypatch, SCRIPTS[short], arguments(tmp_path, dialogues, base_in(tmp_path), steps=1))
    said = capsys.readouterr().out
    assert "had no gradient (allowed)" in said and ", 0 had no gradient" not in said


@pytest.mark.parametrize("attention", ["true", "false"])
def test_mixlora_on_experts_and_a_second_head(attention, dialogues, tmp_path, monkeypatch):
    """The routers of the base are frozen, that of the second head too: only new ones are balanced and
    counted. The head's own attention has an adapter where attention has one, and its loss then trains it."""
    base = base_in(tmp_path, "mtp")
    settings = ("balance.weight=0.1", "balance.bias_rate=0.01", "mixlora.num_experts=3")
    flags = arguments(tmp_path, dialogues, base, *settings, f"mixlora.attention={attention}", steps=5)
    call(monkeypatch, mixlora_train, flags)
    saved = load_checkpoint(tmp_path / "TinySeek_MixLora_final.pkl")["weights"]
    assert any(name.startswith("mtp.") for name in saved) == (attention == "true")
    biases = [part for name, part in saved.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and all(part.any() for part in biases)
    for row in read_log(tmp_path / "mixlora_train" / "log.txt"):
        assert "loss" not in row or ("balance" in row and ("mtp" in row) == (attention == "true"))
    loads = read_log(tmp_path / "mixlora_train" / "experts.txt")
    assert set(loads[0]) == {"step", *(f"L{layer}E{expert}" for layer in (0, 1) for expert in (0, 1, 2))}
    for layer in (0, 1):
        assert sum(loads[-1][f"L{layer}E{expert}"] for expert in (0, 1, 2)) == pytest.approx(1, abs=1e-3)


def test_an_adapter_speaks_the_template_of_its_base(dialogues, tmp_path, monkeypatch):
    """A model that learned ChatML reads no other; `--set` still has the last word."""
    flags = arguments(tmp_path, dialogues, base_in(tmp_path, short="Pre"), "data.template=chatml", steps=2)
    call(monkeypatch, sft_train, flags)
    made = tmp_path / "TinySeek_SFT_final.pkl"
    assert parse_command("lora_train", "Lora", "", ["--init", str(made)]).config.data.template == "chatml"
    own = ["--init", str(made), "--set", "data.template=tinyseek"]
    assert parse_command("lora_train", "Lora", "", own).config.data.template == "tinyseek"


# --- what belongs together --------------------------------------------------------------------------------


def test_an_adapter_of_another_base_is_refused(dialogues, tmp_path, monkeypatch):
    call(monkeypatch, lora_train, arguments(tmp_path, dialogues, base_in(tmp_path), steps=2))
    other = write_checkpoint(tmp_path / "other.pkl", "SFT", seed=9)
    with pytest.raises(UserError, match="was trained on other weights"):
        load_adapter(tmp_path / "TinySeek_Lora_final.pkl", load_full(other))
    with pytest.raises(UserError, match="an adapter of lora_train, not a full model"):
        load_full(tmp_path / "TinySeek_Lora_final.pkl")
    with pytest.raises(UserError, match="holds an adapter, not a whole model: name its base"):
        flags = arguments(tmp_path / "b", dialogues, tmp_path / "TinySeek_Lora_final.pkl")
        call(monkeypatch, prefix_train, flags)


def test_without_a_model_the_way_to_one_is_named(dialogues, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.command.ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="no TinySeek_Pre_final.pkl in .*python train/pre_train.py"):
        sft_train.main()


def gate_flags(out, dialogues, base, candidates):
    """Flags of the gate over some candidates."""
    chosen = json.dumps([str(one) for one in candidates])
    return arguments(out, dialogues, base, f"gate.candidates={chosen}")


@pytest.mark.slow
def test_a_gate_over_adapters(dialogues, tmp_path, monkeypatch, capsys):
    """It finds the adapters beside the base, saves itself alone, and says what it chooses between."""
    base = base_in(tmp_path)
    for script in (lora_train, prefix_train):
        call(monkeypatch, script, arguments(tmp_path, dialogues, base))
    call(monkeypatch, gate_train, arguments(tmp_path, dialogues, base))
    said = capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "TinySeek_Gate_final.pkl")
    assert set(saved["weights"]) and all(name.startswith("selector.") for name in saved["weights"])
    names = [one["path"] for one in saved["base"]["candidates"]]
    assert names[0] == "base" and len(names) == 3 and all(name in said for name in names)
    assert "the gate is right on" in said
    again = arguments(tmp_path, dialogues, base)
    call(monkeypatch, gate_train, [*again, "--resume"])  # it is finished
    call(monkeypatch, lora_train, [*again, "--overwrite", "--seed", "1"])  # the labels were made with another
    with pytest.raises(UserError, match="was trained on other data"):
        call(monkeypatch, gate_train, [*again, "--resume"])
    with pytest.raises(UserError, match="has no adapter beside it"):
        alone = base_in(tmp_path / "empty")
        call(monkeypatch, gate_train, arguments(tmp_path / "empty" / "g", dialogues, alone))


def counted(folder, stage, *words):
    """Run a stage; each process that encodes leaves a file, with one byte for each dialogue."""
    encode = chat_data.encode

    def count(*given):
        with open(f"{folder}/encoded_{os.environ['RANK']}", "ab") as file:
            file.write(b".")
        return encode(*given)

    chat_data.encode = count
    without_pictures(stage, *words)


@pytest.mark.slow
@pytest.mark.parametrize("script", [sft_train, lora_train, gate_train])
def test_one_of_two_processes_encodes(script, dialogues, tmp_path):
    """Each process of each stage once encoded everything (D22)."""
    base, other = base_in(tmp_path), write_checkpoint(tmp_path / "other.pkl", "SFT", seed=9)
    flags = gate_flags(tmp_path / "run", dialogues, base, ["base", other])
    flags += ["--set", f"data.cache_dir={tmp_path}", "--max-steps", "1"]
    done = fork(counted, str(tmp_path), script.__name__, *flags, processes=2)
    assert done.returncode == 0, done.stderr
    encoded = {file.name: file.stat().st_size for file in tmp_path.glob("encoded_*")}
    assert encoded == {"encoded_0": 60}


@pytest.mark.slow
def test_two_processes_equal_one(dialogues, tmp_path, monkeypatch):
    """SFT, MixLoRA and the gate, at the same global batch: the same weights to fp32 rounding."""
    base = base_in(tmp_path, "moe")
    stages, results = {"SFT": sft_train, "MixLora": mixlora_train, "Gate": gate_train}, {}
    for processes in (1, 2):
        out, calls = tmp_path / str(processes), {}
        sizes = ("--set", f"train.batch_size={4 // processes}", "--max-steps", "8")
        for short in ("SFT", "MixLora"):
            calls[short] = [*arguments(out, dialogues, base), *sizes]
        candidates = ["base", out / "TinySeek_MixLora_final.pkl"]
        calls["Gate"] = [*gate_flags(out, dialogues, base, candidates), *sizes]
        for short, flags in calls.items():
            if processes == 1:
                call(monkeypatch, stages[short], flags)
            else:
                done = fork(without_pictures, stages[short].__name__, *flags, processes=2)
                assert done.returncode == 0, done.stderr
        results[processes] = {
            short: load_checkpoint(out / f"TinySeek_{short}_final.pkl") for short in stages
        }
    for short, one in results[1].items():
        two = results[2][short]
        assert (one["step"], one["tokens"]) == (two["step"], two["tokens"])  # the same best of all epochs
        gap = largest_difference(one["weights"], two["weights"])
        assert gap < 1e-4, short
        assert one["evaluation"]["val_loss"] == pytest.approx(two["evaluation"]["val_loss"], rel=1e-4)
