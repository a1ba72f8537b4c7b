"""Every rule for longer contexts against `transformers.modeling_rope_utils` and against numbers published for
it."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from config.model import ModelConfig
from config.rope import read_scaling
from modules.rope import RotaryEmbedding
from modules.rope_scaling import rope_frequencies, yarn_range
from tests.modules.tools import small_config
from utils.errors import UserError


def theirs(head_dim, theta, scaling, max_positions, length=None):
    """Inverse frequencies and factor by Hugging Face."""
    config = LlamaConfig(
        head_dim=head_dim, hidden_size=64, num_attention_heads=2, max_position_embeddings=max_positions
    )
    config.rope_parameters = {"rope_theta": theta, **scaling}
    config.rope_parameters.setdefault("rope_type", scaling.get("type"))
    return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu", seq_len=length)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES = [
    (128, 1e4, {"rope_type": "linear", "factor": 4.0}, 4096),
    (64, 5e5, {"type": "linear", "factor": 2}, 512),
    (128, 1e4, YARN, 16384),
    (128, 1e6, YARN | {"original_max_position_embeddings": 32768}, 131072),
    (64, 1e4, YARN | {"factor": 16.0, "original_max_position_embeddings": 2048}, 32768),
    (16, 1e4, YARN | {"original_max_position_embeddings": 128}, 512),
    (8, 100.0, YARN | {"original_max_position_embeddings": 16}, 64),  # the ramp meets both its ends
    (4, 1e4, YARN | {"original_max_position_embeddings": 6}, 24),  # low == high
    (16, 100.0, YARN, 16384),  # the ramp ends beyond the last frequency, where D-1 and D/2-1 differ
    (128, 1e6, YARN | {"truncate": False}, 16384),
    (64, 1e4, YARN | {"truncate": False, "beta_fast": 20.0, "beta_slow": 2.5}, 16384),
    (128, 1e4, YARN | {"beta_fast": 16, "beta_slow": 2}, 16384),
    (128, 1e4, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}, 163840),
    (64, 1e4, YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707}, 163840),
    (64, 1e4, YARN | {"factor": 40.0, "mscale": 0.8}, 163840),  # one of the two alone counts nothing
    (64, 1e4, YARN | {"attention_factor": 1.0}, 16384),
    (64, 1e4, YARN | {"attention_factor": 0.7, "mscale": 1.0, "mscale_all_dim": 0.5}, 16384),
    (64, 1e4, YARN | {"factor": 1.0}, 4096),
    (64, 1e4, YARN | {"factor": None}, 8192),  # 8192 / 4096
    (64, 1e4, YARN | {"beta_fast": None, "attention_factor": None, "mscale": None}, 16384),
    (128, 5e5, LLAMA3, 131072),
    (64, 5e5, LLAMA3 | {"factor": 32.0}, 131072),
    (32, 1e4, LLAMA3 | {"factor": 3.0, "low_freq_factor": 2.0, "high_freq_factor": 7.0}, 16384),
]


@pytest.mark.parametrize("head_dim, theta, scaling, max_positions", CASES)
def test_the_rules_are_hugging_faces(head_dim, theta, scaling, max_positions):
    expected, factor = theirs(head_dim, theta, dict(scaling), max_positions)
    ours, our_factor = rope_frequencies(head_dim, theta, scaling, max_positions)
    assert ours.dtype == torch.float32 and ours.shape == (head_dim // 2,)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, abs=1e-12)
    # The old spelling with the rule under "type", and theta inside the dictionary as new files have it.
    old = {("type" if key == "rope_type" else key): value for key, value in scaling.items()}
    new = {**scaling, "rope_type": scaling.get("rope_type", scaling.get("type")), "rope_theta": theta}
    for spelling, base in ((old, theta), (new, 12345.0)):
        again, again_factor = rope_frequencies(head_dim, base, spelling, max_positions)
        assert torch.equal(again, ours) and again_factor == our_factor


@pytest.mark.parametrize("length", [None, 10, 64, 65, 200, 1000])
@pytest.mark.parametrize("head_dim", [4, 16, 64])
def test_dynamic_is_hugging_faces(length, head_dim):
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    expected, factor = theirs(head_dim, 1e4, dict(scaling), 64, length)
    ours, our_factor = rope_frequencies(head_dim, 1e4, scaling, 64, length)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == factor == 1.0
    # With the trained length given, the model may be longer; there Hugging Face calls it the model's.
    apart = scaling | {"original_max_position_embeddings": 64}
    assert torch.equal(rope_frequencies(head_dim, 1e4, apart, 4096, length)[0], ours)


def lists(head_dim, seed=0):
    """A dictionary for LongRoPE with random lists."""
    short, long = 1 + 30 * torch.rand(2, head_dim // 2, generator=torch.Generator().manual_seed(seed))
    return {
        "rope_type": "longrope", "short_factor": short.tolist(), "long_factor": long.tolist(),
        "original_max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize("length", [None, 1, 64, 65, 1000])
@pytest.mark.parametrize(
    "changes", [{}, {"factor": 32.0}, {"attention_factor": 1.5}, {"attention_factor": 0.5, "factor": 2.0}]
)
@pytest.mark.parametrize("head_dim, max_positions", [(2, 64), (16, 4096), (96, 50)])
def test_longrope_is_hugging_faces(length, changes, head_dim, max_positions):
    """Also where the model is no longer than it was trained, and the factor is 1."""
    scaling = lists(head_dim) | changes
    expected, factor = theirs(head_dim, 500.0, dict(scaling), max_positions, length)
    ours, our_factor = rope_frequencies(head_dim, 500.0, scaling, max_positions, length)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor, abs=1e-12)
    table = RotaryEmbedding(head_dim, 500.0, scaling, max_positions)(torch.zeros(1, 1), [length or 1])
    assert torch.equal(table[0], torch.full((1, 1, head_dim), factor))


def test_the_tables_follow_the_scaling():
    """The factor reaches cos and sin both, and `dynamic` looks at the longest position: against Hugging
    Face's module."""
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    for scaling, length in ((YARN, 50), (dynamic, 40), (dynamic, 300), (LLAMA3, 50)):
        config = LlamaConfig(head_dim=16, hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
        config.rope_parameters = {"rope_theta": 1e4, **scaling}
        positions = torch.arange(length)[None]
        expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
        ours = RotaryEmbedding(16, 1e4, scaling, 64)(positions)
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
        if scaling is YARN:
            torch.testing.assert_close(
                ours[0] ** 2 + ours[1] ** 2, torch.full_like(ours[0], (0.1 * math.log(4) + 1) ** 2)
            )
    spelled = RotaryEmbedding(16, 1e4, {"rope_type": None, "type": "dynamic", "factor": 2.0}, 64)
    assert torch.equal(spelled(positions[:, :50])[0], RotaryEmbedding(16)(positions[:, :50])[0])
    longer = torch.arange(300)[None]  # a null is as good as absent, also beyond the trained length
    assert torch.equal(spelled(longer)[0], RotaryEmbedding(16, 1e4, dynamic, 64)(longer)[0])


def test_published_numbers():
    """Worked out from the papers and checked once against the authors' code."""
    assert yarn_range(128, 1e4, 4096) == (20, 46)
    inv_freq, factor = rope_frequencies(128, 1e4, YARN, 16384)
    assert factor == pytest.approx(1.1386294, abs=1e-7)
    assert inv_freq[40].item() == pytest.approx(1.3378868e-3, rel=1e-6)
    assert yarn_range(128, 1e4, 2048) == (16, 41)
    assert rope_frequencies(128, 1e4, YARN | {"factor": 16.0}, 1)[1] == pytest.approx(1.2772589, abs=1e-7)
    qwen = YARN | {"original_max_position_embeddings": 32768}
    assert yarn_range(128, 1e6, 32768) == (23, 40)
    assert rope_frequencies(128, 1e6, qwen)[0][25].item() == pytest.approx(4.1317e-3, rel=1e-4)
    assert yarn_range(128, 1e6, 32768, truncate=False) == pytest.approx((23.596, 39.651), abs=1e-3)
    assert rope_frequencies(128, 1e6, qwen | {"truncate": False})[0][25].item() == pytest.approx(
        4.2344e-3, rel=1e-4
    )
    llama = rope_frequencies(128, 5e5, LLAMA3)[0]
    for index, value in ((35, 9.5562e-5), (40, 3.4281e-5), (63, 3.0689e-7)):
        assert llama[index].item() == pytest.approx(value, rel=1e-4)
    phi = lists(128) | {"original_max_position_embeddings": 4096, "factor": 32}
    assert rope_frequencies(128, 1e4, phi)[1] == pytest.approx(1.1902381, abs=1e-7)
    plain = rope_frequencies(128, 1e4)[0]
    for length, base in ((8192, 51293.787), (16384, 135401.973), (4096, 1e4), (100, 1e4)):
        ours = rope_frequencies(128, 1e4, {"rope_type": "dynamic", "factor": 4.0}, 4096, length)[0]
        torch.testing.assert_close(ours, 1.0 / base ** (torch.arange(64) / 64), rtol=2e-6, atol=0)
    assert plain[0] == 1.0


def test_ntk_in_closed_form():
    """base * s^(D/(D-2)): the first frequency stays, the last is divided by exactly s, between them a power
    of s."""
    for head_dim, s in ((128, 4.0), (16, 2.5), (4, 3.0)):
        plain = rope_frequencies(head_dim, 1e4)[0].double()
        ours, factor = rope_frequencies(head_dim, 1e4, {"rope_type": "ntk", "factor": s})
        index = torch.arange(head_dim // 2, dtype=torch.float64)
        torch.testing.assert_close(
            ours.double(), plain * s ** (-2 * index / (head_dim - 2)), rtol=1e-6, atol=0
        )
        assert ours[0] == 1 and factor == 1
        assert (plain[-1] / ours[-1]).item() == pytest.approx(s, rel=1e-6)


def test_a_larger_base_needs_no_rule():
    """ABF: theta alone, from the argument or from a dictionary of type default."""
    direct = rope_frequencies(64, 5e5)[0]
    torch.testing.assert_close(direct, 5e5 ** (-torch.arange(32) / 32.0), rtol=1e-6, atol=0)
    for scaling in ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}):
        assert torch.equal(rope_frequencies(64, 1e4, scaling)[0], direct)
    assert torch.equal(rope_frequencies(64, 5e5, {"rope_theta": None})[0], direct)


