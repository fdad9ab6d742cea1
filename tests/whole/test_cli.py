"""The command line: exit codes, the files of a run, what is printed, and what is left after a signal.

Tests that only read share one run.
"""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import PROGRAM, SMALL, at_step, finish, read, run, shell_code, start, the_run

from gpt2exp.sweep import launch

QUIET = "wandb.mode=disabled"
IMPORTS = [sys.executable, "-X", "importtime", "-m", "gpt2exp.train"]
Done = subprocess.CompletedProcess[str]


def without_imports(done: Done) -> list[str]:
    """Standard error less `-X importtime`'s lines."""
    return [line for line in done.stderr.splitlines() if not line.startswith("import time:")]


def imported(done: Done) -> set[str]:
    """The top-level modules that a process imported, under `-X importtime`."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}


def one_line(done: Done) -> str:
    """The only line of standard error, which must be ours."""
    (line,) = without_imports(done)
    assert line.startswith("gpt2exp: ")
    return line.removeprefix("gpt2exp: ")


def written(folder: Path) -> list[Path]:
    """Whatever lies in a folder."""
    return list(folder.rglob("*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """A run with everything switched on: what it printed and its folder."""
    folder = tmp_path_factory.mktemp("whole") / "here"
    more = ["train.steps=12", "data.val_fraction=0.001", "train.eval_every=5", "train.measure_every=4", "seed=0"]
    done = run(folder, *SMALL, *more, "optimizer.grad_clip=1.0", "train.grad_accum_steps=2")
    return done, the_run(folder)


class TestWhole:
    """One run leaves every file of the contract."""

    def test_exit_and_files(self, whole: tuple[Done, Path]) -> None:
        done, folder = whole
        assert (done.returncode, done.stderr) == (0, "")
        assert folder.relative_to(folder.parents[2]).parts[0] == "runs"
        assert {path.name for path in folder.iterdir()} >= {
            ".hydra",
            "run.log",
            "metrics.jsonl",
            "status.json",
            "summary.json",
            "wandb",
        }
        assert {path.name for path in (folder / ".hydra").iterdir()} >= {"config.yaml", "overrides.yaml", "hydra.yaml"}
        assert not list(folder.rglob("*.part"))

    def test_metrics(self, whole: tuple[Done, Path]) -> None:
        rows = read(whole[1] / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(12))
        assert [row["tokens"] for row in rows] == [2 * 2 * 8 * (step + 1) for step in range(12)]
        for row in rows:
            for key in ("step", "loss", "tokens", "tokens_per_second", "step_ms", "lr"):
                assert math.isfinite(row[key])
            assert row["tokens_per_second"] == pytest.approx(32 / row["step_ms"] * 1e3)
        for key in ("grad_norm", "loss_unseen"):
            assert {row["step"] for row in rows if key in row} >= {0, 4, 8, 11}
        assert [row["step"] for row in rows if "val_loss" in row] == [4, 9, 11]

    def test_status(self, whole: tuple[Done, Path]) -> None:
        status = read(whole[1] / "status.json")
        assert (status["state"], status["step"], status["error"]) == ("done", 12, None)

    def test_summary_has_every_field(self, whole: tuple[Done, Path]) -> None:
        number = (int, float)
        kinds: dict[str, Any] = {
            "state": str,
            "overrides": list,
            "config": dict,
            "seed": int,
            "loss_first": float,
            "loss_last": float,
            "loss_mean_last10": float,
            "val_loss": float,
            "loss_unseen_first": float,
            "loss_unseen_last": float,
            "steps": int,
            "tokens": int,
            "step_ms": {"median": number, "p10": number, "p90": number},
            "first_step_ms": number,
            "tokens_per_second": number,
            "speed_disturbed": (*number, type(None)),
            "flops_per_token": int,
            "mfu": type(None),  # the peak of this processor is unknown
            "peak_memory_bytes": int,
            "wall_seconds": {"startup": number, "train": number, "total": number},
            "parameters": dict.fromkeys(("total", "without_tying", "wte", "wpe", "lm_head", "blocks"), int),
            "precision": {"requested": str, "effective": str, "emulated": bool, "matmul_relative_error": float},
            "data": {
                "name": str,
                "sha256": str,
                **dict.fromkeys(("tokens", "distinct_tokens", "train_tokens", "val_tokens"), int),
            },
            "device": str,
            "threads": int,
            "versions": dict,
            "git": (dict, type(None)),
            "started": str,
        }
        summary = read(whole[1] / "summary.json")
        for key, kind in kinds.items():
            for inner, expected in kind.items() if isinstance(kind, dict) else [(None, kind)]:
                value = summary[key] if inner is None else summary[key][inner]
                assert isinstance(value, expected), f"{key}.{inner}: {value!r}"

    def test_summary_agrees_with_the_metrics(self, whole: tuple[Done, Path]) -> None:
        summary, rows = read(whole[1] / "summary.json"), read(whole[1] / "metrics.jsonl")
        losses = [row["loss"] for row in rows]
        assert (summary["loss_first"], summary["loss_last"]) == (losses[0], losses[-1])
        assert summary["loss_mean_last10"] == pytest.approx(sum(losses[-10:]) / 10)
        assert summary["val_loss"] == rows[-1]["val_loss"]
        assert (summary["loss_unseen_first"], summary["loss_unseen_last"]) == (
            rows[0]["loss_unseen"],
            rows[-1]["loss_unseen"],
        )
        assert (summary["steps"], summary["tokens"]) == (12, rows[-1]["tokens"])
        assert summary["first_step_ms"] == rows[0]["step_ms"]
        assert summary["step_ms"]["p10"] <= summary["step_ms"]["median"] <= summary["step_ms"]["p90"]
        assert summary["seed"] == summary["config"]["seed"] == 0
        assert summary["overrides"][: len(SMALL)] == SMALL
        assert summary["config"]["optimizer"]["grad_clip"] == 1.0
        data = summary["data"]
        assert (data["tokens"], data["distinct_tokens"]) == (338_025, 11_706)
        assert data["train_tokens"] + data["val_tokens"] == data["tokens"]
        assert data["val_tokens"] == 338
        wall = summary["wall_seconds"]
        assert wall["startup"] + wall["train"] == pytest.approx(wall["total"], abs=0.01)

    def test_what_is_printed(self, whole: tuple[Done, Path]) -> None:
        done, folder = whole
        rows = read(folder / "metrics.jsonl")
        for row in rows:
            assert f"step {row['step']:5d} | loss {row['loss']:9.6f} | " in done.stdout
        assert done.stdout.count(" tok/s") == len(rows)
        assert "ln 50257 = 10.825" in done.stdout
        assert "11,706 of 50,257 ids occur" in done.stdout
        (sync,) = [line for line in done.stdout.splitlines() if line.startswith("to upload: wandb sync ")]
        assert (folder.parents[2] / sync.removeprefix("to upload: wandb sync ")).is_dir()
        assert done.stdout == (folder / "run.log").read_text()
        assert "\x1b" not in done.stdout


class TestWithoutTorch:
    """What needs no model answers without loading torch."""

    def test_help(self, tmp_path: Path) -> None:
        done = run(tmp_path / "here", "--help", program=IMPORTS)
        assert (done.returncode, without_imports(done)) == (0, [])
        assert {"hydra", "gpt2exp"} <= imported(done)
        assert not {"torch", "wandb", "tiktoken"} & imported(done)
        for group in ("model=gpt2|", "init=gpt2|", "precision=fp32|", "data=tinyshakespeare|", "optimizer=", "wandb="):
            assert group in done.stdout
        lines = [line.split() for line in done.stdout.splitlines()]
        keys = [words[0] for words in lines if words and "." in words[0] and "=" in words[0]] + ["seed="]
        assert len(keys) >= 10
        assert sum(words[:1] == ["gpt2exp"] and len(words) > 1 for words in lines[2:]) >= 5
        assert not written(tmp_path / "here")

    def test_cfg_job(self, tmp_path: Path) -> None:
        done = run(tmp_path / "here", "--cfg", "job", "model=nano", program=IMPORTS)
        assert (done.returncode, without_imports(done)) == (0, [])
        assert not {"torch", "wandb", "tiktoken"} & imported(done)
        assert "  n_embd: 64\n" in done.stdout
        assert "seed: 1337\n" in done.stdout
        assert not written(tmp_path / "here")

    def test_bad_key(self, tmp_path: Path) -> None:
        """Exit code 2, one line, no traceback, an empty folder."""
        done = run(tmp_path / "here", "model.n_layers=6", program=IMPORTS)
        assert (done.returncode, done.stdout) == (2, "")
        assert one_line(done) == "model.n_layers=6: no such key; did you mean model.n_layer?"
        assert not {"torch", "wandb", "tiktoken"} & imported(done)
        assert not written(tmp_path / "here")


@pytest.mark.parametrize(
    ("args", "shown"),
    [
        (
            ["-m", "model=gpt2,gpt2-xl", "model.tie_weights=true,false", "dry_run=true"],
            ["124,439,808", "163,037,184", "1,557,611,200", "1,638,022,400", " 6,400 ", "fp32: fp32 on cpu"],
        ),
        (
            [*SMALL, "optimizer.schedule=cosine", "optimizer.schedule_steps=6000", "dry_run=true"],
            [" 50 (schedule 6,000) "],
        ),
        (["-m", *SMALL, "dry_run=false,true"], ["811,728"]),
    ],
    ids=["exact counts", "a longer schedule", "in any job"],
)
def test_dry_run(
    args: list[str], shown: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The table, and nothing written, though a later job alone asks for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    assert launch.command(args) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert not [text for text in shown if text not in out]
    assert not written(tmp_path)


class TestText:
    """`data=text` on the user's own file."""

    def test_a_file(self, tmp_path: Path) -> None:
        folder = tmp_path / "here"
        folder.mkdir()
        (folder / "my book.txt").write_text("It was the best of times, it was the worst of times. " * 40)
        more = ["data=text", "data.path='my book.txt'", "train.steps=2", QUIET]
        done = run(folder, *SMALL, *more)
        assert (done.returncode, done.stderr) == (0, "")
        data = read(the_run(folder) / "summary.json")["data"]
        assert data["name"] == "my book.txt"
        assert data["distinct_tokens"] < 20 < 400 < data["tokens"]
        assert not (the_run(folder) / "wandb").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """It closes its record, says so, and ends with the shell's code."""
    process = start(tmp_path / "here", *SMALL, "train.steps=9", QUIET, held=":5")
    with at_step(tmp_path / "here", process) as (folder, held):
        held.send_signal(number)
    done = finish(process)
    assert shell_code(done) == code
    assert "Traceback" not in done.stderr
    status, summary = read(folder / "status.json"), read(folder / "summary.json")
    assert (status["state"], summary["state"]) == ("interrupted", "interrupted")
    assert summary["steps"] == status["step"] == len(read(folder / "metrics.jsonl")) == 6
    assert "interrupted" in done.stdout


