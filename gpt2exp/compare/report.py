"""A comparison in words: on the terminal, as files, as a page, in wandb.

One function makes the verdict sentences (`sentences`) and one the rows of the table (`lines`); every form of the
report shows those. What needs matplotlib (gpt2exp.compare.figures) or jinja2 imports it when called. No torch.
"""

from __future__ import annotations

import csv
import io
import json
import logging
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
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from gpt2exp.compare.comparison import (
    MEMORY,
    SPEED,
    Comparison,
    Distance,
    Effect,
    Grid,
    Interaction,
    Optimum,
    Row,
)
from gpt2exp.config import WandbConfig, parse
from gpt2exp.files import replacing, write_json
from gpt2exp.run import record, terminal
from gpt2exp.run.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gpt2exp.compare.figures import Section


LOSS = {"val_loss": "validation loss", "loss_mean_last10": "loss, the mean of the last ten steps"}

METRICS = {**dict.fromkeys(LOSS, "loss, nats"), SPEED.key: "speed, ratio", MEMORY.key: "memory, MiB"}

COLOURS = {"better": "green", "worse": "red", "indistinguishable": "cyan", "inconclusive": "yellow"}

SIGNS = {"better": "▲", "worse": "▼", "indistinguishable": "≈", "inconclusive": "?", "not_comparable": "–", "": "·"}

METHOD = (
    "Runs that differ in one axis and share the rest, seed included, are a pair. Differences at one seed are averaged "
    "over the other axes first; n counts seeds. Intervals are 95 % paired t intervals, p values are corrected by Holm "
    "over the arms of all axes in one metric. The seed-to-seed std is that of the metric itself among runs that differ "
    "in the seed alone: the size of a difference that chance makes between two single runs.",
    "better, worse: p below 0.05. indistinguishable: the interval lies inside ± the seed-to-seed std, or inside the "
    "margin that was asked for. inconclusive: neither. not comparable: the reason says why.",
)
"""How to read it, for the page and the Markdown."""

log = logging.getLogger("gpt2exp")


# --- numbers ---------------------------------------------------------------------------------------------------------


def spell(value: float, resolution: float = 0.0, *, sign: bool = False) -> str:
    """A number to two digits of `resolution`, what it is known to within; of itself if that is 0.

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


@dataclass
class Words:
    """The figures of an effect as text, in the unit people read, to the precision they are known."""

    mean: str
    low: str
    high: str
    size: str
    """The mean's size without its sign; `near` and `far` are the interval on its side."""
    near: str
    far: str
    std: str
    unit: str

    @property
    def interval(self) -> str:
        """`low to high`; empty without one."""
        return f"{self.low} to {self.high}" if self.low else ""


def words(effect: Effect | Interaction) -> Words:
    """The figures of an effect or interaction as text."""
    ratio = getattr(effect, "speed_ratio", None)
    unit, scale = ("MiB", 2.0**20) if effect.metric == MEMORY.key else ("", 1.0) if ratio is not None else ("nats", 1.0)
    mean = ratio if ratio is not None else effect.mean_difference
    if mean is None:
        return Words("", "", "", "", "", "", "", unit)
    mean /= scale
    bounds = [bound / scale for bound in effect.ci95] if effect.ci95 is not None else []
    half = (bounds[1] - bounds[0]) / 2 if bounds else 0.0
    known = half or abs(mean) / 10
    if ratio is not None:
        known = max(0.01, min(known, 0.5))  # a ratio to two or three decimals
    std = getattr(effect, "seed_std", None)
    deviation = "" if std is None else f"{spell(std * 100)} %" if ratio is not None else spell(std / scale)
    signed = [spell(value, known, sign=ratio is None) for value in (mean, *bounds)]
    sizes = [spell(value if mean >= 0 else -value, known) for value in (mean, *bounds)]
    near, far = sizes[1:][:: 1 if mean >= 0 else -1] if bounds else ("", "")
    low, high = signed[1:] or ("", "")
    return Words(signed[0], low, high, sizes[0], near, far, deviation, unit)


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
    if comparison.optima:
        return [Sentence("", optimum_sentence(item, comparison)) for item in comparison.optima]
    for effect in comparison.axes:
        by_arm.setdefault((effect.key, effect.arm), {})[effect.metric] = effect
    if not by_arm:
        return list(_seeds_only(comparison))
    return [
        Sentence(effects[comparison.metric].verdict or "", _sentence(effects, comparison.metric))
        for effects in by_arm.values()
    ]


