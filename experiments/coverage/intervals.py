"""How often the intervals of the compute multiplier, of the trend and of a change with budget hold the truth.

`python experiments/coverage/intervals.py` simulates runs, hands their losses to the package's own functions and writes
`coverage.csv` and the tables of the page beside it.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt2exp.compare.effect import late_change
from gpt2exp.compare.inference import Floats, fixed
from gpt2exp.compare.multiplier import log_factors, readable, shared_error, widened

sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import replace_block, write_rows

FOLDER = Path(__file__).parent
SWEEPS, BATCH = 4000, 250
"""Simulated for each line, so that a coverage of 95 % is known to 0.35 % (one standard error); at a time."""
SEEDS = (5, 10)
FACTORS = (0.5, 0.8, 1.0, 1.25)
Row = dict[str, str]


@dataclass(frozen=True)
class Noise:
    """How the losses of a run leave its curve: standard deviations in nats unless said otherwise.

    `shared`: of a step, by its batch, the same in all runs of a sweep (data.order=sequential); `batch`: the same in
    both arms of a seed (shuffled); `own`: of each run. Each lasts: neighbouring points correlate by `lasts`. `seed`: of
    a whole run, the same in both arms; `clock`: by how much of itself a run is ahead or behind.
    """

    name: str
    points: tuple[float, ...]
    shared: float = 0.0
    batch: float = 0.0
    own: float = 0.02
    lasts: float = 0.4
    seed: float = 0.05
    clock: float = 0.03


STEPS = tuple(np.arange(1.0, 201))
NOISES = (
    Noise("validation loss, 5 points", tuple(np.arange(40.0, 201, 40)), own=0.01, lasts=0.2),
    Noise("validation loss, 20 points", tuple(np.arange(10.0, 201, 10)), own=0.01, lasts=0.2),
    Noise("training loss, quiet batches shared by all seeds", STEPS, shared=0.02),
    Noise("training loss, batches shuffled by seed", STEPS, batch=0.05),
    Noise("training loss, loud batches shared by all seeds", STEPS, shared=0.3),
)
"""Measured on nano (8 x 32 tokens): seed 0.05, own 0.02 to 0.06, lasts 0.25 to 0.6, shared 0.4; validation 0.02."""


def law(steps: Floats) -> Floats:
    """A training curve without noise: 10.9 nats at first, 5.6 after 200 steps, still falling."""
    return np.asarray(4.5 + 6.4 * (1 + steps / 12) ** -0.6)


def lasting(rng: np.random.Generator, shape: tuple[int, ...], std: float, lasts: float) -> Floats:
    """Noise of which neighbours along the last axis correlate (an autoregression of first order)."""
    noise = rng.standard_normal(shape)
    for at in range(1, shape[-1]):
        noise[..., at] = lasts * noise[..., at - 1] + math.sqrt(1 - lasts**2) * noise[..., at]
    return noise * std


def runs(rng: np.random.Generator, noise: Noise, sweeps: int, seeds: int, factor: float) -> tuple[Floats, Floats]:
    """The losses of baselines and arms (sweeps, seeds, points); the arms' clock runs `factor` times as fast."""
    steps = np.array(noise.points)
    shape = (sweeps, seeds, len(steps))
    common = rng.normal(0, noise.seed, (sweeps, seeds, 1))
    common = common + lasting(rng, (sweeps, 1, len(steps)), noise.shared, noise.lasts)
    common = common + lasting(rng, shape, noise.batch, noise.lasts)
    base, arm = (
        law(steps * times * np.exp(rng.normal(0, noise.clock, (sweeps, seeds, 1))))
        + lasting(rng, shape, noise.own, noise.lasts)
        + common
        for times in (1.0, factor)
    )
    return base, arm


def multiplier(rng: np.random.Generator, noise: Noise, sweeps: int, seeds: int, factor: float) -> Iterator[list[bool]]:
    """Of sweeps: whether the curves can be read; whether the interval, and one over seeds alone, holds the factor."""
    base, arm = runs(rng, noise, sweeps, seeds, factor)
    factors, beyond, _ = log_factors((noise.points, base), (noise.points, arm))
    errors, truth = shared_error(factors), math.log(factor)
    known = readable(noise.points, base.mean(1)) & readable(noise.points, arm.mean(1))
    for values, error, out, read in zip(factors[..., 0], errors, beyond, known, strict=True):
        over_seeds = fixed(values)
        whole = widened(over_seeds, float(error))
        low, high = (-math.inf if out.min() < 0 else whole.low), (math.inf if out.max() > 0 else whole.high)
        yield [bool(read), low <= truth <= high, over_seeds.low <= truth <= over_seeds.high]


