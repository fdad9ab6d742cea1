"""The tuning of arms: the losses over the values of a tuned key, and at which learning rate the arms are compared.

The runs that tune an arm have seeds of their own (`sweep.tune_seeds`) and are never compared. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gpt2exp.config import CONTROL, key_and_values
from gpt2exp.run.metrics import Summary, judged, number_of
from gpt2exp.run.terminal import printable
from gpt2exp.schema import at, is_housekeeping
from gpt2exp.section import override_key, show

if TYPE_CHECKING:
    from gpt2exp.compare.rows import Group, Row

RATE = "optimizer.lr"
CALLED = {RATE: "learning rate", "optimizer.weight_decay": "weight decay", "optimizer.betas": "betas"}
"""Names in words of the keys in which an optimizer is tuned."""
NEEDS = ("optimizer", "schedule", "model", "init", "precision", "train.steps", "train.batch_size", "train.seq_len",
         "train.grad_accum_steps", "train.tokens_per_step")  # fmt: skip
"""Axes that change the best learning rate (keys, groups, sections): one rate for all their arms is unfair to some.

The data do not change it. Other keys compute the same in another way (`train.device`, `train.compile`).
"""
ALSO = {"optimizer": ("optimizer.weight_decay", "optimizer.betas")}
"""By axis, what else would have to be tuned for each arm."""


@dataclass
class Curve:
    """The losses of an arm over the values of the tuned key: an entry of `comparison.json`'s `tuning`."""

    key: str
    arm: str  # its overrides, or its arms of all axes: `optimizer=adamw`
    losses: dict[str, list[float | str]]  # by value as typed, for each tuning seed: the final loss, or a state
    best: str | None = None  # the value at which the arm is compared

    def mean(self, value: str) -> float | None:
        """The mean loss over the tuning seeds: infinite if a run diverged, None if one failed or has not ended."""
        found = [math.inf if loss == "diverged" else loss for loss in self.losses[value]]
        return statistics.fmean(float(loss) for loss in found) if not any(isinstance(n, str) for n in found) else None

    @property
    def left(self) -> int:
        """How many tuning runs have not ended."""
        return sum(isinstance(n, str) and n not in ("diverged", "failed") for of in self.losses.values() for n in of)

    def choose(self) -> str | None:
        """The value with the lowest mean loss, the first of equals; None before all runs have ended, or if none has."""
        means = {value: mean for value in self.losses if (mean := self.mean(value)) is not None and math.isfinite(mean)}
        return min(means, key=means.__getitem__) if means and not self.left else None

    def beyond(self) -> str:
        """If the best value is the first or last that was measured, a clause that names the value to add.

        That value continues the ratio of the last two, to one digit. There is none below zero.
        """
        order = sorted(self.losses, key=float)
        tried = [value for value in order if self.mean(value) is not None]
        if self.best not in (tried[:1] + tried[-1:]) or len(order) < 2:
            return ""
        inside = order if self.best == tried[0] else order[::-1]
        edge, inner = float(self.best), float(inside[(inside.index(self.best) + 1) % len(order)])
        if edge <= 0:
            return ""
        add = f"{2 * edge:g}"
        if inner > 0:
            exact = edge * edge / inner
            further = float(f"{exact:.0e}")
            further = further if abs(math.log(further / inner)) > abs(math.log(edge / inner)) else float(f"{exact:.1e}")
            short = np.format_float_scientific(further, trim="-", exp_digits=1)  # as people type it: 3e-3
            add = f"{further:g}" if 0.01 <= further < 1e4 else short
        return f"the optimum may lie beyond {self.best}: add {add}"

    def said(self) -> str:
        """The optimum in a line, what lies beyond it, and the values left out because a run failed there."""
        if self.best is not None:
            text = f"best at {self.key}={self.best}"
            text += f", at the edge of the values: {beyond}" if (beyond := self.beyond()) else ""
        elif self.left:
            text = f"{self.left} tuning runs have not ended, so that it is not compared yet"
        else:
            text = f"no value of {self.key} has a loss, so that it is not compared: start a sweep with others"
        text += f"; {', '.join(self.failed)} left out, since a run failed there" if self.failed else ""
        return f"{self.arm or 'the arm'}: {text}"

    @property
    def failed(self) -> list[str]:
        """The values that are left out because a run failed there."""
        return [value for value, losses in self.losses.items() if "failed" in losses]

    @property
    def doubtful(self) -> bool:
        """Whether the optimum is not known to lie among the values."""
        return self.best is None or bool(self.beyond() or self.failed)


