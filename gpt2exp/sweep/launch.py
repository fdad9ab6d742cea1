"""The command `gpt2exp`: a request is composed and checked, its folders are written, and each is run.

One run: `_run_jobs` calls `run_folder` (run/job.py), which trains as the folder says.
A sweep: `_run_jobs` calls `_run_job` for one job after another, and this calls `run_folder` unless the job is done.
With `sweep.isolate=true`, `_run_job` starts `python -m gpt2exp.sweep.launch RUN_DIR`, which calls `run_folder`.
With a launcher or a sweeper of Hydra's, `_run_jobs` starts that, and it calls `run_for_hydra`, which calls `_run_job`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override
from omegaconf import DictConfig

from gpt2exp import choices
from gpt2exp.config import DeviceName, Distributed, Fallback, PrecisionName, RunConfig
from gpt2exp.data import tokens
from gpt2exp.model import size
from gpt2exp.run import process, record, secret, terminal, tracking
from gpt2exp.run.job import BEGAN, check_same_text, follow, run_folder
from gpt2exp.run.metrics import TAKEN
from gpt2exp.schema import is_housekeeping
from gpt2exp.section import BadRequest, first_line, home, override_key, require
from gpt2exp.sweep import composing, engines, help, reuse, tuning
from gpt2exp.sweep.composing import Job
from gpt2exp.sweep.overrides import as_meant
from gpt2exp.sweep.request import Request, folder_name, new_request, request_folder
from gpt2exp.sweep.resume import resumed_request
from gpt2exp.training import distributed, outside, setup

WHERE = ": hydra.run.dir=FOLDER, or hydra.sweep.dir for a sweep"  # how to name another folder to write to
FEW = 12  # the closing lines list the runs of a sweep that has at most so many
log = logging.getLogger("gpt2exp")


def main() -> None:
    """The console script."""
    code = command(sys.argv[1:])
    gc.freeze()  # the interpreter's last collection would walk all of torch for half a second
    sys.exit(code)


def command(argv: list[str]) -> int:
    """Carry out a command line; the exit code: 0 done, 1 a run failed, 2 a bad request, 130/143 interrupted."""
    argv = sorted(argv, key=lambda text: text not in ("-m", "--multirun"))  # argparse wants flags before overrides
    return process.carry_out("gpt2exp", lambda: _parse_and_run(argv), WHERE)


def parsed(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse a command line. Returns the flags and overrides, and the words in Hydra's grammar, without `--trust`.

    From here on, code from outside may run where the command line allows it. `BadRequest` if a word holds a credential.
    """
    secret.check_typed(argv)
    words = [as_meant(word) for word in argv]
    args = composing.arguments(words)
    choices.allow(composing.config_folder(args), Path.cwd())
    choices.trust(args.trust)
    return args, [word for word in words if word != "--trust"]


def _parse_and_run(argv: list[str]) -> int:
    args, argv = parsed(argv)
    if args.help:
        terminal.say(help.text(composing.config_folder(args)))
        return 0
    with distributed.process_group():
        if not distributed.is_main():
            return follow()
        try:
            return _run_command_line(args, argv)
        finally:
            distributed.release_followers()


def _run_command_line(args: argparse.Namespace, argv: list[str]) -> int:
    if args.hydra_help or args.shell_completion:
        composing.call_hydra(argv, run_for_hydra)
        return 0
    request = resumed_request(args) or new_request(args)
    flags = [word for word in argv if word not in args.overrides]
    with contextlib.chdir(request.cwd) if request.cwd is not None else contextlib.nullcontext():
        if args.cfg or args.info:
            composing.call_hydra([*flags, *request.argv] if request.resumed else argv, run_for_hydra)
            return 0
        return run_request(request, argv, BEGAN)


