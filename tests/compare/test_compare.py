"""The comparison's verdicts are right: statistics are SciPy's, intervals cover the truth at their stated rate, effects
are found at the rate of theory, and the replicate is the seed. What cannot be compared is refused or marked with a
reason: broken pairs, unlike runs, damaged folders.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import signal, stats

from gpt2exp import schema
from gpt2exp.compare import __main__ as conclude
from gpt2exp.compare import comparison as comparisons
from gpt2exp.compare import effect as effects
from gpt2exp.compare import report, words
from gpt2exp.compare import rows as rows_module
from gpt2exp.compare.comparison import Comparison, Row
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.inference import declared, fixed, holm, infer, needed, open_ended, pairing, pooled_std, upper_std
from gpt2exp.schema import parse, plain
from gpt2exp.section import BadRequest

GROUPS = ("model", "init", "precision", "data", "optimizer")
CLOCK = itertools.count()
"""Minutes: unless a test says otherwise, runs follow each other."""
Draw = Callable[[str, int], float]


@functools.cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The configuration that overrides make, the groups' from the shipped files."""
    config = OmegaConf.create()
    for text in overrides:
        key, _, value = text.partition("=")
        if key in GROUPS:
            config[key] = OmegaConf.create((files(f"gpt2exp.conf.{key}") / f"{value}.yaml").read_text())
    dotted = [text for text in overrides if text.partition("=")[0] not in GROUPS]
    return plain(parse(OmegaConf.merge(config, OmegaConf.from_dotlist(dotted))))


def run(*overrides: str, loss: float = 3.0, seed: int = 1337, typed: Sequence[str] | None = None, **facts: Any) -> Row:
    """A finished run's row as `compare.read` gives it; `typed` where that is not the overrides that made it."""
    config = {**composed(overrides), "seed": seed}
    number = next(CLOCK)
    precision = config["precision"]["name"]
    usual = {
        "name": f"{number:03d}",
        "folder": f"/sweep/{number:03d}",
        "state": "done",
        "error": None,
        "overrides": [*(overrides if typed is None else typed), f"seed={seed}"],
        "config": config,
        "seed": seed,
        "loss_mean_last10": loss,
        "val_loss": None,
        "steps": 50,
        "tokens": 6400,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 10**9,
        "wall_seconds": {"startup": 5.0, "train": 30.0, "total": 35.0},
        "parameters": {"total": 1000},
        "precision": {"requested": precision, "effective": precision, "emulated": False},
        "data": {
            "name": "tinyshakespeare",
            "sha256": "86c4",
            "distinct_tokens": 11706,
            "train_tokens": 338025,
            "val_tokens": 0,
        },
        "device": "cpu: Xeon",
        "threads": 2,
        "machine": "here",
        "versions": {"torch": "2.13.0"},
        "git": {"commit": "85f6eba", "dirty": False},
        "started": (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)).isoformat(timespec="seconds"),
    }
    return {**usual, **facts}


def unfinished(row: Row, state: str = "failed", error: str | None = "out of memory; try less", **facts: Any) -> Row:
    """The same run, in another state."""
    return {**row, "state": state, "error": error, "steps": 7, "tokens_per_second": None, **facts}


def arms(key: str, losses: Mapping[str, Sequence[float]], **facts: Any) -> list[Row]:
    """A sweep of one axis: by arm, the losses of seeds 0, 1, ..."""
    return [
        run(f"{key}={arm}", loss=loss, seed=seed, **facts)
        for arm, all in losses.items()
        for seed, loss in enumerate(all)
    ]


def factorial(figure: Callable[[str, str, int], float], seeds: int) -> list[Row]:
    """A 2 x 2 sweep of tie_weights and residual_scaling over seeds; `figure` gives a run's loss."""
    return [
        run(f"model.tie_weights={a}", f"init.residual_scaling={b}", loss=figure(a, b, seed), seed=seed)
        for a, b, seed in itertools.product(("true", "false"), ("true", "false"), range(seeds))
    ]


def effect(
    rows: Comparison | Sequence[Row], key: str, metric: str = "loss_mean_last10", arm: str | None = None
) -> Effect:
    """The one entry of that axis and metric."""
    comparison = rows if isinstance(rows, Comparison) else comparisons.compare(rows)
    [found] = [e for e in comparison.axes if e.key == key and e.metric == metric and arm in (None, e.arm)]
    return found


# --- simulated sweeps ------------------------------------------------------------------------------------------------

SIMULATIONS = 300
TIE, SCALING = "model.tie_weights", "init.residual_scaling"


def simulated_axis(rng: np.random.Generator, seeds: int, difference: float = 0.0) -> list[Row]:
    """Noise of the seed shared by its pair, five times the run's own."""
    common, own = rng.normal(3, 0.05, seeds), rng.normal(0, 0.01, (2, seeds))
    return arms(TIE, {"true": list(common + own[0]), "false": list(common + own[1] + difference)})


def simulated_factorial(rng: np.random.Generator, seeds: int, by_axis: float = 0.0, b_effect: float = 0.0) -> list[Row]:
    """A 2 x 2 sweep with noise of the seed, of the run and, of std `by_axis`, of the first axis' effect at a seed."""
    common, taste = rng.normal(3, 0.05, seeds), rng.normal(0, by_axis, seeds)
    own = iter(rng.normal(0, 0.01, 4 * seeds))
    return factorial(
        lambda a, b, s: float(common[s] + taste[s] * (a == "false") + b_effect * (b == "false") + next(own)), seeds
    )


def covers(interval: Sequence[float] | None, truth: float = 0.0) -> bool:
    """Whether an interval holds the truth."""
    assert interval is not None
    return interval[0] <= truth <= interval[1]


def test_null_sweeps_of_one_axis() -> None:
    rng = np.random.default_rng(1)
    found = [effect(simulated_axis(rng, 5), TIE) for _ in range(SIMULATIONS)]
    coverage = sum(covers(e.ci95) for e in found) / SIMULATIONS
    called = sum(e.verdict in ("better", "worse") for e in found) / SIMULATIONS
    print(f"coverage {coverage:.3f}, called {called:.3f}")
    assert 0.93 <= coverage <= 0.97
    assert called <= 0.05
    assert all(e.n_seeds == e.n_pairs == 5 for e in found)


@pytest.mark.slow
def test_null_factorial_sweeps_count_seeds_and_not_pairs() -> None:
    """Pairs of one seed share that seed's effect: ten pairs are not ten replicates."""
    rng = np.random.default_rng(1)
    covered = {TIE: 0, SCALING: 0}
    called = naive = interactions = 0
    for _ in range(SIMULATIONS):
        comparison = comparisons.compare(simulated_factorial(rng, 5, by_axis=0.05))
        losses = [e for e in comparison.axes if e.metric == "loss_mean_last10"]
        for e in losses:
            assert (e.n_pairs, e.n_seeds) == (10, 5)
            covered[e.key] += covers(e.ci95)
        called += any(e.verdict in ("better", "worse") for e in losses)
        pairs, _ = comparisons.Grid(comparison.runs, comparison.swept).groups({TIE: ("true", "false")})
        each = [other["loss_mean_last10"] - one["loss_mean_last10"] for one, other in (pair.runs for pair in pairs)]
        naive += covers([(naively := fixed(each)).low, naively.high])
        [interaction] = comparison.interactions
        interactions += covers(interaction.ci95)
    rates = {**{key: n / SIMULATIONS for key, n in covered.items()}, "interaction": interactions / SIMULATIONS}
    print(f"coverage {rates}, sweeps with a call {called / SIMULATIONS:.3f}, naive coverage {naive / SIMULATIONS:.3f}")
    assert all(0.93 <= rate <= 0.97 for rate in rates.values())
    assert called / SIMULATIONS <= 0.05
    assert naive / SIMULATIONS < 0.88


@pytest.mark.slow
def test_null_factorial_sweeps_with_runs_missing() -> None:
    """Broken pairs leave some seeds with one pair and some with two: coverage holds."""
    rng = np.random.default_rng(1)
    covered = total = 0
    for _ in range(SIMULATIONS):
        rows = simulated_factorial(rng, 5, by_axis=0.01, b_effect=1.0)
        lost = set(rng.choice(len(rows), 3, replace=False))
        found = effect([unfinished(row) if at in lost else row for at, row in enumerate(rows)], TIE)
        assert found.n_pairs + found.dropped_pairs == 10
        if found.ci95:
            total += 1
            covered += covers(found.ci95)
    print(f"coverage with runs missing {covered / total:.3f} of {total}")
    assert total > 0.9 * SIMULATIONS
    assert 0.93 <= covered / total <= 0.97


def test_a_true_effect_of_two_standard_errors_is_found_at_the_rate_of_theory() -> None:
    seeds, rng = 3, np.random.default_rng(1)
    error = 0.01 * math.sqrt(2) / math.sqrt(seeds)
    found = [effect(simulated_axis(rng, seeds, difference=-2 * error), TIE) for _ in range(SIMULATIONS)]
    critical, df = stats.t.ppf(0.975, seeds - 1), seeds - 1
    power = stats.nct.sf(critical, df, 2) + stats.nct.cdf(-critical, df, 2)
    rate = sum(e.verdict in ("better", "worse") for e in found) / SIMULATIONS
    print(f"{seeds} seeds: found {rate:.3f}, theory {power:.3f}")
    assert rate == pytest.approx(power, abs=3 * math.sqrt(power * (1 - power) / SIMULATIONS))
    assert sum(not covers(e.ci95) for e in found) == sum(e.verdict in ("better", "worse") for e in found)
    assert sum(covers(e.ci95, -2 * error) for e in found) / SIMULATIONS == pytest.approx(0.95, abs=0.03)
    assert sum(e.verdict == "worse" for e in found) < 0.01 * SIMULATIONS  # lower is better


# --- verdicts --------------------------------------------------------------------------------------------------------


