"""The figures of a comparison, each drawn once and saved as PNG on white and as SVG on nothing.

matplotlib without pyplot, so nothing global is left behind. User text never reaches matplotlib's mathtext. No torch.
"""

from __future__ import annotations

import functools
import io
import math
import re
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from gpt2exp.compare.comparison import MEMORY, SPEED, Comparison, Effect, Grid, Row
from gpt2exp.compare.inference import reach
from gpt2exp.compare.report import Drawing, Section
from gpt2exp.run import record
from gpt2exp.run.metrics import Metric, number_of
from gpt2exp.run.terminal import printable

Array = npt.NDArray[np.float64]
Curve = tuple[Array, Array]
"""Places along x and the values there."""
Replicates = Sequence[tuple[int, Curve | None]]
"""Curves with the seed of each; None where a run did not measure it."""
Draw = Callable[[Axes, "Axis"], str | None]
"""Draws an axis of the comparison and returns the caption; None if there is nothing to draw."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart with any colour vision: Okabe and Ito 2008, without yellow (too faint on white) and black."""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
"""A second mark, for more arms than colours."""
POINTS = 300
"""Points of a curve; longer runs are averaged in equal stretches."""
SIZE = (5.0, 3.4)
"""Inches; 360 units of an SVG, in which text of 11 stays readable on a telephone."""
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "gpt2exp",
    "text.parse_math": False,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "hatch.linewidth": 0.7,
    "patch.linewidth": 0.8,
}


@dataclass
class Arm:
    """The finished runs of one arm, by seed, and how it is drawn."""

    name: str
    colour: str
    dash: Any
    cells: list[tuple[int, Row]]

    @property
    def label(self) -> str:
        """Short enough for a legend, and not taken for a private one."""
        return " " + shorten(self.name, 26)


@dataclass
class Axis:
    """What the figures of an axis are drawn from."""

    key: str | None
    arms: list[Arm]
    grid: Grid
    comparison: Comparison
    metrics: Callable[[Row], list[dict[str, Any]]]
    clock: str
    """What runs along x: `step`, or `tokens` where a step does not cost the same in every run."""

    def effects(self, metric: str) -> list[Effect]:
        """Of its arms, in one metric."""
        return [effect for effect in self.comparison.axes if (effect.key, effect.metric) == (self.key, metric)]

    def curve(self, row: Row, key: str) -> Curve | None:
        """A metric of a run along the clock; None where it was never measured."""
        points = {line[self.clock]: line[key] for line in self.metrics(row) if key in line}  # resumed: the last counts
        if not points:
            return None
        x = sorted(points)
        return np.array(x, dtype=float), np.array([points[at] for at in x], dtype=float)

    def replicates(self, key: str) -> list[tuple[Arm, Replicates]]:
        """A metric's curves of every run, by arm."""
        return [(arm, [(seed, self.curve(row, key)) for seed, row in arm.cells]) for arm in self.arms]


