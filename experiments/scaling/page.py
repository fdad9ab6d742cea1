"""Fit, check and predict: `python experiments/scaling/page.py` writes all of this folder but the sources.

`published.csv` holds what others measured, a row a figure: its source, its words, what was run, and whether it is to be
fitted to or checked against. From it come `fitted.csv`, `checks.csv`, `predictions.csv`, `announced.csv`, the figures
and the tables between the markers of `README.md`. No figure on that page is typed by hand, and no GPU was at hand.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from scipy.optimize import least_squares

from gpt2exp.compare import figures
from gpt2exp.config import ModelConfig
from gpt2exp.model import size

HERE = Path(__file__).parent
CONF = HERE.parent.parent / "conf" / "model"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from predict import BOUNDS, GPUS, Fitted, Setup, memory, mfu, milliseconds, step, tokens_per_second  # noqa: E402
from publish import replace_block, write_rows  # noqa: E402

Row = dict[str, Any]

SIZES = {
    name: ModelConfig(**yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
}
PRECISIONS = ("fp32", "tf32", "bf16")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = 512
"""Of 1024 tokens a step: the half million tokens of GPT-3's small models and of build-nanogpt."""
TOKENS = 10e9
"""To train on, where hours are told: what build-nanogpt and llm.c take for the 124M model."""
ROOM = 0.9
"""Of a GPU's memory: the rest is for CUDA's context, cuBLAS's and NCCL's buffers and what the allocator splits."""
LONG = 50
"""Milliseconds from which a step is not mostly waiting for Python."""
SCALING_WEIGHT = 5.0
"""How much more a series' change from few GPUs to many counts than its level: its level says little of the links."""


# --- what others published -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A published figure: its row, and what was run."""

    row: dict[str, str]
    setup: Setup

    @property
    def source(self) -> str:
        """The series without what tells it from others of the same people."""
        return self.row["series"].split(",")[0]

    @property
    def is_time(self) -> bool:
        """Not memory."""
        return self.row["quantity"] in ("ms", "tokens/s")

    @property
    def value(self) -> float:
        """Milliseconds a step, or bytes."""
        value = float(self.row["value"])
        if self.row["quantity"] == "tokens/s":
            return 1e3 * self.setup.step_tokens / value
        return value * {"ms": 1.0, "MiB": 2.0**20, "GB": 1e9}[self.row["quantity"]]

    def error(self, fitted: Fitted) -> float:
        """Predicted over published, less one."""
        return (milliseconds(self.setup, fitted) if self.is_time else memory(self.setup)) / self.value - 1