def judged(mean: float, half: float, *, p: float, std: float | None = 1.0, margin: float | None = None) -> Effect:
    """An effect on the loss with that interval, judged."""
    e = Effect("k", "a", "b", "val_loss", mean_difference=mean, ci95=[mean - half, mean + half], p_value=p, p_holm=p)
    e.seed_std, e.n_seeds = std, 3
    e.differences = {"1": mean - half, "2": mean, "3": mean + half}
    effects.judge(e, lower_is_better=True, margin=margin)
    return e


def test_precedence_of_verdicts() -> None:
    tiny = judged(0.01, 0.005, p=0.001)
    assert (tiny.verdict, tiny.reason) == ("worse", "smaller than the seed-to-seed std")
    assert judged(0.01, 0.005, p=0.001, margin=0.02).verdict == "indistinguishable"  # the margin is checked first
    assert judged(0.01, 0.005, p=0.001, margin=0.012).verdict == "worse"
    assert judged(-2, 0.5, p=0.001).verdict == "better"
    assert judged(-2, 0.5, p=0.001).reason == ""
    assert judged(0.1, 0.5, p=0.6, margin=0.7).verdict == "indistinguishable"
    assert judged(0.1, 0.5, p=0.6, margin=0.3).verdict == "inconclusive"
    assert judged(0.1, 0.5, p=0.6, margin=0.3).reason.startswith("the interval reaches beyond ±0.3; about ")
    assert judged(0.0, 0.0, p=1.0, std=0.0).verdict == "indistinguishable"  # inside any margin


@pytest.mark.parametrize(("half", "how"), [(0.5, "lies inside"), (1.5, "reaches beyond")])
def test_without_a_margin_no_noise_makes_arms_equal(half: float, how: str) -> None:
    """The seed-to-seed std depends on the data: a noisier study would find no difference more easily."""
    found = judged(0.1, half, p=0.6)
    assert found.verdict == "inconclusive"
    assert found.reason.startswith(f"the interval holds zero and {how} ± the seed-to-seed std; ")
    assert judged(0.1, half, p=0.6, std=None).verdict == "inconclusive"


def test_what_only_holm_takes_back_says_so() -> None:
    e = Effect("k", "a", "b", "val_loss", mean_difference=2, ci95=[0.5, 3.5], p_value=0.03, p_holm=0.06, seed_std=1)
    e.differences, e.n_seeds = {"1": 1.4, "2": 2.0, "3": 2.6}, 3
    effects.judge(e, lower_is_better=True, margin=None)
    assert e.verdict == "inconclusive"
    assert "Holm" in e.reason
    assert (e.n_needed or 0) > 3


def test_equivalence_end_to_end() -> None:
    """Arms that differ by far less than seeds do."""
    wobble = [0.0001, -0.0001, 0.0002, -0.0002, 0.0]
    seeds = [3.0, 3.1, 2.9, 3.2, 2.8]
    same = arms(TIE, {"true": seeds, "false": [s + w for s, w in zip(seeds, wobble, strict=True)]})
    assert effect(same, TIE).verdict == "inconclusive"
    assert effect(comparisons.compare(same, margin=0.001), TIE).verdict == "indistinguishable"
    shifted = arms(TIE, {"true": seeds, "false": [s + 0.001 + w for s, w in zip(seeds, wobble, strict=True)]})
    assert effect(shifted, TIE).verdict == "worse"
    assert effect(shifted, TIE).reason == "smaller than the seed-to-seed std"
    assert effect(comparisons.compare(shifted, margin=0.01), TIE).verdict == "indistinguishable"
    assert effect(comparisons.compare(shifted, margin=0.0001), TIE).verdict == "worse"


def test_the_margin_is_the_runs_and_the_strictest_where_they_differ() -> None:
    losses = {"true": [3.0, 3.1, 2.9], "false": [3.001, 3.1, 2.899]}

    def stated(*margins: str) -> Comparison:
        return comparisons.compare([r for m in margins for r in margined(m, losses)])

    def margined(margin: str, losses: Mapping[str, Sequence[float]]) -> list[Row]:
        return [
            run(f"{TIE}={arm}", f"sweep.margin={margin}", loss=loss, seed=seed)
            for arm, all in losses.items()
            for seed, loss in enumerate(all)
        ]

    assert effect(stated("0.1"), TIE).verdict == "indistinguishable"
    assert (stated("0.1").margin, stated("0.1").notes) == (0.1, [])
    assert effect(stated("null"), TIE).verdict == "inconclusive"
    both = stated("0.1", "0.2")
    assert both.margin == 0.1
    assert "the runs differ in sweep.margin: the smallest is taken, 0.1" in both.notes
    assert stated("0.1", "null").margin is None
    assert comparisons.compare(margined("0.1", losses), margin=0.0001).margin == 0.0001


def test_an_open_row_says_how_many_seeds_would_settle_it() -> None:
    """Seeds come after this look, so by the e-process; for both verdicts, and for a larger std."""
    rows = arms(TIE, {"true": [3.0, 3.1, 2.9, 3.05], "false": [3.02, 3.08, 2.93, 3.06]})
    values = [0.02, -0.02, 0.03, 0.01]
    found, std = effect(comparisons.compare(rows, margin=0.02), TIE), float(np.std(values, ddof=1))
    tell, equal = needed(0.01, std, 0.02, "open")
    tell_at_most, equal_at_most = needed(0.01, upper_std(std, 4), 0.02, "open")
    assert found.verdict == "inconclusive"
    assert found.n_needed == min(tell or 0, equal or 0)
    assert found.n_needed_at_most == min(tell_at_most or 0, equal_at_most or 0)
    assert f"about {tell} (perhaps {tell_at_most:,}) seeds in all would tell" in found.reason
    assert f"about {equal} (perhaps {equal_at_most:,}) to call it indistinguishable" in found.reason
    alone = effect(rows, TIE)
    assert (alone.n_needed, alone.reason.count("indistinguishable")) == (tell, 0)
    never = arms(TIE, {"true": [3.0, 3.1, 2.9, 3.0], "false": [3.1, 3.0, 2.9, 3.0]})
    assert (effect(never, TIE).n_needed, "more than 10,000" in effect(never, TIE).reason) == (None, True)
    assert effect(two_by_two(TIE, "true", "false"), TIE).n_needed is None


def test_what_pairing_gained() -> None:
    one, other = [3.0, 3.1, 2.9, 3.2], [3.02, 3.11, 2.93, 3.21]
    found = effect(arms(TIE, {"true": one, "false": other}), TIE)
    assert found.pair_correlation == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert found.seeds_saved == pairing(one, other)[1]
    assert (found.baseline_std, found.arm_std) == pytest.approx((np.std(one, ddof=1), np.std(other, ddof=1)))
    against = effect(arms(TIE, {"true": one, "false": [6 - loss for loss in one]}), TIE)
    assert (against.seeds_saved or 0) < 0
    assert "unpaired" not in against.reason  # the sentence says it, once


def test_arms_against_each_other_are_said_once() -> None:
    one = [3.0, 3.1, 2.9, 3.2]
    comparison = comparisons.compare(arms(TIE, {"true": one, "false": [6 - loss for loss in one]}))
    said = "the two arms go against each other over the seeds"
    [(_, sentence)] = words.sentences(comparison)
    assert sentence.count(said) == 1
    assert said not in "\n".join(report.effects(comparison))


def test_memory_that_the_order_of_jobs_decides_is_not_compared() -> None:
    """If runs of one arm in one process are 50 MiB apart, arms 20 MiB apart are not compared; arms 200 apart are."""
    peaks = [600, 650, 610]

    def compare(apart: int, pids: Sequence[int]) -> Effect:
        rows = [
            run(
                f"{TIE}={arm}", seed=seed, peak_memory_bytes=(peak + apart * (arm == "false")) * 2**20, pid=pids[at % 6]
            )
            for at, (arm, (seed, peak)) in enumerate(itertools.product(("true", "false"), enumerate(peaks)))
        ]
        return effect(rows, TIE, "peak_memory_bytes")

    found = compare(20, [7] * 6)
    assert (found.verdict, found.ci95, found.p_value) == ("not_comparable", None, None)
    assert "up to 50 MiB apart" in found.reason
    assert "sweep.isolate=true" in found.reason
    assert compare(200, [7] * 6).verdict == "worse"
    assert compare(20, range(1, 7)).verdict == "worse"  # each in a process of its own


def test_a_seed_that_is_far_off_is_named() -> None:
    calm = {str(seed): value for seed, value in enumerate((0.01, 0.02, 0.015, 0.012, 0.018, 0.9))}
    assert effects.far_off(calm, list(calm.values())) == "5"
    rng = np.random.default_rng(2)
    drawn = [list(rng.normal(0, 1, n)) for n in (4, 6, 10) for _ in range(700)]
    found = sum(effects.far_off([str(at) for at in range(len(of))], of) is not None for of in drawn)
    assert 0.003 < found / len(drawn) < 0.017  # at the level of 1 %
    assert effects.far_off(["1", "2", "3"], [0.0, 0.0, 9.0]) is None
    rows = arms(TIE, {"true": [3.0] * 6, "false": [3 + value for value in calm.values()]})
    assert "seed 5 is far off the others" in effect(rows, TIE).reason


# --- looking and adding ----------------------------------------------------------------------------------------------


def test_looking_after_every_seed_calls_what_is_not_there_too_often_only_without_the_record() -> None:
    """500 sweeps without a difference, a look at each n from 3 to 20: the share that ever gets a verdict."""
    rng = np.random.default_rng(5)
    forgetful = honest = 0
    for values in rng.normal(0, 0.01, (500, 20)):
        called = {False: False, True: False}
        for n in range(3, 21):
            for recorded in called:
                looks = list(range(3, n)) if recorded else []
                of = infer(values[:n], looks)
                e = Effect("k", "a", "b", "val_loss", n_seeds=n, mean_difference=of.mean, ci95=[of.low, of.high])
                e.p_value = e.p_holm = of.p
                e.inference, e.looks = of.inference, looks
                e.differences = {str(at): value for at, value in enumerate(values[:n])}
                if called[recorded]:
                    continue
                if of.p < 0.05:
                    effects.judge(e, lower_is_better=True, margin=None)
                    called[recorded] = e.verdict in ("better", "worse")
        forgetful, honest = forgetful + called[False], honest + called[True]
    print(f"called: forgetful {forgetful / 500:.3f}, with the record {honest / 500:.3f}")
    assert honest / 500 <= 0.05
    assert forgetful / 500 > 0.15


