"""A policy with a critic (PPO, arXiv 1707.06347): two models that are trained in the same steps.

    loss = the policy's (train/engine/policy_loss.py) + value

The critic starts as a copy of the policy's decoder with a head of zeros: it reads text as well as the policy
does, and expects nothing at first. Its values of a rollout are computed before any update on that rollout,
without gradient (`Rollouts.score`), and become advantages and returns (modules/alignment/advantage.py). The
term `value` moves it towards the returns. The two models share no parameter and have optimizers of their own,
so neither loss needs a weight against the other.

The experts of the critic are not balanced: it is trained briefly, and no later stage uses it.
"""

from dataclasses import replace

from torch import nn

from config.rl import RLConfig
from config.schema import RunConfig
from load_data.loader import IGNORED
from model.scalar import ScalarModel
from modules.alignment.policy_gradient import aggregated
from modules.alignment.value_loss import value_loss
from train.engine.stage import Batch, Loss, Stage, within

POLICY, CRITIC = "policy", "critic"


def with_critic(stage: Stage, config: RunConfig) -> Stage:
    """Return the stage of a policy with a critic beside it; what is saved as its result is the policy."""
    rl, optim, critic = config.rl, config.optim, ScalarModel.from_policy(stage.model)
    rates = {"lr": optim.lr * rl.critic_lr, "muon_lr": optim.muon_lr * rl.critic_lr}
    return replace(
        stage,
        model=nn.ModuleDict({POLICY: stage.model, CRITIC: critic}),
        result=POLICY, loss=ActorCriticLoss(stage.loss, rl), optim={CRITIC: replace(optim, **rates)},
        trains=lambda name: name.startswith(f"{CRITIC}.") or stage.trains(name.removeprefix(f"{POLICY}.")),
        own=stage.own and frozenset([*(f"{POLICY}.{name}" for name in stage.own),
                                     *(f"{CRITIC}.{name}" for name in critic.state_dict())]),
    )  # fmt: skip


class ActorCriticLoss(Loss):
    """`loss({policy, critic}, micro-batch, weight)`: the terms of the policy's loss, and `value`."""

    def __init__(self, policy: Loss, rl: RLConfig):
        self.policy, self.clip, self.aggregation = policy, rl.value_clip, rl.chosen().aggregation

    def claims(self) -> dict:
        """Return the claims of the policy's terms within the policy, and that of the value."""
        claims = {term: within(POLICY, claim) for term, claim in self.policy.claims().items()}
        return claims | {"value": within(CRITIC, lambda name: True)}

    def before_step(self, models, micro_batches: list[Batch]) -> None:
        """Let the policy's loss look at the step."""
        self.policy.before_step(models[POLICY], micro_batches)

    def __call__(self, models, batch: Batch, weight: float):
        """Return one micro-batch's share of both losses."""
        terms, measures = self.policy(models[POLICY], batch, weight)
        values = models[CRITIC](batch["input_ids"], padding_mask=batch["padding_mask"])
        per_token = value_loss(values, batch["old_values"], batch["returns"], self.clip)
        value = aggregated(per_token, batch["labels"] != IGNORED, self.aggregation) / weight
        return terms | {"value": value}, measures

    def after_step(self, lr_factor: float) -> dict[str, float]:
        """Let the policy's loss finish the step."""
        return self.policy.after_step(lr_factor)
