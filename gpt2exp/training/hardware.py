"""Devices, their memory and peak speeds, and the process's heap."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path

import torch

from gpt2exp import machine
from gpt2exp.config import DeviceName, TrainConfig
from gpt2exp.section import AUTO, BadRequest, require
from gpt2exp.training import distributed

PEAK_TFLOPS = {
    # dense peaks by name as CUDA reports it, from NVIDIA's data sheets (without sparsity); fp16 runs at bf16's rate
    "A100": {"fp64": 9.7, "fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    "A10": {"fp32": 31.2, "tf32": 62.5, "bf16": 125.0},
    "A40": {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7},
    "RTX A6000": {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8},
    "H100 PCIe": {"fp64": 25.6, "fp32": 51.2, "tf32": 378.0, "bf16": 756.0},
    "H100": {"fp64": 33.5, "fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
    "H200": {"fp64": 33.5, "fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
    "L4": {"fp32": 30.3, "tf32": 60.0, "bf16": 121.0},
    "L40S": {"fp32": 91.6, "tf32": 183.0, "bf16": 362.0},
    "RTX 3090": {"fp32": 35.6, "tf32": 35.6, "bf16": 71.0},
    "RTX 4090": {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2},
    "V100": {"fp64": 7.8, "fp32": 15.7},
    "T4": {"fp32": 8.1},
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak floating-point operations per second of a GPU in a precision; None where it is not known."""
    for known in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if re.search(rf"\b{re.escape(known)}\b", device_name.replace("-", " ")):
            tflops = PEAK_TFLOPS[known].get("bf16" if precision == "fp16" else precision)
            return None if tflops is None else tflops * 1e12
    return None


def resolve_device(name: DeviceName) -> torch.device:
    """The device to compute on, one GPU for each process of a machine; `BadRequest` if it is not there.

    Also limits PyTorch's threads to the cores of this process, since PyTorch ignores the quotas of containers. A number
    that the user set (`OMP_NUM_THREADS`) stays.
    """
    if torch.get_num_threads() > machine.cores() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(machine.cores())
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(kind for kind, found in there.items() if found) if name is DeviceName.auto else name.value
    if not there[kind]:
        found = ", ".join(kind for kind, present in there.items() if present)
        raise BadRequest(f"train.device={kind}: PyTorch sees no such device here; use auto or one of: {found}")
    if distributed.world_size() == 1:
        return torch.device(kind)
    if kind == "cuda":
        gpus, processes = torch.cuda.device_count(), distributed.local_world_size()
        why = f"torchrun started {processes} processes here, and there are {gpus} GPUs"
        require(processes <= gpus, "train.device", kind, why, f"try torchrun --nproc-per-node {gpus}")
        return torch.device(kind, distributed.local_rank())
    require(kind == "cpu", "train.device", kind, "processes cannot share Apple's GPU", "start one without torchrun")
    return torch.device(kind)


def device_name(device: torch.device) -> str:
    """The hardware's own name, such as `NVIDIA A100-SXM4-80GB` or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[1].strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished what was queued, so that the clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


WORTH_COMPILING = 1000  # steps from which `train.compile=auto` compiles on CUDA: a guess, not measured


def settle(train: TrainConfig, device: torch.device) -> TrainConfig:
    """`train` with `compile=auto` decided."""
    if train.compile != AUTO:
        return train
    return replace(train, compile=device.type == "cuda" and train.steps >= WORTH_COMPILING)


def pads_vocabulary(choice: bool | str, device: torch.device) -> bool:
    """Whether to pad the vocabulary: `train.pad_vocab`, with `auto` decided.

    Tensor cores want round sizes (NVIDIA's guide on matrix multiplication). On a processor with AVX2 alone, padding
    made the head's products 1.5 times as fast. With AVX-512 it made no difference.
    """
    if isinstance(choice, bool):
        return choice
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2")


LARGE = 32 * 2**20  # where memory is short, freed blocks of this many bytes and more are returned to the system
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # mallopt(3)


def keep_freed_memory(*, tight: bool = False) -> bool:
    """Have glibc reuse freed memory instead of returning it to the system; False if there is no glibc.

    A step frees and allocates the same buffers, and the kernel zeroes the pages of returned ones again. That took a
    fifth of a step of GPT-2 at 4 x 32 tokens (2-core Xeon, `gpt2exp-bench`). Losses do not change.

    `tight`: blocks of `LARGE` bytes and more are still returned. If they are kept, they leave holes that glibc's
    posix_memalign (2.36) does not fill: GPT-2 at 4 x 1024 tokens with activation checkpointing took 4.0 GB with them
    kept and 3.3 GB with them returned, in the same time.
    """
    libc = _libc()
    if libc is None:
        return False
    mapped = libc.mallopt(M_MMAP_THRESHOLD, LARGE) and libc.mallopt(M_MMAP_MAX, 65536 if tight else 0)
    return bool(mapped and libc.mallopt(M_TRIM_THRESHOLD, -1))


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return libc


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = None
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(found[1]) * 1024 if found else None
    group = Path("/sys/fs/cgroup")  # a container's own limit, where it has one
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = limit if free is None else min(free, limit)
    return free


def reset_peak_memory(device: torch.device) -> None:
    """Return freed memory to the system and start a new peak: each job of a sweep in one process has its own."""
    gc.collect()
    if (libc := _libc()) is not None:
        libc.malloc_trim(0)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox without it: the peak is then the process's own
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)


def peak_memory(device: torch.device) -> int:
    """Peak bytes since `reset_peak_memory`: the allocator's on CUDA and MPS, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
