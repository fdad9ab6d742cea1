"""The compute multiplier equals closed forms, and other ways of computing it. A bound is reported as a bound. What a
curve does not show is not reported. Each budget has a verdict, and the page says whether it changes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_compare import TIE, effect, run

from gpt2exp.compare import comparison as comparisons
from gpt2exp.compare import figures, multiplier, report, words
from gpt2exp.compare.comparison import Comparison, Row
from gpt2exp.compare.inference import Floats

STEPS = np.arange(1, 201.0)
PLACES = np.array([10, 20, 40, 80, 120, 160, 200.0])
"""Steps of a validation."""
Curve = Callable[[Floats], Floats]


def law(times: float = 1.0, offset: float = 0.0) -> Curve:
    """A power law whose clock runs so many times as fast."""
    return lambda steps: 3 + offset + 6 * (steps * times) ** -0.4


def trained(folder: Path, arms: Mapping[str, Sequence[Curve]], key: str = "val_loss", **facts: Any) -> list[Row]:
    """A sweep over tying of seeds 0, 1, ..., with the metrics that runs along these curves leave."""
    rows = []
    for arm, curves in arms.items():
        for seed, curve in enumerate(curves):
            row = run(f"{TIE}={arm}", seed=seed, loss=float(curve(STEPS[-10:]).mean()), **facts)
            row["folder"] = str(folder / f"{arm}_{seed}")
            Path(row["folder"]).mkdir(parents=True)
            lines: list[dict[str, float]] = [{"step": s - 1, "tokens": 100 * s, "loss": float(curve(s))} for s in STEPS]
            if key == "val_loss":
                row["val_loss"] = float(curve(STEPS[-1]))
                for line in lines:
                    line["loss"] = 5.0
                    if line["tokens"] / 100 in PLACES:
                        line["val_loss"] = float(curve(line["tokens"] / 100))
            (Path(row["folder"]) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            rows.append(row)
    return rows


def alone(row_: Sequence[Row], **facts: Any) -> list[Row]:
    """The rows with other facts of the second arm."""
    half = len(row_) // 2
    return [*row_[:half], *({**row, **facts} for row in row_[half:])]  # type: ignore[typeddict-item]


def by_hand(base: Curve, arm: Curve) -> float:
    """The log of the steps' factor, by numpy's interpolation of the envelope the other way round."""
    x, ones, others = -(PLACES**-0.28), np.minimum.accumulate(base(PLACES)), np.minimum.accumulate(arm(PLACES))
    worse = max(base(PLACES)[-1], arm(PLACES)[-1])
    one, other = (float((-np.interp(-worse, -all_, x)) ** (-1 / 0.28)) for all_ in (ones, others))
    return math.log(one / other)


SLOWER = (0.80, 0.83, 0.78, 0.81, 0.84)
OFFSETS = (0.0, 0.1, -0.1, 0.05, 0.02)


def test_a_worse_arm(tmp_path: Path) -> None:
    """The factor on the baseline's steps at which its own curve reaches the arm's final loss, by seed; t over seeds."""
    base = [law(offset=offset) for offset in OFFSETS]
    arm = [law(times, offset) for times, offset in zip(SLOWER, OFFSETS, strict=True)]
    found = effect(trained(tmp_path, {"true": base, "false": arm}), TIE, "val_loss")
    values = [by_hand(one, other) for one, other in zip(base, arm, strict=True)]
    of = stats.ttest_1samp(values, 0)
    assert found.steps_factor == pytest.approx(np.exp(np.mean(values)))
    assert found.steps_factor == pytest.approx(stats.gmean(SLOWER), rel=0.01)  # seven places follow a power law
    assert found.steps_factor_ci95 == pytest.approx(list(np.exp(of.confidence_interval(0.95))))
    assert found.compute_multiplier == pytest.approx(found.steps_factor)  # equal speeds
    assert found.multiplier_reason == ""


def test_times_the_speed(tmp_path: Path) -> None:
    base, arm = [law()] * 3, [law(times) for times in SLOWER[:3]]
    rows = trained(tmp_path, {"true": base, "false": arm})
    speeds = [1500.0, 1600.0, 1400.0]
    for row, speed in zip(rows[3:], speeds, strict=True):
        row["tokens_per_second"] = speed
    found = effect(rows, TIE, "val_loss")
    values = [by_hand(law(), one) + math.log(speed / 1000) for one, speed in zip(arm, speeds, strict=True)]
    assert found.compute_multiplier == pytest.approx(np.exp(np.mean(values)))
    interval = np.exp(stats.ttest_1samp(values, 0).confidence_interval(0.95))
    assert found.compute_multiplier_ci95 == pytest.approx(list(interval))
    assert found.steps_factor == pytest.approx(np.exp(np.mean([by_hand(law(), one) for one in arm])))


@pytest.mark.parametrize(
    "facts",
    [
        {"precision": {"requested": "tf32", "effective": "tf32", "emulated": True}},
        {"timed_steps": 1, "steps": 50, "speed_disturbed": 0.9},
        {"machine": "there"},
    ],
)
def test_without_a_comparable_speed_the_steps_stand_alone(tmp_path: Path, facts: dict[str, Any]) -> None:
    rows = alone(trained(tmp_path, {"true": [law()] * 3, "false": [law(t) for t in SLOWER[:3]]}), **facts)
    assert effect(rows, TIE, "tokens_per_second").verdict == "not_comparable"
    found = effect(rows, TIE, "val_loss")
    assert found.steps_factor == pytest.approx(stats.gmean(SLOWER[:3]), rel=0.01)
    assert (found.compute_multiplier, found.compute_multiplier_ci95) == (None, None)
    assert "of the steps alone, since the speed is not compared" in found.multiplier_reason
    comparison = comparisons.compare(rows)
    said = words.sentences(comparison)[0].text
    assert "worth 0.803 times the baseline's steps (95 % interval 0.743 to 0.868)" in said
    assert "| steps, ratio | 3 | 0.803 |" in "\n".join(report.effects(comparison))


def test_a_better_arm_is_a_bound_and_the_inverse_of_the_worse_one(tmp_path: Path) -> None:
    base, arm = [law(offset=offset) for offset in OFFSETS[:3]], [law(1.3, offset) for offset in OFFSETS[:3]]
    better = effect(trained(tmp_path / "a", {"true": base, "false": arm}), TIE, "val_loss")
    worse = effect(trained(tmp_path / "b", {"true": arm, "false": base}), TIE, "val_loss")
    assert better.steps_factor == pytest.approx(1.3, rel=0.01)
    assert better.steps_factor == pytest.approx(1 / (worse.steps_factor or 0))
    assert "the baseline does not reach the arm's final loss within the run" in better.multiplier_reason
    assert "only known to be above 1" in better.multiplier_reason
    assert "within the run" not in worse.multiplier_reason
    mixed = [law(1.3), law(0.8), law(0.9)]
    some = effect(trained(tmp_path / "c", {"true": [law()] * 3, "false": mixed}), TIE, "val_loss")
    assert some.multiplier_reason.startswith("in 1 of 3 pairs the baseline does not reach")


def test_before_the_first_validation_there_is_only_a_bound(tmp_path: Path) -> None:
    """The arm ends above the baseline's first point: its factor is below that point's, and no interval says more."""
    base, arm = [law()] * 3, [law(0.02), law(0.021), law(0.019)]
    found = effect(rows := trained(tmp_path, {"true": base, "false": arm}), TIE, "val_loss")
    assert found.steps_factor_ci95 is not None
    assert found.steps_factor_ci95 == [None, pytest.approx(10 / 200)]
    assert "only a bound is known" in found.multiplier_reason
    assert "worth below 0.050 times the baseline's compute" in words.sentences(comparisons.compare(rows))[0].text


def test_a_curve_that_rises_again_counts_from_where_it_first_fell(tmp_path: Path) -> None:
    """A baseline that overfits reached its final loss long before; so did an equal arm, which is worth just as much."""

    def overfits(steps: Floats) -> Floats:
        return law()(steps) + np.where(steps > 80, (steps - 80) / 300, 0.0)

    same = effect(trained(tmp_path / "a", {"true": [overfits] * 3, "false": [overfits] * 3}), TIE, "val_loss")
    assert (same.steps_factor, same.steps_factor_ci95) == (1, [1, 1])
    worse = effect(trained(tmp_path / "b", {"true": [overfits] * 3, "false": [law(0.5)] * 3}), TIE, "val_loss")
    assert worse.steps_factor == pytest.approx(np.exp(by_hand(overfits, law(0.5))))


def test_undecided_losses_have_no_factor(tmp_path: Path) -> None:
    """The arm is ahead at every place but the last, where chance alone tells the two apart."""

    def ahead(end: float) -> Curve:
        return lambda steps: np.where(steps < PLACES[-1], law(1.5)(steps), law()(steps) + end)

    base, arm = [law()] * 4, [ahead(end) for end in (0.02, -0.01, 0.01, -0.02)]
    comparison = comparisons.compare(trained(tmp_path, {"true": base, "false": arm}))
    found = next(one for one in comparison.axes if one.metric == "val_loss")
    assert (found.verdict, found.steps_factor, found.steps_factor_ci95) == ("inconclusive", None, None)
    assert any("curves that flatten or rise" in note for note in comparison.notes)


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    found = effect(trained(tmp_path, {"true": [law()], "false": [law(0.8)]}), TIE, "val_loss")
    assert found.steps_factor == pytest.approx(0.8, rel=0.01)
    assert found.steps_factor_ci95 is None


def test_by_the_training_loss_where_there_is_no_validation(tmp_path: Path) -> None:
    """Smoothed by least squares, in which noise that both arms share leaves their difference."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 0.005, len(STEPS))

    def noisy(times: float) -> Curve:
        own = rng.normal(0, 0.005, len(STEPS))
        return lambda steps: law(times)(steps) + (shared + own)[np.asarray(steps, int) - 1]

    base, arm = [noisy(1) for _ in range(4)], [noisy(0.8) for _ in range(4)]
    rows = trained(tmp_path, {"true": base, "false": arm}, key="loss")
    found = effect(rows, TIE, "loss_mean_last10")
    assert found.steps_factor == pytest.approx(0.8, rel=0.03)
    assert found.steps_factor_ci95 is not None
    low, high = found.steps_factor_ci95
    assert low is not None
    assert high is not None
    assert low < 0.8 < high < 0.9
    x = np.log(100 * STEPS)
    corners = [x[-1] - number * math.log(2) / 3 for number in range(11)]  # eight steps or more from one to the next
    corners = [at for at in corners if at > x[0]]
    while ((x > corners[-1]) & (x <= corners[-2])).sum() < 8:
        corners.pop()
    at, x = (-np.exp(-0.28 * np.array(of)) for of in ([*x[x < corners[-1]], *corners[::-1]], x))
    hats = np.array([[max(0, 1 - abs(place - peak) / (gap)) if gap else float(place == peak) for peak, gap in
                      ((peak, _gap(at, number, place)) for number, peak in enumerate(at))] for place in x])  # fmt: skip
    fine, values = np.linspace(x[0], x[-1], 200_001), []
    for one, other in zip(base, arm, strict=True):
        a, b = (np.interp(fine, at, np.linalg.lstsq(hats, curve(STEPS), rcond=None)[0]) for curve in (one, other))
        worse = max(a[-1], b[-1])
        values.append(math.log(fine[np.argmax(b <= worse)] / fine[np.argmax(a <= worse)]) / 0.28)
    assert found.steps_factor == pytest.approx(np.exp(np.mean(values)), rel=1e-4)
    t = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert math.log(high / low) >= t.high - t.low  # the shared noise is added


