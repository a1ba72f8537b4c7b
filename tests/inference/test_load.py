"""From files to models: which one is chosen, and what is said about broken ones."""

import pytest
import torch

from inference.load import find_model, load_model
from tests.inference.tools import byte_tokenizer, run_config, tiny_model, write_checkpoint
from utils.errors import UserError


def test_the_latest_stage_is_chosen(tmp_path):
    """Files appear one after the other; each time the best one there is named. GRPO, DPO, SFT, Pre."""
    with pytest.raises(UserError, match="python train/pre_train.py"):
        find_model(tmp_path)
    with pytest.raises(UserError, match="no model in .*nowhere"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "TinySeek_Lora_final.pkl").touch()  # an adapter is no full model
    for name in (
        "TinySeek_Pre2_0.pkl", "TinySeek_Pre10_0.pkl", "TinySeek_Pre1_1.pkl", "TinySeek_Pre_final.pkl",
        "TinySeek_SFT3_0.pkl", "TinySeek_SFT_final.pkl", "TinySeek_DPO_final.pkl", "TinySeek_GRPO_final.pkl",
    ):  # fmt: skip
        (tmp_path / name).touch()
        assert find_model(tmp_path) == tmp_path / name


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = write_checkpoint(tmp_path / "a.pkl", "SFT", seed=3)
    model, tokenizer, checkpoint = load_model(path, torch.device("cpu"))
    ids = torch.tensor([tokenizer.encode("déjà vu")])
    assert torch.equal(model(ids).logits, tiny_model(3)(ids).logits)
    assert not model.training and tokenizer.to_json() == byte_tokenizer().to_json()
    assert checkpoint["short"] == "SFT" and checkpoint["step"] == 1234 and "weights" not in checkpoint


def test_a_config_without_vocabulary_size_takes_the_tokenizers(tmp_path):
    config = run_config(tiny_model())
    config["model"]["vocab_size"] = 0
    model, tokenizer, _ = load_model(write_checkpoint(tmp_path / "a.pkl", config=config))
    assert model.config.vocab_size == tokenizer.vocab_size


def test_broken_checkpoints_are_one_clear_error(tmp_path):
    config = run_config(tiny_model())

    def changed(**values):
        return {**config, "model": {**config["model"], **values}}

    cases = {
        "not a full model, it has no weights": {"weights": None},
        "no config, tokenizer": {"config": None, "tokenizer": None},
        "tokenizer has 263 tokens, its model only 100": {"config": changed(vocab_size=100)},
        "does not fit this model": {"config": changed(num_hidden_layers=1)},
        "not a tokenizer": {"tokenizer": "{}"},
        "unknown setting.*colour": {"config": changed(colour=1)},
    }
    for message, changes in cases.items():
        path = write_checkpoint(tmp_path / "broken.pkl", **changes)
        with pytest.raises(UserError, match=message) as caught:
            load_model(path)
        assert "broken.pkl" in str(caught.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_model(tmp_path / "missing.pkl")
