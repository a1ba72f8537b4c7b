"""From files to models: which one is chosen, and what is said about broken ones."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from inference.fast.decoder import refusal
from inference.generation.generator import Generator
from inference.generation.load import find_base, find_model, load_adapter, load_base, load_full
from inference.generation.sampling import SamplingParams
from inference.generation.speculative import SpeculativeGenerator
from load_data.chat.chat_template import ChatTemplate
from tests.inference.adapters import ADAPTED, MOE, write_adapter, write_base, write_gate
from tests.inference.tools import byte_tokenizer, run_config, tiny_model, write_checkpoint
from tests.train.tools import same_bits
from utils.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from utils.errors import UserError

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)
IDS = byte_tokenizer().encode("déjà vu")


def test_the_latest_stage_is_chosen(tmp_path):
    """Files appear one after the other; each time the best one there is named. GRPO, PPO, DPO, SFT, Pre."""
    with pytest.raises(UserError, match="python train/pre_train.py --out .*, or name one"):
        find_model(tmp_path)  # the way out trains into the folder that was searched
    with pytest.raises(UserError, match="no model in .*nowhere"):
        find_model(tmp_path / "nowhere")
    (tmp_path / "TinySeek_Lora_final.pkl").touch()  # an adapter is no full model
    for name in (
        "TinySeek_Pre2_0.pkl", "TinySeek_Pre10_0.pkl", "TinySeek_Pre1_1.pkl", "TinySeek_Pre_final.pkl",
        "TinySeek_SFT3_0.pkl", "TinySeek_SFT_final.pkl", "TinySeek_DPO_final.pkl", "TinySeek_PPO_final.pkl",
        "TinySeek_GRPO_final.pkl",
    ):  # fmt: skip
        (tmp_path / name).touch()
        assert find_model(tmp_path) == tmp_path / name


def test_a_newer_model_of_an_earlier_stage_is_noticed(tmp_path):
    """A stage that was run again after those that build on it."""
    for second, short in enumerate(("Pre", "SFT")):
        path = tmp_path / f"TinySeek_{short}_final.pkl"
        path.touch()
        os.utime(path, (second, second))
    told = []
    assert find_model(tmp_path, told.append) == path and told == []
    os.utime(tmp_path / "TinySeek_Pre_final.pkl", (9, 9))
    assert find_model(tmp_path, told.append) == path and "TinySeek_Pre_final.pkl is newer" in told[0]


def test_what_was_saved_is_what_is_loaded(tmp_path):
    path = write_checkpoint(tmp_path / "a.pkl", "SFT", seed=3)
    full = load_full(path, torch.device("cpu"))
    model, tokenizer, checkpoint = full.model, full.tokenizer, full.about
    ids = torch.tensor([tokenizer.encode("déjà vu")])
    assert torch.equal(model(ids).logits, tiny_model(3)(ids).logits)
    assert not model.training and tokenizer.to_json() == byte_tokenizer().to_json()
    assert checkpoint["short"] == "SFT" and checkpoint["step"] == 1234 and "weights" not in checkpoint


def test_a_config_without_vocabulary_size_takes_the_tokenizers(tmp_path):
    config = run_config(tiny_model())
    config["model"]["vocab_size"] = 0
    full = load_full(write_checkpoint(tmp_path / "a.pkl", config=config))
    assert full.model.config.vocab_size == full.tokenizer.vocab_size


def test_broken_checkpoints_are_one_clear_error(tmp_path):
    config = run_config(tiny_model())

    def changed(**values):
        return {**config, "model": {**config["model"], **values}}

    cases = {
        "not a full model, it has no weights": {"weights": None},
        "no config, tokenizer": {"config": None, "tokenizer": None},
        "tokenizer has 269 tokens, its model only 100": {"config": changed(vocab_size=100)},
        "does not fit this model": {"config": changed(num_hidden_layers=1)},
        "not a tokenizer": {"tokenizer": "{}"},
        "unknown setting.*colour": {"config": changed(colour=1)},
        "wrong types in config": {"config": "text"},
        "wrong types in weights": {"weights": [torch.zeros(1)]},
        "wrong types in stage, tokenizer, weights": {"stage": 5, "tokenizer": ["x"], "weights": {"a": 1}},
        "embed_tokens.weight .* where the model has .1000000000, 24.": {"config": changed(vocab_size=10**9)},
        "down_proj.weight .* the model has .24, 1000000000.": {"config": changed(intermediate_size=10**9)},
        "names 1000000000 layers": {"config": changed(num_hidden_layers=10**9)},
        "names 1000000000 channels": {"config": changed(hidden_size=10**9)},
    }
    for message, changes in cases.items():
        path = write_checkpoint(tmp_path / "broken.pkl", **changes)
        with pytest.raises(UserError, match=message) as caught:
            load_full(path)
        assert "broken.pkl" in str(caught.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_full(tmp_path / "missing.pkl")
    save_checkpoint(path, load_checkpoint(write_checkpoint(path)) | {"short": ["SFT"]})
    with pytest.raises(UserError, match="its entry short is no text"):
        load_full(path)


# --- adapters ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["dense", "moe"])
def base(request, tmp_path_factory):
    """A model that answers, in a folder of its own."""
    path = tmp_path_factory.mktemp("out") / "TinySeek_SFT_final.pkl"
    return write_base(path, 5, **(MOE if request.param == "moe" else {}))


@pytest.mark.parametrize("like", ADAPTED)
def test_adapters_beside_each_other_leave_the_base_alone(base, like, tmp_path):
    """The logits of a model that carries its adapter unfolded; the base generates what it did before."""
    full = load_full(base)
    own, other = (write_adapter(tmp_path / f"{n}.pkl", base, like, seed=n) for n in (1, 2))
    said, before = Generator(full.model).generate([IDS], GREEDY), load_checkpoint(base)["weights"]
    models = [load_adapter(path, full) for path in (own, other, own)]
    logits = [one.model(torch.tensor([[*IDS, *one.template.before["user"]]])).logits for one in models]
    assert torch.equal(logits[0], logits[2]) and not torch.allclose(logits[0], logits[1])
    assert same_bits(before, full.model.state_dict())
    assert Generator(full.model).generate([IDS], GREEDY) == said
    one = models[0]
    assert one.answers and one.path == own and one.about["step"] == 7 and "weights" not in one.about
    assert (not refusal(one.model)) == (ADAPTED[like][0] == "Lora")
    assert one.digest == weights_digest(load_checkpoint(own)["weights"]) and full.digest == weights_digest(
        before
    )
    slow = Generator(one.model, fast=False).generate([IDS], GREEDY)
    assert Generator(one.model).generate([IDS], GREEDY) == slow


def test_an_adapters_template_is_that_of_its_own_training(base, tmp_path):
    full = load_full(base)
    chatml = {"data": {"template": "chatml"}}
    one = load_adapter(write_adapter(tmp_path / "a.pkl", base, "prompt", **chatml), full)
    expected = ChatTemplate(byte_tokenizer(), "chatml", 2, full.model.config.vocab_size)
    messages = [{"role": "user", "content": "hi"}]
    assert one.template.prompt(messages) == expected.prompt(messages)
    assert max(one.template.prompt(messages)) == full.model.config.vocab_size + 5
    two = load_adapter(write_adapter(tmp_path / "b.pkl", base, "prefix"), full)
    assert two.template.prompt(messages) == full.template.prompt(messages)


@pytest.mark.parametrize("kind", ["sequential", "parallel"])
def test_drafting_with_a_prefix_writes_what_greedy_decoding_writes(kind, tmp_path):
    """The head drafts without the prefix, the trunk checks with it; up to the end of the context."""
    base = write_base(tmp_path / "a.pkl", 4, mtp=kind)
    model = load_adapter(write_adapter(tmp_path / "b.pkl", base, "prefix"), load_full(base)).model.double()
    for prompt, new in (([5], 20), (IDS, 20), ((IDS * 4)[-29:], 40)):
        params = SamplingParams(temperature=0, max_new_tokens=new)
        plain = Generator(model).generate([prompt], params)
        for length in (1, 4) if kind == "sequential" else (1,):
            drafting = SpeculativeGenerator(model, draft_length=length)
            assert drafting.generate([prompt], params) == plain and drafting.drafted > 0
        assert len(set(plain[0])) > 3
    assert len(plain[0]) == 64 - 5 - (64 - 5) // 2


@pytest.mark.parametrize("like", ["prefix", "prompt"])
def test_the_context_is_kept_with_a_prefix(base, like, tmp_path):
    """Prefix, prompt and answer together fill the context and not more."""
    model = load_adapter(write_adapter(tmp_path / "a.pkl", base, like), load_full(base)).model
    generator = Generator(model)
    assert generator.context == 64 - (5 if like == "prefix" else 0)
    answer = generator.generate([[7] * (generator.context - 30)], SamplingParams(max_new_tokens=30))[0]
    assert len(answer) == 30
    answer = generator.generate([[7] * 20], SamplingParams(temperature=0, max_new_tokens=500))[0]
    assert len(answer) == generator.context - 20


def test_files_of_the_wrong_kind_name_the_right_flag(base, tmp_path):
    full = load_full(base)
    adapter = write_adapter(tmp_path / "a.pkl", base)
    gate = write_gate(tmp_path / "g.pkl", base, ["base", adapter])
    cases = [
        (
            lambda: load_full(adapter),
            "a.pkl: an adapter of lora_train, not a full model; use --adapter .*a.pkl",
        ),
        (lambda: load_full(gate), "g.pkl: a gate of gate_train, not a full model; use --gate .*g.pkl"),
        (lambda: load_adapter(base, full), "a full model of sft, not an adapter; use --checkpoint"),
        (lambda: load_adapter(gate, full), "a gate of gate_train, not an adapter; use --gate"),
        (lambda: find_base("--adapter", base), "a full model of sft, not an adapter"),
        (lambda: find_base("--gate", adapter), "an adapter of lora_train, not a gate; use --adapter"),
    ]
    for call, words in cases:
        with pytest.raises(UserError, match=words):
            call()


def test_damaged_adapters_are_one_clear_error(base, tmp_path):
    full = load_full(base)
    path = tmp_path / "a.pkl"
    for entries, words in (
        ({"base": None}, "not an adapter, it has no base"),
        ({"weights": None, "config": None}, "not an adapter, it has no config, weights"),
        ({"weights": {}}, "does not fit this model: weights .* missing"),
        ({"weights": {"lm_head.weight": torch.zeros(1)}}, "missing .*; 1 unexpected"),
        ({"config": {"colour": 1}}, "colour"),
        ({"short": None}, "not an adapter, it has no short"),
        ({"base": ["x"]}, "wrong types in base"),
        ({"base": {"path": 3, "digest": "x"}}, "wrong types in base"),
        ({"weights": "text"}, "wrong types in weights"),
    ):
        write_adapter(path, base, **entries)
        with pytest.raises(UserError, match=f"a.pkl.*{words}"):
            load_adapter(path, full)
    write_adapter(path, base)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_adapter(path, full)
    other = load_full(write_base(tmp_path / "other.pkl", 9))
    with pytest.raises(
        UserError, match=rf"trained on other weights \(.*{base.name}\) than those of .*other.pkl"
    ):
        load_adapter(write_adapter(path, base), other)


def test_the_base_is_found_where_it_was_or_beside_the_file(tmp_path, monkeypatch):
    """Paths as given in training, from whatever folder; where several files have the name, weights decide."""
    project, away = tmp_path / "project", tmp_path / "away"
    for folder in (project / "out" / "lora", away):
        folder.mkdir(parents=True)
    monkeypatch.chdir(project)
    base = write_base(project / "out" / "TinySeek_SFT_final.pkl", 5)
    digest = load_full(base).digest
    adapter = write_adapter(
        project / "out" / "lora" / "a.pkl", base, base={"digest": digest, "path": f"out/{base.name}"}
    )

    def found():
        place = find_base("--adapter", adapter)
        assert load_base(None, "cpu", "nowhere", adapter=adapter).digest == digest
        return place

    assert found() == base
    monkeypatch.chdir(away)  # seen from a folder above the adapter
    assert found() == base
    (away / "out").mkdir()
    write_base(away / "out" / base.name, 6)  # another model of that name, seen from here
    assert found() == base
    beside = shutil.move(base, adapter.parent / base.name)
    assert found() == beside
    shutil.rmtree(away / "out")
    shutil.move(beside, away / "moved.pkl")
    with pytest.raises(
        UserError, match=r"a.pkl: its base out.* was not found; name it with --checkpoint FILE"
    ):
        find_base("--adapter", adapter)
    named = load_base("moved.pkl", "cpu", "nowhere", adapter=adapter)
    assert load_adapter(adapter, named).answers
    windows = {"digest": digest, "path": "C:\\runs\\moved.pkl"}
    assert (
        find_base("--adapter", write_adapter(away / "b.pkl", away / "moved.pkl", base=windows))
        == away / "moved.pkl"
    )


def test_paths_in_a_strangers_file_are_not_probed_without_need(tmp_path, monkeypatch):
    """What lies beside the file comes first and is enough; a network path is never opened."""
    base = write_base(tmp_path / "base.pkl", 5)
    digest, real, probed = load_full(base).digest, Path.is_file, []
    monkeypatch.setattr(Path, "is_file", lambda self: probed.append(str(self)) or real(self))
    for was in ("/elsewhere/base.pkl", r"\\host\share\base.pkl", "//host/share/base.pkl"):
        adapter = write_adapter(tmp_path / "a.pkl", base, base={"digest": digest, "path": was})
        probed.clear()
        assert find_base("--adapter", adapter) == base and probed == [str(base)]
    for was, last in ((r"\\host\share\gone.pkl", "gone.pkl"), ("//host/share/gone.pkl", "gone.pkl")):
        adapter = write_adapter(tmp_path / "a.pkl", base, base={"digest": digest, "path": was})
        probed.clear()
        with pytest.raises(UserError, match="was not found"):
            find_base("--adapter", adapter)
        assert probed == [str(tmp_path / last)]
    away = write_base(tmp_path / "away" / "moved.pkl", 5)  # an absolute path is the last that is tried
    adapter = write_adapter(tmp_path / "a.pkl", base, base={"digest": digest, "path": str(away)})
    assert find_base("--adapter", adapter) == away
