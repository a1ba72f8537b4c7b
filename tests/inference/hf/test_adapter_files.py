"""Adapters that were made here, under peft on Hugging Face's models, and adapters that peft made, here."""

import json
import shutil
import sys
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from inference.generation.load import load_adapter, load_full
from inference.hf.adapter_files import SETTINGS, WEIGHTS, export_adapter, import_adapter
from inference.hf.adapter_names import peft_name
from modules.adapters.lora_model import find_targets
from tests.inference.adapters import MOE, write_adapter, write_base
from tests.inference.tools import byte_tokenizer, run_config, write_checkpoint
from tests.model import test_families, test_moe_model, test_tinyseek
from tests.modules.adapters.test_lora import shake_adapters
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

V = byte_tokenizer().vocab_size
EVERYTHING = ["attention", "dense", "shared", "experts"]


def models(name):
    """Our model and Hugging Face's with the same weights."""
    for module in (test_moe_model, test_families):
        if name in module.SHAPES:
            return module.twins(name, vocab_size=V)
    return test_tinyseek.twins(vocab_size=V, **test_tinyseek.SHAPES[name])


def base_of(ours, tmp_path):
    """Our model as a checkpoint, loaded."""
    write_checkpoint(tmp_path / "base.pkl", "SFT", weights=ours.state_dict(), config=run_config(ours))
    return load_full(tmp_path / "base.pkl")


def ids():
    return torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


DENSE = ["attention", "dense"]
GQA = ["k_proj", "o_proj", "q_proj", "v_proj"]
MLP = ["down_proj", "gate_proj", "up_proj"]
WEIGHTS_OF_MLP = [f"{name}.weight" for name in MLP]
LATENT = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.down_proj", "experts.gate_up_proj"]


def same(mine, theirs):
    """Within 1e-5 of the largest logit: fp32 rounds to 6e-8, and peft adds B (A x) to W x where we multiply
    by W + B A, in some twenty sums one after the other. A wrong name, layout or scale changes the logits by
    a tenth of them and more."""
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


EXPORTED = {  # model, settings of the adapter, and the targets in peft's file, sorted
    "tied": ("tied", {"r": 3}, GQA + MLP, []),
    "untied, rsLoRA": ("untied", {"r": 5, "use_rslora": True, "lora_alpha": 2.5, "lora_dropout": 0.1},
                       GQA + MLP, []),
    "untied, DoRA": ("untied", {"use_dora": True, "target_modules": ["dense", "v_proj"]}, [*MLP, "v_proj"],
                     []),
    "biases, rsDoRA": ("Llama, all biases", {"r": 2, "use_dora": True, "use_rslora": True}, GQA + MLP, []),
    "all of a mixture": ("Dots1, first layer dense",
                         {"r": 3, "use_rslora": True, "target_modules": EVERYTHING}, GQA,
                         [*EXPERTS, *WEIGHTS_OF_MLP, *[f"shared_experts.{one}" for one in WEIGHTS_OF_MLP]]),
    "the dense layer alone": ("Dots1, first layer dense", {"target_modules": ["dense"], "lora_dropout": 0.1},
                              [], WEIGHTS_OF_MLP),
    "DoRA beside experts": ("Dots1", {"use_dora": True, "target_modules": ["attention"]}, GQA, []),
    "one shared expert": ("Qwen2Moe", {"target_modules": [*EVERYTHING, "shared_expert_gate"]},
                          [*GQA, "shared_expert_gate"],
                          [*EXPERTS, *[f"shared_expert.{one}" for one in WEIGHTS_OF_MLP]]),
    "experts alone": ("Qwen3Moe", {"r": 2, "target_modules": ["experts"]}, [], EXPERTS),
    "latent, DoRA": ("DeepseekV3, queries compressed", {"use_dora": True, "target_modules": ["attention"]},
                     [*LATENT, "q_a_proj", "q_b_proj"], []),
    "latent, dense": ("DeepseekV3, dense", {"r": 3}, [*LATENT, "q_proj"], WEIGHTS_OF_MLP),
}  # fmt: skip


