"""`gpt2exp-compare --index` lists what every comparison below some folders found, with links that lead there."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_compare import TIE, arms

from gpt2exp.compare import __main__ as conclude
from gpt2exp.compare import comparison as comparisons
from gpt2exp.compare.comparison import Row


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two comparisons, one below the other's day; one of an older version; a file of another program."""
    monkeypatch.setattr("gpt2exp.compare.figures.draw", lambda _: [])

    def write(rows: list[Row], folder: Path) -> None:
        conclude.write(comparisons.compare(rows), folder)

    write(arms("optimizer.lr", {"0.0003": [3.0, 3.1, 2.9], "0.001": [2.5, 2.6, 2.41]}), tmp_path / "monday" / "a b#c")
    write(arms(TIE, {"true": [3.0, 3.1, 2.9], "false": [3.2, 3.31, 3.1]}), tmp_path / "tuesday")
    old = tmp_path / "tuesday" / "comparison.json"
    whole = json.loads(old.read_text())
    for row in whole["axes"]:
        del row["steps_factor"], row["compute_multiplier"], row["budget"]
    old.write_text(json.dumps(whole))
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "comparison.json").write_text('{"runs": 3}')
    return tmp_path


def test_a_page_and_a_table(sweeps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude.command(["--index", str(sweeps), "--out", str(sweeps / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 arms: " in said
    assert "strange/comparison.json cannot be read" in said
    with (sweeps / "out" / "index.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["question"], row["arm"], row["verdict"]) for row in rows] == [
        (TIE, "false", "worse"),
        ("optimizer.lr", "0.001", "better"),
    ]
    whole = json.loads((sweeps / "tuesday" / "comparison.json").read_text())
    [loss] = [row for row in whole["axes"] if row["metric"] == whole["metric"]]
    assert float(rows[0]["mean_difference"]) == loss["mean_difference"]
    assert [float(rows[0][f"ci95_{side}"]) for side in ("low", "high")] == loss["ci95"]
    day = min(run["started"] for run in whole["runs"])[:10]
    assert (rows[0]["date"], rows[0]["commit"]) == (day, "85f6eba")
    assert all((sweeps / "out" / unquote(row["report"])).resolve().is_file() for row in rows)
    page = (sweeps / "out" / "index.md").read_text()
    assert f"| {TIE}=false against true | +0.203 |" in page
    assert "**▼ worse**" in page
    assert "2 arms in 2 comparisons" in page
    assert 'class="verdict better"' in (sweeps / "out" / "index.html").read_text()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--index", "nowhere"], "nowhere: no such folder"),
        (["--index", "strange"], "cannot be read"),
        (["--index", "monday", "--margin", "0.1"], "--margin: --index compares nothing"),
    ],
)
def test_refused(
    sweeps: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sweeps)
    before = sorted(sweeps.rglob("*"))
    assert conclude.command(argv) == 2
    assert said in capsys.readouterr().err
    assert sorted(sweeps.rglob("*")) == before
