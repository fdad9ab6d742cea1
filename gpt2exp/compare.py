"""Runs to answers: which arm is better, by how much, how sure.

What was typed is what is compared: the override keys that vary among the runs are the axes, and everything else in
their configurations must be the same. Runs that differ in one axis and share the rest, seed included, are a pair. The
seed is the unit of replication: differences at one seed are first averaged over the other axes, since pairs share
their seed's noise, and the interval is taken over seeds. No torch.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt2exp import record
from gpt2exp.config import BadRequest, RunConfig, plain, show

ALPHA = 0.05
"""Level of every test; intervals are 1 - ALPHA."""
HOUSEKEEPING = ("wandb", "sweep", "dry_run", "train.log_every", "train.measure_every")
"""Keys, or whole sections, that say how a run is kept and shown, not what it computes."""
GROUPS = {"precision": "name", "init": "scheme", "data": "name", "optimizer": "name"}
"""Config groups whose choice is a key of their section."""

Row = dict[str, Any]
Settings = dict[str, str]


@dataclass(frozen=True)
class Metric:
    """A figure of a run and how two of them compare."""

    key: str
    lower_is_better: bool
    ratio: bool = False
    """Compared as arm over baseline, on the logarithm."""
    unit: str = ""


LOSSES = (Metric("val_loss", True, unit="nats"), Metric("loss_mean_last10", True, unit="nats"))
SPEED = Metric("tokens_per_second", False, ratio=True)
MEMORY = Metric("peak_memory_bytes", True, unit="bytes")


@dataclass
class Effect:
    """One arm against the baseline of its axis, in one metric: an entry of `comparison.json`'s `axes`."""

    key: str
    baseline: str
    arm: str
    metric: str
    n_pairs: int = 0
    n_seeds: int = 0
    dropped_pairs: int = 0
    """Pairs planned that a failed or missing run broke."""
    mean_difference: float | None = None
    speed_ratio: float | None = None
    ci95: list[float] | None = None
    p_value: float | None = None
    p_holm: float | None = None
    """`p_value` after Holm's correction over the axes of this metric."""
    seed_std: float | None = None
    """Seed-to-seed standard deviation of the metric itself (of its logarithm, for a ratio)."""
    verdict: str | None = None
    reason: str = ""
    baseline_mean: float | None = None
    arm_mean: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    differences: dict[str, float] = field(default_factory=dict)
    """By seed, averaged over the other axes; ratios for a ratio."""


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
class Comparison:
    """Everything a comparison says; `as_dict` is `comparison.json`."""

    runs: list[Row]
    axes: list[Effect]
    interactions: list[Interaction]
    failed: list[Row]
    swept: dict[str, list[str]]
    """Arms of each axis, the baseline first."""
    seeds: list[int]
    metric: str
    """The loss compared."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As JSON's own types."""
        return {
            "runs": [_public(row) for row in self.runs],
            "axes": [asdict(effect) for effect in self.axes],
            "interactions": [asdict(item) for item in self.interactions],
            "failed": self.failed,
            "swept": self.swept,
            "seeds": self.seeds,
            "metric": self.metric,
            "notes": self.notes,
        }


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of every run at or below the folders, each once, with `folder` as an absolute path.

    Raises:
        BadRequest: a folder is missing, or none holds a run.
    """
    rows: dict[Path, Row] = {}
    for folder in folders:
        if not folder.is_dir():
            raise BadRequest(f"{folder}: no such folder; name run or sweep folders, such as sweeps/DAY/TIME-ID")
        for run in record.runs_below(folder.resolve()):
            rows.setdefault(run, {**record.row(run, folder.resolve()), "folder": str(run)})
    if not rows:
        raise BadRequest(f"{folders[0]}: holds no run; name run or sweep folders, such as sweeps/DAY/TIME-ID")
    return list(rows.values())


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested configuration by dotted key, housekeeping left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in HOUSEKEEPING:
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def typed(row: Row) -> Settings:
    """What was typed for a run, by key, values as shown; a key of the configuration takes its value from there."""
    flat = flatten(row["config"])
    settings: Settings = {}
    for text in row.get("overrides", []):
        key, _, value = text.lstrip("+").partition("=")
        if key.split(".")[0] in HOUSEKEEPING or key in HOUSEKEEPING or key == "experiment":
            continue
        settings[key] = show(flat[key]) if key in flat else value
    return settings


def _default(key: str, row: Row) -> str:
    """What a run that did not type `key` has for it."""
    flat = flatten(row["config"])
    if key in flat:
        return show(flat[key])
    if key in GROUPS:
        return show(flat[f"{key}.{GROUPS[key]}"])
    return "gpt2" if key == "model" else "default"


def axes_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Each varying key but `seed`, with its arms: the schema's default first if it is one, else in order of the runs.

    Raises:
        BadRequest: the runs also differ in something that was not typed.
    """
    names = dict.fromkeys(key for row in rows for key in typed(row))
    axes: dict[str, list[str]] = {}
    for key in names:
        arms = list(dict.fromkeys(typed(row).get(key, _default(key, row)) for row in rows))
        if len(arms) > 1 and key != "seed":
            usual = _default(key, {"config": plain(RunConfig())})
            axes[key] = sorted(arms, key=lambda arm: arm != usual)
    controlled = {"seed", *axes}
    differing = sorted(
        key
        for key in {key for row in rows for key in flatten(row["config"])}
        if len({repr(flatten(row["config"]).get(key)) for row in rows}) > 1
        and key not in controlled
        and key.split(".")[0] not in controlled
    )
    if differing:
        raise BadRequest(
            f"the runs also differ in {', '.join(differing)}, which none of them was told to vary; "
            "compare folders whose runs share it"
        )
    return axes


