"""The figures of a comparison, each drawn once and saved as PNG on white and as SVG on a transparent background.

matplotlib without pyplot, so no global state is changed. User text never reaches matplotlib's mathtext. No torch.
"""

from __future__ import annotations

import functools
import io
import itertools
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

from gpt2exp.compare.comparison import MEMORY, SPEED, Comparison, Grid, Row
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.inference import Floats, Inference, moments, reach
from gpt2exp.compare.report import Drawing, tuning_heading
from gpt2exp.run.metrics import BY_KEY, Metric, number_of, shown
from gpt2exp.run.terminal import printable

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#C26A9B", "#B47D00", "#3D94CC")
"""Told apart with any colour vision: Okabe and Ito 2008 without yellow and black; pink, orange and sky blue darker than
theirs, which are too faint on white and, inverted, on black.
"""
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))  # tell arms apart if there are more than colours
SIZE = (5.0, 3.4)  # inches: an SVG of 360 units, whose text of 11 units can be read on a telephone
STYLE = matplotlib.rc_params_from_file(Path(__file__).with_name("figures.mplstyle"), use_default_template=False)
ZERO: dict[str, Any] = {"color": "black", "linewidth": 0.9}
REFERENCE: dict[str, Any] = {"color": "black", "alpha": 0.55, "linewidth": 0.9, "linestyle": (0, (2, 2))}
POINTS = 300  # at most, of a curve; longer ones are averaged in equal stretches

Curve = tuple[Floats, Floats]  # places along x and the values there
Replicates = list[tuple[int, Curve]]  # with the seed of each


@dataclass
class Arm:
    """The finished runs of one arm, by seed, and how it is drawn."""

    name: str
    colour: str
    dash: Any
    cells: list[tuple[int, Row]]


@dataclass
class Axis:
    """The data of an axis' figures; without a key, all runs as one arm."""

    key: str | None
    arms: dict[str, Arm]
    grid: Grid
    comparison: Comparison
    clock: str  # along x: `step`, or `tokens` if steps differ in tokens between runs

    def effects(self, metric: str) -> list[Effect]:
        """The effects of its arms in one metric, where both arms have a mean."""
        found = [effect for effect in self.comparison.axes if (effect.key, effect.metric) == (self.key, metric)]
        return [one for one in found if one.arm_mean is not None and one.budget == self.grid.budget]

    def curves(self, runs: Iterable[tuple[int, Row]], key: str) -> Replicates:
        """A metric along the clock, of the runs that measured it; `runs`: each with its seed."""
        points = ((seed, self.grid.curve(row, key, self.clock)) for seed, row in runs)
        return [(seed, (np.array([*of], float), np.array([*of.values()], float))) for seed, of in points if of]

    def by_arm(self, key: str) -> list[tuple[Arm, Curve]]:
        """A metric's curves, stacked by `by_seed`, of the arms that have any."""
        curves = ((arm, by_seed(self.curves(arm.cells, key))) for arm in self.arms.values())
        return [(arm, stacked) for arm, stacked in curves if stacked is not None]


def by_seed(curves: Replicates) -> Curve | None:
    """The places where all curves have points (points,), and the values there (seeds, points), means of a seed's."""
    x = functools.reduce(np.intersect1d, [own for _, (own, _) in curves]) if curves else np.array([])
    if not len(x):
        return None
    seeds: dict[int, list[Floats]] = defaultdict(list)
    for seed, (own, y) in curves:
        seeds[seed].append(y[np.searchsorted(own, x)])
    y = np.stack([np.mean(rows, axis=0) for rows in seeds.values()])
    if len(x) > POINTS:
        starts = np.arange(0, len(x), math.ceil(len(x) / POINTS))
        sizes = np.diff([*starts, len(x)])
        x, y = np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts, axis=1) / sizes
    return x, y


