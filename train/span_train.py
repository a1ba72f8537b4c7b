"""Train an encoder-decoder (T5) to write the spans that are missing from a text, then to do a task.

    python train/span_train.py                           spans of the standard library of your Python
    python train/span_train.py --data book.txt           spans of your own text
    python train/span_train.py --config lists            the things in a sentence, as a list
    python train/span_train.py --config docstrings --init out/TinySeek_Span_final.pkl
    python inference/seq2seq.py --prompt "def <extra_id_0>(self):"

What makes this stage: its data are pairs of a source and a target, windows of text with spans taken out
(load_data/spans.py) or tasks (load_data/task_pairs.py); its loss is the cross-entropy of the targets; all
parameters are trainable; it saves the last weights, or for a task those that did best on held-out pairs.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import utils  # noqa: F401  sets how threads wait; must precede torch
from inference.generation.sampling import SamplingParams
from inference.seq2seq import written
from load_data.seq2seq import Seq2SeqLoader
from load_data.skills.common import TEST, TRAIN, VAL
from load_data.spans import SpanLoader, SpanPairs, exact_share, sentinel_ids
from load_data.task_pairs import prepare_task
from load_data.tokenization.tokenizer import SENTINELS
from model.encoder_decoder import EncoderDecoder
from train.engine.command import chat_command, parse_command
from train.engine.machine import start_machine
from train.engine.seq2seq_stage import score, seq2seq_stage
from train.engine.text_stage import open_text
from train.engine.trainer import Trainer
from utils.checkpoint import load_weights
from utils.distributed import finish
from utils.errors import run_main

STAGE, SHORT = "span_train", "Span"
SHOWN = 3  # held-out answers, printed after training
SCORED = 100  # held-out windows whose gaps are filled
PROMPTS = {  # what to try a model of each task with
    "spans": "import <extra_id_0>", "lists": "Please buy milk and eggs.",
    "docstrings": "def add(a, b): return a + b",
}  # fmt: skip


def main():
    """Train a model on spans or on a task, then show what it writes."""
    command = parse_command(STAGE, SHORT, __doc__, sections=("seq2seq",))
    config, machine = command.config, start_machine(command.config)
    text, task = open_text(command, machine, "seq2seq", SENTINELS), None
    config.seq2seq.check()  # once more, now that the size of the vocabulary is known
    if config.span.task != "spans":
        task = machine.read(prepare_task, config, text.tokenizer)
        machine.say("\n".join(task.summary))
    model = EncoderDecoder(config.seq2seq)
    if command.init:
        load_weights(model, command.init["weights"], "--init")
    loader, held_out, shown = task_data(task, config, machine) if task else span_data(text, config, machine)
    stage = seq2seq_stage(
        STAGE, SHORT, model, loader, held_out, text.tokenizer, config, machine,
        data_digest=(task or text).digest, keep_best="val_conf" if task else None,
    )  # fmt: skip
    Trainer(stage, config, machine, command.out, command.resume).run()
    if machine.world.is_first:
        show(model, shown, text.tokenizer, command, bool(task))
    finish()


def span_data(text, config, machine):
    """Return the loader, the held-out pairs, and those to show."""
    train, world, length = config.train, machine.world, config.data.sequence_length
    pairs, held_out = (SpanPairs(tokens, length, config.span, text.tokenizer, seed)
                       for tokens, seed in ((text.train, train.seed), (text.val, 0)))  # fmt: skip
    loader = SpanLoader(
        pairs, train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed,
        start_length=config.data.start_length, start_id=config.seq2seq.decoder_start_token_id,
    )  # fmt: skip
    count = min(SCORED, len(held_out))
    return loader, held_out, [held_out[len(held_out) * part // count] for part in range(count)]


def task_data(task, config, machine):
    """Return the same for a task: those to show are those to score."""
    train, world = config.train, machine.world
    loader = Seq2SeqLoader(
        task.sides[TRAIN], train.batch_size, train.accumulation_steps, world.rank, world.size, train.seed,
        pad_id=task.tokenizer.pad_id, start_id=config.seq2seq.decoder_start_token_id,
    )  # fmt: skip
    return loader, task.sides[VAL], task.sides[TEST]


def show(model, pairs, tokenizer, command, scored: bool):
    """Print what the model writes about some held-out sources, and the score of all of them."""
    params = SamplingParams(temperature=0, max_new_tokens=command.config.span.target_length)
    ends = {*tokenizer.eos_ids, *tokenizer.finish}
    answers = written(model, tokenizer, [pair.source for pair in pairs], params)
    targets = [[one for one in pair.target if one not in ends] for pair in pairs]
    share = 0 if scored else exact_share(answers, targets, sentinel_ids(tokenizer))
    spelled = lambda ids: tokenizer.decode(ids, skip_special=False)  # noqa: E731
    answers, targets = [*map(spelled, answers)], [*map(spelled, targets)]
    for pair, answer, target in [*zip(pairs, answers, targets, strict=True)][:: -(-len(pairs) // SHOWN)]:
        print(f"\n--- source ---\n{spelled(pair.source)}")
        print(f"--- target ---\n{target}\n--- written ---\n{answer}")
    if scored:
        line = "  ".join(f"{name}={value:.2f}" for name, value in score(answers, targets).items())
        print(f"\n{len(pairs)} held-out sources, in percent: {line}")
        (command.out / STAGE / "scores.txt").write_text(line + "\n", encoding="utf-8")
    else:
        print(f"\n{share:.1%} of the gaps in {len(pairs)} held-out windows are filled exactly")
    print(f'\nnext: {chat_command(SHORT, command.out)} --prompt "{PROMPTS[command.config.span.task]}"')


if __name__ == "__main__":
    run_main(main)
