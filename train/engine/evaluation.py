"""Evaluation of a language model on held-out text.

    val_loss  nats per token            val_ppl   exp(val_loss): the number of tokens it hesitates between
    val_conf  mean probability of the correct next token
    val_bpb   bits per byte = nats / ln 2 / bytes: independent of the tokenizer, so models can be compared

With experts:

    val_max_vio  (max - mean) / mean of the experts' loads, in the worst layer, over all tokens measured
    val_dead     experts, of all layers together, that none of these tokens chose

In pre-training the windows do not overlap and cover every token once; the first token of a window is
predicted without the text before it. In chat stages only answers are predicted, each with its whole dialogue.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from load_data.loader import IGNORED, eval_windows
from load_data.tokenization.token_kinds import token_kinds
from load_data.tokenization.tokenizer import Tokenizer
from modules.experts.balance import max_vio
from utils.distributed import sum_scalars


class Evaluation:
    """`evaluation(model, max_batches)` -> the numbers above; None measures all held-out text.

    Afterwards `loads` (layers, kinds, E) counts the tokens of each kind that went to each expert; `kinds` has
    the names. Without experts it is None.

    Args:
        held_out: max_batches -> the batches of this process, at most that many.
        rows: the number of held-out rows, over all processes.
    """

    def __init__(self, held_out: Callable, rows: int, batch_size: int, tokenizer: Tokenizer, machine):
        self.held_out, self.machine = held_out, machine
        self.batches = -(-rows // (batch_size * machine.world.size))  # of each process, rounded up
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes.astype(np.int64))
        self.kinds, kind_of = token_kinds(tokenizer)
        other = self.kinds.index("other")  # of learned embeddings, whose ids are beyond the vocabulary
        self.kind_of, self.loads = torch.from_numpy(np.append(kind_of, other)).long(), None

    def __call__(self, model, max_batches: int | None) -> dict[str, float]:
        """Sum over the batches of this process, then over all processes."""
        nats = sure = count = size = 0.0
        self.loads = None
        for batch in self.held_out(max_batches):
            labels = batch["labels"]
            there = {key: value.to(self.machine.device) for key, value in batch.items()}
            output = model(there.pop("input_ids"), **there)
            nll = output.nll.cpu().double()
            if output.routings:
                self.count(output.routings, batch["input_ids"], batch.get("padding_mask", labels != IGNORED))
            nats += nll.sum().item()
            sure += (-nll).exp().sum().item()
            count += len(nll)
            size += self.token_bytes[labels[labels >= 0]].sum().item()
        nats, sure, count, size = sum_scalars([nats, sure, count, size])
        loss, conf, bits = nats / max(count, 1.0), sure / max(count, 1.0), nats / math.log(2)
        values = {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0)), "val_conf": conf,
                  "val_bpb": bits / max(size, 1.0)}  # fmt: skip
        # A process without a batch does not know how many layers and experts there are.
        known = self.loads.shape[::2] if self.loads is not None else (0, 0)
        holders, layers, experts = sum_scalars([self.loads is not None, *known])
        if holders:
            shape = (round(layers / holders), len(self.kinds), round(experts / holders))
            loads = torch.zeros(shape) if self.loads is None else self.loads
            self.loads = torch.tensor(sum_scalars(loads.flatten().tolist())).view(shape)
            layers = self.loads.sum(dim=1)  # (layers, E)
            values["val_max_vio"] = max(max_vio(layer) for layer in layers)
            values["val_dead"] = int((layers == 0).sum())
        return values

    def count(self, routings, ids, real) -> None:
        """Add a batch to `loads`. ids (B, T); real (B, T): columns that are not padding."""
        kinds = self.kind_of[ids[real].clamp(max=len(self.kind_of) - 1)]  # (N,)
        counts = []
        for routing in routings:
            E, K = routing.logits.shape[-1], routing.indices.shape[-1]
            chosen = routing.indices.cpu().view(*ids.shape, K)[real]  # (N, K)
            places = kinds[:, None] * E + chosen
            counts.append(torch.bincount(places.flatten(), minlength=len(self.kinds) * E).view(-1, E))
        batch = torch.stack(counts).double()  # (layers, kinds, E)
        self.loads = batch if self.loads is None else self.loads + batch


def text_evaluation(
    tokens: np.ndarray, tokenizer: Tokenizer, sequence_length: int, batch_size: int, machine
) -> Evaluation:
    """Return the evaluation on held-out ids, `tokens` (N,), in windows of `sequence_length`."""
    rank, size = machine.world.rank, machine.world.size
    windows = partial(eval_windows, tokens, sequence_length, batch_size, rank=rank, world_size=size)
    rows = -(-(len(tokens) - 1) // sequence_length)  # rounded up
    return Evaluation(windows, rows, batch_size, tokenizer, machine)
