"""A run or sweep killed at any moment can be resumed, and ends with the weights of one that was never killed.

SIGKILL comes during start-up, during training, while a checkpoint is written, or between two jobs of a sweep; half of
the runs are killed twice. The moments are drawn by number. `GPT2EXP_CRASHES=40` sets how many (default 3).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import SMALL, finish, losses, read, run, run_folders, shell_code, start

from gpt2exp.run import record

pytestmark = pytest.mark.slow
CRASHES = int(os.environ.get("GPT2EXP_CRASHES", "3"))
ARGS = [
    *SMALL,
    "train.steps=60",
    "checkpoint.every=4",
    "checkpoint.save_last=true",
    "data.order=shuffled",
]
QUIET = "wandb.mode=disabled"
AXIS = ["seed=1,2", QUIET]
Process = subprocess.Popen[str]


def end_of(folder: Path) -> dict[str, bytes]:
    """The weights at the end of a run."""
    weights = load_file(record.saved(folder)[60] / "model.safetensors")
    return {name: weight.numpy().tobytes() for name, weight in weights.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], float]:
    """Both runs, never interrupted, and the seconds that the first took."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    began = time.monotonic()
    assert run(folder / "1", *ARGS, QUIET, "seed=1").returncode == 0
    seconds = time.monotonic() - began
    assert run(folder / "2", *ARGS, QUIET, "seed=2").returncode == 0
    return run_folders(folder), seconds


def until(condition: Callable[[], object], process: Process) -> None:
    """Wait, looking as often as one can, for a condition or the end of the process."""
    while not condition() and process.poll() is None:
        time.sleep(0.0005)


def lies(below: Path, pattern: str) -> bool:
    """Whether there is such a file or folder just now."""
    try:
        return any(below.rglob(pattern))
    except OSError:  # a folder vanished while it was walked
        return False


def kill(process: Process) -> None:
    """SIGKILL, if it still runs."""
    process.kill()
    assert shell_code(finish(process)) in (0, 128 + signal.SIGKILL)


@pytest.mark.parametrize("number", range(CRASHES))
def test_killed(number: int, whole: tuple[list[Path], float], tmp_path: Path) -> None:
    chance = random.Random(number)
    expected, seconds = whole
    kind = ("anywhere", "checkpoint", "sweep")[number % 3]
    here = tmp_path / "here"

    def crash(process: Process) -> None:
        if kind == "anywhere":
            time.sleep(chance.uniform(0, seconds))
        elif kind == "checkpoint":
            for _ in range(chance.randint(1, 9)):  # that many checkpoints, the last while it is written
                until(lambda: lies(here, ".step_*.part"), process)
                last = chance.random() < 0.5
                if last:
                    break
                until(lambda: not lies(here, ".step_*.part"), process)
        else:
            until(lambda: lies(here, "summary.json"), process)
            time.sleep(chance.uniform(0, 0.6))
        kill(process)

    sweep = kind == "sweep"
    request = ["-m", *ARGS, *AXIS] if sweep else [*ARGS, "seed=1"]
    crash(start(here, *request))
    for folder in run_folders(here):
        assert record.read_status(folder)["state"] != "running"
    found = sorted(here.glob("sweeps/*/*" if sweep else "runs/*/*"))
    if visible := [path for path in found if not path.name.startswith(".")]:
        request = [f"resume={visible[0]}"]
    else:
        assert kind == "anywhere", "only before it began has it left nothing to go on with"
    if chance.random() < 0.5:
        crash(start(here, *request))
    if visible := [path for path in here.glob("*/*/*") if not path.name.startswith(".")]:
        request = [f"resume={visible[0]}"]
    done = run(here, *request)
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr
    (top,) = [path for path in here.glob("*/*/*") if not path.name.startswith(".")]
    ends = run_folders(top)
    assert len(ends) == (2 if sweep else 1)
    for folder, other in zip(ends, expected, strict=False):
        assert end_of(folder) == end_of(other)
        assert losses(folder) == losses(other)
        assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(60))
        assert record.row(folder, folder)["state"] == "done"
        assert not list(folder.rglob("*.part"))
        assert len(record.saved(folder)) == 2
