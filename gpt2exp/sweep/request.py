"""What a command line asks for: the jobs, each composed and checked, and the folders that hold them.

The whole request is composed before anything is written, so that a mistake in the last job of a sweep is answered in
a second. Then every job has a folder whose `.hydra` is the whole description of the run. No torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import itertools
import os
import re
import shlex
import shutil
import time
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2exp.config import CONTROL, Design, InitConfig, InitScheme, SweepConfig
from gpt2exp.files import beside
from gpt2exp.model import size
from gpt2exp.run import process, record, secret
from gpt2exp.schema import check_key, group_of, is_housekeeping, keys, owner
from gpt2exp.section import CHOICES, BadRequest, default_of, home, quoted, require, show, typed
from gpt2exp.sweep import composing, design, engines, tuning
from gpt2exp.sweep.composing import SECTIONS, Composer, Job, as_plain, is_hydra


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
    def names(self) -> list[str]:
        """The folders of a sweep's jobs, by number; empty where a sweeper makes up the jobs as it goes."""
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
    def rule(self) -> dict[str, Any]:
        """With `sweep.until`: what decides when it ends, besides its looks."""
        if not self.looks:
            return {}
        settings = self.jobs[-1].config.sweep
        found = design.arms((job.overrides for job in self.jobs), settings)
        axes = {key: values for key, values in found.items() if len(values) > 1}
        axes = {key: values for key, values in axes.items() if key not in ("seed", settings.budget)}
        most = max(settings.looks)
        return {"axes": axes, "margin": settings.margin, "max_seeds": most, "max_hours": settings.max_hours}


def ordered(jobs: Iterable[Job]) -> list[Job]:
    """Jobs in running order: all of a seed before the next seed's.

    Within a seed the order is drawn by the seed, so that a machine that becomes slower or warmer favours no arm.
    """
    jobs = list(jobs)
    seeds = list(dict.fromkeys(job.config.seed for job in jobs))

    def place(job: Job) -> tuple[int, str]:
        arms = sorted(text for text in job.overrides if not text.startswith("seed="))
        drawn = hashlib.sha256(f"{job.config.seed} {arms}".encode()).hexdigest()
        return seeds.index(job.config.seed), drawn if len(seeds) > 1 else ""

    return sorted(jobs, key=place)


def make(args: argparse.Namespace) -> Request:
    """The request of a parsed command line.

    Raises:
        BadRequest: anything in it that cannot be carried out.
    """
    with composing.composing(args) as composer:
        return compose(composer, read(composer, args.overrides), multirun=args.multirun)


