"""`sweep.tune`: each arm is tuned on seeds of its own, then compared at its own best value. This holds for a sweep that
is stopped, resumed with more arms, run by workers or ended as soon as it is answered, and with failed or diverged runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SMALL, read, run, run_folders, stopping_at, without_figures
from test_engines import here, the_sweep

import gpt2exp
from gpt2exp.compare.tuned import arm_of
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch, request, resume
from gpt2exp.sweep.composing import arguments
from gpt2exp.sweep.overrides import as_meant

TINY = [*SMALL, "train.steps=3", "wandb.mode=disabled"]
VALUES = ("1e-3", "1e-2", "1e9")
TUNE = f"sweep.tune=optimizer.lr={','.join(VALUES)}"
TWO = "must be a key and two different numbers or more"
ASKED = ["-m", "optimizer=adamw,sgd", "seed=1,2", TUNE, *TINY]
FEW = ["init=gpt2,openai", "seed=1", "sweep.tune=optimizer.lr=1e-3,1e-2", "sweep.tune_seeds=1", *TINY]
"""Four tuning runs and two that are compared."""


def chosen(sweep: Path) -> dict[str, str | None]:
    """By arm, what `sweep.json` says."""
    known = record.Sweep.read(sweep)
    assert known is not None
    assert known.tuning is not None
    return {
        next(text for text in arm.overrides if text.startswith(("optimizer=", "init="))): arm.best
        for arm in known.tuning.arms
    }


def compared(sweep: Path) -> dict[str, list[Any]]:
    """By the compared run, its seed, learning rate and loss."""
    rows = {folder.name: read(folder / "summary.json") for folder in run_folders(sweep) if folder.parent == sweep}
    return {name: [row["seed"], row["config"]["optimizer"]["lr"], row["loss_last"]] for name, row in rows.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A sweep that was never stopped, and what it printed."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, err = here(folder, *ASKED, figures=True)
    assert code == 0, out + err
    return the_sweep(folder), out


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep that was never stopped, from Python."""
    folder = tmp_path_factory.mktemp("few") / "sweep"
    with without_figures():
        runs = gpt2exp.sweep(FEW, folder)
    assert [curve.best in ("1e-3", "1e-2") for curve in runs.compare().tuning] == [True, True]
    assert len(runs.rows) == 4 + 2
    return folder


def test_each_arm_runs_at_its_own_best(whole: tuple[Path, str]) -> None:
    """By NumPy from the tuning runs' own summaries; the value that diverged (1e9) is the worst."""
    sweep, _ = whole
    trials = [read(folder / "summary.json") for folder in run_folders(sweep / "tuning")]
    assert len(trials) == 2 * len(VALUES) * 2
    assert {row["seed"] for row in trials} == {101, 102}
    for arm, best in chosen(sweep).items():
        means = [
            np.mean([row["loss_mean_last10"] if row["state"] == "done" else np.inf for row in trials
                     if arm in row["overrides"] and f"optimizer.lr={value}" in row["overrides"]])
            for value in VALUES
        ]  # fmt: skip
        assert best == VALUES[int(np.argmin(means))]
        assert np.isinf(means[-1])
    runs = compared(sweep)
    assert [run[0] for run in runs.values()] == [1, 2, 1, 2]
    assert list(runs) == [f"{n:03d}_optimizer={arm},seed={seed}" for n, (arm, seed) in enumerate(
        [("adamw", 1), ("adamw", 2), ("sgd", 1), ("sgd", 2)])]  # fmt: skip
    for name, (_, lr, _) in runs.items():
        assert lr == float(chosen(sweep)[name.split("_")[1].split(",")[0]] or "nan")
        overrides = read(sweep / name / "summary.json")["overrides"]
        assert [text for text in overrides if text.startswith("optimizer.lr=")] == [
            f"optimizer.lr={overrides[-1][13:]}"
        ]


