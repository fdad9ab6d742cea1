"""What `resume=FOLDER` asks for: the jobs of an earlier launch that are still to do, and those a sweep gains.

A run goes on with the configuration it has; what is typed beside may change how it is kept and how long it goes on, but
not what it computes. A sweep's request is composed again with what is typed added to its axes, and its jobs find their
folders by the identity of their configurations. No torch.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gpt2exp import config
from gpt2exp.config import HOUSEKEEPING, BadRequest, DataName, RunConfig, Schedule, show
from gpt2exp.run import record, terminal
from gpt2exp.sweep import request

MAY_CHANGE = (*HOUSEKEEPING, "train.steps", "train.device", "distributed", "data.path")
"""Keys, or whole sections, that a run may go on with another value of; the text at `data.path` must be the same."""


def make(args: argparse.Namespace) -> request.Plan | None:
    """The plan behind a command line with `resume=FOLDER`; None for one without.

    Raises:
        BadRequest: there is nothing to go on with, or what is typed beside cannot be.
    """
    if not any(text.lstrip("+").startswith("resume=") for text in args.overrides):
        return None
    with request.composing(args) as loader:
        typed = request.read(loader, args.overrides)
        request.check(loader, typed)
        folders = [override for override in typed if override.key_or_group == "resume"]
        typed = [override for override in typed if override.key_or_group != "resume"]
        values = {str(value) for override in folders for value in request.values(override) if value is not None}
        if not values:  # resume=null
            return None
        if len(values) > 1:
            raise BadRequest(f"resume={','.join(sorted(values))}: one folder at a time; name one run or one sweep")
    folder = Path(values.pop()).expanduser()
    _check_folder(folder)
    if (folder / record.SWEEP).is_file():
        return _sweep(folder.resolve(), args, typed)
    return _run(folder.resolve(), args, typed)


def _check_folder(folder: Path) -> None:
    such = "name a run's or a sweep's folder, such as runs/DAY/TIME-ID"
    if not folder.is_dir():
        raise BadRequest(f"resume={folder}: no such folder; {such}")
    if (folder / record.SWEEP).is_file() or (folder / ".hydra" / "config.yaml").is_file():
        return
    if above := record.run_around(folder):
        raise BadRequest(f"resume={folder}: holds checkpoints of a run; name the run: {_typed(above)}")
    below = [path.parent for path in folder.glob(f"**/{record.SWEEP}")]
    below += [run for run in record.runs_below(folder) if record.sweep_of(run) is None]
    if below:
        newest = max(below, key=lambda path: path.stat().st_mtime)
        why = f"a folder above {len(below)} of runs and sweeps"
        raise BadRequest(f"resume={folder}: {why}; name one, such as {_typed(newest)}")
    if (folder / "comparison.json").is_file():
        raise BadRequest(f"resume={folder}: holds a comparison, which gpt2exp-compare makes anew; {such}")
    raise BadRequest(f"resume={folder}: neither a run's folder nor a sweep's; {such}")


def _typed(folder: Path) -> str:
    return terminal.pasted(config.typed("resume", terminal.place(folder)))


# --- a run -----------------------------------------------------------------------------------------------------------


def _run(folder: Path, args: argparse.Namespace, typed: list[Override]) -> request.Plan:
    for override in typed:
        if override.is_sweep_override():
            text = override.input_line
            raise BadRequest(f"{text}: {terminal.short(folder)} is one run; leave it out, or name a sweep's folder")
    try:
        before, gone, overrides = record.asked(folder)
    except BadRequest as error:
        raise BadRequest(f"resume={folder}: {error}; put the files back, or start a new run") from error
    recorded = OmegaConf.create(config.plain(before))  # resolved: what follows train.steps keeps the value it had
    overrides = _of_today(overrides, gone)
    began_in, config_dir = _surroundings(folder)
    changed: dict[str, Any] = {}
    if own := [override for override in typed if not _is_hydra(override)]:
        args = copy.copy(args)
        args.config_dir = args.config_dir or config_dir
        changed = _changes(args, overrides, [str(override.input_line) for override in own])
    refused = [key for key in changed if not _within(key, MAY_CHANGE)]
    if refused:
        now = ", ".join(f"{key}={show(_value(before, key))}" for key in refused)
        what = ", ".join(f"{key}={show(changed[key])}" for key in refused)
        why = f"{terminal.short(folder)} began with {now}"
        follows = any("${" in str(record.written(folder).get(key)) for key in refused)  # another key that was typed
        remedy = f"add {now}" if follows else "leave it out"
        raise BadRequest(f"{what}: {why}; {remedy} to go on, or start a new run without resume")
    for key, value in changed.items():
        on_hub = before.data.name is DataName.hub and not Path(str(value)).expanduser().exists()
        if key == "data.path" and value is not None and not on_hub:
            value = str(Path(value).expanduser().absolute())  # as typed it starts here, and the run's others there
        OmegaConf.update(recorded, key, value.value if isinstance(value, Enum) else value)
        overrides = [text for text in overrides if text.lstrip("+").partition("=")[0] != key]
        overrides.append(f"{key}={show(value)}")
    after = config.parse(recorded)
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
    notes = _notes(before, after, changed)
    if steps and not record.saved(folder):
        notes.append(f"no checkpoint was saved: its {steps} steps are done again, from the start")
    if done:
        more = f"to train on, add train.steps=N above {steps}"
        notes = [f"{terminal.short(folder)} is done: {steps} of {after.train.steps} steps; {more}"]
    notes += _gone_note(gone)
    job = request.Job(tuple(overrides), after, done=done)
    composed = recorded if changed and not done else None
    return request.Plan(
        (job,), False, folder, True, tuple(overrides), composed, resumed=True, cwd=began_in, notes=tuple(notes)
    )


def _is_hydra(override: Override) -> bool:
    return override.key_or_group.split("/")[0].split(".")[0] == "hydra"


def _of_today(texts: Sequence[str], gone: Mapping[str, Any]) -> list[str]:
    """Recorded overrides without those of the keys `gone`; keys that have moved under today's names."""
    lost = {*gone, *(key.split(".")[0] for key in gone)} - set(request.SECTIONS)
    moved = config.MOVED.keys() - set(config.keys())
    told = {text: text.lstrip("+").partition("=")[0] for text in texts}
    return [
        text.replace(key, config.MOVED[key], 1) if key in moved else text
        for text, key in told.items()
        if key not in lost
    ]