def _seeds_only(comparison: Comparison) -> Iterable[Sentence]:
    values = [row[comparison.metric] for row in comparison.runs if row["state"] == "done"]
    if values:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        text = f"{LOSS[comparison.metric]}: {spell(statistics.fmean(values), std or 0.005)} nats"
        known = f"on average over {_plain_count(len(values), 'run')}, seed-to-seed std {spell(std)}"
        yield Sentence("", f"{text} {known}." if len(values) > 1 else f"{text} in one run.")


def _sentence(effects: dict[str, Effect], metric: str) -> str:
    loss = effects[metric]
    name, base, said = subject(loss.key, loss.arm), printable(loss.baseline), words(loss)
    reason = printable(loss.reason).replace("the seed-to-seed std", f"the seed-to-seed std {said.std}".strip(), 1)
    tested = f"{_count(loss.n_seeds, 'seed')}, p{probability(1.0 if loss.p_holm is None else loss.p_holm)})"
    costs = "".join(_costs(effects, loss))
    if loss.verdict in ("better", "worse"):
        text = f"{name} is {loss.verdict} than {base} by {said.size} nats "
        text += f"(95 % interval {said.near} to {said.far}, {tested}"
        text += f", {reason}{costs}" if reason else f"{costs}; the seed-to-seed std is {said.std}"
    elif loss.verdict in ("indistinguishable", "inconclusive"):
        open_ = loss.verdict == "inconclusive"
        text = f"{name} against {base} is open" if open_ else f"{name} cannot be told apart from {base}"
        text += f": a difference of {said.mean} nats (95 % interval {said.interval}, {tested}{costs}; {reason}"
    elif loss.verdict == "not_comparable":
        text = f"{name} and {base} cannot be compared: {reason}{costs}"
    else:
        where = "above" if (loss.mean_difference or 0) > 0 else "below"
        text = f"{name} ended {said.size} nats {where} {base} ({reason}){costs}"
    if loss.dropped_pairs:
        text += f"; {_plain_count(loss.dropped_pairs, 'pair')} dropped, for want of a finished run"
    return f"{text}."


def _costs(effects: dict[str, Effect], loss: Effect) -> Iterable[str]:
    """Speed, memory and parameters of an arm, as clauses."""
    speed, memory = effects[SPEED.key], effects[MEMORY.key]
    if speed.speed_ratio is not None and speed.verdict != "not_comparable":
        said = words(speed)
        size = said.mean if abs(speed.speed_ratio - 1) < 0.01 else spell(speed.speed_ratio, 0.5)
        ratio = f"{size} {'times' if float(size) > 1 else 'of'} the speed"
        sure = speed.verdict in ("better", "worse", None)
        yield f", at {ratio}" if sure else f", at {ratio} ({said.interval}: {speed.verdict})"
    elif speed.reason and speed.reason != loss.reason:
        yield f"; speed not compared ({speed.reason})"
    if memory.verdict in ("better", "worse") and memory.mean_difference and memory.baseline_mean:
        share = abs(memory.mean_difference) / memory.baseline_mean
        if share >= 0.005:
            more = "more" if memory.mean_difference > 0 else "less"
            yield f", with {words(memory).size} MiB ({share:.1%}) {more} memory"
    if loss.parameters:
        extra = loss.parameters["arm"] - loss.parameters["baseline"]
        if extra:
            yield f", with {abs(extra):,} {'more' if extra > 0 else 'fewer'} parameters"


