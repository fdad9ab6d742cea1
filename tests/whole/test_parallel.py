"""Runs in several processes (gloo on the CPU) compute what one process does; under torchrun a killed process is named,
and the run can be resumed with another number of processes. NCCL and GPUs were not tested.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import shared_runs
import support
import torch
from safetensors.torch import load_file

from gpt2exp.sweep import launch
from gpt2exp.training import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LOOSE = {"bf16, recomputed": 1e-2, "fp16": 2e-3}
"""Products in half precision round differently for different numbers of rows; fp32 and emulated TF32 hardly do."""


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, ["tied", "untied, clipped, accumulated, shuffled", "bf16, recomputed"]),
        pytest.param(4, ["tf32, accumulated", "fp16", "fp64"], marks=pytest.mark.slow),
    ],
    ids=["2", "4"],
)
def test_several_equal_one(tmp_path: Path, processes: int, cases: list[str]) -> None:
    file = tmp_path / "found.safetensors"
    support.in_ranks(processes, shared_runs.several, str(file), "cpu", *cases)
    found = load_file(file)
    for case in cases:
        alone = shared_runs.train(case, "ddp")
        for how in ("ddp", "fsdp"):
            for name, expected in alone.items():
                if how == "fsdp" and name in ("residual_rms", "wte_grads"):
                    continue  # not measured there
                if name.startswith("weight.") and case != "fp64":
                    continue  # AdamW's first steps make a sign of a gradient of any size: rounding shows
                got, expected = found[f"{how}/{case}/{name}"].double(), expected.double()
                off = float((got - expected).norm() / expected.norm())
                assert off < LOOSE.get(case, 1e-4), f"{how} {case} {name} is off by {off:.1e}"
                if name == "loss":
                    assert off < 1e-5, f"{how} {case}: the losses are off by {off:.1e}"


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_goes_on(tmp_path: Path) -> None:
    args = [*support.SMALL, "train.steps=20", "checkpoint.every=5", "distributed=fsdp", "wandb.mode=disabled"]
    named = [*args, "hydra.run.dir=run"]
    program = [*TORCHRUN, "2", "-m", "gpt2exp.train"]
    process = support.start(tmp_path / "work", *named, program=program, held=":6")
    with support.at_step(tmp_path / "work", process) as (folder, _):
        os.kill(_process(process.pid, rank=1), signal.SIGKILL)
    assert support.finish(process).returncode == 1
    status = support.read(folder / "status.json")
    assert status["state"] == "failed", status
    assert "one of the run's 2 processes ended" in status["error"]
    words = ["resume=run", "train.steps=12", "checkpoint.save_last=true"]
    support.in_ranks(2, support.typed_in, tmp_path / "work", *words)
    assert support.read(folder / "status.json")["step"] == 12
    done = support.run(tmp_path / "work", "resume=run", "train.steps=20")
    assert done.returncode == 0, done.stderr
    whole = support.run(tmp_path / "work", *args, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr
    together, alone = (torch.tensor(support.losses(tmp_path / "work" / name)) for name in ("run", "whole"))
    assert len(together) == 20
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=0)


def _process(launcher: int, rank: int) -> int:
    """The worker of that rank below a torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"no process of rank {rank}")


def test_what_is_refused_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep, and a batch that the processes cannot share equally, before the processes meet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for name in ("process_group", "release_followers"):
        monkeypatch.setattr(distributed, name, contextlib.nullcontext)
    assert launch.command(["-m", *support.SMALL, "seed=1,2"]) == 2
    assert "start sweeps as gpt2exp -m" in capsys.readouterr().err
    assert launch.command([*support.SMALL, "train.batch_size=3"]) == 2
    assert "train.batch_size=3: torchrun started 2 processes" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
