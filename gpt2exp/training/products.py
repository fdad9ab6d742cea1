"""fp32 matrix products by oneDNN, on processors where Intel's MKL is slow.

PyTorch's wheels for x86 multiply fp32 matrices by MKL, which keeps its fastest kernels for Intel's processors. oneDNN
is in the same wheels and generates kernels for the instructions that it finds. On an AMD EPYC with AVX-512 its products
at GPT-2's sizes take 0.3 to 0.6 of MKL's time; `gpt2exp -m precision.library=torch,onednn seed=1,2,3` times the step.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gpt2exp.config import ProductLibrary
from gpt2exp.section import require

SMALL = 2**22  # multiplications in a product below which MKL, called with less ado, is as fast
CPU = "CPU"  # the dispatch key of the kernels that are replaced
NOT_THERE = "oneDNN multiplies on a CPU, where PyTorch was built with it", "try precision.library=auto"


def settle(choice: ProductLibrary, device: torch.device) -> ProductLibrary:
    """`choice` with `auto` settled, by what the processor is: a measurement would not say the same in each run.

    `BadRequest` for oneDNN where it is not to be had.
    """
    mkl, onednn = torch.backends.mkl.is_available(), torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    there = device.type == "cpu" and onednn
    require(choice is not ProductLibrary.onednn or there, "precision.library", choice, *NOT_THERE)
    if choice is ProductLibrary.auto:
        slow = there and mkl and _vendor() == "AuthenticAMD"
        return ProductLibrary.onednn if slow else ProductLibrary.torch
    return choice


def _vendor() -> str | None:
    """The processor's maker as Linux names it, None elsewhere."""
    with contextlib.suppress(OSError):
        found = re.search(r"^vendor_id\s*:\s*(\S+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return found[1] if found else None
    return None


@contextlib.contextmanager
def applied(library: ProductLibrary) -> Iterator[None]:
    """Multiply by `library` inside the block, in every module, forward and backward.

    `torch.library` puts other kernels in the place of `mm` and `addmm`, below autograd, and takes them out again.
    """
    if library is not ProductLibrary.onednn:
        yield
        return
    mm, addmm = (torch.library.get_kernel(f"aten::{name}", CPU) for name in ("mm", "addmm"))

    def new_mm(keys: torch.DispatchKeySet, a: Tensor, b: Tensor) -> Tensor:
        return _product(a, b) if _large(a, b) else mm.call_boxed(keys, a, b)

    def new_addmm(
        keys: torch.DispatchKeySet, bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Tensor:
        if _large(a, b) and bias.shape == b.shape[1:] and beta == alpha == 1:
            return _product(a, b, bias)
        return addmm.call_boxed(keys, bias, a, b, beta=beta, alpha=alpha)  # type: ignore[no-any-return]

    with torch.library._scoped_library("aten", "IMPL") as replaced:
        with warnings.catch_warnings():  # that kernels are replaced
            warnings.simplefilter("ignore")
            replaced.impl("mm", new_mm, CPU, with_keyset=True)
            replaced.impl("addmm", new_addmm, CPU, with_keyset=True)
        yield


def _large(a: Tensor, b: Tensor) -> bool:
    return a.dtype is torch.float32 is b.dtype and a.numel() * b.size(1) >= SMALL


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a` (M, K) times `b` (K, N), plus `bias` (N), by the operation that inductor puts in a linear layer's place.

    It copies a left factor that is not contiguous, as a gradient by weights has. Where the transposed product copies
    less, that one is computed, and copied back.
    """
    linear = torch.ops.mkldnn._linear_pointwise.default
    if bias is None and not a.is_contiguous() and a.numel() > b.numel() + a.size(0) * b.size(1):
        return linear(b.t(), _plain(a), None, "none", [], "").t().contiguous()  # type: ignore[no-any-return]
    return linear(a, _plain(b.t()), bias, "none", [], "")  # type: ignore[no-any-return]


def _plain(weight: Tensor) -> Tensor:
    """The matrix itself if it or its transpose is contiguous, else a copy: for other strides oneDNN is slow."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()