def test_stretching_by_one_changes_nothing():
    plain = rope_frequencies(32, 1e4)[0]
    for rule in ("linear", "ntk", "yarn", "dynamic"):
        inv_freq, factor = rope_frequencies(32, 1e4, {"rope_type": rule, "factor": 1.0}, 512)
        torch.testing.assert_close(inv_freq, plain, rtol=1e-6, atol=0)
        assert factor == 1.0


def test_yarn_takes_the_trained_length_from_the_model_where_none_is_given():
    """As Hugging Face fills it in."""
    bare = {"rope_type": "yarn", "factor": 4.0}
    expected, factor = theirs(64, 1e4, dict(bare), 512)
    ours, our_factor = rope_frequencies(64, 1e4, bare, 512)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    assert our_factor == pytest.approx(factor)


def test_words_that_hugging_face_writes_beside():
    plain = {"rope_type": "linear", "factor": 2.0}
    assert read_scaling(plain | {"partial_rotary_factor": 1.0, "type": "linear"}, 1e4) == read_scaling(
        plain, 1e4
    )
    with pytest.raises(UserError, match="partial_rotary_factor"):
        read_scaling(plain | {"partial_rotary_factor": 0.5}, 1e4)


BAD = [
    ({"rope_type": "magic", "factor": 2.0}, "magic"),
    ({"rope_type": ["yarn"]}, "rope_type"),
    ({"rope_type": 3}, "rope_type"),
    ({"factor": 2.0}, "factor"),  # no rule named
    ({"rope_type": "linear"}, "factor"),
    ({"rope_type": "linear", "factor": None}, "factor"),
    ({"rope_type": "linear", "factor": 0.5}, "at least 1"),
    ({"rope_type": "linear", "factor": 0}, "factor"),
    ({"rope_type": "linear", "factor": -2}, "factor"),
    ({"rope_type": "linear", "factor": "4"}, "factor"),
    ({"rope_type": "linear", "factor": True}, "factor"),
    ({"rope_type": "linear", "factor": math.nan}, "factor"),
    ({"rope_type": "linear", "factor": math.inf}, "factor"),
    ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast"),
    ({"rope_type": "yarn"}, "factor"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate"),
    ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.0}, "attention_factor"),
    ({"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.0}, "attention_factor"),
    ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}, "original"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}, "beta_slow"),
    ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}, "beta_slow"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, "original"),
    (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor"),
    ({"rope_type": "default", "rope_theta": "1e6"}, "rope_theta"),
    ({"rope_type": "default", "rope_theta": 0.5}, "rope_theta"),
    ({"rope_type": "longrope", "factor": 2.0}, "longrope needs short_factor, long_factor, original"),
    (lists(8) | {"original_max_position_embeddings": 1}, "above 1"),
    (lists(8) | {"factor": 0.5}, "at least 1"),
    (lists(8) | {"long_mscale": 1.2}, "long_mscale"),
    (lists(6), "short_factor has 3 numbers, but 8 channels"),
    (lists(8) | {"long_factor": [1.0] * 5}, "long_factor has 5 numbers"),
    (lists(8) | {"long_factor": []}, "long_factor has 0 numbers"),
    (lists(8) | {"short_factor": [1, 2, 3, 0]}, r"short_factor must be a list .*\[0\]"),
    (lists(8) | {"short_factor": [1, 2, 3, -4.0]}, "short_factor must be"),
    (lists(8) | {"long_factor": [1, 2, math.inf, 4]}, "long_factor must be"),
    (lists(8) | {"long_factor": [1, 2, "3", 4]}, "long_factor must be"),
    (lists(8) | {"long_factor": [1, 2, True, 4]}, "long_factor must be"),
    (lists(8) | {"long_factor": 2.0}, "long_factor must be"),
]


@pytest.mark.parametrize("scaling, word", BAD)
def test_a_bad_dictionary_is_one_clear_line(scaling, word):
    with pytest.raises(UserError, match=word) as caught:
        RotaryEmbedding(8, 1e4, scaling)
    assert "\n" not in str(caught.value) and "rope_scaling" in str(caught.value)


def test_two_channels_have_no_slow_frequency_to_stretch():
    for rule in ("ntk", "dynamic"):
        with pytest.raises(UserError, match="head_dim"):
            rope_frequencies(2, 1e4, {"rope_type": rule, "factor": 2.0})


def test_the_dictionary_is_not_changed():
    scaling = dict(YARN)
    rope_frequencies(16, 1e4, scaling, 64)
    assert scaling == YARN and isinstance(small_config(rope_scaling=scaling), ModelConfig)
