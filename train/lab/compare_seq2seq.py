"""Compare an encoder-decoder with a decoder of the same size: same task, same pairs, same seconds.

    python train/lab/compare_seq2seq.py                                  lists, from scratch
    python train/lab/compare_seq2seq.py --task docstrings --seconds 240

The decoder reads `source <extra_id_0> target`, several pairs to a row that do not see each other, and only
targets have labels. It has as many layers as encoder and decoder together, as wide, and the parameters of
cross attention go to its feed-forward: both have equally many. A pair costs it about twice as much, since all
its layers see all tokens. Both have the optimizer of the task's preset, keep the weights that are most
confident on held-out pairs, and are scored by greedy answers to other held-out pairs.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import utils  # noqa: F401  sets how threads wait; must precede torch
import numpy as np

from config.load import load_config, preset_names
from config.model import ModelConfig
from config.schema import RunConfig
from config.seq2seq import Seq2SeqConfig
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from inference.seq2seq import written
from load_data.chat.chat_data import Sample
from load_data.chat.chat_loader import count_eval_rows, eval_chat_batches
from load_data.packing import prepare_pretraining
from load_data.seq2seq import Pair, Seq2SeqLoader
from load_data.skills.common import TEST, TRAIN, VAL
from load_data.spans import sentinel_ids
from load_data.task_pairs import TaskPairs, prepare_task
from load_data.tokenization.tokenizer import SENTINELS, Tokenizer
from model.encoder_decoder import EncoderDecoder
from model.tinyseek import TinySeek
from train.engine.evaluation import Evaluation
from train.engine.fine_tuning import chat_source
from train.engine.language_model_loss import LanguageModelLoss
from train.engine.machine import Machine, start_machine
from train.engine.seq2seq_stage import score, seq2seq_stage
from train.engine.stage import Stage
from train.engine.trainer import Trainer
from utils.device import seed_everything
from utils.errors import Parser, UserError, run_main

ROOT = Path(__file__).resolve().parents[2]
ROW = 256  # tokens in a row of the decoder, at least


def main():
    """Train and score both, and print a table."""
    parser = Parser(__doc__)
    add = parser.add_argument
    tasks = [name for name in preset_names("span_train") if name != "default"]
    add("--task", choices=tasks, default="lists", help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    add("--seconds", type=int, default=120, metavar="S", help="of each training (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help="a new folder (default: out/seq2seq_TASK)")
    add("--set", action="append", default=[], metavar="section.key=value", dest="settings",
        help="a setting of all runs; may be repeated")  # fmt: skip
    args = parser.parse_args()
    out = args.out or ROOT / "out" / f"seq2seq_{args.task}"
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"--out {out} exists: name a new folder")
    limits = {"train": {"max_seconds": args.seconds, "max_steps": None}}
    config = load_config(args.task, args.settings, flags=limits, stage="span_train")
    machine = start_machine(config)
    tokenizer = machine.read(prepare_pretraining, config, None, SENTINELS).tokenizer
    data = machine.read(prepare_task, config, tokenizer)
    machine.say("\n".join(data.summary))
    config.seq2seq.vocab_size = tokenizer.vocab_size
    config.model = decoder_like(config.seq2seq, config)
    found = {name: [] for name in RUNS}
    for seed in args.seeds:
        for name, make in RUNS.items():
            config.train.seed = seed
            seed_everything(seed)
            stage, write = make(data, config, machine)
            machine.say(f"\n{name}, seed {seed}")
            trainer = Trainer(stage, config, machine, out / name / f"seed{seed}")
            trainer.run()
            answers, right = (map(tokenizer.decode, some) for some in (write(), targets(data, tokenizer)))
            scores = score([*answers], [*right]) | {"steps": trainer.step}
            machine.say("  ".join(f"{key}={value:.2f}" for key, value in scores.items()))
            size = sum(parameter.numel() for parameter in stage.model.parameters())
            found[name].append(scores | {"parameters": size})
    (out / "table.md").write_text(table(found), encoding="utf-8")
    print(f"\n{table(found)}\nsaved {out / 'table.md'}")


def decoder_like(shape: Seq2SeqConfig, config: RunConfig) -> ModelConfig:
    """Return the shape of a decoder with as many parameters, gains aside."""
    layers = shape.num_hidden_layers + shape.num_decoder_layers
    inner = shape.num_attention_heads * shape.head_dim
    crossing = 4 * inner * shape.num_decoder_layers  # rows of C numbers in the matrices of cross attention
    return ModelConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, num_hidden_layers=layers,
        num_attention_heads=shape.num_attention_heads, num_key_value_heads=shape.num_attention_heads,
        head_dim=shape.head_dim, intermediate_size=shape.intermediate_size + crossing // (3 * layers),
        max_position_embeddings=config.data.sequence_length + config.span.target_length,
        tie_word_embeddings=shape.tie_word_embeddings, zero_init_residual=True,
    )  # fmt: skip


def targets(data: TaskPairs, tokenizer: Tokenizer) -> list[list[int]]:
    """Return the targets to score, without their ends."""
    ends = {*tokenizer.eos_ids, *tokenizer.finish}
    return [[one for one in pair.target if one not in ends] for pair in data.sides[TEST]]


def encoder_decoder(data: TaskPairs, config: RunConfig, machine: Machine):
    """Return the stage of train/span_train.py, and a function that answers the sources to score."""
    train, tokenizer, model = config.train, data.tokenizer, EncoderDecoder(config.seq2seq)
    loader = Seq2SeqLoader(
        data.sides[TRAIN], train.batch_size, train.accumulation_steps, seed=train.seed,
        pad_id=tokenizer.pad_id, start_id=config.seq2seq.decoder_start_token_id,
    )  # fmt: skip
    stage = seq2seq_stage(
        "span_train", "Span", model, loader, data.sides[VAL], tokenizer, config, machine,
        data_digest=data.digest, keep_best="val_conf",
    )  # fmt: skip
    sources, params = [pair.source for pair in data.sides[TEST]], limited(config)
    return stage, lambda: written(model, tokenizer, sources, params)


def decoder(data: TaskPairs, config: RunConfig, machine: Machine):
    """Return the same for a decoder: its rows hold about as many pairs as a batch of the other."""
    tokenizer, model = data.tokenizer, TinySeek(config.model)
    separator = sentinel_ids(tokenizer)[0]
    train, val = ([as_row(pair, separator) for pair in data.sides[side]] for side in (TRAIN, VAL))
    longest = max(len(sample.ids) - 1 for sample in train + val)
    mean = sum(len(sample.ids) for sample in train) / len(train)
    length = max(ROW, longest)
    rows = max(1, round(config.train.batch_size * mean / length))
    config = replace(config, data=replace(config.data, sequence_length=length),
                     train=replace(config.train, batch_size=rows))  # fmt: skip
    packed = {"packing": True, "pad_id": tokenizer.pad_id}
    batches = partial(eval_chat_batches, val, length, rows, **packed)
    stage = Stage(
        name="decoder", short="Decoder", model=model, source=chat_source(train, tokenizer, config, machine),
        loss=LanguageModelLoss(model, config, machine),
        evaluate=Evaluation(batches, count_eval_rows(val, length), rows, tokenizer, machine),
        tokenizer=tokenizer, data_digest=data.digest, keep_best="val_conf",
    )  # fmt: skip
    prompts = [[*pair.source, separator] for pair in data.sides[TEST]]

    def write():
        generator, ends = Generator(model), {*tokenizer.eos_ids, *tokenizer.finish}
        answers = generator.generate(prompts, limited(config), ends)
        return [[one for one in answer if one not in ends] for answer in answers]

    return stage, write


RUNS = {"encoder-decoder": encoder_decoder, "decoder": decoder}


def as_row(pair: Pair, separator: int) -> Sample:
    """Return source, separator and target as one text, of which the target is supervised."""
    ids = np.array([*pair.source, separator, *pair.target], dtype=np.int32)
    return Sample(ids, np.arange(len(ids)) > len(pair.source))


def limited(config: RunConfig) -> SamplingParams:
    """Return greedy sampling of at most a target."""
    return SamplingParams(temperature=0, max_new_tokens=config.span.target_length)


def table(found: dict[str, list[dict]]) -> str:
    """Return a row for each model: medians over the seeds, with ranges."""
    lines = ["| model | parameters | steps | exact match, % | ROUGE-L, % |", "| --- |" + " ---: |" * 4]
    for name, runs in found.items():
        cells = [cell([run[key] for run in runs]) for key in ("exact", "rouge_l")]
        steps = median(run["steps"] for run in runs)
        lines.append(f"| {name} | {runs[0]['parameters']:,} | {steps:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(values: list[float]) -> str:
    """Return the median, and the range in brackets."""
    middle = f"{median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    run_main(main)
