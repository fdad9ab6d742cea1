"""The recorded precision is what the hardware computed. The TF32 emulation rounds to the bit, forward and backward. The
probe tells fp32, TF32 and bf16 apart. Every switch is put back, so that an fp32 run after a tf32 run is a plain fp32
run. Also what a record holds of the machine: peak memory, device, versions, nothing private.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt2exp.config import DeviceName, Fallback, InitConfig, ModelConfig, PrecisionConfig, PrecisionName, Rounding
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.training import hardware, precision

CPU = torch.device("cpu")
FP32 = PrecisionConfig()
TF32 = PrecisionConfig(name=PrecisionName.tf32)
LARGEST, SMALLEST_NORMAL, SMALLEST = np.float32(3.4028235e38), np.float32(1.1754944e-38), np.float32(1e-45)


def by_arithmetic(values: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.float32]:
    """TF32 from its definition, without looking at bits: a multiple of the spacing of 10-bit mantissas.

    A float32's spacing at 10 bits is 2^(e - 10) with 2^e <= |x| < 2^(e + 1), and never below that of e = -126, where
    the subnormals begin. float64 holds every step exactly.
    """
    exact = values.astype(np.float64)
    exponent = np.maximum(np.frexp(exact)[1] - 1, -126)
    steps = np.ldexp(exact, 10 - exponent)
    whole = np.trunc(steps) if rounding is Rounding.truncate else np.rint(steps)  # rint: ties to even
    with np.errstate(over="ignore"):  # past the largest: infinity, as IEEE 754 rounds
        return np.copysign(np.ldexp(whole, exponent - 10), exact).astype(np.float32)


def rounded(values: npt.NDArray[np.float32], rounding: Rounding) -> npt.NDArray[np.float32]:
    """What the emulation makes of them."""
    return precision.to_tf32(torch.from_numpy(values.copy()), rounding).numpy()


def assert_same_bits(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Equal to the sign of zero."""
    assert got.view(np.uint32).tolist() == expected.view(np.uint32).tolist(), (got, expected)


class TestRounding:
    """`to_tf32`."""

    @settings(deadline=None, max_examples=400, derandomize=True)
    @given(value=st.floats(width=32, allow_nan=False), rounding=st.sampled_from(Rounding))
    @example(value=0.0, rounding=Rounding.nearest)
    @example(value=-0.0, rounding=Rounding.nearest)
    @example(value=-0.0, rounding=Rounding.truncate)
    @example(value=math.inf, rounding=Rounding.nearest)
    @example(value=-math.inf, rounding=Rounding.truncate)
    @example(value=float(LARGEST), rounding=Rounding.nearest)
    @example(value=-float(LARGEST), rounding=Rounding.truncate)
    @example(value=float(SMALLEST), rounding=Rounding.nearest)
    @example(value=float(SMALLEST_NORMAL), rounding=Rounding.nearest)
    @example(value=1 + 2**-11, rounding=Rounding.nearest)  # a tie, down to even
    @example(value=1 + 3 * 2**-11, rounding=Rounding.nearest)  # a tie, up to even
    @example(value=2 - 2**-11, rounding=Rounding.nearest)  # a tie that carries into the exponent
    def test_equals_its_definition(self, value: float, rounding: Rounding) -> None:
        values = np.array([value], dtype=np.float32)
        expected = values if math.isinf(value) else by_arithmetic(values, rounding)
        assert_same_bits(rounded(values, rounding), expected)

    @pytest.mark.parametrize("rounding", Rounding)
    def test_equals_its_definition_on_every_pattern_of_the_cut(self, rounding: Rounding) -> None:
        # all 2^13 cropped endings under an even and an odd last kept place, both signs, normal and subnormal
        endings = np.arange(2**14, dtype=np.uint32)
        starts = np.array([0x3F800000, 0xBF800000, 0x00000000, 0x80000000, 0x007FC000, 0x7F7FC000], dtype=np.uint32)
        values = (starts[:, None] | endings).ravel().view(np.float32)
        assert_same_bits(rounded(values, rounding), by_arithmetic(values, rounding))

    @pytest.mark.parametrize("rounding", Rounding)
    @pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF])
    def test_nan_stays_nan(self, bits: int, rounding: Rounding) -> None:
        # the processor's NaN and CUDA's, whose carry would run through the exponent into the sign
        assert np.isnan(rounded(np.array([bits, bits], dtype=np.uint32).view(np.float32), rounding)).all()

    @pytest.mark.parametrize("rounding", Rounding)
    def test_is_idempotent_and_leaves_its_input_and_layout_alone(self, rounding: Rounding) -> None:
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).T
        before = x.clone()
        once = precision.to_tf32(x, rounding)
        assert torch.equal(x, before)
        assert once.shape == x.shape
        assert torch.equal(once, precision.to_tf32(x.contiguous(), rounding))
        assert torch.equal(precision.to_tf32(once, rounding), once)
        worst = float(((once - x) / x).abs().max())
        assert worst < (2**-10 if rounding is Rounding.truncate else 2**-11)


