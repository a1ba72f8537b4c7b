"""`train.compile=true`: the compiled model is trained as the plain one is."""

import copy
import shutil
import sys

import pytest
import torch

from model.tinyseek import TinySeek
from tests.modules import tools
from tests.train.tools import largest_difference, make_trainer, small_config, weights_of
from utils.log import read_log

COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32" or not COMPILER, reason="torch.compile needs a C++ compiler")
def test_compiled_training_equals_plain_training(tmp_path, monkeypatch):
    """One layer, four steps; kernels that fuse sums round differently. Checkpoints keep the plain names."""
    monkeypatch.setattr("train.engine.trainer.plot_curves", lambda log, png: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # no pool of processes for a few kernels
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
    assert largest_difference(*weights) < 2e-5
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


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
