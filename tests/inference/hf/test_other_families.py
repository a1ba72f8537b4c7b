"""BERT, ModernBERT and T5 from transformers and back: the same logits, and files with the same bits."""

import json
import re
import shlex
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from config.encoder import EncoderConfig
from config.load import to_dict
from config.schema import RunConfig
from config.seq2seq import Seq2SeqConfig
from inference import export_hf, fill_mask, import_hf, seq2seq
from inference.fill_mask import fill
from inference.generation.load import SPECIAL, build, load_encoder, load_seq2seq, open_as
from inference.generation.sampling import SamplingParams
from inference.hf import by_table
from inference.hf.by_table import WHOLE, behaviour, read_settings, write_settings
from inference.hf.families import REQUIRED
from inference.hf.other_families import OTHER_FAMILIES
from inference.seq2seq import written
from load_data.tokenization.tokenizer import MASK, SENTINELS, BpeTokenizer
from tests.inference.hf.others import OTHERS, SIZES, save_other
from tests.inference.hf.test_import import edit_json, rewrite
from utils.checkpoint import save_checkpoint
from utils.errors import UserError, run_main

IDS = torch.randint(5, 28, (3, 17), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(17) < torch.tensor([17, 9, 1])[:, None]  # (3, 17), the last row has one token


def run(monkeypatch, module, *args):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


def opened(path):
    """The model, the tokenizer and the settings in a checkpoint."""
    short = path.name.split("_")[1]
    return build(WHOLE[short], open_as(SPECIAL[short], path), path)


@torch.inference_mode()
def logits_of(model):
    """Logits of real tokens, by either library."""
    more, theirs = {}, isinstance(model, transformers.PreTrainedModel)
    if "decoder" in dict(model.named_children()) and hasattr(model, "encoder"):
        more["decoder_input_ids"] = IDS[:, :11]
    found = model(IDS, **{"attention_mask" if theirs else "padding_mask": REAL}, **more)
    logits = found.prediction_logits if "prediction_logits" in dir(found) else found.logits
    return logits if more else logits[REAL]


def check_same(ours, theirs):
    """Compare all logits: some 60 roundings of 2^-24 of numbers of up to 8."""
    expected = logits_of(theirs)
    assert expected.std() > 0.1, "the comparison needs logits that differ"
    assert (logits_of(ours.eval()) - expected).abs().max() < 4e-6 * max(1, expected.abs().max())


@pytest.mark.parametrize("case", OTHERS)
def test_there_and_back(case, tmp_path, monkeypatch):
    """transformers writes, we read; we write, transformers reads: equal logits, tensors bit for bit."""
    theirs = save_other(case, tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    (path,) = (tmp_path / "out").glob("*.pkl")
    model, tokenizer, _ = opened(path)
    check_same(model, theirs)
    run(monkeypatch, export_hf, tmp_path / "again", "--checkpoint", path)
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("hf", "again"))
    unused = {name for name in before if name.startswith(("bert.pooler.", "cls.seq_relationship."))}
    assert bool(unused) == (case == "BertForPreTraining")
    assert before.keys() - unused == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    config = AutoConfig.from_pretrained(tmp_path / "again")
    again = getattr(transformers, config.architectures[0]).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits_of(again), logits_of(theirs))
    assert config.pad_token_id == tokenizer.pad_id
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "hf" / name).read_text() == (tmp_path / "again" / name).read_text()
    old, new = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("hf", "again"))
    assert behaviour(read_settings(old, before, "")) == behaviour(read_settings(new, after, ""))
    changed = {key: value for key, value in new.items() if old.get(key, value) != value}
    allowed = {"BertForPreTraining": {"architectures": ["BertForMaskedLM"]},  # the head that is left
               "T5ForConditionalGeneration, two matrices, longer decoder": {
                   "tie_word_embeddings": False}}  # as older versions read it  # fmt: skip
    assert changed == allowed.get(case, {})
    assert all(key in new for key, one in old.items() if key.endswith("_token_id") and one is not None)


