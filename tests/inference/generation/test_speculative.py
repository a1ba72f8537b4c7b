"""Speculative decoding against the obvious loop (greedy) and against enumerated probabilities (drawing)."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import RepetitionPenaltyLogitsProcessor
from transformers.generation.utils import _speculative_sampling

from inference.generation import speculative
from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, filtered_probs
from inference.generation.speculative import SpeculativeGenerator, accept
from model.tinyseek import TinySeek
from tests.inference.generation.test_generator import slow_greedy
from tests.modules.test_mtp import MLA, MOE
from tests.modules.tools import shake, small_config
from utils.errors import UserError

SHAPES = {
    "GQA": {},
    "window": {"sliding_window": 5},
    "dual chunks": {"dual_chunk_attention_config": {"chunk_size": 7, "local_size": 2}},
    "pattern, sinks": {"sliding_window": 4, "sliding_window_pattern": 2, "attention_sinks": 1},
    "experts": MOE,
    "MLA": MLA,
    "MLA, experts": MLA | MOE,
    "soft cap": {"final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    "dropout": {"dropout": 0.5, "attention_dropout": 0.5},
}
PROMPTS = [[5, 17, 9, 30, 2], [23], [], [8, 8, 1, 60, 41, 7, 12, 33, 50, 11, 4, 19]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)


def build(kind="sequential", dtype=torch.float64, seed=1, **changes) -> TinySeek:
    return shake(TinySeek(small_config(mtp=kind, **changes)), seed).to(dtype).eval()


class Tokens:
    """A cache that holds the tokens themselves; the verbs that decoding uses."""

    def __init__(self):
        self.tokens = []

    @property
    def lengths(self):
        return [len(self.tokens)]

    def crop(self, lengths):
        assert 0 <= lengths[0] <= len(self.tokens)
        del self.tokens[lengths[0] :]


@pytest.fixture(autouse=True)
def own_caches_and_drafts(monkeypatch):
    """The models of this file that are no `TinySeek` bring their own caches and drafts."""
    for name in ("make_cache", "make_draft_cache", "draft"):
        real = getattr(speculative, name)

        def one(model, *rest, name=name, real=real, **options):
            own = getattr(model, name, None)
            return own(*rest, **options) if own else real(model, *rest, **options)

        monkeypatch.setattr(speculative, name, one)


class Table(nn.Module):
    """A trunk that knows the logits after every beginning of a text, by a function of its tokens."""

    def __init__(self, logits, vocab_size, context=64):
        super().__init__()
        self.rule, self.place = logits, nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            vocab_size=vocab_size, max_position_embeddings=context, mtp="sequential"
        )

    def make_cache(self, rows, capacity, kv_cache="full"):
        return Tokens()

    def forward(self, ids, cache, last_only=False):
        rows = []
        for token in ids[0].tolist():
            cache.tokens.append(token)
            rows.append(self.rule(tuple(cache.tokens)))
        logits, hidden = torch.stack(rows)[None], torch.ones(1, len(rows), 1)
        return SimpleNamespace(logits=logits[:, -1:] if last_only else logits, hidden=hidden)


class WithDrafts(nn.Module):
    """A trunk with a head that drafts by a function of the text so far: logits (V,) for the next token.

    The head sees nothing but what it is handed, so a wrong token in its cache is a wrong text. Where a trunk
    can be asked, it also checks that the hidden states are those of the tokens before.
    """

    def __init__(self, trunk, drafts, check=True):
        super().__init__()
        self.trunk, self.drafts, self.check, self.config = trunk, drafts, check, trunk.config

    def forward(self, ids, cache, last_only=False):
        if cache.lengths == [0]:
            self.first = ids[0, 0].item()
        return self.trunk(ids, cache=cache, last_only=last_only)

    def make_cache(self, rows, capacity, kv_cache="full"):
        return speculative.make_cache(self.trunk, rows, capacity)

    def make_draft_cache(self, rows, capacity):
        return Tokens()

    def draft(self, hidden, following, cache, last_only=False):
        tokens = following.shape[1]
        assert hidden.shape[:2] == following.shape == (1, tokens)
        cache.tokens += following[0].tolist()
        text = [self.first, *cache.tokens]
        if self.check and not hidden.isnan().all():
            expected = self.trunk(torch.tensor([text[:-1]])).hidden[:, -tokens:]
            torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-10)
        logits = self.drafts(tuple(text))
        columns = 1 if last_only else tokens
        return logits.expand(1, columns, -1), torch.full_like(hidden, torch.nan)


def drafts_like(trunk, when):
    """The trunk's own logits where `when(text)` holds, their opposites elsewhere."""

    def drafts(text):
        logits = trunk(torch.tensor([text])).logits[0, -1]
        return logits if when(text) else -logits

    return drafts


