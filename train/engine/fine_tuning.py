"""Shared parts of the fine-tuning stages: the base model, dialogues, adapters, and scores."""

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

from config.load import from_dict
from config.model import ModelConfig
from config.schema import RunConfig
from inference.evaluate import score_dialogues, score_skills
from inference.generation.generator import Generator
from load_data.chat.chat_data import SKILL_WORD, VAL, ChatData, Sample, chosen_skills, prepare_chat
from load_data.chat.chat_loader import ChatLoader, count_eval_rows, eval_chat_batches
from load_data.skills import SFT_SKILLS
from load_data.tokenization.tokenizer import Tokenizer
from model.adapters import attach, put_on_codes, soft_tokens
from model.tinyseek import TinySeek
from train.engine.command import Command, chat_command, parse_command
from train.engine.trainer import Trainer
from train.engine.evaluation import Evaluation
from train.engine.language_model_loss import LanguageModelLoss
from train.engine.machine import Machine, start_machine
from train.engine.stage import LoaderSource, Stage
from utils import distributed
from utils.checkpoint import load_weights, weights_digest
from utils.errors import UserError

SCORED = 100  # items of each skill, before and after training
SCORED_DIALOGUES = 200  # held-out dialogues, before and after training


@dataclass
class Base:
    """The model that a stage starts from."""

    model: TinySeek
    tokenizer: Tokenizer
    record: dict  # its digest and path, for the checkpoints of an adapter


def open_base(command: Command, machine: Machine, adapted: bool = False) -> Base:
    """Load the model and the tokenizer of `--init`. If the model is to be `adapted`, its settings must be
    those that it was trained with: the checkpoint of an adapter does not hold them."""
    init, path = command.init, command.init_path
    command.init = None  # free the memory of the second copy
    tokenizer = Tokenizer.from_json(init["tokenizer"], str(path))
    config = command.config.model
    config.vocab_size = config.vocab_size or tokenizer.vocab_size
    if adapted:
        check_same_model(config, from_dict(init["config"], str(path)).model)
    check_length(command.config)
    model = TinySeek(config)
    load_weights(model, init["weights"], f"--init {path}")
    record = {"digest": weights_digest(init["weights"]), "path": str(path)}
    machine.say(f"base: {path} ({init.get('stage')}, weights {record['digest']})")
    return Base(model, tokenizer, record)


def check_length(config: RunConfig, prefix_length: int = 0) -> None:
    """Raise `UserError` if rows, after a learned prefix, need more positions than the model has."""
    length, places = config.data.sequence_length, config.model.max_position_embeddings
    if length + prefix_length > places:
        behind = f" behind a prefix of {prefix_length}" if prefix_length else ""
        raise UserError(
            f"data.sequence_length={length}{behind} is more than model.max_position_embeddings={places}: "
            "lower it" + (", or prefix.length" if prefix_length else "")
        )


def check_same_model(config: ModelConfig, trained: ModelConfig) -> None:
    """Raise `UserError` if a setting changes the output of the base."""
    free = {"vocab_size", "dropout", "attention_dropout", "router_jitter_noise", "attn_implementation"}
    free |= {"moe_implementation"}
    for name, value in asdict(config).items():
        if name not in free and value != getattr(trained, name):
            raise UserError(
                f"model.{name}={value} is not what the base was trained with ({getattr(trained, name)}), and "
                "an adapter fits its unchanged base only: leave it out, or change it with train/sft_train.py"
            )


def chat_source(samples: Sequence[Sample], tokenizer: Tokenizer, config, machine: Machine) -> LoaderSource:
    """Return the training data of a stage on `samples`, packed into rows."""
    train, world = config.train, machine.world
    steps = (train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed)
    rows = {"packing": config.data.packing, "pad_id": tokenizer.pad_id}
    return LoaderSource(ChatLoader(samples, config.data.sequence_length, *steps, **rows))


