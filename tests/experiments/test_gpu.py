"""`experiments/gpu.py` runs each of its steps on the CPU, reports those it did not run, and leaves the findings
unchanged.

What it measures on a GPU is tested in `tests/gpu/`.
"""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FINDINGS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script."""
    monkeypatch.syspath_prepend(str(FINDINGS))
    for name in ("publish", "claims", "gpu"):
        sys.modules.pop(name, None)
    return importlib.import_module("gpu")


def session(gpu: Any, folder: Path, ends: float = 60) -> Any:
    """A rehearsal with so many seconds left."""
    (folder / "gpu").mkdir()
    return gpu.Session(gpu.REHEARSAL, folder, folder / "gpu", time.monotonic() + ends)


@pytest.mark.slow
def test_the_rehearsal(gpu: Any, tmp_path: Path) -> None:
    before = (FINDINGS / "README.md").read_text()
    out = tmp_path / "gpu"
    line = [sys.executable, str(FINDINGS / "gpu.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert list(results["stages"]) == list(gpu.stages(gpu.REHEARSAL))
    assert not [name for name, stage in results["stages"].items() if "not_run" in stage]
    page = (out / "README.md").read_text()
    assert "**A rehearsal on a CPU: the figures say only that every line ran.**" in page
    for text in (
        "the card crops (emulated)",
        "| fp32, compiled | ",
        " passed, 0 skipped, 0 failed",
        "tf32 against fp32",
    ):
        assert text in page
    written = [f"{name}{end}" for name in ("precision", "throughput") for end in (".csv", "_runs.csv", "_runs.json")]
    kept = {"README.md", "results.json", *written}
    assert {path.name for path in out.iterdir()} == kept
    assert "measured" in (tmp_path / "README.md").read_text()
    assert (FINDINGS / "README.md").read_text() == before
    # the claims' rows, of results as a card would leave them
    stages = results["stages"]
    for name, factor in (("fp32", 3.0), ("tf32", 1.0)):
        stages[f"bench {name}"] = copy.deepcopy(stages["bench fp32, compiled"])
        stages[f"bench {name}"]["steps"][0]["ms"] = 100 * factor
    rows = {row.split(" | ")[0]: row for row in importlib.import_module("claims").index(results).splitlines()}
    assert "300 to 100 ms: 3.0 times" in rows["| TF32 is up to 8 times faster (1000 to 333 ms a step)"]
    assert "**holds** | [gpu](gpu/README.md)" in rows["| TF32 crops the mantissa"]
    assert "needs a GPU" not in "".join(rows.values())


def test_without_a_card_it_says_so(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--rehearse runs every line on the CPU")
    assert not (FINDINGS / "gpu").exists(), "a page of results exists only once they were run"


def test_a_stage_that_did_not_end_is_told_of(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not keep the others from running; earlier results stay."""

    def broken(_: Any) -> Any:
        raise RuntimeError("no kernel image")

    def slow(here: Any) -> Any:
        here.ends = time.monotonic() + 0.2
        return here.run("-c", "import time; time.sleep(60)")

    found = {"rounding": gpu.rounding, "loss": broken, "precision": slow, "throughput": gpu.rounding}
    monkeypatch.setattr(gpu, "stages", lambda _: found)
    began, here = time.monotonic(), session(gpu, tmp_path)
    gpu.carry_out(here, [], True)
    assert time.monotonic() - began < 50, "what runs when the time is over is ended"
    page = (here.out / "README.md").read_text()
    for text in ("- loss: not run, RuntimeError: no kernel image", "- precision: not run, the time was over"):
        assert text in page
    assert "- throughput: not run, the time was over" in page
    assert "the card crops (emulated)" in page
    found["loss"] = gpu.loss
    here.ends = time.monotonic() + 60
    gpu.carry_out(here, ["loss"], True)
    page = (here.out / "README.md").read_text()
    assert "## The loss in chunks" in page
    assert "- precision: not run, the time was over" in page


def test_each_prediction_stands_beside_its_measurement(gpu: Any) -> None:
    step = {"mode": "eager", "precision": "tf32", "batch": 16, "ms": 100.0, "gb": 12.6}
    found = {"bench tf32": {"steps": [step]}, "throughput": {"steps": [step | {"batch": 17}]}, "loss": {}}
    about = {"rehearsal": False, "device": "NVIDIA H100 80GB HBM3"}
    page = gpu.beside_predictions(found, about)
    assert "| tf32, eager, batch 16 | bench | 94 | 100 | -6% | 12.0 | 12.6 | -5% |" in page
    assert "| tf32, eager, batch 17 | throughput | 100 | 100 | -0% | 12.6 | 12.6 | +0% |" in page
    other = gpu.beside_predictions(found, about | {"device": "NVIDIA L4"})
    assert "No prediction was made for this card." in other
    assert "| tf32, eager, batch 16 | bench |  | 100 |  |  | 12.6 |  |" in other


def test_the_peers_stand_beside_the_program(gpu: Any) -> None:
    ratio = {"ms_median": {"median": 0.8, "min": 0.5, "max": 1.0, "n": 2}}
    one = {"precision": "bf16", "steps": [{"mode": "compiled", "ms": 62.4}], "ratios": {"hf, compiled": ratio}}
    assert "| bf16, compiled | 62 | hf, compiled | 1.25 (1.00 to 2.00) | 2 |" in gpu.bench_section({"bench": one}, {})
