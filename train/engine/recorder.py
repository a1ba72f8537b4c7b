"""Record what a decoder computes inside: hidden states after layers, and the attention of one layer.

Forward hooks record it while the recorder is open, and are removed afterwards. The model itself needs no code
for it. Trap: a compiled model skips the hooks.
"""

import torch

from modules.attention.grouped_query import scores_of
from modules.distillation.divergence import wide
from modules.rope import apply_rotary


class Recorder:
    """`with Recorder(model, layers, attention) as seen: model(ids)`; then read `hidden`, `heads`, `scores()`.

    Args:
        model: a `TinySeek`; for `attention`, with grouped-query attention.
        layers: numbers of the layers whose outputs to record.
        attention: the number of the layer whose queries, keys and values to record, or None.
    """

    def __init__(self, model: torch.nn.Module, layers: list[int], attention: int | None = None):
        self.layers, self.found, self.handles = layers, {}, []
        self.parts = {layer: model.model.layers[layer] for layer in layers}
        self.attention = None if attention is None else model.model.layers[attention].self_attn

    def __enter__(self) -> "Recorder":
        """Add the hooks."""
        for layer, part in self.parts.items():
            self.record(part, layer, lambda output: output[0])
        if self.attention is not None:
            D = self.attention.head_dim
            for name in ("q_norm", "k_norm", "v_proj"):
                split = lambda output: output.view(*output.shape[:2], -1, D)  # noqa: E731  (B, T, H or G, D)
                self.record(getattr(self.attention, name), name, split)
            hook = lambda part, given: self.found.update(context=given[1], rotary=given[2])  # noqa: E731
            self.handles.append(self.attention.register_forward_pre_hook(hook))
        return self

    def record(self, part: torch.nn.Module, key, read) -> None:
        """Record `read(output)` of a part of the model under `key`."""
        hook = lambda part, given, output: self.found.update({key: read(output)})  # noqa: E731
        self.handles.append(part.register_forward_hook(hook))

    def __exit__(self, *error) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    @property
    def hidden(self) -> list[torch.Tensor]:
        """The states (B, T, C) after each of the layers, in fp32 or wider."""
        return [wide(self.found[layer]) for layer in self.layers]

    @property
    def heads(self) -> list[torch.Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D), not rotated; in fp32 or wider."""
        return [wide(self.found[name]) for name in ("q_norm", "k_norm", "v_proj")]

    def scores(self) -> torch.Tensor:
        """Return the scores of the attention (B, H, T, T), before its mask."""
        q, k = (part.transpose(1, 2) for part in self.heads[:2])
        q, k = (apply_rotary(part, *self.found["rotary"], self.attention.interleaved) for part in (q, k))
        return scores_of(q, k, self.attention.scale)

    def bias(self) -> torch.Tensor:
        """Return 0 where a query of that layer may attend and -inf elsewhere, (B or 1, 1, T, T)."""
        return self.found["context"].bias(torch.float32)