def _gone_note(gone: Mapping[str, Any]) -> list[str]:
    told = ", ".join(f"{key}={show(value)}" for key, value in sorted(gone.items()))
    return [f"{told}: no key of this version, recorded by another; what is to do is done without it"] if gone else []


def _within(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _value(of: RunConfig, key: str) -> Any:
    """None where the choice made has no such key."""
    value: Any = of
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def _surroundings(folder: Path) -> tuple[Path | None, str | None]:
    """Where a run was started, and its `--config-dir`, each if it is still there."""
    try:
        runtime = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime
        sources = {source.provider: source.path for source in runtime.config_sources}
        began_in, config_dir = Path(runtime.cwd), sources.get("command-line")
    except (OSError, YAMLError, OmegaConfBaseException, TypeError):
        return None, None
    there = config_dir is not None and Path(config_dir).is_dir()
    return began_in if began_in.is_dir() else None, config_dir if there else None


def _changes(args: argparse.Namespace, overrides: list[str], typed: list[str]) -> dict[str, Any]:
    """What typing more changes in a configuration: new values by dotted key."""
    with request.composing(args) as loader:
        name = args.config_name or "config"

        def composed(texts: list[str]) -> RunConfig:
            found = loader.load_configuration(name, texts, run_mode=RunMode.RUN)
            return config.parse({str(key): found._get_node(key) for key in found if key != "hydra"})

        before, after = composed(overrides), composed([*overrides, *typed])
    return {key: _value(after, key) for key in list(config.keys()) if _value(after, key) != _value(before, key)}


def _notes(before: RunConfig, after: RunConfig, changed: dict[str, Any]) -> list[str]:
    notes = []
    for key in changed:
        if not _within(key, HOUSEKEEPING):
            notes.append(f"{key}: {show(_value(after, key))} from here on, {show(_value(before, key))} before")
    if "train.steps" in changed and after.optimizer.schedule is Schedule.cosine and not after.optimizer.schedule_steps:
        notes.append("the steps to come take their learning rates from a cosine over the new train.steps")
    return notes


# --- a sweep ---------------------------------------------------------------------------------------------------------


def _sweep(folder: Path, args: argparse.Namespace, typed: list[Override]) -> request.Plan:
    try:
        known = json.loads((folder / record.SWEEP).read_text(encoding="utf-8"))
        flags = get_args_parser().parse_args([str(word) for word in known["argv"]])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"resume={folder}: its {record.SWEEP} cannot be read; put it back") from error
    if "folders" not in known:
        raise BadRequest(f"resume={folder}: its sweeper made up the jobs as it went; only sweeps of lists can go on")
    runs, gone = _recorded(folder)
    began_in = Path(known.get("cwd", "."))
    if args.config_dir:
        flags.config_dir = str(Path(args.config_dir).absolute())
    elif flags.config_dir:
        flags.config_dir = str((began_in / flags.config_dir).absolute())
    with request.composing(flags) as loader:
        name = flags.config_name or "config"
        texts = _merged(loader, name, _of_today(flags.overrides, gone), typed, folder)
        asked = request.compose(loader, name, texts, multirun=True)
    return dataclasses.replace(
        asked,
        jobs=tuple(_placed(folder, asked.jobs, runs)),
        notes=(*asked.notes, *_gone_note(gone)),
        folder=folder,
        resumed=True,
        cwd=began_in if began_in.is_dir() else None,
        config_dir=flags.config_dir,
    )


