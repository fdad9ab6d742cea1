"""A speed measured while another program used the core is marked as disturbed and not compared; and OpenMP's threads
spin only while no other program wants the core. No duration is asserted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import SMALL, read, run, run_folders

from gpt2exp.config import RunConfig
from gpt2exp.run import terminal
from gpt2exp.training import load

pytestmark = pytest.mark.skipif(load.waited() is None, reason="this system does not count waits for a core")


@pytest.fixture
def shared_core() -> Iterator[None]:
    """A busy process on one core; this thread and what it starts are bound to the same core."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})  # of this thread, and of what it starts
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    busy.kill()
    busy.wait()
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("shared_core")
def test_a_comparison_beside_other_programs(tmp_path: Path) -> None:
    """Steps of tens of milliseconds, so that each outlasts a turn on the core."""
    args = ["-m", *SMALL, "train.batch_size=16", "train.seq_len=32", "train.steps=6", "train.warmup_steps=1"]
    done = run(tmp_path / "here", *args, "model.tie_weights=true,false", "wandb.mode=disabled")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens/s while most steps waited for a core") == 2
    for folder in run_folders(tmp_path / "here"):
        summary = read(folder / "summary.json")
        assert summary["speed_disturbed"] > load.TOO_MANY
        assert summary["timed_steps"] == 5
        assert all(row["waited_ms"] >= 0 for row in read(folder / "metrics.jsonl"))
        assert "of the steps waited for a core: the speed is not this run's own" in (folder / "run.log").read_text(
            encoding="utf-8"
        )
    (sweep,) = (tmp_path / "here").glob("sweeps/*/*")
    (speed,) = (row for row in read(sweep / "comparison.json")["axes"] if row["metric"] == "tokens_per_second")
    assert speed["verdict"] == "not_comparable"
    assert speed["reason"] == "in 2 of 2 runs most steps waited for a core that another program used"


@pytest.mark.slow
@pytest.mark.usefixtures("shared_core")
def test_only_threads_that_compute_count() -> None:
    """What waits beside a busy process: this thread, not one of Python's that works for wandb or a progress bar."""
    code = """
import hashlib, threading
from gpt2exp.training import load
def work(turns):
    for _ in range(turns):
        hashlib.sha256(bytes(20_000_000)).digest()  # lets others run meanwhile
done, end = threading.Event(), threading.Event()
other = threading.Thread(target=lambda: (work(30), done.set(), end.wait()))
before = load.waited()
other.start()
done.wait()
during = load.waited()
work(30)
print(during - before, load.waited() - during)
end.set()
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    others, own = map(float, out.split())
    assert own > 4 * others


def test_what_the_terminal_says() -> None:
    summary: dict[str, Any] = {
        **dict.fromkeys(("error", "loss_first", "val_loss", "loss_unseen_first", "mfu", "peak_memory_bytes")),
        "state": "done",
        "loss_mean_last10": 3.0,
        "tokens_per_second": 1000.0,
        "step_ms": {"median": 1.0, "p10": 1.0, "p90": 1.0},
        "first_step_ms": 1.0,
        "timed_steps": 9,
        "precision": {"emulated": False},
        "wall_seconds": {"total": 1.0, "startup": 1.0},
    }

    def said(share: float | None) -> tuple[str, str]:
        row = {**summary, "speed_disturbed": share}
        rows = terminal.closing_rows(row, RunConfig(), Path("run"))
        return rows.get("other programs", ""), terminal.closing_line(row)

    assert said(0.25)[0] == "25% of the steps waited for a core: left out of the speed"
    assert said(0.75)[0] == "75% of the steps waited for a core: the speed is not this run's own"
    assert "1,000.0 tokens/s while most steps waited for a core, 1.0 s" in said(0.75)[1]
    for share in (None, 0.0):
        assert "waited" not in "".join(said(share))
    assert "waited" not in said(0.25)[1]


WORK = """
import json, os, sys, time, torch
from gpt2exp.training import load
def spent():  # by all other threads, in seconds of CPU time
    times = [open(f"/proc/self/task/{t}/schedstat").read().split()[0] for t in os.listdir("/proc/self/task")]
    return sum(map(int, times)) / 1e9 - time.thread_time()
def idle():  # what the other threads spend after a share of work, while this one sleeps
    x = torch.ones(1 << 18)
    x.add_(1)
    before = spent()
    for _ in range(int(sys.argv[1])):
        x.add_(1)
        time.sleep(0.05)
    return spent() - before
spinning = load.spinning(torch.get_num_threads())
found = [(idle(), len(os.listdir("/proc/self/task")))]
for share in (0.0, 0.1, 0.9, 0.1, None):
    spinning.after_step(share)
    found.append((idle(), len(os.listdir("/proc/self/task"))))
print(json.dumps(found))
"""


def spun(turns: int, **env: str) -> list[tuple[float, int]]:
    """What OpenMP's second thread spends on waiting, and how many threads there are: at first and after five steps."""
    plain = {key: value for key, value in os.environ.items() if key not in load.SPINNING}
    command = [sys.executable, "-c", WORK, str(turns)]
    done = subprocess.run(command, env={**plain, "OMP_NUM_THREADS": "2", **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [(spent, threads) for spent, threads in json.loads(done.stdout)]


@pytest.mark.slow
def test_threads_spin_only_where_nobody_else_wants_the_core() -> None:
    """Brief at first, long after a calm step, brief beside a program that holds a core, until a step that is not known
    to have waited.
    """
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("OpenMP spins briefly anyway with more threads than cores")
    first, calm, bit, held, still, again = spun(20)
    for brief in (first, held, still):
        assert 5 * brief[0] < min(calm[0], bit[0], again[0])
        assert brief[1] > calm[1]
    assert calm[1] == bit[1] == again[1], "the team has gone"


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "active"}, {"OMP_NUM_THREADS": "1"}])
def test_what_the_user_set_stands(env: dict[str, str]) -> None:
    assert len({threads for _, threads in spun(1, **env)}) == 1, "no team was made"


def test_another_openmp_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in load.SPINNING:
        monkeypatch.delenv(name, raising=False)

    def missing(*_: Any, **__: Any) -> Any:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(load, "ctypes", SimpleNamespace(CDLL=missing))
    before = threading.active_count()
    spinning = load.Spinning(2)
    spinning.after_step(0.9)
    assert threading.active_count() == before
