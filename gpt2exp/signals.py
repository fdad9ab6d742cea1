"""What a process does when it is told to stop (SIGINT, SIGTERM): outside training at once, inside after the step.

A job of submitit's is told one thing more: SIGUSR2 says that it is to be queued again (preempted, or out of time), and
under Slurm SIGTERM is but the warning before.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, met like Ctrl-C: what runs is closed properly."""


class Preempted(KeyboardInterrupt):
    """The launcher's signal to a job that it will queue again; `args[0]` is the signal."""


def code(interrupt: KeyboardInterrupt) -> int:
    """The exit code a shell expects: 143 after SIGTERM, 130 after SIGINT."""
    return 143 if isinstance(interrupt, Terminated) else 130


Handler = Callable[[int, FrameType | None], Any] | int | None


@contextlib.contextmanager
def handling(handlers: Mapping[int, Handler]) -> Iterator[None]:
    """These handlers inside the block, by signal; in a thread, where Python lets none be set, those there are."""
    before: dict[int, Handler] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside the block."""

    def raise_it(*_: object) -> None:
        raise Terminated

    with handling({signal.SIGTERM: raise_it}):
        yield


@contextlib.contextmanager
def heralded(herald: Callable[[], object]) -> Iterator[None]:
    """A first SIGINT or SIGTERM inside the block calls `herald` before it raises; a second raises at once."""
    asked: KeyboardInterrupt | None = None

    def tell(number: int, _: object) -> None:
        nonlocal asked
        if asked is None:
            asked = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
            herald()
        raise asked

    with handling({signal.SIGINT: tell, signal.SIGTERM: tell}):
        try:
            yield
        except KeyboardInterrupt as interrupt:
            raise asked or interrupt from None  # what interrupts Ray comes out as a KeyboardInterrupt of its own


def requeued_by() -> list[int]:
    """The signals after which submitit, whose job this process is, queues it again; none in any other process."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return []
    return [number for number in (signal.SIGUSR1, signal.SIGUSR2) if callable(signal.getsignal(number))]


@dataclass
class Stop:
    """Whether an end was asked for."""

    asked: KeyboardInterrupt | None = None
    waiting: bool = False
    """The block will look at `asked` by itself; until then a signal raises."""
    warned: bool = False
    """The end may come any moment without another word: what is not saved by then is lost."""


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """A first signal inside the block sets `asked`, and raises it unless `waiting`; a second ends the process at once.

    At once means without closing anything: every file of a run is whole at every moment. A signal that was submitit's
    to handle reaches it once the block is left, and then queues the job again.
    """
    stop, requeuing = Stop(), requeued_by()
    # Slurm sends SIGTERM when it is about to take the node away, or the job out: who ends by it is not queued again
    warnings = [signal.SIGTERM] if requeuing and os.environ["SUBMITIT_EXECUTOR"] == "slurm" else []

    def note(number: int, _: object) -> None:
        if number in warnings:
            stop.warned = True
            return
        if isinstance(stop.asked, Preempted) and number in requeuing:
            return
        if stop.asked is not None:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
            os._exit(128 + number)
        kinds = {signal.SIGTERM: Terminated(), **{number: Preempted(number) for number in requeuing}}
        stop.asked = kinds.get(number, KeyboardInterrupt())
        if not stop.waiting:
            raise stop.asked

    told = (signal.SIGINT, signal.SIGTERM, *requeuing)
    try:
        # a shell's background ignores Ctrl-C, and so do we
        with handling({number: note for number in told if signal.getsignal(number) != signal.SIG_IGN}):
            yield stop
    finally:
        if isinstance(stop.asked, Preempted):
            signal.raise_signal(stop.asked.args[0])
