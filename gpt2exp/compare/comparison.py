"""Compares runs: which arm is better, by how much, and how sure that is.

Two runs that differ in one axis and share the rest, seed included, are a pair. Pairs of one seed share its noise, so
their differences are averaged first, and the interval is taken over seeds. No torch.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt2exp.compare import multiplier, tuned
from gpt2exp.compare.effect import FEWEST_POINTS, Effect, judge, late_change
from gpt2exp.compare.history import History, history
from gpt2exp.compare.inference import holm, pairing
from gpt2exp.compare.rows import Grid, Group, Row, axes_of, compared, figures, read, with_todays_keys
from gpt2exp.config import CONTROL
from gpt2exp.run.metrics import BY_KEY, METRICS, Metric, from_outside, number_of
from gpt2exp.schema import flatten
from gpt2exp.section import SOURCE, BadRequest
from gpt2exp.training import load

__all__ = ["Comparison", "Distance", "Grid", "Interaction", "Row", "compare", "read"]

LOSSES = tuple(metric for metric in METRICS if metric.compared == "loss")
"""The losses that can be compared: the last one that every finished run has is."""
SPEED = BY_KEY["tokens_per_second"]
MEMORY = BY_KEY["peak_memory_bytes"]


@dataclass
class Interaction:
    """How much the effect of one axis changes with another: the difference of differences, by seed.

    `large`: the interval excludes zero and the size exceeds the seed-to-seed std.
    """

    keys: tuple[str, str]
    arms: tuple[str, str]
    metric: str
    n_seeds: int
    mean_difference: float
    ci95: list[float] | None
    p_value: float | None
    large: bool


@dataclass
class Distance:
    """How far a precision's training losses lie from fp64's at the same seed and step: nats, means over seeds.

    `largest` and `mean` are over the steps. `seed_std`: fp64's own std between seeds, its mean over the steps.
    """

    arm: str
    n_seeds: int
    largest: float
    mean: float
    seed_std: float | None


@dataclass
class Comparison:
    """Everything a comparison says; `as_dict` is `comparison.json`."""

    runs: list[Row]  # without those that tuned an arm
    axes: list[Effect]
    interactions: list[Interaction]
    distances: list[Distance]  # of each precision, if fp64 is an arm
    failed: list[dict[str, Any]]
    swept: dict[str, list[str]]  # the arms of each axis, the baseline first
    seeds: list[int]
    metric: str  # the loss that is compared
    notes: list[str]
    margin: float | None = None  # nats, within which a difference in the loss counts as none
    looks: list[dict[str, Any]] = field(default_factory=list)
    """The comparisons so far, this one last: how many `seeds` each saw, how many were `planned` by then, its `arms`."""
    over: str = ""  # the axis that is a budget, if any: then `axes` has the other axes' arms within each budget
    tuning: list[tuned.Curve] = field(default_factory=list)  # of each arm that was tuned

    @property
    def searched(self) -> bool:
        """Whether this was a search: five or more numbers of one key, each tried once, so that none can be compared."""
        arms = [arm for arms in self.swept.values() for arm in arms]
        numbers = all(re.fullmatch(r"[\d.]+(e[+-]?\d+)?", arm) for arm in arms)
        once = all(effect.n_seeds <= 1 for effect in self.axes)
        return len(self.swept) == 1 and len(arms) >= 5 and numbers and once

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, without the fields that are alike in nearly all runs."""
        repeated = ("config", "gone", "versions", "environment")
        runs = [{key: value for key, value in row.items() if key not in repeated} for row in self.runs]
        return {**asdict(replace(self, runs=[])), "runs": runs}  # a copy of every configuration would take long


