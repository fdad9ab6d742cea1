"""AdamW, its parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gpt2exp.config import BadRequest, OptimizerConfig, Schedule
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
    that reaches `min_lr` at the last step (Loshchilov and Hutter 2017, without restarts), or at the last of
    `schedule_steps`, and stays there.
    """
    if config.schedule is Schedule.constant:
        return config.lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    length = config.schedule_steps or steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, length - 1 - config.warmup_steps))
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

    Raises:
        BadRequest: a tensor is missing, is none of AdamW's, or has another shape or type.
    """
    expected = {}
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            like = torch.zeros((), device=parameter.device) if key == "step" else parameter.detach()
            expected[f"{key}.{name}"] = parameter, key, like
    if distributed.first():
        _check(tensors, {name: like for name, (_, _, like) in expected.items()})
    for name, (parameter, key, like) in expected.items():
        optimizer.state[parameter][key] = distributed.given(tensors.pop(name, None), like)


def _check(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    remedy = "it is another version's, or another optimizer's: start a new run without resume"
    for name in sorted(tensors.keys() ^ expected.keys()):
        what = "is not in it" if name in expected else "is none of AdamW's"
        raise BadRequest(f"the optimizer's state in the checkpoint: {name} {what}; {remedy}")
    for name, like in expected.items():
        got, want = ((tuple(tensor.shape), tensor.dtype) for tensor in (tensors[name], like))
        if got != want:
            raise BadRequest(f"the optimizer's state in the checkpoint: {name} is {got}, not {want}; {remedy}")
