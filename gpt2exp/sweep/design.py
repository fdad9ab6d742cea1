"""Which combinations of a sweep's arms are its jobs. No torch.

An axis is a list of arms. An arm is what it types: one override, or of keys that move together one of each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from omegaconf import DictConfig

from gpt2exp.config import TOGETHER, SweepConfig
from gpt2exp.schema import is_housekeeping
from gpt2exp.section import BadRequest, default_of, show
from gpt2exp.sweep.composing import Job

Arm = tuple[str, ...]


def together(moving: Mapping[str, Sequence[str]], typed: Mapping[str, Sequence[str]]) -> dict[str, list[Arm]]:
    """The axis of the keys that move together, if there are any: its first arm has the first override of each.

    `moving`, `typed`: the overrides of those keys, and of the keys typed by themselves.

    Raises:
        BadRequest: the keys have different numbers of values, or one of them cannot be part of an axis.
    """
    for key, texts in moving.items():
        if key in typed:
            raise BadRequest(f"{typed[key][0]}: {key} is in sweep.together too; name it in one of the two")
        if key in ("seed", "experiment") or is_housekeeping(key) or key.startswith(("hydra.", "hydra/")):
            raise BadRequest(f"sweep.together: {texts[0]} is no arm to compare; sweep {key} by itself, or leave it out")
    counts = {key: len(texts) for key, texts in moving.items()}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise BadRequest(f"sweep.together: {told}; give each key as many values as there are arms")
    return {TOGETHER.join(moving): list(zip(*moving.values(), strict=True))} if moving else {}


def check_unused(sweep: DictConfig, why: str) -> None:
    """Refuse what says which jobs there are, for a request whose jobs are no combinations."""
    for name in ("together",):
        if sweep[name] != default_of(SweepConfig.__dataclass_fields__[name]):
            raise BadRequest(f"sweep.{name}={show(list(sweep[name]))}: {why}")


def arms(jobs: Sequence[Job]) -> dict[str, list[str]]:
    """The values of each overridden key over the jobs; of one that changes no result, the last.

    The keys that move together are one, and their values overrides.
    """
    found: dict[str, dict[str, None]] = {}
    for job in jobs:
        told = dict(text.split("=", 1) for text in job.overrides)
        moved = [key for text in job.config.sweep.together if (key := text.partition("=")[0].strip()) in told]
        if moved:
            told[TOGETHER.join(moved)] = " ".join(f"{key}={told.pop(key)}" for key in moved)
        for key, value in told.items():
            found[key] = {value: None} if is_housekeeping(key) else {**found.get(key, {}), value: None}
    return {key: list(values) for key, values in found.items()}


def jobs(axes: Mapping[str, Sequence[Arm]]) -> Iterator[list[str]]:
    """The overrides of each job."""
    for arms in itertools.product(*axes.values()):
        yield [*itertools.chain(*arms)]