def _gap(at: Floats, number: int, place: float) -> float:
    """From a corner to the next on the side of a place; 0 where there is none."""
    if place <= at[number]:
        return float(at[number] - at[number - 1]) if number else 0.0
    return float(at[number + 1] - at[number]) if number + 1 < len(at) else 0.0


def test_a_curve_of_noise_says_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    batches = rng.normal(0, 0.4, len(STEPS))
    base: Curve = lambda steps: law()(steps) + batches[np.asarray(steps, int) - 1]  # noqa: E731
    arm: Curve = lambda steps: law(0.8)(steps) + batches[np.asarray(steps, int) - 1]  # noqa: E731
    comparison = comparisons.compare(trained(tmp_path, {"true": [base] * 3, "false": [arm] * 3}, key="loss"))
    found = effect(comparison, TIE, "loss_mean_last10")
    assert (found.steps_factor, found.steps_factor_ci95, found.compute_multiplier) == (None, None, None)
    [note] = [note for note in comparison.notes if note.startswith("no compute multiplier: ")]
    assert "too noisy" in note
    assert "train.eval_every" in note


def test_what_a_schedule_hides_is_said(tmp_path: Path) -> None:
    rows = trained(tmp_path, {"true": [law()] * 3, "false": [law(0.8)] * 3})
    for row in rows:
        row["config"] = {**row["config"], "optimizer": {**row["config"]["optimizer"], "schedule": "cosine"}}
    assert "sweep.over compares those" in effect(rows, TIE, "val_loss").multiplier_reason


