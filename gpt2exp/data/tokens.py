"""Text to tokens, once: GPT-2's, by tiktoken on every core, into shards that are memory-mapped ever after.

The only place that imports tiktoken. A tokenised text is a folder of the cache, under the text's hash, so an edited
text is a new folder and the same text is never tokenised twice. The folder is written beside its place and moved there:
it is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from gpt2exp import machine
from gpt2exp.config import BadRequest, DataConfig, TrainConfig
from gpt2exp.data import assets, documents, progress, texts
from gpt2exp.data import shards as shard_files
from gpt2exp.data.shards import Tokens
from gpt2exp.data.texts import Text
from gpt2exp.files import beside, replacing, write_json

if TYPE_CHECKING:
    import tiktoken


END_OF_TEXT = 50256
"""`<|endoftext|>`: placed between documents."""

FORMAT = "gpt2-v1"
"""The tokenizer, and the version of what lies in a folder: another one, another folder."""

BIGRAM_TOKENS = 10_000_000
"""The longest text whose pairs of tokens are counted: that takes some 30 bytes a token, 0.3 GB here."""

T = TypeVar("T")

Ids: TypeAlias = npt.NDArray[np.uint16]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """A tokenised text: where it lies and what is known of it."""

    folder: Path
    name: str
    sha256: str
    """Of the text; see `texts.Text`."""
    tokens: int
    distinct_tokens: int
    max_token: int
    unigram_entropy: float
    """Of the tokens, in nats: the loss of always guessing by frequency."""
    bigram_entropy: float | None
    """Of a token given the one before, in nats, both counted in this text; None if longer than `BIGRAM_TOKENS`."""
    shards: list[dict[str, Any]]
    """See `shards.Writer`."""
    revision: str | None = None
    """The commit, of a dataset on the Hub."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        known: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        known |= {"tokens": self.tokens, "distinct_tokens": self.distinct_tokens}
        known |= {"revision": self.revision} if self.revision else {}
        return known | {"unigram_entropy": self.unigram_entropy, "bigram_entropy": self.bigram_entropy}

    def map(self) -> Tokens:
        """The tokens, (tokens,), memory-mapped read-only."""
        return shard_files.mapped(self.folder, self.shards)

    def seen(self) -> npt.NDArray[np.int64]:
        """The ids that occur, sorted, (distinct_tokens,)."""
        return np.flatnonzero(np.load(self.folder / COUNTS, allow_pickle=False))


COUNTS, FACTS = "counts.npy", "facts.json"


def prepare(config: DataConfig) -> TokenFile:
    """The tokens of a data section, made if the cache has none.

    Raises:
        BadRequest: `data.path` cannot be read, is not of the form its name says, or holds less than two tokens.
        assets.AssetError: the text or the BPE files could not be fetched, or the cache cannot be written.
    """
    text = texts.find(config)
    return _cached(text) or _made(text, config)


def held_out(tokens: int, val_fraction: float) -> int:
    """How many of a text's tokens, from its end, are kept for validation."""
    return round(tokens * val_fraction)


def check_fits(tokens: int, data: DataConfig, train: TrainConfig) -> None:
    """Raise `BadRequest` if one micro-batch, or one validation window, is larger than its part of the data."""
    val = held_out(tokens, data.val_fraction)
    need = train.micro_batch_tokens + 1  # the last input needs a target
    if tokens - val < need:
        most = (tokens - val - 1) // train.seq_len
        remedy = f"try train.batch_size={most}" if most else f"try train.seq_len={max(1, tokens - val - 1)}"
        size = f"a batch of {train.batch_size} x {train.seq_len} + 1 = {need:,} tokens is larger than the data"
        raise BadRequest(f"train.batch_size={train.batch_size}: {size}, {tokens - val:,} training tokens; {remedy}")
    if val and val < train.seq_len + 1:
        why = f"leaves {val:,} tokens, too few for one window of train.seq_len={train.seq_len} and its target"
        enough = min(0.5, round((train.seq_len + 2) / tokens + 0.005, 2))
        raise BadRequest(f"data.val_fraction={data.val_fraction}: {why}; try data.val_fraction={enough} or 0")


def _folder(text: Text) -> Path:
    return assets.cache_folder() / "tokens" / f"{text.sha256}.{FORMAT}"


def _cached(text: Text) -> TokenFile | None:
    folder = _folder(text)
    try:
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        found = TokenFile(folder=folder, name=text.name, revision=text.revision, **known)
        if (folder / COUNTS).is_file() and shard_files.whole(folder, found.shards):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    return None


def _made(text: Text, config: DataConfig) -> TokenFile:
    """Tokenise a text, or wait for the process that already does."""
    folder = _folder(text)
    with assets.writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        lock = FileLock(_lock(folder))
        try:
            lock.acquire(timeout=5)
        except Timeout:
            log.warning("%s: another process is tokenising it; waiting until it has", text.name)
            lock.acquire()
        except NotImplementedError:  # a file system without locks: both tokenise, and the last one's stays
            pass
    try:
        return _cached(text) or _tokenise(text, config, folder)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # who waits looks again at which file it has locked
        lock.release()


