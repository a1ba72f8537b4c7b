"""From checkpoints to models that can be used: a file knows its shape, its weights and its tokenizer.

An adapter's file holds the adapter alone; its base is the model that was named, or the one it was trained on,
and a hash of all weights decides whether that is the right one.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from config.load import from_dict
from config.schema import RunConfig
from load_data.chat_template import ChatTemplate
from load_data.tokenizer import Tokenizer
from model.adapters import ADAPTERS, adapted, soft_tokens
from model.tinyseek import TinySeek
from modules.adapted_layer import fold
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint, load_weights, weights_digest
from utils.errors import UserError

CHAT_STAGES = ("GRPO", "DPO", "SFT")  # their models answer; the latest stage first
FULL_MODELS = (*CHAT_STAGES, "Pre")  # a pre-trained model continues


@dataclass
class Loaded:
    """A model that is ready to be used.

    Attributes:
        config: of the run that trained it (for an adapter: the adapter).
        answers: whether it was trained on dialogues; if not, it continues texts.
        template: how dialogues are put to it.
        about: the checkpoint as saved, less its weights.
    """

    model: TinySeek
    tokenizer: Tokenizer
    config: RunConfig
    path: Path
    answers: bool
    template: ChatTemplate
    about: dict


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
    if checkpoint.get("base"):
        raise UserError(
            f"{path}: an adapter of {checkpoint['stage']}, not a full model; use --adapter {path}"
        )
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


def load_full(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """A whole model with what chat needs to know about it."""
    model, tokenizer, about = load_model(path, device)
    config = from_dict(about["config"], str(path))
    template = ChatTemplate(tokenizer, config.data.template)
    return Loaded(model, tokenizer, config, Path(path), about["short"] in CHAT_STAGES, template, about)


def open_adapter(path: str | Path) -> dict:
    """The checkpoint of an adapter. Raises `UserError` if the file holds something else."""
    checkpoint = load_checkpoint(path)
    if checkpoint.get("short") not in ADAPTERS or not checkpoint.get("base"):
        what = checkpoint.get("stage", "something else")
        raise UserError(f"{path}: not an adapter ({what}); adapters are results of {', '.join(ADAPTERS)}")
    return checkpoint


def find_base(checkpoint: dict, path: str | Path) -> Path:
    """Where the base of an adapter, or of a gate, is: where it was in training, or beside the file."""
    if not checkpoint.get("base"):
        raise UserError(f"{path}: a whole model of {checkpoint.get('stage')}; use --checkpoint {path}")
    was = Path(checkpoint["base"]["path"])
    for place in (was, Path(path).parent / was.name):
        if place.is_file():
            return place
    raise UserError(f"{path}: its base {was} is not there; name it with --checkpoint FILE")


def load_adapter(path: str | Path, base: Loaded) -> Loaded:
    """`base` with the adapter in `path`; both share the tensors of the base."""
    checkpoint = open_adapter(path)
    check_base(checkpoint, path, base)
    config = from_dict(checkpoint["config"], str(path))
    model = adapted(base.model, checkpoint["short"], config, checkpoint.pop("weights"), str(path))
    if checkpoint["short"] == "Lora":
        fold(model, "default")  # plain layers again, which the fast decoder takes
    soft, ids = soft_tokens(checkpoint["short"], config), model.config.vocab_size
    template = ChatTemplate(base.tokenizer, config.data.template, soft, ids)
    return Loaded(model, base.tokenizer, config, Path(path), True, template, checkpoint)


def check_base(checkpoint: dict, path: str | Path, base: Loaded) -> None:
    """Raise `UserError` if the file was made for other weights than those of `base`."""
    needs, has = checkpoint["base"]["digest"], weights_digest(base.model.state_dict())
    if needs != has:
        raise UserError(
            f"{path} was trained on other weights ({needs}, {checkpoint['base']['path']}) than those of "
            f"{base.path} ({has}): name its own base with --checkpoint FILE"
        )