def _merged(loader: ConfigLoaderImpl, name: str, recorded: list[str], typed: list[Override], folder: Path) -> list[str]:
    """The recorded request with the typed values added to its axes; housekeeping and Hydra's own keys are replaced."""
    master = loader.load_configuration(name, recorded, run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False)
    axes = request.axes(loader, [*request.preset(master), *recorded])
    added = request.axes(loader, [str(override.input_line) for override in typed])
    jobs: list[RunConfig] = []
    for key, texts in added.items():
        bare = key.lstrip("+")
        if bare == "experiment" and texts != axes.get(key):
            raise BadRequest(f"{texts[0]}: a study is a sweep of its own; leave out resume to start it")
        if bare.split("/")[0].split(".")[0] == "hydra" or _within(bare, HOUSEKEEPING):
            axes[key] = texts
            continue
        if key not in axes:
            jobs = jobs or [job.config for job in request.compose(loader, name, recorded, multirun=True).jobs]
            axes[key] = [_default(bare, master, jobs, folder)]
        there = [request.read(loader, [text])[0].value() for text in axes[key]]
        axes[key] += [text for text in texts if request.read(loader, [text])[0].value() not in there]
    return [f"{key}={','.join(text.partition('=')[2] for text in texts)}" for key, texts in axes.items()]


def _default(key: str, master: DictConfig, jobs: Sequence[RunConfig], folder: Path) -> str:
    """What every job of the sweep has for a key that none was told, as an override."""
    if key in master.hydra.runtime.choices:
        return f"{key}={master.hydra.runtime.choices[key]}"
    found = {show(_value(job, key)).replace(" ", "") for job in jobs}
    if len(found) > 1:
        why = f"the jobs of {terminal.short(folder)} have {' and '.join(sorted(found))}"
        raise BadRequest(f"{key}: {why}; start a sweep of its own")
    return f"{key}={found.pop()}"


def _recorded(folder: Path) -> tuple[dict[str, list[Path]], dict[str, Any]]:
    """The runs of a sweep by what they compute, and what they have for keys that are none today.

    Raises:
        BadRequest: they differ in such a key, so that which of them is which job cannot be told.
    """
    runs, gone = defaultdict(list), dict[str, Any]()
    for run in record.runs_below(folder):
        try:
            of, unknown, _ = record.asked(run)
        except BadRequest:
            continue  # Hydra's own record is damaged: the job is run anew, beside it
        for key, value in unknown.items():
            if gone.setdefault(key, value) != value and not config.is_housekeeping(key):
                why = f"its runs have {key}={show(gone[key])} and {show(value)}, which is no key of this version"
                raise BadRequest(f"resume={folder}: {why}; go on with the version that began it, or start a new sweep")
        runs[config.identity(of)].append(run)
    return runs, gone


def _placed(folder: Path, jobs: Sequence[request.Job], runs: Mapping[str, Sequence[Path]]) -> list[request.Job]:
    """The jobs with their folders: those of before by what they compute, new ones numbered on from there."""
    known = {identity: list(places) for identity, places in runs.items()}
    numbers = [-1]
    for path in folder.iterdir():
        head = path.name.partition("_")[0]
        numbers += [int(head)] if head.isdigit() else []
    free = max(numbers) + 1
    placed = []
    for job in jobs:
        if places := known.get(config.identity(job.config)):
            run = places.pop(0)
            # a diverged run would diverge again: that is its result
            done = record.row(run, folder)["state"] in ("done", "diverged")
            placed.append(dataclasses.replace(job, folder=str(run.relative_to(folder)), done=done))
        else:
            slug = job.folder.partition("_")[2]
            placed.append(dataclasses.replace(job, folder=request.numbered(free, slug)))
            free += 1
    return placed