@pytest.mark.parametrize(
    "case, script", [("BertForMaskedLM", fill_mask), ("T5ForConditionalGeneration", seq2seq)]
)
def test_the_command_that_an_import_prints_works(case, script, tmp_path, monkeypatch, capsys):
    save_other(case, tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "a folder")
    python, name, *words = shlex.split(capsys.readouterr().err.splitlines()[-1].removeprefix("next: "))
    assert (python, name) == ("python", f"{script.__name__.replace('.', '/')}.py")
    run(monkeypatch, script, *words)


@torch.inference_mode()
def test_masks_are_filled_as_by_transformers(tmp_path, monkeypatch):
    """The whole way of a user: a folder, a text with two masks, the same words and probabilities."""
    theirs = save_other("BertForMaskedLM", tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    model, tokenizer, _ = load_encoder(tmp_path / "out" / "TinySeek_MLM_final.pkl")
    text = "The quick [MASK] jumped over 你 [MASK]!"
    row = AutoTokenizer.from_pretrained(tmp_path / "hf")(text, return_tensors="pt")
    shares = theirs(**row).logits[row["input_ids"] == 4].softmax(dim=-1)  # (2, V)
    for found, expected in zip(fill(model, tokenizer, text, top=28), shares, strict=True):
        words = {tokenizer.decode([one], skip_special=False): share for one, share in enumerate(
            expected[: tokenizer.vocab_size].tolist())}  # fmt: skip
        assert dict(found).keys() == words.keys()
        assert all(abs(share - words[word]) < 1e-6 for word, share in found)
        assert found[0][1] > 2 * found[9][1]


@torch.inference_mode()
def test_a_t5_writes_what_it_writes_in_transformers(tmp_path, monkeypatch):
    """The first token and the last are those of the folder; sources of different lengths in one batch."""
    theirs = save_other("T5ForConditionalGeneration", tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    edit_json(tmp_path / "hf" / "config.json", decoder_start_token_id=None)  # newer files have it elsewhere
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out", "--overwrite")
    model, tokenizer, config = load_seq2seq(tmp_path / "out" / "TinySeek_Span_final.pkl")
    assert config.seq2seq.decoder_start_token_id == 3
    ids = IDS * REAL  # the token for padding is 0
    expected = theirs.generate(ids, attention_mask=REAL.long(), max_new_tokens=12, do_sample=False)[:, 1:]
    sources = [row[mask].tolist() for row, mask in zip(ids, REAL)]
    found = written(model, tokenizer, sources, SamplingParams(0.0, max_new_tokens=12))
    assert found == [row[(row == 1).cumsum(0) == 0].tolist() for row in expected]
    assert len({one for answer in found for one in answer}) > 3
    assert tokenizer.finish == [1] and SENTINELS[0] in tokenizer.special_ids


def test_several_files_and_bf16(tmp_path, monkeypatch):
    """Both sides divide the weights; bf16 is read exactly and written rounded once."""
    theirs = save_other("ModernBertForMaskedLM", tmp_path / "hf", max_shard_size="20KB")
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 2
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "a")
    path = tmp_path / "a" / "TinySeek_MLM_final.pkl"
    check_same(opened(path)[0], theirs)
    monkeypatch.setattr(export_hf, "SHARD", 9_000)
    run(monkeypatch, export_hf, tmp_path / "half", "--checkpoint", path, "--dtype", "bf16")
    assert len([*(tmp_path / "half").glob("*.safetensors")]) > 2
    half = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "half")
    expected = theirs.state_dict()
    assert all(torch.equal(part, expected[name].bfloat16()) for name, part in half.state_dict().items())
    run(monkeypatch, import_hf, tmp_path / "half", "--out", tmp_path / "b")
    check_same(opened(tmp_path / "b" / path.name)[0], half.float().eval())


def rename(old, new):
    return lambda weights: weights.update({name.replace(old, new): weights.pop(name) for name in [*weights]})