def run_request(request: Request, argv: list[str], began: float) -> int:
    """Prepare the jobs to do, write their folders and run them; the exit code: 0 all done, 1 one is not.

    `argv` is what a sweep's folder records; `began`: `time.monotonic()` from which the first job's start-up counts.

    Raises:
        BadRequest: the request does not fit the text, the weights or this machine. Nothing is written.
        KeyboardInterrupt: a signal stopped it; the runs that had begun are saved.
    """
    if request.multirun and distributed.world_size() > 1:
        why = "torchrun would share out every job over the same processes"
        raise BadRequest(f"a sweep: {why}; start sweeps as gpt2exp -m ..., a device a job by hydra/launcher")
    to_do, tuning_to_do = request.to_do, request.tuning_to_do
    texts = _fetch_and_check(request, [*tuning_to_do, *to_do])
    if request.tuning_jobs:  # the jobs to compare have their settings once their arms are tuned
        tuning_to_do = _reusing(tuning_to_do, texts, request.folder)
    elif request.multirun:
        to_do = _reusing(to_do, texts, request.folder)
    if to_do and (prior := to_do[0].config.sweep.prior):
        _show_prior(Path(home(prior)), to_do[0].config.sweep.looks)
    if any(job.config.dry_run for job in request.jobs):
        _show_dry([job for job in to_do if not request.looks or job.config.seed == to_do[0].config.seed])
        if request.looks:
            terminal.say(f"the runs of one seed, of {request.stopping_rule['max_seeds']} at most")
        if request.tuning:
            terminal.say(tuning.announced(request.tuning, len(tuning_to_do), len(to_do)))
        return 0
    for note in _notes(request, to_do):
        terminal.say(f"note: {note}")
    if not to_do and not request.multirun:
        return 0
    with contextlib.ExitStack() as engine:
        if request.launcher is not None and (to_do or tuning_to_do):
            engine.enter_context(engines.running(request.launcher, request.folder))
        with request_folder(request, argv):
            if request.tuning_jobs:
                if tuning_to_do:
                    _run_jobs(request, tuning_to_do, argv, began)
                    began = time.monotonic()
                to_do, said = tuning.settle(request.folder, to_do)
                to_do = _reusing(to_do, texts, request.folder)
                for line in said:
                    terminal.say(line)
            needless = _needless_seeds(request.folder)
            if to_do := [job for job in to_do if job.config.seed not in needless]:
                _run_jobs(request, to_do, argv, began)
            engine.close()
            return _outcome(request)


def _reusing(jobs: list[Job], texts: dict[tuple[Any, ...], str], folder: Path) -> list[Job]:
    """Find the earlier runs that count as these jobs, and print what was found."""
    jobs, lines = reuse.found(jobs, texts, folder)
    for line in lines:
        terminal.say(f"sweep.reuse: {line}")
    return jobs


def _notes(request: Request, to_do: list[Job]) -> Iterator[str]:
    yield from request.notes
    if request.looks and request.stopping_rule["margin"] is None:
        why = f"an axis without a difference takes all {request.stopping_rule['max_seeds']} seeds"
        yield f"without sweep.margin no axis can be called indistinguishable: {why}"
    ignored = (tracking.ignored(job.config.wandb, sweep=request.multirun, resumed=request.resumed) for job in to_do)
    yield from dict.fromkeys(itertools.chain.from_iterable(ignored))
    if distributed.world_size() == 1 and any(job.config.distributed is Distributed.fsdp for job in to_do):
        yield "distributed=fsdp: one process has all of the model; see gpt2exp --help for torchrun"


def _run_jobs(request: Request, to_do: list[Job], argv: list[str], began: float) -> None:
    """Run the jobs: a run alone, a sweep's one by one, or by the launcher or sweeper that the request names."""
    if request.master is None:
        with env_override(to_do[0].hydra.get("job", {}).get("env_set", {})):
            run_folder(request.folder, began)
        return
    try:
        if not request.folders:
            composing.call_hydra(argv, run_for_hydra, request.folder)
        elif not request.local:
            composing.start_launcher(request.master, request.folder, to_do, run_for_hydra)
        else:
            needless = set[int]()
            with env_override(request.master.hydra.job.env_set):
                for job in to_do:
                    if job.config.seed not in needless:
                        needless = _run_job(job, request.folder, began if job is to_do[0] else time.monotonic())
                    if job is to_do[0]:  # each run begins with a garbage collection: spare it the modules loaded by now
                        gc.collect()
                        gc.freeze()
    except KeyboardInterrupt:
        _say_how_to_go_on(request)
        raise
    except Exception as problem:
        if request.local and request.folders:  # not a job's failure: `_run_job` records those
            raise
        terminal.refuse(f"the sweep ended early: {first_line(problem)}", trace=terminal.wants_traces())
        _say_how_to_go_on(request)
    finally:
        gc.unfreeze()


def _say_how_to_go_on(request: Request) -> None:
    if request.launcher is not None and request.launcher._target_ == engines.SLURM:
        terminal.say("the jobs submitted go on: scancel ends them, gpt2exp-compare compares them; then, for the rest,")
    if request.folders:
        configs = [job.config for job in request.jobs]
        terminal.say(f"to go on: {terminal.to_go_on(request.folder.absolute(), *configs)}")


