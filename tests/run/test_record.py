"""The files of a run (metrics.jsonl, status.json, summary.json) are complete at every moment and agree."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import read

from gpt2exp import files
from gpt2exp.run import process, record
from gpt2exp.run.metrics import COLUMNS, MEASURED, METRICS, Summary, losses, shown

FACTS: dict[str, Any] = {
    "overrides": ["seed=3"],
    "config": {"seed": 3},
    "seed": 3,
    "parameters": {"total": 7},
    "precision": {"effective": "fp32", "emulated": False},
    "data": {},
    "device": "cpu",
    "threads": 1,
}


def opened(folder: Path) -> record.Record:
    """A record in a folder made for it."""
    folder.mkdir(parents=True, exist_ok=True)
    return record.Record(folder, dict(FACTS), began=time.monotonic())


def metrics(step: int, **more: float) -> dict[str, Any]:
    """A step's metrics."""
    return {"step": step, "loss": 10.0 - step, "tokens": 128 * (step + 1), **more}


def test_a_run(tmp_path: Path) -> None:
    files_of_run = opened(tmp_path)
    with process.held(tmp_path):
        assert record.read_status(tmp_path)["state"] == "running"
    assert record.read_status(tmp_path)["state"] == "interrupted", "nobody holds the lock"
    assert not (tmp_path / "summary.json").exists()
    files_of_run.training_begins()
    for step in range(3):
        files_of_run.step(metrics(step))
        status = read(tmp_path / "status.json")
        assert (status["state"], status["step"]) == ("running", step + 1)
        assert read(tmp_path / "metrics.jsonl")[-1] == metrics(step), "a step is on disk when it is done"
    files_of_run.measured["peak_memory_bytes"] = 7
    summary = files_of_run.finish("done")
    assert summary == read(tmp_path / "summary.json")
    assert (summary["state"], summary["error"]) == ("done", None)
    assert (summary["steps"], summary["tokens"], summary["seed"]) == (3, 384, 3)
    assert (summary["loss_first"], summary["loss_last"], summary["loss_mean_last10"]) == (10.0, 8.0, 9.0)
    assert (summary["peak_memory_bytes"], summary["mfu"], summary["val_loss"]) == (7, None, None)
    assert record.read_status(tmp_path)["state"] == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl", "status.json", "summary.json"]


def test_times_are_added_up_over_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start-up lasts from the process's start to the first step, then training; an earlier part is added."""
    now = 100.0
    monkeypatch.setattr("gpt2exp.run.record.time.monotonic", lambda: now)
    before = {"from_step": 0, "started": "2026-01-01T00:00:00+00:00", "startup": 2.0, "train": 30.0}
    files_of_run = record.Record(tmp_path, dict(FACTS), began=93.0, metrics=[metrics(0)], parts=[before])
    assert files_of_run.parts[-1] | {"startup": 7.0, "train": 0.0, "from_step": 1} == files_of_run.parts[-1]
    now = 105.0
    files_of_run.training_begins(device="cpu")
    now = 120.0
    summary = files_of_run.finish("done")
    assert summary["wall_seconds"] == {"startup": 14.0, "train": 45.0, "total": 59.0}
    assert summary["started"] == before["started"]
    assert [(part["startup"], part["train"]) for part in summary["parts"]] == [(2.0, 30.0), (12.0, 15.0)]
    assert summary["parts"][1]["device"] == "cpu"


def test_metrics_are_kept_up_to_the_first_that_is_missing(tmp_path: Path) -> None:
    """A line that a killed process left half written is skipped."""
    assert record.kept_metrics(tmp_path) == []
    lines = [json.dumps(metrics(step)) for step in (0, 1, 2, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, "[1]", '{"step": 5, "lo']))
    assert record.read_metrics(tmp_path) == [metrics(step) for step in (0, 1, 2, 4)]
    assert record.kept_metrics(tmp_path) == [metrics(step) for step in (0, 1, 2)]