def interaction_sentence(item: Interaction, comparison: Comparison) -> str:
    """What one axis does to the effect of another, in plain words."""
    (a, b), (arm_a, arm_b) = item.keys, item.arms
    said = words(item)
    base = printable(comparison.swept[b][0])
    how = f"{said.size} nats {'higher' if item.mean_difference > 0 else 'lower'}"
    sure = f"95 % interval {said.interval}, " if said.interval else ""
    p_value = f", p{probability(item.p_value)}, uncorrected" if item.p_value is not None else ""
    return (
        f"under {subject(b, arm_b)} the effect of {subject(a, arm_a)} on the loss is {how} than under {base} "
        f"({sure}{_count(item.n_seeds, 'seed')}{p_value})."
    )


def optimum_sentence(item: Optimum, comparison: Comparison) -> str:
    """What a search found, how sure that is, and the sweep that makes it surer."""
    best, loss = f"{float(item.best):.3g}", LOSS[comparison.metric]
    text = f"of {item.n} values tried, {subject(item.key, best)} ended with the least {loss}, {spell(item.loss, 0.001)}"
    if item.at is None or item.ci95 is None:
        text += "; the least is not between the values around it: search beyond them"
        return f"{text}."
    low, at, high = (f"{value:.3g}" for value in (item.ci95[0], item.at, item.ci95[1]))
    text += f"; a parabola in its logarithm through the {item.fitted} values nearest to it is least at {at} "
    text += f"(95 % interval {low} to {high})"
    if item.n_seeds > 1:
        return f"{text}, {_plain_count(item.n_seeds, 'seed')}."
    (row,) = [row for row in comparison.runs if row["state"] == "done" and row[comparison.metric] == item.loss][:1]
    kept = [word for word in row["overrides"] if word.partition("=")[0] not in (item.key, "seed")]
    arms = ",".join(dict.fromkeys((low, at, high)))
    surer = shlex.join(map(printable, ["gpt2exp", "-m", "seed=1,2,3,4,5", f"{item.key}={arms}", *kept]))
    return f"{text}, all by one seed; to be surer: {surer}"


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


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, and whether it holds numbers, which stand to the right."""

    name: str
    number: bool = False


COLUMNS = (
    Column("axis"),
    Column("arms"),
    Column("metric"),
    Column("n", number=True),
    Column("difference", number=True),
    Column("95 % interval"),
    Column("p", number=True),
    Column("seed std", number=True),
    Column("verdict"),
)


@dataclass
class Line:
    """A row of the comparison table, as text."""

    axis: str
    arms: str
    metric: str
    n: str
    """Seeds, and pairs if those are more."""
    difference: str
    interval: str
    p: str
    std: str
    verdict: str
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The columns before the verdict."""
        return (self.axis, self.arms, self.metric, self.n, self.difference, self.interval, self.p, self.std)


def lines(comparison: Comparison) -> list[Line]:
    """The comparison table, a row an axis, arm and metric."""
    rows = []
    for effect in comparison.axes if not comparison.optima else ():  # a value tried once differs from another by chance
        said = words(effect)
        rows.append(
            Line(
                printable(effect.key),
                f"{printable(effect.arm)} against {printable(effect.baseline)}",
                METRICS[effect.metric],
                str(effect.n_seeds) + (f" ({effect.n_pairs})" if effect.n_pairs != effect.n_seeds else ""),
                said.mean,
                said.interval,
                "" if effect.p_holm is None else probability(effect.p_holm).removeprefix("="),
                said.std,
                effect.verdict or "",
                effect.reason,
            )
        )
    return rows


def name_of(verdict: str) -> str:
    """A verdict as people read it."""
    return verdict.replace("_", " ") or "no verdict"


# --- terminal --------------------------------------------------------------------------------------------------------


