"""A comparison in words: on the terminal, as Markdown, as a page, in wandb.

One function makes the verdict sentences (`sentences`) and one the rows of the table (`effects_table`); every form of
the report shows those, and the page is the Markdown with our style around it. No torch.
"""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from gpt2exp.compare.comparison import MEMORY, SPEED, Comparison, Distance, Grid, Interaction, Row
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.inference import LARGEST
from gpt2exp.config import WandbConfig, parse
from gpt2exp.run import record, terminal
from gpt2exp.run.metrics import BY_KEY, COLUMNS, number_of, shown
from gpt2exp.run.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

PAIRING = ("r", "saved")
"""Columns that the terminal has no room for."""
COLOURS = {"better": "green", "worse": "red", "indistinguishable": "cyan", "inconclusive": "yellow"}
SIGNS = {"better": "▲", "worse": "▼", "indistinguishable": "≈", "inconclusive": "?", "not_comparable": "–", "": "·"}
INTERACTIONS = (
    "How much the effect of one axis on the loss changes with another: the difference of their differences, by seed. "
    "p is not corrected. Large: the interval excludes zero and the size exceeds the seed-to-seed std."
)
METHOD = (
    "Runs that differ in one axis and share the rest, seed included, are a pair. Differences at one seed are averaged "
    "over the other axes first; n counts seeds. Intervals are 95 %, of the paired differences; p values are corrected "
    "by Holm over the arms of all axes in one metric. The seed-to-seed std is that of the metric itself among runs "
    "that differ in the seed alone: the size of a difference that chance makes between two single runs; the arm's, in "
    "brackets the baseline's.",
    "The interval is Student's t, which is right at one look. Where seeds were added after an earlier comparison, it "
    "is that of an e-process, wider and right at every look; p then keeps the strongest look so far. Where the looks "
    "were declared beforehand it is Student's t at a smaller p, right at each of them.",
    "better, worse: p below 0.05. indistinguishable: the interval lies inside the margin stated beforehand "
    "(sweep.margin, or --margin); without a margin only arms without any difference are. inconclusive: neither; the "
    "seeds named would settle it in four of five studies that go on like this one, added after this look and not "
    "corrected by Holm. not comparable: the reason says why.",
    "r is the correlation of the two arms over seeds, and saved how many seeds more an arm would need without sharing "
    "them; below 0, pairing lost.",
)
"""How to read it, for the page and the Markdown."""


@dataclass
class Drawing:
    """A figure under the name of its file, without ending."""

    name: str
    title: str
    caption: str
    svg: bytes
    """A document of its own, on no background."""
    png: bytes


@dataclass
class Section:
    """The figures of one axis; of all runs together where nothing but the seed varies."""

    key: str | None
    drawings: list[Drawing]


class Column(NamedTuple):
    """A column of a table."""

    name: str
    number: bool = False
    """Numbers stand to the right."""


@dataclass
class Table:
    """A table as text."""

    columns: list[Column]
    rows: list[list[str]]


# --- numbers ---------------------------------------------------------------------------------------------------------


def spell(value: float, resolution: float = 0.0, *, sign: bool = False) -> str:
    """Format a number to two significant digits of its uncertainty `resolution` (of itself if 0).

    Below about 1e-5 in scientific form.
    """
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = 1 - _exponent(resolution if resolution > 0 else value)
    if decimals > 6:
        digits = min(max(0, _exponent(value) + decimals), 3)
        text = re.sub(r"e([+-])0*(\d)", r"e\1\2", f"{value:{'+' if sign else ''}.{digits}e}").replace("e+", "e")
    else:
        text = f"{value:{'+' if sign else ''},.{max(0, decimals)}f}"
        if not text.strip("+-0.,"):  # rounded to nothing: no sign either
            text = text.lstrip("+-")
    return text.replace("-", "−") if "e" not in text else re.sub(r"^-", "−", text)