def test_checkpoints_come_newest_first(tmp_path: Path) -> None:
    for name in ("step_000009", "step_000100", "step_000020", "step_000020.aside-1a2b", ".step_000030.1.part"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert list(record.saved(tmp_path)) == [100, 20, 9]


def test_a_run_that_failed_before_its_first_step(tmp_path: Path) -> None:
    """Its summary has every field, null where nothing was measured."""
    summary = opened(tmp_path).finish("failed", "no luck")
    assert (summary["state"], summary["error"], summary["steps"], summary["tokens"]) == ("failed", "no luck", 0, 0)
    for key in (*MEASURED, "loss_first", "loss_last", "loss_mean_last10", "val_loss", "loss_unseen_first"):
        assert summary[key] is None
    assert summary["wall_seconds"].keys() == {"startup", "train", "total"}
    assert summary["wall_seconds"]["train"] == 0
    status = record.read_status(tmp_path)
    assert (status["state"], status["error"]) == ("failed", "no luck")
    assert read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_file_holds_what_is_no_number(tmp_path: Path, value: float) -> None:
    files_of_run = opened(tmp_path)
    files_of_run.step(metrics(0))
    with pytest.raises(ValueError, match="JSON compliant"):
        files_of_run.step(metrics(1) | {"loss": value})
    assert read(tmp_path / "metrics.jsonl") == [metrics(0)]
    assert files_of_run.finish("failed")["loss_last"] == 10.0, "it can still be closed"
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "status.json", {"loss": value})
    assert read(tmp_path / "status.json")["state"] == "failed"


def test_losses() -> None:
    rows = [metrics(step) for step in range(12)]
    rows[0]["loss_unseen"], rows[5]["loss_unseen"] = 1.5, 0.5
    rows[3]["val_loss"], rows[11]["val_loss"] = 9.0, 8.0
    got = losses(rows)
    assert (got["loss_first"], got["loss_last"]) == (10.0, -1.0)
    assert got["loss_mean_last10"] == sum(10.0 - step for step in range(2, 12)) / 10
    assert (got["loss_unseen_first"], got["loss_unseen_last"], got["val_loss"]) == (1.5, 0.5, 8.0)
    assert set(losses([]).values()) == {None}


