"""Reads the runs that are compared, finds their axes and arms, and groups them by seed.

The axes are the override keys that vary among the runs. Everything else in their configurations must be the same.
No torch.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from gpt2exp.compare.inference import pooled_std
from gpt2exp.config import CONTROL, TOGETHER, Design, RunConfig, key_and_values, moving
from gpt2exp.run import record, secret
from gpt2exp.run.metrics import Metric, Summary, number_of
from gpt2exp.schema import MOVED, flatten, is_housekeeping, plain, stored
from gpt2exp.section import SHA256, TARGET, BadRequest, override_key, show


class Row(Summary, total=False):
    """A run's summary; if it left none, its state, `config` and `overrides`."""

    folder: str
    gone: dict[str, Any]  # keys of its configuration that this version does not know
    pid: int | None  # of the process that ran it, or its last part
    tuned: str  # the tuned key: the run has its arm's best value, and this key is no axis


Settings = dict[str, str]


def read(folders: Sequence[Path]) -> list[Row]:
    """The rows of every run at or below the folders, each once, with `folder` as an absolute path.

    A run without a usable summary has its state, and `config` and `overrides` from `.hydra`. Its state is `damaged` if
    it should have a summary.

    Raises:
        BadRequest: a folder is missing, or none holds a run.
    """
    for folder in folders:
        if not folder.is_dir():
            raise BadRequest(f"{folder}: no such folder; name run or sweep folders, such as sweeps/DAY/TIME-ID")
    tops = [folder.resolve() for folder in folders]
    above = Path(os.path.commonpath(tops))  # names begin there, since jobs of several sweeps have the same names
    runs = {run.resolve(): run for top in tops for run in record.runs_below(top)}.values()
    if not runs:
        raise BadRequest(f"{folders[0]}: holds no run; name run or sweep folders, such as sweeps/DAY/TIME-ID")
    return [_row(run, above) for run in runs]


def _row(run: Path, above: Path) -> Row:
    row = cast("Row", {**record.row(run, above), "folder": str(run), "pid": record.read_status(run).get("pid")})
    if "config" in row:
        return row
    if row["state"] == "done" or (run / "summary.json").exists():
        try:
            record.read_summary(run)
        except (OSError, ValueError) as error:
            row["state"], row["error"] = "damaged", f"summary.json is missing or damaged: {error}"
    with contextlib.suppress(BadRequest):  # `.hydra` is unusable too
        config, gone, overrides = record.read_plain_config(run)
        secret.check_values([config, gone, overrides])  # an interpolation in a stranger's folder may name a secret
        row |= {"config": config, "gone": gone, "overrides": overrides}
    return row


def with_todays_keys(row: Row) -> Row:
    """A row with its configuration under today's keys; `gone`: those of its dotted keys that do not exist today."""
    if "config" not in row:
        return row
    config, gone = stored(row["config"])
    return {**row, "config": config, "gone": row.get("gone", {}) | gone}


def _settings(row: Row) -> tuple[Settings, Settings]:
    """A run's configuration, and its overrides, both by dotted key with values as text.

    Both lack housekeeping and the tuned key. The configuration has the keys of other versions too; the overrides are
    under today's keys, and without the backslashes that Hydra's sweeper puts before braces.
    """
    of = flatten(row["config"]) | flatten(row.get("gone", {}))
    flat = {key: show(value) for key, value in of.items() if key != row.get("tuned")}
    told: Settings = {}
    for text in row.get("overrides", []):
        key, value = override_key(text), text.partition("=")[2]
        if key in ("experiment", row.get("tuned")) or key.startswith(("hydra.", "hydra/")) or is_housekeeping(key):
            continue
        key = key if key in flat else MOVED.get(key, key)
        told[key] = re.sub(r"\\([\\()\[\]{}:=, \t])", r"\1", value).strip("'\"")
    return flat, told


