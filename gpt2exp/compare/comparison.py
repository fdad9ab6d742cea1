"""Runs to answers: which arm is better, by how much, how sure.

What was typed is what is compared: the override keys that vary among the runs are the axes, and everything else in
their configurations must be the same. Runs that differ in one axis and share the rest, seed included, are a pair. The
seed is the unit of replication: differences at one seed are first averaged over the other axes, since pairs share
their seed's noise, and the interval is taken over seeds. No torch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from gpt2exp.compare.effect import Effect, infer, judge, paired
from gpt2exp.compare.history import History, history
from gpt2exp.compare.inference import holm, pooled_std
from gpt2exp.config import MOVED, BadRequest, RunConfig, flatten, is_housekeeping, plain, show, stored
from gpt2exp.run import record, secret
from gpt2exp.run.metrics import BY_KEY, METRICS, Metric, Summary, number_of
from gpt2exp.training import load


class Row(Summary, total=False):
    """A run as it is compared: its summary, or of one that left none its state, `config` and `overrides`."""

    folder: str
    gone: dict[str, Any]
    """Keys of its configuration that this version does not know."""


Settings = dict[str, str]

LOSSES = tuple(metric for metric in METRICS if metric.compared == "loss")
"""The one that counts is the last that every finished run has."""

SPEED = BY_KEY["tokens_per_second"]

MEMORY = BY_KEY["peak_memory_bytes"]


@dataclass
class Interaction:
    """How much the effect of one axis changes with another: the difference of differences, by seed."""

    keys: tuple[str, str]
    arms: tuple[str, str]
    metric: str
    n_seeds: int
    mean_difference: float
    ci95: list[float] | None
    p_value: float | None
    large: bool
    """The interval excludes zero and the size exceeds the seed-to-seed std."""


@dataclass
class Distance:
    """How far a precision's training losses lie from fp64's at the same seed and step, in nats, means over seeds."""

    arm: str
    n_seeds: int
    largest: float
    """Over the steps."""
    mean: float
    """Over the steps."""
    seed_std: float | None
    """The seed-to-seed std of fp64's own losses, its mean over the steps: the yardstick."""


@dataclass
class Comparison:
    """Everything a comparison says; `as_dict` is `comparison.json`."""

    runs: list[Row]
    axes: list[Effect]
    interactions: list[Interaction]
    distances: list[Distance]
    """Of each precision from fp64, where that is an arm."""
    failed: list[dict[str, Any]]
    swept: dict[str, list[str]]
    """Arms of each axis, the baseline first."""
    seeds: list[int]
    metric: str
    """The loss compared."""
    notes: list[str]
    margin: float | None = None
    """Nats within which a difference in the loss counts as none."""
    looks: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons so far, this one last: how many `seeds` each saw, how many were `planned` by then, its `arms`."""

    @property
    def searched(self) -> bool:
        """Whether this was a search: five or more numbers of one key, each tried once, so that none can be compared."""
        arms = [arm for arms in self.swept.values() for arm in arms]
        numbers = all(re.fullmatch(r"[\d.]+(e[+-]?\d+)?", arm) for arm in arms)
        once = all(effect.n_seeds <= 1 for effect in self.axes)
        return len(self.swept) == 1 and len(arms) >= 5 and numbers and once

    def as_dict(self) -> dict[str, Any]:
        """As JSON's own types."""
        return {
            "runs": [_public(row) for row in self.runs],
            "axes": [asdict(effect) for effect in self.axes],
            "interactions": [asdict(item) for item in self.interactions],
            "distances": [asdict(item) for item in self.distances],
            "failed": self.failed,
            "swept": self.swept,
            "seeds": self.seeds,
            "metric": self.metric,
            "notes": self.notes,
            "margin": self.margin,
            "looks": self.looks,
        }


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of every run at or below the folders, each once, with `folder` as an absolute path.

    A run without a usable summary has its state, and `config` and `overrides` as Hydra left them; its state is
    `damaged` where a summary should be.

    Raises:
        BadRequest: a folder is missing, or none holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise BadRequest(f"{folder}: no such folder; name run or sweep folders, such as sweeps/DAY/TIME-ID")
    tops = [folder.resolve() for folder in folders]
    above = Path(os.path.commonpath(tops))  # several sweeps have jobs of the same names
    runs = {run.resolve(): run for top in tops for run in record.runs_below(top)}.values()
    if not runs:
        raise BadRequest(f"{folders[0]}: holds no run; name run or sweep folders, such as sweeps/DAY/TIME-ID")
    return [_row(run, above) for run in runs]


