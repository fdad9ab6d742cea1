"""One run: from the configuration in a folder's `.hydra` to its `summary.json`."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp import choices
from gpt2exp.config import RunConfig
from gpt2exp.data import tokens
from gpt2exp.data.assets import AssetError
from gpt2exp.model import size
from gpt2exp.run import process, record, terminal, tracking
from gpt2exp.run.metrics import Summary
from gpt2exp.schema import parse, plain
from gpt2exp.section import AUTO, BadRequest, first_line
from gpt2exp.training import distributed, setup

if TYPE_CHECKING:
    import torch

    from gpt2exp.run import checkpoint
    from gpt2exp.training.precision import Precision
    from gpt2exp.training.trainer import Trainer


log = logging.getLogger("gpt2exp")
BEGAN = time.monotonic()  # when this process began, nearly: the start-up time of the first job counts from here


def run_folder(folder: Path, began: float = BEGAN) -> Summary:
    """Train as `folder`/.hydra says and return the summary. A failure is recorded, not raised.

    The run resumes from the newest whole checkpoint in the folder, if there is one. The caller holds the folder's lock
    (`process.held`). Raises KeyboardInterrupt after a signal stopped it, OSError if the record cannot be written.
    """
    config, _, overrides = record.read_config(folder)
    with process.deferred() as stop, _session(folder, config, overrides, began, stop) as session:
        run_record = session.run_record
        try:
            _train(session, config)
            state, error = "done", None
        except KeyboardInterrupt as interrupt:
            stop.asked = stop.asked or interrupt
            state, error = "interrupted", "stopped by a signal"
        except Exception as problem:
            state, error = _classify(problem, config, run_record.facts.get("estimated_memory_bytes"))
            log.error("%s", error, exc_info=True)
        stop.waiting = True
        summary = run_record.finish(state, error)
        session.view.close(summary, folder, session.mirror.finish(_for_wandb(summary), failed=state != "done"))
    if stop.asked is not None:
        raise stop.asked
    return summary


@dataclass
class Session:
    """What rank 0 keeps while a run trains: its record, its lines, wandb, its checkpoints."""

    run_record: record.Record
    mirror: tracking.Mirror
    view: terminal.View
    stop: process.Stop
    saved: checkpoint.Checkpoint | None  # the checkpoint that the run resumes from
    saver: checkpoint.Saver | None = None
    peak: int = 0  # peak memory in bytes, the largest of any rank

    def keep(self, metrics: dict[str, Any], peak: int) -> None:
        """Record and show a step's metrics, and mirror them where due; `peak`: the field, so far."""
        self.peak = max(self.peak, peak)
        self.run_record.step(metrics)
        self.view.step(metrics)
        if terminal.due(metrics, self.view.config.train):
            self.mirror.log(metrics)

    def save(self, weights: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]) -> None:
        """Write a checkpoint of `Trainer.state`."""
        assert self.saver is not None
        self.run_record.sync()
        kept = ("config", "init", "settled", "versions", "data", "precision", "device", "threads", "machine")
        state = {**numbers, **{key: self.run_record.facts[key] for key in kept}}
        self.saver.save(weights, tensors, state | {"parts": self.run_record.parts, "peak_memory_bytes": self.peak})


@contextlib.contextmanager
def _session(
    folder: Path, config: RunConfig, overrides: list[str], began: float, stop: process.Stop
) -> Iterator[Session]:
    """Open the record, wandb and the terminal of a run that begins or resumes."""
    sweep = record.sweep_of(folder)
    again = (folder / "status.json").is_file() and not os.environ.get("WANDB_RESUME")
    # a signal to stop a sweep goes to the process that the status names: this one from here on
    record.write_status(folder, "running", record.read_status(folder)["step"])
    saved, parts, metrics = None, [], []
    facts: dict[str, Any] = {"overrides": overrides, "config": plain(config), "seed": config.seed}
    name, group = config.wandb.name or ",".join(overrides) or "defaults", config.wandb.group or (sweep and sweep.name)
    about = {"name": name[:128], "group": group, "tags": config.wandb.tags, "config": facts["config"]}
    if record.saved(folder):  # a new run does not wait for torch here
        from gpt2exp.run import checkpoint

        metrics = record.kept_metrics(folder)
        saved = checkpoint.newest(folder, at_most=len(metrics))
    if saved is not None:
        parts, metrics = saved.state["parts"], metrics[: saved.step]
        origin = parts[0]["wandb"]
        about["notes"] = f"goes on at step {saved.step} from {origin}"
        about["config"] = facts["config"] | {"goes_on_from": origin, "goes_on_at_step": saved.step}
    run_record = record.Record(folder, facts, began=began, metrics=metrics if saved else (), parts=parts)
    mirror = tracking.Mirror(config.wandb, folder, about, own=again or sweep is not None)
    with terminal.View(folder, config, overrides, record.progress(sweep, folder) if sweep else None) as view:
        yield Session(run_record, mirror, view, stop, saved)


