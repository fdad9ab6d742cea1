"""fp32 products by oneDNN: right for every layout of the factors, chosen by the processor, gone after the block.

Small products stay with PyTorch's kernel; here `SMALL` is set so that all of them, or none, are replaced.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2exp.config import ProductLibrary
from gpt2exp.section import BadRequest
from gpt2exp.training import precision, products

CPU = torch.device("cpu")
ONEDNN = ProductLibrary.onednn
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """All products are replaced; the shapes of those that oneDNN computed."""
    shapes, real = list[tuple[int, ...]](), products._product
    monkeypatch.setattr(products, "SMALL", 0)
    monkeypatch.setattr(products, "_product", lambda a, *rest: (shapes.append(tuple(a.shape)), real(a, *rest))[1])
    return shapes


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "part of the columns": lambda x: torch.cat([x, x + 1], 1)[:, : x.size(1)],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one number": lambda x: x.new_tensor(0.25).expand(x.shape),
}


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    of_a=st.sampled_from(list(LAYOUTS)),
    of_b=st.sampled_from(list(LAYOUTS)),
    biased=st.booleans(),
)
def test_equals_the_product_in_float64(sizes: tuple[int, int, int], of_a: str, of_b: str, biased: bool) -> None:
    m, k, n = sizes
    generator = torch.Generator().manual_seed(m * k + n)
    a = LAYOUTS[of_a](torch.randn(m, k, generator=generator))
    b = LAYOUTS[of_b](torch.randn(k, n, generator=generator))
    bias = torch.randn(n, generator=generator) if biased else None
    got = products._product(a, b, bias)
    expected = a.double() @ b.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous()  # as PyTorch's: the optimizer reads gradients in the order of the weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_for_which_onednn_has_only_its_reference_are_copied(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(6, 8))
    got = products._plain(x)
    assert torch.equal(got, x)
    assert got.is_contiguous() or got.t().is_contiguous()
    assert (got is x) is (layout in ("rows", "columns"))


def test_a_layer_forward_and_backward(computed: list[tuple[int, ...]]) -> None:
    layer = nn.Linear(24, 40)
    x = torch.randn(3, 5, 24, requires_grad=True)

    def found() -> list[Tensor]:
        y = layer(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    expected = found()
    with products.applied(ONEDNN):
        got = found()
    assert computed == [(15, 24), (15, 40), (40, 15)] or computed == [(15, 24), (40, 15), (15, 40)]
    for one, two in zip(got, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_what_it_cannot_do_is_left_to_pytorch(computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, square = torch.randn(6, 6), torch.randn(6, 6), torch.randn(6, 6)
    calls: list[Callable[[], Tensor]] = [
        lambda: a.double() @ b.double(),
        lambda: a.bfloat16() @ b.bfloat16(),
        lambda: torch.addmm(square, a, b),
        lambda: torch.addmm(square[0], a, b, beta=0.5),
        lambda: torch.addmm(square[0], a, b, alpha=2),
        lambda: torch.empty(0, 6) @ b,
    ]
    expected = [call() for call in calls]
    with products.applied(ONEDNN):
        monkeypatch.setattr(products, "SMALL", 1)
        assert all(torch.equal(call(), known) for call, known in zip(calls, expected, strict=True))
    assert not computed


def test_small_products_are_left_to_pytorch(computed: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 6**3)
    with products.applied(ONEDNN):
        torch.randn(5, 6) @ torch.randn(6, 6)
        assert not computed
        torch.randn(6, 6) @ torch.randn(6, 6)
    assert computed == [(6, 6)]


@pytest.mark.parametrize("library", [ProductLibrary.torch, ONEDNN])
def test_pytorchs_kernels_are_back_after_the_block(library: ProductLibrary, computed: list[tuple[int, ...]]) -> None:
    a, b = torch.randn(30, 30), torch.randn(30, 30)
    before = a @ b

    def stopped() -> None:
        with products.applied(library):
            with products.applied(library):  # as a sweep's check inside a run
                pass
            assert torch.allclose(a @ b, before, rtol=1e-4, atol=1e-5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    within = len(computed)
    assert within == (library is ONEDNN)
    assert torch.equal(a @ b, before)
    assert len(computed) == within


@pytest.mark.parametrize(
    ("vendor", "expected"), [("AuthenticAMD", "onednn"), ("GenuineIntel", "torch"), (None, "torch")]
)
def test_auto_goes_by_the_processor(vendor: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert products.settle(ProductLibrary.auto, CPU) == expected
    assert products.settle(ProductLibrary.auto, torch.device("cuda")) == "torch"
    for choice in (ProductLibrary.torch, ONEDNN):
        assert products.settle(choice, CPU) is choice
    with pytest.raises(BadRequest, match=r"precision\.library=onednn: oneDNN multiplies on a CPU.*try precision\.libr"):
        products.settle(ONEDNN, torch.device("cuda"))
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)  # as on ARM
    assert products.settle(ProductLibrary.auto, CPU) == "torch"


def test_precision_is_measured_with_the_library_in_use(computed: list[tuple[int, ...]]) -> None:
    for library, used in ((ProductLibrary.torch, False), (ONEDNN, True)):
        computed.clear()
        with precision.applied(precision.PrecisionConfig(library=library), CPU) as got:
            assert bool(computed) is used
            assert (got.library, got.effective) == (library, "fp32")
        with precision.reapplied(precision.PrecisionConfig(), got):
            computed.clear()
            torch.randn(4, 4) @ torch.randn(4, 4)
            assert bool(computed) is used


def test_emulated_tf32_rounds_before_onednn_multiplies(computed: list[tuple[int, ...]]) -> None:
    a, b = torch.randn(20, 20), torch.randn(20, 20)
    config = precision.PrecisionConfig(name=precision.PrecisionName.tf32, library=ONEDNN)
    rounded = [precision.to_tf32(x, config.rounding) for x in (a, b)]
    with precision.applied(config, CPU) as got:
        if not got.emulated:
            pytest.skip("this processor has TF32")
        computed.clear()
        product = a @ b
    assert computed == [(20, 20)]
    torch.testing.assert_close(product, rounded[0] @ rounded[1])
