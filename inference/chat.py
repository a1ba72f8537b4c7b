"""Talk to a model: a line in, its answer out as it is written.

    python inference/chat.py                               the latest model in out/, line by line
    python inference/chat.py --prompt ">>> 12 + 7"         one text, then the end
    python inference/chat.py --checkpoint FILE --temperature 0
    python inference/chat.py --adapter out/TinySeek_Lora_final.pkl     a base with an adapter; or with several
    python inference/chat.py --gate out/TinySeek_Gate_final.pkl         a gate chooses who answers each turn

A pre-trained model continues the text that it is given; a fine-tuned one answers it, and remembers the turns
before. With several adapters, a line `/use 2` lets the second answer from there on, `/use 0` the base alone.
Standard output holds the text only; what is said about it goes to standard error.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import contextlib
import dataclasses

import utils  # noqa: F401  first: it says how threads wait, before PyTorch loads
from inference.generation.conversation import Conversation
from inference.generation.selector import LoadedSelector
from inference.generation.generator import Generator
from inference.generation.load import Loaded, load_adapter, load_base
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

ROOT = pathlib.Path(__file__).resolve().parents[1]


def parse_command():
    """The flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="continue or answer this, then end (default: ask for lines)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=ROOT / "out", help="where runs left their models")
    extra = parser.add_mutually_exclusive_group()
    extra.add_argument("--adapter", nargs="+", metavar="FILE", help="results of lora_train, prefix_train, ..")
    extra.add_argument("--gate", metavar="FILE", help="the result of gate_train: it chooses who answers")
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
    if args.draft and (args.adapter or args.gate):
        raise UserError("--draft goes with one whole model: leave out --adapter and --gate")
    models, choose = open_models(args, device)
    generators = [Generator(one.model, one.tokenizer.eos_id) for one in models]
    if args.draft:
        generators = [SpeculativeGenerator(models[0].model, models[0].tokenizer.eos_id, args.draft)]
    conversation = Conversation(models, generators, choose, tuple(args.stop), tell)
    conversation.use = 1 if args.adapter else 0
    answers = models[conversation.use].answers
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
    generator = generators[0]
    if args.draft and generator.drafted:
        share = generator.accepted / generator.drafted
        tell(f"{generator.accepted} of {generator.drafted} drafted tokens were accepted ({share:.0%})")


def open_models(args, device):
    """The models that may answer, and who chooses: the base first where there are adapters."""
    base = load_base(args.checkpoint, device, args.out, args.adapter and args.adapter[0], args.gate)
    does = "answers" if base.answers else "is pre-trained: it continues the text that it is given"
    tell(f"{base.path} ({trained(base)}, {device}) {does}")
    if args.gate:
        gate = LoadedSelector(args.gate, base)

        def choose(messages):
            number = gate.choose(messages)
            tell(f"({gate.names[number]})")
            return number

        tell(f"{args.gate} chooses between: {', '.join(gate.names)}")
        return gate.models, choose
    adapters = [load_adapter(file, base) for file in args.adapter or []]
    for number, adapter in enumerate(adapters, start=1):
        tell(f"{number}: {adapter.path} ({trained(adapter)}) answers")
    return [base, *adapters], None


def trained(model: Loaded) -> str:
    """The stage that a model comes from, and how many steps it took."""
    return model.about["stage"] + (f", step {model.about['step']:,}" if "step" in model.about else "")


def converse(conversation: Conversation, params: SamplingParams) -> None:
    """Line by line, until an empty one or the end of the input."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not line:
            return
        if line.split()[:1] == ["/use"]:  # not /usecase
            choose_model(conversation, line)
            continue
        with contextlib.suppress(KeyboardInterrupt):  # ends the answer, not the conversation
            conversation.say(line, params, show)
        show("\n")
        params = dataclasses.replace(params, seed=params.seed + 1)


def choose_model(conversation: Conversation, line: str) -> None:
    """`/use 2`: the second adapter answers from here on."""
    number, numbers = line.split()[1:], range(len(conversation.models))
    if conversation.choose is not None:
        tell("there is no /use with a gate: it chooses who answers")
    elif len(number) != 1 or number[0] not in map(str, numbers):
        tell(f"/use takes a number from 0 to {numbers[-1]}")
    else:
        conversation.use = int(number[0])
        tell(f"({conversation.models[conversation.use].path})")


if __name__ == "__main__":
    run_main(main)
