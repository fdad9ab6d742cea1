"""The command `gpt2exp`: compose, check, build, fit, summarise.

A request goes one way: `plan.make` composes and checks every job of it without torch and without writing; the token
file is made ready; Hydra runs `job` for each; the exit code is read off the folders. Nothing imports this module.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gpt2exp import (
    build,
    engines,
    estimate,
    help,
    owner,
    parallel,
    plan,
    record,
    resume,
    secret,
    signals,
    tokens,
    view,
)
from gpt2exp import command as commands
from gpt2exp.assets import AssetError
from gpt2exp.config import (
    AUTO,
    BadRequest,
    DeviceName,
    Distributed,
    Fallback,
    PrecisionName,
    RunConfig,
    parse,
    plain,
)

if TYPE_CHECKING:
    import torch

    from gpt2exp import checkpoint
    from gpt2exp.mirror import Mirror
    from gpt2exp.precision import Precision
    from gpt2exp.trainer import Trainer

BEGAN = time.monotonic()
"""When this process began, near enough: the first job's start-up counts from here."""

FEW = 12
"""Runs of a sweep that its closing table still shows one by one."""

log = logging.getLogger("gpt2exp")


def main() -> None:
    """The console script."""
    code = command(sys.argv[1:])
    gc.freeze()  # the interpreter's last collection would walk all of torch for half a second
    sys.exit(code)


def command(argv: list[str]) -> int:
    """Carry out a command line; the exit code: 0 done, 1 a run failed, 2 a bad request, 130/143 interrupted."""
    argv = sorted(argv, key=lambda text: text not in ("-m", "--multirun"))  # argparse wants flags before overrides
    return commands.carry_out("gpt2exp", lambda: _understand(argv), unwritable)


def unwritable(error: OSError) -> str:
    """The line for a disk that filled up or a folder that was taken away."""
    return f"{commands.unwritable(error)}: hydra.run.dir=FOLDER, or hydra.sweep.dir for a sweep"


def _understand(argv: list[str]) -> int:
    secret.check_typed(argv)
    args = commands.strict(get_args_parser(), "gpt2exp").parse_args(argv)
    if args.help:
        view.terminal().print(help.text(), markup=False)
        return 0
    with parallel.joined():
        if not parallel.first():
            return _follow()
        try:
            return _carry_out(args, argv)
        finally:
            parallel.dismiss()


def _carry_out(args: argparse.Namespace, argv: list[str]) -> int:
    if args.hydra_help or args.shell_completion:  # Hydra's own, about no request
        _hydra(argv)
        return 0
    request = resume.make(args) or plan.make(args)
    if request.multirun and parallel.size() > 1:
        why = "under torchrun every job would share out its batch over the same processes"
        remedy = "start sweeps as gpt2exp -m ..., a device a job by hydra/launcher, or torchrun for one run at a time"
        raise BadRequest(f"a sweep: {why}; {remedy}")
    words = [word for word in argv if word not in args.overrides]  # flags
    if request.resumed:
        words += ["-m"] if request.multirun else []
        words += ["--config-dir", request.config_dir] if request.config_dir else []
        words += request.texts
        if request.cwd is not None:
            os.chdir(request.cwd)
    else:
        words = argv
    if args.cfg or args.info:
        _hydra(words)
        return 0
    to_do = [job for job in request.jobs if not job.done]
    _make_ready(request, to_do)
    if any(job.config.dry_run for job in request.jobs):
        if to_do:
            view.terminal().print(view.plan_table([_dry_row(job) for job in to_do]))
        return 0
    notes = list(request.notes)
    if parallel.size() == 1 and any(job.config.distributed is Distributed.fsdp for job in to_do):
        notes.append("distributed=fsdp: one process has all of the model; see gpt2exp --help for torchrun")
    for note in notes:
        view.terminal().print(f"note: {note}", markup=False, soft_wrap=True)
    if not to_do and not request.multirun:
        return 0
    with contextlib.ExitStack() as engine:
        if request.launcher is not None and to_do:
            engine.enter_context(engines.running(request.launcher, request.folder))
        with plan.claimed(request, words):
            if request.resumed and not request.multirun:
                run(request.folder)
            elif to_do:
                _launch(request, words)
            engine.close()
            return _outcome(request)