def _train(session: Session, config: RunConfig) -> None:
    """Settle what the configuration leaves open, build the trainer, train to the end."""
    from gpt2exp.training import hardware

    run_record = session.run_record
    hardware.reset_peak_memory(hardware.resolve_device(config.train.device))
    source = tokens.prepare(config.data)
    if session.saved is not None:  # as the run's first part settled it
        check_same_text(config, source, session.saved.state["data"]["sha256"])
        config = setup.as_begun(config, session.saved.state)
    with setup.ready(config, source) as ready:
        setup.check_text(ready.config, source)
        _describe(session, ready)
        _check_memory(ready)
        distributed.broadcast((plain(ready.config), source.sha256, session.saved is not None, Path.cwd()))
        trainer = _build(session, ready)
        assert session.saver is not None
        try:
            _train_steps(trainer, ready.config, session.stop, session)
        finally:  # also of a run that diverged or was stopped
            session.saver.wait()
            if run_record.metrics:
                run_record.measured |= {**trainer.timing(), "peak_memory_bytes": session.peak}
        speed = run_record.measured["tokens_per_second"]
        run_record.measured["mfu"] = _mfu(ready.config, ready.device, ready.got, speed)


def check_same_text(config: RunConfig, source: tokens.TokenFile, before: str | None) -> None:
    """Raise `BadRequest` if the run began with another text: `before`, its sha256, if known."""
    if before not in (None, source.sha256):
        why = "not the text that the run began with"
        raise BadRequest(f"data.path={config.data.path}: {why}; put that text back, or name where it lies now")


def _describe(session: Session, ready: setup.Ready) -> None:
    """Record and show what is about to run."""
    import torch

    from gpt2exp.training import hardware

    config, device, source, world_size = ready.config, ready.device, ready.source, distributed.world_size()
    held_out = tokens.held_out(source.tokens, config.data.val_fraction)
    session.run_record.facts |= {
        "parameters": size.parameters(config.model),
        "flops_per_token": size.flops_per_token(config.model, config.train.seq_len),
        "precision": asdict(ready.got),
        "data": source.facts | {"train_tokens": source.tokens - held_out, "val_tokens": held_out},
        "device": f"{device.type}: {hardware.device_name(device)}",
        "processes": world_size,
        "distributed": config.distributed.value if world_size > 1 else None,
        "threads": torch.get_num_threads(),
        "estimated_memory_bytes": ready.need,
        "outside": choices.about(config),
        "settled": {key: getattr(config.train, key) for key in setup.SETTLED},
        **record.facts(),
    }
    session.view.header(session.run_record.facts, session.run_record.folder, config)


def _check_memory(ready: setup.Ready) -> None:
    """Raise `MemoryError` if the estimate is a tenth above what is free: the system would kill the whole sweep."""
    need, free = ready.need, ready.here.free
    if free is not None and need > 1.1 * free:
        hint = _smaller(setup.fitting_batch(ready.config, ready.here))
        raise MemoryError(f"needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; {hint}")


def _smaller(batch: int | str | None) -> str:
    return f"try train.batch_size={batch}" if batch else "try a smaller model or a shorter train.seq_len"


def _build(session: Session, ready: setup.Ready) -> Trainer:
    """The trainer at its first step, or where the checkpoint left it; from here on a signal waits for a step's end."""
    from gpt2exp.run import checkpoint

    run_record, saved, view = session.run_record, session.saved, session.view
    trainer, run_record.facts["init"] = setup.trainer(ready, saved)
    view.rows({"weights  ": terminal.origin_line(run_record.facts["init"]), "wandb    ": session.mirror.ready()})
    session.mirror.describe({"facts": _for_wandb(run_record.facts)})
    here = {key: run_record.facts[key] for key in ("device", "processes", "threads", "machine")}
    if saved is not None:
        _restore(session, trainer, saved, here)
        view.rows({"goes on  ": f"from {saved.folder.name}, {saved.step} of {ready.config.train.steps} steps done"})
    from_step, background = saved.step if saved else 0, ready.device.type != "cpu"
    session.saver = checkpoint.Saver(run_record.folder, ready.config.checkpoint, from_step, background=background)
    run_record.training_begins(**here, wandb=session.mirror.link())
    session.stop.waiting = True
    return trainer


