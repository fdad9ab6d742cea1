"""Shared parts of the tests: the real command line, real composition, tiny models.

Texts and tokens come from the user's cache (GPT2EXP_CACHE), fetched once like any user's; every run writes to a
temporary folder, with wandb offline.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread a process, here and in every subprocess: tests run side by side, and bitwise comparisons hold for one
# thread count. Before torch is imported, which reads it.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # else torch.compile starts workers that import torch themselves

from gpt2exp.config import DataConfig, ModelConfig
from gpt2exp.data import assets, tokens


@pytest.fixture(scope="session", autouse=True)
def cache() -> Path:
    """The cache folder, filled before anything is timed or run without a network."""
    folder = assets.cache_folder()
    os.environ["GPT2EXP_CACHE"] = str(folder)  # the same for every subprocess, whatever HOME it gets
    tokens.prepare(DataConfig())
    return folder


def pytest_runtest_setup() -> None:
    """A run collects garbage before it measures memory, and need not look through all that is imported here."""
    gc.freeze()


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """An empty cache that holds the BPE files alone, so that texts are tokenised without a fetch."""
    folder = tmp_path / "cache"
    (folder / "assets").mkdir(parents=True)
    for asset in (assets.VOCAB_BPE, assets.ENCODER_JSON):
        (folder / "assets" / asset.name).write_bytes((cache / "assets" / asset.name).read_bytes())
    monkeypatch.setenv("GPT2EXP_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def quiet_logger() -> Iterator[None]:
    """The package's logger has no handler of another test or of a wider fixture: their streams are closed by now."""
    log = logging.getLogger("gpt2exp")
    log.handlers.clear()
    log.propagate = True
    yield
    log.handlers.clear()
    log.propagate = True


@pytest.fixture(autouse=True)
def figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Comparisons in this process draw figures only in the tests that are about them."""
    from support import without_figures  # with wandb's formats, which pytest's own process does not need

    with contextlib.nullcontext() if request.path.parent.name in ("compare", "experiments") else without_figures():
        yield


@pytest.fixture
def tiny() -> ModelConfig:
    """A model of two layers over GPT-2's own vocabulary."""
    return ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=64)
