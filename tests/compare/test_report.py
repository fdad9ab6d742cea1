"""The report: JSON, CSV, Markdown, HTML and the terminal say the same, no text of a user becomes markup, and the page
opens in Chromium without an error or a request.
"""

from __future__ import annotations

import cProfile
import csv
import functools
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from support import SMALL, OfflineRun, read, run, run_folders

from gpt2exp.compare import __main__ as conclude
from gpt2exp.compare import comparison as compare
from gpt2exp.compare import figures, report, words
from gpt2exp.compare.comparison import Comparison, Distance
from gpt2exp.compare.effect import Effect
from gpt2exp.config import RunConfig
from gpt2exp.run import record, terminal
from gpt2exp.schema import plain

Done = subprocess.CompletedProcess[str]
SHORT = [*SMALL, "train.steps=6", "train.batch_size=1", "train.seq_len=16", "data.val_fraction=0.001"]
SHORT += ["train.eval_every=3", "train.measure_every=3"]
HOSTILE = (
    "<script>alert(1)</script>",
    "</style><img src=http://127.0.0.1:9/x.png>",
    "a\"b'c`d|e*f_g",
    "$\\frac{1}{",
    "_日本 🙂 \x1b[31m",
)
FOLDERS = ("a#b?c%20d", "<script>alert(1)<∕script>", "quote\" 'é 🙂", "100%&amp;", "x:y [z](w) `v` | *u*")


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """Two arms, two seeds, validation data, wandb offline with tags nobody should use: output and sweep folder."""
    folder = tmp_path_factory.mktemp("report") / "here"
    tags = "wandb.tags=['<script>alert(1)</script>','</style>']"
    done = run(folder, "-m", "init.residual_scaling=true,false", "seed=1,2", *SHORT, tags, figures=True)
    return done, run_folders(folder)[0].parent


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """One arm that diverges, at one seed: n=1, a broken pair and no wandb."""
    folder = tmp_path_factory.mktemp("failing") / "here"
    axes = ["seed=1", "optimizer.lr=3e-4,1e9", "init.residual_scaling=true,false"]
    done = run(folder, "-m", *axes, *SHORT, "wandb.mode=disabled", figures=True)
    return done, run_folders(folder)[0].parent


def summary(seed: int, *overrides: str, loss: float = 3.0, state: str = "done", **facts: Any) -> dict[str, Any]:
    """What a run leaves, by hand; keys of the configuration that are overridden are set there too."""
    config = plain(RunConfig())
    config["wandb"]["mode"] = "disabled"
    for text in overrides:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        if name in config.get(section, {}):
            config[section][name] = json.loads(value)
    done = state == "done"
    return {
        "state": state,
        "error": None if done else "loss became nan at step 3",
        "overrides": [*overrides, f"seed={seed}"],
        "config": config | {"seed": seed},
        "parameters": {"total": 1_000_000},
        "precision": {"requested": "fp32", "effective": "fp32", "emulated": False},
        "data": {"name": "text", "sha256": "0" * 64, "distinct_tokens": 11706, "train_tokens": 1000, "val_tokens": 0},
        "device": "cpu: a processor",
        "threads": 2,
        "versions": {"python": "3.11", "gpt2exp": "0.1"},
        "git": {"commit": "0" * 40, "dirty": False},
        "machine": "m",
        "platform": "Linux",
        "environment": {},
        "loss_mean_last10": loss if done else None,
        "val_loss": None,
        "steps": 20,
        "tokens": 20 * 128,
        "tokens_per_second": 1000.0,
        "peak_memory_bytes": 2**29,
        "wall_seconds": {"startup": 1.0, "train": 1.0, "total": 2.0},
        "started": f"2026-01-01T{seed % 24:02d}:{len(overrides[0]) % 60 if overrides else 0:02d}:00+00:00",
    } | facts


def leave(folder: Path, facts: dict[str, Any], steps: int = 20) -> Path:
    """Write a run's folder."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("{}")
    (folder / "summary.json").write_text(json.dumps(facts))
    rows = [{"step": step, "tokens": 128 * (step + 1), "loss": 10 - step / steps} for step in range(steps)]
    rows[0]["residual_rms"] = [0.02, 0.3, 2.0]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose arms, names, errors, command and folders would break out of any markup."""
    folder = tmp_path_factory.mktemp("hostile") / "s#w?e%e<p>"
    for number, (arm, name) in enumerate(zip(HOSTILE, FOLDERS, strict=True)):
        for seed in (1, 2):
            facts = summary(seed, f"+note={arm}", loss=3 + number / 10 + seed / 100)
            leave(folder / f"{name}{seed}", facts | {"started": f"2026-01-01T{number:02d}:{seed:02d}:00+00:00"})
    leave(folder / "failed", summary(1, f"+note={HOSTILE[0]}", state="failed", error=f"{HOSTILE[1]}\n{HOSTILE[4]}"))
    (folder / "sweep.json").write_text(json.dumps({"argv": ["-m", f"+note={HOSTILE[0]},{HOSTILE[2]}"], "jobs": []}))
    conclude.write(compare.compare(compare.read([folder])), folder)
    return folder


