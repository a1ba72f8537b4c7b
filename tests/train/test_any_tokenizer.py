"""Any tokenizer, from the first step of pre-training to a chat in its own template, by flags alone."""

import json
import sys

import pytest

from inference.generation.conversation import Conversation
from inference.generation.generator import Generator
from inference.generation.load import load_full
from inference.generation.sampling import SamplingParams
from tests.load_data.hf_folders import TEMPLATES, save
from train import pre_train, sft_train

FEW = ("train.batch_size=2", "optim.warmup_steps=0", "train.dtype=fp32", "data.sequence_length=48")


class Asked(Generator):
    """Remembers its prompts."""

    def generate(self, prompts, *others, **options):
        self.prompts = prompts
        return super().generate(prompts, *others, **options)


def call(monkeypatch, script, out, *flags):
    flags = [*flags, "--out", out, "--device", "cpu", "--max-steps", 2]
    for setting in (*FEW, f"data.cache_dir={out / 'cache'}"):
        flags += ["--set", setting]
    monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
    monkeypatch.setattr(sys, "argv", ["script", *map(str, flags)])
    script.main()


def said(path, *texts):
    """The prompts of a conversation with the model in `path`, and the model."""
    model = load_full(path)
    generator, prompts = Asked(model.model), []
    talk = Conversation([model], [generator])
    for text in texts:
        talk.say(text, SamplingParams(temperature=0, max_new_tokens=3), lambda piece: None)
        prompts.append(generator.prompts[0])
    return model, talk.messages, prompts


@pytest.mark.slow
def test_a_tokenizer_of_another_model_from_pre_training_to_chat(tmp_path, monkeypatch):
    theirs = save(tmp_path / "hf", "mistral", "llama2", TEMPLATES["mistral"])
    text, dialogues = tmp_path / "text.txt", tmp_path / "dialogues.jsonl"
    text.write_text("The quick brown fox said </s> to the 世界.\n" * 200, encoding="utf-8")
    turns = [{"role": "user", "content": "NAME"}, {"role": "assistant", "content": "The fox"}]
    record = json.dumps({"messages": turns}) + "\n"
    dialogues.write_text("".join(record.replace("NAME", f"fox {n}") for n in range(60)), encoding="utf-8")
    flags = ["--set", "tokenizer.kind=hf", "--set", f"tokenizer.path={tmp_path / 'hf'}"]
    call(monkeypatch, pre_train, tmp_path, "--config", "tiny", "--data", text, *flags,
         "--set", "data.template=own")  # fmt: skip
    base, _, prompts = said(tmp_path / "TinySeek_Pre_final.pkl", "The fox", "")
    assert base.tokenizer.kind == "hf" and base.model.config.vocab_size == base.tokenizer.vocab_size
    assert prompts == [theirs("The fox")["input_ids"], theirs("")["input_ids"]] and prompts[1] == [1]

    # the template comes from the base, as the tokenizer does
    call(monkeypatch, sft_train, tmp_path, "--init", tmp_path / "TinySeek_Pre_final.pkl", "--data", dialogues)
    tuned, messages, prompts = said(tmp_path / "TinySeek_SFT_final.pkl", "The fox", "said")
    assert tuned.config.data.template == "own" and tuned.answers
    first = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert prompts[0] == first and len(prompts[1]) > len(first) and prompts[1].count(1) == 1
    assert prompts[1][: len(first)] == first