# --- statistics ------------------------------------------------------------------------------------------------------


def t_interval(values: Sequence[float]) -> tuple[float, list[float], float]:
    """Mean, 95 % interval and two-sided p value of the mean being zero, for n >= 2 differences.

    The paired t test: mean ± t(0.975, n-1) · s/√n (Student 1908; scipy.stats.ttest_1samp). With no spread at all the
    interval is the point, and p is 1 at zero and 0 elsewhere.
    """
    import numpy as np
    from scipy import stats

    sample = np.asarray(values, dtype=float)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return mean, [mean, mean], 1.0 if mean == 0 else 0.0
    result = stats.ttest_1samp(sample, 0.0)
    interval = result.confidence_interval(1 - ALPHA)
    return mean, [float(interval.low), float(interval.high)], float(result.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): the k-th smallest of m times m-k+1, made monotone, at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def pooled_std(groups: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation within groups, pooled over their degrees of freedom; None if no group has two values."""
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        return None
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum(statistics.variance(group) * (len(group) - 1) for group in groups) / freedom)


def judge(effect: Effect, *, lower_is_better: bool, margin: float | None) -> None:
    """Set the verdict of an effect with an interval, on the scale on which the interval is symmetric (see `_scale`).

    In this order:
    1. inside ±margin, where the user stated one: indistinguishable, whatever the p value;
    2. Holm's p below 0.05: better or worse, the reason saying so if it is smaller than the seed-to-seed std;
    3. inside ± the seed-to-seed std: indistinguishable. Both intervals-inside are equivalence tests in the manner of
       Schuirmann (1987), at 95 % rather than his 90 %, so stricter;
    4. else inconclusive.
    """
    assert effect.ci95 is not None
    scaled, (low, high) = _scale(effect)
    within = margin if margin is not None else effect.seed_std
    inside = within is not None and -within <= low and high <= within
    significant = effect.p_holm is not None and effect.p_holm < ALPHA
    if margin is not None and inside:
        effect.verdict, effect.reason = "indistinguishable", f"the interval lies inside ±{margin:g}"
    elif significant:
        effect.verdict = "better" if (scaled < 0) == lower_is_better else "worse"
        small = effect.seed_std is not None and abs(scaled) < effect.seed_std
        effect.reason = "smaller than the seed-to-seed std" if small else ""
    elif inside:
        effect.verdict, effect.reason = "indistinguishable", "the interval lies inside ± the seed-to-seed std"
    else:
        effect.verdict, effect.reason = "inconclusive", "the interval is wider than the seed-to-seed std: add seeds"


def _scale(effect: Effect) -> tuple[float, tuple[float, float]]:
    """Estimate and interval as a difference: of logarithms, for a ratio."""
    assert effect.ci95 is not None
    if effect.speed_ratio is not None:
        return math.log(effect.speed_ratio), (math.log(effect.ci95[0]), math.log(effect.ci95[1]))
    assert effect.mean_difference is not None
    return effect.mean_difference, (effect.ci95[0], effect.ci95[1])


# --- pairing ---------------------------------------------------------------------------------------------------------


class Grid:
    """Runs by seed and arms."""

    def __init__(self, rows: Sequence[Row], axes: dict[str, list[str]]) -> None:
        self.axes = axes
        self.cells: dict[tuple[int, tuple[str, ...]], Row] = {}
        for row in sorted(rows, key=lambda row: str(row["started"])):  # of a repeated run the last counts
            settings = typed(row)
            arms = tuple(settings.get(key, _default(key, row)) for key in axes)
            self.cells[row["config"]["seed"], arms] = row
        self.seeds = sorted({seed for seed, _ in self.cells})

    def pairs(self, key: str, baseline: str, arm: str) -> tuple[list[tuple[int, Row, Row]], int]:
        """(seed, baseline run, arm run) for every setting of the other axes, and how many lack one of the two."""
        at = list(self.axes).index(key)
        found, broken = [], 0
        others = [[baseline] if name == key else arms for name, arms in self.axes.items()]
        for seed, arms in itertools.product(self.seeds, itertools.product(*others)):
            first = self.cells.get((seed, arms))
            second = self.cells.get((seed, (*arms[:at], arm, *arms[at + 1 :])))
            if first is not None and second is not None:
                found.append((seed, first, second))
            elif first is not None or second is not None:
                broken += 1
        return found, broken

    def spread(self, figure: Callable[[Row], float]) -> float | None:
        """Seed-to-seed standard deviation of a figure, pooled over the settings."""
        by_arms: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for (_, arms), row in self.cells.items():
            by_arms[arms].append(figure(row))
        return pooled_std(by_arms.values())


def compare(rows: Sequence[Row], *, margin: float | None = None) -> Comparison:
    """The comparison of a set of runs, finished or not.

    Raises:
        BadRequest: nothing to compare, or the runs differ in something unswept.
    """
    known = [row for row in rows if "config" in row]
    if not known:
        raise BadRequest("none of the runs has a summary yet; wait for one to finish")
    axes = axes_of(known)
    done = [row for row in known if row["state"] == "done"]
    failed = [
        {"name": row["name"], "state": row["state"], "step": row.get("steps", row.get("step")), "error": row["error"]}
        for row in rows
        if row["state"] != "done"
    ]
    has_validation = bool(done) and all(row.get("val_loss") is not None for row in done)
    loss = LOSSES[0] if has_validation else LOSSES[1]
    grid = Grid(done, axes)
    contended = _contended(done)
    effects = [
        _effect(grid, key, arms[0], arm, metric, contended)
        for key, arms in axes.items()
        for arm in arms[1:]
        for metric in (loss, SPEED, MEMORY)
    ]
    for metric in (loss, SPEED, MEMORY):
        tested = [effect for effect in effects if effect.metric == metric.key and effect.p_value is not None]
        for effect, adjusted in zip(tested, holm([e.p_value for e in tested if e.p_value is not None]), strict=True):
            effect.p_holm = adjusted
            judge(effect, lower_is_better=metric.lower_is_better, margin=margin if metric is loss else None)
    notes = []
    if len(grid.cells) < len(done):
        notes.append(f"{len(done) - len(grid.cells)} runs repeat another's settings and seed; the last of each counts")
    if not axes:
        notes.append("nothing but the seed varies, so there is no axis to compare")
    return Comparison(
        runs=list(rows),
        axes=effects,
        interactions=_interactions(grid, loss),
        failed=failed,
        swept=axes,
        seeds=grid.seeds,
        metric=loss.key,
        notes=notes,
    )


def _effect(grid: Grid, key: str, baseline: str, arm: str, metric: Metric, contended: set[str]) -> Effect:
    pairs, broken = grid.pairs(key, baseline, arm)
    effect = Effect(key, baseline, arm, metric.key, n_pairs=len(pairs), dropped_pairs=broken)
    if not pairs:
        effect.verdict, effect.reason = "not_comparable", "no pair of finished runs"
        return effect
    first, second = pairs[0][1], pairs[0][2]
    effect.parameters = {"baseline": first["parameters"]["total"], "arm": second["parameters"]["total"]}
    figure = _figure(metric)
    by_seed: dict[int, list[float]] = defaultdict(list)
    for seed, one, other in pairs:
        by_seed[seed].append(figure(other) - figure(one))
    differences = {seed: statistics.fmean(values) for seed, values in by_seed.items()}
    effect.n_seeds = len(differences)
    effect.seed_std = grid.spread(figure)
    effect.baseline_mean = statistics.fmean(one[metric.key] for _, one, _ in pairs)
    effect.arm_mean = statistics.fmean(other[metric.key] for _, _, other in pairs)
    back = math.exp if metric.ratio else float
    effect.differences = {str(seed): back(value) for seed, value in differences.items()}
    values = list(differences.values())
    mean, interval, p_value = t_interval(values) if len(values) > 1 else (values[0], None, None)
    if metric.ratio:
        effect.speed_ratio = back(mean)
    else:
        effect.mean_difference = mean
    obstacle = _obstacle(key, metric, pairs, contended)
    if obstacle:
        effect.verdict, effect.reason = "not_comparable", obstacle
        return effect
    if interval is None:
        effect.reason = "n=1: no interval, add seeds"
        return effect
    effect.ci95, effect.p_value = [back(bound) for bound in interval], p_value
    return effect


def _figure(metric: Metric) -> Callable[[Row], float]:
    return lambda row: math.log(row[metric.key]) if metric.ratio else float(row[metric.key])


def _obstacle(key: str, metric: Metric, pairs: Sequence[tuple[int, Row, Row]], contended: set[str]) -> str:
    """Why the pairs of an axis cannot be compared in a metric; empty if they can."""
    both = [(one, other) for _, one, other in pairs]
    if key == "precision":
        got = [{row["precision"]["effective"] for row in pair} for pair in both]
        if any(len(effective) == 1 for effective in got):
            same = next(effective for effective in got if len(effective) == 1)
            return f"both arms computed in {same.pop()} on this hardware"
    if metric in LOSSES:
        if any(one["data"]["sha256"] != other["data"]["sha256"] for one, other in both):
            return "the arms were trained on different texts"
        return ""
    runs = [row for pair in both for row in pair]
    if metric is SPEED and any(row["precision"]["emulated"] for row in runs):
        return "emulated precision: its speed is not a hardware speed"
    if any(one["device"] != other["device"] or one["threads"] != other["threads"] for one, other in both):
        return "the arms ran on different hardware"
    if metric is SPEED and any(row["folder"] in contended for row in runs):
        return "runs shared the machine while they were timed"
    return ""


def _contended(rows: Sequence[Row]) -> set[str]:
    """Folders of runs that overlapped in time with another run on the same machine."""
    spans = []
    for row in rows:
        begin = datetime.fromisoformat(row["started"]).timestamp()
        spans.append((row.get("machine"), begin, begin + row["wall_seconds"]["total"], row["folder"]))
    spans.sort(key=lambda span: span[1])
    found: set[str] = set()
    for one, other in itertools.pairwise(spans):
        if one[0] == other[0] and other[1] < one[2] - 1:  # starts are kept to the second
            found |= {one[3], other[3]}
    return found


def _interactions(grid: Grid, metric: Metric) -> list[Interaction]:
    """Every two-way interaction of arms against their baselines in the loss, by seed like the main effects."""
    figure = _figure(metric)
    spread = grid.spread(figure)
    found = []
    for (a, a_arms), (b, b_arms) in itertools.combinations(grid.axes.items(), 2):
        for arm_a, arm_b in itertools.product(a_arms[1:], b_arms[1:]):
            effects: dict[tuple[int, str], list[float]] = defaultdict(list)
            for seed, one, other in grid.pairs(a, a_arms[0], arm_a)[0]:
                where = typed(one).get(b, _default(b, one))
                effects[seed, where].append(figure(other) - figure(one))
            by_seed = [
                statistics.fmean(effects[seed, arm_b]) - statistics.fmean(effects[seed, b_arms[0]])
                for seed in grid.seeds
                if effects.get((seed, arm_b)) and effects.get((seed, b_arms[0]))
            ]
            if not by_seed:
                continue
            mean, interval, p_value = t_interval(by_seed) if len(by_seed) > 1 else (by_seed[0], None, None)
            excludes = interval is not None and (interval[0] > 0 or interval[1] < 0)
            large = excludes and spread is not None and abs(mean) > spread
            found.append(Interaction((a, b), (arm_a, arm_b), metric.key, len(by_seed), mean, interval, p_value, large))
    return found


def _public(row: Row) -> Row:
    """A row of `comparison.json`'s `runs`: the summary without what every run repeats."""
    return {key: value for key, value in row.items() if key not in ("config", "versions", "environment")}


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script `gpt2exp-compare`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Compare the runs under the folders named; exit code 0, or 2 for a bad request."""
    from gpt2exp import report, view

    parser = argparse.ArgumentParser(
        prog="gpt2exp-compare",
        description="Compare the runs under one or more run or sweep folders, finished or not, and write "
        "comparison.json, comparison.csv, report.md and report.html.",
        epilog="example: gpt2exp-compare sweeps/2026-01-31/12-00-00-abcd --margin 0.01",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run or sweep folder, or one above")
    parser.add_argument("--margin", type=float, help="loss differences inside ±MARGIN nats count as none")
    parser.add_argument("--out", type=Path, help="where to write (default: the first DIR)")
    args = parser.parse_args(argv)
    try:
        if args.margin is not None and not (math.isfinite(args.margin) and args.margin > 0):
            raise BadRequest(f"--margin {args.margin}: must be a number of nats above 0; try --margin 0.01")
        comparison = compare(read(args.folders), margin=args.margin)
        out = args.out or args.folders[0]
        out.mkdir(parents=True, exist_ok=True)
        report.write(comparison, out)
    except BadRequest as error:
        view.refuse(str(error), program="gpt2exp-compare")
        return 2
    except OSError as error:
        why = error.strerror or str(error)
        view.refuse(f"cannot write the comparison ({why}); name a folder with --out", program="gpt2exp-compare")
        return 2
    report.show(comparison, view.terminal())
    return 0


if __name__ == "__main__":
    main()
