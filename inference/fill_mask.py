"""Fill masks: the most likely tokens in the place of each `[MASK]` of a text.

    python inference/fill_mask.py "import [MASK]"
    python inference/fill_mask.py "for [MASK] in range([MASK]):" --top 3 --out out/bert

The model is one of train/mlm_train.py, or an imported BERT. It reads the text on both sides of a mask, and
fills each of several masks independently of the others. Where the tokenizer joins a word with the space
before it, as ours does, a space before a mask is part of what is guessed.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
import torch

from inference.generation.load import DEFAULT_OUT, load_encoder
from inference.generation.terminal import closed_pipe_ends, open_streams, tell
from load_data.masking import WRITTEN, encode_masked
from load_data.tokenization.tokenizer import MASK, Tokenizer
from model.encoder import MaskedLM
from utils.checkpoint import final_name
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

Candidates = list[tuple[str, float]]  # texts of tokens with their probabilities, the likeliest first


@torch.inference_mode()
def fill(model: MaskedLM, tokenizer: Tokenizer, text: str, top: int = 5) -> list[Candidates]:
    """Return the `top` candidates for each mask in `text`. Raises `UserError` for a text without a mask, or
    longer than the model reads."""
    if WRITTEN not in text:
        raise UserError(f"no {WRITTEN} in the text: write it in the place of the word to guess")
    ids, longest = encode_masked(tokenizer, text), model.config.max_position_embeddings
    if len(ids) > longest:
        raise UserError(f"the text has {len(ids)} tokens, and the model reads {longest}: shorten it")
    row = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    hidden = model.model(row)[row == tokenizer.special_ids[MASK]]  # (N, C), N masks
    found = model.logits(hidden).double().softmax(dim=-1)[:, : tokenizer.vocab_size].topk(top)
    words = [[tokenizer.decode([one], skip_special=False) for one in ids] for ids in found.indices]
    return [[*zip(*pair)] for pair in zip(words, found.values.tolist(), strict=True)]


def report(text: str, masks: list[Candidates]) -> str:
    """Return the text with a table of the candidates: a column for each mask."""
    rows = zip(*masks, strict=True)
    cells = [[f"{share:6.1%}  {word!r}" for word, share in row] for row in rows]
    return "\n".join([text.rstrip("\n"), *("  ".join(f"{one:24}" for one in row).rstrip() for row in cells)])


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    parser.add_argument("text", metavar="TEXT", help=f"a text with {WRITTEN} in it, once or several times")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help=f"default: {final_name('MLM')} in --out")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="candidates (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()


@closed_pipe_ends()
def main():
    """Load the model and print its candidates."""
    open_streams()
    args = parse_command()
    path, device = Path(args.checkpoint or Path(args.out) / final_name("MLM")), pick_device(args.device)
    set_threads()
    if not path.exists() and not args.checkpoint:
        raise UserError(f"no {path}: train one with train/mlm_train.py, or name a file with --checkpoint")
    model, tokenizer, _ = load_encoder(path)
    if not 1 <= args.top <= tokenizer.vocab_size:
        raise UserError(f"--top {args.top} must be from 1 to the {tokenizer.vocab_size} tokens of the model")
    masks = fill(model.to(device), tokenizer, args.text, args.top)
    tell(f"{path} ({device})")
    print(report(args.text, masks))


if __name__ == "__main__":
    run_main(main)
