"""The training step, its clock, and the loop around it.

This module knows neither Hydra nor wandb. It takes a model and batches, and yields a dict of metrics per step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpt2exp.choices import Outside
from gpt2exp.config import RunConfig
from gpt2exp.data.batches import Windows
from gpt2exp.model.gpt import GPT
from gpt2exp.training import distributed as dist
from gpt2exp.training import hardware, load, measures, optimizer_state, optimizers, outside, precision


class Diverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


def finite(value: float, what: str, step: int) -> float:
    """The value itself; `Diverged` if it is infinite or not a number."""
    if math.isfinite(value):
        return value
    raise Diverged(f"{what} became {value} at step {step}")


class Trainer:
    """A model in training: `step` trains it for one step, `evaluate` measures its loss, `fit` does the whole run."""

    def __init__(
        self,
        model: GPT,
        batches: Windows,
        config: RunConfig,
        *,
        seen: Tensor | None = None,
        autocast: torch.dtype | None = None,
        computing: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        """`config`: its sections `train`, `optimizer`, `schedule`, `metric` and `distributed` are read.

        `seen` (S,): ids that occur in the data, for `loss_unseen`. `autocast`: the type that the forward pass is cast
        to; with float16 the loss is scaled so that small gradients survive (Micikevicius et al. 2018). `computing`: a
        block around every step, validation and measure, which sets the precision of a trainer outside a run.
        """
        self.model, self.batches, self.seen = model, batches, seen
        self.config, self.optimizer_config, self.autocast = config.train, config.optimizer, autocast
        self.computing = computing
        # DDP and FSDP exchange the gradients that autograd reports, and it does not report this one
        model.transformer.gradient_in_place = model.config.tie_weights and dist.world_size() == 1
        model.transformer.recompute = config.train.activation_checkpointing is True
        model.loss_rows = config.train.loss_rows
        if config.train.compile is True:
            for block in model.transformer.h:  # blocks are alike, so they share one compilation (PyTorch's regional)
                block.compile()
        self.sharded = dist.is_sharded(config.distributed)
        self.module = dist.wrap(model, config.distributed, batches.device)  # `model`, or DDP around it
        self.schedule, self.metric = config.schedule, config.metric
        own = isinstance(config.optimizer, Outside)
        self.optimizers = outside.optimizer(config.optimizer, model) if own else config.optimizer.build(model)
        peak = config.optimizer.lr
        self._shares = {one: [group["lr"] / peak for group in one.param_groups] for one in self.optimizers}
        """Each group's learning rate, as it was built, over `optimizer.lr`: 1 unless code from outside made another."""
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast is torch.float16)
        self.steps_done = 0
        self._unclipped: Tensor | None = None
        self.step_seconds: list[float] = []  # duration of every step done, the first ones included
        self.step_waits: list[float | None] = []  # seconds its threads waited for a core (`load.waited`), if known
        self._spinning = load.spinning(torch.get_num_threads() if self.device.type == "cpu" else 1)
        self.began_at = [0]  # steps at which the run started or resumed; the warm-up steps after each are not timed

    @property
    def device(self) -> torch.device:
        """The device that the model is on."""
        return self.batches.device

    def step(self, measure: Callable[[], object] | None = None) -> Tensor:
        """One optimizer step: next batch, forward, loss, backward, clip if asked, update. Returns the loss, a scalar.

        With accumulation the loss and the gradient are the means over `grad_accum_steps` micro-batches of equal size,
        so that they equal those of one large batch. With several processes the gradient is the mean over all of them;
        the loss returned is that of this process's rows. The gradient stays in `.grad` until the next step. `measure`
        is called when the first micro-batch's gradient is there.
        """
        config = self.config
        with self.computing():
            self.model.zero_grad()
            losses = []
            for micro in range(config.grad_accum_steps):
                x, y = self.batches.train(self.steps_done * config.grad_accum_steps + micro)
                with dist.gradient_sync(self.module, micro == config.grad_accum_steps - 1):
                    with precision.cast(self.device, self.autocast):
                        loss = self.module(x, y) / config.grad_accum_steps
                    self.scaler.scale(loss).backward()
                losses.append(loss.detach())
                if micro == 0 and measure is not None:
                    measure()
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            if self.optimizer_config.grad_clip > 0:
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer_config.grad_clip)
                self._unclipped = dist.full_tensor(norm)
            for optimizer in self.optimizers:
                for group, share in zip(optimizer.param_groups, self._shares[optimizer], strict=True):
                    group["lr"] = self.learning_rate * share
                self.scaler.step(optimizer)
            self.scaler.update()
            self.steps_done += 1
            if self.device.type == "cuda":  # its kernels still run: copy the next batch meanwhile
                self.batches.prefetch(self.steps_done * config.grad_accum_steps)
        return torch.stack(losses).sum()

    def timed_step(self, measure: Callable[[], object] | None = None) -> tuple[Tensor, float, float | None]:
        """Do a `step`; returns its loss, its duration and the time that its threads waited for a core, in seconds.

        The device is synchronised before and after. The wait is the longest of the run's processes. It is None on an
        accelerator, where a thread may wait without making the step longer. The clock stands while `measure` runs.
        """
        stood = 0.0

        def off_the_clock() -> None:
            nonlocal stood
            assert measure is not None
            hardware.synchronize(self.device)
            start = time.perf_counter()
            measure()
            hardware.synchronize(self.device)
            stood = time.perf_counter() - start

        hardware.synchronize(self.device)
        before = load.waited() if self.device.type == "cpu" else None
        start = time.perf_counter()
        loss = self.step(measure and off_the_clock)
        hardware.synchronize(self.device)
        seconds = time.perf_counter() - start - stood
        after = None if before is None else load.waited()
        waits = None if after is None or before is None else max(0.0, after - before)  # a thread may have ended
        self._spinning.after_step(None if waits is None else waits / seconds)
        (most,) = dist.all_max(-1 if waits is None else round(waits * 1e9))
        return loss, seconds, None if most < 0 else most / 1e9

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step."""
        steps = self.config.steps
        if isinstance(self.schedule, Outside):
            return self.optimizer_config.lr * outside.rate(self.schedule, min(self.steps_done, steps - 1), steps)
        return optimizers.learning_rate(self.optimizer_config, self.steps_done, steps)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """The state that later steps depend on: weights, the optimizers' tensors by name, and numbers.

        `micro_batches` is the position in the data: a batch is a pure function of its number. Every process calls this;
        rank 0's answer is the run's, whatever the number of processes.
        """
        weights = dist.gather(dict(self.model.named_parameters()))
        tensors = dist.gather(optimizer_state.state(self.model, self.optimizers))
        scaler = self.scaler.state_dict()
        numbers: dict[str, Any] = {
            "step": self.steps_done,
            "micro_batches": self.steps_done * self.config.grad_accum_steps,
        }
        numbers["groups"] = optimizer_state.group_numbers(self.optimizers)
        numbers["scaler"] = {key: scaler[key] for key in ("scale", "_growth_tracker") if key in scaler}
        return weights, tensors, numbers

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        """Restore all but the weights from rank 0's `state`; `BadRequest` if the tensors are another optimizer's."""
        numbers, kept = dist.broadcast((numbers, bool(tensors)))
        if kept or not self.scaler.is_enabled():  # a run whose scaled steps all overflowed has no moments yet
            optimizer_state.restore(self.model, self.optimizers, tensors)
        for group, known in zip(optimizer_state.groups(self.optimizers), numbers.get("groups", []), strict=False):
            group.update(known)
        self.scaler.load_state_dict(self.scaler.state_dict() | numbers["scaler"])
        self.steps_done = numbers["step"]

    def evaluate(self) -> float:
        """Mean loss in nats over every validation window."""
        total, count = 0.0, 0
        with self.computing(), torch.no_grad(), precision.cast(self.device, self.autocast):
            for x, y in self.batches.validation():
                loss = self.model(x, y)  # also without rows: a sharded model needs every process to call it
                if len(y):
                    total += float(loss) * y.numel()
                    count += y.numel()
        dist.reshard(self.model)
        sums = dist.all_sum(torch.tensor([total, count], dtype=torch.float64))
        return float(sums[0] / sums[1])

    def fit(self) -> Iterator[dict[str, Any]]:
        """Train to the last step, yielding each step's metrics.

        Only the step is on the clock, the device synchronised at both ends; measures, validation and whatever the
        caller does with the metrics are not. `loss` is the loss before the step's update, `step` counts from 0. Losses,
        norms and tokens are those of all processes together.

        Raises:
            Diverged: a loss, or the gradient's norm where it is measured, is infinite or not a number.
        """
        config = self.config
        while self.steps_done < config.steps:
            number, last = self.steps_done, self.steps_done == config.steps - 1
            due = bool(config.eval_every) and (number + 1) % config.eval_every == 0
            measure = last or due or number % config.measure_every == 0
            metrics: dict[str, Any] = {"step": number, "lr": self.learning_rate}
            look = None
            if measure and isinstance(self.metric, Outside):
                self.model.zero_grad()  # the metric needs the memory of the last step's gradient
                batch = self.batches.train(number * config.grad_accum_steps)
                with self.computing(), precision.cast(self.device, self.autocast):
                    metrics |= outside.measure(self.metric, self.model, batch)
            if measure and self.seen is not None:
                self.model.transformer.traced = True
                look = functools.partial(self._measure_trace, metrics, thorough=number == 0 or last or due)
            loss, seconds, waits = self.timed_step(look)
            metrics |= {
                "loss": finite(float(dist.all_mean(loss)), "loss", number),
                "tokens": self.steps_done * config.step_tokens,
                "step_ms": seconds * 1e3,
                "tokens_per_second": config.step_tokens / seconds,
            }
            if waits is not None:
                metrics["waited_ms"] = waits * 1e3
            if measure:
                norm = measures.grad_norm(self.model) if self._unclipped is None else float(self._unclipped)
                # a scaled step that overflows is skipped, and the scale lowered
                if math.isfinite(norm) or not self.scaler.is_enabled():
                    metrics["grad_norm"] = finite(norm, "grad_norm", number)
            if len(self.batches.held_out) and (last or due):
                metrics["val_loss"] = finite(self.evaluate(), "val_loss", number)
            self.step_seconds.append(seconds)
            self.step_waits.append(waits)
            yield metrics

    def _measure_trace(self, metrics: dict[str, Any], *, thorough: bool) -> None:
        """Measure the trace of the step's first micro-batch, before the weights change."""
        assert self.seen is not None
        scale = self.scaler.get_scale() / self.config.grad_accum_steps
        idx, _ = self.batches.train(self.steps_done * self.config.grad_accum_steps)
        with torch.no_grad(), precision.cast(self.device, self.autocast):
            # a sharded model has no whole weights
            metrics |= measures.of_trace(self.model, self.seen, idx if thorough and not self.sharded else None, scale)

    def timing(self) -> dict[str, Any]:
        """Step times of the run so far (`load.timing`); the first `warmup_steps` of each part are left out."""
        cold = {start + number for start in self.began_at for number in range(self.config.warmup_steps)}
        return load.timing(self.step_seconds, self.step_waits, cold, self.config.step_tokens)
