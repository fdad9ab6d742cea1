"""A large text or dataset gives exactly the tokens that tiktoken gives for the whole, from any supported file format
and in bounded memory; a bad file is refused in one line, and nothing half-written stays in the cache.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import lzma
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import safetensors.numpy
import tiktoken
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, orc, parquet

from gpt2exp import files
from gpt2exp.config import DataConfig, DataName
from gpt2exp.data import assets, sources, tokens
from gpt2exp.section import BadRequest

EOT = tokens.END_OF_TEXT
FEW = settings(deadline=None, max_examples=150, derandomize=True)


def text(path: Path | str, **more: Any) -> DataConfig:
    """The section of `data=text data.path=PATH`."""
    return DataConfig(name=DataName.text, path=str(path), **more)


@functools.cache
def encoding() -> tiktoken.Encoding:
    """Tiktoken alone."""
    return tokens.gpt2_encoding()


def encode(piece: str) -> list[int]:
    """The tokens of a whole."""
    return encoding().encode_ordinary(piece)


def joined(*pieces: str) -> list[int]:
    """Tokens of documents with `<|endoftext|>` between them."""
    return [number for piece in pieces for number in (EOT, *encode(piece))][1:]


def ids(source: tokens.TokenFile) -> list[int]:
    """Every token."""
    return source.map().tolist()


# --- cutting ---------------------------------------------------------------------------------------------------------

ODD = st.sampled_from(" \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000'sdtlve.!?_-019aZé雪½٣\u0301\u200b😀")
SEEN = st.sampled_from(["'s", "'ll", " 've", "the", " the", "  ", "\n\n", " \n", "x", "<|endoftext|>", " 12", "..."])


@FEW
@given(st.lists(st.text(ODD, max_size=6) | SEEN, max_size=40))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(blocks: list[str]) -> None:
    pieces = list(sources.cut(blocks))
    assert "".join(pieces) == "".join(blocks)
    assert [number for piece in pieces for number in encode(piece)] == encode("".join(blocks))


def test_no_character_before_a_cut_changes_a_token() -> None:
    """Python and Rust need not agree on what white space is: every character of the basic plane stands there once."""
    cuts = 0
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        whole = f"{chr(code)} x"
        pieces = list(sources.cut([whole]))
        cuts += len(pieces) > 1
        assert [number for piece in pieces for number in encode(piece)] == encode(whole), hex(code)
    assert 63_000 < cuts < 0x10000 - 0x800 - 25  # but for the white space itself


def test_real_text_in_small_pieces() -> None:
    whole = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
    pieces = list(sources.cut(whole[at : at + 997] for at in range(0, len(whole), 997)))
    assert len(pieces) > 1100
    assert max(map(len, pieces)) < 1100
    assert [number for piece in pieces for number in encode(piece)] == encode(whole)


def test_a_stretch_without_white_space_is_kept_whole() -> None:
    assert list(sources.cut(["ab", "雪" * 5, "", "c d", " e"])) == ["ab" + "雪" * 5 + "c", " d", " e"]


@pytest.mark.parametrize("unit", [" ", "\n", "\r\n", "\u3000\t", "\x1c"])
def test_a_long_run_of_white_space(unit: str) -> None:
    """As tiktoken up to the length at which its regular expression fails; beyond, by the same rule."""
    for run in (tokens.LONG - 2, tokens.LONG, tokens.LONG + 2):
        for before, after in (("x", "x"), ("", "'s"), ("x ", ".5  y"), ("x", "")):
            whole = before + unit * (run // len(unit)) + after
            assert tokens.encode_piece(encoding(), whole).tolist() == encode(whole)
    beyond = tokens.encode_piece(encoding(), "we " + unit * 1_200_000 + "x\ud800").tolist()
    assert encoding().decode(beyond) == "we " + unit * 1_200_000 + "x\ufffd"
    last = encode(unit[-1] + "x\ud800")
    assert beyond[-len(last) :] == last


@pytest.mark.parametrize("character", ["a", "7", "-", "雪", "'", "\x00", "\u0301"])
def test_a_long_run_of_anything_else(character: str) -> None:
    found = tokens.encode_piece(encoding(), character * 1_200_000).tolist()
    assert encoding().decode(found) == character * 1_200_000


def test_a_text_with_a_million_blanks(tmp_path: Path, cold: Path) -> None:
    (tmp_path / "a.txt").write_text("to be" + " " * 1_200_000 + "or not")
    assert encoding().decode(ids(tokens.prepare(text(tmp_path / "a.txt")))) == (tmp_path / "a.txt").read_text()


# --- the token file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [7, 2**20])
def test_the_token_file_is_numpys(piece: int, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `.npy`, however many pieces it was written in; its hash and counts are of what it holds."""
    monkeypatch.setattr(sources, "BLOCK", piece)
    (tmp_path / "a.txt").write_text("Before we proceed any further, hear me speak.\n" * 50)
    source = tokens.prepare(text(tmp_path / "a.txt"))
    found = np.load(source.folder / "tokens.npy", allow_pickle=False)
    assert found.dtype == np.dtype("<u2")
    assert found.tolist() == encode("Before we proceed any further, hear me speak.\n" * 50)
    assert source.tokens_sha256 == hashlib.sha256(found.tobytes()).hexdigest()
    assert np.load(source.folder / "counts.npy").tolist() == np.bincount(found, minlength=2**16).tolist()
    assert isinstance(source.map(), np.memmap)


