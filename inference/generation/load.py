"""From checkpoints to models that can be used: a file knows its shape, its weights and its tokenizer.

An adapter's file holds the adapter alone; its base is the model that was named, or the one it was trained on,
and a hash of all weights decides whether that is the right one.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PureWindowsPath

import torch

from config.load import from_dict
from config.schema import RunConfig
from load_data.chat.chat_template import ChatTemplate
from load_data.tokenization.tokenizer import Tokenizer
from model.adapters import ADAPTERS, adapted, soft_tokens
from model.tinyseek import TinySeek
from modules.adapters.adapted_layer import fold
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint, load_weights, weights_digest
from utils.errors import UserError

CHAT_STAGES = ("GRPO", "DPO", "SFT")  # their models answer; the latest stage first
FULL_MODELS = (*CHAT_STAGES, "Pre")  # a pre-trained model continues
KINDS = {"--checkpoint": "a full model", "--adapter": "an adapter", "--gate": "a gate"}  # by their flags


@dataclass
class Loaded:
    """A model that is ready to be used.

    Attributes:
        config: of the run that trained it (for an adapter: the adapter).
        answers: whether it was trained on dialogues; if not, it continues texts.
        template: how dialogues are put to it.
        about: the checkpoint as saved, less its weights.
        own: the weights that its file holds; of an adapter they are the adapter alone.
    """

    model: TinySeek
    tokenizer: Tokenizer
    config: RunConfig
    path: Path
    answers: bool
    template: ChatTemplate
    about: dict
    own: dict[str, torch.Tensor]

    @cached_property
    def digest(self) -> str:
        """Identifies the weights of its file. (Folded ones would not do: each machine rounds them anew.)"""
        return weights_digest(self.own)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.lm_head.weight.device


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
    checkpoint = open_as("--checkpoint", path)
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
    answers = about["short"] in CHAT_STAGES
    return Loaded(model, tokenizer, config, Path(path), answers, template, about, model.state_dict())


def load_base(
    checkpoint: str | None,
    device: str | torch.device,
    out: str | Path,
    adapter: str | None = None,
    gate: str | None = None,
) -> Loaded:
    """The whole model that a command means: the one it names, or else that of the adapter or the gate, or
    else the best in folder `out`."""
    if not checkpoint and adapter:
        checkpoint = find_base("--adapter", adapter)
    if not checkpoint and gate:
        checkpoint = find_base("--gate", gate)
    return load_full(checkpoint or find_model(out), device)


def open_as(flag: str, path: str | Path) -> dict:
    """The checkpoint in `path`. Raises `UserError` unless it is one that `flag`, of `KINDS`, takes."""
    checkpoint = load_checkpoint(path)
    needed = ["stage", "short", "config", "weights", "tokenizer"]
    needed += [] if flag == "--checkpoint" else ["base"]
    short = checkpoint.get("short")
    kind = "--adapter" if short in ADAPTERS else "--gate" if short == "Gate" else "--checkpoint"
    if short is not None and kind != flag:
        stage = checkpoint.get("stage")
        raise UserError(f"{path}: {KINDS[kind]} of {stage}, not {KINDS[flag]}; use {kind} {path}")
    if missing := [key for key in needed if checkpoint.get(key) is None]:
        raise UserError(f"{path}: not {KINDS[flag]}, it has no {', '.join(missing)}")
    return checkpoint


def find_base(flag: str, path: str | Path) -> Path:
    """Where the base of an adapter, or of a gate, is; `flag` says which of them `path` is."""
    base = open_as(flag, path)["base"]
    if found := find_file(base["path"], base["digest"], path):
        return found
    raise UserError(f"{path}: its base {base['path']} is not there; name it with --checkpoint FILE")


def find_file(was: str, digest: str, path: str | Path) -> Path | None:
    """Where a file is that the one in `path` speaks of: where it was in training, seen from here or from a
    folder above `path`, or beside `path`. Of several, the first whose weights have `digest`; or None."""
    folder = Path(path).resolve().parent
    places = [Path(was), *(parent / was for parent in (folder, *folder.parents))]
    places.append(folder / PureWindowsPath(was).name)  # which knows the slashes of both worlds
    found = list(dict.fromkeys(place.resolve() for place in places if place.is_file()))
    if len(found) < 2:
        return found[0] if found else None
    fits = (one for one in found if weights_digest(load_checkpoint(one).get("weights", {})) == digest)
    return next(fits, found[0])


def load_adapter(path: str | Path, base: Loaded) -> Loaded:
    """`base` with the adapter in `path`; both share the tensors of the base, but for matrices that a LoRA
    changes: it is folded into copies of them, which cost memory and make each token as fast as the base's."""
    checkpoint = open_as("--adapter", path)
    check_base(checkpoint, path, base)
    config, own = from_dict(checkpoint["config"], str(path)), checkpoint.pop("weights")
    model = adapted(base.model, checkpoint["short"], config, own, str(path))
    if checkpoint["short"] == "Lora":
        fold(model, "default")  # plain layers again, which the fast decoder takes
    soft, ids = soft_tokens(checkpoint["short"], config), model.config.vocab_size
    template = ChatTemplate(base.tokenizer, config.data.template, soft, ids)
    return Loaded(model, base.tokenizer, config, Path(path), True, template, checkpoint, own)


def check_base(checkpoint: dict, path: str | Path, base: Loaded) -> None:
    """Raise `UserError` if the file was made for other weights than those of `base`."""
    needs = checkpoint["base"]
    if needs["digest"] != base.digest:
        raise UserError(
            f"{path} was trained on other weights ({needs['digest']}, {needs['path']}) than those of "
            f"{base.path} ({base.digest}): name its own base with --checkpoint FILE"
        )
