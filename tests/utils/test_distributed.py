"""Two real processes over gloo: their sums, their agreement, and the gradient that one process would have."""

import time

import pytest
import torch
from torch import nn

from tests.processes import fork
from utils import distributed
from utils.errors import UserError


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    world = distributed.start()
    assert (world.rank, world.size, world.local_rank, world.is_first) == (0, 1, 0, True)
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 2.0)
    distributed.sum_gradients([weight])
    assert weight.grad.tolist() == [2, 2, 2]
    assert distributed.sum_scalars([1, 2.5]) == [1.0, 2.5]
    distributed.broadcast_parameters(nn.Linear(1, 1))
    distributed.same_on_all_ranks("x")
    distributed.barrier()
    with distributed.rank_zero_first():
        pass
    distributed.finish()


def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(UserError, match="nproc_per_node"):
        distributed.start("cuda")


def two_processes(folder):
    """What each of two processes does."""
    world = distributed.start("cpu")
    assert world.size == 2 and world.is_first == (world.rank == 0) and world.local_rank == world.rank

    # only one at a time, and the first process first
    with distributed.rank_zero_first():
        if world.is_first:
            time.sleep(0.3)
            (folder / "made").touch()
        assert (folder / "made").exists()

    # weights start equal, buffers too
    torch.manual_seed(world.rank)
    layers = nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.Sequential(*layers)
    model[1].running_mean.fill_(world.rank)
    model[4].requires_grad_(False)
    distributed.broadcast_parameters(model)
    assert not model[1].running_mean.any()

    # each takes half of the batch; the loss is divided by what both have together
    torch.manual_seed(9)
    x, y = torch.randn(10, 6, dtype=torch.float64), torch.randn(10, 3, dtype=torch.float64)
    model.double().eval()
    run = lambda x: model[2](model[1](model[0](x)))  # noqa: E731
    mine = slice(0, 4) if world.is_first else slice(4, 10)
    (count,) = distributed.sum_scalars([float(len(x[mine]))])
    assert count == 10
    loss = (run(x[mine]) - y[mine]).pow(2).sum() / count
    if not world.is_first:  # a layer that only one process uses
        loss = loss + model[3](y[mine]).sum()
    loss.backward()
    assert (model[3].weight.grad is None) == world.is_first
    distributed.sum_gradients(model.parameters())
    assert model[4].weight.grad is None
    summed = [p.grad.clone() for p in model[:4].parameters()]

    # the whole batch in one process
    model.zero_grad()
    ((run(x) - y).pow(2).sum() / 10 + model[3](y[4:]).sum()).backward()
    for one, two in zip(model[:4].parameters(), summed):
        torch.testing.assert_close(two, one.grad, rtol=1e-12, atol=1e-12)

    # without gradient anywhere: None stays None, as in one process
    model.zero_grad()
    distributed.sum_gradients(model.parameters())
    assert all(p.grad is None for p in model.parameters())

    big = float(2**53 - 2)  # beyond fp32
    assert distributed.sum_scalars([big / 2, world.rank]) == [big, 1.0]
    distributed.same_on_all_ranks("the same")
    try:
        distributed.same_on_all_ranks(f"rank {world.rank}", "trainable parameters")
    except UserError as error:
        assert "trainable parameters" in str(error)
        (folder / f"done{world.rank}").touch()
    distributed.barrier()
    distributed.finish()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    done = fork(two_processes, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done0").exists()
    assert (tmp_path / "done1").exists()