def compare(rows: Sequence[Row], *, margin: float | None = None, out: Path | None = None) -> Comparison:
    """The comparison of a set of runs, finished or not, as `read` gives them.

    `margin`: nats, instead of the runs' `sweep.margin`. `out`: a folder where an earlier comparison may lie.

    Raises:
        BadRequest: nothing to compare, or the runs differ in a key that no override names.
    """
    rows, trials = tuned.separate([with_todays_keys(row) for row in rows])
    if trials and not rows:
        raise BadRequest("all of these runs tuned an arm (sweep.tune_seeds), and such runs are never compared")
    known = [row for row in rows if "config" in row]
    if not known or all(row["state"] in ("running", "not run", "damaged") for row in rows):
        damaged = [f"{row['name']}: {row['error']}" for row in rows if row["state"] == "damaged"]
        raise BadRequest("; ".join(damaged) or "none of the runs has a summary yet; wait for one to finish")
    done = [row for row in known if row["state"] == "done"]
    grid, loss = Grid(known, axes_of(known)), _loss(done)
    stated, notes = _margin(known) if margin is None else (margin, [])
    before = history(known, grid, out)
    own = {metric.key: metric for row in done for metric in from_outside(row["config"])}
    BY_KEY.update(own)
    effects = _effects(grid, (loss, SPEED, MEMORY, *own.values()), before, contended(known), stated)
    speeds = {(one.key, one.arm, one.budget): one for one in effects if one.metric == SPEED.key}
    for effect in effects:
        if effect.metric == loss.key and effect.differences and effect.verdict != "not_comparable":
            part = grid.within(effect.budget)
            _trend(effect, part, before)
            multiplier.measure(effect, speeds[effect.key, effect.arm, effect.budget], part, before)
    unknown = {effect.multiplier_reason: None for effect in effects if effect.steps_factor is None}
    notes += [f"no compute multiplier: {reason}" for reason in unknown if reason]
    curves = tuned.curves(trials, rows)
    return Comparison(
        runs=rows,
        axes=effects,
        interactions=_interactions(grid, loss, before),
        distances=_distances(grid),
        failed=[
            {key: row[key] for key in ("name", "state", "error")} | {"step": row.get("steps", row.get("step"))}
            for row in rows
            if row["state"] != "done"
        ],
        swept=grid.axes,
        seeds=grid.seeds,
        metric=loss.key,
        notes=[*_notes(known, done, grid), *notes, *(curve.said() for curve in curves if curve.doubtful)],
        margin=stated,
        looks=before.looks,
        over=grid.over,
        tuning=curves,
    )


def at_looks(rows: Sequence[Row], looks: Sequence[int]) -> list[list[Effect]]:
    """Each arm's effect on the loss over the first n seeds, for each n of `looks`.

    Raises:
        BadRequest: as `compare`.
    """
    rows, _ = tuned.separate([with_todays_keys(row) for row in rows if "config" in row])
    grid, loss = Grid(rows, axes_of(rows)), _loss([row for row in rows if row["state"] == "done"])
    before, (margin, _), seeds = history(rows, grid), _margin(rows), sorted({seed for seed, _ in grid.planned})
    return [_effects(grid.of({*seeds[:n]}), (loss,), before, set(), margin) for n in looks]


def _loss(done: Sequence[Row]) -> Metric:
    """The last of `LOSSES` that all finished runs have."""
    everywhere = [m for m in LOSSES if done and all(number_of(row, m.key) is not None for row in done)]
    return everywhere[-1] if everywhere else LOSSES[0]


def _margin(known: Sequence[Row]) -> tuple[float | None, list[str]]:
    """The runs' `sweep.margin`, and a note if they differ: then the smallest, or none if one run has none."""
    found = {row["config"]["sweep"]["margin"] for row in known}
    margin = None if None in found else min(found)
    if len(found) == 1:
        return margin, []
    taken = "so none is taken" if margin is None else f"the smallest is taken, {margin:g}"
    return margin, [f"the runs differ in sweep.margin: {taken}"]


