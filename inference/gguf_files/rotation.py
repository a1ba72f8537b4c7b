"""The rotary embedding in a GGUF file: its base, and the rules for longer contexts that llama.cpp knows.

    linear   as a factor, though not in latent attention, whose scores it would multiply too
    yarn     as a factor and a temperature
    llama3   as one divisor for each frequency, a tensor that only the architecture `llama` reads

Under YaRN llama.cpp multiplies cos and sin by 0.1 ln(factor) + 1 and by `attn_factor`, a number of the file,
which turns the product into our temperature. In latent attention the temperature multiplies the whole score
instead (modules/attention/latent.py). llama.cpp reads DeepSeek's `mscale_all_dim` for that, and then its own
factor is 1.
"""

import math

import torch

from config.model import ModelConfig
from config.rope import read_scaling
from modules.rope_scaling import plain, rope_frequencies, yarn_temperature
from utils.errors import UserError


def rotation(config: ModelConfig, divisors: bool) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the keys of the metadata, and a tensor if the rule needs one, which takes `divisors`."""
    rule, theta, p = read_scaling(config.rope_scaling, config.rope_theta)
    R, longest, latent = config.rotary_dim, config.max_position_embeddings, config.attention_kind == "mla"
    keys, scaling, tensors = {"freq_base": theta, "dimension_count": R}, {"type": rule}, {}
    known = rule == "default" or rule == "linear" and not latent or rule == "llama3" and divisors
    if rule == "linear":
        scaling["factor"] = float(p["factor"])
    if rule == "yarn":
        trained = int(p["original_max_position_embeddings"] or longest)
        p["factor"] = float(p["factor"] or max(1.0, longest / trained))
        ours, theirs = yarn_temperature(p), 0.1 * math.log(p["factor"]) + 1
        known = (p["beta_fast"], p["beta_slow"], p["truncate"]) == (32, 1, True) and (ours == 1 or not latent)
        if latent and p["mscale_all_dim"]:
            scaling["yarn_log_multiplier"], theirs = 0.1 * p["mscale_all_dim"], 1.0
        scaling |= {"factor": p["factor"], "original_context_length": trained, "attn_factor": ours / theirs}
    if rule == "llama3":
        tensors["rope_freqs.weight"] = plain(R, theta) / rope_frequencies(R, theta, config.rope_scaling)[0]
    if not known:
        raise UserError(f"model.rope_scaling={config.rope_scaling}: llama.cpp cannot rotate in this way here")
    if rule in ("linear", "yarn"):
        keys |= {f"scaling.{key}": value for key, value in scaling.items()}
    return {f"rope.{key}": value for key, value in keys.items()}, tensors
