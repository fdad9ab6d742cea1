"""What the figures of a comparison are drawn from: an axis, its arms, and metrics along their runs. No matplotlib."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2exp.compare.comparison import Comparison, Grid, Row
from gpt2exp.compare.effect import Effect

Array = npt.NDArray[np.float64]
Curve = tuple[Array, Array]
"""Places along x and the values there."""
Replicates = list[tuple[int, Curve | None]]
"""Curves with the seed of each; None where a run did not measure it."""
POINTS = 300
"""Points of a curve; longer runs are averaged in equal stretches."""


@dataclass
class Arm:
    """The finished runs of one arm, by seed, and how it is drawn."""

    name: str
    colour: str
    dash: Any
    cells: list[tuple[int, Row]]


@dataclass
class Axis:
    """What the figures of an axis are drawn from."""

    key: str | None
    arms: list[Arm]
    grid: Grid
    comparison: Comparison
    clock: str
    """What runs along x: `step`, or `tokens` where a step does not cost the same in every run."""

    def effects(self, metric: str) -> list[Effect]:
        """Of its arms, in one metric, where there is a difference."""
        found = [effect for effect in self.comparison.axes if (effect.key, effect.metric) == (self.key, metric)]
        return [one for one in found if one.arm_mean is not None and one.budget == self.grid.budget]

    def arm(self, effect: Effect) -> Arm:
        """The arm of an effect."""
        return next(arm for arm in self.arms if arm.name == effect.arm)

    def curve(self, row: Row, key: str) -> Curve | None:
        """A metric of a run along the clock; None where it was never measured."""
        lines = self.grid.metrics(row)  # of a resumed run several may have one step: the last counts
        points = {line[self.clock]: line[key] for line in lines if key in line}
        x = sorted(points)
        return (np.array(x, dtype=float), np.array([points[at] for at in x], dtype=float)) if points else None

    def replicates(self, key: str) -> list[tuple[Arm, Replicates]]:
        """A metric's curves of every run, by arm."""
        return [(arm, [(seed, self.curve(row, key)) for seed, row in arm.cells]) for arm in self.arms]


def by_seed(curves: Replicates) -> Curve | None:
    """Where all curves have points (points,), and a row a seed (seeds, points): a seed's curves are averaged first."""
    known = [(seed, curve) for seed, curve in curves if curve is not None]
    x = functools.reduce(np.intersect1d, [curve[0] for _, curve in known]) if known else np.array([])
    if not len(x):
        return None
    seeds: dict[int, list[Array]] = defaultdict(list)
    for seed, (own, y) in known:
        seeds[seed].append(y[np.searchsorted(own, x)])
    y = np.stack([np.mean(rows, axis=0) for rows in seeds.values()])
    if len(x) > POINTS:
        starts = np.arange(0, len(x), math.ceil(len(x) / POINTS))
        sizes = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts, axis=1) / sizes
    return x, y
