"""Span corruption: source and target restore the text, lengths are T5's, divisions do not matter."""

from collections import Counter
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from config.objectives import SpanConfig
from load_data.loader import IGNORED
from load_data.seq2seq import Seq2SeqLoader, collate, eval_pairs, framed_pair
from load_data.spans import SpanLoader, SpanPairs, corrupt, exact_share, filled, segments, sentinel_ids
from load_data.spans import span_counts, with_gaps
from load_data.tokenization.tokenizer import SENTINELS, CharTokenizer
from utils.errors import UserError

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz").with_special(SENTINELS)
GAPS = sentinel_ids(TOKENIZER)
TOKENS = np.random.default_rng(0).integers(8, 34, 1000).astype(np.uint16)  # letters


def pairs(length=40, tokens=TOKENS, **changes):
    """Windows of `length` of the letters above."""
    return SpanPairs(tokens, length, replace(SpanConfig(), **changes), TOKENIZER)


def split(ids):
    """The pieces of a source or a target between sentinels, and the sentinels, in their order."""
    pieces, found = [[]], []
    for one in ids:
        if one in GAPS:
            found.append(one)
            pieces.append([])
        else:
            pieces[-1].append(one)
    return pieces, found


def restored(source, target):
    """The obvious inverse: the pieces of the source and of the target in turn."""
    kept, (nothing, *taken, end), names = split(source)[0], split(target)[0], split(target)[1]
    assert nothing == end == [] and split(source)[1] == GAPS[: len(taken)] and names == GAPS[: len(kept)]
    return [one for piece in chain(*zip(kept, [*taken, []], strict=True)) for one in piece]


@pytest.mark.parametrize("length", [3, 4, 5, 19, 20, 64, 255, 512])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.9, 1.5), (0.01, 9.0)])
def test_source_and_target_restore_the_window(length, density, mean):
    window, rng = np.arange(1000, 1000 + length), np.random.default_rng(length)
    taken, spans = span_counts(length, density, mean)
    many = [*range(spans + 1)]
    source, target = corrupt(window, many, taken, spans, rng)
    assert sorted(one for one in source + target if one >= 1000) == window.tolist()  # each once, on one side
    assert [one for one in source if one < 1000] == many[:-1]
    assert [one for one in target if one < 1000] == many
    assert filled(source, target, many) == window.tolist()
    # Text on both sides of every span: no two sentinels are neighbours, none is at an end.
    at = [place for place, one in enumerate(source) if one < 1000]
    assert min(np.diff([-1, *at, len(source)])) > 1
    assert len(source) == length - taken + spans and len(target) == taken + spans + 1


def test_lengths_are_those_of_the_paper():
    """512 tokens at 15 %: 77 are taken out in 26 spans (round(76.8 / 3)), as in T5's own code."""
    assert span_counts(512, 0.15, 3.0) == (77, 26)
    assert span_counts(100, 0.15, 3.0) == (15, 5)
    assert span_counts(3, 0.15, 3.0) == (1, 1)  # at least one span
    assert span_counts(10, 0.99, 1.0) == (8, 1)  # and text on both sides of each


def test_every_division_is_equally_likely():
    """T5's rule (`_random_segmentation`): the 10 ways to write 6 as 3 positive numbers. Within five standard
    deviations of 1000 each; a fault such as never drawing the last place is thirty away."""
    rng = np.random.default_rng(0)
    found = Counter(tuple(segments(6, 3, rng).tolist()) for _ in range(10_000))
    wanted = {(a, b, 6 - a - b) for a in range(1, 5) for b in range(1, 6 - a)}
    assert found.keys() == wanted and len(wanted) == 10
    assert all(abs(count - 1000) < 5 * 30 for count in found.values())
    assert segments(4, 4, rng).tolist() == [1, 1, 1, 1] and segments(4, 1, rng).tolist() == [4]


