"""Choose the library that multiplies fp32 matrices in training on a CPU, by measuring both.

PyTorch includes two. MKL, the default, is made by Intel: on an AMD processor it may reach half the speed
of oneDNN; on an Intel processor both are fast. They round sums differently, so the choice must not change
between two runs of the same command: it is measured once per processor and stored in a file, and a resumed
run keeps the choice of its checkpoint. For single rows, as in decoding, MKL is faster everywhere.

Trap: PyTorch uses oneDNN for fp32 products only if it is told that rounding to bf16 is allowed. Processors
with AMX units would then round, so the result of a product is checked too (docs/experiments.md, 28).
"""

import contextlib
import hashlib
import os
import platform
import statistics
import time
from pathlib import Path

import torch

MKL, ONEDNN = "MKL", "oneDNN"
PRECISION = {MKL: "ieee", ONEDNN: "bf16"}
SHAPES = ((1024, 256, 768), (1024, 768, 256), (256, 256, 4096))  # rows, inputs and outputs of layers
TURNS = 9
GAIN = 1.2  # how much faster oneDNN must be: near 1, noise would decide


@contextlib.contextmanager
def multiply_with(library: str):
    """Multiply fp32 matrices with `library` within this context."""
    setting = torch.backends.mkldnn.matmul
    before, setting.fp32_precision = setting.fp32_precision, PRECISION[library]
    try:
        yield
    finally:
        setting.fp32_precision = before


def choose_products(folder: Path) -> str:
    """Return the library for this processor, measured now or read from a file in `folder`.

    If several processes measure at the same time, all of them take the choice of the first to finish.
    """
    path = folder / f"products_{processor_key()}.txt"
    with contextlib.suppress(OSError):  # without write access, every run measures
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            mine = path.with_name(f"{path.stem}_{os.getpid()}.tmp")
            mine.write_text(faster_library(), encoding="utf-8")
            with contextlib.suppress(FileExistsError):  # another process was first
                os.link(mine, path)
            mine.unlink()
        found = path.read_text(encoding="utf-8")
        return found if found in PRECISION else MKL
    return faster_library()


def faster_library() -> str:
    """Return oneDNN if it is exact and clearly faster, else MKL. Takes a tenth of a second."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return MKL
    if not is_exact(ONEDNN):
        return MKL
    return ONEDNN if statistics.median(gains()) > GAIN else MKL


def is_exact(library: str) -> bool:
    """Return True if `library` keeps the 24 bits of fp32: 1 + 2^-12 needs more than bf16 and TF32 have."""
    x, identity = torch.full((64, 64), 1 + 2.0**-12), torch.eye(64)
    with multiply_with(library):
        return torch.equal(x @ identity, x)


def gains() -> list[float]:
    """Return the speedup of oneDNN over MKL in each of `TURNS` passes over all shapes."""
    generator = torch.Generator().manual_seed(0)  # leaves the run's own generator alone
    pairs = [(torch.randn(n, i, generator=generator), torch.randn(o, i, generator=generator).T)
             for n, i, o in SHAPES]  # fmt: skip
    seconds = {MKL: [], ONEDNN: []}
    for _ in range(TURNS + 2):
        for library, times in seconds.items():
            with multiply_with(library):
                start = time.perf_counter()
                for x, weight in pairs:
                    x @ weight
                times.append(time.perf_counter() - start)
    both = zip(seconds[MKL][2:], seconds[ONEDNN][2:], strict=True)  # the first two warm up
    return [mkl / onednn for mkl, onednn in both]


def processor_key() -> str:
    """Hash everything that may affect the choice into 12 hexadecimal digits."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else [platform.processor()]
    model = next((line for line in lines if line.startswith("model name")), lines[0])
    limits = [os.environ.get(name) for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")]
    parts = [model, platform.machine(), torch.get_num_threads(), torch.__version__, *limits]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
