"""A sweep with `sweep.until` ends at the seed that its finished runs and its rule decide. Its errors stay at 5 %,
whatever the noise, in any order of its runs, killed or not. `sweep.prior` gives the differences that `inference` gives.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_compare import run

from gpt2exp.compare import stopping
from gpt2exp.compare.comparison import Row
from gpt2exp.compare.inference import fixed, reach, tells, upper_std
from gpt2exp.run.record import Sweep
from gpt2exp.section import BadRequest

TIE = "model.tie_weights"


def known(seeds: int, least: int = 3, **rule: Any) -> Sweep:
    """What `sweep.json` says of a sweep over tying that looks from so many seeds on to its last."""
    jobs = [[f"{TIE}={arm}", f"seed={seed}"] for seed in range(1, seeds + 1) for arm in ("true", "false")]
    usual: dict[str, Any] = {"axes": {TIE: ["true", "false"]}, "margin": None, "max_seeds": seeds, "max_hours": None}
    folders = [",".join(job) for job in jobs]
    return Sweep([], jobs, folders, launched=time.time(), looks=list(range(least, seeds + 1)), rule=usual | rule)


def rows(differences: Sequence[float], sweep: Path, margin: float | None = None, **facts: Any) -> list[Row]:
    """The finished runs of its first seeds: the untied arm's losses exceed the tied one's by so much."""
    typed = [] if margin is None else [f"sweep.margin={margin}"]
    return [
        run(f"{TIE}={arm}", *typed, loss=loss, seed=seed, folder=str(sweep / f"{TIE}={arm},seed={seed}"), **facts)
        for seed, difference in enumerate(differences, 1)
        for arm, loss in (("true", 3.0), ("false", 3.0 + difference))
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Its folder, with `sweep.json`: looks from 3 to 8 seeds."""
    known(8).write(tmp_path)
    return tmp_path


def test_it_errs_in_one_of_twenty_at_most(sweep: Path) -> None:
    """100 sweeps without a difference, a look after every seed from 3 to 8, where a t test at each look errs often."""
    chance = random.Random(15)
    rule, wrong, naive = known(8), 0, 0
    for _ in range(100):
        values = [chance.gauss(0, 0.01) for _ in range(8)]
        progress = stopping.decide(rule, rows(values, sweep))
        assert (progress.seeds == 8) or progress.why == "every arm has its verdict"
        wrong += progress.effects[0].verdict in ("better", "worse")
        naive += any(fixed(values[:n]).p < 0.05 for n in range(3, 9))
    assert (wrong, naive) == (2, 13)


def test_it_ends_at_the_first_seed_that_answers(sweep: Path) -> None:
    """However many seeds have ended beyond it, and in whatever order their runs began."""
    chance = random.Random(2)
    for _ in range(10):
        values = [chance.gauss(0.02, 0.01) for _ in range(8)]
        of = rows(values, sweep)
        whole = stopping.decide(known(8), of)
        for ended in range(0, 9):
            progress = stopping.decide(known(8), of[: 2 * ended])
            assert progress.seeds == min(ended, whole.seeds)
            assert bool(progress.why) == (ended >= whole.seeds)
        shuffled = chance.sample(of, len(of))
        for row, other in zip(shuffled, of, strict=True):
            row["started"] = other["started"]
        assert stopping.decide(known(8), shuffled) == whole


def test_an_unfinished_seed_is_waited_for_and_a_failed_run_is_not(sweep: Path) -> None:
    of = rows([0.5, 0.51, 0.52, 0.5], sweep)
    of[2]["state"] = "interrupted"
    assert stopping.decide(known(8), of) == stopping.Progress(1)
    of[2]["state"] = "failed"
    progress = stopping.decide(known(8), of)
    assert (progress.seeds, progress.effects[0].n_seeds) == (4, 3), "its pair is missing"
    assert progress.effects[0].inference == "declared"


def test_an_arm_that_never_ends_is_not_waited_for(sweep: Path) -> None:
    of = rows([math.inf] * 3, sweep)
    for row in of[1::2]:
        row["state"] = "diverged"
    progress = stopping.decide(known(8), of)
    assert (progress.seeds, progress.why) == (3, "every arm has its verdict")
    assert progress.effects[0].verdict == "not_comparable"


def test_the_margin_ends_it_too(sweep: Path) -> None:
    values = [0.001, -0.001, 0.0005, -0.0004]
    assert stopping.decide(known(8), rows(values, sweep)).why == ""
    progress = stopping.decide(known(8, margin=0.02), rows(values, sweep, margin=0.02))
    assert (progress.seeds, progress.effects[0].verdict) == (3, "indistinguishable")