DIFFERENCES = [0.03, 0.012, 0.02, 0.022, 0.031, 0.008]


def added(seeds: int, sweep: Path, begin: int = 0) -> Path:
    """A sweep of `DIFFERENCES`, of which these seeds were run."""
    for seed in range(begin, seeds):
        for arm, loss in (("true", 3 + seed / 10), ("false", 3 + seed / 10 + DIFFERENCES[seed])):
            put(run(f"{TIE}={arm}", loss=loss, seed=seed), sweep, f"{seed}_{arm}")
    return sweep


def looked(sweep: Path, **how: Any) -> Effect:
    """Compare the sweep and write the comparison; returns its effect on the loss as written."""
    with pytest.MonkeyPatch.context() as patch:  # figures are most of the work, and no look is in them
        patch.setattr("gpt2exp.compare.figures.draw", lambda _: [])
        conclude.write(comparisons.compare(comparisons.read([sweep]), **how), sweep)
    [found] = [e for e in json.loads((sweep / "comparison.json").read_text())["axes"] if "loss" in e["metric"]]
    return Effect(**found)


def test_seeds_added_after_a_look_get_the_interval_that_holds_at_every_look(tmp_path: Path) -> None:
    assert looked(added(3, tmp_path)).inference == "fixed"
    again = looked(tmp_path)
    assert (again.inference, again.looks) == ("fixed", [])  # nothing was added
    grown = looked(added(6, tmp_path, begin=3))
    of = open_ended(DIFFERENCES, [3])
    assert (grown.inference, grown.looks) == ("open", [3])
    assert grown.ci95 == pytest.approx([of.low, of.high])
    assert grown.p_value == pytest.approx(of.p)
    assert "seeds were added after a look at n=3" in grown.reason
    assert looked(tmp_path).looks == [3]
    known = json.loads((tmp_path / "comparison.json").read_text())
    assert [(look["seeds"], look["planned"]) for look in known["looks"]] == [(3, 3), (6, 6)]


def test_a_comparison_of_an_older_version_is_a_look(tmp_path: Path) -> None:
    looked(added(3, tmp_path))
    change(tmp_path / "comparison.json", lambda of: of.pop("looks"))
    assert looked(added(5, tmp_path, begin=3)).looks == [3]


@pytest.mark.parametrize(
    "text", ["[]", "{}", '{"looks": 3}', '{"runs": 1, "seeds": [], "swept": {}}', "\xff", '{"axes"']
)
def test_another_programs_comparison_is_no_look(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    (tmp_path / "sweep.json").write_text(text)
    assert looked(added(3, tmp_path)).inference == "fixed"


def test_what_was_planned_at_the_look_is_not_added(tmp_path: Path) -> None:
    """A sweep that was stopped, or had a failed run, and then ran the rest of its planned seeds."""
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [[f"seed={seed}"] for seed in range(5)]}))
    looked(added(3, tmp_path))
    assert looked(added(5, tmp_path, begin=3)).inference == "fixed"
    assert looked(added(6, tmp_path, begin=5)).looks == [3, 5]


def test_a_look_at_other_arms_is_none_at_these(tmp_path: Path) -> None:
    sweep = added(4, tmp_path)
    looked(sweep)
    change(sweep / "comparison.json", lambda of: of["looks"][0].update(arms={"optimizer.lr": ["0.1", "0.2"]}))
    assert looked(added(6, sweep, begin=4)).inference == "fixed"


def test_looks_that_were_declared_are_sharper(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [], "looks": [3, 4, 5, 6]}))
    looked(added(3, tmp_path))
    found, of = looked(added(5, tmp_path, begin=3)), declared(DIFFERENCES[:5], [3, 4, 5, 6])
    assert (found.inference, found.looks) == ("declared", [3, 4, 5, 6])
    assert found.ci95 == pytest.approx([of.low, of.high])
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": [], "looks": [4, 5]}))  # there was one at 3 too
    assert looked(tmp_path).inference == "open"


def test_seeds_count_in_the_order_in_which_they_were_run() -> None:
    """A look saw the seeds that were run first, not the lowest ones."""
    order = [7, 2, 9, 4]
    rows = [run(f"{TIE}={arm}", seed=seed, loss=3.0) for seed in order for arm in ("true", "false")]
    random.Random(1).shuffle(rows)
    assert list(effect(rows, TIE).differences) == ["7", "2", "9", "4"]


def test_what_was_decided_stays_decided(tmp_path: Path) -> None:
    values = [0.030, 0.031, 0.029, 0.0305, 0.0295, -0.2]
    of = open_ended(values, [5])
    assert of.decided == 5
    assert of.low < 0 < of.high
    e = Effect("k", "a", "b", "val_loss", n_seeds=6, mean_difference=of.mean, ci95=[of.low, of.high], p_value=of.p)
    e.p_holm, e.inference, e.looks = of.p, "open", [5]
    e.differences = {str(at): value for at, value in enumerate(values)}
    effects.judge(e, lower_is_better=True, margin=None)
    assert e.verdict == "worse"  # as it was then; the mean has another sign now
    assert of.mean < 0
    assert "decided at n=5, though the interval of all seeds holds zero again" in e.reason


def test_margin_is_about_the_loss_alone() -> None:
    rows = arms(TIE, {"true": [3, 3.1], "false": [3, 3.1]})
    for row in rows[2:]:
        row["tokens_per_second"] *= 1.5
        row["peak_memory_bytes"] += 7
    comparison = comparisons.compare(rows, margin=10)
    assert effect(comparison, TIE, "tokens_per_second").verdict == "better"
    assert effect(comparison, TIE, "peak_memory_bytes").verdict == "worse"


def test_an_unrelated_wild_arm_does_not_widen_what_counts_as_equal() -> None:
    calm = {"0.0003": [3.0, 3.1, 2.9, 3.0], "0.0004": [3.02, 3.05, 2.97, 3.01]}
    rows = arms("optimizer.lr", calm)
    alone = effect(rows, "optimizer.lr", arm="0.0004")
    wild = effect(rows + arms("optimizer.lr", {"0.1": [3.0, 90.0, 40.0, 9.0]}), "optimizer.lr", arm="0.0004")
    assert wild.seed_std == pytest.approx(alone.seed_std)
    assert alone.seed_std == pytest.approx(pooled_std(calm.values()))


def test_speed_is_a_ratio_on_the_logarithm() -> None:
    slow, fast = [100.0, 200.0, 400.0], [150.0, 400.0, 800.0]
    rows = [run(f"{TIE}=true", seed=s, tokens_per_second=v) for s, v in enumerate(slow)]
    rows += [run(f"{TIE}=false", seed=s, tokens_per_second=v) for s, v in enumerate(fast)]
    found = effect(rows, TIE, "tokens_per_second")
    assert found.speed_ratio == pytest.approx(stats.gmean([1.5, 2, 2]))
    reference = stats.ttest_rel(np.log(fast), np.log(slow))
    assert found.ci95 == pytest.approx(list(np.exp(reference.confidence_interval(0.95))))
    assert found.p_value == pytest.approx(reference.pvalue)
    assert found.mean_difference is None
    assert found.seed_std == pytest.approx(pooled_std([np.log(slow).tolist(), np.log(fast).tolist()]))
    assert found.arm_mean is not None
    assert found.baseline_mean is not None
    assert found.arm_mean / found.baseline_mean == pytest.approx(found.speed_ratio)
    assert found.differences == pytest.approx({"0": 1.5, "1": 2, "2": 2})


def test_holm_runs_over_the_axes_of_a_metric() -> None:
    rows = simulated_factorial(np.random.default_rng(3), 5, b_effect=0.012)
    comparison = comparisons.compare(rows)
    for metric in ("loss_mean_last10", "tokens_per_second", "peak_memory_bytes"):
        tested = [e for e in comparison.axes if e.metric == metric]
        assert len(tested) == 2
        assert [e.p_holm for e in tested] == pytest.approx(holm([e.p_value or 0.0 for e in tested]))
    assert effect(comparison, SCALING).verdict == "worse"


# --- pairing ---------------------------------------------------------------------------------------------------------


def test_differences_are_averaged_over_the_other_axes() -> None:
    rows = factorial(lambda a, b, s: 3 + s + (a == "false") * (0.1 + 0.2 * (b == "false") + 0.01 * s), seeds=3)
    random.Random(0).shuffle(rows)
    found = effect(rows, TIE)
    assert (found.n_pairs, found.n_seeds, found.dropped_pairs) == (6, 3, 0)
    assert found.differences == pytest.approx({"0": 0.2, "1": 0.21, "2": 0.22})
    assert found.mean_difference == pytest.approx(0.21)
    assert found.ci95 == pytest.approx([(of := fixed([0.2, 0.21, 0.22])).low, of.high])
    assert (found.baseline_mean, found.arm_mean) == pytest.approx((4, 4.21))


@pytest.mark.parametrize(
    ("state", "summary"),
    [("failed", True), ("diverged", True), ("interrupted", True), ("failed", False), ("running", False)],
)
def test_a_run_without_an_end_breaks_its_pair_and_is_listed(state: str, summary: bool) -> None:
    rows = arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]})
    error = None if state == "running" else "loss is nan at step 7"
    if summary:
        rows[4] = unfinished(rows[4], state, error)
    else:
        kept = {key: rows[4][key] for key in ("name", "folder", "config", "overrides")}
        rows[4] = {**kept, "state": state, "step": 7, "error": error}
    comparison = comparisons.compare(rows)
    found = effect(comparison, TIE)
    assert (found.n_pairs, found.n_seeds, found.dropped_pairs) == (2, 2, 1)
    assert found.differences == pytest.approx({"0": -1.0, "2": -1.1})
    assert comparison.failed == [{"name": rows[4]["name"], "state": state, "step": 7, "error": error}]
    assert len(comparison.runs) == 6