def _exponent(value: float) -> int:
    """The power of ten of a number's first digit, once it is rounded to two."""
    return int(f"{value:.1e}".partition("e")[2])


def probability(value: float) -> str:
    """A p value as `=0.039` or `<0.001`."""
    if value < 0.001:
        return "<0.001"
    return f"={value:.2g}" if value < 0.995 else "=1"


def subject(key: str, arm: str) -> str:
    """`key=arm`."""
    return f"{printable(key)}={printable(arm)}"


def amounts(effect: Effect | Interaction, *, sign: bool = True) -> tuple[str, str]:
    """The difference (or ratio) and its 95 % interval as text, to the digits they are known to; empty where unknown.

    In nats, MiB or times the baseline's speed. Without `sign` as sizes: of a fall, how far it fell.
    """
    ratio = getattr(effect, "speed_ratio", None)
    mean = effect.mean_difference if ratio is None else ratio
    if mean is None:
        return "", ""
    values = [value / BY_KEY[effect.metric].scale for value in (mean, *(effect.ci95 or []))]
    resolution = (values[2] - values[1]) / 2 if effect.ci95 else 0.0
    resolution = resolution or abs(values[0]) / 10
    if ratio is not None:
        resolution = max(0.01, min(resolution, 0.5))  # a ratio to two or three decimals
    if mean < 0 and not sign:
        values = [-values[0], *(-bound for bound in reversed(values[1:]))]
    text, *bounds = (spell(value, resolution, sign=sign and ratio is None) for value in values)
    return text, " to ".join(bounds)


def deviation(std: float | None, key: str) -> str:
    """A seed-to-seed std in the metric's unit, in per cent of the speed; empty if unknown."""
    if std is None:
        return ""
    metric = BY_KEY[key]
    return f"{spell(std * 100)} %" if metric.ratio else spell(std / metric.scale)


def deviations(effect: Effect) -> str:
    """The arm's seed-to-seed std and in brackets the baseline's: pooled, one would hide the other."""
    arm, baseline = (deviation(std, effect.metric) for std in (effect.arm_std, effect.baseline_std))
    return f"{arm} ({baseline})" if arm and baseline else arm or baseline


def saved(effect: Effect) -> str:
    """Seeds that pairing saved."""
    if effect.seeds_saved is None:
        return "" if effect.ci95 is None else f">{LARGEST - effect.n_seeds:,}"
    return str(effect.seeds_saved).replace("-", "−")


# --- sentences -------------------------------------------------------------------------------------------------------


@dataclass
class Sentence:
    """An arm's verdict in plain words."""

    verdict: str
    """As in `Effect.verdict`; empty where one seed allows none."""
    text: str


def sentences(comparison: Comparison) -> list[Sentence]:
    """A sentence an arm: the loss first, then what it costs. One for all runs where there are no arms."""
    by_arm: dict[tuple[str, str], dict[str, Effect]] = {}
    if comparison.searched:
        return _least(comparison)
    for effect in comparison.axes:
        by_arm.setdefault((effect.key, effect.arm), {})[effect.metric] = effect
    if not by_arm:
        return list(_seeds_only(comparison))
    return [
        Sentence(effects[comparison.metric].verdict or "", _sentence(effects, comparison.metric))
        for effects in by_arm.values()
    ]


def _seeds_only(comparison: Comparison) -> Iterable[Sentence]:
    done = [number_of(row, comparison.metric) for row in comparison.runs if row["state"] == "done"]
    values = [value for value in done if value is not None]
    if values:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        text = f"{BY_KEY[comparison.metric].name}: {spell(statistics.fmean(values), std or 0.005)} nats"
        known = f"on average over {_plain_count(len(values), 'run')}, seed-to-seed std {spell(std)}"
        yield Sentence("", f"{text} {known}." if len(values) > 1 else f"{text} in one run.")


