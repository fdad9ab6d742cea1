"""`gpt2exp-bench` times the real training step beside a real peer, and its last line is JSON of what it printed. The
roofline script of the throughput finding adds the machine's limits to that. No time is asserted.

Contestants run in this process (`timed`), except the peer. tests/experiments/test_gpu.py starts a process for each.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support import SMALL

from gpt2exp import bench
from gpt2exp.section import BadRequest

THROUGHPUT = Path(__file__).parents[2] / "experiments" / "throughput"
TINY = [*SMALL, "train.seq_len=16", "wandb.mode=disabled"]
ONCE = [*TINY, "--pairs", "1", "--steps", "3", "--peer-command"]


REAL = bench.timed
OURS = [sys.executable, "-m", "gpt2exp.bench"]


def script(name: str) -> Any:
    """A script of the throughput finding."""
    return runpy.run_path(str(THROUGHPUT / name))["main"]


def carried_out(command: Any, words: Sequence[str], answer: str = "") -> tuple[int, str]:
    """A command in this process with `answer` to read: its code and what it printed."""
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(sys, "stdin", io.StringIO(answer))
        return command(list(words)), out.getvalue()


def timed(line: Sequence[str]) -> dict[str, Any]:
    """`bench.timed` without a process, where the line is a command of ours."""
    if line[:3] == OURS:
        code, out = carried_out(bench.command, line[3:])
    elif line[0] == sys.executable and Path(line[1]).parent == THROUGHPUT:
        code, out = carried_out(script(Path(line[1]).name), line[2:])
    else:
        return REAL(line)
    return bench.printed(line, code, out, "") | {"process_seconds": 1.0}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One round of ours, transformers and a peer's command, which is a process of its own."""
    folder, out = tmp_path_factory.mktemp("bench"), io.StringIO()
    peer = """python -c 'print("noise"); print("{\\"ms_median\\": 5, \\"first_ms\\": 6, \\"peak_rss_mib\\": 7}")'"""
    args = [*TINY, "--peer", "hf", "--peer-command", peer, "--pairs", "1", "--steps", "4"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "timed", timed)
        assert bench.command([*args, "--out", "found/bench.json"]) == 0
    found: dict[str, Any] = json.loads(out.getvalue().splitlines()[-1])
    assert json.loads((folder / "found" / "bench.json").read_text()) == found
    assert sorted(path.name for path in folder.iterdir()) == ["found"]  # a bench is no run: nothing else is written
    for text in ("step time", "whole process", "peak memory"):
        assert text in out.getvalue()
    return found


@pytest.fixture(scope="module")
def with_roof(result: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same with the machine's limits, added by the script."""
    file = tmp_path_factory.mktemp("roof") / "bench.json"
    file.write_text(json.dumps(result))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "timed", timed)
        words = [*TINY, "--steps", "4", "--verify", "--bench", str(file)]
        code, out = carried_out(script("roofline.py"), words)
    assert code == 0
    for text in ("matrix products alone", "of it", "losses of 4 steps are off the plain path's by at most"):
        assert text in out
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert json.loads(file.read_text()) == found
    assert {key: value for key, value in found.items() if key not in ("roofline", "verified")} == result
    return found


def test_ours_and_the_peers_are_timed(result: dict[str, Any]) -> None:
    (row,) = result["rounds"]
    assert list(row) == ["gpt2exp", "hf", "peer"]
    assert row["gpt2exp"]["loss_last"] < row["gpt2exp"]["loss_first"]
    assert row["hf"]["loss_first"] == pytest.approx(row["gpt2exp"]["loss_first"], rel=0.02)  # the same batch
    assert row["peer"]["ms_median"] == 5
    assert {key: of["ms_median"]["n"] for key, of in result["ratios"].items()} == {"hf": 1, "peer": 1}


