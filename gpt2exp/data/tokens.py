"""Tokenises a text once, with tiktoken on all cores, into a `.npy` in the cache, which runs map into memory.

This is the only module that imports tiktoken. A tokenised text is a folder named by the text's key (`sources.Text`). It
is written beside its place and then renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shlex
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from gpt2exp import machine
from gpt2exp.config import DataConfig, TrainConfig
from gpt2exp.data import assets, sources
from gpt2exp.data.sources import Pieces, Text
from gpt2exp.files import beside, replacing, write_json
from gpt2exp.section import BadRequest

if TYPE_CHECKING:
    import tiktoken


END_OF_TEXT = 50256  # the id placed between documents
MARK = "<|endoftext|>"  # the name of that id; in a text these letters are tokenised as any others
FORMAT = "gpt2-npy"  # part of a folder's name: the tokenizer and the version of the folder's contents
BIGRAM_TOKENS = 10_000_000  # the longest text whose pairs of tokens are counted, in 0.3 GB: 30 bytes a token
Tokens: TypeAlias = npt.NDArray[np.uint16]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenFile:
    """A tokenised text: its folder in the cache, and facts about it."""

    folder: Path
    name: str
    sha256: str  # of the text; see `sources.Text`
    tokens: int
    distinct_tokens: int
    max_token: int
    unigram_entropy: float  # in nats: the loss of guessing each token by its frequency
    bigram_entropy: float | None  # in nats, of a token given the one before; None beyond `BIGRAM_TOKENS`
    tokens_sha256: str  # of the tokens as little-endian uint16
    revision: str | None = None  # the commit, of a dataset on the Hub

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that the run's record keeps."""
        names = ("name", "sha256", "tokens", "distinct_tokens", "revision", "unigram_entropy", "bigram_entropy")
        return {name: getattr(self, name) for name in names if name != "revision" or self.revision}

    def map(self) -> Tokens:
        """The tokens, (tokens,), memory-mapped read-only; OSError or ValueError if the file is not what was written."""
        found: Tokens = np.load(self.folder / TOKENS, mmap_mode="r", allow_pickle=False)
        return found

    @property
    def whole(self) -> bool:
        """Whether the files are as they were written.

        The tokens are hashed (1 to 2 s a gigabyte) only if their file is newer than `facts.json`: copied, or changed.
        """
        path = self.folder / TOKENS
        try:
            mapped, written, known = self.map(), path.stat().st_mtime_ns, (self.folder / FACTS).stat().st_mtime_ns
            self.seen()
        except (OSError, ValueError):
            return False
        if (mapped.dtype, mapped.shape) != (np.dtype("<u2"), (self.tokens,)):
            return False
        if written > known:
            if hashlib.sha256(mapped.data).hexdigest() != self.tokens_sha256:
                return False
            with contextlib.suppress(OSError):  # a read-only cache
                os.utime(path, ns=(known, known))  # not hashed again next time
        return True

    def seen(self) -> npt.NDArray[np.int64]:
        """The ids that occur, sorted, (distinct_tokens,)."""
        return np.flatnonzero(np.load(self.folder / COUNTS, allow_pickle=False))


TOKENS, COUNTS, FACTS = "tokens.npy", "counts.npy", "facts.json"
IDS = 2**16  # ids that a uint16 can name


def prepare(config: DataConfig) -> TokenFile:
    """The tokens of a data section, tokenised unless the cache has them.

    Raises `BadRequest` for a text that cannot be read or is too short, `AssetError` for one that cannot be fetched.
    """
    text = sources.find(config)
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
    return assets.cache_folder() / "tokens" / f"{text.key}.{FORMAT}"


def _cached(text: Text) -> TokenFile | None:
    """The text's tokens in the cache; None where they are absent or damaged."""
    folder = _folder(text)
    with contextlib.suppress(OSError, ValueError, TypeError):
        known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        found = TokenFile(folder=folder, name=text.name, revision=text.revision, **known)
        return found if found.whole else None
    return None


