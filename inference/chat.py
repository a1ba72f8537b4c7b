"""Talk to a model: a line in, its answer out as it is written.

    python inference/chat.py                               the latest model in out/, line by line
    python inference/chat.py --prompt ">>> 12 + 7"         one text, then the end
    python inference/chat.py --checkpoint FILE --temperature 0

A pre-trained model continues the text that it is given; a fine-tuned one (SFT, DPO, GRPO) answers it.
Standard output holds the text only; what is said about it goes to standard error.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import contextlib
import dataclasses

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
from inference.generate import Generator
from inference.load import CHAT_STAGES, find_model, load_model
from inference.sampling import SamplingParams
from inference.speculative import SpeculativeGenerator
from inference.text_stream import TextStream
from utils.device import pick_device, set_threads
from utils.errors import Parser, run_main

ROOT = pathlib.Path(__file__).resolve().parents[1]


def parse_command():
    """The flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="continue or answer this, then end (default: ask for lines)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=ROOT / "out", help="where runs left their models")
    add("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default: 0, from all)")
    add("--top-p", type=float, default=0.9, help="draw from the likeliest that have p (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="drop what is less likely than min_p times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what was written becomes less likely")
    add("--max-new-tokens", type=int, default=200, help="longest answer (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="same seed, same answers; answer n draws with seed + n")
    add("--draft", type=int, default=0, metavar="N", help="draft N tokens ahead with the model's MTP head")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()


class Conversation:
    """What the model has read so far, as token ids, and how a new text is put to it."""

    def __init__(self, generator: Generator, tokenizer, answers: bool, stop: tuple[str, ...] = ()):
        self.generator, self.tokenizer, self.answers, self.stop = generator, tokenizer, answers, stop
        self.turns = []  # ids of each question with its answer
        ends = {tokenizer.eos_id} | ({tokenizer.special_ids["<|im_end|>"]} if answers else set())
        self.stop_ids = frozenset(ends)

    def prompt_ids(self, text: str, max_new_tokens: int) -> list[int]:
        """What the model reads before it writes.

        To continue, a text starts where a document does. To answer, past turns come first (the oldest dropped
        when they would not fit), each as `User：{question}\\nAssistant：{answer}<|im_end|>\\n`. The role
        markers are special ids that no text can spell, so nobody can put words into another's mouth.
        """
        encode, special = self.tokenizer.encode, self.tokenizer.special_ids
        if not self.answers:
            return [self.tokenizer.eos_id, *encode(text)]
        turn = [special["User："], *encode(text), *encode("\n"), special["Assistant："]]
        room = self.generator.context - max_new_tokens - len(turn)
        while self.turns and sum(map(len, self.turns)) > room:
            del self.turns[0]
        return [*sum(self.turns, []), *turn]

    def say(self, text: str, params: SamplingParams, show) -> None:
        """Put `text` to the model; `show(piece)` gets its words as they come."""
        ids = self.prompt_ids(text, params.max_new_tokens)
        read = self.generator.fit(ids, params.max_new_tokens)
        if len(read) < len(ids):
            tell(f"(too long for {self.generator.context} tokens: only the last {len(read)} are read)")
        stream = TextStream(self.tokenizer, self.stop)

        def on_token(row, token):
            show(stream.push(token))
            return stream.stopped

        answer = self.generator.generate([ids], params, self.stop_ids, on_token)[0]
        show(stream.finish())
        if self.answers:
            written = [token for token in answer if token not in self.stop_ids]
            end = [self.tokenizer.special_ids["<|im_end|>"], *self.tokenizer.encode("\n")]
            own = ids[sum(map(len, self.turns)) :]
            self.turns.append([*own, *written, *end])


def show(piece: str) -> None:
    """Standard output, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def tell(line: str) -> None:
    """Standard error: about the text, not of it."""
    print(line, file=sys.stderr, flush=True)


def main():
    """The command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # a Windows pipe speaks another encoding than UTF-8
        stream.reconfigure(encoding="utf-8", errors="replace")
    args = parse_command()
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    params = SamplingParams(**{name: getattr(args, name) for name in names})
    device = pick_device(args.device)
    set_threads()
    path = args.checkpoint or find_model(args.out)
    model, tokenizer, checkpoint = load_model(path, device)
    answers = checkpoint["short"] in CHAT_STAGES
    does = "answers" if answers else "is pre-trained: it continues the text that it is given"
    step = f", step {checkpoint['step']:,}" if "step" in checkpoint else ""
    tell(f"{path} ({checkpoint['stage']}{step}, {device}) {does}")
    generator = Generator(model, tokenizer.eos_id)
    if args.draft:
        generator = SpeculativeGenerator(model, tokenizer.eos_id, args.draft)
    conversation = Conversation(generator, tokenizer, answers, tuple(args.stop))
    try:
        if args.prompt is not None:
            show("" if answers else args.prompt)
            conversation.say(args.prompt, params, show)
            show("\n")
        else:
            tell("Ctrl-C stops an answer; Ctrl-D (Windows: Ctrl-Z, Enter) or an empty line ends.")
            converse(conversation, params)
    except KeyboardInterrupt:
        show("\n")
    if args.draft and generator.drafted:
        share = generator.accepted / generator.drafted
        tell(f"{generator.accepted} of {generator.drafted} drafted tokens were accepted ({share:.0%})")


def converse(conversation: Conversation, params: SamplingParams) -> None:
    """Line by line, until an empty one or the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        with contextlib.suppress(KeyboardInterrupt):  # ends the answer, not the conversation
            conversation.say(line, params, show)
        show("\n")
        params = dataclasses.replace(params, seed=params.seed + 1)


if __name__ == "__main__":
    run_main(main)