def _launch(request: plan.Plan, words: list[str]) -> None:
    try:
        _hydra([*words, *request.pins])
    except KeyboardInterrupt:
        if request.multirun:
            _say_how_to_go_on(request)
        raise
    except Exception as problem:
        if request.local and request.names:  # Hydra's own launcher and sweeper raise nothing of a job's
            raise
        text = str(problem).strip() or type(problem).__name__
        view.refuse(f"the sweep ended early: {text.splitlines()[0]}", trace=view.wants_traces())
        _say_how_to_go_on(request)


def _say_how_to_go_on(request: plan.Plan) -> None:
    if request.launcher is not None and request.launcher._target_ == engines.SLURM:
        text = "the jobs submitted go on: scancel ends them, gpt2exp-compare compares them; then, for the rest,"
        view.terminal().print(text, markup=False)
    if request.names:
        place = view.short(request.folder.absolute())
        view.terminal().print(f"to go on: gpt2exp resume={place}", markup=False, soft_wrap=True)


def _hydra(argv: list[str]) -> None:
    """Hydra's own main over `job`, its exceptions let through to us instead of ending the process."""
    sys.argv[1:] = argv
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=f"pkg://{plan.CONF}", config_name="config", version_base="1.3")(job)()
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _make_ready(request: plan.Plan, to_do: list[plan.Job]) -> None:
    """Fetch every text, tokenised, and all weights of the jobs to do; refuse what does not fit them or this machine."""
    sources: dict[tuple[Any, ...], tokens.TokenFile] = {}  # jobs that share a text read it once
    checked: list[object] = []  # and those that share weights look at them once
    for job in to_do:
        config = job.config
        parallel.check(config)
        text = config.data.text
        if text not in sources:
            sources[text] = tokens.prepare(config.data)
        build.check_text(build.smallest(config), sources[text])
        weights = config.init, config.model
        # what goes on has its weights in a checkpoint
        if weights not in checked and not record.saved(request.folder / job.folder):
            build.check_weights(config.init, config.model)
            checked.append(weights)
        if request.resumed:
            _check_same_text(config, sources[text], record.text_of(request.folder / job.folder))
        named = config.train.device not in (DeviceName.auto, DeviceName.cpu)
        strict = config.precision.name is PrecisionName.tf32 and config.precision.fallback is Fallback.error
        if request.local and (named or strict):
            from gpt2exp import precision, runtime

            with precision.applied(config.precision, runtime.resolve_device(config.train.device)):
                pass


def _check_same_text(config: RunConfig, source: tokens.TokenFile, before: str | None) -> None:
    if before not in (None, source.sha256):
        why = "not the text that the run began with"
        raise BadRequest(f"data.path={config.data.path}: {why}; put that text back, or name where it lies now")


def _dry_row(job: plan.Job) -> dict[str, str]:
    from gpt2exp import precision, runtime

    config = job.config
    device = runtime.resolve_device(config.train.device)
    with precision.applied(config.precision, device) as got:
        free, source = runtime.free_memory(device), tokens.prepare(config.data)
        config, need = build.settled(config, device, got, source, free)
    return {
        "run": " ".join(job.overrides) or "defaults",
        "parameters": f"{config.model.parameters['total']:,}",
        "batch": f"{config.train.sequences} x {config.train.seq_len}",
        "steps": f"{config.train.steps:,}",
        "tokens": f"{config.train.steps * config.train.step_tokens:,}",
        "memory GiB": f"{need / 2**30:.2f}",
        "precision": f"{got.requested}: {got.effective}{' emulated' if got.emulated else ''} on {device.type}",
    }


def job(cfg: DictConfig) -> float | None:
    """Hydra's task: one run, in the folder Hydra made. Records every outcome; raises only what should end a sweep.

    Of a sweep's job it returns the loss that a sweeper is to minimise, infinite if the run diverged or failed.
    """
    view.show_warnings()  # in a process that another launcher started
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    config = parse(cfg)
    sweep = record.sweep_of(folder)
    if sweep is None:
        with _record_kept():
            run(folder)
        return None
    engines.enter(str(hydra_config.launcher._target_), sweep, config.train.device)
    if record.row(folder, sweep)["state"] not in ("done", "diverged"):  # in an earlier launch
        _job_of_sweep(cfg, config, folder, sweep)
    return record.objective(folder)


