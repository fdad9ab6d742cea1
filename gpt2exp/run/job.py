"""One run: from the configuration in a folder's `.hydra` to its `summary.json`."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp.config import (
    AUTO,
    BadRequest,
    RunConfig,
    first_line,
    plain,
)
from gpt2exp.data import tokens
from gpt2exp.data.assets import AssetError
from gpt2exp.run import process as processes
from gpt2exp.run import record, terminal, tracking
from gpt2exp.training import distributed, setup

if TYPE_CHECKING:
    import torch

    from gpt2exp.run import checkpoint
    from gpt2exp.run.tracking import Mirror
    from gpt2exp.training.precision import Precision
    from gpt2exp.training.trainer import Trainer


log = logging.getLogger("gpt2exp")

BEGAN = time.monotonic()
"""When this process began, near enough: the first job's start-up counts from here."""


def _check_same_text(config: RunConfig, source: tokens.TokenFile, before: str | None) -> None:
    if before not in (None, source.sha256):
        why = "not the text that the run began with"
        raise BadRequest(f"data.path={config.data.path}: {why}; put that text back, or name where it lies now")


def run(folder: Path, began: float = BEGAN) -> dict[str, Any]:
    """Train as the configuration in `folder`/.hydra says and return the summary; failures are recorded, not raised.

    The run goes on from the newest whole checkpoint in the folder, if there is one; no other process may be at work
    there (`owner.held`).

    Raises:
        KeyboardInterrupt: a signal asked for an end; the run was recorded as interrupted, or as done if it was by then.
        OSError: the record cannot be written.
    """
    config, _, overrides = record.asked(folder)
    sweep = record.sweep_of(folder)
    with processes.deferred() as stop:
        facts: dict[str, Any] = {"overrides": overrides, "config": plain(config), "seed": config.seed}
        name = config.wandb.name or ",".join(overrides) or "defaults"
        about = {"name": name[:128], "group": config.wandb.group or (sweep and sweep.name), "tags": config.wandb.tags}
        saved = _newest_checkpoint(folder)
        again = (folder / "status.json").is_file() and not os.environ.get("WANDB_RESUME")
        told = {"config": facts["config"]}
        if saved is None:
            files = record.Record(folder, facts, began=began)
        else:
            parts = saved.state["parts"]
            metrics = record.kept_metrics(folder)[: saved.step]
            files = record.Record(folder, facts, began=began, metrics=metrics, parts=parts)
            about["notes"] = f"goes on at step {saved.step} from {parts[0]['wandb']}"
            told["config"] = facts["config"] | {"goes_on_from": parts[0]["wandb"], "goes_on_at_step": saved.step}
        wandb = tracking.Mirror(config.wandb, folder, about | told, own=again or sweep is not None)
        progress = record.progress(sweep, folder) if sweep else None
        with terminal.View(folder, config, overrides, progress) as shown:
            try:
                _train(config, files, wandb, shown, stop, saved)
                state, error = "done", None
            except KeyboardInterrupt as interrupt:
                stop.asked = stop.asked or interrupt
                state, error = "interrupted", "stopped by a signal"
            except Exception as problem:
                state, error = _classify(problem, config, files.facts.get("estimated_memory_bytes"))
                log.error("%s", error, exc_info=True)
            stop.waiting = True
            summary = files.finish(state, error)
            shown.close(summary, folder, wandb.finish(_for_wandb(summary), failed=state != "done"))
    if stop.asked is not None:
        raise stop.asked
    return summary