def test_the_shared_error_is_a_jackknife() -> None:
    """Equal to a computation by loops; if all seeds share the parts' noise, the shared error is all of that noise."""
    rng = np.random.default_rng(3)
    factors = rng.normal(0, 1, (4, 6))

    def variance(values: Floats) -> float:
        return 0.8 * sum((value - sum(values) / 5) ** 2 for value in values)

    mean = variance(np.array([factors[:, part].mean() for part in range(1, 6)]))
    own = sum(variance(row[1:]) for row in factors) / 4
    assert multiplier.shared_error(factors) == pytest.approx(math.sqrt(max(0, (4 * mean - own) / 3)))
    common = np.tile(factors[0], (4, 1))
    assert multiplier.shared_error(common) == pytest.approx(math.sqrt(variance(factors[0][1:])))


def test_every_form_of_the_report_has_it(tmp_path: Path) -> None:
    comparison = comparisons.compare(
        trained(tmp_path, {"true": [law()] * 3, "false": [law(time) for time in SLOWER[:3]]})
    )
    [loss] = [one for one in comparison.as_dict()["axes"] if one["metric"] == "val_loss"]
    head, first = (line.split(",") for line in report.table(comparison).splitlines()[:2])
    assert {"steps_factor", "compute_multiplier_ci95_low", "compute_multiplier_ci95_high"} <= {*head}
    assert str(loss["compute_multiplier"]) in first
    text = "\n".join(report.effects(comparison))
    assert "above 1 the arm is worth that many times the baseline's" in text
    assert "| compute, ratio | 3 | 0.803 |" in text
    assert "no verdict" not in text


