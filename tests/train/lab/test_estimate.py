"""The estimate of a run on a GPU that is not here."""

import re
import sys

import pytest
import torch

from config.load import load_config
from model.tinyseek import TinySeek
from train.lab import estimate
from utils.cost import cost_card
from utils.errors import UserError


@pytest.fixture
def words_of(capsys, monkeypatch, tmp_path):
    """What the command prints, on a text of its own."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 500, encoding="utf-8")

    def words(*arguments, **settings):
        settings = {"tokenizer.kind": "char", "data.cache_dir": tmp_path} | settings
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        monkeypatch.setattr(sys, "argv", ["estimate.py", "--data", str(text), *arguments, *sets])
        estimate.main()
        return capsys.readouterr().out

    return words


def number(pattern: str, words: str) -> float:
    """The number in the parentheses of a pattern."""
    return float(re.search(pattern, words)[1].replace(",", ""))


GPT2 = {  # nanoGPT's shape; feed-forwards of three matrices with two thirds of the width cost the same
    "model.vocab_size": 50304, "model.hidden_size": 768, "model.num_hidden_layers": 12,
    "model.num_attention_heads": 12, "model.num_key_value_heads": 12, "model.head_dim": 64,
    "model.intermediate_size": 2048, "model.max_position_embeddings": 1024, "model.n_routed_experts": 0,
    "data.sequence_length": 1024, "train.batch_size": 12, "train.accumulation_steps": 5,
    "train.compile": "true", "train.max_steps": 600_000, "train.max_seconds": "null",
    "optim.optimizer": "adamw",
}  # fmt: skip


def test_a_published_run_on_paper(words_of):
    """nanoGPT's README: GPT-2 of 124M parameters, 600,000 steps of 0.49M tokens, 4 days on 8 A100 of 40 GB:
    106,700 tokens/s on each. The share of the peak is an assumption, so that a third is allowed."""
    words = words_of("--device", "A100 40GB", **GPT2)
    published = 600_000 * 491_520 / (4 * 86_400) / 8
    assert number(r"([\d,]+) tokens/s", words) == pytest.approx(published, rel=1 / 3)
    assert number(r"parameters +([\d,]+)", words) == pytest.approx(124e6, rel=0.01)
    assert words.rstrip().endswith(": fits") and "37.25 GiB" in words  # it did
    assert "does not fit" in words_of("--device", "4090", **GPT2 | {"train.batch_size": 48})


def test_large_products_are_counted_and_small_ones_launched(words_of):
    words = words_of("--device", "H200", "--mfu", "0.5", **GPT2)
    with torch.device("meta"):
        config = load_config(None, [f"{key}={value}" for key, value in GPT2.items()])
        card = cost_card(TinySeek(config.model), 12 * 1024, 1024)
    assert number(r"([\d,]+) tokens/s", words) == pytest.approx(0.5 * 989e12 / card.train_flops(), rel=1e-3)
    assert "data: read and tokenized in " in words
    tiny = words_of("--config", "tiny", "--device", "H200")
    assert number(r"a step +256 tokens, ([\d,]+) ms", tiny) == 4  # 2 layers of 200 kernels of 10 us


def test_layers_that_run_again_take_time_and_save_memory(words_of):
    """A batch that is too large for a GPU fits; a step has four forward passes' work in place of three."""
    large = GPT2 | {"train.batch_size": 48}
    plain = words_of("--device", "4090", **large)
    again = words_of("--device", "4090", **large | {"train.gradient_checkpointing": "true"})
    assert "does not fit" in plain and again.rstrip().endswith(": fits")
    speeds = [number(r"([\d,]+) tokens/s", words) for words in (plain, again)]
    assert speeds[1] == pytest.approx(speeds[0] * 3 / 4, rel=1e-3)
    memory = "activations of 49,152 tokens ([0-9.]+) GiB"
    assert number(memory, again) < number(memory, plain) / 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--device", "Abacus"), "--device Abacus: unknown; known: B200"),
        (("--device", "H200", "--mfu", "1.5"), "--mfu 1.5: must be above 0"),
        (("--device", "H200", "--set", "train.dtype=fp32"), "train.dtype=fp32: data sheets"),
    ],
)
def test_bad_input_is_one_line(words_of, flags, said):
    with pytest.raises(UserError, match=re.escape(said)):
        words_of("--config", "tiny", *flags)