def _made(text: Text, config: DataConfig) -> TokenFile:
    """The tokens of a text that the cache lacks: tokenise it, or wait for the process that already does."""
    folder = _folder(text)
    with assets.writing(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=5)
        except Timeout:
            log.warning("%s: another process is tokenising it; waiting until it has", text.name)
            lock.acquire()
        except NotImplementedError:  # a file system without locks: both tokenise, and the last rename wins
            pass
    try:
        return _cached(text) or _tokenise(text, config, folder)
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)  # safe: filelock checks the inode again after acquiring
        lock.release()


def _clear_leftovers(place: Path) -> None:
    """Delete the unfinished folders of killed processes: those whose lock is free."""
    for part in place.glob(f".*.{FORMAT}.*.part"):
        name = part.name[1:].partition(f".{FORMAT}.")[0]
        lock = FileLock(place / f".{name}.{FORMAT}.lock", timeout=0)
        with contextlib.suppress(Timeout, NotImplementedError), lock:
            shutil.rmtree(part, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def _tokenise(text: Text, config: DataConfig, folder: Path) -> TokenFile:
    part = beside(folder)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, part, ignore_errors=True)
        with assets.writing(folder.parent):
            part.mkdir()
            file = cleanup.enter_context((part / TOKENS).open("wb"))
        counts, digest, marks = _write_tokens(text, config.max_tokens, file, folder.parent)
        total = int(counts.sum())
        if total < 2:
            why = f"the text has {total} token{'' if total else 's'}"
            raise BadRequest(f"data.path={text.name}: {why}; a target needs at least 2, give a longer text")
        sha256 = text.sha256  # raises BadRequest if the text was changed meanwhile
        with assets.writing(folder.parent):
            file.seek(0)
            _write_header(file, total)
            file.close()
            known = {
                "sha256": sha256,
                "tokens": total,
                "distinct_tokens": int(np.count_nonzero(counts)),
                "max_token": int(np.flatnonzero(counts)[-1]),
                "unigram_entropy": _entropy(counts),
                "bigram_entropy": _bigram_entropy(part) if total <= BIGRAM_TOKENS else None,
                "tokens_sha256": digest,
            }
            np.save(part / COUNTS, counts)
            write_json(part / FACTS, known)  # after the tokens: `TokenFile.whole` compares the dates
            if folder.exists():  # it is damaged: a whole one would have been used
                shutil.rmtree(folder.rename(beside(folder)), ignore_errors=True)
            part.rename(folder)
    if marks:
        log.warning("%s: %s", text.name, _how_to_split(marks, config))
    return TokenFile(folder=folder, name=text.name, revision=text.revision, **known)  # type: ignore[arg-type]


def _write_tokens(text: Text, most: int | None, file: BinaryIO, cache: Path) -> tuple[npt.NDArray[np.int64], str, int]:
    """Write the `.npy`; returns how often each id occurs, the tokens' sha256, and how often the text has `MARK`."""
    counts, digest, marks = np.zeros(IDS, np.int64), hashlib.sha256(), 0

    def counted(pieces: Pieces) -> Pieces:
        nonlocal marks
        for piece in pieces:
            marks += piece.count(MARK) if isinstance(piece, str) else 0  # a cut between pieces never splits it
            yield piece

    with assets.writing(cache):
        _write_header(file, 0)
    with sources.reading(f"tokenising {text.name}", text.size) as advance:
        for tokens in encoded(counted(text.read(advance))):
            tokens = tokens[: None if most is None else most - counts.sum()]
            counts += np.bincount(tokens, minlength=IDS)
            digest.update(tokens.data)
            with assets.writing(cache):
                file.write(tokens.data)
            if counts.sum() == most:
                break
    return counts, digest.hexdigest(), marks


