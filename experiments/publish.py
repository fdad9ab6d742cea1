"""Turn finished sweeps into the findings of this folder: `python experiments/publish.py NAME SWEEP [SWEEP ...]`.

Writes `experiments/NAME/results.csv` (the comparison, a row an axis, arm and metric), `runs.csv` (the figures of each
run), the figures, and the part of its README between the `results` markers. `python experiments/publish.py index`
rewrites the table of claims in `experiments/README.md` from those files. No figure in these pages is typed by hand.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2exp import compare, report

HERE = Path(__file__).parent
FIGURES = {
    "precision": ("gap", "difference"),
    "weight_tying": ("loss", "difference"),
    "residual_scaling": ("residual", "difference"),
    "init_std": ("loss", "difference"),
    "first_steps": ("loss", "unseen"),
    "throughput": ("speed", "memory"),
}
"""Which of the report's figures of the first axis a finding shows."""

Run = dict[str, str]


# --- a sweep to a finding --------------------------------------------------------------------------------------------


def publish(name: str, sweeps: Sequence[Path]) -> None:
    """Write a finding's results, figures and the part of its page between the markers."""
    comparison = compare.compare(compare.read(sweeps))
    folder = HERE / name
    for old in folder.glob("*.png"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        report.write(comparison, Path(scratch))
        (folder / "results.csv").write_text((Path(scratch) / "comparison.csv").read_text())
        for figure in sorted(Path(scratch).rglob("*.png")):
            number, kind = figure.stem.split("-", 1)[0], figure.stem.rsplit("-", 1)[-1]
            if kind in FIGURES[name] and number in ("0", "1"):
                (folder / f"{kind}.png").write_bytes(figure.read_bytes())
        block = results((Path(scratch) / "report.md").read_text(), folder)
    runs = [figures_of(row) for row in comparison.runs if row["state"] == "done"]
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(runs[0]))
        writer.writeheader()
        writer.writerows(runs)
    replace_block(folder / "README.md", "results", block)


def figures_of(row: dict[str, Any]) -> dict[str, Any]:
    """What `runs.csv` keeps of a run."""
    metrics = [json.loads(line) for line in (Path(row["folder"]) / "metrics.jsonl").read_text().splitlines()]
    stream = [step["residual_rms"] for step in metrics if "residual_rms" in step]
    looked, headed = ([step[f"wte_grad_{use}"] for step in metrics if f"wte_grad_{use}" in step] for use in USES)
    kept = {key: value for key, value in row.items() if isinstance(value, (int, float)) or key in ("state", "started")}
    return {
        "name": row["name"],
        "overrides": " ".join(row["overrides"]),
        **kept,
        "parameters": row["parameters"]["total"],
        "step_ms": row["step_ms"]["median"],
        "wall_startup": row["wall_seconds"]["startup"],
        "wall_total": row["wall_seconds"]["total"],
        "steps_total_ms": sum(step["step_ms"] for step in metrics),
        "stream_first_embedded": stream[0][0],
        "stream_first_last_block": stream[0][-1],
        "stream_last_last_block": stream[-1][-1],
        "wte_grad_lookup_first": looked[0],
        "wte_grad_head_first": headed[0],
        "wte_grad_lookup_last": looked[-1],
        "wte_grad_head_last": headed[-1],
        "device": row["device"],
        "commit": (row["git"] or {}).get("commit", "")[:12],
        "dirty": (row["git"] or {}).get("dirty", ""),
    }


USES = ("lookup", "head")


def results(markdown: str, folder: Path) -> str:
    """What a finding's page takes of the report: verdicts, table, figures, and how it was made."""
    head, *parts = markdown.split("\n## ")
    sections = dict(part.split("\n", 1) for part in parts)
    verdicts = "\n".join(line for line in head.splitlines() if line.startswith("- "))
    pictures = "\n\n".join(f"![{picture.stem}]({picture.name})" for picture in sorted(folder.glob("*.png")))
    blocks = [verdicts, sections.get("Comparison", ""), pictures, sections["Reproduce"]]
    return "\n\n".join(block.strip() for block in blocks if block.strip())


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path} lacks the {name} markers")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page))


# --- the findings to an index ----------------------------------------------------------------------------------------


def runs_of(name: str) -> list[Run]:
    """Rows of a finding's `runs.csv`."""
    with (HERE / name / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def effect(name: str, key: str, arm: str, metric: str) -> Run:
    """One row of a finding's `results.csv`."""
    with (HERE / name / "results.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return next(row for row in rows if (row["key"], row["arm"], row["metric"]) == (key, arm, metric))


def column(rows: Sequence[Run], key: str, having: str = "") -> list[float]:
    """A figure of every run whose overrides hold `having`."""
    return [float(row[key]) for row in rows if having in row["overrides"].split() or not having]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over runs."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


@dataclass
class Claim:
    """A claim of the tutorial, and how to hold the runs against it: figure, n, verdict."""

    text: str
    finding: str
    measure: Callable[[], tuple[str, int, str]]


def holds(ok: bool) -> str:
    """In the index's words."""
    return "holds" if ok else "does not hold"


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    if argv[:1] == ["index"]:
        from claims import CLAIMS  # beside this file

        rows = ["| claim | measured | n | verdict | finding |", "|---|---|---|---|---|"]
        for claim in CLAIMS:
            figure, n, verdict = claim.measure()
            rows.append(
                f"| {claim.text} | {figure} | {n} | **{verdict}** | [{claim.finding}]({claim.finding}/README.md) |"
            )
        replace_block(HERE / "README.md", "claims", "\n".join(rows))
    else:
        publish(argv[0], [Path(text) for text in argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
