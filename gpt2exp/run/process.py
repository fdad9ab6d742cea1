"""How a command begins and ends: signals, the folder's lock, arguments, exit codes. No torch."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import logging
import os
import platform
import signal
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from filelock import FileLock, Timeout

from gpt2exp.data.assets import FULL, AssetError
from gpt2exp.run import terminal
from gpt2exp.section import BadRequest

LOCK = ".lock"  # held by the process that works on a folder; the system releases it however that process ends
log = logging.getLogger("gpt2exp")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a run or sweep folder inside the block; `BadRequest` if another process holds it, or it is read-only."""
    lock = FileLock(folder / LOCK, timeout=1)  # `at_work` may hold it for a moment
    try:
        lock.acquire()
    except NotImplementedError:  # a file system without locks, such as some network ones
        log.warning("%s lies where files cannot be locked: start no second process on it", folder)
    except OSError as error:  # a Timeout is one
        why, remedy = f"cannot be written ({error.strerror or error})", "copy it to a place that can be"
        if isinstance(error, Timeout):
            why, remedy = "another process is at work on it", "wait until it has ended, or stop it"
        raise BadRequest(f"resume={folder}: {why}; {remedy}") from error
    try:
        yield
    finally:
        lock.release()


def at_work(folder: Path, status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a folder's `status.json` still holds the folder's lock.

    True as well where the lock cannot tell: the process is another machine's, or the file system has no locks.
    """
    if status.get("machine") != machine():
        return True
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except (OSError, NotImplementedError):
        return True


@functools.cache
def machine() -> str:
    """A hash that identifies this machine but does not reveal its name."""
    return hashlib.sha256(f"{platform.node()}/{uuid.getnode()}".encode()).hexdigest()[:12]


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


class Preempted(KeyboardInterrupt):
    """The launcher's signal that it will requeue this job; `args[0]` is the signal."""


def code(interrupt: KeyboardInterrupt) -> int:
    """The exit code a shell expects: 143 after SIGTERM, 130 after SIGINT."""
    return 143 if isinstance(interrupt, Terminated) else 130


Handler = Callable[[int, FrameType | None], Any] | int | None


@contextlib.contextmanager
def handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """Set these signal handlers inside the block; in a thread, where Python allows none, change nothing."""
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        # a process that a shell started in the background ignores Ctrl-C: leave it so
        heard = [number for number in handlers if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, handlers[number]) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raising_signals(first: Callable[[], object] = lambda: None) -> Iterator[None]:
    """SIGINT or SIGTERM inside the block raises; the first such signal calls `first` before it raises."""
    asked: KeyboardInterrupt | None = None

    def tell(number: int, _: object) -> None:
        nonlocal asked
        if asked is None:
            asked = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
            first()
        raise asked

    with handling({signal.SIGINT: tell, signal.SIGTERM: tell}):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise asked or interrupt from None  # not the KeyboardInterrupt that Ray raises


def requeued_by() -> list[int]:
    """The signals on which submitit requeues this process's job; none if it runs none."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return []
    return [number for number in (signal.SIGUSR1, signal.SIGUSR2) if callable(signal.getsignal(number))]


_guest = False  # whether this process belongs to another program, such as a notebook


@contextlib.contextmanager
def guest() -> Iterator[None]:
    """A second signal inside the block raises. Outside it ends the process (`deferred`)."""
    global _guest
    before, _guest = _guest, True
    try:
        yield
    finally:
        _guest = before


@dataclass
class Stop:
    """Whether a signal asked for an end."""

    asked: KeyboardInterrupt | None = None
    waiting: bool = False  # set by the block once it reads `asked` by itself; until then a signal raises
    warned: bool = False  # the process may be killed at any moment: it must save now


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """A first signal inside the block sets `asked`, and raises it unless `waiting`; a second ends the process.

    Ending the process loses nothing, since every file of a run is whole at every moment. A signal on which submitit
    requeues the job is sent again after the block.
    """
    stop, requeuing = Stop(), requeued_by()
    # Slurm sends SIGTERM before it takes the node or the job away; a job that ends on it is not requeued
    warnings = [signal.SIGTERM] if requeuing and os.environ["SUBMITIT_EXECUTOR"] == "slurm" else []

    def note(number: int, _: object) -> None:
        if number in warnings:
            stop.warned = True
        elif isinstance(stop.asked, Preempted) and number in requeuing:
            pass
        elif stop.asked is None:
            kinds = {signal.SIGTERM: Terminated(), **{number: Preempted(number) for number in requeuing}}
            stop.asked = kinds.get(number, KeyboardInterrupt())
            if not stop.waiting:
                raise stop.asked
        elif _guest:
            raise stop.asked
        else:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
            os._exit(128 + number)

    try:
        with handling(dict.fromkeys((signal.SIGINT, signal.SIGTERM, *requeuing), note)):
            yield stop
    finally:
        if isinstance(stop.asked, Preempted):
            signal.raise_signal(stop.asked.args[0])


def parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose errors are `BadRequest`."""
    epilog = f"example: {program} {example}"
    return strict(argparse.ArgumentParser(prog=program, description=description, epilog=epilog), program)


def strict(made: argparse.ArgumentParser, program: str) -> argparse.ArgumentParser:
    """The parser, its errors turned into `BadRequest`."""

    def error(message: str) -> NoReturn:
        raise BadRequest(f"{message}; {program} --help shows what can be typed")

    made.error = error  # type: ignore[method-assign]
    return made


@contextlib.contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """A block that writes where the user said; `BadRequest` if it cannot, `OSError` if the disk is full or broken."""
    try:
        yield
    except OSError as error:
        if error.errno in (*FULL, errno.EIO):
            raise
        raise BadRequest(f"{what} ({error.strerror or error}); {remedy}") from error


def unwritable(error: OSError, where: str = "") -> str:
    """The line for a full disk or a folder that was removed; an error without a number has its own text.

    `where`: what to type, to name another folder.
    """
    if error.errno is None:
        return str(error)
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return f"{what}; make room, or name another folder{where}"


def carry_out(program: str, action: Callable[[], int | None], where: str = "") -> int:
    """Call `action` and return the exit code, printing an error in one line; `where`: as of `unwritable`.

    The code is `action`'s own, or 0: done. 1: a file could not be fetched, read or written. 2: a bad request. 130 or
    143: interrupted.
    """
    full_error = terminal.wants_traces()
    terminal.show_warnings(traces=full_error)
    try:
        with raising_signals():
            return action() or 0
    except (BadRequest, AssetError) as error:
        terminal.refuse(str(error), program=program, trace=full_error)
        return 2 if isinstance(error, BadRequest) else 1
    except OSError as error:
        terminal.refuse(unwritable(error, where), program=program, trace=full_error)
        return 1
    except KeyboardInterrupt as interrupt:
        return code(interrupt)
