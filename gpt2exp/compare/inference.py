"""Intervals of paired differences, and how many seeds more an answer needs.

A difference is the arm's figure minus the baseline's at one seed, in the order in which the seeds were run. The
differences are taken for independent and normal, with one mean and one unknown standard deviation. There are three
ways to infer the mean: `fixed` if the number of seeds was fixed beforehand, `declared` if the looks were, `open_ended`
if nothing was.

Every interval is mean ± `reach` · s/√n, where s is the standard deviation of the n differences. Every test depends on
the differences only through `share`, the part of their sum of squares that is spread about the mean:
SS/V, where V = SS + n·mean². It is ν/(ν+t²) of Student's t with ν = n-1, and S²/V is n(1-share) for their sum S.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # scipy.stats would take a second to import

ALPHA = 0.05  # level of every test; intervals are 1 - ALPHA
C2 = 0.1  # of the e-process, fixed before any data: best for effects of about 1/√C2 = 3 standard deviations
POWER = 0.8  # probability that the number of seeds that is named is enough
LARGEST = 10_000  # seeds beyond which no number is named
Inference = Literal["fixed", "declared", "open"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """What n differences say of their mean; bounds are ±inf where they say nothing, as at n=1.

    `p` is two-sided, of a mean of zero: below ALPHA if and only if the interval of some look so far left zero out.
    `decided` is the first such look; a later interval may take zero in again, p does not rise.
    """

    mean: float
    low: float
    high: float
    p: float
    n: int
    inference: Inference
    decided: int | None


def fixed(differences: ArrayLike) -> Interval:
    """The paired t test, as scipy.stats.ttest_rel of the two arms: right at one look, at an n fixed beforehand.

    Differences that are all equal have p = 0, or 1 at zero, and the interval is the point.
    """
    path = moments(differences)
    return _interval(path, [len(path.mean)], "fixed", float(nominal_p(path.share)[-1]))


def declared(differences: ArrayLike, looks: Iterable[int]) -> Interval:
    """The group-sequential t test: right at every look, if the looks (numbers of seeds) were fixed beforehand.

    Pocock's design (1977): Student's t at a smaller p, the same at every look, with `overall_p` in place of his
    large-sample approximation. A look may be left out. p is `overall_p` of the least nominal p at the looks so far.

    Raises:
        ValueError: the number of differences is no look; then `open_ended` is right.
    """
    path, looks = moments(differences), tuple(sorted(set(looks)))
    n = len(path.mean)
    if n not in looks:
        raise ValueError(f"{n} differences, but the declared looks are at {looks}; use open_ended")
    so_far = [look for look in looks if look <= n]
    least = float(nominal_p(path.share)[np.array(so_far) - 1].min())
    return _interval(path, so_far, "declared", overall_p(looks, least), looks)


def open_ended(differences: ArrayLike, looks: Iterable[int] | None = None) -> Interval:
    """The t e-process: right at every look, for whatever reason one stops there. Its interval is the widest.

    `looks`: those so far; None: after every seed.

    p is 1 over the largest of `e_values` at the looks: with probability 1 - p at least, an e-process stays below 1/p
    for ever under the null (Ville 1939). Holm's correction applies to it.
    """
    path = moments(differences)
    n = len(path.mean)
    so_far = sorted({n, *(look for look in looks or range(1, n) if look < n)})
    largest = float(e_values(path.share)[np.array(so_far) - 1].max())
    return _interval(path, so_far, "open", min(1.0, 1 / largest))


def infer(values: Sequence[float], looks: Iterable[int] = (), schedule: Sequence[int] = ()) -> Interval:
    """The interval of differences, by what was fixed before they were known.

    `looks`: the numbers of differences at which somebody looked before adding more. `schedule`: the looks declared
    beforehand, if any. If this look or an earlier one is not among them, the e-process is used.
    """
    n, before = len(values), [look for look in looks if look < len(values)]
    if schedule and {*before, n} <= {*schedule}:
        return declared(values, schedule)
    return open_ended(values, before) if before or schedule else fixed(values)


class Moments(NamedTuple):
    """Moments of the first n differences, for every n from 1, along the last axis.

    `error`: of the mean, s/√n; 0 at n=1. `share`: SS/V, from 0 (all equal) to 1 (mean zero).
    """

    mean: Floats
    error: Floats
    share: Floats


def moments(differences: ArrayLike) -> Moments:
    """The moments. The first difference is subtracted before summing: else rounding gives equal ones an SS above 0."""
    values = np.asarray(differences, float)
    n, first = np.arange(1, values.shape[-1] + 1), values[..., :1]
    ahead = np.cumsum(values - first, axis=-1) / n
    spread = np.maximum(np.cumsum((values - first) ** 2, axis=-1) - n * ahead**2, 0)
    mean = first + ahead
    total = spread + n * mean**2
    share = np.divide(spread, total, out=np.ones_like(total), where=total > 0)
    return Moments(mean, np.sqrt(spread / (n * np.maximum(n - 1, 1))), share)


def _interval(
    path: Moments, so_far: Sequence[int], inference: Inference, p: float, looks: tuple[int, ...] = ()
) -> Interval:
    def radius(n: int) -> float:
        times = reach(n, inference, looks)
        return times * float(path.error[n - 1]) if times < math.inf else math.inf  # inf times an error of 0 is NaN

    n, mean = len(path.mean), float(path.mean[-1])
    decided = next((look for look in so_far if radius(look) < abs(path.mean[look - 1])), None)
    return Interval(mean, mean - radius(n), mean + radius(n), p, n, inference, decided)


def reach(n: int, inference: Inference, looks: tuple[int, ...] = ()) -> float:
    """Half the interval's width at n differences, in standard errors s/√n; inf where there is no interval.

    `fixed`: t(1-ALPHA/2, ν), with ν = n-1. `declared`: t(1-q/2, ν), where q is the nominal p of these looks.

    `open`: the means whose e-value is below 1/ALPHA. With x = n·(mean - μ)² and q = (ALPHA²·C2/(n+C2))^(1/n),
    e < 1/ALPHA says (SS + x)/(SS + x·C2/(n+C2)) < 1/q, so x < SS·(1-q)·(n+C2)/(q(n+C2) - C2), and SS is ν·n times
    the squared standard error. Where that denominator is not positive, as at n = 1 and 2, every mean fits.
    """
    if n < 2:
        return math.inf
    if inference != "open":
        q = ALPHA if inference == "fixed" else nominal(looks)
        return float(special.stdtrit(n - 1, 1 - q / 2))
    q = (ALPHA**2 * C2 / (n + C2)) ** (1 / n)
    below = q * (n + C2) - C2
    return math.sqrt((n - 1) * (1 - q) * (n + C2) / below) if below > 0 else math.inf


def nominal_p(share: Floats) -> Floats:
    """Two-sided p of Student's t for every n along the last axis, as if n had been fixed; 1 at n=1.

    P(|t| > τ) = I(ν/(ν+τ²); ν/2, 1/2), the regularised incomplete beta function, and ν/(ν+τ²) is the share.
    """
    freedom = np.arange(share.shape[-1])
    return np.where(freedom > 0, special.betainc(np.maximum(freedom, 1) / 2, 0.5, share), 1.0)


def e_values(share: Floats) -> Floats:
    """The t e-process against a mean of zero, for every n along the last axis.

    The likelihood of the differences where mean/σ is drawn from N(0, 1/C2), over that where it is zero; σ has the
    density 1/σ in both, which makes the ratio one of the scale-free data alone, a martingale under the null for every
    σ (Lai 1976; Wang and Ramdas, arXiv 2310.03722, theorem 4.9). Integrating the mean out of
    exp(-V/2σ² + S·mean/σ² - (n+C2)·mean²/2σ²) leaves √(C2/(n+C2)) · exp(-(V - S²/(n+C2))/2σ²), and σ out of that
    times σ^(-n-1) a constant times (V - S²/(n+C2))^(-n/2); under the null the same constant times V^(-n/2). So
    e = √(C2/(n+C2)) · [V / (V - S²/(n+C2))]^(n/2), and V - S²/(n+C2) = V·(C2 + n·share)/(n+C2).
    """
    n = np.arange(1, share.shape[-1] + 1)
    with np.errstate(over="ignore"):  # inf, so that p is 0
        return np.sqrt(C2 / (n + C2)) * ((n + C2) / (C2 + n * share)) ** (n / 2)


@cache
def overall_p(looks: tuple[int, ...], p: float) -> float:
    """Probability, under the null, of a nominal p of at most `p` at one or more of the looks (2 and more, ascending).

    Computed, not simulated. Under the null u = S/√V is a Markov chain, whatever σ: with w = D/√V for the next
    difference D, it goes to (u + w)/√(1 + w²), and √n·w has Student's t with n degrees of freedom, independent of the
    path so far (Basu 1955: V is complete and sufficient for σ, which the path does not depend on). With w = tan φ
    the step is √(1+u²)·sin(φ + atan u) and φ has density cos^(n-1)φ / B(1/2, n/2) on ±π/2. So `crossing`, the
    probability of an excess at a later look given u, is integrated from the last look back to the first, by Gauss and
    Legendre between the angles at which the step meets the bound; beyond the bound it is 1. (In the manner of
    Armitage, McPherson and Rowe 1969, who did it for known σ.) Within a hundredth of itself down to 0.001; far below,
    the grid is too coarse and Bonferroni's bound, the number of looks times p, holds it.
    """
    nodes, weights = np.polynomial.legendre.leggauss(40)
    bounds = {n: math.sqrt(n * (1 - special.betaincinv((n - 1) / 2, 0.5, p))) for n in looks}
    grid = 1 - np.linspace(1, 0, 256) ** 2  # of |u| over its bound: the chain is symmetric, and steep near the bound
    reached = bounds[looks[-1]] * grid
    crossing = np.zeros_like(reached)
    for n in range(looks[-1] - 1, looks[0] - 1, -1):
        u = bounds.get(n, math.sqrt(n)) * grid
        size, turn = np.sqrt(1 + u**2), np.arctan(u)
        meets = np.arcsin(np.minimum(1, reached[-1] / size))
        most = min(math.pi / 2, 7 / math.sqrt(n))  # all but 1e-11 of φ
        edges = np.clip([turn - most, -meets, meets, math.pi - meets, turn + most], turn - most, turn + most)
        half = np.diff(edges, axis=0)[..., None] / 2
        angle = edges[:-1, :, None] + half * (1 + nodes)
        ahead = np.interp(np.abs(size[:, None] * np.sin(angle)), reached, crossing, right=1.0)
        density = np.cos(angle - turn[:, None]) ** (n - 1) / special.beta(0.5, n / 2)
        reached, crossing = u, (half * density * ahead @ weights[:, None]).sum(axis=0)[:, 0]
    n, last = looks[0], math.asin(reached[-1] / math.sqrt(looks[0]))
    angle = last * (1 + nodes) / 2  # u = √n sin(angle)
    density = np.cos(angle) ** (n - 2) / special.beta(0.5, (n - 1) / 2)
    later = last * float(weights @ (density * np.interp(math.sqrt(n) * np.sin(angle), reached, crossing)))
    return min(1.0, len(looks) * p, p + later)


@cache
def nominal(looks: tuple[int, ...]) -> float:
    """The nominal p at every look whose `overall_p` is ALPHA, to a thousandth of it."""
    p = ALPHA
    for _ in range(8):  # overall_p goes as about the power 0.8, so each step leaves a tenth of the error
        reached = overall_p(looks, p)
        if abs(reached / ALPHA - 1) < 1e-5:
            break
        p *= (ALPHA / reached) ** 1.1
    return p


# --- how many more ---------------------------------------------------------------------------------------------------


def needed(
    mean: float, std: float, margin: float | None = None, inference: Inference = "fixed", looks: tuple[int, ...] = ()
) -> tuple[int | None, int | None]:
    """Seeds in all that tell a mean difference from zero with probability POWER, and that show it within the margin.

    None if it would take more than LARGEST seeds or the last declared look, or if no number is enough; the second also
    without a margin. For `declared` and `open` the numbers are a little too large: an earlier look may already decide.

    `std`: of the differences over seeds. Few seeds may show too small a one, so ask again with `upper_std`.
    """
    numbers: Sequence[int] = looks if inference == "declared" else range(2, LARGEST + 1)

    def first(power: Callable[[int, float], float]) -> int | None:
        at = bisect_left(numbers, POWER, key=lambda n: power(n, reach(n, inference, looks)))
        return numbers[at] if at < len(numbers) else None

    tell = first(lambda n, times: power_to_tell(mean, std, n, times))
    return tell, None if margin is None else first(lambda n, times: power_within(margin, abs(mean), std, n, times))


def power_to_tell(difference: float, std: float, n: int, times: float) -> float:
    """Probability that the interval, `times` standard errors to each side, lies on the difference's side of zero.

    The mean over its standard error is noncentral t with ν = n-1 and δ = √n·difference/std: P(t > times).
    """
    if std == 0 or times == math.inf:
        return float(difference != 0 and times < math.inf)
    shift = math.sqrt(n) * abs(difference) / std
    return 1 - float(special.nctdtr(n - 1, min(shift, 1e3), times))  # certain at 1e3; scipy computes none far above


def power_within(margin: float, difference: float, std: float, n: int, times: float) -> float:
    """Probability that the interval lies inside ±margin.

    Given s, the mean must be within ±(margin - times·s/√n): a difference of two normal probabilities, averaged over s,
    for which (s/std)²·ν is chi-squared with ν = n-1 degrees of freedom, at 200 of its quantiles.
    """
    if times == math.inf:
        return 0.0
    ranks = (np.arange(200) + 0.5) / 200
    error = std / math.sqrt(n)
    room = np.maximum(margin - times * error * np.sqrt(2 * special.gammaincinv((n - 1) / 2, ranks) / (n - 1)), 0)
    if error == 0:
        return float(abs(difference) <= margin)
    return float(np.mean(special.ndtr((room - difference) / error) - special.ndtr((-room - difference) / error)))


def tells(std: float, n: int, times: float) -> float:
    """The difference that n seeds tell from zero with probability POWER, by the `reach`; inf where n seeds tell none.

    The δ at which P(t < times) = 1 - POWER for noncentral t, over √n.
    """
    if times == math.inf:
        return math.inf
    return std * float(special.nctdtrinc(n - 1, 1 - POWER, times)) / math.sqrt(n)


def upper_std(std: float, n: int) -> float:
    """Upper 80 % limit of σ by the standard deviation of n normal values: s·√(ν/χ²(0.2, ν)), ν = n-1.

    A pilot's: 2.12 s at n=3, 1.56 s at n=5 (Browne 1995, Statistics in Medicine 14:1933).
    """
    return std * math.sqrt((n - 1) / float(special.chdtri(n - 1, 0.8)))


def pairing(baseline: ArrayLike, arm: ArrayLike) -> tuple[float | None, int | None]:
    """What pairing at n >= 2 seeds gained: the arms' correlation, and how many seeds it saved each arm.

    The correlation is None if an arm does not vary or n is 2. Saved is how many seeds more each of two unpaired arms
    would need for an interval as narrow: below 0 if pairing lost, None if above LARGEST in all.

    The paired interval's half width is t(ν)·√((a² + b² - 2rab)/n), where a, b are the arms' standard deviations and
    ν = n-1; that of m unpaired seeds an arm is t(2m-2)·√((a² + b²)/m). So r must first make up for half the degrees
    of freedom. (Of arms that vary unequally the unpaired test has fewer than 2m-2: it would need somewhat more.)
    """
    both = np.stack([np.asarray(baseline, float), np.asarray(arm, float)])
    (a2, ab), (_, b2) = np.cov(both)
    n, apart = both.shape[1], max(a2 + b2 - 2 * ab, 0.0)
    half_width = reach(n, "fixed") * math.sqrt(apart / n)
    numbers = range(2, LARGEST + 1)
    at = bisect_left(numbers, True, key=lambda m: reach(2 * m - 1, "fixed") * math.sqrt((a2 + b2) / m) <= half_width)
    correlation = float(ab / math.sqrt(a2 * b2)) if n > 2 and a2 * b2 > 0 else None
    return correlation, numbers[at] - n if at < len(numbers) else None


# --- many at once ----------------------------------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the k-th smallest of m times m-k+1, made monotone, at most 1."""
    p = np.asarray(p_values, float)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return [float(value) for value in adjusted]


def pooled_std(groups: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation within groups, pooled over their degrees of freedom; None if no group has two values."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)
