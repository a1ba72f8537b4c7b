"""`train.compile=true`: the compiled model learns what the plain one learns."""

import shutil
import sys

import pytest

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
