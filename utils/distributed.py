"""Data parallelism by hand: every process works on its own micro-batches, and the gradients are summed.

    torchrun --nproc_per_node 2 train/pre_train.py

`DistributedDataParallel` hooks into the model's forward and into each gradient as it is made. A loss term
that bypasses the forward (a balance loss read from a layer), a parameter without gradient in one process (an
expert without tokens), or several backward passes per step need care there; without it the processes silently
drift apart. Here nothing is hooked: after all backward passes of a step, `sum_gradients` sums what is there,
once. It gives up some overlap of computing and sending, and can be read in a minute.

The loss is divided by the number of supervised tokens of **all** processes, so the sum of gradients is the
gradient of the whole batch: no further division.

Every function also works in a single process, where it does nothing. Tensors on a GPU travel over nccl, all
others over gloo.
"""

import hashlib
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError

LONGEST_WAIT = timedelta(hours=24)  # the first process may tokenize for hours while the others wait


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
    """Join the processes that `torchrun` started (it sets RANK, WORLD_SIZE, LOCAL_RANK), if any.

    `device_type` is where the gradients will be. Raises `UserError` if there are more processes than GPUs.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    world = World(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    if device_type == "cuda":
        if world.local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(f"--nproc_per_node is more than the {gpus} GPUs of this machine: lower it")
        torch.cuda.set_device(world.local_rank)
    if world.size > 1:
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=LONGEST_WAIT)
    return world


def finish() -> None:
    """End this process, if it is one of several, as the last call of a script. A single process goes on."""
    if dist.is_initialized():
        leave(0)


def leave(status: int) -> None:
    """End this process with `status`, together with all others.

    Trap: PyTorch's threads may outlive the interpreter and abort it on exit, and the status is lost. So with
    several processes the output is flushed and the process ends at once.
    """
    if dist.is_initialized():
        barrier()  # the first process may still be writing, and the launcher ends all when one ends
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> torch.Tensor:
    """Replace `tensor` by its sum (or maximum) over all processes; return it."""
    if dist.is_initialized():
        with others_alive():
            dist.all_reduce(tensor, op=op)
    return tensor


@contextmanager
def others_alive():
    """Turn the error of a connection that another process has closed into one clear line."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("closed|reset by peer|Broken pipe|remote process", str(error)):
            raise
        raise UserError("another process of this run has ended; its error line says why") from error


@contextmanager
def all_or_none():
    """Run a block that may fail in one process only: all then raise, instead of waiting for it forever."""
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001  raised again below
        error = caught
    (failed,) = sum_scalars([float(error is not None)])
    if error:
        raise error
    if failed:
        raise UserError("another process of this run has failed; its error line says why")


def sum_gradients(parameters) -> None:
    """Replace each gradient by its sum over all processes: once per optimizer step, after the last backward.

    A parameter without gradient here, but with one in another process, takes part as zeros, because all
    processes must send the same messages. One without gradient anywhere keeps None, as in a single process.
    """
    if not dist.is_initialized():
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    counts = sum_scalars([float(p.grad is not None) for p in parameters])
    used = [parameter for parameter, count in zip(parameters, counts, strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    with others_alive():  # all messages are on their way before the first wait
        for message in [dist.all_reduce(parameter.grad, async_op=True) for parameter in used]:
            message.wait()


def sum_scalars(values: list[float]) -> list[float]:
    """Return the sum of each number over all processes, in fp64: token counts and losses."""
    return reduce(torch.tensor([float(value) for value in values], dtype=torch.float64)).tolist()


def gather(value) -> list:
    """Return the values of all processes, in the order of their ranks: any Python object each."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    with others_alive():
        dist.all_gather_object(values, value)
    return values


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    if dist.is_initialized():
        with others_alive():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, src=0)


def same_on_all_ranks(text: str, what: str = "settings") -> None:
    """Raise `UserError` in all processes if `text` is not the same in all; `what` names it in the error."""
    code = int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:7], "big")
    largest, smallest = reduce(torch.tensor([code, -code]), op=dist.ReduceOp.MAX).tolist()
    if largest != -smallest:
        raise UserError(f"the processes disagree about the {what}: start all with the same command")


def barrier() -> None:
    """Wait until every process is here."""
    sum_scalars([0])


@contextmanager
def rank_zero_first():
    """Run the block in the first process of each machine before the others, which then find its files."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    with all_or_none():  # raises in all if the block failed in the first
        if first:
            yield
    if not first:
        yield
