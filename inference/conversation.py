"""A conversation: what was said so far, and how the next text is put to a model, or to one of several.

A model that was pre-trained only continues each text. One trained on dialogues answers, and reads the turns
before; the oldest are dropped when they would not fit. Past turns are kept as text and written anew by the
template each time, so that models with different templates can take turns, and nothing that a user types can
become a role marker.
"""

from collections.abc import Callable

from inference.generate import Generator
from inference.load import Loaded
from inference.sampling import SamplingParams
from inference.text_stream import TextStream
from load_data.chat_template import fit_turns

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
        self.models, self.generators, self.choose, self.stop, self.tell = (
            models,
            generators,
            choose,
            stop,
            tell,
        )
        self.messages, self.use = [], 0

    def say(self, text: str, params: SamplingParams, show: Callable[[str], None]) -> str:
        """Put `text` to the model; `show(piece)` gets its words as they come. Returns all of them."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.choose is not None:
            self.use = self.choose(messages)
        model, generator = self.models[self.use], self.generators[self.use]
        tokenizer, template = model.tokenizer, model.template
        if model.answers:
            messages = fit_turns(template, messages, generator.context - params.max_new_tokens)
            ids, stop_ids = template.prompt(messages), template.stop_ids
        else:  # a text starts where a document does
            ids, stop_ids = [tokenizer.eos_id, *tokenizer.encode(text)], {tokenizer.eos_id}
        read = generator.fit(ids, params.max_new_tokens)
        if len(read) < len(ids):
            self.tell(f"(too long for {generator.context} tokens: only the last {len(read)} are read)")
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
