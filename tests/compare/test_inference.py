"""Confidence intervals cover the truth at their stated rate, also after many looks. Formulas are checked against
numerical integration, SciPy, simulation and textbook tables.
"""

from __future__ import annotations

import importlib
import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gpt2exp.compare import inference
from gpt2exp.compare.inference import (
    ALPHA,
    C2,
    Interval,
    declared,
    fixed,
    holm,
    needed,
    open_ended,
    pairing,
    pooled_std,
    reach,
    tells,
)

FOLDER = Path(__file__).parents[2] / "experiments" / "sequential"
LOOKS = tuple(range(3, 13))
WAYS: dict[str, Callable[[Sequence[float]], Interval]] = {
    "fixed": fixed,
    "declared": lambda values: declared(values, LOOKS),
    "open": open_ended,
}
way = pytest.mark.parametrize("infer", WAYS.values(), ids=WAYS)
# multiples of 0.001, so that sums of squares neither vanish nor lose the differences' digits
differences = st.lists(st.integers(-(10**6), 10**6).map(lambda value: value / 1000), min_size=3, max_size=12)


@pytest.fixture(scope="module")
def simulate() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("simulate")


# --- fixed n ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_interval_and_p_value_are_those_of_the_paired_t_test(n: int) -> None:
    rng = np.random.default_rng(n)
    for shift in (0.0, 0.3, 30.0):
        baseline, arm = rng.normal(3, 1, n), rng.normal(3 + shift, 1, n)
        found = fixed(arm - baseline)
        reference = stats.ttest_rel(arm, baseline)
        assert found.p == pytest.approx(reference.pvalue, rel=1e-9)
        assert (found.low, found.high) == pytest.approx(tuple(reference.confidence_interval(0.95)), rel=1e-9)
        assert found.mean == pytest.approx((arm - baseline).mean())


# --- all three -------------------------------------------------------------------------------------------------------


@way
@given(values=differences, scale=st.sampled_from([-1.0, 1e-6, -1024.0, 1e9]))
@settings(max_examples=50, deadline=None)
def test_scale_and_sign_change_nothing_else(infer: Any, values: list[float], scale: float) -> None:
    one, other = infer(values), infer([scale * value for value in values])
    assert other.p == pytest.approx(one.p, rel=1e-5, abs=1e-9)
    bounds = sorted((scale * one.low, scale * one.high))
    assert [other.low, other.high] == pytest.approx(bounds, rel=1e-6, abs=abs(scale) * 1e-6)


@way
@given(values=differences)
@settings(max_examples=100, deadline=None)
def test_the_interval_holds_the_mean_and_p_agrees_with_it(infer: Any, values: list[float]) -> None:
    found = infer(values)
    assert found.low <= found.mean <= found.high
    assert 0 <= found.p <= 1
    if abs(found.p / ALPHA - 1) > 0.01:  # the nominal p of the looks is right to a thousandth
        assert (found.decided is not None) == (found.p < ALPHA)
    if found.decided == found.n:
        assert found.low > 0 or found.high < 0
    elif found.low > 0 or found.high < 0:
        assert found.decided is not None, "an earlier look"


@way
@given(values=differences)
@settings(max_examples=50, deadline=None)
def test_the_farther_from_zero_the_smaller_p(infer: Any, values: list[float]) -> None:
    centred = np.array(values) - np.mean(values)
    shifts = np.array([0, 0.1, 0.5, 1, 5]) * (np.ptp(centred) + 1e-3)
    at_one_look = [
        fixed(centred + shift).p if infer is fixed else infer_at_end(infer, centred + shift) for shift in shifts
    ]
    assert all(far <= near * (1 + 1e-9) for near, far in itertools.pairwise(at_one_look))


def infer_at_end(infer: Any, values: np.ndarray) -> float:
    """The p of the last look alone: an earlier look's p need not fall as the mean of all grows."""
    return open_ended(values, [len(values)]).p if infer is open_ended else declared(values, [len(values)]).p


@given(values=differences)
@settings(max_examples=50, deadline=None)
def test_one_declared_look_is_the_fixed_design(values: list[float]) -> None:
    one, other = declared(values, [len(values)]), fixed(values)
    assert (one.mean, one.low, one.high, one.p) == pytest.approx((other.mean, other.low, other.high, other.p))


