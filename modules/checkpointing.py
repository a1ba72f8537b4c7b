"""Gradient checkpointing: keep only the input of each layer for the backward pass; compute the rest again.

    forward     h_1 = layer_1(h_0), .., h_L = layer_L(h_{L-1})        keep h_0 .. h_{L-1}
    backward    for n = L .. 1: run layer_n on h_{n-1} once more, keep what it computes, go back through it

    h_n: (B, T, C)      memory: L inputs and one layer instead of L layers      work: a third more

The second forward must repeat the first bit by bit. PyTorch restores the random generators for it (dropout,
noise of a router) and the dtype of autocast. Anything that a forward writes would be written twice, so layers
return what others count, such as the routing of tokens, and layers that append to a cache do not recompute.

Paper: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class CheckpointedLayer(nn.Module):
    """A layer `forward(hidden, context, rotary, past)` that recomputes itself in the backward pass if its
    `gradient_checkpointing` is set to True."""

    gradient_checkpointing = False

    def __call__(self, hidden, context=None, rotary=None, past=None):
        """Run `forward`; `past` is a cache, a prefix (which is a module and is not written) or None."""
        inputs, writes = (hidden, context, rotary, past), not isinstance(past, (nn.Module, type(None)))
        if not self.gradient_checkpointing or not torch.is_grad_enabled() or writes:
            return super().__call__(*inputs)
        return checkpoint(super().__call__, *inputs, use_reentrant=False)


def checkpoint_layers(model: nn.Module, wanted: bool = True) -> nn.Module:
    """Switch it on or off in every such layer of a model; return the model."""
    for layer in model.modules():
        if isinstance(layer, CheckpointedLayer):
            layer.gradient_checkpointing = wanted
    return model


class Block(CheckpointedLayer):
    """A residual feed-forward with dropout, for the lesson: (B, T, C) -> (B, T, C)."""

    def __init__(self, size: int):
        super().__init__()
        self.up, self.down, self.runs = nn.Linear(size, 4 * size), nn.Linear(4 * size, size), 0

    def forward(self, hidden, *others):
        """hidden (B, T, C) -> (B, T, C)."""
        self.runs += 1
        return hidden + nn.functional.dropout(self.down(self.up(hidden).relu()), 0.1)


def lesson():
    """Go forward and back through stacks of blocks with and without; count what is kept and what is run."""
    hidden = torch.randn(4, 32, 64)
    print("depth   numbers kept for the backward pass     blocks run in a step     same gradients")
    for depth in (2, 8, 32):
        kept, runs, gradients = [], [], []
        for wanted in (False, True):
            torch.manual_seed(0)
            stack = checkpoint_layers(nn.Sequential(*(Block(64) for _ in range(depth))), wanted)
            saved = {}

            def keep(tensor, saved=saved):
                saved[tensor.data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = stack(hidden).square().sum()
            weights = sum(p.numel() for p in stack.parameters() if p.data_ptr() in saved)
            gradients.append(torch.autograd.grad(loss, [*stack.parameters()]))
            kept.append(sum(saved.values()) - weights)
            runs.append(sum(block.runs for block in stack))
        same = all(map(torch.equal, *gradients))
        print(f"{depth:5d}   {kept[0]:10,} -> {kept[1]:9,} ({kept[1] / kept[0]:.0%})"
              f"       {runs[0]:12d} -> {runs[1]:2d}       {same!s:>15s}")  # fmt: skip


if __name__ == "__main__":
    lesson()