def shorten(text: str, most: int) -> str:
    """The two ends of a long text, without what neither a terminal nor an SVG can hold."""
    text, half = printable(text), (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def draw(comparison: Comparison) -> list[Section]:
    """Every figure the finished runs have something for."""
    done = [row for row in comparison.runs if row["state"] == "done"]
    if not done:
        return []
    grid = Grid([row for row in comparison.runs if "config" in row], comparison.swept)
    metrics = functools.cache(lambda folder: record.read_metrics(Path(folder)))
    per_step = {row["tokens"] / row["steps"] for row in done if row["steps"]}
    clock = "step" if len(per_step) == 1 else "tokens"
    sections = []
    for number, key in enumerate(comparison.swept or [None]):
        axis = Axis(key, _arms(grid, key), grid, comparison, lambda row: metrics(row["folder"]), clock)
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", key or "seeds").strip("-.")[:60] or "axis"
        sections.append(Section(key, list(_drawings(axis, f"{number + 1}-{slug}"))))
    return sections


def _arms(grid: Grid, key: str | None) -> list[Arm]:
    at = None if key is None else list(grid.axes).index(key)
    found = []
    for number, name in enumerate(["all runs"] if key is None else grid.axes[key]):
        cells = [(seed, row) for (seed, arms), row in grid.cells.items() if at is None or arms[at] == name]
        turn, colour = divmod(number, len(COLOURS))
        found.append(Arm(name, COLOURS[colour], DASHES[turn % len(DASHES)], cells))
    return found


def _drawings(axis: Axis, stem: str) -> Iterable[Drawing]:
    arms, seeds = len(axis.arms), len(axis.grid.seeds)
    ended = sum(effect.mean_difference is not None for effect in axis.effects(axis.comparison.metric))
    speed = functools.partial(_bars, metric=SPEED, form=lambda value: f"{value:,.0f} tokens/s")
    memory = functools.partial(_bars, metric=MEMORY, form=size)
    kinds: list[tuple[str, str, float, Draw]] = [
        ("loss", "Loss over the run", SIZE[1], _loss),
        ("gap", "Difference along the way", SIZE[1], _gap),
        ("difference", "Difference at the end, seed by seed", _height(ended, 0.55 + 0.16 * min(seeds, 12)), _pairs),
        ("residual", "Residual stream through the blocks", SIZE[1], _residual),
        ("speed", "Throughput", _height(arms, 0.62), speed),
        ("memory", "Peak memory", _height(arms, 0.62), memory),
        ("unseen", "What unused tokens cost", SIZE[1], _unseen),
    ]
    for kind, title, height, painter in kinds:
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that the font lacks is no news to the user
            figure = Figure(figsize=(SIZE[0], height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.05))
            caption = painter(figure.add_subplot(), axis)
            if caption is None:
                continue
            svg, png = io.BytesIO(), io.BytesIO()
            figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
            heading = title if axis.key is None else f"{shorten(axis.key, 30)}: {title[0].lower()}{title[1:]}"
            figure.suptitle(heading, x=0.02, ha="left", fontweight="bold", fontsize=11)
            figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
            yield Drawing(f"{stem}-{kind}", title, caption, svg.getvalue(), png.getvalue())


def _height(rows: int, each: float) -> float:
    return min(0.75 + each * max(rows, 1), 14.0)


# --- curves ----------------------------------------------------------------------------------------------------------


def _by_seed(curves: Replicates) -> Curve | None:
    """Where all curves have points (points,), and a row a seed (seeds, points): a seed's curves are averaged first."""
    known = [(seed, curve) for seed, curve in curves if curve is not None]
    x = functools.reduce(np.intersect1d, [curve[0] for _, curve in known]) if known else np.array([])
    if not len(x):
        return None
    seeds: dict[int, list[Array]] = defaultdict(list)
    for seed, (own, y) in known:
        seeds[seed].append(y[np.searchsorted(own, x)])
    y = np.stack([np.mean(rows, axis=0) for rows in seeds.values()])
    if len(x) > POINTS:
        stretch = math.ceil(len(x) / POINTS)
        starts = np.arange(0, len(x), stretch)
        sizes = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts, axis=1) / sizes
    return x, y


def _spread(y: Array) -> Array:
    """The standard deviation between seeds."""
    return y.std(axis=0, ddof=1) if len(y) > 1 else np.zeros(y.shape[1])


def _reach(y: Array) -> Array:
    """Half the 95 % t interval of the mean over seeds."""
    return _spread(y) * reach(max(len(y), 2), "fixed") / math.sqrt(len(y))


def _curves(
    ax: Axes, axis: Axis, label: str, curves: Iterable[tuple[Arm, Replicates]], half: Callable[[Array], Array] = _spread
) -> bool:
    """A line for the mean of each arm's seeds and a band of ± `half` around it; whether there was any to draw."""
    handles, labels = [], []
    for arm, replicates in curves:
        stacked = _by_seed(replicates)
        if stacked is None:
            continue
        (x, y), mean = stacked, stacked[1].mean(axis=0)
        if len(y) > 1:
            ax.fill_between(x, mean - half(y), mean + half(y), color=arm.colour, alpha=0.2, linewidth=0)
        marker = "o" if len(x) < 8 else None
        handles += ax.plot(x, mean, color=arm.colour, linestyle=arm.dash, linewidth=1.6, marker=marker, markersize=3.5)
        labels.append(arm.label)
    if not handles:
        return False
    ax.set_xlabel("step" if axis.clock == "step" else "tokens trained on")
    ax.set_ylabel(label)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if axis.clock == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    _rules(ax)
    _legend(ax, handles, labels)
    return True


def _rules(ax: Axes) -> None:
    ax.grid(axis="y", color="black", alpha=0.12, linewidth=0.7)
    ax.set_axisbelow(True)


def _legend(ax: Axes, handles: Sequence[Any], labels: Sequence[str]) -> None:
    if len(handles) > 1:
        columns = max(1, min(4, int(44 / (max(map(len, labels)) + 5))))
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.1,
                  handlelength=2.2, columnspacing=1.2)  # fmt: skip


