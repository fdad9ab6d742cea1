"""`sweep.reuse`: a run of another sweep that equals a job is taken, and the job is not run. The reason why a run is not
taken is printed. The other sweep stays as it is. A speed is compared only if it was measured alike.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from support import SMALL, read
from test_engines import here, the_sweep

from gpt2exp.compare.comparison import compare
from gpt2exp.compare.comparison import read as rows_of
from gpt2exp.run import record
from gpt2exp.sweep import launch, request, reuse
from gpt2exp.sweep.composing import arguments
from gpt2exp.sweep.overrides import as_meant

TINY = [*SMALL, "train.steps=3", "wandb.mode=disabled", "data=text"]
BASE = ["-m", "optimizer.lr=1e-3,3e-3", "seed=1,2"]
MORE = ["-m", "optimizer.lr=1e-3,1e-2", "seed=1,2,3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of two learning rates over two seeds."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    assert here(folder, *BASE, *TINY, f"data.path={folder / 'text.txt'}")[0] == 0
    return the_sweep(folder)


def words(base: Path, *more: str) -> list[str]:
    """The overrides of a later sweep, which has one of the two arms and one more seed."""
    return [*MORE, *TINY, f"data.path={base.parents[2] / 'text.txt'}", f"sweep.reuse={base}", *more]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """The runs that are trained from here on: seed and learning rate."""
    begun: list[tuple[int, float]] = []
    real = launch.run_folder

    def counting(folder: Path, began: float) -> Any:
        summary = real(folder, began)
        begun.append((summary["config"]["seed"], summary["config"]["optimizer"]["lr"]))
        return summary

    monkeypatch.setattr(launch, "run_folder", counting)
    return begun


@pytest.fixture(scope="module")
def later(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The later sweep. It counts the other's runs as its own, in the comparison too, and leaves them every byte."""
    folder = tmp_path_factory.mktemp("later")
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        begun = counted(patch)
        code, out, err = here(folder, *words(base))
    assert (code, err) == (0, "")
    asked = {(seed, lr) for seed in (1, 2, 3) for lr in (1e-3, 1e-2)}
    there = {(seed, lr) for seed in (1, 2) for lr in (1e-3, 3e-3)}
    assert sorted(begun) == sorted(asked - there)
    assert f"sweep.reuse: 2 of 4 runs are taken from {base}, and not run" in out
    assert f"sweep.reuse: {base}: not taken, 2: optimizer.lr=0.003, here 0.001\n" in out, "as the first arm has it"
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
    return the_sweep(folder)