class TestProbe:
    """Telling arithmetics apart by their error."""

    def test_fp32_here(self) -> None:
        matmul, attention = precision.probe(CPU)
        assert 1e-8 < matmul < 1e-6
        assert 1e-8 < attention < 1e-6

    @pytest.mark.parametrize(("bits", "name"), [(23, "fp32"), (10, "tf32"), (7, "bf16")], ids=["fp32", "tf32", "bf16"])
    @pytest.mark.parametrize("crop", [True, False])
    def test_classify_at_the_errors_of_real_products(self, bits: int, name: str, crop: bool) -> None:
        generator = np.random.default_rng(0)
        a, b = (generator.standard_normal((256, 256)) for _ in range(2))

        def shortened(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            mantissa, exponent = np.frexp(x)
            return np.ldexp((np.trunc if crop else np.rint)(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)

        error = np.linalg.norm(shortened(a) @ shortened(b) - a @ b) / np.linalg.norm(a @ b)
        assert precision.classify(float(error)) == name

    def test_classify_is_monotone_with_bounds_between_the_three(self) -> None:
        order = [precision.classify(10**exponent) for exponent in np.arange(-8, 0, 0.05)]
        assert order == sorted(order, key=["fp32", "tf32", "bf16"].index)
        usual = [precision.classify(error) for error in (5e-8, 1e-7, 3e-4, 6e-4, 3e-3, 6e-3)]
        assert usual == ["fp32", "fp32", "tf32", "tf32", "bf16", "bf16"]

    def test_no_global_random_state_moves(self) -> None:
        before = torch.get_rng_state()
        precision.probe(CPU)
        assert torch.equal(torch.get_rng_state(), before)


def sample(seed: int, *shape: int) -> Tensor:
    """Normal numbers that ask for their gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def bitwise(a: Tensor, b: Tensor) -> bool:
    """Same bits."""
    return torch.equal(a.detach().contiguous().view(torch.int32), b.detach().contiguous().view(torch.int32))


class TestApplied:
    """The context: what it sets, what it says, what it leaves behind."""

    def test_fp32(self) -> None:
        with precision.applied(FP32, CPU) as got:
            assert torch.get_float32_matmul_precision() == "highest"
        assert (got.requested, got.effective, got.emulated) == ("fp32", "fp32", False)
        assert got.matmul_relative_error < 1e-6 > got.attention_relative_error
        assert json.loads(json.dumps(asdict(got), allow_nan=False)) == asdict(got)

    @pytest.mark.parametrize("rounding", Rounding)
    def test_tf32_is_emulated_where_there_is_none(self, rounding: Rounding) -> None:
        with precision.applied(PrecisionConfig(name=PrecisionName.tf32, rounding=rounding), CPU) as got:
            assert torch.get_float32_matmul_precision() == "high"
        assert (got.requested, got.effective, got.emulated) == ("tf32", "tf32", True)
        assert 1e-4 < got.matmul_relative_error < 1e-3
        assert 1e-4 < got.attention_relative_error < 3e-3  # attention's products are seen too

    def test_fallback_error_refuses_and_restores(self) -> None:
        strict = PrecisionConfig(name=PrecisionName.tf32, fallback=Fallback.error)
        with pytest.raises(BadRequest, match=r"precision=tf32: this cpu computes fp32 .*precision\.fallback=emulate"):
            precision.applied(strict, CPU).__enter__()
        assert torch.get_float32_matmul_precision() == "highest"

    def test_hardware_with_tf32_is_not_emulated(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "probe", lambda *_: (3e-4, 2e-4))
        a, b = sample(0, 8, 8), sample(1, 8, 8)
        plain = a @ b
        for fallback in Fallback:
            with precision.applied(PrecisionConfig(name=PrecisionName.tf32, fallback=fallback), CPU) as got:
                assert bitwise(a @ b, plain)  # nobody rounds here
            assert got == precision.Precision("tf32", "tf32", False, 3e-4, 2e-4, got.library)

    def test_fp32_that_the_hardware_does_not_keep_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precision, "probe", lambda *_: (3e-3, 3e-3))
        with precision.applied(FP32, CPU) as got:
            assert (got.requested, got.effective, got.emulated) == ("fp32", "bf16", False)

    @pytest.mark.parametrize("before", ["highest", "high", "medium"])
    @pytest.mark.parametrize("config", [FP32, TF32], ids=["fp32", "tf32"])
    def test_restores_also_after_an_exception(self, before: str, config: PrecisionConfig) -> None:
        a, b = sample(0, 8, 8), sample(1, 8, 8)
        plain = a @ b
        flash = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        torch.set_float32_matmul_precision(before)
        try:
            with precision.applied(config, CPU):
                pass
            assert torch.get_float32_matmul_precision() == before
            with pytest.raises(KeyboardInterrupt), precision.applied(config, CPU):
                raise KeyboardInterrupt
            assert torch.get_float32_matmul_precision() == before
        finally:
            torch.set_float32_matmul_precision("highest")
        assert bitwise(a @ b, plain)
        assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == flash

    def test_fp32_after_tf32_is_bitwise_a_lone_fp32(self) -> None:
        def loss_and_gradients() -> list[Tensor]:
            model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=97))
            initialise(model, InitConfig(std=0.2), seed=0)
            idx = torch.arange(34).view(2, 17)
            loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

        def same(a: list[Tensor], b: list[Tensor]) -> bool:
            return all(bitwise(x, y) for x, y in zip(a, b, strict=True))

        with precision.applied(FP32, CPU):
            lone = loss_and_gradients()
        with precision.applied(TF32, CPU):
            rough = loss_and_gradients()
            with precision.applied(FP32, CPU):
                assert torch.get_float32_matmul_precision() == "highest"
            assert torch.get_float32_matmul_precision() == "high"
        with precision.applied(FP32, CPU):
            after = loss_and_gradients()
        assert same(after, lone)
        assert not same(rough, lone)
        assert float(rough[0].detach()) == pytest.approx(float(lone[0].detach()), rel=1e-2)


@pytest.mark.parametrize("rounding", Rounding)
class TestEmulatedProducts:
    """Forward and backward are the exact products of rounded operands, and nothing else is rounded."""

    def test_linear(self, rounding: Rounding) -> None:
        x, weight, bias, gradient = sample(0, 5, 8), sample(1, 6, 8), sample(2, 6), sample(3, 5, 6).detach()
        with precision.EmulatedTF32(rounding):
            y = F.linear(x, weight, bias)
            y.backward(gradient)

        def r(tensor: Tensor) -> Tensor:
            return precision.to_tf32(tensor.detach(), rounding).double()

        close = {"rtol": 1e-6, "atol": 1e-6}
        torch.testing.assert_close(y.double(), r(x) @ r(weight).T + bias.double(), **close)
        torch.testing.assert_close(x.grad.double(), r(gradient) @ r(weight), **close)
        torch.testing.assert_close(weight.grad.double(), r(gradient).T @ r(x), **close)
        torch.testing.assert_close(bias.grad, gradient.sum(0), **close)  # a sum, not a product
        assert not torch.allclose(y.double(), (x @ weight.T + bias).double(), **close)  # the rounding shows

    @pytest.mark.parametrize("operation", ["mm", "bmm", "addmm", "baddbmm"])
    def test_each_product(self, operation: str, rounding: Rounding) -> None:
        batched = operation.endswith("bmm")
        a, b = (sample(seed, *([2] if batched else []), 4, 4) for seed in (0, 1))
        start = [sample(2, 2 if batched else 4, 4, 4) if batched else sample(2, 4, 4)] if "add" in operation else []
        with precision.EmulatedTF32(rounding):
            got = getattr(torch, operation)(*start, a, b)
        expected = precision.to_tf32(a.detach(), rounding).double() @ precision.to_tf32(b.detach(), rounding).double()
        torch.testing.assert_close(got.double(), expected + sum(s.double() for s in start), rtol=1e-6, atol=1e-6)

    def test_attention_through_applied(self, rounding: Rounding) -> None:
        q, k, v = (sample(seed, 1, 2, 6, 4) for seed in range(3))
        gradient = sample(3, 1, 2, 6, 4).detach()
        with precision.applied(PrecisionConfig(name=PrecisionName.tf32, rounding=rounding), CPU):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            y.backward(gradient)

        class Product(torch.autograd.Function):
            """Rounded operands in all three products."""

            @staticmethod
            def forward(ctx: torch.autograd.function.FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
                ctx.save_for_backward(a, b)
                return precision.to_tf32(a, rounding) @ precision.to_tf32(b, rounding)

            @staticmethod
            def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
                a, b = (precision.to_tf32(x, rounding) for x in ctx.saved_tensors)
                g = precision.to_tf32(g, rounding)
                return g @ b.mT, a.mT @ g

        inputs = [tensor.detach().clone().requires_grad_() for tensor in (q, k, v)]
        # PyTorch's unfused form scales both operands by the root of the root of the width
        scale = q.size(-1) ** -0.25
        scores = Product.apply(inputs[0] * scale, (inputs[1] * scale).mT)
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
        expected = Product.apply(scores.masked_fill(~mask, -math.inf).softmax(-1), inputs[2])
        expected.backward(gradient)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip((q, k, v), inputs, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)

    def test_what_is_no_float32_product_is_left_alone(self, rounding: Rounding) -> None:
        x = sample(0, 8, 8).detach()

        def others() -> list[Tensor]:
            wide = x.double()
            return [wide @ wide, x * x, x + x, F.gelu(x), F.layer_norm(x, (8,)), x.softmax(-1), x.sum(), x.norm()]

        expected = others()
        with precision.EmulatedTF32(rounding):
            got = others()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class TestRuntime:
    """The facts of the surroundings."""

    @pytest.mark.parametrize(
        ("device", "kind", "expected"),
        [
            ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
            ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
            ("NVIDIA A100-PCIE-40GB", "tf32", 156e12),
            ("NVIDIA H100 80GB HBM3", "fp32", 66.9e12),
            ("NVIDIA H100 80GB HBM3", "tf32", 494.7e12),
            ("NVIDIA H100 PCIe", "tf32", 378e12),
            ("NVIDIA A10", "tf32", 62.5e12),
            ("NVIDIA A10G", "tf32", None),
            ("NVIDIA L4", "tf32", 60e12),
            ("NVIDIA L40S", "tf32", 183e12),
            ("NVIDIA GeForce RTX 3090", "fp32", 35.6e12),
            ("Tesla T4", "fp32", 8.1e12),
            ("Tesla T4", "tf32", None),
            ("NVIDIA A100-SXM4-80GB", "int4", None),
            ("Some GPU of next year", "fp32", None),
            ("", "fp32", None),
        ],
    )
    def test_peaks(self, device: str, kind: str, expected: float | None) -> None:
        assert hardware.peak_flops(device, kind) == (None if expected is None else pytest.approx(expected))

    def test_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        there = {"cuda": False, "mps": False}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
        assert hardware.resolve_device(DeviceName.auto) == CPU
        for name in (DeviceName.cuda, DeviceName.mps):
            with pytest.raises(BadRequest, match=rf"train\.device={name.value}: .*; use auto or one of: cpu$"):
                hardware.resolve_device(name)
        there["mps"] = True
        assert hardware.resolve_device(DeviceName.auto) == torch.device("mps")
        there["cuda"] = True
        assert hardware.resolve_device(DeviceName.auto) == torch.device("cuda")
        assert hardware.resolve_device(DeviceName.cpu) == CPU

    def test_facts_are_an_allow_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "secret" * 6)
        monkeypatch.setenv("HOME", "/home/somebody")
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
        facts = record.facts()
        assert facts.keys() == {"environment", "versions", "git", "platform", "machine"}
        expected = {"python", "gpt2exp", "torch", "numpy", "hydra-core", "tiktoken", "wandb", "code"}
        assert facts["versions"].keys() == expected
        assert facts["versions"]["torch"] == torch.__version__
        assert facts["git"] is None or facts["git"].keys() == {"commit", "dirty"}
        overrides = facts["environment"]
        assert (overrides["OMP_NUM_THREADS"], overrides["GOMP_SPINCOUNT"]) == ("3", "1000")
        assert "NVIDIA_TF32_OVERRIDE" not in overrides
        recorded = json.dumps(facts)
        for private in ("secret", "somebody", os.environ["PATH"], str(Path.cwd()), platform.node()):
            assert private not in recorded

    def test_git_tells_the_commit_of_this_checkout(self) -> None:
        root = Path(hardware.__file__).parents[2]
        if not (root / ".git").exists():
            assert record.facts()["git"] is None
            return
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert record.facts()["git"]["commit"] == head.stdout.strip()

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
    @pytest.mark.parametrize("keep", [True, False])
    def test_a_smaller_second_job_has_a_smaller_peak(self, keep: bool) -> None:
        code = f"""
import torch
from gpt2exp.training import hardware
cpu = torch.device("cpu")
if {keep}: hardware.keep_freed_memory()
peaks = []
for megabytes in (300, 40, 120):
    hardware.reset_peak_memory(cpu)
    blocks = [torch.ones(2**18) for _ in range(megabytes)]
    del blocks
    peaks.append(hardware.peak_memory(cpu) / 2**20)
print(*peaks)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        first, second, third = map(float, done.stdout.split())
        assert first - second == pytest.approx(260, abs=30)
        assert third - second == pytest.approx(80, abs=30)