# --- budgets ---------------------------------------------------------------------------------------------------------

OVER = "sweep.over=train.steps=50,100,200"
AT = (50, 100, 200)


def budgeted(difference: Callable[[int, int], float], seeds: int = 4, **facts: Any) -> Comparison:
    """A sweep of tying over three budgets; `difference`: the arm's loss over the baseline's, by budget and seed."""
    rows = [
        run(f"{TIE}={arm}", f"train.steps={steps}", OVER, loss=5 - steps / 100 + seed / 10
            + difference(steps, seed) * (arm == "false"), seed=seed, steps=steps, **facts)
        for steps, arm, seed in itertools.product((200, 50, 100), ("true", "false"), range(seeds))
    ]  # fmt: skip
    return comparisons.compare(rows)


def growing(steps: int, seed: int) -> float:
    """An arm that is equal at first and worse at last."""
    return 0.1 * math.log2(steps / 50) + (-1) ** seed * 0.01 + seed * steps * 1e-5


def test_a_verdict_within_each_budget() -> None:
    comparison = budgeted(growing)
    assert comparison.over == "train.steps"
    losses = [one for one in comparison.axes if one.metric == "loss_mean_last10"]
    assert [one.budget for one in losses] == [f"train.steps={steps}" for steps in AT]  # ascending, however they ran
    assert {one.key for one in comparison.axes} == {TIE}  # the budget has no verdict of its own
    for one, steps in zip(losses, AT, strict=True):
        values = [growing(steps, seed) for seed in range(4)]
        of = stats.ttest_1samp(values, 0)
        assert one.mean_difference == pytest.approx(np.mean(values))
        assert one.ci95 == pytest.approx(list(of.confidence_interval(0.95)))
        assert one.p_value == pytest.approx(of.pvalue)
    assert [one.verdict for one in losses] == ["inconclusive", "worse", "worse"]
    ordered = sorted(one.p_value or 0.0 for one in losses)
    assert min(one.p_holm or 0.0 for one in losses) == pytest.approx(3 * ordered[0])  # a test a budget


