"""Finds the text of a request (files, a dataset on the Hub, or a text of `assets.TEXTS`) and reads its documents.

A text on disk is identified by its path and by the sizes and dates of its files; it is hashed only while it is
tokenised. A dataset on the Hub is identified by its commit, which is asked for once.

Documents come as an iterator of strings: the pieces of a document in order, with None before each document. A piece can
be tokenised by itself, and only pieces are held in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import importlib
import io
import itertools
import json
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from gpt2exp import choices, files
from gpt2exp.config import DataConfig, DataName
from gpt2exp.data import assets
from gpt2exp.schema import explain, plain
from gpt2exp.section import SOURCE, BadRequest, first_line, require, show

Pieces: TypeAlias = "Iterator[str | npt.NDArray[np.uint16] | None]"
Advance: TypeAlias = Callable[[int], None]  # called with the number of bytes that were read since the last call
Stream: TypeAlias = "io.BufferedReader[Any] | gzip.GzipFile"
BLOCK = 2**20  # bytes, or characters, read at a time: about the length of a piece
ROWS = 256  # rows of a Parquet file that are read at a time
PATIENCE = 3  # seconds of reading after which a bar appears
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
    (rb"\x93NUMPY|\x89HDF|\x80[\x02-\x05]", "arrays or a pickle", "write the text as .txt, .jsonl or .parquet"),
    (rb"\x88\xd84\x01", "tokens (llm.c's)", "name the text that they were made from"),
    (rb"SQLite format 3\0", "an SQLite database", "write its texts as .jsonl or .parquet"),
    (rb"\x7fELF|MZ.{2}\0|\xca\xfe\xba\xbe", "a program", "name text files"),
    (rb"version https://git-lfs", "a pointer of Git LFS to a file that is not here", "fetch it: git lfs pull"),
)
"""Files that are not text: a pattern of their first bytes, what they are, and what to do, with `{}` for the file."""

_LAST_CUT = re.compile(r"(?s:.*)\S(?=[ \t\n\r])")


@dataclass(frozen=True)
class Text:
    """A text that may not have been read yet."""

    name: str
    key: str  # names its tokens in the cache: a hash of its place or commit, and of the keys that select a part of it
    read: Callable[[Advance], Pieces]  # its documents
    size: int | None = None  # bytes that reading it will count, if known
    digest: Callable[[], str] | None = None  # for files: a hash of their bytes, to call once these are read
    revision: str | None = None  # the commit on the Hub

    @property
    def sha256(self) -> str:
        """The sha256 of a plain text's bytes. If keys select a part, a hash of it (or of the Hub's commit) and of them.

        Ask for it after reading.
        """
        return self.digest() if self.digest else self.key


def find(config: DataConfig) -> Text:
    """The text of a data section; `BadRequest` if it is not there, `AssetError` if the Hub cannot be reached."""
    limit = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
    rows: dict[str, Any] = {"field": config.field, "subset": config.subset, "split": config.split, **limit}
    if isinstance(config, choices.Outside):
        own = {key: value for key, value in plain(config).items() if key not in (SOURCE, "val_fraction", "order")}
        return Text(str(config.name), _hash_with("", own), lambda _: _by_code(config))
    if config.name in assets.TEXTS:
        asset = assets.TEXTS[config.name]  # its hash is known, so if the cache has its tokens it is not read

        def fetched(advance: Advance) -> Pieces:
            return in_file(_file(assets.fetch(asset), asset.name, asset.name), config.field, advance)

        return Text(config.name.value, _hash_with(asset.sha256, limit), fetched)
    path = Path(str(config.path))
    if config.name is DataName.hub and not path.expanduser().exists():
        commit = _commit(config)
        key = _hash_with(commit, {**rows, "path": config.path})
        return Text(str(path), key, lambda advance: _streamed(config, commit, advance), revision=commit)
    return _on_disk(config, path, rows, limit)


def _on_disk(config: DataConfig, path: Path, rows: Mapping[str, Any], limit: Mapping[str, Any]) -> Text:
    """A text in files, or a dataset in a folder. `rows`, `limit`: keys that select a part of a dataset, of any text."""
    found = _files(path)
    seen = [(item.name, item.size, item.mtime_ns) for item in found]
    place = {"path": str(path.expanduser().absolute()), "files": seen}
    fields = [item.has_fields for item in found]
    chosen: Mapping[str, Any] = {**limit, **({"field": config.field, "of": fields} if any(fields) else {})}
    size: int | None = sum(item.size for item in found)
    if config.name is DataName.hub:
        why = f"{path} is a folder here and has none"
        require(config.revision is None, "data.revision", config.revision, why, "leave it out")
        chosen, size = rows, None

    def read(advance: Advance) -> Pieces:
        if config.name is DataName.hub:
            return _streamed(config, None, advance)
        return itertools.chain.from_iterable(in_file(item, config.field, advance) for item in found)

    def digest() -> str:
        return _hash_with(files.joint([item.digest() for item in found]), chosen)

    key = _hash_with(hashlib.sha256(json.dumps(place).encode()).hexdigest(), {"name": config.name.value, **chosen})
    return Text(path.name, key, read, size, digest)


def _by_code(config: Any) -> Pieces:
    """The documents that code from outside yields: texts, or token ids."""
    said = f"data={config.name}"
    try:
        for document in choices.call(config):
            yield None
            if isinstance(document, str):
                yield document
                continue
            ids = np.asarray(None)
            with contextlib.suppress(ValueError):
                ids = np.asarray(document)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() < 2**16):
                why = f"its code yielded {type(document).__name__}, neither a text nor token ids below 65,536"
                raise BadRequest(f"{said}: {why}; yield str, or lists of int")
            yield ids.astype("<u2")
    except BadRequest:
        raise
    except Exception as error:
        why = f"its code raised {type(error).__name__}: {first_line(error)}"
        raise BadRequest(f"{said}: {why}; mend its code or its keys") from error


def _hash_with(sha256: str, chosen: Mapping[str, Any]) -> str:
    """`sha256` where nothing is chosen, else a hash of both."""
    if not chosen:
        return sha256
    return hashlib.sha256(json.dumps({"sha256": sha256, **chosen}, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def reading(what: str, size: int | None) -> Iterator[Advance]:
    """A block that reads `size` bytes (None: unknown); after `PATIENCE` seconds a terminal shows a bar."""
    plain = None if isinstance(sys.stderr, io.TextIOWrapper) else False  # a notebook's stream cannot move a cursor
    console, began = Console(stderr=True, force_jupyter=False, force_terminal=plain), time.monotonic()
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=console, transient=True)
    task = bar.add_task(what, total=size)

    def advance(part: int) -> None:
        bar.advance(task, part)
        if console.is_terminal and time.monotonic() - began > PATIENCE:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass
class File:
    """A file of documents as it was found."""

    path: Path
    name: str  # relative to the folder that was named
    named: str  # `data.path` as typed
    size: int
    mtime_ns: int
    sha256: str | None = None  # of its bytes, once all of them have been read through `_Hashed`

    @property
    def has_fields(self) -> bool:
        """Whether a document is a field of a row."""
        return self.ends(*ROWS_OF_JSON, *(f"{ending}.gz" for ending in ROWS_OF_JSON), ".parquet")

    def ends(self, *endings: str) -> bool:
        """Whether its name ends in one of these, in upper or lower case."""
        return self.path.name.lower().endswith(endings)

    def digest(self) -> str:
        """Its sha256; raises `BadRequest` if it cannot be read, or has changed since it was found."""
        try:
            sha256, stat = self.sha256 or files.sha256(self.path), self.path.stat()
        except OSError as error:
            raise self.unreadable(error) from error
        if (stat.st_size, stat.st_mtime_ns) != (self.size, self.mtime_ns):
            raise self.refused("was changed while it was read", "start again once it is written")
        return sha256

    def refused(self, why: str, remedy: str) -> BadRequest:
        """The error that says what is wrong with it; `{}` in the remedy becomes its path, quoted for a shell."""
        path = shlex.quote(str(self.path))
        return BadRequest(f"data.path={self.named}: {self.name} {why}; {remedy.replace('{}', path)}")

    def unreadable(self, error: Exception) -> BadRequest:
        """The error for a file that could not be read."""
        why = f"cannot be read ({getattr(error, 'strerror', None) or error})"
        return self.refused(why, "name files that are whole and readable")


class _Hashed(io.FileIO):
    """The bytes of a file, hashed and counted as they are read."""

    def __init__(self, file: File, advance: Advance) -> None:
        super().__init__(file.path)
        self._file, self._advance, self._digest = file, advance, hashlib.sha256()

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        if count:
            self._digest.update(memoryview(buffer)[:count])
            self._advance(count)
        else:
            self._file.sha256 = self._digest.hexdigest()
        return count


def _file(path: Path, name: str, named: str) -> File:
    stat = path.stat()
    return File(path, name, named, stat.st_size, stat.st_mtime_ns)


def _files(path: Path) -> list[File]:
    """The file, or every file below the folder and the folders linked there, sorted by path; hidden ones left out."""
    named, key = str(path), f"data.path={path}"
    try:
        path = path.expanduser()
        if path.is_dir():
            found = _below(path)
            if not found:
                remedy = "name one with UTF-8 text files, JSONL or Parquet in it"
                raise BadRequest(f"{key}: the folder holds no files; {remedy}")
            return [_file(item, str(item.relative_to(path)), named) for item in found]
        if path.exists() and not path.is_file():  # a pipe or a device: reading might never end
            raise BadRequest(f"{key}: neither a file nor a folder; name a UTF-8 text file or a folder of them")
        return [_file(path, path.name, named)]
    except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: `~NAME`, and there is no such user
        raise BadRequest(f"{key}: no such file or folder; name a UTF-8 text file or a folder of them") from error
    except OSError as error:
        raise BadRequest(f"{key}: cannot be read ({error.strerror}); name a readable UTF-8 text file") from error


def _below(folder: Path) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise error

    found = []
    for here, folders, names in files.walk(folder, unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for item in (here / name for name in names if not name.startswith(".")):
            if item.is_symlink() and not item.exists():
                why = f"{item.relative_to(folder)} is a link that leads nowhere"
                raise BadRequest(f"data.path={folder}: {why}; remove it, or put back what it led to")
            found += [item] if item.is_file() else []
    return sorted(found)


# --- documents -------------------------------------------------------------------------------------------------------


def cut(blocks: Iterable[str]) -> Iterator[str]:
    r"""Cut a text into pieces whose tokens, one piece after another, are those of the whole text.

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
        if found := _LAST_CUT.match(before + block):
            end = found.end() - len(before)
            yield "".join(kept) + block[:end]
            kept, block = [], block[end:]
        kept.append(block)
        before = block[-1:] or before
    yield "".join(kept)