def test_the_maximum_and_the_hours_end_it(sweep: Path) -> None:
    values = [0.01, -0.01, 0.02]
    assert stopping.decide(known(8, max_seeds=3), rows(values, sweep)).why == "sweep.max_seeds is reached"
    rule = known(8, max_hours=1)
    assert stopping.decide(rule, rows(values, sweep)).why == ""
    rule.launched -= 3601
    assert stopping.decide(rule, rows(values, sweep)).why == "sweep.max_hours=1 is over"
    assert stopping.decide(rule, []).why == "", "one seed is run in any case"


def test_what_people_see_after_a_seed(sweep: Path) -> None:
    progress = stopping.decide(known(8), rows([0.01, -0.01, 0.03], sweep))
    (line,) = progress.lines(8)
    assert line.startswith("seed 3 of at most 8: model.tie_weights=false against true: +0.010 (")
    assert line.endswith("nats, inconclusive, more than 8 seeds in all")
    progress = stopping.decide(known(8), rows([0.1, 0.12, 0.11], sweep))
    assert progress.lines(8)[0].endswith("nats, worse")
    assert progress.lines(8)[1] == "seed 3 is the last: every arm has its verdict"


class TestCompared:
    """The comparison of such a sweep, at its end and later."""

    def test_as_of_its_last_seed(self, sweep: Path) -> None:
        of = rows([0.1, 0.12, 0.11, -5.0], sweep)  # the fourth was begun by another worker
        found = stopping.compared(of)
        assert found.seeds == [1, 2, 3]
        assert (found.axes[0].inference, found.axes[0].verdict) == ("declared", "worse")
        assert found.axes[0].looks == [3, 4, 5, 6, 7, 8]
        assert found.notes[0].startswith("decided before the first run: seeds 1, 2, 3, ... until each arm of")
        assert "no margin and a look after every seed from 3 to 8" in found.notes[0]
        assert found.notes[1] == "after 3 seeds it ended: every arm has its verdict"
        assert "seeds begun by then, left out of the comparison: 4" in found.notes

    def test_on_its_way(self, sweep: Path) -> None:
        found = stopping.compared(rows([0.1, -0.2, 0.11, 0.3], sweep))
        assert found.seeds == [1, 2, 3, 4]
        assert found.notes[1] == "after 4 seeds it goes on"

    def test_beyond_what_was_declared_the_interval_holds_at_every_look(self, sweep: Path) -> None:
        """The maximum was raised after the last of the declared looks."""
        longer = known(10)
        longer.looks = longer.looks[:-2]
        longer.write(sweep)
        values = [0.1, -0.1, 0.05, -0.05, 0.1, -0.1, 0.05, -0.05]
        assert stopping.compared(rows(values, sweep)).axes[0].inference == "declared"
        found = stopping.compared(rows([*values, 0.1], sweep))
        assert (found.axes[0].inference, found.axes[0].n_seeds) == ("open", 9)
        assert "a look after every seed from 3 to 8; later up to 10" in found.notes[0]

    def test_beside_another_sweep_nothing_was_declared(
        self, sweep: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        other = rows([0.1], tmp_path_factory.mktemp("other"))
        for row in other:
            row["config"]["seed"] = row["seed"] = 9
        found = stopping.compared([*rows([0.1, -0.1, 0.05], sweep), *other])
        assert found.axes[0].inference == "open"
        assert "these are not the looks declared: the interval holds at every look" in found.axes[0].reason


class TestPrior:
    """What so many seeds could tell."""

    def test_by_its_std_and_the_upper_limit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        values = [0.1, 0.13, 0.12]
        monkeypatch.setattr(stopping, "read", lambda folders: rows(values, tmp_path))
        one, other = stopping.prior(tmp_path, range(3, 31))
        std = statistics.stdev(values)
        assert (one["run"], one["seeds"], other["seeds"]) == (
            "model.tie_weights=false against true",
            "fixed",
            "declared",
        )
        times = reach(5, "declared", tuple(range(3, 31)))
        for row, reached in ((one, reach(5, "fixed")), (other, times)):
            least, most = row["5"].rstrip(")").split(" (")
            assert float(least) == pytest.approx(tells(std, 5, reached), rel=0.05)
            assert float(most) == pytest.approx(tells(upper_std(std, 3), 5, reached), rel=0.05)
        (_, short) = stopping.prior(tmp_path, range(3, 6))
        assert short["10"] == "–", "no look is declared there"

    def test_without_two_seeds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stopping, "read", lambda folders: rows([0.1], tmp_path))
        with pytest.raises(BadRequest, match=r"^sweep\.prior=.*: no arm in it has two seeds or more"):
            stopping.prior(tmp_path, range(3, 31))
