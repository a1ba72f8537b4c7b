"""The index on disk: it follows the folder, embeds nothing twice, and equals one that is rebuilt."""

import os
import pickle
import time

import pytest
import torch

from inference.index import store
from inference.index.passages import Passage
from inference.index.store import Index, embed, index_key, read_index, scan, write_index
from tests.inference.index.tools import WIDTH, tiny_reader
from utils.checkpoint import load_checkpoint, save_checkpoint

OLD = time.time_ns() - 10**12  # a time of change that is long settled
CODE = '"""Words."""\n\n\ndef one():\n    return 1\n\n\ndef two():\n    return 2\n'
FILES = {"a.py": CODE, "sub/b.md": "# Title\nwords\n## Next\nmore\n", "c.txt": "line\n" * 50, "empty.txt": "",
         "binary.txt": "a\0b", "long.txt": "abc " * 200, "latin.txt": b"gr\xfcn"}  # fmt: skip
READER = tiny_reader()


def write(folder, files, when=OLD):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.utime(path, ns=(when, when))


def same(one, other):
    parts = [(index.key, index.files, index.passages) for index in (one, other)]
    return parts[0] == parts[1] and torch.equal(one.vectors, other.vectors)


def update(old, folder, reader):
    """The index of `folder` as it is now, what was left out, and the number of passages embedded."""
    new, skipped = scan(old, folder, reader)
    return new, skipped, embed(old, new, reader, keep=lambda index: None)


def equal(one, other):
    """The same passages, and vectors that differ by rounding at most: batches have other neighbours."""
    bound = {"rtol": 0, "atol": 1e-6}  # unit vectors: ten roundings of fp32
    torch.testing.assert_close(one.vectors, other.vectors, **bound)
    return one.passages == other.passages and one.files.keys() == other.files.keys()


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "folder", FILES)
    return tmp_path / "folder"


@pytest.fixture
def index(folder):
    return update(Index("key"), folder, READER)[0]


def test_a_new_index(folder):
    index, skipped, embedded = update(Index("key"), folder, READER)
    assert [*index.files] == sorted(FILES) and skipped == {"binary files": 1}
    assert {one.file for one in index.passages} == FILES.keys() - {"empty.txt", "binary.txt"}
    assert [one.heading for one in index.passages[:3]] == ["a.py", "a.py: one", "a.py: two"]
    assert embedded == len({(one.heading, one.text) for one in index.passages}) < len(index.passages)
    for one, vector in zip(index.passages, index.vectors, strict=True):  # each alone, without padding
        ids = READER.tokenizer.framed(READER.tokenizer.encode(f"{one.heading}\n{one.text}"))
        assert len(ids) <= 65
        alone = READER.model(torch.tensor([ids]), padding_mask=torch.ones(1, len(ids), dtype=torch.bool))[0]
        torch.testing.assert_close(vector, alone, rtol=0, atol=1e-6)


def test_a_long_heading_leaves_room_for_the_text():
    texts = [Passage("a", 1, 1, "a" * 200, text) for text in ("one", "two")]
    assert (READER.passages(texts)[0] - READER.passages(texts)[1]).abs().max() > 0.01


def test_ranks_equal_those_of_a_loop(index):
    query = READER.query("return two")
    scores = [sum(a * b for a, b in zip(row, query.tolist())) for row in index.vectors.double().tolist()]
    found = index.search(query, 1000)
    places = [index.passages.index(one) for _, one in found]
    assert len(found) == len(scores)
    assert [score for score, _ in found] == pytest.approx([scores[place] for place in places], abs=1e-6)
    assert all(scores[a] > scores[b] - 1e-6 for a, b in zip(places, places[1:]))
    assert index.search(query, 3) == found[:3]


def test_equal_scores_keep_the_order_of_the_folder(index):
    index.vectors = torch.ones(len(index.passages), 2)
    index.vectors[5] = 2
    found = [one for _, one in index.search(torch.ones(2), 1000)]
    rest = index.passages[:5] + index.passages[6:]
    assert found == [index.passages[5], *rest]
    assert Index("key").search(torch.ones(2), 3) == []


