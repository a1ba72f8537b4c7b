"""What a stage inherits from the checkpoint it starts from, so that no held-out text is trained on."""

import pytest
import torch

from train.engine.command import both_held_out, inherited_sections

SECTIONS = {"model": {}, "tokenizer": {}}
OLD, NEW = {"val_fraction": 0.1}, {"val_fraction": 0.1, "same_question": "folded"}


@pytest.mark.parametrize(
    ("short", "data", "expected"),
    [
        ("Pre", OLD | {"paths": ["a.jsonl"]}, {"val_fraction": 0.1, "same_question": "exact"}),
        ("Pre", NEW | {"paths": ["python"]}, NEW),
        ("Pre", NEW | {"paths": ["book.TXT", "more.jsonl"]}, NEW),
        ("Pre", NEW | {"paths": ["book.txt"]}, {"same_question": "folded"}),  # no question can leak
        ("SFT", NEW | {"paths": ["skills"], "template": "chatml", "limit": 5}, NEW | {"template": "chatml"}),
        ("SFT", {}, {"same_question": "exact"}),
    ],
)
def test_the_split_is_inherited(short, data, expected):
    """The fraction and the rule of the split (D1); a checkpoint without a rule has the first one."""
    init = {"config": SECTIONS | {"data": data}, "weights": {}, "tokenizer": "", "short": short}
    assert inherited_sections(init, "a.pkl") == SECTIONS | {"data": expected}


def test_two_models_have_held_out_what_both_have():
    """Of what they disagree on otherwise, the first decides."""
    first = {"model": {}, "tokenizer": {"kind": "bpe"}, "data": NEW | {"val_fraction": 0.3}}
    second = {"tokenizer": {"kind": "char"}, "data": OLD | {"template": "chatml"}}
    assert both_held_out(first, second) == first | {"data": NEW | {"template": "chatml"}}
    assert both_held_out({}, second) == second


def test_an_imported_model_has_held_nothing_out():
    """Its fraction is nobody's choice, so that of a first stage may be larger."""
    data = NEW | {"paths": ["skills"], "template": "own"}
    init = {"config": SECTIONS | {"data": data}, "weights": {}, "tokenizer": "", "short": "SFT"}
    found = inherited_sections(init | {"stage": "import_hf"}, "a.pkl")
    assert found == SECTIONS | {"data": {"template": "own"}}


@pytest.mark.parametrize(
    "scoring, bias, kept", [("softmax", 0, True), ("softmax", 1, False), ("sigmoid", 0, False)]
)
def test_a_router_without_a_bias_gets_none(scoring, bias, kept):
    """Mixtral and Qwen's mixtures have none, so a model that got one could not be exported again."""
    sections = {"model": {"scoring_func": scoring}, "tokenizer": {}}
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    init = {"config": sections, "weights": {name: torch.full((4,), float(bias))}, "tokenizer": ""}
    found = inherited_sections(init, "a.pkl")
    assert found.get("balance") == ({"bias_rate": 0.0} if kept else None)