def _how_to_split(count: int, config: DataConfig) -> str:
    """The note on a text that contains `MARK`, with a command that splits a single plain file into JSON lines."""
    note = f"holds {MARK} {count:,} time{'s' if count != 1 else ''}, as letters: it separates no documents"
    path = Path(str(config.path)).expanduser()
    if not path.is_file() or path.suffix not in ("", ".txt", ".md"):
        return f"{note}; to separate them, make each a row, or a file, of its own"
    parts = f"sys.stdin.read().split('{MARK}')"
    code = f"import json, sys; [print(json.dumps({{'text': part}})) for part in {parts} if part]"
    place = shlex.quote(f"{path.with_suffix('')}.jsonl")
    return f'{note}; to separate them: python -c "{code}" < {shlex.quote(str(path))} > {place}, and data.path={place}'


def _write_header(file: BinaryIO, tokens: int) -> None:
    """Write the header of the `.npy`: always 128 bytes, so that it can be written again once the number is known.

    `open_memmap` would need the number of tokens at the start.
    """
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})


def encoded(pieces: Pieces) -> Iterator[Tokens]:
    """The tokens of documents, `<|endoftext|>` between them, in order and in parts of about a piece.

    Threads suffice, since tiktoken releases the GIL. A few pieces for each thread are in memory at a time.
    """
    encoding, cores = gpt2_encoding(), machine.cores()

    def encode(pieces: list[str | Tokens | None]) -> Tokens:
        made = [encode_piece(encoding, piece) if isinstance(piece, str) else piece for piece in pieces]
        return np.concatenate([END if piece is None else piece for piece in made])

    next(pieces, None)  # skip the None before the first document: no document ends there
    waiting: deque[Future[Tokens]] = deque()
    pool = ThreadPoolExecutor(cores)
    try:
        for batch in _batched(pieces):
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


END = np.array([END_OF_TEXT], dtype="<u2")
WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
LONG = 100_000  # characters of white space in a row that tiktoken can match; a million overflow its stack
_LONG_RUN = re.compile(rf"{WHITE}{{{LONG},}}(?:\Z|(?={WHITE}))")


def encode_piece(encoding: tiktoken.Encoding, piece: str) -> Tokens:
    """The tokens of a text, (tokens,); the name of a control token in it is tokenised as letters.

    A long run of white space would overflow the stack of tiktoken's regular expression, so its byte pairs are merged
    directly. The expression matches the whole run at the text's end, else all but its last character; so does this.
    """
    parts, at = [], 0
    if any(piece[start : start + LONG // 2].isspace() for start in range(0, len(piece), LONG // 2)):
        for run in _LONG_RUN.finditer(piece):
            parts += [encode_piece(encoding, piece[at : run.start()]), np.array(encoding._encode_single_piece(run[0]))]
            at = run.end()
    try:
        parts.append(encoding.encode_to_numpy(piece[at:], disallowed_special=()))
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold: tiktoken puts U+FFFD there
        parts.append(np.array(encoding.encode_ordinary(piece[at:])))
    return np.concatenate(parts).astype("<u2")


def _batched(pieces: Pieces) -> Iterator[list[str | Tokens | None]]:
    """Short documents in groups, so that a task outweighs its overhead."""
    batch, size = list[str | Tokens | None](), 0
    for piece in pieces:
        batch.append(piece)
        size += 0 if piece is None else len(piece)
        if size >= sources.BLOCK // 2:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """The entropy in nats of a draw by these counts."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _bigram_entropy(folder: Path) -> float:
    """The entropy in nats of a token given the one before it, by the chain rule H(b | a) = H(a, b) - H(a)."""
    wide = np.load(folder / TOKENS, allow_pickle=False).astype(np.int64)
    pairs = np.unique(wide[:-1] * IDS + wide[1:], return_counts=True)[1]
    return _entropy(pairs) - _entropy(np.bincount(wide[:-1]))


def gpt2_encoding() -> tiktoken.Encoding:
    """Tiktoken's own `gpt2` encoding; its two files come from our verified cache, so this works offline too."""
    import tiktoken

    # tiktoken looks there for files named by the sha1 of their address
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
