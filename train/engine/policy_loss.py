"""The loss of a policy on its own samples, by terms, each divided by the weight of the whole step.

    loss = pg + kl_weight * kl + alpha * balance + beta * z

`pg` is the policy gradient (modules/alignment/policy_gradient.py), `kl` the distance to the reference policy
where the recipe has it in the loss. Without experts the later terms are absent.

    logprobs_t = log softmax(logits_t / temperature) of the sampled token      (B, T), at labels only

Trap: the distribution that is scored must be the one that was sampled, the temperature included. At the first
update on a rollout the policy is still the one that sampled, so every ratio is 1. That is asserted, not
assumed: a wrong temperature, dropout, or a shift by one token would make training only a little worse.

With experts, one honest difference remains: where two experts are almost equal for a token, rounding decides,
and sampling and scoring may choose differently. Such a token and those after it in its row are left out of
the assertion; `route_gap` is the share of tokens whose own experts differ.
"""

import time

import torch

from load_data.loader import IGNORED
from modules.alignment.kl import kl_estimate
from modules.alignment.policy_gradient import aggregated, log_ratio, objective
from modules.experts.router import routing_codes
from train.engine.language_model_loss import LanguageModelLoss
from utils.device import synchronize
from utils.distributed import sum_scalars
from utils.errors import UserError

SAME = 1e-4  # the largest |ratio - 1| before an update: rounding in fp32 is 1e-6 to 1e-5
ROUTE_GAP = 0.01  # the largest share of tokens whose experts may differ


class PolicyLoss(LanguageModelLoss):
    """`loss(policy, micro-batch, weight)` -> (terms, measures for the log).

    A micro-batch holds `input_ids`, `labels` and `padding_mask`, and (B, T) each, read at labels only:
    `old_logprobs`, `advantages`, and where used `reference_logprobs`. `experts` (B, T), the `routing_codes`
    at sampling (0 without experts), marks the first update on a rollout: ratios are then asserted to be 1.
    """

    def __init__(self, model, config, machine):
        super().__init__(model, config, machine)
        self.recipe, self.temperature = config.rl.chosen(), config.rl.temperature
        self.routed = model.config.n_routed_experts > 0
        self.count = self.real = 1.0

    def claims(self) -> dict:
        """Return the parameters that each term must reach."""
        claims = super().claims()
        return claims | {"pg": claims["ce"], "kl": claims["ce"]}

    def before_step(self, model, micro_batches: list[dict]) -> None:
        """Count the sampled tokens of the step, over all processes."""
        labels = [batch["labels"] for batch in micro_batches]
        counts = [sum((part != IGNORED).sum() for part in labels)]
        self.count = max(*sum_scalars(counts), 1.0)
        self.real = sum(float(batch["padding_mask"].sum()) for batch in micro_batches)  # of this process
        self.checked = self.moved = 0
        self.clock = time.perf_counter()
        super().before_step(model, micro_batches)

    def forward(self, model, batch: dict):
        """Run the policy: hidden states, and no logits but the last."""
        return model(batch["input_ids"], padding_mask=batch["padding_mask"], last_only=True)

    def __call__(self, model, batch: dict, weight: float):
        """Return one micro-batch's share of the loss of the step."""
        recipe, mask = self.recipe, batch["labels"] != IGNORED
        output = self.forward(model, batch)
        logprobs, entropy = token_logprobs(model, output.hidden, batch["labels"], self.temperature)
        by_token = log_ratio(logprobs, batch["old_logprobs"], mask, "token")
        if "experts" in batch:
            self.assert_same_policy(by_token, output.routings, batch, mask)
        sequence = recipe.ratio == "sequence"
        ratio = log_ratio(logprobs, batch["old_logprobs"], mask, "sequence") if sequence else by_token
        per_token, clipped = objective(logprobs, ratio, batch["advantages"], recipe)
        terms = {"pg": aggregated(per_token, mask, recipe.aggregation) / weight}
        seen = {"entropy": entropy, "clip_frac": clipped.float(), "ratio": ratio.exp()}
        if "reference_logprobs" in batch:
            seen["kl"] = kl_estimate(logprobs, batch["reference_logprobs"], recipe.kl)
            if recipe.kl_place == "loss":
                terms["kl"] = recipe.kl_weight * aggregated(seen["kl"], mask, recipe.aggregation) / weight
        measures = {name: value.detach()[mask].sum() / self.count for name, value in seen.items()}
        if self.balancer is not None:
            routings = self.trainable(output)
            more_terms, more_measures = self.balancer.loss(routings, batch["padding_mask"].bool())
            terms, measures = terms | more_terms, measures | more_measures
        return terms, measures

    @torch.no_grad()
    def assert_same_policy(self, log_ratios, routings, batch: dict, mask) -> None:
        """Raise `UserError` unless every ratio is 1, except after a token whose experts differ."""
        real = batch["padding_mask"].bool()
        codes = routing_codes(routings).view_as(mask) if routings else torch.zeros_like(batch["experts"])
        differ = (codes != batch["experts"]) & real
        self.checked, self.moved = self.checked + int(real.sum()), self.moved + int(differ.sum())
        off = (log_ratios.exp() - 1).abs().where(mask & (differ.cumsum(dim=1) == 0), 0)
        if not off.max() <= SAME:
            row, place = divmod(int(off.argmax()), off.shape[1])
            token = int(mask[row, : place + 1].sum())
            raise UserError(
                f"before any update, |ratio - 1| is {off.max():.3g} at token {token} of the answer in row "
                f"{row}, more than {SAME:g}: it is scored as {batch['old_logprobs'][row, place].exp():.3g} x "
                f"{log_ratios[row, place].exp():.3g}; do sampling and scoring differ in temperature, dropout "
                "or dtype, or by one token?"
            )

    def after_step(self, lr_factor: float) -> dict[str, float]:
        """Finish the step; return the speed of the update, the share of differing routes, and the balance."""
        synchronize(self.machine.device)
        values = {"update_tok_s": self.real / (time.perf_counter() - self.clock)}
        if self.checked and self.routed:
            values["route_gap"] = gap = self.moved / self.checked
            if gap > ROUTE_GAP:
                raise UserError(
                    f"{gap:.1%} of all tokens chose other experts when scored than when sampled, more than "
                    f"{ROUTE_GAP:.0%}: this is no rounding; is noise on in the router?"
                )
        return values | super().after_step(lr_factor)


def token_logprobs(model, hidden, labels, temperature: float):
    """Return the log-probabilities of the labels, and without gradient the entropy there; 0 elsewhere.

    hidden (B, T, C), labels (B, T) -> (B, T) each. The (N, V) logits of N labels are in fp32 or wider.
    """
    keep = labels != IGNORED
    logits = model.logits(hidden[keep])  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    scores = logits.log_softmax(dim=-1)
    chosen = scores.gather(1, labels[keep][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(scores.exp() * scores).sum(dim=-1)
    blank = scores.new_zeros(labels.shape)
    return blank.masked_scatter(keep, chosen), blank.masked_scatter(keep, entropy)
