"""What `resume=FOLDER` asks for. No torch.

A run resumes with the configuration in its folder. Other overrides may change how the run is kept and how many steps it
takes, but not what it computes.

A sweep resumes with the jobs that are not done. The values typed join those of its axes, and the sweep is composed
again: a combination that no job of it computes yet becomes a new job.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gpt2exp import choices, schema
from gpt2exp.config import DataName, Design, RunConfig, Schedule
from gpt2exp.run import record, terminal
from gpt2exp.section import BadRequest, override_key, quoted, show, typed
from gpt2exp.sweep import composing, design, request, tuning
from gpt2exp.sweep.composing import Composer, Job, is_hydra
from gpt2exp.sweep.overrides import LOGGING, parse_overrides, values_of

MAY_CHANGE = ("train.steps", "train.device", "distributed", "data.path")
"""Keys besides housekeeping that may have another value when a run resumes. `data.path` must hold the same text."""


def resumed_request(args: argparse.Namespace) -> request.Request | None:
    """The request of a command line with `resume=FOLDER`; None for one without.

    Raises:
        BadRequest: the folder is no run or sweep that can be resumed, or not with these overrides.
    """
    if not any(text.lstrip("+").startswith("resume=") for text in args.overrides):
        return None
    with composing.open_composer(args) as composer:
        typed = parse_overrides(composer, args.overrides)
        folders = [override for override in typed if override.key_or_group == "resume"]
        typed = [override for override in typed if override.key_or_group != "resume"]
        values = {str(value) for override in folders for value in values_of(override) if value is not None}
        if not values:  # resume=null
            return None
        if len(values) > 1:
            raise BadRequest(f"resume={','.join(sorted(values))}: one folder at a time; name one run or one sweep")
    folder = Path(values.pop()).expanduser()
    record.check_folder(folder, "resume")
    if (folder / record.SWEEP).is_file():
        return _sweep(folder.resolve(), args, typed)
    return _run(folder.resolve(), args, typed)


# --- a run -----------------------------------------------------------------------------------------------------------


def _run(folder: Path, args: argparse.Namespace, typed: list[Override]) -> request.Request:
    for override in typed:
        if override.is_sweep_override():
            text = override.input_line
            raise BadRequest(f"{text}: {terminal.short(folder)} is one run; leave it out, or name a sweep's folder")
    try:
        before, gone, overrides = record.read_config(folder)
    except choices.Refused as error:
        raise BadRequest(f"resume={folder}: {error}") from error
    except BadRequest as error:
        raise BadRequest(f"resume={folder}: {error}; put the files back, or start a new run") from error
    recorded = schema.plain(before)  # without interpolations: a key that refers to train.steps keeps its value
    overrides = _of_today(overrides, gone)
    began_in, config_dir = _surroundings(folder)
    if args.trust:
        choices.allow(args.config_dir, Path.cwd(), config_dir, began_in)
    changed: dict[str, Any] = {}
    if own := [override for override in typed if not is_hydra(override.key_or_group)]:
        args = copy.copy(args)
        args.config_dir = args.config_dir or config_dir
        changed = _changes(args, overrides, [str(override.input_line) for override in own])
    had = _flat(before)
    _check_changes(folder, had, changed)
    for key, value in changed.items():
        on_hub = before.data.name is DataName.hub and not Path(str(value)).expanduser().exists()
        if key == "data.path" and value is not None and not on_hub:
            value = str(Path(value).expanduser().absolute())  # relative to where it is typed now
        schema.put(recorded, key, value)
        overrides = [text for text in overrides if override_key(text) != key]
        overrides.append(f"{key}={show(value)}")
    after = schema.parse(recorded)
    steps, done = _steps_done(folder, after)
    notes = [
        f"{key}: {show(value)} from here on, {show(had.get(key))} before"
        for key, value in changed.items()
        if not schema.is_housekeeping(key)
    ]
    if "train.steps" in changed and after.optimizer.schedule == Schedule.cosine and not after.optimizer.schedule_steps:
        notes.append("the steps to come take their learning rates from a cosine over the new train.steps")
    if steps and not record.saved(folder):
        notes.append(f"no checkpoint was saved: its {steps} steps are done again, from the start")
    if done:
        more = f"to train on, add train.steps=N above {steps}"
        notes = [f"{terminal.short(folder)} is done: {steps} of {after.train.steps} steps; {more}"]
    notes += _gone_note(gone)
    job = Job(tuple(overrides), after, recorded if changed and not done else None, done=done)
    argv = [*(["--config-dir", config_dir] if config_dir else []), *overrides]
    return request.Request((job,), False, folder, argv=tuple(argv), resumed=True, cwd=began_in, notes=tuple(notes))


def _steps_done(folder: Path, after: RunConfig) -> tuple[int, bool]:
    """The steps that a run has done, and whether these are all; `BadRequest` if it cannot resume with `after`."""
    row = record.row(folder, folder)
    steps = row["steps"] if row["state"] == "done" else len(record.read_metrics(folder))
    if after.train.steps < steps:
        why = f"{steps} steps are done already"
        raise BadRequest(f"train.steps={after.train.steps}: {why}; try train.steps={steps} or more")
    done = row["state"] == "done" and steps == after.train.steps
    if row["state"] == "done" and not done and not record.saved(folder):
        why = f"{terminal.short(folder)} is done and kept no checkpoint to go on from"
        remedy = "start a new run, with checkpoint.save_last=true if it may go on later"
        raise BadRequest(f"train.steps={after.train.steps}: {why}; {remedy}")
    return steps, done


def _check_changes(folder: Path, had: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Refuse a change of what the run computes."""
    kept = [key for key in changed if schema.is_housekeeping(key) and key.partition(".")[0] != "metric"]
    if refused := [key for key in changed if key not in (*kept, *MAY_CHANGE)]:
        now = ", ".join(f"{key}={show(had.get(key))}" for key in refused)
        what = ", ".join(f"{key}={show(changed[key])}" for key in refused)
        why = f"{terminal.short(folder)} began with {now}"
        # a key that refers to one typed now has changed with it
        follows = any("${" in str(record.read_unresolved(folder).get(key)) for key in refused)
        remedy = f"add {now}" if follows else "leave it out"
        raise BadRequest(f"{what}: {why}; {remedy} to go on, or start a new run without resume")