def _newest_checkpoint(folder: Path) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a folder whose steps are all recorded."""
    if not record.saved(folder):  # of a new run: without waiting for torch
        return None
    from gpt2exp.run import checkpoint

    return checkpoint.newest(folder, at_most=len(record.kept_metrics(folder)))


def _train(
    config: RunConfig,
    files: record.Record,
    wandb: Mirror,
    shown: terminal.View,
    stop: processes.Stop,
    saved: checkpoint.Checkpoint | None,
) -> None:
    import torch

    from gpt2exp.run import checkpoint, record
    from gpt2exp.training import hardware, precision

    device = hardware.resolve_device(config.train.device)
    hardware.reset_peak_memory(device)
    source = tokens.prepare(config.data)
    if saved is not None:
        _check_same_text(config, source, saved.state["data"]["sha256"])
        # what was decided then holds
        settled = {key: value for key, value in saved.state["settled"].items() if key in setup.SETTLED}
        config = replace(config, train=replace(config.train, tokens_per_step=None, **settled))
    with precision.applied(config.precision, device) as got:
        here = setup.Hardware.of(device, got)
        config, need = setup.settled(config, device, here, source)
        setup.check_text(config, source)
        held_out = tokens.held_out(source.tokens, config.data.val_fraction)
        files.facts |= {
            "parameters": config.model.parameters,
            "flops_per_token": config.model.flops_per_token(config.train.seq_len),
            "precision": got.as_dict(),
            "data": source.facts | {"train_tokens": source.tokens - held_out, "val_tokens": held_out},
            "device": f"{device.type}: {hardware.device_name(device)}",
            "processes": distributed.world_size(),
            "distributed": config.distributed.value if distributed.world_size() > 1 else None,
            "threads": torch.get_num_threads(),
            "estimated_memory_bytes": need,
            "settled": {key: getattr(config.train, key) for key in setup.SETTLED},
            "environment": record.environment_overrides(),
            **record.facts(),
        }
        shown.header(files.facts, files.folder, config)
        _check_memory(config, need, here)
        distributed.broadcast((config, source.sha256, saved is not None, Path.cwd()))
        job, files.facts["init"] = setup.trainer(config, device, got, source, saved)
        shown.rows({"weights  ": terminal.origin_line(files.facts["init"]), "wandb    ": wandb.ready()})
        wandb.describe({"facts": _for_wandb(files.facts)})
        now = {key: files.facts[key] for key in ("device", "processes", "threads", "machine")}
        peak = 0
        if saved is not None:
            job.restore(saved.training(), saved.state)
            hardware.reset_peak_memory(device)  # the file read is none of training's memory
            peak = saved.state["peak_memory_bytes"]
            shown.rows({"goes on  ": f"from {saved.folder.name}, {saved.step} of {config.train.steps} steps done"})
            if all(part.get(key, 1) == now[key] for part in saved.state["parts"] for key in now):
                job.step_seconds = [row["step_ms"] / 1e3 for row in files.metrics]
                waits = (row.get("waited_ms") for row in files.metrics)
                job.step_waits = [None if wait is None else wait / 1e3 for wait in waits]
                job.began_at = [part["from_step"] for part in files.parts]
            else:
                log.warning("other hardware or threads than before: the speed is that of the steps from here on")
        from_step = 0 if saved is None else saved.step
        saver = checkpoint.Saver(files.folder, config.checkpoint, from_step, background=device.type != "cpu")
        files.training_begins(**now, wandb=wandb.link())
        stop.waiting = True

        def keep(metrics: dict[str, Any], peak_now: int) -> None:
            nonlocal peak
            peak = max(peak, peak_now)
            files.step(metrics)
            shown.step(metrics)
            if terminal.due(metrics, config.train):
                wandb.log(metrics)

        def save(weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
            files.sync()
            kept = ("config", "init", "settled", "versions", "data", "precision", "device", "threads", "machine")
            state = {**numbers, **{key: files.facts[key] for key in kept}}
            saver.save(weights, tensors, state | {"parts": files.parts, "peak_memory_bytes": peak})

        try:
            _steps(job, config, stop, keep, save)
        finally:  # also of a run that diverged or was stopped, as far as it came
            saver.wait()
            if files.metrics:
                files.measured |= {**job.timing(), "peak_memory_bytes": peak}
        files.measured["mfu"] = _mfu(config, device, got, files.measured["tokens_per_second"])


def _steps(
    job: Trainer,
    config: RunConfig,
    stop: processes.Stop,
    keep: Callable[[dict[str, Any], int], None],
    save: Callable[..., None],
) -> None:
    """Train to the end, or until a signal reached one process of the run; all of them do this alike.

    `keep` gets every step's metrics and the peak memory so far, `save` what `Trainer.state` says where that is due.
    """
    from gpt2exp.training import hardware

    every = config.checkpoint.every
    for metrics in job.fit():
        done, last = job.steps_done, job.steps_done == config.train.steps
        asked, warned, peak = distributed.all_max(stop.asked is not None, stop.warned, hardware.peak_memory(job.device))
        keep(metrics, peak)
        if warned or (every and done % every == 0) or (config.checkpoint.save_last if last else asked):
            stop.warned = False
            save(*job.state())
        if asked and not last:
            raise stop.asked or KeyboardInterrupt


def _follow() -> int:
    """What a process does that is not the run's first: the same steps, with nothing written; the exit code."""
    task: Any = distributed.broadcast()
    if task is None:  # no run came of it
        return 0
    config, text, goes_on, cwd = task
    from gpt2exp.training import hardware, precision

    def leave(*_: Any) -> None:
        """The first process keeps the record."""

    with processes.deferred() as stop:
        stop.waiting = True
        try:
            with contextlib.suppress(OSError):  # on another machine it need not be there
                os.chdir(cwd)
            device = hardware.resolve_device(config.train.device)
            source = tokens.prepare(config.data)
            _check_same_text(config, source, text)
            with precision.applied(config.precision, device) as got:
                job, _origin = setup.trainer(config, device, got, source)
                if goes_on:
                    job.restore({}, {})
                _steps(job, config, stop, leave, leave)
        except KeyboardInterrupt as interrupt:
            return processes.code(stop.asked or interrupt)
        except Exception as problem:
            _, line = _classify(problem, config, None)
            log.error("process %d of %d: %s", distributed.rank() + 1, distributed.world_size(), line)
            return 1
    return 0


