"""From paths to token rows: splits, end-of-text, caching, bounded memory, errors."""

import time

import numpy as np
import pytest
from tqdm import tqdm

from load_data import packing
from load_data.corpora import documents as documents_module
from load_data.corpora import sources
from load_data.packing import TokenWriter, prepare_pretraining
from load_data.corpora.python_corpus import PythonCorpus, SourceFile
from load_data.corpora.sources import TRAIN, VAL, Sources
from load_data.tokenization.tokenizer import UNKNOWN, CharTokenizer
from load_data.tokenization.train_tokenizer import train_tokenizer
from utils.errors import UserError


def records(count, start=0):
    """Distinct records."""
    return [{"text": f"record number {number}\nwith a second line"} for number in range(start, start + count)]


def documents_of(data, side):
    """The texts of a side, cut at the end-of-text tokens."""
    row = getattr(data, side)
    cuts = np.flatnonzero(row == data.tokenizer.eos_id)
    return [data.tokenizer.decode(part) for part in np.split(row, cuts)]


def test_tinyshakespeare_is_split_as_everywhere_else(run_config, write):
    """nanoGPT prepares the 1,115,394 characters into 1,003,854 to train on and 111,540 to validate on."""
    text = ("To be, or not to be\n" * 60_000)[:1_115_394]
    data = prepare_pretraining(run_config(write("input.txt", text), val_fraction=0.1))
    assert (len(data.train), len(data.val)) == (1_003_854, 111_540)
    assert data.tokenizer.decode(data.train) == text[:1_003_854]
    assert data.tokenizer.decode(data.val) == text[1_003_854:]
    assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap) and data.train.ndim == 1


def test_a_file_in_many_pieces_is_still_one_document(run_config, write, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 100)
    monkeypatch.setattr(packing, "BATCH", 250)
    text = "".join(f"{number} lines of text\n" for number in range(1000))
    data = prepare_pretraining(run_config(write("a.txt", text), val_fraction=0.25))
    assert data.tokenizer.eos_id not in data.train and data.tokenizer.eos_id not in data.val
    boundary = int(len(text) * 0.75)
    assert data.tokenizer.decode(data.train) == text[:boundary]
    assert data.tokenizer.decode(data.val) == text[boundary:]


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_records_are_joined_with_one_end_of_text(run_config, write, kind):
    data = prepare_pretraining(run_config(write("a.jsonl", records(200)), kind=kind))
    expected = {record["text"] for record in records(200)}
    train, val = documents_of(data, TRAIN), documents_of(data, VAL)
    assert len(train) + len(val) == 200 and set(train) | set(val) == expected and not set(train) & set(val)
    assert 1 <= len(val) <= 30
    assert (data.train == 0).sum() == len(train) - 1 and data.train[0] != 0 and data.train[-1] != 0
    assert not ((data.train[1:] == 0) & (data.train[:-1] == 0)).any()


def test_the_last_line_of_a_document_has_the_ids_of_any_other(run_config, write):
    """A line break encoded differently there would announce the end of a text."""
    lines = [{"text": f"f({number})\n" * 3} for number in range(200)]
    data = prepare_pretraining(run_config(write("a.jsonl", lines), kind="bpe"))
    for row in (data.train, data.val):
        ends = np.append(np.flatnonzero(row == data.tokenizer.eos_id), len(row))
        assert {data.tokenizer.decode([row[end - 1]]) for end in ends} == {")\n"}


def test_copies_of_a_text_are_on_one_side(run_config, write, tmp_path):
    write("data/a.jsonl", records(100) + records(100))
    write("data/b.jsonl", records(100))
    data = prepare_pretraining(run_config(tmp_path / "data", val_fraction=0.3))
    train, val = set(documents_of(data, TRAIN)), set(documents_of(data, VAL))
    assert train and val and not train & val and len(train | val) == 100


def test_the_split_does_not_depend_on_names_or_neighbours(run_config, write, tmp_path):
    first = prepare_pretraining(run_config(write("one/a.jsonl", records(100)), val_fraction=0.3))
    write("two/x.jsonl", records(50, start=50))
    write("two/y.jsonl", records(80))
    second = prepare_pretraining(run_config(tmp_path / "two", val_fraction=0.3))
    assert set(documents_of(first, VAL)) == set(documents_of(second, VAL))


