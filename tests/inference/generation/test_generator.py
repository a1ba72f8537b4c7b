"""The engine against the obvious loop: one forward over the whole row for each new token, without a cache."""

from contextlib import ExitStack
from threading import Thread

import pytest
import torch

from inference.generation.generator import Generator, few_threads
from inference.generation.sampling import SamplingParams, row_seed
from model.tinyseek import TinySeek
from tests.modules.tools import shake, small_config
from utils.errors import UserError

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 12}
MLA = {"attention_kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
       "v_head_dim": 7}  # fmt: skip
SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "no QK-norm": {"qk_norm": False},
    "bias": {"attention_bias": True},
    "interleaved": {"rope_interleaved": True},
    "window": {"sliding_window": 5},
    "window wider than the text": {"sliding_window": 60},
    "window, sinks": {"sliding_window": 4, "attention_sinks": 3},
    "pattern, sinks": {"sliding_window": 4, "sliding_window_pattern": 2, "attention_sinks": 1},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0,
                                 "original_max_position_embeddings": 16}},
    "longrope, half of the channels": {"partial_rotary_factor": 0.5, "rope_scaling": {
        "rope_type": "longrope", "short_factor": [1.5, 2.0], "long_factor": [6.0, 8.0],
        "original_max_position_embeddings": 24}},
    "untied": {"tie_word_embeddings": False},
    "soft cap": {"final_logit_softcapping": 5.0},
    "eager": {"attn_implementation": "eager"},
    "dropout": {"dropout": 0.5, "attention_dropout": 0.5},
    "experts": MOE | {"router_jitter_noise": 0.5},
    "experts, softmax, first layer dense": MOE | {"scoring_func": "softmax", "first_k_dense_replace": 1},
    "experts in groups, window": MOE | {"n_group": 3, "topk_group": 2, "sliding_window": 5},
    "latent attention": MLA,
    "latent attention, queries compressed, experts": MLA | MOE | {"q_lora_rank": 9},
    "latent attention, yarn": MLA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                      "original_max_position_embeddings": 16}},
}
PROMPTS = [[5, 17, 9, 30, 2], [23], [], [8, 8, 1, 60, 41, 7, 12, 33, 50, 11, 4, 19], [44, 3]]
GREEDY = SamplingParams(temperature=0, max_new_tokens=20)
FREE = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.1, max_new_tokens=20, seed=5)


def build(dtype=torch.float64, seed=1, **changes):
    return shake(TinySeek(small_config(**changes)), seed).to(dtype).eval()


@torch.no_grad()
def slow_greedy(model, prompt, count):
    """Greedy decoding by the definition. Returns tokens and, for each, how far the second best logit was.

    The text has its final length from the start, for rotary embeddings that depend on it; what is not yet
    written is filled with a token that nobody sees."""
    ids, gaps = list(prompt) or [0], []
    for left in range(count, 0, -1):
        best = model(torch.tensor([ids + [7] * left])).logits[0, len(ids) - 1].topk(2)
        ids.append(best.indices[0].item())
        gaps.append((best.values[0] - best.values[1]).item())
    return ids[len(prompt) or 1 :], gaps


