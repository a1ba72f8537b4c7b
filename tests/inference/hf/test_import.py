"""Imported models against transformers with the same weights, and folders that must be refused."""

import json
import os
import pickle
import re
import signal
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from config.model import ModelConfig
from inference import import_hf
from inference.generation.generator import Generator
from inference.generation.load import load_full
from inference.generation.sampling import SamplingParams
from inference.hf.families import FAMILIES, REQUIRED
from inference.hf.settings import behaviour, read_settings, write_settings
from tests.inference.hf.models import CASES, LLAMA3, SMALL, make_model, save, write_tokenizer
from tests.modules.tools import small_config
from utils.errors import UserError, run_main

BOUND = 1e-5  # of logits of up to 4 in fp32: some 30 roundings of 2^-24 of them
TIE = 1e-4  # two logits so close may change places, by rounding


def run(monkeypatch, *args):
    """Run the command in this process."""
    monkeypatch.setattr(sys, "argv", ["import_hf.py", *map(str, args)])
    import_hf.main()


def imported(monkeypatch, folder, out, *args):
    """Import a folder and open the result."""
    run(monkeypatch, folder, "--out", out, *args)
    (path,) = out.glob("*.pkl")
    return load_full(path)


@torch.inference_mode()
def check_same(ours, theirs, tokens=40):
    """Compare the logits of two models for random rows."""
    ids = torch.randint(0, theirs.config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(1))
    logits = theirs(ids).logits
    assert logits.std() > 0.1, "the comparison needs logits that differ"
    gap = (ours(ids).logits - logits).abs().max().item()
    assert gap < BOUND, f"logits differ by {gap:.1e}"


@torch.inference_mode()
def check_same_continuation(ours, theirs, count=64):
    """Compare greedy continuations with a cache, of a prompt alone and on both paths of our generator."""
    prompt = [5, 17, 200, 31, 8]
    for fast in (True, False):
        (answer,) = Generator(ours, fast=fast).generate([prompt], SamplingParams(0.0, max_new_tokens=count))
        row, logits = torch.tensor([prompt + answer]), None
        logits = theirs(row).logits[0, len(prompt) - 1 : -1]  # (count, V), for each token that we wrote
        best = logits.max(dim=-1).values
        chosen = logits[torch.arange(count), torch.tensor(answer)]
        assert len(set(answer)) > 3, "the comparison needs a text that is not one token"
        assert (best - chosen).max() < TIE
        assert ((best - chosen) == 0).float().mean() > 0.9


@pytest.mark.parametrize("case", CASES)
def test_imported_models_compute_the_same(case, tmp_path, monkeypatch):
    """Every family, by our command: logits, and 64 greedy tokens with the cache."""
    theirs = save(case, tmp_path / "hf")
    ours = imported(monkeypatch, tmp_path / "hf", tmp_path / "out").model
    check_same(ours, theirs)
    check_same_continuation(ours, theirs)


def test_every_family_has_three_configurations():
    """One of the three must not fail to be noticed when a family is added."""
    for family in FAMILIES.values():
        name = family.architecture.removesuffix("ForCausalLM")
        assert sum(case.partition(",")[0] == name for case in CASES) >= 3


@pytest.mark.parametrize("case", CASES)
def test_settings_survive_there_and_back(case):
    """What is read from a family is written as a family that computes the same in transformers: its model,
    made from what we write, with the weights of the first one."""
    theirs = make_model(case)
    written = write_settings(read_settings(theirs.config.to_dict(), case))
    again = AutoModelForCausalLM.from_config(AutoConfig.for_model(**written)).eval()
    again.load_state_dict(theirs.state_dict())
    check_same(again, theirs)