def _row(run: Path, above: Path) -> Row:
    row = cast("Row", {**record.row(run, above), "folder": str(run)})
    if "config" in row:
        return row
    if row["state"] == "done" or (run / "summary.json").exists():
        try:
            record.read_summary(run)
        except (OSError, ValueError) as error:
            row["state"], row["error"] = "damaged", f"summary.json is missing or damaged: {error}"
    with contextlib.suppress(BadRequest):  # Hydra's record is unusable too
        config, gone, overrides = record.asked(run)
        secret.check_values([plain(config), gone, overrides])  # an interpolation in a stranger's folder may ask for one
        row |= {"config": plain(config), "gone": gone, "overrides": overrides}
    return row


def _of_today(row: Row) -> Row:
    """A row with its configuration under today's keys; `gone` has by dotted key what has no place there."""
    if "config" not in row:
        return row
    config, gone = stored(row["config"])
    return {**row, "config": config, "gone": row.get("gone", {}) | gone}


def _flat(row: Row) -> Settings:
    """A run's configuration by dotted key, values as shown, without housekeeping; keys of other versions with it."""
    return {key: show(value) for key, value in (flatten(row["config"]) | flatten(row.get("gone", {}))).items()}


def _typed(row: Row, flat: Settings) -> Settings:
    """What was typed for a run, by today's key; Hydra's sweeper records braces with backslashes."""
    settings: Settings = {}
    for text in row.get("overrides", []):
        key, _, value = text.lstrip("+").partition("=")
        if not (is_housekeeping(key) or key == "experiment" or key.startswith(("hydra.", "hydra/"))):
            key = key if key in flat else MOVED.get(key, key)
            settings[key] = re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value).strip("'\"")
    return settings


def _arm(key: str, flat: Settings, told: Settings) -> str:
    """A run's arm of an axis: the value of a key; of a group its choice, told or as its section names it."""
    chosen = f"{_section(key)}{'scheme' if key == 'init' else 'name'}"
    usual = "gpt2" if key.startswith("model") else "default"
    return flat.get(key) or told.get(key) or flat.get(chosen, usual)


def _section(group: str) -> str:
    return f"{group.replace('/', '.')}."