def draw(comparison: Comparison) -> list[Drawing]:
    """Every figure for which the finished runs have data."""
    done = [row for row in comparison.runs if row["state"] == "done"]
    if not done:
        return []
    whole = Grid([row for row in comparison.runs if "config" in row], comparison.swept)
    grid = whole.within(whole.budgets[-1])  # curves along the run are those of the largest budget
    per_step = {row["tokens"] / row["steps"] for row in done if row["steps"]}
    clock = "step" if len(per_step) == 1 else "tokens"
    drawings = []
    if comparison.tuning:
        title, heading = f"Loss against {comparison.tuning[0].key}", tuning_heading(comparison)
        paint = functools.partial(_tuning_curves, comparison=comparison)
        drawings += _drawn(heading, "0-tuning", title, title, SIZE[1], paint)
    for number, key in enumerate(comparison.swept or [None]):
        names = ["all runs"] if key is None else grid.axes[key]
        arms = {name: Arm(name, *_style(place), []) for place, name in enumerate(names)}
        for (seed, of), row in grid.cells.items():
            arms[names[0] if key is None else of[number]].cells.append((seed, row))
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", key or "seeds").strip("-.")[:60] or "axis"
        axis = Axis(key, arms, grid, comparison, clock)
        drawings += _drawings(axis, f"{number + 1}-{slug}")
    return drawings


def _style(place: int) -> tuple[str, Any]:
    """The colour and the dash of an arm by its place."""
    turn, colour = divmod(place, len(COLOURS))
    return COLOURS[colour], DASHES[turn % len(DASHES)]


def _drawings(axis: Axis, stem: str) -> Iterable[Drawing]:
    """The figures of an axis. A painter draws on axes and returns the caption; None if there is nothing to draw."""
    arms, seeds = 0.62 * len(axis.arms), len(axis.grid.seeds)
    differences = len(axis.effects(axis.comparison.metric)) * (0.55 + 0.16 * min(seeds, 12))
    kinds: list[tuple[str, str, float, Callable[..., str | None]]] = [
        ("loss", "Loss over the run", 0, _loss),
        ("gap", "Difference along the way", 0, _gap),
        ("difference", "Difference at the end, seed by seed", differences, _pairs),
        ("intervals", "Difference after each seed", 0, _intervals),
        ("residual", "Residual stream through the blocks", 0, _residual),
        ("speed", "Throughput", arms, functools.partial(_bars, metric=SPEED)),
        ("memory", "Peak memory", arms, functools.partial(_bars, metric=MEMORY)),
        ("unseen", "What unused tokens cost", 0, _unseen),
    ]
    if axis.key is not None and axis.key == axis.grid.over:
        kinds = [("budgets", "Difference by budget", 0, _budgets)]
    for kind, title, rows, painter in kinds:  # `rows`: inches of a figure that grows with them
        heading = title if axis.key is None else f"{shorten(axis.key, 30)}: {title[0].lower()}{title[1:]}"
        heading += f" ({shorten(axis.grid.budget, 30)})" * (kind != "budgets" and bool(axis.grid.budget))
        paint = functools.partial(painter, axis=axis)
        height = min(0.75 + rows, 14.0) if rows else SIZE[1]
        yield from _drawn(printable(axis.key or "Figures"), f"{stem}-{kind}", title, heading, height, paint)


def _drawn(
    of: str, name: str, title: str, heading: str, height: float, paint: Callable[[Axes], str | None]
) -> list[Drawing]:
    """A figure under the heading `of`, `height` inches high, as PNG and SVG; empty if there is nothing to draw."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks: the user can do nothing about it
        figure = Figure(figsize=(SIZE[0], height), layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.05))
        caption = paint(figure.add_subplot())
        if caption is None:
            return []
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.suptitle(heading, x=0.02, ha="left", fontweight="bold", fontsize=11)
        figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
        return [Drawing(of, name, title, caption, svg.getvalue(), png.getvalue())]


# --- what figures share ----------------------------------------------------------------------------------------------


def shorten(text: str, most: int) -> str:
    """The two ends of a long text, without characters that a terminal or an SVG cannot hold."""
    text, half = printable(text), (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def _named(arm: str) -> str:
    """An arm in a legend; with a space, since matplotlib leaves out a name that begins with _."""
    return " " + shorten(arm, 26)


def _label(ax: Axes, x: str, y: str) -> None:
    """Name both axes, draw rules across, and put a legend above if there are several arms."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(axis="y", color="black", alpha=0.12, linewidth=0.7)
    ax.set_axisbelow(True)
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 1:
        columns = max(1, min(4, int(44 / (max(map(len, labels)) + 5))))
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns,
                  borderaxespad=0.1, handlelength=2.2, columnspacing=1.2)  # fmt: skip


