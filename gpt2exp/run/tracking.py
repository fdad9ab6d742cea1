"""Copies a run's metrics to Weights & Biases. If wandb fails, training goes on.

The local files are the record. So the first failure is one warning, and nothing more is sent.
"""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from gpt2exp.config import WandbConfig, WandbMode
from gpt2exp.run import terminal
from gpt2exp.run.metrics import METRICS, Summary, from_outside
from gpt2exp.section import first_line

INIT_TIMEOUT = 15  # seconds to wait for the server before going offline
NO_ROOM = 2**16  # free bytes below which wandb's writes may fail: it writes blocks of 32 KiB
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
"""By value of WANDB_MODE, the mode it means."""

KEYS = {
    "project": ("WANDB_PROJECT",),
    "entity": ("WANDB_ENTITY",),
    "group": ("WANDB_RUN_GROUP",),
    "name": ("WANDB_NAME", "WANDB_RUN_NAME"),
    "tags": ("WANDB_TAGS", "WANDB_RUN_TAGS"),
    "dir": ("WANDB_DIR", "WANDB_ROOT_DIR"),
}
"""By key of the section, the variables that give its default; the first that is set counts."""

IDENTITY = ("run_id", "resume", "resume_from", "fork_from", "sweep_id", "sweep_param_path", "launch")
"""wandb's settings that name the wandb run; their variables are WANDB_ and the name."""

FIXED = {
    "WANDB_CONSOLE": "off",
    **dict.fromkeys(("WANDB_DISABLED", "WANDB_LOG_MODEL", "WANDB_WATCH"), "false"),  # of Hugging Face's trainer
    "WANDB_REINIT": "finish_previous",
    "WANDB_SAVE_CODE": "false",
    **dict.fromkeys(("WANDB_DISABLE_CODE", "WANDB_DISABLE_GIT"), "true"),
    **dict.fromkeys(("WANDB__DISABLE_META", "WANDB__DISABLE_STATS"), "true"),
    **dict.fromkeys(("WANDB_X_DISABLE_META", "WANDB_X_DISABLE_STATS"), "true"),
}
"""Variables that have no effect, and the value used instead. wandb itself reads those not named in these tables."""

log = logging.getLogger("gpt2exp")


def defaults() -> dict[str, Any]:
    """The defaults that the environment gives, by key of the section."""
    found: dict[str, Any] = {}
    for key, names in KEYS.items():
        if value := next(filter(None, map(os.environ.get, names)), None):
            tags = [tag.strip() for tag in value.split(",") if tag.strip()]
            found[key] = tags if key == "tags" else value
    return found


def ignored(config: WandbConfig, *, sweep: bool, resumed: bool) -> list[str]:
    """A line for each of wandb's variables that is set and has no effect."""
    lines = []
    there = {name: value for name, value in os.environ.items() if value and name.startswith("WANDB_")}
    mode = there.get("WANDB_MODE", "online")
    if config.mode is WandbMode.auto and mode not in MODES:
        lines.append(f"WANDB_MODE={mode}: not used; choose online, offline or disabled")
    if resolve_mode(config) == "disabled":
        return lines
    truth = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false"}
    for name, value in FIXED.items():
        given = there.get(name, value).lower()
        if truth.get(given, given) != value:
            lines.append(f"{name}={there[name]}: not used; in gpt2exp it is {value}")
    which = ", ".join(name for name in (f"WANDB_{field.upper()}" for field in IDENTITY) if name in there)
    if sweep and which:
        lines.append(f"{which}: not used in a sweep; its jobs and its comparison are each a run of their own in wandb")
    elif resumed:
        if "WANDB_RUN_ID" in there and "WANDB_RESUME" not in there:
            why = "not used by a resumed run, unless WANDB_RESUME=allow lets it join that run"
            lines.append(f"WANDB_RUN_ID: {why}")
        other = [key for key, value in defaults().items() if getattr(config, key) != value]
        lines += [f"{KEYS[key][0]}: not used by a resumed run; wandb.{key}=VALUE changes it" for key in other]
    return lines


def resolve_mode(config: WandbConfig) -> str:
    """online, offline or disabled: by the key; under `auto` by WANDB_MODE, else by whether there are credentials."""
    if config.mode is not WandbMode.auto:
        return str(config.mode.value)
    if mode := MODES.get(os.environ.get("WANDB_MODE", "")):
        return mode
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    known = bool(os.environ.get("WANDB_API_KEY"))
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        known = known or netrc.netrc(os.environ.get("NETRC") or None).authenticators(host) is not None
    return "online" if known else "offline"


