"""Which text is it: where its documents lie, and the hash it is known by, before anything of it is tokenised.

A text that is large is not read again to be known: what its files hashed to is remembered beside their size, date and
inode. What a dataset on the Hub is known by is the commit; that is asked for once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2exp.config import BadRequest, DataConfig, DataName, require, show
from gpt2exp.data import assets, documents, progress
from gpt2exp.data.documents import Advance, File, Pieces
from gpt2exp.files import write_json

LARGE = 2**26
"""Bytes of a text from which on its files' hashes are remembered; less is hashed in a moment, whatever its date."""

EXTRA = "pip install 'gpt2exp[datasets]'"


@dataclass(frozen=True)
class Text:
    """A text that may not have been read yet."""

    name: str
    sha256: str
    """Of the bytes of a plain text; else of these, or the Hub's commit, together with what was chosen of them."""
    size: int | None
    """Bytes that reading it will count, where they are known."""
    read: Callable[[Advance], Pieces]
    """Its documents, with None before each."""
    revision: str | None = None
    """The commit on the Hub."""


def find(config: DataConfig) -> Text:
    """The text of a data section.

    Raises:
        BadRequest: there is no such text, or it cannot be read.
        assets.AssetError: the Hub cannot be reached.
    """
    if config.name is DataName.tinyshakespeare:
        asset = assets.TINY_SHAKESPEARE  # its hash is known: with a warm cache the text itself is not read again

        def read(advance: Advance) -> Pieces:
            return documents.in_file(_file(assets.fetch(asset), asset.name, asset.name), config.field, advance)

        return Text(config.name.value, _known_by(config, asset.sha256), None, read)
    path = Path(str(config.path))
    if config.name is DataName.text or path.expanduser().exists():
        files = _files(path)
        sha256 = _hash(path, files)
        if config.name is DataName.hub:
            why = f"{path} is a folder here and has none"
            require(config.revision is None, "data.revision", config.revision, why, "leave it out")
            return _hub(config, sha256, None)
        fields = [item.has_fields for item in files]
        chosen = {"field": config.field, "of": fields} if any(fields) else {}
        size = sum(item.stamp[0] for item in files)
        return Text(path.name, _known_by(config, sha256, **chosen), size, lambda advance: _read(config, files, advance))
    commit = _commit(config)
    return _hub(config, commit, commit)


def _known_by(config: DataConfig, sha256: str, **chosen: Any) -> str:
    """`sha256` where all of it is read, else a hash of it and of what is chosen."""
    if config.max_tokens is not None:
        chosen["max_tokens"] = config.max_tokens
    if not chosen:
        return sha256
    return hashlib.sha256(json.dumps({"sha256": sha256, **chosen}, sort_keys=True).encode()).hexdigest()


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path, name: str, named: str) -> File:
    return File(path, name, named, documents.stamp(path))


def _files(path: Path) -> list[File]:
    """The file, or every file below the folder that is not hidden, in the order of their paths."""
    named = str(path)
    key = f"data.path={named}"
    try:
        path = path.expanduser()
        if path.is_dir():
            found = [item for item in sorted(path.rglob("*")) if item.is_file()]
            found = [item for item in found if not any(part.startswith(".") for part in item.relative_to(path).parts)]
            if not found:
                raise BadRequest(
                    f"{key}: the folder holds no files; name one with UTF-8 text files, JSONL or Parquet in it"
                )
            return [_file(item, str(item.relative_to(path)), named) for item in found]
        if path.exists() and not path.is_file():  # a pipe or a device: reading might never end
            raise BadRequest(f"{key}: neither a file nor a folder; name a UTF-8 text file or a folder of them")
        return [_file(path, path.name, named)]
    except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: the home of no user here
        raise BadRequest(f"{key}: no such file or folder; name a UTF-8 text file or a folder of them") from error
    except OSError as error:
        raise BadRequest(f"{key}: cannot be read ({error.strerror}); name a readable UTF-8 text file") from error


def _read(config: DataConfig, files: Sequence[File], advance: Advance) -> Pieces:
    for item in files:
        yield from documents.in_file(item, config.field, advance)
        _check_unchanged(item)


def _check_unchanged(item: File) -> None:
    if documents.stamp(item.path) != item.stamp:
        why = f"{item.name} was changed while it was read"
        raise BadRequest(f"data.path={item.named}: {why}; start again once it is written")