def test_a_pair_restores_its_text_between_the_ends():
    some = pairs()
    for number in range(len(some)):
        source, target = some[number]
        assert source[0] == TOKENIZER.eos_id and target[-1] == TOKENIZER.eos_id
        assert restored(source[1:], target[:-1]) == TOKENS[40 * number : 40 * number + 40].tolist()
    assert len(some) == 25 and some[3] == some[3]


def test_spans_differ_between_epochs_windows_and_seeds():
    one, other = pairs(), SpanPairs(TOKENS, 40, SpanConfig(), TOKENIZER, seed=1)
    drawn = [tuple(one.pair(0, epoch, 40).source) for epoch in range(-1, 6)]
    assert len(set(drawn)) == 7
    assert one.pair(0, 0, 40) == one.pair(0, 0, 40) != other.pair(0, 0, 40)
    same_text = pairs(tokens=np.tile(TOKENS[:40], 3))
    assert same_text[0] != same_text[1]


def rows(batches):
    """The rows of batches as sorted tuples, without padding."""
    found = []
    for batch in batches:
        for ids, real, labels in zip(batch["input_ids"], batch["padding_mask"], batch["labels"], strict=True):
            found.append((*ids[real].tolist(), None, *labels[labels != IGNORED].tolist()))
    return sorted(found, key=str)


def span_loader(rank=0, world=1, rows=8, accumulation=1):
    return SpanLoader(pairs(), rows, accumulation, rank, world, 3, start_id=0)


def task_loader(rank=0, world=1, rows=8, accumulation=1):
    some = [framed_pair(TOKENIZER, [8] * (1 + n % 7), [9 + n % 5] * (1 + n % 3)) for n in range(50)]
    return Seq2SeqLoader(some, rows, accumulation, rank, world, 3, pad_id=6, start_id=0)


@pytest.mark.parametrize("make", [span_loader, task_loader])
@pytest.mark.parametrize(("size", "accumulation", "world"), [(2, 1, 4), (1, 8, 1), (2, 2, 2)])
def test_a_step_is_the_same_however_it_is_divided_and_wherever_it_resumes(make, size, accumulation, world):
    whole = make()
    ranks = [make(rank, world, size, accumulation) for rank in range(world)]
    for _ in range(8):  # over the ends of epochs
        resumed = make()
        resumed.load_state_dict(whole.state_dict())
        expected = whole.next_step()
        again = resumed.next_step()
        assert all(torch.equal(a[key], b[key]) for a, b in zip(expected, again, strict=True) for key in a)
        assert rows(batch for one in ranks for batch in one.next_step()) == rows(expected)
    assert whole.epoch >= 1


def test_an_epoch_visits_every_pair_once():
    one = task_loader(rows=10)
    seen = rows(batch for _ in range(5) for batch in one.next_step())
    assert one.epoch_progress == 1.0
    again = rows(batch for _ in range(5) for batch in one.next_step())
    assert seen == again == rows([collate(one.pairs, 6, 0)])


def test_windows_may_begin_short():
    one = SpanLoader(pairs(), 2, 1, 0, 1, 0, start_length=10, start_id=0)
    short, long = one.next_step(0.0)[0], one.next_step(0.99)[0]
    assert short["input_ids"].shape == (8, 1 + 10 - 2 + 1) and long["input_ids"].shape == (2, 1 + 40 - 6 + 2)


def test_the_shift_and_the_padding_of_a_batch():
    batch = collate([framed_pair(TOKENIZER, [10, 11, 12], [20]), framed_pair(TOKENIZER, [], [30, 31])], 6, 5)
    assert batch["input_ids"].tolist() == [[0, 10, 11, 12], [0, 6, 6, 6]]
    assert batch["padding_mask"].tolist() == [[True] * 4, [True] + [False] * 3]
    assert batch["labels"].tolist() == [[20, 0, -100], [30, 31, 0]]
    assert batch["decoder_input_ids"].tolist() == [[5, 20, 6], [5, 30, 31]]
    assert batch["decoder_padding_mask"].tolist() == [[True, True, False], [True] * 3]


