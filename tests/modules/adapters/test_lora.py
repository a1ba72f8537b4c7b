"""Adapters on linear layers against peft's with the same factors, alone and in whole models."""

import copy
import math

import peft
import pytest
import torch
from torch import nn

from config.adapters import LoraConfig
from model.caches import make_cache
from model.tinyseek import TinySeek
from modules.adapters.lora import LoraExperts, LoraLinear
from modules.adapters.lora_model import add_lora, fold, merge, switch_of
from modules.attention.latent import LatentAttention
from tests.model import test_moe_model
from tests.model.test_tinyseek import text, twins
from tests.modules.tools import added, shake, small_config
from utils.errors import UserError
from train.proof.gradient_check import prove_gradients_before

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "DoRA, rs": {"use_dora": True, "use_rslora": True, "lora_alpha": 1.0},
}
SHAPES = {  # in, out, rank, bias
    "wide": (7, 5, 3, True),
    "tall, no bias": (4, 9, 2, False),
    "rank above both": (3, 2, 6, True),
    "one of each": (1, 1, 1, True),
}
DENSE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", *DENSE[3:]]


class Net(nn.Module):
    """One layer, called `proj`."""

    def __init__(self, width=4, out=3, bias=True):
        super().__init__()
        self.proj = nn.Linear(width, out, bias=bias)

    def forward(self, x):
        return self.proj(x)


def freeze_all_but(model, names):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


@torch.no_grad()
def shake_adapters(model, seed=0, scale=0.3):
    """Random factors; magnitudes near what they were."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if "lora_magnitude" in name:
            parameter.mul_(1 + scale * noise)
        elif "lora_" in name:
            parameter.copy_(scale * noise)


@torch.no_grad()
def with_peft(theirs, ours, targets, parameters=None, **settings):
    """`theirs` under peft, with the factors of ours; and its parameter for each of our names."""
    if hasattr(theirs, "config"):  # for a type of model that it knows, peft takes gate_proj for the experts
        theirs.config.model_type = "unknown"
    config = peft.LoraConfig(target_modules=targets, target_parameters=parameters, **settings)
    theirs, pairs = peft.get_peft_model(theirs, config), {}
    for name, parameter in ours.named_parameters():
        if "lora_" not in name:
            continue
        layer, kind, rest = name.partition(".lora_")
        if ".experts." not in name.replace("shared_experts", ""):
            pairs[name] = theirs.get_parameter(f"base_model.model.{name}.weight")
        else:  # two wrappers, of which the inner one has the first of target_parameters; factors lie flat
            inner = ".base_layer" if "gate_up_proj" in rest else ""
            path = f"base_model.model.{layer}{inner}.lora_{rest[0]}.default.weight"
            pairs[name] = theirs.get_parameter(path)
            parameter = parameter.flatten(0, 1) if rest[0] == "A" else parameter.permute(1, 2, 0).flatten(1)
        pairs[name].copy_(parameter)
    assert len(pairs) == sum(p.requires_grad for p in theirs.parameters())
    return theirs, pairs


def settings_of(kind, rank, **more):
    return {"r": rank, "lora_alpha": 3.0, **KINDS[kind], **more}


def pair(kind, shape=(7, 5, 3, True), dtype=torch.float64, **more):
    """One layer of ours and of peft's with the same random numbers."""
    width, out, rank, bias = shape
    ours = shake(Net(width, out, bias), seed=5).to(dtype)
    theirs, settings = copy.deepcopy(ours), settings_of(kind, rank, **more)
    names = added(add_lora, ours, LoraConfig(**settings, target_modules=["proj"]))
    assert len(names) == 2 + settings.get("use_dora", False)
    shake_adapters(ours)
    freeze_all_but(ours, names)
    return ours, *with_peft(theirs, ours, ["proj"], **settings)


