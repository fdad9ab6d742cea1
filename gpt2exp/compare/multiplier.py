"""Loss and speed as one number: how many times the baseline's compute an arm is worth. No torch.

The *steps' factor* of a pair: the steps (in tokens) that the baseline takes to a loss, over those that the arm takes.
The loss is the worse of the two final ones, since both runs reach it. If the arm is worse, that is the factor on the
baseline's steps at which its own curve reaches the arm's final loss. If the arm is better, the baseline does not get
there within the run; the number is then one at the baseline's final loss. So the factors of two arms are each other's
inverse, 1 for equal ones, and nothing is cut off at 1.

Times the ratio of speeds it is the *compute multiplier*: a ratio of times to a loss, as AlgoPerf counts them (Dahl et
al. 2023, arXiv 2306.07179), above 1 where the arm is faster, as in marin's effective speedup.

The curve is a chain of straight lines over tokens^-0.28. There the loss is straight if it falls to its floor as a power
law with the exponent of Hoffmann et al. 2022 (arXiv 2203.15556, equation 10). The chain goes through every point where
they are few, as on a validation curve, and is fitted by least squares where they are dense (linear splines: Hastie,
Tibshirani and Friedman 2009, section 5.2). It is linear in the losses, so noise that two runs share at a step, such as
their batch's, leaves their difference. A curve may rise; what counts is where it first reaches a loss. Simulated:
experiments/coverage/.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy import special

from gpt2exp.compare.effect import FEWEST_POINTS, Effect
from gpt2exp.compare.history import History
from gpt2exp.compare.inference import ALPHA, Floats, Interval
from gpt2exp.compare.rows import Grid, Group

POWER = 0.28  # curves are taken for straight over tokens to the minus this power
SPACING = math.log(2) / 3  # from corner to corner of a smoothed curve, in logarithms: a third of an octave
DENSE = 8  # fewest points in that stretch that are smoothed; with fewer, each point is a corner
PARTS = 5  # parts of the smoothed points: each is left out in turn, which shows the effect of their noise
KNOWN = 50  # standard errors that a smoothed curve must move in its last octave, or its noise hides its slope
CURVE = 3  # fewest validation losses that make a curve
CROSSING = (
    "the final losses are undecided, yet the arms first reach the higher of them at different steps: curves that "
    "flatten or rise at the end tell no worth"
)
"""The reason given where a steps' factor is dropped: it would call an arm better that the losses do not."""
Tokens = tuple[float, ...]

# --- curves ----------------------------------------------------------------------------------------------------------


class Smoother(NamedTuple):
    """A curve known at some tokens: `at`, its corners, as -tokens^-POWER; `makes`, their heights from the losses.

    `makes` has the shape (1 + PARTS, corners, tokens): by all points, then without each part. A part is a fifth of
    each stretch between corners, in one piece, since neighbouring steps are not independent. `hats` (tokens, corners)
    are the corners' shares in the curve at each token.
    """

    at: Floats
    makes: Floats
    hats: Floats


@cache
def smoother(tokens: Tokens) -> Smoother:
    """The smoother of losses known at these tokens, ascending."""
    x = np.log(np.asarray(tokens))
    corners = [x[-1]]
    while (before := corners[-1] - SPACING) > x[0] and ((x > before) & (x <= corners[-1])).sum() >= DENSE:
        corners.append(before)
    at = -np.exp(-POWER * np.array([*x[x < corners[-1]], *reversed(corners)]))
    hats = np.stack([np.interp(-np.exp(-POWER * x), at, one) for one in np.eye(len(at))], axis=-1)
    part = np.full(len(x), -1)
    for before, after in itertools.pairwise(reversed(corners)):
        (inside,) = np.nonzero((x > before) & (x <= after))
        part[inside] = np.arange(len(inside)) * PARTS // len(inside)
    makes = np.zeros((1 + PARTS, len(at), len(x)))
    for number in range(1 + PARTS):
        kept = part != number - 1 if number else part < PARTS
        makes[number][:, kept] = np.linalg.pinv(hats[kept])
    return Smoother(at, makes, hats)


