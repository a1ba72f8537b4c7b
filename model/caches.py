"""Empty caches that fit a model: kind, shape, dtype and device."""

from collections.abc import Sequence

from model.encoder_decoder import Reading
from modules.attention.cache import KVCache
from modules.attention.hybrid_cache import HybridCache
from modules.attention.rolling_cache import RollingKVCache
from modules.attention.latent_cache import LatentCache
from modules.attention.quantized_cache import QuantizedKVCache
from utils.errors import UserError

KV_BITS = {"int8": 8, "int4": 4}  # of quantised keys and values
KV_KINDS = ("full", *KV_BITS)  # full: the dtype of the model


def make_cache(
    model, batch_size: int, capacity: int, planned: list[int] | None = None, kv_cache: str = "full"
) -> KVCache:
    """Return a cache of a `TinySeek` for `batch_size` rows of at most `capacity` tokens.

    `planned` is the length that each row is meant to reach, by default `capacity`: rotary embeddings that
    depend on the length are computed for it from the first token on. The cache holds the model's prefix, if
    there is one, for which it has extra room. A `Reading` makes its own, with its sources. `kv_cache` is one
    of `KV_KINDS`.
    """
    if isinstance(model, Reading):
        return model.make_cache(batch_size, capacity)
    layers = range(model.config.num_hidden_layers)
    cache = empty_cache(model, layers, batch_size, capacity + model.prefix_length, kv_cache)
    cache.planned = [length + model.prefix_length for length in planned or [capacity] * batch_size]
    if model.prefix is not None:
        model.prefix.start(cache)
    return cache


def make_draft_cache(model, batch_size: int, capacity: int) -> KVCache | None:
    """Return a cache for the sequential MTP head, one layer deep, no prefix; None for other models."""
    if model.config.mtp != "sequential":
        return None
    cache = empty_cache(model, [model.config.num_hidden_layers], batch_size, capacity)
    cache.planned = [capacity + model.prefix_length] * batch_size  # as the trunk's: in training they share it
    return cache


def check_kv_cache(config, kv_cache: str) -> None:
    """Raise `UserError` if a model of this `config` cannot have this kind of cache."""
    if kv_cache in KV_BITS and (config.attention_kind == "mla" or config.sliding_window):
        why = "latent attention" if config.attention_kind == "mla" else "a sliding window"
        raise UserError(f"--kv-cache {kv_cache}: this model has {why}; it needs --kv-cache full")


def empty_cache(
    model, layers: Sequence[int], batch_size: int, capacity: int, kv_cache: str = "full"
) -> KVCache:
    """Return an empty cache for these layers of the model, of its kind and dtype, on its device."""
    config, weight = model.config, model.model.norm.weight
    check_kv_cache(config, kv_cache)
    place = (weight.dtype, weight.device)
    if config.attention_kind == "mla":
        widths = (config.kv_lora_rank, config.qk_rope_head_dim)
        return LatentCache(len(layers), batch_size, capacity, *widths, *place)
    place = (config.num_key_value_heads, config.head_dim, *place)
    if kv_cache in KV_BITS:
        margin = 1 if config.mtp == "none" else 16  # the most tokens that a round of drafts reads
        return QuantizedKVCache(len(layers), batch_size, capacity, *place, KV_BITS[kv_cache], margin)
    local = [config.layer_reach(layer, capacity) < capacity for layer in layers]  # others forget nothing
    if not any(local):
        return KVCache(len(layers), batch_size, capacity, *place)
    window, sinks = config.sliding_window, config.attention_sinks
    if all(local):
        return RollingKVCache(len(layers), batch_size, window, *place, sinks=sinks)
    return HybridCache(local, batch_size, capacity, window, *place, sinks=sinks)