def _notes(known: Sequence[Row], done: Sequence[Row], grid: Grid) -> Iterator[str]:
    if len(grid.cells) < len(done):
        yield f"{len(done) - len(grid.cells)} runs repeat another's settings and seed; the last of each counts"
    if places := Counter(str(Path(row["reused"]["from"]).parent) for row in done if row.get("reused")):
        each = "; ".join(f"{count} from {place}" for place, count in places.items())
        names = ", ".join(row["name"] for row in done if row.get("reused"))
        yield f"taken from other sweeps, not run here (sweep.reuse): {each}: {names}"
    if not grid.axes:
        yield "nothing but the seed varies, so there is no axis to compare"
    if gone := sorted({key for row in known for key in row.get("gone", {})} - set(grid.axes)):
        yield f"{', '.join(gone)}: no key of this version, recorded by another; taken to make no difference"
    for key, arm in grid.arms:
        settings: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        for group in grid.pairs(key, arm):
            settings[group.seed].add(group.where)
        if len(set(map(frozenset, settings.values()))) > 1:
            yield (
                f"{key}: some runs are missing, so the seeds of {arm} average over different settings of the other "
                "axes; if its effect depends on the setting, the mean favours the settings with more seeds"
            )
    made_with = [flatten({key: row.get(key) or {} for key in ("git", "versions")}) for row in done]
    keys = sorted({key for made in made_with for key in made})
    changed = [key for key in keys if len({str(made.get(key)) for made in made_with}) > 1]
    if changed:
        yield f"the runs differ in {', '.join(changed)}, which may show in losses and speed"


def _effects(
    grid: Grid, metrics: Sequence[Metric], before: History, contended: set[str], margin: float | None
) -> list[Effect]:
    """Each arm against the baseline of its axis in each metric, judged; the margin is of the first metric.

    If an axis is a budget, this is done within each budget, and the budget itself has no verdict.
    """
    parts = [grid.within(budget) for budget in grid.budgets]
    each = itertools.product((arm for arm in grid.arms if arm[0] != grid.over), parts, metrics)
    effects = [_effect(part, *arm, metric, before, contended) for arm, part, metric in each]
    # the control is not a question of the study, so Holm's correction does not count it
    for metric, control in itertools.product(metrics, (False, True)):
        tested = [one for one in effects if (one.metric, one.control) == (metric.key, control) and one.ci95 is not None]
        for effect, adjusted in zip(tested, holm([e.p_value for e in tested if e.p_value is not None]), strict=True):
            effect.p_holm = adjusted
            judge(effect, lower_is_better=metric.better == "lower", margin=margin if metric is metrics[0] else None)
    return effects


def _effect(grid: Grid, key: str, arm: str, metric: Metric, before: History, contended: set[str]) -> Effect:
    """An arm against the baseline of its axis, with an interval unless something keeps them from being compared."""
    baseline = grid.axes[key][0]
    groups, broken = grid.groups({key: (baseline, arm)})
    if metric is SPEED:  # if some pairs ran without emulation, only these are compared
        groups = [group for group in groups if not any(map(_emulated, group.runs))] or groups
    control = grid.controlled and key == CONTROL
    effect = Effect(key, baseline, arm, metric.key, grid.budget, control, n_pairs=len(groups), dropped_pairs=broken)
    effect.n_seeds = len({group.seed for group in groups})
    effect.verdict = "not_comparable"
    if not groups:
        effect.reason = f"no two finished runs differ in {key} alone"
        return effect
    one, other = groups[0].runs
    effect.parameters = {"baseline": one["parameters"]["total"], "arm": other["parameters"]["total"]}
    if any(number_of(row, metric.key) is None for group in groups for row in group.runs):
        effect.reason = "not measured in every run"
        return effect
    effect.seed_std, effect.baseline_std, effect.arm_std = (
        grid.spread(metric, key, among) for among in ((baseline, arm), (baseline,), (arm,))
    )
    _estimate(effect, figures(groups, metric, declared=bool(before.schedule)), metric, before)
    if metric in LOSSES:
        effect.tuning = tuned.condition(key, baseline, arm, groups, grid.axes)
    if obstacle := _obstacle(key, metric, groups, contended) or (metric is MEMORY and _memory_obstacle(effect, groups)):
        effect.reason, effect.ci95, effect.p_value = obstacle, None, None
    else:
        effect.verdict = None
    return effect


def _estimate(effect: Effect, by_seed: dict[int, list[float]], metric: Metric, before: History) -> None:
    """Set the mean difference and its interval over seeds."""
    back = math.exp if metric.ratio else float
    ones, others = zip(*by_seed.values(), strict=True)
    values = [other - one for one, other in by_seed.values()]
    effect.baseline_mean, effect.arm_mean = back(statistics.fmean(ones)), back(statistics.fmean(others))
    effect.differences = {str(seed): back(value) for seed, value in zip(by_seed, values, strict=True)}
    found, effect.looks = before.infer(values, effect.key, (effect.baseline, effect.arm))
    effect.inference = found.inference
    if metric.ratio:
        effect.speed_ratio = back(found.mean)
    else:
        effect.mean_difference = found.mean
    if not math.isfinite(found.low):
        effect.reason = f"n={found.n}: no interval, add seeds"
        return
    effect.ci95, effect.p_value = [back(found.low), back(found.high)], found.p
    effect.pair_correlation, effect.seeds_saved = pairing(ones, others)


