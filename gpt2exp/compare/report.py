"""The report of a comparison: on the terminal, as CSV, as Markdown, as a page, in wandb.

Every form shows the sentences and tables of `words`; the page is the Markdown with our style around it. No torch.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from gpt2exp.compare import words
from gpt2exp.compare.comparison import Comparison, Row
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.words import SIGNS, Table, counted, name_of
from gpt2exp.run import record, terminal
from gpt2exp.run.metrics import BY_KEY
from gpt2exp.run.terminal import printable
from gpt2exp.schema import parse

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"better": "green", "worse": "red", "indistinguishable": "cyan", "inconclusive": "yellow"}
INTERACTIONS = (
    "How much the effect of one axis on the loss changes with another: the difference of their differences, by seed. "
    "p is not corrected. Large: the interval excludes zero and the size exceeds the seed-to-seed std."
)
TUNING = (
    "The loss at the end over the tuning seeds: its mean ± their standard deviation. These runs are not compared. An "
    "arm is compared at the value with the lowest mean; a run that diverged makes its value the worst."
)
METHOD = (
    "A pair is two runs that differ in one axis and share the rest, seed included. Differences at one seed are first "
    "averaged over the other axes, so n counts seeds. Intervals are 95 %, of the paired differences; p values are "
    "corrected by Holm over all arms in one metric. The seed-to-seed std says how far runs of one arm lie apart where "
    "only the seed differs: the arm's, and in brackets the baseline's.",
    "The interval is Student's t, which is right for one look, at a number of seeds chosen beforehand. Where the looks "
    "were declared beforehand, it is Student's t at a smaller p. Where seeds were added after another look, it is an "
    "e-process's: wider, and right at every look. In both, p keeps the strongest look so far.",
    "better, worse: p is below 0.05. indistinguishable: the interval lies inside the margin stated before the runs "
    "(sweep.margin, or --margin); without a margin only arms without any difference are. inconclusive: neither. The "
    "seeds named would settle it in four of five studies whose differences go on like these; perhaps: by the upper "
    "80 % limit of their standard deviation. They count further looks, but no correction by Holm. not comparable: the "
    "reason says why.",
    "compute is the factor on the baseline's steps at which its own curve reaches the arm's final loss, times the "
    "ratio of speeds: above 1 the arm is worth that many times the baseline's compute. steps leaves the speed out. The "
    "curve is the validation loss where it was measured along the run, else the smoothed training loss. An arm that "
    "ends lower than the baseline ever gets has no such factor, only a bound of 1; for it the number says how much "
    "sooner it reaches the baseline's final loss.",
    "r is the correlation of the two arms over seeds. saved says how many more seeds each arm would need if the arms "
    "shared none; below 0, pairing lost.",
)
"""How to read it, for the page and the Markdown."""


class Drawing(NamedTuple):
    """A figure under the name of its file, without ending; the SVG is a document of its own, on no background."""

    name: str
    title: str
    caption: str
    svg: bytes
    png: bytes


class Section(NamedTuple):
    """The figures of one axis; of all runs together, without a key, where nothing but the seed varies."""

    key: str | None
    drawings: list[Drawing]


def show(comparison: Comparison, console: Console, out: Path | None = None, *, failed: bool = True) -> None:
    """Table, sentences, failed runs unless told elsewhere, and notes; `out`: where the report was written."""
    from rich.text import Text

    if comparison.axes and not comparison.searched:
        heading = f"compared in {BY_KEY[comparison.metric].name}"
        heading += f"; {words.WORTH}" * any(words.worth(effect)[0] for effect in comparison.axes)
        _show_table(words.effects_table(comparison), console, heading)
    if comparison.tuning:
        shown = words.tuning_table(comparison)
        cells = [dict(zip((column.name for column in shown.columns), row, strict=True)) for row in shown.rows]
        console.print(terminal.table(cells, tuning_heading(comparison)), markup=False)
    for verdict, text in words.sentences(comparison):
        mark = Text(f"{SIGNS[verdict]} ", style=COLOURS.get(verdict, "dim"))
        console.print(mark + Text(text), soft_wrap=True)
    said = [(f"budget: {text}", "") for text in words.changes(comparison)]
    said += [(f"interaction: {text}", "") for text in words.interactions(comparison)]
    said += [(words.distance_sentence(item), "") for item in comparison.distances]
    said += [(f"{name}: {fate}", "red") for name, fate in words.failures(comparison) if failed]
    said += [(f"note: {printable(note)}", "dim") for note in comparison.notes]
    said += [(f"report: {printable(terminal.short((out / 'report.html').absolute()))}", "")] if out is not None else []
    for text, style in said:
        console.print(Text(text, style=style), soft_wrap=True)


def tuning_heading(comparison: Comparison) -> str:
    """What is above the curves of the arms."""
    return f"Each arm's own {comparison.tuning[0].key}"


def tuning(comparison: Comparison) -> list[str]:
    """The curve of each arm over the values of the tuned key in Markdown: a table, and a line an arm."""
    shown = words.tuning_table(comparison)
    shown.rows = [[*map(escaped, cells)] for cells in shown.rows]
    lines = [f"- {escaped(curve.said())}" for curve in comparison.tuning]
    return [TUNING, "", *md_table(shown), "", *lines]


def _show_table(shown: Table, console: Console, heading: str) -> None:
    """The table without what pairing gained, for lack of room, then the reasons that its verdicts refer to."""
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(title=heading, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column("axis and arms", overflow="fold")
    *named, _ = (at for at, column in enumerate(shown.columns) if column.name not in ("r", "saved"))
    for column in (shown.columns[at] for at in named[2:]):
        table.add_column(column.name, justify="right" if column.number else "left", no_wrap=True)
    reasons = words.reasons_of(shown)
    for (axis, arms), rows in itertools.groupby(shown.rows, key=lambda row: row[:2]):
        # three metrics an arm: its axis beside the first, its names beside the second, its budget beside the third
        for row, beside in itertools.zip_longest(rows, (axis, *(f"  {part}" for part in arms.split(", ")))):
            if row is None:
                break
            *cells, verdict = (row[at] for at in named[2:])
            mark = Text(name_of(verdict), style=COLOURS.get(verdict, "dim"))
            mark += Text(f" [{reasons.index(row[-1]) + 1}]" if row[-1] else "", style="dim")
            table.add_row(Text(beside or ""), *map(Text, cells), mark)
    console.print(table)
    for number, reason in enumerate(reasons):
        console.print(Text(f"[{number + 1}] {reason}", style="dim"), soft_wrap=True)


def finite(value: Any) -> Any:
    """JSON's own types with null for what no JSON number can be."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records(effects: Sequence[Effect]) -> tuple[list[str], list[list[Any]]]:
    """Effects as column names and rows of exact values: of each interval and `parameters` two columns."""
    ends = [item.name for item in fields(Effect) if item.name.endswith("ci95")]
    single = [item.name for item in fields(Effect) if item.name not in (*ends, "parameters")]
    rows = []
    for effect in effects:
        row = finite(asdict(effect))
        row["differences"] = json.dumps(row["differences"])
        values = [row[name] for name in single]
        values += itertools.chain(*(row[name] or (None, None) for name in ends))
        values += [row["parameters"].get(side) for side in ("baseline", "arm")]
        rows.append([printable(value) if isinstance(value, str) else value for value in values])
    bounds = [f"{name}_{side}" for name in ends for side in ("low", "high")]
    return [*single, *bounds, "baseline_parameters", "arm_parameters"], rows


