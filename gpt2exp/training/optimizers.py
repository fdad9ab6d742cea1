"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt2exp.config import OptimizerConfig, Schedule
from gpt2exp.training import distributed


def build(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over every parameter of `model` once: matrices and embeddings decay, biases and LayerNorms do not."""
    parameters = list(model.parameters())  # a tied tensor comes once
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    `cosine` rises linearly over `warmup_steps`, the first step at lr / warmup_steps, then falls along half a cosine
    that reaches `min_lr` at the last step (Loshchilov and Hutter 2017, without restarts).
    """
    if config.schedule is Schedule.constant:
        return config.lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress))


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor the optimizer keeps, as `exp_avg.transformer.wte.weight`; empty before the first step."""
    kept = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            kept[f"{key}.{name}"] = value
    return kept


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give the optimizer what `state` said in the first process.

    Each tensor is taken out of `tensors`, so that no two copies pile up; the other processes' may be empty.
    """
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            like = torch.zeros((), device=parameter.device) if key == "step" else parameter.detach()
            optimizer.state[parameter][key] = distributed.given(tensors.pop(f"{key}.{name}", None), like)
