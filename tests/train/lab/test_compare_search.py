"""The comparison with BM25: its scores against the formula, and the table on a small file of pairs."""

import json
import math
import sys

import pytest
import torch

from config.load import to_dict
from tests.inference.tools import byte_tokenizer
from tests.model.test_embedder import embedder
from train.lab import compare_search
from utils.checkpoint import save_checkpoint
from utils.errors import UserError

DOCUMENTS = ["parse json file", "json json text", "open socket", "wait"]


@pytest.fixture
def model(tmp_path):
    """The file of a random model that was trained with this share of held-out pairs."""

    def write(fraction):
        tokenizer = byte_tokenizer()
        model, config = embedder("encoder", "mean", tokenizer.vocab_size)
        config.data.val_fraction = fraction
        path = tmp_path / f"{fraction}.pkl"
        save_checkpoint(path, {"stage": "embed_train", "short": "Embed", "config": to_dict(config), "step": 3,
                               "weights": model.float().state_dict(), "tokenizer": tokenizer.to_json()})
        return path  # fmt: skip

    return write


def test_bm25_is_the_formula():
    """With k1 = 1.5, b = 0.75 and Lucene's idf, as the package uses them by default."""
    pytest.importorskip("bm25s")
    texts, query = [document.split() for document in DOCUMENTS], ["json", "file"]
    average = sum(map(len, texts)) / len(texts)

    def score(text):
        total = 0
        for word in query:
            holders, count = sum(word in other for other in texts), text.count(word)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            total += idf * count / (count + 1.5 * (0.25 + 0.75 * len(text) / average))
        return total

    found = compare_search.bm25([" ".join(query), "the"], DOCUMENTS)
    assert found[0].tolist() == pytest.approx([score(text) for text in texts], rel=1e-5)
    assert not found[1].any()  # stop words alone find nothing


def test_the_table(model, tmp_path, monkeypatch, capsys):
    pytest.importorskip("bm25s")
    path = tmp_path / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(400):
            code = f"def readFile_number{number}(): pass"
            record = {"query": f"read file number{number}", "positive": code}
            file.write(json.dumps(record) + "\n")
    monkeypatch.setattr(sys, "argv", ["compare_search", "--models", str(model(0.05)), "--data", str(path)])
    compare_search.main()
    head, _, columns, plain, split, ours = capsys.readouterr().out.splitlines()
    count = int(head.split()[0])
    assert 5 < count < 60 and columns.split() == ["method", "mrr", "recall1", "recall10"]
    values = [[float(word) for word in line.split()[-3:]] for line in (plain, split, ours)]
    assert values[0][0] < 0.5 and values[1][:2] == [1.0, 1.0]  # split words are found
    assert 0 < values[2][0] <= 1 and "0.05.pkl" in ours
    assert torch.is_grad_enabled()


def test_a_model_that_was_trained_on_other_files_is_refused(model, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["compare_search", "--models", str(model(0.01))])
    with pytest.raises(UserError, match=r"val_fraction=0.01 is not the usual 0.05: it was trained on other"):
        compare_search.main()
