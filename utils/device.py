"""The machine of a run: device, dtype, threads, memory, and the random states that make it repeatable."""

import ctypes
import os
import platform
import random

import numpy
import torch

from utils.cores import thread_count
from utils.errors import UserError

# Dense peaks in FLOP/s with bf16 inputs and fp32 sums, and bytes of memory (the largest version of each
# name), from the vendors' data sheets; longer names first.
GPUS = {
    "B200": (2250e12, 180e9), "H200": (989e12, 141e9), "H100 NVL": (835e12, 94e9),
    "H100 PCIe": (756e12, 80e9), "H100": (989e12, 80e9), "H20": (148e12, 96e9), "A100 40GB": (312e12, 40e9),
    "A100": (312e12, 80e9), "A800": (312e12, 80e9), "A40": (149.7e12, 48e9), "A30": (165e12, 24e9),
    "A10G": (70e12, 24e9), "A10": (125e12, 24e9), "L40S": (362e12, 48e9), "L40": (181e12, 48e9),
    "L4": (121e12, 24e9), "RTX 5090": (209.5e12, 32e9), "RTX 4090": (165.2e12, 24e9),
    "RTX 4080": (97.5e12, 16e9), "RTX 3090": (71e12, 24e9),
}  # fmt: skip


def pick_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `mps`; `auto` takes the fastest available."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind in there if there[kind]]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise UserError(f"--device {name}: this PyTorch ({torch.__version__}) only sees {', '.join(here)}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> tuple[torch.dtype, bool, str]:
    """Return the dtype of matrix products, True if gradients need a scaler, and the reason in one line.

    `name` is `auto`, `fp32`, `bf16` or `fp16`. bf16 pays only where the processor multiplies it natively:
    elsewhere it is emulated, and slower than fp32. Raises `UserError` for fp16 without CUDA.
    """
    native, kind, why = multiplies_bf16(device.type), device.type, "as asked for"
    if name == "fp16" and kind != "cuda":
        raise UserError(f"train.dtype=fp16 is for CUDA, not for {kind}: use bf16 or fp32")
    if name == "auto":
        name = "bf16" if native else "fp16" if kind == "cuda" else "fp32"
        why = f"this {kind} " + ("multiplies it natively" if native else "has no native bf16")
    elif name == "bf16" and not native:
        why += f" (slow on this {kind})"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    scaler = " with a gradient scaler" if name == "fp16" else ""
    return dtype, bool(scaler), f"{name}{scaler}: {why}"


def multiplies_bf16(kind: str) -> bool:
    """Return True if devices of this kind multiply bf16 natively; elsewhere fp32 is faster.

    GPUs do from Ampere on; CPUs with AVX512-BF16, AMX-BF16, or ARM's BF16 under Linux. The environment
    variable ONEDNN_MAX_CPU_ISA hides these units of a CPU from the library that uses them: with AVX512_CORE
    or AVX2 a run computes as on a processor without them.
    """
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = {name for name, value in torch.cpu.get_capabilities().items() if value}
    arm = platform.system() == "Linux" and platform.machine() == "aarch64" and "bf16" in has
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    hidden = not any(word in limit for word in ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT"))
    return kind == "cpu" and not hidden and (arm or bool({"avx512_bf16", "amx_bf16"} & has))


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of a GPU by its name (`torch.cuda.get_device_name()`), or None if unknown.

    bf16 and fp16 are equally fast on these. For fp32 there is no single peak: it depends on TF32.
    """
    return data_sheet(device_name)[0] if dtype in (torch.bfloat16, torch.float16) else None


def data_sheet(device_name: str) -> tuple[float, float] | tuple[None, None]:
    """Return the peak FLOP/s and the bytes of the first GPU whose words are all in `device_name`."""
    words = set(device_name.replace("-", " ").split())
    return next((sheet for name, sheet in GPUS.items() if words.issuperset(name.split())), (None, None))


def synchronize(device: torch.device) -> None:
    """Wait until `device` has finished its work, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> bool:
    """Keep freed memory in the process; return False if the C library is not GNU's or refuses.

    Otherwise the system clears every page of large blocks again when the next step takes them: 2 to 6 % of a
    training step on a CPU, with the same peak (docs/experiments.md, 26).
    """
    if platform.system() != "Linux" or not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    set_option, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3  # names as in <malloc.h>
    # Old versions refuse more than 32 MiB. Either option alone would make things worse than neither.
    if not set_option(mmap_threshold, 2**30) and not set_option(mmap_threshold, 2**25):
        return False
    return bool(set_option(trim_threshold, 2**31 - 1))


def set_threads() -> int:
    """Fix the number of CPU threads and return it. It decides the order of sums, hence the rounding."""
    count = thread_count(os.environ) or torch.get_num_threads()
    torch.set_num_threads(count)
    return count


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)  # NumPy takes 32 bits
    torch.manual_seed(seed)


def random_state() -> dict:
    """Return the state of all random generators, as tensors and plain data that a checkpoint may hold."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of the current GPU: each process has its own
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Restore all generators to a state from `random_state()`, as far as their devices are available."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())  # the checkpoint may have been loaded onto a GPU
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"].cpu())
