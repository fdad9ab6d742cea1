"""Writes a file so that no reader sees a part of it: to a temporary beside it, then moved into place. Walks, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TIMEOUT = 10  # seconds to wait for a server's answer


def beside(path: Path) -> Path:
    """A new, hidden name beside `path` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces `path` when the block ends without an error, else it is removed."""
    part = beside(path)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def walk(top: Path, onerror: Callable[[OSError], object] | None = None) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` that follows links and yields each folder once, under its own name if it lies below `top`.

    Folders that the caller removes from the list are left out.
    """
    seen, to_see = set[tuple[int, int]](), [top]
    for start in to_see:  # grows by the links that are met, so links come last
        for place, folders, names in os.walk(start, onerror=onerror):
            here = Path(place)
            try:
                stat = here.stat()
            except OSError:  # gone by now
                continue
            if (stat.st_dev, stat.st_ino) in seen:
                folders.clear()
                continue
            seen.add((stat.st_dev, stat.st_ino))
            yield here, folders, names
            to_see += [here / name for name in sorted(folders) if os.path.islink(here / name)]  # noqa: PTH114 - no error


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def joint(digests: Sequence[str]) -> str:
    """One digest for several files: if there is one file, its own, else the sha256 of all digests in order."""
    return digests[0] if len(digests) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """`value` as an indented JSON file, written whole."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
