"""Train an embedding model: texts with similar meanings get vectors with similar directions.

    python train/embed_train.py                          docstrings and code of your Python, from scratch
    python train/embed_train.py --data pairs.jsonl       {"query", "positive"}, with "negatives" or without
    python train/embed_train.py --init out/TinySeek_MLM_final.pkl --set embed.words=false
    python train/embed_train.py --config decoder --init out/TinySeek_Pre_final.pkl --out out/decoder
    python inference/search.py "how are checkpoints written"

What makes this stage: its data are pairs of a query and its document (load_data/embed_data.py); its loss is
InfoNCE over all pairs of a step (train/engine/contrastive_loss.py); its model is an encoder, or the decoder
of `--init`, with a pooling, and all its weights are trainable; it saves the last weights.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from functools import partial

import utils  # noqa: F401  sets how threads wait; must precede torch
from inference.generation.load import model_section
from load_data.embed_data import prepare_embedding
from load_data.embed_loader import EmbedLoader, eval_pairs
from load_data.tokenization.tokenizer import Tokenizer
from model.embedder import Embedder
from train.engine.command import chat_command, parse_command
from train.engine.contrastive_loss import ContrastiveLoss, EmbedSource
from train.engine.machine import start_machine
from train.engine.masked_stage import freeze_key_biases
from train.engine.retrieval import RetrievalEvaluation
from train.engine.stage import Stage
from train.engine.trainer import Trainer
from utils.checkpoint import latest_checkpoint, load_checkpoint, load_weights
from utils.distributed import finish
from utils.errors import UserError, run_main

STAGE, SHORT = "embed_train", "Embed"


def main():
    """Train an embedding model on pairs."""
    command = parse_command(STAGE, SHORT, __doc__, sections=("encoder", "model"))
    config, machine = command.config, start_machine(command.config)
    newest = latest_checkpoint(command.out, SHORT) if command.resume else None
    begun = load_checkpoint(newest) if newest else command.init or {}
    tokenizer = Tokenizer.from_json(begun["tokenizer"], str(newest)) if begun else None
    data = machine.read(prepare_embedding, config, tokenizer)
    machine.say("\n".join(data.summary))
    model = build_model(command, data.tokenizer)
    train, world, pad_id = config.train, machine.world, data.tokenizer.pad_id
    loader = EmbedLoader(data.train, train.batch_size, train.accumulation_steps, world.rank, world.size,
                         train.seed, pad_id=pad_id)  # fmt: skip
    held_out = partial(eval_pairs, data.val, train.batch_size, rank=world.rank, world_size=world.size,
                       pad_id=pad_id)  # fmt: skip
    loss = ContrastiveLoss(config.embed, machine)
    stage = Stage(
        name=STAGE, short=SHORT, model=model, source=EmbedSource(loader), loss=loss,
        evaluate=RetrievalEvaluation(held_out, len(data.val.queries), train.batch_size, loss, machine),
        tokenizer=data.tokenizer, data_digest=data.digest,
        trains=freeze_key_biases(model),
    )  # fmt: skip
    found = Trainer(stage, config, machine, command.out, command.resume).run()
    machine.say(f"of {len(data.val.queries):,} held-out queries, {found['val_recall10']:.1%} find their "
                f"document among the first ten; mean reciprocal rank {found['val_mrr']:.3f}")  # fmt: skip
    machine.say(f'\nnext: {chat_command(SHORT, command.out)} "how are checkpoints written" train/engine')
    finish()


def build_model(command, tokenizer: Tokenizer) -> Embedder:
    """Return the model of the run; its body takes the weights of `--init`, if there is one."""
    config, init = command.config, command.init
    if init:
        config.embed.base = "decoder" if model_section(init) == "model" else "encoder"
    section = "encoder" if config.embed.base == "encoder" else "model"
    shape, pooling = getattr(config, section), config.embed.pooling
    if (section, pooling) == ("model", "cls"):
        raise UserError("embed.pooling=cls takes the first token, and that of a decoder has seen no other: "
                        "set embed.pooling=last or mean")  # fmt: skip
    shape.vocab_size = shape.vocab_size or tokenizer.vocab_size
    if max(config.embed.matryoshka or [0]) > shape.hidden_size:
        raise UserError(f"embed.matryoshka={config.embed.matryoshka} goes beyond {section}.hidden_size="
                        f"{shape.hidden_size}, the width of the vectors: leave the larger ones out")
    longest = max(config.embed.query_length, config.embed.document_length)
    if shape.max_position_embeddings < longest:
        raise UserError(f"{section}.max_position_embeddings={shape.max_position_embeddings} is less than the "
                        f"{longest} tokens of a text: lower embed.query_length and embed.document_length")
    if shape.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{section}.vocab_size={shape.vocab_size} is less than the {tokenizer.vocab_size} "
                        "tokens of the tokenizer: leave it out")  # fmt: skip
    model = Embedder.from_config(config.embed, shape)
    if init:
        names = ((name.removeprefix("body.").removeprefix("model."), name) for name in init["weights"])
        own = model.state_dict()
        weights = {f"body.{new}": init["weights"][name] for new, name in names if f"body.{new}" in own}
        if model.query is not None:  # that of another embedding model, or zeros
            weights["query"] = init["weights"].get("query", model.query.detach())
        load_weights(model, weights, str(command.init_path))
    return model


if __name__ == "__main__":
    run_main(main)
