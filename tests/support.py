"""What several test files share: a command line in a folder of its own, what a run left, wandb's offline file.

`start` and `run` carry out a command in a process of its own, with its own environment, pipes and signals. By default
that process is forked from one that has imported torch and all else (`warmed`): importing takes four seconds. With
`program` (PROGRAM is the plain one), or with a variable that is read before Python begins, a new interpreter starts.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import multiprocessing.forkserver as forkserver
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from wandb.proto import wandb_internal_pb2

from gpt2exp.sweep import launch

SMALL = ["model=nano", "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=64"]
SMALL += ["train.batch_size=2", "train.seq_len=8"]
"""The smallest model worth training, on the smallest batch: milliseconds a step."""
PROGRAM = [sys.executable, "-m", "gpt2exp.train"]
COMPARE = [sys.executable, "-m", "gpt2exp.compare"]
HELD = Path(__file__).parent / "held"
EARLY = ("LD_", "PYTHON", "OMP_", "GOMP_", "MKL_")
"""Variables that are read before or while Python and torch are loaded."""
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["warmed"])


def _process(act: Callable[..., object], *args: Any) -> ForkServerProcess:
    """A forked process, begun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the server finds what it is to load
        forkserver.ensure_running()
    made = FORKING.Process(target=act, args=args)
    made.start()
    return made


def surroundings(home: Path, **env: str) -> dict[str, str]:
    """The environment of a user without credentials."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "HYDRA_"))}
    return clean | {"HOME": str(home), "COLUMNS": "120", **env}


@contextlib.contextmanager
def without_figures() -> Iterator[None]:
    """Comparisons inside the block draw none: that takes a second each, and few tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2exp.compare.figures.draw", lambda _: [])
        yield


def _forked(
    folder: Path, environment: dict[str, str], cores: set[int], args: tuple[str, ...], out: str, err: str, figures: bool
) -> None:
    """What `python -m gpt2exp.train ARGS` does, in a forked process bound to `cores`, if the system binds any."""
    from gpt2exp.train import main

    gc.freeze()  # what the server has loaded is not looked through again
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if cores:
        os.sched_setaffinity(0, cores)
    tempfile.tempdir = None  # TMPDIR may be another
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "ROOM" in environment:
        taken = psutil.Process().memory_info().vms + int(environment["ROOM"]) * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (taken, taken))
    if "HELD" in environment:
        runpy.run_path(str(HELD / "sitecustomize.py"))
    sys.argv = ["gpt2exp", *args]
    with contextlib.nullcontext() if figures else without_figures():
        main()


class Forked:
    """As much of `subprocess.Popen` as the tests use, for a forked process."""

    def __init__(self, folder: Path, environment: dict[str, str], args: tuple[str, ...], figures: bool) -> None:
        self.args = args
        self._files = [tempfile.NamedTemporaryFile("w+", encoding="utf-8") for _ in range(2)]  # noqa: SIM115
        names = [file.name for file in self._files]
        # a fork has the server's cores, but a program those of the process that starts it
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        self._process = _process(_forked, folder, environment, cores, args, *names, figures)

    @property
    def pid(self) -> int:
        """The id of the process itself."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, as `poll` returns it."""
        return self.poll()

    def poll(self) -> int | None:
        """The exit code, or less than 0 the signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and error, once it has ended."""
        self._process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(list(self.args), timeout)
        out, err = (self._text(file) for file in self._files)
        return out, err

    @staticmethod
    def _text(file: IO[str]) -> str:
        with file:
            return file.read()


Process = subprocess.Popen[str] | Forked


def start(
    folder: Path, *args: str, program: list[str] | None = None, held: str = "", figures: bool = False, **env: str
) -> Process:
    """Begin `gpt2exp ARGS` in `folder`; `held="001:5"`: the run in the folder 001... waits after 5 steps.

    A forked process draws the figures of its comparison only if `figures` says so, and may take `ROOM` MiB of memory
    beyond what it has, if that is among `env`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = surroundings(folder.parent / "home", **env)
    if held:
        environment |= {"HELD": held, "PYTHONPATH": str(HELD)}
    # a launcher's workers are ended by exit handlers, which a fork of multiprocessing's does not call
    workers = any(arg.startswith("hydra/launcher=") for arg in args)
    if program is None and not workers and not any(key.startswith(EARLY) for key in env):
        return Forked(folder, environment, args, figures)
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [*(program or PROGRAM), *args],
        cwd=folder,
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        # a shell lets what it starts in the background ignore SIGINT, and so its children: not these
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: Process) -> subprocess.CompletedProcess[str]:
    """Wait for what `start` began."""
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode or 0, out, err)


def run(
    folder: Path, *args: str, program: list[str] | None = None, figures: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """`gpt2exp ARGS` in `folder`, to its end."""
    return finish(start(folder, *args, program=program, figures=figures, **env))


def _ranked(number: int, rank: int, port: int, act: Callable[..., object], args: tuple[Any, ...]) -> None:
    """One of several processes, told of the others as torchrun tells its own."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()})
    act(*args)


