"""Exported models in transformers, loaded with no code of ours, and read back bit for bit."""

import json
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from inference import export_hf, import_hf
from inference.generation.generator import Generator
from inference.generation.load import load_full
from inference.generation.sampling import SamplingParams
from tests.inference.adapters import write_adapter
from tests.inference.hf.models import randomized, save, write_tokenizer
from tests.inference.hf.test_import import check_same, check_same_continuation
from tests.inference.quantization.tools import FORMATS, write_quantized, write_source
from tests.inference.tools import byte_tokenizer, run_config, tiny_model, write_checkpoint
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError, run_main

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2, "moe_intermediate_size": 20}
MLA = {"attention_kind": "mla", "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
       "v_head_dim": 7}  # fmt: skip
MODELS = {
    "Qwen3ForCausalLM": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "Dots1ForCausalLM": MOE | {"first_k_dense_replace": 1, "num_hidden_layers": 3, "mtp": "sequential"},
    "DeepseekV3ForCausalLM": MOE | MLA | {"q_lora_rank": 9, "tie_word_embeddings": False},
    "DeepseekV3ForCausalLM, dense": MLA,
    "Qwen3ForCausalLM, other pairing": {"rope_interleaved": True, "sliding_window": 7,
                                        "sliding_window_pattern": 2, "attention_bias": True},
    "LlamaForCausalLM": {"qk_norm": False, "rope_scaling": {"rope_type": "ntk", "factor": 3.0}},
    "Qwen3MoeForCausalLM": MOE | {"scoring_func": "softmax", "n_shared_experts": 0, "mlp_only_layers": [1],
                                  "num_hidden_layers": 3},
}  # fmt: skip


def checkpoint(path, short="SFT", **settings):
    """Save a random model as training would leave it."""
    model = randomized(tiny_model(**settings), seed=5)
    for name, bias in model.named_buffers():
        if name.endswith("correction_bias") and model.config.scoring_func == "softmax":
            bias.zero_()
    evaluation = {"val_loss": 1.25}
    changes = {"weights": model.state_dict(), "config": run_config(model), "evaluation": evaluation}
    return write_checkpoint(path / f"TinySeek_{short}_final.pkl", short, **changes)


def run(monkeypatch, module, *args):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
    module.main()


@torch.no_grad()
@pytest.mark.parametrize("name", ["gptq4", "head"])
def test_codes_are_written_as_the_numbers_they_stand_for(name, tmp_path, monkeypatch, capsys):
    """transformers knows nothing of codes. Plain and tied heads."""
    small = write_quantized(tmp_path / "small.pkl", write_source(tmp_path), FORMATS[name])
    run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", small)
    assert "the numbers that the codes stand for" in capsys.readouterr().err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    ids = torch.arange(20)[None]
    true = load_full(small).model(ids).logits
    assert (theirs(ids).logits - true).norm() < 1e-5 * true.norm()


@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(name, tmp_path, monkeypatch):
    """Logits, greedy text with the cache, the text and ids of a dialogue; and back without a changed bit."""
    path, folder = checkpoint(tmp_path, **MODELS[name]), tmp_path / "hf"
    run(monkeypatch, export_hf, folder, "--checkpoint", path)
    theirs, loaded = AutoModelForCausalLM.from_pretrained(folder).eval(), load_full(path)
    assert type(theirs).__name__ == name.partition(",")[0]
    assert theirs.generation_config.eos_token_id == sorted(loaded.template.stop_ids)
    check_same(loaded.model, theirs)
    check_same_continuation(loaded.model, theirs, count=50)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "短い"}, {"role": "user", "content": "1 + 1?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == loaded.template.prompt(messages)
    chosen = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
    (answer,) = Generator(loaded.model).generate([ids], SamplingParams(0.0, max_new_tokens=8),
                                                 loaded.template.stop_ids)  # fmt: skip
    assert chosen == list(answer)
    run(monkeypatch, import_hf, folder, "--out", tmp_path / "back")
    back = load_full(tmp_path / "back" / path.name)
    assert back.template.prompt(messages) == ids
    if "other pairing" not in name:  # which is not stored there
        for key, weight in loaded.model.state_dict().items():
            assert key.startswith("mtp.") or torch.equal(weight, back.model.state_dict()[key]), key


@pytest.mark.parametrize("case", ("Qwen2Moe", "Mixtral, tied, all experts", "DeepseekV2, yarn, bias"))
def test_an_imported_model_is_written_as_it_was(case, tmp_path, monkeypatch):
    """The same names, shapes, dtypes and bits in the files; the tokenizer's files word for word."""
    from safetensors.torch import load_file

    save(case, tmp_path / "hf")
    write_tokenizer(tmp_path / "hf", size=320)  # no id is free for special tokens of ours
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "out")
    run(monkeypatch, export_hf, tmp_path / "again", "--out", tmp_path / "out")
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("hf", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    old, new = ((tmp_path / one / "tokenizer.json").read_text(encoding="utf-8") for one in ("hf", "again"))
    assert old == new
    old, new = (json.loads((tmp_path / one / "config.json").read_text()) for one in ("hf", "again"))
    assert old["architectures"] == new["architectures"]


def test_bf16_and_several_files(tmp_path, monkeypatch):
    """Matrices are rounded once, router biases not at all; the index names each tensor."""
    path = checkpoint(tmp_path, **MODELS["Dots1ForCausalLM"])
    monkeypatch.setattr(export_hf, "SHARD", 20_000)
    run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path, "--dtype", "bf16")
    assert len([*(tmp_path / "hf").glob("model-*.safetensors")]) > 3
    theirs, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32), load_full(path)
    weights = ours.model.state_dict()
    for name, weight in theirs.state_dict().items():
        kept = weight if name.endswith("correction_bias") else weights[name].bfloat16().float()
        assert torch.equal(weight, kept.to(weight.dtype)), name
    assert torch.equal(theirs.state_dict()[(bias := "model.layers.1.mlp.gate.e_score_correction_bias")],
                       weights[bias])  # fmt: skip