def test_decoder_inputs_are_those_of_transformers():
    """Its `_shift_right`: the labels behind the start token, with padding in the place of -100."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5PreTrainedModel

    batch = next(eval_pairs(pairs(), 4, pad_id=0, start_id=0))
    theirs = T5PreTrainedModel(T5Config(decoder_start_token_id=0, pad_token_id=0))
    assert torch.equal(batch["decoder_input_ids"], theirs._shift_right(batch["labels"]))


def test_held_out_pairs_are_read_once_and_shared_by_ranks():
    held = [framed_pair(TOKENIZER, [8 + n], [8]) for n in range(7)]
    whole = rows(eval_pairs(held, 2, pad_id=6, start_id=0))
    shared = [batch for rank in (0, 1) for batch in eval_pairs(held, 2, None, rank, 2, pad_id=6, start_id=0)]
    assert rows(shared) == whole and len(whole) == 7
    assert len(rows(eval_pairs(held, 2, 1, pad_id=6, start_id=0))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"length": 700}, "gives 35 spans, and the tokenizer has sentinels for 31"),
        ({"length": 2}, "data.sequence_length=2 must be at least 3"),
        ({"length": 1001}, "at most the 1000 tokens of the text"),
    ],
)
def test_windows_that_cannot_be_corrupted_are_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        pairs(**changes)


def test_windows_that_begin_too_short_are_one_line():
    with pytest.raises(UserError, match="data.start_length=2 must be at least 3"):
        SpanLoader(pairs(), 2, 1, 0, 1, 0, start_length=2, start_id=0)
    SpanLoader(pairs(), 2, 1, 0, 1, 0, start_length=3, start_id=0).next_step()


def test_a_tokenizer_without_sentinels_is_one_line():
    with pytest.raises(UserError, match="the tokenizer has no <extra_id_0>"):
        SpanPairs(TOKENS, 40, SpanConfig(), CharTokenizer("abc"))


def test_gaps_in_a_text_become_sentinels_and_nothing_else_does():
    a, b, c, d = (TOKENIZER.encode(letter)[0] for letter in "abcd")
    assert with_gaps(TOKENIZER, "ab <extra_id_0>c<extra_id_1>") == [a, b, GAPS[0], c, GAPS[1]]
    assert with_gaps(TOKENIZER, "<extra_id_0>") == [GAPS[0]]
    assert with_gaps(TOKENIZER, "ab") == [a, b]
    forged = with_gaps(TOKENIZER, "<|endoftext|><extra_id_x>")
    assert not {*forged} & {TOKENIZER.eos_id, *GAPS}
    assert filled([a, GAPS[0], b, GAPS[1]], [GAPS[0], c, d, GAPS[1], a, GAPS[2]], GAPS) == [a, c, d, b, a]
    assert filled([a, GAPS[0], b, GAPS[1]], [c, GAPS[1], d], GAPS) == [a, b, d]


@pytest.mark.parametrize("text", ["<extra_id_1>", "<extra_id_0> <extra_id_0>", "<extra_id_1><extra_id_0>",
                                  "".join(f"<extra_id_{n}>a" for n in range(32))])  # fmt: skip
def test_gaps_out_of_order_are_one_line(text):
    with pytest.raises(UserError, match="in this order, at most 31"):
        with_gaps(TOKENIZER, text)


def test_the_share_of_gaps_that_are_filled_exactly():
    """The sentinel that ends a target names no gap; a gap that the answer leaves out, or fills with more, is
    wrong."""
    a, b, c = range(8, 11)
    one, two = [GAPS[0], a, GAPS[1], b, c, GAPS[2]], [GAPS[0], c, GAPS[1]]
    assert exact_share([one, two], [one, two], GAPS) == 1
    assert exact_share([[GAPS[0], a, GAPS[1], b, GAPS[2]], two], [one, two], GAPS) == pytest.approx(2 / 3)
    assert exact_share([[], [*two, b]], [one, two], GAPS) == pytest.approx(1 / 3)
    assert exact_share([[GAPS[1], b, c], [GAPS[0], c, c]], [one, two], GAPS) == pytest.approx(1 / 3)
