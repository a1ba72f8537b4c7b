"""Fine-tuning from the command line: what each stage trains, saves and refuses, and that two processes equal
one."""

import json
import sys

import pytest
import torch

from inference.fast_decoder import supports
from inference.load import load_adapter, load_full
from tests.inference.tools import byte_tokenizer, write_checkpoint
from tests.train.tools import ROOT, largest_difference, run, same_bits
from train import gate_train, lora_train, mixlora_train, prefix_train, sft_train
from utils.checkpoint import load_checkpoint, weights_digest
from utils.errors import UserError
from utils.log import read_log

SCRIPTS = {"SFT": sft_train, "Lora": lora_train, "MixLora": mixlora_train, "Prefix": prefix_train}
TURNS = str(ROOT / "tests" / "train" / "stages_in_turn.py")


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


SETTINGS = (
    "data.sequence_length=48", "train.batch_size=4", "train.dtype=fp32", "data.val_fraction=0.2",
    "optim.optimizer=adamw", "optim.lr=0.01", "optim.warmup_steps=0", "train.log_every=1",
    "balance.statistics=exact",
)  # fmt: skip


def arguments(out, dialogues, init, *settings, steps=14):
    """Flags of a short run."""
    flags = ["--data", dialogues, "--init", init, "--out", out, "--device", "cpu", "--max-steps", steps]
    for setting in (*SETTINGS, *settings):
        flags += ["--set", setting]
    return [str(flag) for flag in flags]


def call(monkeypatch, script, flags):
    """The script's main in this process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


def base_in(folder, kind="dense", short="SFT"):
    """A random model of `kind`, as training would leave it."""
    from tests.inference.tools import run_config, tiny_model

    model = tiny_model(seed=5, **(MOE if kind == "moe" else {}))
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
    saved = load_checkpoint(out / f"TinySeek_{short}_final.pkl")
    before = load_checkpoint(base)["weights"]
    assert "gradients proven" in said and "weights proven" in said and "exact" in said and "items" in said
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
        assert supports(adapted.model) and adapted.model.state_dict().keys() == before.keys()
    else:
        own = {name: part for name, part in adapted.model.state_dict().items() if name in saved["weights"]}
        assert same_bits(own, saved["weights"])
    ids = torch.tensor([byte_tokenizer().encode("hello")])
    assert not torch.equal(full.model(ids).logits, adapted.model(ids).logits)
    assert same_bits(before, load_checkpoint(base)["weights"])


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
    monkeypatch.setattr("train.cli.ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft", "--out", str(tmp_path / "x")])
    with pytest.raises(UserError, match="no TinySeek_Pre_final.pkl in .*python train/pre_train.py"):
        sft_train.main()


def gate_flags(out, dialogues, base, candidates):
    """Flags of the gate over some candidates."""
    chosen = json.dumps([str(one) for one in candidates])
    return arguments(out, dialogues, base, f"gate.candidates={chosen}")


def test_a_gate_over_adapters(dialogues, tmp_path, monkeypatch, capsys):
    """It finds the adapters beside the base, saves itself alone, and says what it chooses between."""
    base = base_in(tmp_path)
    for script in (lora_train, prefix_train):
        call(monkeypatch, script, arguments(tmp_path, dialogues, base))
    call(monkeypatch, gate_train, arguments(tmp_path, dialogues, base))
    said = capsys.readouterr().out
    saved = load_checkpoint(tmp_path / "TinySeek_Gate_final.pkl")
    assert set(saved["weights"]) and all(name.startswith("gate.") for name in saved["weights"])
    names = [one["path"] for one in saved["base"]["candidates"]]
    assert names[0] == "base" and len(names) == 3 and all(name in said for name in names)
    assert "the gate is right on" in said
    with pytest.raises(UserError, match="no adapter of"):
        alone = base_in(tmp_path / "empty")
        call(monkeypatch, gate_train, arguments(tmp_path / "empty" / "g", dialogues, alone))


@pytest.mark.slow
def test_two_processes_equal_one(dialogues, tmp_path):
    """SFT, LoRA, MixLoRA and the gate, at the same global batch: the same weights to fp32 rounding."""
    base = base_in(tmp_path, "moe")
    results = {}
    for processes in (1, 2):
        out, words = tmp_path / str(processes), []
        for stage in ("sft_train", "lora_train", "mixlora_train"):
            words += [stage, *arguments(out, dialogues, base, f"train.batch_size={4 // processes}"), "--"]
        lora = out / "TinySeek_Lora_final.pkl"
        gate = gate_flags(out, dialogues, base, ["base", lora, out / "TinySeek_MixLora_final.pkl"])
        words += ["gate_train", *gate, "--set", f"train.batch_size={4 // processes}"]
        done = run(TURNS, *words, processes=processes, timeout=300)
        assert done.returncode == 0, done.stderr
        results[processes] = {
            short: load_checkpoint(out / f"TinySeek_{short}_final.pkl")
            for short in ("SFT", "Lora", "MixLora", "Gate")
        }
    for short, one in results[1].items():
        two = results[2][short]
        assert one["tokens"] == two["tokens"]
        gap = largest_difference(one["weights"], two["weights"])
        assert gap < 1e-4, short
        assert one["evaluation"]["val_loss"] == pytest.approx(two["evaluation"]["val_loss"], rel=1e-4)