def test_a_pretrained_model_has_no_chat_template(tmp_path, monkeypatch):
    """It continues texts; its card says how they begin."""
    path = checkpoint(tmp_path, "Pre")
    run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path)
    tokenizer, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_full(path).tokenizer
    assert tokenizer.chat_template is None
    assert tokenizer("a b\nc")["input_ids"] == [ours.eos_id, *ours.encode("a b\nc")]
    card = (tmp_path / "hf" / "README.md").read_text(encoding="utf-8")
    weights = load_full(path).model.parameters()
    for fact in (
        f"{sum(weight.numel() for weight in weights):,}",
        "1,234",
        "| val_loss | 1.25 |",
        "endoftext",
    ):
        assert fact in card
    run(monkeypatch, import_hf, tmp_path / "hf", "--out", tmp_path / "back")
    back = load_full(tmp_path / "back" / "TinySeek_Pre_final.pkl")
    assert not back.answers and back.tokenizer.begin == [ours.eos_id]
    assert back.config.data.template == "tinyseek"  # for fine-tuning, as before
    ends = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert ends["eos_token_id"] == ends["bos_token_id"] == ours.eos_id


def test_fine_tuning_an_imported_base_moves_the_end_of_its_answers(tmp_path, monkeypatch):
    """The base's generation_config.json keeps the rest. Without the new end, transformers would not stop."""
    path, hf = checkpoint(tmp_path, "Pre"), tmp_path / "hf"
    run(monkeypatch, export_hf, hf, "--checkpoint", path)
    (hf / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 7}', encoding="utf-8")
    run(monkeypatch, import_hf, hf, "--out", tmp_path / "in")
    base = load_checkpoint(tmp_path / "in" / "TinySeek_Pre_final.pkl")
    save_checkpoint(tuned := tmp_path / "TinySeek_SFT_final.pkl", base | {"short": "SFT"})
    run(monkeypatch, export_hf, tmp_path / "out", "--checkpoint", tuned)
    config, stop = GenerationConfig.from_pretrained(tmp_path / "out"), load_full(tuned).template.stop_ids
    assert set(config.eos_token_id) == stop and len(stop) > 1 and config.top_k == 7


def test_adapters_alone_and_merged(tmp_path, monkeypatch):
    """--adapter writes a folder for peft; with --merge, the base and the adapter as one model."""
    from peft import PeftModel

    base = checkpoint(tmp_path)
    adapter = write_adapter(tmp_path / "TinySeek_Lora_final.pkl", base)
    for folder, *more in (("base", "--checkpoint", base), ("lora", "--adapter", adapter),
                          ("merged", "--adapter", adapter, "--merge")):  # fmt: skip
        run(monkeypatch, export_hf, tmp_path / folder, *more)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        alone = plain(ids).logits
        both = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(ids).logits
    assert (both - alone).abs().max() > 0.1
    assert (both - merged).abs().max() < 1e-5 * both.abs().max()  # folded weights are rounded


def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, capsys):
    """A model without a twin, and a folder in use: one line, exit code 2."""
    path = checkpoint(tmp_path, final_logit_softcapping=20.0)
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path))
    assert stop.value.code == 2
    assert "final_logit_softcapping" in capsys.readouterr().err
    with pytest.raises(UserError, match="--merge needs"):
        run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path, "--merge")
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    plain = write_checkpoint(tmp_path / "plain.pkl", "SFT")
    with pytest.raises(UserError, match="exists already"):
        run(monkeypatch, export_hf, tmp_path, "--checkpoint", plain)
    assert {one.name for one in tmp_path.iterdir()} == {path.name, "plain.pkl"}


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """The package safetensors has an exception of its own for it."""

    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    path = checkpoint(tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="could not write .*No space left"):
        run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_softmax_router_with_a_bias_has_no_twin(tmp_path, monkeypatch):
    """The bias of balancing without a loss exists there beside sigmoids only."""
    model = tiny_model(3, **MODELS["Qwen3MoeForCausalLM"])
    model.model.layers[0].mlp.gate.e_score_correction_bias[1] = 0.5
    path = write_checkpoint(tmp_path / "TinySeek_SFT_final.pkl", "SFT", weights=model.state_dict(),
                            config=run_config(model))  # fmt: skip
    with pytest.raises(UserError, match="beside a softmax"):
        run(monkeypatch, export_hf, tmp_path / "hf", "--checkpoint", path)
    assert not (tmp_path / "hf").exists() and byte_tokenizer()
