"""Devices, number formats, threads, and random states that survive a checkpoint."""

import os
import random

import numpy
import pytest
import torch

from utils import device as device_module
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.cores import physical_cores
from utils.device import (
    data_sheet,
    peak_flops,
    pick_device,
    pick_dtype,
    random_state,
    seed_everything,
    set_random_state,
    set_threads,
)
from utils.errors import UserError

CPU = torch.device("cpu")


def test_auto_takes_the_fastest_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for missing in ("cuda", "mps"):
        with pytest.raises(UserError, match=f"--device {missing}: .*sees cpu"):
            pick_device(missing)
    with pytest.raises(UserError, match="--device tpu"):
        pick_device("tpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto").type == "cuda"


@pytest.mark.parametrize(
    ("name", "device", "native", "dtype", "scaler"),
    [
        ("auto", "cuda", True, torch.bfloat16, False),
        ("auto", "cuda", False, torch.float16, True),
        ("auto", "cpu", True, torch.bfloat16, False),
        ("auto", "cpu", False, torch.float32, False),
        ("auto", "mps", False, torch.float32, False),
        ("fp16", "cuda", True, torch.float16, True),
        ("bf16", "cpu", False, torch.bfloat16, False),
        ("fp32", "cpu", True, torch.float32, False),
    ],
)
def test_number_formats(monkeypatch, name, device, native, dtype, scaler):
    monkeypatch.setattr(device_module, "multiplies_bf16", lambda kind: native)
    got, needs_scaler, reason = pick_dtype(name, torch.device(device))
    assert (got, needs_scaler) == (dtype, scaler)
    assert reason
    assert "\n" not in reason


def test_fp16_is_for_cuda():
    with pytest.raises(UserError, match="fp16"):
        pick_dtype("fp16", CPU)


def test_threads_are_the_cores_that_we_may_use(monkeypatch):
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert 1 <= set_threads() == torch.get_num_threads() == physical_cores() <= os.cpu_count()
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
        assert set_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert set_threads() == 3
    finally:
        torch.set_num_threads(before)


def draw() -> list[float]:
    """Numbers from every generator, an odd count so that a cached Gaussian is left over."""
    torch_numbers = [
        torch.rand(1).item(),
        *torch.randn(3).tolist(),
        torch.nn.functional.dropout(torch.ones(9)).sum().item(),
    ]
    return [random.gauss(0, 1), random.random(), numpy.random.randn(), numpy.random.rand(), *torch_numbers]


def test_random_states_come_back_from_a_checkpoint(tmp_path):
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first
    save_checkpoint(tmp_path / "a.pkl", {"random": random_state()})
    expected = draw() + draw()
    seed_everything(4)
    assert draw() != first
    set_random_state(load_checkpoint(tmp_path / "a.pkl")["random"])
    assert draw() + draw() == expected


def test_peaks_by_the_names_that_cuda_gives():
    names = {
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA GeForce RTX 4090": 165.2e12,
        "NVIDIA L4": 121e12,
        "NVIDIA L40S": 362e12,
        "Tesla V100-SXM2-16GB": None,
    }
    for name, flops in names.items():
        assert peak_flops(name, torch.bfloat16) == flops
    assert peak_flops("NVIDIA H200", torch.float32) is None


def test_units_that_the_library_may_not_use_do_not_count(monkeypatch):
    """ONEDNN_MAX_CPU_ISA makes a processor with bf16 units compute like one without."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for limit, native in (("avx2", False), ("AVX512_CORE", False), ("AVX512_CORE_BF16", True), ("ALL", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert device_module.multiplies_bf16("cpu") == native


def test_memory_by_the_names_that_cuda_gives():
    sizes = {"NVIDIA A100-SXM4-40GB": 40, "NVIDIA A100-SXM4-80GB": 80, "NVIDIA H100 NVL": 94, "NVIDIA L4": 24}
    assert {name: data_sheet(name)[1] / 1e9 for name in sizes} == sizes
    assert data_sheet("Tesla V100-SXM2-16GB") == (None, None)