def test_pairs_are_counted_as_broken_whether_one_or_both_failed_or_one_is_not_there() -> None:
    rows = arms(TIE, {"true": [3.0, 3.1, 3.2, 3.3], "false": [2.0, 2.2, 2.1, 2.0]})
    rows[0], rows[4], rows[5] = (unfinished(rows[at]) for at in (0, 4, 5))
    del rows[2]
    found = effect(rows, TIE)
    assert (found.n_pairs, found.dropped_pairs) == (1, 3)
    assert (found.verdict, found.reason) == (None, "n=1: no interval, add seeds")


def test_an_arm_that_failed_altogether_is_still_an_arm() -> None:
    rows = arms("optimizer.lr", {"0.0003": [3.0, 3.1], "1000.0": [9.0, 9.0]})
    rows[2:] = [unfinished(row, "diverged", "loss is nan") for row in rows[2:]]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"optimizer.lr": ["0.0003", "1000.0"]}
    found = effect(comparison, "optimizer.lr")
    assert (found.n_pairs, found.dropped_pairs, found.verdict) == (0, 2, "not_comparable")
    assert len(comparison.failed) == 2
    assert comparisons.compare([unfinished(row) for row in rows]).failed


def test_incomplete_factorial_averages_what_is_there_and_says_so() -> None:
    rows = factorial(lambda a, b, s: 3 + (a == "false") * (0.1 + 0.2 * (b == "false")), seeds=3)
    whole = comparisons.compare(rows)
    assert whole.notes == []
    lost = next(r for r in rows if r["overrides"] == [f"{TIE}=false", f"{SCALING}=false", "seed=2"])
    comparison = comparisons.compare([unfinished(row) if row is lost else row for row in rows])
    found = effect(comparison, TIE)
    assert (found.n_pairs, found.n_seeds, found.dropped_pairs) == (5, 3, 1)
    assert found.differences == pytest.approx({"0": 0.2, "1": 0.2, "2": 0.1})
    assert found.arm_mean is not None
    assert found.baseline_mean is not None
    assert found.arm_mean - found.baseline_mean == pytest.approx(found.mean_difference)
    assert [note.partition(":")[0] for note in comparison.notes] == [TIE, SCALING]
    assert covers(found.ci95, 0.2)
    [interaction] = comparison.interactions
    assert (interaction.n_seeds, interaction.mean_difference) == (2, pytest.approx(0.2))


def test_of_repeated_runs_the_last_finished_one_counts() -> None:
    rows = arms(TIE, {"true": [3.0, 3.1], "false": [5.0, 2.1]})
    again = run(f"{TIE}=false", loss=2.0, seed=0)
    later = unfinished(run(f"{TIE}=false", loss=9.0, seed=0))
    comparison = comparisons.compare([later, again, *rows])
    assert effect(comparison, TIE).differences == pytest.approx({"0": -1.0, "1": -1.0})
    assert comparison.notes == ["1 runs repeat another's settings and seed; the last of each counts"]
    assert effect(comparison, TIE).dropped_pairs == 0


def test_each_arm_is_held_against_the_default_where_it_is_one() -> None:
    losses = {"0.001": [3.0, 3.1], "0.0003": [4.0, 4.2], "0.01": [5.0, 5.3]}
    comparison = comparisons.compare(arms("optimizer.lr", losses))
    assert comparison.swept == {"optimizer.lr": ["0.0003", "0.001", "0.01"]}
    assert effect(comparison, "optimizer.lr", arm="0.001").mean_difference == pytest.approx(-1.05)
    assert effect(comparison, "optimizer.lr", arm="0.01").mean_difference == pytest.approx(1.05)
    del losses["0.0003"]
    assert comparisons.compare(arms("optimizer.lr", losses)).swept == {"optimizer.lr": ["0.001", "0.01"]}


def test_one_pair_has_no_verdict() -> None:
    found = effect(arms(TIE, {"true": [3.0], "false": [2.0]}), TIE)
    assert (found.n_pairs, found.n_seeds, found.mean_difference) == (1, 1, -1)
    assert (found.verdict, found.reason, found.ci95, found.p_value) == (None, "n=1: no interval, add seeds", None, None)
    only_two_settings = factorial(lambda a, b, s: 3.0, seeds=1)
    assert effect(only_two_settings, TIE).reason == "n=1: no interval, add seeds"


def test_validation_loss_is_compared_where_every_run_has_it() -> None:
    rows = arms(TIE, {"true": [3.0, 3.1], "false": [2.0, 2.1]})
    for row in rows:
        row["val_loss"] = row["loss_mean_last10"] + 1
    comparison = comparisons.compare(rows)
    assert comparison.metric == "val_loss"
    assert {e.metric for e in comparison.axes} == {"val_loss", "tokens_per_second", "peak_memory_bytes"}
    rows[0]["val_loss"] = None
    assert comparisons.compare(rows).metric == "loss_mean_last10"


def test_runs_alike_but_for_the_seed_are_no_comparison() -> None:
    comparison = comparisons.compare([run(loss=3.0, seed=seed) for seed in range(3)])
    assert comparison.axes == []
    assert comparison.notes == ["nothing but the seed varies, so there is no axis to compare"]


# --- what cannot be compared -----------------------------------------------------------------------------------------

METRICS = ("loss_mean_last10", "tokens_per_second", "peak_memory_bytes")


def verdicts(rows: Sequence[Row], key: str) -> dict[str, tuple[str | None, str]]:
    """By metric, the verdict and reason of an axis of one arm."""
    return {e.metric: (e.verdict, e.reason) for e in comparisons.compare(rows).axes if e.key == key}


def two_by_two(key: str, baseline: str, arm: str, of_arm: Mapping[str, Any] | None = None) -> list[Row]:
    """Two arms of two seeds each, the second's facts changed."""
    rows = [run(f"{key}={baseline}", seed=seed, loss=3 + seed / 10) for seed in (0, 1)]
    return rows + [run(f"{key}={arm}", seed=seed, loss=2 + seed / 8, **(of_arm or {})) for seed in (0, 1)]


@pytest.mark.parametrize("key", ["precision", "precision.name"])
def test_equal_effective_precision_compares_nothing(key: str) -> None:
    got = {"requested": "tf32", "effective": "fp32", "emulated": False}
    found = verdicts(two_by_two(key, "fp32", "tf32", {"precision": got}), key)
    assert found == dict.fromkeys(METRICS, ("not_comparable", "both arms computed in fp32 on this hardware"))


def test_emulated_precision_compares_all_but_speed() -> None:
    got = {"requested": "tf32", "effective": "tf32", "emulated": True}
    found = verdicts(two_by_two("precision", "fp32", "tf32", {"precision": got}), "precision")
    assert found["loss_mean_last10"][0] == "better"
    assert found["tokens_per_second"] == (
        "not_comparable",
        "emulated precision: its speed is not a hardware speed",
    )
    assert found["peak_memory_bytes"][0] == "indistinguishable"
    found = verdicts(two_by_two(TIE, "true", "false", {"precision": got}), TIE)  # the speed of any axis
    assert found["tokens_per_second"][0] == "not_comparable"


def test_two_roundings_of_the_emulation_are_two_precisions() -> None:
    got = {"requested": "tf32", "effective": "tf32", "emulated": True}
    cropped = [run("precision=tf32", seed=s, loss=3 + s / 10, precision=got) for s in (0, 1)]
    nearest = ("precision.name=tf32", "precision.rounding=nearest")
    rounded = [run(*nearest, typed=["precision=tf32_nearest"], seed=s, loss=2 + s / 8, precision=got) for s in (0, 1)]
    assert verdicts(cropped + rounded, "precision")["loss_mean_last10"][0] == "better"
    real = {"requested": "tf32", "effective": "tf32", "emulated": False}
    same = [{**row, "precision": real} for row in cropped + rounded]
    assert verdicts(same, "precision")["loss_mean_last10"][0] == "not_comparable"


@pytest.mark.parametrize("changed", [{"device": "cuda: A100"}, {"threads": 8}, {"processes": 2}])
def test_other_hardware_compares_only_the_loss(changed: dict[str, Any]) -> None:
    found = verdicts(two_by_two(TIE, "true", "false", changed), TIE)
    assert found["loss_mean_last10"][0] == "better"
    for metric in METRICS[1:]:
        assert found[metric] == ("not_comparable", "the arms ran on different hardware")


def test_processors_of_one_name_on_two_machines_are_not_timed_against_each_other() -> None:
    rows = two_by_two(TIE, "true", "false", {"machine": "there"})
    found = verdicts(rows, TIE)
    assert found["tokens_per_second"] == ("not_comparable", "the arms ran on different machines")
    assert found["peak_memory_bytes"][0] == "indistinguishable"
    on_gpus = [{**row, "device": "cuda: A100"} for row in rows]  # a node each, the same card
    assert verdicts(on_gpus, TIE)["tokens_per_second"][0] == "indistinguishable"


def test_seeds_from_several_machines_are_joined() -> None:
    rows = [
        run(f"{TIE}={arm}", seed=seed, loss=3 + seed / 10 + (arm == "false"), machine=f"machine {seed // 2}")
        for arm in ("true", "false")
        for seed in range(4)
    ]
    found = effect(rows, TIE, "tokens_per_second")
    assert (found.n_seeds, found.verdict) == (4, "indistinguishable")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"speed_disturbed": 0.51}, "in 2 of 4 runs most steps waited for a core that another program used"),
        ({"speed_disturbed": 0.5}, None),  # left out of the speed, and enough was left
        ({"speed_disturbed": None}, None),
        ({}, None),  # a run from before it was measured
        ({"speed_disturbed": "?"}, None),
    ],
)
def test_a_speed_under_anothers_load_is_no_arms(facts: dict[str, Any], reason: str | None) -> None:
    rows = two_by_two(TIE, "true", "false", facts)
    found = verdicts(rows, TIE)
    assert found["tokens_per_second"] == (("not_comparable", reason) if reason else found["tokens_per_second"])
    assert (found["tokens_per_second"][0] == "not_comparable") == (reason is not None)
    assert found["loss_mean_last10"][0] == "better"
    assert found["peak_memory_bytes"][0] == "indistinguishable"