@pytest.mark.parametrize("case", ("Qwen3, tied, bias", "Qwen2Moe", "Mixtral", "DeepseekV3, groups"))
def test_files_in_other_forms(case, tmp_path, monkeypatch):
    """Many small files with an index; bf16, which is read exactly; experts stacked as in memory."""
    theirs = save(case, tmp_path / "many", max_shard_size="20KB")
    assert len([*(tmp_path / "many").glob("*.safetensors")]) > 3
    check_same(imported(monkeypatch, tmp_path / "many", tmp_path / "a").model, theirs)
    make_model(case).bfloat16().save_pretrained(tmp_path / "half")
    write_tokenizer(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    check_same(imported(monkeypatch, tmp_path / "half", tmp_path / "b").model, again)
    if case in ("Qwen2Moe", "Mixtral", "DeepseekV3, groups"):
        if case == "Qwen2Moe":  # more experts than tensors
            theirs = make_model(case, num_experts=64)
        theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
        names = load_file(tmp_path / "stacked" / "model.safetensors").keys()
        assert any(name.endswith("mlp.experts.gate_up_proj") for name in names)
        write_tokenizer(tmp_path / "stacked")
        check_same(imported(monkeypatch, tmp_path / "stacked", tmp_path / "c").model, theirs)


def test_old_spellings():
    """config.json as transformers 4 wrote it."""
    old = {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 5e5, **SMALL,
           "rope_scaling": {key: value for key, value in LLAMA3.items() if key != "rope_theta"}}  # fmt: skip
    new = {"model_type": "llama", "dtype": "bfloat16", **SMALL, "rope_parameters": LLAMA3}
    assert read_settings(old, "old") == read_settings(new, "new")
    assert read_settings(old, "old").rope_theta == 5e5
    scaling = old["rope_scaling"]
    older = old | {"rope_scaling": {**scaling, "type": scaling["rope_type"], "rope_type": None}}
    assert read_settings(older, "older").rope_scaling["type"] == "llama3"
    moe = {"model_type": "qwen3_moe", **SMALL, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
    assert read_settings(moe | {"num_experts": 4}, "") == read_settings(moe | {"num_local_experts": 4}, "")


@pytest.mark.parametrize("name", FAMILIES)
def test_absent_settings_are_those_of_transformers(name):
    """A config.json that has only what it must have, and one with windows switched on besides."""
    family = FAMILIES[name]
    needed = {
        family.renamed.get(one, (one,))[0] for one, default in family.settings.items() if default is REQUIRED
    }
    values = SMALL | {
        "num_hidden_layers": 70, "hidden_size": 96, "n_routed_experts": 16, "num_local_experts": 4,
        "num_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "shared_expert_intermediate_size": 8,
    }  # fmt: skip
    least = {one: values[one] for one in needed}
    for more in ({}, {"use_sliding_window": True}, {"sliding_window": None}):
        if family.window_switch and family.max_window_layers is None and name != "qwen3_moe":
            more = {key: value for key, value in more.items() if key != "use_sliding_window"}
        full = AutoConfig.for_model(name, **least | more).to_dict()
        given = {"model_type": name} | least | more
        assert behaviour(read_settings(given, "")) == behaviour(read_settings(full, "")), more


@pytest.mark.parametrize("changes", [{"mlp_bias": True}, {"scoring_func": "sigmoid"}, {"moe_layer_freq": 2}])
def test_settings_of_a_family_that_nothing_here_computes_are_refused(changes):
    """DeepSeek-V2's biases would be in shared experts too."""
    settings = make_model("DeepseekV2, greedy").config.to_dict()
    read_settings(settings, "")
    with pytest.raises(UserError, match=next(iter(changes))):
        read_settings(settings | changes, "")


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"sliding_window": 8, "attention_sinks": 2}, "attention_sinks"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 9}},
         "dynamic"),
        ({"n_routed_experts": 16, "scoring_func": "softmax"}, "scoring_func"),
        ({"qk_norm": False, "mlp_bias": True, "attention_bias": True, "attention_out_bias": False}, "o_proj"),
    ],
)
def test_models_without_a_twin_are_not_written(settings, word):
    """A setting that no family has is named."""
    with pytest.raises(UserError, match=word):
        write_settings(small_config(**settings))


def test_a_base_that_was_enlarged_is_written_as_one():
    """The NTK rule has no name there; it is a larger rope_theta."""
    model = small_config(rope_scaling={"rope_type": "ntk", "factor": 4.0}, head_dim=8)
    written = write_settings(model)
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == pytest.approx(10000 * 4 ** (8 / 6))