def test_a_copied_cache_is_hashed_once(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    source = tokens.prepare(text(tmp_path / "a.txt"))
    os.utime(source.folder / "facts.json", (1e9, 1e9))
    hashed = []

    def sha256(content: Any = b"") -> Any:
        hashed.extend([len(content)] if isinstance(content, memoryview) else [])
        return real(content)

    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", sha256)
    assert source.whole
    assert hashed == [source.tokens]
    assert source.whole
    assert len(hashed) == 1


# --- forms -----------------------------------------------------------------------------------------------------------

DOCUMENTS = ["First citizen: we've 12 oxen.\n", "", "Où sont les neiges ? 雪", "the end"]


def rows(field: str = "text") -> str:
    """DOCUMENTS as JSON lines, with a blank one and another field between."""
    lines = [json.dumps({"id": number, field: document}) for number, document in enumerate(DOCUMENTS)]
    return "\n\n".join(lines) + "\n"


def table(**columns: list[Any]) -> arrow.Table:
    return arrow.table(columns)


def write(form: str, path: Path, field: str = "text") -> Path:
    path = path / f"a.{form}"
    if form != "parquet":
        content = rows(field).encode()
        path.write_bytes(gzip.compress(content) if form.lower().endswith(".gz") else content)
    else:
        parquet.write_table(table(id=[*range(4)], **{field: DOCUMENTS}), path, row_group_size=2)
    return path


FORMS = ["jsonl", "jsonl.gz", "ndjson", "ndjson.gz", "json", "JSON.GZ", "parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_documents(form: str, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCK", 8)  # so that documents are cut, and batched, too
    monkeypatch.setattr(sources, "ROWS", 3)
    source = tokens.prepare(text(write(form, tmp_path)))
    assert ids(source) == joined(*DOCUMENTS)
    body = write(form, tmp_path, "body")
    named = tokens.prepare(text(body, field="body"))
    assert ids(named) == ids(source)
    assert named.sha256 not in (source.sha256, hashlib.sha256(body.read_bytes()).hexdigest())


def test_a_folder_may_mix_them(tmp_path: Path, cold: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "0.md").write_text("# plain")
    for form in ("jsonl", "parquet"):
        write(form, folder)
    (folder / "z.TXT").write_text("last")
    assert ids(tokens.prepare(text(folder))) == joined("# plain", *DOCUMENTS, *DOCUMENTS, "last")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.gz", "a.txt", "a"])
def test_packed_text_is_read_as_plain(name: str, tmp_path: Path, cold: Path) -> None:
    """Whatever its name, also with several members; its hash is that of the file."""
    content = gzip.compress(b"to be or ") + gzip.compress(b"not to be")
    (tmp_path / name).write_bytes(content)
    source = tokens.prepare(text(tmp_path / name))
    assert ids(source) == encode("to be or not to be")
    assert source.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_text(pack: Callable[[bytes], bytes], tmp_path: Path, cold: Path) -> None:
    """It is dropped at the start of each file of a folder; inside a text it stays."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, content in {"a.txt": "to\ufeff be", "b.txt": "or not", "c.jsonl": '{"text": "x"}'}.items():
        (folder / name).write_bytes(pack(content.encode("utf-8-sig")))
    if pack is gzip.compress:
        (folder / "c.jsonl").rename(folder / "c.jsonl.gz")
    assert ids(tokens.prepare(text(folder))) == joined("to\ufeff be", "or not", "x")
    (tmp_path / "late.txt").write_bytes(codecs.BOM_UTF8 + b"x " * 600_000 + b"\xe9")
    with pytest.raises(BadRequest, match=r"late\.txt is not UTF-8 at byte 1200003"):
        tokens.prepare(text(tmp_path / "late.txt"))


def test_a_literal_end_of_text_is_noted_with_how_to_part(
    tmp_path: Path, cold: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the count and a command for a shell; the file that it makes has the documents."""
    path = tmp_path / "my stories.txt"
    path.write_text("to be<|endoftext|>or not\n<|endoftext|>" + "naïve " * 300_000 + "<|endoftext|>")
    source = tokens.prepare(text(path))
    assert EOT not in ids(source)
    tokens.prepare(text(path))
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(
        "my stories.txt: holds <|endoftext|> 3 times, as letters: it separates no documents; to separate them: "
    )
    command, _, made = note.partition("to separate them: ")[2].partition(", and data.path=")
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, executable="/bin/sh", env={**os.environ, "PYTHONUTF8": "1"})
    (place,) = shlex.split(made)
    assert ids(tokens.prepare(text(place))) == joined("to be", "or not\n", "naïve " * 300_000)
    caplog.clear()
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a<|endoftext|>"}) + "\n" + json.dumps({"text": "b"}))
    tokens.prepare(text(tmp_path / "b.jsonl"))
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(
        "b.jsonl: holds <|endoftext|> 1 time, as letters: it separates no documents; to separate them, make each"
    )