def _check_memory(config: RunConfig, need: int, here: setup.Hardware) -> None:
    """Fail before the system would kill the whole sweep for one job's memory.

    Raises:
        MemoryError: the estimate is a tenth above what is free; the text names a batch that fits.
    """
    if here.free is None or need <= 1.1 * here.free:
        return
    batch = setup.fitting_batch(config, here)
    hint = f"try train.batch_size={batch}" if batch else "try a smaller model or a shorter train.seq_len"
    raise MemoryError(f"needs about {need / 2**30:.1f} GiB of memory and {here.free / 2**30:.1f} are free; {hint}")


def _mfu(config: RunConfig, device: torch.device, got: Precision, tokens_per_second: float) -> float | None:
    from gpt2exp.training import hardware

    peak = hardware.peak_flops(hardware.device_name(device), got.effective) if device.type == "cuda" else None
    if peak is None or got.emulated:
        return None
    return config.model.flops_per_token(config.train.seq_len) * tokens_per_second / (peak * distributed.world_size())


def _classify(problem: Exception, config: RunConfig, need: int | None) -> tuple[str, str]:
    """The state and the one line that an exception leaves; `need`: the bytes that the run was estimated to take."""
    import torch

    from gpt2exp.training.trainer import Diverged

    line = first_line(problem)
    if isinstance(problem, Diverged):
        return "diverged", line
    if distributed.is_peer_lost(problem):
        return "failed", f"one of the run's {distributed.world_size()} processes ended, or can no longer be reached"
    if isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem):
        smaller = AUTO if config.train.batch_size == AUTO else config.train.sequences // 2
        hint = f"try train.batch_size={smaller}" if smaller else "try a smaller model or a shorter train.seq_len"
        return "failed", f"out of memory, where about {(need or 0) / 2**30:.1f} GiB were expected to be enough; {hint}"
    if isinstance(problem, (BadRequest, AssetError, MemoryError)):
        return "failed", line
    if isinstance(problem, OSError) and problem.strerror:
        return "failed", f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return "failed", f"{type(problem).__name__}: {line}"


def _for_wandb(values: dict[str, Any]) -> dict[str, Any]:
    """Without what wandb already has as the run's config, and what a summary there cannot show."""
    return {key: value for key, value in values.items() if key not in ("config", "overrides", "started")}