def in_file(file: File, field: str, advance: Advance) -> Pieces:
    """The documents of a file, read by its ending; `BadRequest`, with the line or row, if it is not of that form."""
    try:
        if file.ends(".parquet"):
            yield from _parquet(file, field, advance)
            return
        with io.BufferedReader(_Hashed(file, advance), BLOCK) as raw:
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
                yield None
                yield from cut(_decoded(file, stream))
    except (OSError, EOFError, zlib.error) as error:
        raise file.unreadable(error) from error


def in_row(row: object, field: str, where: str) -> Pieces:
    """The document in a row's `field`; `BadRequest` if there is no text. `where`: names the row."""
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


def _decoded(file: File, stream: Stream) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    at = 0
    if stream.peek(3).startswith(codecs.BOM_UTF8):  # the byte order mark is no part of the text
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
    arrow, parquet = (_extra(name, f"data.path={file.named}") for name in ("pyarrow", "pyarrow.parquet"))
    try:
        with parquet.ParquetFile(file.path, buffer_size=BLOCK) as table:
            columns = {column.name: "" if "string" in str(column.type) else None for column in table.schema_arrow}
            if field not in columns:
                yield from in_row(columns, field, file.name)  # raises BadRequest, naming the columns
            rows = itertools.count(1)
            for batch in table.iter_batches(ROWS, columns=[field]):
                for document in batch.column(0).to_pylist():
                    yield from in_row({field: document}, field, f"{file.name} row {next(rows)}")
                advance(file.size * batch.num_rows // table.metadata.num_rows)
    except arrow.ArrowException as error:
        raise file.refused(f"is no whole Parquet file ({first_line(error)})", "fetch it again") from error


def _extra(module: str, said: str) -> Any:
    """A module of the extra `datasets`; `BadRequest` if it is not installed. `said`: the override that needs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadRequest(f"{said}: needs {module}; pip install 'gpt2exp[datasets]'") from error


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _commit(config: DataConfig) -> str:
    """The commit that `data.revision` of a dataset points to, asked of the Hub once and kept in the cache."""
    asked = hashlib.sha256(f"dataset {config.path} at {config.revision}".encode()).hexdigest()[:32]
    memory = assets.cache_folder() / "texts" / f"{asked}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not asked yet, or the answer is damaged
        return str(json.loads(memory.read_text(encoding="utf-8"))["commit"])
    key = f"data.path={config.path}"
    errors = _extra("huggingface_hub.errors", "data=hub")
    try:
        commit = _extra("huggingface_hub", "data=hub").HfApi().dataset_info(config.path, revision=config.revision).sha
    except errors.RevisionNotFoundError as error:
        why = f"{config.path} has no such revision"
        raise BadRequest(f"data.revision={config.revision}: {why}; name a branch, a tag or a commit of it") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        remedy = "name it OWNER/NAME; for a private one log in: hf auth login"
        raise BadRequest(f"{key}: no such dataset on the Hub, nor a folder here; {remedy}") from error
    except Exception as error:  # also whatever the library's HTTP client raises
        why = f"the Hub cannot be reached ({first_line(error)})"
        raise assets.AssetError(f"{key}: {why}; try again with a network") from error
    with assets.writing(memory.parent):
        memory.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(memory, {"dataset": config.path, "revision": config.revision, "commit": commit})
    return str(commit)


def _streamed(config: DataConfig, commit: str | None, advance: Advance) -> Pieces:
    datasets = _extra("datasets", "data=hub")
    source = str(Path(str(config.path)).expanduser()) if commit is None else str(config.path)
    try:
        rows = datasets.load_dataset(source, config.subset, split=config.split, revision=commit, streaming=True)
    except (ValueError, FileNotFoundError) as error:  # no such split or subset; its text lists those that exist
        key = "subset" if "onfig" in str(error) else "split" if "split" in str(error).lower() else "path"
        value = getattr(config, key)
        raise BadRequest(f"data.{key}={show(value)}: {explain(error)}; name one that {config.path} has") from error
    except Exception as error:
        raise assets.AssetError(f"data.path={config.path}: cannot be loaded ({first_line(error)})") from error
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            for piece in in_row(row, config.field, f"{config.path} row {number}"):
                advance(len(piece or ""))
                yield piece
    except BadRequest:
        raise
    except Exception as error:
        why = f"broke off after row {number} ({first_line(error)})"
        raise assets.AssetError(f"data.path={config.path}: {why}; start it again") from error
