"""From files to documents, in pieces that can be tokenised apart: plain text, JSON lines, Parquet, by their endings.

What a file is not, its first bytes tell: something else under one of these endings is refused by its name, with the
command that makes text of it.

A stream of documents is an iterator of strings, the pieces of a document in their order, with None before each
document. Nothing is held longer than its piece, so a file may be larger than memory.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from gpt2exp import files
from gpt2exp.config import BadRequest, first_line

Pieces: TypeAlias = Iterator[str | None]

Advance: TypeAlias = Callable[[int], None]
"""Told how many more bytes of input have been read."""

Stream: TypeAlias = "io.BufferedReader[Any] | gzip.GzipFile"

BLOCK = 2**20
"""Bytes, or characters, read at a time: about the length of a piece."""

ROWS = 256
"""Rows of a Parquet file that are Python objects at a time."""

ROWS_OF_JSON = (".jsonl", ".ndjson", ".json")

NOT_TEXT: tuple[tuple[bytes, str, str], ...] = (
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8 {} > OUT"),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", "convert it: iconv -f UTF-16 -t UTF-8 {} > OUT"),
    (rb"(?:[\t-~]\0){4}", "UTF-16", "convert it: iconv -f UTF-16LE -t UTF-8 {} > OUT"),
    (rb"(?:\0[\t-~]){4}", "UTF-16", "convert it: iconv -f UTF-16BE -t UTF-8 {} > OUT"),
    (rb"\x1f\x8b", "gzip", "unpack it: gunzip < {} > OUT"),
    (rb"BZh[1-9](?:1AY&SY|\x17\x72)", "bzip2", "unpack it: bunzip2 < {} > OUT"),
    (rb"\xfd7zXZ\0", "xz", "unpack it: xz -dc {} > OUT"),
    (rb"\x28\xb5\x2f\xfd", "zstd", "unpack it: zstd -dc {} > OUT"),
    (rb"\x04\x22\x4d\x18", "lz4", "unpack it: lz4 -dc {} > OUT"),
    (rb"\x1f[\x9d\xa0]", "an output of compress", "unpack it: gzip -dc < {} > OUT"),
    (rb"PK(?:\x03\x04|\x05\x06)", "a zip archive (so are .docx, .epub, .npz and .pt)", "unpack it: unzip {} -d OUT"),
    (rb".{257}ustar(?:\0|  \0)", "a tar archive", "unpack it: mkdir OUT && tar -xf {} -C OUT"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: 7z x {} -oOUT"),
    (rb"Rar!\x1a\x07", "a RAR archive", "unpack it: unrar x {}"),
    (rb"%PDF-", "a PDF", "convert it: pdftotext {} OUT"),
    (rb"\xd0\xcf\x11\xe0", "a document of Microsoft Office", "save it as plain text in UTF-8"),
    (rb"{\\rtf", "RTF", "convert it: pandoc -t plain -o OUT {}"),
    (rb"PAR1[^\s -~]", "Parquet", "let its name end in .parquet"),
    (rb"ARROW1\0|FEA1\0|Obj\x01|ORC\n?[\0-\x08]", "a table (Arrow, Avro or ORC)", "write it as .parquet or .jsonl"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", "a picture", "name text files"),
    (rb"ID3[\2-\4]|OggS\0|fLaC\0|RIFF....(?:WAVE|AVI )|.{4}ftyp|\x1a\x45\xdf\xa3", "sound or film", "name text files"),
    (rb".{5}\0{3}{\"|GGUF[^ -~]", "weights (safetensors or GGUF)", "name text files; init.path=FOLDER is for weights"),
    (
        rb"\x93NUMPY|\x89HDF|\x80[\x02-\x05]",
        "arrays or a pickle, not text",
        "write the text as .txt, .jsonl or .parquet",
    ),
    (rb"\x88\xd84\x01", "tokens (llm.c's)", "name the text that they were made from"),
    (rb"SQLite format 3\0", "an SQLite database", "write its texts as .jsonl or .parquet"),
    (rb"\x7fELF|MZ.{2}\0|\xca\xfe\xba\xbe", "a program", "name text files"),
    (rb"version https://git-lfs", "a pointer of Git LFS to a file that is not here", "fetch it: git lfs pull"),
)
"""What other files begin with, by pattern: what it is, and what to do, with `{}` for the file."""

_LAST_CUT = re.compile(r"(?s:.*)\S(?=[ \t\n\r])")


@dataclass
class File:
    """A file of documents as it was found."""

    path: Path
    name: str
    """As the user knows it: below the folder that was named."""
    named: str
    """`data.path` as typed."""
    size: int
    mtime_ns: int
    sha256: str | None = None
    """Of its bytes, once all of them have been read through `_Bytes`."""

    @property
    def has_fields(self) -> bool:
        """Whether its documents are a field of its rows."""
        return self.ends(*ROWS_OF_JSON, *(f"{ending}.gz" for ending in ROWS_OF_JSON), ".parquet")

    def ends(self, *endings: str) -> bool:
        """Whether its name ends in one of these, in whatever case."""
        return self.path.name.lower().endswith(endings)

    def digest(self) -> str:
        """Its sha256; raises `BadRequest` if it cannot be read, or is no longer the file that was found."""
        try:
            sha256, stat = self.sha256 or files.sha256(self.path), self.path.stat()
        except OSError as error:
            raise self.unreadable(error) from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.refused("was changed while it was read", "start again once it is written")
        return sha256

    def refused(self, why: str, remedy: str) -> BadRequest:
        """The line about what is wrong with it; `{}` in the remedy is the file, as a shell takes it."""
        path = shlex.quote(str(self.path))
        return BadRequest(f"data.path={self.named}: {self.name} {why}; {remedy.replace('{}', path)}")

    def unreadable(self, error: Exception) -> BadRequest:
        """The line about what went wrong in reading it."""
        why = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        return self.refused(why, "name files that are whole and readable")


class _Bytes(io.RawIOBase):
    """The bytes of a file, hashed and counted as they are read."""

    def __init__(self, raw: io.FileIO, file: File, advance: Advance) -> None:
        super().__init__()
        self._raw, self._file, self._advance, self._digest = raw, file, advance, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer)
        if count:
            self._digest.update(memoryview(buffer)[:count])
            self._advance(count)
        else:
            self._file.sha256 = self._digest.hexdigest()
        return count


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
    try:
        if file.ends(".parquet"):
            yield from _parquet(file, field, advance)
            return
        with (
            file.path.open("rb", buffering=0) as opened,
            io.BufferedReader(_Bytes(opened, file, advance), BLOCK) as raw,
        ):
            packed = file.ends(".gz") or raw.peek().startswith(b"\x1f\x8b")
            stream: Stream = gzip.GzipFile(fileobj=raw) if packed else raw
            head = stream.peek(BLOCK)
            for pattern, what, remedy in NOT_TEXT:
                if re.match(pattern, head, re.DOTALL):
                    if packed:
                        remedy = f"gunzip < {{}} > IN, then {remedy.replace('{}', 'IN')}"
                    raise file.refused(f"is {what}", remedy)
            head = head.removeprefix(codecs.BOM_UTF8).lstrip()
            if file.has_fields:
                if head.startswith(b"["):
                    raise file.refused("is one JSON array, no JSON lines", "convert it: jq -c '.[]' {} > OUT.jsonl")
                yield from _jsonl(file, stream, field)
            elif _is_row(head, field):
                raise file.refused("holds JSON lines", "let its name end in .jsonl: data.field of each is then read")
            else:
                yield from _plain(file, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise file.unreadable(error) from error


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


def _is_row(head: bytes, field: str) -> bool:
    """Whether a text begins with a line that is a JSON object, and has `field` or another such line after it."""
    first, _, rest = head.partition(b"\n")
    try:
        row = json.loads(first) if first.startswith(b"{") else None
    except ValueError:
        return False
    return isinstance(row, dict) and (field in row or rest.lstrip().startswith(b"{"))


def _not_utf8(file: File, where: str) -> BadRequest:
    return file.refused(f"is not UTF-8 {where}", "convert it: iconv -f LATIN1 -t UTF-8 {} > OUT, if it is Latin-1")


def _plain(file: File, stream: Stream) -> Pieces:
    yield None
    yield from cut(_decoded(file, stream))


def _decoded(file: File, stream: Stream) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    if stream.peek(3).startswith(codecs.BOM_UTF8):  # a mark for programs, no part of the text
        at = len(stream.read(3))
    while True:
        block = stream.read(BLOCK)
        begun = len(decoder.getstate()[0])  # bytes of a character that the block before began
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(file, f"at byte {at - begun + error.start}") from error
        if "\x00" in text:
            raise file.refused("holds zero bytes, so it is not text", "name UTF-8 text files")
        if not block:
            return
        yield text
        at += len(block)


def _jsonl(file: File, stream: Stream, field: str) -> Pieces:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise _not_utf8(file, f"in line {number}") from error
        except (ValueError, RecursionError) as error:
            remedy = 'write an object a line, such as {"text": "…"}'
            if file.ends(".json", ".json.gz"):
                remedy += ", or name it .txt to train on it as it stands"
            raise file.refused(f"line {number} is no JSON ({error})", remedy) from error
        yield from in_row(row, field, f"{file.name} line {number}")


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
                advance(file.size * batch.num_rows // table.metadata.num_rows)
    except arrow.ArrowException as error:
        raise file.refused(f"is no whole Parquet file ({first_line(error)})", "fetch it again") from error