def at(minute: float) -> str:
    """A start, minutes into a day."""
    return (datetime(2026, 1, 2, tzinfo=UTC) + timedelta(minutes=minute)).isoformat(timespec="seconds")


def spans(*runs: tuple[str, float, float]) -> list[Row]:
    """Runs by machine, start and length in minutes."""
    return [
        run(machine=machine, started=at(begin), wall_seconds={"startup": 9, "train": 60 * minutes, "total": 0})
        for machine, begin, minutes in runs
    ]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([("a", 0, 10), ("a", 10, 10), ("a", 20, 10)], []),
        ([("a", 0, 10), ("a", 9, 10), ("a", 20, 10)], [0, 1]),
        ([("a", 0, 10), ("b", 9, 10)], []),
        ([("a", 0, 10), ("b", 1, 1), ("a", 5, 1)], [0, 2]),  # another machine's run between
        ([("a", 0, 100), ("a", 10, 1), ("a", 50, 1)], [0, 1, 2]),  # one long run beside two short ones
        ([("a", 0, 10), ("a", 10 - 0.5 / 60, 10)], []),  # starts are kept to the second
    ],
)
def test_overlaps_are_found_by_machine(runs: list[tuple[str, float, float]], expected: list[int]) -> None:
    rows = spans(*runs)
    assert comparisons.contended(rows) == {rows[index]["folder"] for index in expected}
    assert comparisons.contended(rows[::-1]) == {rows[index]["folder"] for index in expected}


def test_a_long_start_up_is_no_overlap() -> None:
    """A first job's time counts from before its `started`: from its process's beginning."""
    rows = spans(("a", 0, 1), ("a", 1, 1))
    rows[0]["wall_seconds"] = {"startup": 40.0, "train": 60.0, "total": 100.0}
    assert comparisons.contended(rows) == set()


def test_each_part_of_a_run_counts_where_and_when_it_was_at_work() -> None:
    """A part counts for its span, which begins before `started`; the time between two parts does not count."""
    day = datetime.fromisoformat(at(0)).timestamp()
    rows = spans(("a", 0, 1), ("a", 10, 1))

    def part(machine: str, begin: float, end: float) -> dict[str, Any]:
        return {"started": at(99), "train": 1.0, "machine": machine, "span": [day + 60 * begin, day + 60 * end]}

    for second, shared in ((("a", 20, 21), False), (("b", 10, 11), False), (("a", 9, 10.1), True)):
        rows[0]["parts"] = [part("a", 0, 1), part(*second)]
        assert comparisons.contended(rows) == ({row["folder"] for row in rows} if shared else set())


def test_shared_machines_compare_no_speed() -> None:
    rows = two_by_two(TIE, "true", "false")
    beside = unfinished(run(f"{TIE}=true", seed=9), started=rows[0]["started"])  # a failed run took its share too
    found = verdicts([*rows, beside], TIE)
    assert found["tokens_per_second"] == ("not_comparable", "runs shared the machine while they were timed")
    assert found["peak_memory_bytes"][0] == "indistinguishable"


def test_other_texts_compare_no_loss() -> None:
    other = {"name": "text", "sha256": "ffff", "val_tokens": 0}
    found = verdicts(two_by_two(TIE, "true", "false", {"data": other}), TIE)
    assert found["loss_mean_last10"] == ("not_comparable", "the arms were trained on different texts")
    assert found["tokens_per_second"][0] == "indistinguishable"


def test_other_validation_texts_compare_no_validation_loss() -> None:
    rows = [
        run(f"data.val_fraction={share}", seed=seed, val_loss=3.0, data={"sha256": "86c4", "val_tokens": tokens})
        for share, tokens in (("0.1", 100), ("0.2", 200))
        for seed in (0, 1)
    ]
    reason = "the arms were validated on different texts"
    assert verdicts(rows, "data.val_fraction")["val_loss"] == ("not_comparable", reason)


def test_a_figure_that_was_not_measured_compares_nothing() -> None:
    found = verdicts(two_by_two(TIE, "true", "false", {"peak_memory_bytes": None}), TIE)
    assert found["peak_memory_bytes"] == ("not_comparable", "not measured in every run")
    assert found["loss_mean_last10"][0] == "better"
    rows = [*two_by_two(TIE, "true", "false"), run(f"{TIE}=true", seed=7, tokens_per_second=None)]  # in no pair
    assert verdicts(rows, TIE)["tokens_per_second"][0] == "indistinguishable"


def test_other_versions_are_noted() -> None:
    rows = two_by_two(TIE, "true", "false", {"versions": {"torch": "2.14.0"}, "git": None})
    [note] = comparisons.compare(rows).notes
    assert "git.commit, git.dirty, versions.torch" in note


# --- what was typed --------------------------------------------------------------------------------------------------


def test_an_untyped_difference_is_refused_by_name() -> None:
    rows = two_by_two(TIE, "true", "false")
    rows[2]["config"] = {**rows[2]["config"], "optimizer": {**rows[2]["config"]["optimizer"], "eps": 1e-6}}
    with pytest.raises(BadRequest, match=r"^the runs also differ in optimizer\.eps, which none"):
        comparisons.compare(rows)
    rows[2]["overrides"].append("optimizer.eps=1e-06")  # told to
    assert set(comparisons.compare(rows).swept) == {TIE, "optimizer.eps"}


@pytest.mark.parametrize(("key", "choices"), [("init", ["gpt2", "xavier", "torch"]), ("model", ["gpt2", "nano"])])
def test_a_group_is_one_axis(key: str, choices: list[str]) -> None:
    comparison = comparisons.compare(arms(key, {choice: [3.0, 3.1] for choice in reversed(choices)}))
    assert comparison.swept == {key: [choices[0], *reversed(choices[1:])]}
    with pytest.raises(BadRequest, match=r"optimizer\.lr"):
        comparisons.compare(
            [run(f"{key}={choices[0]}"), run(f"{key}={choices[1]}", "optimizer.lr=1", typed=[f"{key}=x"])]
        )


def test_one_choice_of_a_group_means_one_section() -> None:
    """If the group's file was edited between two runs, one override makes two configurations."""
    rows = arms("model", {"gpt2": [3.0, 3.1], "nano": [2.0, 2.1]})
    rows[3] = run("model=nano", "model.n_layer=6", typed=["model=nano"], seed=1)
    with pytest.raises(BadRequest, match=r"model\.n_layer"):
        comparisons.compare(rows)


def test_a_choice_that_a_preset_made_is_the_choice() -> None:
    rows = [run("model=nano", f"{TIE}={tie}", typed=[f"{TIE}={tie}"], seed=0) for tie in ("true", "false")]
    rows += [run("model=nano", f"{TIE}={tie}", seed=1) for tie in ("true", "false")]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {TIE: ["true", "false"]}
    assert effect(comparison, TIE).n_seeds == 2
    with pytest.raises(BadRequest, match=r"model\.n_layer"):  # it is not known which of the two was not typed
        comparisons.compare([*rows, run("model=gpt2", seed=0)])
    rows = [run(), run("precision=tf32", seed=1), run("precision.name=tf32")]
    assert comparisons.compare(rows).swept == {"precision.name": ["fp32", "tf32"]}


def test_group_and_key_of_its_section_are_two_axes() -> None:
    rows = [
        run(f"init={scheme}", f"{SCALING}={on}", seed=seed, loss=3 + seed / 10 + (on == "false"))
        for scheme in ("gpt2", "xavier")
        for on in ("true", "false")
        for seed in (0, 1)
    ]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"init": ["gpt2", "xavier"], SCALING: ["true", "false"]}
    assert effect(comparison, "init").n_pairs == 4
    assert effect(comparison, SCALING).mean_difference == pytest.approx(1)


def test_what_only_one_choice_has_is_no_axis() -> None:
    """A pretrained run names its weights, and one from scratch beside it cannot: they differ in `init` alone."""
    rows = [run("init=gpt2", seed=0), run("init=pretrained", "init.path=a", seed=0)]
    assert comparisons.compare(rows).swept == {"init": ["gpt2", "pretrained"]}
    assert effect(rows, "init").n_pairs == 1
    rows.append(run("init=pretrained", "init.path=b", seed=0))
    assert set(comparisons.compare(rows).swept) == {"init", "init.path"}


def test_axes_that_only_vary_together_have_no_pairs() -> None:
    rows = [run("model=gpt2"), run("model=nano", "model.n_layer=6")]
    for key in ("model", "model.n_layer"):
        assert effect(rows, key).reason == f"no two finished runs differ in {key} alone"


def test_housekeeping_neither_varies_nor_divides() -> None:
    kept = ["wandb.tags=[a,b]", "wandb.name='x y'", "train.log_every=7", "sweep.isolate=true"]
    first, second = (
        run(seed=0, loss=3.0),
        run(f"{TIE}=false", *kept[2:], seed=0, loss=2.0, typed=[f"{TIE}=false", *kept]),
    )
    assert comparisons.compare([first, second]).swept == {TIE: ["true", "false"]}


def test_a_run_that_typed_nothing_has_the_defaults() -> None:
    rows = [{**run(seed=1337), "overrides": []}, run("precision=tf32", seed=1337)]
    assert comparisons.compare(rows).swept == {"precision": ["fp32", "tf32"]}
    assert effect(rows, "precision").n_pairs == 1
    told = run("precision=tf32", seed=1337, typed=["experiment=precision", "precision=tf32"])
    assert comparisons.compare([rows[0], told]).swept == {"precision": ["fp32", "tf32"]}
    rows = [run("model=nano"), run(), run("init=torch")]
    assert comparisons.compare(rows).swept == {"model": ["gpt2", "nano"], "init": ["gpt2", "torch"]}


