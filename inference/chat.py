"""Talk to a model that streams its answers.

    python inference/chat.py                               the latest model in out/, message by message
    python inference/chat.py --prompt ">>> 12 + 7"         answer one text, then exit
    python inference/chat.py --checkpoint FILE --temperature 0
    python inference/chat.py --adapter out/TinySeek_Lora_final.pkl     a base with one adapter, or several
    python inference/chat.py --gate out/TinySeek_Gate_final.pkl        a selector picks a model for each turn

A pre-trained model continues each text. A fine-tuned model answers and remembers the turns before. A line
that begins with / is a command; /help lists them. Only the text itself goes to standard output, and remarks
go to standard error.
"""

import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # repository root

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below ends without a traceback

import re
from dataclasses import fields, replace

import utils  # noqa: F401  first: it sets how threads wait, before PyTorch loads
from inference.generation.conversation import Conversation
from inference.generation.exchange import Request
from inference.generation.selector import LoadedSelector
from inference.generation.generator import Generator
from inference.generation.load import DEFAULT_OUT, Loaded, load_adapter, load_base
from inference.generation.sampling import SamplingParams, row_seed
from inference.generation.speculative import SpeculativeGenerator
from inference.generation.terminal import RED, closed_pipe_ends, edit_lines, open_streams, read_message
from inference.generation.terminal import murmur, show, tell
from model.caches import KV_KINDS
from utils.device import pick_device, set_threads
from utils.errors import Parser, UserError, run_main

HELP = """\
/help                  list the commands
/clear                 forget the conversation; the system message stays
/system TEXT           set the system message; without TEXT remove it
/params                show the sampling settings
/params NAME=VALUE     change them, for example /params temperature=0 top_p=1
/use N                 let adapter N answer; 0 is the base
/think on|off          think before answering, in a model that was trained to
/tools on|off          let the model call a calculator and look up Python's standard library
/exit                  leave (or Ctrl-D; under Windows Ctrl-Z, Enter)
Ctrl-C stops an answer. To send a text that looks like a command, put a space before it."""


def parse_command():
    """Return the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--prompt", metavar="TEXT", help="continue or answer this, then exit (default: ask for messages)")
    add("--system", metavar="TEXT", default="", help="the system message, for a model that answers")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--checkpoint", metavar="FILE", help="the model (default: the latest stage in --out)")
    source.add_argument("--out", metavar="DIR", default=DEFAULT_OUT, help="the folder of the trained models")
    extra = parser.add_mutually_exclusive_group()
    extra.add_argument("--adapter", nargs="+", metavar="FILE", help="results of lora_train, prefix_train, ..")
    extra.add_argument("--gate", metavar="FILE", help="the result of gate_train: a selector of the model")
    add("--temperature", type=float, default=0.7, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens (default: 0, from all)")
    add("--top-p", type=float, default=0.9, help="the likeliest tokens that sum to p (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="drop tokens less than p times as likely as the most likely")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: fewer repeated tokens")
    add("--max-new-tokens", type=int, default=200, help="longest answer (default: %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="the same seed gives the same answers (default: %(default)s)")
    add("--think", action="store_true", help="think before answering, in a model that was trained to")
    add("--think-budget", type=int, metavar="N", help="answer after at most N tokens of thinking")
    add("--tools", action="store_true", help="let the model call a calculator and look up docstrings")
    add("--kv-cache", choices=KV_KINDS, default="full", help="int8 or int4: past tokens in less memory")
    add("--draft", type=int, default=0, metavar="N", help="draft N tokens ahead with the model's MTP head")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args()


@closed_pipe_ends()
def main():
    """Open the models, then answer the one prompt or each message."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    open_streams()
    args = parse_command()
    params = SamplingParams(**{field.name: getattr(args, field.name) for field in fields(SamplingParams)})
    device = pick_device(args.device)
    set_threads()
    if args.draft and (args.adapter or args.gate):
        raise UserError("--draft works with one whole model only: leave out --adapter and --gate")
    models, choose = open_models(args, device)
    kv_cache = args.kv_cache
    generators = [Generator(one.model, one.tokenizer.eos_id, kv_cache=kv_cache) for one in models]
    if args.draft:
        generators = [SpeculativeGenerator(models[0].model, generators[0].start_id, args.draft, kv_cache)]
    request = Request(budget=args.think_budget)
    conversation = Conversation(models, generators, choose, tuple(args.stop), tell, murmur, request)
    chat = Chat(conversation, params)
    conversation.use = 1 if args.adapter else 0
    orders = {f"/system {args.system}": args.system, "/think on": args.think, "/tools on": args.tools}
    for line in (line for line, wanted in orders.items() if wanted):
        chat.obey(line)
    try:
        if args.prompt is not None:
            show("" if chat.model.answers else args.prompt)
            chat.answer(args.prompt)
        else:
            chat.run()
    except KeyboardInterrupt:
        show("\n")
    if args.draft and (drafted := generators[0].drafted):
        accepted = generators[0].accepted
        tell(f"{accepted} of {drafted} drafted tokens were accepted ({accepted / drafted:.0%})")