def _zero(ax: Axes, margin: float | None) -> str:
    """Draw lines at no difference and at the margin, if there is one; returns what to add to the caption."""
    ax.axhline(0, **ZERO)
    for bound in (-margin, margin) if margin else ():
        ax.axhline(bound, **REFERENCE)
    return f" Dotted: the margin, ±{margin:g} nats." if margin else ""


def _curves(ax: Axes, axis: Axis, label: str, curves: Sequence[tuple[Arm, Curve]], *, interval: bool = False) -> bool:
    """Draw each arm's mean over seeds in a band of ± the seeds' standard deviation, or of the mean's 95 % t interval.

    Returns whether there was a curve to draw.
    """
    for arm, (x, y) in curves:
        mean, n = y.mean(axis=0), len(y)
        if n > 1:
            half = y.std(axis=0, ddof=1) * (reach(n, "fixed") / math.sqrt(n) if interval else 1)
            ax.fill_between(x, mean - half, mean + half, color=arm.colour, alpha=0.2, linewidth=0)
        ax.plot(x, mean, color=arm.colour, linestyle=arm.dash, linewidth=1.6, marker="o" if len(x) < 8 else None,
                markersize=3.5, label=_named(arm.name))  # fmt: skip
    if curves:
        _label(ax, "step" if axis.clock == "step" else "tokens trained on", label)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if axis.clock == "tokens":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return bool(curves)


def _rows(ax: Axes, rows: float, *sides: str) -> None:
    """Let `rows` stand one below the other, without a scale on the left and without these sides of the frame."""
    ax.set_ylim(rows, 0)
    ax.set_yticks([])
    for side in ("left", *sides):
        ax.spines[side].set_visible(False)


# --- along the run ---------------------------------------------------------------------------------------------------


def _tuning_curves(ax: Axes, comparison: Comparison) -> str | None:
    """Each arm's losses over the values of the tuned key: a line through the means, a dot a tuning seed."""
    curves, every = comparison.tuning, dict[float, str]()
    for place, curve in enumerate(curves):
        colour, dash = _style(place)
        known = {value: [n for n in losses if not isinstance(n, str)] for value, losses in curve.losses.items()}
        means = {float(value): statistics.fmean(found) for value, found in known.items() if found}
        every |= {float(value): value for value, found in known.items() if found}
        own = [text for text in curve.arm.split(", ") if place == 0 or text not in curves[0].arm.split(", ")]
        ax.plot(sorted(means), [means[at] for at in sorted(means)], linewidth=1.6, color=colour, linestyle=dash,
                label=_named(", ".join(own)))  # fmt: skip
        for value, found in known.items():
            ax.plot([float(value)] * len(found), found, "o", color=colour, markersize=3.5, alpha=0.6)
        if curve.best is not None and (best := float(curve.best)) in means:
            ax.plot(best, means[best], "D", color=colour, markersize=7, markeredgecolor="black")
    if not every:
        return None
    if min(every) > 0:
        ax.set_xscale("log")
    ax.set_xticks(list(every), list(every.values()))
    ax.xaxis.set_minor_formatter(NullFormatter())
    _label(ax, curves[0].key, "loss at the end, nats a token")
    gone = sorted(
        f"{curve.arm} at {value}" for curve in curves for value, of in curve.losses.items() if "diverged" in of
    )
    text = "A dot a tuning seed, a line through their mean; the diamond is the value at which the arm is compared."
    return f"{text} Diverged: {shorten(', '.join(gone), 200)}." if gone else text


