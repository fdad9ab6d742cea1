"""The report of a comparison: on the terminal, as CSV, as Markdown, as a page, in wandb.

Every form shows the sentences and tables of `words`; the page is the Markdown with our style around it. No torch.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import operator
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from gpt2exp.compare import words
from gpt2exp.compare.comparison import Comparison, Row
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.words import Table, counted, name_of
from gpt2exp.run import record, terminal
from gpt2exp.run.metrics import BY_KEY
from gpt2exp.run.terminal import printable
from gpt2exp.schema import parse

if TYPE_CHECKING:
    from jinja2 import Template
    from rich.console import Console

SIGNS = words.SIGNS | words.OTHERS
COLOURS = {"better": "green", "worse": "red", "indistinguishable": "cyan", "inconclusive": "yellow"}
TUNING = (
    "The loss at the end over the tuning seeds: its mean ± their standard deviation. These runs are not compared. An "
    "arm is compared at the value with the lowest mean; a run that diverged makes its value the worst."
)


class Drawing(NamedTuple):
    """A figure; the SVG is a whole document with a transparent background."""

    heading: str  # the heading that it stands under: its axis
    name: str  # the name of its file, without ending
    title: str
    caption: str
    svg: bytes
    png: bytes


def show(comparison: Comparison, console: Console, out: Path | None = None, *, failed: bool = True) -> None:
    """Print tables, sentences and notes, and failed runs if `failed`; `out`: where the report was written."""
    from rich.text import Text

    if comparison.axes and not comparison.searched:
        _show_effects(comparison, console)
    if comparison.tuning:
        rows = words.tuning_table(comparison).rows
        console.print(terminal.table(rows, tuning_heading(comparison)), markup=False)
    said = [(SIGNS[of], COLOURS.get(of, "dim"), text) for of, text in words.findings(comparison)]
    said += [("note:", "dim", printable(note)) for note in comparison.notes]
    said += [(f"{name}:", "red", fate) for name, fate in words.failures(comparison) if failed]
    said += [("report:", "", printable(terminal.short((out / "report.html").absolute())))] if out is not None else []
    for mark, style, text in said:
        console.print(Text(f"{mark} ", style=style) + Text(text), soft_wrap=True)


def _show_effects(comparison: Comparison, console: Console) -> None:
    """Print the table of effects, then its reasons. What pairing gained is left out for lack of room."""
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = words.effects_table(comparison)
    heading = f"compared in {BY_KEY[comparison.metric].name}"
    heading += f"; {words.WORTH}" * any(row["verdict"] == words.UNJUDGED for row in shown.rows)
    table = RichTable(title=heading, title_justify="left", box=None, pad_edge=False, collapse_padding=True)
    table.add_column("axis and arms", overflow="fold")
    names = [name for name in shown.rows[0] if name not in ("axis", "arms", "r", "saved", "verdict", "reason")]
    for name in (*names, "verdict"):
        table.add_column(name, justify="right" if name in shown.numbers else "left", no_wrap=True)
    for (axis, arms), rows in itertools.groupby(shown.rows, key=operator.itemgetter("axis", "arms")):
        # three metrics an arm: its axis beside the first, its names beside the second, its budget beside the third
        for row, beside in itertools.zip_longest(rows, (axis, *(f"  {part}" for part in arms.split(", ")))):
            if row is None:
                break
            mark = Text(name_of(row["verdict"]), style=COLOURS.get(row["verdict"], "dim"))
            mark += Text(f" {row['reason']}" * bool(row["reason"]), style="dim")
            table.add_row(Text(beside or ""), *(Text(row[name]) for name in names), mark)
    console.print(table)
    for number, reason in enumerate(shown.notes):
        console.print(Text(f"[{number + 1}] {reason}", style="dim"), soft_wrap=True)


def finite(value: Any) -> Any:
    """A value as JSON types, with null for inf and NaN."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def record_of(effect: Effect) -> dict[str, Any]:
    """An effect as exact values by column; each interval, and `parameters`, takes two columns."""
    row = finite(asdict(effect))
    ends = {name: row.pop(name) or (None, None) for name in list(row) if name.endswith("ci95")}
    row |= {f"{name}_{side}": end for name, of in ends.items() for side, end in zip(("low", "high"), of, strict=True)}
    sides = row.pop("parameters")
    row |= {f"{side}_parameters": sides.get(side) for side in ("baseline", "arm")}
    row["differences"] = json.dumps(row["differences"])
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def table(comparison: Comparison) -> str:
    """`comparison.csv`: a row an axis, arm and metric; empty cells where there is nothing."""
    return csv_of(map(record_of, comparison.axes), record_of(Effect("", "", "", "")))