def _fetch_and_check(request: Request, to_do: list[Job]) -> dict[tuple[Any, ...], str]:
    """Fetch the texts and weights of the jobs, tokenise, and refuse jobs that do not fit them or this machine.

    Returns the sha256 of each text.
    """
    sources: dict[tuple[Any, ...], tokens.TokenFile] = {}  # a text that several jobs share is read once
    checked: list[object] = []  # weights that several jobs share are checked once
    for job in to_do:
        config = job.config
        distributed.check(config)
        text = config.data.text
        if text not in sources:
            sources[text] = tokens.prepare(config.data)
        setup.check_text(setup.smallest(config), sources[text])
        name = config.metric.name
        free = not name or (name.isidentifier() and name not in TAKEN)
        require(free, "metric", name, "is recorded under its name, which must be a word of its own", "rename its file")
        outside.try_out(config)
        weights = config.init, config.model
        # a run that resumes takes its weights from a checkpoint
        if weights not in checked and not record.saved(request.folder / job.folder):
            setup.check_weights(config.init, config.model)
            checked.append(weights)
        if request.resumed:
            check_same_text(config, sources[text], record.text_of(request.folder / job.folder))
        named = config.train.device not in (DeviceName.auto, DeviceName.cpu)
        strict = config.precision.name is PrecisionName.tf32 and config.precision.fallback is Fallback.error
        if request.local and (named or strict):
            from gpt2exp.training import hardware, precision

            with precision.applied(config.precision, hardware.resolve_device(config.train.device)):
                pass
    return {text: source.sha256 for text, source in sources.items()}


def _show_prior(earlier: Path, looks: Sequence[int]) -> None:
    """Print how small a difference each number of seeds can tell, given the scatter in an earlier sweep."""
    from gpt2exp.compare import stopping

    table = stopping.prior(earlier, looks)
    text = "the smallest difference in nats that so many seeds tell from zero in four of five studies, given the std of"
    text += f" the differences in {terminal.short(earlier.absolute())} (in brackets: given that std's upper 80 % limit)"
    terminal.say(text)
    terminal.terminal().print(terminal.table(table))


def _show_dry(to_do: list[Job]) -> None:
    """Print the table of a dry run. Jobs that need the same memory and precision are measured once."""
    if not to_do:
        return
    rows, known = list[dict[str, str]](), dict[str, dict[str, str]]()
    for job in to_do:
        of = job.config
        optimizer = of.optimizer.name, of.optimizer.schedule_steps
        shape = repr((of.model, of.precision, of.data, of.train, of.distributed, *optimizer))
        known[shape] = known.get(shape) or _dry_row(of)
        told = " ".join(text for text in job.overrides if not is_housekeeping(override_key(text)))
        rows.append({"run": (told or "defaults") + " (taken)" * bool(job.reused), **known[shape]})
    terminal.terminal().print(terminal.table(rows))


def _dry_row(config: RunConfig) -> dict[str, str]:
    with setup.ready(config) as ready:
        config, got, length = ready.config, ready.got, ready.config.optimizer.schedule_steps
    return {
        "parameters": f"{size.parameters(config.model)['total']:,}",
        "batch": f"{config.train.sequences} x {config.train.seq_len}",
        "steps": f"{config.train.steps:,}" + (f" (schedule {length:,})" if length else ""),
        "tokens": f"{config.train.steps * config.train.step_tokens:,}",
        "memory GiB": f"{ready.need / 2**30:.2f}",
        "precision": f"{got.requested}: {got.effective}{' emulated' if got.emulated else ''} on {ready.device.type}",
    }


def _outcome(request: Request) -> int:
    """Compare and show a sweep's runs; the exit code, from what the folders say."""
    every = [record.row(folder, request.folder) for folder in record.runs_below(request.folder)]
    tuning_rows = [row for row in every if row["name"].startswith(f"{record.TUNING}/")]
    rows = [row for row in every if not row["name"].startswith(f"{record.TUNING}/")]
    failed = [row for row in tuning_rows if row["state"] not in ("done", "diverged")]
    done, jobs = sum(row["state"] == "done" for row in rows), len(request.folders) or len(rows)
    if request.multirun:
        from gpt2exp.compare import __main__ as conclude
        from gpt2exp.compare import stopping

        if request.looks and stopping.progress(request.folder).why:
            jobs = len(rows)  # those of later seeds are not needed
        console = terminal.terminal()
        title = f"{done} of {jobs} runs done in {terminal.short(request.folder.absolute())}"
        if tuning_rows:
            title = f"{len(tuning_rows) - len(failed)} of {len(tuning_rows)} tuning runs and {title}"
        console.print(terminal.runs_table(rows, title) if len(rows) <= FEW else title, markup=False)
        kept = conclude.conclude(request.folder, console)
        for row in (*failed, *rows):
            if row["state"] != "done":
                terminal.refuse(f"{row['name']}: {terminal.state_line(row)}")
        if found := tracking.offline(request.folder, every, kept):
            console.print(f"to upload: wandb sync {' '.join(found)}", markup=False, soft_wrap=True)
    return 0 if rows and done == max(jobs, len(rows)) and not failed else 1


# --- one job of a sweep ----------------------------------------------------------------------------------------------


