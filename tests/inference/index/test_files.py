"""Which files of a folder are read, against a folder made to be awkward."""

import os

import pytest

from inference.index import files
from inference.index.files import find_files, read_file, text_of


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_what_is_found_and_why_the_rest_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_BY_KIND", {".py": 20, ".md": 20})
    read = {"a.py": "x = 1\n", "just.py": "y" * 20, "sub/deeper/B.MD": "# B"}
    left_out = {
        "many.py": "x" * 21, "picture.png": "", "py": "", ".env.py": "secret", ".git/a.py": "",
        "sub/.venv/a.py": "", "virtual/pyvenv.cfg": "", "virtual/a.py": "", "out/a.py": "",
        "sub/build/a.py": "", "a.egg-info/a.py": "",
    }  # fmt: skip
    write(tmp_path, left_out | read)
    found, skipped = find_files(tmp_path)
    assert [*found] == [*read] and found["just.py"].st_size == 20
    assert skipped == {"large files": 1, "files of other kinds": 2, "hidden files": 1, "hidden folders": 2,
                       "virtual environments": 1, "built folders": 3}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need a right there")
def test_links_are_never_followed(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    write(folder, {"a.py": "x = 1\n"})
    write(outside, {"secret.txt": "secret\n"})
    (folder / "file.txt").symlink_to(outside / "secret.txt")
    (folder / "outside").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "broken.txt").symlink_to(folder / "nothing")
    found, skipped = find_files(folder)
    assert [*found] == ["a.py"] and skipped == {"links": 4}
    found, _ = find_files(folder / "outside")  # the folder itself may be one: the user named it
    assert [*found] == ["secret.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in folders")
def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert find_files(tmp_path) == ({}, {"files of other kinds": 1})


def test_a_file_that_is_deleted_while_the_folder_is_read(tmp_path, monkeypatch):
    write(tmp_path, {"a.py": "x = 1\n", "b.py": "y = 1\n"})
    walk = os.walk

    def deleting(*arguments, **options):
        for step in walk(*arguments, **options):
            (tmp_path / "a.py").unlink()
            yield step

    monkeypatch.setattr(os, "walk", deleting)
    found, skipped = find_files(tmp_path)
    assert [*found] == ["b.py"] and not skipped
    assert read_file(tmp_path / "a.py") is None and read_file(tmp_path) is None


@pytest.mark.parametrize("data, text", [
    (b"", ""), (b"a\r\nb\rc\n", "a\nb\nc\n"), ("\ufeffgr\u00fcn".encode(), "gr\u00fcn"),
    (b"gr\xfcn", "gr\u00fcn"), (b"a\0b", None), ("gr\u00fcn".encode("utf-16"), None),
])  # fmt: skip
def test_bytes_to_text(data, text):
    assert text_of(data) == text


def test_a_file_that_has_grown_is_read_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 3)
    (tmp_path / "a.txt").write_text("abcdef")
    assert read_file(tmp_path / "a.txt") == b"abc"