def _trend(effect: Effect, grid: Grid, before: History) -> None:
    """Set the trend of the difference in training loss, with its interval over seeds; not if a run is too short."""
    changes: dict[int, list[float]] = {seed: [] for seed in map(int, effect.differences)}
    for group in grid.pairs(effect.key, effect.arm):
        one, other = (grid.curve(row, "loss") for row in group.runs)
        tokens = [at for at in one if at in other]
        if len(tokens) < FEWEST_POINTS:
            return
        changes[group.seed].append(late_change(tokens, [other[at] - one[at] for at in tokens]))
    values = [statistics.fmean(each) for each in changes.values()]
    found, _ = before.infer(values, effect.key, (effect.baseline, effect.arm))
    if math.isfinite(found.low):
        effect.trend = [found.mean, found.low, found.high]


def _interactions(grid: Grid, metric: Metric, before: History) -> list[Interaction]:
    """Every two-way interaction in the loss of arms against their baselines, with its interval over seeds.

    Each difference of differences is taken among four runs that share all else, then averaged over the other axes.
    """
    found = []
    for (at_a, (a, a_arms)), (at_b, (b, b_arms)) in itertools.combinations(enumerate(grid.axes.items()), 2):
        met = {(arms[at_a], arms[at_b]) for _, arms in grid.planned}
        for pair in itertools.product(a_arms[1:], b_arms[1:]):
            two = a_arms[0], pair[0]
            four = grid.groups({a: two, b: (b_arms[0], pair[1])})[0] if pair in met else []
            four = [group for group in four if all(number_of(row, metric.key) is not None for row in group.runs)]
            if not four:
                continue
            corners = figures(four, metric, declared=bool(before.schedule)).values()
            by_seed = [both - a_alone - b_alone + neither for neither, b_alone, a_alone, both in corners]
            spread, (of, _) = grid.spread(metric, a, two), before.infer(by_seed, a, two)
            interval, p_value = ([of.low, of.high], of.p) if math.isfinite(of.low) else (None, None)
            large = (of.low > 0 or of.high < 0) and spread is not None and abs(of.mean) > spread
            found.append(Interaction((a, b), pair, metric.key, of.n, of.mean, interval, p_value, large))
    return found


# --- what cannot be compared -----------------------------------------------------------------------------------------


def _obstacle(key: str, metric: Metric, pairs: Sequence[Group], contended: set[str]) -> str:
    """Why the pairs of an axis cannot be compared in a metric; empty if they can."""
    runs = [row for pair in pairs for row in pair.runs]

    def differ(of: Callable[[Row], Any]) -> bool:
        return any(of(one) != of(other) for one, other in (pair.runs for pair in pairs))

    def arithmetic(row: Row) -> tuple[str, str | None]:
        """The precision of its products and, if that is emulated, their rounding."""
        return row["precision"]["effective"], row["config"]["precision"]["rounding"] if _emulated(row) else None

    if key in ("precision", "precision.name"):
        for one, other in (pair.runs for pair in pairs):
            if arithmetic(one) == arithmetic(other):
                return f"both arms computed in {one['precision']['effective']} on this hardware"
    if metric in LOSSES:
        if differ(lambda row: row["data"]["sha256"]):
            return "the arms were trained on different texts"
        validated = metric.key == "val_loss" and differ(lambda row: row["data"].get("val_tokens"))
        return "the arms were validated on different texts" if validated else ""
    if metric.compared == metric.key:
        code = [row["config"]["metric"] | {SOURCE: ""} for row in runs]
        return "" if all(one == code[0] for one in code) else "the runs measured it by different code or keys"
    if metric is SPEED and any(map(_emulated, runs)):
        return "emulated precision: its speed is not a hardware speed"
    if differ(lambda row: (row["device"], row["threads"], row.get("processes", 1))):
        return "the arms ran on different hardware"
    if metric is not SPEED:
        return ""
    # the speeds of two GPUs of one name can be compared, those of two processors cannot
    if differ(lambda row: row["device"].startswith("cpu") and row.get("machine")):
        return "the arms ran on different machines"
    if any(row["folder"] in contended for row in runs):
        return "runs shared the machine while they were timed"
    if disturbed := {row["folder"] for row in runs if load.mostly_disturbed(row)}:
        several = len({row["folder"] for row in runs})
        return f"in {len(disturbed)} of {several} runs most steps waited for a core that another program used"
    return ""


