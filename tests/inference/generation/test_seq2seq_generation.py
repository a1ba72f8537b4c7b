"""`Generator` writes about sources, against the obvious loop without a cache and against Hugging Face's."""

import pytest
import torch

from inference.generation.generator import Generator
from inference.generation.sampling import SamplingParams
from model.caches import make_cache
from tests.model.test_encoder_decoder import build, twin

SOURCES = [[5, 17, 9, 30, 2], [23], [8, 8, 1, 60, 41, 7, 12, 33, 50, 11, 4, 19], [44, 3], []]
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
FREE = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, max_new_tokens=20, seed=5)
START = [[0]] * len(SOURCES)


@pytest.fixture(scope="module")
def model():
    return build(dropout=0.5, tie_word_embeddings=False)  # tied ones repeat themselves


@torch.no_grad()
def slow_greedy(model, source, written, count):
    """Greedy decoding by the definition: everything again for each token."""
    mask, ids = torch.tensor([[bool(source)] * max(1, len(source))]), torch.tensor([source or [0]])
    written = list(written)
    for _ in range(count):
        logits = model(ids, padding_mask=mask, decoder_input_ids=torch.tensor([written])).logits[0, -1]
        written.append(logits.argmax().item())
    return written[-count:]


def test_greedy_is_that_of_the_loop_and_the_encoder_runs_once(model):
    """Sources and beginnings of different lengths, and rows that leave the batch early."""
    beginnings = [[0], [0, 7, 7], [0], [0, 1], [0, 3, 5, 8, 13]]
    expected = [slow_greedy(model, *both, 20) for both in zip(SOURCES, beginnings, strict=True)]
    assert len({tuple(row) for row in expected}) == len(expected)  # what is written depends on the source
    calls = []
    hook = model.encoder.register_forward_hook(lambda *call: calls.append(call))
    reader = model.reading(SOURCES)
    generator = Generator(reader)
    assert generator.generate(beginnings, GREEDY) == expected
    ends = [2, 20, 4, 1, 9]  # row 1 alone goes on to the end
    left = [iter([False] * (end - 1) + [True]) for end in ends]
    short = generator.generate(beginnings, GREEDY, on_token=lambda row, token: next(left[row]))
    assert short == [row[:n] for row, n in zip(expected, ends, strict=True)]
    hook.remove()
    assert len(calls) == 1 and generator.why_plain


def test_greedy_is_that_of_transformers(model):
    """`generate` with its own cache, left-padded sources, and an end token."""
    sources = SOURCES[:-1]
    width = max(map(len, sources))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in sources])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in sources])
    ours = Generator(model.reading(sources)).generate(START[:-1], GREEDY)
    stop = ours[0][5]
    ours = Generator(model.reading(sources)).generate(START[:-1], GREEDY, stop_ids={stop})
    theirs = twin(model).generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=stop,
    )  # fmt: skip
    for mine, other in zip(ours, theirs.tolist(), strict=True):
        assert mine == other[1 : 1 + len(mine)] and not any(other[1 + len(mine) :])
    assert ours[0].finish_reason == "stop" and len(ours[0]) <= 6


def test_samples_do_not_depend_on_the_other_rows(model):
    """Three continuations of each source, in one batch and each by itself."""
    together = Generator(model.reading(SOURCES)).generate(START, FREE, samples=3, seeds=list(range(15)))
    assert len({tuple(row) for row in together}) == 15
    for number, row in enumerate(together):
        alone = Generator(model.reading([SOURCES[number // 3]])).generate([[0]], FREE, seeds=[number])
        assert alone == [row]


def test_crop_forgets_what_was_written_and_keeps_the_source(model):
    reader, written = model.reading(SOURCES), torch.randint(1, 61, (5, 6))
    cache, all_at_once = make_cache(reader, 5, 9), make_cache(reader, 5, 9)
    reader.eval()
    reader(torch.cat([written[:, :2], torch.full((5, 3), 9)], dim=1), cache=cache)
    cache.crop([2] * 5)
    logits = reader(written[:, 2:], cache=cache).logits
    torch.testing.assert_close(logits, reader(written, cache=all_at_once).logits[:, 2:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_left_alone(model, training):
    """No dropout while it reads and writes, whatever mode it is in."""
    model.train(training)
    first, second = (Generator(model.reading(SOURCES)).generate(START, GREEDY) for _ in range(2))
    assert first == second and all(part.training == training for part in model.modules())
    model.eval()


def test_as_many_rows_as_sources(model):
    with pytest.raises(ValueError, match="2 rows to write for 5 sources"):
        Generator(model.reading(SOURCES)).generate([[0]] * 2, GREEDY)
