"""Calls the code of choices from outside in training, and tries it on a tiny model before a run begins."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gpt2exp import choices
from gpt2exp.config import InitConfig, MetricConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig
from gpt2exp.section import BadRequest, first_line
from gpt2exp.training import distributed, optimizers

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TINY = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16)  # choices are tried on this model
_tried: set[str] = set()


def optimizer(config: OptimizerConfig, model: nn.Module) -> list[torch.optim.Optimizer]:
    """PyTorch optimizers that together step every parameter of `model` once; `ValueError` if the code returns others.

    The code is called with the model if its first parameter is called `model`, else with the parameters: a class that
    has `weight_decay` gets them in `optimizers.decay_groups`, any other code in a list.
    """
    import torch

    code = config.code  # type: ignore[attr-defined]
    first = next(iter(inspect.signature(code).parameters), "")
    given: Any = model if first == "model" else list(model.parameters())
    if inspect.isclass(code) and hasattr(config, "weight_decay"):
        given = optimizers.decay_groups(model, config.weight_decay)
    made = choices.call(config, given)
    built = list(made) if isinstance(made, (list, tuple)) else [made]
    if odd := [type(one).__name__ for one in built if not isinstance(one, torch.optim.Optimizer)]:
        raise ValueError(f"it returned {odd[0]}, where a torch.optim.Optimizer, or a list of them, must be")
    stepped = [id(parameter) for one in built for group in one.param_groups for parameter in group["params"]]
    for name, parameter in model.named_parameters():
        if (times := stepped.count(id(parameter))) != 1:
            raise ValueError(f"it gave {name} to {times} optimizers, where each parameter must have one")
    return built


def rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor on `optimizer.lr` at a step (from 0) of `steps`; `ValueError` unless it is 0 or more."""
    factor = float(choices.call(config, step, steps))
    if not (math.isfinite(factor) and factor >= 0):
        raise ValueError(f"it returned {factor} for step {step} of {steps}, where 0 or more must be")
    return factor


def measure(config: MetricConfig, model: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The metric of a batch, two tensors (B, T): its name and its mean over all ranks; `ValueError` if not finite."""
    import torch

    with torch.no_grad():
        value = float(distributed.all_mean(torch.as_tensor(choices.call(config, model, batch), dtype=torch.float64)))
    if not math.isfinite(value):
        raise ValueError(f"metric={config.name}: it returned {value}, where a finite number must be")
    return {config.name: value}


def try_out(config: RunConfig) -> None:
    """Try each choice from outside once a process; `BadRequest` names one that fails. Slots: `model.size.check`."""
    trials: dict[str, Callable[[RunConfig], object]] = {
        "optimizer": _optimizer,
        "schedule": _schedule,
        "init": lambda config: _tiny_model(config.init, config.seed),
        "metric": _metric,
    }
    for section, trial in trials.items():
        choice = getattr(config, section)
        said = repr((choice, config.train.steps))
        if isinstance(choice, choices.Outside) and said not in _tried:
            key = "optimizer.schedule" if section == "schedule" else section
            with _naming(f"{key}={choice.name}"):  # type: ignore[attr-defined]
                trial(config)
            _tried.add(said)


@contextlib.contextmanager
def _naming(choice: str) -> Iterator[None]:
    """Name the choice in whatever its code raises, and restore PyTorch's random state."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]), distributed.alone():
            yield
    except Exception as error:
        raised = "" if type(error) is ValueError else f"its code raised {type(error).__name__}: "
        why = f"{raised}{first_line(error).removeprefix(f'{choice}: ')}"
        raise BadRequest(f"{choice}: {why}; mend its code or its keys") from error


def _tiny_model(init: InitConfig | None = None, seed: int = 0) -> Any:
    from gpt2exp.model.gpt import GPT
    from gpt2exp.model.init import initialise

    model = GPT(TINY)
    initialise(model, init or InitConfig(), seed)
    return model


def _optimizer(config: RunConfig) -> None:
    """Make a step, then save and restore the state as a checkpoint does."""
    from gpt2exp.training import optimizer_state

    model = _tiny_model()
    built = optimizer(config.optimizer, model)
    model.transformer.gradient_in_place = False
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    for one in built:
        one.step()
    optimizer_state.restore(model, built, copy.deepcopy(optimizer_state.state(model, built)))


def _schedule(config: RunConfig) -> None:
    for step in {0, config.train.steps // 2, config.train.steps - 1}:
        rate(config.schedule, step, config.train.steps)


def _metric(config: RunConfig) -> None:
    import torch

    measure(config.metric, _tiny_model(), (torch.zeros(2, 8, dtype=torch.int64),) * 2)
