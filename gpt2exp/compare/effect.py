"""One arm against its baseline in one metric: the interval, the verdict, and the remarks. No torch."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from gpt2exp.compare.inference import ALPHA, LARGEST, Inference, infer, needed, upper_std

FAR_OFF = 0.01  # level of the test for an outlier among the seeds
FEWEST_POINTS = 16  # fewest steps at which both losses are known that make a trend: 8 of them in the last half


@dataclass
class Effect:
    """One arm against the baseline of its axis, in one metric: an entry of `comparison.json`'s `axes`."""

    key: str
    baseline: str
    arm: str
    metric: str
    budget: str = ""  # within which the arms are compared, such as `train.steps=50` (`sweep.over`)
    control: bool = False  # the baseline against itself with another data order (`sweep.control`)
    n_pairs: int = 0
    n_seeds: int = 0
    dropped_pairs: int = 0  # planned pairs of which a run is missing or did not finish
    mean_difference: float | None = None
    speed_ratio: float | None = None
    ci95: list[float] | None = None
    p_value: float | None = None
    p_holm: float | None = None  # after Holm's correction over the arms of all axes in this metric
    inference: Inference = "fixed"  # what was fixed beforehand: the number of seeds, the looks, or nothing
    looks: list[int] = field(default_factory=list)  # numbers of seeds at the earlier looks, or at all declared ones
    seed_std: float | None = None  # of the metric (for a ratio, of its logarithm), pooled over both arms
    baseline_std: float | None = None
    arm_std: float | None = None
    pair_correlation: float | None = None  # the correlation of the two arms over seeds
    seeds_saved: int | None = None  # how many more each arm would need without pairing; below 0, pairing lost
    trend: list[float] | None = None  # change of the training losses' difference over the last half, low, high
    steps_factor: float | None = None  # for a loss, see `multiplier`: above 1 the arm is better
    steps_factor_ci95: list[float | None] | None = None  # one end is None if only a bound is known
    compute_multiplier: float | None = None  # the same times the ratio of speeds
    compute_multiplier_ci95: list[float | None] | None = None
    multiplier_reason: str = ""
    verdict: str | None = None
    reason: str = ""
    tuning: str = ""  # for a loss: at which learning rate, tuned or not, the two arms ran
    n_needed: int | None = None  # if inconclusive: seeds in all that would settle it with probability 0.8
    n_needed_at_most: int | None = None  # the same by the upper 80 % limit of the differences' standard deviation
    baseline_mean: float | None = None
    arm_mean: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    """By seed, in the order in which the seeds were run, averaged over the other axes; ratios for a ratio."""

    @property
    def scaled(self) -> list[float]:
        """The differences on the scale on which the interval is symmetric: of logarithms, for a ratio."""
        values = self.differences.values()
        return [math.log(value) for value in values] if self.speed_ratio is not None else list(values)


