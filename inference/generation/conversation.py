"""A conversation: what was said so far, and how the next text is put to a model, or to one of several.

A model that was pre-trained only continues each text. One trained on dialogues answers, and reads the turns
before; the oldest are dropped when they would not fit. Past turns are kept as text and written anew by the
template each time, so that models with different templates can take turns, and nothing that a user types can
become a role marker.
"""

from collections.abc import Callable

from inference.generation.generator import Generator
from inference.generation.load import Loaded
from inference.generation.sampling import SamplingParams
from inference.generation.text_stream import TextStream
from load_data.chat.chat_template import ChatTemplate, fit_turns

Message = dict[str, str]


class Conversation:
    """`say(text, params, show)` for each line.

    Args:
        models: they answer in turn, as `choose` or `use` says; all answer, or there is one that continues.
        generators: one for each model.
        choose: the messages so far -> number of the model that answers; None: always `use`, at first 0.
        tell: gets remarks about the text, of one line.
    """

    def __init__(
        self,
        models: list[Loaded],
        generators: list[Generator],
        choose: Callable[[list[Message]], int] | None = None,
        stop: tuple[str, ...] = (),
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.models, self.generators, self.choose = models, generators, choose
        self.stop, self.tell = stop, tell
        self.messages, self.use = [], 0

    def say(self, text: str, params: SamplingParams, show: Callable[[str], None]) -> str:
        """Put `text` to the model; `show(piece)` gets its words as they come. Returns all of them."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.choose is not None:
            self.use = self.choose(messages)
        model, generator = self.models[self.use], self.generators[self.use]
        tokenizer, template, room = model.tokenizer, model.template, room_for(generator, params)
        if model.answers:
            messages = fit_turns(template, messages, room)
            whole, stop_ids = template.prompt(messages), template.stop_ids
            ids = prompt_within(template, messages, room)
        else:  # a text starts where a document does
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

        answer = generator.generate([ids], params, stop_ids, on_token)[0]
        shown(stream.finish())
        if model.answers:
            written = tokenizer.decode(token for token in answer if token not in stop_ids)
            self.messages = [*messages, {"role": "assistant", "content": written}]
        return "".join(pieces)


def room_for(generator: Generator, params: SamplingParams) -> int:
    """How many ids a prompt may have, so that the generator reads all of them."""
    return len(generator.fit(range(generator.context), params.max_new_tokens))


def prompt_within(template: ChatTemplate, messages: list[Message], room: int) -> list[int]:
    """The prompt of `messages` as at most `room` ids: less the oldest turns, then less the beginning of the
    question, as in training. The markers stay, even where `room` is too small for them."""
    messages = fit_turns(template, messages, room)
    ids, text = template.prompt(messages), len(template.tokenizer.encode(messages[-1]["content"]))
    end = len(ids) - len(template.before["assistant"]) - len(template.after["user"])  # of the question's text
    cut = min(max(0, len(ids) - room), text)
    return ids[: end - text] + ids[end - text + cut :]
