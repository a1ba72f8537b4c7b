"""Reinforcement learning: which published algorithm picks what. Every piece can be changed alone.

    --set rl.recipe=dapo                      a row of the table
    --set rl.recipe=grpo --set rl.kl=none     a row with one piece changed

The pieces are in modules/alignment/. `advantage` compares a sample with others of its prompt, or with a
critic (`gae`); `ratio` compares the policy with the one that sampled, by token or by sequence; `clip` bounds
its effect; `aggregation` says what is averaged; `kl` estimates the distance to the reference policy.
"""

from dataclasses import asdict, dataclass, fields

from config.checks import option
from utils.errors import UserError

ADVANTAGES = ("reward", "mean", "mean_std", "leave_one_out", "gae")
RATIOS = ("none", "token", "sequence")  # none: REINFORCE, the gradient of the log-probability itself
CLIPS = ("none", "ppo", "cispo")
AGGREGATIONS = ("sequence", "token", "constant")
KLS = ("none", "k1", "k2", "k3")
PLACES = ("loss", "reward")


@dataclass(frozen=True)
class Recipe:
    """One algorithm, by its pieces."""

    advantage: str
    ratio: str = "token"
    clip: str = "ppo"
    clip_low: float = 0.2  # ppo: the ratio stays within 1 - clip_low and 1 + clip_high
    clip_high: float = 0.2  # cispo: the largest weight itself
    aggregation: str = "token"
    kl: str = "none"
    kl_place: str = "loss"
    kl_weight: float = 0.0
    dynamic_sampling: bool = False  # drop groups in which all rewards are equal, and sample others
    overlong: float = 0.0  # the last share of `max_new_tokens` in which the reward falls by up to 1


RECIPES = {
    # rejection-sampling fine-tuning: the likelihood of right samples, which have reward 1
    "rft": Recipe("reward", ratio="none", clip="none"),
    # REINFORCE with leave-one-out (arXiv 2402.14740)
    "rloo": Recipe("leave_one_out", "none", "none", aggregation="constant", kl="k1", kl_place="reward",
                   kl_weight=0.05),
    # with a critic (arXiv 1707.06347)
    "ppo": Recipe("gae", kl="k1", kl_place="reward", kl_weight=0.05),
    "grpo": Recipe("mean_std", aggregation="sequence", kl="k3", kl_weight=0.04),  # arXiv 2402.03300
    "dr_grpo": Recipe("mean", aggregation="constant"),  # arXiv 2503.20783
    "dapo": Recipe("mean_std", clip_high=0.28, dynamic_sampling=True, overlong=0.2),  # arXiv 2503.14476
    "cispo": Recipe("mean_std", clip="cispo", clip_high=5.0),  # arXiv 2506.13585
    # arXiv 2507.18071
    "gspo": Recipe("mean_std", "sequence", clip_low=3e-4, clip_high=4e-4, aggregation="sequence"),
}  # fmt: skip


@dataclass
class RLConfig:
    """Reinforcement learning (train/grpo_train.py, train/ppo_train.py). None takes the recipe's choice."""

    recipe: str = option("grpo", choices=tuple(RECIPES))
    advantage: str | None = option(None, choices=ADVANTAGES)
    ratio: str | None = option(None, choices=RATIOS)
    clip: str | None = option(None, choices=CLIPS)
    clip_low: float | None = option(None, at_least=0, at_most=1)
    clip_high: float | None = option(None, at_least=0)
    aggregation: str | None = option(None, choices=AGGREGATIONS)
    kl: str | None = option(None, choices=KLS)
    kl_place: str | None = option(None, choices=PLACES)
    kl_weight: float | None = option(None, at_least=0)
    dynamic_sampling: bool | None = None
    overlong: float | None = option(None, at_least=0, at_most=1)
    lora: bool = False  # train an adapter by the settings in section `lora`, beside a frozen base
    # sampling
    prompts: int = option(16, at_least=1)  # in one rollout, over all processes
    group_size: int = option(8, at_least=1)  # samples of each prompt
    updates: int = option(1, at_least=1)  # optimizer steps on each rollout
    temperature: float = option(1.0, above=0)  # of sampling and scoring alike
    max_new_tokens: int = option(48, at_least=1)  # of an answer, a call, or a thought with its answer
    think: bool = False  # prompts ask for thinking
    think_budget: int | None = option(None, at_least=0)  # most tokens of it; None for no limit
    tools: bool = False  # calls are run, and their results read
    reward: str = "right"  # a rule (load_data/skills/verifiers.py), or the file of a reward model
    # with a critic
    gamma: float = option(1.0, above=0, at_most=1)
    lam: float = option(0.95, at_least=0, at_most=1)  # of generalised advantage estimation
    value_clip: float = option(0.2, above=0)
    critic_lr: float = option(3.0, above=0)  # learning rates of the critic over those of the policy

    def chosen(self) -> Recipe:
        """Return the recipe with the pieces that were changed; without an estimator, its weight is 0."""
        changes = {item.name: getattr(self, item.name) for item in fields(Recipe)}
        changes = {name: value for name, value in changes.items() if value is not None}
        pieces = asdict(RECIPES[self.recipe]) | changes
        return Recipe(**(pieces | ({"kl_weight": 0.0} if pieces["kl"] == "none" else {})))

    def check(self):
        """Reject combinations that have no meaning."""
        recipe = self.chosen()
        if recipe.clip != "none" and recipe.ratio == "none":
            raise UserError(f"rl.clip={recipe.clip} needs a ratio: set rl.ratio=token, or rl.clip=none")
        if recipe.clip == "none" and self.updates > 1 and recipe.ratio == "none":
            raise UserError(
                f"rl.updates={self.updates} with rl.ratio=none: from its second update on the policy is no "
                "longer the one that sampled; set rl.ratio=token, or rl.updates=1"
            )
        if self.think_budget is not None and not self.think:
            raise UserError(f"rl.think_budget={self.think_budget} bounds thinking: set rl.think=true too")
        if self.think and self.max_new_tokens < 2:
            raise UserError("rl.think=true needs rl.max_new_tokens=2 or more: a forced </think> is one")
        if self.kl_weight and recipe.kl == "none":
            raise UserError(f"rl.kl_weight={self.kl_weight} needs an estimator: set rl.kl=k3 too")
        if recipe.advantage in ("mean", "mean_std", "leave_one_out") and self.group_size < 2:
            raise UserError(
                f"rl.group_size={self.group_size}: advantage {recipe.advantage} compares samples of one "
                "prompt and needs at least 2"
            )
