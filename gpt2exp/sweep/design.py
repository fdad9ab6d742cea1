"""From a sweep's axes to its jobs: which combinations of their arms are run. No torch.

An axis is a list of arms. An arm is one override, or one override of each key that moves together.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from gpt2exp.config import CONTROL, TOGETHER, Design, SweepConfig, key_and_values, moving
from gpt2exp.schema import is_housekeeping, keys
from gpt2exp.section import BadRequest, default_of, require, show
from gpt2exp.sweep import tuning
from gpt2exp.sweep.composing import Composer
from gpt2exp.sweep.overrides import as_meant, key_types, parse_overrides

Arm = tuple[str, ...]
DEFINING = ("together", "design", "control", "reuse", "over", "until", "tune")
"""The keys of `sweep` that decide which jobs there are."""


def preset(master: DictConfig) -> list[str]:
    """The axes that a study or a sweeper has in its file, as overrides."""
    return [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]


def axes(overrides: Sequence[Override]) -> dict[str, list[str]]:
    """The overrides by key: one for a constant, one for each value of an axis. The last override of a key counts."""
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


def together_overrides(composer: Composer, together: Sequence[str]) -> dict[str, list[str]]:
    """The overrides in `sweep.together`, by key."""
    SweepConfig(together=list(together))  # checks that each is KEY=A,B
    return axes(parse_overrides(composer, [as_meant(text) for text in together]))


def budgets(composer: Composer, over: str, others: dict[str, list[str]]) -> dict[str, list[str]]:
    """The axis that `sweep.over` adds, as `axes` returns it, ascending; `others`: all other overrides.

    Raises:
        BadRequest: its key is no number or is among the others, it has one value, or nothing else varies.
    """
    again = "try sweep.over=train.steps=50,100,200"
    require("=" in over, "sweep.over", over, "must be KEY=A,B", again)
    ((key, texts),) = axes(parse_overrides(composer, [over])).items()
    counts = key in keys() and not is_housekeeping(key) and key != "seed" and bool({int, float} & {*key_types(key)})
    vary = any(len(each) > 1 for name, each in others.items() if name != "seed")
    for ok, why, remedy in (
        (counts, f"{key} is no number that makes a run larger", again),
        (len({*texts}) > 1, "one value is no axis", again),
        (key not in others, f"{key} is given twice", f"leave out {key}=..."),
        (vary, "nothing else varies", "add what to compare: model.tie_weights=true,false"),
    ):
        require(ok, "sweep.over", over, why, remedy)
    return {key: sorted(texts, key=lambda text: float(text.partition("=")[2]))}


def together(overrides: Mapping[str, Sequence[str]], typed: Mapping[str, Sequence[str]]) -> dict[str, list[Arm]]:
    """The axis of the keys that move together, if there are any: its first arm has the first override of each key.

    `overrides`: those of the keys that move together. `typed`: those of all other keys.

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


def check_single(typed: Mapping[str, Sequence[str]]) -> None:
    """Refuse several values of a key that decides which jobs there are; `typed`: the overrides of each key."""
    for key in (f"sweep.{name}" for name in (*DEFINING, "min_seeds", "max_seeds", "max_hours", "margin")):
        if len(typed.get(key, ())) > 1:
            raise BadRequest(f"{', '.join(typed[key])}: it says which jobs there are; name one value of it")


def check_unused(sweep: SweepConfig, *, multirun: bool) -> None:
    """Refuse the keys that decide which jobs there are, for one run and for a sweeper that proposes its own."""
    why = "one run has no arms to compare; add -m, and what to compare, such as model.tie_weights=true,false"
    why = "it takes the basic sweeper; leave out hydra/sweeper" if multirun else why
    for name in DEFINING:
        value, usual = getattr(sweep, name), default_of(SweepConfig.__dataclass_fields__[name])
        if value != usual:
            raise BadRequest(f"sweep.{name}={show(value)}: {why}")


def arms(jobs: Iterable[Sequence[str]], sweep: SweepConfig) -> dict[str, list[str]]:
    """By key the values that the overrides of the jobs give it; of a key that changes no result only the last.

    Keys that move together are one entry, whose values are overrides. The keys of `sweep.control` and `sweep.tune` are
    left out.
    """
    found: dict[str, dict[str, None]] = {}
    for texts in jobs:
        told = dict(text.split("=", 1) for text in tuning.without_tuned(texts, sweep.tune))
        if sweep.control:
            told.pop(CONTROL, None)
        moved = [key for key in moving(sweep.together) if key in told]
        if moved:
            told[TOGETHER.join(moved)] = " ".join(f"{key}={told.pop(key)}" for key in moved)
        for key, value in told.items():
            found[key] = {value: None} if is_housekeeping(key) else {**found.get(key, {}), value: None}
    return {key: list(values) for key, values in found.items()}


def asked(jobs: Iterable[Sequence[str]], sweep: SweepConfig) -> dict[str, list[str]]:
    """By key the values to type, to ask for all these jobs in one command line."""
    each = {key: values for key, values in arms(jobs, sweep).items() if TOGETHER not in key and key != sweep.budget}
    if sweep.until:
        each.pop("seed", None)
    if sweep.design is Design.leave_one_out:  # there the baseline is typed last
        each = {key: values if key == "seed" else values[::-1] for key, values in each.items()}
    return each


def jobs(axes: Mapping[str, Sequence[Arm]], sweep: SweepConfig, control: Arm | None) -> Iterator[list[str]]:
    """The overrides of each job. In every design but the product, the baseline comes first at each seed and budget.

    The baseline has the first arm of each axis; with `leave_one_out` the last, and is then the full set. `control`: the
    overrides with which the baseline is run once more.

    Raises:
        BadRequest: an axis has more arms than the design can take, or the control's key is an axis.
    """
    design = sweep.design
    crossed = {"seed", sweep.budget, key_and_values(sweep.tune)[0]}  # the whole design is run for each value of these
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
