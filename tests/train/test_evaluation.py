"""Evaluation against a plain loop: `F.cross_entropy` over the whole held-out text, bits against its UTF-8
bytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from config.schema import TokenizerConfig
from load_data.tokenizer import CharTokenizer
from load_data.train_tokenizer import train_tokenizer
from tests.train.tools import machine, small_config
from model.tinyseek import TinySeek
from train import evaluation as evaluation_module
from train.evaluation import LanguageModelEvaluation
from utils.distributed import World

TEXT = "def größe(x):\n    return x * 2  # 大きさ, \N{ROCKET}\n" * 40
LENGTH = 16


@pytest.fixture(scope="module", params=["char", "bpe"])
def case(request, tmp_path_factory):
    """A tokenizer, held-out tokens that do not fill the last window, and a model with random weights."""
    if request.param == "char":
        tokenizer = CharTokenizer("".join(sorted(set(TEXT))))
    else:
        config = TokenizerConfig(kind="bpe", vocab_size=320)
        tokenizer = train_tokenizer(config, [TEXT], tmp_path_factory.mktemp("cache"))
    tokens = np.array(tokenizer.encode(TEXT), dtype=np.uint16)[:213]
    config = small_config(f"model.vocab_size={tokenizer.vocab_size}", f"data.sequence_length={LENGTH}")
    torch.manual_seed(3)
    return tokenizer, tokens, TinySeek(config.model).eval()


def plain_loop(model, tokenizer, tokens):
    """Window after window, logits of each, everything added up; bytes counted by decoding what was
    predicted."""
    nats, sure, count, size = 0.0, 0.0, 0, 0
    for start in range(0, len(tokens) - 1, LENGTH):
        row = torch.from_numpy(tokens[start : start + LENGTH + 1].astype(np.int64))
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0].double()
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        sure += logits.softmax(-1)[torch.arange(len(row) - 1), row[1:]].sum().item()
        count += len(row) - 1
    raw = b"".join(tokenizer.id_to_bytes[token] for token in tokens[1:])
    size = len(raw)
    loss = nats / count
    return {
        "val_loss": loss,
        "val_ppl": math.exp(loss),
        "val_conf": sure / count,
        "val_bpb": nats / math.log(2) / size,
    }


def evaluate(case, max_batches=None, batch_size=3, world=None):
    """Our evaluation of the case."""
    tokenizer, tokens, model = case
    place = machine(world=world or World())
    with torch.no_grad():
        return LanguageModelEvaluation(tokens, tokenizer, LENGTH, batch_size, place)(model, max_batches)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_all_of_the_text_against_a_plain_loop(case, batch_size):
    expected = plain_loop(case[2], case[0], case[1])
    assert evaluate(case, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_bytes_are_those_of_the_text(case):
    """A model that knows nothing needs log2(V) bits a token; the bytes are those of the text itself."""
    tokenizer, tokens, model = case
    uniform = TinySeek(model.config)
    torch.nn.init.zeros_(uniform.model.embed_tokens.weight)
    text = tokenizer.decode(tokens[1:])
    tokens_of = len(tokens) - 1
    values = evaluate((tokenizer, tokens, uniform))
    assert "\N{REPLACEMENT CHARACTER}" not in text and len(text.encode()) > len(text)
    assert values["val_bpb"] == pytest.approx(
        tokens_of * math.log2(tokenizer.vocab_size) / len(text.encode())
    )
    assert values["val_ppl"] == pytest.approx(tokenizer.vocab_size) and values["val_conf"] == pytest.approx(
        1 / tokenizer.vocab_size
    )


@pytest.mark.parametrize("max_batches", [None, 1, 2])
def test_two_processes_measure_what_one_does(case, monkeypatch, max_batches):
    """Their sums are added up; here one after the other, in `test_factoring.py` with real processes. With a
    bound, two processes of 2 rows look at the windows of one process of 4."""
    sums = []
    monkeypatch.setattr(evaluation_module, "sum_scalars", lambda values: sums.append(values) or values)
    for rank in (0, 1):
        evaluate(case, max_batches, batch_size=2, world=World(rank, 2, rank))
    total = [first + second for first, second in zip(*sums)]
    sums.clear()
    evaluate(case, max_batches, batch_size=4)
    assert total == pytest.approx(sums[0], rel=1e-6)


def test_the_number_of_batches_is_what_a_whole_evaluation_takes(case):
    """From it the engine estimates how long the last evaluation will take."""
    tokenizer, tokens, model = case
    seen = []

    def count(module, given, *rest):
        seen.append(given[0].shape[0])

    handle = model.register_forward_pre_hook(count)
    evaluate(case, batch_size=4)
    handle.remove()
    evaluation = LanguageModelEvaluation(tokens, tokenizer, LENGTH, 4, machine())
    assert evaluation.batches == len(seen) == 4 and sum(seen) == -(-212 // LENGTH)