def _job_of_sweep(cfg: DictConfig, config: RunConfig, folder: Path, sweep: Path) -> None:
    hydra_config = HydraConfig.get()
    isolate = config.sweep.isolate and not signals.requeued_by()  # submitit gives a job its own process already
    try:
        with _record_kept(), contextlib.nullcontext() if isolate else owner.held(folder):
            plan.describe(folder, cfg, hydra_config.overrides.task, cast("DictConfig", HydraConfig.instance().cfg))
            if config.sweep.fail_fast and _failed_before(sweep):
                return
            if isolate:
                _in_own_process(folder)
            else:
                run(folder, BEGAN if hydra_config.job.num == 0 else time.monotonic())
    except BadRequest as error:  # someone goes on with this job alone
        log.warning("%s", error)


@contextlib.contextmanager
def _record_kept() -> Iterator[None]:
    """A line where the record itself cannot be written: the folder says as much as it could."""
    try:
        yield
    except OSError as error:
        log.error("%s", unwritable(error))


def _failed_before(sweep: Path) -> bool:
    """Whether a job of this launch failed or diverged; those of an earlier one have their second chance."""
    launched = json.loads((sweep / record.SWEEP).read_text(encoding="utf-8"))["launched"]
    statuses = (record.read_status(folder) for folder in record.runs_below(sweep))
    return any(status["state"] in ("failed", "diverged") and status["updated"] > launched for status in statuses)