class TestReplacing:
    """A file is the old one or the new one, never half of one."""

    def test_new_and_over_old(self, tmp_path: Path) -> None:
        for text in ("first", "second"):
            with files.replacing(tmp_path / "file") as part:
                part.write_text(text)
                assert part.parent == tmp_path, "a move between file systems is no single act"
                if text == "second":
                    assert (tmp_path / "file").read_text() == "first"
            assert (tmp_path / "file").read_text() == text
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_failure_leaves_the_old(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("old")

        def fail() -> None:
            with files.replacing(tmp_path / "file") as part:
                part.write_text("half of the n")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert (tmp_path / "file").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_two_at_once(self, tmp_path: Path) -> None:
        """Each writes its own part; the last to finish stands."""
        with files.replacing(tmp_path / "file") as outer:
            outer.write_text("outer")
            with files.replacing(tmp_path / "file") as inner:
                inner.write_text("inner")
            assert (tmp_path / "file").read_text() == "inner"
        assert (tmp_path / "file").read_text() == "outer"


@pytest.fixture
def sweep(tmp_path: Path) -> Iterator[Path]:
    """A sweep of four jobs: done, failed without a summary, running, not begun."""
    jobs = [[f"seed={seed}"] for seed in range(4)]
    files.write_json(tmp_path / record.SWEEP, {"argv": ["-m", "seed=0,1,2,3"], "jobs": jobs})
    for number in range(4):
        folder = tmp_path / f"00{number}_seed={number}"
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text(f"seed: {number}\n")
    done, failed, running, _ = record.runs_below(tmp_path)
    finished = opened(done)
    finished.step(metrics(0))
    finished.finish("done")
    record.write_status(failed, "failed", 5, "killed")
    opened(running)
    with process.held(running):
        yield tmp_path


def test_rows(sweep: Path) -> None:
    rows = [record.row(folder, sweep) for folder in record.runs_below(sweep)]
    assert [row["name"] for row in rows] == [f"00{number}_seed={number}" for number in range(4)]
    assert [row["state"] for row in rows] == ["done", "failed", "running", "not run"]
    assert [row["error"] for row in rows] == [None, "killed", None, None]
    assert rows[3]["step"] == 0
    assert rows[0]["loss_first"] == 10.0
    (alone,) = [record.row(folder, folder) for folder in record.runs_below(sweep)[:1]]
    assert alone["name"] == "000_seed=0"


@pytest.mark.parametrize("text", ["", "{", "[]", '"done"', "null"])
def test_a_damaged_file_is_no_run(sweep: Path, text: str) -> None:
    folder = record.runs_below(sweep)[0]
    (folder / "summary.json").write_text(text)
    row = record.row(folder, sweep)
    assert (row["state"], row["steps"]) == ("done", 1), "the status stands in"
    (folder / "status.json").write_text(text)
    assert record.row(folder, sweep)["state"] == "not run"
    with pytest.raises((ValueError, OSError)):
        record.read_summary(folder)


@pytest.mark.parametrize("lost", ["val_loss", "mfu", "speed_disturbed", "error"])
def test_a_summary_of_an_older_version(sweep: Path, lost: str) -> None:
    """A figure that it does not have yet reads as not measured."""
    folder = record.runs_below(sweep)[0]
    kept = {key: value for key, value in read(folder / "summary.json").items() if key != lost}
    files.write_json(folder / "summary.json", kept)
    summary = record.row(folder, sweep)
    assert (summary["state"], summary["steps"], summary[lost]) == ("done", 1, None)  # type: ignore[literal-required]


def test_the_table_of_metrics() -> None:
    """Every figure of a summary has a row, and what is compared or shown in tables all that this needs."""
    fields = {*losses([]), *MEASURED}
    assert fields <= Summary.__annotations__.keys()
    for metric in METRICS:
        assert not metric.column or metric.key in fields
        assert not metric.compared or (metric.name and metric.unit and metric.better and metric.column)
    assert [metric.column for metric in COLUMNS] == ["loss", "val loss", "tokens/s", "peak MiB"]
    (metric,) = [metric for metric in METRICS if metric.compared == "memory"]
    assert shown({"peak_memory_bytes": 3 * 2**30}, metric.key) == "3,072", "in its unit"
    assert shown({"peak_memory_bytes": None}, metric.key) == "–"


def test_sweep_of(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert record.sweep_of(record.runs_below(sweep)[0]) == sweep
    assert record.sweep_of(sweep) is None, "a sweep is not a job of itself"
    assert record.sweep_of(tmp_path_factory.mktemp("alone")) is None


def test_progress(sweep: Path) -> None:
    """By the jobs that ended since the launch, however many run at once: two in 40 s, so two more in another 40."""
    folders = record.runs_below(sweep)
    request = read(sweep / record.SWEEP)
    assert record.progress(sweep, folders[3]) == "job 4", "its sweeper makes up the jobs as it goes"
    request["folders"] = [folder.name for folder in folders]
    launched = time.time() - 40
    files.write_json(sweep / record.SWEEP, request | {"launched": launched})
    assert record.progress(sweep, folders[3]) == "job 4 of 4, about 40 s left"
    assert record.progress(sweep, folders[1]) == "job 2 of 4, about 120 s left", "one in 40 s, three to go"
    files.write_json(sweep / record.SWEEP, request | {"launched": launched + 50})
    assert record.progress(sweep, folders[3]) == "job 4 of 4", "what ended in an earlier launch tells no pace"


def test_objective(sweep: Path) -> None:
    """Validation's loss where there is one; a run that is not done is as bad as can be."""
    done, *others = record.runs_below(sweep)
    assert record.objective(done) == 10.0
    summary = read(done / "summary.json")
    files.write_json(done / "summary.json", summary | {"val_loss": 7.5})
    assert record.objective(done) == 7.5
    assert [record.objective(folder) for folder in others] == [math.inf] * 3
