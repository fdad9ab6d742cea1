"""What `heap` asks of glibc really happens: a long run's memory is there before it is asked for, and is usable.

In a process of its own, since these settings are the process's. No time is asserted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from gpt2exp.training import heap

CODE = """
import json, re, sys, threading
from pathlib import Path
import numpy as np
from gpt2exp.training import heap

def resident():
    return int(re.search(r"^VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024

steps, tight = json.loads(sys.argv[1])
before = resident()
heap.prepare(512 * 2**20, certain=256 * 2**20, steps=steps, tight=tight)
block = np.full(2**24, 7, dtype=np.uint32)  # 64 MiB, written while the thread touches the same memory
for thread in threading.enumerate():
    if thread.name == "heap":
        thread.join()
touched = resident()
whole = bool((block == 7).all())
more = np.full(2**24, 5, dtype=np.uint32)
used = resident()
del block, more
print(json.dumps({"touched": touched - before, "more": used - touched, "freed": used - resident(), "whole": whole}))
"""


def measured(steps: int, tight: bool) -> dict[str, Any]:
    asked = json.dumps([steps, tight])
    done = subprocess.run([sys.executable, "-c", CODE, asked], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.skipif(heap._libc() is None or sys.platform != "linux", reason="there is no glibc here")
class TestPrepare:
    """MiB of resident memory."""

    def test_a_long_run_finds_its_memory_touched(self) -> None:
        found = measured(heap.LONG, tight=False)
        assert found["whole"]  # what was written meanwhile is unharmed
        assert found["touched"] == pytest.approx(256, abs=16)  # the 64 MiB lie inside it
        assert found["more"] < 8  # and so do 64 more
        assert found["freed"] < 8  # kept

    def test_a_short_run_takes_what_it_asks_for(self) -> None:
        found = measured(heap.LONG - 1, tight=False)
        assert found["touched"] == pytest.approx(64, abs=8)
        assert found["more"] == pytest.approx(64, abs=8)
        assert found["freed"] < 8

    def test_where_memory_is_short_large_blocks_are_given_back(self) -> None:
        found = measured(heap.LONG - 1, tight=True)
        assert found["freed"] == pytest.approx(128, abs=8)