def open_models(args, device):
    """Return the models that may answer, the base before its adapters, and the function that chooses."""
    base = load_base(args.checkpoint, device, args.out, args.adapter and args.adapter[0], args.gate, tell)
    does = "answers" if base.answers else "is pre-trained: it continues each text"
    tell(f"{base.path} ({base.about['stage']}, step {base.about['step']:,}, {device}) {does}")
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
        about = adapter.about
        tell(f"{number}: {adapter.path} ({about['stage']}, step {about['step']:,}) answers")
    return [base, *adapters], None


class Chat:
    """A conversation at the terminal: messages for the model, and commands."""

    def __init__(self, conversation: Conversation, params: SamplingParams):
        self.conversation, self.settings, self.answered = conversation, params, 0

    @property
    def model(self) -> Loaded:
        """The model that answers next, unless a selector chooses it."""
        return self.conversation.models[self.conversation.use]

    def run(self) -> None:
        """Read messages and commands to the end of the input, or to /exit."""
        at_terminal, interrupted = sys.stdin.isatty(), False
        edit_lines()
        if at_terminal:
            tell("/help lists the commands; Ctrl-C stops an answer; Ctrl-D leaves (Windows: Ctrl-Z, Enter)")
        while True:
            try:
                text = read_message()
            except EOFError:
                return show("\n" if at_terminal else "")
            except KeyboardInterrupt:
                if interrupted or not at_terminal:
                    raise
                interrupted = True
                tell("\n(Ctrl-C again or Ctrl-D leaves)")
                continue
            interrupted, line = False, text.rstrip()
            if line in ("/exit", "/quit"):
                return None
            try:
                if re.match(r"/[A-Za-z]*(\s|$)", line) and "\n" not in line:
                    self.obey(line)
                elif line:
                    self.answer(text)
            except UserError as error:
                tell(f"error: {error}", RED)

    def answer(self, text: str) -> None:
        """Answer one message. Ctrl-C ends the answer, not the conversation."""
        seed = row_seed(self.settings.seed, self.answered)  # each answer draws different random numbers
        self.answered += 1
        try:
            self.conversation.say(text, replace(self.settings, seed=seed), show)
            remark = self.conversation.cut
        except KeyboardInterrupt:
            remark = "(stopped)"
        show("\n")
        if remark:
            tell(remark)

    def obey(self, line: str) -> None:
        """Run a command. Raises `UserError` for an unknown one, or for wrong arguments."""
        name, rest, conversation = *(line.split(maxsplit=1) + [""])[:2], self.conversation
        if name == "/help":
            tell(HELP)
        elif name == "/clear":
            conversation.messages = []
            tell("(a new conversation)")
        elif name == "/system":
            if rest and not self.model.answers:
                raise UserError(f"{self.model.path} reads no system message: only fine-tuned models do")
            if rest:  # a template may have no place for it
                self.model.template.turn({"role": "system", "content": rest})
            conversation.system = rest
            tell("(system message set)" if rest else "(no system message)")
        elif name == "/params":
            self.change(rest.split())
            tell("  ".join(f"{key}={value}" for key, value in vars(self.settings).items()))
        elif name in ("/think", "/tools"):
            self.switch(name, rest)
        elif name != "/use":
            raise UserError(f"{name}: no such command; /help lists them")
        elif conversation.choose is not None:
            raise UserError("there is no /use with a gate: it chooses the model")
        elif rest not in map(str, range(len(conversation.models))):
            raise UserError(f"/use takes a number from 0 to {len(conversation.models) - 1}")
        else:
            conversation.use = int(rest)
            tell(f"({self.model.path})")

    def switch(self, name: str, rest: str) -> None:
        """Switch thinking or tools on or off."""
        if rest not in ("on", "off"):
            raise UserError(f"{name} takes on or off")
        if rest == "on" and not self.model.answers:
            raise UserError(f"{self.model.path} continues texts: only fine-tuned models think or use tools")
        what = "thinking" if name == "/think" else "tools"
        fraction = self.model.config.data.val_fraction
        request = replace(self.conversation.request, **{what: rest == "on"}, val_fraction=fraction)
        request.check(self.model.template)
        self.conversation.request = request
        tell(f"({what} {rest})")

    def change(self, changes: list[str]) -> None:
        """Change sampling settings by `name=value`."""
        kinds, new = {field.name: field.type for field in fields(SamplingParams)}, {}
        for change in changes:
            name, _, value = change.partition("=")
            name = name.replace("-", "_")
            try:
                new[name] = kinds[name](value)
            except KeyError:
                raise UserError(f"/params {change}: write NAME=VALUE for {', '.join(kinds)}") from None
            except ValueError:
                raise UserError(f"/params {change}: {value!r} is not {kinds[name].__name__}") from None
        self.settings = replace(self.settings, **new)
        self.answered = 0 if "seed" in new else self.answered


if __name__ == "__main__":
    run_main(main)