def csv_of(rows: Iterable[Mapping[str, Any]], head: Iterable[str]) -> str:
    """Rows as CSV; None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(head), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# --- what the runs were ----------------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: (
        "{n_layer} layers, {n_head} heads, {n_embd} wide, ".format_map(of := row["config"]["model"])
        + ("tied" if of["tie_weights"] else "untied")
    ),
    "parameters": lambda row: f"{row['parameters']['total']:,}",
    "run": lambda row: (
        "{steps:,} steps of {batch_size} × {seq_len} tokens".format_map(of := row["config"]["train"])
        + f" × {of['grad_accum_steps']}" * (of["grad_accum_steps"] > 1)
    ),
    "optimizer": lambda row: "{name}, lr {lr:g}, {schedule}".format_map(row["config"]["optimizer"]),
    "text": lambda row: "{name}: {train_tokens:,} tokens to train on, {val_tokens:,} to validate".format_map(
        row["data"]
    ),
    "precision": lambda row: row["precision"]["effective"] + " emulated" * row["precision"]["emulated"],
    "hardware": lambda row: f"{row['device']}, {row['threads']} threads",
    "platform": lambda row: row["platform"],
    "machine": lambda row: row["machine"],
    "commit": lambda row: row["git"]["commit"] + ", with changes not committed" * row["git"]["dirty"],
    "versions": lambda row: ", ".join(map(" ".join, row["versions"].items())),
    "environment": lambda row: " ".join(map("=".join, row["environment"].items())),
    "text's sha256": lambda row: row["data"]["sha256"],
}
"""Facts of a run by label; a run may lack any of them."""


def facts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The facts of the runs as text; if runs differ in one, each value with the number of runs that have it."""
    told = []
    for label, get in FACTS.items():
        found: Counter[str] = Counter()
        for row in rows:
            with contextlib.suppress(KeyError, TypeError, ValueError):
                found[printable(get(row) or "")] += 1
        del found[""]
        if found:
            each = (f"{value} ({counted(count, 'run')})" for value, count in found.items())
            told.append((label, next(iter(found)) if len(found) == 1 else "; ".join(each)))
    if days := sorted(str(row["started"]) for row in rows if row.get("started")):
        told.append(("started", printable(days[0] if days[0] == days[-1] else f"{days[0]} to {days[-1]}")))
    return told


def commands(rows: Sequence[Row]) -> list[str]:
    """The command lines that made the runs: each sweep's as typed, a single run's from its overrides."""
    found, read = dict[str, None](), functools.cache(record.Sweep.read)  # a sweep's record is long: read it once
    for row in rows:
        known = next(filter(None, map(read, Path(row["folder"]).parents)), None)
        argv = known.argv if known else row.get("overrides", [])
        found[shlex.join(["gpt2exp", *(printable(word) for word in argv)])] = None
    return list(found)


# --- Markdown --------------------------------------------------------------------------------------------------------


class Marked(str):
    """Text that is Markdown already."""

    __slots__ = ()


def escaped(text: str) -> str:
    """User text that Markdown leaves as it is; an underscore inside a word needs nothing."""
    if isinstance(text, Marked):
        return text
    text = re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def linked(text: str, place: Path, out: Path, end: str = "") -> Marked:
    """A link to a file or folder, by its address from `out`."""
    return Marked(f"[{escaped(text)}]({address(place, out)}{end})")


def address(place: Path, out: Path) -> str:
    """The address of a file or folder, relative to the page's folder `out`, quoted for Markdown and HTML."""
    return quote(os.fsencode(Path(os.path.relpath(place, out.resolve())).as_posix()), safe="/=,+@~")


def verdict_text(verdict: str) -> Marked:
    """A verdict with its sign, by which the page colours it; empty in a row that has none."""
    return Marked("" if verdict == words.UNJUDGED else f"**{SIGNS[verdict]} {name_of(verdict)}**")


def md_table(shown: Table) -> list[str]:
    """The lines of a table, its cells escaped."""
    head = list(map(escaped, shown.rows[0]))
    rule = ["--:" if name in shown.numbers else "---" for name in shown.rows[0]]
    return [
        "| " + " | ".join(cells) + " |" for cells in (head, rule, *(map(escaped, of.values()) for of in shown.rows))
    ]


def verdicts(comparison: Comparison) -> list[str]:
    """The findings and notes, a line of Markdown each."""
    text = [f"- {verdict_text(of)} {escaped(said)}" for of, said in words.findings(comparison)]
    return text + [f"- note: {escaped(printable(note))}" for note in comparison.notes]