WHEN = {
    "always": lambda text: True,
    "sometimes": lambda text: (7 * len(text) + text[-1]) % 3 > 0,
    "never": lambda text: False,
}


@pytest.mark.parametrize("kind, lengths", [("parallel", [1]), ("sequential", [1, 4])])
@pytest.mark.parametrize("name", SHAPES)
def test_greedy_writes_what_the_trunk_would(name, kind, lengths):
    """Token for token in fp64, whatever a head of random weights drafts."""
    model = build(kind, **SHAPES[name])
    expected = [slow_greedy(model, prompt, 15)[0] for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_new_tokens=15)
    for length in lengths:
        generator = SpeculativeGenerator(model, draft_length=length)
        assert [generator.generate([prompt], params)[0] for prompt in PROMPTS] == expected
        assert generator.drafted > 0


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("seed, changes", [(1, {}), (2, {"sliding_window": 4}), (3, MLA)])
def test_greedy_with_drafts_of_every_quality(when, seed, changes):
    """All accepted, some, none: 15 tokens each time, in as many rounds as that takes."""
    trunk, prompt = build(seed=seed, **changes), PROMPTS[seed]
    expected, params = slow_greedy(trunk, prompt, 15)[0], SamplingParams(temperature=0, max_new_tokens=15)
    model = WithDrafts(trunk, drafts_like(trunk, WHEN[when]))
    for length in (1, 2, 4):
        generator, calls = SpeculativeGenerator(model, draft_length=length), []
        counter = model.register_forward_pre_hook(lambda module, ids, to=calls: to.append(ids[0].shape[1]))
        assert generator.generate([prompt], params)[0] == expected
        rate = generator.accepted / generator.drafted
        assert {"always": rate == 1, "sometimes": 0 < rate < 1, "never": rate == 0}[when]
        assert calls == rounds(length, prompt or [0], expected, WHEN[when])
        counter.remove()


def rounds(length, prompt, answer, when):
    """How many tokens the trunk reads in each forward: the prompt, then in each round the last token that
    was written and the drafts, never more than could still be written."""
    written, calls = 1, [len(prompt)]
    while written < len(answer):
        drafted = min(length, len(answer) - written - 1)
        hits = 0
        while hits < drafted and when(prompt + answer[: written + hits]):
            hits += 1
        written += hits + 1
        calls.append(1 + drafted)
    return calls