GAINS = [(".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta")]
FILES = {  # what files of other versions look like -> (case, changes of the tensors)
    "gains as gamma and beta": ("BertForMaskedLM", [rename(*one) for one in GAINS]),
    "both tied heads": ("BertForMaskedLM", [lambda w: w.update({
        "cls.predictions.decoder.weight": w["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": w["cls.predictions.bias"].clone(),
        "bert.embeddings.position_ids": torch.arange(48)[None]})]),
    "the bias under its other name": ("BertForMaskedLM", [
        rename("cls.predictions.bias", "cls.predictions.decoder.bias")]),
    "an embedding for each half": ("T5ForConditionalGeneration", [lambda w: w.update({
        f"{half}.embed_tokens.weight": w["shared.weight"].clone() for half in ("encoder", "decoder")})]),
    "a table that no layer has": ("T5ForConditionalGeneration", [lambda w: w.update({
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)})]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_versions(name, tmp_path, monkeypatch):
    """Old names, and tied tensors that are in the file more than once."""
    case, changes = FILES[name]
    theirs = save_other(case, tmp_path / "hf")
    for change in changes:
        rewrite(tmp_path / "hf", change)
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    check_same(opened(next((tmp_path / "out").glob("*.pkl")))[0], theirs)


def test_old_spellings():
    """config.json as transformers 4 wrote it."""
    rope = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 70}}
    new = SIZES | {"model_type": "modernbert", "rope_parameters": rope,
                   "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    old = SIZES | {"model_type": "modernbert", "global_attn_every_n_layers": 2, "global_rope_theta": 500.0,
                   "local_rope_theta": 70.0}  # fmt: skip
    assert behaviour(read_settings(old, (), "")) == behaviour(read_settings(new, (), ""))
    assert behaviour(read_settings(old | {"global_rope_theta": 9.0}, (), "")) != behaviour(
        read_settings(new, (), ""))  # fmt: skip
    t5 = {"model_type": "t5", **OTHERS["T5ForConditionalGeneration"]}
    for tied in (True, False):  # which said whether the outputs are scaled, too
        model = read_settings(t5 | {"tie_word_embeddings": tied}, () if tied else ("lm_head.weight",), "")
        assert (model.tie_word_embeddings, model.scale_decoder_outputs) == (tied, tied)
    mixed = read_settings(t5 | {"tie_word_embeddings": True, "scale_decoder_outputs": False}, (), "")
    assert mixed.tie_word_embeddings and not mixed.scale_decoder_outputs


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_absent_settings_are_those_of_transformers(name):
    """A config.json that has only what it must have."""
    family = OTHER_FAMILIES[name]
    values = SIZES | {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 20}
    needed = [names[0] for default, *names in family.settings.values() if default is REQUIRED]
    least = {one: values[one] for one in needed}
    least |= {"feed_forward_proj": "gated-gelu"} if name == "t5" else {}
    full = AutoConfig.for_model(name, **least).to_dict()
    given = {"model_type": name} | least
    assert to_dict(RunConfig(**{family.section: read_settings(given, (), "")})) == to_dict(
        RunConfig(**{family.section: read_settings(full | {"layer_types": None}, (), "")}))  # fmt: skip
    assert behaviour(read_settings(given, (), "")) == behaviour(read_settings(full, (), ""))


CLASSIC = {"norm_order": "post", "norm": "layer_norm", "norm_bias": True, "gated": False, "mlp_bias": True,
           "position_embedding_type": "absolute", "hidden_act": "gelu", "attention_bias": True,
           "type_vocab_size": 2, "head_bias": True}  # fmt: skip
SETTINGS = {
    "bert": {"hidden_act": "relu", "position_embedding_type": "relative_key", "is_decoder": True,
             "add_cross_attention": True, "tie_word_embeddings": False, "type_vocab_size": 0,
             "quantization_config": {"bits": 4}, "hidden_size": None},
    "modernbert": {"hidden_activation": "relu", "classifier_activation": "relu", "decoder_bias": False,
                   "tie_word_embeddings": False, "rope_scaling": {"rope_type": "yarn"},
                   "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}},
                   "layer_types": ["full_attention"], "local_attention": "wide"},
    "t5": {"feed_forward_proj": "relu", "is_gated_act": False, "dense_act_fn": "relu", "d_kv": 0,
           "relative_attention_num_buckets": 6},
}  # fmt: skip