def axes_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The keys whose values vary and that a run was told, with their arms: the default first, else in order of runs.

    A group is one axis, of its choices. It stands for what varies in its section with the choice alone: what was not
    told by itself, or is null by default, such as `data.path`. A value that follows others is no axis.

    Raises:
        BadRequest: the runs also differ in something that was not told.
    """
    flats = [_flat(row) for row in rows]
    told = [_typed(row, flat) for row, flat in zip(rows, flats, strict=True)]
    usual = {key: show(value) for key, value in flatten(plain(RunConfig())).items()}
    keys = {key for flat in flats for key in flat} - {"seed"}
    # a run may lack a key of another version: nobody knows its value there, so it differs from none
    varying = {key for key in keys if len({flat[key] for flat in flats if key in flat}) > 1}
    names = dict.fromkeys(key for settings in told for key in settings if key in varying or key not in {*keys, "seed"})
    arms = {key: [_arm(key, *of_run) for of_run in zip(flats, told, strict=True)] for key in names}
    arms = {key: of_runs for key, of_runs in arms.items() if len(set(of_runs)) > 1}
    by_group: set[str] = set()
    for group in arms.keys() - keys:
        inside = {key for key in keys if key.startswith(_section(group))}
        for key in {key for key in inside & varying if key not in arms or usual.get(key) == "null"}:
            both = {(arm, flat.get(key)) for arm, flat in zip(arms[group], flats, strict=True)}
            if len(both) == len(set(arms[group])):
                by_group.add(key)
        if inside and not inside & by_group:
            del arms[group]  # told in some runs, a preset's choice in the others
    following = {key for key in varying - by_group if _follows(key, rows, told)}
    if differing := sorted(varying - arms.keys() - by_group - following):
        raise BadRequest(
            f"the runs also differ in {', '.join(differing)}, which none of them was told to vary; "
            "compare folders whose runs share it"
        )
    return {
        key: sorted(dict.fromkeys(of_runs), key=_arm(key, usual, {}).__ne__)  # the default first: False before True
        for key, of_runs in arms.items()
        if key not in by_group | following
    }


def _follows(key: str, rows: Sequence[Row], told: Sequence[Settings]) -> bool:
    """Whether a key follows others in every run, alike, as `${train.steps}` does: typed, or written in a preset.

    What a resolver gives (`${oc.env:LR}`) may be anything.
    """
    texts = (settings.get(key) or _written(row, key) for row, settings in zip(rows, told, strict=True))
    first = next(texts)
    return "${" in first and ":" not in first and all(text == first for text in texts)


def _written(row: Row, key: str) -> str:
    """A key's value in a run's `.hydra`, interpolations as they stand; empty where that cannot be read."""
    with contextlib.suppress(BadRequest):
        return str(record.written(Path(row["folder"])).get(key))
    return ""


# --- pairing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two finished runs that differ in the arm of one axis."""

    seed: int
    where: tuple[str, ...]
    """Their arms of the other axes."""
    baseline: Row
    arm: Row


class Grid:
    """Runs by seed and arms; the finished ones are its cells."""

    def __init__(self, rows: Sequence[Row], axes: dict[str, list[str]]) -> None:
        self.axes = axes
        self.cells: dict[tuple[int, tuple[str, ...]], Row] = {}
        planned: set[tuple[int, tuple[str, ...]]] = set()
        for row in sorted(rows, key=lambda row: str(row.get("started"))):  # of a repeated run the last counts
            flat = _flat(row)
            told = _typed(row, flat)
            arms = tuple(_arm(key, flat, told) for key in axes)
            planned.add((row["config"]["seed"], arms))
            if row["state"] == "done":
                self.cells[row["config"]["seed"], arms] = row
        ranks = [{arm: rank for rank, arm in enumerate(arms)} for arms in axes.values()]
        self.planned = sorted(
            planned, key=lambda cell: (cell[0], [rank[arm] for rank, arm in zip(ranks, cell[1], strict=True)])
        )
        self.seeds = sorted({seed for seed, _ in self.cells})

    def of(self, seeds: set[int]) -> Grid:
        """Its part of these seeds."""
        part = copy.copy(self)
        part.cells = {cell: row for cell, row in self.cells.items() if cell[0] in seeds}
        part.planned = [cell for cell in self.planned if cell[0] in seeds]
        return part

    def pairs(self, key: str, baseline: str, arm: str) -> tuple[list[Pair], int]:
        """The pairs of two arms, one for every seed and setting of the other axes, and how many lack a finished run."""
        at = list(self.axes).index(key)
        found, broken = [], 0
        for seed, where in dict.fromkeys(
            (seed, (*arms[:at], *arms[at + 1 :])) for seed, arms in self.planned if arms[at] in (baseline, arm)
        ):
            one, other = (self.cells.get((seed, (*where[:at], name, *where[at:]))) for name in (baseline, arm))
            if one is not None and other is not None:
                found.append(Pair(seed, where, one, other))
            else:
                broken += 1
        return found, broken

    def spread(self, metric: Metric, key: str, among: Sequence[str]) -> float | None:
        """Seed-to-seed standard deviation of a metric, pooled over the settings with one of these arms."""
        at = list(self.axes).index(key)
        by_arms: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for (_, arms), row in self.cells.items():
            if arms[at] in among and number_of(row, metric.key) is not None:
                by_arms[arms].append(_compared(row, metric))
        return pooled_std(by_arms.values())


