"""Rounding in training against torch's fake quantisation: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modules.experts.moe import Experts, loop_experts
from modules.quantized.fake import FakeExperts, FakeLinear, FakeQuantize

KINDS = ("ste", "lsq")


def linear(out=6, width=24, bias=False, seed=0) -> nn.Linear:
    """A layer whose numbers are of many sizes."""
    torch.manual_seed(seed)
    layer = nn.Linear(width, out, bias=bias)
    layer.weight.data = torch.randn(out, width) ** 3
    return layer


@pytest.mark.parametrize("bits", [4, 8])
def test_value_and_gradients_are_torchs(bits):
    """LSQ's from the function with learnable scales, here small ones; the straight-through one from
    that with fixed scales. torch adds up the gradient of a scale in another order: the bound is a few
    roundings of its largest terms."""
    torch.manual_seed(1)
    groups, scales = torch.randn(10, 16) * 3, torch.rand(10) * 20 / 2**bits + 0.01
    low, high, zeros = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.zeros(10)
    upstream, found = torch.randn(10, 16), []
    for which in ("ours", "learned", "fixed"):
        w, s = groups.clone().requires_grad_(), scales.clone().requires_grad_(which != "fixed")
        if which == "ours":
            y = FakeQuantize.apply(w, s, bits)
        elif which == "learned":
            y = torch._fake_quantize_learnable_per_channel_affine(
                w, s, zeros, 0, low, high, (16 * high) ** -0.5
            )
        else:
            y = torch.fake_quantize_per_channel_affine(w, s, zeros.int(), 0, low, high)
        y.backward(upstream)
        found.append((y.detach(), w.grad, s.grad))
    for y, grad, _ in found[1:]:
        assert torch.equal(found[0][0], y) and torch.equal(found[0][1], grad)
    assert (found[0][1] == 0).any() and (found[0][1] != 0).any()
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [None, 8])
def test_scales_of_the_largest_number_are_torchaos(group):
    """Straight-through training computes what `IntxWeightOnlyConfig` leaves after training, with scales in
    fp32 as torchao has them."""
    torchao = pytest.importorskip("torchao.quantization")
    layer = linear()
    fake = FakeLinear(layer, 4, group, "ste")
    fake.scale_dtype = torch.float32
    model = nn.Sequential(nn.Linear(24, 6, bias=False))
    model[0].weight.data = layer.weight.data.clone()
    grain = torchao.PerGroup(group) if group else torchao.PerAxis(0)
    torchao.quantize_(model, torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=grain))
    torch.testing.assert_close(fake.rounded("weight"), model[0].weight.dequantize().float(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_is_what_was_trained(kind):
    """After some steps, the layers on codes give the same bits. Names of weights stay."""
    layer, x = linear(bias=False), torch.randn(7, 24)
    fake = FakeLinear(layer, 4, 8, kind)
    names = {"weight"} | ({"weight_log_scale"} if kind == "lsq" else set())
    assert set(dict(fake.named_parameters())) == names and fake.weight is layer.weight
    optimizer = torch.optim.AdamW(fake.parameters(), lr=0.05)
    before = fake(x).detach()
    for _ in range(3):
        loss = fake(x).square().sum()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert not torch.equal(fake(x), before)
    assert torch.equal(fake(x), fake.quantized()(x))

    experts = Experts(3, 8, 4, "loop")
    for weight in experts.parameters():
        weight.data.normal_()
    fakes = FakeExperts(experts, 4, 4, kind)
    x, indices, weights = torch.randn(9, 8), torch.randint(0, 3, (9, 2)), torch.rand(9, 2)
    y = fakes(x, indices, weights)
    assert torch.equal(y, fakes.quantized()(x, indices, weights))
    matrices = [torch.stack([FakeLinear(slice_of(part, e), 4, 4, kind).rounded("weight") for e in range(3)])
                for part in experts.parameters()]  # fmt: skip
    assert torch.equal(y, loop_experts(x, indices, weights, *matrices))
    y.sum().backward()
    assert all(parameter.grad.any() for parameter in fakes.parameters())


def slice_of(stack, expert) -> nn.Linear:
    """One expert's matrix as a layer."""
    layer = nn.Linear(*stack.shape[:0:-1], bias=False)
    layer.weight.data = stack.data[expert]
    return layer


def test_the_gradient_of_log_scales_follows_the_chain_rule():
    """d/d log s = s d/ds, with d/ds from torch; fp16 storage passes it through unrounded: a gradient of 1e-9
    would be zero in fp16."""
    fake = FakeLinear(linear(3, 8), 4, 4, "lsq")
    upstream = torch.randn(3, 8) * 1e-9
    fake.rounded("weight").backward(upstream)
    scales = fake.weight_log_scale.detach().exp().half().float().requires_grad_()
    groups = fake.weight.detach().view(-1, 4)
    y = torch._fake_quantize_learnable_per_channel_affine(
        groups, scales, torch.zeros(6), 0, -8, 7, (4 * 7) ** -0.5
    )
    y.backward(upstream.view(-1, 4))
    expected = scales.grad * fake.weight_log_scale.detach().exp()
    assert expected.any()
    torch.testing.assert_close(fake.weight_log_scale.grad, expected, rtol=1e-3, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_gives_zeros(kind):
    layer = linear()
    layer.weight.data[2] = 0
    fake = FakeLinear(layer, 4, 8, kind)
    x = torch.randn(5, 24)
    fake(x).sum().backward()
    assert not fake(x)[:, 2].any() and all(torch.isfinite(p.grad).all() for p in fake.parameters())
    assert torch.equal(fake(x), fake.quantized()(x))


def test_groups_that_do_not_divide_a_row_are_refused():
    with pytest.raises(ValueError, match="groups of 7"):
        FakeLinear(linear(), 4, 7, "ste")


def test_gradients_of_the_input_and_the_bias_are_plain():
    """Those of a plain layer with the rounded weight."""
    fake = FakeLinear(linear(bias=True), 8, None, "lsq")
    x = torch.randn(5, 24, requires_grad=True)
    fake(x).square().sum().backward()
    mine, bias = x.grad.clone(), fake.bias.grad.clone()
    fake.bias.grad = x.grad = None
    F.linear(x, fake.rounded("weight").detach(), fake.bias).square().sum().backward()
    assert torch.equal(mine, x.grad) and torch.equal(bias, fake.bias.grad)