def spoken(comparison: Comparison, out: Path | None = None) -> str:
    """What `show` prints to a pipe."""
    buffer = io.StringIO()
    report.show(comparison, Console(file=buffer, width=110, highlight=False), out)
    return buffer.getvalue()


def effect(verdict: str | None, mean: float, low: float = 0, high: float = 0, **facts: Any) -> dict[str, Effect]:
    """The effects of an arm in the loss, with equal speed and memory."""
    usual: dict[str, Any] = {"n_seeds": 3, "n_pairs": 3, "p_value": 0.039, "p_holm": 0.039, "seed_std": 0.021}
    interval = None if verdict in (None, "not_comparable") else [low, high]
    loss = Effect("init.residual_scaling", "true", "false", "loss_mean_last10", **usual | facts)
    loss.mean_difference, loss.ci95, loss.verdict = mean, interval, verdict
    speed = Effect("init.residual_scaling", "true", "false", "tokens_per_second", speed_ratio=0.98, verdict="worse")
    speed.ci95 = [0.97, 0.99]
    memory = Effect("init.residual_scaling", "true", "false", "peak_memory_bytes", mean_difference=0.0, ci95=[0.0, 0.0])
    return {item.metric: item for item in (loss, speed, memory)}


def _comparison(effects: list[Effect], swept: dict[str, list[str]]) -> Comparison:
    return Comparison(
        runs=[],
        axes=effects,
        interactions=[],
        distances=[],
        failed=[],
        swept=swept,
        seeds=[1, 2, 3],
        metric="loss_mean_last10",
        notes=[],
    )


def sentence(effects: dict[str, Effect]) -> str:
    """The one sentence of a comparison with these effects."""
    axes = {"init.residual_scaling": ["true", "false"]}
    (said,) = words.sentences(_comparison(list(effects.values()), axes))
    return said.text


# --- words -----------------------------------------------------------------------------------------------------------


class TestWords:
    """Numbers to the digits they are known to, verdicts in plain words."""

    @pytest.mark.parametrize(
        ("value", "resolution", "text"),
        [
            (0.0102, 0.009, "0.0102"),
            (-0.01024, 0.009, "−0.0102"),
            (1234.567, 20, "1,235"),
            (2.1e-7, 0, "2.1e-7"),
            (-2.123e-7, 1e-8, "−2.12e-7"),
            (1e-9, 0.01, "0.000"),
            (0.0, 0.0, "0"),
            (math.nan, 0.0, "–"),
            (1e300, 1e298, f"{1e300:,.0f}"),
        ],
    )
    def test_numbers(self, value: float, resolution: float, text: str) -> None:
        assert words.spell(value, resolution) == text

    def test_worse(self) -> None:
        text = sentence(effect("worse", 0.0102, 0.0012, 0.0192, reason="smaller than the seed-to-seed std"))
        assert text == (
            "init.residual_scaling=false is worse than true by 0.0102 nats (95 % interval 0.0012 to 0.0192, n=3 seeds, "
            "p=0.039), smaller than the seed-to-seed std 0.021, at 0.98 of the speed."
        )

    def test_better_counts_from_its_own_side(self) -> None:
        text = sentence(effect("better", -0.0102, -0.0192, -0.0012))
        assert "is better than true by 0.0102 nats (95 % interval 0.0012 to 0.0192, n=3 seeds" in text
        assert text.endswith("at 0.98 of the speed; the seed-to-seed std is 0.021.")

    def test_indistinguishable(self) -> None:
        why = "the interval lies inside ± the seed-to-seed std"
        text = sentence(effect("indistinguishable", 1.2e-4, -3e-4, 5e-4, reason=why, dropped_pairs=2))
        assert "cannot be told apart from true: a difference of +0.00012 nats (95 % interval −0.00030 to" in text
        assert text.endswith(f"{why} 0.021; 2 pairs dropped, since a run did not finish.")

    def test_the_stds_of_unequal_arms_stand_apart(self) -> None:
        effects = effect("better", -0.0102, -0.0192, -0.0012, baseline_std=0.088, arm_std=0.015)
        assert sentence(effects).endswith("the seed-to-seed std is 0.015 (0.088).")
        axes = {"init.residual_scaling": ["true", "false"]}
        row = words.effects_table(_comparison(list(effects.values()), axes)).rows[0]
        assert row["seed std"] == "0.015 (0.088)"

    def test_what_pairing_gained_stands_on_its_row(self) -> None:
        axes = {"init.residual_scaling": ["true", "false"]}
        for r, seeds, told in ((0.84, 5, ["0.84", "5"]), (-0.3, -2, ["−0.3", "−2"]), (0.99996, None, ["1", ">9,997"])):
            effects = effect("better", -0.01, -0.02, -0.001, pair_correlation=r, seeds_saved=seeds)
            row = words.effects_table(_comparison(list(effects.values()), axes)).rows[0]
            assert [row["r"], row["saved"]] == told
        spoken_ = spoken(_comparison(list(effects.values()), axes))
        assert "saved" not in spoken_  # there is no room

    def test_one_seed_gives_no_verdict(self) -> None:
        one = effect(None, 0.5, n_seeds=1, p_value=None, p_holm=None, reason="n=1: no interval, add seeds")
        assert "=false ended 0.500 nats above true (n=1: no interval, add seeds)" in sentence(one)

    def test_distance_from_fp64(self) -> None:
        text = words.distance_sentence(Distance("tf32", 3, 4.2e-3, 7.1e-7, 0.021))
        assert text == (
            "precision=tf32 strays from fp64's training loss at the same seed and step by 7.1e-7 nats on average and "
            "0.0042 at most (n=3 seeds; between seeds fp64's own losses have a std of 0.021)."
        )

    def test_reason_of_what_cannot_be_compared_is_said_once(self) -> None:
        why = "both arms computed in fp32 on this hardware"
        effects = effect("not_comparable", 0.5, reason=why)
        effects["tokens_per_second"].verdict, effects["tokens_per_second"].reason = "not_comparable", why
        assert sentence(effects) == f"init.residual_scaling=false and true cannot be compared: {why}."

    def test_what_it_costs(self) -> None:
        effects = effect("worse", 0.5, 0.4, 0.6, parameters={"baseline": 1000, "arm": 4000})
        effects["tokens_per_second"].speed_ratio = 1.5
        memory = effects["peak_memory_bytes"]
        memory.mean_difference, memory.baseline_mean, memory.verdict = -(2.0**20) * 100, 2.0**30, "better"
        memory.ci95 = [-(2.0**20) * 110, -(2.0**20) * 90]
        text = sentence(effects)
        assert "at 1.50 times the speed, with 100 MiB (9.8%) less memory, with 3,000 more parameters" in text

    def test_no_control_character_reaches_a_terminal(self) -> None:
        assert terminal.printable("a\x1b[31m\nb\x07\x9b\udc80\uffff") == "a�[31m�b��?�"


