"""What a process does when it is told to stop (SIGINT, SIGTERM): outside training at once, inside after the step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


class Terminated(KeyboardInterrupt):
    """SIGTERM, met like Ctrl-C: what runs is closed properly."""


def code(interrupt: KeyboardInterrupt) -> int:
    """The exit code a shell expects: 143 after SIGTERM, 130 after SIGINT."""
    return 143 if isinstance(interrupt, Terminated) else 130


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside the block."""

    def raise_it(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, raise_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class Stop:
    """Whether an end was asked for."""

    asked: KeyboardInterrupt | None = None
    waiting: bool = False
    """The block will look at `asked` by itself; until then a signal raises."""


@contextlib.contextmanager
def deferred() -> Iterator[Stop]:
    """A first signal inside the block sets `asked`, and raises it unless `waiting`; a second ends the process at once.

    At once means without closing anything: every file of a run is whole at every moment.
    """
    stop = Stop()

    def note(number: int, _: object) -> None:
        if stop.asked is not None:
            if os.isatty(1):
                os.write(1, b"\x1b[?25h")  # the progress bar had hidden the cursor
            os._exit(128 + number)
        stop.asked = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if not stop.waiting:
            raise stop.asked

    before = {}
    # some launchers run jobs in other threads, where Python has no signals
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background ignores Ctrl-C, and so do we
                before[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
