"""Which combinations of a sweep's arms are its jobs. No torch.

An axis is a list of arms. An arm is what it types: one override, or of keys that move together one of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gpt2exp.config import CONTROL, TOGETHER, Design, SweepConfig, key_and_values, moving
from gpt2exp.schema import is_housekeeping
from gpt2exp.section import BadRequest, default_of, show
from gpt2exp.sweep import tuning

Arm = tuple[str, ...]
RULES = ("together", "design", "control", "reuse", "over", "until", "tune")
"""Keys of `sweep` that say which jobs there are."""


def together(overrides: Mapping[str, Sequence[str]], typed: Mapping[str, Sequence[str]]) -> dict[str, list[Arm]]:
    """The axis of the keys that move together, if there are any: its first arm has the first override of each.

    `overrides`, `typed`: the overrides of those keys, and of the keys typed by themselves.

    Raises:
        BadRequest: the keys have different numbers of values, or one of them cannot be part of an axis.
    """
    for key, texts in overrides.items():
        if key in typed:
            raise BadRequest(f"{typed[key][0]}: {key} is in sweep.together too; name it in one of the two")
        if key in ("seed", "experiment") or is_housekeeping(key) or key.startswith(("hydra.", "hydra/")):
            raise BadRequest(f"sweep.together: {texts[0]} is no arm to compare; sweep {key} by itself, or leave it out")
    counts = {key: len(texts) for key, texts in overrides.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise BadRequest(f"sweep.together: {told}; give each key as many values as there are arms")
    return {TOGETHER.join(overrides): list(zip(*overrides.values(), strict=True))} if overrides else {}


def _crossed(sweep: SweepConfig) -> set[str]:
    """The keys at each value of which the whole design is run: the seed, the budget, the tuned key."""
    return {"seed", sweep.budget, key_and_values(sweep.tune)[0]}


def check_single(typed: Mapping[str, Sequence[str]]) -> None:
    """Refuse several values of what says which jobs there are; `typed`: the overrides of each key."""
    for key in (f"sweep.{name}" for name in (*RULES, "min_seeds", "max_seeds", "max_hours", "margin")):
        if len(typed.get(key, ())) > 1:
            raise BadRequest(f"{', '.join(typed[key])}: it says which jobs there are; name one value of it")


def check_unused(sweep: SweepConfig, *, multirun: bool) -> None:
    """Refuse what says which jobs there are, for one run and for another sweeper, which makes up its jobs."""
    why = "one run has no arms to compare; add -m, and what to compare, such as model.tie_weights=true,false"
    why = "it takes the basic sweeper; leave out hydra/sweeper" if multirun else why
    for name in RULES:
        value, usual = getattr(sweep, name), default_of(SweepConfig.__dataclass_fields__[name])
        if value != usual:
            raise BadRequest(f"sweep.{name}={show(value)}: {why}")


def arms(jobs: Iterable[Sequence[str]], sweep: SweepConfig) -> dict[str, list[str]]:
    """The values of each overridden key over the jobs' overrides; of one that changes no result, the last.

    The keys that move together are one, and their values overrides. Without the control's key and a tuned one.
    """
    found: dict[str, dict[str, None]] = {}
    for texts in jobs:
        told = dict(text.split("=", 1) for text in tuning.untold(texts, sweep.tune))
        if sweep.control:
            told.pop(CONTROL, None)
        moved = [key for key in moving(sweep.together) if key in told]
        if moved:
            told[TOGETHER.join(moved)] = " ".join(f"{key}={told.pop(key)}" for key in moved)
        for key, value in told.items():
            found[key] = {value: None} if is_housekeeping(key) else {**found.get(key, {}), value: None}
    return {key: list(values) for key, values in found.items()}


def asked(jobs: Iterable[Sequence[str]], sweep: SweepConfig) -> dict[str, list[str]]:
    """By key the values that a command line gives to ask for all these jobs."""
    each = {key: values for key, values in arms(jobs, sweep).items() if TOGETHER not in key and key != sweep.budget}
    if sweep.until:
        each.pop("seed", None)
    if sweep.design is Design.leave_one_out:  # there the baseline is typed last
        each = {key: values if key == "seed" else values[::-1] for key, values in each.items()}
    return each


def jobs(axes: Mapping[str, Sequence[Arm]], sweep: SweepConfig, control: Arm | None) -> Iterator[list[str]]:
    """The overrides of each job; of all designs but the product the baseline's first, at each seed and budget.

    The baseline has the first arm of each axis; of `leave_one_out` the last, and is the full set. `control`: what the
    baseline is told once more.

    Raises:
        BadRequest: an axis has more arms than the design can take, or the control's key is one.
    """
    design, crossed = sweep.design, _crossed(sweep)
    if design is Design.leave_one_out:
        if many := next((key for key, arms in axes.items() if key not in crossed and len(arms) > 2), None):
            why = f"{many} has {len(axes[many])} values, so that nobody knows which leaves it out"
            raise BadRequest(f"sweep.design=leave_one_out: {why}; name two, without and with, or try one_at_a_time")
        axes = {key: arms if key in crossed else arms[::-1] for key, arms in axes.items()}
    if control and CONTROL in axes:
        raise BadRequest(f"{axes[CONTROL][0][0]}: sweep.control=true sets it; leave one of the two out")
    first = {key: arms[0] for key, arms in axes.items()}
    others = {key: arms[1:] for key, arms in axes.items() if key not in crossed}
    if design is not Design.product and not any(others.values()):
        raise BadRequest(f"sweep.design={design}: nothing varies but the seed; add what to compare")
    fixed = {key: arms if key in crossed or design is Design.product else arms[:1] for key, arms in axes.items()}
    combined = [dict(zip(axes, arms, strict=True)) for arms in itertools.product(*fixed.values())]
    if design is not Design.product:
        combined = [job for at in combined for job in (at, *(at | {key: arm} for key in others for arm in others[key]))]
    for job in combined:
        yield [*itertools.chain(*job.values())]
        if control and all(job[key] == first[key] for key in others):
            yield [*itertools.chain(*job.values(), control)]
