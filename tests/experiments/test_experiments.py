"""The committed findings: the index follows from the records beside it, and every study has a page."""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FINDINGS = ROOT / "experiments"
STUDIES = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


def block(page: str, name: str) -> str:
    """What stands between a page's markers."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", page, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_index_follows_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FINDINGS))
    for name in ("publish", "claims"):
        sys.modules.pop(name, None)
    publish = importlib.import_module("publish")
    assert block((FINDINGS / "README.md").read_text(), "claims") == publish.index()
    assert block((ROOT / "conf" / "README.md").read_text(), "keys") == publish.key_tables()
    tables = f"{publish.bench_table()}\n\n{publish.floor_table()}"
    assert block((FINDINGS / "throughput" / "README.md").read_text(), "bench") == tables


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_has_its_finding(study: str) -> None:
    folder = FINDINGS / study
    page = (folder / "README.md").read_text()
    for heading in ("**Question.**", "**What is said.**", "**Method.**", "## Result", "## Reading", "## Limits"):
        assert heading in page
    assert f"gpt2exp experiment={study}" in page
    assert re.search(r"- commit: [0-9a-f]{40}", block(page, "results"))
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert pictures
    assert all((folder / picture).stat().st_size > 1000 for picture in pictures)
    with (folder / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    assert len({run["seed"] for run in runs}) >= 5
    assert {run["state"] for run in runs} == {"done"}
    assert {run["dirty"] for run in runs} == {"False"}, "findings come from committed code"


def test_every_effect_stands_on_its_page() -> None:
    for path in FINDINGS.glob("*/results.csv"):
        page = (path.parent / "README.md").read_text()
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                assert f"{row['arm']} against {row['baseline']}" in page


def test_tokenising_is_timed(cold: Path, tmp_path: Path) -> None:
    """The script that the page on data names runs as it says, and counts the tokens."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "To be, or not to be"}\n' * 3)
    script = FINDINGS / "throughput" / "tokenise.py"
    done = subprocess.run([sys.executable, script, text, "1"], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"23 tokens, rate over tiktoken's \d+\.\d\d\n", done.stdout)
