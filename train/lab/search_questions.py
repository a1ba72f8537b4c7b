"""Ask a search twenty questions that a newcomer has about this repository, and rank the files that answer.

    python train/lab/search_questions.py --models minilm
    python train/lab/search_questions.py --models minilm out/TinySeek_Embed_final.pkl

The questions were written down, each with the files that answer it, before any of them was searched for. A
rank is the place of the first passage of one of these files among all passages of `FOLDERS`, this file
excepted. The table of docs/search.md is printed by it.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # repository root

from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.load import DEFAULT_OUT
from inference.generation.terminal import open_streams
from inference.index.reader import TextReader
from inference.index.store import Index
from inference.search import open_index, open_reader
from load_data.packing import REPOSITORY
from utils.device import set_threads
from utils.errors import Parser, run_main

FOLDERS = ("config/", "inference/", "load_data/", "model/", "modules/", "train/", "utils/")
HERE = Path(__file__).resolve().relative_to(REPOSITORY).as_posix()
QUESTIONS = {
    "how are gradients clipped": ("train/engine/parallel.py",),
    "where are the labels shifted by one position": ("load_data/loader.py", "load_data/chat/chat_loader.py"),
    "what happens if the power fails while a checkpoint is written": ("utils/checkpoint.py",),
    "can a model file from a stranger run code on my computer": (
        "utils/checkpoint.py",
        "inference/hf/folder.py",
    ),
    "how does the model know the order of the words": ("modules/rope.py",),
    "how does generation avoid reading the whole prompt again for each new token": (
        "modules/attention/cache.py",
        "inference/generation/generator.py",
    ),
    "how is the next word drawn from the probabilities": ("inference/generation/sampling.py",),
    "why are some experts used more than others, and what can be done about it": (
        "modules/experts/balance.py",
        "train/engine/load_balancer.py",
    ),
    "which parameters are trained by Muon and which by AdamW": (
        "train/engine/optimizers.py",
        "modules/muon.py",
    ),
    "training runs out of memory, how can it need less": (
        "modules/checkpointing.py",
        "train/engine/forecast.py",
        "utils/errors.py",
    ),
    "how can a large model be fine-tuned with few trainable numbers": (
        "modules/adapters/lora.py",
        "train/lora_train.py",
        "modules/adapters/prefix.py",
        "train/prefix_train.py",
    ),
    "how is a text split into pieces that occur often": (
        "load_data/byte_pair.py",
        "load_data/tokenization/train_tokenizer.py",
        "load_data/tokenization/tokenizer.py",
    ),
    "guess several tokens ahead and check them all at once": (
        "inference/generation/speculative.py",
        "modules/mtp.py",
    ),
    "run my trained model in llama.cpp": (
        "inference/export_gguf.py",
        "inference/gguf_files/architectures.py",
    ),
    "is it safe when the model computes with a calculator": ("inference/tools/calculator.py",),
    "when does the learning rate start to fall": ("train/engine/schedule.py",),
    "what happens when I press Ctrl-C during training": ("train/engine/stopping.py",),
    "can a message pretend to be the assistant": (
        "load_data/chat/chat_template.py",
        "load_data/tokenization/plain_text.py",
    ),
    "how do I know that every weight really learns": (
        "train/proof/gradient_check.py",
        "train/proof/weight_witness.py",
    ),
    "learn from rewards without a critic": ("train/grpo_train.py", "modules/alignment/advantage.py"),
}


def main():
    """Print a table of ranks, one column for each model, and the summary of each."""
    open_streams()
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--models", metavar="MODEL", nargs="+", default=["minilm"], help="as in inference/search.py")
    add("--out", metavar="DIR", type=Path, default=DEFAULT_OUT, help="the folder of the trained models")
    args = parser.parse_args()
    set_threads()
    columns = []
    for model in args.models:
        reader = open_reader(model, args.out)
        index = open_index(REPOSITORY, reader, args.out)
        columns.append([place_of(question, index, reader) for question in QUESTIONS])
    print("\n".join(table([Path(model).stem for model in args.models], columns)))


def place_of(question: str, index: Index, reader: TextReader) -> tuple[int, str]:
    """Return the rank of the first passage that answers `question`, from 1, and where that passage is."""
    found = [one for _, one in index.search(reader.query(question), len(index.passages))]
    found = [one for one in found if one.file.startswith(FOLDERS) and one.file != HERE]
    rank = next(number for number, one in enumerate(found, 1) if one.file in QUESTIONS[question])
    return rank, f"{found[rank - 1].file}:{found[rank - 1].first}"


def table(models: list[str], columns: list[list[tuple[int, str]]]) -> list[str]:
    """Return the lines of a table in Markdown, with the passages that the first model finds."""
    rows = [["question", *models, "found"], ["---"] * (len(models) + 2)]
    for question, *places in zip(QUESTIONS, *columns, strict=True):
        rows.append([question, *(str(rank) for rank, _ in places), places[0][1]])
    means = [sum(1 / rank for rank, _ in column) / len(column) for column in columns]
    rows.append(["mean reciprocal rank", *(f"{mean:.2f}" for mean in means), ""])
    rows.append(["among the first ten", *(str(sum(rank <= 10 for rank, _ in one)) for one in columns), ""])
    return ["| " + " | ".join(row) + " |" for row in rows]


if __name__ == "__main__":
    run_main(main)