def test_what_people_see(whole: tuple[Path, str]) -> None:
    sweep, out = whole
    comparison = read(sweep / "comparison.json")
    assert "12 of 12 tuning runs and 4 of 4 runs done" in out
    assert "tuning job 1 of 12" in out
    assert "job 1 of 4" in out
    assert f"tuned optimizer=sgd: best at optimizer.lr={chosen(sweep)['optimizer=sgd']}" in out
    assert "Each arm's own optimizer.lr" in out
    assert "diverged (2 of 2)" in out
    assert list(comparison["swept"]) == ["optimizer"]
    assert comparison["seeds"] == [1, 2]
    assert [len(curve["losses"]) for curve in comparison["tuning"]] == [3, 3]
    assert "each at its own best learning rate (sgd" in (sweep / "report.md").read_text()
    assert (sweep / "figures" / "0-tuning.png").is_file()


def test_the_record(whole: tuple[Path, str]) -> None:
    """`sweep.json` names the runs behind each choice; its jobs are those compared, and its command asks for them."""
    known = record.Sweep.read(whole[0])
    assert known is not None
    assert known.tuning is not None
    assert (known.tuning.key, known.tuning.seeds) == ("optimizer.lr", [101, 102])
    for arm in known.tuning.arms:
        assert list(arm.runs) == list(VALUES)
        for value, names in arm.runs.items():
            rows = [read(whole[0] / name / "summary.json") for name in names]
            assert [row["seed"] for row in rows] == [101, 102]
            assert all({*arm.overrides, f"optimizer.lr={value}"} <= {*row["overrides"]} for row in rows)
    assert list(known.by_seed) == [1, 2]
    again = request.new_request(arguments(known.argv))
    assert (len(again.jobs), len(again.tuning_jobs)) == (4, 12)
    known.write(whole[0])
    assert record.Sweep.read(whole[0]) == known


