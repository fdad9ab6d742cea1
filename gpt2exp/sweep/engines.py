"""Launchers: a sweep's jobs run by joblib, Ray or Slurm instead of one after another in this process. No torch.

Hydra's plugins start the jobs. This module decides how many run at a time and which job uses which GPU, and stops the
jobs when the sweep is stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from gpt2exp.config import DeviceName
from gpt2exp.machine import cores
from gpt2exp.run import process, record
from gpt2exp.section import BadRequest, first_line, require

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
RAY = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
EXTRAS = {"joblib": "joblib", "ray": "ray", "submitit": "slurm", "optuna": "optuna"}
"""By a word in the name of Hydra's plugin, the extra of this package that installs it."""

_launching = False  # whether this process launches a sweep: `prepare_worker` leaves it alone
_gpu: FileLock | None = None  # a worker's, for as long as it lives


def install_hint(choice: str) -> str:
    """The command that installs the plugin behind a choice such as `hydra/launcher/joblib`; empty if it needs none."""
    plugin = choice.rpartition("/")[2].partition("_")[0]
    return f"pip install 'gpt2exp[{EXTRAS[plugin]}]'" if plugin in EXTRAS else ""


# --- how many side by side -------------------------------------------------------------------------------------------


def gpus() -> list[str]:
    """The GPUs this process may use, as `CUDA_VISIBLE_DEVICES` names them, found without CUDA's own library."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(number) for number, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def workers() -> int:
    """Jobs at a time: one a GPU, or two on a processor."""
    return len(gpus()) or min(2, cores())


def resolvers() -> dict[str, Any]:
    """The OmegaConf resolvers that the presets in `conf/hydra/launcher` use."""
    return {
        "cores_here": cores,
        "gpus_here": lambda: len(gpus()),
        "jobs_at_once": workers,
        "cores_a_job": lambda: max(1, cores() // workers()),
        "gpus_a_job": lambda: min(1, len(gpus())),
    }


def check(launcher: DictConfig, device: DeviceName) -> None:
    """Refuse launcher settings that this machine cannot carry out."""
    there = len(gpus())
    if launcher._target_ == JOBLIB and there and device is not DeviceName.cpu:
        why, remedy = f"each job takes a GPU of its own, and here {there} can be seen", f"at most n_jobs={there}"
        require(1 <= launcher.n_jobs <= there, "hydra.launcher.n_jobs", launcher.n_jobs, why, remedy)
    if launcher._target_ == SLURM:
        why, remedy = "there is no Slurm (srun) here", "go to a cluster's login node, or try hydra/launcher=slurm_local"
        require(shutil.which("srun") is not None, "hydra/launcher", "slurm", why, remedy)


# --- in the process that launches ------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(launcher: DictConfig, sweep: Path) -> Iterator[None]:
    """Start what the launcher needs; a signal inside the block stops the jobs on this machine before it raises.

    Raises:
        BadRequest: Ray cannot be started, or reached, with these settings.
    """
    global _launching
    _launching = True
    try:
        with contextlib.ExitStack() as stack:
            if launcher._target_ == RAY:
                stack.enter_context(_ray(launcher.ray.init))
            if launcher._target_ not in (BASIC, SLURM):  # Slurm's jobs outlive who submitted them
                stack.enter_context(process.raising_signals(lambda: stop(sweep)))
            yield
    finally:
        _launching = False


@contextlib.contextmanager
def _ray(settings: DictConfig) -> Iterator[None]:
    """Start or join Ray before the launcher does; after the block end what was started here."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # by default Ray drops lines that are alike
    import ray

    try:
        # Ray's own handler would end its workers in the middle of a step
        with process.handling({signal.SIGTERM: signal.getsignal(signal.SIGTERM)}):
            ray.init(**cast("dict[str, Any]", OmegaConf.to_container(settings, resolve=True)))
    except (ValueError, TypeError, RuntimeError, ConnectionError) as error:
        why = f"{first_line(error)}; these are the arguments of ray.init"
        raise BadRequest(f"hydra.launcher.ray.init: {why}") from error
    try:
        yield
    finally:
        ray.shutdown()


def stop(sweep: Path) -> None:
    """Ask every job of a sweep on this machine to finish its step and save, and wait until each has."""
    told = []
    for folder in record.runs_below(sweep):
        status = record.read_status(folder)
        if status["state"] == "running" and status["machine"] == process.machine() and status["pid"] != os.getpid():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(status["pid"], signal.SIGTERM)
                told.append(folder)
    for folder in told:
        while True:  # a step may take minutes; a second signal ends this wait
            with contextlib.suppress(BadRequest), process.held(folder):
                break
            time.sleep(0.05)


# --- in a worker -----------------------------------------------------------------------------------------------------


def prepare_worker(launcher: str, sweep: Path, device: DeviceName) -> None:
    """Prepare a launcher's worker: ignore Ctrl-C, restore the current folder, lock a GPU. Before torch is imported."""
    if _launching or launcher == BASIC:
        return
    if threading.current_thread() is threading.main_thread():  # only there can a handler be set
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the launching process, which tells us
    with contextlib.suppress(OSError):  # relative paths are as typed
        if known := record.Sweep.read(sweep):
            os.chdir(known.cwd)
    if launcher == JOBLIB and device is not DeviceName.cpu:
        take_gpu()


def take_gpu(folder: Path | None = None) -> None:
    """Lock a free GPU, waiting for one, and hide the others from CUDA; without GPUs do nothing."""
    global _gpu
    if _gpu is not None or not gpus():
        return
    folder = folder or Path(tempfile.gettempdir()) / f"gpt2exp-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    while _gpu is None:
        for name in gpus():
            lock = FileLock(folder / f"{name}.lock", timeout=0)
            with contextlib.suppress(Timeout):
                lock.acquire()
                _gpu, os.environ["CUDA_VISIBLE_DEVICES"] = lock, name
                break
        else:
            time.sleep(1)