def _loss(ax: Axes, axis: Axis) -> str | None:
    if not _curves(ax, axis, "loss, nats a token", axis.replicates("loss")):
        return None
    validated = [(arm, stacked) for arm, all_ in axis.replicates("val_loss") if (stacked := _by_seed(all_)) is not None]
    for arm, (x, y) in validated:
        ax.plot(x, y.mean(axis=0), color=arm.colour, linestyle="none", marker="D", markersize=4.5,
                markerfacecolor="none", markeredgewidth=1.2, zorder=3)  # fmt: skip
    outside = _baselines(ax, axis)
    seeds = len(axis.grid.seeds)
    text = f"Training loss, the mean of {seeds} seeds; the band is ± one standard deviation between seeds"
    text = text if seeds > 1 else "Training loss of one seed"
    text += ". Open diamonds: validation loss." if validated else "."
    return f"{text} Outside the picture: {', '.join(outside)}." if outside else text


def _baselines(ax: Axes, axis: Axis) -> list[str]:
    """Lines at what simple predictors cost, labelled; those far outside the picture are returned as text."""
    rows = [row for arm in axis.arms for _, row in arm.cells]
    known: dict[str, set[float | None]] = {
        "ln V, a uniform guess": {math.log(row["config"]["model"]["vocab_size"]) for row in rows},
        "ln of the ids that occur": {math.log(row["data"]["distinct_tokens"]) for row in rows},
        "unigram entropy": {row["data"].get("unigram_entropy") for row in rows},
        "bigram entropy": {row["data"].get("bigram_entropy") for row in rows},
    }
    low, high = ax.get_ylim()
    room = 0.12 * (high - low)
    outside = []
    for label, values in known.items():
        value = next(iter(values)) if len(values) == 1 else None
        if value is None:
            continue
        if not low - room <= value <= high + room:
            outside.append(f"{label} {value:.3f}")
            continue
        ax.axhline(value, color="black", alpha=0.55, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
        upper = value > (low + high) / 2  # losses fall: the upper right and the lower left are free
        where = {"x": 0.99, "ha": "right"} if upper else {"x": 0.01, "ha": "left"}
        ax.text(y=value, s=f"{label} {value:.3f}", transform=ax.get_yaxis_transform(), va="bottom", fontsize=9,
                alpha=0.8, **where)  # type: ignore[arg-type]  # fmt: skip
    return outside


def _gap(ax: Axes, axis: Axis) -> str | None:
    """The paired difference in training loss at every step."""
    if axis.key is None or len(axis.arms) < 2:
        return None
    base = axis.arms[0]

    def differences(arm: Arm) -> Iterable[tuple[int, Curve]]:
        for pair in axis.grid.pairs(axis.key or "", base.name, arm.name)[0]:
            both = _by_seed([(0, axis.curve(pair.baseline, "loss")), (1, axis.curve(pair.arm, "loss"))])
            if both is not None and len(both[1]) == 2 and len(both[0]) > 1:
                yield pair.seed, (both[0], both[1][1] - both[1][0])

    if not _curves(ax, axis, "arm minus baseline, nats", [(a, list(differences(a))) for a in axis.arms[1:]], _reach):
        return None
    ax.axhline(0, color="black", linewidth=0.9)
    text = f"Training loss minus that of {shorten(base.name, 60)} at the same seed and step: below zero is better"
    return f"{text}. Mean and 95 % interval over seeds." if len(axis.grid.seeds) > 1 else f"{text}."


def _unseen(ax: Axes, axis: Axis) -> str | None:
    if not _curves(ax, axis, "nats a token", axis.replicates("loss_unseen")):
        return None
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    text = "The part of the loss spent on tokens that never occur in the text"
    return f"{text}: −log of the probability left to the rest."


def _residual(ax: Axes, axis: Axis) -> str | None:
    handles, labels = [], []
    for arm in axis.arms:
        streams = [
            [line["residual_rms"] for line in axis.metrics(row) if line.get("residual_rms")] for _, row in arm.cells
        ]
        for which, dash in ((0, (0, (2, 2))), (-1, "-")):
            by_depth: dict[int, list[list[float]]] = defaultdict(list)  # depths differ where another axis varies them
            for measured in filter(None, streams):
                by_depth[len(measured[which])].append(measured[which])
            for depth, rows in by_depth.items():
                line = ax.plot(range(depth), np.mean(rows, axis=0), color=arm.colour, linestyle=dash, linewidth=1.5,
                               marker="o", markersize=3)[0]  # fmt: skip
        if any(streams):
            handles.append(line)
            labels.append(arm.label)
    if not handles:
        return None
    low, high = ax.get_ylim()
    if low <= 0 or high / max(low, 1e-12) > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")  # the usual 10^n is mathtext, which the style forbids
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("blocks passed (0: the embedding)")
    ax.set_ylabel("RMS of the stream")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _rules(ax)
    _legend(ax, handles, labels)
    text = "Root mean square of the residual stream as embedded and after each block"
    return f"{text}: dotted as first measured, solid as last."


# --- at the end ------------------------------------------------------------------------------------------------------


def _pairs(ax: Axes, axis: Axis) -> str | None:
    """A line a seed from zero to the arm's difference, the mean with its interval below them."""
    effects = [effect for effect in axis.effects(axis.comparison.metric) if effect.mean_difference is not None]
    if not effects:
        return None
    colours = {arm.name: arm.colour for arm in axis.arms}
    std = max((effect.seed_std or 0.0 for effect in effects), default=0.0)
    furthest = max(abs(value) for effect in effects for value in (*effect.differences.values(), *(effect.ci95 or [])))
    shaded = 0 < std < 4 * furthest  # a band ten times as wide as the picture would hide the differences
    if shaded:
        ax.axvspan(-std, std, color="black", alpha=0.08, linewidth=0)
    for row, effect in enumerate(effects):
        colour = colours[effect.arm]
        values = list(effect.differences.values())
        places = row + (np.arange(len(values)) + 0.5) / (len(values) + 1.5) * 0.62 + 0.28
        ax.vlines(0, row + 0.3, row + 1, color="black", linewidth=0.9)
        ax.hlines(places, 0, values, color=colour, linewidth=1.0, alpha=0.75)
        ax.plot(values, places, "o", color=colour, markersize=3.5)
        ax.text(0.01, row + 0.16, shorten(effect.arm, 40), transform=ax.get_yaxis_transform(), va="center")
        if effect.ci95 is not None:
            ax.plot(effect.ci95, [row + 0.92] * 2, color="black", linewidth=2, solid_capstyle="butt")
        ax.plot(effect.mean_difference or 0.0, row + 0.92, "D", color="black", markersize=5.5)
    ax.set_ylim(len(effects) + 0.05, 0)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"{axis.comparison.metric} minus that of {shorten(effects[0].baseline, 24)}, nats")
    text = f"A line a seed, from {shorten(effects[0].baseline, 60)} at zero to the arm; the diamond is the mean"
    text += ", its bar the 95 % interval" if any(effect.ci95 for effect in effects) else ""
    return f"{text}. Shaded: ± the standard deviation between seeds." if shaded else f"{text}."


