"""Where and how a run computes: device, number format, threads, processes. Chosen once, and said aloud."""

import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from config.schema import RunConfig
from utils import distributed
from utils.device import keep_freed_memory, pick_device, pick_dtype, seed_everything, set_threads


@dataclass
class Machine:
    """Where and how this process computes."""

    device: torch.device
    dtype: torch.dtype
    scaled: bool  # fp16 needs its gradients scaled
    world: distributed.World

    def autocast(self):
        """Matrix products in `dtype`; weights and sums stay in fp32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, *words) -> None:
        """Print, in the first process only, without breaking the progress bar."""
        if self.world.is_first:
            tqdm.write(" ".join(str(word) for word in words))


def start_machine(config: RunConfig) -> Machine:
    """Device, number format, threads, processes and seed, each said aloud with its reason; and memory."""
    for stream in (sys.stdout, sys.stderr):  # a Windows pipe speaks another encoding than UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    device = pick_device(config.train.device)
    world = distributed.start(device.type)
    dtype, scaled, reason = pick_dtype(config.train.dtype, device)
    threads = start_process(device, config.train.seed)
    keep_freed_memory()
    machine = Machine(device, dtype, scaled, world)
    plural = "es" if world.size > 1 else ""
    machine.say(f"device: {device}, {threads} threads, {world.size} process{plural}; {reason}")
    return machine


def start_process(device: torch.device, seed: int) -> int:
    """How any process of ours computes; returns the number of threads."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in fp32
    seed_everything(seed)
    return set_threads()
