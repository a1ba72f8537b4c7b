"""Write with an encoder-decoder: it reads a text, and writes another one, or what is missing from the first.

    python inference/seq2seq.py --prompt "import <extra_id_0>"
    python inference/seq2seq.py --prompt "def add(a, b): return <extra_id_0> + <extra_id_1>" --temperature 0.7
    python inference/seq2seq.py --out out/lists --prompt "Please buy milk and eggs."

The model is one of train/span_train.py, or an imported T5. `<extra_id_0>`, `<extra_id_1>`, .. mark gaps,
which a model of spans fills; the whole text is printed. A space before a gap belongs to the missing word.
Only the text goes to standard output, and remarks go to standard error.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

from pathlib import Path

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.generator import Generator
from inference.generation.load import DEFAULT_OUT, load_seq2seq
from inference.generation.sampling import SamplingParams
from inference.generation.terminal import closed_pipe_ends, open_streams, show, tell
from load_data.spans import GAP, filled, sentinel_ids, with_gaps
from load_data.tokenization.tokenizer import Tokenizer
from model.encoder_decoder import EncoderDecoder
from utils.checkpoint import final_name
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

BATCH = 50  # sources that are read together
LONGEST = 4096  # tokens of a source; its scores are that many squared, in every head


def written(
    model: EncoderDecoder, tokenizer: Tokenizer, sources: list[list[int]], params: SamplingParams
) -> list[list[int]]:
    """Return the target that the model writes for each framed source, without the end."""
    start, stops, answers = [model.config.decoder_start_token_id], {*tokenizer.eos_ids, *tokenizer.finish}, []
    for first in range(0, len(sources), BATCH):
        part = sources[first : first + BATCH]
        answers += Generator(model.reading(part)).generate([start] * len(part), params, stops)
    return [[one for one in answer if one not in stops] for answer in answers]


def respond(model: EncoderDecoder, tokenizer: Tokenizer, text: str, params: SamplingParams) -> str:
    """Return the text that the model writes about `text`, or `text` with its gaps filled."""
    ids = with_gaps(tokenizer, text) if GAP.search(text) else tokenizer.encode(text)
    if len(ids) > LONGEST:
        raise UserError(f"the text has {len(ids)} tokens, and at most {LONGEST} are read: shorten it")
    (answer,) = written(model, tokenizer, [tokenizer.framed(ids)], params)
    if GAP.search(text):
        answer = filled(ids, answer, sentinel_ids(tokenizer))
    return tokenizer.decode(answer)


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", required=True, help="the text to read, with gaps or without")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help=f"default: {final_name('Span')} in --out")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="the likeliest tokens that sum to p (default: %(default)s)")
    add("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same answers (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()


@closed_pipe_ends()
def main():
    """Load the model, and answer."""
    open_streams()
    args = parse_command()
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.max_new_tokens, seed=args.seed
    )
    if not args.prompt.strip():
        raise UserError("--prompt is empty: give a text to read")
    path, device = Path(args.checkpoint or Path(args.out) / final_name("Span")), pick_device(args.device)
    set_threads()
    if not path.exists() and not args.checkpoint:
        raise UserError(f"no {path}: train one with train/span_train.py, or name a file with --checkpoint")
    model, tokenizer, _ = load_seq2seq(path)
    tell(f"{path} ({device})")
    show(respond(model.to(device), tokenizer, args.prompt, params) + "\n")


if __name__ == "__main__":
    run_main(main)
