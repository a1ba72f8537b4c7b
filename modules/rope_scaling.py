"""Longer contexts for RoPE: rules that lower its frequencies so that far positions look familiar.

With s the stretch factor (new length / old length) and inv_i = base^(-2i/D):

  linear    inv_i / s                                     all frequencies alike (arXiv 2306.15595)
  ntk       base' = base * s^(D/(D-2))                    the fastest is kept, the slowest is divided by s
  dynamic   ntk with an s that follows the length of the row; nothing changes up to the trained length
  yarn      fast ones are kept, slow ones divided by s, with a ramp in between; cos and sin are multiplied by
            a temperature m = 0.1 ln(s) + 1 (arXiv 2309.00071)
  llama3    by wavelength: short ones are kept, long ones divided by s, blended in between (Llama 3.1)
  longrope  each is divided by a number of its own, which a search has found: one list for rows up to the
            trained length L, one for longer rows; cos and sin times sqrt(1 + ln s / ln L) (arXiv 2402.13753)
  ABF       no rule: a larger `rope_theta` (arXiv 2309.16039)

`rope_frequencies` returns the D/2 inverse frequencies in fp32 and the factor for cos and sin. The parameters
of each rule are in config/rope.py.

Traps: YaRN's ramp runs over the D/2 frequencies, not over D channels; it uses the *original* length; its
temperature multiplies both cos and sin, so scores are multiplied by m^2. `dynamic` and `longrope` depend on
the length of the row: it must stay the same while a row is read piece by piece (`RotaryEmbedding`).
"""

import math

import torch

from config.rope import read_scaling
from utils.errors import UserError

LENGTH_RULES = ("dynamic", "longrope")  # their frequencies depend on the length of the row


def rope_frequencies(head_dim, theta, scaling=None, max_positions=2048, length=None):
    """Return the inverse frequencies (D/2,) in fp32 and the factor on cos and sin.

    Args:
        head_dim: D, the number of channels that are rotated.
        theta: the base, unless `scaling` carries `rope_theta`.
        scaling: Hugging Face dictionary or None.
        max_positions: the configured context length (`max_position_embeddings`).
        length: the length of the row in tokens, read by the rules of `LENGTH_RULES`; None: the trained one.
    """
    rule, theta, p = read_scaling(scaling, theta)
    if rule == "yarn":
        p["original_max_position_embeddings"] = p["original_max_position_embeddings"] or max_positions
        p["factor"] = p["factor"] or max(1.0, max_positions / p["original_max_position_embeddings"])
    if rule in ("ntk", "dynamic") and head_dim < 4:
        raise UserError(f"model.rope_scaling: {rule} needs a head_dim of at least 4, not {head_dim}")
    factor = p.get("factor", 1.0)
    if rule == "dynamic":
        trained = p["original_max_position_embeddings"] or max_positions
        stretch = factor * max(length or 0, trained) / trained - (factor - 1)
        return plain(head_dim, theta * stretch ** (head_dim / (head_dim - 2))), 1.0
    if rule == "ntk":
        return plain(head_dim, theta * factor ** (head_dim / (head_dim - 2))), 1.0
    inv_freq = plain(head_dim, theta)
    if rule == "linear":
        return inv_freq / factor, 1.0
    if rule == "llama3":
        return llama3(inv_freq, p), 1.0
    if rule == "yarn":
        original, fast, slow = p["original_max_position_embeddings"], p["beta_fast"], p["beta_slow"]
        low, high = yarn_range(head_dim, theta, original, fast, slow, p["truncate"])
        position = torch.arange(head_dim // 2, dtype=torch.float32)
        ramp = ((position - low) / (high - low)).clamp(0, 1)  # 0: fast, kept as it is; 1: slow, divided
        return inv_freq / factor * ramp + inv_freq * (1 - ramp), yarn_temperature(p)
    if rule == "longrope":
        return longrope(inv_freq, p, max_positions, length)
    return inv_freq, 1.0


def plain(head_dim, theta):
    """Return base^(-2i/D) for i = 0 .. D/2-1."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def yarn_range(head_dim, theta, original, beta_fast=32.0, beta_slow=1.0, truncate=True):
    """Return the first and last frequency of YaRN's ramp.

    A frequency that makes `n` full turns over the original length L has index D ln(L / 2 pi n) / (2 ln base).
    One with more than beta_fast turns is kept, one with fewer than beta_slow turns is divided.
    """

    def index(turns):
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high  # no division by zero


def yarn_temperature(p):
    """Return the factor on cos and sin; DeepSeek's two mscales cancel if they are equal."""

    def mscale(scale, weight=1.0):
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if p["attention_factor"]:
        return p["attention_factor"]
    if p["mscale"] and p["mscale_all_dim"]:
        return mscale(p["factor"], p["mscale"]) / mscale(p["factor"], p["mscale_all_dim"])
    return mscale(p["factor"])


def llama3(inv_freq, p):
    """Keep wavelengths below L/high, divide those above L/low by the factor, blend in between."""
    original, low, high = p["original_max_position_embeddings"], p["low_freq_factor"], p["high_freq_factor"]
    wavelength = 2 * math.pi / inv_freq
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 1: kept; 0: divided
    return (1 - blend) * inv_freq / p["factor"] + blend * inv_freq


def longrope(inv_freq, p, max_positions, length):
    """Return the frequencies divided by one of the two lists, and the factor on cos and sin, one for both."""
    trained, factor = p["original_max_position_embeddings"], p["attention_factor"]
    divisors = {name: p[name] for name in ("short_factor", "long_factor")}
    for name, numbers in divisors.items():
        if len(numbers) != len(inv_freq):
            raise UserError(
                f"model.rope_scaling: {name} has {len(numbers)} numbers, but {2 * len(inv_freq)} channels "
                f"rotate: give {len(inv_freq)}, one for each pair"
            )
    if not factor:
        stretch = max(1.0, p["factor"] or max_positions / trained)
        factor = math.sqrt(1 + math.log(stretch) / math.log(trained))
    chosen = "long_factor" if length and length > trained else "short_factor"
    return inv_freq / torch.tensor(divisors[chosen]), factor


def lesson():
    """Print the turns of each frequency over 16384 positions, for a model trained on 4096.

    In training the slowest ones made less than one turn.
    """
    rules = {
        "plain": None,
        "linear": {"rope_type": "linear", "factor": 4.0},
        "ntk": {"rope_type": "ntk", "factor": 4.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    }
    picks = [0, 8, 16, 24, 32, 40, 48, 56, 63]
    print("turns over 16384 positions, D = 128, base 10000, trained on 4096")
    print("  frequency :", *[f"{i:7d}" for i in picks])
    trained = plain(128, 10000.0) * 4096 / (2 * math.pi)
    print("  in training", *[f"{trained[i]:7.2f}" for i in picks])
    for name, scaling in rules.items():
        inv_freq, factor = rope_frequencies(128, 10000.0, scaling, 4096)
        turns = inv_freq * 16384 / (2 * math.pi)
        print(f"  {name:10s}:", *[f"{turns[i]:7.2f}" for i in picks], f"  cos and sin times {factor:.4f}")
    print("  yarn's ramp runs from frequency", *yarn_range(128, 10000.0, 4096))


if __name__ == "__main__":
    lesson()
