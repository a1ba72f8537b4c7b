"""Every preset is built and stepped: its own model, optimizer and schedule, on one row of sixteen tokens.

Only the batch, the vocabulary and the number of layers are small: none of them decides whether the settings
of a preset fit each other. Those of fine-tuning run as they are, two steps on a tiny random base.
"""

import importlib
import sys

import pytest
import torch

from config.load import PRESETS, load_config, preset_names, to_dict
from load_data.loader import TokenLoader
from model.tinyseek import TinySeek
from tests.inference.tools import run_config, tiny_model, write_checkpoint
from tests.train.tools import make_trainer, random_tokens, weights_of
from utils.checkpoint import load_checkpoint

VOCABULARY = 100


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "gpu" in name else ()) for name in preset_names()]
)
def test_a_preset_is_built_and_stepped(name, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.checkpoints.Checkpoints.save", lambda self: None)  # large
    monkeypatch.setattr("train.engine.checkpoints.Checkpoints.save_final", lambda self: None)
    shrink = [
        "batch_size=1",
        "accumulation_steps=1",
        "max_steps=2",
        "max_seconds=null",
        "compile=false",
        "dtype=fp32",
    ]
    config = load_config(name, [f"train.{setting}" for setting in shrink] + ["train.log_every=1"])
    assert config.data.sequence_length <= config.model.max_position_embeddings
    config.model.vocab_size = VOCABULARY
    config.model.num_hidden_layers = min(2, config.model.num_hidden_layers)
    torch.manual_seed(0)
    model = TinySeek(config.model)
    before = weights_of(model)
    trainer = make_trainer(
        tmp_path, config, model=model, loader=TokenLoader(random_tokens() % VOCABULARY, 16, 1)
    )
    trainer.run()
    assert trainer.step == 2
    for name, weight in model.named_parameters():
        assert torch.isfinite(weight).all() and not torch.equal(weight, before[name]), name


FINE_TUNING = {"sft_train": "SFT", "lora_train": "Lora", "mixlora_train": "MixLora", "prefix_train": "Prefix",
               "gate_train": "Gate", "dpo_train": "DPO", "reward_train": "Reward"}  # fmt: skip


def test_every_stage_has_presets_and_every_folder_is_of_a_stage():
    others = {"extend_context", "grpo_train", "ppo_train"}  # with tests of their own, like the next
    stages = FINE_TUNING.keys() | others | {"mlm_train", "span_train", "embed_train", "distill_train"}
    assert {folder.name for folder in PRESETS.iterdir() if folder.is_dir()} == stages
    assert all("default" in preset_names(stage) for stage in stages)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model with a context as long as the presets' rows, in a folder of its own."""
    model = tiny_model(max_position_embeddings=512)
    path = tmp_path_factory.mktemp("base") / "TinySeek_SFT_final.pkl"
    return write_checkpoint(path, "SFT", weights=model.state_dict(), config=run_config(model))


pytestmark = pytest.mark.usefixtures("part_of_the_library")


def fine_tune(monkeypatch, stage, name, base, out, *settings):
    """`python train/<stage>.py --config NAME` with two steps; returns what it saved and its settings."""
    monkeypatch.setattr("train.engine.fine_tuning.SCORED", 1)
    monkeypatch.setattr("load_data.chat.chat_data.VAL_PER_SKILL", 4)
    monkeypatch.setattr("train.engine.sampled_pairs.verify", lambda item, answer: len(answer.encode()) % 2)
    small = ["data.skill_samples=40", "train.batch_size=1", "train.dtype=fp32"]
    small += ["pairs.prompts=24", "pairs.samples=12", "pairs.max_new_tokens=24"]
    small += [f"data.cache_dir={base.parent / 'cache'}", *settings]
    flags = ["--config", name, "--init", base, "--out", out, "--device", "cpu", "--max-steps", "2"]
    flags += [part for setting in small for part in ("--set", setting)]
    monkeypatch.setattr(sys, "argv", [stage, *map(str, flags)])
    importlib.import_module(f"train.{stage}").main()
    return load_checkpoint(out / f"TinySeek_{FINE_TUNING[stage]}_final.pkl")


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage in FINE_TUNING for name in preset_names(stage)]
)
def test_a_preset_of_fine_tuning_is_built_and_stepped(stage, name, base, tmp_path, monkeypatch):
    """The run says itself that every weight moved; here, that it ran with what the preset says."""
    settings = []
    if stage == "gate_train":
        fine_tune(monkeypatch, "prefix_train", "default", base, tmp_path)
        settings = [f'gate.candidates=["base", "{tmp_path / "TinySeek_Prefix_final.pkl"}"]']
    saved = fine_tune(monkeypatch, stage, name, base, tmp_path / "run", *settings)
    preset = to_dict(load_config(name, stage=stage))
    assert preset["data"]["sequence_length"] <= 512
    for section in ("optim", "balance", "lora", "mixlora", "prefix", "dpo"):
        assert saved["config"][section] == preset[section]
    assert saved["config"]["data"]["paths"] == preset["data"]["paths"]
    assert saved["step"] == 2 and all(part.isfinite().all() for part in saved["weights"].values())