def test_what_is_there_is_not_run(base: Path, later: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reused run keeps its figures; the sweep can be resumed as any other."""
    sweep = shutil.copytree(later, tmp_path / "sweep")
    for seed in (1, 2):
        (mine,), (theirs,) = (folder.glob(f"*lr=0.001,seed={seed}") for folder in (sweep, base))
        assert (mine / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        told = read(mine / "summary.json")
        assert told.pop("reused") == {"from": str(theirs), "shared": False}
        known = read(theirs / "summary.json")
        assert {key for key, value in told.items() if value != known[key]} <= {"overrides", "config"}
    (loss,) = [row for row in read(sweep / "comparison.json")["axes"] if row["metric"] == "loss_mean_last10"]
    assert (loss["n_seeds"], loss["arm"]) == (3, "0.01")
    for page in ("report.md", "report.html"):
        text = (sweep / page).read_text(encoding="utf-8")
        assert f"taken from other sweeps, not run here (sweep.reuse): 2 from {base}" in text.replace("\\_", "_")
    again = counted(monkeypatch)
    assert here(tmp_path, f"resume={sweep}", "seed=4")[0] == 0
    assert sorted(again) == [(4, 1e-3), (4, 1e-2)]


def test_dry(base: Path, tmp_path: Path) -> None:
    code, out, _ = here(tmp_path, *words(base), "dry_run=true")
    assert (code, out.count("(taken)")) == (0, 2)
    assert not any(tmp_path.iterdir())


def test_until_it_is_answered(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed is not begun because its runs exist in another sweep."""
    begun = counted(monkeypatch)
    asked = [word for word in words(base) if not word.startswith("seed=")]
    assert here(tmp_path, *asked, "sweep.until=answered", "sweep.max_seeds=3")[0] == 0
    assert sorted(begun) == [(1, 1e-2), (2, 1e-2), (3, 1e-3), (3, 1e-2)]


def changed(base: Path, folder: Path, **facts: Any) -> Path:
    """A copy of the sweep whose summaries say something else."""
    copy = folder / "copy"
    shutil.copytree(base, copy)
    for path in copy.glob("*/summary.json"):
        summary = read(path)
        for key, value in facts.items():
            summary[key] = summary[key] | value if isinstance(value, dict) else value
        path.write_text(json.dumps(summary))
    return copy


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"versions": {"code": "123"}}, "2: the code of gpt2exp was 123, here "),
        ({"versions": {"torch": "1.0"}}, "2: torch was 1.0, here "),
        ({"versions": {"wandb": "1.0"}}, ""),
        ({"data": {"sha256": "123"}}, "2: it was trained on another text (sha256)"),
        ({"state": "failed"}, "4: its state is failed"),
    ],
)
def test_what_stands_in_the_way(facts: dict[str, Any], line: str, base: Path, tmp_path: Path) -> None:
    copy = changed(base, tmp_path, **facts)
    code, out, _ = here(tmp_path / "there", *words(copy)[:-1], f"data.path={base.parents[2] / 'text.txt'}",
                        f"sweep.reuse={copy}", "dry_run=true")  # fmt: skip
    assert code == 0
    assert out.count("(taken)") == (0 if line else 2)
    assert f"not taken, {line}" in out


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"machine": "another"}, "the arms ran on different machines"),
        ({"threads": 77}, "the arms ran on different hardware"),
        ({"parts": [{"from_step": 0, "started": "2026-01-01T00:00:00+00:00", "startup": 1.0, "train": 9.0,
                     "machine": "a", "span": [0.0, 9.0]}]}, "runs shared the machine while they were timed"),
        ({"speed_disturbed": 0.9}, r"in \d of 6 runs most steps waited for a core that another program used"),
    ],
)  # fmt: skip
def test_a_speed_that_was_measured_otherwise(
    facts: dict[str, Any], reason: str, base: Path, later: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is compared, the speed is not, and the reason is said."""
    monkeypatch.setattr("gpt2exp.training.load.TOO_MANY", 0.8)
    copy, sweep = changed(base, tmp_path, **facts), shutil.copytree(later, tmp_path / "later")
    asked = [word for word in words(base) if not word.startswith("sweep.reuse=")]
    plan = request.new_request(arguments([*map(as_meant, [*asked, f"sweep.reuse={copy}"])]))
    texts = {job.config.data.text: read(copy / "000_optimizer.lr=0.001,seed=1" / "summary.json")["data"]["sha256"]
             for job in plan.jobs}  # fmt: skip
    taken = [job for job in reuse.found(plan.jobs, texts, sweep)[0] if job.reused]
    assert len(taken) == 2
    for job in taken:
        reuse.take(job, sweep / job.folder)
    rows = {effect.metric: effect for effect in compare(rows_of([sweep])).axes}
    assert rows["loss_mean_last10"].n_seeds == 3
    assert rows["loss_mean_last10"].ci95 is not None
    assert rows["tokens_per_second"].verdict == "not_comparable"
    assert re.fullmatch(reason, rows["tokens_per_second"].reason)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["-m", "seed=1,2", "sweep.reuse=nowhere"], r"sweep\.reuse=nowhere: no such folder; name run or sweep"),
        (["-m", "seed=1,2", "sweep.reuse=empty"], r"sweep\.reuse=empty: holds no run"),
        (["sweep.reuse=empty"], r"sweep\.reuse=\[empty\]: one run has no arms to compare; add -m"),
    ],
)
def test_refused(typed: list[str], line: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    code, _, err = here(tmp_path, *typed, *TINY[:-1])
    assert code == 2
    assert re.match(f"gpt2exp: {line}", err)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_several_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Separated by commas; a folder whose name has one is one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    for typed, folders in (("a,b", ["a,b"]), ("a,c", ["a", "c"]), ("'a,c'", ["a", "c"]), ("['a','c']", ["a", "c"])):
        args, _ = launch.parsed(["-m", "seed=1,2", f"sweep.reuse={typed}"])
        assert request.new_request(args).jobs[0].config.sweep.reuse == folders


def test_the_code_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hash changes with any file that a loss depends on, and with no other."""
    was, package = record.facts()["versions"]["code"], Path(record.__file__).parents[1]
    copy = tmp_path / "gpt2exp"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(record, "__file__", str(copy / "run" / "record.py"))
    first = record._code()
    (copy / "compare" / "words.py").write_text("# another\n")
    assert record._code() == first
    seen = {first}
    for name in ("model/gpt.py", "data/batches.py", "training/trainer.py", "run/job.py", "config.py"):
        (copy / name).write_text((copy / name).read_text() + "# another\n")
        assert record._code() not in seen
        seen.add(record._code())
        assert record.facts()["versions"]["code"] == was, "a process says what it runs, whatever is edited meanwhile"
