"""Stored logits of a teacher: against its forward over each dialogue alone, and the hash of their folder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from load_data.chat.chat_data import ChatData, Samples, encode, samples_digest
from modules.distillation.divergence import KINDS, top_logit_loss, top_outcomes
from tests.inference.tools import byte_tokenizer, tiny_model
from tests.train.engine.test_student_samples import DIALOGUES, TEMPLATE
from tests.train.tools import machine, small_config
from train.engine import teacher_logits
from train.engine.fine_tuning import chat_source
from train.engine.teacher_logits import store_logits
from utils.errors import UserError

HALF = 2.0**-11  # fp16 rounds by at most this share


def dialogues(*more):
    """The data as a stage has them."""
    found = [encode(TEMPLATE, turns, 41)[0] for turns in [*DIALOGUES, *more]]
    lengths = np.array([len(one.ids) for one in found])
    samples = Samples(*map(np.concatenate, zip(*found, strict=True)), lengths)
    digest = samples_digest({"train": samples})
    return ChatData(byte_tokenizer(), TEMPLATE, samples, samples, [], digest, None)


def stored(out, model, *settings, data=None, digest="a teacher"):
    """A source with stored logits of `model`, and their folder."""
    teacher = SimpleNamespace(model=model, tokenizer=byte_tokenizer(), digest=digest)
    config = small_config("data.sequence_length=40", "train.batch_size=2", "distill.top_k=5",
                          f"data.cache_dir={out}", *settings)  # fmt: skip
    data = data or dialogues()
    source = chat_source(data.train, byte_tokenizer(), config, machine())
    return source, store_logits(source, data, teacher, config, machine())


@pytest.mark.parametrize("packing", ["true", "false"])
def test_stored_logits_are_those_of_the_running_teacher(packing, tmp_path):
    """In every epoch and row, at the labels and nowhere else; fp16 is all that differs."""
    teacher, warm = tiny_model(seed=2), 1.5
    source, _ = stored(tmp_path, teacher, f"data.packing={packing}", f"distill.temperature={warm}")
    seen = 0
    while source.epoch_progress < 2:
        (batch,) = source.next_step().micro_batches
        names = ("input_ids", "labels", "document_ids", "teacher_ids", "teacher_logprobs")
        rows = zip(*(batch[name] for name in names), strict=True)
        for ids, labels, documents, best, logprobs in rows:
            assert not best[labels == -100].any() and not logprobs[labels == -100].any()
            for number in documents[documents >= 0].unique():
                here = documents == number
                with torch.no_grad():
                    scores = (teacher(ids[here][None]).logits[0] / warm).log_softmax(-1)
                keep = labels[here] != -100
                values, places = scores[keep].topk(5)
                assert torch.equal(best[here][keep], places)
                off = (logprobs[here][keep] - values).abs()
                assert (off <= HALF * values.abs() + 2e-6).all()
                seen += len(places)
    assert seen >= 2 * int(source.loader.rows.samples.targets.sum())


def test_the_loss_is_that_of_the_running_teacher(tmp_path):
    """With the same top_k. A rounded log p weighs at most 2^-11 of itself in each term of the divergence."""
    teacher, student = tiny_model(seed=2), tiny_model(seed=3)
    source, _ = stored(tmp_path, teacher)
    (batch,) = source.next_step().micro_batches
    keep = batch["labels"] != -100
    about = {key: batch[key] for key in ("position_ids", "document_ids", "padding_mask")}
    with torch.no_grad():
        scores, truth = (model(batch["input_ids"], **about).logits[keep] for model in (student, teacher))
    for kind in KINDS:
        found = top_logit_loss(scores, batch["teacher_ids"][keep], batch["teacher_logprobs"][keep], kind)
        running = top_logit_loss(scores, *top_outcomes(truth, 5), kind)
        assert found.item() == pytest.approx(running.item(), rel=2 * HALF) and found != running


def test_the_hash_is_of_teacher_data_and_settings(tmp_path, monkeypatch):
    teacher = tiny_model(seed=2)
    source, folder = stored(tmp_path, teacher)
    names = {folder.name}
    for setting in ("distill.top_k=4", "distill.temperature=2"):
        names.add(stored(tmp_path, teacher, setting)[1].name)
    names.add(stored(tmp_path, teacher, digest="another")[1].name)
    names.add(stored(tmp_path, teacher, data=dialogues(DIALOGUES[1]))[1].name)
    assert len(names) == 5 and all((tmp_path / name).is_dir() for name in names)
    monkeypatch.setattr(teacher_logits, "write_folder", None)  # the same again is read
    again, _ = stored(tmp_path, None)
    for first, second in zip(source.next_step().micro_batches, again.next_step().micro_batches, strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["ids.bin", "logprobs.bin", "meta.json"])
@pytest.mark.parametrize("how", ["a bit", "the end", "all"])
def test_a_damaged_file_is_refused(name, how, tmp_path):
    teacher = tiny_model(seed=2)
    _, folder = stored(tmp_path, teacher)
    path, whole = folder / name, (folder / name).read_bytes()
    if how == "all":
        path.unlink()
    else:
        path.write_bytes(whole[:-2] if how == "the end" else whole[:20] + bytes([whole[20] ^ 1]) + whole[21:])
    with pytest.raises(UserError, match=f"teacher_logits_{folder.name[-16:]}: damaged; delete this folder"):
        stored(tmp_path, teacher)