@pytest.mark.parametrize("name, key", [(name, key) for name, some in SETTINGS.items() for key in some])
def test_settings_that_nothing_here_computes_are_refused(name, key):
    """The error names them."""
    case = {"bert": "BertForMaskedLM", "modernbert": "ModernBertForMaskedLM",
            "t5": "T5ForConditionalGeneration"}[name]  # fmt: skip
    settings = {"model_type": name, **OTHERS[case]}
    assert read_settings(settings, (), "config.json")
    words = {"d_kv": "head_dim", "hidden_activation": "hidden_activation='relu'"}.get(key, key)
    with pytest.raises(UserError, match=f"^config.json: .*{words}"):
        read_settings(settings | {key: SETTINGS[name][key]}, (), "config.json")


@pytest.mark.parametrize("rope", ["yarn", {"rope_type": "default"}, {"full_attention": 3}])
def test_rules_of_positions_of_another_form_are_refused(rope):
    """A rule for all layers alike would be read as none."""
    settings = {"model_type": "modernbert", **OTHERS["ModernBertForMaskedLM"]}
    with pytest.raises(UserError, match="rope_parameters"):
        read_settings(settings | {"rope_parameters": rope}, (), "config.json")


def test_no_feed_forward_named_is_that_of_the_first_t5():
    """An absent entry means `relu`."""
    settings = {"model_type": "t5", **OTHERS["T5ForConditionalGeneration"]}
    del settings["feed_forward_proj"]
    with pytest.raises(UserError, match="feed_forward_proj='relu'"):
        read_settings(settings, (), "config.json")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, "modernbert comes nearest, but not in norm='rms_norm', hidden_act='silu'"),
        ({"norm": "layer_norm", "hidden_act": "gelu", "type_vocab_size": 2}, "type_vocab_size=2"),
        (CLASSIC | {"head_bias": False}, "bert comes nearest, but not in head_bias=False"),
        (CLASSIC | {"local_attention": 8}, "windows of layers=[None, 5, 5, None]"),
    ],
)  # fmt: skip
def test_models_without_a_twin_are_not_written(settings, words):
    """The nearest family, and what it lacks."""
    with pytest.raises(UserError, match=re.escape(words)):
        write_settings(EncoderConfig(vocab_size=9, **settings))


def test_settings_without_effect_do_not_matter():
    """All layers see all, and nothing rotates; the buckets of a T5 have no last one."""
    modern = EncoderConfig(vocab_size=9, norm="layer_norm", hidden_act="gelu", local_rope_theta=7.0)
    written = AutoConfig.for_model(**write_settings(modern))
    assert set(written.layer_types) == {"full_attention"} and written.local_attention == 128
    classic = EncoderConfig(vocab_size=9, **CLASSIC, local_rope_theta=7.0, global_rope_theta=8.0)
    assert write_settings(classic)["model_type"] == "bert"
    assert write_settings(Seq2SeqConfig(vocab_size=9, max_position_embeddings=7))["d_model"] == 192


def test_a_model_of_ours_with_a_tokenizer_of_ours(tmp_path, monkeypatch):
    """What mlm_train leaves is a ModernBERT that transformers loads, with a mask token."""
    tokenizer = BpeTokenizer([]).with_special([MASK])
    config = RunConfig(encoder=EncoderConfig(tokenizer.vocab_size, 32, 2, 2, 24, 40, norm="layer_norm",
                                             hidden_act="gelu", local_attention=4))  # fmt: skip
    config.train.max_steps = 1
    model = WHOLE["MLM"](config.encoder).eval()
    save_checkpoint(path := tmp_path / "TinySeek_MLM_final.pkl", {
        "stage": "mlm_train", "short": "MLM", "config": to_dict(config), "weights": model.state_dict(),
        "tokenizer": tokenizer.to_json(), "step": 7})  # fmt: skip
    run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path)
    twin = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert twin.mask_token_id == tokenizer.special_ids[MASK]
    ids = twin("def f(x):")["input_ids"]
    assert ids == tokenizer.framed(tokenizer.encode("def f(x):"))
    theirs = transformers.ModernBertForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        row = torch.tensor([ids])
        assert (theirs(row).logits - model(row).logits).abs().max() < 1e-5
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "back")
    back = opened(tmp_path / "back" / path.name)[0].state_dict()
    assert all(torch.equal(part, back[name]) for name, part in model.state_dict().items())