def trend(rng: np.random.Generator, noise: Noise, sweeps: int, seeds: int, factor: float) -> Iterator[list[bool]]:
    """Of sweeps: whether the interval holds by how much the curves' difference moves over the last half."""
    base, arm = runs(rng, noise, sweeps, seeds, factor)
    steps = np.array(noise.points)
    truth = late_change(list(steps), list(law(steps * factor) - law(steps)))
    for pairs in arm - base:
        found = fixed([late_change(noise.points, list(pair)) for pair in pairs])
        yield [True, found.low <= truth <= found.high, True]


def change(rng: np.random.Generator, noise: Noise, sweeps: int, seeds: int, factor: float) -> Iterator[list[bool]]:
    """Of sweeps over 50 and 200 steps: whether the interval holds by how much the final difference changes."""
    at = np.array([50.0, 200.0])
    each = [runs(rng, Noise("", (steps,), own=0.02), sweeps, seeds, factor) for steps in at]
    gaps = [(arm - base)[..., 0] for base, arm in each]
    truth = float(np.diff(law(at * factor) - law(at))[0])
    for values in gaps[1] - gaps[0]:
        found = fixed(values)
        yield [True, found.low <= truth <= found.high, True]


def simulate(sweeps: int = SWEEPS, seed: int = 17) -> list[Row]:
    """A row for each figure, noise, number of seeds and factor."""
    figures = [("steps' factor", multiplier, noise) for noise in NOISES]
    figures += [("trend over the last half", trend, noise) for noise in NOISES[2:]]
    figures += [("change with budget", change, Noise("final loss of runs of 50 and 200 steps", ()))]
    rows = list[Row]()
    for (name, figure, noise), seeds, factor in itertools.product(figures, SEEDS, FACTORS):
        rng = np.random.default_rng([seed, seeds, round(100 * factor), len(rows)])
        batches = [min(BATCH, sweeps - done) for done in range(0, sweeps, BATCH)]
        told = np.array([row for size in batches for row in figure(rng, noise, size, seeds, factor)])
        read = told[told[:, 0]]
        shares = [f"{share:.4f}" for share in read[:, 1:].mean(0)] if len(read) > sweeps / 20 else ["", ""]
        row = {"figure": name, "noise": noise.name, "seeds": str(seeds), "factor": f"{factor:g}", "sweeps": str(sweeps)}
        rows.append(row | {"read": f"{told[:, 0].mean():.4f}", "coverage": shares[0], "over_seeds_alone": shares[1]})
    return rows


def table(rows: list[Row]) -> str:
    """The page's table: a line a figure and noise, a column for seeds and factor."""
    cases = list(dict.fromkeys((row["seeds"], row["factor"]) for row in rows))
    lines = [f"| interval of | losses | {' | '.join(f'n={n}, {factor}' for n, factor in cases)} | read |"]
    lines.append("|---|---|" + "--:|" * (len(cases) + 1))
    for figure, noise in dict.fromkeys((row["figure"], row["noise"]) for row in rows):
        of = {(row["seeds"], row["factor"]): row for row in rows if (row["figure"], row["noise"]) == (figure, noise)}
        cells = [f"{float(of[case]['coverage']):.1%}" if of[case]["coverage"] else "–" for case in cases]
        alone = [f"{float(of[case]['over_seeds_alone']):.1%}" if of[case]["coverage"] else "–" for case in cases]
        reads = [float(row["read"]) for row in of.values()]
        lines.append(f"| {figure} | {noise} | {' | '.join(cells)} | {min(reads):.0%} |")
        if "shared" in noise and figure == "steps' factor" and alone[0] != "–":
            lines.append(f"| without the noise that seeds share | | {' | '.join(alone)} | |")
    return "\n".join(lines)


def main() -> None:
    """Simulate, and write the page's figures."""
    rows = simulate()
    write_rows(FOLDER / "coverage.csv", rows)
    replace_block(FOLDER / "README.md", "table", table(rows))


if __name__ == "__main__":
    main()
