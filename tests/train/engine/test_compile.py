"""`train.compile=true`: the compiled model is trained as the plain one is.

The backend `aot_eager` runs the traced operations one by one: tracing, graph breaks, checkpoints and the
backward pass are those of every compiled run, without the half minute in which a C++ compiler builds kernels.
"""

import copy
import shutil
import sys

import pytest
import torch

from model.tinyseek import TinySeek
from modules.mlp import SwiGLU
from modules.norm import RMSNorm
from tests.modules import tools
from tests.train.tools import largest_difference, make_trainer, small_config, weights_of
from utils.log import read_log

COMPILE = torch.compile
COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@pytest.mark.slow
def test_compiled_training_equals_plain_training(tmp_path, monkeypatch):
    """One layer, four steps. Checkpoints keep the plain names."""
    monkeypatch.setattr(torch, "compile", lambda model: COMPILE(model, backend="aot_eager"))
    weights, losses = [], []
    for compiled in ("false", "true"):
        config = small_config("model.num_hidden_layers=1", f"train.compile={compiled}", steps=4)
        trainer = make_trainer(tmp_path / compiled, config)
        trainer.run()
        assert (trainer.runner is trainer.model) == (compiled == "false")
        weights.append(weights_of(trainer.model))
        losses.append(
            [row["loss"] for row in read_log(tmp_path / compiled / "toy" / "log.txt") if "loss" in row]
        )
    assert largest_difference(*weights) < 2e-6  # sums in another order
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=2e-5)


@pytest.mark.slow
def test_compiled_under_autocast_every_gradient_is_the_plain_one():
    """AOTAutograd traces the backward pass under the forward's autocast. A backward pass that leaves its
    dtype open then runs in bf16: that of norms did, and every gradient was off by 0.2 to 0.9 %. This backend
    runs the traced operations one by one, so that nothing but their dtype can differ."""
    torch.manual_seed(0)
    tokens = 150  # attention by blocks of queries
    config = tools.small_config(num_hidden_layers=1, max_position_embeddings=160)
    plain = tools.shake(TinySeek(config), scale=0.1)
    ids, gradients = torch.randint(0, 61, (2, tokens + 1)), []
    for model in (plain, copy.deepcopy(plain)):
        runner = torch.compile(model, backend="aot_eager") if gradients else model
        with torch.autocast("cpu", torch.bfloat16):
            loss = runner(ids[:, :-1], labels=ids[:, 1:]).loss_sum
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for name, a, b in zip(dict(plain.named_parameters()), *gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm(), name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or not COMPILER, reason="torch.compile needs a C++ compiler")
def test_fused_kernels_of_a_block_without_attention(tmp_path, monkeypatch):
    """The default backend, on a norm and a feed-forward: a whole model has twenty kernels more to build. Sums
    are fused, so they round differently."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for a few kernels
    torch.manual_seed(0)
    block = torch.nn.Sequential(RMSNorm(16), SwiGLU(16, 24))
    x, results = torch.randn(2, 8, 16), []
    for runner in (block, COMPILE(block)):
        y = runner(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(block.parameters()))])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
