"""What a command line asks for: the jobs, each composed and checked, and the folders that hold them.

1. `overrides.py` parses and checks each override by itself.
2. `request_of` composes every job, and checks them together. Nothing is written yet, so that a mistake in the last job
   of a sweep is answered in a second.
3. `request_folder` writes a folder for each job, whose `.hydra` is the whole description of the run. No torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import os
import re
import shutil
import time
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gpt2exp.config import CONTROL, Design, InitConfig, InitScheme, SweepConfig
from gpt2exp.files import beside
from gpt2exp.model import size
from gpt2exp.run import process, record, secret
from gpt2exp.schema import keys
from gpt2exp.section import BadRequest, home, require, show
from gpt2exp.sweep import composing, design, engines, tuning
from gpt2exp.sweep.composing import SECTIONS, Composer, Job, as_plain
from gpt2exp.sweep.overrides import example, key_types, parse_overrides, takes_text, values_of


@dataclass(frozen=True)
class Request:
    """The checked jobs, whether they form a sweep, and where the results go."""

    jobs: tuple[Job, ...]  # a run alone, or the runs that a sweep compares
    multirun: bool
    folder: Path
    master: DictConfig | None = None  # of a sweep: what its jobs share, with Hydra's section
    argv: tuple[str, ...] = ()  # with `resume=`: a command line that asks for all the jobs
    resumed: bool = False  # `resume=` names the folder
    cwd: Path | None = None  # where relative paths start, if not here
    notes: tuple[str, ...] = ()  # what the user should know before it begins
    looks: tuple[int, ...] = ()  # with `sweep.until`: the numbers of seeds at which the sweep looks
    tuning_jobs: tuple[Job, ...] = ()  # with `sweep.tune`: these run first, and are not compared
    tuning: record.Tuning | None = None  # by arm the folders of `tuning_jobs`, and the value once it is chosen

    @property
    def tuning_to_do(self) -> list[Job]:
        """The tuning jobs of arms whose value is not chosen yet, in running order."""
        arms = self.tuning.arms if self.tuning else []
        settled = {name for arm in arms if arm.best for names in arm.runs.values() for name in names}
        return ordered(job for job in self.tuning_jobs if not job.done and job.folder not in settled)

    @property
    def folders(self) -> list[str]:
        """The folders of a sweep's jobs, by number; empty where a sweeper proposes the jobs as it goes."""
        return [job.folder for job in self.jobs if job.folder]

    @property
    def to_do(self) -> list[Job]:
        """The jobs that are not done, in running order."""
        return ordered(job for job in self.jobs if not job.done)

    @property
    def launcher(self) -> DictConfig | None:
        """A sweep's launcher and its settings."""
        return None if self.master is None else self.master.hydra.launcher

    @property
    def local(self) -> bool:
        """Whether the jobs run in this process, one after another."""
        return self.launcher is None or self.launcher._target_ == engines.BASIC

    @property
    def stopping_rule(self) -> dict[str, Any]:
        """With `sweep.until`: what decides when the sweep ends, besides its looks."""
        if not self.looks:
            return {}
        settings = self.jobs[-1].config.sweep
        found = design.arms((job.overrides for job in self.jobs), settings)
        compared = found.keys() - {"seed", settings.budget}
        axes = {key: values for key, values in found.items() if key in compared and len(values) > 1}
        most = max(settings.looks)
        return {"axes": axes, "margin": settings.margin, "max_seeds": most, "max_hours": settings.max_hours}


