"""Weights of a Hugging Face model by TinySeek's names, and back.

Most names are equal. Experts are stacked here, (E, 2F, C) and (E, C, F), and in files one tensor for each
matrix of each expert; newer files may have them stacked too.

    ours    model.layers.0.mlp.experts.gate_up_proj          gate of all experts over up of all experts
    theirs  model.layers.0.mlp.experts.7.gate_proj.weight    and so on
"""

import math
import re
from collections.abc import Callable, Iterator

import torch
from tqdm import tqdm

from config.model import ModelConfig
from inference.hf.families import Family
from inference.hf.folder import Stored, listed, read_into
from model.blank import blank
from model.tinyseek import TinySeek
from modules.rope_pairing import other_pairing
from utils.errors import UserError

HEAD, EMBEDDING, BIAS = "lm_head.weight", "model.embed_tokens.weight", "e_score_correction_bias"
STACKS = {"gate_up_proj": slice(0, 2), "down_proj": slice(2, 3)}  # our stack -> its part of `Family.expert`
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def shapes_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return our weights by name, without memory. Tied weights have two names; a head of MTP is left out."""
    state = blank(TinySeek, config, "meta").state_dict()
    return {name: tensor for name, tensor in state.items() if not name.startswith("mtp.")}


def may_be_absent(name: str, config: ModelConfig) -> bool:
    """Return True for a weight of ours that files may lack: a tied head, the bias of a softmax router."""
    return (name == HEAD and config.tie_word_embeddings) or (
        name.endswith(BIAS) and config.scoring_func == "softmax"
    )


def pieces(name: str, tensor, family: Family, stored=()) -> list[tuple[torch.Tensor, str]]:
    """Return (view of one of our weights, name of the tensor in the family's files that belongs there).

    Files that are being read may have it under our own name, as transformers holds it in memory.
    """
    stem, _, last = name.rpartition(".")
    theirs = name
    for piece, replaced in family.weights.items():
        theirs = theirs.replace(piece, replaced)
    if not stem.endswith(".experts") or name in stored:
        return [(tensor, name if name in stored else theirs)]
    stem, matrices = theirs.rpartition(".")[0], family.expert[STACKS[last]]
    # of each expert: gate_up (2F, C) -> gate (F, C), up (F, C); or down (C, F) as it is
    return [
        (part, f"{stem}.{expert}.{matrix}.weight")
        for expert, both in enumerate(tensor)
        for part, matrix in zip(both.chunk(len(matrices)), matrices, strict=True)
    ]


def read_weights(config: ModelConfig, family: Family, stored: dict[str, Stored], where: str) -> dict:
    """Return the weights of `TinySeek(config)` in fp32, read from the files of a model.

    All names and shapes are checked first. Raises `UserError` that lists what is missing, left over, or of
    another shape.
    """
    experts = config.n_routed_experts if any(map(config.is_moe_layer, range(config.num_hidden_layers))) else 0
    sizes = [one.shape for one in stored.values() if 0 not in one.shape]
    routers = not experts or any(shape[:1] == (experts,) for shape in sizes)  # which has a row for each
    rotates = config.rotary_dim <= sum(map(math.prod, sizes))
    if config.num_hidden_layers > len(stored) or not (routers and rotates):  # before they cost time or memory
        raise UserError(
            f"{where}: {len(stored)} tensors cannot be those of config.json, which has "
            f"{config.num_hidden_layers} layers, {experts} experts, {config.rotary_dim} channels that rotate"
        )
    try:
        shapes = shapes_of(config)
    except (TypeError, RuntimeError):  # more than 2^63 numbers
        raise UserError(f"{where}: config.json describes tensors of impossible sizes") from None
    plan = {name: pieces(name, tensor, family, stored) for name, tensor in shapes.items()}
    plan = {name: sources for name, sources in plan.items()
            if sources[0][1] in stored or not may_be_absent(name, config)}  # fmt: skip
    needed = {theirs: tuple(part.shape) for sources in plan.values() for part, theirs in sources}
    compare(needed, stored, lambda name: is_ignored(name, config), where)
    weights = {}
    total = sum(4 * shapes[name].numel() for name in plan)
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading") as bar:
        for name in sorted(plan, key=lambda name: -shapes[name].numel()):  # the largest while memory is free
            weights[name] = torch.empty(shapes[name].shape)
            read_into(pieces(name, weights[name], family, stored), stored)
            bar.update(4 * weights[name].numel())
    if config.tie_word_embeddings:
        head = weights.setdefault(HEAD, weights[EMBEDDING])
        if not torch.equal(head, weights[EMBEDDING]):
            raise UserError(f"{where}: tie_word_embeddings is true, but {HEAD} differs from {EMBEDDING}")
        weights[HEAD] = weights[EMBEDDING]
    for name in shapes.keys() - weights.keys():
        weights[name] = torch.zeros(shapes[name].shape)  # the bias of a router with softmax
    return {name: weights[name] for name in shapes}


def compare(
    needed: dict[str, tuple], stored: dict[str, Stored], ignored: Callable[[str], bool], where: str
) -> None:
    """Raise a `UserError` that lists what is missing, left over, or of another shape."""
    faults = {
        "missing": [name for name in needed if name not in stored],
        "left over": [name for name in stored if name not in needed and not ignored(name)],
        "of another shape": [
            f"{name} {stored[name].shape} where config.json says {shape}"
            for name, shape in needed.items()
            if name in stored and stored[name].shape != shape
        ],
    }
    if any(faults.values()):
        words = "; ".join(f"{fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise UserError(f"{where}: config.json and the weights contradict each other; {words}")


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Return True for what transformers ignores as well: tables of angles in old files, and DeepSeek's layers
    for multi-token prediction, which come after the last."""
    layer = LAYER.match(name)
    late = config.attention_kind == "mla" and layer and int(layer[1]) >= config.num_hidden_layers
    return bool(late) or name.endswith("rotary_emb.inv_freq")


def written_weights(weights: dict, config: ModelConfig, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield our weights as the tensors of the family's files, one for each matrix of each expert."""
    if config.attention_kind == "gqa" and config.rope_interleaved:  # Hugging Face has the other pairing
        weights = other_pairing(weights, config)
    for name in shapes_of(config):
        if not may_be_absent(name, config):
            for part, theirs in pieces(name, weights[name], family):
                yield theirs, part
        elif name != HEAD and weights[name].any():
            raise UserError(
                f"{name} is not zero, and no architecture of Hugging Face has it beside a softmax: train "
                "with balance.bias_rate=0"
            )