# --- files -----------------------------------------------------------------------------------------------------------


class TestFiles:
    """What a sweep leaves in its folder, each form saying the same."""

    def test_the_sweep_ends_in_its_comparison(self, sweep: tuple[Done, Path]) -> None:
        done, folder = sweep
        assert (done.returncode, done.stderr) == (0, "")
        comparison = compare.compare(compare.read([folder]))
        assert "4 of 4 runs done" in done.stdout
        for item in words.sentences(comparison):
            assert item.text in done.stdout.splitlines()[-4:][0] or item.text in done.stdout
        assert f"report: {folder.relative_to(folder.parents[2])}/report.html" in done.stdout

    def test_json_csv_and_markdown_agree(self, sweep: tuple[Done, Path]) -> None:
        _, folder = sweep
        known = read(folder / "comparison.json")
        assert len(known["axes"]) == 3
        assert {row["metric"] for row in known["axes"]} == {"val_loss", "tokens_per_second", "peak_memory_bytes"}
        with (folder / "comparison.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for said, row in zip(known["axes"], rows, strict=True):
            for name in [name for name in said if name.endswith("ci95")]:
                low, high = said.pop(name) or (None, None)
                said |= {f"{name}_low": low, f"{name}_high": high}
            parameters = said.pop("parameters")
            assert json.loads(row.pop("differences")) == said.pop("differences")
            said |= {f"{side}_parameters": parameters[side] for side in parameters}
            assert row == {key: "" if value is None else str(value) for key, value in said.items()}
        comparison = compare.compare(compare.read([folder]))
        lines = (folder / "report.md").read_text().splitlines()
        table = [line for line in lines if line.startswith("| init.residual_scaling ")]
        rows, _, reasons = words.effects_table(comparison)
        assert [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table] == [
            [
                *(cell.replace("<", "&lt;") for cell in cells),
                (report.verdict_text(verdict) + (f" {report.escaped(reason)}" if reason else "")).strip(),
            ]
            for *cells, verdict, reason in (row.values() for row in rows)
        ]
        assert [line for line in lines if line.startswith("- \\[")] == [
            f"- \\[{number}\\] {reason}" for number, reason in enumerate(reasons, 1)
        ]
        for item in words.sentences(comparison):
            assert f"- {report.verdict_text(item.verdict)} {item.text.replace('<', '&lt;')}" in lines

    def test_columns_of_numbers_stand_to_the_right(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each column says itself whether it holds numbers, so that a new one cannot misalign another."""
        for tie in ("true", "false"):
            leave(tmp_path / tie, summary(7, f"model.tie_weights={tie}"))
        comparison = compare.compare(compare.read([tmp_path]))
        runs = words.runs_table(comparison)
        assert {*runs.numbers} == {"seed", "loss", "val loss", "tokens/s", "peak MiB", "seconds"}
        wider = runs._replace(rows=[row | {"remark": "none"} for row in runs.rows])
        monkeypatch.setattr(words, "runs_table", lambda _: wider)
        text = report.markdown(comparison, tmp_path, [])
        rules = [line for line in text.splitlines() if line.startswith("| -")]
        assert rules == [
            "| --- | --- | --- | --: | --: | --- | --: | --: | --: | --: | --- |",
            "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- |",
        ]
        page = report.page(text, words.title(comparison), tmp_path)
        assert page.count("<td>none</td>") == 2
        assert page.count('<td style="text-align:right">7</td>') == 2, "the seeds"

    def test_every_form_has_every_run(self, sweep: tuple[Done, Path]) -> None:
        _, folder = sweep
        names = [path.name for path in run_folders(folder)]
        assert [row["name"] for row in read(folder / "comparison.json")["runs"]] == names
        text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
        for name in names:
            assert f"[{name}]({name}/)" in text
            assert f'<a href="{name}/">{name}</a>' in page

    def test_figures_are_linked_and_white(self, sweep: tuple[Done, Path]) -> None:
        from matplotlib import image

        _, folder = sweep
        linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (folder / "report.md").read_text())
        kinds = ("loss", "gap", "difference", "residual", "speed", "memory", "unseen")
        assert linked == [f"figures/1-init.residual-scaling-{kind}.png" for kind in kinds]
        for name in linked:
            pixels = image.imread(str(folder / name))
            assert set(pixels[0, 0].tolist()) == {1}  # of its alpha too
            assert pixels[..., :3].min() < 0.1  # and something is drawn

    def test_how_to_reproduce(self, sweep: tuple[Done, Path]) -> None:
        _, folder = sweep
        first = read(run_folders(folder)[0] / "summary.json")
        text = (folder / "report.md").read_text()
        assert "gpt2exp -m init.residual_scaling=true,false seed=1,2 model=nano" in text
        assert "'wandb.tags=['\"'\"'<script>" in text  # quoted for a shell
        assert first["git"] is None or first["git"]["commit"] in text  # none where the tests run without a checkout
        assert f"torch {first['versions']['torch']}" in text
        assert f"{first['threads']} threads" in text

    def test_compare_again_writes_the_same(self, sweep: tuple[Done, Path], tmp_path: Path) -> None:
        _, folder = sweep
        before = (folder / "comparison.json").read_bytes()
        out = tmp_path / "elsewhere"
        program = [sys.executable, "-m", "gpt2exp.compare"]
        done = run(tmp_path, str(folder), "--out", str(out), program=program)
        assert (done.returncode, done.stderr) == (0, "")
        assert (out / "comparison.json").read_bytes() == before
        assert not [path for path in out.rglob("*") if path.name.endswith(".part") or path.name == "wandb"]
        for address in _links((out / "report.html").read_text()):
            assert (out / unquote(address)).resolve() in run_folders(folder)

    def test_nothing_that_is_no_json_number(self, tmp_path: Path) -> None:
        comparison = compare.compare([dict(summary(seed), name=str(seed), folder="/nowhere") for seed in (1, 2)])
        comparison.axes.append(Effect("k", "a", "b", "loss_mean_last10", p_value=math.nan, ci95=[-math.inf, 1.0]))
        assert report.finite(comparison.as_dict())["axes"][0]["ci95"] == [None, 1.0]
        assert ",nan" not in report.table(comparison)

    def test_a_folder_of_any_name(self, tmp_path: Path) -> None:
        """Also a folder whose name is not UTF-8, as on a disk from elsewhere."""
        folder = tmp_path / os.fsdecode(b"\xff\xfe")
        leave(folder, summary(1))
        conclude.write(compare.compare(compare.read([tmp_path])), tmp_path / "out")
        assert read(tmp_path / "out" / "comparison.json")["runs"][0]["name"] == folder.name


class TestEnds:
    """Sweeps with little or nothing to compare."""

    def test_a_failing_sweep_still_reports(self, failing: tuple[Done, Path]) -> None:
        done, folder = failing
        assert done.returncode == 1
        *errors, first, second = done.stderr.splitlines()
        assert errors == ["error: loss became nan at step 1"] * 2
        assert all(line.endswith(": diverged: loss became nan at step 1") for line in (first, second))
        for name in ("report.html", "report.md", "comparison.csv", "comparison.json"):
            assert (folder / name).is_file()
        known = read(folder / "comparison.json")
        assert [row["state"] for row in known["failed"]] == ["diverged"] * 2
        comparison = compare.compare(compare.read([folder]))
        texts = [item.text for item in words.sentences(comparison)]
        assert "init.residual_scaling=false ended" in texts[1]
        assert "(n=1: no interval, add seeds)" in texts[1]
        assert "1 pair dropped" in texts[1]
        assert "cannot be compared" in texts[0]
        for text in texts:
            assert text in done.stdout
        assert "loss became nan at step 1" in (folder / "report.html").read_text()
        assert "report: " in spoken(comparison, folder)
        assert "diverged after step 1" in spoken(comparison)

    def test_seeds_only(self, tmp_path: Path) -> None:
        for seed in (1, 2, 3):
            leave(tmp_path / str(seed), summary(seed, loss=3 + seed / 10))
        comparison = compare.compare(compare.read([tmp_path]))
        conclude.write(comparison, tmp_path)
        assert read(tmp_path / "comparison.json")["axes"] == []
        text = "loss, the mean of the last ten steps: 3.20 nats on average over 3 runs, seed-to-seed std 0.10."
        assert text in spoken(comparison)
        assert text in (tmp_path / "report.html").read_text()
        assert (tmp_path / "figures" / "1-seeds-loss.png").is_file()

    def test_all_failed(self, tmp_path: Path) -> None:
        for seed in (1, 2):
            for lr in ("0.0003", "0.1"):
                facts = summary(seed, f"optimizer.lr={lr}", state="diverged")
                leave(tmp_path / f"{seed}-{lr}", facts)
        comparison = compare.compare(compare.read([tmp_path]))
        conclude.write(comparison, tmp_path)
        assert not (tmp_path / "figures").exists()
        assert spoken(comparison).count("diverged after step 20: loss became nan at step 3") == 4
        assert "cannot be compared" in (tmp_path / "report.md").read_text()

    def test_no_comparison_is_a_line_and_no_failure(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        leave(tmp_path / "1", summary(1))
        other = summary(2)
        other["config"]["model"]["n_layer"] = 3
        leave(tmp_path / "2", other)
        log = conclude.log
        propagate, log.propagate = log.propagate, True
        try:
            conclude.conclude(tmp_path, Console(file=io.StringIO()))
        finally:
            log.propagate = propagate
        (line,) = caplog.messages
        assert line.startswith("no comparison: the runs also differ in model.n_layer")
        assert "gpt2exp-compare" in line

    def test_arms_of_different_length_and_batch(self, tmp_path: Path) -> None:
        """Curves are drawn over tokens if steps differ in tokens."""
        for seed in (1, 2):
            for size, steps in (("4", 20), ("8", 10)):
                facts = summary(seed, f"train.batch_size={size}", steps=steps, tokens=20 * 128)
                leave(tmp_path / f"{seed}-{size}", facts, steps)
        comparison = compare.compare(compare.read([tmp_path]))
        assert b"tokens trained on" in figures.draw(comparison)[0].svg


def _contrast(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """WCAG's contrast of two colours, red, green and blue from 0 to 1."""

    def luminance(colour: np.ndarray[Any, Any]) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", figures.COLOURS)
def test_an_arms_colour_stands_out_light_and_dark(colour: str) -> None:
    """At least 3 to 1, as WCAG asks of graphics; in the dark the page inverts the figure and turns its hues back."""
    from matplotlib.colors import to_rgb

    drawn = np.array(to_rgb(colour))
    luma = np.array([0.213, 0.715, 0.072])
    inverted = np.clip(2 * luma @ (1 - drawn) - (1 - drawn), 0, 1)  # hue-rotate(180deg), by the CSS standard's matrix
    assert _contrast(drawn, np.array(to_rgb("#fcfcfa"))) >= 3
    assert _contrast(inverted, np.array(to_rgb("#15181b"))) >= 3


def test_intervals_after_each_seed(tmp_path: Path) -> None:
    """More arms than colours differ in their marks; the last intervals fill the picture, and the caption says so."""
    rng = np.random.default_rng(1)
    for seed in range(1, 7):
        for at, std in enumerate((0.02, 0.01, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08)):
            loss = 3 + 0.01 * at + float(rng.normal(0, 0.01))
            leave(tmp_path / f"{std}-{seed}", summary(seed, f"init.std={std}", loss=loss))
    comparison = compare.compare(compare.read([tmp_path]))
    (drawing,) = (item for item in figures.draw(comparison) if item.name.endswith("intervals"))
    marks = set(re.findall(rb'<use [^>]*style="(fill: [^"]+)"', drawing.svg))
    assert len(marks) >= 7, "seven arms, six colours: the seventh is hollow"
    assert "the first intervals are wider than the picture" in drawing.caption


# --- the page --------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _parsed(html: str) -> _Page:
    page = _Page()
    page.feed(html)
    page.close()
    return page


def _links(html: str) -> list[str]:
    hrefs = [attributes["href"] for tag, attributes in _parsed(html).tags if tag == "a"]
    return [href for href in hrefs if href and not href.startswith("#")]


class TestEscaping:
    """Nothing a user typed becomes markup, anywhere."""

    def test_page_has_only_our_own_tags(self, hostile: Path) -> None:
        page = _parsed((hostile / "report.html").read_text())
        tags = {tag for tag, _ in page.tags}
        assert not tags & {"script", "iframe", "object", "embed", "form", "base", "video", "audio"}
        assert sum(tag == "style" for tag, _ in page.tags) == 1
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "img" or (attributes["src"] or "").startswith("data:image/svg+xml;base64,")
        assert sum(tag == "img" for tag, _ in page.tags) == len(list((hostile / "figures").iterdir())) >= 5
        text = "".join(page.text)
        for arm in HOSTILE:
            assert terminal.printable(arm) in text
        for row in read(hostile / "comparison.json")["runs"]:
            assert terminal.printable(row["name"]) in page.text

    @given(st.text())
    @example("*a* _b_ `c` [d](e) ![f](g) ~~h~~ <b>i</b> &amp; j|k \\* ^l^")
    @settings(deadline=None, max_examples=30)
    def test_any_text_stays_itself(self, text: str) -> None:
        """From Markdown, as an item and as a cell, to the page."""
        said = f"x{terminal.printable(text)}x"
        lines = [f"- {report.escaped(said)}", "", "| h |", "| --- |", f"| {report.escaped(said)} |"]
        page = _parsed(report.page("\n".join(lines), "x", Path()))
        assert page.text.count(said) == 2

    def test_links_resolve(self, hostile: Path) -> None:
        addresses = _links((hostile / "report.html").read_text())
        assert {(hostile / unquote(address)).resolve() for address in addresses} == set(run_folders(hostile))
        listed = re.findall(r"\]\(([^)]+/)\)", (hostile / "report.md").read_text())
        assert listed == addresses

    def test_markdown_has_no_markup_of_theirs(self, hostile: Path) -> None:
        fenced = False
        rows = 0
        for line in (hostile / "report.md").read_text().splitlines():
            fenced ^= line.startswith("```")
            if fenced:
                continue
            assert "<script" not in line
            assert "<img" not in line
            if line.startswith("| +note") or line.startswith("| note"):
                rows += 1
                assert len(re.findall(r"(?<!\\)\|", line)) == 12
        assert rows == 4 * (len(HOSTILE) - 1), "loss, steps, speed and memory of each arm"

    def test_terminal_gets_no_escape_code(self, hostile: Path) -> None:
        comparison = compare.compare(compare.read([hostile]))
        text = spoken(comparison, hostile)
        assert "\x1b" not in text
        assert "<script>alert(1)</script>" in text

    def test_figures_have_the_words_as_text(self, hostile: Path) -> None:
        """Well-formed, with no mathtext made of a name, and no axis labelled in it either."""
        for drawing in figures.draw(compare.compare(compare.read([hostile]))):
            root = ElementTree.fromstring(drawing.svg)
            words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
            assert not [word for word in words if "mathdefault" in word]
            assert drawing.name.endswith(("gap", "difference")) or any("\\frac" in word for word in words)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--v=0"),
)
PROBE = """<script>
addEventListener("load", () => {
  const html = document.documentElement, images = [...document.querySelectorAll("p img")];
  const wide = [...document.querySelectorAll("body *")].filter(e => !e.closest("table *") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "." + e.className);
  const ink = image => {  // the mean of what the page shows of an image, on black and on white
    const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
    canvas.filter = getComputedStyle(image).filter;
    canvas.drawImage(image, 0, 0, image.width, image.height);
    const data = canvas.getImageData(0, 0, image.width, image.height).data;
    const opaque = [...data.keys()].filter(at => at % 4 == 0 && data[at + 3] > 250);
    const grey = opaque.filter(at => Math.max(...data.slice(at, at + 3)) - Math.min(...data.slice(at, at + 3)) < 9);
    return grey.reduce((sum, at) => sum + data[at], 0) / grey.length;
  };
  parent.postMessage(JSON.stringify({
    width: innerWidth, scrolled: html.scrollWidth, wide, dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor, figures: images.filter(e => e.naturalWidth).length,
    ink: images.length && ink(images[0]), small: Math.min(...images.map(e => e.width / 360 * 9)),
    loaded: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    links: [...document.querySelectorAll("td a")].map(a => a.href),
  }), "*");
});
</script></body>"""
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><body style="margin:0">
<script>addEventListener("message", event => {{ document.body.dataset.probe = event.data; }});</script>
<iframe src="probed.html" style="border:0;width:{width}px;height:900px"></iframe></body>"""
"""Headless windows are never narrower than 500 pixels; a frame can be."""


def chromium(page: Path, profile: Path, *flags: str, dark: bool = False, width: int = 1600) -> Done:
    """Open a page in a browser of its own."""
    assert CHROMIUM is not None
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    own = [f"--user-data-dir={profile}", scheme, f"--window-size={width},900"]
    command = [CHROMIUM, *FLAGS, *own, *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def probe(page: Path, tmp_path: Path, *, dark: bool, width: int) -> dict[str, Any]:
    """Measure a copy of a page in a frame of some width; it lies beside the page, so that links work."""
    html = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", page.read_text())
    copy, frame = page.with_name("probed.html"), page.with_name("frame.html")
    copy.write_text(html.replace("</body>", PROBE))
    frame.write_text(FRAME.format(width=width))
    try:
        done = chromium(frame, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000", dark=dark)
    finally:
        copy.unlink()
        frame.unlink()
    assert "CONSOLE" not in done.stderr
    (value,) = [attributes["data-probe"] for tag, attributes in _parsed(done.stdout).tags if "data-probe" in attributes]
    return dict(json.loads(value or ""))


@pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="no chromium here, and not in CI: apt-get install chromium"
)
class TestChromium:
    """The page in a real browser."""

    @pytest.mark.parametrize(
        ("which", "dark", "width"), [("sweep", False, 1600), ("failing", True, 1600), ("hostile", True, 360)]
    )
    def test_renders(self, which: str, dark: bool, width: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        got = request.getfixturevalue(which)
        folder = got if isinstance(got, Path) else got[1]
        page = folder / "report.html"
        done = chromium(page, tmp_path / "first", "--dump-dom", dark=dark, width=max(width, 500))
        assert "CONSOLE" not in done.stderr  # an error, a blocked script or a blocked load would be a line
        assert "alert(1)" not in done.stdout or "<script" not in done.stdout
        seen = probe(page, tmp_path, dark=dark, width=width)
        assert (seen["width"], seen["dark"]) == (width, dark)
        assert seen["scrolled"] <= width
        assert seen["wide"] == []
        assert seen["figures"] >= 3
        assert seen["loaded"] == []
        assert seen["small"] >= 7.5  # pixels of the smallest text
        assert (sum(_rgb(seen["paper"])) < 150) == dark
        assert seen["ink"] > 200 if dark else seen["ink"] < 50  # the text and axes of a figure: not black on black
        folders = [Path(urllib.request.url2pathname(urlsplit(link).path)) for link in seen["links"]]
        assert folders == [Path(row["folder"]) for row in read(folder / "comparison.json")["runs"]]
        assert all(path.is_dir() for path in folders)

    @pytest.mark.slow
    def test_screenshot_is_no_blank_page(self, sweep: tuple[Done, Path], tmp_path: Path) -> None:
        from matplotlib import image

        for dark in (False, True):
            picture = tmp_path / f"{dark}.png"
            chromium(sweep[1] / "report.html", tmp_path / f"p{dark}", f"--screenshot={picture}", dark=dark)
            pixels = image.imread(str(picture))[..., :3]
            assert (pixels[2, 2].mean() < 0.2) == dark
            assert pixels.std() > 0.03

    def test_the_watch_sees_what_it_should(self, tmp_path: Path) -> None:
        """The same probes find the faults of a page that errs, loads and overflows."""
        bad = tmp_path / "bad.html"
        bad.write_text(
            "<!doctype html><body><div style='width:3000px'>x</div><img src='http://127.0.0.1:9/x.png'></body>"
        )
        seen = probe_quietly(bad, tmp_path)
        assert seen["scrolled"] > 360
        assert seen["wide"]
        assert seen["loaded"] == ["http://127.0.0.1:9/x.png"]
        loud = tmp_path / "loud.html"
        loud.write_text("<!doctype html><body><script>console.error('x')</script></body>")
        assert "CONSOLE" in chromium(loud, tmp_path / "p", "--dump-dom").stderr


def probe_quietly(page: Path, tmp_path: Path) -> dict[str, Any]:
    """`probe` where the console's lines are expected."""
    with pytest.MonkeyPatch.context() as patch:
        real = subprocess.run

        def silent(*args: Any, **options: Any) -> Any:
            done = real(*args, **options)
            done.stderr = ""
            return done

        patch.setattr(subprocess, "run", silent)
        return probe(page, tmp_path, dark=False, width=360)


def _rgb(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


# --- wandb and speed -------------------------------------------------------------------------------------------------


class TestWandb:
    """The comparison as a run of its own."""

    def test_beside_the_runs(self, sweep: tuple[Done, Path]) -> None:
        done, folder = sweep
        shown = OfflineRun(folder)
        assert shown.run.job_type == "comparison"
        assert shown.run.run_group == folder.name == OfflineRun(run_folders(folder)[0]).run.run_group
        assert list(shown.run.tags) == ["<script>alert(1)</script>", "</style>"]
        assert shown.exit_codes == [0]
        known = read(folder / "comparison.json")
        logged = functools.reduce(lambda one, other: one | other, shown.history)
        drawn = {f"figures/{path.stem}" for path in (folder / "figures").iterdir()}
        assert {key.rpartition(".")[0] for key in logged if key.endswith("._type")} == {
            "runs", "effects", "verdicts", *drawn
        }  # fmt: skip
        tables = folder.glob("wandb/offline-run-*/files/media/table/effects_*.table.json")
        (table,) = [json.loads(path.read_text()) for path in tables]
        got = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        for said, row in zip(known["axes"], got, strict=True):
            for key in ("key", "arm", "metric", "mean_difference", "p_value", "verdict"):
                assert row[key] == said[key]
        assert f"{folder.relative_to(folder.parents[2])}/wandb/offline-run-*" in done.stdout

    def test_none_where_the_runs_have_none(self, failing: tuple[Done, Path]) -> None:
        done, folder = failing
        assert not (folder / "wandb").exists()
        assert "to upload" not in done.stdout


@pytest.mark.slow
def test_two_hundred_runs_without_torch(tmp_path: Path) -> None:
    """As many runs as a large study has, in a process that never imports torch, nor wandb."""
    number = 0
    for seed in range(10):
        for lr in (1e-4, 2e-4, 3e-4, 4e-4, 5e-4):
            for tie, scaling in (("true", "true"), ("true", "false"), ("false", "true"), ("false", "false")):
                axes = [f"optimizer.lr={lr}", f"model.tie_weights={tie}", f"init.residual_scaling={scaling}"]
                started = f"2026-01-{1 + number // 24:02d}T{number % 24:02d}:00:00+00:00"
                leave(tmp_path / f"{number:03d}", summary(seed, *axes, loss=3 + seed / 50 + lr, started=started), 1000)
                number += 1
    code = (
        "import sys; from pathlib import Path\n"
        "from gpt2exp.compare import __main__ as conclude, comparison as compare\n"
        f"folder = Path({str(tmp_path)!r}); comparison = compare.compare(compare.read([folder]))\n"
        "conclude.write(comparison, folder)\n"
        "assert len(comparison.runs) == 200 and len(comparison.axes) == 18\n"
        "print([name for name in ('torch', 'wandb', 'tiktoken') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert len(_links((tmp_path / "report.html").read_text())) == 200


def _calls(folder: Path, seeds: int) -> Counter[tuple[Any, Any]]:
    """What the package called, by caller and callee, to compare two arms of so many seeds."""
    for seed in range(seeds):
        for lr in (1e-4, 2e-4):
            leave(folder / f"{lr}-{seed}", summary(seed, f"optimizer.lr={lr}", loss=3 + lr * math.sin(seed)))
    (folder / "sweep.json").write_text(json.dumps({"argv": [], "jobs": []}))
    profile = cProfile.Profile()
    profile.runcall(lambda: conclude.write(compare.compare(compare.read([folder])), folder))
    profile.create_stats()
    found, package = Counter[tuple[Any, Any]](), str(Path(report.__file__).parents[1])
    for callee, (*_, callers) in profile.stats.items():  # type: ignore[attr-defined]  # typeshed lacks it
        found |= {(caller, callee): count for caller, (count, *_) in callers.items() if package in caller[0]}
    return found


def test_work_grows_no_faster_than_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No function is called more than in proportion to the runs; a sweep's list of its jobs is read a few times."""
    monkeypatch.setattr(figures.Figure, "savefig", lambda *_, **__: None)  # still painted, but not saved
    _calls(tmp_path / "first", 10)  # imports
    small, middle, large = (_calls(tmp_path / str(seeds), seeds) for seeds in (10, 20, 40))
    more = {pair: (small[pair], middle[pair], count) for pair, count in large.items()}
    # in proportion to the runs twice as many calls are added as before, to their square four times
    assert not {pair: of for pair, of in more.items() if of[2] - of[1] > 2.5 * (of[1] - of[0]) + 20}
    reads = {pair: of for pair, of in more.items() if pair[1][0] == record.__file__ and pair[1][2] == "read"}
    assert reads
    assert all(of[0] == of[2] for of in reads.values())


def test_imports_are_lazy() -> None:
    """Comparing and showing needs neither matplotlib nor jinja2."""
    heavy = ("torch", "matplotlib", "jinja2", "scipy.stats", "wandb")
    code = f"import sys, gpt2exp.compare.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"
