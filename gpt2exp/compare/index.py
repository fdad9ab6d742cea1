"""Lists the findings of many comparisons on one page and in one CSV. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gpt2exp.compare import report, words
from gpt2exp.compare.effect import Effect
from gpt2exp.files import walk
from gpt2exp.run.terminal import printable
from gpt2exp.section import BadRequest

REPORT = "comparison.json"
COLUMNS = ("question", "arms", "difference, nats", "95 % interval", "worth", "n", "verdict", "date", "commit")


@dataclass
class Finding:
    """What a comparison says of an arm's loss, and a link to its report."""

    question: str
    link: Path
    date: str  # the day on which its first run began
    commit: str
    effect: Effect


def findings(comparison: Mapping[str, Any], link: Path) -> list[Finding]:
    """The findings of a `comparison.json`, one an arm; a file of an older version may lack fields.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: another program wrote it.
    """
    runs, known = comparison["runs"], {item.name for item in fields(Effect)}
    date = min((str(run["started"]) for run in runs if run.get("started")), default="")[:10]
    commits = {str((run.get("git") or {}).get("commit", ""))[:7] for run in runs} - {""}
    question = " × ".join(map(printable, comparison["swept"]))
    rows = [row for row in comparison["axes"] if row["metric"] == comparison["metric"] and not row.get("control")]
    arms = [Effect(**{key: row[key] for key in row.keys() & known}) for row in rows]
    return [Finding(question, link, date, ", ".join(sorted(commits)), arm) for arm in arms]


def below(folders: Sequence[Path]) -> tuple[list[Finding], list[str]]:
    """The findings of every comparison at or below the folders, by question and day, and a line for each unreadable.

    Raises:
        BadRequest: a folder is missing, or there is no comparison.
    """
    found, unread = list[Finding](), list[str]()
    for folder in folders:
        if not folder.is_dir():
            raise BadRequest(f"{folder}: no such folder; name folders of sweeps, such as sweeps")
    places = dict.fromkeys(here.resolve() for folder in folders for here, _, names in walk(folder) if REPORT in names)
    for place in places:
        try:
            whole = json.loads((place / REPORT).read_text(encoding="utf-8"))
            page = next((place / name for name in ("report.html", "report.md") if (place / name).exists()), place)
            found += findings(whole, page)
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            unread.append(f"{place / REPORT} cannot be read: {type(error).__name__}: {error}")
    if not found:
        why = "; ".join(unread) or "no comparison of arms at or below it"
        raise BadRequest(f"{folders[0]}: {why}; gpt2exp-compare SWEEP makes one")
    return sorted(found, key=lambda one: (one.question, one.date, str(one.link))), unread


def table(found: Sequence[Finding], out: Path) -> list[str]:
    """A row a finding in Markdown, linked to its report by an address relative to `out`."""
    rows = []
    for one in found:
        effect, (of, factor, interval) = one.effect, words.worth(one.effect)
        arms = f"{words.subject(effect.key, effect.arm)} against {printable(effect.baseline)}"
        arms += f", {printable(effect.budget)}" * bool(effect.budget)
        worth = f"{factor} × {of} ({interval})" if interval and factor != "–" else f"{factor} {interval} {of}".strip()
        cells = [arms, *words.amounts(effect), worth if of else "", str(effect.n_seeds)]
        linked, verdict = report.linked(one.question, one.link, out), report.verdict_text(effect.verdict or "")
        rows.append(dict(zip(COLUMNS, [linked, *cells, verdict, one.date, one.commit], strict=True)))
    return report.md_table(words.Table(rows, ("difference, nats", "n")))


def page(found: Sequence[Finding], unread: Sequence[str], out: Path) -> str:
    """The findings as a page of Markdown."""
    several = f"{words.counted(len(found), 'arm')} in {words.counted(len({one.link for one in found}), 'comparison')}"
    text = ["# Findings", "", f"{several}; worth: {words.WORTH}.", "", *table(found, out), ""]
    text += [f"- {report.escaped(printable(line))}" for line in unread]
    return "\n".join(text).rstrip() + "\n"


def as_csv(found: Sequence[Finding], out: Path) -> str:
    """The findings with exact numbers, a row each, with every column of `comparison.csv`."""
    rows = [
        {"question": one.question, "date": one.date, "commit": one.commit, "report": report.address(one.link, out)}
        | report.record_of(one.effect)
        for one in found
    ]
    return report.csv_of(rows, rows[0])