def judge(effect: Effect, *, lower_is_better: bool, margin: float | None) -> None:
    """Set the verdict of an effect with an interval, its reason and the seeds it needs.

    In this order:
    1. inside ±`margin`, stated beforehand: indistinguishable, whatever the p value (two one-sided tests, Schuirmann
       1987, at 95 % rather than his 90 %). An interval that is zero itself lies inside any margin;
    2. Holm's p below 0.05: better or worse;
    3. else inconclusive.
    How the interval compares with the seed-to-seed std is a remark. It decides nothing: the std depends on the data, so
    a noisier study would find no difference more easily.
    """
    ratio = effect.speed_ratio
    mean = effect.mean_difference if ratio is None else math.log(ratio)
    assert effect.ci95 is not None
    assert mean is not None
    low, high = effect.ci95 if ratio is None else map(math.log, effect.ci95)
    within, std = margin or 0.0, effect.seed_std
    if -within <= low and high <= within:
        effect.verdict = "indistinguishable"
        said = [f"the interval lies inside ±{margin:g}" if margin else "no difference at any seed"]
    elif effect.p_holm is not None and effect.p_holm < ALPHA:
        said = ["smaller than the seed-to-seed std"] if std is not None and abs(mean) < std else []
        if low <= 0 <= high:  # p is of the strongest look so far, the interval of this look
            values = effect.scaled
            found = infer(values, effect.looks, effect.looks if effect.inference == "declared" else ())
            mean = statistics.fmean(values[: found.decided])
            said.append(f"decided at n={found.decided}, though the interval of all seeds holds zero again")
        effect.verdict = "better" if (mean < 0) == lower_is_better else "worse"
    else:
        effect.verdict = "inconclusive"
        if effect.p_value is not None and effect.p_value < ALPHA:
            said = ["p is below 0.05 by itself, but not after Holm's correction for several comparisons"]
        elif margin:
            said = [f"the interval reaches beyond ±{margin:g}"]
        else:
            reaches = "lies inside" if std is not None and -std <= low and high <= std else "reaches beyond"
            said = [f"the interval holds zero and {reaches} ± the seed-to-seed std"]
        said.append(_advice(effect, margin))
    if effect.inference == "open":
        at = f"seeds were added after a look at n={', '.join(map(str, effect.looks))}"
        said.append(f"{at if effect.looks else 'these are not the looks declared'}: the interval holds at every look")
    if (seed := far_off(effect.differences, effect.scaled)) is not None:
        said.append(f"seed {seed} is far off the others: look at its runs, for intervals assume normal differences")
    effect.reason = "; ".join(said)


def _advice(effect: Effect, margin: float | None) -> str:
    """How many seeds in all would settle an effect, if they are added now, after a look."""
    declared = effect.inference == "declared"
    way: Inference = "declared" if declared else "open"
    looks = tuple(effect.looks) if declared else ()
    limit = f"more than {looks[-1] if declared else LARGEST:,}"
    values, n = effect.scaled, effect.n_seeds
    mean, std = statistics.fmean(values), statistics.stdev(values)
    by_std = (needed(mean, each, margin, way, looks) for each in (std, upper_std(std, n)))
    both = [[number and max(number, n + 1) for number in numbers] for numbers in by_std]
    effect.n_needed, effect.n_needed_at_most = (min(filter(None, numbers), default=None) for numbers in both)
    tell, equal = (
        f"about {number:,} (perhaps {f'{most:,}' if most else limit})" if number else limit
        for number, most in zip(*both, strict=True)
    )
    said = f"{tell} seeds in all would tell a difference of this size"
    return f"{said}, {equal} to call it indistinguishable within ±{margin:g}" if margin else said


def far_off(seeds: Iterable[str], values: Sequence[float]) -> str | None:
    """The seed whose difference is an outlier, if there is one.

    Grubbs' test (1969): the farthest one's distance from the mean of the others, over their standard deviation, times a
    factor, has Student's t with n-2 degrees of freedom. p is multiplied by n, since the farthest was picked.
    """
    n = len(values)
    if n < 4:
        return None
    mean = statistics.fmean(values)
    seed, value = max(zip(seeds, values, strict=True), key=lambda both: abs(both[1] - mean))
    others = [other for other in values if other != value]
    if len(others) < n - 1 or (std := statistics.stdev(others)) == 0:
        return None
    t = abs(value - statistics.fmean(others)) / (std * math.sqrt(n / (n - 1)))
    return seed if 2 * n * float(special.stdtr(n - 2, -t)) < FAR_OFF else None


def late_change(x: Sequence[float], y: Sequence[float]) -> float:
    """The change of `y` over the last half of `x` (ascending): the least-squares slope there, times its length.

    The steps of a run share its noise, so they are no replicates: take the interval over the changes of the seeds.
    """
    at = bisect_left(x, (x[0] + x[-1]) / 2)
    slope, _ = np.polyfit(np.asarray(x[at:], float) - x[at], y[at:], 1)
    return float(slope) * (x[-1] - x[at])