def in_ranks(number: int, act: Callable[..., object], *args: Any) -> None:
    """`act(*args)` in so many forked processes of one run; each of them must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [_process(_ranked, number, rank, port, act, args) for rank in range(number)]
    for process in processes:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * number


def typed_in(folder: Path, *args: str) -> None:
    """`gpt2exp ARGS` in this process, which it ends."""
    os.chdir(folder)
    sys.argv = ["gpt2exp", *args]
    with without_figures():
        launch.main()


def shell_code(process: subprocess.CompletedProcess[str]) -> int:
    """The exit code as a shell gives it: ended by signal N is 128 + N."""
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def run_folders(below: Path) -> list[Path]:
    """Every run folder below a folder, by name."""
    return sorted(path.parent.parent for path in below.rglob(".hydra/config.yaml"))


def the_run(below: Path) -> Path:
    """The one run folder below a folder."""
    (folder,) = run_folders(below)
    return folder


def read(path: Path) -> Any:
    """A JSON file, or the list of objects of a JSON-lines file."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def losses(folder: Path) -> list[float]:
    """The losses of a run, step by step."""
    return [row["loss"] for row in read(folder / "metrics.jsonl")]


@contextlib.contextmanager
def at_step(below: Path, process: Process | None = None, job: int = 0) -> Iterator[tuple[Path, psutil.Process]]:
    """The `job`-th run folder and its process, which `held` has stopped; it goes on when the block is left.

    Signals sent inside the block all reach it in the middle of one step.
    """
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        with contextlib.suppress(OSError, IndexError, psutil.NoSuchProcess):  # not there yet
            folder = run_folders(below)[job]
            found = psutil.Process(read(folder / "status.json")["pid"])
            if found.status() == psutil.STATUS_STOPPED:
                break
        time.sleep(0.02)
    else:
        raise AssertionError(f"no run was held: {process and process.poll()}")
    try:
        yield folder, found
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.send_signal(signal.SIGCONT)


def offline_records(file: Path) -> Iterator[Any]:
    """The records of wandb's offline file: LevelDB's log format, its first block opened by 7 bytes of wandb's own."""
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:  # too little for a record's head: padding
            at += room
            continue
        _crc, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind in (1, 2, 3, 4), f"byte {at} of {file} opens no record"
        parts = (b"" if kind in (1, 2) else parts) + data[at + 7 : at + 7 + length]  # 1 full, 2 first, 3 middle, 4 last
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


class OfflineRun:
    """One wandb run as its offline file tells it."""

    def __init__(self, folder: Path) -> None:
        """`folder`: of the run, with `wandb/offline-run-*` in it."""
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        self.file = file
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.metrics: list[Any] = []
        self.exit_codes: list[int] = []
        self.run: Any = None
        for record in offline_records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._update(self.config, record.run.config.update)
            elif kind == "config":
                self._update(self.config, record.config.update)
            elif kind == "summary":
                self._update(self.summary, record.summary.update)
            elif kind == "history":
                self.history.append({})
                self._update(self.history[-1], record.history.item)
            elif kind == "metric":
                self.metrics.append(record.metric)
            elif kind == "exit":
                self.exit_codes.append(record.exit.exit_code)

    @staticmethod
    def _update(target: dict[str, Any], items: Any) -> None:
        for item in items:
            target[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)


def stopping_at(number: int, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Ctrl-C where a sweep in this process begins its run of this number; the folders of the runs that began."""
    begun: list[Path] = []
    real = launch.run_folder

    def stopping(folder: Path, began: float) -> Any:
        begun.append(folder)
        if len(begun) == number:
            raise KeyboardInterrupt
        return real(folder, began)

    monkeypatch.setattr(launch, "run_folder", stopping)
    return begun
