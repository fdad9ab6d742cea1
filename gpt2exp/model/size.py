"""Counts a model's parameters, FLOPs and activations on its own modules, on PyTorch's meta device (shapes, no numbers).

A slot's module is counted alone, once for each configuration, and counts for that slot of every block. Counting also
tries the slot's class before a run begins. GPT-2's own slots have a formula, since counting takes a second of imports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpt2exp.config import InitConfig, ModelConfig
from gpt2exp.schema import kind_of
from gpt2exp.section import BadRequest, first_line

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCK = {"attention": 1, "mlp": 1, "norm": 2}  # the slots of a block, and how many modules each fills
SLOTS = (*BLOCK, "position")
_known: dict[tuple[Any, ...], int] = {}


def parameters(model: ModelConfig) -> dict[str, int]:
    """Parameter counts by part; `total` counts a tied tensor once. `BadRequest` if a slot's class cannot be made."""
    width, shift = model.n_embd, model.n_embd * model.bias
    known = {
        "attention": 4 * width**2 + 4 * shift,
        "mlp": 8 * width**2 + 5 * shift,
        "norm": width + shift,
        "position": model.block_size * width,
    }
    own = _by_slot(model, known, _count_parameters)
    head = model.vocab_size * model.n_embd
    blocks = model.n_layer * sum(times * own[slot] for slot, times in BLOCK.items())
    parts = {"wte": head, "wpe": own["position"], "blocks": blocks, "ln_f": own["norm"]}
    untied = sum(parts.values()) + head
    return {"total": untied - head * model.tie_weights, "without_tying": untied, "lm_head": head, **parts}


def flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of one token's forward and backward pass, those of matrix products alone.

    Three times the forward pass's, which PyTorch counts. For GPT-2 that is the published figure (Chowdhery et al. 2022,
    PaLM, appendix B): six per weight of a product, and 12·n_layer·n_embd·seq_len for attention's two products, the
    causal half not discounted. Left out, as there: norms, GELU, softmax, rotations, and what is computed again in
    backward. Raises `BadRequest` if a slot's class cannot be made or called, or gives another shape.
    """
    width = model.n_embd
    known = {"attention": 8 * seq_len * width**2 + 4 * seq_len**2 * width, "mlp": 16 * seq_len * width**2}
    own = _by_slot(model, known, _count_flops, seq_len)
    layers = model.n_layer * sum(times * own[slot] for slot, times in BLOCK.items())
    return 3 * ((layers + own["norm"] + own["position"]) // seq_len + 2 * model.vocab_size * model.n_embd)


def kept_beyond_gpt2(model: ModelConfig, seq_len: int) -> int:
    """How many more numbers a block keeps for backward than one with GPT-2's own slots, per token."""
    usual = gpt2_slots(model)
    filled = [slot for slot in BLOCK if getattr(model, slot) != getattr(usual, slot)]
    more = (
        _counted(_count_saved, model, slot, seq_len) - _counted(_count_saved, usual, slot, seq_len) for slot in filled
    )
    return sum(BLOCK[slot] * numbers for slot, numbers in zip(filled, more, strict=True)) // seq_len


def gpt2_slots(model: ModelConfig) -> ModelConfig:
    """The model with GPT-2's own modules in its slots."""
    own: dict[str, Any] = {slot: kind_of(f"model.{slot}")() for slot in SLOTS}
    return replace(model, **own)


def check(model: ModelConfig, init: InitConfig, seq_len: int) -> None:
    """Try the classes in the slots. If all are GPT-2's own, do nothing, without importing PyTorch.

    Raises `BadRequest` for a class that cannot be made or called, returns another shape, or has a parameter that no
    rule starts, a buffer that no checkpoint would keep, or dropout, in which a resumed run would differ.
    """
    key = (check, repr(model), repr(init), seq_len)
    if model == gpt2_slots(model) or key in _known:
        return
    flops_per_token(model, seq_len)
    import torch

    from gpt2exp.model.gpt import GPT
    from gpt2exp.model.init import rule_of

    with torch.device("meta"):
        gpt = GPT(replace(model, n_layer=1))
    known = dict(gpt.named_parameters(remove_duplicate=False))
    for name, parameter in known.items():
        rule_of(name, parameter, gpt, init)
    for name in gpt.state_dict().keys() - known.keys():
        why = "a buffer, and a checkpoint keeps parameters alone"
        raise BadRequest(f"{name}: {why}; make it a parameter, or with persistent=False if it never changes")
    for name, module in gpt.named_modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            raise BadRequest(f"{name}: drops at random, where this model has no dropout; make it with p=0")
    _known[key] = 0


def _by_slot(model: ModelConfig, known: dict[str, int], count: Callable[..., int], *length: int) -> dict[str, int]:
    """A count for each slot: `known` (else 0) where it holds GPT-2's own module, else `count` of its module."""
    usual = gpt2_slots(model)
    return {
        slot: known.get(slot, 0)
        if getattr(model, slot) == getattr(usual, slot)
        else _counted(count, model, slot, *length)
        for slot in SLOTS
    }


def _counted(count: Callable[..., int], model: ModelConfig, slot: str, *length: int) -> int:
    """A count of a slot, made once for a configuration; if its class raises, `BadRequest` names the slot."""
    key = (count, repr(model), slot, *length)
    if key not in _known:
        try:
            _known[key] = count(model, slot, *length)
        except BadRequest:
            raise
        except Exception as error:
            why = first_line(error) if type(error) is ValueError else f"{type(error).__name__}: {first_line(error)}"
            remedy = "mend its class: it is made of the model's config and its keys, and maps (B, T, C) to (B, T, C)"
            raise BadRequest(f"model/{slot}={getattr(model, slot).name}: {why}; {remedy}") from error
    return _known[key]


def _on_meta(model: ModelConfig, slot: str, length: int) -> tuple[nn.Module, Tensor]:
    """A slot's module and a sequence for it, on the meta device."""
    import torch

    with torch.device("meta"):
        module: nn.Module = getattr(model, slot).build(model)
        return module.to("meta"), torch.empty(1, length, model.n_embd)  # `to`: its class may name a device


def _count_parameters(model: ModelConfig, slot: str) -> int:
    """Numbers in the parameters of a slot's module."""
    return sum(parameter.numel() for parameter in _on_meta(model, slot, 1)[0].parameters())


def _count_flops(model: ModelConfig, slot: str, length: int) -> int:
    """Floating-point operations of the products in a slot's forward pass over a sequence."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    module, x = _on_meta(model, slot, length)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        y = module(x)
    if (shape := getattr(y, "shape", None)) != x.shape:
        given = type(y).__name__ if shape is None else tuple(shape)
        raise ValueError(f"maps {tuple(x.shape)} to {given}, where the shape must stay")
    return int(counter.get_total_flops())


def _count_saved(model: ModelConfig, slot: str, length: int) -> int:
    """Numbers that a slot's forward pass saves for backward, without its parameters and tables."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    held: list[Tensor] = []  # kept until all are counted, so that no memory is freed and given to another tensor

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    # fake tensors say that they are on a CPU; on the meta device attention would be unfused and save its scores
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = getattr(model, slot).build(model)
        x = torch.empty(1, length, model.n_embd, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            module(x)
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    sizes = {kept.untyped_storage()._cdata: kept.untyped_storage().nbytes() // kept.itemsize for kept in held}
    return sum(numbers for memory, numbers in sizes.items() if memory not in own)
