"""Record what a decoder computes inside: hidden states after layers, and the attention of one layer.

Forward hooks record it while the recorder is open, and are removed afterwards. The model itself needs no code
for it. Trap: a compiled model skips the hooks.
"""

from functools import partial

import torch

from modules.attention.grouped_query import scores_of
from modules.distillation.divergence import wide
from modules.rope import apply_rotary

HEADS = ("q_norm", "k_norm", "v_proj")  # whose outputs are queries, keys and values before the rotation


class Recorder:
    """`with Recorder(model, layers, attention) as seen: model(ids)`; then read `hidden`, `heads`, `scores()`.

    Args:
        model: a `TinySeek`; for `attention`, with grouped-query attention.
        layers: numbers of the layers whose outputs to record.
        attention: the number of the layer whose queries, keys and values to record, or None.
    """

    def __init__(self, model: torch.nn.Module, layers: list[int], attention: int | None = None):
        self.layers, self.attention, self.found, self.handles = layers, None, {}, []
        self.parts = {layer: model.model.layers[layer] for layer in layers}  # whose outputs are recorded
        if attention is not None:
            self.attention = model.model.layers[attention].self_attn
            self.parts |= {name: getattr(self.attention, name) for name in HEADS}

    def __enter__(self) -> "Recorder":
        """Add the hooks."""
        for key, part in self.parts.items():
            self.handles.append(part.register_forward_hook(partial(self.record, key)))
        if self.attention is not None:
            self.handles.append(self.attention.register_forward_pre_hook(self.record_inputs))
        return self

    def record(self, key: int | str, part: torch.nn.Module, given: tuple, output) -> None:
        """Record the output of a part of the model under `key`."""
        self.found[key] = output

    def record_inputs(self, part: torch.nn.Module, given: tuple) -> None:
        """Record the mask and the rotary tables that the attention is given."""
        self.found["context"], self.found["rotary"] = given[1:3]

    def __exit__(self, *error) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    @property
    def hidden(self) -> list[torch.Tensor]:
        """The states (B, T, C) after each of the layers, in fp32 or wider."""
        return [wide(self.found[layer][0]) for layer in self.layers]

    @property
    def heads(self) -> list[torch.Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D), not rotated; in fp32 or wider."""
        found = [wide(self.found[name]) for name in HEADS]
        return [part.view(*part.shape[:2], -1, self.attention.head_dim) for part in found]

    def scores(self) -> torch.Tensor:
        """Return the scores of the attention (B, H, T, T), before its mask."""
        q, k = (part.transpose(1, 2) for part in self.heads[:2])
        q, k = (apply_rotary(part, *self.found["rotary"], self.attention.interleaved) for part in (q, k))
        return scores_of(q, k, self.attention.scale)

    def bias(self) -> torch.Tensor:
        """Return 0 where a query of that layer may attend and -inf elsewhere, (B or 1, 1, T, T)."""
        return self.found["context"].bias(torch.float32)
