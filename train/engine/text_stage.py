"""Shared by the stages that learn from plain text: windows of one long row of tokens, and their score."""

from load_data.loader import TokenLoader
from load_data.packing import PretrainData
from model.tinyseek import TinySeek
from train.engine.evaluation import text_evaluation
from train.engine.language_model_loss import LanguageModelLoss
from train.engine.machine import Machine
from train.engine.stage import LoaderSource, Stage
from utils.cost import cost_card


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
