"""The committed findings: the index follows from the records beside it, and every study has a page."""

from __future__ import annotations

import csv
import importlib
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SMALL

from gpt2exp.sweep import launch

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "experiments"
PRESETS = ROOT / "conf" / "experiment"
STUDIES = sorted(path.relative_to(PRESETS).with_suffix("").as_posix() for path in PRESETS.rglob("*.yaml"))
"""`NAME`, and `NAME/gpt2` for the same question at GPT-2's own scale."""


def block(page: str, name: str) -> str:
    """What stands between a page's markers."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_index_follows_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FINDINGS))
    for name in ("publish", "claims"):
        sys.modules.pop(name, None)
    publish, claims = importlib.import_module("publish"), importlib.import_module("claims")
    assert block((FINDINGS / "README.md").read_text(), "claims") == claims.index()
    assert block((ROOT / "conf" / "README.md").read_text(), "keys") == publish.key_tables()
    page = (FINDINGS / "throughput" / "bench" / "README.md").read_text()
    assert block(page, "bench") == publish.bench_tables()


@pytest.mark.parametrize("study", STUDIES)
def test_a_page_follows_from_its_record(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By today's rules: who changes a rule publishes the pages again, which needs no sweep and no training."""
    monkeypatch.syspath_prepend(str(FINDINGS))
    publish = importlib.import_module("publish")
    comparison, record = publish.recorded(study), publish.Record(study)
    assert block(record.page.read_text(), record.block) == publish.results(study, comparison)
    assert record.results.read_text() == publish.report.table(comparison)
    if comparison.margin is None:
        assert "indistinguishable" not in {effect.verdict for effect in comparison.axes}


def test_a_sweep_becomes_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page, the tables and the figures, from the comparison itself."""
    monkeypatch.syspath_prepend(str(FINDINGS))
    monkeypatch.chdir(tmp_path)
    publish = importlib.import_module("publish")
    monkeypatch.setattr(publish, "HERE", tmp_path)
    words = [*SMALL, "wandb.mode=disabled", "train.steps=20", "train.batch_size=1", "train.seq_len=16"]
    words += ["data.val_fraction=0.001", "hydra.sweep.dir=sweep"]
    assert launch.command(["-m", "init.std=0.02,0.04", "seed=1,2", *words]) == 0
    page = tmp_path / "init_std" / "README.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    publish.publish("init_std", [tmp_path / "sweep"])
    text = page.read_text()
    assert "sweep.dir" not in text
    publish.publish("init_std", [])
    assert page.read_text() == text, "the record says all that the sweep does"
    assert publish.effect("init_std", "init.std", "0.04", "val_loss")["trend"], "also what only the losses say"
    assert text.startswith("before\n<!-- results -->\n- ")
    assert "STALE" not in text
    for part in (
        "init.std=0.04",
        "0.04 against 0.02",
        "![loss](loss.png)",
        "by `gpt2exp -m init.std=0.02,0.04 seed=1,2 ",
        "[runs.json](runs.json)",
    ):
        assert part in text
    assert (page.parent / "loss.png").stat().st_size > 1000
    (row, *_) = publish.runs_of("init_std")
    assert (row["state"], len(publish.runs_of("init_std"))) == ("done", 4)
    assert len(publish.having(publish.runs_of("init_std"), "init.std=0.04")) == 2
    assert publish.effect("init_std", "init.std", "0.04", "val_loss")["n_seeds"] == "2"
    reproduce = importlib.import_module("reproduce")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "init_std"])
    capsys.readouterr()
    assert reproduce.main() == 0, "the same processor"
    assert capsys.readouterr().out == f"init_std: {row['name']}: equal\n"
    with monkeypatch.context() as changed:
        changed.setattr(reproduce, "again", lambda known, _: known | dict.fromkeys(reproduce.LOSSES, 7.0))
        assert reproduce.main() == 1
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision" / "README.md").write_text("<!-- speed -->\n<!-- /speed -->\n")
    publish.publish("precision/speed", [tmp_path / "sweep"])
    assert "speed, ratio" in (tmp_path / "precision" / "README.md").read_text()
    assert "loss, nats" not in (tmp_path / "precision" / "README.md").read_text()
    assert sorted(path.name for path in (tmp_path / "precision").iterdir())[1:] == [
        "speed-results.csv",
        "speed.csv",
        "speed.json",
    ]


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_its_finding(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FINDINGS))
    publish = importlib.import_module("publish")
    record = publish.Record(study)
    folder, page = record.page.parent, record.page.read_text()
    for heading in ("**Question.**", "**What is said.**", "**Method.**", "## Result", "## Reading", "## Limits"):
        assert heading in page
    assert f"gpt2exp experiment={study}" in page
    assert len(page.splitlines()) <= 60
    assert "/tmp/" not in page
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert pictures
    assert all((folder / picture).stat().st_size > 1000 for picture in pictures)
    with record.stem.with_suffix(".csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert len({run["seed"] for run in runs}) >= 5
    assert {run["state"] for run in runs} == {"done"}
    for known in (publish.facts(study, run) for run in runs):
        assert re.fullmatch("[0-9a-f]{40}", known["git.commit"])
        assert known["git.dirty"] is False, "findings come from committed code"


@pytest.mark.parametrize("study", [study for study in STUDIES if study not in ("first_steps", "throughput")])
def test_a_study_of_the_loss_states_its_margin_and_why(study: str) -> None:
    """Or no later run of it could find arms equal: first_steps has one arm, throughput asks for the speed."""
    preset = (PRESETS / f"{study}.yaml").read_text()
    assert re.search(r"^sweep:\n  margin: 0\.\d+ # .{20,}$", preset, re.MULTILINE)


def test_every_effect_stands_on_its_page() -> None:
    for path in FINDINGS.glob("*/*results.csv"):
        page = (path.parent / "README.md").read_text()
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert f"{row['arm']} against {row['baseline']}" in page


@pytest.fixture
def lr_search(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script beside the search."""
    monkeypatch.syspath_prepend(str(FINDINGS / "lr_search"))
    return importlib.import_module("optimum")