@pytest.mark.parametrize("stop_at", [2, 6])
def test_stopped_and_resumed(stop_at: int, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the tuning, and within the comparison."""
    begun = stopping_at(stop_at, monkeypatch)
    assert here(tmp_path, "-m", *FEW)[0] == 130
    sweep = the_sweep(tmp_path)
    assert (set(chosen(sweep).values()) == {None}) == (stop_at < 5)
    code, out, err = here(tmp_path, f"resume={sweep}")
    assert code == 0, out + err
    assert len(begun) == 6 + 1, "what was done is kept"
    assert chosen(sweep) == chosen(few)
    assert compared(sweep) == compared(few)
    code, out, _ = here(tmp_path, f"resume={sweep}")
    assert (code, len(begun)) == (0, 7), "nothing is left to do"


def test_resumed_with_more(few: Path, tmp_path: Path) -> None:
    """A new seed takes the value that is chosen; a new arm is tuned first."""
    sweep = shutil.copytree(few, tmp_path / "sweep")
    code, out, err = here(tmp_path, f"resume={sweep}", "seed=1,2")
    assert code == 0, out + err
    assert (len(run_folders(sweep / "tuning")), len(compared(sweep))) == (4, 4)
    assert list(compared(sweep))[2:] == ["002_init=gpt2,seed=2", "003_init=openai,seed=2"]
    code, out, err = here(tmp_path, f"resume={sweep}", "init=xavier")
    assert code == 0, out + err
    assert (len(run_folders(sweep / "tuning")), len(compared(sweep))) == (6, 6)
    known = record.Sweep.read(sweep)
    assert known is not None
    assert known.tuning is not None
    assert all(arm.best for arm in known.tuning.arms)
    assert len(known.tuning.arms) == 3
    asked = request.new_request(arguments(known.argv))
    assert (len(asked.jobs), len(asked.tuning_jobs)) == (6, 6)
    for typed in ("optimizer.lr=1", "sweep.tune_seeds=3", "sweep.tune=optimizer.lr=1,2"):
        with pytest.raises(BadRequest, match=r"that was decided before the first run of"):
            resume.resumed_request(arguments([f"resume={sweep}", as_meant(typed)]))
    with pytest.raises(BadRequest, match=r"^sweep\.tune_seeds=\[101\]: 101 would be compared too; try .*=102$"):
        resume.resumed_request(arguments([f"resume={sweep}", "seed=101"]))


def test_a_tuning_run_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is left out, which is said, and the sweep ends as failed."""
    real = launch.run_folder

    def failing(folder: Path, began: float) -> Any:
        if folder.name.endswith("optimizer.lr=1e-2,optimizer=adamw,seed=102"):
            record.write_status(folder, "failed", 0, "out of memory")
            return {"state": "failed"}
        return real(folder, began)

    monkeypatch.setattr(launch, "run_folder", failing)
    code, out, err = here(tmp_path, *ASKED[:2], "seed=1", "sweep.tune=optimizer.lr=1e-3,1e-2", *TINY)
    sweep = the_sweep(tmp_path)
    assert code == 1
    assert "optimizer.lr=1e-3" in (sweep / "report.md").read_text()
    assert chosen(sweep)["optimizer=adamw"] == "1e-3"
    assert "1e-2 left out, since a run failed there" in out
    assert "7 of 8 tuning runs and 2 of 2 runs done" in out
    assert "out of memory" in err


def test_an_arm_without_a_value_is_not_run(tmp_path: Path) -> None:
    """Every value diverged: the other arm runs, the sweep ends as failed."""
    words = ["-m", "optimizer.grad_clip=0.0,1.0", "sweep.tune=optimizer.lr=1e9,1e10", "sweep.tune_seeds=1"]
    code, out, _ = here(tmp_path, *words, "seed=1", *TINY)
    assert code == 1
    assert out.count("no value of optimizer.lr has a loss") == 2
    assert not compared(the_sweep(tmp_path))


def test_until_it_is_answered(tmp_path: Path) -> None:
    until = ["sweep.until=answered", "sweep.max_seeds=6"]
    tuned = ["sweep.tune=optimizer.lr=1e-3,1e-2", "sweep.tune_seeds=1"]
    code, out, err = here(tmp_path, "-m", "optimizer=adamw,sgd", *tuned, *until, *TINY)
    assert code == 0, out + err
    sweep = the_sweep(tmp_path)
    comparison = read(sweep / "comparison.json")
    assert comparison["seeds"] == list(range(1, len(comparison["seeds"]) + 1))
    assert comparison["notes"][0].startswith(
        "decided before the first run: seeds 1, 2, 3, ... until each arm of optimizer "
    )
    assert len(run_folders(sweep / "tuning")) == 4
    assert len(compared(sweep)) == 2 * len(comparison["seeds"])
    assert not [line for line in out.splitlines() if line.startswith("seed 0")]
    with pytest.raises(BadRequest, match=r"would be compared too"):
        request.new_request(
            arguments([*ASKED[:2], as_meant(TUNE), "sweep.until=answered", "sweep.max_seeds=101", *TINY])
        )


def test_a_dry_run(tmp_path: Path) -> None:
    code, out, _ = here(tmp_path, *ASKED, "dry_run=true")
    assert code == 0
    stages = (
        "first 12 jobs that tune optimizer.lr (2 arms x 3 values x 2 seeds: 101, 102), at 1e-3, 1e-2, 1e9; then 4 jobs"
    )
    assert stages in out.replace("\n", " ")
    assert not list(tmp_path.iterdir())


TWO = "must be a key and two different numbers or more"


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        (["-m", "optimizer=adamw,sgd", "sweep.tune=optimizer.lr=1e-3"], TWO),
        (["-m", "optimizer=adamw,sgd", "sweep.tune=optimizer.lr=1e-3,0.001,1"], TWO),
        (["-m", "optimizer=adamw,sgd", "sweep.tune=optimizer.lr=low,high"], TWO),
        (["-m", "optimizer=adamw,sgd", "sweep.tune=optimizer.rate=1,2"], "optimizer.rate=1: no such key"),
        (["-m", "optimizer=adamw,sgd", "sweep.tune=train.log_every=1,2"], "changes no result; tune another key"),
        (["-m", "optimizer=adamw,sgd", "sweep.tune=optimizer.lr=1,-1"], "optimizer.lr=-1"),
        (["-m", "optimizer=adamw,sgd", "optimizer.lr=1,2", TUNE], "leave out optimizer.lr=1,2"),
        (["-m", "optimizer=adamw,sgd", "optimizer.lr=0.5", TUNE], "leave out optimizer.lr=0.5"),
        (["-m", "optimizer=adamw,sgd", "seed=100,101", TUNE], "101 would be compared too; try sweep.tune_seeds=103,"),
        (["-m", "optimizer=adamw,sgd", TUNE, "sweep.tune_seeds=1,1"], "must be different seeds"),
        (["-m", "seed=1,2", TUNE], "nothing varies but the seed; add what to compare"),
        (["optimizer=sgd", TUNE], "one run has no arms to compare; add -m, and what to compare"),
        (["-m", "hydra/sweeper=lr_search", "init=gpt2", TUNE], "it takes the basic sweeper"),
        (["-m", "optimizer=adamw,sgd", "sweep.tune_seeds=3"], "has no meaning without sweep.tune"),
    ],
)  # fmt: skip
def test_bad_requests(typed: list[str], why: str, tmp_path: Path) -> None:
    code, _, err = here(tmp_path, *typed, *TINY)
    assert code == 2
    assert why in err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