def run_for_hydra(cfg: DictConfig) -> float:
    """Run the job that a launcher or a sweeper of Hydra's passes on: `cfg` holds it.

    Returns the loss that a sweeper minimises, infinite if the run diverged or failed.
    """
    terminal.show_warnings()
    hydra = HydraConfig.get()
    sweep = Path(hydra.runtime.output_dir)
    job = composing.job_from_hydra(cfg, sweep)
    if not job.folder:  # the sweeper proposed it
        known = record.Sweep.read(sweep)
        told = sorted(set(job.overrides) - set(known.jobs[0] if known else ()))
        job = replace(job, folder=folder_name(hydra.job.num, ",".join(told)))
    engines.prepare_worker(str(hydra.launcher._target_), sweep, job.config.train.device)
    if job.config.seed not in _needless_seeds(sweep):
        _run_job(job, sweep, BEGAN if hydra.job.num == 0 else time.monotonic())
    return record.objective(sweep / job.folder)


def _run_job(job: Job, sweep: Path, began: float) -> set[int]:
    """Run one job of a sweep unless it is done. A failure is recorded; only a signal is raised.

    Returns the seeds of which no run is to begin any more.
    """
    folder = sweep / job.folder
    done = record.row(folder, sweep)["state"] in ("done", "diverged")  # in an earlier launch
    if done or (job.config.sweep.fail_fast and _failed_before(sweep)):
        return set()
    if not (folder / ".hydra" / "config.yaml").is_file():
        composing.write_hydra_folder(folder, job)
    try:
        if job.reused:
            reuse.take(job, folder)
        elif job.config.sweep.isolate and not process.requeued_by():  # submitit gives a job its own process already
            _run_in_subprocess(folder)
        else:
            with process.held(folder):
                run_folder(folder, began)
    except BadRequest as error:  # another process has resumed this job by itself
        log.warning("%s", error)
    except OSError as error:  # the folder holds what could be written
        log.error("%s", process.unwritable(error, WHERE))
    return _needless_seeds(sweep, job.config.seed)


def _needless_seeds(sweep: Path, ended: int | None = None) -> set[int]:
    """The seeds of which no run is to begin any more, since the sweep is answered; none without `sweep.until`.

    `ended`: the seed of a run that has just ended. If all runs of that seed have, the answer so far is printed.
    """
    known = record.Sweep.read(sweep)
    if known is None or not known.looks or (ended is not None and ended not in known.by_seed):  # it tuned an arm
        return set()
    from gpt2exp.compare import stopping

    of = [record.read_status(sweep / name)["state"] for name in known.by_seed.get(ended or 0, [])]
    if ended is not None and not {*of} <= {*stopping.ENDED}:
        return set()
    progress = stopping.progress(sweep)
    for line in progress.lines(known.rule["max_seeds"]) if ended is not None else ():
        terminal.say(line)
    begun = {path.parent.name for path in sweep.glob("*/status.json")}
    return {seed for seed, names in known.by_seed.items() if not begun & {*names}} if progress.why else set()


def _failed_before(sweep: Path) -> bool:
    """Whether a job failed in this launch, or diverged, which a tuning job may. Jobs of earlier launches run again."""
    known = record.Sweep.read(sweep)
    statuses = ((folder.parent == sweep, record.read_status(folder)) for folder in record.runs_below(sweep))
    bad = {True: ("failed", "diverged"), False: ("failed",)}
    ended = [status["updated"] for compared, status in statuses if status["state"] in bad[compared]]
    return known is not None and max(ended, default=0) > known.launched


def _run_in_subprocess(folder: Path) -> None:
    """Run a folder in a new process; if that process dies, record the failure."""
    # in a session of its own, so that Ctrl-C reaches it once, through us
    child = subprocess.Popen([sys.executable, "-m", "gpt2exp.sweep.launch", str(folder)], start_new_session=True)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()  # it saves itself and records that it was interrupted
        try:
            child.wait()
        except KeyboardInterrupt:  # a second one
            child.kill()
        raise
    if code not in (2, 130, 143) and not (folder / "summary.json").is_file():  # it had no chance to say so itself
        cause = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; the system may have run out of memory, try a smaller train.batch_size" if code == -9 else ""
        step = record.read_status(folder)["step"]
        record.write_status(folder, "failed", step, f"the job's process ended: {cause}{hint}")
    if code in (130, 143):
        raise KeyboardInterrupt


def _main_of_subprocess(folder: Path) -> int:
    """What the process of `_run_in_subprocess` does; the exit code: 0 done, 1 not."""
    choices.trust()  # the process that started this one has checked what may run
    with process.held(folder):
        return 0 if run_folder(folder)["state"] == "done" else 1


if __name__ == "__main__":
    sys.exit(process.carry_out("gpt2exp", lambda: _main_of_subprocess(Path(sys.argv[1])), WHERE))