def test_the_optimum_of_a_search(lr_search: Any) -> None:
    """The vertex of numpy's own fit, with an interval that holds the truth as often as it says."""
    x = np.linspace(-7, -3, 9)
    assert lr_search.vertex(x, 2 + (x + 4.5) ** 2) == pytest.approx([-4.5] * 3)
    assert lr_search.vertex(x, (2 - (x + 4.5) ** 2)) is None, "a hill has no least"
    assert lr_search.vertex(x, (2 + (x + 9) ** 2)) is None, "beyond the values"
    random, held = np.random.default_rng(1), 0
    for _ in range(400):
        y = (x + 4.5) ** 2 + random.normal(0, 0.2, len(x))
        _, b, a = np.polynomial.polynomial.polyfit(x, y, 2)
        low, at, high = lr_search.vertex(x, y)
        assert at == pytest.approx(-b / (2 * a))
        held += low <= -4.5 <= high
    assert 0.92 < held / 400 < 0.98


def test_a_search_is_read_from_its_comparison(lr_search: Any) -> None:
    rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    losses = [8 + (math.log10(rate) + 2.9) ** 2 + noise for rate, noise in zip(rates, (0.01, -0.01) * 3, strict=False)]
    told = [
        {"state": "done", "val_loss": y, "overrides": ["model=nano", f"optimizer.lr={x}"]}
        for x, y in zip(rates, losses, strict=True)
    ]
    told.append({"state": "diverged", "overrides": ["model=nano", "optimizer.lr=1.0"]})
    comparison = {"swept": {"optimizer.lr": []}, "metric": "val_loss", "runs": told}
    text = lr_search.optimum(comparison)
    assert re.match(r"of 5 values tried, optimizer\.lr=0\.001 ended with the least val_loss, 8\.0\d+; a parabola", text)
    low, at, high = map(float, re.search(r"least at (\S+) .*interval (\S+) to (\S+)\)", text).group(2, 1, 3))
    assert low < at < high
    assert at == pytest.approx(10**-2.9, rel=0.1)
    assert text.endswith(f"gpt2exp -m seed=1,2,3,4,5 optimizer.lr={low:g},{at:g},{high:g} model=nano")
    with pytest.raises(ValueError, match="2 values with a loss; 5 are needed"):
        lr_search.optimum(comparison | {"runs": told[:2]})