def readable(tokens: Tokens, losses: Floats) -> np.ndarray:
    """Whether curves (..., tokens) move by more than their noise in the last octave; they may rise there.

    The noise is the usual standard error of a contrast in least squares, by the residuals about the curve. True where
    nothing is smoothed.
    """
    at, makes, hats = smoother(tokens)
    begin = min(int(np.searchsorted(at, at[-1] * math.exp(POWER * 3 * SPACING) - 1e-12)), len(at) - 2)
    contrast = makes[0][begin] - makes[0][-1]
    late = -(np.asarray(tokens) ** -POWER) > at[begin]
    residuals = (losses - losses @ (hats @ makes[0]).T)[..., late]
    noise = np.sqrt((residuals**2).sum(-1) / max(int(late.sum()) - (len(at) - 1 - begin), 1))
    return np.asarray(np.abs(losses @ contrast) > KNOWN * noise * np.sqrt((contrast**2).sum()))


def reaches(at: Floats, curve: Floats, loss: Floats) -> Floats:
    """Where curves (..., corners) first come down to losses (...); the first corner where they begin below."""
    here = np.argmax(curve <= loss[..., None], axis=-1)[..., None]
    before = np.maximum(here - 1, 0)
    high, low = (np.take_along_axis(curve, which, -1)[..., 0] for which in (before, here))
    share = np.divide(high - loss, high - low, out=np.zeros_like(high), where=high > low)
    return np.asarray(at[before[..., 0]] + share * (at[here[..., 0]] - at[before[..., 0]]))


def log_factors(base: tuple[Tokens, Floats], arm: tuple[Tokens, Floats]) -> tuple[Floats, Floats, Floats]:
    """Logarithms of the steps' factors (..., 1 + PARTS) of losses (..., tokens), each given with its tokens.

    Second, whether they are bounds (...): -1 if the baseline's curve is below the loss from its first point on, so that
    the factor may be less; 1 if the arm's is, so that it may be more; else 0. Third, the arm's final loss minus the
    baseline's.
    """
    (ones_at, ones), (others_at, others) = (
        (made.at, np.einsum("pct,...t->...pc", made.makes, losses, optimize=True))  # (..., 1 + PARTS, corners)
        for made, losses in ((smoother(tokens), losses) for tokens, losses in (base, arm))
    )
    worse = np.maximum(ones[..., -1], others[..., -1])
    one, other = reaches(ones_at, ones, worse), reaches(others_at, others, worse)
    beyond = np.where(other == others_at[0], 1.0, 0.0) - (one == ones_at[0])
    return np.log(other / one) / POWER, beyond[..., 0], (others[..., -1] - ones[..., -1])[..., 0]


# --- over seeds ------------------------------------------------------------------------------------------------------


def shared_error(factors: Floats) -> Floats:
    """Standard error of the mean (...) of factors (..., seeds, 1 + PARTS) that comes from the noise all seeds share.

    Runs that read the same batches in the same order have the same noise, and an interval over seeds cannot show it.
    Leaving out each part in turn (the delete-a-group jackknife: Kott 2001, Journal of Official Statistics 17:521) gives
    the variance that comes from the noise of the steps: W of one seed, V of the mean. With a shared part S and a seed's
    own part O, W = S + O and V = S + O/n.
    """

    def variance(of: Floats) -> Floats:
        return np.asarray((PARTS - 1) / PARTS * ((of - of.mean(-1, keepdims=True)) ** 2).sum(-1))

    n, parts = factors.shape[-2], factors[..., 1:]
    shared = (n * variance(parts.mean(-2)) - variance(parts).mean(-1)) / max(n - 1, 1)
    return np.asarray(np.sqrt(np.maximum(shared, 0)))


def widened(found: Interval, error: float) -> Interval:
    """An interval over seeds, widened by the error that all seeds share; squares add up (Zou and Donner 2008)."""
    shared = float(special.stdtrit(PARTS - 1, 1 - ALPHA / 2)) * error
    low, high = (math.hypot(bound - found.mean, shared) for bound in (found.low, found.high))
    return replace(found, low=found.mean - low, high=found.mean + high)


# --- of a comparison -------------------------------------------------------------------------------------------------


