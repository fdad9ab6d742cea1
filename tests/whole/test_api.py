"""The package in Python: the page's example runs, and the functions do what the commands do, also in a thread and in a
notebook.
"""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support import SMALL, losses, read, run

import gpt2exp
from gpt2exp.schema import parse, plain

ROOT = Path(__file__).parents[2]
FEW = [*SMALL, "train.steps=3", "wandb.mode=disabled"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_example_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block of the package's page, on SMALL, as a cell is executed."""
    page = (ROOT / "gpt2exp" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(import gpt2exp\n.*?)^```$", page, re.M | re.S)
    block = block.replace('"model=nano", "train.steps=3"', ", ".join(f'"{word}"' for word in FEW))
    block = block.replace("val_fraction=0.1", "val_fraction=0.001")
    cell: dict[str, Any] = {}
    exec(compile(block, "cell", "exec"), cell)
    assert cell["summary"]["state"] == "done"
    assert len(cell["table"]) == 6
    assert {row["precision.name"] for row in cell["table"]} == {"fp32", "tf32"}
    assert {len(row) for row in cell["table"]} == {len(cell["table"][0])}
    assert all(isinstance(row["tokens_per_second"], float) for row in cell["table"])
    assert json.dumps(cell["table"])  # scalars alone
    assert len(cell["again"].rows) == 7
    assert (here / "sweeps" / "by-hand" / "report.html").is_file()


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp64"])
def test_a_step_by_hand_is_a_runs_step(here: Path, precision: str) -> None:
    """Bit for bit, with a trainer of another precision in between, which it leaves alone."""
    import torch

    config = gpt2exp.compose(*FEW, f"precision={precision}")
    one, other = gpt2exp.trainer(config), gpt2exp.trainer(gpt2exp.compose(*FEW, "precision=medium"))
    before = torch.get_float32_matmul_precision()
    by_hand = []
    for _ in range(3):
        by_hand.append(float(one.step()))
        other.step()
    assert torch.get_float32_matmul_precision() == before
    assert gpt2exp.run(config, here / "run")["state"] == "done"
    assert losses(here / "run") == by_hand
    rows = gpt2exp.trainer(config).fit()
    assert [row["loss"] for row in rows] == by_hand


def test_a_run_is_the_commands_run(here: Path) -> None:
    """The same losses and the same configuration, overrides that the comparison can tell arms by, and `resume=`."""
    words = [*FEW, "init=torch", "optimizer.betas=[0.8,0.9]", "wandb.tags=['a b',c]", "train.batch_size=4"]
    summary = gpt2exp.run(gpt2exp.compose(*words), "run")
    done = run(here / "other", *words)
    assert done.returncode == 0
    (other,) = (here / "other").glob("runs/*/*")
    assert losses(here / "run") == losses(other)
    assert summary["config"] == read(other / "summary.json")["config"]
    assert {"train.steps=3", "init.scheme=torch", "optimizer.betas=[0.8,0.9]"} <= set(summary["overrides"])
    more = gpt2exp.sweep(["resume=run", "train.steps=3"])
    assert [row["state"] for row in more.rows] == ["done"]


def test_runs_of_configurations_compare(here: Path) -> None:
    """Configurations changed in Python make an axis."""
    for layers in (1, 2):
        for seed in (1, 2):
            config = gpt2exp.compose(*FEW, f"seed={seed}", f"model.n_layer={layers}")
            gpt2exp.run(parse(plain(config) | {"seed": seed + 5}), here / f"{layers}-{seed}")
    found = gpt2exp.load(here).compare(out=here / "report")
    assert {effect.key for effect in found.axes} == {"model.n_layer"}
    assert (here / "report" / "report.md").is_file()


def test_bad_requests_raise_one_line(here: Path) -> None:
    for words, line in {
        ("model.n_layer=0",): "model.n_layer=0: must be at least 1",
        ("seed=1,2",): "seed=1,2: several values make a sweep",
        ("experiment=precision",): "several runs, or a resumed one",
        ("+wandb.api_key=12345678",): "credentials are no part of a request",
    }.items():
        with pytest.raises(gpt2exp.BadRequest, match=re.escape(line)):
            gpt2exp.compose(*words)
    with pytest.raises(gpt2exp.BadRequest, match="larger than the data"):
        gpt2exp.trainer(gpt2exp.compose(*FEW, "train.batch_size=100000"))
    (here / "full").mkdir()
    (here / "full" / "file").touch()
    with pytest.raises(gpt2exp.BadRequest, match="results are never overwritten"):
        gpt2exp.run(gpt2exp.compose(*FEW), "full")
    with pytest.raises(gpt2exp.BadRequest, match="holds no run"):
        gpt2exp.load(here)
    with pytest.raises(AttributeError):
        gpt2exp.nothing  # noqa: B018
    assert gpt2exp.api.__doc__


def test_a_failed_run_is_returned(here: Path) -> None:
    summary = gpt2exp.run(gpt2exp.compose(*FEW, "optimizer.lr=1e38"), "run")
    assert (summary["state"], summary["error"][:4]) == ("diverged", "loss")
    (row,) = gpt2exp.load("run").table()
    assert (row["state"], row["seed"], row["val_loss"]) == ("diverged", 1337, None)


def test_in_a_thread(here: Path) -> None:
    """No signal handler is set there, and each step is printed once."""
    found: list[Any] = []
    config, out = gpt2exp.compose(*FEW), io.StringIO()
    with redirect_stdout(out):
        thread = threading.Thread(target=lambda: found.append(gpt2exp.run(config, "run")))
        thread.start()
        thread.join()
    assert found[0]["state"] == "done"
    assert len(re.findall(r"^step ", out.getvalue(), re.M)) == 3


def test_a_notebook_gets_plain_lines(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is printed once: a notebook's stream says it is a terminal, but cannot move a cursor."""

    class Notebook(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Notebook()
    monkeypatch.setattr(sys, "stdout", out)
    gpt2exp.run(gpt2exp.compose(*FEW), "run")
    assert len(re.findall(r"^step ", out.getvalue(), re.M)) == 3
    assert "\x1b" not in out.getvalue()
    assert "training " not in out.getvalue()


def test_an_import_is_quick() -> None:
    code = (
        "import sys, gpt2exp; gpt2exp.compose('model=nano'); gpt2exp.run; gpt2exp.sweep\n"
        "try: gpt2exp.load('.')\nexcept gpt2exp.BadRequest: pass\n"
        "print({'torch', 'wandb', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


NOTEBOOK = """
import os, signal, sys, threading, time
import gpt2exp
from gpt2exp.run import record
from pathlib import Path

def interrupt(folder, times):
    while record.read_status(folder)["step"] < 3:
        time.sleep(0.01)
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)
config = gpt2exp.compose(*sys.argv[1:])
for times in (1, 50):
    folder = Path(str(times))
    threading.Thread(target=interrupt, args=(folder, times), daemon=True).start()
    try:
        gpt2exp.run(config, folder)
    except KeyboardInterrupt:
        print(times, "stopped", record.read_status(folder)["state"], len(record.saved(folder)))
    print(times, "the next cell", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def test_an_interrupted_cell_leaves_the_notebook(here: Path) -> None:
    """One signal saves the run; however many come, the process goes on with the next cell."""
    words = [*FEW, "train.steps=100000"]
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, *words],
        capture_output=True,
        text=True,
        cwd=here,
        check=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert re.search("^1 stopped interrupted 1$", done.stdout, re.M)
    assert (here / "1" / "summary.json").exists()
    for times in (1, 50):
        assert re.search(f"^{times} the next cell True$", done.stdout, re.M), done.stderr