def _loss(ax: Axes, axis: Axis) -> str | None:
    if not _curves(ax, axis, "loss, nats a token", axis.by_arm("loss")):
        return None
    validated = axis.by_arm("val_loss")
    for arm, (x, y) in validated:
        ax.plot(x, y.mean(axis=0), color=arm.colour, linestyle="none", marker="D", markersize=4.5,
                markerfacecolor="none", markeredgewidth=1.2, zorder=3)  # fmt: skip
    outside, seeds = _baselines(ax, axis), len(axis.grid.seeds)
    text = f"Training loss, the mean of {seeds} seeds; the band is ± one standard deviation between seeds"
    text = text if seeds > 1 else "Training loss of one seed"
    text += ". Open diamonds: validation loss." if validated else "."
    return f"{text} Outside the picture: {', '.join(outside)}." if outside else text


def _baselines(ax: Axes, axis: Axis) -> list[str]:
    """Draw labelled lines at the losses of simple predictors; returns as text those far outside the picture."""
    rows = [row for arm in axis.arms.values() for _, row in arm.cells]
    known: dict[str, set[float | None]] = {
        "ln V, a uniform guess": {math.log(row["config"]["model"]["vocab_size"]) for row in rows},
        "ln of the ids that occur": {math.log(row["data"]["distinct_tokens"]) for row in rows},
        "unigram entropy": {row["data"].get("unigram_entropy") for row in rows},
        "bigram entropy": {row["data"].get("bigram_entropy") for row in rows},
    }
    low, high = ax.get_ylim()
    room, outside = 0.12 * (high - low), []
    for label, values in known.items():
        value = next(iter(values)) if len(values) == 1 else None
        if value is None:
            continue
        if not low - room <= value <= high + room:
            outside.append(f"{label} {value:.3f}")
            continue
        ax.axhline(value, **REFERENCE, zorder=1)
        upper = value > (low + high) / 2  # losses fall: the upper right and the lower left are free
        ax.text(0.99 if upper else 0.01, value, f"{label} {value:.3f}", transform=ax.get_yaxis_transform(),
                ha="right" if upper else "left", va="bottom", fontsize=9, alpha=0.8)  # fmt: skip
    return outside


def _gap(ax: Axes, axis: Axis) -> str | None:
    """The paired difference in training loss at every step."""
    if axis.key is None or len(axis.arms) < 2:
        return None
    base, *others = axis.arms.values()
    curves = []
    for arm in others:
        gaps: Replicates = []
        for seed, _, runs in axis.grid.pairs(axis.key, arm.name):
            both = by_seed(axis.curves(enumerate(runs), "loss"))
            if both is not None and len(both[1]) == 2 and len(both[0]) > 1:
                gaps.append((seed, (both[0], both[1][1] - both[1][0])))
        if (stacked := by_seed(gaps)) is not None:
            curves.append((arm, stacked))
    if not _curves(ax, axis, "arm minus baseline, nats", curves, interval=True):
        return None
    ax.axhline(0, **ZERO)
    text = f"Training loss minus that of {shorten(base.name, 60)} at the same seed and step: below zero is better"
    return f"{text}. Mean and 95 % interval over seeds." if len(axis.grid.seeds) > 1 else f"{text}."


def _unseen(ax: Axes, axis: Axis) -> str | None:
    if not _curves(ax, axis, "nats a token", axis.by_arm("loss_unseen")):
        return None
    ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
    text = "The part of the loss spent on tokens that never occur in the text"
    return f"{text}: −log of the probability left to the rest."


def _residual(ax: Axes, axis: Axis) -> str | None:
    for arm in axis.arms.values():
        streams = [[*axis.grid.curve(row, "residual_rms").values()] for _, row in arm.cells]
        streams = [measured for of_run in streams if (measured := [*filter(None, of_run)])]
        line = None
        for which, dash in ((0, (0, (2, 2))), (-1, "-")):
            by_depth: dict[int, list[Any]] = defaultdict(list)  # depths differ where another axis varies them
            for measured in streams:
                by_depth[len(measured[which])].append(measured[which])
            for depth, rows in by_depth.items():
                (line,) = ax.plot(range(depth), np.mean(rows, axis=0), color=arm.colour, linestyle=dash, linewidth=1.5,
                                  marker="o", markersize=3)  # fmt: skip
        if line is not None:
            line.set_label(_named(arm.name))
    if not ax.lines:
        return None
    low, high = ax.get_ylim()
    if low <= 0 or high / max(low, 1e-12) > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")  # the usual 10^n is mathtext, which the style forbids
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(ax, "blocks passed (0: the embedding)", "RMS of the stream")
    text = "Root mean square of the residual stream as embedded and after each block"
    return f"{text}: dotted as first measured, solid as last."