def test_linked_folders_are_read_once(tmp_path: Path, cold: Path) -> None:
    """A circle of links is no endless loop; a real folder has its own name."""
    folder, other = tmp_path / "texts", tmp_path / "other"
    for place, content in {folder / "m" / "a": "real", other / "b": "linked", other / ".git" / "c": "no"}.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    for name, place in {"a_twin": folder / "m", "other": other, "zz": other, "self": folder, ".hidden": other}.items():
        (folder / name).symlink_to(place)
    (other / "back").symlink_to(folder)
    (folder / "file").symlink_to(other / "b")
    assert ids(tokens.prepare(text(folder))) == joined("linked", "real", "linked")
    (folder / "m" / "gone").symlink_to("nowhere")
    with pytest.raises(BadRequest, match=r"data\.path=.*texts: m/gone is a link that leads nowhere; remove it"):
        tokens.prepare(text(folder))


def test_half_a_surrogate_pair_is_what_tiktoken_makes_of_it(tmp_path: Path, cold: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "c"}\n')
    assert ids(tokens.prepare(text(tmp_path / "a.jsonl"))) == joined("a \ud800 b", "c")


@pytest.mark.parametrize("most", [2, 5, 1000])
def test_max_tokens(most: int, tmp_path: Path, cold: Path) -> None:
    path = write("jsonl", tmp_path)
    whole, some = tokens.prepare(text(path)), tokens.prepare(text(path, max_tokens=most))
    assert ids(some) == ids(whole)[:most]
    assert some.tokens == min(most, whole.tokens)
    assert some.sha256 != whole.sha256


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', r"data\.path=.*a\.jsonl: a\.jsonl line 3 is no JSON .*; write an"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}',
            r"data\.field=text: a\.jsonl line 2 has .* body; try data\.field=body",
        ),
        ("a.jsonl", b'{"text": null}', r"data\.field=text: a\.jsonl line 1 holds null, no text; name"),
        ("a.jsonl", b"1", r"data\.field=text: a\.jsonl line 1 is no row of named fields; name the field"),
        (
            "a.jsonl",
            b'{"text": "\xe9"}',
            r"data\.path=.*: a\.jsonl is not UTF-8 in line 1; convert it: iconv -f LATIN1",
        ),
        ("a.jsonl", b"[" * 100_000 + b"\n", r"a\.jsonl is one JSON array, no JSON lines; convert it: jq -c"),
        ("a.jsonl", b'{"a":' * 100_000 + b"\n", r"a\.jsonl line 1 is no JSON"),
        ("a.json", b'[\n{"text": "x"}\n]', r"a\.json is one JSON array, .*: jq -c '\.\[\]' /.*a\.json > OUT\.jsonl$"),
        ("a.json", b'{\n"text": "x"\n}', r"a\.json line 1 is no JSON .*; write an object a line.*, or name it \.txt"),
        ("a.json", b'{"data": ["x"]}', r"data\.field=text: a\.json line 1 has no such field, only data"),
        ("a.txt", b'\n{"text": "x"}\n', r"a\.txt holds JSON lines; let its name end in \.jsonl"),
        ("a", b'{"body": "x"}\n{"body": "y"}\n', r"a holds JSON lines; let its name end in \.jsonl"),
        ("a.jsonl", b"\n", r"the text has 0 tokens"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "x"}' * 9, mtime=0)[:-9],
            r"data\.path=.*: a\.jsonl\.gz cannot be read",
        ),
        ("a.jsonl.gz", b'{"text": "x"}\n', r"data\.path=.*: a\.jsonl\.gz cannot be read \(Not a gzipped file"),
        ("a.parquet", b"PAR1 no", r"data\.path=.*: a\.parquet is no whole Parquet file"),
        ("a.parquet", {"n": [1], "body": ["x"]}, r"data\.field=text: a\.parquet has .* n, body; try data\.field=body"),
        ("a.parquet", {"text": ["x", None]}, r"data\.field=text: a\.parquet row 2 holds null"),
        ("a.parquet", {"text": [["x"]]}, r"data\.field=text: a\.parquet row 1 holds a list"),
        ("a.txt", b"x " * 600_000 + b"\xe9", r"data\.path=.*: a\.txt is not UTF-8 at byte 1200000; convert"),
        ("a.txt", "雪".encode() * 400_000 + b"\xe9 ", r"data\.path=.*: a\.txt is not UTF-8 at byte 1200000; convert"),
        ("a.txt", b"x " * 600_000 + b"\x00", r"data\.path=.*: a\.txt holds zero bytes"),
    ],
)
def test_what_is_no_text_is_refused(
    name: str, content: bytes | dict[str, list[Any]], complaint: str, tmp_path: Path, cold: Path
) -> None:
    """Also far into a file, after tokens were written."""
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else parquet.write_table(table(**content), path)
    with pytest.raises(BadRequest, match=complaint) as refusal:
        tokens.prepare(text(path))
    assert "\n" not in str(refusal.value)
    assert not list(cold.glob("tokens/*"))