def test_of_several_text_files_each_tail_is_held_out(run_config, write, tmp_path):
    """Whole files once were: of two books, perhaps the 170 times longer one (D8)."""
    texts = [f"{number}" * length for number, length in enumerate((1000, 20, 100, 3))]
    for number, text in enumerate(texts):
        write(f"data/{number}.txt", text)
    data = prepare_pretraining(run_config(tmp_path / "data", val_fraction=0.1))
    assert documents_of(data, TRAIN) == [text[: len(text) * 9 // 10] for text in texts]
    assert documents_of(data, VAL) == [text[len(text) * 9 // 10 :] for text in texts]
    alone = prepare_pretraining(run_config(tmp_path / "data/0.txt", val_fraction=0.1))
    assert documents_of(alone, VAL) == [texts[0][900:]]


def test_a_limit_is_shared_by_all_sources(run_config, write, tmp_path):
    """The first file is not read alone (D9)."""
    write("data/a.jsonl", records(200))
    write("data/b.jsonl", records(15, start=1000))
    write("data/c.txt", "plain text " * 9)
    data = prepare_pretraining(run_config(tmp_path / "data", val_fraction=0.2, limit=50))
    kept = documents_of(data, TRAIN) + documents_of(data, VAL)
    expected = {one["text"] for one in records(34) + records(15, start=1000)}
    assert expected < set(kept) and len(kept) == 49 + 2  # the head and the tail of c.txt


def test_validation_text_does_not_reach_the_tokenizer(run_config, write):
    text = "abcde " * 100 + "XYZ"
    data = prepare_pretraining(run_config(write("a.txt", text), val_fraction=0.1))
    assert data.tokenizer.contents["characters"] == " abcde"
    assert (data.val == data.tokenizer.special_ids[UNKNOWN]).sum() == 3


def test_a_limit_caps_the_documents(run_config, write):
    path = write("a.jsonl", records(200))
    everything = prepare_pretraining(run_config(path, val_fraction=0.2))
    data = prepare_pretraining(run_config(path, limit=50, val_fraction=0.2))
    assert data.digest != everything.digest
    kept = documents_of(data, TRAIN) + documents_of(data, VAL)
    assert set(kept) == {record["text"] for record in records(50)}


def test_the_second_time_nothing_is_prepared(run_config, write, monkeypatch):
    config = run_config(write("a.jsonl", records(100)))
    first = prepare_pretraining(config)
    monkeypatch.setattr(packing, "write_folder", None)
    monkeypatch.setattr(Sources, "documents", lambda sources: (1 / 0 for _ in "x"))  # fails when read
    second = prepare_pretraining(config)
    assert second.digest == first.digest and second.summary == first.summary
    assert np.array_equal(second.train, first.train)


def test_a_given_tokenizer_gives_the_same_data(run_config, write, monkeypatch):
    config = run_config(write("a.jsonl", records(100)))
    first = prepare_pretraining(config)
    monkeypatch.setattr(packing, "write_folder", None)  # found by the digest of the tokenizer
    assert prepare_pretraining(config, first.tokenizer).digest == first.digest


def test_changed_content_is_prepared_anew(run_config, write):
    path = write("a.txt", "one text " * 50)
    digests = [prepare_pretraining(run_config(path)).digest]
    path.write_text("two text " * 50)  # the same size
    digests.append(prepare_pretraining(run_config(path)).digest)
    digests.append(prepare_pretraining(run_config(path, val_fraction=0.2)).digest)
    digests.append(prepare_pretraining(run_config(path), CharTokenizer(" ent")).digest)
    assert len(set(digests)) == 4
    path.write_text("one text " * 50)
    assert prepare_pretraining(run_config(path)).digest == digests[0]


def test_a_file_is_known_by_its_size_and_time(run_config, write):
    path = write("a.txt", "some text " * 50)
    first = Sources(run_config(path).data).fingerprint
    assert Sources(run_config(path).data).fingerprint == first
    time.sleep(0.01)
    path.write_text("some text " * 50)
    assert Sources(run_config(path).data).fingerprint != first


def test_an_interrupted_preparation_leaves_nothing(run_config, write, monkeypatch, tmp_path):
    config = run_config(write("a.jsonl", records(100)))
    monkeypatch.setattr(packing, "tokens_digest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare_pretraining(config)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]  # the tokenizer was complete
    monkeypatch.undo()
    assert prepare_pretraining(config).summary


def test_two_processes_at_once_agree(run_config, write, monkeypatch):
    """The slower one finds the folder of the faster one when it is about to rename its own."""
    config = run_config(write("a.jsonl", records(100)))
    digest = packing.tokens_digest

    def other_process_first(*arguments):
        monkeypatch.setattr(packing, "tokens_digest", digest)
        prepare_pretraining(config)
        return digest(*arguments)

    monkeypatch.setattr(packing, "tokens_digest", other_process_first)
    assert len(prepare_pretraining(config).train) > 0


def test_the_writer_holds_a_batch_not_the_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BATCH", 1000)
    writer = TokenWriter(tmp_path / "t.bin", CharTokenizer("ab"), "uint16", tqdm(disable=True))
    for number in range(200):
        writer.add_document(["ab" * 50] * 3)
        assert writer.characters < 1000 and len(writer.waiting) < 30
        assert writer.counts["tokens"] + 1000 + 20 > number * 301
    writer.flush()
    assert writer.counts["tokens"] == 200 * 300 + 199 == len(np.fromfile(tmp_path / "t.bin", dtype=np.uint16))
    assert writer.counts == {"documents": 200, "bytes": 60_000, "tokens": 60_199}


def test_wide_vocabularies_get_wide_ids(run_config, write):
    characters = "".join(map(chr, range(0x10000, 0x10000 + 70_000)))
    data = prepare_pretraining(run_config(write("a.txt", "text " * 100)), CharTokenizer(characters))
    assert data.train.dtype == np.uint32


def test_the_summary_says_what_was_read(run_config, write):
    path = write("a.txt", "some text " * 50)
    data = prepare_pretraining(run_config(path, val_fraction=0.1))
    assert data.summary[0] == f"{path}: 500 bytes"
    assert data.summary[2:] == [
        "train: 1 documents, 450 bytes, 450 tokens, 1.00 bytes per token",
        "val: 1 documents, 50 bytes, 50 tokens, 1.00 bytes per token",
    ]


def test_chat_records_become_plain_text(run_config, write):
    chats = [{"instruction": f"q{number}", "output": f"a{number}"} for number in range(100)]
    data = prepare_pretraining(run_config(write("a.jsonl", chats)))
    assert "q7\na7" in documents_of(data, TRAIN) + documents_of(data, VAL)
    assert data.train.max() >= 7 and not np.isin(data.train, range(1, 8)).any()


@pytest.mark.parametrize("content", [[{"text": "the only record"}], [{"text": "a"}, {"text": "a"}]])
def test_a_side_without_text_is_an_error(run_config, write, content):
    for fraction, side, change in ((0.001, "validation", "raise"), (0.999, "training", "lower")):
        config = run_config(write("a.jsonl", content), val_fraction=fraction)
        with pytest.raises(UserError, match=f"no {side} text; {change} data.val_fraction"):
            prepare_pretraining(config)


def test_a_file_too_short_to_split_is_an_error(run_config, write, tmp_path):
    with pytest.raises(UserError, match="no validation text; raise data.val_fraction"):
        prepare_pretraining(run_config(write("a.txt", "ten bytes!"), val_fraction=0.1))
    assert all(path.name.startswith("tokenizer_") for path in (tmp_path / "cache").iterdir())


def test_errors_in_files_come_through(run_config, write):
    path = write("a.jsonl", [*records(30), {"txt": "wrong"}])
    for _ in range(2):  # prepared, then cached
        data = prepare_pretraining(run_config(path, val_fraction=0.2))
        assert data.summary[1] == "skipped records: 1" and data.summary[2].startswith(f"  {path}, line 31: ")
    with pytest.raises(UserError, match=r"b.jsonl, line 1: .*its keys: txt"):
        prepare_pretraining(run_config(write("b.jsonl", [{"txt": "wrong"}])))


@pytest.mark.slow
def test_python_puts_held_out_files_on_one_side_and_all_else_on_the_other(run_config, library, monkeypatch):
    corpus = PythonCorpus(library.train[::8], library.val)
    monkeypatch.setattr(sources, "read_python_corpus", lambda fraction: corpus)
    documents = list(Sources(run_config("python", worked_examples=160).data).documents())
    val = {text for side, (text,) in documents if side == VAL}
    train = [text for side, (text,) in documents if side == TRAIN]
    assert val == {file.text for file in corpus.val}
    assert {file.text for file in corpus.train} <= set(train)
    assert sum(text.startswith(">>> ") for text in train) == 10
    assert len(train) > len(corpus.train) + 500  # docstrings
    modules = [
        file.name.removesuffix(".py").replace("/", ".") for file in corpus.val if "__" not in file.name
    ]
    headings = {text.split("\n")[0].removeprefix("class ").removeprefix("module ") for text in train}
    assert not any(heading.startswith(tuple(f"{name}." for name in modules)) for heading in headings)


def test_python_obeys_the_limit(run_config, monkeypatch):
    files = [SourceFile(f"{number}.py", f"x = {number}") for number in range(100)]
    monkeypatch.setattr(sources, "read_python_corpus", lambda fraction: PythonCorpus(files[10:], files[:10]))
    sides = [side for side, _ in Sources(run_config("python", limit=40, worked_examples=16).data).documents()]
    assert sides.count(VAL) == 2 and sides.count(TRAIN) == 38


@pytest.mark.slow
def test_the_embedded_default_is_well_compressed(run_config, library, monkeypatch):
    """With all 4096 tokens, but an eighth of the files: more than 3.2 bytes per token of held-out source."""
    corpus = PythonCorpus(library.train[::8], library.val[::4])
    monkeypatch.setattr(sources, "read_python_corpus", lambda fraction: corpus)
    config = run_config("python", kind="bpe", worked_examples=1600)
    config.tokenizer.vocab_size = 4096
    data = prepare_pretraining(config)
    assert len(data.train) > 2e5 and data.tokenizer.vocab_size == 4096
    assert data.tokenizer.token_bytes[data.val].sum() / len(data.val) > 3.2


def test_train_tokenizer_and_prepare_share_the_cache_folder(run_config, write, tmp_path):
    config = run_config(write("a.txt", "some text " * 50))
    prepare_pretraining(config)
    train_tokenizer(config.tokenizer, ["other text"], tmp_path / "cache", "other", 10)
    assert len(list((tmp_path / "cache").glob("tokenizer_*.json"))) == 2
