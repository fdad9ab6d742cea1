"""What a model holds and computes, counted on its own modules, on PyTorch's meta device: shapes without numbers.

Each slot is counted alone and its blocks multiplied, once for each configuration. That is also where a class in a slot
is tried, before a run begins: one that cannot be made, or that does not map (B, T, C) to (B, T, C), is a `BadRequest`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from gpt2exp.config import (
    AttentionConfig,
    BadRequest,
    InitConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    first_line,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

SLOTS = ("attention", "mlp", "norm", "position")

_known: dict[tuple[str, str, int], int] = {}


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameter counts by part; `total` counts a tied tensor once, `without_tying` as two.

    Raises:
        BadRequest: the class in a slot cannot be made.
    """
    own = _of_slots(model, _held, 0)
    head = model.vocab_size * model.n_embd
    blocks = model.n_layer * (own["attention"] + own["mlp"] + 2 * own["norm"])
    parts = {"wte": head, "wpe": own["position"], "blocks": blocks, "ln_f": own["norm"]}
    untied = sum(parts.values()) + head
    return {"total": untied - head * model.tie_weights, "without_tying": untied, "lm_head": head, **parts}


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of one token's forward and backward pass, those of matrix products alone.

    Three times the forward pass's, which PyTorch counts. For GPT-2 that is the published figure (Chowdhery et al. 2022,
    PaLM, appendix B): six per weight of a product, and 12·n_layer·n_embd·seq_len for attention's two products, the
    causal half not discounted. The embedding look-ups cost nothing; the head counts whether tied or not. Not in it, as
    in the published one: what norms, GELU, softmax and rotations cost, and what is computed again in backward.

    Raises:
        BadRequest: the class in a slot cannot be made or called, or gives another shape.
    """
    own = _of_slots(model, _forward, seq_len)
    layers = model.n_layer * (own["attention"] + own["mlp"] + 2 * own["norm"])
    stream = layers + own["norm"] + own["position"]
    return 3 * (stream // seq_len + 2 * model.vocab_size * model.n_embd)


def kept_beyond_gpt2(model: ModelConfig, seq_len: int) -> int:
    """How many more numbers a block keeps for backward than one with GPT-2's own slots, per token."""
    usual = gpt2_slots(model)
    if model == usual:
        return 0
    return (_once("block", model, _kept, seq_len) - _once("block", usual, _kept, seq_len)) // seq_len


def gpt2_slots(model: ModelConfig) -> ModelConfig:
    """The model with GPT-2's own modules in its slots."""
    own = {"attention": AttentionConfig(), "mlp": MLPConfig(), "norm": NormConfig(), "position": PositionConfig()}
    return replace(model, **own)  # type: ignore[arg-type]


def check(model: ModelConfig, init: InitConfig, seq_len: int) -> None:
    """Try what is in the slots. GPT-2's own needs no trial, and PyTorch is not imported for it.

    Raises:
        BadRequest: a class cannot be made or called, gives another shape, or has a parameter that no rule starts.
    """
    if model == gpt2_slots(model):
        return
    flops_per_token(model, seq_len)
    import torch

    from gpt2exp.model.gpt import GPT
    from gpt2exp.model.init import rule_of

    with torch.device("meta"):
        gpt = GPT(replace(model, n_layer=1))
    for name, parameter in gpt.named_parameters():
        rule_of(name, parameter, gpt, init)


def _of_slots(model: ModelConfig, count: Callable[[ModelConfig, str, int], int], seq_len: int) -> dict[str, int]:
    return {slot: _once(slot, model, count, seq_len) for slot in SLOTS}


def _once(part: str, model: ModelConfig, count: Callable[[ModelConfig, str, int], int], seq_len: int) -> int:
    """A count, made once for a configuration."""
    key = (f"{count.__name__} {part}", repr(model), seq_len)
    if key not in _known:
        with _naming(model, part):
            _known[key] = count(model, part, seq_len)
    return _known[key]


@contextlib.contextmanager
def _naming(model: ModelConfig, slot: str) -> Iterator[None]:
    """Name the slot in whatever its class raises."""
    try:
        yield
    except BadRequest:
        raise
    except Exception as error:
        why = first_line(error) if type(error) is ValueError else f"{type(error).__name__}: {first_line(error)}"
        remedy = "mend its class: it is made of the model's config and its keys, and maps (B, T, C) to (B, T, C)"
        raise BadRequest(f"model/{slot}={getattr(model, slot).name}: {why}; {remedy}") from error


def _made(model: ModelConfig, slot: str) -> nn.Module:
    import torch

    with torch.device("meta"):
        module: nn.Module = getattr(model, slot).build(model)
    return module.to("meta")  # what its class made elsewhere


def _held(model: ModelConfig, slot: str, _: int) -> int:
    """Numbers in the parameters of a slot's module."""
    return sum(parameter.numel() for parameter in _made(model, slot).parameters())


def _forward(model: ModelConfig, slot: str, seq_len: int) -> int:
    """Floating-point operations of the products in a slot's forward pass over a sequence."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module, x = _made(model, slot), torch.empty(1, seq_len, model.n_embd, device="meta")
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        y = module(x)
    if (shape := getattr(y, "shape", None)) != x.shape:
        given = type(y).__name__ if shape is None else tuple(shape)
        raise ValueError(f"maps {tuple(x.shape)} to {given}, where the shape must stay")
    return counter.get_total_flops()


def _kept(model: ModelConfig, _: str, seq_len: int) -> int:
    """Numbers that a block's forward pass over a sequence leaves for backward, its parameters aside."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from gpt2exp.model.gpt import Block

    held: list[Tensor] = []  # alive until counted, so that no memory is taken for another's

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    # tensors that say they are on a CPU: on the meta device attention would be the slow kind, that keeps its scores
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = Block(model)
        x = torch.empty(1, seq_len, model.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            block(x)
    own = {tensor.untyped_storage()._cdata for tensor in (*block.parameters(), *block.buffers())}
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() // t.itemsize for t in held}
    return sum(size for memory, size in sizes.items() if memory not in own)