def _bars(ax: Axes, axis: Axis, metric: Metric, form: Callable[[float], str]) -> str | None:
    """A bar an arm, a tick a run; hatched where arms cannot be compared, with the reasons in the caption."""
    refused = {
        effect.arm: effect.reason
        for effect in axis.effects(metric.key)
        if effect.verdict == "not_comparable" and effect.arm_mean is not None
    }
    values = []
    for arm in axis.arms:
        rows = [row for _, row in arm.cells if number_of(row, metric.key)]
        if metric is SPEED and not refused:  # as the comparison has it: where pairs were not emulated, those count
            rows = [row for row in rows if not row["precision"]["emulated"]] or rows
        values.append([number_of(row, metric.key) or 0.0 for row in rows])
    if not any(values):
        return None
    far = max(max(some) for some in values if some)
    for row, (arm, some) in enumerate(zip(axis.arms, values, strict=True)):
        ax.text(0, row + 0.2, shorten(arm.name, 44), va="center")
        if not some:
            ax.text(0, row + 0.62, "no finished run", va="center", fontsize=9, alpha=0.7)
            continue
        mean = statistics.fmean(some)
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": arm.colour, "hatch": "////"}
        ax.barh(row + 0.62, mean, height=0.42, **(hatched if refused else {"facecolor": arm.colour, "alpha": 0.65}))
        ax.plot(some, np.full(len(some), row + 0.62), "|", color="black", markersize=9, alpha=0.6)
        ax.text(max(*some, mean) + 0.02 * far, row + 0.62, form(mean), va="center")
    ax.set_xlim(0, far * 1.32)
    ax.set_ylim(len(values), 0)
    ax.set_yticks([])
    ax.set_xticks([])
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    text = "Mean of the arm's runs, a tick each."
    if refused:
        text += f" Hatched, not to be compared: {'; '.join(map(printable, dict.fromkeys(refused.values())))}."
    return text


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
