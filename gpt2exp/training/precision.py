"""Sets the precision of matrix products, and measures what the hardware computes.

`applied` sets how matrix products are computed, measures the result, and restores the process's settings. Nothing is
assumed: the error of a product against float64 tells fp32 (about 1e-7), TF32 (about 3e-4) and bf16 (about 3e-3) apart.
If the hardware has no TF32, its numerics can be emulated: operands rounded to 10 mantissa bits, products accumulated in
fp32 (NVIDIA A100 architecture white paper, "TF32").
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2exp.config import Fallback, PrecisionConfig, PrecisionName, ProductLibrary, Rounding
from gpt2exp.section import BadRequest
from gpt2exp.training import products


@dataclass(frozen=True)
class Precision:
    """The precision that a run asked for, and the one that it got."""

    requested: str
    effective: str  # fp64, fp32, tf32, fp16 or bf16, by the measured error of a matrix product
    emulated: bool
    matmul_relative_error: float
    attention_relative_error: float
    library: str = "torch"  # of fp32 products on a CPU: `torch` (PyTorch's own choice) or `onednn`

    @property
    def weights(self) -> torch.dtype:
        """The type of weights, gradients and moments."""
        return getattr(torch, PrecisionName[self.requested].weights)  # type: ignore[no-any-return]

    @property
    def autocast(self) -> torch.dtype | None:
        """The type that the forward pass is cast to, None without a cast (PyTorch's automatic mixed precision)."""
        return _dtype(PrecisionName[self.requested].autocast)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


@contextlib.contextmanager
def applied(config: PrecisionConfig, device: torch.device) -> Iterator[Precision]:
    """Compute as `config` says inside the block, and after it as before; `BadRequest` if this hardware cannot."""
    library = products.settle(config.library, device)
    with _matmul(config.name.matmul), products.applied(library):
        if device.type == "mps" and config.name.weights == "float64":
            raise BadRequest(f"precision={config.name}: Apple's GPUs have no double precision; add train.device=cpu")
        with cast(device, _dtype(config.name.autocast)):
            matmul, attention = probe(device, getattr(torch, config.name.weights))
        effective = classify(matmul)
        if config.name.autocast == "float16" and effective == "tf32":
            effective = "fp16"  # both keep 10 bits of mantissa, so the error cannot tell them apart
        if config.name is PrecisionName.tf32 and effective != "tf32":
            if config.fallback is Fallback.error:
                raise BadRequest(
                    f"precision=tf32: this {device.type} computes {effective} instead "
                    f"(relative error {matmul:.1e}); use precision.fallback=emulate for its numerics, or a GPU from "
                    "NVIDIA's Ampere generation on"
                )
            with _emulated(config.rounding):
                matmul, attention = probe(device)
                yield Precision(str(config.name), classify(matmul), True, matmul, attention, str(library))
        else:
            yield Precision(str(config.name), effective, False, matmul, attention, str(library))


@contextlib.contextmanager
def reapplied(config: PrecisionConfig, got: Precision) -> Iterator[None]:
    """Compute inside the block as `applied` did when it measured `got`; nothing is measured again."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_matmul(config.name.matmul))
        stack.enter_context(products.applied(ProductLibrary[got.library]))
        if got.emulated:
            stack.enter_context(_emulated(config.rounding))
        yield


@contextlib.contextmanager
def _matmul(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    # torch.backends.*.fp32_precision is only ever read: a process that writes both raises (PyTorch's CUDA notes)
    try:
        torch.set_float32_matmul_precision(name)
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _emulated(rounding: Rounding) -> Iterator[None]:
    # only unfused attention has products that the mode sees
    with EmulatedTF32(rounding), sdpa_kernel(SDPBackend.MATH):
        yield


def cast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """Autocast to `dtype` for a forward pass; nothing for None."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def probe(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Relative errors (Frobenius norm) of a matrix product and an attention on `dtype` operands against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    q, k, v = (torch.randn(1, 2, 128, 64, generator=generator) for _ in range(3))

    def error(function: Callable[..., Tensor], *operands: Tensor) -> float:
        with torch.no_grad():
            exact = function(*(operand.double() for operand in operands))
            got = function(*(operand.to(device, dtype) for operand in operands)).cpu().double()
        return float((got - exact).norm() / exact.norm())

    return error(torch.matmul, a, b), error(F.scaled_dot_product_attention, q, k, v)


def classify(relative_error: float) -> str:
    """The arithmetic behind a measured relative error of a matrix product.

    Rounding an operand to p mantissa bits leaves a relative error near 2^-p: 1e-7 for fp32, 3e-4 for TF32's 10 bits
    (twice that when truncated), 3e-3 for bf16's 7. The bounds lie at the geometric means.
    """
    fp64, fp32, tf32, bf16 = 2e-16, 2e-7, 4e-4, 3e-3
    if relative_error < math.sqrt(fp64 * fp32):
        return "fp64"
    if relative_error < math.sqrt(fp32 * tf32):
        return "fp32"
    return "tf32" if relative_error < math.sqrt(tf32 * bf16) else "bf16"


def to_tf32(x: Tensor, rounding: Rounding) -> Tensor:
    """A float32 tensor with its mantissas shortened from 23 bits to TF32's 10, sign and exponent kept.

    `truncate` crops; `nearest` rounds to nearest, ties to even: it adds just under half of the last kept place (and one
    more where that place is odd), then crops. Infinities and NaN stay. NaN is set again at the end, since CUDA's,
    0x7fffffff, carries into the sign and becomes -0.
    """
    bits = x.contiguous().view(torch.int32)
    if rounding is Rounding.truncate:
        return (bits & -0x2000).view(torch.float32)
    rounded = bits >> 13  # in place from here: the weights pass through at every product
    rounded.bitwise_and_(1).add_(bits).add_(0xFFF).bitwise_and_(-0x2000)
    return rounded.view(torch.float32).masked_fill_(x.isnan(), math.nan)


class EmulatedTF32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Round the operands of every float32 matrix product, forward and backward, and leave the rest alone."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding = rounding
        aten = torch.ops.aten
        # the place of the first of the two factors among the arguments; a third is added in full precision
        self.factors = {
            aten.mm.default: 0,
            aten.mm.out: 0,
            aten.bmm.default: 0,
            aten.addmm.default: 1,
            aten.addmm_.default: 1,
            aten.baddbmm.default: 1,
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each operation while the mode is active."""
        first = self.factors.get(func)
        if first is not None and args[first].dtype is torch.float32:
            rounded = (to_tf32(factor, self.rounding) for factor in args[first : first + 2])
            args = (*args[:first], *rounded, *args[first + 2 :])
        return func(*args, **(kwargs or {}))