def test_a_ramp_that_is_not_rounded_stays_so():
    """`truncate` is false, which is a value of its own and not one that is missing."""
    rule = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False}
    assert write_settings(small_config(rope_scaling=rule, head_dim=8))["rope_scaling"]["truncate"] is False


def test_a_family_is_not_chosen_for_a_width_that_it_refuses():
    """transformers loads no Llama, and no DeepSeek-V2, of 4 heads and width 30."""
    settings = make_model("Mistral, no window, head_dim", hidden_size=30).config.to_dict()
    model = read_settings(settings, "config.json")
    assert AutoConfig.for_model(**write_settings(model)).model_type == "mistral"


@pytest.mark.parametrize("step", (0, "2"))
def test_steps_between_layers_with_experts_are_checked(step):
    """The number is a divisor."""
    settings = make_model("Qwen3Moe, one expert").config.to_dict() | {"decoder_sparse_step": step}
    with pytest.raises(UserError, match="decoder_sparse_step"):
        read_settings(settings, "config.json")


def edit_json(path, **changes):
    """Change entries of a JSON file; None removes one."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def rewrite(folder, change):
    """Change the tensors of a folder with `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) * 2 // 3])


def replace_by_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def leave(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / "model.safetensors").rename(target)
    weights = {"model.norm.weight": "../elsewhere.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def store_twice(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({GATE: weights[GATE]}, folder / "more.safetensors")
    places = dict.fromkeys(weights, "model.safetensors") | {"more": "more.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


GATE = "model.layers.0.mlp.gate_proj.weight"
BAD = {
    "cut": (cut, "damaged or cut short"),
    "table is nonsense": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99),
        "damaged or cut short",
    ),
    "another shape": (lambda f: rewrite(f, lambda w: w.update({GATE: torch.zeros(3, 4)})), r"\(3, 4\) where"),
    "missing": (lambda f: rewrite(f, lambda w: w.pop(GATE)), f"missing: {GATE}"),
    "left over": (
        lambda f: rewrite(f, lambda w: w.update({"odd.bias": torch.ones(2)})),
        "left over: odd.bias",
    ),
    "left over, with an odd name": (
        lambda f: rewrite(f, lambda w: w.update({"\x1b[31m" + "a" * 5000: torch.ones(2)})),
        r"left over: '\\x1b\[31ma{80,100}$",  # no code for the terminal, and not the whole of it
    ),
    "quantized": (lambda f: rewrite(f, lambda w: w.update({GATE: w[GATE].to(torch.int8)})), "I8"),
    "unknown family": (lambda f: edit_json(f / "config.json", model_type="gpt2"), "model_type 'gpt2'.*qwen3"),
    "no family": (lambda f: edit_json(f / "config.json", model_type=None), "model_type None"),
    "an activation": (lambda f: edit_json(f / "config.json", hidden_act="gelu"), "hidden_act='gelu'"),
    "a setting missing": (lambda f: edit_json(f / "config.json", vocab_size=None), "vocab_size is missing"),
    "a wrong type": (lambda f: edit_json(f / "config.json", hidden_size="big"), "hidden_size must be int"),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=3, layer_types=None),
        "missing: ",
    ),
    "fewer layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=1, layer_types=None),
        "left over",
    ),
    "endless layers": (lambda f: edit_json(f / "config.json", num_hidden_layers=10**9), "num_hidden_layers"),
    "many layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=99999, layer_types=None),
        "layers,",
    ),
    "a huge vocabulary": (
        lambda f: edit_json(f / "config.json", vocab_size=10**12),
        "where config.json says",
    ),
    "another rule": (lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "odd"}), "'odd'"),
    "a rule that is a text": (
        lambda f: edit_json(f / "config.json", rope_parameters="yarn"),
        "rope_parameters must be dict",
    ),
    "types that are a number": (
        lambda f: edit_json(f / "config.json", layer_types=3),
        "layer_types must be list",
    ),
    "a huge head": (lambda f: edit_json(f / "config.json", head_dim=10**12), "channels that rotate"),
    "a size of 100 bits": (
        lambda f: edit_json(f / "config.json", intermediate_size=10**30),
        "tensors of impossible sizes",
    ),
    "a pipe": (
        lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
        "config.json: no such file",
    ),
    "weights that are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors: no such file",
    ),
    "quantization": (lambda f: edit_json(f / "config.json", quantization_config={}), "quantized"),
    "a pickle": (replace_by_pickle, "pytorch_model.bin, a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "JSON object"),
    "config is cut": (lambda f: (f / "config.json").write_text('{"a": '), "cannot be read as JSON"),
    "a weight twice": (store_twice, "gate_proj.weight is in model.safetensors too"),
    "leads out of the folder": (leave, "not a .safetensors file of this folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused(name, tmp_path, monkeypatch, capsys):
    """One line that says what is wrong, exit code 2, and nothing left behind."""
    folder, (spoil, words) = tmp_path / "hf", BAD[name]
    save("Qwen3, head_dim", folder)
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(monkeypatch, folder, "--out", tmp_path / "out"))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(words, error), error
    assert not (tmp_path / "out").exists()


def test_a_tied_head_must_be_the_embedding(tmp_path, monkeypatch):
    """A file may hold both; two different ones contradict config.json."""
    theirs = save("Qwen2, tied", tmp_path / "hf")
    table = theirs.model.embed_tokens.weight.detach()
    rewrite(tmp_path / "hf", lambda weights: weights.update({"lm_head.weight": table.clone()}))
    check_same(imported(monkeypatch, tmp_path / "hf", tmp_path / "out").model, theirs)
    rewrite(tmp_path / "hf", lambda weights: weights["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "again")


def test_tables_and_extra_prediction_layers_are_ignored(tmp_path, monkeypatch):
    """As transformers does: angles in old files, and DeepSeek's layers after the last."""
    theirs = save("DeepseekV3, groups", tmp_path / "hf")
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq":
             torch.ones(3)}  # fmt: skip
    rewrite(tmp_path / "hf", lambda weights: weights.update(extra))
    check_same(imported(monkeypatch, tmp_path / "hf", tmp_path / "out").model, theirs)


@pytest.mark.parametrize("ends", [299, [299, 7]])
def test_the_end_of_a_text_may_be_named_by_the_model(ends, tmp_path, monkeypatch):
    """config.json stands in for a missing generation_config.json, as in transformers."""
    save("Qwen3, head_dim", tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").unlink()
    edit_json(tmp_path / "hf" / "tokenizer_config.json", eos_token=None)
    edit_json(tmp_path / "hf" / "config.json", eos_token_id=ends)
    loaded = imported(monkeypatch, tmp_path / "hf", tmp_path / "out")
    assert loaded.tokenizer.eos_ids == [299, 7][: 1 + isinstance(ends, list)]


def test_a_stopped_import_leaves_no_file(tmp_path, monkeypatch):
    """SIGTERM comes while the checkpoint is being written."""
    save("Qwen3, head_dim", tmp_path / "hf")
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(torch, "save", lambda data, file: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit):
            run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not [*(tmp_path / "out").iterdir()]


def test_out_is_a_folder(tmp_path, monkeypatch):
    """It is checked before the weights are read."""
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="is a file: name a folder"):
        run(monkeypatch, tmp_path, "--out", tmp_path / "out")


def test_an_import_is_not_replaced_unasked(tmp_path, monkeypatch):
    """--overwrite replaces an earlier one."""
    save("Qwen3, head_dim", tmp_path / "hf")
    imported(monkeypatch, tmp_path / "hf", tmp_path / "out")
    with pytest.raises(UserError, match="--overwrite"):
        run(monkeypatch, tmp_path / "hf", "--out", tmp_path / "out")
    assert isinstance(
        imported(monkeypatch, tmp_path / "hf", tmp_path / "out", "--overwrite").model.config, ModelConfig
    )