def test_tokenising_is_timed(cold: Path, tmp_path: Path) -> None:
    """The script that the page on data names runs as it says, and counts the tokens."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "To be, or not to be"}\n' * 3)
    script = FINDINGS / "throughput" / "tokenise.py"
    done = subprocess.run([sys.executable, script, text, "1"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"23 tokens, rate over tiktoken's \d+\.\d\d\n", done.stdout)


def test_the_table_of_findings_follows_from_the_records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(FINDINGS))
    publish = importlib.import_module("publish")
    here = shutil.copytree(FINDINGS, tmp_path / "here", ignore=shutil.ignore_patterns("*.png"))
    monkeypatch.setattr(publish, "HERE", here)
    publish.publish_findings()
    for name in ("README.md", "findings.csv"):
        assert (here / name).read_text() == (FINDINGS / name).read_text()


def test_the_intervals_from_curves_hold_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """The committed simulation is in 93 to 97 %; its page has its figures; and it runs, on fewer sweeps."""
    monkeypatch.syspath_prepend(str(FINDINGS / "coverage"))
    sys.modules.pop("intervals", None)
    simulate = importlib.import_module("intervals")
    with (FINDINGS / "coverage" / "coverage.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = [row for row in rows if float(row["read"]) > 0.05]
    assert len(read) > 60
    assert all(0.93 <= float(row["coverage"]) <= 0.97 for row in read)
    assert all(int(row["sweeps"]) >= 4000 for row in rows)  # known to 0.35 %
    assert block((FINDINGS / "coverage" / "README.md").read_text(), "table") == simulate.table(rows)
    again = [row for row in simulate.simulate(sweeps=20) if row["coverage"]]
    assert 0.93 <= np.mean([float(row["coverage"]) for row in again]) <= 0.97


def test_growths_page_follows_from_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FINDINGS / "throughput"))
    growth = importlib.import_module("growth")
    sizes = growth.read()
    assert {size.series for size in sizes} == growth.SERIES.keys()
    assert growth.table(sizes) in (growth.HERE / "README.md").read_text()


def test_whole_commands_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In turn, in a folder of their own; the rows of another job stay. The shipped page has the shipped table."""
    monkeypatch.syspath_prepend(str(FINDINGS / "throughput"))
    whole = importlib.import_module("whole")
    shipped = whole.PAGE.read_text()
    with whole.TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert block(shipped, "whole") == whole.table(rows)
    page, table = tmp_path / "README.md", tmp_path / "whole.csv"
    page.write_text("<!-- whole -->\n<!-- /whole -->\n")
    monkeypatch.setattr(whole, "PAGE", page)
    monkeypatch.setattr(whole, "TABLE", table)
    steps = """open("metrics.jsonl", "x").write('{"step_ms": 1.0}\\n{"step_ms": 2.0}\\n')"""
    ours, other = f"{sys.executable} -c {shlex.quote(steps)}", f"{sys.executable} -c pass"
    for job in ("first", "second", "first"):
        monkeypatch.setattr(sys, "argv", ["whole.py", job, ours, f"other={other}", "--rounds", "2"])
        whole.main()
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["gpt2exp", "other"] * 2
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["name"], row["round"]) for row in rows] == [
        (job, name, number) for job in ("second", "first") for number in "12" for name in ("gpt2exp", "other")
    ]
    assert [row["of_steps"] for row in rows] == ["0.0", ""] * 4
    assert sys.executable not in page.read_text()  # no folder of this machine
    monkeypatch.setattr(sys, "argv", ["whole.py", "third", f"{sys.executable} -c 1/0"])
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        whole.main()
