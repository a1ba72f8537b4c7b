"""Both paths through the experts against an obvious loop over tokens; the block against Hugging Face's."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, Dots1Config, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from modules.experts import grouped, moe as moe_file
from modules.experts.grouped import grouped_experts, sort_rows
from modules.experts.moe import MoE, loop_experts
from tests.modules.tools import shake, small_config

PATHS = [loop_experts, grouped_experts]
SHAPES = {  # N, C, E, K, F
    "plain": (7, 6, 5, 2, 4),
    "odd": (9, 5, 3, 2, 7),
    "one token": (1, 6, 4, 2, 3),
    "one token, one expert, one channel": (1, 1, 1, 1, 1),
    "fewer rows than experts": (2, 4, 16, 3, 5),
    "every expert": (5, 6, 4, 4, 3),
    "one of many": (6, 4, 8, 1, 2),
    "blank rows": (150, 3, 3, 2, 5),
    "many blank rows": (700, 2, 4, 2, 1),
}


def make_experts(N, C, E, K, F, seed=0, dtype=torch.float64, idle=()):
    """Random inputs of a path; experts in `idle` get no token."""
    torch.manual_seed(seed)
    scores = torch.rand(N, E)
    scores[:, list(idle)] = -1
    indices = scores.topk(K).indices[:, torch.randperm(K)]
    x, weights = torch.randn(N, C, dtype=dtype), torch.rand(N, K, dtype=dtype) + 0.1
    gate_up, down = torch.randn(E, 2 * F, C, dtype=dtype), torch.randn(E, C, F, dtype=dtype)
    return x, indices, weights, gate_up, down


def leaves(inputs):
    """The four of the inputs that have a gradient, as leaves."""
    x, indices, *rest = (t.detach().clone() for t in inputs)
    for tensor in (x, *rest):
        tensor.requires_grad_()
    return x, indices, *rest


def slow_experts(x, indices, weights, gate_up, down):
    """One token, one expert and one inner channel after the other. Any dtype with gradients."""
    rows, width = [], down.shape[2]
    for n in range(len(x)):
        row = torch.zeros_like(x[n])
        for slot, e in enumerate(indices[n].tolist()):
            for f in range(width):
                gate, up = (gate_up[e, f] * x[n]).sum(), (gate_up[e, width + f] * x[n]).sum()
                row = row + weights[n, slot] * gate / (1 + torch.exp(-gate)) * up * down[e, :, f]
        rows.append(row)
    return torch.stack(rows)


def gradients(path, inputs, upstream):
    """Value, and the gradients of x, weights, gate_up and down."""
    x, indices, *rest = leaves(inputs)
    y = path(x, indices, *rest)
    grads = torch.autograd.grad(y, (x, *rest), upstream.to(y.dtype), allow_unused=True)
    return y, [torch.zeros_like(t) if g is None else g for t, g in zip((x, *rest), grads, strict=True)]


def like_the_loop(inputs) -> list:
    """Value and gradients of every path are those of the loop over tokens; returns the gradients of each."""
    upstream = torch.randn_like(inputs[0])
    slow, expected = gradients(slow_experts, inputs, upstream)
    results = []
    for path in PATHS:
        y, grads = gradients(path, inputs, upstream)
        torch.testing.assert_close(y, slow, rtol=1e-13, atol=1e-13)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        results.append(grads)
    return results


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradient_are_those_of_the_loop_over_tokens(shape):
    assert len(like_the_loop(make_experts(*shape))) == len(PATHS)


@pytest.mark.parametrize("idle", [(0,), (4,), (1, 2), (0, 2, 4)])
def test_an_expert_that_gets_nothing_gets_a_gradient_of_zeros(idle):
    inputs = make_experts(6, 4, 5, 2, 3, idle=idle)
    for grads in like_the_loop(inputs):
        assert not grads[2][list(idle)].any() and not grads[3][list(idle)].any()


@pytest.mark.parametrize("shape", [(5, 3, 4, 2, 3), (1, 3, 4, 2, 2), (3, 2, 2, 2, 3)])
def test_the_derivation_by_hand_passes_gradcheck(shape):
    x, indices, *rest = leaves(make_experts(*shape))
    assert torch.autograd.gradcheck(lambda x, *rest: grouped_experts(x, indices, *rest), (x, *rest))


@pytest.fixture
def one_kernel(monkeypatch):
    """Send `grouped_experts` through `F.grouped_mm`, which runs on a CPU too; count its calls."""
    calls = []
    kernel = F.grouped_mm
    monkeypatch.setattr(grouped, "has_kernel", lambda gate_up, down: True)
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **named: calls.append(a) or kernel(*a, **named))
    return calls


@pytest.mark.parametrize("idle", [(), (0, 3)])
def test_pytorchs_grouped_product_gives_the_same(idle, one_kernel):
    """The path of GPUs, on a CPU: two products forward, four backward. In bf16 the weights are rounded to 8
    bits, so a per cent is all that can be asked for."""
    inputs = make_experts(11, 8, 6, 3, 16, idle=idle)
    upstream = torch.randn_like(inputs[0])
    slow, expected = gradients(slow_experts, inputs, upstream)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        single = [t if t.dtype == torch.int64 else t.to(dtype) for t in inputs]
        single[2] = inputs[2].float()
        one_kernel.clear()
        y, grads = gradients(grouped_experts, single, upstream)
        assert len(one_kernel) == 6
        for a, b in zip([y, *grads], [slow, *expected], strict=True):
            assert (a - b).norm() < bound * b.norm()


def test_a_kernel_that_leaves_garbage_for_idle_experts_does_not_teach_them(one_kernel, monkeypatch):
    """pytorch#172439: on some GPUs the gradient of an empty group is whatever was in memory."""
    kernel = F.grouped_mm

    def leaves_garbage(left, right, offs):
        out = kernel(left, right, offs=offs)
        if right.dim() == 2:  # a gradient of matrices, one for each expert
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    monkeypatch.setattr(F, "grouped_mm", leaves_garbage)
    single = [t if t.dtype == torch.int64 else t.float() for t in make_experts(11, 8, 6, 3, 16, idle=(0, 3))]
    _, (*_, gate_up, down) = gradients(grouped_experts, single, torch.ones(11, 8))
    for grad in (gate_up, down):
        assert grad.isfinite().all() and not grad[[0, 3]].any() and grad[1].any()


