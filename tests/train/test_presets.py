"""Every preset is built and stepped: its own model, optimizer and schedule, on one row of sixteen tokens.

Only the batch is small, and of a preset with more than eight layers two are built: twelve would take twenty
seconds.
"""

import pytest
import torch

from config.load import load_config, preset_names
from load_data.loader import TokenLoader
from model.tinyseek import TinySeek
from tests.train.tools import make_trainer, random_tokens, weights_of

VOCABULARY = 100  # of presets whose tokenizer decides it, and who have one of characters


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "gpu" in name else ()) for name in preset_names()]
)
def test_a_preset_is_built_and_stepped(name, tmp_path, monkeypatch):
    monkeypatch.setattr("train.engine.plot_curves", lambda log, png: None)
    monkeypatch.setattr("train.engine.Trainer.save", lambda self: None)  # hundreds of megabytes
    monkeypatch.setattr("train.engine.Trainer.save_final", lambda self: None)
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
    config.model.vocab_size = config.tokenizer.vocab_size if config.tokenizer.kind == "bpe" else VOCABULARY
    if config.model.num_hidden_layers > 8:
        config.model.num_hidden_layers = 2
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