@pytest.mark.parametrize("name", SHAPES)
def test_cached_equals_uncached(name):
    """Token for token in fp64, alone (fast path where it can), alone by the plain path, and in a batch."""
    model = build(**SHAPES[name])
    expected = [slow_greedy(model, prompt, 20)[0] for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1  # the prompt matters
    for fast in (True, False):
        generator = Generator(model, fast=fast)
        assert [generator.generate([prompt], GREEDY)[0] for prompt in PROMPTS] == expected
    assert Generator(model).generate(PROMPTS, GREEDY) == expected


@pytest.mark.parametrize("fast", [True, False])
def test_fp32_differs_only_at_near_ties(fast):
    model = build(torch.float32, seed=4)
    params = SamplingParams(temperature=0, max_new_tokens=40)
    for prompt in PROMPTS:
        expected, gaps = slow_greedy(model, prompt, 40)
        answer = Generator(model, fast=fast).generate([prompt], params)[0]
        different = [step for step in range(40) if answer[step] != expected[step]]
        assert not different or gaps[different[0]] < 1e-4


@pytest.mark.parametrize("name", ["GQA", "window", "bias", "experts", "latent attention", "dynamic"])
def test_a_row_is_what_it_would_be_alone(name):
    """With drawing: row b alone, with its own seed, gives the same tokens; so do other neighbours."""
    model = build(**SHAPES[name])
    together = Generator(model).generate(PROMPTS, FREE)
    assert together != Generator(model).generate(PROMPTS, GREEDY)
    for row, prompt in enumerate(PROMPTS):
        params = SamplingParams(**{**vars(FREE), "seed": row_seed(FREE.seed, row)})
        assert Generator(model).generate([prompt], params)[0] == together[row]
    assert Generator(model).generate([PROMPTS[0], [1, 2, 3]], FREE)[0] == together[0]
    assert Generator(model).generate(PROMPTS, FREE) == together  # again: nothing is left over


def test_same_seed_same_text_another_seed_another():
    model = build()
    draws = [SamplingParams(seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
    texts = [Generator(model).generate([[5]], params) for params in draws]
    assert texts[0] == texts[1] != texts[2]


def test_global_random_state_is_neither_read_nor_moved():
    model = build()
    torch.manual_seed(0)
    first, state = Generator(model).generate([[5]], FREE), torch.get_rng_state()
    torch.manual_seed(1)
    assert Generator(model).generate([[5]], FREE) == first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fast", [True, False])
def test_rows_end_at_their_stop_tokens(fast):
    """The stop token is the last one given; the other rows go on, unchanged."""
    generator = Generator(build(), fast=fast)
    free = generator.generate(PROMPTS, GREEDY)
    stops = {free[0][3], free[3][11]}

    def cut(tokens):
        ends = [place for place, token in enumerate(tokens) if token in stops]
        return tokens[: ends[0] + 1] if ends else tokens

    expected = [cut(tokens) for tokens in free]
    assert len({len(tokens) for tokens in expected}) > 1
    assert generator.generate(PROMPTS, GREEDY, stops) == expected
    assert [generator.generate([prompt], GREEDY, stops)[0] for prompt in PROMPTS] == expected


def test_tokens_come_as_they_are_made():
    generator = Generator(build())
    free, heard = generator.generate(PROMPTS, GREEDY), []

    def on_token(row, token):
        heard.append((row, token))
        return row == 1 and len([r for r, _ in heard if r == 1]) == 4  # row 1 is stopped by its listener

    answers = generator.generate(PROMPTS, GREEDY, on_token=on_token)
    assert answers[1] == free[1][:4] and answers[:1] + answers[2:] == free[:1] + free[2:]
    for row, answer in enumerate(answers):
        assert [token for r, token in heard if r == row] == answer
    assert [row for row, _ in heard[:10]] == [0, 1, 2, 3, 4] * 2  # step by step, not row by row


def test_an_exception_in_the_listener_leaves_no_trace():
    """Ctrl-C in the middle: the model is in its old mode, and the next answer is whole."""
    model, threads = build(dropout=0.5).train(), torch.get_num_threads()
    generator = Generator(model)
    torch.set_num_threads(threads + 1)

    def interrupt(row, token):
        assert torch.get_num_threads() == 1  # the model is small
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator.generate([[5]], GREEDY, on_token=interrupt)
    assert model.training and torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert generator.generate([[5]], GREEDY) == [slow_greedy(model.eval(), [5], 20)[0]]


def test_the_context_is_never_exceeded():
    """64 tokens in all. Prompts are read whole; `fit` makes room for the answer, but keeps half at least."""
    model = build()
    generator = Generator(model)
    text = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    for length, wanted, kept, given in [
        (10, 20, 10, 20), (44, 20, 44, 20), (50, 20, 44, 20), (100, 20, 44, 20), (60, 1, 60, 1),
        (100, 1, 63, 1), (10, 200, 10, 54), (100, 200, 32, 32), (32, 64, 32, 32), (1, 64, 1, 63),
    ]:  # fmt: skip
        params = SamplingParams(temperature=0, max_new_tokens=wanted)
        prompt = text[:length][-generator.room(wanted) :]
        assert prompt == text[:length][-kept:]
        answer = generator.generate([prompt], params)[0]
        assert answer == slow_greedy(model, prompt, given)[0] and answer.finish_reason == "length"
    expected = [slow_greedy(model, *case)[0] for case in ((text[:10], 50), (text[-60:], 4), ([3], 50))]
    params = SamplingParams(temperature=0, max_new_tokens=50)
    assert generator.generate([text[:10], text[-60:], [3]], params) == expected
    assert generator.generate([text[-64:]], params) == [[]]
    for prompts in ([text[:65]], [[5], text]):  # never shortened in silence
        with pytest.raises(UserError, match=r"a prompt of (65|100) tokens does not fit in the context of 64"):
            generator.generate(prompts, params)


def test_a_context_of_one_token_has_no_room_for_an_answer():
    assert Generator(build(max_position_embeddings=1)).generate([[5], []], GREEDY) == [[], []]


@pytest.mark.parametrize("prompts", ["hello", ["hello"], [5, 6], torch.tensor([[5, 6]]), [[5.0]], [None]])
def test_anything_but_lists_of_ids_is_explained(prompts):
    with pytest.raises(TypeError, match=r"lists of token ids, .*tokenizer.encode\(text\)"):
        Generator(build(num_hidden_layers=1)).generate(prompts, GREEDY)


def test_the_reason_why_a_row_ended():
    """`stop` after a stop token or a listener, `length` at the limit: the two words of other libraries."""
    generator = Generator(build())
    free = generator.generate(PROMPTS, GREEDY)
    assert {answer.finish_reason for answer in free} == {"length"}
    stopped = generator.generate(PROMPTS, GREEDY, {free[0][3]})
    reasons = ["stop" if free[0][3] in tokens else "length" for tokens in free]
    assert [answer.finish_reason for answer in stopped] == reasons and set(reasons) == {"stop", "length"}
    heard = generator.generate(PROMPTS[:2], GREEDY, on_token=lambda row, token: row == 1)
    assert [answer.finish_reason for answer in heard] == ["length", "stop"]
    at_the_limit = SamplingParams(temperature=0, max_new_tokens=free[0].index(free[0][3]) + 1)
    assert generator.generate(PROMPTS[:1], at_the_limit, {free[0][3]})[0].finish_reason == "stop"


def test_overlapping_contexts_restore_the_threads():
    """Two engines in turns, in one Python thread and in two, leave the number of threads as it was."""
    model, before = build(num_hidden_layers=1), torch.get_num_threads()
    torch.set_num_threads(before + 1)
    first, second = ExitStack(), ExitStack()
    first.enter_context(few_threads(model, 1))
    second.enter_context(few_threads(model, 1))
    assert torch.get_num_threads() == 1
    first.close()
    second.close()
    after = [torch.get_num_threads()]

    def other():
        with few_threads(model, 1):
            pass
        after.append(torch.get_num_threads())

    with few_threads(model, 1):
        thread = Thread(target=other)
        thread.start()
        thread.join()
    after.append(torch.get_num_threads())
    torch.set_num_threads(before)
    assert after == [before + 1] * 3


def test_no_prompt_no_answer():
    assert Generator(build()).generate([], GREEDY) == []


def test_an_empty_prompt_starts_from_the_start_token():
    model = build()
    assert Generator(model, start_id=9).generate([[]], GREEDY) == Generator(model).generate([[9]], GREEDY)


def test_training_in_between_is_noticed():
    """The fast path works on a copy of the weights; after an optimizer step it must be a new copy."""
    model = build()
    generator = Generator(model)
    before = generator.generate([[5]], GREEDY)
    copy = generator.decoder
    assert generator.generate([[5]], GREEDY) == before and generator.decoder is copy
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    labels = torch.tensor([[1, 2, 3]])
    model(labels, labels=labels).loss_sum.backward()
    optimizer.step()
    after = generator.generate([[5]], GREEDY)
    assert generator.decoder is not copy
    assert after == [slow_greedy(model, [5], 20)[0]] != before
    model.load_state_dict(build(seed=8).state_dict())
    assert generator.generate([[5]], GREEDY) == [slow_greedy(model, [5], 20)[0]] != after
