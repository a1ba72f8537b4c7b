"""Ways to stretch the context of a trained model: the settings that each changes. No weight changes.

With L the trained length and s the factor:

  plain    no change: positions beyond L are used as they are
  linear, ntk, dynamic, yarn    rules for the rotary frequencies, see modules/rope_scaling.py
  abf      rope_theta times THETA_GROWTH: all but the fastest frequencies slow down (arXiv 2309.16039)
  dca      dual chunk attention: no distance is ever larger than those seen in training (arXiv 2402.17463)
  window   each query sees the last L tokens and the first 4 (arXiv 2309.17453)
"""

from dataclasses import replace

from config.model import ModelConfig
from utils.errors import UserError

THETA_GROWTH = 50.0  # 10,000 becomes 500,000, as in arXiv 2309.16039
SINKS = 4
METHODS = ("plain", "linear", "ntk", "dynamic", "yarn", "abf", "dca", "window")


def stretched(model: ModelConfig, method: str, length: int) -> ModelConfig:
    """Return the configuration of `model` for `length` tokens, by one of `METHODS`.

    Raises `UserError` for an unknown method, a length that is not longer, a model that is stretched already,
    and one that does not take the method.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r} to extend the context; known: {', '.join(METHODS)}")
    trained = model.max_position_embeddings
    if length <= trained:
        raise UserError(f"a context of {length} tokens is no extension: the model has {trained} already")
    if method != "plain" and (model.rope_scaling or model.dual_chunk_attention_config):
        raise UserError(f"{method} needs a model that is not stretched already: extend its base instead")
    factor = length / trained
    original = {"original_max_position_embeddings": trained}
    changes = {
        "plain": {},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": factor}},
        "ntk": {"rope_scaling": {"rope_type": "ntk", "factor": factor}},
        "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, **original}},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": factor, **original}},
        "abf": {"rope_theta": model.rope_theta * THETA_GROWTH},
        "dca": {"dual_chunk_attention_config": {
            "chunk_size": trained * 3 // 4, "local_size": trained // 8, **original,
        }},
        "window": {"sliding_window": min(model.sliding_window or trained, trained), "attention_sinks": SINKS},
    }  # fmt: skip
    longer = replace(model, max_position_embeddings=length, **changes[method])
    longer.check()
    return longer
