"""Show dialogues as a model sees them in training: their text, ids, and what is learned of them.

    python load_data/show.py                                     three dialogues of the embedded skills
    python load_data/show.py --data my.jsonl --index 0 17        some of your own
    python load_data/show.py --packed                            a row of several dialogues, as in training
    python load_data/show.py --template chatml

What is learned is green in a terminal and in ⟦brackets⟧ elsewhere. The table has one line for each place of
the row: from the input token there (and those before it in the same dialogue) the model is to predict the
label; at -100 it may predict what it likes.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import itertools
import unicodedata

from config.load import from_dict
from config.schema import DataConfig, RunConfig
from load_data.chat.chat_data import Sample, prepare_chat
from load_data.chat.chat_loader import ChatLoader, DialogueRows
from load_data.loader import IGNORED
from load_data.tokenization.tokenizer import BpeTokenizer, Tokenizer
from utils.checkpoint import final_name, load_checkpoint
from utils.errors import Parser, UserError, run_main

OUT = pathlib.Path(__file__).resolve().parents[1] / "out"
GREEN, PLAIN = ("\033[32m", "\033[0m"), ("⟦", "⟧")  # around what is learned
FEWEST = 1000  # dialogues of the skills that are made, so that rows can be packed well


def parse_command():
    """The flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", metavar="FILE", help="its tokenizer (default: the result of sft_train or pre_train)")
    add("--data", nargs="+", default=["skills"], metavar="PATH", help=".jsonl files, folders, skills[:NAMES]")
    add("--index", nargs="+", type=int, metavar="N", help="which dialogues, or rows (default: 0 1 2, or 0)")
    add("--template", choices=("tinyseek", "chatml"), help="default: that of the checkpoint, or tinyseek")
    add("--packed", action="store_true", help="rows of the first epoch, with several dialogues in each")
    add("--plain", action="store_true", help="no colours")
    return parser.parse_args()


def open_tokenizer(path: str | None) -> tuple[Tokenizer, RunConfig, str]:
    """Tokenizer and settings of a checkpoint, and which; without any, bytes as tokens."""
    for short in ("SFT", "Pre"):
        final = OUT / final_name(short)
        path = path or (final if final.is_file() else None)
    if path is None:
        return BpeTokenizer([]), RunConfig(), "no checkpoint: every byte is a token"
    checkpoint = load_checkpoint(path)
    if "tokenizer" not in checkpoint or "config" not in checkpoint:
        raise UserError(f"{path}: no checkpoint of a language model, it has no tokenizer or no config")
    tokenizer = Tokenizer.from_json(checkpoint["tokenizer"], str(path))
    return tokenizer, from_dict(checkpoint["config"], str(path)), str(path)


def main():
    """The command."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a Windows pipe speaks another encoding
    args = parse_command()
    tokenizer, saved, name = open_tokenizer(args.checkpoint)
    length, template = saved.data.sequence_length, args.template or saved.data.template
    config = RunConfig(data=DataConfig(paths=args.data, sequence_length=length, template=template))
    config.data.skill_samples = max(FEWEST, *(number + 1 for number in args.index or [0]))
    data = prepare_chat(config, tokenizer)
    marks = PLAIN if args.plain or not sys.stdout.isatty() else GREEN
    count = len(data.train)
    if args.packed:
        loader = ChatLoader(data.train, length, 1, pad_id=tokenizer.pad_id)
        table, rows, what = loader.rows, list(loader.starts), "row"
    else:
        table = DialogueRows(data.train, length, False, tokenizer.pad_id)
        rows, what = table.arrange(range(count)), "dialogue"
    print(f"{name}; template {template}; {count:,} dialogues for training")
    for number in args.index or ([0] if args.packed else range(min(3, count))):
        if not 0 <= number < len(rows):
            raise UserError(f"--index {number}: there are {what}s 0 to {len(rows) - 1}")
        used = sum(int(table.lengths[one]) for one in rows[number])
        room = f" of {length}, {len(rows[number])} dialogues" if args.packed else ""
        print(f"\n{what} {number}: {used} places{room}\n")
        for one in rows[number]:
            print(marked_text(tokenizer, data.train[one], marks), end="")
        print()
        print("\n".join(table_lines(tokenizer, table.batch([rows[number]]), args.packed)))


def marked_text(tokenizer: Tokenizer, sample: Sample, marks: tuple[str, str]) -> str:
    """The text of a sample, special tokens spelled out, with `marks` around what is learned."""
    parts = []
    for learned, places in itertools.groupby(range(len(sample.ids)), key=sample.targets.__getitem__):
        text = tokenizer.decode((sample.ids[place] for place in places), skip_special=False)
        parts.append(text.join(marks) if learned else text)
    return "".join(parts)


def table_lines(tokenizer: Tokenizer, batch: dict, packed: bool) -> list[str]:
    """One line for each place of a batch of one row; padding, which is alike, as one line at the end."""
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
        lines.append(f"then {padding} places of {spelled(tokenizer, tokenizer.pad_id)}, document -1")
    return lines


def spelled(tokenizer: Tokenizer, one: int) -> str:
    """An id and what it stands for; the bytes of an unfinished character as such."""
    if one in tokenizer.special_spellings:
        return f"{one:5} {tokenizer.special_spellings[one].decode('utf-8')}"
    raw = tokenizer.id_to_bytes[one]
    try:
        return f"{one:5} {raw.decode('utf-8')!r}"
    except UnicodeDecodeError:
        return f"{one:5} {raw!r}"


def padded(text: str, width: int) -> str:
    """`text` filled up to `width` columns of a terminal, in which a Chinese letter takes two."""
    taken = sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
    return text + " " * max(1, width - taken)


if __name__ == "__main__":
    run_main(main)
