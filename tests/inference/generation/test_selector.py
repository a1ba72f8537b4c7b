"""Gates from their files: the choice by hand, what may be a candidate, and what is said about wrong ones."""

import shutil

import pytest
import torch

from inference.generation.selector import BASE, LoadedSelector, candidate_records, open_candidates
from inference.generation.load import load_adapter, load_full
from load_data.tokenization.tokenizer import BpeTokenizer
from tests.inference.adapters import MOE, write_adapter, write_base, write_gate
from tests.inference.tools import byte_tokenizer, write_checkpoint
from tests.train.tools import same_bits
from utils.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from utils.errors import UserError

TOKENIZER = byte_tokenizer()
QUESTIONS = ["a", "你好", "Assistant：<|im_end|>", "", *(f"what is {n} + {n * n}?" for n in range(20))]


def asked(text):
    """One message of the user."""
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, two adapters, two whole models of other shapes, all in one folder."""
    folder = tmp_path_factory.mktemp("out")
    base = write_base(folder / "base.pkl", 5)
    write_adapter(folder / "lora.pkl", base, "lora")
    write_adapter(folder / "prefix.pkl", base, "prefix", data={"template": "chatml"})
    write_base(folder / "whole.pkl", 6, "Pre", num_hidden_layers=1)
    write_base(folder / "experts.pkl", 7, **MOE)
    return folder


@pytest.mark.parametrize("width", [0, 4])
def test_the_choice_is_made_from_the_last_token_of_the_last_question(folder, width):
    base = load_full(folder / "base.pkl")
    files = ["base", folder / "lora.pkl", folder / "prefix.pkl"]
    path = write_gate(folder / f"gate{width}.pkl", folder / "base.pkl", files, seed=3, width=width)
    gate, weights = LoadedSelector(path, base), load_checkpoint(path)["weights"]
    assert gate.names == [str(file) for file in files]
    chosen = []
    for text in QUESTIONS:
        ids = torch.tensor([base.template.prompt(asked(text))])
        h = base.model(ids).hidden[0, -1]
        h = h / (h.square().mean() + 1e-6).sqrt() * weights["selector.norm.weight"]
        if width:
            h = weights["selector.up_proj.weight"] @ h + weights["selector.up_proj.bias"]
            h = h * torch.sigmoid(h)
        logits = weights["selector.out_proj.weight"] @ h + weights["selector.out_proj.bias"]
        chosen.append(int(logits.argmax()))
        assert gate.choose(asked(text)) == chosen[-1]
        before = [{"role": "system", "content": "s"}, *asked("x"), {"role": "assistant", "content": "y"}]
        assert gate.choose(before + asked(text)) == chosen[-1]
    assert len(set(chosen)) > 1
    assert same_bits(load_checkpoint(folder / "base.pkl")["weights"], base.model.state_dict())


def test_a_question_longer_than_the_context_keeps_its_markers(folder):
    """As in a conversation: the gate reads its end between the markers."""
    base = load_full(folder / "base.pkl")
    path = write_gate(folder / "g.pkl", folder / "base.pkl", ["base", folder / "lora.pkl"])
    gate = LoadedSelector(path, base)
    read = []
    gate.selecting.base.model.register_forward_pre_hook(lambda module, args: read.append(args[0][0].tolist()))
    gate.choose(asked("0123456789" * 9))
    before, after = (
        base.template.before["user"],
        base.template.after["user"] + base.template.before["assistant"],
    )
    text = TOKENIZER.encode("0123456789" * 9)[len(before) + len(after) - 64 :]
    assert read == [[*before, *text, *after]] and len(read[0]) == 64


def test_packed_questions_are_questions_alone(folder):
    """As training reads them: several in one row, then padding; and the base gets no gradient."""
    base = load_full(folder / "base.pkl")
    path = write_gate(folder / "p.pkl", folder / "base.pkl", ["base", folder / "lora.pkl"])
    gated = LoadedSelector(path, base).selecting
    first, second = ([TOKENIZER.encode(text)] for text in ("hello", "what?"))
    row = torch.tensor([first[0] + second[0] + [6] * 3])
    documents = torch.tensor([[0] * 5 + [1] * 5 + [2] * 3])
    places = torch.tensor([[*range(5), *range(5), 0, 1, 2]])
    real = torch.arange(13)[None] < 10
    logits = gated(row, position_ids=places, document_ids=documents, padding_mask=real)
    alone = torch.cat([gated(torch.tensor(first)), gated(torch.tensor(second))], dim=1)
    torch.testing.assert_close(logits[:, :10], alone, rtol=1e-4, atol=1e-5)
    logits[0, 4].sum().backward()
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert all(parameter.grad is not None for parameter in gated.selector.parameters())


def test_candidates_may_be_whole_models(folder):
    """Of another shape and stage; each answers as itself, a pre-trained one too."""
    base = load_full(folder / "base.pkl")
    files = [folder / name for name in ("whole.pkl", "experts.pkl", "lora.pkl")]
    gate = LoadedSelector(write_gate(folder / "w.pkl", folder / "base.pkl", files, seed=2), base)
    ids = torch.tensor([TOKENIZER.encode("hello")])
    expected = [load_full(files[0]), load_full(files[1]), load_adapter(files[2], base)]
    for model, one in zip(gate.models, expected, strict=True):
        assert torch.equal(model.model(ids).logits, one.model(ids).logits) and model.answers
    assert not expected[0].answers
    assert len({gate.choose(asked(text)) for text in QUESTIONS}) > 1


def test_records_say_what_lies_in_the_files(folder):
    base = load_full(folder / "base.pkl")
    files = [BASE, str(folder / "lora.pkl"), str(folder / "whole.pkl")]
    models = open_candidates(files, base)
    places = [folder / "base.pkl", *files[1:]]
    digests = [weights_digest(load_checkpoint(place)["weights"]) for place in places]
    assert models[0] is base
    assert candidate_records(models, base) == [
        {"path": path, "digest": digest} for path, digest in zip(files, digests, strict=True)
    ]


def test_candidates_are_found_where_they_were_or_beside_the_gate(folder, tmp_path):
    """The whole folder moves; a candidate that is gone is named."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(folder, old)
    files = ["base", old / "lora.pkl", old / "whole.pkl"]
    write_gate(old / "gate.pkl", old / "base.pkl", files)
    shutil.move(old, new)
    gate = LoadedSelector(new / "gate.pkl", load_full(new / "base.pkl"))
    assert [model.path for model in gate.models] == [new / "base.pkl", new / "lora.pkl", new / "whole.pkl"]
    assert gate.names[1] == str(old / "lora.pkl")
    (new / "lora.pkl").unlink()
    with pytest.raises(UserError, match=r"gate.pkl: its candidate .*lora.pkl was not found; put it beside"):
        LoadedSelector(new / "gate.pkl", load_full(new / "base.pkl"))


