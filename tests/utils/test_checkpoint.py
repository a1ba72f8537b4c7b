"""Checkpoints survive what machines and strangers do to them."""

import os
import pickle
import re
import signal
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.processes import Forked, fork
from utils.checkpoint import (
    FORMAT_VERSION,
    checkpoint_name,
    final_name,
    find_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_weights,
    prune_checkpoints,
    save_checkpoint,
    weights_digest,
)
from utils.errors import UserError

def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    data = {
        "weights": model.state_dict(),
        "half": torch.tensor([1.0, -0.0, float("nan")], dtype=torch.bfloat16),
        "optimizer": optimizer.state_dict(),
        "config": {"model": {"hidden_size": 3, "rope_scaling": None, "names": ["a", "ä"]}},
        "step": 7,
    }
    save_checkpoint(tmp_path / "new" / "a.pkl", data)
    back = load_checkpoint(tmp_path / "new" / "a.pkl")
    assert back["format_version"] == FORMAT_VERSION
    assert back["config"] == data["config"]
    assert isinstance(back["weights"], OrderedDict)
    for name, tensor in data["weights"].items():
        assert torch.equal(back["weights"][name], tensor)
    assert torch.equal(back["half"].view(torch.int16), data["half"].view(torch.int16))
    moments = optimizer.state_dict()["state"][0]
    assert all(torch.equal(back["optimizer"]["state"][0][key], moments[key]) for key in moments)
    assert os.listdir(tmp_path / "new") == ["a.pkl"]


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(1000, 64), "head": nn.Linear(64, 1000, bias=False)})
    model["head"].weight = model["embed"].weight
    save_checkpoint(tmp_path / "a.pkl", {"weights": model.state_dict()})
    assert (tmp_path / "a.pkl").stat().st_size < 1.1 * 1000 * 64 * 4
    weights = load_checkpoint(tmp_path / "a.pkl")["weights"]
    assert torch.equal(weights["embed.weight"], weights["head.weight"])


@pytest.mark.parametrize("value", [Path("x"), torch.float32, {1, 2}, nn.Linear(1, 1)])
def test_what_could_not_be_read_again_is_not_written(tmp_path, value):
    with pytest.raises(TypeError, match=r"checkpoint\['deep'\]\[1\]"):
        save_checkpoint(tmp_path / "a.pkl", {"deep": [0, value]})
    assert not list(tmp_path.iterdir())


def refusal(path) -> str:
    """The one line with which `load_checkpoint` refuses; it names the file."""
    with pytest.raises(UserError) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "a.pkl"
    assert "no such checkpoint" in refusal(path)
    assert "cannot be read" in refusal(tmp_path)
    for content in (b"", b"hello", pickle.dumps({"format_version": 1}), os.urandom(999)):
        path.write_bytes(content)
        assert "not a TinySeek checkpoint" in refusal(path)
    torch.save({"model": torch.ones(2)}, path)
    assert "format_version" in refusal(path)
    torch.save([1], path)
    assert "format_version" in refusal(path)
    torch.save({"format_version": 99}, path)
    assert "format 99" in refusal(path)


def test_a_damaged_file_is_refused_wherever_it_is_damaged(tmp_path):
    path = tmp_path / "a.pkl"
    save_checkpoint(path, {"weights": torch.arange(300.0), "name": "x"})
    content = path.read_bytes()
    for length in range(2, len(content), 97):
        path.write_bytes(content[:length])
        assert "cut short" in refusal(path)
    first_weight = content.index(torch.arange(300.0).numpy().tobytes())
    for place in (first_weight, first_weight + 601, content.index(b"weights")):
        broken = bytearray(content)
        broken[place] ^= 0x10
        path.write_bytes(broken)
        assert "damaged" in refusal(path)


