"""Masked language modelling as a whole: what it leaves, from where it goes on, and the filling of masks."""

import shutil
import sys

import pytest
import torch

from config.load import load_config, preset_names, to_dict
from inference import fill_mask
from inference.generation.load import load_encoder
from inference.import_hf import import_model
from load_data.tokenization.tokenizer import MASK
from tests.inference.tools import write_checkpoint
from tests.processes import fork, without_pictures
from tests.train.tools import largest_difference, same_bits, without_timing
from train import mlm_train
from utils.checkpoint import find_checkpoints, load_checkpoint
from utils.errors import run_main
from utils.log import read_log

TEXT = "\n".join(f"def line_{number}(x):\n    return x + {number}" for number in range(150))
FINAL = "TinySeek_MLM_final.pkl"
SMALL = {
    "encoder.hidden_size": 16, "encoder.num_hidden_layers": 2, "encoder.num_attention_heads": 2,
    "encoder.intermediate_size": 24, "encoder.max_position_embeddings": 32, "data.sequence_length": 32,
    "data.start_length": 8, "tokenizer.vocab_size": 300, "train.dtype": "fp32", "train.log_every": 1,
    "train.save_every": 3, "optim.warmup_steps": 0, "train.eval_batches": 1,
}  # fmt: skip


def sets(settings):
    """The flags for some settings."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def flags(folder, out, *more, **settings):
    """The flags of a small run on a text of this folder."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    given = ["--data", folder / "text.txt", "--out", out, "--device", "cpu", "--max-steps", 6, *more]
    return [*given, *sets(SMALL | {"data.cache_dir": folder / "cache"} | settings)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script within this process; returns its exit code, its output and its line of error."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_main(script.main)
        return caught.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a finished run of BERT's recipe in first/."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
        patch.setattr("utils.checkpoint.prune_checkpoints", lambda *given, **named: None)
        words = flags(folder, folder / "first", "--config", "bert")
        patch.setattr(sys, "argv", ["mlm_train.py", *map(str, words)])
        mlm_train.main()
    return folder


def test_what_a_run_leaves_and_a_resumed_run_repeats_it(trained, call):
    """Resumed from its third step, it sees the same masks in rows of 8, 16 and 32 tokens."""
    saved = load_checkpoint(trained / "first" / FINAL)
    assert saved["stage"] == "mlm_train" and MASK in saved["tokenizer"]
    assert saved["config"]["encoder"]["vocab_size"] == len(saved["weights"]["lm_head.bias"]) == 289
    assert set(saved["evaluation"]) == {"val_loss", "val_ppl", "val_acc"}
    again = trained / "again"
    (again / "mlm_train").mkdir(parents=True)
    saves = {load_checkpoint(path)["step"]: path for path in find_checkpoints(trained / "first", "MLM")}
    shutil.copy(saves[3], again)
    shutil.copy(trained / "first" / "mlm_train" / "log.txt", again / "mlm_train")
    code, output, _ = call(mlm_train, *flags(trained, again, "--config", "bert", "--resume"))
    assert code == 0 and "at step 3" in output
    assert same_bits(load_checkpoint(again / FINAL)["weights"], saved["weights"])
    logs = [without_timing(read_log(out / "mlm_train" / "log.txt")) for out in (trained / "first", again)]
    assert logs[0] == logs[1]


def test_a_run_goes_on_with_a_trained_encoder(trained, call):
    """The model's settings come from the checkpoint; no step of this run is large enough to hide that."""
    out, init = trained / "more", trained / "first" / FINAL
    few = {key: SMALL[key] for key in SMALL if not key.startswith(("encoder", "tokenizer"))}
    few |= {"data.cache_dir": trained / "cache", "optim.lr": 1e-6, "optim.muon_lr": 1e-6}
    words = ["--init", init, "--data", trained / "text.txt", "--out", out, "--device", "cpu"]
    assert call(mlm_train, *words, "--max-steps", 2, *sets(few))[0] == 0
    first, second = (load_checkpoint(path) for path in (init, out / FINAL))
    assert second["config"]["encoder"] == first["config"]["encoder"]
    assert 0 < largest_difference(first["weights"], second["weights"]) < 1e-4


@pytest.mark.parametrize("name", preset_names("mlm_train"))
def test_a_preset_is_built_and_stepped(trained, call, name):
    """Its own width, recipe, optimizer and masks: only rows, layers and vocabulary are smaller. The run says
    itself that every weight moved."""
    small = {"encoder.num_hidden_layers": 2, "data.sequence_length": 16, "data.start_length": 8,
             "tokenizer.vocab_size": 300, "train.batch_size": 2, "train.dtype": "fp32"}  # fmt: skip
    words = ["--config", name, "--data", trained / "text.txt", "--out", trained / name, "--max-steps", 3]
    small |= {"data.cache_dir": trained / "cache", "train.device": "cpu"}
    code, output, error = call(mlm_train, *words, *sets(small))
    assert code == 0, error
    saved, preset = load_checkpoint(trained / name / FINAL), to_dict(load_config(name, stage="mlm_train"))
    shape = preset["encoder"] | {"num_hidden_layers": 2, "vocab_size": 289}
    assert saved["config"]["encoder"] == shape and preset["data"]["sequence_length"] <= 512
    assert all(saved["config"][section] == preset[section] for section in ("mlm", "optim"))
    assert saved["step"] == 3 and all(part.isfinite().all() for part in saved["weights"].values())
    assert "weights proven" in output and preset["train"]["max_seconds"] <= 600


@pytest.mark.slow
def test_two_processes_equal_one(trained, call):
    """8 rows; 2 x 4 rows; 2 processes x 2 x 2 rows: weights, losses, evaluations."""
    results = {}
    for rows, accumulation, processes in ((8, 1, 1), (4, 2, 1), (2, 2, 2)):
        out = trained / f"{rows}x{accumulation}x{processes}"
        sizes = {"train.batch_size": rows, "train.accumulation_steps": accumulation, "train.eval_batches": 99}
        words = flags(trained, out, "--config", "bert", **sizes)
        if processes == 1:
            assert call(mlm_train, *words)[0] == 0
        else:
            done = fork(without_pictures, "train.mlm_train", *words, processes=processes)
            assert done.returncode == 0, done.stderr
        results[rows] = load_checkpoint(out / FINAL), without_timing(read_log(out / "mlm_train" / "log.txt"))
    whole, log = results.pop(8)
    for other, rows in results.values():
        # Adam enlarges the rounding of tiny gradients: six steps of 0.001 move a weight by 0.006 at most.
        assert largest_difference(whole["weights"], other["weights"]) < 2e-5
        assert len(rows) == len(log)
        for row, expected in zip(rows, log, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------------------------------------ fill_mask


def test_candidates_are_those_of_the_model(trained, call):
    """Against the logits of the whole text, mask by mask."""
    path = trained / "first" / FINAL
    model, tokenizer, _ = load_encoder(path)
    text = "def [MASK](x):\n    return [MASK]"
    found = fill_mask.fill(model, tokenizer, text, top=7)
    ids = tokenizer.begin + [
        *tokenizer.encode("def"), tokenizer.special_ids[MASK], *tokenizer.encode("(x):\n    return"),
        tokenizer.special_ids[MASK],
    ]  # fmt: skip
    with torch.no_grad():
        shares = model(torch.tensor([ids])).logits[0].double().softmax(-1)
    assert len(found) == 2
    places = [place for place, one in enumerate(ids) if one == tokenizer.special_ids[MASK]]
    for candidates, place in zip(found, places, strict=True):
        best = shares[place].argsort(descending=True)[:7].tolist()
        assert [word for word, _ in candidates] == [tokenizer.decode([n], skip_special=False) for n in best]
        assert [share for _, share in candidates] == pytest.approx(shares[place][best].tolist(), rel=1e-6)
    code, output, _ = call(fill_mask, text, "--checkpoint", path, "--top", 7)
    lines = output.splitlines()
    assert code == 0 and lines[:2] == text.splitlines() and len(lines) == 2 + 7
    assert repr(found[0][0][0]) in lines[2] and repr(found[1][0][0]) in lines[2]


def test_what_cannot_be_filled_is_one_line(trained, call, tmp_path):
    path, decoder = trained / "first" / FINAL, write_checkpoint(tmp_path / "TinySeek_Pre_final.pkl")
    for words, expected in [
        (["no mask", "--checkpoint", path], "no [MASK] in the text"),
        (["[MASK] " * 40, "--checkpoint", path], "and the model reads 32: shorten it"),
        (["[MASK]", "--checkpoint", path, "--top", 0], "--top 0 must be from 1 to the 289"),
        (["[MASK]", "--checkpoint", decoder], f"use python inference/chat.py --checkpoint {decoder}"),
        (["[MASK]", "--out", tmp_path], "TinySeek_MLM_final.pkl: train one with train/mlm_train.py"),
        (["[MASK]", "--checkpoint", tmp_path / "none.pkl"], "none.pkl: no such checkpoint"),
    ]:
        code, _, error = call(fill_mask, *words)
        assert code == 2 and expected in error and error.count("\n") == 1, error


def test_what_cannot_be_trained_is_one_line(trained, call, tmp_path):
    decoder, out = write_checkpoint(tmp_path / "base.pkl"), tmp_path / "out"
    for more, settings, expected in [
        (["--init", decoder], {}, "base.pkl: the model of pre_train has the settings of section model"),
        ([], {"data.sequence_length": 33}, "is more than encoder.max_position_embeddings=32"),
        ([], {"encoder.vocab_size": 10}, "encoder.vocab_size=10 is less than the 289 tokens"),
        ([], {"mlm.mask_ratio": 0}, "mlm.mask_ratio=0.0 must be above 0"),
        ([], {"mlm.replaced_by_random": 0.3}, "are more than 1 together"),
    ]:
        code, _, error = call(mlm_train, *flags(trained, out, *more, **settings))
        assert code == 2 and expected in error.splitlines()[-1] and "Traceback" not in error, error
        assert not out.exists()


@pytest.mark.slow
def test_an_imported_bert_fills_masks_as_transformers_does_and_learns_on(call, tmp_path):
    """From the text to the candidates, with BERT's own tokenizer; then two steps of training. Rows of the
    model beyond the tokenizer's ids are no candidates here."""
    import transformers

    from tests.inference.hf.others import save_other

    theirs = save_other("BertForMaskedLM", tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "bert", False)
    model, tokenizer, _ = load_encoder(tmp_path / "bert" / FINAL)
    text = "The quick [MASK] jumps over a [MASK] dog!"
    pipeline = transformers.FillMaskPipeline(
        model=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    )
    found = fill_mask.fill(model, tokenizer, text, 4)
    for ours, candidates in zip(found, pipeline(text, top_k=60), strict=True):
        expected = [one for one in candidates if one["token"] < tokenizer.vocab_size][:4]
        assert [share for _, share in ours] == pytest.approx([one["score"] for one in expected], rel=1e-4)
        words = [one["token_str"].removeprefix("##") for one in expected]
        assert [word.strip() for word, _ in ours] == words
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog ! " * 60, encoding="utf-8")
    rows = {"data.sequence_length": 16, "data.start_length": 8, "data.cache_dir": tmp_path / "cache"}
    words = ["--init", tmp_path / "bert" / FINAL, "--data", tmp_path / "text.txt", "--out", tmp_path / "more"]
    code, _, error = call(mlm_train, *words, "--max-steps", 2, "--device", "cpu", *sets(rows))
    assert code == 0, error
    saved = load_checkpoint(tmp_path / "more" / FINAL)
    assert saved["config"]["encoder"]["norm_order"] == "post" and saved["config"]["tokenizer"]["kind"] == "hf"