LOGGING = ("hydra.verbose", "hydra/job_logging")  # have an effect in a launcher's workers alone
OUTPUT = ("hydra.run.dir", "hydra.sweep.dir")
LISTS = {"sweep.together": ";", "sweep.reuse": ","}  # lists that may be typed as one text, and what separates its parts
PLACES = ("data.path", "init.path", "resume", "sweep.prior", "wandb.dir")
QUOTES = "'\""
ELEMENT = re.compile(r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^][(),'"]+""")


def as_meant(text: str) -> str:
    """An argument in Hydra's grammar, quoted where Hydra would read a name as something else.

    `wandb.name=2024_01_15` would be the number 20240115, `resume=None` a folder called None, `hydra.run.dir=~/x` an
    error, and a comma in the name of a file that is there would part it in two. What is quoted stays as it is.
    """
    key, _, value = text.partition("=")
    bare = key.lstrip("+")
    if bare in LISTS and value[:1] != "[":
        text = value.strip(QUOTES)
        return f"{key}={as_list([text] if os.path.exists(home(text)) else text.split(LISTS[bare]))}"  # noqa: PTH110
    if bare in ("sweep.over", "sweep.tune") and "=" in value and value[0] not in QUOTES:
        return f"{key}={quoted(value)}"
    if bare == "sweep.tune_seeds" and re.fullmatch(r"[\d, ]+", value):
        seeds = value if "," in value else ",".join(map(str, range(101, 101 + int(value))))
        return f"{key}=[{seeds}]"
    if not value or "${" in value or value[0] in QUOTES or bare not in (*OUTPUT, *keys()):
        return text
    parser = OverridesParser.create()
    if bare in OUTPUT or (bare in PLACES and value != "null" and os.path.exists(home(value))):  # noqa: PTH110
        return typed(key, value)
    expected = kinds(bare)

    def name(found: re.Match[str]) -> str:
        part = found[0].strip()
        if part == "None" and type(None) in expected:
            return "null"
        try:
            number = parser.parse_rule(part, "primitive")
        except HydraException:
            return found[0]
        otherwise = isinstance(number, int | float) and str(number) != part and is_text(expected)
        return quoted(part) if otherwise else found[0]

    value = ELEMENT.sub(name, value)
    try:
        parser.parse_override(f"{key}={value}")
    except HydraException:  # a character that the grammar does not know
        return f"{key}={quoted(value)}" if is_text(expected) and not set(value) & set(",[{") else text
    return f"{key}={value}"


def as_list(texts: Iterable[str]) -> str:
    """Texts as a list in Hydra's grammar."""
    return f"[{','.join(quoted(text.strip()) for text in texts if text.strip())}]"


def read(composer: Composer, texts: Sequence[str]) -> list[Override]:
    """Overrides as typed, each checked by itself; BadRequest for a text that is none."""
    parser = OverridesParser.create(config_loader=composer.loader)
    overrides = []
    for text in texts:
        try:
            parsed = parser.parse_overrides([text])
            if not parsed[0].key_or_group:
                raise HydraException("no key")
        except HydraException as error:
            hint = f"write KEY=VALUE, and quote values with special characters: {example(text)}"
            raise BadRequest(f"{text}: cannot be read as an override; {hint}") from error
        overrides += parsed
    for override in overrides:
        check(composer, override)
    return overrides


def example(text: str) -> str:
    """An override with its value quoted, to be pasted into a shell."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        key, value = "data.path", "my file.txt"
    return shlex.quote(f"{key}={quoted(value)}" if set(value) & set('"\\') else f'{key}="{value}"')


def values(override: Override) -> list[Any]:
    """The values that an override gives its key, one or several."""
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]


def check(composer: Composer, override: Override) -> None:
    """Refuse an override whose key, choice or type is wrong, with a line better than the composer's."""
    key = override.key_or_group
    if is_hydra(key):
        if override.is_choice_sweep():
            raise BadRequest(f"{override.input_line}: a sweep has one {key}; name one, quoted if it holds a comma")
        return
    offered = composer.offered(key)
    group, _, part = key.rpartition(".")
    if (group in CHOICES and part == "name") or part.startswith("_"):
        name = show(override.value())
        again = f"write {group_of(group)}={name if part == 'name' else 'NAME, with NAME.yaml in that group'}"
        raise BadRequest(f"{key}={name}: a choice brings keys of its own; {again}")
    if override.type is OverrideType.DEL:
        raise BadRequest(f"~{key}: a key cannot be deleted; give it another value instead: {key}=VALUE")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return  # intervals and the like belong to another sweeper, which checks them
    for number, value in enumerate(values(override)):
        if offered:
            _check_choice(key, value, offered)
        elif not composer.may_have(key):
            if number == 0:
                check_key(key, value)
            _check_type(key, value)
        if override.is_add() and (not offered or key in (*SECTIONS, "experiment")):
            again = shlex.quote((override.input_line or "").lstrip("+"))
            raise BadRequest(f"+{key}={show(value)}: the key is there already; leave out the +: {again}")


def _check_choice(group: str, value: Any, choices: list[str]) -> None:
    if isinstance(value, (dict, list)) or str(value) not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {group}={near[0]}? Choices: " if near else "choose one of "
        raise BadRequest(f"{group}={show(value)}: no such choice; {hint}{', '.join(choices)}")


def _check_type(key: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: its type shows once composed
    expected, (section, name) = kinds(key), owner(key)
    try:
        if isinstance(value, bool) and not {bool, str} & set(expected):
            raise ValueError("a bool is no number")
        if isinstance(value, (int, float)) and expected == (bool,) and value not in (0, 1):
            raise ValueError("a number is no bool")
        OmegaConf.update(composing.schema_of(section), name, value)
    except (OmegaConfBaseException, ValueError) as error:
        shown = show(default_of(section.__dataclass_fields__[name]))
        for kind in expected:
            if isinstance(kind, type) and issubclass(kind, Enum):
                raise BadRequest(f"{key}={show(value)}: no such value; choose one of {', '.join(kind)}") from error
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        wanted = names.get(expected[0], f"a list, such as {key}={shown}") + " or auto" * (expected[1:] == (str,))
        raise BadRequest(f"{key}={show(value)}: must be {wanted}; the default is {shown}") from error


@functools.cache
def kinds(key: str) -> tuple[Any, ...]:
    """The types that a key takes, with None's where it may be null."""
    section, name = owner(key)
    hint = typing.get_type_hints(section)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def is_text(kinds: tuple[Any, ...]) -> bool:
    """Whether a key of these types takes free text; `auto` beside a number is not."""
    return list[str] in kinds or (str in kinds and not {int, bool} & set(kinds))


def compose(
    composer: Composer, typed: Sequence[Override], *, multirun: bool, absent: Collection[str] | None = None
) -> Request:
    """The request of overrides that were checked one by one.

    `absent`: of a sweep that goes on, and so brings no axes along, the keys that one of its arms is not told.
    """
    texts = [str(override.input_line) for override in typed]
    master = composer.compose(texts, multirun=multirun)
    multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
    for override in typed:
        if override.is_sweep_override():
            _check_several(composer, override, multirun=multirun)
    if not multirun and (brought := preset(master)):
        raise BadRequest(f"{' '.join(brought)}: the axes of a study or a sweeper make a sweep; add -m")
    check_hydra(master.hydra)
    # an interpolation in hydra.run.dir may name hydra.job.*, so resolve within the whole configuration
    folder = Path(home(str(master.hydra.sweep.dir if multirun else master.hydra.run.dir)))
    basic = multirun and master.hydra.sweeper._target_ == composing.BASIC_SWEEPER
    if basic:
        jobs = _combinations(composer, master, typed, absent)
    else:  # a sweeper that makes up its jobs has the others' keys checked
        design.check_unused(rules(master), multirun=multirun)
        constant = [str(override.input_line) for override in typed if not override.is_sweep_override()]
        jobs = [composing.job_of(composing.identified(composer.compose(constant) if multirun else master), texts)]
    looks = _looks(jobs, typed)
    tuning.check(jobs)
    first = named(tuning.jobs(composer, master, jobs) if basic else [], place=f"{record.TUNING}/")
    if not multirun or basic:  # all the jobs are known
        _check_path_used([job.config.init for job in jobs])
    for job in jobs:
        size.check(job.config.model, job.config.init, job.config.train.seq_len)
    for device in {job.config.train.device for job in jobs} if multirun else ():
        engines.check(master.hydra.launcher, device)
    arms, shared = tuning.recorded(first), master if multirun else None
    return Request(tuple(jobs), multirun, folder, shared, looks=looks, tuning_jobs=tuple(first), tuning=arms)


def rules(master: DictConfig) -> SweepConfig:
    """The keys of `sweep`, which are one for all jobs."""
    return typing.cast(SweepConfig, OmegaConf.to_object(master.sweep))


def _combinations(
    composer: Composer, master: DictConfig, typed: Sequence[Override], absent: Collection[str] | None
) -> list[Job]:
    """The jobs of a sweep of lists."""
    found, sweep = axes([*(read(composer, preset(master)) if absent is None else ()), *typed]), rules(master)
    design.check_single(found)
    together = moving(composer, sweep.together)
    if sweep.over is not None:
        found |= budgets(composer, sweep.over, found | together)
    if sweep.until:  # a study's seeds are replaced
        found.pop("seed", None)
        found = {"seed": [f"seed={seed}" for seed in range(1, sweep.looks.stop)], **found}
    found |= tuning.first(composer, sweep, found | together)
    single: dict[str, list[design.Arm]] = {key: [(text,) for text in texts] for key, texts in found.items()}
    for key in single.keys() & {*(absent or ())}:  # the arm without it is the baseline's
        single[key].insert(len(single[key]) if sweep.design is Design.leave_one_out else 0, ())
    control = (f"{CONTROL}={master.data.redraw + 1}",) if sweep.control else None
    texts = design.jobs(single | design.together(together, found), sweep, control)
    jobs = named(list(composer.jobs(master, texts)))
    return [dataclasses.replace(job, overrides=tuple(tuning.untold(job.overrides, sweep.tune))) for job in jobs]


def _looks(jobs: Sequence[Job], typed: Sequence[Override]) -> tuple[int, ...]:
    """The looks of a sweep that runs until it is answered; of any other none."""
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
    """Refuse several values without -m, and several studies, each of which is a sweep."""
    key, text = override.key_or_group, str(override.input_line)
    group = not key.startswith("hydra/") and key not in SECTIONS and composer.offered(key)
    for value in values(override) if group and override.is_discrete_sweep() else ():
        one = f"{override.get_key_element()}={value}"
        if preset(composer.compose([one], multirun=True)):
            raise BadRequest(f"{text}: each is a sweep of its own; start one at a time, such as gpt2exp {one}")
    if not multirun:
        remedy = "add -m to run every one of them"
        if key in keys() and is_text(kinds(key)):
            remedy += f", or quote a comma that is part of it: {example(text)}"
        raise BadRequest(f"{text}: several values make a sweep; {remedy}")


def _check_path_used(inits: Sequence[InitConfig]) -> None:
    """Refuse an `init.path` that no job reads."""
    if any(init.scheme is InitScheme.pretrained for init in inits):
        return
    for init in inits:
        why = f"init={show(init.scheme)} draws its weights"
        require(init.path is None, "init.path", init.path, why, "add init=pretrained")


def check_hydra(settings: DictConfig) -> None:
    """Refuse settings of Hydra's that hold a credential, have no effect here, or that no run could start with."""
    secret.check_values(as_plain(settings), "hydra")
    local, unheard = (
        settings.launcher._target_ == engines.BASIC,
        "has no effect without a launcher; run.log has all lines",
    )
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


def preset(master: DictConfig) -> list[str]:
    """A study's own axes, as overrides."""
    return [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]


def axes(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """The overrides by key: one for a constant, several for an axis; a later one replaces an earlier."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override() and not override.is_discrete_sweep():
            reason = "the basic sweeper takes lists, choice(...) and range(...)"
            raise BadRequest(f"{override.input_line}: {reason}; write {key}=A,B")
        several = override.is_sweep_override()
        each = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
        found[key] = [f"{key}={value}" for value in each]
    return found


def moving(composer: Composer, together: Sequence[str]) -> dict[str, list[str]]:
    """The overrides in `sweep.together`, by key."""
    SweepConfig(together=list(together))  # checks that each is KEY=A,B
    return axes(read(composer, [as_meant(text) for text in together]))


def budgets(composer: Composer, over: str, others: dict[str, list[str]]) -> dict[str, list[str]]:
    """The axis that `sweep.over` adds, as `axes` returns it.

    Raises:
        BadRequest: it is no list of numbers for a key that counts, is there already, or nothing else varies.
    """
    again = "try sweep.over=train.steps=50,100,200"
    require("=" in over, "sweep.over", over, "must be KEY=A,B", again)
    ((key, texts),) = axes(read(composer, [over])).items()
    counts = key in keys() and not is_housekeeping(key) and key != "seed" and bool({int, float} & {*kinds(key)})
    vary = any(len(each) > 1 for name, each in others.items() if name != "seed")
    for ok, why, remedy in (
        (counts, f"{key} is no number that makes a run larger", again),
        (len({*texts}) > 1, "one value is no axis", again),
        (key not in others, f"{key} is given twice", f"leave out {key}=..."),
        (vary, "nothing else varies", "add what to compare: model.tie_weights=true,false"),
    ):
        require(ok, "sweep.over", over, why, remedy)
    return {key: sorted(texts, key=lambda text: float(text.partition("=")[2]))}


def named(jobs: Sequence[Job], first: int = 0, place: str = "") -> list[Job]:
    """Give each job without a folder one: a number from `first`, and the overrides that not all jobs share.

    `place`: what the folders lie in, with a slash.
    """
    alike = set.intersection(*(set(job.overrides) for job in jobs)) if jobs else set()
    free = itertools.count(first)

    def name(job: Job) -> str:
        return place + numbered(next(free), ",".join(sorted(text for text in job.overrides if text not in alike)))

    return [job if job.folder else dataclasses.replace(job, folder=name(job)) for job in jobs]


def numbered(number: int, overrides: str) -> str:
    """`NUM_slug`, such as `003_precision=tf32,seed=2`."""
    slug = re.sub(r"[^\w.=,+-]+", "_", overrides).strip("_.")[:100]
    return f"{number:03d}_{slug}" if slug else f"{number:03d}"


@contextlib.contextmanager
def claimed(request: Request, argv: Sequence[str]) -> Iterator[None]:
    """Create and lock the request's folder, and write the request into it: `sweep.json`, and every job's `.hydra`.

    Raises:
        BadRequest: a new folder holds something already or cannot be created; another process is at work on an old one.
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
    """Create the folder with the request in it, by a rename: there is never one without."""
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
        told = [list(job.overrides) for job in request.jobs]
        where, looks, now = str(request.cwd or Path.cwd()), list(request.looks), time.time()
        known = record.Sweep(list(request.argv or argv), told, request.names or None, where, now, looks, request.rule)
        dataclasses.replace(known, tuning=request.tuning).write(folder)
    for job in request.tuning_jobs or request.jobs:  # after tuning, `settle` makes the folders of `jobs`
        place = folder / job.folder
        # a sweep that ends as soon as it is answered makes a folder as its run begins
        proposed = request.multirun and not job.folder
        later = request.looks and not request.tuning_jobs and not place.exists()
        if not (job.done or proposed or later):
            composing.write_hydra_folder(place, job, request.folder / job.folder)