def test_spellings_of_one_value_are_one_arm() -> None:
    rows = [
        run("optimizer.betas=[0.9,0.95]", typed=["optimizer.betas=[0.9, .95]"], seed=0),
        run("optimizer.betas=[0.9,0.95]", seed=1),
        run("optimizer.betas=[0.9,0.999]", typed=["optimizer.betas=[0.9,0.999]"], seed=0),
        run(seed=1),
    ]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"optimizer.betas": ["[0.9,0.999]", "[0.9,0.95]"]}
    assert effect(comparison, "optimizer.betas").n_seeds == 2
    quoted = [run("model=nano", typed=["model='nano'"]), run("model=nano", typed=["+model=nano"]), run("model=gpt2")]
    assert comparisons.compare(quoted).swept == {"model": ["gpt2", "nano"]}
    a, b = (run(typed=[f'+note="a={x}"']) for x in "xy")
    assert comparisons.compare([a, b]).swept == {"note": ["a=x", "a=y"]}


def test_a_value_that_follows_an_axis_is_no_axis() -> None:
    rows = [
        run(
            "optimizer.schedule=cosine",
            f"train.steps={steps}",
            f"optimizer.warmup_steps={steps}",
            typed=["optimizer.schedule=cosine", f"train.steps={steps}", "optimizer.warmup_steps=${train.steps}"],
            seed=seed,
        )
        for steps in (50, 100)
        for seed in (0, 1)
    ]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"train.steps": ["50", "100"]}
    assert effect(comparison, "train.steps").n_pairs == 2


def test_a_value_that_follows_in_a_sweep_is_no_axis_either() -> None:
    """Hydra's sweeper records its braces with backslashes; and it is the value that a run alone typed."""
    follows = "optimizer.min_lr=$\\{optimizer.lr\\}"
    rows = [
        run(
            "optimizer.schedule=cosine",
            f"optimizer.lr={lr}",
            f"optimizer.min_lr={lr}",
            typed=["optimizer.schedule=cosine", f"optimizer.lr={lr}", follows if seed else "optimizer.min_lr=${.lr}"],
            seed=seed,
        )
        for lr in (1e-3, 3e-4)
        for seed in (1, 2)
    ]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"optimizer.lr": ["0.0003", "0.001"]}
    assert effect(comparison, "optimizer.lr").n_pairs == 2


def test_what_a_resolver_gave_is_a_value() -> None:
    """The environment may differ between two runs of one command: they are no repetition of each other."""
    rows = [run(f"optimizer.lr={lr}", typed=["optimizer.lr=${oc.env:LR}"], seed=1) for lr in (1e-3, 3e-4)]
    comparison = comparisons.compare(rows)
    assert comparison.swept == {"optimizer.lr": ["0.0003", "0.001"]}
    assert comparison.notes == []


def test_a_value_that_follows_in_a_preset_is_no_difference(tmp_path: Path) -> None:
    """Nobody typed it: a study of the user's own says `min_lr: ${optimizer.lr}`."""
    rows = [
        run(
            "optimizer.schedule=cosine",
            f"optimizer.lr={lr}",
            f"optimizer.min_lr={lr}",
            typed=["optimizer.schedule=cosine", f"optimizer.lr={lr}"],
            seed=seed,
        )
        for lr in (1e-3, 3e-4)
        for seed in (1, 2)
    ]
    folders = put_all(rows, tmp_path)
    with pytest.raises(BadRequest, match=r"also differ in optimizer\.min_lr"):
        comparisons.compare(comparisons.read([tmp_path]))
    for folder in folders:
        change(folder / ".hydra" / "config.yaml", lambda of: of["optimizer"].update(min_lr="${optimizer.lr}"))
    assert comparisons.compare(comparisons.read([tmp_path])).swept == {"optimizer.lr": ["0.0003", "0.001"]}


# --- interactions ----------------------------------------------------------------------------------------------------


def test_a_planted_interaction_is_estimated_and_large() -> None:
    rng = np.random.default_rng(0)
    planted = factorial(lambda a, b, s: 3 + 0.01 * s + (a == b == "false") * 0.5 + float(rng.normal(0, 0.01)), seeds=5)
    [found] = comparisons.compare(planted).interactions
    assert (found.keys, found.arms, found.n_seeds) == ((TIE, SCALING), ("false", "false"), 5)
    assert found.mean_difference == pytest.approx(0.5, abs=0.03)
    assert covers(found.ci95, 0.5)
    assert found.large


def test_additive_effects_do_not_interact() -> None:
    rng = np.random.default_rng(0)
    additive = factorial(
        lambda a, b, s: 3 + 0.1 * s + (a == "false") + 2 * (b == "false") + float(rng.normal(0, 0.01)), seeds=5
    )
    [found] = comparisons.compare(additive).interactions
    assert covers(found.ci95)
    assert not found.large
    exact = comparisons.compare(factorial(lambda a, b, s: 3 + (a == "false") + 2 * (b == "false"), seeds=2))
    assert exact.interactions[0].mean_difference == pytest.approx(0)


def test_an_interaction_below_the_seeds_or_open_to_zero_is_not_large() -> None:
    small = factorial(lambda a, b, s: 3 + s + (a == b == "false") * (0.1 + s / 100), seeds=4)
    [found] = comparisons.compare(small).interactions
    assert not covers(found.ci95)
    assert not found.large
    unsure = factorial(lambda a, b, s: 3 + (a == b == "false") * (-1) ** s * (s + 1), seeds=4)
    assert not comparisons.compare(unsure).interactions[0].large
    for sign in (1, -1):  # the interval just includes zero; the size is far above the std
        just = factorial(lambda a, b, s, sign=sign: 3 + sign * (a == b == "false") * (0.2, 0.9, 1.6, 0.3)[s], seeds=4)
        [found] = comparisons.compare(just).interactions
        assert covers(found.ci95)
        assert not found.large
    far = factorial(lambda a, b, s: 3 + (a == b == "false") * (9 if s else 0.1), seeds=2)
    [found] = comparisons.compare(far).interactions
    assert covers(found.ci95)
    assert not found.large
    assert comparisons.compare(factorial(lambda a, b, s: 3 + (a == b), seeds=1)).interactions[0].ci95 is None


def test_arms_that_never_met_have_no_interaction() -> None:
    rows = factorial(lambda a, b, s: 3.0, seeds=2)
    rows += [run("init.std=0.1", seed=seed) for seed in (0, 1)]
    assert [item.keys for item in comparisons.compare(rows).interactions] == [(TIE, SCALING)]
    three = arms("optimizer.lr", {"0.0003": [3.0], "0.001": [3.0], "0.01": [3.0]})
    for row in list(three[:2]):  # 0.01 was run tied alone
        lr = row["overrides"][0]
        three.append(run(lr, f"{TIE}=false", seed=0))
    assert [item.arms for item in comparisons.compare(three).interactions] == [("0.001", "false")]


def test_a_missing_run_of_a_third_axis_plants_no_interaction() -> None:
    """The four runs of a difference of differences share all else, so a third axis cannot leak into it."""
    rows = [
        run(
            f"{TIE}={a}",
            f"{SCALING}={b}",
            f"optimizer.lr={c}",
            seed=seed,
            loss=3 + (a == "false") * (c == "0.01"),  # of the first and third axes alone
        )
        for a, b, c in itertools.product(("true", "false"), ("true", "false"), ("0.0003", "0.01"))
        for seed in range(3)
    ]
    lost = next(r for r in rows if r["overrides"][:3] == [f"{TIE}=false", f"{SCALING}=false", "optimizer.lr=0.01"])
    found = comparisons.compare([unfinished(row) if row is lost else row for row in rows]).interactions
    by_keys = {item.keys: item.mean_difference for item in found}
    assert by_keys[TIE, SCALING] == pytest.approx(0)
    assert by_keys[SCALING, "optimizer.lr"] == pytest.approx(0)
    assert by_keys[TIE, "optimizer.lr"] == pytest.approx(1)


# --- folders ---------------------------------------------------------------------------------------------------------


def put(row: Row, sweep: Path, name: str) -> Path:
    """Write a row as the folder that its run would have left."""
    folder = sweep / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(row["config"]))  # JSON is YAML
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(row["overrides"]))
    (folder / "summary.json").write_text(
        json.dumps({key: value for key, value in row.items() if key not in ("name", "folder")})
    )
    status = {"state": row["state"], "step": row["steps"], "error": row["error"], "pid": 1, "updated": 0.0}
    (folder / "status.json").write_text(json.dumps(status))
    lines = ({"step": step, "loss": 9.0 - step, "tokens": 128 * (step + 1)} for step in range(3))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def put_all(rows: Sequence[Row], sweep: Path) -> list[Path]:
    """A sweep's folders, in the order of its rows."""
    return [put(row, sweep, f"{number:03d}_job") for number, row in enumerate(rows)]


def running(folder: Path) -> None:
    """Delete the files that a run writes at its end."""
    (folder / "summary.json").unlink()
    status = {"state": "running", "step": 4, "error": None, "pid": 1, "updated": 0.0}
    (folder / "status.json").write_text(json.dumps(status))


def truncated(folder: Path) -> None:
    """Half a summary."""
    text = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(text[: len(text) // 2])


def without(key: str) -> Callable[[Path], None]:
    """A summary that lacks a key."""

    def damage(folder: Path) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != key}))

    return damage


def changed(**values: Any) -> Callable[[Path], None]:
    """A summary with other values."""

    def damage(folder: Path) -> None:
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, **values}))

    return damage


