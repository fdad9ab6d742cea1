"""Optimizers, a class each; the learning rate as a pure function of the step; an optimizer's state by name.

A class is a choice of the group `optimizer`: its fields are the keys beside those of `OptimizerConfig`, and `build`
makes PyTorch's. No torch before `build`: a request is checked without it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from gpt2exp.config import OptimizerConfig, Schedule
from gpt2exp.section import BadRequest, choice_of, option, require
from gpt2exp.training import distributed

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Every parameter of `model` once (a tied tensor is one): matrices and embeddings decay, vectors do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


@choice_of("optimizer")
@dataclass(kw_only=True, slots=True)
class AdamW(OptimizerConfig):
    """Fused AdamW (Loshchilov and Hutter 2019) with PyTorch's defaults, as the tutorial's 50 steps."""

    name: str = option("adamw", "chosen by optimizer=NAME")
    betas: list[float] = option([0.9, 0.999], "decay of the gradient's running mean and square", at_least=0, below=1)
    eps: float = option(1e-8, "added to the denominator", above=0)
    weight_decay: float = option(0.01, "decoupled decay of matrices and embeddings alone", at_least=0)
    moments: ClassVar[int] = 2

    def agree(self) -> None:
        OptimizerConfig.agree(self)
        remedy = "try optimizer.betas=[0.9,0.95]"
        require(len(self.betas) == 2, "optimizer.betas", self.betas, "must be two numbers", remedy)

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        import torch

        groups = decay_groups(model, self.weight_decay)
        betas = (self.betas[0], self.betas[1])
        return [torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)]


@choice_of("optimizer")
@dataclass(kw_only=True, slots=True)
class SGD(OptimizerConfig):
    """Stochastic gradient descent with momentum (Polyak 1964; Sutskever et al. 2013), fused."""

    name: str = option("sgd", "chosen by optimizer=NAME")
    momentum: float = option(0.9, "decay of the running sum of gradients; 0: none", at_least=0, below=1)
    nesterov: bool = option(False, "look one momentum step ahead (Nesterov 1983)")
    weight_decay: float = option(0.0, "decay of matrices and embeddings alone, added to their gradient", at_least=0)
    moments: ClassVar[int] = 1

    def agree(self) -> None:
        OptimizerConfig.agree(self)
        why = "needs momentum, and optimizer.momentum=0"
        require(not self.nesterov or self.momentum > 0, "optimizer.nesterov", True, why, "try optimizer.momentum=0.9")

    def build(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        import torch

        groups = decay_groups(model, self.weight_decay)
        return [torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    `cosine` rises linearly over `warmup_steps`, the first step at lr / warmup_steps, then falls along half a cosine
    that reaches `min_lr` at the last step (Loshchilov and Hutter 2017, without restarts), or at the last of
    `schedule_steps`, and stays there.
    """
    if config.schedule == Schedule.constant:
        return config.lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = config.schedule_steps or steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, length - 1 - config.warmup_steps))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every tensor the optimizers keep, as `exp_avg.transformer.wte.weight`; empty before the first step.

    A plain number that one keeps is a tensor of no dimension.
    """
    import torch

    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    kept = itertools.chain.from_iterable(optimizer.state.items() for optimizer in optimizers)
    return {
        f"{key}.{names[parameter]}": value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        for parameter, values in kept
        for key, value in values.items()
    }


def groups(optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """The groups of parameters of all of them."""
    return itertools.chain.from_iterable(optimizer.param_groups for optimizer in optimizers)


def group_numbers(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    """The numbers that a group has beside its learning rate: some optimizers change them as they go."""
    return [
        {key: one[key] for key in one if type(one[key]) in (int, float) and key != "lr"} for one in groups(optimizers)
    ]


def restore(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Give the optimizers what `state` returned on rank 0; `BadRequest` if these tensors are not theirs.

    Each tensor is removed from `tensors`, so that there are no two copies of all; on other ranks it may be empty.
    """
    import torch

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
        if like.is_meta:  # of a shape that its code alone knows
            shape = distributed.broadcast(None if saved is None else tuple(saved.shape))
            like = torch.empty(shape, dtype=like.dtype, device=parameter.device)
        optimizer.state[parameter][key] = distributed.broadcast_like(saved, like)


def _kept_by(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, str, Any]]:
    """Each parameter of an optimizer, the name of each thing it keeps for it, and one of that shape and type.

    Found by a step of the same optimizer over tiny parameters: in each group one of each number of dimensions. What has
    neither the parameter's shape nor no dimension is a tensor on the meta device; a plain number stays one.
    """
    import torch

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