def _sentence(effects: dict[str, Effect], metric: str) -> str:
    loss = effects[metric]
    name, base, std = subject(loss.key, loss.arm), printable(loss.baseline), deviation(loss.seed_std, loss.metric)
    difference, interval = amounts(loss)
    size, size_interval = amounts(loss, sign=False)
    reason = printable(loss.reason).replace("the seed-to-seed std", f"the seed-to-seed std {std}".strip(), 1)
    tested = f"{_count(loss.n_seeds, 'seed')}, p{probability(1.0 if loss.p_holm is None else loss.p_holm)})"
    costs = "".join(_costs(effects, loss))
    if loss.verdict in ("better", "worse"):
        text = f"{name} is {loss.verdict} than {base} by {size} nats (95 % interval {size_interval}, {tested}"
        text += f", {reason}{costs}" if reason else costs
        text += "" if "seed-to-seed" in reason else f"; the seed-to-seed std is {deviations(loss) or std}"
    elif loss.verdict in ("indistinguishable", "inconclusive"):
        open_ = loss.verdict == "inconclusive"
        text = f"{name} against {base} is open" if open_ else f"{name} cannot be told apart from {base}"
        text += f": a difference of {difference} nats (95 % interval {interval}, {tested}{costs}; {reason}"
    elif loss.verdict == "not_comparable":
        text = f"{name} and {base} cannot be compared: {reason}{costs}"
    else:
        where = "above" if (loss.mean_difference or 0) > 0 else "below"
        text = f"{name} ended {size} nats {where} {base} ({reason}){costs}"
    if loss.dropped_pairs:
        text += f"; {_plain_count(loss.dropped_pairs, 'pair')} dropped, for want of a finished run"
    return f"{text}."


def _costs(effects: dict[str, Effect], loss: Effect) -> Iterable[str]:
    """Speed, memory and parameters of an arm, as clauses."""
    speed, memory = effects[SPEED.key], effects[MEMORY.key]
    if speed.speed_ratio is not None and speed.verdict != "not_comparable":
        ratio, interval = amounts(speed)
        if abs(speed.speed_ratio - 1) >= 0.01:
            ratio = spell(speed.speed_ratio, 0.5)
        yield f", at {ratio} {'times' if float(ratio) > 1 else 'of'} the speed"
        if speed.verdict not in ("better", "worse", None):
            yield f" ({interval}: {speed.verdict})"
    elif speed.reason and speed.reason != loss.reason:
        yield f"; speed not compared ({speed.reason})"
    if memory.verdict in ("better", "worse") and memory.mean_difference and memory.baseline_mean:
        share = abs(memory.mean_difference) / memory.baseline_mean
        if share >= 0.005:
            more = "more" if memory.mean_difference > 0 else "less"
            yield f", with {amounts(memory, sign=False)[0]} MiB ({share:.1%}) {more} memory"
    if loss.parameters:
        extra = loss.parameters["arm"] - loss.parameters["baseline"]
        if extra:
            yield f", with {abs(extra):,} {'more' if extra > 0 else 'fewer'} parameters"


def interaction_sentence(item: Interaction, comparison: Comparison) -> str:
    """What one axis does to the effect of another, in plain words."""
    (a, b), (arm_a, arm_b) = item.keys, item.arms
    interval, base = amounts(item)[1], printable(comparison.swept[b][0])
    how = f"{amounts(item, sign=False)[0]} nats {'higher' if item.mean_difference > 0 else 'lower'}"
    sure = f"95 % interval {interval}, " if interval else ""
    p_value = f", p{probability(item.p_value)}, uncorrected" if item.p_value is not None else ""
    return (
        f"under {subject(b, arm_b)} the effect of {subject(a, arm_a)} on the loss is {how} than under {base} "
        f"({sure}{_count(item.n_seeds, 'seed')}{p_value})."
    )


