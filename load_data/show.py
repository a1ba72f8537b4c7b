"""Show dialogues as a model sees them in training: their text, ids, and supervised tokens.

    python load_data/show.py                                     three dialogues of the embedded skills
    python load_data/show.py --data my.jsonl --index 0 17        some of your own
    python load_data/show.py --packed                            a row of several dialogues, as in training
    python load_data/show.py --template chatml

Supervised tokens are green in a terminal and in ⟦brackets⟧ elsewhere. The table has one line per position
of the row: the model predicts the label from the input token there and those before it in the same dialogue.
The loss ignores labels of -100.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import itertools
import unicodedata
from dataclasses import replace

from config.load import from_dict
from config.schema import DataConfig, RunConfig
from load_data.chat.chat_data import Sample, encode, split_dialogues
from load_data.chat.chat_loader import ChatLoader
from load_data.chat.chat_template import ChatTemplate
from load_data.corpora.documents import skipped_lines
from load_data.corpora.sources import TRAIN
from load_data.loader import IGNORED
from load_data.tokenization.tokenizer import BpeTokenizer, Tokenizer
from utils.checkpoint import final_name, load_checkpoint
from utils.errors import Parser, UserError, run_main

OUT = pathlib.Path(__file__).resolve().parents[1] / "out"
GREEN, PLAIN = ("\033[32m", "\033[0m"), ("⟦", "⟧")  # around supervised tokens
FEWEST = 1000  # dialogues of the skills, so that rows can be packed well


def parse_command():
    """Parse the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="whose tokenizer (default: the SFT or Pre result in out/)")
    add("--data", nargs="+", default=["skills"], metavar="PATH", help=".jsonl files, folders, skills[:NAMES]")
    add("--index", nargs="+", type=int, metavar="N", help="dialogues or rows (default: 0 1 2, or row 0)")
    add("--template", choices=("tinyseek", "chatml", "own"), help="default: the checkpoint's, or tinyseek")
    add("--packed", action="store_true", help="show rows of the first epoch, with several dialogues in each")
    return parser.parse_args()


def open_tokenizer(path: str | None) -> tuple[Tokenizer, RunConfig, str]:
    """Return tokenizer, settings and name of a checkpoint; without one, bytes are tokens."""
    for short in ("SFT", "Pre"):
        final = OUT / final_name(short)
        path = path or (final if final.is_file() else None)
    if path is None:
        return BpeTokenizer([]), RunConfig(), "no checkpoint: every byte is a token"
    checkpoint = load_checkpoint(path)
    if "tokenizer" not in checkpoint or "config" not in checkpoint:
        raise UserError(f"{path}: tokenizer or config missing: name the checkpoint of a language model")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"], str(path))
    return tokenizer, from_dict(checkpoint["config"], str(path)), str(path)


def main():
    """Run the command."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a Windows pipe has another encoding
    args = parse_command()
    tokenizer, saved, name = open_tokenizer(args.checkpoint)
    length, template = saved.data.sequence_length, args.template or saved.data.template
    samples = training_samples(args, ChatTemplate(tokenizer, template), saved.data)
    marks, count = GREEN if sys.stdout.isatty() else PLAIN, len(samples)
    loader = ChatLoader(samples, length, 1, packing=args.packed, pad_id=tokenizer.pad_id)
    rows, what = (loader.starts, "row") if args.packed else ([[n] for n in range(count)], "dialogue")
    print(f"{name}; template {template}; {count:,} dialogues for training")
    for number in args.index or ([0] if args.packed else range(min(3, count))):
        if not 0 <= number < len(rows):
            raise UserError(f"--index {number}: there are {what}s 0 to {len(rows) - 1}")
        used = sum(len(samples[one].ids) - 1 for one in rows[number])
        room = f" of {length}, {len(rows[number])} dialogues" if args.packed else ""
        print(f"\n{what} {number}: {used} positions{room}\n")
        for one in rows[number]:
            print(marked_text(tokenizer, samples[one], marks), end="")
        print()
        print("\n".join(table_lines(tokenizer, loader.rows.batch([rows[number]]), args.packed)))


def training_samples(args, template: ChatTemplate, saved: DataConfig) -> list[Sample]:
    """Encode the dialogues of `--data` that are for training."""
    data = replace(saved, paths=args.data, limit=None)
    data.skill_samples = max(FEWEST, *(number + 1 for number in args.index or [0]))
    skipped = []
    split = split_dialogues(data, skipped)
    room = saved.sequence_length + 1
    samples = [encode(template, messages, room)[0] for side, messages in split if side == TRAIN]
    print(*skipped_lines(skipped), sep="\n", file=sys.stderr, end="\n" if skipped else "")
    if not samples:
        raise UserError(f"--data {' '.join(args.data)}: every dialogue is held out; give more dialogues")
    return samples


def marked_text(tokenizer: Tokenizer, sample: Sample, marks: tuple[str, str]) -> str:
    """Return the text of a sample, special tokens spelled out, with `marks` around supervised tokens."""
    parts = []
    for supervised, places in itertools.groupby(range(len(sample.ids)), key=sample.targets.__getitem__):
        text = tokenizer.decode((sample.ids[place] for place in places), skip_special=False)
        parts.append(text.join(marks) if supervised else text)
    return "".join(parts)


def table_lines(tokenizer: Tokenizer, batch: dict, packed: bool) -> list[str]:
    """Return one line for each position of a batch of one row, and one line for all of the padding."""
    row = {key: value[0].tolist() for key, value in batch.items()}
    lines = [("document  " if packed else "") + "position  " + padded("input token", 28) + "label"]
    used = sum(row["padding_mask"])
    for place in range(used):
        numbers = f"{row['document_ids'][place]:8}  " if packed else ""
        numbers += f"{row['position_ids'][place]:8}  "
        label = row["labels"][place]
        following = str(IGNORED) if label == IGNORED else spelled(tokenizer, label)
        lines.append(numbers + padded(spelled(tokenizer, row["input_ids"][place]), 28) + following)
    if padding := len(row["padding_mask"]) - used:
        lines.append(f"then {padding} positions of {spelled(tokenizer, tokenizer.pad_id)}, document -1")
    return lines


def spelled(tokenizer: Tokenizer, one: int) -> str:
    """Return an id and its text; the bytes of an incomplete character are shown as bytes."""
    raw, text = tokenizer.id_to_bytes[one], tokenizer.decode([one], skip_special=False)
    if raw:  # not a special token
        text = repr(text) if text.encode("utf-8") == raw else repr(raw)
    return f"{one:5} {text}"


def padded(text: str, width: int) -> str:
    """Return `text` padded to `width` columns of a terminal; a Chinese character takes two."""
    taken = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return text + " " * max(1, width - taken)


if __name__ == "__main__":
    run_main(main)