def _hash(path: Path, files: Sequence[File]) -> str:
    """Of a file its sha256; of several the sha256 of theirs, one after the other."""
    size = sum(item.stamp[0] for item in files)
    memory = _memory(f"files of {path.expanduser().absolute()}")
    before = _recall(memory) if size >= LARGE else {}
    digests: dict[str, str] = {}
    with progress.reading(f"looking at {path.name}", size) as advance:
        for item in files:
            known = before.get(item.name, [])
            if known[:-1] == [*item.stamp]:
                digests[item.name] = known[-1]
                advance(item.stamp[0])
            else:
                digests[item.name] = _sha256(item, advance)
    # a file changed within its clock's tick would look as before, so what is that young is not remembered
    settled = [item for item in files if time.time_ns() - item.stamp[1] > 2e9]
    now = {item.name: [*item.stamp, digests[item.name]] for item in settled}
    if size >= LARGE and now != before:
        with contextlib.suppress(OSError):  # a cache that may only be read: hashed again the next time
            _remember(memory, now)
    if len(files) == 1:
        return digests[files[0].name]
    return hashlib.sha256(b"".join(bytes.fromhex(digests[item.name]) for item in files)).hexdigest()


def _sha256(item: File, advance: Advance) -> str:
    digest = hashlib.sha256()
    try:
        with item.path.open("rb") as file:
            while block := file.read(documents.BLOCK):
                digest.update(block)
                advance(len(block))
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
        raise BadRequest(f"data.path={item.named}: {why}; name a readable UTF-8 text file") from error
    _check_unchanged(item)
    return digest.hexdigest()


# --- what is remembered ----------------------------------------------------------------------------------------------


def _memory(about: str) -> Path:
    return assets.cache_folder() / "texts" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.json"


def _recall(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: Mapping[str, Any]) -> None:
    memory.parent.mkdir(parents=True, exist_ok=True)
    write_json(memory, known)


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _hub(config: DataConfig, sha256: str, commit: str | None) -> Text:
    chosen = {"field": config.field, "subset": config.subset, "split": config.split, "path": config.path}
    if commit is None:  # a local folder: its files say enough
        del chosen["path"]
    name = Path(str(config.path)).name if commit is None else str(config.path)
    sha256 = _known_by(config, sha256, **chosen)
    return Text(name, sha256, None, lambda advance: _streamed(config, commit, advance), commit)


def _commit(config: DataConfig) -> str:
    """What `data.revision` of a dataset on the Hub points to: asked once, and the same ever after."""
    memory = _memory(f"dataset {config.path} at {config.revision}")
    if commit := _recall(memory).get("commit"):
        return str(commit)
    key = f"data.path={config.path}"
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise BadRequest(f"data=hub: needs the datasets library; {EXTRA}") from error
    try:
        commit = HfApi().dataset_info(str(config.path), revision=config.revision).sha
    except RevisionNotFoundError as error:
        why = f"{config.path} has no such revision"
        raise BadRequest(f"data.revision={config.revision}: {why}; name a branch, a tag or a commit of it") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "no such dataset on the Hub, nor a folder here"
        remedy = "name it OWNER/NAME; for a private one log in: hf auth login"
        raise BadRequest(f"{key}: {why}; {remedy}") from error
    except Exception as error:  # the library lets its HTTP client's own kinds through
        raise assets.AssetError(
            f"{key}: the Hub cannot be reached ({_line(error)}); try again with a network"
        ) from error
    assert commit is not None, "the Hub names the commit of every dataset"
    with assets.writing(memory.parent):
        _remember(memory, {"dataset": config.path, "revision": config.revision, "commit": commit})
    return commit


def _streamed(config: DataConfig, commit: str | None, advance: Advance) -> Pieces:
    try:
        import datasets
    except ImportError as error:
        raise BadRequest(f"data=hub: needs the datasets library; {EXTRA}") from error
    path = Path(str(config.path)).expanduser()
    source = str(path) if commit is None else str(config.path)
    try:
        rows = datasets.load_dataset(source, config.subset, split=config.split, revision=commit, streaming=True)
    except (ValueError, FileNotFoundError) as error:  # no such split or subset: which there are, it says
        key = "subset" if "onfig" in str(error) else "split" if "split" in str(error).lower() else "path"
        value = getattr(config, key)
        raise BadRequest(f"data.{key}={show(value)}: {_line(error)}; name one that {config.path} has") from error
    except Exception as error:
        raise assets.AssetError(f"data.path={config.path}: cannot be loaded ({_line(error)})") from error
    number = 0
    stream = iter(rows)
    while True:
        try:
            row = next(stream, None)
        except Exception as error:
            why = f"broke off after row {number} ({_line(error)})"
            raise assets.AssetError(f"data.path={config.path}: {why}; start it again") from error
        if row is None:
            return
        number += 1
        for piece in documents.in_row(row, config.field, f"{config.path} row {number}"):
            advance(len(piece or ""))
            yield piece


def _line(error: Exception) -> str:
    """An exception of another library as a part of a line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