class Mirror:
    """One wandb run. No call raises. It is opened in a thread: that takes long, and is mostly waiting."""

    def __init__(
        self, config: WandbConfig, folder: Path, run: dict[str, Any], *, job_type: str | None = None, own: bool = False
    ) -> None:
        """`run`: wandb.init's `config`, `name`, `group`, `tags`, and `notes` if any.

        `own`: open a new wandb run, even if the environment names one. `job_type`: None for WANDB_JOB_TYPE or `train`.
        """
        job_type = job_type or os.environ.get("WANDB_JOB_TYPE") or os.environ.get("WANDB_RUN_JOB_TYPE") or "train"
        if "notes" in run:
            run = run | {"notes": "\n".join(filter(None, (os.environ.get("WANDB_NOTES"), run["notes"])))}
        place = {"project": config.project, "entity": config.entity, "dir": config.dir or str(folder)}
        self.mode, self._run = resolve_mode(config), cast(Any, None)
        asked = place | {"job_type": job_type} | run
        self._opening = threading.Thread(target=self._open, args=(asked, own), daemon=True)
        self._opening.start()

    def _open(self, run: dict[str, Any], own: bool) -> None:
        for mode in dict.fromkeys((self.mode, "offline")) if self.mode != "disabled" else ():
            try:
                with _no_identity() if own else contextlib.nullcontext():
                    self._run = _init(run, mode)
                self.mode = mode
                return
            except Exception as error:  # wandb raises its own kinds and the network's
                then = "going on offline" if mode == "online" else "going on without it"
                log.warning("wandb could not start %s (%s); %s", mode, _why(error), then)
        self.mode = "disabled"

    def ready(self) -> str:
        """Wait until the wandb run is open; returns its mode: online, offline or disabled."""
        self._opening.join()
        return self.mode

    def link(self) -> str | None:
        """The wandb run's address if it is online, else its id; None without a run."""
        self._opening.join()
        return None if self._run is None else str(self._run.url if self.mode == "online" else self._run.id)

    def describe(self, facts: dict[str, Any]) -> None:
        """Add to the wandb run's config."""
        self._guard(lambda: self._run.config.update(facts))

    def log(self, metrics: dict[str, Any]) -> None:
        """Send one step's metrics; each element of a list gets a curve of its own."""
        flat: dict[str, Any] = {}
        for key, value in metrics.items():
            flat |= {f"{key}/{i}": one for i, one in enumerate(value)} if isinstance(value, list) else {key: value}
        # commit now: otherwise wandb sends this step at finish, over summary fields of the same name
        self._guard(lambda: self._run.log(flat, step=metrics["step"], commit=True))

    def show(self, make: Callable[[], dict[str, Any]]) -> None:
        """Send the tables and images that `make` returns. Only if there is a run, it is called and may import wandb."""
        self._guard(lambda: self._run.log(make()))

    def finish(self, summary: dict[str, Any], *, failed: bool) -> Path | None:
        """Write the summary and close the wandb run, as failed if it was; returns the folder to sync if offline."""
        self._guard(lambda: self._run.summary.update(summary))
        kept = Path(self._run.settings.sync_dir) if self._run is not None and self.mode == "offline" else None
        self._guard(lambda: self._run.finish(exit_code=int(failed)))
        with contextlib.suppress(OSError):
            if kept is not None and shutil.disk_usage(kept).free < NO_ROOM:  # wandb does not report it
                log.warning("the disk of wandb's folder is full (%s); what lies there is incomplete", kept)
        return kept

    def _guard(self, call: Callable[[], object]) -> None:
        self._opening.join()
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # no error of wandb's may reach the training loop
            log.warning("wandb stopped (%s); the local record goes on", first_line(error))
            self._run = None
            theirs = logging.getLogger("wandb")
            # wandb closes a run's debug.log only at a finish that succeeds
            for handler in [one for one in theirs.handlers if isinstance(one, logging.FileHandler)]:
                theirs.removeHandler(handler)
                handler.close()
            if isinstance(error, ConnectionError):  # its process died: start another next time, and exit quietly
                with contextlib.suppress(Exception, SystemExit):
                    import wandb

                    wandb.teardown()


def _init(run: dict[str, Any], mode: Any) -> Any:
    """A new wandb run, whose curves have tokens on the x-axis."""
    import wandb

    settings = wandb.Settings(
        # text is read as wandb reads its variables
        init_timeout=os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT,  # type: ignore[arg-type]
        console="off",
        silent=os.environ.get("WANDB_SILENT") or True,  # type: ignore[arg-type]
        host=os.environ.get("WANDB_HOST") or "",
        # the record has its own allow-list of facts: no host name, user, arguments or environment from here
        x_disable_meta=True,
        x_disable_stats=True,
        disable_git=True,
        save_code=False,
    )
    # finish_previous: by default a sweep's next job would get the run before
    opened = wandb.init(mode=mode, reinit="finish_previous", settings=settings, **run)
    opened.define_metric("*", step_metric="tokens", step_sync=True)
    for metric in (*METRICS, *from_outside(run["config"])):
        if metric.step:
            opened.define_metric(metric.key, step_metric="tokens", step_sync=True, summary=metric.best)
    for name in ("tokens", "step"):
        opened.define_metric(name, hidden=True)
    return opened


@contextlib.contextmanager
def _no_identity() -> Iterator[None]:
    """Inside the block wandb.init starts a new run, whatever run or wandb sweep the environment names."""
    import wandb

    # in a wandb sweep, wandb.init ignores these as arguments
    shared = wandb.setup().settings
    before = {field: getattr(shared, field) for field in IDENTITY}
    for field in IDENTITY:
        setattr(shared, field, False if field == "launch" else None)
    try:
        yield
    finally:
        for field, value in before.items():
            setattr(shared, field, value)


def _why(error: Exception) -> str:
    """An error's first line; for settings that wandb refuses, each with the reason."""
    wrong = getattr(error, "errors", None)
    if not callable(wrong):
        return first_line(error)
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in wrong())


def offline(sweep: Path, rows: Iterable[Summary], comparison: Path | None) -> list[str]:
    """The offline wandb folders of a sweep's runs and of its comparison, quoted for a shell."""
    place = shlex.quote(terminal.place(sweep.absolute()))
    found = [f"{place}/{few}" for few in ("*/wandb/offline-run-*", "wandb/offline-run-*") if any(sweep.glob(few))]
    for row in rows:
        if elsewhere := row.get("config", {}).get("wandb", {}).get("dir"):
            pattern = f"wandb/offline-run-*-{row['parts'][-1]['wandb']}"
            found += map(terminal.pasted, Path(elsewhere).absolute().glob(pattern))
    if comparison is not None and not comparison.is_relative_to(sweep.absolute()):
        found.append(terminal.pasted(comparison))
    return found
