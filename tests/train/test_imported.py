"""An imported model is fine-tuned by the stages as they are, and written for transformers and peft again."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from inference import export_hf, import_hf
from inference.generation.load import load_adapter, load_full
from tests.inference.hf.models import make_model
from tests.inference.hf.test_import import check_same
from tests.load_data import hf_folders
from train import lora_train, sft_train

CHATML = (
    "{% for one in messages %}{{ '<|im_start|>' + one.role + '\n' + one.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STEPS = ("train.batch_size=4", "train.eval_batches=1", "data.sequence_length=48")
ASKED = [{"role": "user", "content": "the quick 3"}]


def run(monkeypatch, module, *args):
    """Run a command in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
    module.main()


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with the dialogues, and the checkpoint of an imported model with a template of its own."""
    folder = tmp_path_factory.mktemp("imported")
    make_model("Qwen2, tied", vocab_size=360).save_pretrained(folder / "hf")
    hf_folders.save(folder / "hf", "byte_level", "chatml", CHATML)
    pairs = [(f"the quick {n}", f"fox {n % 3}") for n in range(200)]
    roles = ("user", "assistant")
    dialogues = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, pair)]} for pair in pairs
    ]
    (folder / "dialogues.jsonl").write_text("\n".join(map(json.dumps, dialogues)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        run(patch, import_hf, folder / "hf", "--out", folder)
    return folder, folder / "TinySeek_SFT_final.pkl"


@pytest.mark.parametrize("stage, name", [(sft_train, "SFT"), (lora_train, "Lora")])
def test_a_stage_trains_an_imported_model(imported, stage, name, tmp_path, monkeypatch):
    """It learns, keeps the template, and what it wrote gives the same logits elsewhere."""
    folder, base = imported
    settings = [part for one in (*STEPS, f"data.cache_dir={tmp_path / 'cache'}") for part in ("--set", one)]
    data = ("--data", folder / "dialogues.jsonl", "--max-steps", "12", "--device", "cpu")
    run(monkeypatch, stage, "--init", base, "--out", tmp_path, *data, *settings)
    result = tmp_path / f"TinySeek_{name}_final.pkl"
    before = load_full(base)
    trained = load_full(result) if name == "SFT" else load_adapter(result, before)
    assert trained.template.kind == "own"
    prompt = trained.template.prompt(ASKED)
    with torch.no_grad():
        ids = torch.tensor([prompt + trained.tokenizer.encode("fox 0")])
        losses = [
            -one.model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            for one in (load_full(base), trained)
        ]
        told = ids[0, len(prompt) :, None]
        old, new = (loss.gather(1, told).mean() for loss in losses)
    assert new < old - 0.5
    if name == "SFT":
        run(monkeypatch, export_hf, tmp_path / "again", "--checkpoint", result)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        assert type(theirs).__name__ == "Qwen2ForCausalLM"
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
        assert tokenizer.apply_chat_template(ASKED, add_generation_prompt=True)["input_ids"] == prompt
    else:
        run(monkeypatch, export_hf, tmp_path / "again", "--adapter", result)
        theirs = AutoModelForCausalLM.from_pretrained(folder / "hf")
        theirs = PeftModel.from_pretrained(theirs, tmp_path / "again").eval()
    check_same(trained.model, theirs)


def test_an_adapter_of_peft_for_an_imported_model(imported, tmp_path, monkeypatch):
    """peft made it on the folder that was imported; with --base it gives the same logits here."""
    folder, base = imported
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf")
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True)
    theirs = get_peft_model(theirs, settings).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    theirs.save_pretrained(tmp_path / "lora")
    run(monkeypatch, import_hf, tmp_path / "lora", "--base", base, "--out", tmp_path)
    ours = load_adapter(tmp_path / "TinySeek_Lora_final.pkl", load_full(base))
    check_same(ours.model, theirs)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert (ours.model(ids).logits - load_full(base).model(ids).logits).abs().max() > 0.1
