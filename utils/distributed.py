"""Data parallelism by hand: every process works on its own micro-batches, and the gradients are added up.

    torchrun --nproc_per_node 2 train/pre_train.py

Why not `DistributedDataParallel`? It hooks into the model's forward and into each gradient as it is made. A
loss term that goes around the forward (a balance loss read from a layer, a second head called directly), a
parameter that gets no gradient in one process (an expert without tokens), or several backward passes per step
need care there, and where care is missing the processes drift apart without an error. Here nothing is hooked:
after all backward passes of a step, `sum_gradients` adds up what is there, once. It gives up some overlap of
computing and sending, and can be read in a minute.

The loss is divided by the number of supervised tokens of **all** processes, so the sum of gradients is the
gradient of the whole batch: no further division.

Every function here works without other processes too: then it does nothing.
"""

import hashlib
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from utils.errors import UserError

BUCKET_BYTES = 32 * 2**20  # gradients travel in flat pieces of this size: few messages, little extra memory


@dataclass(frozen=True)
class World:
    """The processes of this run: `rank` of `size`, and `local_rank` within this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """True in the one process that prints, logs and saves."""
        return self.rank == 0


def start(device_type: str = "cpu") -> World:
    """Join the processes that `torchrun` started (it sets RANK, WORLD_SIZE, LOCAL_RANK); alone without it.

    `device_type` is where the gradients will be: `cuda` exchanges over nccl, everything else over gloo.
    Raises `UserError` if there are more processes than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    world = World(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device_type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {world.local_rank} of this machine has no GPU, there are "
                f"{torch.cuda.device_count()}: lower --nproc_per_node"
            )
        torch.cuda.set_device(world.local_rank)
    if world.size > 1:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return world


def finish() -> None:
    """Leave the group of processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process with `status`, together with all others.

    Trap: PyTorch's threads may outlive the interpreter and abort it on its way out, and the status is lost.
    So with several processes there is no way out: what is open is flushed, and the process is gone.
    """
    if dist.is_initialized():
        dist.barrier()  # the first process may still be writing, and the launcher ends all when one ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def exchange_device() -> torch.device:
    """Where small tensors must be to travel."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def sum_gradients(parameters) -> None:
    """Replace each gradient by its sum over all processes: once per optimizer step, after the last backward.

    A parameter without gradient here, but with one in another process, takes part as zeros, because all
    processes must send the same messages. One without gradient anywhere keeps None, as in a run of one
    process.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    has_gradient = torch.tensor([float(p.grad is not None) for p in parameters], device=exchange_device())
    dist.all_reduce(has_gradient)
    used = [parameter for parameter, count in zip(parameters, has_gradient.tolist()) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in buckets([parameter.grad for parameter in used]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(total.view_as(gradient))


def buckets(tensors: list[torch.Tensor]):
    """Yield `tensors` in order, in groups of one dtype and at most `BUCKET_BYTES` (or a single tensor)."""
    group, size = [], 0
    for tensor in tensors:
        if group and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != group[0].dtype):
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.nbytes
    if group:
        yield group


def sum_scalars(values: list[float]) -> list[float]:
    """The sum of each number over all processes, in fp64: token counts and losses."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    total = torch.tensor(values, dtype=torch.float64, device=exchange_device())
    dist.all_reduce(total)
    return total.tolist()


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def same_on_all_ranks(text: str, what: str = "settings") -> None:
    """Raise `UserError` in all processes if `text` is not the same in all; `what` names it in the error."""
    if not dist.is_initialized():
        return
    code = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:7], "big")
    extremes = torch.tensor([code, -code], device=exchange_device())
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)  # the largest code, and minus the smallest
    if extremes[0] != -extremes[1]:
        raise UserError(
            f"the processes of this run disagree about the {what}: start all with the same command"
        )


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank_zero_first():
    """The first process of each machine runs the block before the others: it makes files that they find."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    if not first:
        barrier()
    try:
        yield
    finally:
        if first:  # even after an error: else the others would wait for ever
            barrier()
