"""What runs, sweeps, comparisons and texts cost as they grow: `python experiments/throughput/growth.py [SERIES ...]`.

Each series makes one thing larger and leaves the rest. It writes `growth/growth.csv`, a row a size with seconds and
peak memory, of a process of its own each time, then the figure and the table of `growth/README.md`. In the table stands
the exponent between neighbouring sizes, at its largest: time that grows as the work has 1 at most. Without series all
are measured, which takes twenty minutes on two cores; with `--page` none. Several jobs at a time share the work
of one sweep: there the exponent is below 0 where they gain, and the memory is that of the command alone.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import replace_block, write_rows

from gpt2exp.data import assets
from gpt2exp.run.record import SWEEP
from gpt2exp.training.hardware import device_name

HERE = Path(__file__).parent / "growth"
PROGRAM = """
import re, sys, time
from pathlib import Path
from {module} import main
sys.argv = sys.argv[:1] + sys.argv[2:]
start = time.perf_counter()
try:
    code = main()
except SystemExit as error:
    code = error.code
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())
print("measured", time.perf_counter() - start, int(peak[1]) / 1024)
sys.exit(code)
"""
"""A command whose last line says its time and its peak: the peak of children that ended has their parent's in it."""


class Size(NamedTuple):
    """A row of the table: what was made larger, to what, and what it took."""

    series: str
    size: int
    seconds: float
    mib: float


# --- what is measured ------------------------------------------------------------------------------------------------


def command(module: str, *words: str, cwd: Path, **environment: str) -> tuple[float, float]:
    """Run a command of the package in a folder; its seconds from the entry point on and its peak memory in MiB."""
    told = os.environ | {"WANDB_MODE": "disabled"} | environment
    program = [sys.executable, "-c", PROGRAM.format(module=module), module, *words]
    out = subprocess.run(program, env=told, cwd=cwd, check=True, capture_output=True, text=True).stdout
    seconds, mib = next(line for line in reversed(out.splitlines()) if line.startswith("measured")).split()[1:]
    return float(seconds), float(mib)


def step(key: str) -> Callable[[int, Path], tuple[float, float]]:
    """The median of GPT-2's steps with one key changed, and the peak memory."""

    def measure(size: int, folder: Path) -> tuple[float, float]:
        fixed = "train.steps=6", "train.batch_size=1", "hydra.run.dir=run"
        command("gpt2exp.train", *fixed, f"{key}={size}", cwd=folder)
        summary = json.loads((folder / "run" / "summary.json").read_text())
        return summary["step_ms"]["median"] / 1e3, summary["peak_memory_bytes"] / 2**20

    return measure


def dry_sweep(jobs: int, folder: Path) -> tuple[float, float]:
    """A sweep's plan, from the command to its table."""
    words = "-m", "model=nano", "optimizer.lr=1e-3,2e-3", f"seed=range({jobs // 2})", "dry_run=true"
    return command("gpt2exp.train", *words, cwd=folder)


