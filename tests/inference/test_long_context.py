"""The command on a tiny model that was trained and extended within the test."""

import sys

import pytest

from inference import long_context
from inference.generation.load import load_full
from train import extend_context, pre_train
from utils.checkpoint import load_checkpoint
from utils.errors import run_main


def command(monkeypatch, module, *arguments):
    """Run a command within this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        run_main(module.main)
    return caught.value.code


@pytest.fixture(scope="module")
def folder(tmp_path_factory, part_of_the_library):
    """A folder with a model of 32 tokens, and one extended to 64 of them."""
    out = tmp_path_factory.mktemp("long")
    shape = ["--set", f"data.cache_dir={out / 'cache'}", "--data", "python", "recall", "--limit", 60]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pre_train, "show_samples", lambda *arguments: None)
        size = ["--config", "tiny", "--set=model.max_position_embeddings=32", "--set=data.sequence_length=32"]
        assert command(patch, pre_train, "--out", out, "--max-steps", 3, *shape, *size) == 0
        settings = ("extend.times=2", "extend.method=yarn", "train.batch_size=2", "train.eval_batches=2")
        flags = [word for setting in settings for word in ("--set", setting)]
        assert command(patch, extend_context, "--out", out, "--max-steps", 2, *shape, *flags) == 0
    return out


def test_the_extended_model_has_the_settings_and_other_weights(folder):
    base, extended = (load_full(folder / f"TinySeek_{short}_final.pkl") for short in ("Pre", "Long"))
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    assert extended.config.model.rope_scaling == scaling
    assert extended.config.model.max_position_embeddings == extended.config.data.sequence_length == 64
    assert (base.model.lm_head.weight != extended.model.lm_head.weight).any()
    about = load_checkpoint(folder / "TinySeek_Long_final.pkl")
    assert about["stage"] == "extend_context" and about["tokenizer"] == base.tokenizer.to_json()


def test_the_command_measures_every_method(monkeypatch, capsys, folder):
    arguments = ["--checkpoint", folder / "TinySeek_Pre_final.pkl", "--lengths", "128,256", "--count", 2]
    arguments += ["--methods", "plain,yarn,dca,window", "--tasks", "passkey,keys", "--depths", 2]
    assert command(monkeypatch, long_context, *arguments) == 0
    out = capsys.readouterr().out
    for method in ("plain", "yarn", "dca", "window"):
        assert out.count(f"\n{method} ") == 5  # a line of losses, and of two tasks two lengths
    pictures = {path.name for path in (folder / "long_context").iterdir()}
    assert pictures == {"loss.png", "passkey.png", "keys.png"}


def test_the_latest_model_is_the_extended_one(monkeypatch, capsys, folder):
    arguments = ["--out", folder, "--lengths", "32,64", "--count", 1, "--depths", 1, "--windows", 1]
    assert command(monkeypatch, long_context, *arguments) == 0
    assert "trained on 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("arguments, words", [
    (["--methods", "yarn,magic"], "--methods magic: known are plain"),
    (["--tasks", "riddle"], "--tasks riddle: known are passkey"),
    (["--lengths", "12,x"], "--lengths 12,x: give whole numbers"),
    (["--count", "0"], "--count 0 must be at least 1"),
    (["--lengths", "100000000"], "there are only"),
    (["--lengths", "16", "--methods", "yarn"], "16 tokens is no extension"),
])  # fmt: skip
def test_wrong_flags(monkeypatch, capsys, folder, arguments, words):
    base = folder / "TinySeek_Pre_final.pkl"
    assert command(monkeypatch, long_context, "--checkpoint", base, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and error.startswith("error")


def test_a_finished_extension_is_not_replaced(monkeypatch, capsys, folder):
    """And the way to talk to it is that of a whole model."""
    assert command(monkeypatch, extend_context, "--out", folder) == 2
    assert f"chat.py --out {folder}" in capsys.readouterr().err


@pytest.mark.parametrize("settings, words", [
    (["--set", "extend.times=1"], "extend.times=1 must be at least 2"),
    (["--set", "extend.method=magic"], "extend.method='magic' must be one of plain"),
    (["--init", "Long", "--set", "extend.method=yarn"], "extend its base instead"),
])  # fmt: skip
def test_what_cannot_be_extended(monkeypatch, capsys, folder, tmp_path, settings, words):
    settings = [str(folder / "TinySeek_Long_final.pkl") if word == "Long" else word for word in settings]
    init = [] if "--init" in settings else ["--init", folder / "TinySeek_Pre_final.pkl"]
    assert command(monkeypatch, extend_context, "--out", tmp_path / "new", *init, *settings) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