def _arm(key: str, flat: Settings, told: Settings, baseline: str = "") -> str:
    """A run's arm of an axis: the value of a key, or the choice of a group, as typed or as its section names it.

    For keys that move together it is `n_embd=128 lr=0.0005`, without the values that the `baseline` has too.
    """
    if len(keys := key.split(TOGETHER)) > 1:
        names = [re.split("[./]", one)[-1] for one in keys]
        names = names if len({*names}) == len(names) else keys
        parts = [f"{name}={_arm(one, flat, told)}" for name, one in zip(names, keys, strict=True)]
        return " ".join(part for part in parts if part not in baseline.split()) or " ".join(parts)
    section = _section(key)
    chosen = flat.get(f"{section}name") or flat.get(f"{section}scheme")
    return flat.get(key) or told.get(key) or chosen or ("gpt2" if key.startswith("model") else "default")


def _section(group: str) -> str:
    """The prefix of the keys of a group's section; a schedule from outside has a section of its own."""
    return "schedule." if group == "optimizer.schedule" else f"{group.replace('/', '.')}."


def axes_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The axes: keys that were typed for a run and whose values vary, each with its arms, the baseline first.

    The baseline is the default, if a run has it, else the first run's arm. If not every combination is run, or there is
    a control, it is always the first run's arm. A control's axis stands first.

    A group is one axis, and its choices are the arms. It includes the keys of its section that vary with the choice
    alone, if they were not typed or are null by default, such as `data.path`. A key that follows others
    (`_follows`) is no axis.

    Raises:
        BadRequest: the runs also differ in something that was not typed.
    """
    runs = [_settings(row) for row in rows]
    usual = {key: show(value) for key, value in flatten(plain(RunConfig())).items()}
    keys = {key for flat, _ in runs for key in flat} - {"seed"}
    # a run of another version may lack a key: its value is not known, so it counts as no difference
    varying = {key for key in keys if len({flat[key] for flat, _ in runs if key in flat}) > 1}
    names = dict.fromkeys(key for _, told in runs for key in told if key in varying or key not in {*keys, "seed"})
    arms = {key: [_arm(key, *run) for run in runs] for key in names}
    arms = {key: of_runs for key, of_runs in arms.items() if len(set(of_runs)) > 1}
    by_group: set[str] = set()
    for group in arms.keys() - (keys - {"optimizer.schedule"}):
        inside = {key for key in keys if key.startswith(_section(group))}
        for key in {key for key in inside & varying if key not in arms or usual.get(key) == "null"}:
            both = {(arm, flat.get(key)) for arm, (flat, _) in zip(arms[group], runs, strict=True)}
            if len(both) == len(set(arms[group])):
                by_group.add(key)
        if inside and not inside & by_group and group not in keys:
            del arms[group]  # typed for some runs, a preset's choice in the others
    following = {key for key in varying - by_group if _follows(key, rows, [told for _, told in runs])}
    if differing := sorted(varying - arms.keys() - by_group - following):
        _refuse(differing, [flat for flat, _ in runs])
    axes = _joined([key for key in arms if key not in by_group | following], rows)
    axes.sort(key=lambda key: key != CONTROL or not controlled(rows))
    found, first = dict[str, list[str]](), selective(rows)
    for key in axes:
        of_runs = [_arm(key, *run) for run in runs]
        baseline = of_runs[0] if first else min(of_runs, key=_arm(key, usual, {}).__ne__)
        found[key] = list(dict.fromkeys([baseline, *(_arm(key, *run, baseline) for run in runs)]))
    return found


def _refuse(differing: Sequence[str], flats: Sequence[Settings]) -> NoReturn:
    """Raise `BadRequest` for runs that differ in keys that were not typed."""
    for key in differing:
        if key.endswith(f".{SHA256}"):
            target = key.replace(SHA256, TARGET)
            what = next(flat[target] for flat in flats if target in flat)
            why = "its code was changed between the runs, so that they are no longer one arm"
            raise BadRequest(f"{target}={what}: {why}; compare runs of one version of it")
    why = "which none of them was told to vary; compare folders whose runs share it"
    raise BadRequest(f"the runs also differ in {', '.join(differing)}, {why}")


def controlled(rows: Sequence[Row]) -> bool:
    """Whether the runs have a control: the baseline with another data order."""
    return any(row["config"]["sweep"]["control"] for row in rows)


def selective(rows: Sequence[Row]) -> bool:
    """Whether some combinations of arms were not to be run."""
    return controlled(rows) or any(row["config"]["sweep"]["design"] != Design.product for row in rows)


def _joined(keys: list[str], rows: Sequence[Row]) -> list[str]:
    """The axes; keys that moved together in a run (`sweep.together`) are one."""
    for texts in dict.fromkeys(tuple(row["config"]["sweep"]["together"]) for row in rows):
        if len(moved := [key for key in keys if key in moving(texts)]) > 1:
            keys = [key for key in keys if key not in moved[1:]]
            keys[keys.index(moved[0])] = TOGETHER.join(moved)
    return keys


def _follows(key: str, rows: Sequence[Row], told: Sequence[Settings]) -> bool:
    """Whether a key is, in every run, the same reference to other keys, such as `${train.steps}`, typed or in a preset.

    A resolver such as `${oc.env:LR}` may give anything, and so does not count; nor does an unreadable `.hydra`.
    """

    def written(row: Row) -> str:
        with contextlib.suppress(BadRequest):
            return str(record.read_unresolved(Path(row["folder"])).get(key))
        return ""

    texts = (settings.get(key) or written(row) for row, settings in zip(rows, told, strict=True))
    first = next(texts)
    return "${" in first and ":" not in first and all(text == first for text in texts)


# --- pairing ---------------------------------------------------------------------------------------------------------


class Group(NamedTuple):
    """Finished runs at one seed that differ in the arms of some axes alone.

    For one axis: the baseline's run and the arm's. For two axes: all four combinations, the later axis varying faster.
    """

    seed: int
    where: tuple[str, ...]  # an arm of each axis; for the axes that vary, the baseline
    runs: tuple[Row, ...]


Cell = tuple[int, tuple[str, ...]]  # a seed, and an arm of each axis


def cell_of(row: Row, axes: Mapping[str, Sequence[str]]) -> Cell:
    """The cell that a run belongs to."""
    settings = _settings(row)
    return row["config"]["seed"], tuple(_arm(key, *settings, arms[0]) for key, arms in axes.items())


class Grid:
    """Runs by seed and arms: `cells` are the finished ones, `planned` the cells of all, in order."""

    def __init__(self, rows: Sequence[Row], axes: dict[str, list[str]]) -> None:
        self.controlled, self.selective = controlled(rows), selective(rows)
        overs = {key_and_values(row["config"]["sweep"].get("over"))[0] for row in rows}
        # the axis that is a budget (`sweep.over`), its arms in ascending order; empty without one
        self.over = next(iter(overs), "") if len(overs) == 1 and overs <= axes.keys() else ""
        if self.over:
            axes = {**axes, self.over: sorted(axes[self.over], key=float)}
        self.axes, self.budget = axes, ""
        self._metrics: dict[str, list[dict[str, Any]]] = {}  # read once, by folder
        in_order = sorted(rows, key=lambda row: str(row.get("started")))
        cells = [(cell_of(row, axes), row) for row in in_order]
        self.cells = {cell: row for cell, row in cells if row["state"] == "done"}  # of repeated runs the last counts
        self.planned = sorted(
            {cell for cell, _ in cells},
            key=lambda cell: (cell[0], [arms.index(arm) for arms, arm in zip(axes.values(), cell[1], strict=True)]),
        )
        self.seeds = sorted({seed for seed, _ in self.cells})

    def part(self, keep: Callable[[int, tuple[str, ...]], bool], budget: str = "") -> Grid:
        """The part with the cells for which `keep(seed, arms)` is true."""
        part = copy.copy(self)
        part.cells = {cell: row for cell, row in self.cells.items() if keep(*cell)}
        part.planned, part.budget = [cell for cell in self.planned if keep(*cell)], budget
        return part

    def of(self, seeds: set[int]) -> Grid:
        """The part of these seeds."""
        return self.part(lambda seed, _: seed in seeds)

    @property
    def budgets(self) -> list[str]:
        """The budgets, such as `train.steps=50`, ascending; one empty text if no axis is a budget."""
        return [f"{self.over}={arm}" for arm in self.axes[self.over]] if self.over else [""]

    def within(self, budget: str) -> Grid:
        """The part of a budget."""
        over, _, arm = budget.partition("=")
        at = [*self.axes].index(over) if budget else 0
        return self.part(lambda _, arms: not budget or arms[at] == arm, budget)

    def curve(self, row: Row, key: str, clock: str = "tokens") -> dict[float, Any]:
        """A metric of a run along its steps or tokens, ascending; of a step that was done twice, the last value."""
        if row["folder"] not in self._metrics:
            self._metrics[row["folder"]] = record.read_metrics(Path(row["folder"]))
        points = {line[clock]: line[key] for line in self._metrics[row["folder"]] if key in line}
        return dict(sorted(points.items()))

    @property
    def arms(self) -> list[tuple[str, str]]:
        """Every axis with each of its arms but the baseline."""
        return [(key, arm) for key, arms in self.axes.items() for arm in arms[1:]]

    def pairs(self, key: str, arm: str) -> list[Group]:
        """The groups of an axis's baseline and an arm."""
        return self.groups({key: (self.axes[key][0], arm)})[0]

    def groups(self, varied: Mapping[str, tuple[str, str]]) -> tuple[list[Group], int]:
        """The groups, one for every seed and setting of the other axes, and the number of groups that lack a run.

        If a sweep was to run some combinations alone, a group counts only if each of its runs has a folder.

        `varied`: by axis, the baseline and the arm.
        """
        two, planned, found = [varied.get(key) for key in self.axes], {*self.planned}, dict[Cell, Group | None]()
        for seed, arms in self.planned:
            choices = [both or (arm,) for both, arm in zip(two, arms, strict=True)]
            where = seed, tuple(of_axis[0] for of_axis in choices)
            if where in found or not all(arm in of_axis for arm, of_axis in zip(arms, choices, strict=True)):
                continue
            cells = [(seed, each) for each in itertools.product(*choices)]
            if not self.selective or planned.issuperset(cells):
                runs = tuple(self.cells[cell] for cell in cells if cell in self.cells)
                found[where] = Group(*where, runs) if len(runs) == len(cells) else None
        whole = [group for group in found.values() if group]
        return whole, len(found) - len(whole)

    def spread(self, metric: Metric, key: str, among: Sequence[str]) -> float | None:
        """Seed-to-seed standard deviation of a metric, pooled over the settings with one of these arms."""
        at = list(self.axes).index(key)
        by_arms: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for (_, arms), row in self.cells.items():
            if arms[at] in among and number_of(row, metric.key) is not None:
                by_arms[arms].append(compared(row, metric))
        return pooled_std(by_arms.values())


def figures(groups: Sequence[Group], metric: Metric, *, declared: bool = False) -> dict[int, list[float]]:
    """By seed, the metric of each run of a group, averaged over the groups.

    Seeds are in the order in which the last run of each began, or if looks were `declared`, in the order of numbers.
    """
    by_seed: dict[int, list[tuple[Row, ...]]] = defaultdict(list)
    for group in groups:
        by_seed[group.seed].append(group.runs)
    began = {seed: max(row["started"] for runs in each for row in runs) for seed, each in by_seed.items()}
    return {
        seed: [statistics.fmean(compared(row, metric) for row in rows) for rows in zip(*by_seed[seed], strict=True)]
        for seed in (sorted(by_seed) if declared else sorted(by_seed, key=began.__getitem__))
    }


def compared(row: Row, metric: Metric) -> float:
    """A run's metric on the scale on which it is compared."""
    value = cast(float, number_of(row, metric.key))
    return math.log(value) if metric.ratio else float(value)
