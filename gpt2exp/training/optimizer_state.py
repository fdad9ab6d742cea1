"""Saves and restores the state of optimizers by name, for checkpoints; works for any `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt2exp.section import BadRequest
from gpt2exp.training import distributed


def state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor that the optimizers keep, as `exp_avg.transformer.wte.weight`; empty before the first step.

    A plain number becomes a tensor without dimensions.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    kept = itertools.chain.from_iterable(optimizer.state.items() for optimizer in optimizers)
    return {
        f"{key}.{names[parameter]}": value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        for parameter, values in kept
        for key, value in values.items()
    }


def groups(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)


def group_numbers(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """Each group's numbers other than its learning rate: some optimizers change them during training."""
    return [
        {key: one[key] for key in one if type(one[key]) in (int, float) and key != "lr"} for one in groups(optimizers)
    ]


def restore(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Restore in the optimizers what `state` returned on rank 0; `BadRequest` if these tensors are not theirs.

    Each tensor is removed from `tensors` once restored, to save memory. On other ranks `tensors` may be empty.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    expected = {
        f"{key}.{names[parameter]}": (optimizer, parameter, key, like)
        for optimizer in optimizers
        for parameter, key, like in _kept_by(optimizer)
    }
    if distributed.is_main():
        _check(tensors, {name: like for name, (*_, like) in expected.items()})
    for name, (optimizer, parameter, key, like) in expected.items():
        saved = tensors.pop(name, None)
        if isinstance(like, (int, float)):
            optimizer.state[parameter][key] = type(like)(distributed.broadcast(saved))
            continue
        if like.is_meta:  # its shape is not known here
            shape = distributed.broadcast(None if saved is None else tuple(saved.shape))
            like = torch.empty(shape, dtype=like.dtype, device=parameter.device)
        optimizer.state[parameter][key] = distributed.broadcast_like(saved, like)


def _kept_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Any]]:
    """For each parameter of an optimizer, each name that it keeps a value under, and an example of that value.

    Found by a step of a copy of the optimizer over tiny parameters, in each group one for each number of dimensions.
    A value of the tiny parameter's shape has the parameter's shape, and the example has it too. A scalar or a plain
    number is its own example. The shape of any other value is not known: its example is on the meta device.
    """
    probe, tried = copy.copy(optimizer), list[dict[int, torch.nn.Parameter]]()
    probe.state, probe.param_groups = defaultdict(dict), []
    for group in optimizer.param_groups:
        tried.append({})
        for like in {p.dim(): p for p in group["params"]}.values():
            tiny = torch.nn.Parameter(torch.zeros((2, 3, 4, 5)[: like.dim()], dtype=like.dtype, device=like.device))
            tiny.grad = torch.zeros_like(tiny)
            tried[-1][like.dim()] = tiny
        probe.param_groups.append({**group, "params": list(tried[-1].values())})
    probe.step()
    for group, tinies in zip(optimizer.param_groups, tried, strict=True):
        for parameter in group["params"]:
            like = tinies[parameter.dim()]
            for key, value in probe.state[like].items():
                if isinstance(value, torch.Tensor) and value.shape == like.shape:
                    yield parameter, key, parameter.detach().to(value.dtype)
                else:
                    scalar = not isinstance(value, torch.Tensor) or value.dim() == 0
                    yield parameter, key, value if scalar else value.to("meta")


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    remedy = "it is another version's, or another optimizer's: start a new run without resume"
    for name in sorted(tensors.keys() ^ expected.keys()):
        what = "is not in it" if name in expected else "is not kept by this optimizer"
        raise BadRequest(f"the optimizer's state in the checkpoint: {name} {what}; {remedy}")
    for name, like in expected.items():
        if isinstance(like, (int, float)) or like.is_meta:
            continue
        got, want = ((tuple(tensor.shape), tensor.dtype) for tensor in (tensors[name], like))
        if got != want:
            raise BadRequest(f"the optimizer's state in the checkpoint: {name} is {got}, not {want}; {remedy}")