def test_a_diverging_run(tmp_path: Path) -> None:
    done = run(tmp_path / "here", *SMALL, "optimizer.lr=1e9", QUIET)
    folder = the_run(tmp_path / "here")
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: loss became nan at step 1"]
    status, summary = read(folder / "status.json"), read(folder / "summary.json")
    assert (status["state"], summary["state"]) == ("diverged", "diverged")
    assert status["error"] == summary["error"] == "loss became nan at step 1"
    assert summary["steps"] == 1
    log = (folder / "run.log").read_text()
    assert "Traceback" in log, "the log keeps what the terminal is spared"


@pytest.fixture(scope="module")
def alone() -> list[str]:
    """The program in a network namespace of its own, which reaches nothing."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-n", "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare -n is not permitted here, so the network cannot be taken away")
    return [unshare, "-n", *PROGRAM]


def test_a_run_that_its_last_update_breaks(tmp_path: Path) -> None:
    """The loss is finite and the validation loss is not: the record is still closed."""
    more = ["optimizer.lr=1e38", "train.steps=1", "data.val_fraction=0.001", QUIET]
    done = run(tmp_path / "here", *SMALL, *more)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: val_loss became nan at step 0"]
    assert read(the_run(tmp_path / "here") / "summary.json")["state"] == "diverged"


class TestWithoutNetwork:
    """A machine that reaches nothing at all."""

    @pytest.mark.slow
    def test_warm_cache(self, tmp_path: Path, alone: list[str]) -> None:
        done = run(tmp_path / "here", *SMALL, "train.steps=2", program=alone)
        assert (done.returncode, done.stderr) == (0, "")
        assert read(the_run(tmp_path / "here") / "summary.json")["state"] == "done"

    def test_cold_cache(self, tmp_path: Path, alone: list[str]) -> None:
        cache = tmp_path / "cache"
        done = run(tmp_path / "here", *SMALL, program=alone, GPT2EXP_CACHE=str(cache))
        assert (done.returncode, done.stdout) == (1, "")
        *why, what = done.stderr.splitlines()
        assert what.startswith(
            "gpt2exp: tinyshakespeare.txt: not in the cache and no source could be reached; get http"
        )
        assert what.endswith(f"place it at {cache / 'assets' / 'tinyshakespeare.txt'}")
        assert [line.split(":")[0] for line in why] == ["warning", "warning"]  # a line for each source tried
        assert not written(tmp_path / "here")
        assert not [path for path in written(cache) if path.is_file()]
