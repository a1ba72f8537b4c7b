"""Small checkpoints with random weights, as training would leave them."""

from config.load import to_dict
from config.schema import RunConfig
from load_data.tokenization.tokenizer import BpeTokenizer
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config
from utils.checkpoint import save_checkpoint

STAGES = {"Pre": "pre_train", "SFT": "sft", "DPO": "dpo", "GRPO": "grpo"}


def byte_tokenizer() -> BpeTokenizer:
    """Special tokens and the 256 bytes; no merges, so that characters outside ASCII come in pieces."""
    return BpeTokenizer([])


def tiny_model(seed=0, **changes) -> TinySeek:
    """A model over `byte_tokenizer` that writes all kinds of bytes."""
    return shake(TinySeek(small_config(vocab_size=byte_tokenizer().vocab_size, **changes)), seed).eval()


def run_config(model: TinySeek) -> dict:
    """The nested configuration that a run with `model` would save."""
    config = RunConfig(model=model.config)
    config.train.max_steps = 10
    config.data.val_fraction = 0.3  # a later stage may hold out less, not more
    return to_dict(config.validate())


def write_checkpoint(path, short="Pre", seed=0, **changes):
    """Save `tiny_model(seed)` as stage `short` would, with `changes` to the entries; returns the path."""
    model = tiny_model(seed)
    data = {
        "stage": STAGES[short],
        "short": short,
        "config": run_config(model),
        "weights": model.state_dict(),
        "tokenizer": byte_tokenizer().to_json(),
        "step": 1234,
        "tokens": 99,
    }
    save_checkpoint(path, {key: value for key, value in (data | changes).items() if value is not None})
    return path