@pytest.mark.parametrize("infer", [WAYS["declared"], open_ended])
def test_p_does_not_rise_again_after_a_look(infer: Any) -> None:
    values = [1.0, 1.01, 0.99, 1.0, -9.0, 11.0]
    early, late = infer(values[:4]), infer(values)
    assert early.decided == late.decided == 3
    assert late.p <= early.p < ALPHA
    assert late.low < 0 < late.high


@way
def test_equal_differences(infer: Any) -> None:
    none, same = infer([0.0, 0.0, 0.0]), infer([0.1, 0.1, 0.1])
    assert (none.mean, none.low, none.high, none.p, none.decided) == (0, 0, 0, 1, None)
    assert (same.low, same.high, same.decided) == (0.1, 0.1, 3)
    assert same.p == pytest.approx(C2 / (3 + C2) if infer is open_ended else 0)
    assert (fixed([-0.5, -0.5]).low, fixed([-0.5, -0.5]).p) == (-0.5, 0)


def test_too_few_differences_have_no_bounds() -> None:
    for found in (fixed([0.3]), open_ended([0.3]), open_ended([0.3, 0.3]), open_ended([0.3, 0.4])):
        assert (found.low, found.high) == (-math.inf, math.inf)
        assert found.p > ALPHA
    assert fixed([0.3]).p == open_ended([0.3]).p == 1


# --- open-ended ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[0.4, -0.2], [1.0, 1.3, 0.6], [0.1, -0.3, 0.2, 0.9, 0.5], [2, 2.1, 1.9, 2.2]])
def test_e_value_is_the_mixture_integrated(values: list[float]) -> None:
    sigma = np.exp(np.linspace(-6, 9, 1501))[:, None]  # evenly in its logarithm, which is its density 1/sigma
    effect = np.linspace(-30, 30, 1201)
    density = math.prod(np.exp(-((value / sigma - effect) ** 2) / 2) / sigma for value in values)
    prior = np.exp(-C2 * effect**2 / 2) / np.exp(-C2 * effect**2 / 2).sum()
    mixed, null = (density @ prior).sum(), density[:, 600].sum()  # sums of equal steps: trapezia
    assert inference.e_values(inference.moments(values).share)[-1] == pytest.approx(mixed / null, rel=1e-5)


def test_the_interval_holds_the_means_that_are_not_rejected() -> None:
    values = np.random.default_rng(3).normal(0.7, 1, 9)
    found = open_ended(values)
    for bound, sign in ((found.low, -1), (found.high, 1)):
        for step, rejected in ((1e-9, True), (-1e-9, False)):
            e = inference.e_values(inference.moments(values - bound - sign * step).share)[-1]
            assert (e > 1 / ALPHA) == rejected


def test_radii_are_the_known_ones() -> None:
    """In standard errors, as the literature's formula gives them (issue 15)."""
    radii = [reach(n, "open") for n in (3, 4, 5, 8, 10, 20)]
    assert radii == pytest.approx([13.2, 6.5, 5.4, 4.4, 4.2, 3.8], abs=0.05)
    assert [reach(n, "open") for n in (1, 2)] == [math.inf, math.inf]


def test_only_the_looks_taken_count() -> None:
    values = [1.0, 1.01, 0.99, 1.0, -9.0, 11.0]
    assert open_ended(values, [6]).p > ALPHA > open_ended(values, [4]).p == open_ended(values, [4, 6]).p


# --- declared looks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("looks", "known"),
    [(range(3, 11), 0.0123), (range(2, 11), 0.0101), (range(3, 31), 0.0062), ((5, 10), 0.0286), ((5, 10, 20), 0.0198)],
)
def test_nominal_p_is_the_simulated_one(looks: Sequence[int], known: float) -> None:
    """The prototype's simulated values (issue 15), and the looks' rate of errors, simulated here."""
    q = inference.nominal(tuple(looks))
    assert q == pytest.approx(known, rel=0.035)
    drawn = np.random.default_rng(0).standard_normal((100_000, max(looks)))
    p = inference.nominal_p(inference.moments(drawn).share)[:, [look - 1 for look in looks]].min(axis=1)
    for level, overall in ((q, ALPHA), (q / 10, inference.overall_p(tuple(looks), q / 10))):
        assert np.mean(p <= level) == pytest.approx(overall, abs=4 * math.sqrt(overall / len(p)))