@pytest.mark.parametrize("when, length", [("always", 1), ("always", 4), ("sometimes", 2)])
def test_the_penalty_looks_at_drafts_too(when, length):
    """Against a loop with the processor of `transformers`; a perfect head stays perfect."""
    trunk, processor = build(seed=5), RepetitionPenaltyLogitsProcessor(2.5)
    params = SamplingParams(temperature=0, repetition_penalty=2.5, max_new_tokens=20)
    for prompt in PROMPTS[:2]:
        ids = torch.tensor([prompt])
        for _ in range(20):
            best = processor(ids, trunk(ids).logits[:, -1]).argmax(dim=1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
        expected = ids[0, len(prompt) :].tolist()
        assert expected != slow_greedy(trunk, prompt, 20)[0]
        generator = SpeculativeGenerator(WithDrafts(trunk, drafts_like(trunk, WHEN[when])), 0, length)
        assert generator.generate([prompt], params)[0] == expected
        assert (generator.accepted == generator.drafted) == (when == "always")


@pytest.mark.parametrize("when", WHEN)
def test_a_required_token_takes_the_place_of_a_draft(when):
    """At every place of a round the text is that without drafts, and goes on from the required token."""
    trunk = build()
    model = WithDrafts(trunk, drafts_like(trunk, WHEN[when]))
    params = SamplingParams(temperature=0, max_new_tokens=12)
    for place in (0, 1, 2, 3, 7):
        options = {"must": lambda row, written, place=place: 7 if len(written) == place else None}
        plain = Generator(trunk).generate([PROMPTS[0]], params, **options)
        assert plain[0][place] == 7
        for length in (1, 4):
            drafting = SpeculativeGenerator(model, draft_length=length)
            assert drafting.generate([PROMPTS[0]], params, **options) == plain


def test_the_opposite_is_never_the_likeliest():
    """What `never` rests on."""
    trunk = build()
    logits = trunk(torch.tensor([PROMPTS[0]])).logits
    assert not (logits.argmax(dim=-1) == (-logits).argmax(dim=-1)).any()


@pytest.mark.parametrize("length", [1, 3])
def test_fp32_differs_only_at_near_ties(length):
    for seed in range(3):
        model = build(dtype=torch.float32, seed=seed)
        params = SamplingParams(temperature=0, max_new_tokens=30)
        for prompt in PROMPTS[:2]:
            expected, gaps = slow_greedy(model, prompt, 30)
            answer = SpeculativeGenerator(model, draft_length=length).generate([prompt], params)[0]
            different = [step for step in range(30) if answer[step] != expected[step]]
            assert not different or gaps[different[0]] < 1e-4


@pytest.mark.parametrize("kind, length", [("parallel", 1), ("sequential", 1), ("sequential", 3)])
@pytest.mark.parametrize("name", ["GQA", "experts", "window", "MLA"])
def test_drafts_are_those_of_the_head_without_a_cache(monkeypatch, name, kind, length):
    """Each logit that the engine got, against the head over the whole text: the trunk's hidden states, then
    one of the head's own for each draft."""
    model = build(kind, **SHAPES[name])
    generator, heard = SpeculativeGenerator(model, draft_length=length), []
    guess, draft = generator.guess, speculative.draft

    def spy_on_guess(length, hidden, following, cache, sampler):
        heard.append([])
        return guess(length, hidden, following, cache, sampler)

    def spy_on_draft(model, hidden, following, cache, last_only):
        answer = draft(model, hidden, following, cache, last_only)
        heard[-1].append((following[0, -1].item(), answer[0][0]))
        return answer

    generator.guess = spy_on_guess
    monkeypatch.setattr(speculative, "draft", spy_on_draft)
    written, moments = [], []
    params = SamplingParams(temperature=1.0, max_new_tokens=15, seed=3)

    def on_token(row, token):
        moments.append((len(heard), len(written)))  # rounds so far
        written.append(token)

    generator.generate([PROMPTS[0]], params, on_token=on_token)
    compared = 0
    with torch.no_grad():
        for number, drafts in enumerate(heard):
            text = PROMPTS[0] + written[: sum(rounds <= number for rounds, _ in moments)]
            hidden = model(torch.tensor([text[:-1]])).hidden
            following = text[1:]
            assert not drafts or drafts[0][0] == following[-1]
            for place, (_, logits) in enumerate(drafts):
                expected, second = draft(model, hidden, torch.tensor([following]))
                torch.testing.assert_close(logits, expected[:, -1], rtol=0, atol=1e-9)
                hidden = torch.cat([hidden, second[:, -1:]], dim=1)
                following += [token for token, _ in drafts[place + 1 : place + 2]]
                compared += 1
    assert compared > 5


def test_a_stop_token_inside_a_draft_ends_the_row():
    """Perfect drafts of four: the stop token comes at each place of a round."""
    trunk = build()
    free = slow_greedy(trunk, PROMPTS[0], 20)[0]
    places = {token: place for place, token in reversed(list(enumerate(free)))}
    assert len(places) > 6
    for when in ("always", "sometimes"):
        model = WithDrafts(trunk, drafts_like(trunk, WHEN[when]))
        for token, place in places.items():
            generator, heard = SpeculativeGenerator(model, draft_length=4), []
            answer = generator.generate([PROMPTS[0]], GREEDY, {token}, lambda *new, to=heard: to.append(new))
            assert answer == [free[: place + 1]] and answer[0].finish_reason == "stop"
            assert heard == [(0, token) for token in answer[0]]


def test_a_listener_ends_the_row_inside_a_draft():
    trunk = build()
    free = slow_greedy(trunk, PROMPTS[0], 20)[0]
    for stop in range(1, 12):
        heard = []

        def on_token(row, token, heard=heard, stop=stop):
            heard.append(token)
            return len(heard) == stop

        model = WithDrafts(trunk, drafts_like(trunk, WHEN["always"]))
        generator = SpeculativeGenerator(model, draft_length=4)
        answers = generator.generate([PROMPTS[0]], GREEDY, on_token=on_token)
        assert answers == [free[:stop]] and answers[0].finish_reason == "stop"


def test_the_context_is_never_exceeded():
    """As with `Generator`: 64 tokens in all, never more than `max_new_tokens`, and no forward beyond."""
    trunk = build()
    text = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    for size, wanted, given in [(10, 20, 20), (60, 1, 1), (62, 2, 2), (61, 9, 3), (32, 200, 32), (64, 5, 0)]:
        expected = slow_greedy(trunk, text[:size], given)[0]
        params = SamplingParams(temperature=0, max_new_tokens=wanted)
        for when, length in itertools.product(("always", "never"), (1, 4)):
            model = WithDrafts(trunk, drafts_like(trunk, WHEN[when]), check=False)
            generator = SpeculativeGenerator(model, draft_length=length)
            answer = generator.generate([text[:size]], params)[0]
            assert answer == expected and answer.finish_reason == "length"
    with pytest.raises(UserError, match="a prompt of 65 tokens does not fit in the context of 64"):
        generator.generate([text[:65]], GREEDY)
    tight = SpeculativeGenerator(build(max_position_embeddings=1))
    assert tight.generate([[5]], GREEDY) == tight.generate([[]], GREEDY) == [[]]


def test_several_rows_and_none():
    model = build()
    assert SpeculativeGenerator(model).generate(PROMPTS, GREEDY) == Generator(model).generate(PROMPTS, GREEDY)
    assert SpeculativeGenerator(model).generate([], GREEDY) == []
    generator = SpeculativeGenerator(model, start_id=9)
    assert generator.generate([[]], GREEDY) == generator.generate([[9]], GREEDY)


def test_nothing_is_left_over():
    """Neither in the model nor in the global random state; Ctrl-C in the middle included."""
    model = build(dropout=0.5).train()
    generator, threads = SpeculativeGenerator(model, draft_length=2), torch.get_num_threads()
    params = SamplingParams(max_new_tokens=20, seed=4)
    torch.manual_seed(0)
    first, state = generator.generate([[5]], params), torch.get_rng_state()
    assert model.training
    torch.set_num_threads(threads + 1)

    def interrupt(row, token):
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate([[5]], params, on_token=interrupt)
    assert model.training and torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    assert generator.generate([[5]], params) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    other = SamplingParams(max_new_tokens=20, seed=5)
    assert generator.generate([[5]], other) != first


def test_what_cannot_draft_is_an_error():
    with pytest.raises(UserError, match="model.mtp=sequential"):
        SpeculativeGenerator(build("none"))
    for kind, length in (("parallel", 2), ("sequential", 0), ("sequential", 16), ("parallel", 0)):
        with pytest.raises(UserError, match=f"draft_length={length}"):
            SpeculativeGenerator(build(kind), draft_length=length)
    for shape in ({}, {"sliding_window_pattern": 2, "attention_sinks": 2}):
        trunk = build(sliding_window=3, **shape)  # 15: the longest draft that a rolling cache takes back
        for head in (trunk, WithDrafts(trunk, drafts_like(trunk, WHEN["sometimes"]))):
            params = SamplingParams(temperature=0, max_new_tokens=40)
            answer = SpeculativeGenerator(head, draft_length=15).generate([PROMPTS[3]], params)[0]
            assert answer == slow_greedy(trunk, PROMPTS[3], 40)[0]


# Drawing. Every text of three tokens has a probability that can be written down.


def table(seed, vocab_size, sharpness=1.5):
    """Random logits after every text, the same each time it is asked."""
    known = {}

    def logits(text):
        if text not in known:
            number = sum((token + 1) * (vocab_size + 1) ** place for place, token in enumerate(text))
            generator = torch.Generator().manual_seed(10 * number + seed)
            known[text] = sharpness * torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        return known[text]

    return logits


TRUNK, OTHER = table(1, 4), table(2, 4)
DRAFTS = {
    "good": lambda text: TRUNK(text) + 0.4 * OTHER(text),
    "bad": lambda text: -TRUNK(text),
    "one-hot": lambda text: torch.where(OTHER(text) == OTHER(text).max(), 100.0, -100.0).double(),
    "perfect": TRUNK,
}
FILTERS = {
    "plain": {},
    "cold, top-p": {"temperature": 0.8, "top_p": 0.85},
    "penalty, top-k": {"repetition_penalty": 1.6, "top_k": 3},
    "hot, min-p": {"temperature": 1.6, "min_p": 0.2},
}


def exact_probabilities(prompt, params, length):
    """Of every text of `length` tokens after the prompt, by the chain rule."""
    probabilities = {}
    for text in itertools.product(range(4), repeat=length):
        probability, so_far = 1.0, tuple(prompt)
        for token in text:
            seen = torch.zeros(1, 4, dtype=torch.bool)
            seen[0, list(so_far)] = True
            probability *= filtered_probs(TRUNK(so_far)[None], params, seen)[0, token].item()
            so_far += (token,)
        probabilities[text] = probability
    return probabilities


def plausibility(counts, probabilities):
    """How often chance would give counts as far off: the chi-square test; rare texts are one cell."""
    total, cells, rare = sum(counts.values()), [], (0.0, 0)
    for text, probability in probabilities.items():
        cell = (probability * total, counts.get(text, 0))
        if cell[0] >= 8:
            cells.append(cell)
        else:
            rare = (rare[0] + cell[0], rare[1] + cell[1])
    if rare[0] >= 3:
        cells.append(rare)
    chi2 = sum((found - expected) ** 2 / expected for expected, found in cells)
    halves = torch.tensor([(len(cells) - 1) / 2, chi2 / 2], dtype=torch.float64)
    return torch.special.gammaincc(*halves).item()


@pytest.mark.parametrize(
    "drafts, filters, length",
    [
        ("good", "plain", 3), ("good", "penalty, top-k", 2), ("bad", "hot, min-p", 1),
        ("one-hot", "cold, top-p", 3), ("perfect", "penalty, top-k", 3),
    ],
)  # fmt: skip
def test_drawn_texts_have_the_probabilities_of_the_trunk(drafts, filters, length):
    """The first one, two and three tokens after a prompt, over many seeds, against the chain rule."""
    runs, prompt = 1000, [1, 2]
    model = WithDrafts(Table(TRUNK, 4), DRAFTS[drafts], check=False)
    generator = SpeculativeGenerator(model, draft_length=length)
    texts = []
    for seed in range(runs):
        params = SamplingParams(max_new_tokens=4, seed=seed, **FILTERS[filters])
        texts.append(tuple(generator.generate([prompt], params)[0]))
    for size in (1, 2, 3):
        counts = {}
        for text in texts:
            counts[text[:size]] = counts.get(text[:size], 0) + 1
        probabilities = exact_probabilities(prompt, params, size)
        assert all(probabilities[text] > 0 for text in counts)
        assert len([p for p in probabilities.values() if p > 0]) > 2**size - 1
        assert plausibility(counts, probabilities) > 1e-3
    rate = generator.accepted / generator.drafted
    assert rate == 1 if drafts == "perfect" else 0 < rate < 1


def test_the_check_above_can_fail():
    """Counts as they should be, and with 6 % of the texts moved."""
    probabilities = exact_probabilities([1, 2], SamplingParams(), 1)
    counts = {text: round(1000 * probability) for text, probability in probabilities.items()}
    assert plausibility(counts, probabilities) > 0.99
    first, second, *_ = sorted(counts, key=counts.get, reverse=True)
    moved = counts | {first: counts[first] - 60, second: counts[second] + 60}
    assert plausibility(moved, probabilities) < 1e-3


@pytest.fixture
def numbers(monkeypatch):
    """The random numbers that `accept` will use, in this order."""
    queue = []
    monkeypatch.setattr(speculative, "uniform", lambda generator: queue.pop(0))
    return queue


def random_probabilities(rows, vocab_size, seed, zeros=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64)
    logits[:, torch.randperm(vocab_size, generator=generator)[:zeros]] = -torch.inf
    return logits.softmax(dim=1)


@pytest.mark.parametrize("zeros", [0, 2])
def test_acceptance_over_all_random_numbers(numbers, zeros):
    """One draft, from each token with its probability q, over a grid of random numbers: the first token
    comes out with the trunk's p, the draft is accepted with probability sum min(p, q), and then the token
    after it is right too."""
    p, q = random_probabilities(2, 5, 1, zeros), random_probabilities(1, 5, 2, zeros)
    cells = 32
    grid = (torch.arange(cells) + 0.5) / cells
    first, accepted, second = torch.zeros(5), 0.0, torch.zeros(5)
    for token in range(5):
        if q[0, token] == 0:
            continue
        share = q[0, token].item() / cells**2
        for one, two in itertools.product(grid.tolist(), repeat=2):
            numbers[:] = [one, two]
            new = accept(p, [q], [token], None)
            assert not numbers and len(new) in (1, 2)
            first[new[0]] += share
            if len(new) == 2:
                accepted += share
                second[new[1]] += share
                assert new[0] == token
    torch.testing.assert_close(first.double(), p[0], rtol=0, atol=1 / cells)  # the grid has no finer steps
    assert abs(accepted - torch.minimum(p[0], q[0]).sum().item()) < 1 / cells
    torch.testing.assert_close((second / second.sum()).double(), p[1], rtol=0, atol=1 / cells)


def test_acceptance_is_that_of_transformers(numbers, monkeypatch):
    """The same random numbers for both: as many drafts accepted, and the last token drawn from the same
    probabilities, which theirs hands to `torch.multinomial` and ours to `draw`."""
    vocab_size, seen = 6, {}
    generator = torch.Generator().manual_seed(0)
    lengths = []
    real_draw = speculative.draw

    def their_multinomial(weights, num_samples):
        seen["theirs"] = weights.flatten()
        return weights.argmax(dim=-1, keepdim=True)

    def our_draw(weights, uniforms):
        seen["ours"] = weights.flatten() / weights.sum()
        return real_draw(weights, uniforms)

    monkeypatch.setattr(torch, "multinomial", their_multinomial)
    monkeypatch.setattr(speculative, "draw", our_draw)
    for trial in range(60):
        g = 1 + trial % 4
        p = random_probabilities(g + 1, vocab_size, trial)
        q = random_probabilities(g, vocab_size, 999 + trial)
        drafts = [torch.rand(vocab_size, generator=generator).argmax().item() for _ in range(g)]
        uniforms = torch.rand(g, generator=generator, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand_like", lambda like, u=uniforms: u.view(like.shape))
        tokens, matches = _speculative_sampling(
            torch.tensor([[0, *drafts]]), q.log()[None], g, p.log()[None]
        )
        numbers[:] = [*uniforms.tolist()[: min(matches.item() + 1, g)], 0.5]
        new = accept(p, list(q[:, None]), drafts, None)
        assert not numbers
        assert new[:-1] == tokens[0, :-1].tolist() and len(new) == matches + 1
        torch.testing.assert_close(seen["ours"], seen["theirs"], rtol=0, atol=1e-12)
        lengths.append((g, len(new)))
    assert {size for g, size in lengths if g == 4} >= {1, 2, 3}


def test_acceptance_at_its_borders(numbers):
    p = torch.tensor([[0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])
    q = torch.tensor([[0.5, 0.25, 0.25]])
    for greater_or_equal in (q, p[:1]):
        numbers[:] = [1.0, 0.3]
        assert accept(p, [greater_or_equal], [1], None) == [1, 1]  # accepted for every number
    numbers[:] = [2**-24, 0.6]  # p = 0: rejected for every number
    assert accept(p, [q], [0], None) == [2]
    numbers[:] = [0.4]
    assert accept(p[:1], [], [], None) == [1]  # nothing drafted: the trunk's own
    nearly = p[:1] * (1 + 1e-6)  # sums above 1, as rounding may make them: nothing is left of p - q
    numbers[:] = [1.0, 0.6]
    assert accept(p, [nearly], [1], None) == [2]


def test_random_numbers_are_above_zero(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    assert 0 < min(speculative.uniform(generator) for _ in range(100)) < 0.1
    monkeypatch.setattr(torch, "rand", lambda size, generator: torch.zeros(size))
    assert speculative.uniform(generator) == 1
