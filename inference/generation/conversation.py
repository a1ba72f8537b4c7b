"""A conversation: the turns so far, and the next message for one model or for one of several.

A pre-trained model only continues each text. A model trained on dialogues answers and reads the turns before;
the oldest are dropped when they no longer fit. Past turns are kept as text and encoded anew each time, so
models with different templates can take turns, and nothing that a user types can become a role marker.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from inference.generation.generator import Generator
from inference.generation.load import Loaded
from inference.generation.sampling import SamplingParams
from inference.generation.text_stream import TextStream
from load_data.chat.chat_template import ChatTemplate, cut_turn, fit_turns

Message = dict[str, str]


@dataclass
class Conversation:
    """The state of a chat; call `say(text, params, show)` for each message."""

    models: list[Loaded]  # the models that may answer
    generators: list[Generator]  # one for each model
    choose: Callable[[list[Message]], int] | None = None  # messages -> number of the model; None for `use`
    stop: tuple[str, ...] = ()  # texts that end an answer
    tell: Callable[[str], None] = lambda line: None  # receives remarks of one line
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
        if model.answers:
            kept = fit_turns(template, [*system, *messages], room)
            if dropped := len(system) + len(messages) - len(kept):
                messages = messages[dropped:]
                self.tell(f"(the context is full: the {dropped} oldest messages were dropped)")
            whole, stop_ids = template.prompt(kept), template.stop_ids
            ids = prompt_within(template, kept, room)
        else:  # a text begins like a document, after the end of another
            whole, stop_ids = [tokenizer.eos_id, *tokenizer.encode(text)], {tokenizer.eos_id}
            ids = whole[-room:]
        if len(ids) < len(whole):
            self.tell(f"(too long for {generator.context} tokens: only the last {len(ids)} are read)")
        stream, pieces = TextStream(tokenizer, self.stop), []

        def shown(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        def on_token(row, token):
            shown(stream.push(token))
            return stream.stopped

        complete, self.cut = False, ""
        try:
            answer = generator.generate([ids], params, stop_ids, on_token)[0]
            shown(stream.finish())
            complete = True
        finally:
            written = "".join(pieces)
            if model.answers and (complete or written):
                self.messages = [*messages, {"role": "assistant", "content": written}]
        if answer.finish_reason == "length":
            full = len(answer) < params.max_new_tokens
            limit = f"the context of {generator.context} tokens is full" if full else "max_new_tokens"
            self.cut = f"(cut after {len(answer)} tokens: {limit})"
        return written


def prompt_within(template: ChatTemplate, messages: list[Message], room: int) -> list[int]:
    """Return the prompt of `messages` as at most `room` ids, shortened exactly as training shortens it: see
    `fit_turns` and `cut_turn`. Markers stay, even if `room` is too small for them."""
    messages = fit_turns(template, messages, room)
    ids = template.prompt(messages)
    return ids if len(ids) <= room else cut_turn(template, messages, room)[0]