def same_gradients(ours, theirs, pairs, x, tolerance):
    """Output, and the gradients of x and of every adapter parameter; frozen weights get none."""
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(mine), theirs(other)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn_like(y)
    y.backward(upstream), expected.backward(upstream)
    torch.testing.assert_close(mine.grad, other.grad, rtol=tolerance, atol=tolerance)
    for name, parameter in ours.named_parameters():
        if name in pairs:
            assert parameter.grad.any(), name
            torch.testing.assert_close(parameter.grad, pairs[name].grad, rtol=tolerance, atol=tolerance)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_gradients_and_merged_weight_are_pefts(kind, shape):
    torch.manual_seed(2)
    ours, theirs, pairs = pair(kind, shape)
    for lead in ((2, 3), (1, 1), (5,)):
        x = torch.randn(*lead, shape[0], dtype=torch.float64)
        same_gradients(ours, theirs, pairs, x, 1e-10)
        ours.zero_grad(), theirs.zero_grad()
    unmerged = ours(x)
    merge(ours, "default")
    torch.testing.assert_close(ours(x), unmerged, rtol=1e-12, atol=1e-12)
    expected = theirs.merge_and_unload().proj
    torch.testing.assert_close(ours.proj.weight, expected.weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_dropout_is_pefts_with_the_same_seed(kind):
    ours, theirs, pairs = pair(kind, lora_dropout=0.4)
    x = torch.randn(2, 9, 7, dtype=torch.float64)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    assert (ours(x) - outputs[0]).abs().max() > 0.01  # another mask
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(ours(x), ours(x))


def test_dropout_leaves_the_base_alone_and_keeps_the_mean():
    """With W = 0 and B A = 1 the output is the dropped-out input: each number is 0 or 1 / (1 - p)."""
    model = Net(1, 1, bias=False)
    add_lora(model, LoraConfig(r=1, lora_alpha=1.0, lora_dropout=0.25, target_modules=["proj"]))
    for parameter, value in zip(model.parameters(), (0.0, 1.0, 1.0), strict=True):
        nn.init.constant_(parameter, value)
    y = model(torch.ones(20_000, 1))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
    assert (y == 0).float().mean() == pytest.approx(0.25, abs=0.015)  # five standard deviations
    with torch.no_grad():
        model.proj.weight.fill_(5.0)
    assert sorted(model(torch.ones(50, 1)).unique().tolist()) == pytest.approx([5, 5 + 4 / 3])


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_new_adapter_is_without_effect_and_drawn_by_hes_rule(kind):
    model = shake(Net(6, 5))
    x = torch.randn(2, 3, 6)
    before = model(x)
    torch.manual_seed(4)
    add_lora(model, LoraConfig(r=4, target_modules=["proj"], **KINDS[kind]))
    torch.manual_seed(4)
    expected = nn.init.kaiming_uniform_(torch.empty(4, 6), a=math.sqrt(5))
    torch.testing.assert_close(model.proj.lora_A["default"], expected)
    assert not model.proj.lora_B["default"].any()
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    if kind == "DoRA":
        expected = torch.stack([row.norm() for row in model.proj.weight])
        torch.testing.assert_close(model.proj.lora_magnitude_vector["default"], expected)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_factors_stay_in_fp32_on_a_base_in_bf16(kind):
    """As in peft; the branch is computed in fp32, added, and rounded once."""
    ours, theirs, pairs = pair(kind, (64, 48, 4, True), torch.bfloat16)
    assert {p.dtype for p in pairs.values()} == {torch.float32}
    assert all(p.dtype == torch.float32 for n, p in ours.named_parameters() if "lora_" in n)
    x = torch.randn(4, 5, 64).bfloat16()
    y, expected = ours(x), theirs(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1 / 128, atol=1e-3)
    exact = copy.deepcopy(ours).double()(x.double())
    assert (y - exact).norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_under_autocast(kind):
    ours, *_ = pair(kind, (64, 48, 4, True), torch.float32)
    x = torch.randn(4, 5, 64)
    exact = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16
    assert 0 < (y - exact).norm() < 0.01 * exact.norm()
    y.float().square().sum().backward()
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.any(), name


def our_model(seed=1, **changes):
    return shake(TinySeek(small_config(**changes)), seed)


MOE = test_moe_model.MOE | {"first_k_dense_replace": 1}
TREES = {  # settings, targets -> the layers of one adapter, numbers of layers as given
    "dense": ({}, ["attention", "dense"], {
        *[f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in DENSE[:4]],
        *[f"model.layers.{n}.mlp.{p}" for n in (0, 1) for p in DENSE[4:]]}),
    "by name": ({}, ["o_proj", "up_proj"], {
        *[f"model.layers.{n}.{p}" for n in (0, 1) for p in ("self_attn.o_proj", "mlp.up_proj")]}),
    "all groups, no experts there": ({}, ["dense", "shared", "experts"], {
        *[f"model.layers.{n}.mlp.{p}" for n in (0, 1) for p in DENSE[4:]]}),
    "mixture": (MOE, ["dense", "shared", "experts"], {
        *[f"model.layers.{layer}{p}" for layer in ("0.mlp.", "1.mlp.shared_experts.") for p in DENSE[4:]],
        "model.layers.1.mlp.experts"}),
    "mixture, experts alone": (MOE, ["experts"], {"model.layers.1.mlp.experts"}),
    "latent": (test_moe_model.MLA | {"q_lora_rank": 9}, ["attention"], {
        *[f"model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in LATENT[:5]]}),
    "second head": ({"mtp": "sequential", "num_hidden_layers": 1}, ["dense", "v_proj", "eh_proj"], {
        *[f"{layer}.mlp.{p}" for layer in ("model.layers.0", "mtp.layer") for p in DENSE[4:]],
        "model.layers.0.self_attn.v_proj", "mtp.layer.self_attn.v_proj", "mtp.eh_proj"}),
    "parallel head": ({"mtp": "parallel"}, ["proj"], {"mtp.proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_targets_are_those_named_and_the_base_keeps_names_and_tensors(name):
    changes, targets, expected = TREES[name]
    model = our_model(**changes)
    before = {key: (parameter, parameter.clone()) for key, parameter in model.named_parameters()}
    names = added(add_lora, model, LoraConfig(r=2, target_modules=targets), "mine")
    assert {key.partition(".lora_")[0] for key in names} == expected
    assert all(key.endswith(".mine") or ".mine." in key for key in names)
    after = dict(model.named_parameters())
    assert set(after) == {*before, *names} and len(set(names)) == len(names)
    for key, (parameter, value) in before.items():
        assert after[key] is parameter and torch.equal(parameter, value) and parameter.requires_grad
    twin = our_model(seed=2, **changes)
    add_lora(twin, LoraConfig(r=2, target_modules=targets), "mine")
    shake_adapters(model)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(text(2, 5)).logits, model(text(2, 5)).logits)


BAD = {
    "unknown": (["q_proj", "qproj"], {}, "one", r"'qproj'.*attention.*q_proj"),
    "output head": (["attention", "lm_head"], {}, "one", "lm_head"),
    "router": (["gate"], {}, "one", "router"),
    "nothing there": (["shared", "experts"], {}, "one", r"shared.*dense"),
    "empty": ([], {}, "one", "empty"),
    "a name twice": (["attention"], {}, "taken", "already"),
    "a dot": (["attention"], {}, "a.b", "a.b"),
    "a method": (["attention"], {}, "keys", "keys"),
    "no name": (["attention"], {}, "", "called"),
    "dropout on experts": (["attention", "experts"], {"lora_dropout": 0.1}, "one", "dropout"),
    "DoRA on zeros": (["q_proj"], {"use_dora": True}, "one", r"layers\.1\.self_attn\.q_proj.*zeros"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_changes_nothing(name):
    targets, settings, adapter, words = BAD[name]
    model = our_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[3] = 0
    add_lora(model, LoraConfig(target_modules=["up_proj"]), "taken")
    switch_of(model).use(None)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        add_lora(model, LoraConfig(target_modules=targets, **settings), adapter)
    assert name == "output head" or "lm_head" not in str(error.value)  # never offered
    after = model.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert sum(isinstance(layer, LoraLinear) for layer in model.modules()) == 2
    assert switch_of(model).choice is None and list(switch_of(model).configs) == ["taken"]


def test_a_model_without_linear_layers_or_adapters():
    with pytest.raises(UserError, match="no linear layer"):
        add_lora(nn.LayerNorm(3), LoraConfig())
    with pytest.raises(UserError, match="no adapter"):
        switch_of(our_model())


def test_a_second_adapter_may_have_dora_rank_and_targets_of_its_own():
    """B of the first, all zeros, is no row of zeros of the weight."""
    model = our_model()
    first = added(add_lora, model, LoraConfig(r=3, target_modules=["q_proj"]), "a")
    config = LoraConfig(r=5, target_modules=["q_proj", "o_proj"], use_dora=True)
    second = added(add_lora, model, config, "b")
    config.lora_alpha = 1000.0  # the model has its own copy
    assert len(first) == 4 and len(second) == 12 and not set(first) & set(second)
    assert switch_of(model).choice == "b" and switch_of(model).configs["b"].lora_alpha == 16
    assert len({id(layer.switch) for layer in model.modules() if isinstance(layer, LoraLinear)}) == 1


MODELS = {
    "dense": ({}, ["attention", "dense"], DENSE, None),
    "Dots1, first layer dense": ({}, ["attention", "dense", "shared"], DENSE, None),
    "Dots1": ({}, ["shared", "experts"], DENSE[4:], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "DeepseekV3, queries compressed": ({}, ["attention", "shared"], LATENT, None),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name, kind", [
    *[(name, kind) for name in MODELS for kind in ("LoRA", "DoRA") if (name, kind) != ("Dots1", "DoRA")],
    ("Dots1", "rsLoRA"),
])  # fmt: skip
def test_a_whole_model_is_hugging_faces_under_peft(name, kind):
    """Logits, and the gradient of every factor. peft has no DoRA for experts: test_lora_experts.py."""
    changes, targets, theirs_targets, parameters = MODELS[name]
    bias = {"attention_bias": True} if name == "dense" else {}
    ours, theirs = twins(**bias) if name == "dense" else test_moe_model.twins(name, **changes)
    settings = settings_of(kind, 3)
    names = added(add_lora, ours, LoraConfig(**settings, target_modules=targets))
    shake_adapters(ours)
    freeze_all_but(ours, names)
    theirs, pairs = with_peft(theirs, ours, theirs_targets, parameters, **settings)
    ids = text(2, 9)
    logits, expected = ours(ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
    switch_of(ours).use(None)
    assert (ours(ids).logits - logits).abs().max() > 0.05
    upstream = torch.randn_like(logits) / logits.shape[-1]
    logits.backward(upstream), expected.backward(upstream)
    for key in names:
        grad, other = ours.get_parameter(key).grad, pairs[key].grad
        if "experts.lora" in key:  # as they lie in peft
            grad = grad.flatten(0, 1) if "lora_A" in key else grad.permute(1, 2, 0).flatten(1)
        assert grad.any(), key
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("rows", [False, True])
@torch.no_grad()
def test_latent_attention_with_an_adapter_on_the_expansion_decodes_what_it_reads(rows, monkeypatch):
    """The absorbed form reads kv_b_proj.weight itself and would pass the adapter by; it comes back once the
    layer is plain again."""
    model, absorbed = our_model(**test_moe_model.MLA).double().eval(), []
    original = LatentAttention.absorbed
    monkeypatch.setattr(LatentAttention, "absorbed", lambda *a: absorbed.append(1) or original(*a))
    add_lora(model, LoraConfig(r=2, target_modules=["kv_b_proj"]))
    shake_adapters(model)

    def decode():
        cache = make_cache(model, 2, 12)
        return torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(12)], dim=1)

    ids = text(2, 12)
    switch_of(model).use([None, "default"] if rows else "default")
    expected = model(ids).logits
    torch.testing.assert_close(decode(), expected, rtol=1e-9, atol=1e-9)
    assert not absorbed
    fold(model, "default")
    torch.testing.assert_close(decode()[1], expected[1], rtol=1e-9, atol=1e-9)
    assert absorbed


def test_a_deep_copy_has_a_switch_of_its_own():
    model = our_model(**MOE)
    add_lora(model, LoraConfig(r=2, target_modules=["attention", "experts"]), "a")
    shake_adapters(model)
    twin = copy.deepcopy(model)
    switches = {id(m.switch) for m in twin.modules() if isinstance(m, (LoraLinear, LoraExperts))}
    assert switches == {id(switch_of(twin))} and switch_of(twin) is not switch_of(model)
    ids = text(2, 5)
    expected = model(ids).logits
    assert torch.equal(twin(ids).logits, expected)
    switch_of(twin).use(None)
    assert torch.equal(model(ids).logits, expected) and not torch.equal(twin(ids).logits, expected)
    switch_of(twin).use("a")
    assert torch.equal(twin(ids).logits, expected)


def test_the_gradient_proof_accepts_adapters():
    """Zeros in B are replaced in its copy, so that A is reached; the model stays as it is."""
    model = our_model(**MOE | {"n_routed_experts": 3})
    config = LoraConfig(r=2, target_modules=["attention", "dense", "shared", "experts"], use_dora=True)
    names = added(add_lora, model, config)
    freeze_all_but(model, names)
    ids = text(4, 9)
    report = prove_gradients_before(
        model, lambda m, ids: m(ids[:, :-1], ids[:, 1:]).loss_sum, [ids], trains=set(names).__contains__
    )
    assert set(report.starts_at_zero) == {name for name in names if "lora_B" in name}
    assert report.reached_by == {"loss": len(names)} and not report.idle
