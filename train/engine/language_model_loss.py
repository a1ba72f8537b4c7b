"""The loss of a language model, by terms, each already divided by the supervised tokens of the whole step.

    loss = CE(next token) + lambda * CE(token after the next) + alpha * balance + beta * z

Without a second head or without experts the later terms are absent. The balance of experts (see
modules/experts/balance.py) is that of a whole optimizer step over all its micro-batches and processes, hence
`before_step` and `after_step`.
"""

import torch

from modules.experts.router import TopkRouter
from train.engine.load_balancer import LoadBalancer
from train.engine.stage import Loss
from utils.distributed import sum_scalars

MTP_WEIGHT = {"none": 0.0, "parallel": 1.0, "sequential": 0.3}  # lambda, the papers' choices


class LanguageModelLoss(Loss):
    """`loss(model, micro-batch, supervised tokens of the step)` -> (terms, measures for the log).

    Trainable routers of the model are balanced, and its second head is trained; frozen ones, as under an
    adapter, are left alone.
    """

    def __init__(self, model, config, machine):
        routers = [part for part in model.modules() if isinstance(part, TopkRouter)]
        routers = [router for router in routers if router.weight.requires_grad]
        self.balancer = LoadBalancer(config.balance, routers) if routers else None
        self.mtp = model.mtp is not None and any(p.requires_grad for p in model.mtp.parameters())
        weight = config.train.mtp_weight
        self.mtp_weight = MTP_WEIGHT[config.model.mtp] if weight is None else weight
        self.machine = machine

    def claims(self) -> dict:
        """Return the parameters that each term must reach, for the gradient proof: term -> (name -> bool)."""
        router = lambda name: name.endswith(".gate.weight")  # noqa: E731
        second = lambda name: name.startswith("mtp.")  # noqa: E731
        return {"ce": lambda name: not second(name), "mtp": second, "balance": router, "z": router}

    def before_step(self, model, micro_batches: list[dict]) -> None:
        """Count the real tokens of the step and, if asked to, the experts that they choose."""
        if self.balancer is None:
            return
        (tokens,) = sum_scalars([sum(float(real_tokens(batch).sum()) for batch in micro_batches)])
        self.balancer.begin_step(tokens)
        if self.balancer.needs_counting_pass:
            devices = [self.machine.device] if self.machine.device.type == "cuda" else []
            # The same dropout and noise as in the training pass, so that the same experts are chosen.
            with torch.random.fork_rng(devices), torch.no_grad(), self.machine.autocast():
                for batch in micro_batches:
                    output = self.forward(model, batch)
                    self.balancer.count(self.trainable(output), real_tokens(batch))

    def trainable(self, output) -> list:
        """Return the routings of trainable routers: all, or all but the last if the second head is frozen."""
        return output.routings[: len(self.balancer.routers)]

    def forward(self, model, batch: dict):
        """Run the model on a batch, with its positions, documents and padding."""
        return model(batch["input_ids"], labels=batch["labels"], mtp=self.mtp, **about(batch))

    def __call__(self, model, batch: dict, step_tokens: float):
        """Return one micro-batch's share of the loss of the step."""
        return self.shares(self.forward(model, batch), batch, step_tokens)

    def shares(self, output, batch: dict, step_tokens: float):
        """Return the terms and measures of the output of a micro-batch."""
        terms = {"ce": output.loss_sum / step_tokens}
        measures = {"conf": (-output.nll).exp().sum() / step_tokens}  # probability of the correct next token
        if self.mtp:
            measures["mtp"] = output.mtp_loss_sum / step_tokens  # the log shows it without lambda
            terms["mtp"] = self.mtp_weight * measures["mtp"]
        if self.balancer is not None:
            more_terms, more_measures = self.balancer.loss(self.trainable(output), real_tokens(batch))
            terms, measures = terms | more_terms, measures | more_measures
        return terms, measures

    def after_step(self, lr_factor: float) -> dict[str, float]:
        """Move the loss-free bias, at a rate that decays with the learning rate. Return numbers for the log:
        `LoadBalancer.end_step`, and loads (`L0E3`: the share of layer 0's assignments that expert 3 got)."""
        if self.balancer is None:
            return {}
        values = self.balancer.end_step(lr_factor)
        for layer, loads in enumerate(self.balancer.loads.tolist()):
            values |= {f"L{layer}E{expert}": load for expert, load in enumerate(loads)}
        return values


def about(batch: dict) -> dict:
    """Return what a batch says about its tokens, for the model: positions, documents and padding."""
    return {key: batch[key] for key in ("position_ids", "document_ids", "padding_mask") if key in batch}


def real_tokens(batch: dict) -> torch.Tensor:
    """Return (B, T) bool, False for padding. Without a `padding_mask`, every token is real."""
    mask = batch.get("padding_mask")
    return torch.ones_like(batch["labels"], dtype=torch.bool) if mask is None else mask.bool()
