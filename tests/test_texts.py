"""That a large text is the text it says: cut anywhere it may be cut, read from any form, kept in shards, it gives the
tokens that tiktoken gives for the whole; more of it than memory holds is no matter; and whatever is wrong with it, or
happens meanwhile, is one line and leaves no half of it behind.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
import tiktoken
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from gpt2exp.config import BadRequest, DataConfig, DataName, DataOrder, TrainConfig
from gpt2exp.data import assets, batches, documents, shards, texts, tokens
from gpt2exp.sweep import launch

CPU = torch.device("cpu")
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
    """Every token, however many shards there are."""
    mapped = source.map()
    return mapped[np.arange(len(mapped))].tolist()


# --- cutting ---------------------------------------------------------------------------------------------------------

ODD = st.sampled_from(" \n\t\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000'sdtlve.!?_-019aZé雪½٣\u0301\u200b😀")
SEEN = st.sampled_from(["'s", "'ll", " 've", "the", " the", "  ", "\n\n", " \n", "x", "<|endoftext|>", " 12", "..."])


@FEW
@given(st.lists(st.text(ODD, max_size=6) | SEEN, max_size=40))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(blocks: list[str]) -> None:
    pieces = list(documents.cut(blocks))
    assert "".join(pieces) == "".join(blocks)
    assert [number for piece in pieces for number in encode(piece)] == encode("".join(blocks))


def test_no_character_before_a_cut_changes_a_token() -> None:
    """Python and Rust need not agree on what white space is: every character of the basic plane stands there once."""
    cuts = 0
    for code in (*range(0xD800), *range(0xE000, 0x10000)):
        whole = f"{chr(code)} x"
        pieces = list(documents.cut([whole]))
        cuts += len(pieces) > 1
        assert [number for piece in pieces for number in encode(piece)] == encode(whole), hex(code)
    assert 63_000 < cuts < 0x10000 - 0x800 - 25  # but for the white space itself


def test_real_text_in_small_pieces() -> None:
    whole = assets.fetch(assets.TINY_SHAKESPEARE).read_text(encoding="utf-8")
    pieces = list(documents.cut(whole[at : at + 997] for at in range(0, len(whole), 997)))
    assert len(pieces) > 1100
    assert max(map(len, pieces)) < 1100
    assert [number for piece in pieces for number in encode(piece)] == encode(whole)


def test_a_stretch_without_white_space_is_kept_whole() -> None:
    assert list(documents.cut(["ab", "雪" * 5, "", "c d", " e"])) == ["ab" + "雪" * 5 + "c", " d", " e"]


# --- shards ----------------------------------------------------------------------------------------------------------


def written(folder: Path, parts: list[list[int]], shard_tokens: int) -> shards.Writer:
    """A folder of shards of these parts."""
    folder.mkdir()
    writer = shards.Writer(folder, shard_tokens)
    for part in parts:
        writer.append(np.array(part, dtype="<u2"))
    writer.close()
    return writer


@settings(FEW, max_examples=60)
@given(
    parts=st.lists(st.lists(st.integers(0, 50256), max_size=9), min_size=1, max_size=8).filter(any),
    size=st.integers(1, 12),
    pick=st.data(),
)
def test_shards_are_one_sequence(
    parts: list[list[int]], size: int, pick: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = np.array([number for part in parts for number in part], dtype="<u2")
    folder = tmp_path_factory.mktemp("shards") / "a"
    writer = written(folder, parts, size)
    assert shards.whole(folder, writer.shards)
    assert [shard["tokens"] for shard in writer.shards][:-1] == [size] * (len(writer.shards) - 1)
    assert np.array_equal(writer.counts, np.bincount(expected, minlength=2**16))
    mapped = shards.mapped(folder, writer.shards)
    assert len(mapped) == writer.tokens == len(expected)
    first, last = sorted(pick.draw(st.tuples(*[st.integers(0, len(expected))] * 2)))
    some, there = mapped[first:last], expected[first:last]
    assert len(some) == len(there)
    if len(there):
        shape = pick.draw(st.sampled_from([(5,), (2, 3), (0, 4), ()]))
        index = np.array(pick.draw(st.lists(st.integers(0, len(there) - 1), min_size=6, max_size=6)))
        index = np.resize(index, shape).astype(np.int64)
        found = some[index]
        assert found.dtype == np.uint16
        assert np.array_equal(found, there[index])
        assert found.shape == shape


@pytest.mark.parametrize("order", list(DataOrder))
def test_batches_do_not_know_of_shards(order: DataOrder, tmp_path: Path) -> None:
    """Training and validation, over borders that fall in windows: the same as from one array, bit for bit."""
    whole = np.random.default_rng(0).integers(0, 50257, 1000).astype("<u2")
    writer = written(tmp_path / "a", [whole.tolist()], 37)
    mapped = shards.mapped(tmp_path / "a", writer.shards)
    assert isinstance(mapped, shards.Shards)
    for one, other in zip(batches.split(whole, 0.2), batches.split(mapped, 0.2), strict=True):
        config = TrainConfig(batch_size=3, seq_len=16)
        plain, sharded = (batches.Batches(part, config, order, 5, CPU) for part in (one, other))
        assert plain.per_epoch == sharded.per_epoch
        for number in range(2 * plain.per_epoch):
            assert all(map(torch.equal, plain.at(number), sharded.at(number)))
        windows = [batches.validation_windows(part, 16, 3, CPU) for part in (one, other)]
        for expected, found in zip(*windows, strict=True):
            assert all(map(torch.equal, expected, found))


def test_a_number_outside_is_no_token(tmp_path: Path) -> None:
    writer = written(tmp_path / "a", [[1, 2, 3]], 2)
    mapped = shards.mapped(tmp_path / "a", writer.shards)
    for index in (-1, 3):
        with pytest.raises(IndexError, match="of 3 tokens"):
            mapped[np.array([0, index])]


def test_a_shard_is_llm_cs_file(tmp_path: Path) -> None:
    """Read as llmc/dataloader.h and modded-nanogpt's `_load_data_shard` do."""
    writer = written(tmp_path / "a", [[7, 50256, 40000, 1, 2]], 3)
    found = []
    for file in sorted((tmp_path / "a").glob("*.bin")):
        header = np.fromfile(file, dtype="<i4", count=256)
        assert (header[0], header[1]) == (20240520, 1)
        assert file.stat().st_size == 256 * 4 + 2 * header[2]
        part = np.fromfile(file, dtype="<u2", offset=256 * 4)
        assert header[8:16].tobytes() == hashlib.sha256(part.tobytes()).digest()
        assert not header[3:8].any()
        assert not header[16:].any()
        found += part.tolist()
    assert found == [7, 50256, 40000, 1, 2]
    assert len(writer.shards) == 2


