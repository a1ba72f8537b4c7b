"""The stage of a policy without a critic: its models, its samples, its loss."""

import copy

from inference.evaluate import score_skills
from inference.generation.generator import Generator
from load_data.chat.chat_data import chosen_skills
from load_data.chat.chat_template import ChatTemplate
from train.engine.fine_tuning import Base
from train.engine.machine import Machine
from train.engine.policy_loss import PolicyLoss
from train.engine.rollouts import Rollouts
from train.engine.stage import Stage
from utils.errors import UserError


class Greedy:
    batches = 1

    def __init__(self, template, names, config):
        self.template, self.names, self.config = template, names, config

    def __call__(self, model, max_batches):
        scores = score_skills(Generator(model), self.template, self.names, 100, self.config.data.val_fraction)
        return {f"val_{name}": score.percent for name, score in scores.items()}


def policy_stage(name: str, short: str, base: Base, config, machine: Machine) -> Stage:
    """Return a stage that trains `base` by `config.rl`, with a frozen copy of it as the reference if the
    recipe measures the distance to one."""
    names, recipe, model = chosen_skills(config.data.paths), config.rl.chosen(), base.model
    if not names:
        paths = " ".join(config.data.paths)
        raise UserError(f"--data {paths}: no questions that a rule can judge; name skills:sums, for example")
    if recipe.advantage == "gae":
        raise UserError(f"rl.recipe={config.rl.recipe} needs a critic: use train/ppo_train.py")
    if model.mtp is not None:
        model.mtp.requires_grad_(False)
    frozen = {"reference": copy.deepcopy(model)} if recipe.kl_weight else {}
    template = ChatTemplate(base.tokenizer, config.data.template)
    return Stage(
        name=name, short=short, model=model, frozen=frozen,
        source=Rollouts(model, template, names, config, machine),
        loss=PolicyLoss(model, config, machine),
        evaluate=Greedy(template, names, config),
        tokenizer=base.tokenizer, data_digest=" ".join(names),
        trains=lambda name: not name.startswith("mtp."),
    )  # fmt: skip
