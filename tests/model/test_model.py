"""The model is GPT-2: logits, loss and every gradient equal Hugging Face's, parameters are counted as published, tied
weights are one tensor, and no token sees a later one.
"""

from __future__ import annotations

import pytest
import torch
import transformers  # each class is imported when it is first named
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2exp.config import InitConfig, ModelConfig
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.model.size import flops_per_token, parameters
from gpt2exp.training.optimizers import AdamW

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Hugging Face keeps these as Conv1D, (in, out)."""

SIZES = {
    "gpt2": ({}, 124_439_808),
    "gpt2-medium": ({"n_layer": 24, "n_head": 16, "n_embd": 1024}, 354_823_168),
    "gpt2-large": ({"n_layer": 36, "n_head": 20, "n_embd": 1280}, 774_030_080),
    "gpt2-xl": ({"n_layer": 48, "n_head": 25, "n_embd": 1600}, 1_557_611_200),
}


def small(tie: bool = True) -> GPT:
    """Two layers, three heads, 101 words: weights large enough that attention is far from uniform."""
    model = GPT(ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=16, vocab_size=101, tie_weights=tie))
    initialise(model, InitConfig(std=0.2, position_std=0.2), seed=0)
    with torch.no_grad():  # no bias at 0, no LayerNorm at 1: each has to be in its place
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(rows: int, length: int = 16, seed: int = 0) -> Tensor:
    """Random ids below 101."""
    return torch.randint(101, (rows, length), generator=torch.Generator().manual_seed(seed))


def as_hf(name: str, tensor: Tensor) -> Tensor:
    """One of our tensors in Hugging Face's layout."""
    return tensor.T if name.endswith(CONV1D) else tensor


def reference(model: GPT) -> transformers.GPT2LMHeadModel:
    """Hugging Face's model holding our weights."""
    ours = model.config
    config = transformers.GPT2Config(
        vocab_size=ours.vocab_size,
        n_positions=ours.block_size,
        n_embd=ours.n_embd,
        n_layer=ours.n_layer,
        n_head=ours.n_head,
        tie_word_embeddings=ours.tie_weights,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    hf = transformers.GPT2LMHeadModel(config)
    hf.load_state_dict({name: as_hf(name, tensor) for name, tensor in model.state_dict().items()}, strict=True)
    assert (hf.lm_head.weight is hf.transformer.wte.weight) == ours.tie_weights
    return hf


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name; all must be there."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Names and values, in Hugging Face's layout or ours alike."""
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("tie", "in_place"), [(True, False), (True, True), (False, False)])
def test_logits_loss_and_every_gradient_equal_hugging_face(tie: bool, in_place: bool) -> None:
    model, idx = small(tie), tokens(3, 17)
    hf, (x, y) = reference(model), (idx[:, :-1], idx[:, 1:])
    model.transformer.gradient_in_place = in_place

    logits = hf(x).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=1e-4)
    loss = model(x, y)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    # Hugging Face shifts the labels itself: the same loss from the whole row
    torch.testing.assert_close(model(x[:, :-1], x[:, 1:]), hf(x, labels=x).loss, atol=1e-6, rtol=1e-5)

    loss.backward()
    expected.backward()
    ours = {name: as_hf(name, gradient) for name, gradient in gradients(model).items()}
    assert_same_gradients(ours, gradients(hf))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_published(size: str, tie: bool) -> None:
    shape, published = SIZES[size]
    config = ModelConfig(**shape, tie_weights=tie)
    with torch.device("meta"):
        model = GPT(config)
    counted = {
        "total": sum(p.numel() for p in model.parameters()),
        "without_tying": sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)),
        "lm_head": model.lm_head.weight.numel(),
        "wte": model.transformer.wte.weight.numel(),
        "wpe": model.transformer.wpe.weight.numel(),
        "blocks": sum(p.numel() for p in model.transformer.h.parameters()),
        "ln_f": sum(p.numel() for p in model.transformer.ln_f.parameters()),
    }
    assert parameters(config) == counted
    assert counted["total"] == published + (0 if tie else 50257 * config.n_embd)
    if size == "gpt2":
        assert counted["without_tying"] == 163_037_184


def test_names_and_shapes_are_hugging_faces() -> None:
    model = small()
    hf = reference(model)
    expected = {name: tuple(tensor.shape) for name, tensor in hf.state_dict().items()}
    assert {name: tuple(as_hf(name, tensor).shape) for name, tensor in model.state_dict().items()} == expected
    assert {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "lm_head.weight"} <= expected.keys()


@pytest.mark.parametrize("tie", [True, False])
def test_tied_is_one_storage_before_and_after_init_and_once_in_the_optimizer(tie: bool, tiny: ModelConfig) -> None:
    tiny.tie_weights = tie
    model = GPT(tiny)

    def one_storage() -> bool:
        return model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()

    assert one_storage() == tie
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie
    initialise(model, InitConfig(), seed=0)
    assert one_storage() == tie
    groups = AdamW().build(model)[0].param_groups
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(parameter) for parameter in model.parameters()}
    assert sum(p.numel() for group in groups for p in group["params"]) == parameters(tiny)["total"]


@settings(deadline=None, max_examples=25, derandomize=True)
@given(data=st.data())
def test_a_later_token_changes_no_earlier_logits(data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 16))
    place = data.draw(st.integers(1, length - 1))
    model, idx = small(), tokens(1, length, seed=data.draw(st.integers(0, 99)))
    other = idx.clone()
    other[0, place] = (idx[0, place] + data.draw(st.integers(1, 100))) % 101
    with torch.no_grad():
        before, after = model(idx), model(other)
    torch.testing.assert_close(after[:, :place], before[:, :place], atol=0, rtol=0)
    assert (after[:, place:] - before[:, place:]).abs().amax(-1).min() > 1e-4  # and every later one does change


@pytest.mark.parametrize(("size", "seq_len"), [("gpt2", 1024), ("gpt2-xl", 32)])
@pytest.mark.parametrize("tie", [True, False])
def test_flops_agree_with_a_count_over_the_modules(size: str, seq_len: int, tie: bool) -> None:
    config = ModelConfig(**SIZES[size][0], tie_weights=tie)
    with torch.device("meta"):
        model = GPT(config)
    multiplications = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear))
    for block in model.transformer.h:  # scores, then their product with the values: T x head width each, every head
        width = block.attn.c_proj.in_features // block.attn.n_head
        multiplications += 2 * block.attn.n_head * seq_len * width
    # a multiplication comes with an addition; backward does each product twice, for its input and its weight
    assert flops_per_token(config, seq_len) == 2 * 3 * multiplications
