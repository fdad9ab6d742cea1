"""`hardware.keep_freed_memory` has its effect in glibc: freed memory stays with the process, or goes back to the
system.

Each test has a process of its own, since these settings are the process's. No time is asserted.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from gpt2exp.training import hardware

CODE = """
import re, sys
from pathlib import Path
import numpy as np
from gpt2exp.training import hardware

def resident():
    return int(re.search(r"^VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) / 1024

assert hardware.keep_freed_memory(tight=sys.argv[1] == "tight")
block = np.full(2**25, 7, dtype=np.uint32)  # 128 MiB
used = resident()
del block
print(used - resident())
"""


@pytest.mark.skipif(hardware._libc() is None or sys.platform != "linux", reason="there is no glibc here")
@pytest.mark.parametrize(("memory", "returned"), [("plenty", 0), ("tight", 128)])
def test_mebibytes_returned_to_the_system(memory: str, returned: float) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, memory], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(returned, abs=8)