def read(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def published() -> list[Point]:
    """Every figure of `published.csv`."""
    points = []
    for row in read(HERE / "published.csv"):
        told = {key: int(row[key]) for key in ("gpus", "batch", "seq_len", "accumulation")}
        words = {key: row[key] for key in ("gpu", "precision", "mode", "attention", "adamw", "parallel")}
        shape = ModelConfig(
            n_layer=int(row["layers"]),
            n_head=int(row["heads"]),
            n_embd=int(row["width"]),
            vocab_size=int(row["vocab"]),
            block_size=int(row["seq_len"]),
        )
        points.append(Point(row, Setup(model=shape, loss="whole", **told, **words)))
    return points


def fit(points: Sequence[Point]) -> Fitted:
    """The numbers under which the points' errors are smallest, to three digits so that they are the same everywhere.

    Logarithms of the ratios, and beside them how each series changes from its fewest GPUs on; a few that are far off
    count less (soft L1 beyond a tenth).
    """
    pairs = []
    for one in points:
        alike = [p for p in points if same_but_gpus(p, one)]
        fewest = min(alike, key=lambda p: p.setup.gpus)
        if one.setup.gpus > fewest.setup.gpus:
            pairs.append((one, fewest))

    def residuals(logarithms: Sequence[float]) -> list[float]:
        fitted = Fitted(*map(math.exp, logarithms))
        off = {id(point): math.log1p(point.error(fitted)) for point in points}
        return [*off.values(), *(SCALING_WEIGHT * (off[id(a)] - off[id(b)]) for a, b in pairs)]

    low, start, high = ([math.log(x) for x in astuple(numbers)] for numbers in (BOUNDS[0], Fitted(), BOUNDS[1]))
    found = least_squares(residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return Fitted(*(float(f"{math.exp(x):.3g}") for x in found.x))


def same_but_gpus(a: Point, b: Point) -> bool:
    """Of one series, and the same model and sequences."""
    return all(a.row[key] == b.row[key] for key in ("series", "model", "seq_len"))


# --- the tables' rows ------------------------------------------------------------------------------------------------


def check_rows(points: Sequence[Point], fitted: Fitted) -> list[Row]:
    """Each figure beside the prediction; also by numbers fitted without its source, where it was fitted to."""
    chosen = [point for point in points if point.is_time and point.row["use"] == "fit"]
    without = {
        source: fit([point for point in chosen if point.source != source])
        for source in dict.fromkeys(point.source for point in chosen)
    }
    rows = []
    for point in points:
        kept = {key: value for key, value in point.row.items() if key not in ("layers", "heads", "width", "vocab")}
        blind = f"{point.error(without[point.source]):.4f}" if point in chosen else ""
        shown = point.value * (1 if point.is_time else 1 / 1e9)
        error = point.error(fitted)
        told = {"unit": "ms" if point.is_time else "GB", "published": f"{shown:.5g}"}
        told |= {"predicted": f"{shown * (1 + error):.5g}", "error": f"{error:.4f}", "error_without_source": blind}
        rows.append(kept | told)
    return rows


def plan(setup: Setup) -> Setup | None:
    """`setup` with the largest batch of a power of two that fits, accumulated to a step; None if not one sequence."""
    share = SEQUENCES // setup.gpus
    while setup.batch:
        tried = replace(setup, accumulation=share // setup.batch)
        if setup.batch <= share and memory(tried) <= ROOM * GPUS[setup.gpu].memory:
            return tried
        setup = replace(setup, batch=setup.batch // 2)
    return None


def prediction_rows(fitted: Fitted) -> list[Row]:
    """Every size, GPU, count, precision and way to share the work."""
    rows = []
    for gpu in ("A100", "H100"):
        for name, model in SIZES.items():
            for gpus in COUNTS:
                for precision in PRECISIONS:
                    for parallel in ("ddp", "fsdp") if gpus > 1 else ("ddp",):
                        asked = Setup(model, gpu, gpus, precision, batch=SEQUENCES, parallel=parallel)
                        rows.append(prediction_row(name, plan(asked) or replace(asked, batch=0), fitted))
    return rows


def announced_rows(fitted: Fitted) -> list[Row]:
    """What `experiments/gpu.py` measures, said before it is run: GPT-2 on a card, at 16 x 1024 and near it."""
    steps = [(mode, precision, 16) for mode in ("eager", "compiled") for precision in PRECISIONS]
    steps += [("eager", "tf32", batch) for batch in (8, 17, 24)]
    rows = []
    for gpu in ("A100", "H100"):
        for mode, precision, batch in steps:
            row = prediction_row("gpt2", Setup(SIZES["gpt2"], gpu, 1, precision, batch, mode=mode), fitted)
            rows.append({key: value for key, value in row.items() if key in ANNOUNCED} | {"mode": mode})
    return rows


ANNOUNCED = ("gpu", "precision", "batch", "step_ms", "tokens_per_second", "mfu", "memory_gb")


def prediction_row(name: str, setup: Setup, fitted: Fitted) -> Row:
    """One of them; a batch of 0 says that it does not fit."""
    told = {
        "gpu": setup.gpu,
        "model": name,
        "gpus": setup.gpus,
        "precision": setup.precision,
        "parallel": setup.parallel if setup.gpus > 1 else "one",
        "batch": setup.batch,
        "accumulation": setup.accumulation,
    }
    if not setup.batch:
        return told
    parts = step(setup, fitted)
    speed = tokens_per_second(setup, fitted)
    return (
        told
        | {"step_ms": f"{sum(parts.values()):.4g}", "tokens_per_second": f"{speed:.4g}"}
        | {"mfu": f"{mfu(setup, fitted):.3f}", "memory_gb": f"{memory(setup) / 1e9:.4g}"}
        | {"hours_10b": f"{TOKENS / speed / 3600:.4g}"}
        | {f"{part.replace(' ', '_')}_ms": f"{value:.4g}" for part, value in parts.items()}
    )


# --- the page --------------------------------------------------------------------------------------------------------


def table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Markdown; a column whose name ends in `>` is set flush right."""
    names = [name.strip() for name in head.split("|")]
    ruler = ["--:" if name.endswith(">") else "---" for name in names]
    lines = [[name.rstrip("> ") for name in names], ruler, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def answer(predictions: Sequence[Row]) -> str:
    """How long ten billion tokens take in bf16."""
    machines = [("A100", "1"), ("A100", "8"), ("H100", "1"), ("H100", "8"), ("H100", "64")]
    rows = []
    for name, model in SIZES.items():
        cells = [f"`{name}`, {size.parameters(model)['total'] / 1e6:,.0f}M"]
        for gpu, gpus in machines:
            row = simplest(predictions, gpu=gpu, model=name, gpus=gpus, precision="bf16")
            cells.append(duration(float(row["hours_10b"])))
        rows.append(cells)
    head = "model | " + " | ".join(f"{gpus} x {gpu} >" for gpu, gpus in machines)
    return f"Prediction: {TOKENS / 1e9:.0f} billion tokens in bf16, on 80 GB SXM cards.\n\n{table(head, rows)}"


def ratios(predictions: Sequence[Row]) -> str:
    """The precisions beside each other, and 64 GPUs beside 8."""

    def over(gpu: str, slow: dict[str, str], fast: dict[str, str]) -> str:
        steps = [
            [float(simplest(predictions, gpu=gpu, model=name, **told)["step_ms"]) for told in (slow, fast)]
            for name in SIZES
        ]
        found = [a / b for a, b in steps]
        return f"{min(found):.1f} to {max(found):.1f}"

    pairs = [
        ("fp32 over TF32, 1 GPU", {"gpus": "1", "precision": "fp32"}, {"gpus": "1", "precision": "tf32"}),
        ("TF32 over bf16, 1 GPU", {"gpus": "1", "precision": "tf32"}, {"gpus": "1", "precision": "bf16"}),
        ("1 GPU over 8, bf16", {"gpus": "1", "precision": "bf16"}, {"gpus": "8", "precision": "bf16"}),
        ("8 GPUs over 64, bf16", {"gpus": "8", "precision": "bf16"}, {"gpus": "64", "precision": "bf16"}),
    ]
    rows = [[name, *(over(gpu, slow, fast) for gpu in ("A100", "H100"))] for name, slow, fast in pairs]
    return f"Prediction: ratios of the step's time, over the four sizes.\n\n{table('ratio | A100 > | H100 >', rows)}"


def duration(hours: float) -> str:
    """In the unit one would say it in."""
    if hours < 2:
        return f"{60 * hours:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


def simplest(rows: Sequence[Row], **told: str) -> Row:
    """Of the rows that hold what is told and fit, DDP before FSDP."""
    having = [row for row in rows if all(row[key] == value for key, value in told.items()) and row["batch"] != "0"]
    return min(having, key=lambda row: row["parallel"] == "fsdp")


def predictions_of(gpu: str) -> Callable[[Sequence[Row]], str]:
    """The table of a GPU: on 1, 8 and 64 of them."""

    def write(predictions: Sequence[Row]) -> str:
        rows = []
        for name in SIZES:
            for gpus in ("1", "8", "64"):
                for precision in PRECISIONS:
                    told = {"gpu": gpu, "model": name, "gpus": gpus, "precision": precision}
                    row = simplest(predictions, **told)
                    sharded = [] if gpus == "1" else [simplest(predictions, **told, parallel="fsdp")]
                    waits = float(row["waiting_ms"]) + float(row["host_ms"])
                    what = [name, gpus, precision, row["parallel"].upper() if gpus != "1" else ""]
                    time = [f"{row['batch']} x {row['accumulation']}", f"{float(row['step_ms']):,.0f}", f"{waits:.0f}"]
                    speed = [f"{float(row['tokens_per_second']):,.0f}", f"{float(row['mfu']):.0%}"]
                    room = "".join(f"{float(one['memory_gb']):.0f} ({one['batch']})" for one in sharded)
                    rows.append([*what, *time, *speed, f"{float(row['memory_gb']):.0f}", room])
        head = "model | GPUs > | precision | by | batch a GPU x accumulated > | step, ms > | of it waits, ms > "
        head += "| tokens/s > | MFU > | memory a GPU, GB > | with FSDP (batch) > "
        title = f"Prediction: {gpu} SXM 80 GB, {SEQUENCES} sequences of 1024 tokens a step, the largest batch that fits"
        return f"{title}\n\n{table(head, rows)}"

    return write


def announced(rows: Sequence[Row]) -> str:
    """The table of what one card should show."""
    lines = []
    for mode, precision, batch in dict.fromkeys((row["mode"], row["precision"], row["batch"]) for row in rows):
        cells = [mode, precision, f"{batch} x 1024"]
        for gpu in ("A100", "H100"):
            told = {"gpu": gpu, "mode": mode, "precision": precision, "batch": batch}
            (row,) = (row for row in rows if told.items() <= row.items())
            numbers = float(row["step_ms"]), float(row["tokens_per_second"]), float(row["memory_gb"])
            cells += [f"{numbers[0]:,.0f}", f"{numbers[1]:,.0f}", f"{numbers[2]:.1f}"]
        lines.append(cells)
    head = "how | precision | B x T >" + "".join(
        f" | {gpu}: step, ms > | tokens/s > | GB >" for gpu in ("A100", "H100")
    )
    return f"Prediction: `gpt2` on one 80 GB card.\n\n{table(head, lines)}"


def summary(checks: Sequence[Row]) -> str:
    """How far off, by series."""
    rows = []
    for use, unit in (("fit", "ms"), ("check", "ms"), ("check", "GB")):
        having = [row for row in checks if (row["use"], row["unit"]) == (use, unit)]
        for series in dict.fromkeys(row["series"] for row in having):
            mine = [row for row in having if row["series"] == series]
            errors = [float(row["error"]) for row in mine]
            blind = [float(row["error_without_source"]) for row in mine if row["error_without_source"]]
            what = {"ms": "time", "GB": "memory"}[unit]
            if unit == "ms":
                what += ", fitted to" if use == "fit" else ", held out"
            rows.append([series, what, str(len(mine)), *spread(errors), *(spread(blind) if blind else ("", ""))])
    head = "series | of | n > | median error > | worst > | median, its source left out > | worst > "
    return f"Prediction over published, less one:\n\n{table(head, rows)}"


def trust(checks: Sequence[Row]) -> str:
    """How near the prediction of a step that is not mostly waiting comes, in a sentence for each kind of check."""

    def within(rows: Sequence[Row], key: str) -> str:
        errors = sorted(abs(float(row[key])) for row in rows)
        return f"half are within {statistics.median(errors):.0%}, all within {errors[-1]:.0%}"

    long = [row for row in checks if row["unit"] == "ms" and float(row["published"]) >= LONG]
    fitted_to = [row for row in long if row["use"] == "fit"]
    by_hand = [float(row["error"]) for row in long if row["series"] == "llm.c"]
    return (
        f"Of {len(fitted_to)} published steps of {LONG} ms and more {within(fitted_to, 'error')}; predicted by numbers "
        f"fitted without their source, {within(fitted_to, 'error_without_source')}.\n"
        "Beside llm.c, hand-written CUDA and held out, the prediction for PyTorch is "
        f"{min(by_hand):.0%} to {max(by_hand):.0%} too long."
    )


def spread(errors: Sequence[float]) -> tuple[str, str]:
    """Median and worst."""
    return f"{statistics.median(errors):+.0%}", f"{max(errors, key=abs):+.0%}"


def every_check(unit: str) -> Callable[[Sequence[Row]], str]:
    """All figures of time, or of memory."""

    def write(checks: Sequence[Row]) -> str:
        rows = []
        for row in checks:
            if row["unit"] != unit:
                continue
            blind = f"{float(row['error_without_source']):+.0%}" if row["error_without_source"] else ""
            how = ", ".join(row[key] for key in ("mode", "attention", "adamw"))
            number = 1 + addresses(checks).index(row["url"])
            rows.append(
                [f"{row['series']} [{number}]", row["model"], f"{row['gpus']} x {row['gpu']}", row["precision"]]
                + [f"{row['batch']} x {row['seq_len']} x {row['accumulation']}", how, shown(row["published"])]
                + [shown(row["predicted"]), f"{float(row['error']):+.0%}"]
                + ([blind, "" if row["use"] == "fit" else "held out"] if unit == "ms" else [])
            )
        head = "source | model | GPUs | precision | batch x T x accumulated | how "
        head += f"| published, {unit} > | predicted, {unit} > | error >"
        return table(head + (" | its source left out > | " if unit == "ms" else ""), rows)

    return write


def addresses(checks: Sequence[Row]) -> list[str]:
    """Of the sources, in order."""
    return list(dict.fromkeys(row["url"] for row in checks))


def sources(checks: Sequence[Row]) -> str:
    """What the numbers in brackets stand for."""
    return "\n".join(f"[{number}]: {url}" for number, url in enumerate(addresses(checks), 1))


def shown(text: str) -> str:
    """A figure to four digits at most."""
    value = float(text)
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def numbers(fitted: Fitted) -> str:
    """The free numbers, and where a bound holds one."""
    rows = []
    for name, value in asdict(fitted).items():
        low, high = (getattr(bound, name) for bound in BOUNDS)
        rows.append([f"`{name}`", f"{value:g}", "at its bound" if value in (low, high) else ""])
    return table("number | value > | ", rows)


def chunked_loss(fitted: Fitted) -> str:
    """What the loss in chunks costs in time and saves in memory, where the logits are not the bottleneck."""
    rows = []
    for name, model in SIZES.items():
        for gpu in ("A100", "H100"):
            ours = Setup(model, gpu, 1, "bf16", batch=8)
            whole = replace(ours, loss="whole")
            ratio = milliseconds(ours, fitted) / milliseconds(whole, fitted)
            cells = [f"{memory(one) / 1e9:.1f}" for one in (ours, whole)]
            rows.append([name, gpu, f"{ratio:.2f}", *cells])
    head = "model | GPU | step, chunks over whole > | memory in chunks, GB > | whole, GB >"
    return f"Prediction: bf16, 8 sequences of 1024 tokens on one GPU.\n\n{table(head, rows)}"


def left_out(fitted: Fitted) -> str:
    """Published figures that could not be used, and what can be said of them."""
    gpt3 = ModelConfig(block_size=2048)
    implied = 524_288 / 0.150 * size.flops_per_token(gpt3, 2048) / (8 * Setup(gpt3, "A100", 8, "bf16", 32).peak)
    peak = Setup(gpt3, "H100", 8, "bf16", 32).peak
    nanochat = 4.330784131228946e19 / 10949.46713 / (8 * peak)
    wait = fitted.wait_ms * math.log2(64)
    rows = [
        [
            "[llm.c, GPT-3 125M](https://github.com/karpathy/llm.c/blob/f1e2ace/scripts/run_gpt3_125M.sh)",
            "8 x A100, 524,288 tokens of 2048: “steps in ~150ms/iter”",
            f"would be {implied:.0%} of the A100's peak; perhaps an H100",
        ],
        [
            "[nanochat, run 1](https://github.com/karpathy/nanochat/blob/92d63d4/dev/LEADERBOARD.md)",
            "8 x H100, depth 24: “total_training_flops 4.330784131228946e+19”, “total_training_time 10949.46713”",
            f"not GPT-2's shape, attention or optimizer; by its own count {nanochat:.0%} MFU",
        ],
        [
            "[Modal, modded-nanogpt](https://github.com/modal-labs/multinode-training-guide/pull/27)",
            "64 x H100: “`27ms` of compute time and `3ms` of network time”",
            f"not GPT-2; `wait_ms` says {wait:.0f} ms at 64 GPUs, so short steps may be faster than predicted",
        ],
        [
            "[Debirtha Saha](https://debtirthasaha.github.io/blog/2026/gpt2-124m/)",
            "8 x A100, build-nanogpt: “Sustained throughput 1.1M tokens/sec”",
            "the batch a GPU is not said",
        ],
    ]
    return table("source | says | why not used", rows)


# --- figures ---------------------------------------------------------------------------------------------------------


def draw(path: Path, plot: Callable[[Axes], None]) -> None:
    """A figure in the house's style."""
    with matplotlib.rc_context(figures.STYLE):
        figure = Figure(figsize=figures.SIZE, layout="constrained")
        plot(figure.add_subplot())
        figure.savefig(path, format="png", dpi=150, facecolor="white", metadata={"Software": None})


def plot_checks(checks: Sequence[Row]) -> Callable[[Axes], None]:
    """Error against the step's length, by source."""

    def plot(axes: Axes) -> None:
        times = [row for row in checks if row["unit"] == "ms"]
        sources = dict.fromkeys(row["series"].split(",")[0] for row in times)
        for colour, marker, source in zip(figures.COLOURS, "osD^v", sources, strict=False):
            mine = [row for row in times if row["series"].split(",")[0] == source]
            held = "" if any(row["use"] == "fit" for row in mine) else ", held out"
            x, y = ([float(row[key]) for row in mine] for key in ("published", "error"))
            axes.plot(x, [100 * e for e in y], marker, color=colour, ms=4, alpha=0.8, label=f"{source}{held}")
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(
            StrMethodFormatter("{x:,.0f}")
        )  # 10^3 would be mathtext, which the style forbids
        axes.set_xlabel("published step, ms")
        axes.set_ylabel("prediction off by, %")
        axes.legend(fontsize=8)

    return plot


def plot_scaling(predictions: Sequence[Row]) -> Callable[[Axes], None]:
    """Tokens a second in bf16 over the number of GPUs."""

    def plot(axes: Axes) -> None:
        for colour, name in zip(figures.COLOURS, SIZES, strict=False):
            for gpu, dash in zip(("H100", "A100"), figures.DASHES, strict=False):
                rows = [simplest(predictions, gpu=gpu, model=name, gpus=str(n), precision="bf16") for n in COUNTS]
                speed = [float(row["tokens_per_second"]) for row in rows]
                axes.plot(COUNTS, speed, ls=dash, color=colour, marker="o", ms=3, label=f"{name}, {gpu}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_ylim(top=1e8)  # room for the legend
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.set_xlabel("GPUs")
        axes.set_ylabel("tokens/s, predicted, bf16")
        axes.legend(fontsize=7, ncols=2, loc="upper left")

    return plot


# --- all of it -------------------------------------------------------------------------------------------------------


def blocks(folder: Path) -> dict[str, str]:
    """The page's tables by their marker, from the CSV files of `folder`."""
    checks, predictions = read(folder / "checks.csv"), read(folder / "predictions.csv")
    fitted = Fitted(**{row["number"]: float(row["value"]) for row in read(folder / "fitted.csv")})
    return {
        "announced": announced(read(folder / "announced.csv")),
        "answer": f"{answer(predictions)}\n\n{trust(checks)}",
        "ratios": ratios(predictions),
        "A100": predictions_of("A100")(predictions),
        "H100": predictions_of("H100")(predictions),
        "summary": summary(checks),
        "times": every_check("ms")(checks),
        "memory": every_check("GB")(checks),
        "sources": sources(checks),
        "fitted": numbers(fitted),
        "loss": chunked_loss(fitted),
        "left out": left_out(fitted),
    }


def compute(folder: Path) -> None:
    """The four CSV files, into `folder`."""
    points = published()
    fitted = fit([point for point in points if point.is_time and point.row["use"] == "fit"])
    write_rows(folder / "fitted.csv", [{"number": key, "value": f"{x:g}"} for key, x in asdict(fitted).items()])
    write_rows(folder / "checks.csv", check_rows(points, fitted))
    write_rows(folder / "predictions.csv", prediction_rows(fitted))
    write_rows(folder / "announced.csv", announced_rows(fitted))


def main() -> None:
    """See the module's docstring."""
    compute(HERE)
    draw(HERE / "checks.png", plot_checks(read(HERE / "checks.csv")))
    draw(HERE / "scaling.png", plot_scaling(read(HERE / "predictions.csv")))
    for name, text in blocks(HERE).items():
        replace_block(HERE / "README.md", name, text)


if __name__ == "__main__":
    main()
