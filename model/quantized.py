"""A TinySeek whose matrices are codes: the layers that are replaced, and those that stay as they are.

    replaced     linear layers of attention and feed-forwards, shared and routed experts
    stay         embedding, output head (unless `quant.head`), routers, norms, gates of one row, MTP

Norms and routers are small, and a router that rounds otherwise chooses other experts. Embedding and head hold
a fifth of a small model; each row of them is a token.

`quantize_weights` turns a model into one on codes; `with_stores` gives a blank model the same layers, empty,
to be filled from a checkpoint. Both leave a mapping from path to layer, as the settings say.
"""

from torch import nn

from config.quant import SCALED, QuantConfig
from model.tinyseek import TinySeek
from modules.experts.moe import Experts
from modules.quantized.layers import QuantExperts, QuantLinear
from modules.quantized.stored import empty_store
from utils.errors import UserError

STAY = {
    "embed_tokens": "each row is a token",
    "lm_head": "it scores every token; --set quant.head=true quantises it",
    "gate": "a router that rounds otherwise chooses other experts",
    "shared_expert_gate": "a single row",
    "mtp": "a second head drafts only",
}


def quantized_paths(model: TinySeek, quant: QuantConfig) -> dict[str, nn.Module]:
    """Return the layers that `quant` replaces, by path. A tied output head is not replaced: the embedding
    would be, and it is read row by row."""
    found = {}
    for path, layer in model.named_modules():
        parts = path.split(".")
        head = parts[-1] == "lm_head" and quant.head
        if isinstance(layer, (nn.Linear, Experts)) and (head or not STAY.keys() & set(parts)):
            found[path] = layer
    return found


def with_stores(model: TinySeek, quant: QuantConfig) -> TinySeek:
    """Replace the layers in place by empty quantised ones; return the model.

    Raises `UserError` for a matrix that the format does not fit, naming it.
    """
    if quant.head and model.config.tie_word_embeddings:
        raise UserError(
            "quant.head=true: the output head is the embedding (model.tie_word_embeddings), which is read "
            "row by row and stays in full precision: leave quant.head out"
        )
    for path, layer in quantized_paths(model, quant).items():
        try:
            model.set_submodule(path, empty_layer(layer, quant))
        except ValueError as error:
            raise UserError(f"quant: {path}: {error}; choose another quant.group_size, or 8 bits") from None
    return model


def empty_layer(layer: nn.Linear | Experts, quant: QuantConfig) -> QuantLinear | QuantExperts:
    """Return an empty quantised layer of the same shape."""
    scaled, activations = quant.method in SCALED, quant.method == "smoothquant"
    if isinstance(layer, Experts):
        stores = [empty_store(part.shape, quant) for part in (layer.gate_up_proj, layer.down_proj)]
        return QuantExperts(*stores, layer.implementation, scaled)
    return QuantLinear(empty_store(layer.weight.shape, quant), layer.bias, scaled, activations)


def quantize_weights(model: TinySeek, quant: QuantConfig) -> TinySeek:
    """Round the weights of `model` in place to the nearest codes (`rtn` and `nf4`); return the model."""
    plain = quantized_paths(model, quant)
    with_stores(model, quant)
    for path, layer in plain.items():
        new = model.get_submodule(path)
        if isinstance(layer, Experts):
            new.gate_up.round(layer.gate_up_proj), new.down.round(layer.down_proj)
        else:
            new.store.round(layer.weight)
    return model
