"""Writes and reads the files of a run's folder, all plain JSON. No torch.

`metrics.jsonl` gets a line a step. `status.json` says how far the run is. `summary.json` has the results, which
comparisons read. These files are the record; wandb gets a copy (`tracking.py`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from gpt2exp import choices
from gpt2exp.config import RunConfig
from gpt2exp.files import joint, replacing, sha256, walk, write_json
from gpt2exp.run import process, terminal
from gpt2exp.run.metrics import ALWAYS, DONE, MEASURED, Status, Summary, from_outside, judged, losses, number_of
from gpt2exp.schema import leaves, parse, plain, put, stored
from gpt2exp.section import BadRequest, first_line, typed
from gpt2exp.training import load

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def facts() -> dict[str, Any]:
    """Versions, revision and variables: an allow-list, so that nothing else of the environment is recorded."""
    # these change the arithmetic or the speed, and no key shows them
    arithmetic = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "environment": {name: os.environ[name] for name in (*arithmetic, *load.SPINNING) if name in os.environ},
        **loaded(),
        "platform": platform.platform(terse=True),
        "machine": process.machine(),
    }


@functools.cache
def loaded() -> dict[str, Any]:
    """Versions and commit of the code that this process has loaded. Looked up once for all jobs of a sweep."""
    import torch

    names = ("gpt2exp", "torch", "numpy", "hydra-core", "tiktoken", "wandb")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}
    versions["code"] = _code()
    versions["torch"] = str(torch.__version__)  # with the build, such as +cu130, which the package index leaves out
    return {"versions": versions, "git": _git()}


def _code() -> str:
    """A hash of the package's files that a run's losses depend on."""
    package = Path(__file__).parents[1]
    computing = [path for name in ("data", "model", "training") for path in (package / name).rglob("*.py")]
    computing += [package / "config.py", package / "run" / "job.py"]
    return joint([sha256(path) for path in sorted(computing)])[:12]


def _git() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether it was changed; None for an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}


SWEEP = "sweep.json"  # in a sweep's folder: `Sweep`
CHECKPOINTS = "checkpoints"  # in a run's folder: its checkpoints (`gpt2exp.run.checkpoint`)

# --- writing ---------------------------------------------------------------------------------------------------------


class Record:
    """Writes a run's files as it goes; `finish` closes it with a state.

    A run that was stopped and resumed has several parts: each is an entry of the summary's `parts`, and times are added
    up over them.
    """

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        *,
        began: float,
        metrics: Sequence[dict[str, Any]] = (),
        parts: Sequence[dict[str, Any]] = (),
    ) -> None:
        """`facts`: first fields of the summary, to which more may be added. `began`: `time.monotonic()` at the start.

        `metrics`, `parts`: of a run that resumes, the metrics of the steps already done, and its earlier parts.
        """
        self.folder, self.facts, self.began, self.metrics = folder, facts, began, list(metrics)
        self.measured: dict[str, Any] = dict.fromkeys(MEASURED)  # speed and memory so far
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._parts, self._part = list(parts), {"from_step": len(self.metrics), "started": started}
        self._opened, self._training_began = time.time(), 0.0
        for left in (*folder.glob(".*.part"), *folder.glob(".hydra/.*.part")):  # by a process killed while it wrote
            left.unlink(missing_ok=True)
        write_status(folder, "running", len(self.metrics))
        (folder / "summary.json").unlink(missing_ok=True)  # an earlier part's, with which the run would count as ended
        with replacing(folder / "metrics.jsonl") as part:  # steps after the checkpoint are done again
            part.write_text("".join(f"{json.dumps(row)}\n" for row in self.metrics), encoding="utf-8")
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def training_begins(self, **facts: Any) -> None:
        """End the start-up here; `facts` are recorded of this part."""
        self._training_began = time.monotonic()
        self._part |= facts

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Parts so far, this one last: `from_step`, `started`, seconds of `startup` and of `train`, hardware, wandb.

        `span`: when it ran, from the record's opening to now, in seconds since 1970.
        """
        now = time.monotonic()
        trained_from = self._training_began or now
        times = {"startup": round(trained_from - self.began, 3), "train": round(now - trained_from, 3)}
        return [*self._parts, self._part | times | {"span": [round(self._opened, 3), round(time.time(), 3)]}]

    def step(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics. If one is not a finite number, raise ValueError and append nothing."""
        line = json.dumps(metrics, allow_nan=False)
        self.metrics.append(metrics)
        self._file.write(line + "\n")
        self._file.flush()
        write_status(self.folder, "running", len(self.metrics))

    def sync(self) -> None:
        """Flush the steps so far to the disk: a checkpoint needs them."""
        os.fsync(self._file.fileno())

    def finish(self, state: str, error: str | None = None) -> Summary:
        """Write `summary.json`, then `status.json` with the final state (done, failed, diverged, interrupted)."""
        parts = self.parts
        wall = {name: sum(part[name] for part in parts) for name in ("startup", "train")}
        wall["total"] = wall["startup"] + wall["train"]
        summary = {
            "state": state,
            "error": error,
            **self.facts,
            **losses(self.metrics, from_outside(self.facts["config"])),
            **self.measured,
            "steps": len(self.metrics),
            "tokens": self.metrics[-1]["tokens"] if self.metrics else 0,
            "wall_seconds": {name: round(seconds, 3) for name, seconds in wall.items()},
            "started": parts[0]["started"],
            "parts": parts,
        }
        self._file.close()
        write_json(self.folder / "summary.json", summary)
        write_status(self.folder, state, len(self.metrics), error)
        return cast("Summary", summary)


def write_status(folder: Path, state: str, step: int, error: str | None = None) -> None:
    """Write `status.json`, with this process as the one at work."""
    whose = {"pid": os.getpid(), "machine": process.machine()}
    write_json(folder / "status.json", {"state": state, "step": step, "error": error, **whose, "updated": time.time()})


def read_status(folder: Path) -> Status:
    """`status.json` of a run folder; without a readable one the state is `not run`.

    If it says `running` but no process holds the folder's lock, the state is `interrupted`.
    """
    status: Status = {"state": "not run", "step": 0, "error": None}
    with contextlib.suppress(OSError, ValueError, TypeError):
        status |= json.loads((folder / "status.json").read_text(encoding="utf-8"))
        if status["state"] == "running" and not process.at_work(folder, status):
            status |= {"state": "interrupted", "error": "its process ended without a word: killed?"}
    return status


# --- reading ---------------------------------------------------------------------------------------------------------


def runs_below(folder: Path) -> list[Path]:
    """Run folders at or below `folder`, which are those with a `.hydra/config.yaml`, in the order of names."""
    found = (here for here, _, _ in walk(folder))
    return sorted(here for here in found if os.path.exists(here / ".hydra" / "config.yaml"))  # noqa: PTH110 - no error


def read_unresolved(folder: Path) -> dict[str, Any]:
    """A run's configuration by dotted key, with its interpolations; `BadRequest` if it cannot be read."""
    return leaves(_yaml(folder, "config.yaml", dict))


def read_config(folder: Path) -> tuple[RunConfig, dict[str, Any], list[str]]:
    """A run's configuration from its `.hydra`, its values of keys that no longer exist, and its overrides.

    Raises `BadRequest` if it cannot be read or carried out, `choices.Refused` if it names code that may not run here.
    """
    today, unknown, overrides = _stored_config(folder)
    choices.admit(today)
    return parse(today), unknown, overrides


def read_plain_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """As `read_config`, but the configuration as plain values. Code that it names is not loaded, and may be missing."""
    today, unknown, overrides = _stored_config(folder)
    outside = choices.found_in(today)
    for section, values in outside.items():
        put(today, section, {"name": values["name"]} if section == "schedule" else {})
    config = plain(parse(today))
    for section, values in outside.items():
        put(config, section, dict(values))
    return config, unknown, overrides


def _stored_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    today, unknown = stored(_yaml(folder, "config.yaml", dict))
    return today, unknown, [str(text) for text in _yaml(folder, "overrides.yaml", list)]


def _yaml(folder: Path, name: str, kind: type) -> Any:
    """A file in a run's `.hydra`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        found = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / name))
        if not isinstance(found, kind):
            raise ValueError(f"no {kind.__name__}")
        return found
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise BadRequest(f"its .hydra/{name} cannot be read ({first_line(error)})") from error


def saved(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run folder, whole or damaged, by the steps done at each, newest first."""
    found = {int(path.name[5:]): path for path in folder.glob(f"{CHECKPOINTS}/step_*") if path.name[5:].isdigit()}
    return dict(sorted(found.items(), reverse=True))


def run_around(folder: Path) -> Path | None:
    """The run whose `checkpoints` folder this is, or one of whose checkpoints; None if it is neither."""
    place = folder.resolve()
    inside = CHECKPOINTS in (place.name, place.parent.name)
    return next((above for above in place.parents[:2] if inside and (above / ".hydra").is_dir()), None)


def check_folder(folder: Path, key: str = "") -> None:
    """Raise `BadRequest` for a folder that is no run's, and name the one that was probably meant.

    `key`: the key it was typed for; with a key, a sweep's folder is accepted too.
    """
    wanted = "a run's or a sweep's folder" if key else "a run's folder"
    said, such = f"{key}={folder}" if key else str(folder), f"name {wanted}, such as runs/DAY/TIME-ID"

    def pasted(place: Path) -> str:
        return terminal.pasted(typed(key, terminal.place(place))) if key else shlex.quote(str(place))

    if not folder.is_dir():
        raise BadRequest(f"{said}: no such folder; {such}")
    if (folder / ".hydra" / "config.yaml").is_file() or (key and (folder / SWEEP).is_file()):
        return
    if above := run_around(folder):
        raise BadRequest(f"{said}: holds checkpoints of a run; name the run: {pasted(above)}")
    if below := {(sweep_of(run) if key else None) or run for run in runs_below(folder)}:
        newest = max(below, key=lambda one: (bool(saved(one)), one.stat().st_mtime))
        what = "a sweep" if Sweep.read(folder) else "a folder above runs"
        raise BadRequest(f"{said}: {what}; name one, such as {pasted(newest)}")
    raise BadRequest(f"{said}: not {wanted}; {such}")


def check_run(folder: Path) -> None:
    """Raise `BadRequest` for a folder that is no run's with a checkpoint."""
    check_folder(folder)
    if not saved(folder):
        remedy = "train with checkpoint.save_last=true (a run that was interrupted has one)"
        raise BadRequest(f"{folder}: this run saved no checkpoint; {remedy}")


def text_of(folder: Path) -> str | None:
    """The sha256 of a run's text, from its newest checkpoint; None if no checkpoint has it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, StopIteration):
        newest = next(iter(saved(folder).values()))
        return str(json.loads((newest / "state.json").read_text(encoding="utf-8"))["data"]["sha256"])
    return None


@functools.cache
def _schema() -> TypeAdapter[Summary]:
    from pydantic import TypeAdapter

    return TypeAdapter(Summary)


def read_summary(folder: Path) -> Summary:
    """`summary.json` of a run folder; OSError if there is none, ValueError (why) if it is no summary."""
    from pydantic import ValidationError

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if not isinstance(summary, dict):
        raise ValueError(f"it holds {type(summary).__name__}, no fields")
    summary = dict.fromkeys(("error", *losses([]), *MEASURED)) | summary
    try:
        _schema().validate_python(summary, strict=True)
    except ValidationError as error:
        wrong = error.errors()[0]
        where = ".".join(map(str, wrong["loc"]))
        raise ValueError(f"no {where}" if wrong["type"] == "missing" else f"{where} is {wrong['input']!r}") from error
    if missing := [key for key in (DONE if summary["state"] == "done" else ALWAYS) if key not in summary]:
        raise ValueError(f"no {missing[0]}")
    try:
        datetime.fromisoformat(str(summary["started"]))
    except ValueError as error:
        raise ValueError(f"started is {summary['started']!r}") from error
    return cast("Summary", summary)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The steps' metrics of a run folder; a line that a killed process left half written is skipped."""
    lines = list[str]()
    with contextlib.suppress(OSError):
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        rows = json.loads(f"[{','.join(lines)}]")  # one call is several times faster than one a line
    except ValueError:
        rows = []
        for line in lines:
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def kept_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of steps 0, 1, 2, ... up to the first that is missing."""
    rows = enumerate(read_metrics(folder))
    return [row for number, row in itertools.takewhile(lambda pair: pair[0] == pair[1].get("step"), rows)]


def row(folder: Path, above: Path) -> Summary:
    """A run's summary or, where it left none, its status; `name` is its folder as seen from `above`."""
    name = str(folder.relative_to(above)) if folder != above else folder.name
    try:
        return {**read_summary(folder), "name": name}
    except (OSError, ValueError):
        status = read_status(folder)
        return cast("Summary", {"name": name, "steps": status["step"], **status})


TUNING = "tuning"  # the folder, in a sweep's, that holds its tuning runs


@dataclass
class Tuned:
    """An arm of a sweep that is tuned."""

    overrides: list[str]  # without the tuned key and the seed
    runs: dict[str, list[str]]  # by value as typed, the folders of its tuning runs: one a tuning seed, in their order
    best: str | None = None  # the value at which its runs are compared; None until it is chosen


@dataclass
class Tuning:
    """The tuning runs of each arm of a sweep, and the arm's best value of the tuned key."""

    key: str
    seeds: list[int]
    arms: list[Tuned]

    @property
    def jobs(self) -> dict[str, list[str]]:
        """By folder the overrides of each tuning run, without those that change no result."""
        return {
            name: [*arm.overrides, f"{self.key}={value}", f"seed={seed}"]
            for arm in self.arms
            for value, names in arm.runs.items()
            for name, seed in zip(names, self.seeds, strict=True)
        }


@dataclass
class Sweep:
    """`sweep.json`: which jobs a sweep has, where they lie, and when it ends."""

    argv: list[str]  # the command line that asks for all of it
    jobs: list[list[str]]  # the overrides of each job; where a sweeper proposes the jobs, those that all share
    folders: list[str] | None = None  # the jobs' folders by number; None where a sweeper proposes the jobs
    cwd: str = "."  # where relative paths start
    launched: float = 0.0  # when its newest launch began, in seconds since 1970
    looks: list[int] = field(default_factory=list)  # with sweep.until: the numbers of seeds at which it may end
    rule: dict[str, Any] = field(default_factory=dict)  # what ends it: `axes`, `margin`, `max_seeds`, `max_hours`
    tuning: Tuning | None = None  # with sweep.tune: its tuning runs, which are not among `jobs`

    @classmethod
    def read(cls, folder: Path) -> Sweep | None:
        """The sweep whose folder this is; None if it is none, even if another program left a `sweep.json`."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            known = json.loads((folder / SWEEP).read_text(encoding="utf-8"))
            if isinstance(known, dict) and isinstance(known.get("jobs"), list):
                if tuning := known.get("tuning"):
                    known["tuning"] = Tuning(**tuning | {"arms": [Tuned(**arm) for arm in tuning["arms"]]})
                return cls(**{"argv": []} | {key: known[key] for key in cls.__dataclass_fields__ if key in known})
        return None

    @property
    def by_seed(self) -> dict[int, list[str]]:
        """The jobs' folders by seed, in the order of seeds."""
        found: dict[int, list[str]] = {}
        for name, job in zip(self.folders or (), self.jobs, strict=False):
            for seed in (text[5:] for text in job if text.startswith("seed=")):
                found.setdefault(int(seed), []).append(name)
        return found

    def write(self, folder: Path) -> None:
        """Write it to that folder."""
        write_json(folder / SWEEP, {key: value for key, value in asdict(self).items() if value not in (None, [], {})})


def sweep_of(folder: Path) -> Path | None:
    """The sweep folder around a job's folder, if there is one."""
    return next((above for above in folder.parents if Sweep.read(above)), None)


def progress(folder: Path, job: Path) -> str:
    """`job 3 of 8, about 40 s left`: a job's place in its sweep, and the time left at the pace of this launch."""
    sweep, others = Sweep.read(folder), [other for other in runs_below(folder) if other != job]
    if sweep is None or not sweep.folders:
        return f"job {len(others) + 1}"
    place, tried = str(job.relative_to(folder)), list(sweep.tuning.jobs) if sweep.tuning else []
    stage = tried if place in tried else sweep.folders
    text = f"job {(stage.index(place) if place in stage else len(others)) + 1} of {len(stage)}"
    if stage is tried:
        text = f"tuning {text}"
    elif sweep.looks:  # nobody knows how many jobs there will be
        return text.replace(" of ", " of at most ")
    statuses = {other: read_status(other) for other in others}
    ended = {other: status for other, status in statuses.items() if status["state"] not in ("running", "not run")}
    if now := sum(status["updated"] > sweep.launched for status in ended.values()):
        left = len(stage) - sum(str(other.relative_to(folder)) in stage for other in ended)
        text += f", about {(time.time() - sweep.launched) / now * left:.0f} s left"
    return text


def objective(folder: Path) -> float:
    """The loss by which a sweeper may judge a run (`judged`); infinite if it is not done."""
    found = row(folder, folder)
    loss = number_of(found, judged(found)) if found["state"] == "done" else None
    return math.inf if loss is None else loss