def dialogue_stage(
    name: str, short: str, base: Base, data: ChatData, config, machine: Machine, own: frozenset | None = None
) -> Stage:
    """Return a stage on dialogues that keeps the weights most confident on held-out answers.

    `own`: the weights of an adapter, which alone are trained and saved; None for all.
    """
    machine.say("\n".join(data.summary))
    length, size, packing = config.data.sequence_length, config.train.batch_size, config.data.packing
    held_out = partial(
        eval_chat_batches, data.val, length, size, rank=machine.world.rank, world_size=machine.world.size,
        packing=packing, pad_id=base.tokenizer.pad_id,
    )  # fmt: skip
    rows = count_eval_rows(data.val, length, packing)
    adapter = {} if own is None else {"trains": own.__contains__, "own": own, "base": base.record}
    return Stage(
        name=name, short=short, model=base.model,
        source=chat_source(data.train, base.tokenizer, config, machine),
        loss=LanguageModelLoss(base.model, config, machine),
        evaluate=Evaluation(held_out, rows, size, base.tokenizer, machine),
        tokenizer=base.tokenizer, data_digest=data.digest, keep_best="val_conf", **adapter,
    )  # fmt: skip


def train_adapter(name: str, short: str, description: str) -> None:
    """Run a stage that trains an adapter beside a frozen base, from its command line to its last line."""
    command = parse_command(name, short, description, bases=("SFT", "Pre"))
    config, machine = command.config, start_machine(command.config)
    base = open_base(command, machine, adapted=True)
    put_on_codes(base.model, short, config)
    own = attach(base.model, short, config)  # freezes everything else
    check_length(config, base.model.prefix_length)
    data = machine.read(prepare_chat, config, base.tokenizer, soft_tokens(short, config))
    stage = dialogue_stage(name, short, base, data, config, machine, own)
    train_and_score(stage, data, command, machine)
    machine.say(f"\nnext: {chat_command(short, command.out)}")
    distributed.finish()


def train_and_score(stage: Stage, data: ChatData, command: Command, machine: Machine) -> None:
    """Train, and score greedy answers to held-out questions before and after."""
    held_out = [*deque(data.dialogues(VAL), SCORED_DIALOGUES)]  # those of files are behind those of skills
    with distributed.all_or_none():
        before = scores(stage.presented.to(machine.device), data, held_out, command, machine)
    Trainer(stage, command.config, machine, command.out, command.resume).run()
    with distributed.all_or_none():
        after = scores(stage.presented, data, held_out, command, machine)
    if not after:  # not the first process, or nothing has one right answer
        return
    width = max(map(len, after))
    lines = [f"  {name:{width}} {before[name]:6.1f} -> {after[name]:5.1f}" for name in after]
    machine.say("\n".join(["correct answers to held-out questions, in percent, before -> after", *lines]))
    text = "".join(f"{name}  before={before[name]:.2f}  after={after[name]:.2f}\n" for name in after)
    (command.out / stage.name / "scores.txt").write_text(text, encoding="utf-8")


def scores(model, data: ChatData, held_out: list, command: Command, machine: Machine) -> dict[str, float]:
    """Return the percentage of correct answers, in the first process only.

    There is one for each skill, including those of `sft_train`, and one for held-out dialogues of files
    (`exact`, or `items` if answers are tables). They also chose the best weights, so trust a new file more.
    """
    if not machine.world.is_first:
        return {}
    generator, found = Generator(model, data.tokenizer.eos_id), {}
    skills = chosen_skills(command.config.data.paths)
    if skills:
        names = dict.fromkeys((*SFT_SKILLS, *skills))
        found = score_skills(generator, data.template, names, SCORED, command.config.data.val_fraction)
    if held_out and any(not path.startswith(SKILL_WORD) for path in command.config.data.paths):
        tables = all(messages[-1]["content"].startswith("|") for messages in held_out)
        for kind in ("exact", "items") if tables else ("exact",):
            found[kind] = score_dialogues(generator, data.template, held_out, kind, command.config.data)
    return {name: score.percent for name, score in found.items()}
