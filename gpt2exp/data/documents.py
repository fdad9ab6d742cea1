"""From files to documents, in pieces that can be tokenised apart: plain text, JSON lines, Parquet, by their endings.

A stream of documents is an iterator of strings, the pieces of a document in their order, with None before each
document. Nothing is held longer than its piece, so a file may be larger than memory.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from gpt2exp.config import BadRequest

Pieces: TypeAlias = Iterator[str | None]

Advance: TypeAlias = Callable[[int], None]
"""Told how many more bytes of input have been read."""

BLOCK = 2**20
"""Bytes, or characters, read at a time: about the length of a piece."""

ROWS = 256
"""Rows of a Parquet file that are Python objects at a time."""

_LAST_CUT = re.compile(r"(?s:.*)\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class File:
    """A file of documents as it was found."""

    path: Path
    name: str
    """As the user knows it: below the folder that was named."""
    named: str
    """`data.path` as typed."""
    stamp: tuple[int, int, int]
    """Size, time of change in ns, inode: with another one the content is another."""

    @property
    def has_fields(self) -> bool:
        """Whether its documents are a field of its rows."""
        return self.ends(".jsonl", ".jsonl.gz", ".parquet")

    def ends(self, *endings: str) -> bool:
        """Whether its name ends in one of these, in whatever case."""
        return self.path.name.lower().endswith(endings)


def stamp(path: Path) -> tuple[int, int, int]:
    """What a file looks like without reading it; see `File`."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def cut(blocks: Iterable[str]) -> Iterator[str]:
    r"""The same text in pieces whose tokens, one piece after another, are those of the whole.

    A cut lies before a space, tab or line break that follows a character which is no white space. GPT-2's pattern is

        '(?:[sdmt]|ll|ve|re) | ?\p{L}+ | ?\p{N}+ | ?[^\s\p{L}\p{N}]+ | \s+$ | \s+(?!\S) | \s

    of which an alternative holds either white space alone or white space only as its first character. So no match
    spans the cut: one that holds the character before it ends there, and the next begins with the white space. Nor
    does a match see across it: there is no look-behind, and what looks ahead, `$` and `(?!\S)`, stands after white
    space, which the text before the cut does not end with. Tokens never leave a match. (Python's `\s` holds all of
    Unicode's White_Space, which is Rust's, and four separators more: there is no cut behind those.)

    A stretch without such a place is not cut, however long.
    """
    kept: list[str] = []
    before = ""  # the last character of what is kept
    for block in blocks:
        found = _LAST_CUT.match(before + block)
        if found:
            end = found.end() - len(before)
            yield "".join(kept) + block[:end]
            kept, block = [], block[end:]
        kept.append(block)
        before = block[-1:] or before
    yield "".join(kept)


def in_file(file: File, field: str, advance: Advance) -> Pieces:
    """The documents of a file, by its ending: a row's `field` for JSON lines and Parquet, else the whole file.

    Raises:
        BadRequest: it is not of the form that its ending says, or cannot be read; the text names line or row.
    """
    reader = _jsonl if file.ends(".jsonl", ".jsonl.gz") else _parquet if file.ends(".parquet") else _plain
    try:
        yield from reader(file, field, advance)
    except (OSError, EOFError, zlib.error) as error:
        why = f"{file.name} cannot be read ({getattr(error, 'strerror', None) or error})"
        raise BadRequest(f"data.path={file.named}: {why}; name files that are whole and readable") from error


def in_row(row: object, field: str, where: str) -> Pieces:
    """The document in a row's `field`.

    Raises:
        BadRequest: there is no such field, or no text in it; `where` says in which row of what.
    """
    yield None
    if not isinstance(row, Mapping) or field not in row:
        names = [str(name) for name in row] if isinstance(row, Mapping) else []
        why = f"has no such field, only {', '.join(names[:12])}" if names else "is no row of named fields"
        texts = [name for name in names if isinstance(cast(Mapping[str, Any], row)[name], str)]
        remedy = f"try data.field={texts[0]}" if texts else "name the field that holds the text"
        raise BadRequest(f"data.field={field}: {where} {why}; {remedy}")
    document = row[field]
    if not isinstance(document, str):
        what = "null" if document is None else f"a {type(document).__name__}"
        raise BadRequest(f"data.field={field}: {where} holds {what}, no text; name another field, or leave the row out")
    yield from cut(document[at : at + BLOCK] for at in range(0, len(document), BLOCK))


def _plain(file: File, field: str, advance: Advance) -> Pieces:
    yield None
    yield from cut(_decoded(file, advance))


def _decoded(file: File, advance: Advance) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    with file.path.open("rb") as raw:
        while True:
            block = raw.read(BLOCK)
            begun = len(decoder.getstate()[0])  # bytes of a character that the block before began
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                why = f"{file.name} is not UTF-8 at byte {at - begun + error.start}"
                remedy = "convert it: iconv -f LATIN1 -t UTF-8 IN > OUT"
                raise BadRequest(f"data.path={file.named}: {why}; {remedy}") from error
            if "\x00" in text:
                raise BadRequest(
                    f"data.path={file.named}: {file.name} holds zero bytes, so it is not text; name UTF-8 text files"
                )
            if not block:
                return
            yield text
            at += len(block)
            advance(len(block))


def _jsonl(file: File, field: str, advance: Advance) -> Pieces:
    with file.path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if file.ends(".gz") else raw
        at = 0
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except ValueError as error:  # also of the decoding
                why = f"{file.name} line {number} is no JSON ({error})"
                raise BadRequest(
                    f'data.path={file.named}: {why}; write an object a line, such as {{"text": "…"}}'
                ) from error
            yield from in_row(row, field, f"{file.name} line {number}")
            advance(raw.tell() - at)
            at = raw.tell()


def _parquet(file: File, field: str, advance: Advance) -> Pieces:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadRequest(f"data.path={file.named}: Parquet needs pyarrow; pip install 'gpt2exp[datasets]'") from error
    try:
        with parquet.ParquetFile(file.path, buffer_size=BLOCK) as table:
            columns = {column.name: "" if "string" in str(column.type) else None for column in table.schema_arrow}
            if field not in columns:
                yield from in_row(columns, field, file.name)
            number = 0
            for batch in table.iter_batches(ROWS, columns=[field]):
                for document in batch.column(0).to_pylist():
                    number += 1
                    yield from in_row({field: document}, field, f"{file.name} row {number}")
                advance(file.stamp[0] * batch.num_rows // table.metadata.num_rows)
    except arrow.ArrowException as error:
        why = f"{file.name} is no whole Parquet file ({str(error).splitlines()[0]})"
        raise BadRequest(f"data.path={file.named}: {why}; fetch it again") from error