def test_whether_it_changes_is_the_difference_of_differences() -> None:
    comparison = budgeted(growing)
    [change] = [one for one in comparison.interactions if "200" in one.arms]
    values = [growing(200, seed) - growing(50, seed) for seed in range(4)]
    of = stats.ttest_1samp(values, 0)
    assert change.mean_difference == pytest.approx(np.mean(values))
    assert change.ci95 == pytest.approx(list(of.confidence_interval(0.95)))
    [(of, said)] = words.interactions(comparison)  # said once
    assert of == "budget"
    assert said.startswith(
        "from train.steps=50 to 200 the effect of model.tie_weights=false on the loss changes: at 200 it is 0.20"
    )
    assert "nats higher than at 50 (95 % interval" in said
    assert words.sentences(comparison)[0].text.startswith("at train.steps=50 model.tie_weights=false against true is")
    assert "| false against true, train.steps=200 | loss, nats | 4 |" in "\n".join(report.effects(comparison))


def test_a_change_that_the_interval_does_not_show() -> None:
    [(_, said)] = words.interactions(budgeted(lambda steps, seed: 0.3 * (-1) ** (seed + steps // 100)))
    assert "may or may not change" in said
    margin = comparisons.compare(budgeted(lambda steps, seed: 0.2 + 1e-4 * (seed + steps % 3)).runs, margin=0.05)
    [(_, said)] = words.interactions(margin)
    assert "on the loss holds within ±0.05 nats" in said


def test_the_trend_has_its_interval(tmp_path: Path) -> None:
    """By least squares with polyfit over the last half, seed by seed; shown with its interval."""
    slopes = (0.1, 0.12, 0.09, 0.11)
    arm = [lambda steps, slope=slope: law()(steps) + slope * steps / 200 for slope in slopes]
    comparison = comparisons.compare(trained(tmp_path, {"true": [law()] * 4, "false": arm}, key="loss"))
    found = effect(comparison, TIE, "loss_mean_last10")
    late = STEPS[100:]
    values = [np.polyfit(late, slope * late / 200, 1)[0] * (late[-1] - late[0]) for slope in slopes]
    of = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.trend == pytest.approx([np.mean(values), of.low, of.high], rel=1e-6)
    assert "over the last half of the run the difference grows by 0.052 nats (95 % interval 0.042 to" in (
        words.sentences(comparison)[0].text
    )


def test_figures_are_of_the_largest_budget_and_one_is_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, str] = {}
    monkeypatch.setattr(figures.Figure, "suptitle", lambda _, text, **how: drawn.update({text: str(how)}))
    kinds = [(drawing.heading, drawing.name.rsplit("-", 1)[-1]) for drawing in figures.draw(budgeted(growing))]
    assert [kind for of, kind in kinds if of == "train.steps"] == ["budgets"]
    assert (TIE, "difference") in kinds
    assert f"{TIE}: difference at the end, seed by seed (train.steps=200)" in drawn