def _least(comparison: Comparison) -> list[Sentence]:
    """The best value of a search."""
    (key,), metric = comparison.swept, comparison.metric
    losses = [(number_of(row, metric), row["overrides"]) for row in comparison.runs if row["state"] == "done"]
    tried = [(loss, overrides) for loss, overrides in losses if loss is not None]
    if not tried:
        return []
    loss, overrides = min(tried)
    arm = next((text for text in overrides if text.lstrip("+").startswith(f"{key}=")), key)
    text = f"of {len(tried)} values tried, {printable(arm)} ended with the least {BY_KEY[metric].name}"
    return [Sentence("", f"{text}, {spell(loss, 0.001)}; each ran once, so that no two can be told apart.")]


def distance_sentence(item: Distance) -> str:
    """How far a precision strays from fp64, in plain words."""
    std = "" if item.seed_std is None else f"; between seeds fp64's own losses have a std of {spell(item.seed_std)}"
    return (
        f"{subject('precision', item.arm)} strays from fp64's training loss at the same seed and step by "
        f"{spell(item.mean)} nats on average and {spell(item.largest)} at most ({_count(item.n_seeds, 'seed')}{std})."
    )


def failures(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and fate of every run that did not finish."""
    told = []
    for row in comparison.failed:
        fate = printable(row["state"])
        if row["state"] != "not run":
            fate += f" {'at' if row['state'] == 'running' else 'after'} step {row['step'] or 0}"
        told.append((printable(row["name"]), f"{fate}: {printable(row['error'])}" if row["error"] else fate))
    return told


def _count(number: int, thing: str) -> str:
    return f"n={number} {thing}{'' if number == 1 else 's'}"


def _plain_count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


# --- table -----------------------------------------------------------------------------------------------------------


def effects_table(comparison: Comparison) -> Table:
    """A row an axis, arm and metric; the verdict and its reason last."""
    numeric = ("n", "difference", "p", "seed std", *PAIRING)
    names = ("axis", "arms", "metric", "n", "difference", "95 % interval", "p", "seed std", *PAIRING)
    rows = []
    # in a search a value tried once differs from another by chance
    for effect in comparison.axes if not comparison.searched else ():
        metric = BY_KEY[effect.metric]
        rows.append(
            [
                printable(effect.key),
                f"{printable(effect.arm)} against {printable(effect.baseline)}",
                f"{metric.compared}, {'ratio' if metric.ratio else metric.unit}",
                str(effect.n_seeds) + (f" ({effect.n_pairs})" if effect.n_pairs != effect.n_seeds else ""),
                *amounts(effect),
                "" if effect.p_holm is None else probability(effect.p_holm).removeprefix("="),
                deviations(effect),
                "" if effect.pair_correlation is None else f"{effect.pair_correlation:.3g}".replace("-", "−"),
                saved(effect),
                effect.verdict or "",
                printable(effect.reason),
            ]
        )
    return Table([Column(name, name in numeric) for name in (*names, "verdict", "reason")], rows)


def without(shown: Table, names: Sequence[str]) -> Table:
    """The table without some columns."""
    kept = [at for at, column in enumerate(shown.columns) if column.name not in names]
    return Table([shown.columns[at] for at in kept], [[row[at] for at in kept] for row in shown.rows])


def reasons_of(effects: Table) -> list[str]:
    """The different reasons; verdicts refer to them by number, since most rows share one and room is scarce."""
    return list(dict.fromkeys(row[-1] for row in effects.rows if row[-1]))


def _interactions_table(comparison: Comparison) -> Table:
    names = ("effect of", "changed by", "n", "difference, nats", "95 % interval", "p", "size")
    rows = []
    for item in comparison.interactions:
        p_value = "" if item.p_value is None else probability(item.p_value).removeprefix("=")
        subjects = [subject(key, arm) for key, arm in zip(item.keys, item.arms, strict=True)]
        rows.append([*subjects, str(item.n_seeds), *amounts(item), p_value, "large" if item.large else ""])
    return Table([Column(name, name in ("n", "difference, nats", "p")) for name in names], rows)


def name_of(verdict: str) -> str:
    """A verdict as people read it."""
    return verdict.replace("_", " ") or "no verdict"


# --- terminal --------------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console, out: Path | None = None, *, failed: bool = True) -> None:
    """Table, sentences, failed runs unless told elsewhere, and notes; `out`: where the report was written."""
    from rich.text import Text

    if comparison.axes and not comparison.searched:
        _show_table(effects_table(comparison), console, f"compared in {BY_KEY[comparison.metric].name}")
    for sentence in sentences(comparison):
        mark = Text(f"{SIGNS[sentence.verdict]} ", style=COLOURS.get(sentence.verdict, "dim"))
        console.print(mark + Text(sentence.text), soft_wrap=True)
    large = [item for item in comparison.interactions if item.large]
    said = [(f"interaction: {interaction_sentence(item, comparison)}", "") for item in large]
    said += [(distance_sentence(item), "") for item in comparison.distances]
    said += [(f"{name}: {fate}", "red") for name, fate in failures(comparison) if failed]
    said += [(f"note: {printable(note)}", "dim") for note in comparison.notes]
    said += [(f"report: {printable(terminal.short((out / 'report.html').absolute()))}", "")] if out is not None else []
    for text, style in said:
        console.print(Text(text, style=style), soft_wrap=True)


def _show_table(shown: Table, console: Console, heading: str) -> None:
    """The table, then the reasons that its verdicts refer to."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=heading, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column("axis and arms", overflow="fold")
    shown = without(shown, PAIRING)
    for column in shown.columns[2:-1]:
        table.add_column(column.name, justify="right" if column.number else "left", no_wrap=True)
    reasons = reasons_of(shown)
    above: list[list[str]] = []
    for row in shown.rows:
        axis, arms, *cells, verdict, reason = row
        # three metrics an arm: its axis beside the first, its names beside the second
        place = sum(other[:2] == row[:2] for other in above)
        above.append(row)
        mark = Text(name_of(verdict), style=COLOURS.get(verdict, "dim"))
        if reason:
            mark += Text(f" [{reasons.index(reason) + 1}]", style="dim")
        table.add_row(Text((axis, f"  {arms}", "")[min(place, 2)]), *map(Text, cells), mark)
    console.print(table)
    for number, reason in enumerate(reasons):
        console.print(Text(f"[{number + 1}] {reason}", style="dim"), soft_wrap=True)


# --- exact -----------------------------------------------------------------------------------------------------------


def finite(value: Any) -> Any:
    """JSON's own types with null for what no JSON number can be."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """The effects as column names and rows of exact values: `ci95` and `parameters` in two columns each, `differences`
    as JSON.
    """
    single = [item.name for item in fields(Effect) if item.name not in ("ci95", "parameters")]
    rows = []
    for effect in comparison.axes:
        row = finite(asdict(effect))
        row["differences"] = json.dumps(row["differences"])
        values = [row[name] for name in single]
        values += [*(row["ci95"] or (None, None)), *(row["parameters"].get(side) for side in ("baseline", "arm"))]
        rows.append([printable(value) if isinstance(value, str) else value for value in values])
    return [*single, "ci95_low", "ci95_high", "baseline_parameters", "arm_parameters"], rows


def table(comparison: Comparison) -> str:
    """`comparison.csv`: a row an axis, arm and metric; empty cells where there is nothing."""
    head, rows = records(comparison)
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
    return buffer.getvalue()


# --- what the runs were ----------------------------------------------------------------------------------------------


def link(folder: str, out: Path) -> str:
    """A run's folder as a relative address from a page in `out`."""
    relative = Path(os.path.relpath(folder, out.resolve())).as_posix()
    return quote(os.fsencode(relative), safe="/=,+@~") + "/"


def common(rows: Sequence[Row], get: Callable[[Row], Any]) -> str:
    """A fact of the runs as text; where they differ, each with how many have it."""
    found: Counter[str] = Counter()
    for row in rows:
        try:
            value = get(row)
        except (KeyError, TypeError, ValueError):
            continue
        if value not in (None, "", {}):
            found[printable(value)] += 1
    if len(found) <= 1:
        return next(iter(found), "")
    return "; ".join(f"{value} ({_plain_count(count, 'run')})" for value, count in found.items())


def commands(rows: Sequence[Row]) -> list[str]:
    """The command lines that made the runs: each sweep's as typed, a single run's from its overrides."""
    found: dict[str, None] = {}
    for row in rows:
        sweep = record.sweep_of(Path(row["folder"]))
        argv = row.get("overrides", [])
        if sweep is not None:
            known = record.Sweep.read(sweep)
            argv = known.argv if known else []
        found[shlex.join(["gpt2exp", *(printable(word) for word in argv)])] = None
    return list(found)


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was trained on what, where and with what."""
    known: dict[str, Callable[[Row], Any]] = {
        "model": lambda row: (
            "{n_layer} layers, {n_head} heads, {n_embd} wide".format_map(row["config"]["model"])
            + (", tied" if row["config"]["model"]["tie_weights"] else ", untied")
        ),
        "parameters": lambda row: f"{row['parameters']['total']:,}",
        "run": lambda row: (
            "{steps:,} steps of {batch_size} × {seq_len} tokens".format_map(row["config"]["train"])
            + (f" × {row['config']['train']['grad_accum_steps']}" * (row["config"]["train"]["grad_accum_steps"] > 1))
        ),
        "optimizer": lambda row: "{name}, lr {lr:g}, {schedule}".format_map(row["config"]["optimizer"]),
        "text": lambda row: "{name}: {train_tokens:,} tokens to train on, {val_tokens:,} to validate".format_map(
            row["data"]
        ),
        "precision": lambda row: row["precision"]["effective"] + (" emulated" if row["precision"]["emulated"] else ""),
        "hardware": lambda row: f"{row['device']}, {row['threads']} threads",
        "platform": lambda row: row["platform"],
        "machine": lambda row: row["machine"],
        "commit": lambda row: row["git"]["commit"] + (", with changes not committed" if row["git"]["dirty"] else ""),
        "versions": lambda row: ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
        "environment": lambda row: " ".join(f"{name}={value}" for name, value in row["environment"].items()),
        "text's sha256": lambda row: row["data"]["sha256"],
    }
    told = [(label, text) for label, get in known.items() if (text := common(rows, get))]
    days = sorted(str(row["started"]) for row in rows if row.get("started"))
    if days:
        told.append(("started", printable(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")))
    return told


def runs_table(comparison: Comparison) -> Table:
    """A row a run, its name first."""
    keys = list(comparison.swept)
    rows = []
    for row in comparison.runs:
        seed, arms = Grid([row], comparison.swept).planned[0] if "config" in row else ("", [""] * len(keys))
        cells = [printable(row["name"]), printable(row["state"]), *map(printable, arms), str(seed)]
        cells += [shown(row, metric.key) for metric in COLUMNS]
        rows.append([*cells, f"{row['wall_seconds']['total']:,.1f}" if "wall_seconds" in row else "–"])
    words = [Column(name) for name in ("run", "state", *map(printable, keys))]
    return Table(
        [*words, *(Column(name, number=True) for name in ("seed", *(metric.column for metric in COLUMNS), "seconds"))],
        rows,
    )


def title(comparison: Comparison) -> str:
    """What was asked."""
    return " × ".join(map(printable, comparison.swept)) or "One setting, several seeds"


def summary(comparison: Comparison) -> str:
    """How many runs there are and what is compared."""
    runs, seeds = _plain_count(len(comparison.runs), "run"), _plain_count(len(comparison.seeds), "seed")
    text = f"{runs}, {len(comparison.runs) - len(comparison.failed)} finished, {seeds}"
    if not comparison.axes:
        return text
    margin = "no margin stated" if comparison.margin is None else f"margin ±{comparison.margin:g} nats"
    return f"{text}; compared in {BY_KEY[comparison.metric].name}, {margin}"


# --- Markdown --------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """User text that Markdown leaves as it is; an underscore inside a word needs nothing."""
    text = re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def verdict_text(verdict: str) -> str:
    """A verdict with its sign; the page colours it by the sign."""
    return f"**{SIGNS[verdict]} {name_of(verdict)}**"


def _md_table(shown: Table) -> list[str]:
    """The table's lines; the cells are Markdown already."""
    head = [escaped(column.name) for column in shown.columns]
    rule = ["--:" if column.number else "---" for column in shown.columns]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *shown.rows)]