def show(comparison: Comparison, console: Console, out: Path | None = None, *, failed: bool = True) -> None:
    """Table, sentences, failed runs unless told elsewhere, and notes; `out`: where the report was written."""
    from rich.text import Text

    if comparison.axes and not comparison.optima:
        overview, reasons = _rich_table(comparison)
        console.print(overview)
        for number, reason in enumerate(reasons):
            console.print(Text(f"[{number + 1}] {reason}", style="dim"), soft_wrap=True)
    for sentence in sentences(comparison):
        mark = Text(f"{SIGNS[sentence.verdict]} ", style=COLOURS.get(sentence.verdict, "dim"))
        console.print(mark + Text(sentence.text), soft_wrap=True)
    for item in comparison.interactions:
        if item.large:
            console.print(Text(f"interaction: {interaction_sentence(item, comparison)}"), soft_wrap=True)
    for distance in comparison.distances:
        console.print(Text(distance_sentence(distance)), soft_wrap=True)
    for name, fate in failures(comparison) if failed else ():
        console.print(Text(f"{name}: {fate}", style="red"), soft_wrap=True)
    for note in comparison.notes:
        console.print(Text(f"note: {note}", style="dim"), soft_wrap=True)
    if out is not None:
        console.print(Text(f"report: {printable(terminal.short((out / 'report.html').absolute()))}"), soft_wrap=True)


def _rich_table(comparison: Comparison) -> tuple[Table, list[str]]:
    """The table, and the reasons its verdicts refer to by number: most rows share one, and no terminal has the room."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"compared in {LOSS[comparison.metric]}", title_justify="left", box=None, pad_edge=False,
                  collapse_padding=True)  # fmt: skip
    table.add_column("axis and arms", overflow="fold")
    for column in COLUMNS[2:]:
        table.add_column(column.name, justify="right" if column.number else "left", no_wrap=True)
    reasons: list[str] = []
    rows = lines(comparison)
    for number, line in enumerate(rows):
        # three metrics an arm: its axis beside the first, its names beside the second
        place = sum(other.axis == line.axis and other.arms == line.arms for other in rows[:number])
        who = Text(line.axis) if place == 0 else Text(f"  {line.arms}" if place == 1 else "")
        verdict = Text(name_of(line.verdict), style=COLOURS.get(line.verdict, "dim"))
        if line.reason:
            if line.reason not in reasons:
                reasons.append(line.reason)
            verdict += Text(f" [{reasons.index(line.reason) + 1}]", style="dim")
        table.add_row(who, *map(Text, line.cells[2:]), verdict)
    return table, reasons


def _write(comparison: Comparison, out: Path, sections: Sequence[Section]) -> None:
    write_json(out / "comparison.json", finite(comparison.as_dict()))
    _write_text(out / "comparison.csv", table(comparison))
    if sections:
        (out / "figures").mkdir(exist_ok=True)
    for section in sections:
        for drawing in section.drawings:
            with replacing(out / "figures" / f"{drawing.name}.png") as part:
                part.write_bytes(drawing.png)
    _write_text(out / "report.md", markdown(comparison, out, sections))
    _write_text(out / "report.html", page(comparison, out, sections))


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8", newline="")


def finite(value: Any) -> Any:
    """JSON's own types with null for what no JSON number can be."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(comparison: Comparison) -> list[Row]:
    """The effects as flat rows, exact: `ci95` as two columns, `parameters` as two, `differences` as JSON."""
    rows = []
    for effect in comparison.axes:
        row = finite(asdict(effect))
        low, high = row.pop("ci95") or (None, None)
        parameters = row.pop("parameters")
        row["differences"] = json.dumps(row["differences"])
        extra = {"ci95_low": low, "ci95_high": high}
        rows.append(row | extra | {f"{side}_parameters": parameters.get(side) for side in ("baseline", "arm")})
    return rows


def table(comparison: Comparison) -> str:
    """`comparison.csv`: a row an axis, arm and metric; empty cells where there is nothing."""
    plain = [item.name for item in fields(Effect) if item.name not in ("ci95", "parameters")]
    columns = [*plain, "ci95_low", "ci95_high", "baseline_parameters", "arm_parameters"]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in records(comparison):
        writer.writerow({key: printable(value) if isinstance(value, str) else value for key, value in row.items()})
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


