"""Pairs as data: reading, sides, repetitions, ids, and batches."""

import numpy as np
import pytest
import torch

from load_data import embed_data
from load_data.code_pairs import docstring_pairs
from load_data.corpora.python_corpus import PythonCorpus, SourceFile
from load_data.corpora.sources import TRAIN, VAL
from load_data.embed_data import encode_texts, prepare_embedding, read_pairs
from load_data.embed_loader import NO_OWNER, EmbedLoader, eval_pairs, pair_batch
from utils.errors import UserError

RECORDS = [{"query": f"question {n}", "positive": f"answer {n}"} for n in range(40)]
RECORDS[3]["negatives"] = ["no answer", "answer 99"]


@pytest.fixture
def encoded(run_config, write):
    """The data of a small file."""
    return prepare_embedding(run_config(write("pairs.jsonl", RECORDS), val_fraction=0.3))


def test_sides_are_apart_and_texts_occur_once(run_config, write):
    """Texts that differ in case and spaces count as equal. A pair with a held-out text is not trained on."""
    config = run_config(write("pairs.jsonl", RECORDS), val_fraction=0.3)
    sides, _ = read_pairs(config.data)
    held_out = sides[VAL][0]
    more = [{"query": held_out.query.upper(), "positive": "another"}]  # the folded query decides its side
    more += [{"query": f"new {n}", "positive": f" {held_out.positive} "} for n in range(30)]
    config = run_config(write("more.jsonl", RECORDS + RECORDS[:5] + more), val_fraction=0.3)
    again, summary = read_pairs(config.data)
    assert again[VAL][: len(sides[VAL])] == sides[VAL] and again[TRAIN] == sides[TRAIN]
    fold = lambda text: "".join(text.split()).casefold()  # noqa: E731
    texts = [{fold(text) for pair in again[side] for text in pair[:2]} for side in (TRAIN, VAL)]
    assert not texts[0] & texts[1] and len(texts[1]) == 2 * len(again[VAL])
    assert len(sides[TRAIN]) + len(sides[VAL]) == 40 and any("pairs left out" in line for line in summary)


def test_the_library_gives_docstrings_of_held_out_files_and_more_of_the_others(
    run_config, library, part_of_the_library, monkeypatch
):
    monkeypatch.setattr(embed_data, "read_python_corpus", lambda fraction: part_of_the_library)
    sides, summary = read_pairs(run_config("python").data)
    queries = {query for file in part_of_the_library.val for query, _ in docstring_pairs(file)}
    assert {pair.query for pair in sides[VAL]} <= queries
    trained = [pair for file in part_of_the_library.train for pair in docstring_pairs(file)]
    assert len(sides[TRAIN]) > 2 * len(trained) and summary[0].startswith("standard library")
    small = PythonCorpus(library.train[:3], library.val[:4])
    monkeypatch.setattr(embed_data, "read_python_corpus", lambda fraction: small)
    limited, _ = read_pairs(run_config("python", limit=8).data)
    assert len(limited[VAL]) == 1 and len(limited[TRAIN]) == 7


def test_no_form_of_a_held_out_function_is_trained_on(run_config, monkeypatch):
    """The whole source, the source without the name, in other case and with other white space."""
    held_out = 'def area(w, h):\n    """Return the area of a rectangle."""\n    return w * h\n'
    copies = {"whole": held_out, "other": held_out.replace("area(", "size("),
              "case": held_out.upper().lower()}  # fmt: skip
    copies |= {"new": 'def half(x):\n    """Return the half of some number."""\n    return x / 2\n'}
    train = [SourceFile(name, text.replace("Return", f"{name}: return")) for name, text in copies.items()]
    corpus = PythonCorpus(train, [SourceFile("val", held_out)])
    monkeypatch.setattr(embed_data, "read_python_corpus", lambda fraction: corpus)
    sides, _ = read_pairs(run_config("python").data)
    assert [pair.query for pair in sides[VAL]] == ["Return the area of a rectangle."]
    assert {pair.query for pair in sides[TRAIN]} == {"other: return the area of a rectangle.", "half",
                                                     "new: return the half of some number."}  # fmt: skip