def final(row: Summary) -> float | str:
    """The loss by which a run is judged, or the state of one that has none."""
    loss = number_of(row, judged(row)) if row["state"] == "done" else None
    return row["state"] if loss is None else loss


# --- of runs that are compared ---------------------------------------------------------------------------------------


def key_of(row: Row) -> str:
    """The key that a run's sweep tunes for each arm; empty without one."""
    return key_and_values(at(row.get("config"), "sweep.tune"))[0]


def separate(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The runs to compare, and those that only tuned them.

    If all runs to compare were tuned in one key, they are marked with it (`tuned`): then it is no axis.
    """
    trials, others = list["Row"](), list["Row"]()
    for row in rows:
        tries = key_of(row) and row["config"]["seed"] in at(row["config"], "sweep.tune_seeds")
        (trials if tries else others).append(row)
    keys = {key_of(row) for row in others if "config" in row}
    if len(keys) == 1 and (key := keys.pop()):
        others = [{**row, "tuned": key} for row in others]
    return others, trials


def arm_of(overrides: Sequence[str], key: str) -> tuple[str, ...]:
    """The overrides that make a run's arm: all but its seed, data order, tuned key and housekeeping."""
    told, others = {text: override_key(text) for text in overrides}, ("seed", CONTROL, key)
    return tuple(text for text, name in told.items() if name not in others and not is_housekeeping(name))


def names(arms: Sequence[tuple[str, ...]]) -> list[str]:
    """Each arm's name: those of its overrides that not all arms have, such as `optimizer=adamw`."""
    alike = set.intersection(*map(set, arms)) if arms else set()
    return [printable(", ".join(text for text in arm if text not in alike)) for arm in arms]


def curves(trials: Sequence[Row], rows: Sequence[Row]) -> list[Curve]:
    """The curve of each arm, in the order of their folders, with the value at which the arm's runs are compared."""
    found: dict[tuple[str, ...], Curve] = {}
    for row in sorted(trials, key=lambda row: row["folder"]):
        key = key_of(row)
        curve = found.setdefault(arm_of(row["overrides"], key), Curve(key, "", {}))
        curve.losses.setdefault(typed(row, key), []).append(final(row))
    compared = {arm_of(row["overrides"], of): typed(row, of) for row in rows if (of := row.get("tuned"))}
    for (arm, curve), name in zip(found.items(), names(list(found)), strict=True):
        curve.arm, curve.best = name, compared.get(arm)
    return list(found.values())


def typed(row: Row, key: str) -> str:
    """A run's value of a key, as typed."""
    told = dict(text.lstrip("+").split("=", 1) for text in row.get("overrides", []))
    return told.get(key) or show(at(row["config"], key))


def condition(key: str, baseline: str, arm: str, groups: Sequence[Group], swept: Mapping[str, Sequence[str]]) -> str:
    """At which learning rate the two arms of an axis ran, as a clause; empty if the axis does not change the best one.

    `groups`: the pairs; `swept`: all axes.
    """
    needs = any(key == need or key.startswith((f"{need}.", f"{need}/")) for need in NEEDS)
    if not needs or key == RATE:
        return ""
    runs = [run for group in groups for run in group.runs]
    by, said = runs[0].get("tuned", ""), list[str]()
    if by:
        sides = (" and ".join(dict.fromkeys(typed(group.runs[side], by) for group in groups)) for side in (1, 0))
        each = "; ".join(f"{name} {values}" for name, values in zip((arm, baseline), sides, strict=True))
        said.append(f"each at its own best {CALLED.get(by, by)} ({each})")
    if RATE not in (by, *swept):
        several = len({at(run["config"], RATE) for run in runs}) > 1
        rate = "each arm's own learning rate" if several else "one learning rate for all arms"
        said.append(f"at {rate}, not tuned")
    more = [other for other in ALSO.get(key, ()) if other not in (by, *swept)]
    if more := [CALLED[other] for other in more if any(at(run["config"], other) is not None for run in runs)]:
        said.append(f"{' and '.join(more)} not tuned")
    return ", ".join(said)