def measure(effect: Effect, speed: Effect, grid: Grid, before: History) -> None:
    """Set the steps' factor and the compute multiplier of an effect on the loss, and the remarks on them.

    `speed`: the effect on the speed; if that is not comparable, there is no compute multiplier.
    """
    groups = grid.pairs(effect.key, effect.arm)
    key = "val_loss" if effect.metric == "val_loss" else "loss"
    curves = [[_curve(grid, group, place, key) for place in (0, 1)] for group in groups]
    said = []
    if key == "val_loss" and any(len(one[0]) < CURVE for pair in curves for one in pair):
        curves = [[_curve(grid, group, place, "loss") for place in (0, 1)] for group in groups]
        key = "loss"
        said.append("by the smoothed training loss, for want of a validation curve (train.eval_every)")
    if any(len(one[0]) < (FEWEST_POINTS if key == "loss" else CURVE) for pair in curves for one in pair):
        return
    if not all(_readable([pair[place] for pair in curves]) for place in (0, 1)):
        noisy = "the training loss is too noisy to say by what factor the steps differ; train.eval_every=N shows it"
        effect.multiplier_reason = noisy if key == "loss" else "the loss no longer falls: no factor on the steps"
        return
    by_seed: dict[str, list[Floats]] = defaultdict(list)
    beyond, better = list[float](), 0
    for group, (base, arm) in zip(groups, curves, strict=True):
        factors, outside, difference = log_factors(base, arm)
        by_seed[str(group.seed)].append(factors)
        beyond.append(float(outside))
        better += bool(difference < 0)
    factors = np.stack([np.mean(by_seed[seed], axis=0) for seed in effect.differences])
    effect.steps_factor, effect.steps_factor_ci95 = _over_seeds(effect, factors, before, beyond)
    low, high = effect.steps_factor_ci95 or (None, None)
    if effect.verdict not in ("better", "worse") and ((low or 0) > 1 or (high or math.inf) < 1):
        effect.steps_factor = effect.steps_factor_ci95 = None
        effect.multiplier_reason = CROSSING
        return
    said += _remarks(groups, better, beyond)
    ratios = speed.differences if speed.verdict != "not_comparable" else {}
    if ratios.keys() == effect.differences.keys():
        times = np.log([ratios[seed] for seed in effect.differences])
        found = _over_seeds(effect, factors + times[:, None], before, beyond)
        effect.compute_multiplier, effect.compute_multiplier_ci95 = found
    else:
        said.append("of the steps alone, since the speed is not compared")
    effect.multiplier_reason = "; ".join(said)


def _remarks(groups: Sequence[Group], better: int, beyond: Sequence[float]) -> Iterator[str]:
    """The remarks on a factor; `better`: in how many pairs the arm ends lower than the baseline."""
    if better:
        where = f"in {better} of {len(groups)} pairs " if better < len(groups) else ""
        yield (
            f"{where}the baseline does not reach the arm's final loss within the run, for which its factor is only "
            "known to be above 1; this one is at the baseline's final loss"
        )
    if any(beyond):
        yield "one curve lies below the loss from its first point on, so that only a bound is known"
    if any(row["config"]["optimizer"]["schedule"] != "constant" for group in groups for row in group.runs):
        yield "a schedule made for fewer steps would do better than this one half way: sweep.over compares those"


def _curve(grid: Grid, group: Group, place: int, key: str) -> tuple[Tokens, Floats]:
    """The tokens trained on, and a run's losses there."""
    points = grid.curve(group.runs[place], key)
    tokens = tuple(float(at) for at in points if at)
    return tokens, np.array([points[at] for at in tokens], float)


def _readable(curves: Sequence[tuple[Tokens, Floats]]) -> bool:
    """Whether the mean curve of an arm's runs is `readable`; runs of different lengths have a mean each."""
    by_tokens: dict[Tokens, list[Floats]] = defaultdict(list)
    for tokens, losses in curves:
        by_tokens[tokens].append(losses)
    return all(bool(readable(tokens, np.mean(all_, axis=0))) for tokens, all_ in by_tokens.items())


def _over_seeds(
    effect: Effect, factors: Floats, before: History, beyond: Sequence[float]
) -> tuple[float, list[float | None] | None]:
    """The mean factor of logarithms (seeds, 1 + PARTS), and its interval; an end is None if only the other is known."""
    found, _ = before.infer(list(map(float, factors[:, 0])), effect.key, (effect.baseline, effect.arm))
    if not math.isfinite(found.low):
        return math.exp(found.mean), None
    found = widened(found, float(shared_error(factors)))
    low, high = math.exp(found.low), math.exp(found.high)
    return math.exp(found.mean), [None if min(beyond) < 0 else low, None if max(beyond) > 0 else high]