def test_a_copied_cache_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = written(tmp_path / "a", [[1, 2, 3]], 2)
    for file in (tmp_path / "a").iterdir():
        os.utime(file)
    hashed = []
    real = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or real(file, name))
    assert shards.whole(tmp_path / "a", writer.shards)
    assert len(hashed) == 2
    assert shards.whole(tmp_path / "a", writer.shards)
    assert len(hashed) == 2


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
    if form == "jsonl":
        path.write_text(rows(field), encoding="utf-8")
    elif form == "jsonl.gz":
        path.write_bytes(gzip.compress(rows(field).encode()))
    else:
        parquet.write_table(table(id=[*range(4)], **{field: DOCUMENTS}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet"])
def test_rows_are_documents(form: str, tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK", 8)  # so that documents are cut, and batched, too
    monkeypatch.setattr(documents, "ROWS", 3)
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
        ("a.jsonl", b"[1, 2]", r"data\.field=text: a\.jsonl line 1 is no row of named fields; name the field"),
        ("a.jsonl", b'{"text": "\xe9"}', r"data\.path=.*: a\.jsonl line 1 is no JSON .*utf-8"),
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
    """Also far behind where tokens were written already."""
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else parquet.write_table(table(**content), path)
    with pytest.raises(BadRequest, match=complaint) as refusal:
        tokens.prepare(text(path))
    assert "\n" not in str(refusal.value)
    assert not list(cold.glob("tokens/*"))


def test_parquet_without_its_library(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("parquet", tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadRequest, match=r"needs pyarrow; pip install 'gpt2exp\[datasets\]'$"):
        tokens.prepare(text(path))


# --- which text it is ------------------------------------------------------------------------------------------------


def test_a_plain_texts_hash_is_what_it_always_was(tmp_path: Path, cold: Path) -> None:
    """Runs of earlier versions are resumed by it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_bytes(b"to be")
    assert texts.find(text(folder / "b.txt")).sha256 == hashlib.sha256(b"to be").hexdigest()
    assert texts.find(text(folder)).sha256 == hashlib.sha256(b"to be").hexdigest()
    (folder / "a.txt").write_bytes(b"or not")
    both = hashlib.sha256(hashlib.sha256(b"or not").digest() + hashlib.sha256(b"to be").digest())
    assert texts.find(text(folder)).sha256 == both.hexdigest()


def test_a_large_text_is_hashed_once_and_a_change_is_noticed(
    tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "LARGE", 5)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / name).write_text("to be")
        os.utime(folder / name, (1e9, 1e9))
    hashed = []
    real = texts._sha256
    monkeypatch.setattr(texts, "_sha256", lambda item, advance: hashed.append(item.name) or real(item, advance))
    first = texts.find(text(folder)).sha256
    assert (texts.find(text(folder)).sha256, hashed) == (first, ["a", "b"])
    (folder / "b").write_text("or is")  # as long, and the date says so
    os.utime(folder / "b", (2e9, 2e9))
    second = texts.find(text(folder)).sha256
    assert (second != first, hashed) == (True, ["a", "b", "b"])
    os.utime(folder / "b", (1e9, 1e9))
    assert (texts.find(text(folder)).sha256, hashed) == (second, ["a", "b", "b", "b"])
    (folder / "c").write_text("to be")
    (folder / "c").replace(folder / "b")  # another file of the same length
    os.utime(folder / "b", (1e9, 1e9))
    assert texts.find(text(folder)).sha256 == first


def test_what_was_just_written_is_not_remembered(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks tick: another content may follow with the same date."""
    monkeypatch.setattr(texts, "LARGE", 5)
    path = tmp_path / "a.txt"
    path.write_text("to be")
    stat = path.stat()
    first = texts.find(text(path)).sha256
    path.write_text("or is")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert texts.find(text(path)).sha256 != first


def test_a_text_that_is_still_written_is_refused(tmp_path: Path, cold: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("to be " * 100)
    pieces = texts.find(text(path)).read(lambda _: None)
    assert next(pieces) is None
    with path.open("a") as file:
        file.write("or not")
    with pytest.raises(BadRequest, match=r"data\.path=.*a\.txt: a\.txt was changed while it was read; start again"):
        list(pieces)


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a program's own peak")
def test_memory_does_not_grow_with_the_text(tmp_path: Path, cold: Path) -> None:
    """Twenty times the text, the same memory, but for the pairs of a short text's tokens; on two cores at most."""
    code = """
import os, sys
from pathlib import Path
from gpt2exp import tokens
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
    """Nothing of it is ever used, and the next one that tokenises anything clears it away."""
    path = tmp_path / "a.txt"
    path.write_text("Before we proceed any further, hear me speak.\n" * 400_000)
    code = "import sys; from gpt2exp import tokens; from gpt2exp.config import DataConfig, DataName; "
    code += "tokens.prepare(DataConfig(name=DataName.text, path=sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not (found := list(cold.glob("tokens/.*.part/*.bin"))) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert found
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
    with pytest.raises(BadRequest, match=r"^data=hub: needs the datasets library; pip install 'gpt2exp\[datasets\]'$"):
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
    """As much of the Hub as loading a dataset of one file asks for."""

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
    """Its commit is recorded, and later starts need no network; what it has not is said by name."""
    code = """
import json, sys
from gpt2exp import assets, tokens
from gpt2exp.config import BadRequest, DataConfig, DataName
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


# --- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_on_many_shards(tmp_path: Path, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command, on JSON lines in shards of 100 tokens: the losses of the same text in one shard."""
    path = tmp_path / "a.jsonl"
    path.write_text(rows() * 60, encoding="utf-8")
    losses = []
    for size in (shards.SHARD_TOKENS, 100):
        monkeypatch.setattr(shards.Writer.__init__, "__defaults__", (size,))
        monkeypatch.setenv("GPT2EXP_CACHE", str(cold))
        (tmp_path / str(size)).mkdir()
        with contextlib.chdir(tmp_path / str(size)):
            small = ["model=nano", "model.n_layer=1", "model.n_head=1", "model.n_embd=8", "train.steps=3"]
            code = launch.command(
                [
                    *small,
                    "data=text",
                    f"data.path={path}",
                    "data.val_fraction=0.1",
                    "data.order=shuffled",
                    "wandb.mode=disabled",
                ]
            )
        assert code == 0
        (summary,) = (tmp_path / str(size)).glob("runs/*/*/summary.json")
        facts = json.loads(summary.read_text())
        losses.append((facts["loss_first"], facts["loss_last"], facts["val_loss"], facts["loss_unseen_last"]))
        source = tokens.prepare(text(path))
        assert len(source.shards) == -(-source.tokens // size)
        source.folder.rename(tmp_path / f"tokens{size}")
    assert losses[0] == losses[1]
