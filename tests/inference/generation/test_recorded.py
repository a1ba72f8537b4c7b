"""Sampling that records: what was drawn is what is scored, however the rows were batched."""

import math

import pytest
import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams, row_seed
from inference.generation.speculative import SpeculativeGenerator
from modules.experts.router import routing_codes
from tests.inference.generation.test_generator import PROMPTS, SHAPES, build
from utils.errors import UserError

DRAWN = 8000  # a temperature that is off by a tenth is 5 deviations away


def chi_square(params) -> float:
    """How far `DRAWN` first tokens are from softmax(logits / temperature) of a plain forward, in standard
    deviations of the statistic: 0 in the mean if they follow it. Rare tokens count as one."""
    model = build(seed=4)
    prompt = [5, 17, 9]
    logits = model(torch.tensor([prompt])).logits[0, -1].detach()
    probs = (logits / params.temperature).softmax(-1)
    answers = Generator(model).generate([prompt], params, samples=DRAWN)
    counts = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=len(probs)).double()
    expected, rare = DRAWN * probs, DRAWN * probs < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    statistic = ((counts - expected).square() / expected.clamp(min=1e-9)).sum().item()
    freedom = len(expected) - 1
    assert freedom > 5
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_what_is_drawn_is_what_is_scored(temperature):
    assert abs(chi_square(SamplingParams(temperature, max_new_tokens=1, seed=3))) < 4


@pytest.mark.parametrize("name, value", [
    ("top_k", 10), ("top_p", 0.9), ("min_p", 0.1), ("repetition_penalty", 50.0), ("temperature", 0),
])  # fmt: skip
def test_what_would_break_that_is_refused(name, value):
    """Every other rule draws from another distribution than the one that is scored, which shows at once."""
    params = SamplingParams(**{name: value}, max_new_tokens=1, seed=3)
    assert name == "temperature" or chi_square(params) > 8
    with pytest.raises(UserError, match=name):
        Generator(build()).generate([[5]], params, record=True)


@pytest.mark.parametrize("name", ["GQA", "pattern, sinks", "dynamic", "latent attention", "experts"])
def test_samples_of_one_batch_are_what_they_would_be_alone(name):
    """Prompts of five lengths, three samples each, of which some end early and leave the batch: tokens,
    log-probabilities by a plain forward, and the experts of each token."""
    model, params = build(**SHAPES[name]), SamplingParams(0.9, max_new_tokens=12)
    seeds = [row_seed(7, prompt, sample) for prompt in range(len(PROMPTS)) for sample in range(3)]
    ends = set(range(0, 61, 9))
    together = Generator(model).generate(PROMPTS, params, ends, samples=3, seeds=seeds, record=True)
    assert len({len(answer) for answer in together}) > 2
    for row, answer in enumerate(together):
        prompt = PROMPTS[row // 3] or [0]
        (alone,) = Generator(model, fast=False).generate([prompt], params, ends, seeds=[seeds[row]])
        assert alone == answer and alone.finish_reason == answer.finish_reason
        planned = [7] * (12 - len(answer))  # rotary embeddings may depend on the length it might have had
        output = model(torch.tensor([prompt + answer + planned]))
        scores = (output.logits[0] / 0.9).log_softmax(-1)
        scored = [scores[len(prompt) + n - 1, token].item() for n, token in enumerate(answer)]
        assert answer.logprobs == pytest.approx(scored, abs=1e-9)
        codes = routing_codes(output.routings).tolist() if output.routings else []
        assert answer.experts == codes[: len(prompt) + len(answer) - 1]


@pytest.mark.parametrize("fast", [True, False])
def test_a_prompt_is_read_once_and_finished_rows_leave(monkeypatch, fast):
    """The batch of each forward: the prompts, then all samples, then fewer by halves."""
    generator, sizes = Generator(build(), fast=fast), []
    forward = generator.forward

    def counted(ids, cache, new, recorded, decoder=None):
        sizes.append(len(ids))
        assert (decoder is not None) == (fast and len(sizes) > 1)
        return forward(ids, cache, new, recorded, decoder)

    monkeypatch.setattr(generator, "forward", counted)
    params = SamplingParams(max_new_tokens=30, seed=1)
    answers = generator.generate([[5, 1], [9]], params, set(range(0, 61, 9)), samples=8)
    assert sizes[0] == 2 and sizes[1] == 16 and sizes[-1] <= 2
    lengths = [len(answer) for answer in answers]
    for step, size in enumerate(sizes[1:], start=1):
        left = sum(length > step for length in lengths)
        assert left <= size < 2 * left
    assert sizes[-1] < 16


def test_a_generator_with_drafts_records_without_them():
    model = build(mtp="sequential")
    params = SamplingParams(max_new_tokens=6, seed=2)
    plain = Generator(model).generate([[5, 1]], params, record=True)
    drafting = SpeculativeGenerator(model).generate([[5, 1]], params, record=True)
    assert plain == drafting and plain[0].logprobs == drafting[0].logprobs
