"""Sweeps by joblib, Ray, submitit, Slurm, Optuna and wandb's agent give the losses of Hydra's own launcher.

Real: joblib, Ray with two local workers, submitit's local executor, Optuna, and the code by which wandb's agent starts
a run. Faked: Slurm's `sbatch`, which only keeps the script, and GPUs, which are names in `CUDA_VISIBLE_DEVICES`.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from filelock import FileLock
from support import (
    HELD,
    SMALL,
    OfflineRun,
    at_step,
    losses,
    read,
    run,
    run_folders,
    surroundings,
    the_run,
    without_figures,
)

from gpt2exp import machine
from gpt2exp.config import DeviceName, InitConfig, ModelConfig
from gpt2exp.model import gpt, init
from gpt2exp.run import process as processes
from gpt2exp.run import record
from gpt2exp.sweep import engines
from gpt2exp.sweep import launch as launching
from gpt2exp.sweep import request as requests
from gpt2exp.sweep.composing import arguments
from gpt2exp.training import hardware

ROOT = Path(__file__).parents[2]
QUIET = "wandb.mode=disabled"
AXES = ["optimizer.lr=1e-3,3e-3", "seed=1,2"]
SHORT = [*SMALL, "train.steps=12", QUIET]


def here(folder: Path, *args: str, figures: bool = False) -> tuple[int, str, str]:
    """`gpt2exp ARGS` in `folder` and in this process: the exit code, and what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = io.StringIO(), io.StringIO()
    drawn = contextlib.nullcontext() if figures else without_figures()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), drawn:
        return launching.command(list(args)), out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {"cpu.max": "1600000 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 3),
        ("0::/of/the/host", {"cpu.max": "400000 100000"}, 4),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu,cpuacct/a/cpu.cfs_quota_us": "300000"}, 3),
        ("1:cpu:/", {"cpu/cpu.cfs_quota_us": "-1"}, 8),
        ("1:cpu:/of/the/host\n5:memory:/", {"cpu/cpu.cfs_quota_us": "200000"}, 2),
        ("7:cpuset:/", {"cpuset/cpu.cfs_quota_us": "100000"}, 8),
        (None, {}, 8),
    ],
)
def test_a_containers_quota_bounds_the_cores(
    groups: str | None, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of control groups in both versions, nested ones too; written here as the system would show them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    if groups is not None:
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "self" / "cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        if "quota" in name:
            path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert machine.cores(tmp_path) == expected


@pytest.mark.parametrize(("typed", "expected"), [(None, 2), ("3", 3)])
def test_threads_are_no_more_than_the_cores_unless_the_user_says_so(
    typed: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's, and those that draw the first weights."""
    before, pools = torch.get_num_threads(), []
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if typed is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", typed)
    real = init.ThreadPoolExecutor
    monkeypatch.setattr(init, "ThreadPoolExecutor", lambda threads: (pools.append(threads), real(threads))[1])
    try:
        torch.set_num_threads(3)
        hardware.resolve_device(DeviceName.cpu)
        assert torch.get_num_threads() == expected
        shape = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=50)
        init.initialise(gpt.GPT(shape), InitConfig(), 0)
        assert pools == [expected]
    finally:
        torch.set_num_threads(before)


def the_sweep(below: Path) -> Path:
    """The one sweep below a folder."""
    (folder,) = below.glob("sweeps/*/*")
    return folder


def running(below: Path, jobs: int) -> list[int]:
    """Processes of the jobs below a folder, once that many are at work and well under way."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # a status is replaced as we look
            found = [read(path) for path in sorted(below.rglob("status.json"))]
            at_work = [status["pid"] for status in found if status["state"] == "running" and status["step"] >= 5]
            if len(at_work) == jobs:
                return at_work
        time.sleep(0.01)
    raise AssertionError(f"no {jobs} jobs are at work")


@contextlib.contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Run `act` in a thread while the block runs."""
    thread = threading.Thread(target=act)
    thread.start()
    yield
    thread.join()


@pytest.fixture(scope="module")
def basic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep by Hydra's own launcher, one job after another."""
    folder = tmp_path_factory.mktemp("basic")
    assert here(folder, "-m", *AXES, *SHORT)[0] == 0
    return the_sweep(folder)


def assert_same(sweep: Path, basic: Path) -> None:
    """The same losses bit for bit and the same verdicts on them, and the speeds are not compared."""
    ours, theirs = run_folders(sweep), run_folders(basic)
    assert [folder.name for folder in ours] == [folder.name for folder in theirs]
    assert [losses(folder) for folder in ours] == [losses(folder) for folder in theirs]
    assert {read(folder / "summary.json")["threads"] for folder in ours} == {1}
    assert len({read(folder / "status.json")["pid"] for folder in ours}) == 2, "two workers"
    of = [read(folder / "comparison.json")["axes"] for folder in (sweep, basic)]
    compared = [[effect for effect in axes if effect["metric"] == "loss_mean_last10"] for axes in of]
    assert compared[0] == compared[1]
    assert compared[0][0]["n_seeds"] == 2
    speeds = [[effect["reason"] for effect in axes if effect["metric"] == "tokens_per_second"] for axes in of]
    assert speeds[0] == ["runs shared the machine while they were timed"]
    assert speeds[1] != speeds[0]


# --- joblib ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The sweep by joblib, on a machine said to have two GPUs; and where the workers keep them from each other.

    joblib's workers live on for the tests that follow.
    """
    from joblib.externals.loky import get_reusable_executor

    folder = tmp_path_factory.mktemp("joblib")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        patched.setenv("TMPDIR", str(folder))
        assert here(folder, "-m", "hydra/launcher=workers", *AXES, *SHORT)[0] == 0
        yield the_sweep(folder), folder / f"gpt2exp-gpus-{os.getuid()}"
        get_reusable_executor().shutdown(kill_workers=True)


def test_joblib(parallel: tuple[Path, Path], basic: Path) -> None:
    assert_same(parallel[0], basic)


def test_each_worker_has_a_gpu_of_its_own(parallel: tuple[Path, Path]) -> None:
    locks = sorted(parallel[1].iterdir())
    assert [path.name for path in locks] == ["0.lock", "1.lock"]
    for path in locks:
        with pytest.raises(TimeoutError):
            FileLock(path, timeout=0).acquire()


@pytest.mark.slow
def test_a_joblib_sweep_gains_a_seed(parallel: tuple[Path, Path], tmp_path: Path) -> None:
    """By resume=, in workers again; what is done stays."""
    sweep, _ = parallel
    before = {folder.name: (folder / "status.json").read_bytes() for folder in run_folders(sweep)}
    code, out, _ = here(tmp_path, f"resume={sweep}", "seed=1,2,3")
    assert code == 0
    assert "6 of 6 runs done" in out
    after = run_folders(sweep)
    assert {folder.name: (folder / "status.json").read_bytes() for folder in after if folder.name in before} == before
    assert not {read(folder / "status.json")["pid"] for folder in after} & {os.getpid()}
    assert read(sweep / "comparison.json")["seeds"] == [1, 2, 3]


@pytest.mark.slow
def test_a_stopped_sweep_leaves_no_worker_at_work(parallel: tuple[Path, Path], tmp_path: Path) -> None:
    """Told to the launching process alone: every job finishes its step and saves itself before its worker ends."""
    pids: list[int] = []

    def tell() -> None:
        pids.extend(running(tmp_path, 2))
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(tell):
        ended, out, _ = here(tmp_path, "-m", "hydra/launcher=workers", "seed=1,2", *SHORT, "train.steps=1000000")
    assert ended == 130
    assert f"to go on: gpt2exp resume={the_sweep(tmp_path).relative_to(tmp_path)}" in out
    for folder in run_folders(tmp_path):
        summary = read(folder / "summary.json")
        assert summary["state"] == read(folder / "status.json")["state"] == "interrupted"
        assert list(record.saved(folder)) == [summary["steps"]]
    assert psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=30)[1] == []


def test_a_signal_calls_first_once() -> None:
    """The original interruption is raised, whatever a launcher raises in its place."""
    told: list[int] = []

    def launch() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as Ray does

    with pytest.raises(processes.Terminated), processes.raising_signals(lambda: told.append(1)):
        launch()
    assert told == [1]


def test_more_jobs_than_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    code, _, err = here(tmp_path, "-m", "hydra/launcher=workers", "hydra.launcher.n_jobs=3", "seed=1,2", *SHORT)
    assert code == 2
    assert err.startswith("gpt2exp: hydra.launcher.n_jobs=3: each job takes a GPU of its own, and here 2 can be seen;")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engines.gpus() == []


def test_a_gpu_that_another_has_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(engines, "_gpu", None)
    with FileLock(tmp_path / "3.lock"):
        engines.take_gpu(tmp_path)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
        engines.take_gpu(tmp_path)  # by its next job
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


# --- Ray -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ray(basic: Path, tmp_path: Path) -> None:
    """Two workers of a cluster that is gone with the sweep."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as place:  # sockets have short names
        own = f"++hydra.launcher.ray.init._temp_dir={place}"
        more = {"RAY_AUTH_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
        done = run(tmp_path / "here", "-m", "hydra/launcher=ray_local", own, *AXES, *SHORT, **more)
        assert done.returncode == 0, done.stderr
        assert "4 of 4 runs done" in done.stdout
        left = [process for process in psutil.process_iter(["cmdline"]) if place in str(process.info["cmdline"])]
        assert psutil.wait_procs(left, timeout=10)[1] == []
    assert_same(the_sweep(tmp_path / "here"), basic)


@pytest.mark.slow
def test_no_ray_there(tmp_path: Path) -> None:
    code, _, err = here(tmp_path, "-m", "hydra/launcher=ray_cluster", "seed=1,2", *SHORT)
    assert code == 2
    assert err.startswith("gpt2exp: hydra.launcher.ray.init: Could not find any running Ray instance")
    assert not list(tmp_path.iterdir())


# --- Slurm -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_preempted_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher's signal finishes the step and saves; its handler has the job started again, to the same losses."""
    request = [*SMALL, "train.steps=12", "seed=1", QUIET]
    pids: list[int] = []

    def preempt() -> None:
        with at_step(tmp_path / "here") as (_, held):
            pids.append(held.pid)
            held.send_signal(signal.SIGUSR2)

    monkeypatch.setenv("HELD", ":5")
    monkeypatch.setenv("PYTHONPATH", str(HELD))
    with meanwhile(preempt):
        code, out, _ = here(tmp_path / "here", "-m", "hydra/launcher=slurm_local", *request)
    assert code == 0
    assert "1 of 1 runs done" in out
    assert here(tmp_path / "whole", *request)[0] == 0
    folder = the_run(tmp_path / "here")
    summary = read(folder / "summary.json")
    assert len(summary["parts"]) == 2
    assert summary["parts"][1]["from_step"] == 6
    assert read(folder / "status.json")["pid"] != pids[0]
    assert losses(folder) == losses(the_run(tmp_path / "whole"))


def test_under_slurm_sigterm_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It saves and goes on; SIGUSR2 ends the block, and then its own handler gets it, once however often it came."""
    told: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: told.append(number))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    try:
        with processes.deferred() as stop:
            stop.waiting = True
            signal.raise_signal(signal.SIGTERM)
            assert (stop.warned, stop.asked) == (True, None)
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            assert isinstance(stop.asked, processes.Preempted)
            assert told == []
        assert told == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


SBATCH = """\
#SBATCH --array=0-1%2
#SBATCH --cpus-per-task=8
#SBATCH --error=FOLDER/%A_%a/%A_%a_0_log.err
#SBATCH --gpus-per-node=1
#SBATCH --job-name=gpt2exp
#SBATCH --mem=32GB
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=FOLDER/%A_%a/%A_%a_0_log.out
#SBATCH --partition=short
#SBATCH --signal=USR2@120
#SBATCH --time=240
#SBATCH --wckey=submitit"""


def test_the_script_that_slurm_gets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One array of jobs, a GPU each, warned two minutes before the end; the queue is full here, and that is said."""
    there = tmp_path / "bin"
    there.mkdir()
    for name, body in (("srun", ""), ("sbatch", f'cp "$1" {tmp_path}/script.sh; echo queue full >&2; exit 1')):
        (there / name).write_text(f"#!/bin/sh\n{body}\n")
        (there / name).chmod(0o755)
    request = ["-m", "hydra/launcher=slurm", "hydra.launcher.partition=short", "seed=1,2", *SHORT]
    code, _, err = here(tmp_path / "none", *request)
    assert code == 2
    assert "there is no Slurm (srun) here" in err
    assert not list((tmp_path / "none").iterdir())
    monkeypatch.setenv("PATH", f"{there}:{os.environ['PATH']}")
    code, out, err = here(tmp_path / "here", *request)
    assert code == 1
    assert "the sweep ended early: " in err
    assert "to go on: gpt2exp resume=" in out
    script = (tmp_path / "script.sh").read_text()
    sweep = the_sweep(tmp_path / "here")
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert lines == SBATCH.replace("FOLDER", f"{sweep}/.submitit").splitlines()
    assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK\n" in script
    assert f"{sys.executable} -u -m submitit.core._submit" in script
    assert subprocess.run(["sh", "-n", str(tmp_path / "script.sh")], check=False).returncode == 0


# --- searches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, str, str]]:
    """Seven rates by Optuna, from too low to too high."""
    folder = tmp_path_factory.mktemp("search")
    rates = "optimizer.lr=tag(log,interval(1e-3,1e6))"
    more = ["data.val_fraction=0.001", "train.steps=6", "hydra.sweeper.n_trials=7"]
    done = here(folder, "-m", "hydra/sweeper=lr_search", rates, *SHORT, *more)
    return the_sweep(folder), done


@pytest.mark.slow
def test_search(search: tuple[Path, tuple[int, str, str]]) -> None:
    """Optuna is told that a rate that diverges is the worst, and the search goes on."""
    sweep, (code, out, _) = search
    summaries = [read(folder / "summary.json") for folder in run_folders(sweep)]
    states = [summary["state"] for summary in summaries]
    assert set(states) == {"done", "diverged"}
    assert len(states) == 7
    assert code == 1, "a run diverged"
    best = min((summary for summary in summaries if summary["state"] == "done"), key=lambda one: one["val_loss"])
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_value"] == best["val_loss"]
    rate = best["config"]["optimizer"]["lr"]
    assert found["best_params"] == {"optimizer.lr": rate}
    assert f"of {states.count('done')} values tried, optimizer.lr={rate} ended with the least validation loss" in out
    assert "seeds" not in out.partition("values tried")[2], "values that ran once are not compared"
    assert all(folder.name.partition("_")[2].startswith("optimizer.lr=") for folder in run_folders(sweep))


@pytest.mark.slow
def test_a_search_is_not_resumed(search: tuple[Path, tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, err = here(tmp_path, f"resume={search[0]}")
    assert code == 2
    assert "its sweeper proposed the jobs as it went" in err


@pytest.mark.slow
def test_wandb_agents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What wandb's agent makes of the shipped file is a run of ours, which joins the agent's run in the sweep."""
    from wandb import wandb_agent

    file = yaml.safe_load((ROOT / "experiments" / "lr_search" / "sweep.yaml").read_text())
    least, most = (file["parameters"]["optimizer.lr"][end] for end in ("min", "max"))
    assert isinstance(least, float)
    small = [*SMALL, "data.val_fraction=0.001", "train.steps=3"]
    agent: Any = object.__new__(wandb_agent.Agent)  # without the server that its constructor asks
    agent._sweep_command = [*file["command"][:-1], *small, file["command"][-1]]
    agent._function, agent._in_jupyter, agent._forward_signals, agent._run_processes = None, False, False, {}
    for key, value in surroundings(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for key, value in {"MODE": "offline", "SWEEP_ID": "abcd1234", "RUN_ID": "", "SWEEP_PARAM_PATH": ""}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    monkeypatch.chdir(tmp_path)
    args = {"optimizer.lr": {"value": math.sqrt(least * most)}}
    agent._command_run({"run_id": "run00001", "program": file["program"], "args": args})
    assert agent._run_processes["run00001"].wait() == 0
    folder = the_run(tmp_path / "runs")
    summary, mirrored = read(folder / "summary.json"), OfflineRun(folder)
    assert summary["state"] == "done"
    assert summary["config"]["optimizer"]["lr"] == pytest.approx(math.sqrt(least * most))
    assert (mirrored.run.sweep_id, mirrored.run.run_id) == ("abcd1234", "run00001")
    assert mirrored.summary[file["metric"]["name"]] == summary["val_loss"]
    assert mirrored.config["optimizer"]["lr"] == summary["config"]["optimizer"]["lr"]


# --- what is said of them ---------------------------------------------------------------------------------------------


def test_the_commands_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each line of the page's section is a request; every preset is in one, and in the page of groups."""
    (tmp_path / "srun").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    page = (ROOT / "gpt2exp" / "sweep" / "README.md").read_text()
    section = page[page.index("## Launchers") :].split("\n## ")[0]
    groups = (ROOT / "conf" / "README.md").read_text()
    lines = re.findall(r"^gpt2exp (-m .+?) +#", section, re.MULTILINE)
    for line in lines:
        assert requests.new_request(arguments(line.replace("1,2,3,4", "1").split())).jobs
    presets = [path for kind in ("launcher", "sweeper") for path in (ROOT / "conf" / "hydra" / kind).glob("*.yaml")]
    shown = {re.findall(r"hydra/(\w+)=(\w+)", line)[0] for line in lines}
    assert shown == {(path.parent.name, path.stem) for path in presets}
    for path in presets:
        assert f"`{path.stem}`" in groups


# --- plugins that are not there --------------------------------------------------------------------------------------

WITHOUT = {
    "hydra/launcher=workers": "joblib",
    "hydra/launcher=ray_local": "ray",
    "hydra/launcher=slurm": "slurm",
    "hydra/launcher=slurm_local": "slurm",
    "hydra/sweeper=lr_search": "optuna",
}


def test_a_plugin_that_is_not_installed(tmp_path: Path) -> None:
    """An empty package takes the name that the plugins share, so that none is found."""
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()
    program = "import sys; from gpt2exp import train; print([train.command(['-m', it]) for it in sys.argv[1:]])"
    done = run(tmp_path / "here", *WITHOUT, program=[sys.executable, "-c", program], PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str([2] * len(WITHOUT))
    lines = done.stderr.splitlines()
    assert len(lines) == len(WITHOUT)
    for line, extra in zip(lines, WITHOUT.values(), strict=True):
        assert line.endswith(f"is not installed; pip install 'gpt2exp[{extra}]'")
    assert not list((tmp_path / "here").iterdir())
