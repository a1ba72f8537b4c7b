"""Answers of an encoder-decoder from the command line: texts, gaps, and one-line errors."""

import sys

import pytest
import torch

from config.load import to_dict
from config.schema import RunConfig
from inference import seq2seq
from inference.generation.load import load_full, load_seq2seq
from inference.generation.sampling import SamplingParams
from inference.generation.terminal import harmless
from load_data.spans import sentinel_ids
from load_data.tokenization.tokenizer import SENTINELS
from model.encoder_decoder import EncoderDecoder
from tests.inference.tools import byte_tokenizer, write_checkpoint
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

TOKENIZER = byte_tokenizer().with_special(SENTINELS)
GAPS = sentinel_ids(TOKENIZER)


def write_model(folder, **changes):
    """A checkpoint with random weights, as train/span_train.py leaves it; returns its path."""
    config = RunConfig()
    config.train.max_steps = 1
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_decoder_layers": 1, "head_dim": 8,
             "num_attention_heads": 2, "intermediate_size": 24, "initializer_range": 1.0,
             "vocab_size": TOKENIZER.vocab_size, "max_position_embeddings": 40}  # fmt: skip
    for name, value in shape.items():
        setattr(config.seq2seq, name, value)
    torch.manual_seed(0)
    entries = {"stage": "span_train", "short": "Span", "step": 3, "tokenizer": TOKENIZER.to_json(),
               "config": to_dict(config), "weights": EncoderDecoder(config.seq2seq).state_dict()}  # fmt: skip
    path = folder / "TinySeek_Span_final.pkl"
    save_checkpoint(path, entries | changes)
    return path


def run(monkeypatch, *words):
    """The command with these words."""
    monkeypatch.setattr(sys, "argv", ["seq2seq", *map(str, words)])
    seq2seq.main()


def test_a_text_is_answered(tmp_path, monkeypatch, capsys):
    path = write_model(tmp_path)
    said = []
    for words in (["--checkpoint", path], ["--out", tmp_path], ["--out", tmp_path, "--temperature", "2"],
                  ["--out", tmp_path, "--temperature", "2", "--seed", "1"]):  # fmt: skip
        run(monkeypatch, "--prompt", "ab", "--max-new-tokens", "12", *words)
        said.append(capsys.readouterr())
    texts = [one.out for one in said]
    assert texts[0] == texts[1] and len({*texts}) == 3 and str(path) in said[0].err
    model, tokenizer, config = load_seq2seq(path)
    assert not model.training and sentinel_ids(tokenizer) == GAPS and config.span.task == "spans"
    params = SamplingParams(temperature=0, max_new_tokens=12)
    assert harmless(seq2seq.respond(model, tokenizer, "ab", params) + "\n") == texts[0]


def test_rows_do_not_depend_on_their_batch_and_end_before_the_end(tmp_path, monkeypatch):
    model, tokenizer, _ = load_seq2seq(write_model(tmp_path))
    params = SamplingParams(temperature=0, max_new_tokens=6)
    sources = [tokenizer.framed(tokenizer.encode("a" * n)) for n in range(1, 6)]
    together = seq2seq.written(model, tokenizer, sources, params)
    monkeypatch.setattr(seq2seq, "BATCH", 2)
    assert seq2seq.written(model, tokenizer, sources, params) == together
    assert len(together) == 5 and not any(tokenizer.eos_id in answer for answer in together)


def test_gaps_are_filled_with_what_is_written(tmp_path, monkeypatch):
    model, tokenizer, _ = load_seq2seq(write_model(tmp_path))
    x, y = tokenizer.encode("xy")
    read = []

    def answer(model, tokenizer, sources, params):
        read.extend(sources)
        return [[GAPS[0], x, GAPS[1], y, y, GAPS[2]]]

    monkeypatch.setattr(seq2seq, "written", answer)
    found = seq2seq.respond(model, tokenizer, "a<extra_id_0>b<extra_id_1>c", None)
    assert found == "axbyyc"
    assert read == [[tokenizer.eos_id, *tokenizer.encode("a"), GAPS[0], *tokenizer.encode("b"), GAPS[1],
                     *tokenizer.encode("c")]]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "a", "--out", "OTHER"], "train one with train/span_train.py"),
        (["--prompt", "a", "--checkpoint", "OTHER/x.pkl"], "x.pkl"),
        (["--prompt", "a <extra_id_3>"], "in this order"),
        (["--prompt", "a " * 3000], "the text has 6000 tokens, and at most 4096 are read"),
        (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, error):
    write_model(tmp_path)
    words = [word.replace("OTHER", str(tmp_path / "other")) for word in words]
    place = [] if {"--out", "--checkpoint"} & {*words} else ["--out", tmp_path]
    with pytest.raises(UserError, match=error):
        run(monkeypatch, *words, *place)


def test_checkpoints_of_other_kinds_say_what_opens_them(tmp_path):
    path = write_model(tmp_path)
    with pytest.raises(UserError, match=r"an encoder-decoder of span_train.*inference/seq2seq.py"):
        load_full(path)
    with pytest.raises(UserError, match="a full model of pre_train, not an encoder-decoder"):
        load_seq2seq(write_checkpoint(tmp_path / "TinySeek_Pre_final.pkl"))


def test_a_start_token_beyond_the_vocabulary_is_one_line(tmp_path):
    path = write_model(tmp_path)
    about = torch.load(path, weights_only=True)
    about["config"]["seq2seq"] |= {"decoder_start_token_id": 10**4, "vocab_size": 0}
    save_checkpoint(path, about)
    with pytest.raises(UserError, match="decoder_start_token_id=10000 must be below"):
        load_seq2seq(path)


def test_a_file_that_names_a_million_layers_is_refused_before_they_are_built(tmp_path):
    path = write_model(tmp_path)
    about = torch.load(path, weights_only=True)
    about["config"]["seq2seq"]["num_decoder_layers"] = 10**6
    save_checkpoint(path, about)
    with pytest.raises(UserError, match="1000001 layers"):
        load_seq2seq(path)