def _emulated(row: Row) -> bool:
    return bool(row["precision"]["emulated"])


def contended(rows: Sequence[Row]) -> set[str]:
    """Folders of runs that overlapped in time with another run on the same machine, finished or not.

    Each part of a resumed run counts by itself, for the `span` that it recorded. An older record has no `span`: it
    counts from `started`, which has whole seconds, for as long as it trained. A run that was taken from another sweep
    has recorded whether it overlapped there.
    """
    spans: dict[str | None, list[tuple[float, float, str]]] = defaultdict(list)
    for row in rows:
        if "started" in row:
            whole: list[dict[str, Any]] = [{"started": row["started"], "train": row["wall_seconds"]["train"]}]
            for part in row.get("parts", whole):
                begin = datetime.fromisoformat(part["started"]).timestamp()
                begin, end = part.get("span", (begin, begin + part["train"] - 1))
                spans[part.get("machine", row.get("machine"))].append((begin, end, row["folder"]))
    found = {row["folder"] for row in rows if row.get("reused", {}).get("shared")}
    for on_machine in spans.values():
        longest = (-math.inf, -math.inf, "")
        for span in sorted(on_machine):
            if span[0] < longest[1]:
                found |= {longest[2], span[2]}
            longest = max(longest, span, key=lambda one: one[1])
    return found


def _memory_obstacle(effect: Effect, pairs: Sequence[Group]) -> str:
    """Why the memory cannot be compared if one process ran several of the runs; empty if it can.

    What an earlier job leaves in the process adds to a later job's peak. Runs that differ in the seed alone show how
    much that is. Arms that differ by less are not compared.
    """
    runs = {row["folder"]: row for pair in pairs for row in pair.runs}.values()
    processes = [(row.get("machine"), row["pid"]) for row in runs if row.get("pid")]
    alike: dict[tuple[int, tuple[str, ...]], list[float]] = defaultdict(list)
    for pair in pairs:
        for place, row in enumerate(pair.runs):
            alike[place, pair.where].append(compared(row, MEMORY))
    most = max(max(peaks) - min(peaks) for peaks in alike.values())
    if len({*processes}) == len(processes) or abs(effect.mean_difference or 0.0) >= most:
        return ""
    apart = f"runs that differ in the seed alone are up to {most / MEMORY.scale:,.0f} {MEMORY.unit} apart"
    return f"one process ran several jobs, and {apart}, more than the arms; sweep.isolate=true measures each by itself"


def _distances(grid: Grid) -> list[Distance]:
    """Each precision's distance from the fp64 trajectory; empty where fp64 is no arm."""
    found, arms = [], grid.axes.get("precision", [])
    for arm in arms if "fp64" in arms else ():
        pairs = grid.groups({"precision": ("fp64", arm)})[0] if arm != "fp64" else []
        both = [tuple([*grid.curve(row, "loss", "step").values()] for row in pair.runs) for pair in pairs]
        both = [(one, other) for one, other in both if one and len(one) == len(other)]
        if not both:
            continue
        gaps = [[abs(a - b) for a, b in zip(one, other, strict=True)] for one, other in both]
        steps = zip(*(one for one, _ in both), strict=False)
        spread = statistics.fmean(map(statistics.stdev, steps)) if len(both) > 1 else None
        largest, mean = (statistics.fmean(map(of, gaps)) for of in (max, statistics.fmean))
        found.append(Distance(arm, len({pair.seed for pair in pairs}), largest, mean, spread))
    return found