def _restore(session: Session, trainer: Trainer, saved: checkpoint.Checkpoint, here: dict[str, Any]) -> None:
    """Resume from a checkpoint; the times of its steps count where the hardware and threads are the same."""
    from gpt2exp.training import hardware

    trainer.restore(saved.training(), saved.state)
    hardware.reset_peak_memory(trainer.device)  # reading the file is no part of training
    session.peak = saved.state["peak_memory_bytes"]
    if all(part.get(key, 1) == here[key] for part in saved.state["parts"] for key in here):
        steps = session.run_record.metrics
        trainer.step_seconds = [step["step_ms"] / 1e3 for step in steps]
        trainer.step_waits = [step["waited_ms"] / 1e3 if "waited_ms" in step else None for step in steps]
        trainer.began_at = [part["from_step"] for part in session.run_record.parts]
    else:
        log.warning("other hardware or threads than before: the speed is that of the steps from here on")


def _train_steps(trainer: Trainer, config: RunConfig, stop: process.Stop, session: Session | None = None) -> None:
    """Train to the end, or until a signal has reached one rank; every rank stops at the same step.

    `session`: rank 0's, which alone writes.
    """
    from gpt2exp.training import hardware

    every = config.checkpoint.every
    for metrics in trainer.fit():
        done, last = trainer.steps_done, trainer.steps_done == config.train.steps
        peak = hardware.peak_memory(trainer.device)
        asked, warned, peak = distributed.all_max(stop.asked is not None, stop.warned, peak)
        if session is not None:
            session.keep(metrics, peak)
        if warned or (every and done % every == 0) or (config.checkpoint.save_last if last else asked):
            stop.warned = False
            state = trainer.state()
            if session is not None:
                session.save(*state)
        if asked and not last:
            raise stop.asked or KeyboardInterrupt


def follow() -> int:
    """What a rank other than 0 does: the same steps, with nothing written. Returns the exit code."""
    task: Any = distributed.broadcast()
    if task is None:  # rank 0 has no run to start
        return 0
    asked, text, goes_on, cwd = task
    choices.trust()  # the first process was asked whether this code may run
    choices.admit(asked)
    config = parse(asked)
    with process.deferred() as stop:
        stop.waiting = True
        try:
            with contextlib.suppress(OSError):  # on another machine it need not be there
                os.chdir(cwd)
            source = tokens.prepare(config.data)
            check_same_text(config, source, text)
            with setup.ready(config, source) as ready:
                trainer, _ = setup.trainer(ready)
                if goes_on:
                    trainer.restore({}, {})
                _train_steps(trainer, config, stop)
        except KeyboardInterrupt as interrupt:
            return process.code(stop.asked or interrupt)
        except Exception as problem:
            where, why = f"{distributed.rank() + 1} of {distributed.world_size()}", _classify(problem, config, None)[1]
            log.error("process %s: %s", where, why)
            return 1
    return 0


def _mfu(config: RunConfig, device: torch.device, got: Precision, tokens_per_second: float) -> float | None:
    from gpt2exp.training import hardware

    peak = hardware.peak_flops(hardware.device_name(device), got.effective) if device.type == "cuda" else None
    if peak is None or got.emulated:
        return None
    flops = size.flops_per_token(config.model, config.train.seq_len)
    return flops * tokens_per_second / (peak * distributed.world_size())


def _classify(problem: Exception, config: RunConfig, need: int | None) -> tuple[str, str]:
    """The state and the one line for an exception; `need`: the estimated bytes of memory."""
    import torch

    from gpt2exp.training.trainer import Diverged

    line = first_line(problem)
    if isinstance(problem, Diverged):
        return "diverged", line
    if distributed.is_peer_lost(problem):
        return "failed", f"one of the run's {distributed.world_size()} processes ended, or can no longer be reached"
    if isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem):
        hint = _smaller(AUTO if config.train.batch_size == AUTO else config.train.sequences // 2)
        return "failed", f"out of memory, where about {(need or 0) / 2**30:.1f} GiB were expected to be enough; {hint}"
    if isinstance(problem, (BadRequest, AssetError, MemoryError)):
        return "failed", line
    if isinstance(problem, OSError) and problem.strerror:
        return "failed", f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    return "failed", f"{type(problem).__name__}: {line}"


def _for_wandb(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values without what wandb has already as the run's config, and what its summary cannot show."""
    return {key: value for key, value in values.items() if key not in ("config", "overrides", "started")}
