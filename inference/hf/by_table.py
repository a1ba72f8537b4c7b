"""Settings and weights of the families in other_families.py, from Hugging Face's files to ours and back.

As with decoders, a family can hold a model if what it writes is read back as a model that computes the same.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch

from config.checks import validate_section
from config.encoder import EncoderConfig
from config.schema import RunConfig
from config.seq2seq import Seq2SeqConfig
from inference.hf.families import REQUIRED
from inference.hf.folder import Stored, read_into
from inference.hf.other_families import OTHER_FAMILIES, TableFamily
from inference.hf.settings import family_of
from inference.hf.weights import compare
from model.blank import blank
from model.encoder import MaskedLM
from model.encoder_decoder import EncoderDecoder
from utils.errors import UserError

WHOLE = {"MLM": MaskedLM, "Span": EncoderDecoder}
NUMBER = re.compile(r"\.(\d+)\.")  # of a layer; the first one in a name
# settings that logits do not depend on, or that `behaviour` has in another form
UNSEEN = {"initializer_range", "dropout", "attention_dropout", "attn_implementation", "layer_types",
          "global_attn_every_n_layers", "local_attention"}  # fmt: skip


# --- settings -------------------------------------------------------------------------------------


def read_settings(config: dict, names, where: str) -> EncoderConfig | Seq2SeqConfig:
    """Return the settings of a model that computes what the model of this config.json does. `names`: of the
    tensors in its files, by `table_names`."""
    family = family_of(config, where, OTHER_FAMILIES)
    given = {name: value for name, value in config.items() if value is not None}
    for name, only in family.needs.items():
        if (value := given.get(name, family.absent.get(name, only))) != only:
            raise UserError(f"{where}: {name}={value!r} is not supported, only {only!r}")
    found = dict(family.fixed)
    for ours, (default, *spellings) in family.settings.items():
        found[ours] = next((given[one] for one in spellings if one in given), default)
        if found[ours] is REQUIRED:
            raise UserError(f"{where}: {spellings[0]} is missing")
    try:
        model = type(getattr(RunConfig(), family.section))(**found | family.read(given, names))
        validate_section(family.section, model)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def write_settings(model: EncoderConfig | Seq2SeqConfig) -> dict:
    """Return the config.json of the first family that can hold the model; without any, raise a `UserError`
    that names what the nearest one lacks."""
    wanted, nearest = behaviour(model), (math.inf, "~")
    for name, family in OTHER_FAMILIES.items():
        if not isinstance(model, type(getattr(RunConfig(), family.section))):
            continue
        config = {"model_type": name, "architectures": [family.architecture]} | family.needs
        config |= {theirs: getattr(model, ours) for ours, (_, theirs, *_) in family.settings.items()}
        config |= family.write(model)
        names = () if getattr(model, "tie_word_embeddings", True) else ("lm_head.weight",)
        try:
            found = behaviour(read_settings(config, names, name))
            lacks = [key for key in wanted if wanted[key] != found[key]]
        except UserError as error:
            rank, words = math.inf, str(error)
        else:
            rank, words = len(lacks), ", ".join(f"{key}={wanted[key]!r}" for key in lacks)
        if not rank:
            return config
        nearest = min(nearest, (rank, f"{name} comes nearest, but not in {words}"))
    raise UserError(f"no architecture of Hugging Face that TinySeek knows has this model: {nearest[1]}")


def behaviour(model: EncoderConfig | Seq2SeqConfig) -> dict:
    """Return all settings that the logits depend on, None for those without effect in this model."""
    found = {one.name: getattr(model, one.name) for one in fields(model) if one.name not in UNSEEN}
    if isinstance(model, Seq2SeqConfig):
        return found | {"max_position_embeddings": None}  # buckets know no limit
    if model.position_embedding_type != "rope":
        found |= {"global_rope_theta": None, "local_rope_theta": None}
    return found | {"windows of layers": [model.layer_window(n) for n in range(model.num_hidden_layers)]}


# --- weights --------------------------------------------------------------------------------------


def table_names(family: TableFamily, stored: dict[str, Stored]) -> dict[str, str]:
    """Return {name of a tensor in the family's table: its name in the files}."""
    bare = not any(name.startswith(family.prefix) for name in stored)  # files of a body alone
    found = {}
    for name in stored:
        known = family.prefix * bare + name
        for old, new in family.endings.items():
            known = known.removesuffix(old) + new if known.endswith(old) else known
        found[name if known in stored else known] = name
    for copy, original in family.copies.items():
        if copy in found and original not in found:
            found[original] = found.pop(copy)
    return found


def plan(kind: Callable, config, family: TableFamily, ours: str = "") -> tuple[dict, dict]:
    """Return {their tensor: [(our weight, its shape), ..]}, and {our tied weight: the weight that it equals}.

    `ours`: what the table puts before the names of the weights of `kind(config)`.
    """
    places = {one: number for number, one in enumerate(family.weights)}
    first, tied, found = {}, {}, []
    for name, weight in blank(kind, config, "meta").named_parameters(remove_duplicate=False):
        if id(weight) in first:
            tied[name] = first[id(weight)]
            continue
        first[id(weight)] = name
        layer, _, parameter = (ours + name).rpartition(".")
        pattern = NUMBER.sub(".N.", layer + ".", 1)[:-1]
        number = NUMBER.search(layer + ".")
        theirs = family.weights[pattern].replace(".N.", number[0] if number else "")
        found.append((places[pattern], f"{theirs}.{parameter}", name, tuple(weight.shape)))
    parts = {}
    for _, theirs, name, shape in sorted(found):
        parts.setdefault(theirs, []).append((name, shape))
    return parts, tied


def read_weights(
    kind: Callable, config, family: TableFamily, stored: dict[str, Stored], where: str, body: bool = False
) -> dict[str, torch.Tensor]:
    """Return the weights of `kind(config)` in fp32, read from the files of a model.

    `body`: `kind` is the body of the table's model, and the heads in the files are left out. All names and
    shapes are checked first. Raises `UserError` that lists what is missing, left over, or of another shape.
    """
    sizes = sum(math.prod(one.shape) for one in stored.values())
    layers = config.num_hidden_layers + getattr(config, "num_decoder_layers", 0)
    if layers > len(stored) or max(config.head_dim, config.hidden_size) > sizes:  # before they cost memory
        raise UserError(
            f"{where}: {len(stored)} tensors cannot be those of config.json, which has {layers} layers of "
            f"{config.hidden_size} channels, and heads of {config.head_dim} channels"
        )
    try:
        parts, tied = plan(kind, config, family, "model." if body else "")
    except (TypeError, RuntimeError):  # more than 2^63 numbers
        raise UserError(f"{where}: config.json describes tensors of impossible sizes") from None
    shapes = {
        theirs: (sum(shape[0] for _, shape in ours), *ours[0][1][1:]) for theirs, ours in parts.items()
    }
    names = table_names(family, stored)

    def is_ignored(name: str) -> bool:
        head = body and not name.startswith(family.prefix)
        return head or name.startswith(family.ignored) or name in family.copies

    compare(shapes, {name: stored[real] for name, real in names.items()}, is_ignored, where)
    copies = {copy: one for copy, one in family.copies.items() if copy in names and one in shapes}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    tensors |= {copy: torch.empty(stored[names[copy]].shape) for copy in copies}
    read_into([(tensor, names[name]) for name, tensor in tensors.items()], stored)
    for copy, original in copies.items():
        if not torch.equal(tensors[copy], tensors[original]):
            raise UserError(f"{where}: {copy} differs from {original}, which this family ties to it")
    weights = {}
    for theirs, ours in parts.items():
        rows = tensors[theirs].split([shape[0] for _, shape in ours])
        weights |= {name: part.clone() for (name, _), part in zip(ours, rows, strict=True)}
    return weights | {name: weights[one] for name, one in tied.items()}


def written_weights(
    weights: dict, kind: Callable, config, family: TableFamily
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield our weights as the tensors of the family's files."""
    for theirs, ours in plan(kind, config, family)[0].items():
        yield theirs, torch.cat([weights[name] for name, _ in ours])
