"""A conversation: the turns so far, and the next message for one model or for one of several.

A pre-trained model only continues each text. A model trained on dialogues answers and reads the turns before;
the oldest are dropped when they no longer fit. Past turns are kept as text and encoded anew each time, so
models with different templates can take turns, and nothing that a user types can become a role marker.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from inference.generation.exchange import PLAIN, Exchange, Request, respond
from inference.generation.generator import Generator
from inference.generation.load import Loaded
from inference.generation.sampling import SamplingParams
from load_data.chat.chat_template import ChatTemplate, Message, cut_turn, fit_turns


@dataclass
class Conversation:
    """The state of a chat; call `say(text, params, show)` for each message."""

    models: list[Loaded]  # the models that may answer
    generators: list[Generator]  # one for each model
    choose: Callable[[list[Message]], int] | None = None  # messages -> number of the model; None for `use`
    stop: tuple[str, ...] = ()  # texts that end an answer
    tell: Callable[[str], None] = lambda line: None  # receives remarks of one line
    murmur: Callable[[str], None] = lambda piece: None  # receives pieces of thinking, calls and results
    request: Request = PLAIN  # whether models may think and use tools
    messages: list[Message] = field(default_factory=list)  # turns so far, without the system message
    system: str = ""  # the system message; empty for none
    use: int = 0  # the number of the model that answers
    cut: str = ""  # the reason why the last answer was cut; empty if it was not

    def say(self, text: str, params: SamplingParams, show: Callable[[str], None]) -> str:
        """Return the model's answer to `text`; `show(piece)` receives each piece as it is written.

        Ctrl-C ends the answer with `KeyboardInterrupt`; the part that was shown stays in `messages`.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.choose is not None:
            self.use = self.choose(messages)
        model, generator = self.models[self.use], self.generators[self.use]
        tokenizer, template, room = model.tokenizer, model.template, generator.room(params.max_new_tokens)
        system = [{"role": "system", "content": self.system}] if self.system else []
        request = self.request if model.answers else PLAIN
        if model.answers:
            kept = fit_turns(template, [*system, *messages], room - len(template.opening(request.thinking)))
            if dropped := len(system) + len(messages) - len(kept):
                messages = messages[dropped:]
                self.tell(f"(the context is full: the {dropped} oldest messages were dropped)")
            whole, stop_ids = template.prompt(kept, request.thinking), template.stop_ids
            ids = prompt_within(template, kept, room, request.thinking)
        else:  # a text begins as documents do
            whole, stop_ids = [*tokenizer.begin, *tokenizer.encode_open([text])[0]], set(tokenizer.eos_ids)
            whole = whole or [tokenizer.eos_id]
            ids = whole[-room:]
        if len(ids) < len(whole):
            self.tell(f"(too long for {generator.context} tokens: only the last {len(ids)} are read)")
        written, before, answers, self.cut = {"content": ""}, "", [], ""

        def on_text(row: int, part: str, piece: str) -> None:
            nonlocal before
            if piece and (part != before or part == "result"):
                self.murmur("\n" * bool(before) + "-> " * (part == "result"))
                before = part
            written[part] = written.get(part, "") + piece
            (show if part == "content" else self.murmur)(piece)

        try:
            exchange = respond(generator, template, [ids], params, request, stop_ids, self.stop, on_text)[0]
            answers = exchange.messages
        finally:
            if not answers and any(written.values()):  # Ctrl-C
                answers = [{"role": "assistant", "content": written["content"]}]
            if model.answers and answers:
                self.messages = [*messages, *answers]
        self.cut = self.why_cut(exchange, generator, params)
        return written["content"]

    def why_cut(self, exchange: Exchange, generator: Generator, params: SamplingParams) -> str:
        """Return the reason why an exchange was cut; empty if it was not."""
        if exchange.finish_reason == "calls":
            return "(too many calls of tools)"
        if exchange.finish_reason == "length":
            full = exchange.written < params.max_new_tokens or not exchange.own[-1]
            limit = f"the context of {generator.context} tokens is full" if full else "max_new_tokens"
            return f"(cut after {exchange.written} tokens: {limit})"
        if "tool_calls" in exchange.messages[-1]:
            return "(the model calls a tool, which runs with /tools on or --tools)"
        return ""


def prompt_within(
    template: ChatTemplate, messages: list[Message], room: int, thinking: bool = False
) -> list[int]:
    """Return the prompt of `messages` as at most `room` ids, shortened exactly as training shortens it: see
    `fit_turns` and `cut_turn`. Markers stay, even if `room` is too small for them."""
    opening = template.opening(thinking)
    room -= len(opening)
    messages = fit_turns(template, messages, room)
    ids = template.prompt(messages)
    return (ids if len(ids) <= room else cut_turn(template, messages, room)[0]) + opening