def test_overall_p_lies_between_the_nominal_one_and_bonferroni() -> None:
    ps = [0.0, *np.logspace(-12, 0, 25).tolist()]
    overall = [inference.overall_p(LOOKS, p) for p in ps]
    assert all(p <= o <= min(1, len(LOOKS) * p) * (1 + 1e-9) for p, o in zip(ps, overall, strict=True))
    assert all(one < other or other == 1 for one, other in itertools.pairwise(overall))


def test_looks_that_were_not_declared_are_refused() -> None:
    with pytest.raises(ValueError, match=r"4 differences, but the declared looks are at \(3, 5\)"):
        declared([1, 2, 3, 4], [3, 5])


# --- how many more ---------------------------------------------------------------------------------------------------


def test_seeds_to_tell_are_the_textbook_ones() -> None:
    """Paired t test, 5 % two-sided, 80 % (Cohen 1988; G*Power)."""
    for effect, n in ((0.5, 34), (0.8, 15), (1, 10), (1.5, 6), (2, 5), (3, 4)):
        assert needed(effect, 1) == (n, None)
        assert tells(1, n, reach(n, "fixed")) <= effect < tells(1, n - 1, reach(n - 1, "fixed"))


@pytest.mark.parametrize("way", ["fixed", "open"])
def test_powers_are_the_simulated_ones(way: inference.Inference) -> None:
    n, difference, margin = 12, 0.9, 2.0
    path = inference.moments(np.random.default_rng(2).normal(difference, 1, (20_000, n)))
    mean, radius = path.mean[:, -1], reach(n, way) * path.error[:, -1]
    told, inside = np.mean(mean - radius > 0), np.mean(np.abs(mean) + radius <= margin)
    narrow = np.mean(np.abs(mean - difference) + radius <= 0.6)  # most intervals are wider than it
    assert 0.2 < told < 0.9
    assert inference.power_to_tell(difference, 1, n, reach(n, way)) == pytest.approx(told, abs=0.012)
    assert 0.2 < inside < 0.95
    assert inference.power_within(margin, difference, 1, n, reach(n, way)) == pytest.approx(inside, abs=0.012)
    assert inference.power_within(0.6, 0.0, 1, n, reach(n, way)) == pytest.approx(narrow, abs=0.012)


def test_needed_by_inference_and_spread() -> None:
    std = float(np.std([0.5, 1.9, 0.6], ddof=1))
    tell, equal = needed(1.0, std, 3.0)
    later_tell, later_equal = needed(1.0, std, 3.0, "open")
    most_tell, _ = needed(1.0, inference.upper_std(std, 3), 3.0)
    assert tell is not None
    assert equal is not None
    assert 3 < tell < min(later_tell or 0, most_tell or 0)
    assert equal < (later_equal or 0)
    assert needed(1.0, inference.upper_std(std, 3), 3.0, "declared", LOOKS[:6])[0] is None, "more than the last look"
    assert needed(1.0, std, 0.9)[1] is None, "the mean itself is beyond the margin"
    assert needed(1.0, std)[1] is None, "no margin"
    assert needed(1.0, 0.0, 2.0, "open") == (3, 3)
    assert needed(0.0, 0.0, 2.0) == (None, 2)


def test_upper_limit_of_a_pilots_std() -> None:
    assert [inference.upper_std(1, n) for n in (3, 5)] == pytest.approx([2.12, 1.56], abs=0.005)
    stds = np.random.default_rng(4).normal(0, 1, (20_000, 4)).std(axis=1, ddof=1)
    assert np.mean(stds * inference.upper_std(1, 4) >= 1) == pytest.approx(0.8, abs=0.012)