GATE = "bert.encoder.layer.1.output.dense.weight"
BAD = {
    "missing": (lambda f: rewrite(f, lambda w: w.pop(GATE)), f"missing: {GATE}"),
    "left over": (
        lambda f: rewrite(f, lambda w: w.update({"odd.bias": torch.ones(2)})), "left over: odd.bias"),
    "another shape": (lambda f: rewrite(f, lambda w: w.update({GATE: torch.zeros(3, 4)})), r"\(3, 4\) where"),
    "old and new name": (lambda f: rewrite(f, lambda w: w.update({
        "bert.embeddings.LayerNorm.gamma": torch.ones(32)})), "left over: bert.embeddings.LayerNorm.gamma"),
    "a tied head that differs": (lambda f: rewrite(f, lambda w: w.update({
        "cls.predictions.decoder.bias": torch.ones(60)})), "decoder.bias differs from cls.predictions.bias"),
    "a body alone": (lambda f: rewrite(f, lambda w: (
        [w.pop(name) for name in [*w] if name.startswith("cls.")], rename("bert.", "")(w))),
        "missing: cls.predictions"),
    "more layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "missing: bert.encoder"),
    "endless layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "1000000000 layers"),
    "a huge width": (lambda f: edit_json(f / "config.json", hidden_size=4 * 10**12), "heads of 10000000"),
    "a size of 100 bits": (lambda f: edit_json(f / "config.json", intermediate_size=10**30), "impossible"),
    "more tokens than rows": (lambda f: (edit_json(f / "config.json", vocab_size=20), rewrite(
        f, lambda w: w.update({"bert.embeddings.word_embeddings.weight": torch.ones(20, 32)}))),
        "only 20 rows"),
    "unknown": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "known: qwen3, .*, bert, modern"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused(name, tmp_path, monkeypatch, capsys):
    """One line that says what is wrong, exit code 2, and nothing left behind."""
    spoil, words = BAD[name]
    save_other("BertForMaskedLM", tmp_path / "hf")
    spoil(tmp_path / "hf")
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(words, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["num_decoder_layers", "d_model"])
def test_the_sizes_of_a_t5_are_checked_before_they_cost_memory(name, tmp_path, monkeypatch):
    save_other("T5ForConditionalGeneration", tmp_path / "hf")
    edit_json(tmp_path / "hf" / "config.json", **{name: 10**6})
    monkeypatch.setattr(by_table, "blank", None)
    with pytest.raises(UserError, match="cannot be those of config.json, which has .*100000"):
        run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")


def test_a_tokenizer_without_a_frame_is_exported(tmp_path, monkeypatch):
    """GPT-2's puts nothing around a text: its end of text ends a target too."""
    save_other("T5ForConditionalGeneration", tmp_path / "hf")
    edit_json(tmp_path / "hf" / "tokenizer.json", post_processor=None)
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    path = tmp_path / "out" / "TinySeek_Span_final.pkl"
    tokenizer = opened(path)[1]
    assert not tokenizer.begin and not tokenizer.finish
    run(monkeypatch, export_hf, tmp_path / "again", "--checkpoint", path)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.eos_id


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    """RMSNorm is in no BERT; and a folder in use is refused."""
    save_other("BertForMaskedLM", tmp_path / "hf")
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    path = tmp_path / "out" / "TinySeek_MLM_final.pkl"
    with pytest.raises(UserError, match="exists already"):
        run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path)
    monkeypatch.setattr(by_table, "OTHER_FAMILIES", {"t5": OTHER_FAMILIES["t5"]} | {
        "modernbert": OTHER_FAMILIES["modernbert"]})  # fmt: skip
    with pytest.raises(UserError, match="modernbert comes nearest"):
        run(monkeypatch, export_hf, tmp_path / "new", "--checkpoint", path)
    assert {one.name for one in tmp_path.iterdir()} == {"hf", "out"}