# --- at the end ------------------------------------------------------------------------------------------------------


def _pairs(ax: Axes, axis: Axis) -> str | None:
    """A line a seed from zero to the arm's difference, the mean with its interval below them."""
    effects = axis.effects(axis.comparison.metric)
    if not effects:
        return None
    std = max(effect.seed_std or 0.0 for effect in effects)
    furthest = max(abs(value) for effect in effects for value in (*effect.differences.values(), *(effect.ci95 or [])))
    shaded = 0 < std < 4 * furthest  # a band ten times as wide as the picture would hide the differences
    if shaded:
        ax.axvspan(-std, std, color="black", alpha=0.08, linewidth=0)
    for row, effect in enumerate(effects):
        colour, values = axis.arms[effect.arm].colour, list(effect.differences.values())
        places = row + (np.arange(len(values)) + 0.5) / (len(values) + 1.5) * 0.62 + 0.28
        ax.vlines(0, row + 0.3, row + 1, **ZERO)
        ax.hlines(places, 0, values, color=colour, linewidth=1.0, alpha=0.75)
        ax.plot(values, places, "o", color=colour, markersize=3.5)
        ax.text(0.01, row + 0.16, shorten(effect.arm, 40), transform=ax.get_yaxis_transform(), va="center")
        if effect.ci95 is not None:
            ax.plot(effect.ci95, [row + 0.92] * 2, color="black", linewidth=2, solid_capstyle="butt")
        ax.plot(effect.mean_difference or 0.0, row + 0.92, "D", color="black", markersize=5.5)
    _rows(ax, len(effects) + 0.05)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel(f"{BY_KEY[axis.comparison.metric].column} minus that of {shorten(effects[0].baseline, 24)}, nats")
    text = f"A line a seed, from {shorten(effects[0].baseline, 60)} at zero to the arm; the diamond is the mean"
    text += ", its bar the 95 % interval" if any(effect.ci95 for effect in effects) else ""
    return f"{text}. Shaded: ± the standard deviation between seeds." if shaded else f"{text}."