@pytest.mark.parametrize("capability, width, dtype, taken", [
    ((9, 0), 16, torch.bfloat16, True),
    ((8, 0), 16, torch.bfloat16, True),
    ((7, 5), 16, torch.bfloat16, False),  # Turing
    ((9, 0), 12, torch.bfloat16, False),  # rows of 24 bytes
    ((9, 0), 16, torch.float32, False),
])  # fmt: skip
def test_the_kernel_is_for_gpus_that_have_it(capability, width, dtype, taken, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    matrices = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(4, 32, width))
    assert grouped.has_kernel(matrices, matrices) == taken
    assert not grouped.has_kernel(torch.zeros(4, 32, 16).bfloat16(), torch.zeros(4, 16, 16).bfloat16())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(150, 16, 3, 2, 4), (5, 24, 6, 2, 15)])
def test_bf16_is_near_the_exact_answer(path, shape):
    """Under autocast and in a model in bf16; fp32 weights get fp32 gradients. Rounding weights alone moves
    each by up to 1/256, so that a per cent is all that can be asked for."""
    exact = make_experts(*shape)
    upstream = torch.randn_like(exact[0])
    slow, expected = gradients(slow_experts, exact, upstream)
    single = [t if t.dtype == torch.int64 else t.float() for t in exact]
    half = [t if t.dtype == torch.int64 else t.bfloat16() for t in exact]
    half[2] = single[2]  # a router gives fp32 in any model
    for inputs, cast in ((single, True), (half, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y, grads = gradients(path, inputs, upstream)
        assert y.dtype == torch.bfloat16
        assert [g.dtype for g in grads] == [t.dtype for t in inputs if t.dtype != torch.int64]
        for a, b in zip([y, *grads], [slow, *expected], strict=True):
            assert (a - b).norm() < 0.01 * b.norm()


def test_in_bf16_only_inputs_and_results_of_products_are_rounded():
    """With matrices of ones and one channel y = g silu(x) x, rounded once after PyTorch's bf16 functions.
    The sum over rows and that of dg over channels are not rounded on the way."""
    torch.manual_seed(0)
    x, weights = torch.rand(2000, 1).bfloat16() + 0.5, torch.rand(2000, 1, requires_grad=True)
    ones = torch.ones(1, 2, 1, dtype=torch.bfloat16), torch.ones(1, 1, 1, dtype=torch.bfloat16)
    y = grouped_experts(x, torch.zeros(2000, 1, dtype=torch.long), weights, *ones)
    exact = (F.silu(x) * x).double() * weights.detach().bfloat16()
    assert (y.double() / exact - 1).abs().max() <= 1 / 256
    y.sum().backward()
    assert torch.equal(weights.grad, (F.silu(x) * x).float())
    indices, weights = torch.arange(64).expand(2000, 64), torch.rand(2000, 64)
    y = grouped_experts(x, indices, weights, *(stack.expand(64, -1, -1) for stack in ones))
    exact = ((F.silu(x) * x).double() * weights.bfloat16()).sum(dim=1, keepdim=True)
    assert (y.double() / exact - 1).abs().max() < 1.001 / 256  # one rounding, of the sum; 64 are off by more
    x, ones = x.new_ones(1, 1), (x.new_ones(1, 1000, 1), x.new_ones(1, 1, 500))
    weights = torch.ones(1, 1, requires_grad=True)
    grouped_experts(x, torch.zeros(1, 1, dtype=torch.long), weights, *ones).sum().backward()
    silu = F.silu(x[0, 0]).double()
    assert abs(weights.grad.item() / (500 * silu) - 1) < 1 / 256  # a sum in bf16 would stop growing at 256 x


@pytest.mark.parametrize("path", PATHS)
def test_twice_the_same_bits(path):
    inputs = make_experts(200, 16, 8, 3, 12, dtype=torch.float32)
    upstream = torch.randn_like(inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        runs = [gradients(path, inputs, upstream) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_second_backward_pass_finds_what_the_first_one_found(dtype):
    """The first one works in place, but not on what is saved."""
    x, indices, *rest = leaves(make_experts(150, 16, 8, 3, 12, dtype=dtype))
    y = grouped_experts(x, indices, rest[0].float() if dtype == torch.bfloat16 else rest[0], *rest[1:])
    runs = [torch.autograd.grad(y.sum(), (x, *rest), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_without_gradients_under_checkpoints_and_with_strided_tensors(path):
    inputs = make_experts(9, 4, 5, 2, 3)
    slow, expected = gradients(slow_experts, inputs, torch.ones(9, 4))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(path(*leaves(inputs)), slow, rtol=1e-13, atol=1e-13)
    for reentrant in (False, True):
        x, indices, *rest = leaves(inputs)
        checkpoint(path, x, indices, *rest, use_reentrant=reentrant).sum().backward()  # an expanded gradient
        for a, b in zip((x, *rest), expected, strict=True):
            torch.testing.assert_close(a.grad, b, rtol=1e-12, atol=1e-12)
    x, indices, *rest = inputs
    wide = torch.stack([x, -x], dim=-1)[..., 0]
    y = path(wide, indices.T.contiguous().T, *(t.mT.contiguous().mT for t in rest))
    torch.testing.assert_close(y, slow, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (3,), (2, 3), (0, 1)])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(path, frozen):
    """Any of x, weights, gate_up and down."""
    x, indices, *rest = inputs = leaves(make_experts(9, 4, 5, 2, 3))
    _, expected = gradients(slow_experts, inputs, torch.ones(9, 4))
    for n in frozen:
        (x, *rest)[n].requires_grad_(False)
    path(x, indices, *rest).sum().backward()
    for n, tensor in enumerate((x, *rest)):
        if n in frozen:
            assert tensor.grad is None
        else:
            torch.testing.assert_close(tensor.grad, expected[n], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("learning", list(itertools.product((False, True), repeat=4))[1:])
def test_what_is_frozen_costs_nothing(learning):
    """Experts under LoRA, say: not even computed. Products of the backward pass, in N K C F multiplications:
    1 for d inner, 2 for dx, 2 for dU, 1 for dD."""
    x, indices, *rest = make_experts(9, 4, 5, 2, 3)
    for tensor, learns in zip((x, *rest), learning, strict=True):
        tensor.requires_grad_(learns)
    y = grouped_experts(x, indices, *rest)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert [tensor.grad is not None for tensor in (x, *rest)] == list(learning)
    learns_x, learns_weights, learns_gate_up, learns_down = learning
    inner = learns_x or learns_weights or learns_gate_up
    products = inner + 2 * learns_x + 2 * learns_gate_up + learns_down
    assert counter.get_total_flops() == products * 2 * 9 * 2 * 4 * 3


@pytest.mark.parametrize("N, E, K", [(1, 4, 2), (2, 16, 3), (150, 3, 2), (700, 4, 2), (2048, 16, 4)])
def test_every_assignment_has_a_row_of_its_own_among_those_of_its_expert(N, E, K):
    """And sizes are round: few different shapes, few blank rows. One kernel for all needs no blank rows."""
    _, indices, *_ = make_experts(N, 1, E, K, 1)
    counts, mean = indices.flatten().bincount(minlength=E), N * K // E
    for one_kernel in (False, True):
        position, token, blank_rows, sizes = sort_rows(indices, E, one_kernel)
        sizes = torch.as_tensor(sizes)
        assert position.shape == indices.shape and position.unique().numel() == N * K
        assert torch.equal(token[position], torch.arange(N)[:, None].expand(N, K))
        assert sorted([*position.flatten().tolist(), *blank_rows.tolist()]) == list(range(sizes.sum()))
        ends = sizes.cumsum(0)
        assert (position >= (ends - sizes)[indices]).all() and (position < ends[indices]).all()
        for e in range(E):  # in the order of tokens
            assert (position[indices == e].diff() == 1).all()
        blank = sizes - counts
        assert (blank >= 0).all() and (blank <= (0 if one_kernel else mean / 16)).all()
        if mean >= 128 and not one_kernel:
            assert (sizes % 4 == 0).all() and len(set((sizes // max(1, mean // 64)).tolist())) <= 24


@pytest.mark.parametrize("path", PATHS)
def test_an_overflow_of_one_token_reaches_its_own_experts_only(path):
    """In fp16 the product of token 0 overflows in experts it did not choose. Their blank rows must not hold
    it: infinity times a weight of zero is NaN, and no gradient scaler can cure that."""
    N, E, C, width = 600, 3, 4, 5
    indices = torch.arange(N)[:, None] % E
    assert path is loop_experts or len(sort_rows(indices[: N - 2], E).blank)
    x, weights = torch.ones(N - 2, C), torch.ones(N - 2, 1)
    x[0] = 300.0
    gate_up = torch.full((E, 2 * width, C), 0.01)
    gate_up[1:] = 1.0  # 1200 * 1200 is above the largest number of fp16, 65504
    inputs = (x.half(), indices[: N - 2], weights, gate_up.half(), torch.full((E, C, width), 0.01).half())
    y, grads = gradients(path, inputs, torch.ones(N - 2, C))
    assert y.isfinite().all() and all(grad.isfinite().all() for grad in grads)
    x = inputs[0].clone()
    x[0] = torch.inf
    ill = path(x, *inputs[1:])
    assert torch.equal(ill[1:], y[1:]) and not ill[0].isfinite().any()


def block(path="auto", **settings):
    """A block with random weights and correction bias; its experts are narrow."""
    values = {"n_routed_experts": 12, "moe_intermediate_size": 10, "moe_implementation": path} | settings
    ours = shake(MoE(small_config(**values)))
    ours.gate.e_score_correction_bias.copy_(torch.randn(12, generator=torch.Generator().manual_seed(7)) * 0.3)
    return ours


def same_as(theirs, ours, their_experts=None):
    """Output, and the gradients of x and of every parameter, for 3 rows of 5 tokens."""
    theirs.load_state_dict(ours.state_dict(), strict="e_score_correction_bias" in dir(theirs.gate))
    x = torch.randn(3, 5, 24, requires_grad=True, generator=torch.Generator().manual_seed(3))
    y, routing = ours(x)
    expected = theirs(x)
    assert y.shape == x.shape and routing.indices.shape[0] == 15
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    upstream, twins = torch.randn_like(y), dict(theirs.named_parameters())
    assert set(twins) == {name for name, _ in ours.named_parameters()}
    mine = torch.autograd.grad(y, (x, *ours.parameters()), upstream)
    names = [name for name, _ in ours.named_parameters()]
    other = torch.autograd.grad(expected, (x, *(twins[name] for name in names)), upstream)
    for name, a, b in zip(["x", *names], mine, other, strict=True):
        assert b.abs().max() > 1e-3, name
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("path", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("chosen, normed", [(1, False), (4, True), (4, False), (12, True)])
def test_with_a_softmax_the_block_is_qwen3s(path, chosen, normed):
    same = {"num_experts_per_tok": chosen, "norm_topk_prob": normed, "hidden_size": 24}
    ours = block(path, scoring_func="softmax", n_shared_experts=0, **same)
    ours.gate.e_score_correction_bias.zero_()
    assert ours.shared_experts is None
    settings = Qwen3MoeConfig(num_experts=12, moe_intermediate_size=10, **same)
    settings._experts_implementation = "eager"
    same_as(Qwen3MoeSparseMoeBlock(settings), ours)


@pytest.mark.parametrize("path", ["auto", "grouped", "loop"])
@pytest.mark.parametrize("groups, kept, chosen, shared", [(1, 1, 4, 2), (3, 2, 5, 1), (4, 1, 3, 3)])
@pytest.mark.parametrize("twin, settings", [(DeepseekV3MoE, DeepseekV3Config), (Dots1MoE, Dots1Config)])
def test_with_sigmoids_the_block_is_deepseeks_and_dots1s(twin, settings, groups, kept, chosen, shared, path):
    same = {
        "n_routed_experts": 12, "num_experts_per_tok": chosen, "n_group": groups, "topk_group": kept,
        "n_shared_experts": shared, "moe_intermediate_size": 10, "hidden_size": 24,
        "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    }  # fmt: skip
    theirs = settings(**same)
    theirs._experts_implementation = "eager"
    same_as(twin(theirs), block(path, **same))


def test_the_path_is_the_one_that_was_asked_for(monkeypatch):
    """`auto` sorts where there are at least as many rows as experts, and loops for the few of generation."""
    taken = []
    for name in ("loop_experts", "grouped_experts"):
        path = getattr(moe_file, name)
        monkeypatch.setattr(moe_file, name, lambda *a, name=name, path=path: taken.append(name) or path(*a))
    for path, tokens in (("loop", 9), ("grouped", 1), ("auto", 3), ("auto", 2), ("auto", 1)):
        block(path, num_experts_per_tok=4)(torch.randn(1, tokens, 24))
    assert taken == ["loop_experts", *["grouped_experts"] * 2, *["loop_experts"] * 2]


def test_shared_experts_are_added_and_see_every_token():
    ours, x = block(), torch.randn(2, 4, 24)
    y, _ = ours(x)
    ours.shared_experts.down_proj.weight.data.zero_()
    routed, _ = ours(x)
    ours.shared_experts = None
    torch.testing.assert_close(ours(x)[0], routed, rtol=0, atol=1e-6)
    assert ((y - routed).abs().amax(-1) > 1e-3).all()


def test_jitter_reaches_the_router_and_not_the_experts():
    """With every expert chosen at fixed weights nothing of it is left in the output."""
    ours = block(router_jitter_noise=0.5, num_experts_per_tok=12, norm_topk_prob=True)
    ours.gate.weight.data.zero_()
    x = torch.randn(2, 4, 24)
    torch.testing.assert_close(ours.train()(x)[0], ours.eval()(x)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", ["grouped", "loop"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scoring_func": "softmax"},
        {"scoring_func": "softmax", "num_experts_per_tok": 1, "norm_topk_prob": False},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
    ],
)
def test_a_loss_on_the_output_teaches_the_router(path, settings):
    ours = block(path, **settings)
    y, _ = ours(torch.randn(2, 8, 24))
    (y * torch.randn_like(y)).sum().backward()
    assert ours.gate.weight.grad.norm() > 1e-2
