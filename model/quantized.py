"""A TinySeek whose matrices are codes: the layers that are replaced, and those that stay as they are.

    replaced     linear layers of attention and feed-forwards, shared and routed experts
    by choice    embedding and output head (`quant.head`), in 8 bits with a scale for each row
    stay         routers, norms, biases, gates of one row, MTP

Norms and routers are small, and a router that rounds otherwise chooses other experts. Embedding and head hold
a fifth of a small model. Where they are tied, both read one store: the head multiplies by all of its rows,
the embedding looks up some.

`quantize_weights` turns a model into one on codes; `with_stores` gives a blank model the same layers, empty,
to be filled from a checkpoint; `dequantize_weights` goes back to plain layers.
"""

import math
import re

import torch
from torch import nn

from config.model import ModelConfig
from config.quant import SCALED, QuantConfig
from model.blank import Blank
from model.tinyseek import TinySeek
from modules.experts.moe import Experts
from modules.quantized.embedding import QuantEmbedding
from modules.quantized.layers import QuantExperts, QuantLinear
from modules.quantized.stored import empty_store
from utils.errors import UserError

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = QuantConfig("rtn", 8)  # the format of both
STAY = {  # pattern of a part of a name -> the reason
    "mtp": "it only drafts",
    "embed_tokens": "each row is a token; --head quantises it",
    "lm_head": "it scores every token; --head quantises it",
    "gate": "a router that rounds otherwise chooses other experts",
    "shared_expert_gate": "a single row",
    r"\w*norm": "small",
    r"\w*bias": "small",
}


def stays(name: str) -> str:
    """Return the reason why a weight or layer of this name stays in full precision; empty if none does."""
    parts = name.split(".")
    return next((why for key, why in STAY.items() if any(re.fullmatch(key, one) for one in parts)), "")


def quantized_paths(model: TinySeek, quant: QuantConfig) -> dict[str, nn.Module]:
    """Return the layers that `quant` replaces, by path."""
    chosen = (EMBEDDING, HEAD) if quant.head else ()
    return {
        path: layer
        for path, layer in model.named_modules()
        if path in chosen or (isinstance(layer, (nn.Linear, Experts)) and not stays(path))
    }


def with_stores(model: TinySeek, quant: QuantConfig) -> TinySeek:
    """Replace the layers in place by empty quantised ones; return the model.

    Raises `UserError` for a matrix that the format does not fit, naming it.
    """
    found = quantized_paths(model, quant)
    for path, layer in found.items():
        try:
            new = empty_layer(layer, ROWS if path in (EMBEDDING, HEAD) else quant)
        except ValueError as error:
            fits = fitting([layer for path, layer in found.items() if path not in (EMBEDDING, HEAD)])
            raise UserError(f"quant: {path}: {error}; {fits}") from None
        model.set_submodule(path, new)
    if HEAD in found and model.config.tie_word_embeddings:
        model.lm_head.store = model.model.embed_tokens.store
    return model


def on_stores(quant: QuantConfig, config: ModelConfig) -> TinySeek:
    """Return a new model whose matrices are empty stores, or a plain one if `quant` names no method."""
    model = TinySeek(config)
    return model if quant.method == "none" else with_stores(model, quant)


def empty_layer(layer: nn.Module, quant: QuantConfig) -> QuantLinear | QuantExperts | QuantEmbedding:
    """Return an empty quantised layer of the same shape."""
    if isinstance(layer, Experts):  # their inputs are never rounded, so that SmoothQuant has nothing to scale
        stores = [empty_store(part.shape, quant) for part in matrices(layer)]
        return QuantExperts(*stores, layer.implementation, scaled=quant.method == "awq")
    store = empty_store(layer.weight.shape, quant)
    if isinstance(layer, nn.Embedding):
        return QuantEmbedding(store)
    return QuantLinear(store, layer.bias, quant.method in SCALED, activations=quant.method == "smoothquant")


def matrices(layer: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return the matrices (.., out, in) of a layer, plain or quantised."""
    experts = isinstance(layer, (Experts, QuantExperts))
    return (layer.gate_up_proj, layer.down_proj) if experts else (layer.weight,)


def stores_of(layer: nn.Module) -> tuple[nn.Module, ...]:
    """Return the stores of a quantised layer, in the order of `matrices`."""
    return (layer.gate_up, layer.down) if isinstance(layer, QuantExperts) else (layer.store,)


def fitting(layers: list[nn.Module]) -> str:
    """Return the sizes of groups that divide the rows of all `layers`."""
    common = math.gcd(*(part.shape[-1] for layer in layers for part in matrices(layer)))
    sizes = [size for size in (16, 32, 64, 128, 256) if common % size == 0]
    groups = f"groups of {', '.join(map(str, sizes))}, or " if sizes else ""
    return f"this model takes {groups}{'one scale per row' if common % 2 == 0 else '8 bits'}"


@torch.no_grad()
def quantize_weights(model: TinySeek, quant: QuantConfig) -> TinySeek:
    """Round the weights of the layers that `quant` replaces to the nearest codes, in place; return the model.

    A calibrated method has replaced the layers that it fits before (inference/quantization/fit.py).
    """
    plain = quantized_paths(model, quant)
    with_stores(model, quant)
    for path, layer in plain.items():
        for store, weight in zip(stores_of(model.get_submodule(path)), matrices(layer), strict=True):
            store.round(weight)
    return model


@torch.no_grad()
def dequantize_weights(model: TinySeek) -> TinySeek:
    """Replace quantised layers in place by plain ones with the numbers that the codes stand for; return the
    model. Inputs are no longer rounded, where they were."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (QuantLinear, QuantExperts, QuantEmbedding)):
            model.set_submodule(path, plain_layer(layer))
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def plain_layer(layer: nn.Module) -> nn.Linear | Experts | nn.Embedding:
    """Return a plain layer with the numbers of a quantised one."""
    weights = [nn.Parameter(part) for part in matrices(layer)]
    with Blank("meta"):  # no memory and no random numbers for weights that are replaced
        if isinstance(layer, QuantExperts):
            plain = Experts(*weights[1].shape, layer.implementation)
            plain.gate_up_proj, plain.down_proj = weights
            return plain
        if isinstance(layer, QuantEmbedding):
            plain = nn.Embedding(*layer.store.shape)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.bias = layer.bias
    plain.weight = weights[0]
    return plain


def held_bytes(module: nn.Module) -> int:
    """Return the memory that a module's parameters and buffers occupy, each storage once."""
    tensors = (*module.parameters(), *module.buffers())
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