def packed_tar() -> bytes:
    """A tar archive with a text in it."""
    with io.BytesIO() as out:
        with tarfile.open(fileobj=out, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("a.txt"))
        return out.getvalue()


def packed_zip() -> bytes:
    """A zip archive with a text in it."""
    with io.BytesIO() as out:
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("a.txt", "to be")
        return out.getvalue()


def saved(write: Callable[[Any], object]) -> bytes:
    """What a library writes to a file."""
    with io.BytesIO() as out:
        write(out)
        return out.getvalue()


OTHERS = {
    "UTF-16": ("to be".encode("utf-16"), "UTF-16; convert it: iconv -f UTF-16 -t UTF-8 "),
    "UTF-16 be": (codecs.BOM_UTF16_BE + "to be".encode("utf-16-be"), "UTF-16; convert it: iconv -f UTF-16 -t UTF-8 "),
    "UTF-16 bare": ("to be".encode("utf-16-le"), "UTF-16; convert it: iconv -f UTF-16LE -t UTF-8 "),
    "UTF-16 bare be": ("to be".encode("utf-16-be"), "UTF-16; convert it: iconv -f UTF-16BE -t UTF-8 "),
    "UTF-32": ("to be".encode("utf-32"), "UTF-32; convert it: iconv -f UTF-32 -t UTF-8 "),
    "gzip twice": (
        gzip.compress(gzip.compress(b"x")),
        "gzip; gunzip < .*a.txt > IN, then unpack it: gunzip < IN > OUT",
    ),
    "tar.gz": (
        gzip.compress(packed_tar()),
        "a tar archive; gunzip < .*a.txt > IN, then unpack it: mkdir OUT && tar -xf IN",
    ),
    "bz2": (bz2.compress(b"x"), "bzip2; unpack it: bunzip2 < "),
    "bz2 empty": (bz2.compress(b""), "bzip2; unpack it: bunzip2 < "),
    "xz": (lzma.compress(b"x"), "xz; unpack it: xz -dc "),
    "zstd": (arrow.compress(b"x" * 99, "zstd", asbytes=True), "zstd; unpack it: zstd -dc "),
    "zip": (packed_zip(), "a zip archive .*; unpack it: unzip "),
    "tar": (packed_tar(), "a tar archive; unpack it: mkdir OUT && tar -xf "),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "a PDF; convert it: pdftotext "),
    "PNG": (b"\x89PNG\r\n\x1a\n\x00", "a picture; name text files"),
    "JPEG": (b"\xff\xd8\xff\xe0\x00\x10JFIF", "a picture; name text files"),
    "Parquet": (
        saved(lambda out: parquet.write_table(arrow.table({"text": ["x"]}), out)),
        "Parquet; let its name end in",
    ),
    "Feather": (saved(lambda out: feather.write_feather(arrow.table({"text": ["x"]}), out)), "a table .*; write it as"),
    "ORC": (saved(lambda out: orc.write_table(arrow.table({"text": ["x"]}), out)), "a table .*; write it as .parquet"),
    "safetensors": (safetensors.numpy.save({"a": np.zeros(3)}), "weights .*; name text files; init.path=FOLDER"),
    "npy": (saved(lambda out: np.save(out, np.zeros(3))), "arrays or a pickle"),
    "pickle": (pickle.dumps(["x"]), "arrays or a pickle"),
    "tokens": (np.array([20240520, 1, 5], "<i4").tobytes(), "tokens .*; name the text that they were made from"),
    "SQLite": (b"SQLite format 3\x00", "an SQLite database"),
    "Word": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a document of Microsoft Office; save it as plain text"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS .*; fetch it: git lfs pull"),
}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_file_is_its_first_bytes_tell(kind: str, name: str, tmp_path: Path, cold: Path) -> None:
    content, complaint = OTHERS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadRequest, match=f"a.[a-z]+ is {complaint.replace('a.txt', name)}") as refusal:
        tokens.prepare(text(tmp_path / name))
    assert "\n" not in str(refusal.value)
    assert not list(cold.glob("tokens/*"))