def _of_today(texts: Sequence[str], gone: Mapping[str, Any]) -> list[str]:
    """Recorded overrides under today's keys, without those of keys that no longer exist (`gone`)."""
    lost = {*gone, *(key.split(".")[0] for key in gone)} - set(composing.SECTIONS)
    moved = schema.MOVED.keys() - set(schema.keys())
    told = {text: override_key(text) for text in texts}
    return [
        text.replace(key, schema.MOVED[key], 1) if key in moved else text
        for text, key in told.items()
        if key not in lost
    ]


def _gone_note(gone: Mapping[str, Any]) -> list[str]:
    told = ", ".join(f"{key}={show(value)}" for key, value in sorted(gone.items()))
    return [f"{told}: no key of this version, recorded by another; the rest is done without it"] if gone else []


def _surroundings(folder: Path) -> tuple[Path | None, str | None]:
    """The folder in which a run was started, and its `--config-dir`; None for one that no longer exists."""
    try:
        runtime = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime
        sources = {source.provider: source.path for source in runtime.config_sources}
        began_in, config_dir = Path(runtime.cwd), sources.get("command-line")
    except (OSError, YAMLError, OmegaConfBaseException, TypeError):
        return None, None
    there = config_dir is not None and Path(config_dir).is_dir()
    return began_in if began_in.is_dir() else None, config_dir if there else None


def _changes(args: argparse.Namespace, overrides: list[str], typed: list[str]) -> dict[str, Any]:
    """By dotted key, the values that the overrides `typed` change."""
    with composing.open_composer(args) as composer:
        composed = (composing.identified(composer.compose(texts)) for texts in (overrides, [*overrides, *typed]))
        before, after = (_flat(composing.checked(one)) for one in composed)
    return {key: after.get(key) for key in before | after if after.get(key) != before.get(key)}


def _flat(of: RunConfig) -> dict[str, Any]:
    return schema.leaves(schema.plain(of))


# --- a sweep ---------------------------------------------------------------------------------------------------------


