"""Load checkpoints as models that are ready to use: a file holds shape, weights and tokenizer.

The file of an adapter holds the adapter alone. Its base is the model that the user names, or the one it was
trained on; a hash of all weights identifies it.

A file may come from a stranger: the types of its entries are checked, its shapes are compared before memory
is allocated, and the paths in it are not trusted.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path, PureWindowsPath

import torch

from config.load import from_dict
from config.schema import RunConfig
from load_data.chat.chat_template import ChatTemplate
from load_data.tokenization.tokenizer import Tokenizer
from model.blank import blank
from model.embedder import Embedder
from model.encoder import MaskedLM
from model.adapters import ADAPTERS, adapted, soft_tokens
from model.encoder_decoder import EncoderDecoder
from model.quantized import dequantize_weights, on_stores
from model.tinyseek import TinySeek
from modules.adapters.lora_model import fold
from utils.checkpoint import final_name, latest_checkpoint, load_checkpoint, load_weights, weights_digest
from utils.errors import UserError

CHAT_STAGES = ("GRPO", "PPO", "DPO", "SFT")  # stages whose models answer, the latest first
# Models before fine-tuning continue texts; a student is opened where no larger model is.
FULL_MODELS = (*CHAT_STAGES, "Long", "Pre", "Distill")
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "out"
ENTRIES = {"stage": str, "short": str, "config": dict, "tokenizer": str, "step": int}  # of any checkpoint
RECORD = {"path": str, "digest": str}  # what a checkpoint says about another file
REWARD = "--set rl.reward="  # of train/grpo_train.py
FILL = "python inference/fill_mask.py --checkpoint"
SEQ2SEQ = "python inference/seq2seq.py --checkpoint"
SEARCH = "python inference/search.py --model"
KINDS = {  # flag -> the name of the kind, and the required form of its entry `base`
    "--checkpoint": ("a full model", {}),
    "--adapter": ("an adapter", {"base": RECORD}),
    "--gate": ("a gate", {"base": RECORD | {"candidates": [RECORD]}}),
    REWARD: ("a reward model", {}),
    FILL: ("an encoder", {}),
    SEQ2SEQ: ("an encoder-decoder", {}),
    SEARCH: ("an embedding model", {}),
}
SPECIAL = dict.fromkeys(ADAPTERS, "--adapter") | {"Gate": "--gate", "Reward": REWARD}  # the flags of stages
SPECIAL |= {"MLM": FILL, "Span": SEQ2SEQ, "Embed": SEARCH, "Distill": "--checkpoint"}
SECTIONS = {"MLM": "encoder", "Span": "seq2seq"}  # of the configuration, where it is not `model`


@dataclass
class Loaded:
    """A model that is ready to be used."""

    model: TinySeek
    tokenizer: Tokenizer
    config: RunConfig  # of the run that trained it; for an adapter, of the run that trained the adapter
    path: Path
    answers: bool  # True if it was trained on dialogues; otherwise it continues texts
    template: ChatTemplate
    about: dict  # the checkpoint without its weights
    own: dict[str, torch.Tensor]  # the weights in its file; for an adapter those of the adapter alone

    @cached_property
    def digest(self) -> str:
        """A hash of the weights in its file, not of folded ones: machines round those differently."""
        return weights_digest(self.own)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.model.model.norm.weight.device


def find_model(out: str | Path, tell: Callable[[str], None] = lambda line: None) -> Path:
    """Return the model of the latest stage in `out`: its result, or its newest intermediate checkpoint.

    The stage decides, not the date: fine-tuning comes after pre-training. `tell` is told of newer results.
    """
    results = [Path(out) / final_name(short) for short in FULL_MODELS]
    for short, result in zip(FULL_MODELS, results, strict=True):
        if found := result if result.is_file() else latest_checkpoint(out, short):
            newest = max([found, *filter(Path.is_file, results)], key=lambda path: path.stat().st_mtime)
            if newest != found:
                tell(f"(note: {newest} is newer, but of an earlier stage; --checkpoint opens it)")
            return found
    where = "" if Path(out).resolve() == DEFAULT_OUT else f" --out {out}"
    raise UserError(
        f"no model in {out}: train one with python train/pre_train.py{where}, or name one with --checkpoint"
    )


def load_full(path: str | Path, device: str | torch.device = "cpu") -> Loaded:
    """Return a whole model on `device`, with all that a chat needs to know about it.

    Raises `UserError` if the file is missing, damaged, or holds no full model.
    """
    about = open_as("--checkpoint", path)
    model, tokenizer, config = build(TinySeek, about, path)
    model.to(device).eval()
    template = ChatTemplate(tokenizer, config.data.template)
    answers = answers_questions(about)
    return Loaded(model, tokenizer, config, Path(path), answers, template, about, model.state_dict())


def answers_questions(about: dict) -> bool:
    """Return True if the model of a checkpoint was trained on dialogues; otherwise it continues texts."""
    if about.get("short") != "Distill":
        return about.get("short") in CHAT_STAGES
    return ((about.get("config") or {}).get("distill") or {}).get("task") == "dialogues"


def load_encoder(path: str | Path) -> tuple[MaskedLM, Tokenizer, RunConfig]:
    """Return an encoder with its head for masked tokens. Raises `UserError` as `load_full` does."""
    model, tokenizer, config = build(MaskedLM, open_as(FILL, path), path)
    return model.eval(), tokenizer, config


def load_seq2seq(path: str | Path) -> tuple[EncoderDecoder, Tokenizer, RunConfig]:
    """Return an encoder-decoder. Raises `UserError` as `load_full` does."""
    model, tokenizer, config = build(EncoderDecoder, open_as(SEQ2SEQ, path), path)
    config.seq2seq.check()  # once more, now that the size of the vocabulary is known
    return model.eval(), tokenizer, config


def load_embedder(path: str | Path) -> tuple[Embedder, Tokenizer, RunConfig]:
    """Return an embedding model. Raises `UserError` as `load_full` does."""
    about = open_as(SEARCH, path)
    embed = from_dict(about["config"], str(path)).embed
    model, tokenizer, config = build(partial(Embedder.from_config, embed), about, path)
    return model.eval(), tokenizer, config


def model_section(about: dict) -> str:
    """Return the section of the configuration that is the model's of a checkpoint."""
    if about.get("short") == "Embed":  # an encoder, or the body of a decoder
        embed = (about.get("config") or {}).get("embed") or {}
        return "model" if embed.get("base") == "decoder" else "encoder"
    return SECTIONS.get(about.get("short"), "model")