def ordered(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in running order: all of a seed before the next seed's.

    Within a seed the order is drawn, by a hash: a machine that becomes slower or warmer favours no arm.
    """
    jobs = list(jobs)
    seeds = list(dict.fromkeys(job.config.seed for job in jobs))

    def place(job: Job) -> tuple[int, str]:
        arms = sorted(text for text in job.overrides if not text.startswith("seed="))
        drawn = hashlib.sha256(f"{job.config.seed} {arms}".encode()).hexdigest()
        return seeds.index(job.config.seed), drawn if len(seeds) > 1 else ""

    return sorted(jobs, key=place)


def new_request(args: argparse.Namespace) -> Request:
    """The request of a parsed command line.

    Raises:
        BadRequest: anything in it that cannot be carried out.
    """
    with composing.open_composer(args) as composer:
        return request_of(composer, parse_overrides(composer, args.overrides), multirun=args.multirun)


def request_of(
    composer: Composer, typed: Sequence[Override], *, multirun: bool, absent: Collection[str] | None = None
) -> Request:
    """The request of overrides that `parse_overrides` has checked one by one.

    `absent`: None for a new request, to which a study adds its axes. For a resumed sweep, whose axes are all in
    `typed`: the keys that some of its jobs have no override of.
    """
    texts = [str(override.input_line) for override in typed]
    master = composer.compose(texts, multirun=multirun)
    multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
    for override in typed:
        if override.is_sweep_override():
            _check_several(composer, override, multirun=multirun)
    if not multirun and (brought := design.preset(master)):
        raise BadRequest(f"{' '.join(brought)}: the axes of a study or a sweeper make a sweep; add -m")
    _check_hydra(master.hydra)
    # an interpolation in hydra.run.dir may name hydra.job.*, so resolve within the whole configuration
    folder = Path(home(str(master.hydra.sweep.dir if multirun else master.hydra.run.dir)))
    basic = multirun and master.hydra.sweeper._target_ == composing.BASIC_SWEEPER
    if basic:
        jobs = _combinations(composer, master, typed, absent)
    else:  # one run; or a sweeper that proposes values as it goes, of which only the other keys are known
        design.check_unused(sweep_section(master), multirun=multirun)
        constant = [str(override.input_line) for override in typed if not override.is_sweep_override()]
        jobs = [composing.job_of(composing.identified(composer.compose(constant) if multirun else master), texts)]
    looks = _looks(jobs, typed)
    tuning.check(jobs)
    first = with_folders(tuning.jobs(composer, master, jobs) if basic else [], place=f"{record.TUNING}/")
    if not multirun or basic:  # all the jobs are known
        _check_path_used([job.config.init for job in jobs])
    for job in jobs:
        size.check(job.config.model, job.config.init, job.config.train.seq_len)
    for device in {job.config.train.device for job in jobs} if multirun else ():
        engines.check(master.hydra.launcher, device)
    arms, shared = tuning.recorded(first), master if multirun else None
    return Request(tuple(jobs), multirun, folder, shared, looks=looks, tuning_jobs=tuple(first), tuning=arms)


def sweep_section(master: DictConfig) -> SweepConfig:
    """The section `sweep`, which all jobs share."""
    return typing.cast(SweepConfig, OmegaConf.to_object(master.sweep))


def _combinations(
    composer: Composer, master: DictConfig, typed: Sequence[Override], absent: Collection[str] | None
) -> list[Job]:
    """The jobs of a sweep over lists of values: the combinations that its design has, each with a folder."""
    sweep = sweep_section(master)
    of_study = parse_overrides(composer, design.preset(master)) if absent is None else []
    found = design.axes([*of_study, *typed])
    design.check_single(found)
    together = design.together_overrides(composer, sweep.together)
    if sweep.over is not None:
        found |= design.budgets(composer, sweep.over, found | together)
    if sweep.until:  # a study's seeds are replaced
        found.pop("seed", None)
        found = {"seed": [f"seed={seed}" for seed in range(1, sweep.looks.stop)], **found}
    found |= tuning.first(composer, sweep, found | together)
    single: dict[str, list[design.Arm]] = {key: [(text,) for text in texts] for key, texts in found.items()}
    for key in single.keys() & {*(absent or ())}:  # one more arm, the baseline's, has no override of the key
        single[key].insert(len(single[key]) if sweep.design is Design.leave_one_out else 0, ())
    control = (f"{CONTROL}={master.data.redraw + 1}",) if sweep.control else None
    texts = design.jobs(single | design.together(together, found), sweep, control)
    jobs = with_folders(list(composer.jobs(master, texts)))
    return [dataclasses.replace(job, overrides=tuple(tuning.without_tuned(job.overrides, sweep.tune))) for job in jobs]


def _looks(jobs: Sequence[Job], typed: Sequence[Override]) -> tuple[int, ...]:
    """With `sweep.until`: the numbers of seeds after which the sweep looks at its answer; otherwise none."""
    sweep = jobs[0].config.sweep
    if not sweep.until:
        return ()
    if seeds := [one.input_line for one in typed if one.key_or_group == "seed"]:
        why = f"it takes the seeds 1, 2, 3, ... one after another; leave out {seeds[0]}"
        raise BadRequest(f"sweep.until=answered: {why}")
    arms = {tuple(text for text in job.overrides if not text.startswith("seed=")) for job in jobs}
    remedy = "add what to compare, such as model.tie_weights=true,false"
    require(len(arms) > 1, "sweep.until", "answered", "nothing varies but the seed", remedy)
    return tuple(sweep.looks)


def _check_several(composer: Composer, override: Override, *, multirun: bool) -> None:
    """Refuse several values without -m, and several studies at once: each is a sweep."""
    key, text = override.key_or_group, str(override.input_line)
    group = not key.startswith("hydra/") and key not in SECTIONS and composer.offered(key)
    for value in values_of(override) if group and override.is_discrete_sweep() else ():
        one = f"{override.get_key_element()}={value}"
        if design.preset(composer.compose([one], multirun=True)):
            raise BadRequest(f"{text}: each is a sweep of its own; start one at a time, such as gpt2exp {one}")
    if not multirun:
        remedy = "add -m to run every one of them"
        if key in keys() and takes_text(key_types(key)):
            remedy += f", or quote a comma that is part of it: {example(text)}"
        raise BadRequest(f"{text}: several values make a sweep; {remedy}")


def _check_path_used(inits: Sequence[InitConfig]) -> None:
    """Refuse an `init.path` that no job reads."""
    used = any(init.scheme is InitScheme.pretrained for init in inits)
    for init in inits:
        why = f"init={show(init.scheme)} draws its weights"
        require(used or init.path is None, "init.path", init.path, why, "add init=pretrained")


def _check_hydra(settings: DictConfig) -> None:
    """Refuse settings of Hydra's that hold a credential, that have no effect here, or that no run could start with."""
    secret.check_values(as_plain(settings), "hydra")
    local = settings.launcher._target_ == engines.BASIC
    unheard = "has no effect without a launcher; run.log has all lines"
    for key, value, usual, why in (
        ("hydra.output_subdir", settings.output_subdir, ".hydra", "a run is known by its folder .hydra"),
        ("hydra.sweep.subdir", as_plain(settings.sweep)["subdir"], ".", "resume= and the comparison name the folders"),
        ("hydra.callbacks", list(settings.callbacks), [], "Hydra starts no run here, and calls none"),
        ("hydra.job.chdir", bool(settings.job.chdir), False, "relative paths would start in the run's folder"),
        ("hydra.verbose", local and settings.verbose, False, unheard),
        ("hydra/job_logging", settings.runtime.choices["hydra/job_logging"] if local else "none", "none", unheard),
    ):
        require(value == usual, key, value, why, "leave it out")
    known = sorted(Plugins.instance().class_name_to_class)
    for part in ("launcher", "sweeper"):
        target = settings[part]._target_
        there = [name for name in known if part in name.rpartition(".")[2].lower()]
        why, remedy = f"no such {part} is installed", f"choose one of {', '.join(there)}"
        require(target in known, f"hydra.{part}._target_", target, why, remedy)


def with_folders(jobs: Sequence[Job], first: int = 0, place: str = "") -> list[Job]:
    """The jobs; one without a folder gets one, named by a number from `first` and the overrides that vary.

    `place`: the parent of these folders, with a slash at the end.
    """
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    free = itertools.count(first)

    def name(job: Job) -> str:
        return place + folder_name(next(free), ",".join(sorted(text for text in job.overrides if text not in alike)))

    return [job if job.folder else dataclasses.replace(job, folder=name(job)) for job in jobs]


def folder_name(number: int, overrides: str) -> str:
    """`NUM_slug`, such as `003_precision=tf32,seed=2`."""
    slug = re.sub(r"[^\w.=,+-]+", "_", overrides).strip("_.")[:100]
    return f"{number:03d}_{slug}" if slug else f"{number:03d}"


@contextlib.contextmanager
def request_folder(request: Request, argv: Sequence[str]) -> Iterator[None]:
    """Lock the request's folder inside the block, created if it is new; it holds `sweep.json` and each job's `.hydra`.

    Raises:
        BadRequest: a new folder is not empty or cannot be created, or another process works on an old one.
    """
    if not request.resumed:
        try:
            _create(request, argv)
        except OSError as error:
            key = f"hydra.{'sweep' if request.multirun else 'run'}.dir"
            why, remedy = error.strerror or str(error), "choose a folder that can be written"
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                why, remedy = "already holds files, and results are never overwritten", "choose a new folder"
            raise BadRequest(f"{key}={request.folder}: {why}; {remedy}") from error
    with process.held(request.folder):
        if request.resumed:
            _write(request, argv, request.folder)
        yield


def _create(request: Request, argv: Sequence[str]) -> None:
    """Create the folder by a rename, with the request in it: a folder without it is never seen."""
    if request.folder.exists():
        if any(request.folder.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        _write(request, argv, request.folder)
        return
    folder = request.folder.absolute()
    part = beside(folder)
    try:
        part.mkdir(parents=True)
        _write(request, argv, part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(request: Request, argv: Sequence[str], folder: Path) -> None:
    if request.multirun:
        record.Sweep(
            argv=list(request.argv or argv),
            jobs=[list(job.overrides) for job in request.jobs],
            folders=request.folders or None,
            cwd=str(request.cwd or Path.cwd()),
            launched=time.time(),
            looks=list(request.looks),
            rule=request.stopping_rule,
            tuning=request.tuning,
        ).write(folder)
    for job in request.tuning_jobs or request.jobs:  # after tuning, `settle` makes the folders of `jobs`
        place = folder / job.folder
        proposed = request.multirun and not job.folder  # by a sweeper: `run_for_hydra` makes the folder
        # with sweep.until, a folder is made when its run begins: that run may not be needed
        later = request.looks and not request.tuning_jobs and not place.exists()
        if not (job.done or proposed or later):
            composing.write_hydra_folder(place, job, request.folder / job.folder)