@pytest.mark.filterwarnings("error:.*(missing|matched|target)", "ignore::FutureWarning")
@pytest.mark.parametrize("case", EXPORTED)
def test_peft_gives_our_logits_and_the_way_back_is_the_identity(case, tmp_path):
    name, settings, modules, parameters = EXPORTED[case]
    torch.manual_seed(0)
    ours, theirs = models(name)
    base = base_of(ours, tmp_path)
    path = write_adapter(tmp_path / "adapter.pkl", base.path, lora=settings)
    adapter = load_adapter(path, base)
    folder = export_adapter(path, base, tmp_path / "folder", "a/base")
    written = json.loads((folder / SETTINGS).read_text())
    assert written["target_modules"] == sorted(modules)
    assert (written["target_parameters"] or []) == sorted(f"mlp.{one}" for one in parameters)
    under_peft = peft.PeftModel.from_pretrained(theirs, folder)
    same(logits(adapter.model), logits(under_peft))
    assert (logits(adapter.model) - logits(ours)).abs().max() > 0.5
    back = load_adapter(import_adapter(folder, base, tmp_path / "back"), base)
    assert back.own.keys() == adapter.own.keys() and back.digest == adapter.digest  # of every bit
    before, after = adapter.config.lora, back.config.lora
    assert find_targets(ours, before.target_modules) == find_targets(ours, after.target_modules)
    dropout = 0.0 if parameters else before.lora_dropout  # which peft does not have for parameters
    assert replace(after, target_modules=[]) == replace(before, target_modules=[], lora_dropout=dropout)


PEFTS = {  # model, and peft's settings
    "all linear layers": ("untied", {"target_modules": "all-linear", "r": 3}),
    "rsLoRA on one layer": ("tied", {"target_modules": ["q_proj", "mlp.up_proj"], "use_rslora": True,
                                     "layers_to_transform": 1, "lora_dropout": 0.1}),
    "DoRA on one layer": ("Llama, all biases", {"target_modules": [*GQA, "up_proj"], "use_dora": True,
                                                "layers_to_transform": [0], "layers_pattern": "layers"}),
    "DoRA by path": ("tied", {"target_modules": ["model.layers.0.mlp.down_proj", "layers.1.self_attn.o_proj"],
                              "use_dora": True, "init_lora_weights": "gaussian"}),
    "a mixture": ("Dots1, first layer dense",
                  {"target_modules": GQA, "target_parameters": ["shared_experts.up_proj.weight"] +
                   [f"mlp.{one}" for one in EXPERTS]}),
    "one shared expert": ("Qwen2Moe", {"target_modules": ["shared_expert_gate", "v_proj"],
                                       "target_parameters": ["shared_expert.down_proj.weight"]}),
    "one stack": ("Qwen3Moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "the other stack": ("Qwen3Moe", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "latent": ("DeepseekV3, queries compressed", {"target_modules": ["q_b_proj", "kv_b_proj"],
                                                  "use_dora": True}),
}  # fmt: skip


def made_by_peft(folder, theirs, **settings):
    """A folder that peft wrote, with random factors and magnitudes; returns the logits of its model."""
    model = peft.get_peft_model(theirs, peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | settings))
    shake_adapters(model)
    model.save_pretrained(folder)
    return logits(model.eval())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Could not find a config")
@pytest.mark.parametrize("case", PEFTS)
def test_what_peft_made_gives_its_logits_here(case, tmp_path):
    name, settings = PEFTS[case]
    ours, theirs = models(name)
    expected = made_by_peft(tmp_path / "folder", theirs, **settings)
    base = base_of(ours, tmp_path)
    adapter = load_adapter(import_adapter(tmp_path / "folder", base, tmp_path), base)
    same(logits(adapter.model), expected)
    assert (logits(ours) - expected).abs().max() > 0.5
    assert adapter.about["base"] == {"digest": base.digest, "path": str(base.path)}