def _sweep(folder: Path, args: argparse.Namespace, typed: list[Override]) -> request.Request:
    """The whole sweep, composed again with the overrides typed now; its earlier jobs keep their folders."""
    known = record.Sweep.read(folder)
    if known is None:
        raise BadRequest(f"resume={folder}: its {record.SWEEP} cannot be read; put it back")
    if known.folders is None:
        why = "its sweeper proposed the jobs as it went; only a sweep over lists can be resumed"
        raise BadRequest(f"resume={folder}: {why}")
    flags, began_in = composing.arguments(known.argv), Path(known.cwd)
    if args.config_dir:
        flags.config_dir = str(Path(args.config_dir).absolute())
    elif flags.config_dir:
        flags.config_dir = str((began_in / flags.config_dir).absolute())
    if args.trust:
        choices.allow(args.config_dir, Path.cwd(), flags.config_dir, began_in)
    _check_rule(folder, known, typed)
    runs, gone = _recorded(folder)
    listed = dict(zip(known.folders, known.jobs, strict=True))
    listed |= {name: texts for name, (_, texts) in runs.items() if not name.startswith(f"{record.TUNING}/")}
    listed = {name: _of_today(texts, gone) for name, texts in listed.items()}
    with composing.open_composer(flags) as composer:
        before = [text for text in _of_today(flags.overrides, gone) if override_key(text) not in LOGGING]
        words, absent = _words(composer, before, list(listed.values()), typed)
        whole = request.request_of(composer, parse_overrides(composer, words), multirun=True, absent=absent)
    key, tried = (known.tuning.key, known.tuning.jobs) if known.tuning else ("", {})
    again = any(schema.is_housekeeping(override.key_or_group) for override in typed)
    first = _placed(whole.tuning_jobs, tried, runs, folder, again=again)
    return dataclasses.replace(
        whole,
        jobs=tuple(_placed(whole.jobs, listed, runs, folder, tuned=key, again=again)),
        tuning_jobs=tuple(first),
        tuning=tuning.recorded(first, known.tuning),
        looks=tuple(known.looks),
        folder=folder,
        argv=("-m", *(["--config-dir", flags.config_dir] if flags.config_dir else []), *words),
        resumed=True,
        cwd=began_in if began_in.is_dir() else None,
        notes=tuple(_gone_note(gone)),
    )


def _words(
    composer: Composer, before: list[str], listed: Sequence[Sequence[str]], typed: Sequence[Override]
) -> tuple[list[str], set[str]]:
    """The words that ask for the earlier jobs and the new ones, and the keys that some jobs have no override of.

    `before`: the earlier command line. `listed`: the overrides of its jobs. `typed`: the overrides typed now.
    """
    sweep = request.sweep_section(composer.compose(before, multirun=True))
    told = design.asked(listed, sweep)
    keys = [{*map(override_key, texts)} for texts in listed]
    absent = {key for key in told if not (schema.is_housekeeping(key) or all(key in each for each in keys))}
    hydra = [text for text in before if is_hydra(text)]
    for key, texts in design.axes(typed).items():
        values, had = list(map(_value, texts)), told.get(key, [])
        if is_hydra(key):
            hydra += texts
        elif key == "sweep.together":
            told[key] = [_together(composer, sweep.together, texts)]
        elif schema.is_housekeeping(key):
            told[key] = values
        elif key == "experiment" and values != had:
            raise BadRequest(f"{texts[0]}: a study is a sweep of its own; leave out resume to start it")
        elif key == sweep.budget:
            told["sweep.over"] = [quoted(",".join([str(sweep.over), *values]))]
        else:
            absent |= {key} - told.keys()
            full_set = sweep.design is Design.leave_one_out and key != "seed"  # the full set has the last value
            told[key] = list(dict.fromkeys([*values, *had] if full_set else [*had, *values]))
    return [*(f"{key}={','.join(values)}" for key, values in told.items()), *hydra], absent


def _together(composer: Composer, had: Sequence[str], texts: list[str]) -> str:
    """The value of `sweep.together` with the earlier arms, then those of `texts`, typed now."""
    before, value = design.together_overrides(composer, had), parse_overrides(composer, texts)[0].value()
    more = design.together_overrides(composer, value if isinstance(value, list) else [])
    if before and before.keys() != more.keys():
        why = f"the sweep began with {' and '.join(before)}"
        raise BadRequest(f"sweep.together: {', '.join(more)}: {why}; name those, or start a new sweep")
    axes = (design.together({key: each[key] for key in before or more}, {}) for each in (before or more, more))
    arms = dict.fromkeys(itertools.chain.from_iterable(itertools.chain(*axis.values()) for axis in axes))
    columns = zip(before or more, zip(*arms, strict=True), strict=True)
    moved = [f"{key}={','.join(map(_value, column))}" for key, column in columns]
    return _value(typed("sweep.together", moved))