def compare(rows: Sequence[Row], *, margin: float | None = None, out: Path | None = None) -> Comparison:
    """The comparison of a set of runs, finished or not.

    Args:
        rows: As `read` gives them.
        margin: Nats, instead of the `sweep.margin` that the runs have.
        out: Where an earlier comparison may lie, besides the runs' sweeps.

    Raises:
        BadRequest: nothing to compare, or the runs differ in something unswept.
    """
    rows = [_of_today(row) for row in rows]
    known = [row for row in rows if "config" in row]
    if not known or all(row["state"] in ("running", "not run", "damaged") for row in rows):
        damaged = [f"{row['name']}: {row['error']}" for row in rows if row["state"] == "damaged"]
        raise BadRequest("; ".join(damaged) or "none of the runs has a summary yet; wait for one to finish")
    done = [row for row in known if row["state"] == "done"]
    grid, loss = Grid(known, axes_of(known)), _loss(done)
    stated, notes = _margin(known)
    if margin is not None:
        stated, notes = margin, []
    before = _history(known, grid, out)
    effects = _effects(grid, (loss, SPEED, MEMORY), before, _contended(known), stated)
    return Comparison(
        runs=rows,
        axes=effects,
        interactions=_interactions(grid, loss, before),
        distances=_distances(grid),
        failed=[_failed(row) for row in rows if row["state"] != "done"],
        swept=grid.axes,
        seeds=grid.seeds,
        metric=loss.key,
        notes=[*_notes(known, done, grid), *notes],
        margin=stated,
        looks=before.looks,
    )


def at_looks(rows: Sequence[Row], looks: Sequence[int]) -> list[list[Effect]]:
    """The loss of each arm against its baseline at each of these numbers of seeds, as if no later seed were there.

    Raises:
        BadRequest: as `compare`.
    """
    rows = [_of_today(row) for row in rows if "config" in row]
    grid, loss = Grid(rows, axes_of(rows)), _loss([row for row in rows if row["state"] == "done"])
    before, (margin, _), seeds = _history(rows, grid), _margin(rows), sorted({seed for seed, _ in grid.planned})
    return [_effects(grid.of({*seeds[:n]}), (loss,), before, set(), margin) for n in looks]


def _loss(done: Sequence[Row]) -> Metric:
    """The loss to compare: the last that all of them have."""
    everywhere = [m for m in LOSSES if done and all(number_of(row, m.key) is not None for row in done)]
    return everywhere[-1] if everywhere else LOSSES[0]


def _history(known: Sequence[Row], grid: Grid, out: Path | None = None) -> History:
    sweeps = list(dict.fromkeys(Path(row["folder"]).parent for row in known))
    return history(sweeps, grid.axes, len(grid.seeds), (seed for seed, _ in grid.planned), out)


def _failed(row: Row) -> dict[str, Any]:
    step = row.get("steps", row.get("step"))
    return {"name": row["name"], "state": row["state"], "step": step, "error": row.get("error")}


def _margin(known: Sequence[Row]) -> tuple[float | None, list[str]]:
    """The margin stated before the runs, and a note where they disagree: the strictest counts, which is none."""
    found = {row["config"]["sweep"]["margin"] for row in known}
    margin = None if None in found else min(found)
    if len(found) == 1:
        return margin, []
    taken = "so none is taken" if margin is None else f"the smallest is taken, {margin:g}"
    return margin, [f"the runs differ in sweep.margin: {taken}"]


def _notes(known: Sequence[Row], done: Sequence[Row], grid: Grid) -> Iterator[str]:
    if len(grid.cells) < len(done):
        yield f"{len(done) - len(grid.cells)} runs repeat another's settings and seed; the last of each counts"
    if not grid.axes:
        yield "nothing but the seed varies, so there is no axis to compare"
    if gone := sorted({key for row in known for key in row.get("gone", {})} - set(grid.axes)):
        yield f"{', '.join(gone)}: no key of this version, recorded by another; taken to make no difference"
    yield from _unequal(grid)
    made_with = [flatten({key: row.get(key) or {} for key in ("git", "versions")}) for row in done]
    changed = sorted({key for made in made_with for key in made if len({str(m.get(key)) for m in made_with}) > 1})
    if changed:
        yield f"the runs differ in {', '.join(changed)}, which may show in losses and speed"


