"""How well a language model predicts held-out text.

    val_loss  nats per token            val_ppl   exp(val_loss): among how many tokens it hesitates
    val_conf  mean probability of the right next token
    val_bpb   bits per byte = nats / ln 2 / bytes: does not depend on the tokenizer, so models can be compared

The windows do not overlap and cover every token once; the first token of a window is predicted without what
came before."""

import math

import numpy as np
import torch

from load_data.loader import eval_windows
from load_data.tokenizer import Tokenizer
from utils.distributed import sum_scalars


class LanguageModelEvaluation:
    """`evaluation(model, max_batches)` -> the four numbers; None measures all of `tokens`.

    Args:
        tokens: (N,) held-out ids.
        tokenizer: tells how many bytes each id stands for.
        sequence_length, batch_size: the shape of a batch.
        machine: device and processes; each process measures its share.
    """

    def __init__(
        self, tokens: np.ndarray, tokenizer: Tokenizer, sequence_length: int, batch_size: int, machine
    ):
        self.tokens, self.length, self.batch_size, self.machine = tokens, sequence_length, batch_size, machine
        self.token_bytes = torch.from_numpy(tokenizer.token_bytes.astype(np.int64))
        windows = -(-(len(tokens) - 1) // sequence_length)  # rounded up
        self.batches = -(-windows // (batch_size * machine.world.size))  # of each process

    def __call__(self, model, max_batches: int | None) -> dict[str, float]:
        """Sums over this process's batches, then over all processes."""
        world, device = self.machine.world, self.machine.device
        nats = sure = count = size = 0.0
        for batch in eval_windows(
            self.tokens, self.length, self.batch_size, max_batches, world.rank, world.size
        ):
            labels = batch["labels"]
            nll = model(batch["input_ids"].to(device), labels=labels.to(device)).nll.double()
            nats += nll.sum().item()
            sure += (-nll).exp().sum().item()
            count += len(nll)
            size += self.token_bytes[labels[labels >= 0]].sum().item()
        nats, sure, count, size = sum_scalars([nats, sure, count, size])
        loss = nats / count
        return {
            "val_loss": loss,
            "val_ppl": math.exp(min(loss, 700.0)),
            "val_conf": sure / count,
            "val_bpb": nats / math.log(2) / max(size, 1.0),
        }