def test_folders_are_read_as_their_rows(tmp_path: Path) -> None:
    rows = arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]})
    put_all(rows, tmp_path)
    read = comparisons.read([tmp_path])
    assert [row["name"] for row in read] == [f"{number:03d}_job" for number in range(6)]
    assert all(Path(row["folder"]).is_absolute() for row in read)
    assert [asdict(e) for e in comparisons.compare(read).axes] == [asdict(e) for e in comparisons.compare(rows).axes]
    json.dumps(comparisons.compare(read).as_dict(), allow_nan=False)


def test_sweeps_and_runs_are_joined_each_once(tmp_path: Path) -> None:
    first = put_all(arms(TIE, {"true": [3.0], "false": [2.0]}), tmp_path / "a")
    put_all(arms(TIE, {"true": [3.1, 9.0], "false": [2.1, 9.0]})[1::2], tmp_path / "b")
    lone = put(run(f"{TIE}=true", loss=3.5, seed=7), tmp_path, "lone")
    read = comparisons.read([tmp_path / "a", first[1], tmp_path / "b", lone])
    assert [row["name"] for row in read] == ["a/000_job", "a/001_job", "b/000_job", "b/001_job", "lone"]
    assert comparisons.read([lone])[0]["name"] == "lone"
    assert effect(read, TIE).n_pairs == 2
    assert effect(read, TIE).dropped_pairs == 1


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (truncated, "Expecting|Unterminated|Invalid"),
        (lambda folder: (folder / "summary.json").unlink(), "No such file"),
        (lambda folder: (folder / "summary.json").write_bytes(b"\xff\xfe\x00"), "can't decode"),
        (lambda folder: (folder / "summary.json").write_text("[1, 2]"), "it holds list, no fields"),
        (without("precision"), "no precision"),
        (changed(precision={"effective": "fp32"}), "no precision.emulated"),
        (without("config"), "no config"),
        (changed(device=None), "device is None"),
        (changed(tokens_per_second="fast"), "tokens_per_second is 'fast'"),
        (changed(started="today"), "started is 'today'"),
    ],
)
def test_a_damaged_run_is_listed_and_hides_nothing(tmp_path: Path, damage: Callable[[Path], None], error: str) -> None:
    folders = put_all(arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]}), tmp_path)
    damage(folders[4])
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    [listed] = comparison.failed
    assert (listed["name"], listed["state"]) == ("004_job", "damaged")
    assert re.match(f"summary.json is missing or damaged: .*({error})", listed["error"])
    found = effect(comparison, TIE)
    assert (found.n_pairs, found.dropped_pairs) == (2, 1)


def test_a_killed_job_keeps_its_arm(tmp_path: Path) -> None:
    """It left no summary; its configuration is in `.hydra`."""
    folders = put_all(arms("optimizer.lr", {"0.0003": [3.0, 3.1], "0.01": [2.0, 2.2]}), tmp_path)
    for folder in folders[2:]:
        (folder / "summary.json").unlink()
        (folder / "status.json").write_text(json.dumps({"state": "failed", "step": 0, "error": "killed by SIGKILL"}))
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert comparison.swept == {"optimizer.lr": ["0.0003", "0.01"]}
    assert [row["error"] for row in comparison.failed] == ["killed by SIGKILL"] * 2
    (folders[3] / ".hydra" / "config.yaml").write_text("optimizer: {lr: ${nowhere}}")
    (folders[2] / ".hydra" / "config.yaml").write_text("optimizer: [")
    assert len(comparisons.compare(comparisons.read([tmp_path])).failed) == 2


