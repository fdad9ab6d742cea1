"""Tokens on disk: uint16 in shards behind a header, memory-mapped as one sequence that may be larger than memory.

A shard is llm.c's file (karpathy/llm.c, dev/data/data_common.py and llmc/dataloader.h), which modded-nanogpt reads too:
256 little-endian int32, of which they look at the first three (magic, version, count), then the tokens as little-endian
uint16. The 32 bytes from the ninth int32 on, unused there, are the sha256 of the tokens here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, overload

import numpy as np
import numpy.typing as npt

HEADER = np.dtype(
    [
        ("magic", "<i4"),
        ("version", "<i4"),
        ("tokens", "<i4"),
        ("unused", "V20"),
        ("sha256", "V32"),
        ("rest", "V960"),
    ]
)

MAGIC, VERSION = 20240520, 1

SHARD_TOKENS = 100_000_000
"""Tokens in a shard: 200 MB, as llm.c's FineWeb script has it."""

IDS = 2**16
"""Ids that a uint16 can name."""


class Shards:
    """The tokens of several arrays as one sequence, (tokens,): nothing is copied but what an index array asks for."""

    def __init__(self, parts: Sequence[npt.NDArray[np.uint16]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, index: slice) -> Shards: ...
    @overload
    def __getitem__(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]: ...
    def __getitem__(self, index: slice | npt.NDArray[np.int64]) -> Shards | npt.NDArray[np.uint16]:
        """A slice without a step: `Shards` over the same memory. An integer array: a new array of its shape."""
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            assert step == 1, "tokens are read in their order"
            near = zip(self.starts.tolist(), self.parts, strict=False)
            return Shards([part[max(first - start, 0) : max(last - start, 0)] for start, part in near])
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"{index.min()} to {index.max()} of {len(self)} tokens")
        shard = np.searchsorted(self.starts, index, side="right") - 1
        found = np.empty(index.shape, dtype="<u2")
        for number in np.unique(shard):
            here = shard == number
            found[here] = self.parts[number][index[here] - self.starts[number]]
        return found


Tokens: TypeAlias = npt.NDArray[np.uint16] | Shards
"""A sequence of tokens: both have `len`, slices and gathering by an integer array."""


class Writer:
    """Writes tokens into the shards of a folder as they come, and counts them."""

    def __init__(self, folder: Path, shard_tokens: int = SHARD_TOKENS) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.counts = np.zeros(IDS, np.int64)
        """How often each id was written, (65536,)."""
        self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        """Of each closed shard its `tokens`, its `sha256` and the `mtime_ns` it was closed with."""
        self._file: BinaryIO | None = None
        self._in_shard = 0
        self._digest = hashlib.sha256()

    def append(self, tokens: npt.NDArray[np.uint16]) -> None:
        """Write tokens (n,) behind those that are there."""
        self.counts += np.bincount(tokens, minlength=IDS)
        self.tokens += len(tokens)
        while len(tokens):
            if self._file is None:
                self._file = _path(self.folder, len(self.shards)).open("wb")
                self._file.write(bytes(HEADER.itemsize))
                self._in_shard, self._digest = 0, hashlib.sha256()
            now, tokens = np.split(tokens, [self.shard_tokens - self._in_shard])
            content = now.astype("<u2", copy=False).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._in_shard += len(now)
            if self._in_shard == self.shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        assert self._file is not None
        header = np.zeros((), HEADER)
        header["magic"], header["version"], header["tokens"] = MAGIC, VERSION, self._in_shard
        header["sha256"] = np.void(self._digest.digest())
        with self._file as file:
            file.seek(0)
            file.write(header.tobytes())
        self._file = None
        path = _path(self.folder, len(self.shards))
        known = {"tokens": self._in_shard, "sha256": self._digest.hexdigest(), "mtime_ns": path.stat().st_mtime_ns}
        self.shards.append(known)

    def close(self) -> None:
        """Give the last shard its header; without this it has none, and is none."""
        if self._file is not None:
            self._close_shard()

    def abandon(self) -> None:
        """Let go of what is not to be finished."""
        if self._file is not None:
            self._file.close()


def _path(folder: Path, number: int) -> Path:
    return folder / f"tokens_{number:06d}.bin"


def whole(folder: Path, shards: Sequence[dict[str, Any]]) -> bool:
    """Whether every shard is there as it was written.

    Size and header are looked at each time. The tokens are hashed, at a second or two a gigabyte, only where a file is
    not dated as it was written: it was copied or touched, or something else wrote to it.
    """
    for number, known in enumerate(shards):
        path = _path(folder, number)
        try:
            stat = path.stat()
            if stat.st_size != HEADER.itemsize + 2 * known["tokens"]:
                return False
            with path.open("rb") as file:
                header = np.frombuffer(file.read(HEADER.itemsize), HEADER)[0]
                told = int(header["magic"]), int(header["version"]), int(header["tokens"]), header["sha256"].tobytes()
                if told != (MAGIC, VERSION, known["tokens"], bytes.fromhex(known["sha256"])):
                    return False
                if stat.st_mtime_ns == known["mtime_ns"]:
                    continue
                if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                    return False
        except OSError:
            return False
        with contextlib.suppress(OSError):  # of a cache that may only be read
            os.utime(path, ns=(stat.st_atime_ns, known["mtime_ns"]))  # so that it is hashed once
    return True


def mapped(folder: Path, shards: Sequence[dict[str, Any]]) -> Tokens:
    """The tokens of all shards, (tokens,), memory-mapped read-only; of a single one the mapped array itself."""
    paths = [_path(folder, number) for number in range(len(shards))]
    parts = [np.memmap(path, dtype="<u2", mode="r", offset=HEADER.itemsize) for path in paths]
    return parts[0] if len(parts) == 1 else Shards(parts)
