"""Score a model: the share of right answers to held-out questions.

    python inference/evaluate.py                         every skill of fine-tuning, the latest model in out/
    python inference/evaluate.py --skills arithmetic,lists --count 500
    python inference/evaluate.py --data dialogues.jsonl --score items
    python inference/evaluate.py --adapter out/TinySeek_Lora_final.pkl     a base with an adapter

Answers are greedy. Each skill judges its own answers, most of them by equality. Answers to held-out
dialogues must equal the true ones (`exact`), or, where an answer is a table `|name|amount|note|name|...|`,
its items are compared (`items`, see `table_items`). `tokens` is what the model wrote for an answer, thoughts
and calls included. The last line is for programs: `skill=percent` for each.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.conversation import prompt_within
from inference.generation.exchange import PLAIN, Exchange, Request, respond
from inference.generation.generator import Generator
from inference.generation.load import DEFAULT_OUT, Loaded, load_adapter, load_base
from inference.generation.sampling import SamplingParams
from inference.generation.terminal import closed_pipe_ends, open_streams, tell
from config.schema import DataConfig
from load_data.chat.chat_data import split_dialogues
from load_data.chat.records import scored_answers
from load_data.skills import HELD_OUT, SFT_SKILLS, SKILLS, is_right, scored_items, skill_named
from load_data.corpora.sources import VAL
from model.caches import KV_KINDS
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

BATCH = 50  # questions that are answered together
CALL_LENGTH = 64  # tokens that an answer with a call may take
COLUMNS = 3  # of a table: name, amount, note
DATA = "data"  # the name of the score of held-out dialogues


@dataclass(frozen=True)
class Score:
    """The result of one set of questions. With `items`, the items of tables are counted, not the answers."""

    right: int
    of: int  # the number of expected answers or items
    percent: float  # the share of right answers, or the F1 of the items (extra items lower it too)
    wrong: tuple[str, str, str] | None  # the first wrong answer: question, answer, expected answer
    tokens: float = field(default=0.0, compare=False)  # that the model wrote, mean over the answers


def score_skills(
    generator,
    template,
    names: Iterable[str],
    count: int = 100,
    val_fraction: float = HELD_OUT,
    request: Request = PLAIN,
) -> dict[str, Score]:
    """Return the score of each skill in `names` on `count` test items, or on all if it has fewer.

    `template` is a `ChatTemplate`, `val_fraction` what the model's training held out, `request` whether it
    may think and use tools. Raises `UserError` for an unknown skill.
    """
    scores = {}
    for name in names:
        items = scored_items(name, count, 0, val_fraction)
        tasks = [(item.messages, item.expected) for item in items]
        answers = greedy_answers(generator, template, tasks, request)
        judged = [(is_right(item, text_of(one)), 1, 1) for item, one in zip(items, answers, strict=True)]
        scores[name] = total(tasks, answers, judged)
    return scores


def score_dialogues(
    generator, template, dialogues: Iterable[list[dict]], score: str = "exact", data: DataConfig | None = None
) -> Score:
    """Return the score on dialogues. Each answer to a question that `data` holds out (None: each answer) is
    predicted from the true turns before it.

    score: `exact`, or `items` for the F1 of the items of tables, over all answers together.
    """
    rule = (data.val_fraction, data.same_question) if data else (1.0, "exact")
    tasks = [
        (messages[:turn], messages[turn]["content"])
        for messages in dialogues
        for turn in scored_answers(messages, *rule)
    ]
    answers, judged = greedy_answers(generator, template, tasks), []
    for (_, expected), one in zip(tasks, answers, strict=True):
        answer = text_of(one)
        if score == "exact":
            judged.append((answer.strip() == expected.strip(), 1, 1))
        else:
            found, true = table_items(answer), table_items(expected)
            judged.append(((found & true).total(), found.total(), true.total()))
    return total(tasks, answers, judged)


def greedy_answers(
    generator, template, tasks: list[tuple[list[dict], str]], request: Request = PLAIN
) -> list[Exchange]:
    """Return what follows each (messages, expected answer), computed in batches.

    The expected answer only saves time: a batch holds questions with answers of similar length, and an answer
    that reaches 1.5 times the expected length is cut, because it is already wrong.
    """
    tokenizer = template.tokenizer
    lengths = [len(tokenizer.encode(expected)) for _, expected in tasks]
    order = sorted(range(len(tasks)), key=lambda number: lengths[number])
    answers = [None] * len(tasks)
    for first in range(0, len(order), BATCH):
        batch = order[first : first + BATCH]
        longest = 16 + lengths[batch[-1]] * 3 // 2 + (request.budget or 0) + CALL_LENGTH * request.tools
        params = SamplingParams(temperature=0, max_new_tokens=longest)
        room, think = generator.room(longest), request.thinking
        prompts = [prompt_within(template, tasks[number][0], room, think) for number in batch]
        written = respond(generator, template, prompts, params, request)
        for number, exchange in zip(batch, written, strict=True):
            answers[number] = exchange
    return answers


def text_of(one: Exchange) -> str:
    """Return the answer at the end of an exchange; a result of a tool, after which the context was full, is
    none."""
    last = one.messages[-1]
    return last["content"] if last["role"] == "assistant" else ""


def total(tasks, answers: list[Exchange], judged: list[tuple[int, int, int]]) -> Score:
    """Return the score of all answers, from (right, given, expected) items of each.

    The F1, 2 right / (given + expected), is the share of right answers where each answer is one item.
    """
    right, given, wanted = map(sum, zip((0, 0, 0), *judged, strict=True))
    cases = zip(tasks, answers, judged, strict=True)
    cases = [case[:2] for case in cases if len({*case[2]}) > 1]
    wrong = [(task[0][-1]["content"], text_of(one), task[1]) for task, one in cases]
    tokens = sum(sum(one.own) for one in answers) / max(len(answers), 1)
    return Score(right, wanted, 200 * right / max(given + wanted, 1), wrong[0] if wrong else None, tokens)


def table_items(text: str) -> Counter:
    """Return the items of `|name|amount|note|name|...|`.

    Cells left over at the end make one shorter item. It equals no whole item, so it counts as wrong unless
    the other table ends in the same way.
    """
    inner = text.strip().removeprefix("|").removesuffix("|")
    cells = [cell.strip() for cell in inner.split("|")] if inner else []
    return Counter(tuple(cells[first : first + COLUMNS]) for first in range(0, len(cells), COLUMNS))


def report(scores: dict[str, Score]) -> str:
    """Return a table for people, and a last line for programs."""
    lines = [f"{'skill':12} {'right':>6} {'of':>6} {'percent':>8} {'tokens':>7}  a wrong answer"]
    for name, score in scores.items():
        line = f"{name:12} {score.right:6} {score.of:6} {score.percent:8.1f} {score.tokens:7.1f}"
        if score.wrong:
            short = (text if len(text) <= 48 else text[:45] + "..." for text in score.wrong)
            line += "  {!r} -> {!r}, not {!r}".format(*short)
        lines.append(line)
    return "\n".join([*lines, " ".join(f"{name}={score.percent:.2f}" for name, score in scores.items())])


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    add("--adapter", metavar="FILE", help="score the base with this result of lora_train, ..")
    add("--skills", metavar="A,B", help=f"some of {','.join(SKILLS)} (default: those of fine-tuning)")
    add("--data", nargs="+", default=[], metavar="FILE", help="score the held-out dialogues of these files")
    add("--count", type=int, default=100, metavar="N", help="questions for each score (default: %(default)s)")
    add("--score", choices=("exact", "items"), default="exact", help="the rule for answers of --data")
    add("--think", action="store_true", help="let the model think before it answers")
    add("--think-budget", type=int, default=64, metavar="N", help="tokens of thinking (default: %(default)s)")
    add("--tools", action="store_true", help="let the model call a calculator and look up docstrings")
    add("--kv-cache", choices=KV_KINDS, default="full", help="int8 or int4: past tokens in less memory")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    if args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    args.skills = args.skills.split(",") if args.skills else [] if args.data else SFT_SKILLS
    for name in args.skills:
        skill_named(name)  # reports an unknown one before anything is loaded
    return args


def held_out(paths: list[str], loaded: Loaded, count: int) -> list[list[dict]]:
    """Return the first `count` held-out dialogues of files, by the split that `loaded` was trained with
    (for an adapter: that of the adapter)."""
    data = replace(loaded.config.data, paths=paths)
    split = split_dialogues(data, [])
    dialogues = list(islice((messages for side, messages in split if side == VAL), count))
    if not dialogues:
        raise UserError(f"--data {' '.join(paths)}: no dialogue in it is held out; give more dialogues")
    return dialogues


@closed_pipe_ends()
def main():
    """Load the model, score it, and print the report."""
    open_streams()
    args = parse_command()
    device = pick_device(args.device)
    set_threads()
    loaded = load_base(args.checkpoint, device, args.out, args.adapter, tell=tell)
    if args.adapter:
        loaded = load_adapter(args.adapter, loaded)
    tell(f"{loaded.path} ({loaded.about['stage']}, {device})")
    generator = Generator(loaded.model, loaded.tokenizer.eos_id, kv_cache=args.kv_cache)
    rule = loaded.config.data
    request = Request(args.think, args.think_budget if args.think else None, args.tools, rule.val_fraction)
    scores = score_skills(generator, loaded.template, args.skills, args.count, rule.val_fraction, request)
    if args.data:
        dialogues = held_out(args.data, loaded, args.count)
        scores[DATA] = score_dialogues(generator, loaded.template, dialogues, args.score, rule)
    print(report(scores))


if __name__ == "__main__":
    run_main(main)