def test_seeds_as_a_number_or_a_list() -> None:
    for typed, seeds in (("3", [101, 102, 103]), ("7,9", [7, 9]), ("[7]", [7]), ("1", [101])):
        asked = request.new_request(arguments([*map(as_meant, [*ASKED, f"sweep.tune_seeds={typed}"])]))
        assert sorted({job.config.seed for job in asked.tuning_jobs}) == seeds
        assert [job.config.seed for job in asked.jobs] == [1, 2, 1, 2]


def test_every_combination_of_axes_is_an_arm() -> None:
    asked = request.new_request(arguments([*map(as_meant, [*ASKED, "init=gpt2,openai"])]))
    assert asked.tuning is not None
    assert (len(asked.jobs), len(asked.tuning.arms), len(asked.tuning_jobs)) == (8, 4, 24)
    assert len({job.folder for job in (*asked.jobs, *asked.tuning_jobs)}) == 32
    assert all(job.folder.startswith("tuning/") for job in asked.tuning_jobs)


def test_one_at_a_time_tunes_each_leaving_and_the_control_has_the_baselines_value() -> None:
    words = ["-m", "init=gpt2,openai", "model.bias=true,false", "seed=1,2", TUNE, *TINY]
    words += ["sweep.design=one_at_a_time", "sweep.control=true", "data.order=shuffled"]
    asked = request.new_request(arguments([*map(as_meant, words)]))
    assert asked.tuning is not None
    assert (len(asked.jobs), len(asked.tuning.arms)) == (2 * 4, 3)
    assert {job.config.data.redraw for job in asked.tuning_jobs} == {0}
    control = next(job for job in asked.jobs if job.config.data.redraw)
    assert arm_of(control.overrides, "optimizer.lr") == tuple(asked.tuning.arms[0].overrides)


def test_runs_of_another_sweep_are_taken_in_both_stages(whole: tuple[Path, str], tmp_path: Path) -> None:
    """A compared run is taken at the value of its arm, not at another of the values."""
    more = TUNE.replace("1e9", "1e-1")
    code, out, err = here(tmp_path, *ASKED[:3], more, *TINY, f"sweep.reuse={whole[0]}")
    assert code == 0, out + err
    sweep = the_sweep(tmp_path)
    rows = [read(folder / "summary.json") for folder in run_folders(sweep)]
    assert sum("reused" in row for row in rows if row["seed"] > 100) == 8
    for arm, best in chosen(sweep).items():
        runs = [row for row in rows if row["seed"] < 100 and arm in row["overrides"]]
        assert all(row["config"]["optimizer"]["lr"] == float(best or "nan") for row in runs)
        assert all(("reused" in row) == (best == chosen(whole[0])[arm]) for row in runs)


@pytest.mark.slow
def test_with_workers(few: Path, tmp_path: Path) -> None:
    """The comparison waits for the tuning."""
    done = run(tmp_path / "here", "-m", *FEW, "hydra/launcher=workers")
    assert done.returncode == 0, done.stderr
    sweep = the_sweep(tmp_path / "here")
    assert (chosen(sweep), compared(sweep)) == (chosen(few), compared(few))