def comparison(runs: int, folder: Path) -> tuple[float, float]:
    """The comparison of a sweep of two arms: records of short runs, given other seeds and losses."""
    words = "model=nano", "model.n_layer=1", "train.steps=20", "data.val_fraction=0.01", "hydra.sweep.dir=sweep"
    command("gpt2exp.train", "-m", *words, "optimizer.lr=1e-3,2e-3", "seed=1,2", cwd=folder)
    whole = folder / "sweep"
    planned = json.loads((whole / SWEEP).read_text())
    for arm in sorted(whole.glob("*,seed=1")):
        text = {name: (arm / name).read_text() for name in ("summary.json", "metrics.jsonl", "status.json")}
        summary, job = json.loads(text["summary.json"]), planned["jobs"][planned["folders"].index(arm.name)]
        for seed in range(3, runs // 2 + 1):
            copy = whole / arm.name.replace(",seed=1", f",seed={seed}")
            planned["jobs"].append([*job[:-1], f"seed={seed}"])
            planned["folders"].append(copy.name)
            shutil.copytree(arm / ".hydra", copy / ".hydra")
            moved = {key: summary[key] + 0.01 * math.sin(seed) for key in ("val_loss", "loss_mean_last10", "loss_last")}
            summary |= moved | {"seed": seed, "config": summary["config"] | {"seed": seed}}
            (copy / "summary.json").write_text(json.dumps(summary))
            (copy / "metrics.jsonl").write_text(text["metrics.jsonl"])
            (copy / "status.json").write_text(text["status.json"])
    (whole / SWEEP).write_text(json.dumps(planned))
    taken = command("gpt2exp.compare.__main__", "sweep", cwd=folder)
    if (found := len(json.loads((whole / "comparison.json").read_text())["runs"])) != runs:
        raise ValueError(f"{found} runs were compared, not {runs}")
    return taken


def text(tokens: int, folder: Path) -> tuple[float, float]:
    """A run of one step on a text of so many tokens that nobody has tokenised before."""
    shakespeare = assets.fetch(assets.TINY_SHAKESPEARE).read_text()
    with (folder / "text.txt").open("w") as file:
        for copy in range(max(1, round(tokens / 338_025))):
            file.write(f"Copy {copy}.\n{shakespeare[: int(len(shakespeare) * min(1, tokens / 338_025))]}\n")
    shutil.copytree(assets.cache_folder() / "assets", folder / "cache" / "assets")
    words = "model=nano", "model.n_layer=1", "train.steps=1", "data=text", "data.path=text.txt"
    return command("gpt2exp.train", *words, cwd=folder, GPT2EXP_CACHE=str(folder / "cache"))


def workers(*words: str) -> Callable[[int, Path], tuple[float, float]]:
    """A whole sweep, from the command to its comparison, with so many jobs at a time; the peak of the command alone."""

    def measure(at_once: int, folder: Path) -> tuple[float, float]:
        engine = ("hydra/launcher=workers", f"hydra.launcher.n_jobs={at_once}") if at_once > 1 else ()
        return command("gpt2exp.train", "-m", *words, *engine, "hydra.sweep.dir=sweep", cwd=folder)

    return measure


SERIES: dict[str, tuple[str, tuple[int, ...], Callable[[int, Path], tuple[float, float]]]] = {
    "batch": ("sequences of 32 tokens in a batch of GPT-2 124M, a step", (1, 2, 4, 8, 16), step("train.batch_size")),
    "sequence": ("tokens in the one sequence of a step", (32, 64, 128, 256, 512, 1024), step("train.seq_len")),
    "depth": ("layers of width 768, a step of one sequence", (3, 6, 12, 24), step("model.n_layer")),
    "nano": (
        "jobs at a time, of a sweep of 8 of nano, 100 steps each",
        (1, 2, 4),
        workers("model=nano", "train.steps=100", "seed=range(8)"),
    ),
    "gpt2": (
        "jobs at a time, of a sweep of 4 of GPT-2 124M, 10 steps each",
        (1, 2, 4),
        workers("train.steps=10", "seed=range(4)"),
    ),
    "jobs": ("jobs in a sweep, planned", (2, 10, 100, 1000), dry_sweep),
    "runs": ("runs in a comparison", (10, 100, 1000, 5000), comparison),
    "tokens": ("tokens in a new text, to the end of a run's first step", (10**5, 10**6, 10**7, 10**8, 10**9), text),
}


# --- the page --------------------------------------------------------------------------------------------------------


def read() -> list[Size]:
    """The table as it was measured."""
    with (HERE / "growth.csv").open(newline="") as file:
        return [
            Size(row["series"], int(row["size"]), float(row["seconds"]), float(row["mib"]))
            for row in csv.DictReader(file)
        ]


def table(sizes: list[Size]) -> str:
    """A row a series: what it takes at each size, and the exponents."""
    rows = ["| what grows | sizes | seconds | largest exponent | MiB | largest exponent |", "|---|---|---|--:|---|--:|"]
    for name, (told, _, _) in SERIES.items():
        own = [size for size in sizes if size.series == name]
        if own:
            seconds, mib = ([getattr(size, key) for size in own] for key in ("seconds", "mib"))
            cells = ", ".join(f"{size.size:,}" for size in own), ", ".join(f"{x:.3g}" for x in seconds)
            memory = ", ".join(f"{x:,.0f}" for x in mib)
            steep = [f"{max(exponents(own, key)):.2f}" for key in ("seconds", "mib")]
            rows.append(f"| {told} | {' | '.join(cells)} | {steep[0]} | {memory} | {steep[1]} |")
    return "\n".join(rows)


def exponents(own: list[Size], key: str) -> list[float]:
    """By what power a quantity grows between neighbouring sizes."""
    pairs = itertools.pairwise(own)
    return [math.log(getattr(b, key) / getattr(a, key)) / math.log(b.size / a.size) for a, b in pairs]


def draw(sizes: list[Size]) -> None:
    """Time and memory of each series, relative to its smallest size."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(axes, ("seconds", "mib"), ("time", "peak memory"), strict=True):
        for name in SERIES:
            own = [size for size in sizes if size.series == name]
            if own:
                x = [size.size / own[0].size for size in own]
                axis.loglog(x, [getattr(size, key) / getattr(own[0], key) for size in own], marker="o", label=name)
        ends = axis.get_xlim()
        axis.loglog(ends, ends, color="0.7", linestyle="--", label="as the work")
        axis.set(xlabel="size over the smallest", ylabel=f"{label} over the smallest's")
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "growth.png", dpi=120)


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    chosen = [] if argv == ["--page"] else argv or list(SERIES)
    known = [size for size in read() if size.series not in chosen] if (HERE / "growth.csv").is_file() else []
    for name in chosen:
        _, values, measure = SERIES[name]
        for value in values:
            with tempfile.TemporaryDirectory() as folder:
                known.append(Size(name, value, *measure(value, Path(folder))))
            print(*known[-1], flush=True)
    known.sort(key=lambda size: (list(SERIES).index(size.series), size.size))
    write_rows(HERE / "growth.csv", [size._asdict() for size in known])
    draw(known)
    about = f"Measured on {time.strftime('%Y-%m-%d')}, {device_name(torch.device('cpu'))}." if chosen else ""
    page = table(known) + f"\n\n![growth](growth.png)\n\n{about or said()}"
    replace_block(HERE / "README.md", "growth", page)


def said() -> str:
    """When and where the table was measured, as the page has it."""
    return next(line for line in (HERE / "README.md").read_text().splitlines() if line.startswith("Measured on"))


if __name__ == "__main__":
    main(sys.argv[1:])