def _in_own_process(folder: Path) -> None:
    # in a session of its own, so that Ctrl-C reaches it once, through us
    process = subprocess.Popen([sys.executable, "-m", "gpt2exp.isolated", str(folder)], start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # it saves itself and records that it was interrupted
        try:
            process.wait()
        except KeyboardInterrupt:  # a second one
            process.kill()
        raise
    if code not in (2, 130, 143) and not (folder / "summary.json").is_file():  # it had no chance to say so itself
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the system may have run out of memory, try a smaller train.batch_size" if code == -9 else ""
        step = record.read_status(folder)["step"]
        record.write_status(folder, "failed", step, f"the job's process ended: {cause}{hint}")
    if code in (130, 143):
        raise KeyboardInterrupt


def run(folder: Path, began: float = BEGAN) -> dict[str, Any]:
    """Train as the configuration in `folder`/.hydra says and return the summary; failures are recorded, not raised.

    The run goes on from the newest whole checkpoint in the folder, if there is one; no other process may be at work
    there (`owner.held`).

    Raises:
        KeyboardInterrupt: a signal asked for an end; the run was recorded as interrupted, or as done if it was by then.
        OSError: the record cannot be written.
    """
    config = parse(dict(OmegaConf.load(folder / ".hydra" / "config.yaml")))
    overrides = [str(text) for text in OmegaConf.load(folder / ".hydra" / "overrides.yaml")]
    sweep = record.sweep_of(folder)
    free = build.prepare_heap(config)
    from gpt2exp import mirror

    with signals.deferred() as stop:
        facts: dict[str, Any] = {"overrides": overrides, "config": plain(config), "seed": config.seed}
        name = config.wandb.name or ",".join(overrides) or "defaults"
        about = {"name": name[:128], "group": config.wandb.group or (sweep and sweep.name), "tags": config.wandb.tags}
        saved = _newest_checkpoint(folder)
        told = {"config": facts["config"]}
        if saved is None:
            files = record.Record(folder, facts, began=began)
        else:
            parts = saved.state["parts"]
            metrics = record.kept_metrics(folder)[: saved.step]
            files = record.Record(folder, facts, began=began, metrics=metrics, parts=parts)
            about["notes"] = f"goes on at step {saved.step} from {parts[0]['wandb']}"
            told["config"] = facts["config"] | {"goes_on_from": parts[0]["wandb"], "goes_on_at_step": saved.step}
        wandb = mirror.Mirror(config.wandb, folder, about | told)
        progress = record.progress(sweep, folder) if sweep else None
        with view.View(folder, config, overrides, progress) as shown:
            try:
                _train(config, files, wandb, shown, free, stop, saved)
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
    from gpt2exp import checkpoint

    return checkpoint.newest(folder, at_most=len(record.kept_metrics(folder)))


def _train(
    config: RunConfig,
    files: record.Record,
    wandb: Mirror,
    shown: view.View,
    free: int | None,
    stop: signals.Stop,
    saved: checkpoint.Checkpoint | None,
) -> None:
    import torch

    from gpt2exp import checkpoint, precision, runtime

    device = runtime.resolve_device(config.train.device)
    runtime.reset_peak_memory(device)
    source = tokens.prepare(config.data)
    if saved is not None:
        _check_same_text(config, source, saved.state["data"]["sha256"])
        # what was decided then holds
        config = replace(config, train=replace(config.train, tokens_per_step=None, **saved.state["settled"]))
    with precision.applied(config.precision, device) as got:
        if device.type == "cuda":
            free = runtime.free_memory(device)
        config, need = build.settled(config, device, got, source, free)
        build.check_text(config, source)
        held_out = tokens.held_out(source.tokens, config.data.val_fraction)
        files.facts |= {
            "parameters": config.model.parameters,
            "flops_per_token": config.model.flops_per_token(config.train.seq_len),
            "precision": got.as_dict(),
            "data": source.facts | {"train_tokens": source.tokens - held_out, "val_tokens": held_out},
            "device": f"{device.type}: {runtime.device_name(device)}",
            "processes": parallel.size(),
            "distributed": config.distributed.value if parallel.size() > 1 else None,
            "threads": torch.get_num_threads(),
            "estimated_memory_bytes": need,
            "settled": {key: getattr(config.train, key) for key in estimate.SETTLED},
            "environment": runtime.environment_overrides(),
            **runtime.facts(),
        }
        shown.header(files.facts, files.folder, config)
        _check_memory(config, need, free, got, device)
        parallel.from_first((config, source.sha256, saved is not None, Path.cwd()))
        job = build.trainer(config, device, got, source, saved)
        files.facts["init"] = job.origin
        shown.rows({"weights  ": view.origin_line(files.facts["init"]), "wandb    ": wandb.ready()})
        wandb.describe({"facts": _for_wandb(files.facts)})
        here = {key: files.facts[key] for key in ("device", "processes", "threads", "machine")}
        peak = 0
        if saved is not None:
            job.restore(saved.training(), saved.state)
            runtime.reset_peak_memory(device)  # the file read is none of training's memory
            peak = saved.state["peak_memory_bytes"]
            shown.rows({"goes on  ": f"from {saved.folder.name}, {saved.step} of {config.train.steps} steps done"})
            if all(part.get(key, 1) == here[key] for part in saved.state["parts"] for key in here):
                job.step_seconds = [row["step_ms"] / 1e3 for row in files.metrics]
                job.began_at = [part["from_step"] for part in files.parts]
            else:
                log.warning("other hardware or threads than before: the speed is that of the steps from here on")
        from_step = 0 if saved is None else saved.step
        saver = checkpoint.Saver(files.folder, config.checkpoint, from_step, background=device.type != "cpu")
        files.training_begins(**here, wandb=wandb.link())
        stop.waiting = True

        def keep(metrics: dict[str, Any], peak_now: int) -> None:
            nonlocal peak
            peak = max(peak, peak_now)
            files.step(metrics)
            shown.step(metrics)
            if metrics["step"] % config.train.log_every == 0 or job.steps_done == config.train.steps:
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
    stop: signals.Stop,
    keep: Callable[[dict[str, Any], int], None],
    save: Callable[..., None],
) -> None:
    """Train to the end, or until a signal reached one process of the run; all of them do this alike.

    `keep` gets every step's metrics and the peak memory so far, `save` what `Trainer.state` says where that is due.
    """
    from gpt2exp import runtime

    every = config.checkpoint.every
    for metrics in job.fit():
        done, last = job.steps_done, job.steps_done == config.train.steps
        asked, warned, peak = parallel.largest(stop.asked is not None, stop.warned, runtime.peak_memory(job.device))
        keep(metrics, peak)
        if warned or (every and done % every == 0) or (config.checkpoint.save_last if last else asked):
            stop.warned = False
            save(*job.state())
        if asked and not last:
            raise stop.asked or KeyboardInterrupt


