"""From a checkpoint to a model that can be used: the file knows its shape, its weights and its tokenizer."""

from pathlib import Path

import torch

from config.load import from_dict
from load_data.tokenizer import Tokenizer
from model.tinyseek import TinySeek
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint, load_weights
from utils.errors import UserError

CHAT_STAGES = ("GRPO", "DPO", "SFT")  # their models answer; the latest stage first
FULL_MODELS = (*CHAT_STAGES, "Pre")  # a pre-trained model continues


def find_model(out: str | Path) -> Path:
    """The model of the latest stage in folder `out`: its result, or else its newest checkpoint."""
    for short in FULL_MODELS:
        final = Path(out) / final_name(short)
        if final.is_file():
            return final
        if newest := latest_checkpoint(out, short):
            return newest
    raise UserError(
        f"no model in {out}: train one with python train/pre_train.py, or name one with --checkpoint FILE"
    )


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[TinySeek, Tokenizer, dict]:
    """Model (on `device`, ready to generate), tokenizer, and the checkpoint as saved, less its weights.

    Raises `UserError` if the file is missing, damaged, or holds no full model.
    """
    checkpoint = load_checkpoint(path)
    missing = [key for key in ("stage", "short", "config", "weights", "tokenizer") if key not in checkpoint]
    if missing:
        raise UserError(f"{path}: not a full model, it has no {', '.join(missing)}")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"], str(path))
    config = from_dict(checkpoint["config"], str(path)).model
    config.vocab_size = config.vocab_size or tokenizer.vocab_size
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {config.vocab_size}"
        )
    model = TinySeek(config)
    load_weights(model, checkpoint.pop("weights"), str(path))
    return model.to(device).eval(), tokenizer, checkpoint