def table(comparison: Comparison) -> str:
    """`comparison.csv`: a row an axis, arm and metric; empty cells where there is nothing."""
    head, rows = records(comparison.axes)
    return csv_of([head, *rows])


def csv_of(rows: Sequence[Sequence[Any]]) -> str:
    """Rows as CSV; None is an empty cell."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


# --- what the runs were ----------------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[Row], Any]] = {
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
"""What was trained on what, where and with what; a run may lack any of it."""


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The facts of the runs as text; where they differ, each with how many have it."""
    told = []
    for label, get in FACTS.items():
        found: Counter[str] = Counter()
        for row in rows:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found[printable(get(row) or "")] += 1
        del found[""]
        each = (f"{value} ({counted(count, 'run')})" for value, count in found.items())
        if found:
            told.append((label, next(iter(found)) if len(found) == 1 else "; ".join(each)))
    days = sorted(str(row["started"]) for row in rows if row.get("started"))
    if days:
        told.append(("started", printable(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")))
    return told


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


# --- Markdown --------------------------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """User text that Markdown leaves as it is; an underscore inside a word needs nothing."""
    text = re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def address(place: Path, out: Path) -> str:
    """Of a file or folder, relative to the page's folder `out`, as Markdown and HTML take it."""
    return quote(os.fsencode(Path(os.path.relpath(place, out.resolve())).as_posix()), safe="/=,+@~")


def verdict_text(verdict: str) -> str:
    """A verdict with its sign, by which the page colours it; empty in a row that has none."""
    return "" if verdict == words.UNJUDGED else f"**{SIGNS[verdict]} {name_of(verdict)}**"


def md_table(shown: Table) -> list[str]:
    """The table's lines; the cells are Markdown already."""
    head = [escaped(column.name) for column in shown.columns]
    rule = ["--:" if column.number else "---" for column in shown.columns]
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *shown.rows)]


def verdicts(comparison: Comparison) -> list[str]:
    """What was found, a line of Markdown each."""
    text = [f"- {verdict_text(verdict)} {escaped(said)}" for verdict, said in words.sentences(comparison)]
    text += [f"- **⇢ budget** {escaped(said)}" for said in words.changes(comparison)]
    text += [f"- **× interaction** {escaped(said)}" for said in words.interactions(comparison)]
    text += [f"- **↔ from fp64** {escaped(words.distance_sentence(item))}" for item in comparison.distances]
    return text + [f"- note: {escaped(printable(note))}" for note in comparison.notes]


def effects(comparison: Comparison, metrics: Sequence[str] = ()) -> list[str]:
    """The table of effects in Markdown, of these metrics or all, and the reasons of its verdicts."""
    shown = words.effects_table(comparison)
    shown.rows = [row for row in shown.rows if row[2] in metrics or not metrics]
    if not shown.rows:
        return []
    reasons = words.reasons_of(shown)
    rows = [
        [*map(escaped, cells), verdict_text(verdict) + (f" \\[{reasons.index(reason) + 1}\\]" if reason else "")]
        for *cells, verdict, reason in shown.rows
    ]
    notes = [f"- \\[{number + 1}\\] {escaped(reason)}" for number, reason in enumerate(reasons)]
    said = [f"{words.WORTH[0].upper()}{words.WORTH[1:]}.", ""] * any(row[-2] == words.UNJUDGED for row in shown.rows)
    return [*md_table(Table(shown.columns[:-1], rows)), "", *said, *notes]


def reproduce(comparison: Comparison) -> list[str]:
    """The commands and the facts that a repetition needs, in Markdown."""
    typed = commands(comparison.runs)
    longest = max((len(ticks) for text in typed for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    known = [f"- {label}: {escaped(value)}" for label, value in facts(comparison.runs)]
    return [f"{fence}sh", *typed, fence, "", *known]


def _runs(comparison: Comparison, out: Path) -> list[str]:
    """The table of runs, each linked to its folder by an address relative to `out`."""
    runs = words.runs_table(comparison)
    for row, cells in zip(comparison.runs, runs.rows, strict=True):
        name, state, *others = cells
        state = state if state == "done" else f"**{state}**"
        cells[:] = [f"[{escaped(name)}]({address(Path(row['folder']), out)}/)", state, *map(escaped, others)]
    return md_table(runs)


def markdown(comparison: Comparison, out: Path, sections: Sequence[Section]) -> str:
    """`report.md`, whose links and figures are relative to `out`."""
    text = [f"# {escaped(words.title(comparison))}", "", f"{words.summary(comparison)}.", "", *verdicts(comparison)]
    if compared := effects(comparison):
        text += ["", "## Comparison", "", *compared]
    if comparison.failed:
        text += ["", "## Not finished", ""]
        text += [f"- **{escaped(name)}** {escaped(fate)}" for name, fate in words.failures(comparison)]
    if comparison.tuning and not sections:
        text += ["", f"## {escaped(tuning_heading(comparison))}", "", *tuning(comparison)]
    for section in sections:
        text += ["", f"## {escaped(printable(section.key or 'Figures'))}"]
        if comparison.tuning and section is sections[0]:
            text += ["", *tuning(comparison)]
        for item in section.drawings:  # the backslash breaks the line
            text += ["", f"![{item.title}](figures/{item.name}.png)\\", f"*{item.title}.* {escaped(item.caption)}"]
    if comparison.interactions:
        table = words.interactions_table(comparison)
        table.rows = [[*map(escaped, cells)] for cells in table.rows]
        text += ["", "## Interactions", "", INTERACTIONS, "", *md_table(table)]
    text += ["", "## Runs", "", *_runs(comparison, out)]
    text += ["", "## Reproduce", "", *reproduce(comparison)]
    text += ["", "## How to read this", "", *(f"{paragraph}\n" for paragraph in METHOD)]
    return "\n".join(text).rstrip() + "\n"


def page(text: str, title: str, out: Path, sections: Sequence[Section] = ()) -> str:
    """The Markdown `text` of a file in `out` as one HTML page that needs nothing else, the figures inside it."""
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
        title=title,
        folder=printable(terminal.short(out.absolute())),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        body=Markup(reader.renderer.render(tokens, reader.options, {})),  # html=False: user text is escaped in it
    )


def mirror(comparison: Comparison, sweep: Path, sections: Sequence[Section]) -> Path | None:
    """The comparison as a wandb run of its own beside the sweep's runs; the folder to sync if offline.

    Where the runs' settings for wandb differ, the first that is not disabled counts.
    """
    from gpt2exp.run.tracking import Mirror, resolve_mode

    sections_of = [row.get("config", {}).get("wandb", {"mode": "disabled"}) for row in comparison.runs]
    different = [section for at, section in enumerate(sections_of) if section not in sections_of[:at]]
    known = (parse({"wandb": section}).wandb for section in different)
    config = next((config for config in known if resolve_mode(config) != "disabled"), None)
    if config is None:
        return None
    about = {
        "name": f"comparison of {words.title(comparison)}"[:128],
        "group": config.group or sweep.resolve().name,
        "tags": config.tags,
        "config": {"swept": comparison.swept, "seeds": comparison.seeds, "metric": comparison.metric},
    }
    wandb = Mirror(config, sweep, about, job_type="comparison", own=True)
    wandb.show(lambda: _for_wandb(comparison, sweep, sections))
    verdicts = [text for _, text in words.sentences(comparison)]
    found = {"runs": len(comparison.runs), "failed": len(comparison.failed), "verdicts": verdicts}
    return wandb.finish(found, failed=False)


def _for_wandb(comparison: Comparison, sweep: Path, sections: Sequence[Section]) -> dict[str, Any]:
    import wandb

    runs, (head, effects) = words.runs_table(comparison), records(comparison.axes)
    verdicts = [[name_of(verdict), text] for verdict, text in words.sentences(comparison)]
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