def test_ratios_are_taken_pair_by_pair(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In turn, ours and the peer's."""
    times = iter([2, 4, 9, 3])
    same = {"first_ms": 1, "peak_rss_mib": 1, "process_seconds": 1}
    monkeypatch.setattr(bench, "timed", lambda _: {"ms_median": next(times), **same})
    assert bench.command([*TINY, "--peer", "hf", "--pairs", "2", "--steps", "4"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["gpt2exp"]["ms_median"], row["hf"]["ms_median"]) for row in found["rounds"]] == [(2, 4), (9, 3)]
    assert found["ratios"]["hf"]["ms_median"] == {"median": 1.75, "min": 0.5, "max": 3, "n": 2}
    assert found["ratios"]["hf"]["peak_rss_mib"] == {"median": 1, "min": 1, "max": 1, "n": 2}


def test_two_at_once_are_timed_beside_one_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each, here one after the other, says that it is built before it is told to begin."""
    beside = script("beside.py")

    def at_once(line: Sequence[str], copies: int) -> list[dict[str, Any]]:
        assert line[:2] == [sys.executable, str(THROUGHPUT / "beside.py")]
        found = []
        for _ in range(copies):
            code, out = carried_out(beside, line[2:], "begin\n")
            assert out.startswith("built\n")
            found.append(bench.printed(line, code, out, ""))
        return found

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setitem(beside.__globals__, "at_once", at_once)
    code, out = carried_out(beside, ["2", *TINY, "--pairs", "1", "--steps", "3"])
    assert code == 0
    assert "2 at once: a step takes" in out
    found = json.loads(out.splitlines()[-1])
    (alone,), (several,) = found["alone"], found["ms_medians"]
    assert (found["processes"], len(several)) == (2, 2)
    assert found["ratio"]["median"] == max(several) / alone
    assert beside(["1", *TINY, "--pairs", "1", "--steps", "3"]) == 2
    assert capsys.readouterr().err.startswith("beside.py: 1 -")


def test_processes_at_once_begin_together(tmp_path: Path) -> None:
    """None begins before all are built; if one fails, that is said, and no process is left."""
    code = """
import json, os, pathlib, sys
here = pathlib.Path(sys.argv[1])
(here / str(os.getpid())).touch()
print("built", flush=True)
sys.stdin.readline()
print(json.dumps({"ms_median": len(list(here.iterdir()))}))
"""
    at_once = runpy.run_path(str(THROUGHPUT / "beside.py"))["at_once"]
    found = at_once([sys.executable, "-c", code, str(tmp_path)], 3)
    assert [row["ms_median"] for row in found] == [3, 3, 3]
    with pytest.raises(bench.ContestantError, match="exit code 1"):
        at_once(["false"], 2)


def test_losses_are_held_against_the_plain_path(with_roof: dict[str, Any]) -> None:
    assert with_roof["verified"]["steps"] == 4
    assert 0 <= with_roof["verified"]["largest_relative_difference"] < 1e-5
    assert with_roof["command"].startswith("gpt2exp-bench model=nano ")


def test_the_floor_is_its_parts(with_roof: dict[str, Any]) -> None:
    result, roof = with_roof, with_roof["roofline"]
    assert roof["step_ms"] == pytest.approx(statistics.median(row["gpt2exp"]["ms_median"] for row in result["rounds"]))
    assert roof["floor_ms"] == pytest.approx(roof["matmul_ms"] + roof["adamw_ms"])
    assert roof["fraction"] == pytest.approx(roof["floor_ms"] / roof["step_ms"])
    assert {product["layer"] for product in roof["products"]} == {
        "c_attn",
        "attn.c_proj",
        "c_fc",
        "mlp.c_proj",
        "lm_head",
    }
    # two operations a weight and token, forward and twice backward
    gflop = sum(product["gflop"] for product in roof["products"])
    model = result["model"]
    weights = 12 * model["n_layer"] * model["n_embd"] ** 2 + model["vocab_size"] * model["n_embd"]
    assert gflop == pytest.approx(6 * weights * 2 * 16 / 1e9)
    assert roof["parts"]["matrix products"] > 0
    assert roof["parts"]["AdamW"] > 0


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["model.n_layers=3"], 2, "gpt2exp-bench: model.n_layers=3: no such key; did you mean model.n_layer?"),
        (["seed=1,2"], 2, "gpt2exp-bench: seed=1,2: several values make a sweep"),
        (["--steps", "2"], 2, "gpt2exp-bench: --steps 2 --pairs 3: at least 3 steps and one pair"),
        (["experiment=throughput"], 2, "gpt2exp-bench: gpt2exp-bench times one configuration"),
        ([*ONCE, "false"], 1, "gpt2exp-bench: false: exit code 1"),
        (
            [*ONCE, "echo x"],
            1,
            "gpt2exp-bench: echo x: its last line",
        ),
        (
            [*ONCE, "no-such"],
            1,
            "gpt2exp-bench: no-such: No such file",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(
    args: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "child", lambda *_: ["echo", '{"ms_median": 1}'])  # ours is not what fails
    assert bench.command(args) == code
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert len(err.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_a_bad_request(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match=r"^--out \S+: cannot be written \("):
        bench.print_result({}, tmp_path / "file" / "bench.json")