def change(path: Path, how: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of JSON in place."""
    content = json.loads(path.read_text())
    how(content)
    path.write_text(json.dumps(content))


def test_a_key_that_old_runs_lack_has_todays_default(tmp_path: Path) -> None:
    """A release adds a key: the runs before it have its default, whether they left a summary or not."""
    folders = put_all(arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]}), tmp_path)
    for folder in folders[:4]:
        change(folder / "summary.json", lambda of: of["config"]["precision"].pop("rounding"))
        change(folder / "summary.json", lambda of: of["config"].pop("optimizer"))
    (folders[1] / "summary.json").unlink()
    change(folders[1] / ".hydra" / "config.yaml", lambda of: of["optimizer"].pop("eps"))
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert comparison.swept == {TIE: ["true", "false"]}
    assert (effect(comparison, TIE).n_pairs, effect(comparison, TIE).dropped_pairs) == (2, 1)
    assert comparison.notes == []
    conclude.write(comparison, tmp_path)


def test_a_key_that_is_gone_is_named_and_the_run_kept(tmp_path: Path) -> None:
    folders = put_all(arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]}), tmp_path)

    def add(old: int, *, told: bool, to: Sequence[Path]) -> None:
        for folder in to:
            change(folder / "summary.json", lambda of: of["config"]["model"].update(old=old))
            change(folder / "summary.json", lambda of: of["overrides"].extend([f"model.old={old}"] * told))

    add(1, told=True, to=folders[:4])
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert (comparison.swept, comparison.failed) == ({TIE: ["true", "false"]}, [])
    assert effect(comparison, TIE).n_pairs == 3
    [note] = comparison.notes
    assert note.startswith("model.old: no key of this version")
    for folder in folders:
        change(folder / "summary.json", lambda of: of.update(overrides=of["overrides"][:2]))
    add(2, told=False, to=folders[:1])  # that may be why it is better
    with pytest.raises(BadRequest, match=r"also differ in model\.old, which none"):
        comparisons.compare(comparisons.read([tmp_path]))


def test_a_sweep_over_a_key_that_is_gone_is_still_compared(tmp_path: Path) -> None:
    folders = put_all([run(loss=3.0 + old, seed=seed) for old in (0, 1) for seed in (0, 1)], tmp_path)
    for number, folder in enumerate(folders):
        change(folder / "summary.json", lambda of, old=number // 2: of["config"]["model"].update(old=old))
        change(folder / "summary.json", lambda of, old=number // 2: of["overrides"].append(f"model.old={old}"))
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert comparison.swept == {"model.old": ["0", "1"]}
    assert effect(comparison, "model.old").mean_difference == pytest.approx(1)


def test_a_key_that_moved_is_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(schema.MOVED, "model.old", "optimizer.grad_clip")
    folders = put_all(arms("optimizer.grad_clip", {"0.0": [3.0, 3.1], "1.0": [2.0, 2.2]}), tmp_path)
    for folder, clip in ((folders[0], 0.0), (folders[2], 1.0)):
        change(folder / "summary.json", lambda of: of["config"]["optimizer"].pop("grad_clip"))
        change(folder / "summary.json", lambda of, clip=clip: of["config"]["model"].update(old=clip))
        change(folder / "summary.json", lambda of, clip=clip: of["overrides"].insert(0, f"model.old={clip}"))
        change(folder / "summary.json", lambda of: of["overrides"].pop(1))
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert comparison.swept == {"optimizer.grad_clip": ["0.0", "1.0"]}
    assert (effect(comparison, "optimizer.grad_clip").n_pairs, comparison.notes) == (2, [])


def test_links_are_followed_once(tmp_path: Path) -> None:
    """A sweep that lies elsewhere is compared through its link; two links to it, or a loop, add nothing."""
    put_all(arms(TIE, {"true": [3.0], "false": [2.0]}), tmp_path / "elsewhere")
    put(run(f"{TIE}=true", loss=3.5, seed=7), tmp_path / "all", "own")
    (tmp_path / "all" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "all" / "a-run").symlink_to(tmp_path / "all" / "own")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path)
    read = comparisons.read([tmp_path / "all"])
    assert len(read) == 3
    assert {Path(row["folder"]).resolve().parent.name for row in read} == {"elsewhere", "all"}
    assert "own" in {row["name"] for row in read}, "its own path, not a link's"
    assert effect(read, TIE).n_pairs == 1
    both = comparisons.read([tmp_path / "all", tmp_path / "elsewhere"])
    assert len(both) == 3


def test_the_distance_from_fp64_has_no_sign(tmp_path: Path) -> None:
    """Losses above at one step and below at the next do not cancel: they are far from fp64's."""
    rows = [run(f"precision={name}", seed=seed) for name in ("fp64", "fp32") for seed in (0, 1)]
    for folder, gaps in zip(put_all(rows, tmp_path), ((0, 0), (1, 3), (0.1, -0.3), (0.8, 3.2)), strict=True):
        lines = ({"step": step, "loss": 9 - step + gap, "tokens": 128} for step, gap in enumerate(gaps))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [found] = comparisons.compare(comparisons.read([tmp_path])).distances
    assert (found.arm, found.n_seeds) == ("fp32", 2)
    assert (found.largest, found.mean) == (pytest.approx(0.25), pytest.approx(0.2))
    assert found.seed_std == pytest.approx((1 + 3) / 2 / math.sqrt(2)), "of fp64's own losses at a step, over its seeds"
    assert (
        comparisons.compare(comparisons.read([tmp_path / "000_job", tmp_path / "002_job"])).distances[0].seed_std
        is None
    )
    with (tmp_path / "002_job" / "metrics.jsonl").open("a") as file:  # another length: not the same steps
        file.write(json.dumps({"step": 2, "loss": 9.0, "tokens": 128}) + "\n")
    [found] = comparisons.compare(comparisons.read([tmp_path])).distances
    assert found.largest == pytest.approx(0.2)


# --- along the run ---------------------------------------------------------------------------------------------------


def test_the_trend_of_a_difference_covers_the_truth() -> None:
    """The slope over the last half, by seed: its noise lasts along a run (AR(1) at 0.9), so steps are no replicates."""
    rng = np.random.default_rng(7)
    x, held, steps_alone = np.arange(100), 0, 0
    for _ in range(600):
        changes = []
        for _ in range(5):
            noise = signal.lfilter([1], [1, -0.9], rng.normal(0, 0.01, 150))[50:]
            difference = 0.05 + 0.0004 * x + noise + rng.normal(0, 0.0002) * x
            changes.append(effects.late_change(x.tolist(), difference.tolist()))
        found = fixed(changes)
        held += found.low <= 0.0004 * 49 <= found.high
        line = stats.linregress(x[50:], difference[50:])
        steps_alone += abs(line.slope - 0.0004) < stats.t.ppf(0.975, 48) * line.stderr
    print(f"coverage over seeds {held / 600:.3f}, over the steps of one run {steps_alone / 600:.3f}")
    assert 0.93 <= held / 600 <= 0.97
    assert steps_alone / 600 < 0.7


@pytest.mark.parametrize(
    ("slope", "margin", "said"),
    [
        (0.01, None, "the difference grows by 0.0"),
        (-0.01, None, "the difference fades by 0.0"),
        (0, None, ""),
        (0, 0.05, "the difference holds within ±0.05 nats"),
    ],
)
def test_whether_a_difference_grows_fades_or_holds(
    tmp_path: Path, slope: float, margin: float | None, said: str
) -> None:
    rows = arms(TIE, {"true": [3.0, 3.1, 2.9, 3.0], "false": [3.5, 3.62, 3.39, 3.5]})
    for number, folder in enumerate(put_all(rows, tmp_path)):
        arm, seed = divmod(number, 4)
        noise = np.random.default_rng(seed).normal(0, 0.001, 20)
        losses = [9 - step / 10 + arm * (0.5 + slope * step + noise[step]) for step in range(20)]
        lines = ({"step": step, "loss": loss, "tokens": 128 * step} for step, loss in enumerate(losses))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = comparisons.compare(comparisons.read([tmp_path]), margin=margin)
    trend = effect(found, TIE).trend
    assert trend is not None
    assert trend[1] <= slope * 9 <= trend[2]
    [sentence] = words.sentences(found)
    assert said in sentence.text
    assert said or "last half" not in sentence.text
    assert effect(found, TIE, "tokens_per_second").trend is None
    kept = (tmp_path / "000_job" / "metrics.jsonl").read_text().splitlines()[:15]
    (tmp_path / "000_job" / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert effect(comparisons.compare(comparisons.read([tmp_path])), TIE).trend is None, "too short"


# --- searches --------------------------------------------------------------------------------------------------------


def searched(rates: Sequence[float], seed: int = 0) -> list[Row]:
    """Runs whose loss is a parabola over the logarithm of the rate, least at 0.0008, and no parabola far from it."""
    away = [abs(math.log(rate / 0.0008)) for rate in rates]
    return [
        run(f"optimizer.lr={r}", loss=3 + x**2 if x < 4 else 9, seed=seed) for r, x in zip(rates, away, strict=True)
    ]


def test_a_search_names_the_best_value_and_compares_none() -> None:
    found = comparisons.compare(searched([0.0001, 0.0003, 0.001, 0.003, 0.01]))
    assert found.searched
    [sentence] = words.sentences(found)
    assert sentence.text.startswith("of 5 values tried, optimizer.lr=0.001 ended with the least ")
    assert report.effects(found) == []


def test_few_values_several_seeds_and_words_are_no_search() -> None:
    rates = [0.0001, 0.0003, 0.001, 0.003, 0.01]
    assert not comparisons.compare(searched(rates[:4])).searched
    assert not comparisons.compare(searched(rates[:4]) + searched(rates[:1], seed=1)).searched
    assert not comparisons.compare(searched(rates) + searched(rates, seed=1)).searched
    assert not comparisons.compare([run(f"init={name}") for name in ("gpt2", "torch")]).searched


# --- the command -----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which the command refuses; nothing else is printed."""
    assert conclude.command(list(argv)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("gpt2exp-compare: ")
    return printed.err


def test_a_full_disk_is_no_bad_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 as of every command; what cannot be written because of its name is 2."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conclude, "read", lambda _: [])
    monkeypatch.setattr(conclude, "compared", lambda *_, **__: None)
    monkeypatch.setattr(conclude, "write", full)
    assert conclude.command([str(tmp_path)]) == 1
    assert capsys.readouterr().err == "gpt2exp-compare: No space left on device; make room, or name another folder\n"


def everything_below(folder: Path) -> set[Path]:
    """All paths, to see that nothing was written."""
    return set(folder.rglob("*"))


def test_the_command_writes_and_exits_with_0(tmp_path: Path) -> None:
    """In a process of its own, where torch is never imported."""
    folders = put_all(arms(TIE, {"true": [3.0, 3.1, 3.2], "false": [2.0, 2.2, 2.1]}), tmp_path / "sweep")
    truncated(folders[5])
    code = (
        "import sys\nfrom gpt2exp.compare import __main__ as compare\n"
        "code = compare.command(sys.argv[1:])\nassert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sweep"), "--out", str(tmp_path / "new" / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "005_job" in done.stdout
    written = json.loads((tmp_path / "new" / "out" / "comparison.json").read_text())
    assert len(written["runs"]) == 6
    assert {(e["metric"], e["verdict"]) for e in written["axes"]} >= {("loss_mean_last10", "better")}
    assert written["failed"][0]["state"] == "damaged"
    assert {"comparison.csv", "report.md", "report.html"} <= {p.name for p in (tmp_path / "new" / "out").iterdir()}


def test_bad_requests_are_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = put_all(arms(TIE, {"true": [3.0], "false": [2.0]}), tmp_path / "sweep")
    put(run("optimizer.eps=0.1", typed=[]), tmp_path / "other", "000")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "deep").mkdir(parents=True)
    (tmp_path / "foreign" / "summary.json").write_text('{"state": "done"}')
    (tmp_path / "foreign" / "deep" / "package.json").write_text("{}")
    before = everything_below(tmp_path)
    for name, text in {
        "missing": "no such folder",
        "empty": "holds no run",
        "foreign": "holds no run",
        "sweep/000_job/summary.json": "no such folder",
    }.items():
        assert f"{tmp_path / name}: {text}" in refused(capsys, str(tmp_path / name))
    assert "optimizer.eps" in refused(capsys, str(tmp_path))
    for margin in ("nonsense", "0", "-1", "nan", "inf"):
        assert "--margin" in refused(capsys, str(folders[0].parent), f"--margin={margin}")
    assert "DIR" in refused(capsys)
    assert "--frobnicate" in refused(capsys, str(folders[0].parent), "--frobnicate")
    assert everything_below(tmp_path) == before


def test_nothing_that_ended_is_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(run(), tmp_path, "000_job")
    running(folder)
    before = everything_below(tmp_path)
    assert "none of the runs has a summary yet; wait" in refused(capsys, str(tmp_path))
    (folder / "status.json").unlink()
    assert "none of the runs has a summary yet; wait" in refused(capsys, str(tmp_path))
    put(run(), tmp_path, "001_job")
    truncated(tmp_path / "001_job")
    assert "001_job: summary.json is missing or damaged" in refused(capsys, str(tmp_path))
    assert everything_below(tmp_path) - before == everything_below(tmp_path / "001_job") | {tmp_path / "001_job"}


def test_a_running_run_waits_its_turn(tmp_path: Path) -> None:
    folders = put_all(arms(TIE, {"true": [3.0, 3.1], "false": [2.0, 2.2]}), tmp_path)
    running(folders[3])
    comparison = comparisons.compare(comparisons.read([tmp_path]))
    assert comparison.failed == [{"name": "003_job", "state": "running", "step": 4, "error": None}]
    assert effect(comparison, TIE).dropped_pairs == 1


def test_an_unwritable_place_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_all(arms(TIE, {"true": [3.0], "false": [2.0]}), tmp_path / "sweep")
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, str(tmp_path / "sweep"), "--out", str(tmp_path / "file"))


# --- cost ------------------------------------------------------------------------------------------------------------


def flattenings(rows: Sequence[Row], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a comparison walks through a run's configuration: the work that grows, counted and not timed."""
    calls = []
    real = rows_module.flatten

    def counted(config: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(config)
        return real(config)

    monkeypatch.setattr(rows_module, "flatten", counted)
    comparisons.compare(rows)
    return len(calls)


def test_the_work_on_200_runs_is_a_few_passes_over_each(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = itertools.product(("true", "false"), ("true", "false"), (1, 2, 3, 4, 5), range(10))
    rows = [
        run(f"{TIE}={a}", f"{SCALING}={b}", f"optimizer.grad_clip={c}", loss=3 + s / 7 + c, seed=s)
        for a, b, c, s in grid
    ]
    assert len(rows) == 200
    assert flattenings(rows, monkeypatch) < 10 * len(rows)


def test_a_random_search_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is an arm of its own: there are far more combinations of arms than runs, too many to walk through."""
    rng = random.Random(0)
    keys = ("optimizer.lr", "optimizer.weight_decay", "optimizer.grad_clip", "optimizer.eps", "init.std")
    rows = [run(*(f"{key}={rng.uniform(0.001, 1):.6f}" for key in keys), loss=rng.random()) for _ in range(60)]
    assert flattenings(rows, monkeypatch) < 10 * len(rows)


def test_speed_is_judged_by_the_pairs_at_hardware_speed() -> None:
    """An emulated setting of another axis does not keep the rest from being compared in speed."""
    rows = []
    for precision, scaling, seed in itertools.product(("fp32", "tf32"), ("true", "false"), (1, 2, 3)):
        emulated = precision == "tf32"
        speed = 50.0 * seed if emulated else (1100.0 if scaling == "false" else 1000.0) + seed
        got = {"requested": precision, "effective": precision, "emulated": emulated}
        overrides = (f"precision={precision}", f"init.residual_scaling={scaling}")
        rows.append(run(*overrides, seed=seed, tokens_per_second=speed, precision=got))
    speeds = {item.key: item for item in comparisons.compare(rows).axes if item.metric == "tokens_per_second"}
    assert speeds["precision"].verdict == "not_comparable"
    scaling_effect = speeds["init.residual_scaling"]
    assert (scaling_effect.verdict, scaling_effect.n_pairs) == ("better", 3)
    assert scaling_effect.speed_ratio == pytest.approx(1.1, rel=1e-2)
