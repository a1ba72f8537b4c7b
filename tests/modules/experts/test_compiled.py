"""A model with experts under `torch.compile`: it equals the plain one, and no step compiles anew."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model.tinyseek import TinySeek
from modules.experts.router import TopkRouter
from tests.modules.tools import shake, small_config

MOE = {"n_routed_experts": 6, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8}


@pytest.mark.slow
def test_a_compiled_model_with_experts_equals_the_plain_one():
    """The counts of tokens change from step to step. No C++ compiler: what Inductor would get runs as it
    is."""
    model = shake(TinySeek(small_config(num_hidden_layers=1, **MOE)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled, frames = torch.compile(model, backend=counter), []
    for step in range(3):
        ids = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(step))
        runs = []
        for runner in (compiled, model):
            loss = runner(ids, labels=ids).loss_sum
            runs.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        for ours, plain in zip(*runs, strict=True):
            assert (ours - plain).norm() <= 1e-5 * plain.norm()
        frames.append(counter.frame_count)
    assert frames[0] > 1 and frames[1:] == frames[:1] * 2


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_of_the_router_is_exact_under_autocast(compiled):
    """A compiler traces the backward pass under the autocast of the forward pass. fp32 keeps 24 bits, so sums
    of 512 products are right to about 1e-6; bf16, with 8 bits, would be off by 3e-3."""
    torch.manual_seed(0)
    router = shake(TopkRouter(small_config(hidden_size=32, **MOE)))
    x, upstream = torch.randn(512, 32), torch.randn(512, 2)

    def slopes(router, run, x, cast):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            weights = run(x).weights
        return torch.autograd.grad((weights * upstream.to(weights)).sum(), (x, router.weight))

    exact = copy.deepcopy(router).double()
    run = torch.compile(router, backend="aot_eager") if compiled else router
    right = slopes(exact, exact, x.double(), False)
    for ours, expected in zip(slopes(router, run, x, True), right, strict=True):
        assert (ours - expected).norm() < 1e-6 * expected.norm()
