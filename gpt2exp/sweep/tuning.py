"""The stage before a comparison in which each arm finds its own best value of a key: `sweep.tune`. No torch.

Every arm is run at every value on the tuning seeds, in the folder `tuning/` of the sweep. As soon as all tuning runs of
an arm have ended its value is chosen and written to `sweep.json`; its runs to be compared take that value, and stay
with it when the sweep is resumed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from gpt2exp.compare.tuned import Curve, arm_of, final, names
from gpt2exp.config import SweepConfig, key_and_values
from gpt2exp.run import record
from gpt2exp.schema import check_key, is_housekeeping, parse, put
from gpt2exp.section import override_key, require
from gpt2exp.sweep.composing import Composer, Job, write_hydra_folder


def first(composer: Composer, sweep: SweepConfig, told: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The tuned key at its first value: jobs are composed with it until their arm's own value is chosen.

    `told`: the other overrides, by key.

    Raises:
        BadRequest: the key cannot be tuned, or is among the other overrides.
    """
    key, values = key_and_values(sweep.tune)
    if not key:
        return {}
    if not composer.may_have(key):
        check_key(key, values[0])
    ok = not is_housekeeping(key) and key != "seed"
    require(ok, "sweep.tune", sweep.tune, f"{key} changes no result", "tune another key")
    again = f"{key}={','.join(text.partition('=')[2] for text in told.get(key, ()))}"
    require(key not in told, "sweep.tune", sweep.tune, "each arm has a value of its own", f"leave out {again}")
    return {key: [f"{key}={values[0]}"]}


def check(jobs: Sequence[Job]) -> None:
    """Refuse `sweep.tune` without arms, or with seeds that are compared too."""
    tune, seeds = jobs[0].config.sweep.tune, jobs[0].config.sweep.tune_seeds
    if not tune:
        return
    arms = {arm_of(job.overrides, key_and_values(tune)[0]) for job in jobs}
    remedy = "add what to compare, such as optimizer=adamw,sgd"
    require(len(arms) > 1, "sweep.tune", tune, "nothing varies but the seed", remedy)
    compared = {job.config.seed for job in jobs}
    both, free = sorted(compared & {*seeds}), max(100, *compared, *seeds) + 1
    why, others = f"{', '.join(map(str, both))} would be compared too", range(free, free + len(seeds))
    require(not both, "sweep.tune_seeds", seeds, why, f"try sweep.tune_seeds={','.join(map(str, others))}")


def without_tuned(overrides: Sequence[str], tune: str | None) -> list[str]:
    """The overrides without that of the tuned key."""
    key = key_and_values(tune)[0]
    return [text for text in overrides if not key or override_key(text) != key]


def jobs(composer: Composer, master: Any, compared: Sequence[Job]) -> list[Job]:
    """The jobs that tune the arms of the jobs `compared`, without folders."""
    asked = compared[0].config.sweep
    if not asked.tune:
        return []
    key, values = key_and_values(asked.tune)
    arms = dict.fromkeys(arm_of(job.overrides, key) for job in compared)
    kept = [text for text in compared[0].overrides if is_housekeeping(override_key(text))]
    each = itertools.product(arms, values, asked.tune_seeds)
    return list(composer.jobs(master, ([*kept, *arm, f"{key}={v}", f"seed={seed}"] for arm, v, seed in each)))


def recorded(jobs: Sequence[Job], known: record.Tuning | None = None) -> record.Tuning | None:
    """The tuning runs as `sweep.json` records them; `known`: of an earlier launch, with the values it chose."""
    if not jobs:
        return None
    key, values = key_and_values(jobs[0].config.sweep.tune)
    chosen = {tuple(arm.overrides): arm.best for arm in known.arms} if known else {}
    found = record.Tuning(key, jobs[0].config.sweep.tune_seeds, [])
    arms: dict[tuple[str, ...], record.Tuned] = {}
    for job in jobs:
        arm = arm_of(job.overrides, key)
        of = arms.setdefault(arm, record.Tuned(list(arm), {value: [] for value in values}, chosen.get(arm)))
        told = next(text for text in job.overrides if override_key(text) == key)
        of.runs[told.partition("=")[2]].append(job.folder)
    found.arms = list(arms.values())
    return found


def announced(tuning: record.Tuning, trials: int, jobs: int) -> str:
    """How many jobs each stage has, for a dry run."""
    shape = f"{len(tuning.arms)} arms x {len(tuning.arms[0].runs)} values x {len(tuning.seeds)} seeds"
    seeds = ", ".join(map(str, tuning.seeds))
    text = f"first {trials} jobs that tune {tuning.key} ({shape}: {seeds}), at {', '.join(tuning.arms[0].runs)}"
    return f"{text}; then {jobs} jobs that are compared, each at its arm's best value"


def settle(sweep: Path, jobs: Sequence[Job]) -> tuple[list[Job], list[str]]:
    """Choose the value of every arm whose tuning runs have ended, and record it in `sweep.json`.

    Returns the jobs of the arms that have one, each at that value, and a line for each arm that had none before.
    """
    known = record.Sweep.read(sweep)
    assert known is not None
    assert known.tuning is not None
    key, said = known.tuning.key, list[str]()
    arms = known.tuning.arms
    for arm, name in zip(arms, names([tuple(arm.overrides) for arm in arms]), strict=True):
        finals = {value: [final(record.row(sweep / run, sweep)) for run in runs] for value, runs in arm.runs.items()}
        curve = Curve(key, name, finals, arm.best)
        if not curve.best:
            curve.best = arm.best = curve.choose()
            said.append(f"tuned {curve.said()}" if arm.best else f"not tuned: {curve.said()}")
    best = {tuple(arm.overrides): arm.best for arm in arms if arm.best}
    settled = [_at(job, key, value) for job in jobs if (value := best.get(arm_of(job.overrides, key)))]
    told = {job.folder: list(job.overrides) for job in settled}
    known.jobs = [told.get(name, texts) for name, texts in zip(known.folders or (), known.jobs, strict=True)]
    known.write(sweep)
    for job in settled:
        # with sweep.until, a folder is made when its run begins: that run may not be needed
        if not job.done and (not known.looks or (sweep / job.folder).exists()):
            write_hydra_folder(sweep / job.folder, job)
    return settled, said


def _at(job: Job, key: str, value: str) -> Job:
    """A job with this value of a key; one whose folder is written has it already."""
    if job.unresolved is None:
        return job
    unresolved, told = copy.deepcopy(job.unresolved), (*job.overrides, f"{key}={value}")
    put(unresolved, key, OverridesParser.create().parse_override(f"{key}={value}").value())
    return replace(job, overrides=told, unresolved=unresolved, config=parse(unresolved))
