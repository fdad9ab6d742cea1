"""Whose folder is it: which process works on a run or sweep, and does it still live? No torch."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gpt2exp.config import BadRequest

LOCK = ".lock"
"""Held by the process at work on a folder; the system lets go of it however that process ends."""

log = logging.getLogger("gpt2exp")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep every other process away from a run or sweep folder inside the block.

    Raises:
        BadRequest: another process holds it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        why = "another process is at work on it"
        raise BadRequest(f"resume={folder}: {why}; wait until it has ended, or stop it") from error
    except NotImplementedError:  # a file system without locks, such as some network ones
        log.warning("%s lies where files cannot be locked: start no second process on it", folder)
    except OSError as error:
        why = f"cannot be written ({error.strerror or error})"
        raise BadRequest(f"resume={folder}: {why}; copy it to a place that can be") from error
    try:
        yield
    finally:
        lock.release()


@functools.cache
def machine() -> str:
    """Tells machines apart without naming them."""
    return hashlib.sha256(f"{platform.node()}/{uuid.getnode()}".encode()).hexdigest()[:12]


def me() -> dict[str, Any]:
    """Who writes a `status.json`: the process by `pid` and when it was `born` (seconds since 1970), and the machine."""
    return _signature(os.getpid())


@functools.cache
def _signature(pid: int) -> dict[str, Any]:  # by pid, so that a forked child does not go by its parent's
    import psutil

    return {"pid": pid, "born": psutil.Process(pid).create_time(), "machine": machine()}


def lives(status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a `status.json` still runs; True too where that cannot be known from here.

    A process is its number and the moment it began, since numbers are used again.
    """
    if status.get("machine") != machine() or not {"pid", "born"} <= status.keys():
        return True
    import psutil

    try:
        process = psutil.Process(status["pid"])
        return bool(abs(process.create_time() - status["born"]) < 2 and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