def setting(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """What was trained on what: the reader's bearings."""
    facts = {
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
    }
    return [(label, text) for label, get in facts.items() if (text := common(rows, get))]


def provenance(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Where and with what the runs were made."""
    facts = {
        "hardware": lambda row: f"{row['device']}, {row['threads']} threads",
        "platform": lambda row: row["platform"],
        "machine": lambda row: row["machine"],
        "commit": lambda row: row["git"]["commit"] + (", with changes not committed" if row["git"]["dirty"] else ""),
        "versions": lambda row: ", ".join(f"{name} {version}" for name, version in row["versions"].items()),
        "environment": lambda row: " ".join(f"{name}={value}" for name, value in row["environment"].items()),
        "text's sha256": lambda row: row["data"]["sha256"],
    }
    known = [(label, text) for label, get in facts.items() if (text := common(rows, get))]
    days = sorted(str(row["started"]) for row in rows if row.get("started"))
    if days:
        known.append(("started", printable(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")))
    return known


def runs_table(comparison: Comparison) -> tuple[list[Column], list[tuple[Row, list[str]]]]:
    """The columns, then each run with its cells; the first column, its name, is left to the caller to link."""
    keys = list(comparison.swept)
    forms: dict[str, Callable[[Row], str]] = {
        "loss": lambda row: f"{row['loss_mean_last10']:.4f}",
        "val loss": lambda row: f"{row['val_loss']:.4f}",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        "seconds": lambda row: f"{row['wall_seconds']['total']:,.1f}",
    }
    rows = []
    for row in comparison.runs:
        known = "config" in row
        seed, arms = Grid([row], comparison.swept).planned[0] if known else ("", [""] * len(keys))
        cells = [printable(row["state"]), *map(printable, arms), str(seed)]
        for form in forms.values():
            try:
                cells.append(form(row))
            except (KeyError, TypeError, ValueError):
                cells.append("")
        rows.append((row, cells))
    words = [Column(name) for name in ("run", "state", *map(printable, keys))]
    return [*words, *(Column(name, number=True) for name in ("seed", *forms))], rows


def title(comparison: Comparison) -> str:
    """What was asked."""
    return " × ".join(map(printable, comparison.swept)) or "One setting, several seeds"


def summary(comparison: Comparison) -> str:
    """How many runs there are and what is compared."""
    runs, seeds = _plain_count(len(comparison.runs), "run"), _plain_count(len(comparison.seeds), "seed")
    text = f"{runs}, {len(comparison.runs) - len(comparison.failed)} finished, {seeds}"
    return f"{text}; compared in {LOSS[comparison.metric]}" if comparison.axes else text


# --- Markdown --------------------------------------------------------------------------------------------------------


def _md(text: str) -> str:
    """User text that Markdown leaves as it is; an underscore inside a word needs nothing."""
    text = re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _md_table(head: Sequence[Column], rows: Iterable[Sequence[str]]) -> list[str]:
    rule = ["--:" if column.number else "---" for column in head]
    return ["| " + " | ".join(cells) + " |" for cells in ([_md(column.name) for column in head], rule, *rows)]


def _fenced(texts: Sequence[str]) -> list[str]:
    longest = max((len(ticks) for text in texts for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}sh", *texts, fence]


def markdown(comparison: Comparison, out: Path, sections: Sequence[Section]) -> str:
    """`report.md`."""
    text = [f"# {_md(title(comparison))}", "", f"{summary(comparison)}.", ""]
    text += [f"- {SIGNS[item.verdict]} {_md(item.text)}" for item in sentences(comparison)]
    text += [f"- interaction: {_md(interaction_sentence(x, comparison))}" for x in comparison.interactions if x.large]
    text += [f"- {_md(distance_sentence(item))}" for item in comparison.distances]
    text += [f"- note: {_md(note)}" for note in comparison.notes]
    if comparison.axes and not comparison.optima:
        rows = [[_md(cell) for cell in (*line.cells, name_of(line.verdict), line.reason)] for line in lines(comparison)]
        text += ["", "## Comparison", "", *_md_table([*COLUMNS, Column("reason")], rows)]
    if comparison.failed:
        text += ["", "## Not finished", ""]
        text += [f"- {_md(name)}: {_md(fate)}" for name, fate in failures(comparison)]
    for section in sections:
        text += ["", f"## {_md(printable(section.key or 'Figures'))}"]
        for item in section.drawings:
            text += ["", f"![{_md(item.title)}](figures/{item.name}.png)", "", f"*{item.title}.* {_md(item.caption)}"]
    if comparison.interactions:
        text += ["", "## Interactions", ""]
        text += [f"- {_md(interaction_sentence(item, comparison))}" for item in comparison.interactions]
    head, runs = runs_table(comparison)
    linked = [
        [f"[{_md(printable(row['name']))}]({link(row['folder'], out)})", *(_md(cell) for cell in cells)]
        for row, cells in runs
    ]
    text += ["", "## Runs", "", *_md_table(head, linked)]
    text += ["", "## Reproduce", "", *_fenced(commands(comparison.runs)), ""]
    facts = setting(comparison.runs) + provenance(comparison.runs)
    text += [f"- {label}: {_md(value)}" for label, value in facts]
    text += ["", "## How to read this", "", *(f"{paragraph}\n" for paragraph in METHOD)]
    return "\n".join(text).rstrip() + "\n"


# --- page ------------------------------------------------------------------------------------------------------------


def page(comparison: Comparison, out: Path, sections: Sequence[Section]) -> str:
    """`report.html`: one page that needs nothing else. The template escapes all of it but our own figures."""
    import jinja2
    from markupsafe import Markup

    source = resources.files("gpt2exp.compare").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    head, runs = runs_table(comparison)
    kinds = Counter(item.verdict for item in sentences(comparison))
    return environment.from_string(source).render(
        title=title(comparison),
        folder=printable(terminal.short(out.absolute())),
        summary=summary(comparison),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        sentences=sentences(comparison),
        kinds=kinds,
        signs=SIGNS,
        name_of=name_of,
        notes=[printable(note) for note in comparison.notes],
        failures=failures(comparison),
        lines=lines(comparison),
        large=[interaction_sentence(item, comparison) for item in comparison.interactions if item.large],
        distances=[distance_sentence(item) for item in comparison.distances],
        interactions=[(item, words(item)) for item in comparison.interactions],
        subject=subject,
        probability=probability,
        sections=[
            {
                "key": None if section.key is None else printable(section.key),
                "arms": [printable(arm) for arm in comparison.swept.get(section.key or "", [])],
                "figures": [(item, Markup(item.svg)) for item in section.drawings],  # not user text
            }
            for section in sections
        ],
        head=head,
        runs=[(printable(row["name"]), link(row["folder"], out), cells) for row, cells in runs],
        commands=commands(comparison.runs),
        setting=setting(comparison.runs),
        provenance=provenance(comparison.runs),
        method=METHOD,
    )


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

    head, runs = runs_table(comparison)
    effects = records(comparison)
    shown: dict[str, Any] = {
        "runs": wandb.Table(
            columns=[column.name for column in head], data=[[printable(row["name"]), *cells] for row, cells in runs]
        ),
        "verdicts": wandb.Table(
            columns=["verdict", "sentence"], data=[[name_of(item.verdict), item.text] for item in sentences(comparison)]
        ),
    }
    if effects:
        data = [list(row.values()) for row in effects]
        shown["effects"] = wandb.Table(columns=[*effects[0]], data=data)
    for section in sections:
        for item in section.drawings:
            image = wandb.Image(str(sweep / "figures" / f"{item.name}.png"), caption=f"{item.title}. {item.caption}")
            shown[f"figures/{item.name}"] = image
    return shown