def _effects(
    grid: Grid, metrics: Sequence[Metric], before: History, contended: set[str], margin: float | None
) -> list[Effect]:
    """Each arm against the baseline of its axis in each metric, judged."""
    effects = [
        _effect(grid, key, arm, metric, before, contended)
        for key, arms in grid.axes.items()
        for arm in arms[1:]
        for metric in metrics
    ]
    for metric in metrics:
        tested = [effect for effect in effects if effect.metric == metric.key and effect.ci95 is not None]
        for effect, adjusted in zip(tested, holm([e.p_value for e in tested if e.p_value is not None]), strict=True):
            effect.p_holm = adjusted
            judge(effect, lower_is_better=metric.better == "lower", margin=margin if metric is metrics[0] else None)
    return effects


def _unequal(grid: Grid) -> Iterator[str]:
    """A note for each axis whose seeds average over different settings of the other axes."""
    for key, arms in grid.axes.items():
        for arm in arms[1:]:
            settings: dict[int, set[tuple[str, ...]]] = defaultdict(set)
            for pair in grid.pairs(key, arms[0], arm)[0]:
                settings[pair.seed].add(pair.where)
            if len({frozenset(where) for where in settings.values()}) > 1:
                yield (
                    f"{key}: for lack of some runs the seeds of {arm} average over different settings of the other "
                    "axes; where the effect differs between those, it weighs the settings unequally"
                )


def _effect(grid: Grid, key: str, arm: str, metric: Metric, before: History, contended: set[str]) -> Effect:
    """An arm against the baseline of its axis, with an interval unless something keeps them from being compared."""
    baseline = grid.axes[key][0]
    pairs, broken = grid.pairs(key, baseline, arm)
    if metric is SPEED:  # where some settings of the other axes ran at a hardware speed, those pairs decide
        pairs = [pair for pair in pairs if not _emulated(pair)] or pairs
    effect = Effect(key, baseline, arm, metric.key, n_pairs=len(pairs), dropped_pairs=broken)
    effect.n_seeds = len({pair.seed for pair in pairs})
    if not pairs:
        effect.verdict, effect.reason = "not_comparable", f"no two finished runs differ in {key} alone"
        return effect
    first = pairs[0]
    effect.parameters = {"baseline": first.baseline["parameters"]["total"], "arm": first.arm["parameters"]["total"]}
    if any(number_of(row, metric.key) is None for pair in pairs for row in (pair.baseline, pair.arm)):
        effect.verdict, effect.reason = "not_comparable", "not measured in every run"
        return effect
    effect.seed_std, effect.baseline_std, effect.arm_std = (
        grid.spread(metric, key, among) for among in ((baseline, arm), (baseline,), (arm,))
    )
    _estimate(effect, pairs, metric, before)
    if obstacle := _obstacle(key, metric, pairs, contended):
        effect.verdict, effect.reason, effect.ci95, effect.p_value = "not_comparable", obstacle, None, None
    return effect


def _estimate(effect: Effect, pairs: Sequence[Pair], metric: Metric, before: History) -> None:
    """Set the mean difference and its interval over seeds, in the order in which the seeds were run."""
    back = math.exp if metric.ratio else float
    by_seed = _in_order(((pair.seed, (pair.baseline, pair.arm)) for pair in pairs), before)
    both = [[(_compared(one, metric), _compared(other, metric)) for one, other in rows] for rows in by_seed.values()]
    ones = [statistics.fmean(one for one, _ in figures) for figures in both]
    others = [statistics.fmean(other for _, other in figures) for figures in both]
    values = [other - one for one, other in zip(ones, others, strict=True)]
    effect.baseline_mean, effect.arm_mean = back(statistics.fmean(ones)), back(statistics.fmean(others))
    effect.differences = {str(seed): back(value) for seed, value in zip(by_seed, values, strict=True)}
    looks = before.of(len(values), effect.key, (effect.baseline, effect.arm))
    found = infer(values, looks, before.schedule)
    effect.inference, effect.looks = found.inference, list(before.schedule) if found.inference == "declared" else looks
    if metric.ratio:
        effect.speed_ratio = back(found.mean)
    else:
        effect.mean_difference = found.mean
    if not math.isfinite(found.low):
        effect.reason = f"n={found.n}: no interval, add seeds"
        return
    effect.ci95, effect.p_value = [back(found.low), back(found.high)], found.p
    paired(effect, ones, others)


