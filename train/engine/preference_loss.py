"""Losses on pairs of answers, and their evaluation: of a policy against its reference, and of a reward model.

    margin    the reward of the chosen answer minus that of the rejected one; the reward of a policy is beta
              times the score of modules/alignment/preference.py, and DPO's and IPO's begin at 0
    acc       the share of pairs with a margin above 0
    chosen, rejected    log-probabilities of the answers, or for a reward model their rewards

A loss is a mean over pairs. Balance losses of experts are not part of it: the few steps of these stages leave
the routers' loads close to what fine-tuning made of them.
"""

import torch

from config.preference import DPOConfig
from load_data.chat.pairs import PairLoader
from load_data.loader import IGNORED
from modules.alignment.preference import answer_scores, bradley_terry, pair_loss
from train.engine.policy_loss import token_logprobs
from train.engine.stage import Batch, LoaderSource, Loss, Step
from utils.distributed import sum_scalars


class PairSource(LoaderSource):
    """Steps whose weight is their number of pairs."""

    def __init__(self, loader: PairLoader):
        super().__init__(loader)

    def next_step(self, models=None, progress: float = 0.0) -> Step:
        """Return the next micro-batches of pairs."""
        step = super().next_step(models, progress)
        (rows,) = sum_scalars([sum(len(batch["input_ids"]) for batch in step.micro_batches)])
        return step._replace(weight=rows / 2)


class PairLoss(Loss):
    """A loss on pairs."""

    def compare(self, model, batch: Batch) -> tuple[dict, dict]:
        """Return the terms of each pair, and its `margin`, `chosen` and `rejected`, (P,) each."""
        raise NotImplementedError

    def __call__(self, model, batch: Batch, weight: float) -> tuple[dict, dict]:
        """Return the share of one micro-batch in the mean over all pairs of the step."""
        terms, measures = self.compare(model, batch)
        measures["acc"] = (measures["margin"] > 0).to(measures["margin"])
        shares = lambda values: {name: value.sum() / weight for name, value in values.items()}  # noqa: E731
        return shares(terms), {name: value.detach() for name, value in shares(measures).items()}


class PreferenceLoss(PairLoss):
    """The loss of a policy on pairs, against a frozen `reference` where `settings.kind` needs one."""

    def __init__(self, settings: DPOConfig, reference: torch.nn.Module | None):
        self.settings, self.reference = settings, reference

    def compare(self, model, batch: Batch) -> tuple[dict, dict]:
        """Return the loss by `kind`, with a weight the likelihood of the chosen answer, and measures."""
        settings, mask, reference = self.settings, batch["labels"] != IGNORED, None
        logprobs = label_logprobs(model, batch)
        if self.reference is not None:
            with torch.no_grad():
                reference = label_logprobs(self.reference, batch)
        scores = answer_scores(settings.kind, logprobs, mask, reference)
        chosen, rejected = scores[::2], scores[1::2]
        loss = pair_loss(settings.kind, chosen, rejected, settings.strength, settings.margin)
        totals, terms = logprobs.sum(1), {settings.kind: loss}
        if settings.likelihood:
            terms["nll"] = -settings.likelihood * totals[::2] / mask[::2].sum(1)
        margin = settings.strength * (chosen - rejected)
        return terms, {"margin": margin, "chosen": totals[::2], "rejected": totals[1::2]}


class RewardLoss(PairLoss):
    """The loss of a reward model on pairs."""

    def compare(self, model, batch: Batch) -> tuple[dict, dict]:
        """Return the loss of the rewards, and measures."""
        rewards = last_scores(model, batch)
        chosen, rejected = rewards[::2], rewards[1::2]
        measures = {"margin": chosen - rejected, "chosen": chosen, "rejected": rejected}
        return {"bt": bradley_terry(chosen, rejected)}, measures


class PairEvaluation:
    """`evaluation(model, max_batches)` -> means over held-out pairs: `val_loss`, `val_acc`, `val_margin`, ..

    Args:
        held_out: max_batches -> the batches of this process, at most that many.
        pairs: the number of held-out pairs, over all processes.
    """

    def __init__(self, held_out, pairs: int, batch_size: int, loss: PairLoss, machine):
        self.held_out, self.loss, self.machine = held_out, loss, machine
        self.batches = -(-pairs // (batch_size * machine.world.size))  # of each process, rounded up

    def __call__(self, model, max_batches: int | None) -> dict[str, float]:
        """Sum over the batches of this process, then over all processes."""
        names, sums = ("loss", "acc", "margin", "chosen", "rejected"), torch.zeros(5).double()
        count = 0
        for batch in self.held_out(max_batches):
            batch = {key: value.to(self.machine.device) for key, value in batch.items()}
            terms, measures = self.loss(model, batch, 1.0)
            values = {"loss": sum(terms.values()), **measures}
            sums += torch.stack([values[name].double() for name in names]).cpu()
            count += len(batch["input_ids"]) // 2
        *sums, count = sum_scalars([*sums.tolist(), count])
        return {f"val_{name}": value / max(count, 1) for name, value in zip(names, sums, strict=True)}


def label_logprobs(model, batch: Batch) -> torch.Tensor:
    """Return the log-probability of every label, 0 where there is none: (B, T), in fp32 or wider.

    The output head runs at the labels alone, and in fp32 under autocast too: bf16 logits of 20 are rounded to
    steps of an eighth.
    """
    about = {key: batch[key] for key in ("position_ids", "document_ids", "padding_mask")}
    hidden = model(batch["input_ids"], last_only=True, **about).hidden  # (B, T, C)
    with torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return token_logprobs(model, wide, batch["labels"], temperature=1.0)[0]


def last_scores(model, batch: Batch) -> torch.Tensor:
    """Return the score of the last real token of each row (B,)."""
    about = {key: batch[key] for key in ("position_ids", "document_ids", "padding_mask")}
    scores = model(batch["input_ids"], **about)  # (B, T)
    return scores.gather(1, batch["padding_mask"].sum(1, keepdim=True) - 1)[:, 0]
