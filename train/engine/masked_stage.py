"""Masked language modelling: its evaluation on held-out text, and the parts of its stage.

    val_loss  nats per masked token     val_ppl  exp(val_loss)     val_acc  share of masked tokens found

The evaluation masks 15 % of the tokens, always the same ones, and gives no other clue in their place
(load_data/masking.py), whatever the run itself trains with: so all runs on a text can be compared.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from load_data.loader import IGNORED
from load_data.masking import HELD_OUT, MaskedLoader, Masking, count_rows, eval_masked
from load_data.packing import PretrainData
from load_data.tokenization.tokenizer import Tokenizer
from model.encoder import MaskedLM
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Stage
from train.engine.token_loss import TokenLoss
from utils.distributed import sum_scalars
from utils.errors import UserError


class MaskedEvaluation:
    """`evaluation(model, max_batches)` -> the numbers above; None measures all held-out text."""

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, length: int, batch_size: int, machine):
        masking, world = Masking(tokenizer, HELD_OUT), machine.world
        self.machine = machine
        self.held_out = lambda most: eval_masked(
            tokens, masking, length, batch_size, most, world.rank, world.size
        )
        self.batches = -(-count_rows(tokens, masking, length) // (batch_size * world.size))  # rounded up

    def __call__(self, model: MaskedLM, max_batches: int | None) -> dict[str, float]:
        """Sum over the batches of this process, then over all processes."""
        nats = right = count = 0.0
        for batch in self.held_out(max_batches):
            batch = {key: value.to(self.machine.device) for key, value in batch.items()}
            labels = batch.pop("labels")
            keep = labels != IGNORED
            logits = model.logits(model.model(**batch)[keep]).float()  # (N, V)
            nats += F.cross_entropy(logits, labels[keep], reduction="sum").item()
            right += (logits.argmax(dim=-1) == labels[keep]).sum().item()
            count += len(logits)
        nats, right, count = sum_scalars([nats, right, count])
        loss = nats / max(count, 1.0)
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700.0)), "val_acc": right / max(count, 1.0)}


def masked_stage(
    name: str, short: str, model: MaskedLM, data: PretrainData, config, machine: Machine
) -> Stage:
    """Return a stage that trains `model` on the masked tokens of `data`."""
    train, world, length = config.train, machine.world, config.data.sequence_length
    if length > config.encoder.max_position_embeddings:
        raise UserError(
            f"data.sequence_length={length} is more than encoder.max_position_embeddings="
            f"{config.encoder.max_position_embeddings}: lower it"
        )
    loader = MaskedLoader(
        data.train, Masking(data.tokenizer, config.mlm), length, train.batch_size, train.accumulation_steps,
        world.rank, world.size, seed=train.seed, start_length=config.data.start_length,
    )  # fmt: skip
    machine.say(f"parameters  {sum(part.numel() for part in model.parameters()):,}")
    return Stage(
        name=name, short=short, model=model, source=LoaderSource(loader), loss=TokenLoss(),
        evaluate=MaskedEvaluation(data.val, data.tokenizer, length, train.batch_size, machine),
        tokenizer=data.tokenizer, data_digest=data.digest,
        trains=freeze_key_biases(model),
    )  # fmt: skip


def freeze_key_biases(model: torch.nn.Module) -> Callable[[str], bool]:
    """Freeze the biases of keys that are not rotated: they add the same number to all scores of a query, and
    the softmax does not see it. Their gradient is rounding noise, which Adam would enlarge to full steps.

    Return which parameters are trained, by name: all others. Every decoder here rotates its keys.
    """
    rotated = getattr(model.config, "position_embedding_type", "rope") == "rope"
    frozen = () if rotated else tuple(n for n, _ in model.named_parameters() if n.endswith("k_proj.bias"))
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return lambda name: name not in frozen