def _follow() -> int:
    """What a process does that is not the run's first: the same steps, with nothing written; the exit code."""
    task: Any = parallel.from_first()
    if task is None:  # no run came of it
        return 0
    config, text, goes_on, cwd = task
    build.prepare_heap(config)
    from gpt2exp import precision, runtime

    def leave(*_: Any) -> None:
        """The first process keeps the record."""

    with signals.deferred() as stop:
        stop.waiting = True
        try:
            with contextlib.suppress(OSError):  # on another machine it need not be there
                os.chdir(cwd)
            device = runtime.resolve_device(config.train.device)
            source = tokens.prepare(config.data)
            _check_same_text(config, source, text)
            with precision.applied(config.precision, device) as got:
                job = build.trainer(config, device, got, source)
                if goes_on:
                    job.restore({}, {})
                _steps(job, config, stop, leave, leave)
        except KeyboardInterrupt as interrupt:
            return signals.code(stop.asked or interrupt)
        except Exception as problem:
            log.error("process %d of %d: %s", parallel.rank() + 1, parallel.size(), _classify(problem, config, None)[1])
            return 1
    return 0


def _check_memory(config: RunConfig, need: int, free: int | None, got: Precision, device: torch.device) -> None:
    """Fail before the system would kill the whole sweep for one job's memory.

    Raises:
        MemoryError: the estimate is a tenth above what is free; the text names a batch that fits.
    """
    if free is None or need <= 1.1 * free:
        return
    batch = estimate.fitting_batch(config, free, on_cpu=device.type == "cpu", unfused_attention=got.emulated)
    hint = f"try train.batch_size={batch}" if batch else "try a smaller model or a shorter train.seq_len"
    raise MemoryError(f"needs about {need / 2**30:.1f} GiB of memory and {free / 2**30:.1f} are free; {hint}")


def _mfu(config: RunConfig, device: torch.device, got: Precision, tokens_per_second: float) -> float | None:
    from gpt2exp import runtime

    peak = runtime.peak_flops(runtime.device_name(device), got.effective) if device.type == "cuda" else None
    if peak is None or got.emulated:
        return None
    return config.model.flops_per_token(config.train.seq_len) * tokens_per_second / (peak * parallel.size())


def _classify(problem: Exception, config: RunConfig, need: int | None) -> tuple[str, str]:
    """The state and the one line that an exception leaves; `need`: the bytes that the run was estimated to take."""
    import torch

    from gpt2exp.trainer import Diverged

    text = str(problem).strip().splitlines()
    line = text[0] if text else type(problem).__name__
    if isinstance(problem, Diverged):
        return "diverged", line
    if parallel.lost(problem):
        return "failed", f"one of the run's {parallel.size()} processes ended, or can no longer be reached"
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


def _outcome(request: plan.Plan) -> int:
    """What a sweep came to, if it was one, and the exit code, both from what the folders say."""
    rows = [record.row(folder, request.folder) for folder in record.runs_below(request.folder)]
    done, jobs = sum(row["state"] == "done" for row in rows), len(request.names) or len(rows)
    if request.multirun:
        from gpt2exp.conclude import conclude

        console, place = view.terminal(), view.short(request.folder.absolute())
        title = f"{done} of {jobs} runs done in {place}"
        console.print(view.runs_table(rows, title) if len(rows) <= FEW else title, markup=False)
        conclude(request.folder, console)
        for row in rows:
            if row["state"] != "done":
                view.refuse(f"{row['name']}: {row['state']}{': ' if row['error'] else ''}{row['error'] or ''}")
        offline = ("*/wandb/offline-run-*", "wandb/offline-run-*")  # of the jobs, of the comparison
        if found := [f"{place}/{pattern}" for pattern in offline if any(request.folder.glob(pattern))]:
            console.print(f"to upload: wandb sync {' '.join(found)}", markup=False, soft_wrap=True)
    return 0 if rows and done == max(jobs, len(rows)) else 1


if __name__ == "__main__":
    from gpt2exp import train  # under its own name, by which a launcher's workers find `job`

    train.main()