class Evil:
    """Unpickled, it creates a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("raw", [True, False], ids=["plain pickle", "torch.save"])
def test_a_file_with_code_is_refused_and_its_code_not_run(tmp_path, raw):
    path, target = tmp_path / "a.pkl", tmp_path / "it_ran"
    evil = {"format_version": FORMAT_VERSION, "weights": Evil(target)}
    if raw:
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path)
        assert "carries code or a foreign object (" in refusal(path)
    refusal(path)
    assert not target.exists()
    if not raw:  # the trap does work
        torch.load(path, weights_only=False)
        assert target.exists()


def test_weights_must_fit(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    good = {name: torch.full_like(tensor, 2.0) for name, tensor in model.state_dict().items()}
    before = model[0].weight.detach().clone()
    bad = {
        name: tensor
        for name, tensor in good.items()
        if name not in ("0.bias", "2.bias", "3.bias", "3.weight")
    }
    bad |= {"1.weight": torch.zeros(4, 5), "extra": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_weights(model, bad, "x.pkl")
    line = str(caught.value)
    assert "x.pkl" in line
    assert "4 missing (0.bias, 2.bias, 3.weight, ...)" in line
    assert "1 unexpected (extra)" in line
    assert "1 of another shape (1.weight (4, 5) where the model has (4, 3))" in line
    assert torch.equal(model[0].weight, before)  # nothing was copied
    load_weights(model, good, "x.pkl")
    assert model[0].weight.eq(2).all()


def test_names_and_order(tmp_path):
    assert checkpoint_name("Pre", 3, 0) == "TinySeek_Pre3_0.pkl"
    assert final_name("SFT") == "TinySeek_SFT_final.pkl"
    assert latest_checkpoint(tmp_path, "Pre") is None
    order = [(2, 0), (10, 0), (1, 1), (1, 10)]  # index, epoch
    names = [checkpoint_name("Pre", *pair) for pair in order]
    others = [final_name("Pre"), "TinySeek_Prefix1_0.pkl", "TinySeek_Prefix2_0.pkl.tmp", "notes.txt"]
    leftovers = ["TinySeek_Pre11_0.pkl.tmp", "TinySeek_Pre_final.pkl.tmp", "TinySeek_Pre9_0.pkl.old"]
    for name in names[::-1] + others + leftovers:
        (tmp_path / name).touch()
    assert [path.name for path in find_checkpoints(tmp_path, "Pre")] == names
    assert latest_checkpoint(str(tmp_path), "Pre").name == names[-1]
    prune_checkpoints(tmp_path, "Pre")
    assert sorted(os.listdir(tmp_path)) == sorted(names[-2:] + others)
    prune_checkpoints(tmp_path, "Pre", keep=0)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_a_digest_knows_names_shapes_formats_and_every_bit():
    """And neither the order of the entries, nor how they lie in memory."""
    matrix = torch.arange(6.0).view(2, 3)
    weights = {"a": matrix, "b": torch.ones(2, dtype=torch.bfloat16)}
    digest = weights_digest(weights)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    turned = {"b": weights["b"].clone(), "a": matrix.T.contiguous().T}
    assert weights_digest(turned) == digest
    bit = matrix.clone()
    bit.view(torch.int32)[1, 2] ^= 1
    for other in (
        weights | {"a": bit}, weights | {"a": matrix.view(3, 2)}, weights | {"a": matrix.view(torch.int32)},
        {"a": matrix}, {"c": matrix, "b": weights["b"]}, weights | {"c": torch.ones(())},
        weights | {"a": torch.cat([-matrix[:1], matrix[1:]])},
    ):  # fmt: skip
        assert weights_digest(other) != digest


def test_weights_of_an_adapter_are_loaded_beside_those_of_its_base():
    """All of its names and no other, or nothing is copied."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    before = {name: part.clone() for name, part in model.state_dict().items()}
    names = {"1.weight", "1.bias"}
    good = {"1.weight": torch.ones(2, 3), "1.bias": torch.ones(2)}
    for bad, words in (
        ({"1.weight": torch.ones(2, 3)}, r"adapter\.pkl .*1 missing \(1\.bias\)"),
        (good | {"0.bias": torch.ones(3)}, r"1 unexpected \(0\.bias\)"),
        (good | {"1.bias": torch.ones(3)}, r"1\.bias \(3,\) where the model has \(2,\)"),
    ):
        with pytest.raises(UserError, match=words):
            load_weights(model, bad, "adapter.pkl", names)
        assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items())
    load_weights(model, good, "adapter.pkl", names)
    after = model.state_dict()
    assert all(torch.equal(after[name], (before | good)[name]) for name in before)


def save_for_ever(path):
    """Save one checkpoint after the other, and print the step of each that is complete."""
    for step in range(10**9):
        save_checkpoint(path, {"step": step, "weights": torch.full((500_000,), float(step))})
        print(step, flush=True)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_kill_in_the_middle_of_saving_leaves_a_complete_checkpoint(tmp_path):
    path = tmp_path / checkpoint_name("Pre", 1, 0)
    for trial in range(6):
        process = Forked(save_for_ever, path)
        while "\n" not in process.text("out"):
            time.sleep(0.001)
        time.sleep(0.003 * trial)
        process.send_signal(signal.SIGKILL)
        printed, _ = process.communicate()
        assert process.returncode == -signal.SIGKILL
        data = load_checkpoint(path)
        assert data["step"] >= int(printed.split()[-1])
        assert data["weights"].eq(data["step"]).all()
    prune_checkpoints(tmp_path, "Pre")
    assert os.listdir(tmp_path) == [path.name]


def fill_the_disk(path, numbers):
    """Save a checkpoint, and another where a file may hold 100 kB."""
    import resource

    save_checkpoint(path, {"weights": torch.ones(1000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    save_checkpoint(path, {"weights": torch.zeros(numbers)})


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [24_900, 1_000_000])  # full at the end of the file, and full at once
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so_in_one_line(tmp_path, numbers):
    pytest.importorskip("resource")
    path = tmp_path / "a.pkl"
    process = fork(fill_the_disk, path, numbers)
    assert process.returncode == 2, process.stderr
    assert re.fullmatch(r"error: could not write .*a\.pkl: File too large\..*--resume\)\n", process.stderr)
    assert load_checkpoint(path)["weights"].eq(1).all()
    assert os.listdir(tmp_path) == ["a.pkl"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"could not write .*a\.pkl"):
        save_checkpoint(tmp_path / "file" / "a.pkl", {})
