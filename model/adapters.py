"""Adapters: what a fine-tuning stage adds to a frozen base, by the short name of the stage.

    Lora      low-rank changes of linear layers (modules/adapters/lora.py)
    MixLora   a router over LoRA experts in each feed-forward, plain LoRA on attention
    (modules/adapters/mixlora.py)
    Prefix    learned keys and values, or learned embeddings (modules/adapters/prefix.py)

An adapter's parameters have names that the base does not have, and the base keeps its own, so a checkpoint of
an adapter is a few entries of the state dict, and a hash says which base they belong to.
"""

import copy
from dataclasses import replace

from torch import nn

from config.schema import RunConfig
from model.tinyseek import TinySeek
from modules.adapters.lora import add_lora
from modules.adapters.mixlora import add_mixlora
from modules.adapters.prefix import add_prefix
from utils.checkpoint import load_weights

ADAPTERS = ("Lora", "MixLora", "Prefix")


def attach(model: TinySeek, kind: str, config: RunConfig) -> frozenset[str]:
    """Add an untrained adapter of one of `ADAPTERS` and freeze all the rest; returns the names of what it
    added: parameters that learn, and buffers."""
    before = set(model.state_dict())
    if kind == "Lora":
        add_lora(model, config.lora)
    elif kind == "MixLora":
        add_mixlora(model, config.mixlora)
        if config.mixlora.attention:
            add_lora(model, replace(config.lora, target_modules=["attention"]))
    else:
        add_prefix(model, config.prefix)
    added = frozenset(model.state_dict()) - before
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in added)
    return added


def soft_tokens(kind: str, config: RunConfig) -> int:
    """How many learned embeddings the chat template writes after each role marker."""
    return config.prefix.length if kind == "Prefix" and config.prefix.kind == "prompt" else 0


def twin(model: TinySeek) -> TinySeek:
    """Return another model over the memory of `model`, at no cost. Its parameters are objects of their own, so
    freezing or adapting it leaves `model` as it is; writing into a weight changes both."""
    shared = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def adapted(base: TinySeek, kind: str, config: RunConfig, weights: dict, where: str) -> TinySeek:
    """A model over the tensors of `base` with a trained adapter; `where` names its source in errors."""
    model = twin(base)
    added = attach(model, kind, config)
    load_weights(model, weights, where, added)
    return model.to(base.model.embed_tokens.weight.device).eval()
