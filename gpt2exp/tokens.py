"""Text to a token file, once: little-endian uint16 GPT-2 tokens, memory-mapped ever after.

The only place that imports tiktoken. Files live in the cache under the sha256 of the text, so an edited text is a
new file and the same text is never tokenised twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2exp import assets
from gpt2exp.config import BadRequest, DataConfig, DataName, TrainConfig
from gpt2exp.files import replacing, write_json

if TYPE_CHECKING:
    import tiktoken

Tokens = npt.NDArray[np.uint16]
END_OF_TEXT = 50256
"""`<|endoftext|>`: placed between the files of a folder."""


@dataclass(frozen=True)
class TokenFile:
    """A tokenised text: where it lies and what is known of it."""

    path: Path
    name: str
    sha256: str
    """Of the text."""
    tokens: int
    distinct_tokens: int
    max_token: int
    unigram_entropy: float
    """Of the tokens, in nats: the loss of always guessing by frequency."""
    bigram_entropy: float
    """Of a token given the one before, in nats, both counted in this text."""

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        known: dict[str, Any] = {"name": self.name, "sha256": self.sha256}
        known |= {"tokens": self.tokens, "distinct_tokens": self.distinct_tokens}
        return known | {"unigram_entropy": self.unigram_entropy, "bigram_entropy": self.bigram_entropy}

    def map(self) -> Tokens:
        """The tokens, (tokens,), memory-mapped read-only."""
        return np.memmap(self.path, dtype="<u2", mode="r")

    def seen(self) -> npt.NDArray[np.int64]:
        """The ids that occur, sorted, (distinct_tokens,)."""
        counts = np.bincount(self.map(), minlength=self.max_token + 1)
        return np.flatnonzero(counts)


def prepare(config: DataConfig) -> TokenFile:
    """The token file of a data section, tokenised if the cache has none.

    Raises:
        BadRequest: `data.path` cannot be read, is no UTF-8 text, or holds less than two tokens.
        assets.AssetError: the text or the BPE files could not be fetched, or the cache cannot be written.
    """
    if config.name is DataName.tinyshakespeare:
        asset = assets.TINY_SHAKESPEARE
        # the hash is known beforehand: with a warm cache the text itself is not read again
        found = _cached(asset.sha256, config.name.value)
        return found or _tokenise([assets.fetch(asset).read_bytes()], config.name.value, asset.sha256)
    documents = _read(Path(str(config.path)))
    digest = hashlib.sha256()
    for document in documents:
        digest.update(hashlib.sha256(document).digest() if len(documents) > 1 else document)
    name = Path(str(config.path)).name
    return _cached(digest.hexdigest(), name) or _tokenise(documents, name, digest.hexdigest())


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


def _read(path: Path) -> list[bytes]:
    """The file, or every file below the folder that is not hidden, in the order of their paths."""
    key = f"data.path={path}"
    try:
        path = path.expanduser()
        if path.is_dir():
            files = [item for item in sorted(path.rglob("*")) if item.is_file()]
            files = [item for item in files if not any(part.startswith(".") for part in item.relative_to(path).parts)]
            if not files:
                raise BadRequest(f"{key}: the folder holds no files; name one with UTF-8 text files in it")
        elif path.exists() and not path.is_file():  # a pipe or a device: reading might never end
            raise BadRequest(f"{key}: neither a file nor a folder; name a UTF-8 text file or a folder of them")
        else:
            files = [path]
        documents = [item.read_bytes() for item in files]
    except (FileNotFoundError, RuntimeError) as error:  # RuntimeError: the home of no user here
        raise BadRequest(f"{key}: no such file or folder; name a UTF-8 text file or a folder of them") from error
    except OSError as error:
        raise BadRequest(f"{key}: cannot be read ({error.strerror}); name a readable UTF-8 text file") from error
    for item, document in zip(files, documents, strict=True):
        try:
            text = document.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"{item.name} is not UTF-8 at byte {error.start}"
            raise BadRequest(f"{key}: {where}; convert it: iconv -f LATIN1 -t UTF-8 IN > OUT") from error
        if "\x00" in text:
            raise BadRequest(f"{key}: {item.name} holds zero bytes, so it is not text; name UTF-8 text files")
    return documents


def _target(sha256: str) -> tuple[Path, Path]:
    folder = assets.cache_folder() / "tokens"
    return folder / f"{sha256}.gpt2.u16", folder / f"{sha256}.gpt2.json"


def _cached(sha256: str, name: str) -> TokenFile | None:
    path, facts = _target(sha256)
    try:
        known = json.loads(facts.read_text())
        if path.stat().st_size == 2 * known["tokens"]:
            return TokenFile(path=path, name=name, **known)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: made again
    return None


def _tokenise(documents: list[bytes], name: str, sha256: str) -> TokenFile:
    encoding = gpt2_encoding()
    parts: list[Tokens] = []
    for document in documents:
        if parts:
            parts.append(np.array([END_OF_TEXT], dtype="<u2"))
        parts.append(np.array(encoding.encode_ordinary(document.decode("utf-8")), dtype="<u2"))
    tokens = np.concatenate(parts)
    if len(tokens) < 2:
        what = f"{len(tokens)} token{'s' if len(tokens) != 1 else ''}"
        raise BadRequest(f"data.path={name}: the text has {what}; a target needs at least 2, give a longer text")
    path, facts = _target(sha256)
    unigram, bigram = entropies(tokens)
    known: dict[str, Any] = {
        "tokens": len(tokens),
        "distinct_tokens": len(np.unique(tokens)),
        "max_token": int(tokens.max()),
        "unigram_entropy": unigram,
        "bigram_entropy": bigram,
    }
    result = TokenFile(path=path, name=name, sha256=sha256, **known)
    with assets.writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            tokens.tofile(part)
        write_json(facts, {"sha256": sha256, **known})  # last: its presence says the tokens are complete
    return result


def entropies(tokens: Tokens) -> tuple[float, float]:
    """Entropy of a token, and of a token given the one before it, in nats, by the counts in `tokens`."""

    def entropy(values: npt.NDArray[np.int64]) -> float:
        share = np.unique(values, return_counts=True)[1] / len(values)
        return float(-(share * np.log(share)).sum())

    wide = tokens.astype(np.int64)
    # the chain rule: H(a, b) = H(a) + H(b | a)
    return entropy(wide), entropy(wide[:-1] * 2**16 + wide[1:]) - entropy(wide[:-1])


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
