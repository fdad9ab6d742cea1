"""A bar on the terminal while a long text is read."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

PATIENCE = 3
"""Seconds that something may take before a bar says how far it is."""


@contextlib.contextmanager
def reading(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """A block that reads `size` bytes (None: nobody knows how many) and tells the function it gets of each part.

    Where that takes long, a bar with rate and time left stands on a terminal's standard error meanwhile.
    """
    console, began = Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    task = bar.add_task(what, total=size)

    def advance(part: int) -> None:
        bar.advance(task, part)
        if time.monotonic() - began > PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        bar.stop()
