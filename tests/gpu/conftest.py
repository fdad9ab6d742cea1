"""Tests that take `device` run on the CPU and, if there is one, on a GPU; `pytest -m gpu` runs only the latter."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

CARD = pytest.param("cuda", marks=pytest.mark.gpu)
NO_CARD = pytest.mark.skip(reason="needs a GPU: PyTorch sees no CUDA device here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(NO_CARD)


@pytest.fixture(params=["cpu", CARD])
def device(request: pytest.FixtureRequest) -> Any:
    """Both kinds."""
    return request.param


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), CARD])
def slowly(request: pytest.FixtureRequest) -> Any:
    """Both, the CPU as a slow test: it takes seconds, or other tests have that part."""
    if request.param == "cpu" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    return request.param