def test_texts_become_ids(encoded, run_config):
    """Wrong documents follow the right one; a text is framed, and cut so that the frame fits."""
    queries, documents, first = encoded.train
    decode, frame = encoded.tokenizer.decode, encoded.tokenizer.framed([])
    texts = [decode(ids) for ids in queries]
    number = texts.index("question 3")
    assert [decode(documents[n]) for n in range(first[number], first[number + 1])] == [
        "answer 3", "no answer", "answer 99"]  # fmt: skip
    assert first[-1] == len(documents) == len(queries) + 2
    assert all(ids[: len(frame)].tolist() == frame for ids in queries)
    settings = run_config().embed
    (short,) = encode_texts(["question 12"], encoded.tokenizer, settings, 5)
    assert len(short) == 5 and decode(short) == "question"[: 5 - len(frame)]
    encoded.tokenizer.finish = [7, 8]  # as the [SEP] of BERT
    (short,) = encode_texts(["question 12"], encoded.tokenizer, settings, 6)
    assert len(short) == 6 and short[-2:] == [7, 8] and short[: len(frame)] == frame
    encoded.tokenizer.finish = []
    settings.words = True
    (ids,) = encode_texts(["QuestionOne"], encoded.tokenizer, settings, 50)
    assert decode(ids) == " question one"
    same = queries.keys[:, None] == queries.keys
    assert (same == np.eye(len(queries), dtype=bool)).all() and queries.keys.min() >= 0


def test_a_batch(encoded):
    pairs = encoded.train
    number = [encoded.tokenizer.decode(ids) for ids in pairs.queries].index("question 3")
    batch = pair_batch(pairs, np.array([number, 0, 1]), pad_id=2)
    assert len(batch["query_ids"]) == 3 and len(batch["document_ids"]) == 5
    chosen, right = [number, 0, 1], pairs.first[[number, 0, 1]].tolist()
    for name, texts, rows in (("query", pairs.queries, chosen),
                              ("document", pairs.documents, [*right, right[0] + 1, right[0] + 2])):
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        assert [row[one].tolist() for row, one in zip(ids, mask)] == [texts[row].tolist() for row in rows]
        assert (ids[~mask] == 2).all() and mask.any(0).all()
    assert batch["owner_keys"].tolist() == [*batch["query_keys"].tolist(), NO_OWNER, NO_OWNER]


def test_a_step_has_the_same_pairs_however_it_is_divided(encoded):
    def queries_of(size, accumulation, world):
        loaders = [EmbedLoader(encoded.train, size, accumulation, rank, world, 0, pad_id=2)
                   for rank in range(world)]  # fmt: skip
        steps = [[batch for loader in loaders for batch in loader.next_step()] for _ in range(5)]
        return [sorted(key for batch in step for key in batch["query_keys"].tolist()) for step in steps]

    whole = queries_of(12, 1, 1)
    assert whole == queries_of(3, 2, 2) == queries_of(1, 12, 1)
    loader = EmbedLoader(encoded.train, 4, 1, 0, 1, 0, pad_id=2)
    seen = torch.cat([loader.next_step()[0]["query_keys"] for _ in range(len(encoded.train.queries) // 4)])
    assert len(set(seen.tolist())) == len(seen)
    state = loader.state_dict()
    expected = loader.next_step()[0]
    loader.next_step(), loader.load_state_dict(state)
    assert torch.equal(loader.next_step()[0]["document_ids"], expected["document_ids"])


def test_held_out_pairs_are_each_seen_once(encoded):
    count = len(encoded.val.queries)
    parts = [batch for rank in (0, 1) for batch in eval_pairs(encoded.val, 3, None, rank, 2, 2)]
    keys = torch.cat([part["query_keys"] for part in parts])
    assert sorted(keys.tolist()) == sorted(encoded.val.queries.keys)
    assert sum(len(part["query_ids"]) for part in eval_pairs(encoded.val, 3, 1, 0, 1, 2)) == 3 < count


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [("a.jsonl", [{"query": "q"}], "line 1: no positive; a pair is"),
     ("a.jsonl", [{"text": "q"}], "line 1: no query and no positive"),
     ("a.jsonl", [{"query": 3, "positive": "p"}], "line 1: query must be a text"),
     ("a.jsonl", [{"query": "q", "positive": " "}], "line 1: positive without text"),
     ("a.jsonl", [{"query": "q", "positive": "p", "negatives": "n"}], "negatives must be a list of texts"),
     ("a.jsonl", [{"query": "q", "positive": "p"}], "there is no"),
     ("a.txt", "some text", r"a\.txt: pairs are read from \.jsonl")],
)  # fmt: skip
def test_bad_files_are_one_clear_line(name, content, error, run_config, write):
    with pytest.raises(UserError, match=error) as caught:
        prepare_embedding(run_config(write(name, content)))
    assert "\n" not in str(caught.value)


def test_bad_records_among_good_ones_are_skipped(run_config, write):
    config = run_config(write("a.jsonl", [*RECORDS, {"query": "x"}]), val_fraction=0.3)
    assert any("skipped records: 1" in line for line in prepare_embedding(config).summary)
