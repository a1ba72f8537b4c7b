"""Attach an adapter of modules/adapters/ to a frozen base, by the short name of its training stage.

    Lora      lora.py       low-rank changes of linear layers and experts; so do policies (GRPOLora, ..)
    MixLora   mixlora.py    a router over LoRA experts in each feed-forward, plain LoRA on attention
    Prefix    prefix.py     trained keys and values, or trained embeddings

With `lora.base=nf4` the base of LoRA is on codes while it trains (QLoRA, modules/adapters/qlora.py). The
adapter then fits the rounded base: `adapted` gives it one, in full precision.

An adapter's parameters have names of their own, and those of the base do not change. A checkpoint of an
adapter is therefore a few entries of the state dict; a hash identifies the base they belong to.
"""

import copy
from dataclasses import replace

from torch import nn

from config.quant import QuantConfig
from config.schema import RunConfig
from model.quantized import dequantize_weights, quantize_weights
from model.tinyseek import TinySeek
from modules.adapters.lora_model import add_lora
from modules.adapters.mixlora import add_mixlora
from modules.adapters.prefix import add_prefix
from utils.checkpoint import load_weights
from utils.errors import UserError

ADAPTERS = {"Lora": "Lora", "MixLora": "MixLora", "Prefix": "Prefix", "GRPOLora": "Lora",
            "PPOLora": "Lora", "DPOLora": "Lora"}  # stage -> kind of adapter  # fmt: skip


NF4 = QuantConfig("nf4", 4, double_quant=True)  # the base of QLoRA


def on_codes(short: str, config: RunConfig) -> bool:
    """Return whether an adapter trains on a base of codes. Raise `UserError` if its kind cannot."""
    codes = config.lora.base != "full" and ADAPTERS[short] != "Prefix"
    if codes and ADAPTERS[short] != "Lora":
        raise UserError(f"lora.base={config.lora.base} is for plain LoRA (train/lora_train.py): leave it out")
    return codes


def put_on_codes(model: TinySeek, short: str, config: RunConfig) -> TinySeek:
    """Put the base on codes if its adapter wants it so; return the model."""
    return quantize_weights(model, NF4) if on_codes(short, config) else model


def attach(model: TinySeek, short: str, config: RunConfig) -> frozenset[str]:
    """Add an untrained adapter of one of `ADAPTERS` and freeze everything else; return the names of the new
    parameters, which are trainable, and buffers."""
    before, kind = set(model.state_dict()), ADAPTERS[short]
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
    """Return the number of trained embeddings that the chat template writes after each role marker."""
    return config.prefix.length if kind == "Prefix" and config.prefix.kind == "prompt" else 0


def twin(model: TinySeek) -> TinySeek:
    """Return another model that shares the memory of `model`. Its parameters are objects of their own,
    so freezing or adapting it leaves `model` as it is; writing into a weight changes both."""
    shared = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def adapted(base: TinySeek, short: str, config: RunConfig, weights: dict, where: str) -> TinySeek:
    """Return `base` with a trained adapter, sharing its tensors; `where` names the source in errors."""
    model = twin(base)
    if on_codes(short, config):
        dequantize_weights(quantize_weights(model, NF4))
    added = attach(model, short, config)
    load_weights(model, weights, where, added)
    return model.to(base.model.norm.weight.device).eval()
