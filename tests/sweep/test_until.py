"""`sweep.until=answered` runs seeds until every arm has its verdict, on any launcher. If it is stopped or killed on the
way, it ends at the same seed with the same verdict. Jobs run seed by seed; within a seed their order is drawn.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support import SMALL, finish, read, run, run_folders, start, stopping_at
from test_engines import here, the_sweep

from gpt2exp.config import SweepConfig
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch, request, resume
from gpt2exp.sweep.composing import arguments

TINY = [*SMALL, "train.steps=3", "wandb.mode=disabled"]
ARMS = "optimizer.lr=1e-3,3e-3"
UNTIL = ["sweep.until=answered", "sweep.max_seeds=8"]
ASKED = ["-m", ARMS, *UNTIL, *TINY]


def end_of(sweep: Path) -> tuple[Any, ...]:
    """What the sweep came to: the seeds compared, the loss's row but for what is measured in time, and why it ended."""
    comparison = read(sweep / "comparison.json")
    (loss,) = [row for row in comparison["axes"] if row["metric"] == "loss_mean_last10"]
    return comparison["seeds"], loss, comparison["notes"][:2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, _ = here(folder, *ASKED)
    assert code == 0
    return the_sweep(folder), out


class TestWhole:
    """One sweep by one process."""

    def test_it_ends_by_itself(self, whole: tuple[Path, str]) -> None:
        sweep, out = whole
        seeds, loss, notes = end_of(sweep)
        assert 3 <= len(seeds) < 8
        assert seeds == list(range(1, len(seeds) + 1))
        assert (loss["inference"], loss["n_seeds"]) == ("declared", len(seeds))
        assert loss["verdict"] in ("better", "worse")
        assert notes[1] == f"after {len(seeds)} seeds it ended: every arm has its verdict"
        assert len(run_folders(sweep)) == 2 * len(seeds), "no folder of a seed that was not needed"
        assert f"{2 * len(seeds)} of {2 * len(seeds)} runs done" in out
        assert "not run" not in out

    def test_what_people_see(self, whole: tuple[Path, str]) -> None:
        """After each seed from the third on the interval, and the rule on the page."""
        sweep, out = whole
        last = len(end_of(sweep)[0])
        lines = [line for line in out.splitlines() if line.startswith("seed ")]
        assert [int(line.split()[1]) for line in lines] == [*range(3, last + 1), last]
        assert all(": optimizer.lr=0.003 against 0.001: −0.0" in line for line in lines[:-1])
        assert all(", about " in line and " more seed" in line for line in lines[:-2])
        assert lines[-1] == f"seed {last} is the last: every arm has its verdict"
        assert "note: without sweep.margin no axis can be called indistinguishable" in out
        for page in ("report.md", "report.html"):
            text = (sweep / page).read_text()
            assert (
                "decided before the first run: seeds 1, 2, 3, ... until each arm of optimizer.lr has a verdict" in text
            )
            assert "it ended: every arm has its verdict" in text

    def test_the_rule_is_written(self, whole: tuple[Path, str]) -> None:
        known = record.Sweep.read(whole[0])
        assert known is not None
        assert known.looks == [3, 4, 5, 6, 7, 8]
        assert known.rule == {
            "axes": {"optimizer.lr": ["0.001", "0.003"]},
            "margin": None,
            "max_seeds": 8,
            "max_hours": None,
        }
        assert list(known.by_seed) == list(range(1, 9))

    def test_there_is_nothing_to_go_on_with(self, whole: tuple[Path, str], tmp_path: Path) -> None:
        sweep, _ = whole
        before = {path: path.read_bytes() for path in sweep.glob("*/summary.json")}
        of = end_of(sweep)
        code, out, _ = here(tmp_path, f"resume={sweep}")
        assert (code, end_of(sweep)) == (0, of)
        assert {path: path.read_bytes() for path in sweep.glob("*/summary.json")} == before
        assert "job 1" not in out

    @pytest.mark.parametrize("key", ["seed=31", "model.n_layer=1,2", "sweep.margin=0.1", "sweep.min_seeds=2"])
    def test_what_was_decided_stays(self, whole: tuple[Path, str], key: str) -> None:
        with pytest.raises(BadRequest, match=rf"^{key}: that was decided before the first run of \S+; leave it out"):
            resume.resumed_request(arguments([f"resume={whole[0]}", key]))

    def test_a_higher_maximum(self, whole: tuple[Path, str]) -> None:
        """The seeds that it adds come after those that were planned; the looks stay those that were declared."""
        asked = resume.resumed_request(arguments([f"resume={whole[0]}", "sweep.max_seeds=10", "sweep.max_hours=2"]))
        assert asked is not None
        assert asked.looks == (3, 4, 5, 6, 7, 8)
        assert (asked.stopping_rule["max_seeds"], asked.stopping_rule["max_hours"]) == (10, 2)
        assert {job.config.seed for job in asked.jobs} == set(range(1, 11))
        assert len(set(asked.folders)) == len(asked.jobs) == 20
        again = request.new_request(arguments(list(asked.argv)))
        assert {job.config.seed for job in again.jobs} == set(range(1, 11)), "its command line asks for all of it"


def test_a_fixed_sweep_stays_one(tmp_path: Path) -> None:
    assert here(tmp_path, "-m", "seed=1", *TINY)[0] == 0
    with pytest.raises(BadRequest, match=r"^sweep\.until=answered: that was decided before the first run of"):
        resume.resumed_request(arguments([f"resume={the_sweep(tmp_path)}", "sweep.until=answered"]))


@pytest.mark.parametrize("stop_at", [*(pytest.param(at, marks=pytest.mark.slow) for at in (1, 5)), 8])
def test_stopped_and_gone_on_with(
    stop_at: int, whole: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between seeds and within one."""
    stopping_at(stop_at, monkeypatch)
    assert here(tmp_path, *ASKED)[0] == 130
    assert here(tmp_path, f"resume={the_sweep(tmp_path)}")[0] == 0
    assert end_of(the_sweep(tmp_path)) == end_of(whole[0])
    assert [path.name for path in run_folders(tmp_path)] == [path.name for path in run_folders(whole[0])]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_killed(number: int, whole: tuple[Path, str], tmp_path: Path) -> None:
    """SIGKILL at any moment, up to three times."""
    chance = random.Random(number)
    words = ASKED
    for _ in range(3):
        process = start(tmp_path / "here", *words)
        runs = chance.randint(0, 7)
        while process.poll() is None and len(list(tmp_path.rglob("summary.json"))) < runs:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        process.kill()
        finish(process)
        if found := list((tmp_path / "here").glob("sweeps/*/[!.]*")):
            words = [f"resume={found[0]}"]
    done = run(tmp_path / "here", *words)
    assert done.returncode == 0, done.stderr
    assert end_of(the_sweep(tmp_path / "here")) == end_of(whole[0])


@pytest.mark.slow
def test_with_workers(whole: tuple[Path, str], tmp_path: Path) -> None:
    """The answer is the first in the order of seeds; a seed begun meanwhile is finished, the others leave no folder."""
    done = run(tmp_path / "here", *ASKED, "hydra/launcher=workers")
    assert done.returncode == 0, done.stderr
    sweep = the_sweep(tmp_path / "here")
    assert end_of(sweep) == end_of(whole[0])
    rows = [record.row(folder, sweep) for folder in run_folders(sweep)]
    assert {row["state"] for row in rows} == {"done"}
    assert "not run" not in done.stdout
    left = {path.name for path in sweep.iterdir() if path.name[:3].isdigit()}
    assert left == {row["name"] for row in rows}
    again = run(tmp_path / "here", f"resume={sweep}")
    assert (again.returncode, end_of(sweep)) == (0, end_of(whole[0]))


def test_a_worker_looks_before_it_begins(whole: tuple[Path, str]) -> None:
    """If the sweep has ended, no further seed is begun; if it goes on, any seed is."""
    sweep, _ = whole
    last = len(end_of(sweep)[0])
    assert launch._needless_seeds(sweep) == set(range(last + 1, 9))
    name = record.Sweep.read(sweep).by_seed[last + 1][0]  # type: ignore[union-attr]
    try:
        (sweep / name).mkdir()
        record.write_status(sweep / name, "running", 0)  # by another worker
        assert launch._needless_seeds(sweep) == set(range(last + 2, 9)), "a seed that has begun is finished"
    finally:
        (sweep / name / "status.json").unlink()
        (sweep / name).rmdir()


def test_fail_fast(tmp_path: Path) -> None:
    """The first failure ends it, as a failure."""
    code, out, _ = here(tmp_path, "-m", "optimizer.lr=1e9", "init=gpt2,openai", *UNTIL, *TINY, "sweep.fail_fast=true")
    assert code == 1
    assert len(run_folders(tmp_path)) == 1
    assert "0 of 16 runs done" in out


def test_an_arm_that_diverges_at_every_seed(tmp_path: Path) -> None:
    """More seeds would not answer it."""
    code, out, _ = here(tmp_path, "-m", "optimizer.lr=1e-3,1e9", *UNTIL, *TINY)
    assert code == 1
    assert "3 of 6 runs done" in out
    assert "seed 3 is the last: every arm has its verdict" in out


def test_hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = here(tmp_path, *ASKED, "sweep.max_hours=1e-9")
    assert code == 0
    assert len(run_folders(tmp_path)) == 2
    assert "seed 1 is the last: sweep.max_hours=1e-09 is over" in out
    stopping_at(3, monkeypatch)
    assert here(tmp_path, f"resume={the_sweep(tmp_path)}", "sweep.max_hours=1")[0] == 130
    assert len(run_folders(tmp_path)) == 5, "it goes on"


@pytest.mark.parametrize("study", ["weight_tying", "init_std"])
def test_the_studies(study: str) -> None:
    """Their seeds are replaced by 1, 2, 3, ..., and go first."""
    asked = request.new_request(arguments([f"experiment={study}", *UNTIL]))
    assert [job.config.seed for job in asked.jobs] == [seed for seed in range(1, 9) for _ in range(4)]
    assert asked.jobs[4].folder.startswith("004_")


def test_a_dry_run(whole: tuple[Path, str], tmp_path: Path) -> None:
    """One seed's runs, and by an earlier sweep what 3, 5, 10, 20 seeds can tell."""
    code, out, _ = here(tmp_path, *ASKED, f"sweep.prior={whole[0]}", "dry_run=true")
    assert code == 0
    assert out.count("optimizer.lr=0.00") == 2 + 2
    assert "the runs of one seed, of 8 at most" in out
    table = [line.split() for line in out.splitlines() if "against 0.001" in line]
    assert [row[3] for row in table] == ["fixed", "declared"]
    least = [float(row[at]) for row in table for at in (4, 6)]  # at 3 and 5 seeds
    assert least[0] > least[1]
    assert least[2] > least[0], "several looks cost something"
    assert not list(tmp_path.iterdir())


def test_the_keys_bounds() -> None:
    for given in ({"max_seeds": 5}, {"min_seeds": 4}, {"max_hours": 1.0}):
        with pytest.raises(BadRequest, match=r"has no meaning without sweep\.until; add sweep\.until=answered"):
            SweepConfig(**given)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"^sweep\.max_seeds=30: fewer than sweep\.min_seeds=40"):
        SweepConfig(until="answered", min_seeds=40)
    assert list(SweepConfig(until="answered", max_seeds=4).looks) == [3, 4]


class TestOrder:
    """In which order the jobs of any sweep run."""

    def test_seeds_are_the_outer_loop(self, tmp_path: Path) -> None:
        """Whatever was typed first; folders keep the numbers of the product."""
        code, _, _ = here(tmp_path, "-m", "optimizer.lr=1e-3,2e-3", "seed=5,3", *TINY)
        assert code == 0
        rows = [read(folder / "summary.json") for folder in run_folders(tmp_path)]
        assert [(row["config"]["optimizer"]["lr"], row["seed"]) for row in rows] == [
            (lr, seed) for lr in (1e-3, 2e-3) for seed in (5, 3)
        ]
        began = sorted(rows, key=lambda row: row["parts"][0]["span"][0])
        assert [row["seed"] for row in began] == [5, 5, 3, 3]
        asked = request.new_request(arguments(["-m", "optimizer.lr=1e-3,2e-3", "seed=5,3", *TINY]))
        assert [row["overrides"] for row in began] == [list(job.overrides) for job in asked.to_do]

    def test_each_arm_is_first_about_as_often(self) -> None:
        words = ["-m", "model=nano", "optimizer.lr=1,2,3", "seed=range(0,60)"]
        asked = request.new_request(arguments(words))
        arms = [job.config.optimizer.lr for job in asked.to_do]
        orders = Counter(tuple(arms[at : at + 3]) for at in range(0, 180, 3))
        assert len(orders) == 6
        assert min(orders.values()) > 4, orders
        assert asked.to_do == request.new_request(arguments(words)).to_do, "and the same when asked again"

    def test_without_several_seeds_it_is_as_typed(self) -> None:
        asked = request.new_request(arguments(["-m", "model=nano", "optimizer.lr=3,1,2", "seed=1"]))
        assert [job.config.optimizer.lr for job in asked.to_do] == [3, 1, 2]
