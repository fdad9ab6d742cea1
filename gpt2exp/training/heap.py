"""How glibc's heap is used: freed memory is kept, and lies on huge pages. No torch.

Measured on a 2-core Xeon with GPT-2 124M, 4 x 32 tokens in fp32 (`gpt2exp-bench`): a training step frees and asks
again for the same buffers, and the kernel zeroing their pages anew each time was a fifth of it; huge pages take up to
another twentieth off, by fewer misses of the processor's address cache. Losses do not change. Elsewhere than on Linux
with glibc nothing happens.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import threading
from pathlib import Path

from gpt2exp.config import DeviceName

HUGE_PAGE = 2 * 2**20

WORTH_IT = 64 * 2**20
"""Below this many bytes of weights, gradients and moments a run is left to itself."""

LONG = 200
"""Steps from which huge pages win back what zeroing them costs: 2.3 s at GPT-2's size, against 5 to 30 ms a step."""

LARGE = 32 * 2**20
"""Blocks from this size on are given back where memory is short."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # mallopt(3)

MADV_POPULATE_WRITE = 23  # madvise(2), Linux 5.14


def keep_freed_memory(*, tight: bool = False) -> bool:
    """Have glibc map no block by itself and never give the heap's end back; False where there is no glibc.

    `tight`: blocks of `LARGE` bytes and more come and go one by one. Kept, they leave holes that glibc's
    posix_memalign (2.36) does not fill with a block of the same size: GPT-2 at 4 x 1024 tokens, its activations
    computed again, took 4.0 GB kept and 3.3 GB so, in the same time.
    """
    libc = _libc()
    if libc is None:
        return False
    mapped = libc.mallopt(M_MMAP_THRESHOLD, LARGE) and libc.mallopt(M_MMAP_MAX, 65536 if tight else 0)
    return bool(mapped and libc.mallopt(M_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Return freed memory to the system: what an earlier job of this process left is not this one's."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def computes_here(device: DeviceName) -> bool:
    """Whether a run's tensors will lie on this heap, as far as can be told without torch."""
    return device is DeviceName.cpu or (device is DeviceName.auto and not Path("/dev/nvidiactl").exists())


def available() -> int | None:
    """Bytes that could still be taken here; None where that is not known."""
    free = None
    with contextlib.suppress(OSError, ValueError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(found[1]) * 1024 if found else None
    group = Path("/sys/fs/cgroup")  # a container's own limit, where it has one
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        free = limit if free is None else min(free, limit)
    return free


def prepare(size: int, certain: int, steps: int, *, tight: bool = False) -> None:
    """Keep freed memory; for a long run grow the heap by `size` bytes on huge pages, and touch `certain` in a thread.

    The kernel zeroes a page when it is first touched: done while Python imports and builds, the first step does not
    wait for it. The memory is free for whoever asks malloc for it meanwhile, and its content is not changed.
    """
    libc = _libc()
    if libc is None or not keep_freed_memory(tight=tight) or certain < WORTH_IT or steps < LONG:
        return
    block = libc.malloc(size)
    if not block:
        return
    start = -(-block // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(start, (block + size - start) // HUGE_PAGE * HUGE_PAGE, mmap.MADV_HUGEPAGE)
    libc.free(block)

    def touch() -> None:
        # page by page: whoever maps memory meanwhile, as an import does, waits for one page and not for all
        for page in range(start, start + min(certain, size) - 2 * HUGE_PAGE, HUGE_PAGE):
            if libc.madvise(page, HUGE_PAGE, MADV_POPULATE_WRITE) != 0:
                return  # an older kernel, or no memory left: pages come as they are used

    threading.Thread(target=touch, name="heap", daemon=True).start()


def _libc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.malloc_trim.argtypes = [ctypes.c_size_t]
        libc.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    except (OSError, AttributeError):
        return None
    return libc
