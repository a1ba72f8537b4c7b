"""Answer prompts: thinking within a budget, and calls of tools with their results.

    prompt  .. Assistant：<think>                     the request asks for thinking
    model   7,8=15 4,3,1=8</think>                    after `budget` tokens </think> is forced
            <tool_call>{"name": ..}</tool_call><|im_end|>
    tool    \\n<tool_response>85</tool_response>\\n
    prompt  Assistant：<think>
    model   </think>85<|im_end|>

Within one exchange the model goes on from the very ids that it wrote, not from their text encoded again. The
budget is for the whole exchange, and the number of calls is bounded. `Exchange.own` tells the ids that the
model chose from those of tools and prompts and from a forced </think>: training must not score the latter.
One request has one prompt and any number of exchanges (`samples`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from inference.generation.text_stream import AnswerStream
from inference.tools.calls import run_call
from load_data.chat.chat_template import CALL, END_THINK, ChatTemplate, Messages
from load_data.skills import HELD_OUT
from utils.errors import UserError

MOST_CALLS = 4  # answers with calls in one exchange; after that the model is told to answer, once
NO_MORE = "error: no more calls; answer now"


@dataclass(frozen=True)
class Request:
    """The thinking and the tools that a request asks for."""

    thinking: bool = False
    budget: int | None = None  # most tokens of thinking; None for no limit
    tools: bool = False
    val_fraction: float = HELD_OUT  # of the standard library, closed to the tools

    def __post_init__(self):
        if self.budget is not None and self.budget < 0:
            raise UserError(f"a budget of {self.budget} thinking tokens: it must be 0 or above")

    def check(self, template: ChatTemplate) -> None:
        """Raise `UserError` if the model's template cannot do this."""
        if self.thinking or self.tools:
            template.part(CALL)


PLAIN = Request()


@dataclass
class Exchange:
    """One prompt, and all that follows it."""

    row: int
    prompt: list[int]
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # True where the model chose the id
    # with `record`: log-probabilities of all ids, 0 of those of tools; and `routing_codes` of prompt and ids,
    # without the last one that the model wrote, see `read_again`
    logprobs: list[float] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    messages: Messages = field(default_factory=list)  # answers, and results of tools between them
    thought: int = 0  # tokens of thinking so far
    written: int = 0  # tokens of the last answer
    finish_reason: str = ""  # of the last answer, as in `Answer`; "calls" if it was one call too many


def respond(
    generator: Generator,
    template: ChatTemplate,
    prompts: list[list[int]],
    params: SamplingParams,
    request: Request = PLAIN,
    stop_ids: Collection[int] | None = None,
    stop: tuple[str, ...] = (),
    on_text: Callable[[int, str, str], None] = lambda row, part, text: None,
    samples: int = 1,
    seeds: list[int] | None = None,
    record: bool = False,
) -> list[Exchange]:
    """Return what follows each prompt; a prompt of a request with thinking ends in `<think>`.

    `params.max_new_tokens` bounds each answer. `stop_ids` are by default those of the template; `stop` are
    texts that end an answer. `on_text(row, part, text)` receives text as it is written: of the parts
    `thinking`, `content` and `call`, and then the `result` of a call. Prompt p is answered `samples` times,
    in rows p * samples and following. `seeds`: of each row, by default made from that of `params`.
    `record`: fill in `logprobs` and `experts`.
    """
    request.check(template)
    stop_ids = template.stop_ids if stop_ids is None else stop_ids
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    rows = active = [Exchange(row, prompt) for row, prompt in enumerate(prompts)]
    seeds = seeds or [row_seed(params.seed, row) for row in range(len(rows))]
    for turn in range(MOST_CALLS + 2):
        streams = [AnswerStream(template.tokenizer, request.thinking, stop) for _ in active]
        options = {"record": record, "samples": 1 if turn else samples}
        # New random numbers in each turn, which depend on no other row. Two numbers, so that no later turn
        # repeats the first one of another row.
        options["seeds"] = [row_seed(seeds[one.row], 0, turn) if turn else seeds[one.row] for one in active]
        write(generator, active, streams, params, request, stop_ids, on_text, options)
        active = [one for one in active if goes_on(one, template, request, turn, generator.context, on_text)]
        if not active:
            break
    return rows


def write(generator, active: list[Exchange], streams, params, request, stop_ids, on_text, options) -> None:
    """Write one answer in each of the `active` exchanges; `options` are for the generator."""
    special = streams[0].tokenizer.special_ids if streams else {}
    forced, leaving = {}, {special.get(END_THINK), special.get(CALL)}

    def on_token(place, token):
        on_text(active[place].row, *streams[place].push(token))
        return streams[place].stopped

    def must(place, written):
        if len(written) != request.budget - active[place].thought or not leaving.isdisjoint(written):
            return None
        forced[place] = len(written)
        return special[END_THINK]

    if request.thinking and request.budget is not None:
        options["must"] = must
    begun = [one.prompt + one.ids for one in active[:: options["samples"]]]
    answers = generator.generate(begun, params, stop_ids, on_token, **options)
    for place, (one, stream, answer) in enumerate(zip(active, streams, answers, strict=True)):
        on_text(one.row, *stream.finish())
        if request.thinking:
            one.thought += next((n for n, token in enumerate(answer) if token in leaving), len(answer))
        one.ids, one.written = one.ids + answer, len(answer)
        if options["record"]:
            one.logprobs += answer.logprobs
            one.experts = read_again(one.experts, answer.experts)
        one.own += [number != forced.get(place) for number in range(len(answer))]
        one.messages.append(stream.message())
        one.finish_reason = answer.finish_reason


def read_again(before: list[int], now: list[int]) -> list[int]:
    """Return routing codes `now` of ids of which the first were read `before`. Where rounding chose other
    experts, no code is right for what came before and after a call alike: -1, which equals none."""
    return [new if new == old else -1 for old, new in zip(before, now)] + now[len(before) :]


def goes_on(one: Exchange, template: ChatTemplate, request: Request, turn: int, context, on_text) -> bool:
    """Run the calls of the last answer, if there are any; return whether the model is to answer again."""
    calls = one.messages[-1].get("tool_calls")
    if not request.tools or not calls or one.ids[-1] != template.end_of_turn[0]:
        return False  # an answer, or one that was cut
    if turn > MOST_CALLS:
        one.finish_reason = "calls"
        return False
    allowed, fraction = turn < MOST_CALLS, request.val_fraction
    results = [run_call(call, fraction) if allowed else NO_MORE for call in calls]
    for result in results:
        on_text(one.row, "result", result)
    one.messages += [{"role": "tool", "content": result} for result in results]
    reply = template.reply(results, request.thinking)
    one.ids, one.own = one.ids + reply, one.own + [False] * len(reply)
    one.logprobs += [0.0] * len(reply) if one.logprobs else []
    if len(one.prompt) + len(one.ids) < context:
        return True
    one.finish_reason = "length"
    return False