def _lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _clear_leftovers(place: Path) -> None:
    """Remove what processes left that were killed: theirs are the unfinished folders that nobody holds the lock of."""
    for part in place.glob(f".*.{FORMAT}.*.part"):
        name = part.name[1:].partition(f".{FORMAT}.")[0]
        lock = FileLock(_lock(place / f"{name}.{FORMAT}"), timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError), lock:
            shutil.rmtree(part, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def _tokenise(text: Text, config: DataConfig, folder: Path) -> TokenFile:
    part = beside(folder)
    writer = shard_files.Writer(part)
    try:
        with progress.reading(f"tokenising {text.name}", text.size) as advance:
            for tokens in encoded(text.read(advance)):
                room = None if config.max_tokens is None else config.max_tokens - writer.tokens
                with assets.writing(folder.parent):
                    part.mkdir(exist_ok=True)
                    writer.append(tokens[:room])
                if writer.tokens == config.max_tokens:
                    break
        if writer.tokens < 2:
            what = f"{writer.tokens} token{'s' if writer.tokens != 1 else ''}"
            raise BadRequest(
                f"data.path={text.name}: the text has {what}; a target needs at least 2, give a longer text"
            )
        with assets.writing(folder.parent):
            writer.close()
            counts = writer.counts
            short = writer.tokens <= BIGRAM_TOKENS
            known: dict[str, Any] = {
                "sha256": text.sha256,
                "tokens": writer.tokens,
                "distinct_tokens": int(np.count_nonzero(counts)),
                "max_token": int(np.flatnonzero(counts)[-1]),
                "unigram_entropy": _entropy(counts),
                "bigram_entropy": _bigram_entropy(shard_files.mapped(part, writer.shards)) if short else None,
                "shards": writer.shards,
            }
            np.save(part / COUNTS, counts)
            write_json(part / FACTS, known)
            _put_in_place(part, folder)
    finally:
        writer.abandon()
        shutil.rmtree(part, ignore_errors=True)
    return TokenFile(folder=folder, name=text.name, revision=text.revision, **known)


def _put_in_place(part: Path, folder: Path) -> None:
    if folder.exists():  # damaged, or it would have been used
        damaged = beside(folder)
        folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    part.rename(folder)


def encoded(pieces: documents.Pieces) -> Iterator[Ids]:
    """The tokens of a stream of documents, `<|endoftext|>` between them, in order and in parts of about a piece.

    Threads are enough: tiktoken leaves the interpreter to the others while it works. No more than a few pieces for each
    are held at a time.
    """
    encoding = gpt2_encoding()

    def encode(pieces: list[str | None]) -> Ids:
        parts = []
        for piece in pieces:
            if piece is None:
                parts.append(np.array([END_OF_TEXT], dtype="<u2"))
                continue
            try:  # no id of the text's own is a control token: "<|endoftext|>" in it is letters
                ids = encoding.encode_to_numpy(piece, disallowed_special=())
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold: tiktoken puts U+FFFD there
                ids = np.array(encoding.encode_ordinary(piece))
            parts.append(ids.astype("<u2"))
        return np.concatenate(parts)

    next(pieces, None)  # the None before the first document: nothing to end there
    cores = machine.cores()
    pool = ThreadPoolExecutor(cores)
    try:
        yield from _in_order(pool, encode, _batched(pieces), ahead=2 * cores)
    finally:
        pool.shutdown(cancel_futures=True)


def _batched(pieces: documents.Pieces) -> Iterator[list[str | None]]:
    """Short documents together, so that each task is worth its while."""
    batch: list[str | None] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece or "")
        if size >= documents.BLOCK // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _in_order(pool: ThreadPoolExecutor, work: Callable[[T], Ids], items: Iterator[T], ahead: int) -> Iterator[Ids]:
    """`map` of a pool that takes no more than `ahead` items before their results are asked for."""
    waiting: deque[Future[Ids]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """Of a draw by these counts, in nats."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _bigram_entropy(tokens: Tokens) -> float:
    """Of a token given the one before it, in nats: by the chain rule H(b | a) = H(a, b) - H(a)."""
    wide = tokens[np.arange(len(tokens))].astype(np.int64)
    pairs = np.unique(wide[:-1] * shard_files.IDS + wide[1:], return_counts=True)[1]
    return _entropy(pairs) - _entropy(np.bincount(wide[:-1]))


def gpt2_encoding() -> tiktoken.Encoding:
    """Tiktoken's own `gpt2` encoding, its two files taken from our verified store, also offline."""
    import tiktoken

    # tiktoken looks in this folder for files named by the sha1 of their address
    folder = assets.cache_folder() / "tiktoken"
    for asset in (assets.VOCAB_BPE, assets.ENCODER_JSON):
        link = folder / hashlib.sha1(asset.url.encode()).hexdigest()
        if not link.exists() or hashlib.sha256(link.read_bytes()).hexdigest() != asset.sha256:
            source = assets.fetch(asset)
            with assets.writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with replacing(link) as part:
                    part.write_bytes(source.read_bytes())
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        return tiktoken.get_encoding("gpt2")
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
        if before is not None:
            os.environ["TIKTOKEN_CACHE_DIR"] = before