@FEW
@given(st.sampled_from([content for content, _ in OTHERS.values()]), st.text(min_size=1))
def test_no_text_is_taken_for_something_else(begun: bytes, more: str) -> None:
    """What begins with the letters of such a mark ("ORCHARD", "ID3 tags", "GGUF is") is still text."""
    start = "".join(itertools.takewhile(str.isprintable, begun.decode("latin-1")))
    for whole in (more, start + " " + more, start + "Z" + more):
        if "\x00" not in whole and not whole.startswith(("%PDF-", "BZh91AY", "version https://git-lfs")):
            assert not any(re.match(mark[0], whole.encode(errors="replace"), re.DOTALL) for mark in sources.NOT_TEXT)


def test_parquet_without_its_library(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadRequest, match=r"needs pyarrow; pip install 'gpt2exp\[datasets\]'$"):
        tokens.prepare(text(path))


# --- which text it is ------------------------------------------------------------------------------------------------


def test_a_plain_texts_hash_is_what_it_always_was(tmp_path: Path, cold: Path) -> None:
    """Runs of earlier versions are resumed by it, so it must not change."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(b"to be")
    assert tokens.prepare(text(folder / "b.txt")).sha256 == hashlib.sha256(b"to be").hexdigest()
    assert tokens.prepare(text(folder)).sha256 == hashlib.sha256(b"to be").hexdigest()
    (folder / "a.txt").write_bytes(b"or not")
    both = hashlib.sha256(hashlib.sha256(b"or not").digest() + hashlib.sha256(b"to be").digest())
    assert tokens.prepare(text(folder)).sha256 == both.hexdigest()


@pytest.mark.parametrize(
    ("form", "more", "chosen"),
    [
        ("jsonl", {}, {"field": "text", "of": [True]}),
        ("jsonl.gz", {}, {"field": "text", "of": [True]}),
        ("parquet", {}, {"field": "text", "of": [True]}),
        ("jsonl", {"max_tokens": 3}, {"field": "text", "of": [True], "max_tokens": 3}),
        ("txt", {"max_tokens": 3}, {"max_tokens": 3}),
    ],
)
def test_what_is_chosen_of_a_text_is_in_its_hash(
    form: str, more: dict[str, int], chosen: dict[str, Any], tmp_path: Path, cold: Path
) -> None:
    """As before: of all the bytes, also where they were not read to the end, or not in their order."""
    path = write(form, tmp_path) if form != "txt" else tmp_path / "a.txt"
    if form == "txt":
        path.write_text("to be or not to be " * 200_000)
    known = json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **chosen}, sort_keys=True)
    assert tokens.prepare(text(path, **more)).sha256 == hashlib.sha256(known.encode()).hexdigest()


def test_a_text_is_read_once_and_a_change_is_noticed(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is hashed while it is tokenised; a start that finds its tokens opens none of its files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("to be or not")
    opened = []
    real = sources._Hashed

    def counted(file: sources.File, advance: sources.Advance) -> Any:
        opened.append(file.path.name)
        return real(file, advance)

    monkeypatch.setattr(sources, "_Hashed", counted)
    monkeypatch.setattr(files, "sha256", lambda path: pytest.fail("read a second time"))
    first = tokens.prepare(text(folder))
    assert opened == ["a", "b"]
    assert tokens.prepare(text(folder)) == first
    assert opened == ["a", "b"]
    (folder / "b").write_text("or is it bad")  # of the same length: only the date tells
    os.utime(folder / "b", (2e9, 2e9))
    second = tokens.prepare(text(folder))
    assert second.sha256 != first.sha256
    assert ids(second) == joined("to be or not", "or is it bad")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_text_that_is_still_written_is_refused(
    form: str, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(form, tmp_path)
    real = sources.in_row

    def meanwhile(*row: Any) -> Iterator[str | None]:
        os.utime(path, (2e9, 2e9))
        return real(*row)

    monkeypatch.setattr(sources, "in_row", meanwhile)
    with pytest.raises(
        BadRequest, match=rf"data\.path=.*a\.{form}: a\.{form} was changed while it was read; start again"
    ):
        tokens.prepare(text(path))
    assert not list(cold.glob("tokens/*"))


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a program's own peak")
def test_memory_does_not_grow_with_the_text(tmp_path: Path, cold: Path) -> None:
    """Twenty times the text, the same memory, but for the pairs of a short text's tokens; on two cores at most."""
    code = """
import os, sys
from pathlib import Path
from gpt2exp.data import tokens
from gpt2exp.config import DataConfig, DataName
os.sched_setaffinity(0, [*os.sched_getaffinity(0)][:2])
tokens.BIGRAM_TOKENS = 0
for path in sys.argv[1:]:
    tokens.prepare(DataConfig(name=DataName.text, path=path))
    status = Path("/proc/self/status").read_text().split()
    print(int(status[status.index("VmHWM:") + 1]) / 1024)  # of this program alone: ru_maxrss has its parent's too
"""
    line = "Before we proceed any further, hear me speak.\n"
    small, large = tmp_path / "small.txt", tmp_path / "large.txt"
    small.write_text(line * 40_000)
    large.write_text(line * 800_000)
    done = subprocess.run([sys.executable, "-c", code, small, large], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert after - before < 24, (before, after)  # MiB; the text alone has 35


# --- company and faults ----------------------------------------------------------------------------------------------


def test_killed_while_it_tokenises(tmp_path: Path, cold: Path) -> None:
    """Its folder is never used, and the next process that tokenises any text deletes it."""
    (tmp_path / "a.txt").write_text("Before we proceed any further, hear me speak.")
    code = "import os, sys, numpy; from gpt2exp.data import tokens; from gpt2exp.config import DataConfig, DataName; "
    code += "numpy.save = lambda *_: os.kill(os.getpid(), 9); "  # the counts' turn, after the tokens were written
    code += "tokens.prepare(DataConfig(name=DataName.text, path=sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list(cold.glob("tokens/.*.part/tokens.npy"))
    assert all(item.name.startswith(".") for item in (cold / "tokens").iterdir())
    (tmp_path / "b.txt").write_text("to be or not to be")
    other = tokens.prepare(text(tmp_path / "b.txt"))
    assert list((cold / "tokens").iterdir()) == [other.folder]


def test_what_another_process_works_on_is_not_cleared_away(tmp_path: Path, cold: Path) -> None:
    (tmp_path / "b.txt").write_text("to be or not to be")
    part = cold / "tokens" / f".{'0' * 64}.{tokens.FORMAT}.1-2.part"
    part.mkdir(parents=True)
    with FileLock(part.with_name(f".{'0' * 64}.{tokens.FORMAT}.lock")):
        tokens.prepare(text(tmp_path / "b.txt"))
        assert part.exists()
    (tmp_path / "b.txt").write_text("that is the question")
    tokens.prepare(text(tmp_path / "b.txt"))
    assert not part.exists()


def test_who_comes_second_waits_for_the_first(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be")
    config = text(tmp_path / "a.txt")
    first = tokens.prepare(config)
    aside = first.folder.rename(tmp_path / "aside")

    def refuse() -> None:
        raise AssertionError("tokenised twice")

    monkeypatch.setattr(tokens, "gpt2_encoding", refuse)
    asked = threading.Event()
    real = tokens._clear_leftovers
    monkeypatch.setattr(tokens, "_clear_leftovers", lambda place: (real(place), asked.set()))
    found: list[tokens.TokenFile] = []
    with FileLock(first.folder.with_name(f".{first.folder.name}.lock")):
        second = threading.Thread(target=lambda: found.append(tokens.prepare(config)))
        second.start()
        assert asked.wait(30)
        aside.rename(first.folder)
    second.join(30)
    assert found == [first]


# --- the Hub ---------------------------------------------------------------------------------------------------------


def hub(path: Path | str, **more: Any) -> DataConfig:
    """The section of `data=hub data.path=PATH`."""
    return DataConfig(name=DataName.hub, path=str(path), **more)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A folder that `datasets` loads: two splits."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text(rows(), encoding="utf-8")
    (folder / "test.jsonl").write_text('{"id": 0, "text": "held out"}\n')
    return folder


def test_a_local_dataset_is_streamed(dataset: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tokens.prepare(hub(dataset))
    assert ids(source) == joined(*DOCUMENTS)
    assert ids(tokens.prepare(hub(dataset, split="test"))) == joined("held out")
    assert (source.name, source.revision) == ("dataset", None)
    monkeypatch.setitem(sys.modules, "datasets", None)  # the second time nothing of it is needed
    assert tokens.prepare(hub(dataset)) == source
    with pytest.raises(BadRequest, match=r"^data=hub: needs datasets; pip install 'gpt2exp\[datasets\]'$"):
        tokens.prepare(hub(dataset, max_tokens=3))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"split": "dev"}, r"^data\.split=dev: .*train.*; name one that .*dataset has$"),
        ({"subset": "en"}, r"^data\.subset=en: .*en.*; name one that .*dataset has$"),
        (
            {"field": "body"},
            r"^data\.field=body: .*dataset row 1 has no such field, only id, text; try data\.field=text$",
        ),
        ({"revision": "v1"}, r"^data\.revision=v1: .*dataset is a folder here and has none; leave it out$"),
    ],
)
def test_what_a_dataset_has_not(more: dict[str, str], complaint: str, dataset: Path, cold: Path) -> None:
    with pytest.raises(BadRequest, match=complaint) as refusal:
        tokens.prepare(hub(dataset, **more))
    assert "\n" not in str(refusal.value)
    assert not list(cold.glob("tokens/*"))


COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub that loading a dataset of one file needs."""

    protocol_version = "HTTP/1.1"
    file = "data/train.jsonl"
    content = rows().encode()

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, code: int, body: Any = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        api, path = "/api/datasets/me/it", self.path.partition("?")[0]
        file = {"type": "file", "path": self.file, "size": len(self.content), "oid": "b" * 40}
        folder = {"type": "directory", "path": "data", "oid": "c" * 40}
        if path in (api, f"{api}/revision/v1", f"{api}/revision/{COMMIT}"):
            self.answer(200, {"id": "me/it", "sha": COMMIT, "siblings": [{"rfilename": self.file}]})
        elif path == f"{api}/tree/{COMMIT}":
            self.answer(200, [folder])
        elif path == f"{api}/tree/{COMMIT}/data":
            self.answer(200, [file])
        elif path == f"/datasets/me/it/resolve/{COMMIT}/{self.file}":
            self.answer(200, self.content, ETag='"b"', X_Repo_Commit=COMMIT)
        elif path.startswith("/datasets/me/it/"):
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        else:
            self.answer(404, {}, X_Error_Code="RevisionNotFound" if path.startswith(api) else "RepoNotFound")


@pytest.fixture
def endpoint() -> Iterator[str]:
    """The address of a Hub that has one dataset."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_hub_is_asked_once(endpoint: str, tmp_path: Path, cold: Path) -> None:
    """Its commit is recorded, and later starts need no network; what it lacks is named."""
    code = """
import json, sys
from gpt2exp.data import assets, tokens
from gpt2exp.config import DataConfig, DataName
from gpt2exp.section import BadRequest
for more in json.loads(sys.argv[1]):
    try:
        source = tokens.prepare(DataConfig(**{"name": DataName.hub, "path": "me/it", **more}))
        print(json.dumps([source.facts, source.map().tolist()]))
    except (BadRequest, assets.AssetError) as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""

    def ask(endpoint: str, *requests: dict[str, str]) -> list[Any]:
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": ""}
        command = [sys.executable, "-c", code, json.dumps(requests)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    (facts, found), named, *refused = ask(
        endpoint, {}, {"revision": "v1"}, {"revision": "v2"}, {"path": "me/other"}, {"path": "a/b/c"}, {"split": "dev"}
    )
    assert found == joined(*DOCUMENTS)
    assert (facts["name"], facts["revision"]) == ("me/it", COMMIT)
    assert named == [facts, found]  # the same commit by another name: the same text
    assert [kind for kind, _ in refused] == ["BadRequest"] * 4
    for (_, line), start in zip(
        refused,
        ("data.revision=v2: ", "data.path=me/other: no such", "data.path=a/b/c: no such", "data.split=dev: "),
        strict=True,
    ):
        assert line.startswith(start)
    nowhere = "http://127.0.0.1:9"
    again, (kind, line) = ask(nowhere, {}, {"path": "me/other"})
    assert again == [facts, found]
    assert kind == "AssetError"
    assert line.startswith("data.path=me/other: the Hub cannot be reached (")
