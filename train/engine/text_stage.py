"""Shared by the stages that learn from plain text: its tokens, windows of one long row of them, and their
score."""

from collections.abc import Sequence

from load_data.loader import TokenLoader
from load_data.packing import PretrainData, prepare_pretraining
from load_data.tokenization.tokenizer import Tokenizer
from model.tinyseek import TinySeek
from train.engine.command import Command
from train.engine.evaluation import text_evaluation
from train.engine.language_model_loss import LanguageModelLoss
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Stage
from utils.checkpoint import latest_checkpoint, load_checkpoint
from utils.cost import cost_card
from utils.errors import UserError


def open_text(
    command: Command, machine: Machine, section: str = "model", special: Sequence[str] = ()
) -> PretrainData:
    """Return the tokens of a run, with the special tokens `special` among them, and say what they are. The
    vocabulary of the model, whose settings are in `section`, becomes that of the tokenizer if it is not set.
    """
    newest = latest_checkpoint(command.out, command.short) if command.resume else None
    begun = load_checkpoint(newest) if newest else command.init or {}
    # A run goes on with the tokenizer it began with: one trained today may have other special tokens.
    tokenizer = Tokenizer.from_json(begun["tokenizer"], str(newest)) if begun.get("tokenizer") else None
    data = machine.read(prepare_pretraining, command.config, tokenizer, special)
    machine.say("\n".join(data.summary))
    shape, needed = getattr(command.config, section), data.tokenizer.vocab_size
    shape.vocab_size = shape.vocab_size or needed
    if shape.vocab_size < needed:
        raise UserError(
            f"{section}.vocab_size={shape.vocab_size} is less than the {needed} tokens of the tokenizer: "
            "leave it out, or set it to at least that"
        )
    return data


def text_stage(name: str, short: str, model: TinySeek, data: PretrainData, config, machine: Machine) -> Stage:
    """Return a stage that trains all of `model` on every token of `data`, and print what it costs."""
    train, world, length = config.train, machine.world, config.data.sequence_length
    loader = TokenLoader(
        data.train, length, train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed,
        config.data.start_length,
    )  # fmt: skip
    tokens, optimizer, device = train.batch_size * length, config.optim.optimizer, machine.device.type
    card = cost_card(model, tokens, length, optimizer, machine.dtype, device, train.gradient_checkpointing)
    machine.say("\n".join(card.lines()))
    return Stage(
        name=name, short=short, model=model, source=LoaderSource(loader),
        loss=LanguageModelLoss(model, config, machine),
        evaluate=text_evaluation(data.val, data.tokenizer, length, train.batch_size, machine),
        tokenizer=data.tokenizer, data_digest=data.digest,
    )  # fmt: skip