def test_pairing_gains_with_correlation_and_loses_without() -> None:
    noise = np.random.default_rng(5).normal(0, 1, (3, 8))
    shared, one, other = noise - noise.mean(axis=1, keepdims=True)
    correlation, saved = pairing(shared + 0.1 * one, shared + 0.1 * other)
    assert correlation == pytest.approx(np.corrcoef(shared + 0.1 * one, shared + 0.1 * other)[0, 1])
    assert correlation > 0.95
    assert saved is not None
    assert saved > 8 * 9
    against, lost = pairing(shared, -shared)
    assert against == pytest.approx(-1)
    assert lost is not None
    assert lost < 0
    # r = 0 and equal spread: unpaired t(2m-2) against paired t(7) at the same variance
    a, b = np.array([1, -1, 1, -1] * 2), np.array([1, 1, -1, -1] * 2)
    m = 8 + (pairing(a, b)[1] or 0)
    half = [stats.t.ppf(0.975, 2 * k - 2) / math.sqrt(k) for k in (m - 1, m)]
    assert half[1] <= stats.t.ppf(0.975, 7) / math.sqrt(8) < half[0]
    assert pairing([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == (pytest.approx(1), None)
    assert pairing([1.0, 2.0], [1.0, 5.0])[0] is None
    assert pairing([1, 1, 1], [1, 2, 3])[0] is pairing([1, 2, 3], [1, 1, 1])[0] is None


# --- simulated sweeps ------------------------------------------------------------------------------------------------


def test_null_sweeps_looked_at_after_every_seed(simulate: Any) -> None:
    """2,000 each, up to 30 seeds: the t test errs in more than 15 %, the others in at most 5 % (+ 3 s.e. of 0.5 %)."""
    rows = {row["procedure"]: row for row in simulate.errors(2000, 1) if row["noise"] == "normal"}
    print({name: row["err"] for name, row in rows.items()})
    assert float(rows.pop("t test at every look")["err"]) > 0.15
    for name, row in rows.items():
        assert float(row["err"]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000), name
        assert float(row["least_coverage"]) >= 0.95, name
    assert float(rows["open-ended"]["err"]) <= 0.04


def test_mean_seeds_to_an_answer(simulate: Any) -> None:
    drawn = np.random.default_rng(6).standard_normal((2000, 30))
    for effect, known in ((1, 14.3), (2, 6.2), (3, 4.6)):
        assert float(simulate.stopped(drawn + effect, "open", 30)["mean_seeds"]) == pytest.approx(known, rel=0.05)
        assert float(simulate.stopped(drawn + effect, "declared", 30)["mean_seeds"]) <= known * 1.02


def test_a_difference_of_the_margin_is_seldom_called_none(simulate: Any) -> None:
    for row in simulate.equal(2000, 7):
        assert float(row["called_at_the_margin"]) <= ALPHA / 2 + 3 * math.sqrt(0.025 / 2000)
        assert float(row["called"]) > 0.5


def test_the_page_shows_the_committed_rows(simulate: Any) -> None:
    page = (FOLDER / "README.md").read_text()
    found = re.search(r"<!-- tables -->\n(.*)\n<!-- /tables -->", page, re.DOTALL)
    assert found is not None
    assert found[1] == simulate.tables(*map(simulate.read, simulate.FILES))


# --- many at once ----------------------------------------------------------------------------------------------------


def test_holm_is_bonferroni_closed_over_all_subsets() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # R: p.adjust
    assert holm([]) == []
    rng = random.Random(0)
    for size in range(1, 7):
        p_values = [round(rng.random() ** 3, 2) for _ in range(size)]  # with ties
        subsets = [s for k in range(1, size + 1) for s in itertools.combinations(range(size), k)]
        for index, adjusted in enumerate(holm(p_values)):
            tests = (len(s) * min(p_values[i] for i in s) for s in subsets if index in s)
            assert adjusted == pytest.approx(min(1.0, max(tests)))


def test_pooled_std_weighs_groups_by_their_degrees_of_freedom() -> None:
    rng = np.random.default_rng(0)
    groups = [list(rng.normal(level, 2, n)) for level, n in ((0, 2), (100, 5), (-7, 9))]
    squares = sum(((np.array(group) - np.mean(group)) ** 2).sum() for group in groups)
    assert pooled_std([*groups, [4.0], []]) == pytest.approx(math.sqrt(squares / (1 + 4 + 8)))
    assert pooled_std(groups[1:2]) == pytest.approx(np.std(groups[1], ddof=1))
    assert pooled_std([[1.0], [2.0]]) is None
