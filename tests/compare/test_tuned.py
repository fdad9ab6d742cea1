"""Each arm is compared at its own best value, chosen on seeds that are not compared, and the conclusion names that
value.

The choice and the comparison of made-up runs equal those computed with NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from test_compare import run as made
from test_compare import unfinished

from gpt2exp.compare import __main__ as conclude
from gpt2exp.compare import tuned, words
from gpt2exp.compare.comparison import Comparison, Row, compare
from gpt2exp.compare.tuned import Curve
from gpt2exp.section import BadRequest

VALUES = ("1e-3", "1e-2", "1e-1")
ONE = "at one learning rate for all arms, not tuned"
TUNE = f"sweep.tune=optimizer.lr={','.join(VALUES)}"


def run(*overrides: str, typed: Sequence[str] | None = None, **facts: Any) -> Row:
    """A finished run's row; an optimizer is chosen as its file would."""
    inside = tuple(text.replace("optimizer=", "optimizer.name=", 1) for text in overrides)
    return made(*inside, typed=overrides if typed is None else typed, **facts)


def of(losses: dict[str, list[float | str]], best: str | None = None) -> Curve:
    """A curve of AdamW's learning rate."""
    return Curve("optimizer.lr", "optimizer=adamw", losses, best)


def test_the_lowest_mean_is_chosen() -> None:
    """Whatever the numbers: the first of equals."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        losses = rng.normal(3, 0.5, (4, 3)).round(1)
        curve = of({f"{10.0**-at:g}": [float(loss) for loss in row] for at, row in enumerate(losses)})
        means = [sum(map(float, row)) / 3 for row in losses]
        assert float(curve.choose() or "nan") == 10.0 ** -int(np.argmin(np.round(means, 12)))


def test_a_diverged_run_is_the_worst_and_a_failed_one_leaves_its_value_out() -> None:
    assert of({"1": [1.0, "diverged"], "2": [3.0, 3.5]}).choose() == "2", "though its other run was the best"
    assert of({"1": [4.0], "2": [3.0], "4": ["diverged"]}, "2").beyond() == "", "4 was tried"
    left_out = of({"1": [1.0, "failed"], "2": [3.0, 3.5], "4": [4.0, 4.0]})
    assert left_out.choose() == "2"
    left_out.best = "2"
    assert left_out.said().endswith("the optimum may lie beyond 2: add 1; 1 left out, since a run failed there")
    none = of({"1": ["diverged", "diverged"], "2": ["failed", 3.0]})
    assert none.choose() is None
    assert "no value of optimizer.lr has a loss, so that it is not compared" in none.said()
    waiting = of({"1": [1.0, "interrupted"], "2": [3.0, "not run"]})
    assert waiting.choose() is None
    assert waiting.said() == "optimizer=adamw: 2 tuning runs have not ended, so that it is not compared yet"


@pytest.mark.parametrize(
    ("values", "best", "add"),
    [
        (("1e-4", "3e-4", "1e-3"), "1e-3", "3e-3"),
        (("1e-4", "3e-4", "1e-3"), "1e-4", "3e-5"),
        (("1e-4", "3e-4", "1e-3"), "3e-4", None),
        (("0.1", "1", "10"), "10", "100"),
        (("0.1", "0.11"), "0.11", "0.12"),
        (("0", "0.1"), "0", None),
        (("0", "0.1"), "0.1", "0.2"),
        (("2", "4"), "2", "1"),
    ],
)
def test_the_best_at_the_edge_says_what_to_add(values: Sequence[str], best: str, add: str | None) -> None:
    losses: dict[str, list[float | str]] = {value: [1.0 if value == best else 2.0] for value in values}
    expected = "" if add is None else f"the optimum may lie beyond {best}: add {add}"
    assert of(losses, best).beyond() == expected


def sweep(rng: np.random.Generator, best: dict[str, str]) -> tuple[list[Row], np.ndarray]:
    """Runs of a tuned sweep over two optimizers, and the paired differences of its compared ones."""
    rows, losses = [], {}
    for arm, at in best.items():
        for value in VALUES:
            for seed in (101, 102):
                loss = 3.0 + abs(math.log10(float(value) / float(at))) + rng.normal(0, 0.01)
                rows.append(run(f"optimizer={arm}", f"optimizer.lr={value}", TUNE, loss=loss, seed=seed))
        losses[arm] = rng.normal(3.0, 0.1, 4)
        rows += [
            run(f"optimizer={arm}", f"optimizer.lr={at}", TUNE, loss=float(loss), seed=seed)
            for seed, loss in enumerate(losses[arm], 1)
        ]
    return rows, losses["sgd"] - losses["adamw"]


def loss_row(found: Comparison) -> words.Effect:
    """The loss of the only arm."""
    (row,) = [effect for effect in found.axes if effect.metric == "loss_mean_last10"]
    return row


def test_the_pair_of_arm_and_value_is_compared(tmp_path: Path) -> None:
    """The tuned key is no axis though it differs; mean and interval are NumPy's over the compared seeds alone."""
    rows, differences = sweep(np.random.default_rng(1), {"adamw": "1e-3", "sgd": "1e-2"})
    found = compare(rows)
    row = loss_row(found)
    half = stats.t.ppf(0.975, 3) * differences.std(ddof=1) / 2
    assert list(found.swept) == ["optimizer"]
    assert (found.seeds, row.n_seeds, len(found.runs)) == ([1, 2, 3, 4], 4, 8)
    assert row.mean_difference == pytest.approx(differences.mean())
    assert row.ci95 == pytest.approx([differences.mean() - half, differences.mean() + half])
    (said,) = words.sentences(found)
    assert ", each at its own best learning rate (sgd 1e-2; adamw 1e-3), weight decay and betas not tuned" in said.text
    assert [(curve.arm, curve.best) for curve in found.tuning] == [
        ("optimizer=adamw", "1e-3"),
        ("optimizer=sgd", "1e-2"),
    ]
    for curve in found.tuning:
        of = [r for r in rows if r["seed"] > 100 and curve.arm in r["overrides"]]
        for value, losses in curve.losses.items():
            assert losses == [r["loss_mean_last10"] for r in of if f"optimizer.lr={value}" in r["overrides"]]
    edge = "at the edge of the values: the optimum may lie beyond 1e-3: add 1e-4"
    assert f"optimizer=adamw: best at optimizer.lr=1e-3, {edge}" in found.notes
    assert not any("sgd: best" in note for note in found.notes)

    conclude.write(found, tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "## Each arm's own optimizer.lr" in page
    assert "| arm | 1e-3 | 1e-2 | 1e-1 | best |" in page
    mean, std = np.mean(found.tuning[1].losses["1e-2"]), np.std(found.tuning[1].losses["1e-2"], ddof=1)
    first = words.tuning_table(found).rows[1]["1e-3"]
    assert f"| optimizer=sgd | {first} | {words.spell(mean, std)} ± {words.spell(std)} |" in page
    assert (tmp_path / "figures" / "0-tuning.png").stat().st_size > 5000
    assert "| optimizer | optimizer.lr | seed |" in page, "the table of runs has the value of each"


def test_runs_that_tuned_are_never_compared() -> None:
    rows, _ = sweep(np.random.default_rng(1), {"adamw": "1e-3", "sgd": "1e-2"})
    trials = [row for row in rows if row["seed"] > 100]
    with pytest.raises(BadRequest, match="all of these runs tuned an arm"):
        compare(trials)
    assert tuned.separate(rows)[1] == trials
    plain = [run("optimizer.lr=0.001", seed=101), run("optimizer.lr=0.01", seed=101)]
    assert tuned.separate(plain) == (plain, []), "the seed alone makes no run one that tunes"


def test_beside_runs_that_were_not_tuned_the_rate_is_an_axis() -> None:
    rows, _ = sweep(np.random.default_rng(1), {"adamw": "1e-3", "sgd": "1e-2"})
    more = [run("optimizer=adamw", "optimizer.lr=0.05", seed=seed) for seed in (1, 2, 3, 4)]
    assert "optimizer.lr" in compare([*rows, *more]).swept


def test_failed_and_diverged_trials_are_in_the_table() -> None:
    rows, _ = sweep(np.random.default_rng(1), {"adamw": "1e-3", "sgd": "1e-2"})
    rows[0], rows[1] = unfinished(rows[0], "diverged"), unfinished(rows[1], "failed")
    found = compare(rows)
    assert words.tuning_table(found).rows[0]["1e-3"] == "diverged (1 of 2), failed (1 of 2)"
    assert found.failed == [], "they are none of those compared"


@pytest.mark.parametrize(
    ("axis", "others", "expected"),
    [
        (("optimizer=adamw", "optimizer=sgd"), (), f"{ONE}, weight decay and betas not tuned"),
        (("optimizer.betas=[0.9,0.99]", "optimizer.betas=[0.9,0.95]"), (), ONE),
        (("init=gpt2", "init=xavier"), (), ONE),
        (("init.std=0.02", "init.std=0.01"), (), ONE),
        (("model.n_embd=768", "model.n_embd=1536"), (), ONE),
        (("train.batch_size=4", "train.batch_size=8"), (), ONE),
        (("precision=fp32", "precision=bf16"), (), ONE),
        (("optimizer.lr=0.001", "optimizer.lr=0.01"), (), ""),
        (("data.order=sequential", "data.order=shuffled"), (), ""),
        (("train.device=auto", "train.device=cpu"), (), ""),
    ],
)  # fmt: skip
def test_what_was_held_fixed_is_said_where_it_matters(
    axis: tuple[str, str], others: Sequence[str], expected: str
) -> None:
    rows = [run(arm, *others, loss=3 + seed / 10 + at, seed=seed) for at, arm in enumerate(axis) for seed in (1, 2, 3)]
    found = compare(rows)
    assert loss_row(found).tuning == expected
    (said,) = words.sentences(found)
    assert f", {expected}" in said.text
    assert said.text.count("not tuned") == expected.count("not tuned")


def test_the_caveat_is_said_once_an_axis_and_names_rates_that_differ() -> None:
    arms = ["init=gpt2", "init=xavier", "init=torch"]
    rows = [run(arm, loss=3 + seed / 10 + at, seed=seed) for at, arm in enumerate(arms) for seed in (1, 2, 3)]
    assert [text.count("not tuned") for _, text in words.sentences(compare(rows))] == [1, 0]
    own = [
        run(f"optimizer={arm}", f"optimizer.lr={lr}", typed=[f"optimizer={arm}"], loss=3 + seed / 10 + lr, seed=seed)
        for arm, lr in (("adamw", 3e-4), ("sgd", 0.1))
        for seed in (1, 2, 3)
    ]
    assert loss_row(compare(own)).tuning.startswith("at each arm's own learning rate, not tuned")


def test_another_tuned_key_leaves_the_rate_untuned() -> None:
    decay = "sweep.tune=optimizer.weight_decay=0,0.1"
    rows = [
        run(f"optimizer={arm}", "optimizer.weight_decay=0.1", decay, loss=3 + seed / 10, seed=seed)
        for arm in ("adamw", "sgd")
        for seed in (1, 2, 101)
    ]
    assert loss_row(compare(rows)).tuning == (
        "each at its own best weight decay (sgd 0.1; adamw 0.1), at one learning rate for all arms, not tuned, "
        "betas not tuned"
    )