def test_a_second_head_stays_here(tmp_path):
    """transformers has none: its part of the adapter is not written, and comes back without effect."""
    changes = {"mtp": "sequential", "num_hidden_layers": 1}
    base = load_full(write_base(tmp_path / "base.pkl", **changes))
    path = write_adapter(tmp_path / "a.pkl", base.path, lora={"use_dora": True, "target_modules": DENSE})
    folder = export_adapter(path, base, tmp_path / "folder")
    assert not any("mtp" in name for name in load_file(folder / WEIGHTS))
    before = load_adapter(path, base)
    after = load_adapter(import_adapter(folder, base, tmp_path), base)
    assert after.config.lora == before.config.lora
    changed = {name for name in before.own if not torch.equal(before.own[name], after.own[name])}
    assert changed and changed == {name for name in before.own if name.startswith("mtp.")}
    assert torch.equal(logits(before.model), logits(after.model))
    for name, part in base.model.mtp.named_parameters():  # rounded twice: m, then m V / |V|
        torch.testing.assert_close(after.model.mtp.get_parameter(name), part, rtol=1e-6, atol=0)
    alone = write_adapter(tmp_path / "b.pkl", base.path, lora={"target_modules": ["eh_proj"]})
    with pytest.raises(UserError, match="second prediction head alone"):
        export_adapter(alone, base, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_in_16_bits_become_fp32_bit_for_bit(dtype, tmp_path):
    base = load_full(write_base(tmp_path / "base.pkl"))
    folder = export_adapter(write_adapter(tmp_path / "a.pkl", base.path), base, tmp_path / "folder")
    tensors = {name: part.to(dtype) for name, part in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    found = load_checkpoint(import_adapter(folder, base, tmp_path))["weights"]
    assert {part.dtype for part in found.values()} == {torch.float32} and len(found) == len(tensors)
    for name, part in found.items():
        assert torch.equal(part, tensors[peft_name(name, base.model)].float())


def test_the_card_has_the_numbers(tmp_path, monkeypatch):
    base = load_full(write_base(tmp_path / "base.pkl"))
    path = write_adapter(tmp_path / "a.pkl", base.path, lora={"r": 3, "use_rslora": True, "use_dora": True})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export_adapter(path, base, ".", "a/base")
    text = (tmp_path / "empty" / "README.md").read_text()
    own = sum(part.numel() for part in load_checkpoint(path)["weights"].values())
    beside = sum(part.numel() for part in base.model.parameters())
    words = (f"{own:,} parameters, beside {beside:,}", "rsDoRA of rank 3 with lora_alpha 16", "lora_train",
             " 7 steps", base.digest, 'base_model: "a/base"', "base.pkl")  # fmt: skip
    assert all(word in text for word in words), text
    assert str(tmp_path) not in text


# ------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A base, an adapter of it, and its peft folder."""
    tmp_path = tmp_path_factory.mktemp("good")
    base = load_full(write_base(tmp_path / "base.pkl"))
    adapter = write_adapter(tmp_path / "a.pkl", base.path)
    return base, adapter, export_adapter(adapter, base, tmp_path / "folder")


@pytest.mark.parametrize("words, changes", [
    ("peft_type=IA3", {"peft_type": "IA3"}),
    ("peft_type=None", {"peft_type": None}),
    ("task_type=SEQ_CLS", {"task_type": "SEQ_CLS"}),
    ("bias=all, modules_to_save=.*'embed_tokens'", {"bias": "all", "modules_to_save": ["embed_tokens"]}),
    ("init_lora_weights=pissa_niter_4", {"init_lora_weights": "pissa_niter_4"}),
    ("rank_pattern={'q_proj': 4}", {"rank_pattern": {"q_proj": 4}}),
    ("a_new_one=True", {"a_new_one": True}),
    ("target_modules must be a list of str.*patterns", {"target_modules": "(a+)+$"}),
    ("target_modules must be a list of str", {"target_modules": [1]}),
    ("layers_to_transform must be a list of int", {"layers_to_transform": [True]}),
    ("name no layer", {"target_modules": ["query", "lm_head"]}),
    ("name no layer", {"layers_to_transform": [7]}),
    ("14 missing .*lora_magnitude_vector", {"use_dora": True}),
    ("14 unknown .*layers.0", {"layers_to_transform": [1]}),
    ("unknown .*down_proj", {"target_modules": GQA}),
    ("28 of another shape", {"r": 4}),
    ("lora.r must be int, not '3'", {"r": "3"}),
    ("lora.r=0 must be", {"r": 0}),
    ("more than any adapted matrix", {"r": 2**62}),
    ("lora.use_dora must be bool", {"use_dora": 1}),
    ("too large", {"lora_alpha": 10**400}),
])  # fmt: skip
def test_settings_that_cannot_be_kept_are_one_clear_line(words, changes, good, tmp_path):
    refused(good, tmp_path, words, lambda folder: edit(folder, **changes))


def edit(folder, **changes):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | changes))


def refused(good, tmp_path, words, spoil):
    """The import of a spoiled copy of the good folder: one line, and nothing is written."""
    base, _, source = good
    folder = shutil.copytree(source, tmp_path / "folder")
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        import_adapter(folder, base, tmp_path / "out")
    assert str(folder) in str(error.value) and len(str(error.value)) < 700
    assert not (tmp_path / "out").exists()


def change_tensors(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors, next(iter(tensors)))
        save_file(tensors, folder / WEIGHTS)

    return spoil


def cut(folder, kept):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])


