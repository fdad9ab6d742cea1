"""The command `gpt2exp`: compose, check, build, fit, summarise.

A request goes one way: `plan.make` composes and checks every job of it without torch and without writing; the token
file is made ready; Hydra runs `job` for each; the exit code is read off the folders. Nothing imports this module.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gpt2exp.config import (
    BadRequest,
    DeviceName,
    Distributed,
    Fallback,
    PrecisionName,
    RunConfig,
    first_line,
    parse,
)
from gpt2exp.data import tokens
from gpt2exp.run import process as processes
from gpt2exp.run import record, secret, terminal, tracking
from gpt2exp.run.job import BEGAN, _check_same_text, _follow, run
from gpt2exp.sweep import engines, help, resume
from gpt2exp.sweep.request import CONF, Job, Plan, as_meant, claimed, describe, make
from gpt2exp.training import distributed, setup

if TYPE_CHECKING:
    pass


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
    return processes.carry_out("gpt2exp", lambda: _understand(argv), unwritable)


def unwritable(error: OSError) -> str:
    """The line for a disk that filled up or a folder that was taken away."""
    return f"{processes.unwritable(error)}: hydra.run.dir=FOLDER, or hydra.sweep.dir for a sweep"


def _understand(argv: list[str]) -> int:
    secret.check_typed(argv)
    argv = [as_meant(word) for word in argv]
    args = processes.strict(get_args_parser(), "gpt2exp").parse_args(argv)
    if args.help:
        terminal.terminal().print(help.text(), markup=False)
        return 0
    with distributed.process_group():
        if not distributed.is_main():
            return _follow()
        try:
            return _carry_out(args, argv)
        finally:
            distributed.release_followers()


def _carry_out(args: argparse.Namespace, argv: list[str]) -> int:
    if args.hydra_help or args.shell_completion:  # Hydra's own, about no request
        _hydra(argv)
        return 0
    request = resume.make(args) or make(args)
    if request.multirun and distributed.world_size() > 1:
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
            terminal.terminal().print(terminal.plan_table([_dry_row(job) for job in to_do]))
        return 0
    notes = list(request.notes)
    ignored = (tracking.ignored(job.config.wandb, sweep=request.multirun, resumed=request.resumed) for job in to_do)
    notes += dict.fromkeys(itertools.chain.from_iterable(ignored))
    if distributed.world_size() == 1 and any(job.config.distributed is Distributed.fsdp for job in to_do):
        notes.append("distributed=fsdp: one process has all of the model; see gpt2exp --help for torchrun")
    for note in notes:
        terminal.terminal().print(f"note: {note}", markup=False, soft_wrap=True)
    if not to_do and not request.multirun:
        return 0
    with contextlib.ExitStack() as engine:
        if request.launcher is not None and to_do:
            engine.enter_context(engines.running(request.launcher, request.folder))
        with claimed(request, words):
            if request.resumed and not request.multirun:
                run(request.folder)
            elif to_do:
                _launch(request, words)
            engine.close()
            return _outcome(request)


def _launch(request: Plan, words: list[str]) -> None:
    try:
        _hydra([*words, *request.pins])
    except KeyboardInterrupt:
        if request.multirun:
            _say_how_to_go_on(request)
        raise
    except Exception as problem:
        if request.local and request.names:  # Hydra's own launcher and sweeper raise nothing of a job's
            raise
        terminal.refuse(f"the sweep ended early: {first_line(problem)}", trace=terminal.wants_traces())
        _say_how_to_go_on(request)


def _say_how_to_go_on(request: Plan) -> None:
    if request.launcher is not None and request.launcher._target_ == engines.SLURM:
        text = "the jobs submitted go on: scancel ends them, gpt2exp-compare compares them; then, for the rest,"
        terminal.terminal().print(text, markup=False)
    if request.names:
        line = f"to go on: {terminal.to_go_on(request.folder.absolute())}"
        terminal.terminal().print(line, markup=False, soft_wrap=True)


def _hydra(argv: list[str]) -> None:
    """Hydra's own main over `job`, its exceptions let through to us instead of ending the process."""
    typed, sys.argv[1:] = sys.argv[1:], argv
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=f"pkg://{CONF}", config_name="config", version_base="1.3")(job)()
    finally:
        sys.argv[1:] = typed
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def _make_ready(request: Plan, to_do: list[Job]) -> None:
    """Fetch every text, tokenised, and all weights of the jobs to do; refuse what does not fit them or this machine."""
    sources: dict[tuple[Any, ...], tokens.TokenFile] = {}  # jobs that share a text read it once
    checked: list[object] = []  # and those that share weights look at them once
    for job in to_do:
        config = job.config
        distributed.check(config)
        text = config.data.text
        if text not in sources:
            sources[text] = tokens.prepare(config.data)
        setup.check_text(setup.smallest(config), sources[text])
        weights = config.init, config.model
        # what goes on has its weights in a checkpoint
        if weights not in checked and not record.saved(request.folder / job.folder):
            setup.check_weights(config.init, config.model)
            checked.append(weights)
        if request.resumed:
            _check_same_text(config, sources[text], record.text_of(request.folder / job.folder))
        named = config.train.device not in (DeviceName.auto, DeviceName.cpu)
        strict = config.precision.name is PrecisionName.tf32 and config.precision.fallback is Fallback.error
        if request.local and (named or strict):
            from gpt2exp.training import hardware, precision

            with precision.applied(config.precision, hardware.resolve_device(config.train.device)):
                pass


