"""A run's metrics mirrored to Weights & Biases; whatever wandb does, training goes on.

The local files are the record, so every call is guarded: the first failure is one warning and the mirror goes quiet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpt2exp.config import WandbConfig, WandbMode

INIT_TIMEOUT = 15
"""Seconds to wait for the server before going offline."""

NO_ROOM = 2**16
"""Free bytes below which wandb's own writes, in blocks of 32 KiB, cannot be relied on."""

log = logging.getLogger("gpt2exp")


def resolve_mode(config: WandbConfig) -> str:
    """online, offline or disabled: the configuration's, with `auto` decided by WANDB_MODE, then by credentials."""
    if config.mode is not WandbMode.auto:
        return str(config.mode.value)
    wanted = os.environ.get("WANDB_MODE", "")
    if wanted in ("online", "offline", "disabled"):
        return wanted
    return "online" if _has_credentials() else "offline"


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import requests

    host = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    try:
        return requests.utils.get_netrc_auth(host) is not None
    except (OSError, ValueError):
        return False


class Mirror:
    """One wandb run. It opens in a thread of its own, since wandb mostly waits for another process; no call raises."""

    def __init__(self, config: WandbConfig, folder: Path, run: dict[str, Any], *, job_type: str = "train") -> None:
        """`run`: wandb.init's `config`, `name`, `group`, `tags`, and `notes` if any."""
        self.mode: str = resolve_mode(config)
        self._run: Any = None
        self._opening = threading.Thread(target=self._start, args=(config, folder, run, job_type), daemon=True)
        self._opening.start()

    def _start(self, config: WandbConfig, folder: Path, run: dict[str, Any], job_type: str) -> None:
        if self.mode == "disabled":
            return
        for mode in dict.fromkeys((self.mode, "offline")):
            try:
                self._run = self._open(config, folder, run, job_type, mode)
                self.mode = mode
                return
            except Exception as error:  # wandb raises its own kinds and the network's
                then = "going on offline" if mode == "online" else "going on without it"
                log.warning("wandb could not start %s (%s); %s", mode, _line(error), then)
        self.mode = "disabled"

    def _open(self, config: WandbConfig, folder: Path, run: dict[str, Any], job_type: str, mode: Any) -> Any:
        import wandb

        settings = wandb.Settings(
            init_timeout=INIT_TIMEOUT,
            console="off",
            silent=True,
            # the record has its own allow-list of facts: no host name, user, arguments or environment from here
            x_disable_meta=True,
            x_disable_stats=True,
            disable_git=True,
            save_code=False,
        )
        opened = wandb.init(
            project=config.project,
            entity=config.entity,
            dir=config.dir or str(folder),
            job_type=job_type,
            mode=mode,
            reinit="finish_previous",  # the default would hand a sweep's next job the run before
            settings=settings,
            **run,
        )
        opened.define_metric("tokens", hidden=True)
        opened.define_metric("step", hidden=True)
        opened.define_metric("*", step_metric="tokens", step_sync=True)
        return opened

    def ready(self) -> str:
        """Wait until it is open; the mode it is in: online, offline or disabled."""
        self._opening.join()
        return self.mode

    def link(self) -> str | None:
        """The run's address, or where it has none yet its id; None without a run."""
        self._opening.join()
        return None if self._run is None else str(self._run.url if self.mode == "online" else self._run.id)

    def describe(self, facts: dict[str, Any]) -> None:
        """Add to the run's config."""
        self._guard(lambda: self._run.config.update(facts))

    def log(self, metrics: dict[str, Any]) -> None:
        """One step's metrics."""
        flat = {key: value for key, value in metrics.items() if not isinstance(value, list)}
        for key, values in ((key, value) for key, value in metrics.items() if isinstance(value, list)):
            flat |= {f"{key}/{index}": value for index, value in enumerate(values)}  # a curve a block
        # committed at once: held back, the last step's values would overwrite the summary's of the same name
        self._guard(lambda: self._run.log(flat, step=metrics["step"], commit=True))

    def show(self, make: Callable[[], dict[str, Any]]) -> None:
        """Tables and images: `make` runs, and may import wandb, only if there is a run to show them in."""
        self._guard(lambda: self._run.log(make()))

    def finish(self, summary: dict[str, Any], *, failed: bool) -> Path | None:
        """Write the summary and close the run, marked as failed there too if it was; the folder to sync if offline."""
        self._guard(lambda: self._run.summary.update(summary))
        kept = Path(self._run.settings.sync_dir) if self._run is not None and self.mode == "offline" else None
        self._guard(lambda: self._run.finish(exit_code=int(failed)))
        with contextlib.suppress(OSError):
            if kept is not None and shutil.disk_usage(kept).free < NO_ROOM:  # wandb itself would not say
                log.warning("the disk of wandb's folder is full (%s); what lies there is incomplete", kept)
        return kept

    def _guard(self, call: Callable[[], object]) -> None:
        self._opening.join()
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # as above: nothing of wandb's may reach the training loop
            log.warning("wandb stopped (%s); the local record goes on", _line(error))
            self._run = None
            if isinstance(error, ConnectionError):
                _forget_process()


def _forget_process() -> None:
    """After wandb's own process died: no traceback from its hook at our exit, and a new process for the next run."""
    import wandb

    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
