"""Which text it is: where its documents lie, and what names its tokens in the cache.

A text on disk is known by its path and by the sizes and dates of its files: what it holds is hashed only while it is
tokenised. A dataset on the Hub is known by its commit, which is asked for once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2exp.config import BadRequest, DataConfig, DataName, explain, first_line, require, show
from gpt2exp.data import assets, documents
from gpt2exp.data.documents import Advance, File, Pieces
from gpt2exp.files import write_json

EXTRA = "pip install 'gpt2exp[datasets]'"


@dataclass(frozen=True)
class Text:
    """A text that may not have been read yet."""

    name: str
    key: str
    """A hash that names its tokens: of where it lies, or the Hub's commit, and of what is chosen of it."""
    size: int | None
    """Bytes that reading it will count, where they are known."""
    read: Callable[[Advance], Pieces]
    """Its documents, with None before each."""
    sha256: Callable[[], str]
    """For the record, once it was read: of a plain text's bytes; for rows also of the field, subset, split and limit
    chosen; of a dataset of its commit and these."""
    revision: str | None = None
    """The commit on the Hub."""


def find(config: DataConfig) -> Text:
    """The text of a data section.

    Raises:
        BadRequest: there is no such text, or it cannot be read.
        assets.AssetError: the Hub cannot be reached.
    """
    limit = {} if config.max_tokens is None else {"max_tokens": config.max_tokens}
    if config.name is DataName.tinyshakespeare:
        asset = assets.TINY_SHAKESPEARE  # its hash is known: with a warm cache the text itself is not read again

        def read(advance: Advance) -> Pieces:
            return documents.in_file(_file(assets.fetch(asset), asset.name, asset.name), config.field, advance)

        known = _with(asset.sha256, limit)
        return Text(config.name.value, known, None, read, lambda: known)
    path = Path(str(config.path))
    chosen: dict[str, Any] = {"field": config.field, "subset": config.subset, "split": config.split}
    if config.name is DataName.hub and not path.expanduser().exists():
        commit = _commit(config)
        known = _with(commit, {**chosen, "path": config.path, **limit})
        return Text(
            str(config.path), known, None, lambda advance: _streamed(config, commit, advance), lambda: known, commit
        )
    found = _files(path)
    if config.name is DataName.hub:
        why = f"{path} is a folder here and has none"
        require(config.revision is None, "data.revision", config.revision, why, "leave it out")
    else:
        fields = [item.has_fields for item in found]
        chosen = {"field": config.field, "of": fields} if any(fields) else {}
    chosen |= limit
    place = {
        "path": str(path.expanduser().absolute()),
        "files": [(item.name, item.size, item.mtime_ns) for item in found],
    }
    key = _with(hashlib.sha256(json.dumps(place).encode()).hexdigest(), {"name": config.name.value, **chosen})
    size = None if config.name is DataName.hub else sum(item.size for item in found)

    def documents_of(advance: Advance) -> Pieces:
        if config.name is DataName.hub:
            return _streamed(config, None, advance)
        return itertools.chain.from_iterable(documents.in_file(item, config.field, advance) for item in found)

    return Text(path.name, key, size, documents_of, lambda: _with(_digest(found), chosen))


def _with(sha256: str, chosen: Mapping[str, Any]) -> str:
    """`sha256` where nothing is chosen, else a hash of it and of what is."""
    if not chosen:
        return sha256
    return hashlib.sha256(json.dumps({"sha256": sha256, **chosen}, sort_keys=True).encode()).hexdigest()


def _digest(found: Sequence[File]) -> str:
    """Of a file its sha256; of several the sha256 of theirs, one after the other."""
    digests = [item.digest() for item in found]
    return digests[0] if len(digests) == 1 else hashlib.sha256(bytes.fromhex("".join(digests))).hexdigest()


# --- files -----------------------------------------------------------------------------------------------------------


def _file(path: Path, name: str, named: str) -> File:
    stat = path.stat()
    return File(path, name, named, stat.st_size, stat.st_mtime_ns)


def _files(path: Path) -> list[File]:
    """The file, or every file below the folder and the folders linked there, in the order of their paths.

    What is hidden is left out, and what several links lead to is read once.
    """
    named = str(path)
    key = f"data.path={named}"
    try:
        path = path.expanduser()
        if path.is_dir():
            found = _below(path)
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


def _below(folder: Path) -> list[Path]:
    found, seen, places = [], set(), [folder]
    for place in places:  # which grows: a linked folder comes last, so that a real one is known by its own name
        for where, folders, names in os.walk(place, onerror=_raise):
            here = Path(where)
            if (real := here.resolve()) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = [name for name in folders if not name.startswith(".")]
            places += [here / name for name in sorted(folders) if (here / name).is_symlink()]
            for name in names:
                item = here / name
                if name.startswith("."):
                    continue
                if item.is_symlink() and not item.exists():
                    why = f"{item.relative_to(folder)} is a link that leads nowhere"
                    raise BadRequest(f"data.path={folder}: {why}; remove it, or put back what it led to")
                found += [item] if item.is_file() else []
    return sorted(found)


def _raise(error: OSError) -> None:
    """A folder that cannot be read is not passed over, as `os.walk` would."""
    raise error


# --- the Hub ---------------------------------------------------------------------------------------------------------


def _commit(config: DataConfig) -> str:
    """What `data.revision` of a dataset on the Hub points to: asked once, and the same ever after."""
    asked = hashlib.sha256(f"dataset {config.path} at {config.revision}".encode()).hexdigest()[:32]
    memory = assets.cache_folder() / "texts" / f"{asked}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not asked yet, or the answer is damaged
        return str(json.loads(memory.read_text(encoding="utf-8"))["commit"])
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
            f"{key}: the Hub cannot be reached ({first_line(error)}); try again with a network"
        ) from error
    assert commit is not None, "the Hub names the commit of every dataset"
    with assets.writing(memory.parent):
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {"dataset": config.path, "revision": config.revision, "commit": commit})
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
        raise BadRequest(f"data.{key}={show(value)}: {explain(error)}; name one that {config.path} has") from error
    except Exception as error:
        raise assets.AssetError(f"data.path={config.path}: cannot be loaded ({first_line(error)})") from error
    number = 0
    stream = iter(rows)
    while True:
        try:
            row = next(stream, None)
        except Exception as error:
            why = f"broke off after row {number} ({first_line(error)})"
            raise assets.AssetError(f"data.path={config.path}: {why}; start it again") from error
        if row is None:
            return
        number += 1
        for piece in documents.in_row(row, config.field, f"{config.path} row {number}"):
            advance(len(piece or ""))
            yield piece
