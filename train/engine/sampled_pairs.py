"""The pairs of a preference stage: those of files, and those that a model makes of its own answers.

For each question of a skill the model samples some answers, and the skill's verifier says which are right. A
pair is a right answer (chosen) and a wrong one (rejected) to the same question; each distinct wrong answer is
in one pair. Questions whose answers are all right, or all wrong, teach nothing here. Both answers are the ids
that were sampled, so no token is one that the model would not have written. A right answer has ended by
itself; a wrong one may have been cut, and then has no end marker.

Pairs are made once, by the first process, before training; a folder of the cache keeps them for a resumed run
and for other runs from the same model.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path

from tqdm import tqdm

from config.schema import RunConfig
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from load_data.chat.chat_data import chosen_files, chosen_skills
from load_data.chat.chat_template import ChatTemplate
from load_data.chat.pairs import Pair, PairData, file_pairs, fit_pair, open_pairs, write_pairs
from load_data.corpora.documents import skipped_lines
from load_data.corpora.sources import PYTHON, TRAIN, VAL, Sources
from load_data.packing import REPOSITORY, prepared_folder
from load_data.skills import Item, as_turn, distinct_samples
from load_data.skills.verifiers import verify
from train.engine.fine_tuning import Base

QUESTIONS = 32  # that are answered together
HELD_OUT_SHARE = 8  # one held-out question for this many questions to train on


def prepare_pairs(config: RunConfig, base: Base, machine) -> PairData:
    """Return the pairs that `config.data` names, made now or cached."""
    data, names = config.data, chosen_skills(config.data.paths)
    template = ChatTemplate(base.tokenizer, data.template, 0, config.model.vocab_size)
    files = [str(file) for file in chosen_files(data.paths)]
    files += [PYTHON] * ("docstrings" in names)  # this skill asks about the library
    decides = [Sources(replace(data, paths=files)).fingerprint, base.tokenizer.digest, template.before]
    decides += [data.sequence_length, names] + ["own"] * (template.kind == "own")
    if names:
        decides += [base.record["digest"], asdict(config.pairs), config.train.seed]
    folder = REPOSITORY / data.cache_dir
    folder = prepared_folder(folder, "pairs", decides, write_folder, config, template, names, base, machine)
    return open_pairs(folder, template)


def write_folder(folder: Path, config: RunConfig, template: ChatTemplate, names, base: Base, machine) -> None:
    """Write the pairs of the skills `names` and those of the files."""
    sides, skipped, data, too_long = {TRAIN: [], VAL: []}, [], config.data, 0
    summary = [f"{file}: {file.stat().st_size:,} bytes" for file in chosen_files(data.paths)]
    if names:
        generator = Generator(base.model.to(machine.device), base.tokenizer.eos_id)
        for side in sides:
            items = list(questions(config, names, side, config.pairs.prompts))
            tell = {"desc": f"sampling answers ({side})", "leave": False, "disable": None}
            pairs = [*tqdm(sampled_pairs(generator, template, items, config), **tell, unit=" pairs")]
            sides[side] += [pair for _, pair in pairs]
            mixed = len({id(item) for item, _ in pairs})
            summary.append(f"{side}: {len(items):,} questions of {', '.join(names)}, {config.pairs.samples} "
                           f"answers each; {mixed:,} have right and wrong ones")  # fmt: skip
    for side, pair in file_pairs(data, template, skipped):
        too_long += pair is None
        sides[side] += [pair] if pair else []
    summary += skipped_lines(skipped)
    if too_long:
        summary.append(f"left out: {too_long:,} pairs with too long an answer for data.sequence_length")
    write_pairs(folder, sides, data, template, summary)


def questions(config: RunConfig, names: list[str], side: str, wanted: int) -> Iterator[Item]:
    """Yield distinct questions of one side, the same number from each skill: `wanted` to train on."""
    data, wanted = config.data, min(wanted, config.data.limit or wanted)
    count = -(-wanted // (len(names) * (HELD_OUT_SHARE if side == VAL else 1)))  # rounded up
    for name in names:
        for sample in distinct_samples(name, side, count, config.train.seed, data.val_fraction):
            yield Item(name, as_turn(sample)[:1], sample.answer)


def sampled_pairs(
    generator: Generator, template: ChatTemplate, items: list[Item], config: RunConfig
) -> Iterator[tuple[Item, Pair]]:
    """Yield pairs of sampled answers to `items`, each with its item."""
    settings, stop_ids = config.pairs, template.stop_ids
    params = SamplingParams(settings.temperature, max_new_tokens=settings.max_new_tokens)
    for first in range(0, len(items), QUESTIONS):
        batch = items[first : first + QUESTIONS]
        prompts = [template.prompt(item.messages) for item in batch]
        seeds = [row_seed(config.train.seed, first + place, sample)
                 for place in range(len(batch)) for sample in range(settings.samples)]  # fmt: skip
        answers = generator.generate(prompts, params, stop_ids, samples=settings.samples, seeds=seeds)
        for place, item in enumerate(batch):
            group = answers[place * settings.samples : (place + 1) * settings.samples]
            for chosen, rejected in contrasted(item, group, template):
                pair = fit_pair(template, item.messages, [chosen, rejected], config.data.sequence_length)
                if pair:
                    yield item, pair


def contrasted(item: Item, answers: list, template: ChatTemplate) -> list[tuple[list[int], list[int]]]:
    """Return each distinct wrong answer with a right one, the distinct right ones in turn."""
    right, wrong = {}, {}  # keep the order
    for answer in answers:
        ended = answer.finish_reason == "stop"
        fine = ended and verify(item, template.tokenizer.decode(answer))
        (right if fine else wrong)[tuple(answer)] = None
    return [(list(chosen), list(rejected)) for rejected, chosen in zip(wrong, cycle(right))] if right else []
