"""An encoder-decoder beside a decoder: as many parameters, labels on targets alone, a table."""

import sys

import pytest

from config.load import load_config, preset_names
from load_data.seq2seq import framed_pair
from load_data.spans import sentinel_ids
from load_data.tokenization.tokenizer import SENTINELS
from model.encoder_decoder import EncoderDecoder
from model.tinyseek import TinySeek
from tests.train.tools import TOKENIZER
from train.lab import compare_seq2seq
from utils.errors import UserError

LETTERS = TOKENIZER.with_special(SENTINELS)


@pytest.mark.parametrize("task", preset_names("span_train"))
def test_both_have_as_many_parameters(task):
    """All but the gains of norms and the tables of distances: less than one in a thousand."""
    config = load_config(task, stage="span_train")
    config.seq2seq.vocab_size = 500
    both = EncoderDecoder(config.seq2seq), TinySeek(compare_seq2seq.decoder_like(config.seq2seq, config))
    first, second = (sum(parameter.numel() for parameter in model.parameters()) for model in both)
    assert abs(first - second) < first / 1000


def test_a_row_of_the_decoder_is_source_separator_target():
    """The target is what the encoder-decoder has to write, its end included."""
    pair, separator = framed_pair(LETTERS, [8, 9, 10], [11, 12]), sentinel_ids(LETTERS)[0]
    sample = compare_seq2seq.as_row(pair, separator)
    assert sample.ids.tolist() == [0, 8, 9, 10, separator, 11, 12, 0]
    assert sample.ids[sample.targets].tolist() == pair.target


def test_a_table_has_medians_and_ranges():
    runs = [{"exact": value, "rouge_l": 50.0, "steps": 7, "parameters": 1234} for value in (1.0, 9.0, 2.0)]
    last = compare_seq2seq.table({"decoder": runs, "other": runs[:1]}).splitlines()[2:]
    assert last == ["| decoder | 1,234 | 7 | 2.0 (1.0 to 9.0) | 50.0 (50.0 to 50.0) |",
                    "| other | 1,234 | 7 | 1.0 | 50.0 |"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("part_of_the_library")
def test_both_are_trained_and_scored(tmp_path, monkeypatch, capsys):
    small = ["hidden_size=16", "num_hidden_layers=1", "num_decoder_layers=1", "num_attention_heads=2",
             "head_dim=8", "intermediate_size=24"]  # fmt: skip
    small = [*(f"seq2seq.{one}" for one in small), "tokenizer.kind=char", "data.skill_samples=20",
             "data.worked_examples=20", f"data.cache_dir={tmp_path / 'cache'}", "train.batch_size=2",
             "train.max_steps=2", "train.eval_batches=1", "train.dtype=fp32", "train.device=cpu"]  # fmt: skip
    sets = [part for setting in small for part in ("--set", setting)]
    monkeypatch.setattr("load_data.task_pairs.SCORED", 2)
    monkeypatch.setattr(sys, "argv", ["compare", "--out", str(tmp_path / "out"), "--seeds", "0", *sets])
    compare_seq2seq.main()
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "| encoder-decoder | " in table and "| decoder | " in table and table in capsys.readouterr().out
    with pytest.raises(UserError, match="name a new folder"):
        compare_seq2seq.main()