def build(kind: Callable, about: dict, path: str | Path) -> tuple[torch.nn.Module, Tokenizer, RunConfig]:
    """Return the model `kind(config)`, the tokenizer and the settings of a checkpoint, taking its weights."""
    tokenizer = Tokenizer.from_json(about["tokenizer"], str(path))
    config, weights = from_dict(about["config"], str(path)), about.pop("weights")
    shape = getattr(config, model_section(about))
    shape.vocab_size = shape.vocab_size or tokenizer.vocab_size
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, its model only {shape.vocab_size}"
        )
    if config.quant.method != "none":
        if kind is not TinySeek:
            raise UserError(f"{path}: quantised, which only whole models that write text can be")
        kind = partial(on_stores, config.quant)
    elif config.qat.bits:  # whose exact weights are not what it computes with
        bits = config.qat.bits
        raise UserError(f"{path}: of an unfinished training with qat.bits={bits}: end it with --resume")
    layers = shape.num_hidden_layers + getattr(shape, "num_decoder_layers", 0)
    if layers > len(weights):
        raise UserError(f"{path}: it names {layers} layers and has {len(weights)} weights")
    if shape.hidden_size > sum(part.numel() for part in weights.values()):
        raise UserError(f"{path}: it names {shape.hidden_size} channels, which its weights cannot have")
    with warnings.catch_warnings(action="ignore"):
        load_weights(blank(kind, shape, "meta"), weights, str(path))  # compares shapes, without memory
    model = blank(kind, shape)
    load_weights(model, weights, str(path))
    return model, tokenizer, config


def in_full(loaded: Loaded, tell: Callable[[str], None]) -> Loaded:
    """Return `loaded` with plain weights, in place; say so if they were codes."""
    if (quant := loaded.config.quant).method != "none":
        dequantize_weights(loaded.model)
        tell(f"({quant.method}, {quant.bits} bits: what is written are the numbers that the codes stand for)")
    return loaded


def load_base(checkpoint, device, out, adapter=None, gate=None, tell=lambda line: None) -> Loaded:
    """Return the whole model of a command: `checkpoint`, or the base of the adapter or of the gate, or else
    the model that `find_model` finds."""
    if not checkpoint and (adapter or gate):
        checkpoint = find_base("--adapter", adapter) if adapter else find_base("--gate", gate)
    return load_full(checkpoint or find_model(out, tell), device)