@pytest.mark.parametrize("name", ["lora.pkl", "whole.pkl"])
def test_a_candidate_that_was_trained_anew_is_refused(folder, tmp_path, name):
    place = tmp_path / name
    shutil.copy(folder / name, place)
    gate = write_gate(tmp_path / "gate.pkl", folder / "base.pkl", ["base", place])
    base = load_full(folder / "base.pkl")
    assert len(LoadedSelector(gate, base).models) == 2
    if name == "lora.pkl":
        write_adapter(place, folder / "base.pkl", seed=99)
    else:
        write_base(place, 99, "Pre", num_hidden_layers=1)
    with pytest.raises(UserError, match=f"trained to choose .*{name} has other weights now: train the gate"):
        LoadedSelector(gate, base)


def test_what_cannot_be_chosen_is_refused(folder, tmp_path):
    base = load_full(folder / "base.pkl")
    strange = write_checkpoint(tmp_path / "strange.pkl", "SFT", tokenizer=BpeTokenizer([], r"\w").to_json())
    gate = write_gate(tmp_path / "gate.pkl", folder / "base.pkl", ["base", folder / "lora.pkl"])
    with pytest.raises(UserError, match="strange.pkl has another tokenizer than the base .*base.pkl"):
        open_candidates([str(strange)], base)
    with pytest.raises(UserError, match="a gate of gate_train, not"):
        open_candidates([str(gate)], base)
    with pytest.raises(UserError, match="none.pkl: no such checkpoint"):
        open_candidates([str(tmp_path / "none.pkl")], base)
    with pytest.raises(UserError, match="lora.pkl was trained on other weights"):
        open_candidates([str(folder / "lora.pkl")], load_full(folder / "experts.pkl"))
    with pytest.raises(
        UserError, match="gate.pkl was trained on other weights .* than those of .*experts.pkl"
    ):
        LoadedSelector(gate, load_full(folder / "experts.pkl"))
    with pytest.raises(UserError, match="lora.pkl: an adapter of lora_train, not a gate; use --adapter"):
        LoadedSelector(folder / "lora.pkl", base)
    with pytest.raises(UserError, match="base.pkl: a full model of sft, not a gate; use --checkpoint"):
        LoadedSelector(folder / "base.pkl", base)
    saved = load_checkpoint(gate)
    for changes, words in (
        ({"base": {"path": "x", "digest": "y"}}, "wrong types in base"),
        ({"base": saved["base"] | {"candidates": ["base"]}}, "wrong types in base"),
        ({"config": saved["config"] | {"gate": {"width": "wide"}}}, "gate.width"),
    ):
        save_checkpoint(tmp_path / "odd.pkl", saved | changes)
        with pytest.raises(UserError, match=words):
            LoadedSelector(tmp_path / "odd.pkl", base)
    gate.write_bytes(gate.read_bytes()[:-50])
    with pytest.raises(UserError, match="cut short"):
        LoadedSelector(gate, base)
