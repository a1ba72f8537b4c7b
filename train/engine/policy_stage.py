"""The stage of a policy: its models, its samples, its loss; and answers before and after, side by side."""

from operator import itemgetter

from load_data.chat.chat_data import SKILL_WORD, chosen_skills
from load_data.chat.chat_template import ChatTemplate
from train.engine.actor_critic import POLICY
from train.engine.answer_rows import Row
from train.engine.command import Command
from train.engine.fine_tuning import Base
from train.engine.machine import Machine
from train.engine.policy_base import policy_parts
from train.engine.policy_evaluation import PolicyEvaluation, held_out_items
from train.engine.policy_loss import PolicyLoss
from train.engine.rollouts import Rollouts
from train.engine.stage import Stage
from train.engine.trainer import Trainer
from utils import distributed
from utils.errors import UserError

HELD_OUT = 128  # questions of each skill


def policy_stage(base: Base, command: Command, machine: Machine, critic: bool = False) -> Stage:
    """Return a stage that trains `base` by `rl`, with a reference if the recipe measures the distance to
    one. `critic`: one will be added (train/engine/actor_critic.py)."""
    config = command.config
    names, recipe, model = chosen_skills(config.data.paths), config.rl.chosen(), base.model
    others = [path for path in config.data.paths if path.partition(":")[0] != SKILL_WORD]
    if others or not names:
        paths = " ".join(others)
        raise UserError(f"--data {paths}: no questions that a rule can judge; name skills:sums, for example")
    if (recipe.advantage == "gae") != critic:
        words = "uses no critic: set rl.recipe=ppo, or use train/grpo_train.py"
        words = words if critic else "needs a critic: use train/ppo_train.py"
        raise UserError(f"rl.recipe={config.rl.recipe} with rl.advantage={recipe.advantage} {words}")
    parts = policy_parts(base, command, machine, reference=bool(recipe.kl_weight))
    template = ChatTemplate(base.tokenizer, config.data.template)
    source = Rollouts(model, template, names, config, machine)
    items = held_out_items(names, HELD_OUT, config.data.val_fraction)
    policy_of = itemgetter(POLICY) if critic else lambda model: model
    measured = (items, template, config.rl, source.judge, machine.world, config.train.seed)
    return Stage(
        name=command.stage, short=command.short, model=model, source=source,
        loss=PolicyLoss(model, config, machine),
        evaluate=PolicyEvaluation(*measured, policy_of, source.request),
        tokenizer=base.tokenizer, data_digest=" ".join(names), **parts,
    )  # fmt: skip


def train_policy(stage: Stage, command: Command, machine: Machine) -> None:
    """Train, and write sampled answers to held-out questions before and after."""
    before = samples(stage, machine)
    Trainer(stage, command.config, machine, command.out, command.resume).run()
    after = samples(stage, machine)
    if machine.world.is_first:
        path = command.out / stage.name / "samples.txt"
        stage.evaluate.write_side_by_side(path, before, after)
        machine.say(f"answers before and after: {path}")


def samples(stage: Stage, machine: Machine) -> list[Row]:
    """Return sampled answers, in the first process only."""
    with distributed.all_or_none():
        return stage.evaluate.sampled(stage.model.to(machine.device)) if machine.world.is_first else []
