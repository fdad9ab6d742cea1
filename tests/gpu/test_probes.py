"""`experiments/gpu.py` finds out whether a GPU crops or rounds to TF32, and what each way to compute the loss costs.

The probe's operands tell every rounding rule from the others. Here they are given to the package's two emulations and
to a third one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt2exp.config import PrecisionConfig, PrecisionName, Rounding
from gpt2exp.training import precision

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "experiments"))
    return importlib.import_module("gpu")


class TestRounding:
    """The probe of known operands."""

    def test_every_ending_stands_under_even_and_odd_places(self, gpu: Any) -> None:
        bits = gpu.operands().view(torch.int32)
        assert {int(end) for end in torch.unique(bits & 0x1FFF)} == set(gpu.ENDINGS)
        for end in gpu.ENDINGS:
            having = bits[(bits & 0x1FFF) == end]
            assert {0, 1} == {int(place) for place in torch.unique((having >> 13) & 1)}
            assert bool((having < 0).any())
            assert bool((having > 0).any())
        assert bool(gpu.operands().isfinite().all())

    def test_no_two_rules_agree_on_the_operands(self, gpu: Any) -> None:
        made = [rule(gpu.operands()) for rule in gpu.RULES.values()]
        assert not any(torch.equal(one, two) for number, one in enumerate(made) for two in made[:number])

    @pytest.mark.parametrize(
        ("rounding", "said"),
        [(Rounding.truncate, "crops"), (Rounding.nearest, "rounds to nearest, ties to even")],
    )
    def test_the_emulations_are_told_apart(self, gpu: Any, rounding: Rounding, said: str) -> None:
        with precision.EmulatedTF32(rounding):
            assert gpu.rule_of(torch.matmul, CPU) == {"left": said, "right": said}

    def test_other_arithmetics(self, gpu: Any) -> None:
        def mixed(a: Tensor, b: Tensor) -> Tensor:
            return gpu.away(a) @ precision.to_tf32(b, Rounding.truncate)

        assert gpu.rule_of(mixed, CPU) == {"left": "rounds to nearest, ties away from zero", "right": "crops"}
        assert gpu.rule_of(torch.matmul, CPU) == {"left": "keeps all bits", "right": "keeps all bits"}
        half = gpu.rule_of(lambda a, b: (a.bfloat16() @ b.bfloat16()).float(), CPU)
        assert half == {"left": "other", "right": "other"}

    def test_what_the_card_does(self, gpu: Any, device: str) -> None:
        """One known rule, the same for both operands; on the CPU the emulation's default."""
        with precision.applied(PrecisionConfig(name=PrecisionName.tf32), torch.device(device)):
            found = gpu.rule_of(torch.matmul, torch.device(device))
        print(f"measured: {found}; the emulation's default is {PrecisionConfig().rounding}")
        assert found["left"] == found["right"]
        assert found["left"] not in ("other", "keeps all bits")
        assert device == "cuda" or found["left"] == "crops"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loss_in_chunks_is_the_plain_one(gpu: Any, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 32, generator=generator).to(device).requires_grad_() for size in (1500, 211))
    targets = torch.randint(211, (1500,), generator=generator).to(device)
    ways = gpu.loss_ways(1500)
    assert list(ways) == ["256 rows", "1024 rows", "all rows", "plain"]
    found = {}
    for name, way in ways.items():
        x.grad = weight.grad = None
        value = way(x, weight, targets, dtype)
        value.backward()
        found[name] = value.detach(), x.grad, weight.grad
    within = 1e-4 if dtype is torch.float32 else 2e-2
    for name, tensors in found.items():
        for got, expected in zip(tensors, found["plain"], strict=True):
            assert float((got - expected).norm() / expected.norm()) < within, name


def test_the_loss_is_timed_each_way(gpu: Any, device: str) -> None:
    """The figures are printed, none is asserted."""
    sizes = (16 * 1024, 768, 50257) if device == "cuda" else (300, 16, 211)
    rows = gpu.loss_times(torch.device(device), sizes, repeats=2)
    print("\n".join(f"measured: loss, {row}" for row in rows))
    assert {row["in"] for row in rows} == {"float32", "bfloat16"}
    assert all(row["ms"] > 0 and row["peak_gb"] > 0 for row in rows)
