"""Rotary position embedding (RoPE): rotate pairs of channels by an angle that grows with position.

    angle(position, i) = position * base^(-2i/D),   i = 0 .. D/2-1
    (x_i, x_j) -> (x_i cos - x_j sin,  x_j cos + x_i sin)

The dot product of two rotated vectors depends only on the difference of their positions, so attention sees
distance, not position. Pairs with small i rotate fast (near neighbours differ), those with large i slowly
(far positions stay apart).

There are two conventions for the pairs, the best-known trap when weights are converted:
  half-split  (Hugging Face Llama, Qwen): channel i with channel i + D/2
  interleaved (the paper, GPT-J, DeepSeek): channel 2i with channel 2i + 1
Both give the same scores once the rows of the query and key projections, their biases and the gains of
QK-norm are permuted (`rope_pairing.py`).

    q: (B, H, T, D)   cos, sin: (B or 1, T, R)   ->   (B, H, T, D)

R is D, or less with partial rotary embeddings (GPT-J, GPT-NeoX, Phi-3): then only the first R channels of a
head rotate, the others compare contents regardless of distance, and D is R in the formula above.

Paper: Su et al., "RoFormer", arXiv 2104.09864. Longer contexts: `rope_scaling.py`.
Trap: angles and tables are fp32. In bf16 positions above 256 are no longer distinct integers, and a rounded
cos breaks the dependence on distance alone (arXiv 2411.13476).
Trap: where frequencies depend on the length of a row (dynamic NTK, LongRoPE), queries and cached keys must be
rotated by the same ones. They are chosen once, for the length that the row is planned to reach.
"""

import torch
from torch import nn

from modules.rope_scaling import LENGTH_RULES, read_scaling, rope_frequencies


class RotaryEmbedding(nn.Module):
    """Positions to tables: `forward(positions (B, T))` returns cos and sin, each (B, T, R), in fp32.

    Args:
        head_dim: R, the number of channels of a head that rotate; even.
        theta: the base of the frequencies; a larger one rotates more slowly (ABF, arXiv 2309.16039).
        scaling: a Hugging Face `rope_scaling` dictionary or None, see `rope_scaling.py`.
        max_positions: the context length of the model; some scaling rules need it.
        interleaved: pair channels (2i, 2i+1) instead of (i, i + D/2).
    """

    def __init__(self, head_dim, theta=10000.0, scaling=None, max_positions=2048, interleaved=False):
        super().__init__()
        self.settings, self.interleaved = (head_dim, theta, scaling, max_positions), interleaved
        inv_freq = 1.0 / theta ** (torch.arange(0, head_dim, 2) / head_dim)  # (R/2,)
        self.attention_factor = 1.0
        if scaling:
            inv_freq, self.attention_factor = rope_frequencies(*self.settings)
        self.depends_on_length = bool(scaling) and read_scaling(scaling, theta)[0] in LENGTH_RULES
        # Not part of a checkpoint: it follows from the configuration.
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.exact = inv_freq  # a plain attribute, which no cast reaches

    def _apply(self, fn, recurse=True):
        """Follow device moves and `.double()`, but do not let `.to(bfloat16)` or `.half()` round."""
        super()._apply(fn, recurse)
        wide = torch.float64 if self.inv_freq.dtype == torch.float64 else torch.float32
        self.inv_freq = self.exact.to(self.inv_freq.device, wide)
        return self

    @torch.no_grad()
    def forward(self, positions, lengths: list[int | None] | None = None):
        """positions (B or 1, T) int -> cos, sin (B or 1, T, R), in fp32, or fp64 for a model in fp64.

        lengths: what each row is planned to reach (`planned` of a cache), read by rules that depend on it;
        None: the rows end here, so it follows from their positions, which are 0 for padding.
        """
        inv_freq = self.inv_freq
        if self.depends_on_length:
            lengths = lengths or (positions.amax(dim=1) + 1).tolist()
            if None in lengths:
                raise ValueError("this rope_scaling depends on the length: give the cache `planned` lengths")
            known = {length: rope_frequencies(*self.settings, length)[0] for length in set(lengths)}
            rows = torch.stack([known[length] for length in lengths])  # (B, R/2)
            inv_freq = rows[:, None].to(inv_freq)  # (B, 1, R/2)
        angles = positions[..., None].to(inv_freq.dtype) * inv_freq  # (B, T, R/2)
        spread = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
        return spread.cos() * self.attention_factor, spread.sin() * self.attention_factor


def pairs(x, interleaved: bool):
    """Return views of the first and of the second channels of all pairs. (..., D) -> 2 x (..., D/2)."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def rotate(x, cos, sin, interleaved: bool):
    """Rotate the first R channels of x (..., D) by tables (..., R) that broadcast to them.

    Computed in the dtype of the tables, returned in that of x. The other channels are returned as they are.
    """
    turned = cos.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate(x[..., :turned], cos, sin, interleaved), x[..., turned:]], dim=-1)
    wide = x.to(cos.dtype)
    (first, second), (sines, _) = pairs(wide, interleaved), pairs(sin, interleaved)
    out = wide * cos  # a pair has one angle: its two entries in a table are equal
    to_first, to_second = pairs(out, interleaved)
    to_first.addcmul_(second, sines, value=-1)
    to_second.addcmul_(first, sines)
    return out.to(x.dtype)


def apply_rotary(x, cos, sin, interleaved=False):
    """Rotate x (B, H, T, D) by the tables (B or 1, T, R), the same for all heads."""
    return Rotate.apply(x, cos.unsqueeze(1), sin.unsqueeze(1), interleaved)


class Rotate(torch.autograd.Function):
    """`rotate` under autograd. The gradient is the rotation by the opposite angle, so x need not be kept."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        """x (B, H, T, D), cos and sin (B or 1, 1, T, R) -> (B, H, T, D)."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotate(x, cos, sin, interleaved)

    @staticmethod
    def backward(ctx, grad):
        """grad (B, H, T, D) -> gradient of x; the tables are constants."""
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin, ctx.interleaved), None, None, None


def lesson():
    """Print how the score of a vector with its rotated copy falls with distance, and only with distance."""
    torch.manual_seed(0)
    x, q, k = torch.ones(1, 1, 1, 64) / 8, *torch.randn(2, 1, 1, 1, 64)
    places = torch.tensor([[0, 1, 4, 16, 64, 256, 1024]])
    print("RoPE: score of a vector with its own copy, at a distance of", *places[0].tolist())
    for theta in (100.0, 10000.0, 1000000.0):
        rotated = apply_rotary(x.expand(1, 1, 7, 64), *RotaryEmbedding(64, theta)(places))[0, 0]
        print(f"  theta {theta:9.0f}:", *[f"{score:6.2f}" for score in (rotated @ rotated[0]).tolist()])
    for a, b in ((5, 2), (105, 102), (1005, 1002)):
        cos, sin = RotaryEmbedding(64)(torch.tensor([[a, b]]))
        score = (apply_rotary(q, cos[:, :1], sin[:, :1]) * apply_rotary(k, cos[:, 1:], sin[:, 1:])).sum()
        print(f"  q at {a:4d}, k at {b:4d}: score {score.item():.3f} (only the distance counts)")


if __name__ == "__main__":
    lesson()