def effects(comparison: Comparison, metrics: Sequence[str] = ()) -> list[str]:
    """The table of effects in Markdown, of these metrics or all, and the reasons of its verdicts."""
    shown = words.effects_table(comparison, metrics)
    if not shown.rows:
        return []
    said = [f"{words.WORTH[0].upper()}{words.WORTH[1:]}.", ""] * any(
        of["verdict"] == words.UNJUDGED for of in shown.rows
    )
    for row in shown.rows:
        row["verdict"] = Marked(f"{verdict_text(row['verdict'])} {escaped(row.pop('reason'))}".rstrip())
    notes = [f"- \\[{number + 1}\\] {escaped(reason)}" for number, reason in enumerate(shown.notes)]
    return [*md_table(shown), "", *said, *notes]


def tuning_heading(comparison: Comparison) -> str:
    """The heading above the tuning curves."""
    return f"Each arm's own {comparison.tuning[0].key}"


def tuning(comparison: Comparison) -> list[str]:
    """The curve of each arm over the values of the tuned key in Markdown: a table, and a line an arm."""
    lines = [f"- {escaped(curve.said())}" for curve in comparison.tuning]
    return [TUNING, "", *md_table(words.tuning_table(comparison)), "", *lines]


def markdown(comparison: Comparison, out: Path, drawings: Sequence[Drawing]) -> str:
    """`report.md`, whose links and figures are relative to `out`."""
    runs = words.runs_table(comparison)
    for row, cells in zip(comparison.runs, runs.rows, strict=True):
        cells["run"] = linked(cells["run"], Path(row["folder"]), out, "/")
        if row["state"] != "done":
            cells["state"] = Marked(f"**{escaped(cells['state'])}**")
    typed = commands(comparison.runs)
    ticks = max((len(found) for text in typed for found in re.findall(r"`+", text)), default=0)
    text = _template("report.md.j2").render(
        comparison=comparison,
        drawings=drawings,
        runs=runs,
        commands=typed,
        fence="`" * max(3, ticks + 1),  # longer than any in the commands
    )
    return text.rstrip() + "\n"


def _template(name: str) -> Template:
    """A template of this folder."""
    import jinja2

    loader, page = jinja2.PackageLoader("gpt2exp.compare", "."), name.endswith(".html.j2")
    made = jinja2.Environment(loader=loader, autoescape=page, trim_blocks=True, undefined=jinja2.StrictUndefined)
    made.filters |= {"escaped": escaped, "md_table": md_table}
    made.globals |= {of.__name__: of for of in (verdicts, effects, tuning, tuning_heading, facts)} | {"words": words}
    return made.get_template(name)


def page(text: str, title: str, out: Path, drawings: Sequence[Drawing] = ()) -> str:
    """The Markdown `text` of a file in `out` as one HTML page that needs nothing else, the figures inside it."""
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    figures = {f"figures/{item.name}.png": item.svg for item in drawings}
    classes = {sign: verdict for verdict, sign in words.SIGNS.items()}
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
    return _template("report.html.j2").render(
        title=title,
        folder=printable(terminal.short(out.absolute())),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        body=Markup(reader.renderer.render(tokens, reader.options, {})),  # html=False: user text is escaped in it
    )


def mirror(comparison: Comparison, sweep: Path, drawings: Sequence[Drawing]) -> Path | None:
    """Send the comparison to wandb as a run of its own beside the sweep's runs; returns the folder to sync if offline.

    If the runs' settings for wandb differ, the first that is not disabled counts.
    """
    from gpt2exp.run.tracking import Mirror, resolve_mode

    settings = [row["config"]["wandb"] for row in comparison.runs if "config" in row]
    different = [one for at, one in enumerate(settings) if one not in settings[:at]]
    known = (parse({"wandb": one}).wandb for one in different)
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
    wandb.show(lambda: _for_wandb(comparison, sweep, drawings))
    verdicts = [text for _, text in words.sentences(comparison)]
    found = {"runs": len(comparison.runs), "failed": len(comparison.failed), "verdicts": verdicts}
    return wandb.finish(found, failed=False)


def _for_wandb(comparison: Comparison, sweep: Path, drawings: Sequence[Drawing]) -> dict[str, Any]:
    import wandb

    verdicts = [{"verdict": name_of(verdict), "sentence": text} for verdict, text in words.sentences(comparison)]
    tables = {"runs": words.runs_table(comparison).rows, "verdicts": verdicts}
    tables["effects"] = [record_of(effect) for effect in comparison.axes]
    shown: dict[str, Any] = {
        name: wandb.Table(columns=list[str | int](rows[0]), data=[[*row.values()] for row in rows])
        for name, rows in tables.items()
        if rows
    }
    for item in drawings:
        path = str(sweep / "figures" / f"{item.name}.png")
        shown[f"figures/{item.name}"] = wandb.Image(path, caption=f"{item.title}. {item.caption}")
    return shown
