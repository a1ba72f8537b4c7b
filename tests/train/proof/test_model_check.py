"""What is hidden in a model, shared by accident, or frozen by mistake, is found by looking, and named."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils.errors import UserError
from train.proof.model_check import (
    check_hidden,
    check_model,
    check_one_device,
    check_saved,
    check_shared,
    hidden_parts,
)


def small():
    """Layers 0 and 1, on which things are hidden."""
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))


def cyclic(part):
    """An object that holds itself, and the part."""
    one = SimpleNamespace(parts=[part])
    one.parts.append(one)
    return {"one": one}


@pytest.mark.parametrize("part", [
    nn.Linear(2, 2), nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True),
    nn.Parameter(torch.ones(2), requires_grad=False), nn.Sequential(nn.ReLU(), nn.Linear(2, 2)),
], ids=["module", "parameter", "tensor", "frozen parameter", "nested module"])  # fmt: skip
@pytest.mark.parametrize(("hide", "place"), [
    (lambda part: {"e0": part}, r"1\.0\.extra\['e0'\]"),
    (lambda part: [0, part], r"1\.0\.extra\[1\]"),
    (lambda part: (part,), r"1\.0\.extra\[0\]"),
    (lambda part: {part}, r"1\.0\.extra\[0\]"),
    (lambda part: [{"a": ({"b": part},)}], r"1\.0\.extra\[0\]\['a'\]\[0\]\['b'\]"),
    (lambda part: SimpleNamespace(inner=SimpleNamespace(x=[part])), r"1\.0\.extra\.inner\.x\[0\]"),
    (cyclic, r"1\.0\.extra\['one'\]\.parts\[0\]"),
], ids=["dict", "list", "tuple", "set", "nested", "object", "cycle"])  # fmt: skip
def test_what_is_hidden_is_named_with_its_place(part, hide, place):
    model = small()
    check_hidden(model)
    model[1][0].extra = hide(part)
    with pytest.raises(UserError, match=f"^{place} .*never see it.*nn\\.ModuleDict"):
        check_hidden(model)


def test_what_several_layers_share_is_named_once():
    model, settings = small(), SimpleNamespace(table=torch.ones(2))
    model[0].settings = model[1][0].settings = model.settings = settings
    assert [where for where, _ in hidden_parts(model)] == ["settings.table"]


def test_an_attribute_set_behind_the_back_of_the_module_is_found():
    model = small()
    object.__setattr__(model, "extra", nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"^extra \(Linear on cpu\)"):
        check_hidden(model)


def test_references_to_what_is_registered_are_fine():
    model = small()
    model[1].layers = [model[0], {"w": model[0].weight}, model]
    model.register_buffer("table", torch.ones(3), persistent=False)
    model[0].table = [model.table]
    model[0].activations = {"relu": nn.ReLU()}
    model[0].names = {"a": 1, "b": None, "c": "text", "d": torch.float32, "e": len, "f": nn.Linear}
    assert list(hidden_parts(model)) == []
    check_model(model)


def test_a_plain_tensor_is_no_error_by_itself():
    model = small()
    model[0].exact = torch.ones(2)
    model[0].activations = [nn.BatchNorm1d(2, affine=False)]  # no parameters, but buffers
    assert [where for where, _ in hidden_parts(model)][:2] == [
        "0.exact", "0.activations[0]._buffers['running_mean']"]  # fmt: skip
    check_model(model)


def test_a_buffer_with_a_gradient_and_an_old_activation_are_refused():
    model = small()
    model[0].register_buffer("table", nn.Parameter(torch.ones(2)))
    with pytest.raises(UserError, match=r"0\.table wants a gradient, but is a buffer"):
        check_hidden(model)
    model = small()
    model[0].last = model(torch.ones(1, 3))
    with pytest.raises(UserError, match=r"0\.last .* earlier forward"):
        check_hidden(model)


def test_one_layer_in_several_places_is_refused_and_a_known_tie_is_not():
    with pytest.raises(UserError, match=r"under 3 names: 0\.weight \(in Linear\), 1\.weight"):
        check_shared(nn.Sequential(*[nn.Linear(2, 2)] * 3))
    one, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    other.weight = nn.Parameter(one.weight.data)  # two parameters, one memory
    with pytest.raises(UserError, match=r"under 2 names: 0\.weight .*, 1\.weight"):
        check_shared(nn.Sequential(one, other))

    check_shared(nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2, device="meta")))  # no memory

    def tied(*names):
        model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in names})
        for name in names:
            model[name].weight = model[names[0]].weight
        return model

    check_shared(tied("embed_tokens", "lm_head"))
    for names in (("embed_tokens", "lm_head", "third"), ("embed_tokens", "third"), ("lm_head", "my_lm_head")):
        with pytest.raises(UserError, match=f"under {len(names)} names"):
            check_shared(tied(*names))


def test_both_ways_of_filtering_wrongly_are_named():
    model = small()
    model[0].requires_grad_(False)
    check_model(model, trains=lambda name: name.startswith("1."))
    with pytest.raises(UserError, match=r"^trainable, though .*: 1\.0\.bias \(in Linear\); check"):
        check_model(model, trains=lambda name: name == "1.0.weight")
    with pytest.raises(UserError, match=r"^frozen, though .*: 0\.bias \(in Linear\); check"):
        check_model(model, trains=lambda name: name != "0.weight")
    with pytest.raises(UserError, match="^frozen, though"):
        check_model(model)  # by default everything is to learn


def test_what_learns_has_one_dtype_and_the_frozen_base_may_have_another():
    model = small()
    model[0].to(torch.bfloat16).requires_grad_(False)
    check_model(model, trains=lambda name: name.startswith("1."))
    model[1].append(nn.Linear(3, 3, bias=False).double())
    with pytest.raises(UserError, match=r"one dtype: 1\.1\.weight \(in Linear\) is torch\.float64"):
        check_model(model, trains=lambda name: name.startswith("1."))


def test_everything_is_on_one_device():
    model = small()
    model[0].register_buffer("table", torch.ones(2, device="meta"))
    with pytest.raises(UserError, match=r"buffer 0\.table is on meta; the others are on cpu"):
        check_one_device(model, [])


class Router(nn.Module):
    """As far as it matters here."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))
        self.register_buffer("e_score_correction_bias", torch.zeros(2))


def test_what_is_trained_must_be_saved():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "gate": Router()})
    names = set(model.state_dict())
    check_saved(model, names)
    for lost in names:
        with pytest.raises(UserError, match=f"not saved: {lost} "):
            check_saved(model, names - {lost})
    model["gate"].requires_grad_(False)  # its bias does not move then
    check_saved(model, ["a.weight", "a.bias"])
