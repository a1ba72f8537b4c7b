"""The machine of a run: device, dtype, threads and processes, chosen once and printed."""

import os
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

from config.schema import RunConfig
from inference.generation.terminal import open_streams
from load_data.packing import REPOSITORY
from utils import distributed
from utils.device import keep_freed_memory, pick_device, pick_dtype, seed_everything, set_threads
from utils.products import MKL, choose_products


@dataclass
class Machine:
    """The device, dtype and processes of a run."""

    device: torch.device
    dtype: torch.dtype
    scaled: bool  # fp16 gradients need a scaler
    world: distributed.World
    products: str = MKL  # the library that multiplies fp32 matrices (utils/products.py)

    def autocast(self):
        """Return a context that computes matrix products in `dtype`; weights and sums stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, *words) -> None:
        """Print, in the first process only, without breaking the progress bar."""
        if self.world.is_first:
            tqdm.write(" ".join(str(word) for word in words))

    def read(self, prepare, *arguments):
        """Prepare data, in the first process of each machine first; print how long it took."""
        clock = time.monotonic()
        with distributed.rank_zero_first():
            data = prepare(*arguments)
        self.say(f"data: read and tokenized in {time.monotonic() - clock:.1f} seconds, apart from training")
        return data


def start_machine(config: RunConfig) -> Machine:
    """Set up device, dtype, threads, processes, memory and seed; print the choices and their reasons."""
    open_streams()
    device = pick_device(config.train.device)
    world = distributed.start(device.type)
    dtype, scaled, reason = pick_dtype(config.train.dtype, device)
    threads = start_process(device, config.train.seed)
    keep_freed_memory()
    machine = Machine(device, dtype, scaled, world)
    if (device.type, dtype) == ("cpu", torch.float32):
        machine.products = choose_products(REPOSITORY / "out" / "cache")  # measured once for all runs
        reason += f", products by {machine.products}"
    plural = "es" if world.size > 1 else ""
    machine.say(f"device: {device}, {threads} threads, {world.size} process{plural}; {reason}")
    if device.type == "cpu" and os.environ.get("OMP_WAIT_POLICY") == "passive":
        machine.say("waiting threads sleep, which leaves cores to other programs; on idle cores they spin")
    warmup, steps = config.optim.warmup_steps, config.train.max_steps
    if steps and warmup >= steps:
        machine.say(f"warning: optim.warmup_steps={warmup} is not below train.max_steps={steps}: the "
                    "learning rate never reaches its peak")  # fmt: skip
    return machine


def start_process(device: torch.device, seed: int) -> int:
    """Set precision, seed and threads of this process; return the number of threads."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    seed_everything(seed)
    return set_threads()
