"""Measures how long a run's threads wait for a core that other programs use, and keeps them from spinning then.

PyTorch's wheel for Linux ships GNU's OpenMP, whose threads spin for milliseconds where they wait for each other. That
makes a lone run fast. Beside another program, a thread that spins takes a core from the very thread it waits for: two
runs at once were 30 to 50 times slower each. No torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import statistics
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any

SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # variables that set how long OpenMP's threads spin; a user's stay
DISTURBED = 0.05  # a step is disturbed if its threads waited for a core for more than this share of it
HELD = 0.2  # from this share on another program holds a core for good, and spinning does more harm than good
TOO_MANY = 0.5  # above this share of disturbed steps a run's speed tells of the machine's load, not of the run


def waited() -> float | None:
    """Seconds, summed over this process's threads, in which a thread was ready to run and had no core.

    Linux's scheduler counts each wait (`schedstat`, proc(5)). CPU time would not tell, since a thread that spins uses
    its core fully. Python's other threads (wandb's, a progress bar's) do not compute and are left out. None if the
    system does not count. Takes 0.05 ms.
    """
    idle = {thread.native_id for thread in threading.enumerate()} - {threading.get_native_id()}
    nanoseconds = 0
    try:
        for thread in os.scandir("/proc/self/task"):
            if int(thread.name) not in idle:
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    file = os.open(f"{thread.path}/schedstat", os.O_RDONLY)
                    try:
                        nanoseconds += int(os.read(file, 100).split()[1])
                    finally:
                        os.close(file)
    except (OSError, ValueError, IndexError):
        return None
    return nanoseconds / 1e9 if nanoseconds else None  # a kernel that does not count says 0


def timing(
    seconds: Sequence[float], waits: Sequence[float | None], cold: Collection[int], step_tokens: int
) -> dict[str, Any]:
    """Step times from each step's `seconds` and the seconds that its threads waited for a core (`waits`, if known).

    The steps numbered in `cold` are left out, the last step never. `tokens_per_second` is that of the median step, so
    that one slow step does not change it. `speed_disturbed` is the share of these steps whose threads waited for a core
    (`DISTURBED`), None if that is not known. Such steps are left out too, unless they are most (`TOO_MANY`).
    """
    if not seconds:
        empty = dict.fromkeys(("step_ms", "first_step_ms", "tokens_per_second", "speed_disturbed"))
        return {**empty, "timed_steps": 0}
    steps = list(itertools.zip_longest(seconds, waits))
    timed = [step for number, step in enumerate(steps) if number not in cold] or steps[-1:]
    known = [(took, waited) for took, waited in timed if waited is not None]
    calm = [took for took, waited in known if waited <= DISTURBED * took]
    disturbed = 1 - len(calm) / len(known) if known else None
    kept = calm if disturbed is not None and disturbed <= TOO_MANY else [took for took, _ in timed]
    median = statistics.median(kept)
    deciles = statistics.quantiles(kept, n=10, method="inclusive") if len(kept) > 1 else [median] * 9
    return {
        "step_ms": {"median": median * 1e3, "p10": deciles[0] * 1e3, "p90": deciles[8] * 1e3},
        "first_step_ms": seconds[0] * 1e3,
        "tokens_per_second": step_tokens / median,
        "timed_steps": len(kept),
        "speed_disturbed": disturbed,
    }


def mostly_disturbed(summary: Mapping[str, Any]) -> bool:
    """Whether most of a run's steps were disturbed, so that its speed is not its own; False if not measured."""
    share = summary.get("speed_disturbed")
    return isinstance(share, (int, float)) and share > TOO_MANY


class Spinning:
    """Lets OpenMP's waiting threads spin long, or briefly; does nothing if another OpenMP is loaded.

    A variable of the environment (`SPINNING`) would hold for the whole process. But long spinning slows down a run
    beside another program, and brief spinning slows down a lone run. GNU's OpenMP spins 100 times instead of 300,000
    while it knows of more threads than cores. So a team of that many idle threads exists while spinning is to be brief.
    """

    def __init__(self, threads: int) -> None:
        """`threads`: how many compute. Import torch before. Spinning is brief at first, until a step was measured."""
        self._end: threading.Event | None = None
        self._openmp: ctypes.CDLL | None = None
        if threads > 1 and not any(name in os.environ for name in SPINNING):
            with contextlib.suppress(OSError, AttributeError):  # another OpenMP, or none, is loaded
                self._openmp = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        self.brief(self._openmp is not None)

    def after_step(self, share: float | None) -> None:
        """Decide how long threads spin in the next step.

        `share`: the last step's seconds of waiting for a core, over its duration. None, not known: spin long.
        """
        if self._openmp is not None:
            self.brief(share is not None and share > (DISTURBED if self._end else HELD))

    def brief(self, wanted: bool) -> None:
        """Let waiting threads spin briefly from now on if `wanted`, else long."""
        if wanted and self._end is None:
            self._end, ready = threading.Event(), threading.Event()
            threading.Thread(target=self._idle_team, args=(self._end, ready), name="spin", daemon=True).start()
            ready.wait()
        elif not wanted and self._end is not None:
            self._end.set()
            self._end = None

    def _idle_team(self, end: threading.Event, ready: threading.Event) -> None:
        """Start a team of more threads than there are cores; it exists as long as this thread."""
        assert self._openmp is not None
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL) does nothing
        self._openmp.GOMP_parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
        ready.set()
        end.wait()


@functools.cache
def spinning(threads: int) -> Spinning:
    """The one `Spinning` of this process, so that a sweep's next job goes on with its state."""
    return Spinning(threads)