def test_only_what_changed_is_embedded(folder, index):
    def again(expected):
        nonlocal index
        index, _, embedded = update(index, folder, READER)
        assert embedded == expected
        assert equal(index, update(Index("key"), folder, READER)[0])

    again(0)
    write(folder, {"a.py": CODE}, when=OLD + 1)  # touched
    again(0)
    write(folder, {"a.py": CODE.replace("2", "3")}, when=OLD + 2)
    again(1)
    assert "3" in index.passages[2].text
    write(folder, {"a.py": "# a line above\n" + CODE}, when=OLD + 3)  # all lines move
    again(2)  # the first passage, and `two` as it was at the beginning, which the index has forgotten
    assert index.passages[1].first == 5
    write(folder, {"sub/new.md": "# A\nb\n# C\nd\n"})
    again(2)
    (folder / "a.py").rename(folder / "z.py")
    again(3)  # a passage is embedded with its path
    (folder / "sub/b.md").unlink()
    again(0)
    write(folder, {"binary.txt": "text now"}, when=OLD + 4)
    again(1)
    write(folder, {"c.txt": "no\0 text"}, when=OLD + 5)
    again(0)
    assert not {"a.py", "sub/b.md", "c.txt"} & {one.file for one in index.passages}


def test_a_touched_file_is_not_cut_again(folder, index, monkeypatch):
    write(folder, FILES, when=OLD + 1)
    monkeypatch.setattr(store, "passages_of", None)
    assert equal(update(index, folder, READER)[0], index)


def test_a_file_with_the_same_size_and_time_is_not_read(folder, index, monkeypatch):
    reads = []
    monkeypatch.setattr(store, "read_file", lambda path: reads.append(path))
    again, skipped, embedded = update(index, folder, READER)
    assert not reads and embedded == 0 and skipped == {"binary files": 1}
    assert same(again, index)


def test_a_file_that_changed_just_now_is_read_again(folder, index):
    """Two changes within one tick of a coarse clock leave the same size and time."""
    now = time.time_ns()
    write(folder, {"a.py": CODE.replace("1", "5")}, when=now)
    index, _, _ = update(index, folder, READER)
    write(folder, {"a.py": CODE.replace("1", "6")}, when=now)
    index, _, embedded = update(index, folder, READER)
    assert embedded == 1 and "6" in index.passages[1].text


def test_a_file_that_changes_or_vanishes_while_it_is_read(folder, monkeypatch):
    read = store.read_file

    def late(path):
        if path.name == "c.txt":
            path.unlink()
        if path.name == "a.py":
            write(folder, {"a.py": CODE + "\n# more\n"}, when=OLD + 9)
        return read(path)

    monkeypatch.setattr(store, "read_file", late)
    index, skipped, _ = update(Index("key"), folder, READER)
    assert skipped == {"binary files": 1, "unreadable files": 1} and "c.txt" not in index.files
    monkeypatch.undo()
    index, _, embedded = update(index, folder, READER)
    assert embedded == 0 and equal(index, update(Index("key"), folder, READER)[0])