FILES = {
    "one missing": ("1 missing", change_tensors(lambda tensors, name: tensors.pop(name))),
    "one too many": ("1 unknown .*lm_head", change_tensors(
        lambda tensors, name: tensors.update({"base_model.model.lm_head.weight": torch.zeros(2)}))),
    "another layer": ("1 missing .* 1 unknown .*layers.7", change_tensors(
        lambda tensors, name: tensors.update({name.replace("layers.0", "layers.7"): tensors.pop(name)}))),
    "turned": ("1 of another shape", change_tensors(
        lambda tensors, name: tensors.update({name: tensors[name].T.contiguous()}))),
    "integers": ("1 of another shape or type .*I32", change_tensors(
        lambda tensors, name: tensors.update({name: tensors[name].int()}))),
    "cut in its header": ("damaged", lambda folder: cut(folder, 100)),
    "cut in its data": ("damaged", lambda folder: cut(folder, -1)),
    "empty": ("damaged", lambda folder: cut(folder, 0)),
    "no file": ("no such file", lambda folder: (folder / WEIGHTS).unlink()),
    "a pickle": ("adapter_model.bin is a pickle", lambda folder: (folder / WEIGHTS).rename(
        folder / "adapter_model.bin")),
    "no settings": ("cannot be read", lambda folder: (folder / SETTINGS).unlink()),
    "no JSON": ("cannot be read as JSON", lambda folder: (folder / SETTINGS).write_text("{")),
    "an empty object": ("peft_type=None", lambda folder: (folder / SETTINGS).write_text("{}")),
    "deep JSON": ("cannot be read as JSON", lambda folder: (folder / SETTINGS).write_text("[" * 99_999)),
    "large JSON": ("more than 1 MB", lambda folder: (folder / SETTINGS).write_text(" " * 1_000_001)),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_spoiled_files_are_one_clear_line(case, good, tmp_path):
    refused(good, tmp_path, *FILES[case])


def test_what_is_there_is_not_replaced(good, tmp_path):
    base, adapter, folder = good
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name} exists already"):
            export_adapter(adapter, base, tmp_path / name)
    (tmp_path / "TinySeek_Lora_final.pkl").write_text("mine")
    with pytest.raises(UserError, match="TinySeek_Lora_final.pkl exists"):
        import_adapter(folder, base, tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"full", "file", "TinySeek_Lora_final.pkl"}
    assert [one.read_text() for one in tmp_path.rglob("*") if one.is_file()] == ["mine"] * 3


def test_a_full_disk_leaves_nothing_behind(good, tmp_path, monkeypatch):
    base, adapter, _ = good

    def full(path, *args, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)  # after the tensors
    with pytest.raises(UserError, match="could not write .*new: No space left"):
        export_adapter(adapter, base, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_without_the_package_a_line_says_what_to_install(good, tmp_path, monkeypatch):
    base, adapter, folder = good
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: export_adapter(adapter, base, tmp_path / "new"),
                 lambda: import_adapter(folder, base, tmp_path)):  # fmt: skip
        with pytest.raises(UserError, match="pip install safetensors"):
            call()


def test_a_base_that_the_adapter_cannot_use(good, tmp_path):
    """DoRA has no direction for a row of zeros; peft has no DoRA for experts."""
    base, adapter, _ = good
    dora = write_adapter(tmp_path / "dora.pkl", base.path, lora={"r": 3, "use_dora": True})
    folder = export_adapter(dora, base, tmp_path / "dora")
    with torch.no_grad():
        weights = {name: part.clone() for name, part in base.own.items()}
        weights["model.layers.1.mlp.up_proj.weight"][3] = 0
    zeros = load_full(write_checkpoint(tmp_path / "zeros.pkl", weights=weights, config=base.about["config"]))
    with pytest.raises(UserError, match="up_proj has a row of zeros"):
        import_adapter(folder, zeros, tmp_path)
    mixture = load_full(write_base(tmp_path / "mixture.pkl", **MOE))
    path = write_adapter(tmp_path / "m.pkl", mixture.path, lora={"target_modules": ["experts"]})
    refused((mixture, path, export_adapter(path, mixture, tmp_path / "experts")), tmp_path,
            "use_dora with target_parameters", lambda folder: edit(folder, use_dora=True))  # fmt: skip
    assert not (tmp_path / "TinySeek_Lora_final.pkl").exists()


def test_adapters_that_peft_cannot_hold(good, tmp_path):
    base, adapter, _ = good
    part = dict([*load_checkpoint(adapter)["weights"].items()][1:])
    other = load_full(write_base(tmp_path / "other.pkl", seed=1))
    mixture = load_full(write_base(tmp_path / "mixture.pkl", **MOE))
    dora = {"use_dora": True, "target_modules": ["shared", "experts"]}
    for path, on, words in (
        (adapter, other, "trained on other weights"),
        (base.path, base, "not an adapter"),
        (write_adapter(tmp_path / "part.pkl", base.path, weights=part), base, "1 missing"),
        (write_adapter(tmp_path / "prefix.pkl", base.path, like="prefix"), base, "prefix_train.*LoRA only"),
        (write_adapter(tmp_path / "mix.pkl", base.path, like="mixlora"), base, "mixlora_train.*LoRA only"),
        (write_adapter(tmp_path / "dora.pkl", mixture.path, lora=dora), mixture,
         "no DoRA for mlp.experts.down_proj, .* export the adapter merged"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            export_adapter(path, on, tmp_path / "new")
        assert not (tmp_path / "new").exists()
