"""The jobs of a sweep share one process but no folder, precision, peak memory or failure."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from support import SMALL, OfflineRun, at_step, finish, losses, read, run, run_folders, shell_code, start, the_run

from gpt2exp.config import RunConfig, TrainConfig
from gpt2exp.sweep import request as requests
from gpt2exp.sweep.composing import arguments
from gpt2exp.training import hardware, setup

AXES = ["precision=tf32,fp32", "seed=1,2"]
QUIET = "wandb.mode=disabled"
Done = subprocess.CompletedProcess[str]


def overrides(folder: Path) -> list[str]:
    """What Hydra says it composed a run of."""
    text = (folder / ".hydra" / "overrides.yaml").read_text()
    return [line.removeprefix("- ") for line in text.splitlines()]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, list[Path]]:
    """Both precisions with two seeds, tf32 first: what it printed and its run folders in order."""
    folder = tmp_path_factory.mktemp("sweep") / "here"
    done = run(folder, "-m", *AXES, *SMALL, "train.steps=4")
    return done, run_folders(folder)


class TestSweep:
    """Four runs of one command."""

    def test_four_runs_done(self, sweep: tuple[Done, list[Path]]) -> None:
        done, folders = sweep
        assert (done.returncode, done.stderr) == (0, "")
        assert [folder.name for folder in folders] == [
            "000_precision=tf32,seed=1",
            "001_precision=tf32,seed=2",
            "002_precision=fp32,seed=1",
            "003_precision=fp32,seed=2",
        ]
        assert len({folder.parent for folder in folders}) == 1
        assert [read(folder / "summary.json")["state"] for folder in folders] == ["done"] * 4
        assert "4 of 4 runs done" in done.stdout
        for folder in folders:
            assert folder.name in done.stdout

    def test_the_plan_is_what_hydra_ran(self, sweep: tuple[Done, list[Path]]) -> None:
        _, folders = sweep
        request = requests.new_request(arguments(["-m", *AXES, *SMALL, "train.steps=4"]))
        assert [list(job.overrides) for job in request.jobs] == [overrides(folder) for folder in folders]
        known = read(folders[0].parent / "sweep.json")
        assert known["jobs"] == [overrides(folder) for folder in folders]
        assert known["argv"] == ["-m", *AXES, *SMALL, "train.steps=4"]

    def test_each_its_own_wandb_run_in_one_group(self, sweep: tuple[Done, list[Path]]) -> None:
        _, folders = sweep
        runs = [OfflineRun(folder) for folder in folders]
        assert {entry.run.run_group for entry in runs} == {folders[0].parent.name}
        assert len({entry.run.run_id for entry in runs}) == 4
        assert [entry.run.display_name for entry in runs] == [",".join(overrides(folder))[:128] for folder in folders]
        assert [entry.exit_codes for entry in runs] == [[0]] * 4
        for entry, folder in zip(runs, folders, strict=True):
            assert [row["loss"] for row in entry.history] == losses(folder)

    def test_fp32_after_tf32_is_a_lone_fp32(self, sweep: tuple[Done, list[Path]], tmp_path: Path) -> None:
        """Bit for bit: nothing of the emulation, the seed or the allocator is left behind."""
        _, folders = sweep
        assert run(tmp_path / "here", *SMALL, "train.steps=4", "seed=1", QUIET).returncode == 0
        lone = the_run(tmp_path / "here")
        assert losses(folders[2]) == losses(lone)
        assert losses(folders[2]) != losses(folders[3])
        assert losses(folders[2]) != losses(folders[0])
        precision = [read(folder / "summary.json")["precision"] for folder in (*folders, lone)]
        assert [entry["requested"] for entry in precision] == ["tf32", "tf32", "fp32", "fp32", "fp32"]
        assert [entry["effective"] for entry in precision] == ["tf32", "tf32", "fp32", "fp32", "fp32"]
        assert precision[2] == precision[4]

    def test_isolated_is_the_same(self, sweep: tuple[Done, list[Path]], tmp_path: Path) -> None:
        """A job in a process of its own gives the same losses."""
        _, folders = sweep
        process = start(tmp_path / "here", "-m", "seed=1", *SMALL, "train.steps=4", "sweep.isolate=true", QUIET)
        done = finish(process)
        assert (done.returncode, done.stderr) == (0, "")
        fp32 = the_run(tmp_path / "here")
        assert losses(fp32) == losses(folders[2])
        assert read(fp32 / "status.json")["pid"] != process.pid


def test_a_diverging_job_stops_no_other(tmp_path: Path) -> None:
    """Exit code 1, the others done, and wandb told which is which."""
    done = run(tmp_path / "here", "-m", "optimizer.lr=1e9,1e-3,1e-4", *SMALL, "train.steps=2")
    folders = run_folders(tmp_path / "here")
    assert done.returncode == 1
    assert [read(folder / "summary.json")["state"] for folder in folders] == ["diverged", "done", "done"]
    assert "2 of 3 runs done" in done.stdout
    assert done.stderr.splitlines()[-1].endswith(": diverged: loss became nan at step 1")
    assert folders[0].name in done.stderr.splitlines()[-1]
    first, second, third = (OfflineRun(folder).exit_codes for folder in folders)
    assert first not in ([], [0])
    assert second == third == [0]


@pytest.mark.slow
def test_a_diverging_job_and_one_refused_memory_leave_the_comparison(tmp_path: Path) -> None:
    """Four jobs, of which those with the large batch cannot fit here and those with the large rate diverge."""
    free = hardware.free_memory(torch.device("cpu"))
    large = setup.memory(
        RunConfig(train=TrainConfig(batch_size=4096, seq_len=64, loss_chunk=10**6)), setup.Hardware("cpu")
    )
    if free is None or free > large:
        pytest.skip(f"this machine has the {large / 2**30:.0f} GiB that the large batch needs")
    more = ["train.seq_len=64", "train.loss_chunk=1000000", "train.steps=3", QUIET]
    axes = ["train.batch_size=2,4096", "optimizer.lr=1e-3,1e9"]
    done = run(tmp_path / "here", "-m", *SMALL, *more, *axes)
    assert done.returncode == 1
    (report,) = (tmp_path / "here").glob("sweeps/*/*/report.html")
    comparison = read(report.parent / "comparison.json")
    states = sorted(row["state"] for row in comparison["failed"])
    assert states == ["diverged", "failed", "failed"]
    refused = [row["error"] for row in comparison["failed"] if row["state"] == "failed"]
    assert all("GiB of memory" in error and "try train.batch_size=" in error for error in refused)
    assert "optimizer.lr" in done.stdout
    assert report.stat().st_size > 1000


def test_fail_fast(tmp_path: Path) -> None:
    done = run(tmp_path / "here", "-m", "optimizer.lr=1e9,1e-3", *SMALL, "train.steps=2", "sweep.fail_fast=true", QUIET)
    first, second = run_folders(tmp_path / "here")
    assert done.returncode == 1
    assert read(first / "status.json")["state"] == "diverged"
    assert not (second / "status.json").exists()
    assert not (second / "metrics.jsonl").exists()
    assert "0 of 2 runs done" in done.stdout
    assert "not run" in done.stdout


def test_peak_memory_is_each_jobs_own(tmp_path: Path) -> None:
    """The first job's logits alone take 1024 x 50257 floats at a time, 206 MB; the second's 6 MB."""
    done = run(tmp_path / "here", "-m", *SMALL, "train.batch_size=64,1", "train.seq_len=32", "train.steps=1", QUIET)
    assert done.returncode == 0
    big, small = (read(folder / "summary.json")["peak_memory_bytes"] for folder in run_folders(tmp_path / "here"))
    assert big - small > 150e6


@pytest.mark.slow
def test_a_killed_job_is_recorded_and_the_sweep_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path / "here", "-m", "train.steps=9,3", *SMALL, "sweep.isolate=true", QUIET, held="000:5")
    with at_step(tmp_path / "here", process) as (_, job):
        assert job.pid != process.pid
        job.kill()
    done = finish(process)
    assert done.returncode == 1
    first, second = run_folders(tmp_path / "here")
    status = read(first / "status.json")
    assert status["state"] == "failed"
    assert "killed by SIGKILL" in status["error"]
    assert "train.batch_size" in status["error"]
    assert status["step"] >= 1
    assert read(second / "summary.json")["state"] == "done"
    assert "1 of 2 runs done" in done.stdout


@pytest.mark.slow
def test_an_isolated_job_is_stopped_with_its_sweep(tmp_path: Path) -> None:
    """The signal reaches the job, which closes its record; no further job begins."""
    args = ["-m", "seed=1,2", *SMALL, "train.steps=1000000", "sweep.isolate=true", QUIET]
    process = start(tmp_path / "here", *args, held=":5")
    with at_step(tmp_path / "here", process) as (folder, _):
        process.send_signal(signal.SIGINT)
    assert shell_code(finish(process)) == 130
    first, second = run_folders(tmp_path / "here")
    assert (first, (second / "status.json").exists()) == (folder, False)
    assert read(folder / "status.json")["state"] == read(folder / "summary.json")["state"] == "interrupted"