def _in_order(found: Iterable[tuple[int, tuple[Row, ...]]], before: History) -> dict[int, list[tuple[Row, ...]]]:
    """Runs held against each other by seed, in the order in which the last runs of each began, or as was declared."""
    by_seed: dict[int, list[tuple[Row, ...]]] = defaultdict(list)
    for seed, rows in found:
        by_seed[seed].append(rows)
    began = {seed: max(row["started"] for rows in each for row in rows) for seed, each in by_seed.items()}
    return dict(sorted(by_seed.items(), key=lambda item: item[0] if before.schedule else began[item[0]]))


def _emulated(pair: Pair) -> bool:
    return bool(pair.baseline["precision"]["emulated"] or pair.arm["precision"]["emulated"])


def _compared(row: Row, metric: Metric) -> float:
    """A measured figure on the scale on which it is compared."""
    value = cast(float, number_of(row, metric.key))
    return math.log(value) if metric.ratio else float(value)


def _obstacle(key: str, metric: Metric, pairs: Sequence[Pair], contended: set[str]) -> str:
    """Why the pairs of an axis cannot be compared in a metric; empty if they can."""
    both = [(pair.baseline, pair.arm) for pair in pairs]
    if key in ("precision", "precision.name"):
        for one, other in both:
            if _arithmetic(one) == _arithmetic(other):
                return f"both arms computed in {one['precision']['effective']} on this hardware"
    if metric in LOSSES:
        if any(one["data"]["sha256"] != other["data"]["sha256"] for one, other in both):
            return "the arms were trained on different texts"
        if metric.key == "val_loss" and any(
            one["data"].get("val_tokens") != other["data"].get("val_tokens") for one, other in both
        ):
            return "the arms were validated on different texts"
        return ""
    runs = [row for pair in both for row in pair]
    if metric is SPEED and any(map(_emulated, pairs)):
        return "emulated precision: its speed is not a hardware speed"
    hardware = [tuple((row["device"], row["threads"], row.get("processes", 1)) for row in pair) for pair in both]
    if any(one != other for one, other in hardware):
        return "the arms ran on different hardware"
    # a GPU's name says what it is, a processor's does not
    if metric is SPEED and any(
        one["device"].startswith("cpu") and one.get("machine") != other.get("machine") for one, other in both
    ):
        return "the arms ran on different machines"
    if metric is SPEED and any(row["folder"] in contended for row in runs):
        return "runs shared the machine while they were timed"
    if metric is SPEED and (disturbed := {row["folder"] for row in runs if load.too_many(row)}):
        several = len({row["folder"] for row in runs})
        return f"in {len(disturbed)} of {several} runs most steps waited for a core that another program used"
    return ""


def _arithmetic(row: Row) -> tuple[str, str | None]:
    """What a run's products were computed in, and how the emulation rounds if it was one."""
    precision = row["precision"]
    return precision["effective"], row["config"]["precision"]["rounding"] if precision["emulated"] else None


