"""Convert weights between the two pairings of rotary channels (`rope_interleaved`, see rope.py).

    half-split   0 1 2 | 3 4 5     pairs (0, 3) (1, 4) (2, 5)
    interleaved  0 3 | 1 4 | 2 5   the same channels in another order: pairs of neighbours

A pair must keep its frequency, so both channels of pair i become those of pair i in the other layout. Queries
and keys are reordered alike, and their dot products stay. What produces or scales a rotated channel moves:

  GQA   the rows of each head in q_proj (H*D, C) and k_proj (G*D, C), their biases, and the gains of
        QK-norm (D,)
  MLA   the last rows of each head in q_proj or q_b_proj, (H*(nope+rope), C), and the last rows of
        kv_a_proj_with_mqa, (rank+rope, C), with its bias

Channels that do not rotate (partial rotary embeddings) stay, and so do all other weights.
"""

import torch

from config.model import ModelConfig
from utils.errors import UserError


def channel_orders(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Return for each kind of weight the order that turns its channels (of one head) to the other pairing."""
    R, shape = config.rotary_dim, (2, -1)  # half-split: all first channels, then all second ones
    turned = torch.arange(R).view(shape[::-1] if config.rope_interleaved else shape).T.flatten()
    if config.attention_kind == "gqa":
        order = torch.cat([turned, torch.arange(R, config.head_dim)])
        return dict.fromkeys(("q_proj", "k_proj", "q_norm", "k_norm"), order)
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    query, latent = (torch.cat([torch.arange(fixed), fixed + turned]) for fixed in (nope, rank))
    return {"q_proj": query, "q_b_proj": query, "kv_a_proj_with_mqa": latent}


def other_pairing(state: dict, config: ModelConfig) -> dict:
    """Return the weights `state` of a `TinySeek` in the pairing that is not `config.rope_interleaved`.

    They give the same logits in a model with the other `rope_interleaved`. Raise `UserError` if `state` holds
    adapters, whose weights would have to move too.
    """
    if adapters := [name for name in state if ".lora_" in name or name.startswith("prefix.")]:
        raise UserError(f"{adapters[0]} belongs to an adapter: merge or remove it before the conversion")
    orders, moved = channel_orders(config), {}
    for name, weight in state.items():
        order = orders.get(name.split(".")[-2])
        if order is not None:
            weight = weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)  # (heads, D, ...)
        moved[name] = weight
    return moved


def lesson():
    """Print both layouts of a head of 8 channels, of which 6 rotate, and a score before and after."""
    from modules.rope import RotaryEmbedding, apply_rotary

    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    half = ModelConfig(**shape, partial_rotary_factor=0.75)
    both = ModelConfig(**shape, partial_rotary_factor=0.75, rope_interleaved=True)
    print("The order of the channels of a head of 8, of which 6 rotate")
    print("  half-split to interleaved:", *channel_orders(half)["q_proj"].tolist())
    print("  interleaved to half-split:", *channel_orders(both)["q_proj"].tolist())
    state = {f"self_attn.{name}_proj.weight": torch.randn(8, 8) for name in "qk"}
    x, places = torch.randn(1, 1, 2, 8), torch.tensor([[3, 17]])
    for name, weights, interleaved in (
        ("half-split weights, half-split rotation", state, False),
        ("converted weights, interleaved rotation", other_pairing(state, half), True),
        ("half-split weights, interleaved rotation", state, True),
    ):
        tables = RotaryEmbedding(6, interleaved=interleaved)(places)
        q, k = (apply_rotary(x @ weight.T, *tables, interleaved) for weight in weights.values())
        print(f"  {name:41s}: score {(q[..., 1, :] * k[..., 0, :]).sum():.4f}")


if __name__ == "__main__":
    lesson()
