"""Counts the cores that this process may use. No torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """The processor's cores that this process may use: those it is bound to, no more than its containers' quotas.

    A quota is rounded down: threads above it stop the others for the rest of each period. `root`: of the file system.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    bound = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min([bound, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """Cores that each control group around this process has (cgroups(7)); none where the system has no such groups."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers  # version 2 names no controllers
        inside = mount / path.strip("/")
        # in a container the path may be the host's and not exist: then the container's group is the mount itself
        for group in (inside, *inside.parents):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    quota, period = (group / "cpu.max").read_text().split()
                if quota.strip().isdigit():  # without a limit: max, or -1
                    yield int(quota) / int(period)
            if group == mount:
                break