def _dry_row(job: Job) -> dict[str, str]:
    from gpt2exp.training import hardware, precision

    config = job.config
    device, length = hardware.resolve_device(config.train.device), config.optimizer.schedule_steps
    with precision.applied(config.precision, device) as got:
        source = tokens.prepare(config.data)
        config, need = setup.settled(config, device, setup.Hardware.of(device, got), source)
    return {
        "run": " ".join(job.overrides) or "defaults",
        "parameters": f"{config.model.parameters['total']:,}",
        "batch": f"{config.train.sequences} x {config.train.seq_len}",
        "steps": f"{config.train.steps:,}" + (f" (schedule {length:,})" if length else ""),
        "tokens": f"{config.train.steps * config.train.step_tokens:,}",
        "memory GiB": f"{need / 2**30:.2f}",
        "precision": f"{got.requested}: {got.effective}{' emulated' if got.emulated else ''} on {device.type}",
    }


def job(cfg: DictConfig) -> float | None:
    """Hydra's task: one run, in the folder Hydra made. Records every outcome; raises only what should end a sweep.

    Of a sweep's job it returns the loss that a sweeper is to minimise, infinite if the run diverged or failed.
    """
    terminal.show_warnings()  # in a process that another launcher started
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
    isolate = config.sweep.isolate and not processes.requeued_by()  # submitit gives a job its own process already
    try:
        with _record_kept(), contextlib.nullcontext() if isolate else processes.held(folder):
            describe(folder, cfg, hydra_config.overrides.task, cast("DictConfig", HydraConfig.instance().cfg))
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
    process = subprocess.Popen([sys.executable, "-m", "gpt2exp.sweep.isolated", str(folder)], start_new_session=True)
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


def _outcome(request: Plan) -> int:
    """What a sweep came to, if it was one, and the exit code, both from what the folders say."""
    rows = [record.row(folder, request.folder) for folder in record.runs_below(request.folder)]
    done, jobs = sum(row["state"] == "done" for row in rows), len(request.names) or len(rows)
    if request.multirun:
        from gpt2exp.compare import __main__ as conclude

        console, place = terminal.terminal(), terminal.short(request.folder.absolute())
        title = f"{done} of {jobs} runs done in {place}"
        console.print(terminal.runs_table(rows, title) if len(rows) <= FEW else title, markup=False)
        kept = conclude.conclude(request.folder, console)
        for row in rows:
            if row["state"] != "done":
                terminal.refuse(f"{row['name']}: {row['state']}{': ' if row['error'] else ''}{row['error'] or ''}")
        offline = ("*/wandb/offline-run-*", "wandb/offline-run-*")  # of the jobs, of the comparison
        place = shlex.quote(terminal.place(request.folder.absolute()))
        found = [f"{place}/{pattern}" for pattern in offline if any(request.folder.glob(pattern))]
        for row in rows:
            if elsewhere := row.get("config", {}).get("wandb", {}).get("dir"):
                pattern = f"wandb/offline-run-*-{row['parts'][-1]['wandb']}"
                found += map(terminal.pasted, Path(elsewhere).absolute().glob(pattern))
        if kept is not None and not kept.is_relative_to(request.folder.absolute()):
            found.append(terminal.pasted(kept))
        if found:
            console.print(f"to upload: wandb sync {' '.join(found)}", markup=False, soft_wrap=True)
    return 0 if rows and done == max(jobs, len(rows)) else 1
