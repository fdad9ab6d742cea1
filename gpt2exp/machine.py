"""What this process may use of the machine. No torch."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2exp.sweep.engines import _quotas


def cores(root: Path = Path("/")) -> int:
    """The processor's cores that this process may use: those it is bound to, no more than its containers' quotas.

    A quota is rounded down: threads above it stop the others for the rest of each period. `root`: of the file system.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    bound = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([bound, *(int(quota) for quota in _quotas(root))]))