def _fenced(texts: Sequence[str]) -> list[str]:
    longest = max((len(ticks) for text in texts for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *texts, fence]


def verdicts(comparison: Comparison) -> list[str]:
    """What was found, a line of Markdown each."""
    text = [f"- {verdict_text(item.verdict)} {escaped(item.text)}" for item in sentences(comparison)]
    large = [item for item in comparison.interactions if item.large]
    text += [f"- **× interaction** {escaped(interaction_sentence(item, comparison))}" for item in large]
    text += [f"- **↔ from fp64** {escaped(distance_sentence(item))}" for item in comparison.distances]
    return text + [f"- note: {escaped(printable(note))}" for note in comparison.notes]


def effects(comparison: Comparison, metrics: Sequence[str] = ()) -> list[str]:
    """The table of effects in Markdown, of these metrics or all, and the reasons of its verdicts."""
    shown = effects_table(comparison)
    shown.rows = [row for row in shown.rows if row[2] in metrics or not metrics]
    if not shown.rows:
        return []
    reasons = reasons_of(shown)
    rows = [
        [*map(escaped, cells), verdict_text(verdict) + (f" \\[{reasons.index(reason) + 1}\\]" if reason else "")]
        for *cells, verdict, reason in shown.rows
    ]
    notes = [f"- \\[{number + 1}\\] {escaped(reason)}" for number, reason in enumerate(reasons)]
    return [*_md_table(Table(shown.columns[:-1], rows)), "", *notes]


def reproduce(comparison: Comparison) -> list[str]:
    """The commands and the facts that a repetition needs, in Markdown."""
    known = [f"- {label}: {escaped(value)}" for label, value in facts(comparison.runs)]
    return [*_fenced(commands(comparison.runs)), "", *known]


def markdown(comparison: Comparison, out: Path, sections: Sequence[Section]) -> str:
    """`report.md`, whose links and figures are relative to `out`."""
    text = [f"# {escaped(title(comparison))}", "", f"{summary(comparison)}.", "", *verdicts(comparison)]
    if compared := effects(comparison):
        text += ["", "## Comparison", "", *compared]
    if comparison.failed:
        text += ["", "## Not finished", ""]
        text += [f"- **{escaped(name)}** {escaped(fate)}" for name, fate in failures(comparison)]
    for section in sections:
        text += ["", f"## {escaped(printable(section.key or 'Figures'))}"]
        for item in section.drawings:  # the backslash breaks the line
            text += ["", f"![{item.title}](figures/{item.name}.png)\\", f"*{item.title}.* {escaped(item.caption)}"]
    if comparison.interactions:
        interactions = _interactions_table(comparison)
        interactions.rows = [[*map(escaped, cells)] for cells in interactions.rows]
        text += ["", "## Interactions", "", INTERACTIONS, "", *_md_table(interactions)]
    runs = runs_table(comparison)
    runs.rows = [
        [
            f"[{escaped(name)}]({link(row['folder'], out)})",
            state if state == "done" else f"**{state}**",
            *map(escaped, cells),
        ]
        for row, (name, state, *cells) in zip(comparison.runs, runs.rows, strict=True)
    ]
    text += ["", "## Runs", "", *_md_table(runs)]
    text += ["", "## Reproduce", "", *reproduce(comparison)]
    text += ["", "## How to read this", "", *(f"{paragraph}\n" for paragraph in METHOD)]
    return "\n".join(text).rstrip() + "\n"


# --- page ------------------------------------------------------------------------------------------------------------


def page(text: str, comparison: Comparison, out: Path, sections: Sequence[Section]) -> str:
    """`report.html`: the Markdown `text` as one page that needs nothing else, the figures inside it."""
    import jinja2
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    figures = {f"figures/{item.name}.png": item.svg for section in sections for item in section.drawings}
    classes = {sign: verdict for verdict, sign in SIGNS.items()}
    reader = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = reader.parse(text)
    for block in tokens:
        if block.type == "table_open":
            block.attrSet("tabindex", "0")  # wide tables scroll, with the keyboard too
        for token, following in itertools.pairwise(block.children or []):
            if token.type == "image":
                svg = base64.b64encode(figures[str(token.attrs["src"])]).decode()
                token.attrSet("src", f"data:image/svg+xml;base64,{svg}")
            elif token.type == "strong_open" and following.content[:1] in classes:
                token.attrSet("class", f"verdict {classes[following.content[:1]]}")
    source = resources.files("gpt2exp.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    return template.render(
        title=title(comparison),
        folder=printable(terminal.short(out.absolute())),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        body=Markup(reader.renderer.render(tokens, reader.options, {})),  # html=False: user text is escaped in it
    )


# --- wandb -----------------------------------------------------------------------------------------------------------


def mirror(comparison: Comparison, sweep: Path, sections: Sequence[Section]) -> Path | None:
    """The comparison as a wandb run of its own beside the sweep's runs; the folder to sync if offline.

    Where the runs' settings for wandb differ, the first that is not disabled counts.
    """
    from gpt2exp.run.tracking import Mirror, resolve_mode

    config = next((config for config in map(_wandb_of, comparison.runs) if resolve_mode(config) != "disabled"), None)
    if config is None:
        return None
    about = {
        "name": f"comparison of {title(comparison)}"[:128],
        "group": config.group or sweep.resolve().name,
        "tags": config.tags,
        "config": {"swept": comparison.swept, "seeds": comparison.seeds, "metric": comparison.metric},
    }
    wandb = Mirror(config, sweep, about, job_type="comparison", own=True)
    wandb.show(lambda: _for_wandb(comparison, sweep, sections))
    found = {
        "runs": len(comparison.runs),
        "failed": len(comparison.failed),
        "verdicts": [item.text for item in sentences(comparison)],
    }
    return wandb.finish(found, failed=False)


def _wandb_of(row: Row) -> WandbConfig:
    section = row.get("config", {}).get("wandb", {"mode": "disabled"})
    return parse({"wandb": section}).wandb


def _for_wandb(comparison: Comparison, sweep: Path, sections: Sequence[Section]) -> dict[str, Any]:
    import wandb

    runs, (head, effects) = runs_table(comparison), records(comparison)
    verdicts = [[name_of(item.verdict), item.text] for item in sentences(comparison)]
    shown: dict[str, Any] = {
        "runs": wandb.Table(columns=[column.name for column in runs.columns], data=runs.rows),
        "verdicts": wandb.Table(columns=["verdict", "sentence"], data=verdicts),
    }
    if effects:
        shown["effects"] = wandb.Table(columns=list[str | int](head), data=effects)
    for item in (item for section in sections for item in section.drawings):
        path = str(sweep / "figures" / f"{item.name}.png")
        shown[f"figures/{item.name}"] = wandb.Image(path, caption=f"{item.title}. {item.caption}")
    return shown