def _contended(rows: Sequence[Row]) -> set[str]:
    """Folders of runs that overlapped in time with another run on the same machine, finished or not.

    Each part of a run that was stopped and went on counts by itself: for the `span` it has recorded, of older records
    from `started`, kept to the second, for as long as it trained, since what its start-up took before is unknown.
    """
    spans: dict[str | None, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        if "started" in row:
            whole: list[dict[str, Any]] = [{"started": row["started"], "train": row["wall_seconds"]["train"]}]
            for part in row.get("parts", whole):
                begin = datetime.fromisoformat(part["started"]).timestamp()
                begin, end = part.get("span", (begin, begin + part["train"] - 1))
                spans[part.get("machine", row.get("machine"))].append((begin, end, row["folder"]))
    found: set[str] = set()
    for on_machine in spans.values():
        longest = (-math.inf, -math.inf, "")
        for span in sorted(on_machine):
            if span[0] < longest[1]:
                found |= {longest[2], span[2]}
            longest = max(longest, span, key=lambda one: one[1])
    return found


def _interactions(grid: Grid, metric: Metric, before: History) -> list[Interaction]:
    """Every two-way interaction of arms against their baselines in the loss, by seed like the main effects.

    Each difference of differences is taken among four runs that share all else, then averaged over the other axes.
    """
    found = []
    for (a, a_arms), (b, b_arms) in itertools.combinations(grid.axes.items(), 2):
        at_a, at_b = list(grid.axes).index(a), list(grid.axes).index(b)
        by_arms: dict[tuple[str, str], list[tuple[int, tuple[Row, ...]]]] = defaultdict(list)
        for seed, arms in grid.planned:
            if arms[at_a] == a_arms[0] or arms[at_b] == b_arms[0]:
                continue
            corners = []
            for arm_a, arm_b in itertools.product((arms[at_a], a_arms[0]), (arms[at_b], b_arms[0])):
                corner = list(arms)
                corner[at_a], corner[at_b] = arm_a, arm_b
                corners.append(grid.cells.get((seed, tuple(corner))))
            rows = tuple(row for row in corners if row is not None and number_of(row, metric.key) is not None)
            if len(rows) == 4:
                by_arms[arms[at_a], arms[at_b]].append((seed, rows))
        for pair in itertools.product(a_arms[1:], b_arms[1:]) if by_arms else ():
            if pair not in by_arms:
                continue
            by_seed = [
                statistics.fmean(
                    one - two - three + four
                    for one, two, three, four in ((_compared(row, metric) for row in four) for four in rows)
                )
                for rows in _in_order(by_arms[pair], before).values()
            ]
            spread = grid.spread(metric, a, (a_arms[0], pair[0]))
            of = infer(by_seed, before.of(len(by_seed), a, (a_arms[0], pair[0])), before.schedule)
            interval, p_value = ([of.low, of.high], of.p) if math.isfinite(of.low) else (None, None)
            large = (of.low > 0 or of.high < 0) and spread is not None and abs(of.mean) > spread
            found.append(Interaction((a, b), pair, metric.key, of.n, of.mean, interval, p_value, large))
    return found


def _distances(grid: Grid) -> list[Distance]:
    """Each precision's distance from the fp64 trajectory; empty where fp64 is no arm."""
    if "fp64" not in grid.axes.get("precision", []):
        return []

    def losses(row: Row) -> list[float]:
        return [step["loss"] for step in record.read_metrics(Path(row["folder"]))]

    found = []
    for arm in grid.axes["precision"]:
        pairs = grid.pairs("precision", "fp64", arm)[0] if arm != "fp64" else []
        both = [(losses(pair.baseline), losses(pair.arm)) for pair in pairs]
        both = [(one, other) for one, other in both if one and len(one) == len(other)]
        if not both:
            continue
        gaps = [[abs(a - b) for a, b in zip(one, other, strict=True)] for one, other in both]
        steps = zip(*(one for one, _ in both), strict=False)
        spreads = [statistics.stdev(step) for step in steps] if len(both) > 1 else []
        found.append(
            Distance(
                arm,
                len({pair.seed for pair in pairs}),
                statistics.fmean(map(max, gaps)),
                statistics.fmean(map(statistics.fmean, gaps)),
                statistics.fmean(spreads) if spreads else None,
            )
        )
    return found


def _public(row: Row) -> dict[str, Any]:
    """A row of `comparison.json`'s `runs`: the summary without what every run repeats."""
    return {key: value for key, value in row.items() if key not in ("config", "gone", "versions", "environment")}