def open_as(flag: str, path: str | Path) -> dict:
    """Return the checkpoint in `path`. Raises `UserError` unless it is sound and of the kind of `flag`."""
    checkpoint, (name, base) = load_checkpoint(path), KINDS[flag]
    short = checkpoint.get("short")
    kind = SPECIAL.get(short, "--checkpoint")
    if short is not None and kind != flag:
        stage, use = checkpoint.get("stage"), f"{kind}{path}" if kind == REWARD else f"{kind} {path}"
        if flag.startswith("python ") and not kind.startswith("python "):  # whose own flags mean other things
            use = f"python {'train/grpo_train.py' if kind == REWARD else 'inference/chat.py'} {use}"
        raise UserError(f"{path}: {KINDS[kind][0]} of {stage}, not {name}; use {use}")
    forms = ENTRIES | {"weights": are_weights} | base
    if missing := [key for key in forms if checkpoint.get(key) is None]:
        raise UserError(f"{path}: not {name}, it has no {', '.join(missing)}")
    if wrong := [key for key, form in forms.items() if not has_form(checkpoint[key], form)]:
        raise UserError(f"{path}: not written by a run: wrong types in {', '.join(wrong)}")
    return checkpoint


def has_form(value, form) -> bool:
    """Return True if `value` has `form`: a type, [form of each element], {key: form} or a test function."""
    if isinstance(form, list):
        return isinstance(value, list) and all(has_form(one, form[0]) for one in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(has_form(value.get(key), one) for key, one in form.items())
    return isinstance(value, form) if isinstance(form, type) else form(value)


def are_weights(value) -> bool:
    """Return True for a dictionary of tensors."""
    return has_form(value, {}) and has_form([*value], [str]) and has_form([*value.values()], [torch.Tensor])


def find_base(flag: str, path: str | Path) -> Path:
    """Return the path of the base of an adapter or a gate; `flag` says which of them `path` is."""
    base = open_as(flag, path)["base"]
    if found := find_file(base["path"], base["digest"], path):
        return found
    raise UserError(f"{path}: its base {base['path']} was not found; name it with --checkpoint FILE")


def find_file(was: str, digest: str, path: str | Path) -> Path | None:
    """Return the file that the checkpoint in `path` refers to as `was`, or None.

    The search goes through the folder of `path`, then takes `was` relative to it, to the folders above and to
    the working directory, or as it is if absolute. The first file whose weights have `digest` wins, or else
    the first file.

    Trap: a stranger wrote that path. A network path is never opened, because Windows would send the user's
    name and a hash of the password to that host.
    """
    folder, name = Path(path).resolve().parent, PureWindowsPath(was)  # accepts both kinds of slashes
    places = [folder / name.name]
    if not name.anchor:
        places += [*(parent / was for parent in (folder, *folder.parents)), Path(was)]
    elif not name.drive.startswith("\\\\"):
        places.append(Path(was))
    first = None
    for place in places:
        if place.is_file():
            first = first or place.resolve()
            weights = load_checkpoint(place).get("weights")
            if are_weights(weights) and weights_digest(weights) == digest:
                return place.resolve()
    return first


def load_adapter(path: str | Path, base: Loaded) -> Loaded:
    """Return `base` with the adapter in `path`. They share the tensors of the base, except for the matrices
    that LoRA changes: LoRA is folded into copies, which cost memory but decode as fast as the base."""
    checkpoint = open_as("--adapter", path)
    check_base(checkpoint, path, base)
    config, own = from_dict(checkpoint["config"], str(path)), checkpoint.pop("weights")
    model = adapted(base.model, checkpoint["short"], config, own, str(path))
    if ADAPTERS[checkpoint["short"]] == "Lora":
        fold(model, "default")  # plain layers again, which the fast decoder supports
    soft, ids = soft_tokens(checkpoint["short"], config), model.config.vocab_size
    template = ChatTemplate(base.tokenizer, config.data.template, soft, ids)
    return Loaded(model, base.tokenizer, config, Path(path), True, template, checkpoint, own)


def check_base(checkpoint: dict, path: str | Path, base: Loaded) -> None:
    """Raise `UserError` if the file was trained on other weights than those of `base`."""
    needs = checkpoint["base"]
    if needs["digest"] != base.digest:
        raise UserError(
            f"{path} was trained on other weights ({needs['digest']}, {needs['path']}) than those of "
            f"{base.path} ({base.digest}): name its own base with --checkpoint FILE"
        )
