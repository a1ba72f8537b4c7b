"""Calibration: what each matrix of a model reads in training data, layer after layer.

    for each decoder layer:   run it on all rows, and watch the inputs of its matrices
                              quantise its matrices by what was seen
                              run it again: its new outputs are the inputs of the next layer

So each layer is fitted to the errors of those before it (as in GPTQ, arXiv 2210.17323), and only one layer
has statistics at a time. Rows are windows of the text that the model was trained on, or dialogues if it
answers: of the side of the split that is trained on, never of the one that scores are made with. Padding is
left out. An expert sees the tokens that its router sends to it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from inference.generation.load import Loaded
from load_data.chat.chat_data import prepare_chat
from load_data.chat.chat_loader import ChatLoader
from load_data.loader import TokenLoader
from load_data.packing import prepare_pretraining
from model.quantized import matrices
from model.tinyseek import Decoder, TinySeek
from modules.experts.moe import Experts
from modules.quantized.gptq import add_inputs

ROWS = 4  # in a batch
KEPT = 512  # inputs of each matrix that are kept as they are


class Inputs:
    """The inputs (n, in) of one matrix (out, in): their number, the largest |x| of each channel, 2 X^T X if
    `hessian`, and some of them, evenly spread over `batches`."""

    def __init__(self, width: int, batches: int, hessian: bool):
        self.count, self.largest, self.each = 0, torch.zeros(width), -(-KEPT // batches)
        self.hessian = torch.zeros(width, width) if hessian else None
        self.kept = []

    def add(self, x) -> None:
        """Count in the inputs x (n, in) of a batch."""
        if not len(x):
            return
        self.count += len(x)
        self.largest = torch.maximum(self.largest, x.abs().amax(dim=0))
        self.kept.append(x[:: -(-len(x) // self.each)].clone())
        if self.hessian is not None:
            add_inputs(self.hessian, x)

    @property
    def sample(self):
        """The inputs that were kept (m, in)."""
        return torch.cat(self.kept) if self.kept else torch.zeros(0, len(self.largest))


def training_rows(loaded: Loaded, paths: list[str] | None, rows: int, seed: int = 0) -> list[dict]:
    """Return batches of at most `rows` rows of training data: that of the model, or of `paths`."""
    config = loaded.config
    config = replace(config, data=replace(config.data, paths=paths or config.data.paths))
    length, tokenizer = config.data.sequence_length, loaded.tokenizer
    if loaded.answers:
        data = prepare_chat(config, tokenizer).train
        packing = config.data.packing
        loader = ChatLoader(data, length, 1, seed=seed, packing=packing, pad_id=tokenizer.pad_id)
    else:
        length = min(length, loaded.model.config.max_position_embeddings)
        loader = TokenLoader(prepare_pretraining(config, tokenizer).train, length, 1, seed=seed)
    starts = loader.take(min(rows, len(loader.starts)))
    batches = [loader.batch(starts[first : first + ROWS]) for first in range(0, len(starts), ROWS)]
    for batch in batches:
        batch.setdefault("padding_mask", torch.ones_like(batch.pop("labels"), dtype=torch.bool))
    return batches


class Catch(nn.Module):
    """Stands in for a decoder layer and keeps what it is called with."""

    def forward(self, hidden, context, rotary, past=None):
        """Return `hidden` as it is."""
        self.hidden, self.context = hidden, (context, rotary)
        return hidden, None


def layer_inputs(decoder: Decoder, batch: dict) -> tuple[torch.Tensor, list[tuple]]:
    """Return the input (B, T, C) of the first layer, and the context and rotary tables of each layer."""
    layers = decoder.layers
    decoder.layers = nn.ModuleList(Catch() for _ in layers)
    try:
        decoder(**batch)
        return decoder.layers[0].hidden, [one.context for one in decoder.layers]
    finally:
        decoder.layers = layers


def stack_of(weight: torch.Tensor) -> torch.Tensor:
    """Return one matrix (out, in), or a stack of experts, as a stack (E, out, in); E = 1 for one matrix."""
    return weight.reshape(-1, *weight.shape[-2:])


def watch(layer: nn.Module, parts: list[list[Inputs]], current: dict) -> torch.utils.hooks.RemovableHandle:
    """Count what `layer`, linear or experts, reads from now on in `parts`: for each of its stacks of matrices
    the `Inputs` of each. `current["real"]` says which tokens (N,) are no padding."""

    def linear(module, args):
        parts[0][0].add(args[0].reshape(-1, args[0].shape[-1])[current["real"]])

    def experts(module, args):
        x, indices, _ = args
        for number, (read, inner) in enumerate(zip(*parts, strict=True)):
            rows = x[(indices == number).any(dim=-1) & current["real"]]  # (n, C)
            gate, up = F.linear(rows, module.gate_up_proj[number]).chunk(2, dim=-1)
            read.add(rows), inner.add(F.silu(gate) * up)

    return layer.register_forward_pre_hook(experts if isinstance(layer, Experts) else linear)


@torch.no_grad()
def calibrated(
    model: TinySeek, plain: dict[str, nn.Module], batches: list[dict], hessians: bool, tick: Callable
) -> Iterator[dict[str, list[list[Inputs]]]]:
    """Yield for each decoder layer, by path, what those of the `plain` layers read that are inside it. The
    caller may replace them before it takes the next item. `tick()` is called after each batch of each layer,
    twice.
    """
    steps = [layer_inputs(model.model, batch) for batch in batches]
    hidden, contexts = [step[0] for step in steps], [step[1] for step in steps]
    masks = [batch["padding_mask"].flatten() for batch in batches]
    for number, layer in enumerate(model.model.layers):
        seen, current, hooks = {}, {}, []
        for path, part in plain.items():
            if not path.startswith(f"model.layers.{number}."):
                continue
            seen[path] = [
                [Inputs(weight.shape[-1], len(batches), hessians) for _ in stack_of(weight)]
                for weight in matrices(part)
            ]
            hooks.append(watch(part, seen[path], current))
        for step, mask in enumerate(masks):
            current["real"] = mask
            layer(hidden[step], *contexts[step][number])
            tick()
        for hook in hooks:
            hook.remove()
        yield seen
        for step in range(len(batches)):
            hidden[step] = layer(hidden[step], *contexts[step][number])[0]
            tick()
