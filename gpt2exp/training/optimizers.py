"""Optimizers, a class for each, and the learning rate as a pure function of the step.

Each class is a choice of the group `optimizer`. Its fields are keys, added to those of `OptimizerConfig`, and `build`
makes PyTorch's optimizer. torch is imported in `build` alone: a request is checked without it.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from gpt2exp.config import OptimizerConfig, Schedule
from gpt2exp.section import choice_of, option, require

if TYPE_CHECKING:
    import torch
    from torch import nn


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
        return [undecorated(torch.optim.AdamW)(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)]


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
        kind = undecorated(torch.optim.SGD)
        return [kind(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=True)]


@functools.cache
def undecorated(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The class without the decorators of its methods, which import TorchDynamo at their first call.

    The decorators keep TorchDynamo from tracing these methods; here it traces only blocks. Its import takes a second of
    a run's start. `functools.wraps` leaves the plain method in `__wrapped__`; `step` then has to turn gradients off.
    """
    import torch

    own = {name: inspect.unwrap(getattr(kind, name)) for name in ("add_param_group", "zero_grad")}
    return type(kind.__name__, (kind,), {**own, "step": torch.no_grad()(inspect.unwrap(kind.step))})


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
