"""The router against Hugging Face's four, and against an obvious loop over tokens in fp64."""

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, Dots1Config, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.dots1.modeling_dots1 import Dots1TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from modules.experts.router import ExactLinear, TopkRouter
from tests.modules.tools import shake, small_config

SETTINGS = {
    "sigmoid": {},
    "sigmoid, not normed": {"norm_topk_prob": False},
    "softmax": {"scoring_func": "softmax"},
    "softmax, not normed": {"scoring_func": "softmax", "norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "one of three groups": {"n_group": 3, "num_experts_per_tok": 2},
    "two of four groups, softmax": {"n_group": 4, "topk_group": 2, "scoring_func": "softmax"},
    "two of three groups": {"n_group": 3, "topk_group": 2, "num_experts_per_tok": 5},
    "all groups": {"n_group": 2, "topk_group": 2},
    "groups by their best": {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"},
    "groups of one": {"n_group": 12, "topk_group": 5, "topk_method": "group_limited_greedy"},
    "every expert": {"num_experts_per_tok": 12},
    "one of one": {"n_routed_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "top-1": {"num_experts_per_tok": 1, "norm_topk_prob": False},
}


def make_router(bias=0.3, seed=0, **settings):
    """A router of 12 experts, 4 per token, with random weights and a random correction bias."""
    values = {"n_routed_experts": 12, "num_experts_per_tok": 4} | settings
    router = shake(TopkRouter(small_config(**values)), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    router.e_score_correction_bias.copy_(bias * torch.randn(values["n_routed_experts"], generator=generator))
    return router


def slow_routing(x, weight, bias, config):
    """One token after the other, in fp64: a list of {expert: weight}."""
    size, chosen_of = config.n_routed_experts // config.n_group, []
    for token in x.double():
        logits = [(token * row).sum() for row in weight]
        if config.scoring_func == "sigmoid":
            scores = [1 / (1 + torch.exp(-logit)) for logit in logits]
        else:
            total = sum(torch.exp(logit) for logit in logits)
            scores = [torch.exp(logit) / total for logit in logits]
        choice = [score.item() + b.item() for score, b in zip(scores, bias, strict=True)]
        groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
        if config.n_group > 1:
            count = 1 if config.topk_method == "group_limited_greedy" else 2
            groups.sort(key=lambda group: sum(sorted(choice[e] for e in group)[-count:]))
        allowed = [e for group in groups[-config.topk_group :] for e in group]
        chosen = sorted(allowed, key=lambda e: choice[e])[-config.num_experts_per_tok :]
        total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1
        chosen_of.append({e: scores[e] / total * config.routed_scaling_factor for e in chosen})
    return chosen_of


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("bias", [0.0, 0.3, 3.0])
def test_choice_weights_and_gradient_are_those_of_the_loop(settings, bias):
    """With a bias of 3 every choice is the bias's, and many choice scores are negative."""
    torch.manual_seed(1)
    router = make_router(bias, **settings).double()
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    routing = router(x)
    slow = slow_routing(x, router.weight, router.e_score_correction_bias, router.config)
    upstream = torch.randn(7, router.config.n_routed_experts, dtype=torch.float64)
    total = slow_total = 0
    for n, expected in enumerate(slow):
        assert set(routing.indices[n].tolist()) == set(expected)
        for e, weight in zip(routing.indices[n].tolist(), routing.weights[n], strict=True):
            torch.testing.assert_close(weight, expected[e], rtol=0, atol=1e-14)
            total, slow_total = total + weight * upstream[n, e], slow_total + expected[e] * upstream[n, e]
    ours = torch.autograd.grad(total, (x, router.weight))
    for a, b in zip(ours, torch.autograd.grad(slow_total, (x, router.weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def same_as(theirs, ours, x, order_too):
    """Logits, choice, weights, and the gradients of x and of the matrix are the twin's."""
    known = theirs.state_dict().keys()  # Qwen3's router has no bias
    weights = {key: value for key, value in ours.state_dict().items() if key in known}
    assert ours.state_dict().keys() - known <= {"e_score_correction_bias"}
    theirs.load_state_dict(weights, strict=True)
    routing, (logits, weights, indices) = ours(x), theirs(x)
    torch.testing.assert_close(routing.logits, logits, rtol=1e-6, atol=1e-6)
    if order_too:
        assert torch.equal(routing.indices, indices)
    dense = torch.zeros_like(logits).scatter(1, routing.indices, routing.weights)
    expected = torch.zeros_like(logits).scatter(1, indices, weights)
    assert torch.equal(dense > 0, expected > 0)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(dense)
    mine = torch.autograd.grad(dense, (x, ours.weight), upstream)
    for a, b in zip(mine, torch.autograd.grad(expected, (x, theirs.weight), upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups, kept, chosen", [(1, 1, 4), (3, 2, 5), (4, 1, 3)])
@pytest.mark.parametrize("normed, scale", [(True, 1.0), (False, 2.5)])
@pytest.mark.parametrize(
    "twin, settings", [(DeepseekV3TopkRouter, DeepseekV3Config), (Dots1TopkRouter, Dots1Config)]
)
def test_with_sigmoids_it_is_deepseeks_and_dots1s(twin, settings, groups, kept, chosen, normed, scale):
    torch.manual_seed(groups)
    same = {
        "num_experts_per_tok": chosen, "n_group": groups, "topk_group": kept, "norm_topk_prob": normed,
        "routed_scaling_factor": scale, "n_routed_experts": 12, "hidden_size": 24,
    }  # fmt: skip
    ours = make_router(seed=groups, **same)
    same_as(twin(settings(**same)), ours, torch.randn(31, 24, requires_grad=True), order_too=False)


@pytest.mark.parametrize("groups, kept, chosen", [(4, 2, 5), (3, 1, 4), (12, 6, 6)])
def test_with_the_best_of_each_group_it_is_deepseek_v2s(groups, kept, chosen):
    torch.manual_seed(groups)
    same = {
        "num_experts_per_tok": chosen, "n_group": groups, "topk_group": kept, "routed_scaling_factor": 2.5,
        "n_routed_experts": 12, "hidden_size": 24, "topk_method": "group_limited_greedy",
    }  # fmt: skip
    ours = make_router(0.0, groups, scoring_func="softmax", norm_topk_prob=False, **same)
    x = torch.randn(31, 24, requires_grad=True)
    theirs = DeepseekV2TopkRouter(DeepseekV2Config(**same, num_attention_heads=4))
    same_as(theirs, ours, x, order_too=False)
    if groups < 12:  # of a group of one, the best is all there is
        two = make_router(0.0, groups, scoring_func="softmax", **same | {"topk_method": "noaux_tc"})
        assert (two(x).indices.sort().values != ours(x).indices.sort().values).any()


@pytest.mark.parametrize("chosen, normed", [(1, False), (4, True), (4, False), (12, True)])
def test_with_a_softmax_it_is_qwen3s(chosen, normed):
    torch.manual_seed(chosen)
    same = {"num_experts_per_tok": chosen, "norm_topk_prob": normed, "hidden_size": 24}
    ours = make_router(0.0, scoring_func="softmax", **same)
    theirs = Qwen3MoeTopKRouter(Qwen3MoeConfig(num_experts=12, **same))
    same_as(theirs, ours, torch.randn(31, 24, requires_grad=True), order_too=True)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_the_bias_changes_the_choice_and_not_the_weights(scoring):
    """Expert 0 is wanted by all and expert 1 by none, both at weights made of their scores alone."""
    torch.manual_seed(0)
    router, x = make_router(0.0, scoring_func=scoring, norm_topk_prob=False), torch.randn(50, 24)
    before = router(x)
    router.e_score_correction_bias[0], router.e_score_correction_bias[1] = 10.0, -10.0
    after = router(x)
    assert (before.indices == 1).any() and not (after.indices == 1).any()
    assert not (before.indices == 0).any(1).all() and (after.indices == 0).any(1).all()
    assert torch.equal(after.weights, before.scores.gather(1, after.indices))
    assert torch.equal(after.logits, before.logits) and torch.equal(after.scores, before.scores)
    assert [name for name, _ in router.named_parameters()] == ["weight"]
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}


def test_scores_that_all_vanish_give_no_nan():
    """Sigmoids of -120 are zero in fp32: the weights become zeros, not 0/0."""
    router = make_router(0.0)
    router.weight.data.fill_(-5.0)
    weights = router(torch.ones(2, 24)).weights
    assert weights.isfinite().all() and not weights.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_a_model_of_low_precision_the_router_stays_exact(dtype):
    """The bias keeps its digits, and logits are those of fp32 on the same rounded weights and inputs."""
    router = make_router()
    exact = router.e_score_correction_bias.clone()
    router.to(dtype)
    assert router.weight.dtype == dtype and router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exact)
    x = torch.randn(9, 24).to(dtype)
    expected = slow_routing(x, router.weight.double(), exact, router.config)
    for cast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            routing = router(x)
        assert all(part.dtype == torch.float32 for part in (routing.logits, routing.scores, routing.weights))
        torch.testing.assert_close(
            routing.logits.double(), x.double() @ router.weight.double().T, rtol=1e-6, atol=1e-6
        )
        for n, row in enumerate(expected):
            assert set(routing.indices[n].tolist()) == set(row)
    assert router.float().e_score_correction_bias.equal(exact)
    assert router.double().e_score_correction_bias.dtype == torch.float64
    assert router(x.double()).weights.dtype == torch.float64


def test_autocast_changes_no_bit():
    router, x = make_router(), torch.randn(9, 24)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


def test_the_choice_is_exact_where_products_are_tf32(monkeypatch):
    """As on a GPU in training: products round their factors to 11 bits, and sum up in fp32."""
    real = torch.Tensor.__matmul__

    def tf32(a, b):
        return real(*(((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b)))

    torch.manual_seed(0)
    x, weight = torch.randn(64, 512), torch.randn(8, 512)
    exact, errors = x.double() @ weight.T.double(), []
    monkeypatch.setattr(torch.Tensor, "__matmul__", tf32)
    for precision in ("highest", "high"):  # what the trainer asks for on a GPU is high
        torch.set_float32_matmul_precision(precision)
        errors.append(((ExactLinear.apply(x, weight) - exact).norm() / exact.norm()).item())
    torch.set_float32_matmul_precision("highest")
    assert errors[0] > 2**-14 and errors[1] < 2**-20


def test_jitter_is_for_training_and_keeps_its_bounds():
    """On one channel at a time the logits show the factor itself: uniform in 0.9 to 1.1."""
    router, x = make_router(router_jitter_noise=0.1, hidden_size=24), torch.eye(24).repeat(20, 1)
    kept = x.clone()
    calm = make_router(hidden_size=24)(x)
    assert all(torch.equal(a, b) for a, b in zip(router.eval()(x), calm, strict=True))
    factor = router.train()(x).logits / calm.logits
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))  # it is the input that is shaken
    assert 0.9 - 1e-5 <= factor.min() < 0.91 and 1.09 < factor.max() <= 1.1 + 1e-5
    assert abs(factor[:, 0].std() - 0.1 / 3**0.5) < 0.006 and abs(factor[:, 0].mean() - 1) < 0.01
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    "settings", [{}, {"scoring_func": "softmax"}, {"scoring_func": "softmax", "norm_topk_prob": False}]
)
def test_the_weights_teach_the_router(settings):
    router = make_router(**settings)
    routing = router(torch.randn(9, 24))
    (routing.weights * torch.randn(9, 4)).sum().backward()
    assert router.weight.grad.norm() > 1e-2


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_one_normed_expert_teaches_it_nothing_and_that_is_why_it_is_refused(scoring):
    """s / s is 1 whatever s is; without normalisation the same router learns."""
    slopes = []
    for normed in (True, False):
        router = make_router(0.0, scoring_func=scoring, num_experts_per_tok=2)
        router.config.num_experts_per_tok, router.config.norm_topk_prob = 1, normed  # past the check
        routing = router(torch.randn(9, 24, generator=torch.Generator().manual_seed(0)))
        (routing.weights * torch.arange(1.0, 10.0)[:, None]).sum().backward()
        slopes.append(router.weight.grad.norm())
    assert slopes[0] < 1e-4 * slopes[1]