def test_what_is_ready_is_kept(folder, monkeypatch):
    """An interrupted run leaves whole files, and the next one goes on from there."""
    monkeypatch.setattr(store, "ROUND", 3)
    monkeypatch.setattr(store, "KEEP_EVERY", 0)
    new, _ = scan(Index("key"), folder, READER)
    kept = []
    total = embed(Index("key"), new, READER, kept.append)
    assert len(kept) == -(-total // 3) and {"a.py", "empty.txt"} <= kept[0].files.keys() < set(FILES)
    assert {one.file for one in kept[0].passages} == {"a.py"}
    rest, _, embedded = update(kept[1], folder, READER)
    assert total - 6 <= embedded < total and equal(rest, new) and same(kept[-1], new)


def test_written_and_read(tmp_path, index):
    path, told = tmp_path / "index" / store.NAME, []
    assert same(read_index(path, "key", WIDTH, told.append), Index("key"))
    for one in (index, Index("key")):
        write_index(path, one)
        assert same(read_index(path, "key", WIDTH, told.append), one) and not told


class Bomb:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return print, ("run",)


def changed(entry, place, value):
    def change(data):
        part = data[entry]
        part[place] = value(part[place]) if callable(value) else value

    return change


@pytest.mark.parametrize("change, fault", {
    "leaves the folder": (changed("passages", 0, lambda one: ["../a.py", *one[1:]]), "damaged"),
    "of no file": (changed("passages", 0, lambda one: ["b.py", *one[1:]]), "damaged"),
    "a path upwards": (lambda data: data["files"].update({"../a.py": [1, 1, "", False]}), "damaged"),
    "an absolute path": (lambda data: data["files"].update({"/etc/a.py": [1, 1, "", False]}), "damaged"),
    "a number for a path": (lambda data: data["files"].update({1: [1, 1, "", False]}), "damaged"),
    "a state too short": (changed("files", "a.py", [1, 1, ""]), "damaged"),
    "line 0": (changed("passages", 0, lambda one: [one[0], 0, *one[2:]]), "damaged"),
    "True for a line": (changed("passages", 0, lambda one: [one[0], True, *one[2:]]), "damaged"),
    "lines in reverse": (changed("passages", 0, lambda one: [one[0], 9, 8, *one[3:]]), "damaged"),
    "a passage too short": (changed("passages", 0, lambda one: one[:4]), "damaged"),
    "one vector less": (lambda data: data.update(vectors=data["vectors"][1:]), "damaged"),
    "a width less": (lambda data: data.update(vectors=data["vectors"][:, 1:].clone()), "damaged"),
    "not a number": (changed("vectors", 3, float("nan")), "damaged"),
    "whole numbers": (lambda data: data.update(vectors=data["vectors"].long()), "damaged"),
    "sparse": (lambda data: data.update(vectors=data["vectors"].to_sparse()), "damaged"),
    "vectors without passages": (lambda data: data.update(passages=[]), "damaged"),
    "no vectors": (lambda data: data.pop("vectors"), "damaged"),
    "another key": (lambda data: data.update(key="other"), "another folder or model"),
}.values())  # fmt: skip
def test_a_forged_index_is_made_anew(tmp_path, folder, index, change, fault):
    path, told = tmp_path / store.NAME, []
    write_index(path, index)
    data = load_checkpoint(path)
    change(data)
    save_checkpoint(path, data)
    again = read_index(path, "key", WIDTH, told.append)
    assert same(again, Index("key")) and len(told) == 1 and fault in told[0] and str(path) in told[0]
    assert equal(update(again, folder, READER)[0], index)


@pytest.mark.parametrize("damage", [
    lambda data: data[:1000], lambda data: b"", lambda data: b"no index",
    lambda data: data.replace(b"a.py: one", b"a.py: ane"),
    lambda data: pickle.dumps({"format_version": 2, "key": "key", "passages": [Bomb()]}),
])  # fmt: skip
def test_a_damaged_index_is_made_anew(tmp_path, index, damage, capsys):
    path, told = tmp_path / store.NAME, []
    write_index(path, index)
    path.write_bytes(damage(path.read_bytes()))
    assert same(read_index(path, "key", WIDTH, told.append), Index("key"))
    assert told == [f"{path}: no index, or a damaged one; it is rebuilt"]
    assert "run" not in capsys.readouterr().out


def test_another_model_or_folder_has_another_key(tmp_path):
    key = index_key(tmp_path, READER)
    assert index_key(tmp_path, tiny_reader()) == key
    others = [tiny_reader(1), tiny_reader(document_length=66)]
    assert len({key, index_key(tmp_path / "a", READER), *(index_key(tmp_path, one) for one in others)}) == 4