def _intervals(ax: Axes, axis: Axis) -> str | None:
    """Mean and interval of the first n seeds for every n, by intervals that hold at every look."""
    effects = [effect for effect in axis.effects(axis.comparison.metric) if effect.ci95 and effect.n_seeds > 2]
    if not effects:
        return None
    inside, widest = [0.0], list[tuple[float, float]]()
    for number, effect in enumerate(effects):
        shift = (number - (len(effects) - 1) / 2) * 0.5 / len(effects)  # so that arms do not hide each other
        way: Inference = "declared" if effect.inference == "declared" else "open"
        schedule, path = tuple(sorted(effect.looks)) if way == "declared" else (), moments(effect.scaled)
        ends = np.array([n for n in schedule or range(3, effect.n_seeds + 1) if n <= effect.n_seeds])
        x, means = ends + shift, path.mean[ends - 1]
        half = path.error[ends - 1] * [reach(n, way, schedule) for n in ends]
        arm, bounds = axis.arms[effect.arm], list(zip(means - half, means + half, strict=True))
        ax.vlines(x, *zip(*bounds, strict=True), color=arm.colour, linewidth=1.4, linestyle=arm.dash)
        face = arm.colour if arm.dash == DASHES[0] else "white"
        ax.plot(x, means, "o", color=arm.colour, markersize=4, markerfacecolor=face, label=_named(arm.name))
        inside += itertools.chain(means, *bounds[len(bounds) // 2 :])
        widest += bounds
    dotted = _zero(ax, axis.comparison.margin)
    room = 0.1 * (max(inside) - min(inside))  # the later half fits; the first intervals may be many times as wide
    low, high = ax.set_ylim(min(inside) - room, max(inside) + room)
    ax.margins(x=0.1)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    _label(ax, "seeds, in the order in which they were run", "arm minus baseline, nats")
    text = f"Mean difference from {shorten(effects[0].baseline, 60)} over the first seeds"
    text += ", with a 95 % interval that holds however often one looks"
    if any(effect.inference == "fixed" for effect in effects):
        text += ", so wider than the table's, which is right at one look"
    if any(one < low or other > high for one, other in widest):
        text += "; the first intervals are wider than the picture"
    return f"{text}.{dotted}"


def _budgets(ax: Axes, axis: Axis) -> str | None:
    """The mean difference of each arm within each budget, with its interval."""
    by_arm: dict[tuple[str, str], list[Effect]] = defaultdict(list)
    for effect in axis.comparison.axes:
        if effect.metric == axis.comparison.metric and effect.mean_difference is not None:
            by_arm[effect.key, effect.arm].append(effect)
    for place, ((key, arm), each) in enumerate(by_arm.items()):
        colour, dash = _style(place)
        x = [float(effect.budget.partition("=")[2]) for effect in each]
        ax.plot(x, [effect.mean_difference or 0.0 for effect in each], marker="o", markersize=4, color=colour,
                linestyle=dash, linewidth=1.4, label=_named(f"{key}={arm}"))  # fmt: skip
        sure = [(at, *effect.ci95) for at, effect in zip(x, each, strict=True) if effect.ci95]
        if sure:
            ax.vlines(*zip(*sure, strict=True), color=colour, linestyle=dash, linewidth=1.4)
    if not by_arm:
        return None
    dotted = _zero(ax, axis.comparison.margin)
    _label(ax, axis.grid.over, "arm minus baseline, nats")
    return f"Mean difference in the loss at the end of runs of each budget, with its 95 % interval.{dotted}"


def _bars(ax: Axes, axis: Axis, metric: Metric) -> str | None:
    """A bar an arm, a tick a run; hatched where arms cannot be compared, with the reasons in the caption."""
    refused = dict.fromkeys(effect.reason for effect in axis.effects(metric.key) if effect.verdict == "not_comparable")
    values = []
    for arm in axis.arms.values():
        rows = [row for _, row in arm.cells if number_of(row, metric.key)]
        if metric is SPEED and not refused:  # as in the comparison: if some runs were not emulated, only these count
            rows = [row for row in rows if not row["precision"]["emulated"]] or rows
        values.append([number_of(row, metric.key) or 0.0 for row in rows])
    if not any(values):
        return None
    far = max(max(some) for some in values if some)
    for row, (arm, some) in enumerate(zip(axis.arms.values(), values, strict=True)):
        ax.text(0, row + 0.2, shorten(arm.name, 44), va="center")
        if not some:
            ax.text(0, row + 0.62, "no finished run", va="center", fontsize=9, alpha=0.7)
            continue
        mean = statistics.fmean(some)
        plain: dict[str, Any] = {"facecolor": arm.colour, "alpha": 0.65}
        hatched: dict[str, Any] = {"facecolor": "none", "edgecolor": arm.colour, "hatch": "////"}
        ax.barh(row + 0.62, mean, height=0.42, **(hatched if refused else plain))
        ax.plot(some, np.full(len(some), row + 0.62), "|", color="black", markersize=9, alpha=0.6)
        amount = f"{shown({metric.key: mean}, metric.key, ',.0f')} {metric.unit}"
        ax.text(max(*some, mean) + 0.02 * far, row + 0.62, amount, va="center")
    ax.set_xlim(0, far * 1.32)
    ax.set_xticks([])
    _rows(ax, len(values), "bottom")
    text = "Mean of the arm's runs, a tick each."
    return f"{text} Hatched, not to be compared: {'; '.join(map(printable, refused))}." if refused else text