def _placed(
    jobs: Sequence[Job],
    listed: Mapping[str, list[str]],
    runs: Mapping[str, tuple[RunConfig, list[str]]],
    folder: Path,
    *,
    tuned: str = "",
    again: bool,
) -> list[Job]:
    """The earlier jobs in their folders, then those of `jobs` that compute something else, in new folders.

    Args:
        jobs: All jobs of the sweep, as composed now.
        listed: By folder the overrides of each earlier job.
        runs: By folder what each run that has begun has on disk: its configuration and overrides.
        folder: The sweep's.
        tuned: The key of `sweep.tune`, of which each job has its arm's own value.
        again: Whether the configurations of jobs that are not done are written anew.
    """

    def computing(texts: Iterable[str]) -> frozenset[str]:
        told = {text: override_key(text) for text in texts}
        return frozenset(text for text, key in told.items() if key != tuned and not schema.is_housekeeping(key))

    told, found = {computing(job.overrides): dataclasses.replace(job, folder="") for job in jobs}, list[Job]()
    for name, texts in listed.items():
        job = told.pop(computing(texts), None)
        if name in runs:
            of, overrides = runs[name]
            alike = job is not None and (tuned or schema.identity(job.config) == schema.identity(of))
            if job is None or not (again and alike):
                job = Job(tuple(overrides), of)
            # a diverged run would diverge again: that is its result
            done = record.row(folder / name, folder)["state"] in ("done", "diverged")
            found.append(dataclasses.replace(job, folder=name, done=done))
        elif job is not None:  # a folder that exists is damaged, or it would be in `runs`: the job gets another
            found.append(job if (folder / name).exists() else dataclasses.replace(job, folder=name))
    known = {schema.identity(job.config) for job in found}
    for job in told.values():
        if (identity := schema.identity(job.config)) not in known:
            known.add(identity)
            found.append(job)
    place = next(iter(listed), "").rpartition("/")[0]
    return request.with_folders(found, _free(folder / place, listed), f"{place}/" if place else "")


def _check_rule(folder: Path, known: record.Sweep, typed: Sequence[Override]) -> None:
    """Refuse to change a sweep's design, or the rule by which it ends, once it has begun."""
    fixed = ["sweep.until", "sweep.over", "sweep.min_seeds", "sweep.tune", "sweep.tune_seeds"]
    fixed += ["sweep.design", "sweep.control", *["sweep.margin", "sweep.together"] * bool(known.looks)]
    fixed += [known.tuning.key] if known.tuning else []
    for override in typed:
        key = override.key_or_group
        if key in fixed or not (not known.looks or schema.is_housekeeping(key) or is_hydra(key)):
            why = f"that was decided before the first run of {terminal.short(folder)}"
            raise BadRequest(f"{override.input_line}: {why}; leave it out, or start a new sweep")


def _recorded(folder: Path) -> tuple[dict[str, tuple[RunConfig, list[str]]], dict[str, Any]]:
    """By folder the configuration and overrides of a sweep's runs; and their values of keys that no longer exist.

    Raises:
        BadRequest: the runs differ in such a key, so that nothing says which run is which job.
    """
    runs, gone = dict[str, tuple[RunConfig, list[str]]](), dict[str, Any]()
    for run in record.runs_below(folder):
        try:
            of, unknown, overrides = record.read_config(run)
        except choices.Refused as error:
            raise BadRequest(f"resume={folder}: {run.name}: {error}") from error
        except BadRequest:
            continue  # its `.hydra` is damaged: the job runs again in another folder
        for key, value in unknown.items():
            if gone.setdefault(key, value) != value and not schema.is_housekeeping(key):
                why = f"its runs have {key}={show(gone[key])} and {show(value)}, which is no key of this version"
                raise BadRequest(f"resume={folder}: {why}; go on with the version that began it, or start a new sweep")
        runs[str(run.relative_to(folder))] = of, overrides
    return runs, gone


def _free(folder: Path, names: Iterable[str]) -> int:
    """The first number that neither a folder in `folder` nor one of `names` begins with."""
    known = [*map(Path, names), *(folder.iterdir() if folder.is_dir() else ())]
    heads = [path.name.partition("_")[0] for path in known]
    return max((int(head) for head in heads if head.isdigit()), default=-1) + 1


def _value(text: str) -> str:
    return text.partition("=")[2]
