"""The pages of this folder: `python experiments/publish.py STUDY [SWEEP ...]`.

A study is `NAME`, or `NAME/PART` for another one of the same question: at GPT-2's scale, on another text, run until it
was answered. With sweeps, writes its record into `experiments/NAME/`: `runs.csv` (a row a run), `runs.json` (what all
runs share: commands, versions, configuration), of a part `PART.csv` and `PART.json`, and the figures. Then, and without
sweeps from the record that is there, compares the runs as the program does today and writes `results.csv` (a row an
axis, arm and metric) and the part of the README between the markers `results` or `PART`. `... bench` writes the tables
of what `gpt2exp-bench --out` and `throughput/roofline.py` wrote into `throughput/bench/`, `... keys` the table of keys
in `conf/README.md`, `... findings` what all records say together: `findings.csv` and a table of this folder's page.
`claims.py` rewrites the table of claims. No figure in these pages is typed by hand.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt2exp.compare import figures, index, inference, report, words
from gpt2exp.compare.comparison import Comparison, Distance, Row, compare, read
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.stopping import compared
from gpt2exp.compare.tuned import Curve
from gpt2exp.schema import leaves, options
from gpt2exp.section import show

HERE = Path(__file__).parent
FIGURES = {
    "precision": ("gap", "difference"),
    "precision/gpt2": ("gap", "difference"),
    "weight_tying": ("loss", "difference"),
    "weight_tying/gpt2": ("loss", "difference"),
    "weight_tying/equal_parameters": (),
    "residual_scaling": ("residual", "difference"),
    "residual_scaling/gpt2": ("residual", "difference"),
    "init_std": ("loss", "intervals"),
    "init_std/gpt2": ("loss", "intervals"),
    "first_steps": ("loss", "unseen"),
    "library": ("speed", "difference"),
    "gpt2_choices": ("tuning", "difference"),
    "gpt2_choices/gpt2": ("difference",),
    "second_text": ("difference",),
    "throughput": ("speed", "memory"),
}
"""Which of the report's figures of the first axis a record's part of the page shows; of other records none."""
METRICS = {
    "throughput": ("speed, ratio", "memory, MiB"),
    "precision/speed": ("speed, ratio",),
    "library": ("loss, nats", "speed, ratio", "memory, MiB"),
}
"""Which metrics the table of a record has; of others the loss, with the reasons in the sentences above it."""
WHOLE = ("config", "precision", "data", "device", "threads", "processes", "machine", "versions", "git")
"""Fields of a summary that are recorded with all they hold."""

Run = dict[str, str]


# --- a sweep to a finding --------------------------------------------------------------------------------------------


def publish(study: str, sweeps: Sequence[Path]) -> None:
    """Write a study's record from its sweeps, if any are named, then its results and its page from the record."""
    record = Record(study)
    comparison = compared(read(sweeps)) if sweeps else recorded(study)
    if sweeps:
        write_record(comparison, record.stem)
    record.results.write_text(report.table(comparison))
    draw(record, comparison)
    replace_block(record.page, record.block, results(study, comparison))


@dataclass(frozen=True)
class Record:
    """Where a study's record lies: of `NAME` and of `NAME/PART`, another study of the same question."""

    study: str

    @property
    def page(self) -> Path:
        return HERE / self.study.partition("/")[0] / "README.md"

    @property
    def stem(self) -> Path:
        """The path of `runs.csv` and `runs.json`, or of `PART.csv` and `PART.json`, without the ending."""
        return self.page.parent / (self.study.partition("/")[2] or "runs")

    @property
    def block(self) -> str:
        """The markers of its part of the page."""
        return self.study.partition("/")[2] or "results"

    @property
    def results(self) -> Path:
        return self.beside("results.csv")

    def beside(self, name: str) -> Path:
        """A file of the results: `NAME`, or `PART-NAME`."""
        _, _, part = self.study.partition("/")
        return self.page.parent / (f"{part}-{name}" if part else name)


def results(study: str, comparison: Comparison) -> str:
    """A study's part of the page, between the markers."""
    record = Record(study)
    table = report.effects(comparison, METRICS[study]) if study in METRICS else losses(comparison)
    # where GPT-2's own part leads, the small model's sentences would repeat it
    leads = Record(f"{study}/gpt2").stem.with_suffix(".csv").is_file()
    kinds = () if leads and not comparison.tuning else FIGURES.get(study, ())
    pictures = [path for kind in sorted(kinds) if (path := record.beside(f"{kind}.png")).is_file()]
    spared = ("- note: no compute multiplier", "- **↔")  # `gaps` says in a line how far precisions stray
    told = [line for line in report.verdicts(comparison) if not line.startswith(spared)]
    if record.block in ("until", "equal_parameters"):
        told, table = [line for line in told if not line.startswith("- note: ")], []
    parts = [
        [] if leads else told,
        gaps(comparison),
        table,
        [line for line in report.tuning(comparison) if ": best at " not in line]
        if comparison.tuning and not leads
        else [],
        [" ".join(f"![{path.stem}]({path.name})" for path in pictures)] if pictures else [],
        [provenance(record.stem.with_suffix(".json"))],
        *([extra(runs_of(study))] for extra in EXTRAS.get(study, [])),
    ]
    return "\n\n".join("\n".join(part).strip() for part in parts if part)


def gaps(comparison: Comparison) -> list[str]:
    """How far each precision's training loss lies from fp64's, in a line."""
    if not comparison.distances:
        return []
    far = [f"{item.arm} {words.spell(item.mean)} ({words.spell(item.largest)})" for item in comparison.distances]
    std = comparison.distances[0].seed_std
    return [
        "How far the training loss lies from fp64's at the same seed and step, in nats, on average (and at the worst "
        f"step, mean over seeds): {', '.join(far)}."
        + (f" Between seeds fp64's own losses have a std of {words.spell(std)}." if std is not None else "")
    ]


def losses(comparison: Comparison) -> list[str]:
    """The table of the loss without its footnotes: a page's sentences give the reasons."""
    table = report.effects(comparison, ["loss, nats", "compute, ratio", "steps, ratio"])
    if "" not in table:
        return table
    return [re.sub(r" \\\[\d+\\\]", "", line) for line in table[: table.index("")]]


def draw(record: Record, comparison: Comparison) -> None:
    """Replace those of a study's figures for which the comparison has something."""
    for drawing in figures.draw(comparison):
        number, kind = drawing.name.split("-", 1)[0], drawing.name.rsplit("-", 1)[-1]
        if kind in FIGURES.get(record.study, ()) and number in ("0", "1"):
            record.beside(f"{kind}.png").write_bytes(drawing.png)


def publish_findings() -> None:
    """The table and the CSV of what the records say of the loss, as `gpt2exp-compare --index` makes them of sweeps."""
    records = [Record(study) for study in FIGURES]
    known = [record for record in records if record.stem.with_suffix(".json").is_file()]
    each = ((record, index.findings(recorded(record.study).as_dict(), record.page)) for record in known)
    found = [replace(one, question=record.study) for record, arms in each for one in arms]
    (HERE / "findings.csv").write_text(index.as_csv(found, HERE))
    replace_block(HERE / "README.md", "findings", "\n".join(index.table(found, HERE)))


# --- the record of a finding -----------------------------------------------------------------------------------------


def write_record(comparison: Comparison, stem: Path) -> None:
    """Write `stem`.csv and `stem`.json: of the finished runs what each has of its own, and what they share."""
    done = [row for row in comparison.runs if row["state"] == "done"]
    every = [leaves({key: row[key] for key in WHOLE if key in row}) for row in done]
    shared = {key: value for key, value in every[0].items() if all(of.get(key, "") == value for of in every)}
    runs = []
    for row, facts in zip(done, every, strict=True):
        own = {key: json.dumps(value) for key, value in facts.items() if key not in shared}
        runs.append(figures_of(row) | own)
    write_rows(stem.with_suffix(".csv"), runs)
    commits = dict.fromkeys((row.get("git") or {}).get("commit", "") for row in done)
    typed = [re.sub(r" hydra\.sweep\.dir=\S+", "", command) for command in report.commands(done)]
    told = {
        "commands": typed,
        "facts": {**dict(report.facts(done)), "commit": ", ".join(filter(None, commits))},
        "distances": [asdict(item) for item in comparison.distances],
        "curves": {_arms(effect): of for effect in comparison.axes if (of := from_curves(effect))},
        "tuning": [asdict(curve) for curve in comparison.tuning],
        "inference": sorted({effect.inference for effect in comparison.axes}),
        "shared": shared,
    }
    stem.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


def figures_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of a run's figures."""
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
    }


USES = ("lookup", "head")


def recorded(study: str) -> Comparison:
    """The comparison of a study's runs, by today's rules, from its record.

    Raises:
        ValueError: it was looked at more than once; only its sweeps know when.
    """
    stem = Record(study).stem
    told = json.loads(stem.with_suffix(".json").read_text())
    if {*told["inference"]} - {"fixed"}:
        raise ValueError(f"{study}: it was looked at more than once, so publish it from its sweeps")
    comparison = compare([_row(run, stem.parent, told["shared"]) for run in runs_of(study)])
    comparison.tuning = [Curve(**item) for item in told.get("tuning", [])]
    comparison.distances = [Distance(**item) for item in told["distances"]]
    old = {arms: {"trend": trend} for arms, trend in told.get("trends", {}).items()}
    for effect in comparison.axes:
        if effect.metric == comparison.metric:
            for name, value in told.get("curves", old).get(_arms(effect), {}).items():
                setattr(effect, name, value)
    return comparison


def _arms(effect: Effect) -> str:
    return f"{effect.key}={effect.arm}" + f" at {effect.budget}" * bool(effect.budget)


def from_curves(effect: Effect) -> dict[str, Any]:
    """What an effect has of the steps' metrics, which a record does not keep."""
    names = [
        item.name for item in fields(Effect) if item.name.startswith(("trend", "steps_f", "compute_", "multiplier"))
    ]
    return {name: getattr(effect, name) for name in names if getattr(effect, name)}


def _row(run: Run, folder: Path, shared: Mapping[str, Any]) -> Row:
    """A run as `read` would give it."""
    row: dict[str, Any] = {"name": run["name"], "folder": str(folder / run["name"]), "error": None}
    row |= {key: run[key] for key in ("state", "started")} | {"overrides": run["overrides"].split()}
    row |= {key: float(run[key]) for key in run if key in NUMBERS and run[key]}
    row |= {key: int(run[key]) for key in ("steps", "tokens", "seed", "pid") if run.get(key)}
    row["parameters"] = {"total": int(run["parameters"])}
    row["wall_seconds"] = {"train": float(run["wall_total"]) - float(run["wall_startup"])}
    for key, value in {**shared, **{key: json.loads(text) for key, text in run.items() if "." in key and text}}.items():
        *sections, name = key.split(".")
        section = row
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return row  # type: ignore[return-value]


NUMBERS = ("loss_mean_last10", "val_loss", "tokens_per_second", "peak_memory_bytes", "speed_disturbed")


def provenance(path: Path) -> str:
    """When and by what the runs of a record were made, and where the rest of it stands."""
    told = json.loads(path.read_text())
    day, commits = told["facts"]["started"].partition("T")[0], told["facts"].get("commit", "").split(", ")
    by = ", ".join(f"`{command}`" for command in told["commands"])
    rest = f"machine, versions, text and configuration: [{path.name}]({path.name})"
    return f"Run on {day} at commit {' and '.join(commit[:7] for commit in commits)} by {by}; {rest}."


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table with all the rows' keys as its columns; what a row lacks is left empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, list(names), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def replace_block(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers `<!-- name -->` and `<!-- /name -->` of a page."""
    page = path.read_text()
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"{path} lacks the {name} markers")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", page))


# --- the bench -------------------------------------------------------------------------------------------------------


def benches() -> list[dict[str, Any]]:
    """What `gpt2exp-bench` found, by size."""
    found = [json.loads(path.read_text()) for path in sorted((HERE / "throughput" / "bench").glob("*.json"))]
    return sorted(
        found, key=lambda one: (one["train"]["batch_size"] * one["train"]["seq_len"], list(one.get("ratios", "")))
    )


def bench_tables() -> str:
    """The tables of each processor."""
    found = benches()
    own = [[one for one in found if one["processor"] == name] for name in sorted({one["processor"] for one in found})]
    return "\n\n".join(f"{bench_table(ones)}\n\n{floor_table(ones)}" for ones in own)


def bench_table(found: Sequence[Mapping[str, Any]]) -> str:
    """Ours beside each peer: medians of the rounds, ratios pair by pair with their range."""
    rows = [
        "| B x T | peer | our step, ms | peer's, ms | step, ours over theirs | peak memory, MiB | over theirs |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for one in found:
        train, ratios = one["train"], one.get("ratios", {})
        mine = [row["gpt2exp"] for row in one["rounds"]]
        size = f"{train['batch_size']} x {train['seq_len']}"
        if train["activation_checkpointing"] is True:
            size += ", recomputed"
        step, peak = (statistics.median(row[key] for row in mine) for key in ("ms_median", "peak_rss_mib"))
        cells = [size, next(iter(ratios), "none"), f"{step:,.0f}"]
        for name, ratio in ratios.items():
            theirs = statistics.median(row[name]["ms_median"] for row in one["rounds"])
            pairs = ratio["ms_median"]
            cells += [f"{theirs:,.0f}", f"{pairs['median']:.2f} ({pairs['min']:.2f} to {pairs['max']:.2f})"]
            cells += [f"{peak:,.0f}", f"{ratio['peak_rss_mib']['median']:.2f}"]
        cells += ["", "", f"{peak:,.0f}", ""] if not ratios else []
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([f"{found[0]['processor']}; fp32, GPT-2 124M.", "", *rows])


def floor_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The step against the machine's own limits, and where a profiled step's time goes."""
    found = [one for one in found if "roofline" in one]
    sizes = [f"{one['train']['batch_size']} x {one['train']['seq_len']}" for one in found]
    rows = [f"| | {' | '.join(sizes)} |", f"|---|{'--:|' * len(found)}"]
    roofs = [one["roofline"] for one in found]
    limits = (("matrix products alone, ms", "matmul_ms"), ("AdamW on one flat tensor, ms", "adamw_ms"))
    for label, key in (*limits, ("floor, ms", "floor_ms"), ("step, ms", "step_ms")):
        rows.append(f"| {label} | {' | '.join(f'{roof[key]:,.0f}' for roof in roofs)} |")
    rows.append(f"| floor over step | {' | '.join(format(roof['fraction'], '.2f') for roof in roofs)} |")
    for kind in sorted(roofs[0]["parts"], key=lambda kind: -roofs[0]["parts"][kind]):
        shares = [roof["parts"][kind] / sum(roof["parts"].values()) for roof in roofs]
        rows.append(f"| profiled: {kind} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    return "\n".join(rows)


def publish_bench() -> None:
    """Rewrite the tables of the finding."""
    replace_block(HERE / "throughput" / "bench" / "README.md", "bench", bench_tables())


# --- the configuration -----------------------------------------------------------------------------------------------


def key_tables() -> str:
    """Every key of the schema with its default and its help, a table a section."""
    tables: dict[str, list[str]] = {}
    for key, default, help in options():
        section = key.rpartition(".")[0] or "Keys without a section"
        rows = tables.setdefault(section, [f"### {section}", "", "| key | default | what it is |", "|---|---|---|"])
        escaped = help.replace("|", r"\|")
        rows.append(f"| `{key}` | `{show(default)}` | {escaped} |")
    return "\n\n".join("\n".join(rows) for rows in tables.values())


# --- what a comparison of one axis does not say ----------------------------------------------------------------------


def equal_parameters(runs: Sequence[Run]) -> str:
    """The untied model of half the width against the tied one, paired by seed."""
    tied, untied = (
        {run["seed"]: run for run in having(runs, f"model.tie_weights={tie}", f"model.n_embd={width}")}
        for tie, width in (("true", 64), ("false", 32))
    )
    gaps = [float(untied[seed]["val_loss"]) - float(tied[seed]["val_loss"]) for seed in tied]
    found = inference.fixed(gaps)
    sizes = [f"{int(next(iter(arm.values()))['parameters']):,}" for arm in (untied, tied)]
    return (
        f"At nearly equal parameters, untied at width 32 ({sizes[0]}) against tied at width 64 ({sizes[1]}): "
        f"{found.mean:+.3f} nats (95 % interval {found.low:.3f} to {found.high:.3f}, n={found.n} seeds, "
        f"p={found.p:.2g})."
    )


def stream_growth(runs: Sequence[Run]) -> str:
    """How the residual stream grows at init, by depth and scaling, in a sentence."""
    key, told = "model.n_layer=", []
    words_of = (word for run in runs for word in run["overrides"].split())
    for depth in sorted({int(word.removeprefix(key)) for word in words_of if word.startswith(key)}):
        times = []
        for scaling, name in (("true", "with scaling"), ("false", "without")):
            alike = having(runs, f"{key}{depth}", f"init.residual_scaling={scaling}")
            first, last = (column(alike, f"stream_first_{where}") for where in ("embedded", "last_block"))
            times.append(f"{spread([b / a for a, b in zip(first, last, strict=True)], '.2f')} times {name}")
        told.append(f"at {depth} layers {' and '.join(times)}")
    return (
        "Before the first step the stream's root mean square grows from the embedding to the last block, "
        f"mean ± std over seeds, {', '.join(told)}."
    )


def duration(runs: Sequence[Run]) -> str:
    """How many seeds a sweep took that ended when it was answered, and how long."""
    began = [datetime.fromisoformat(run["started"]).timestamp() for run in runs]
    ended = [start + float(run["wall_total"]) for start, run in zip(began, runs, strict=True)]
    seeds = len({run["seed"] for run in runs})
    return f"It took {seeds} seeds, {len(runs)} runs, {(max(ended) - min(began)) / 60:.0f} minutes."


def unused_share(runs: Sequence[Run]) -> str:
    """How much of the fall is unused tokens, and which use steers the embedding."""
    fall = [float(run["loss_first"]) - float(run["loss_last"]) for run in runs]
    unseen = [float(run["loss_unseen_first"]) - float(run["loss_unseen_last"]) for run in runs]
    shares = [part / whole for part, whole in zip(unseen, fall, strict=True)]

    def lookup(when: str) -> list[float]:
        both = [(float(run[f"wte_grad_lookup_{when}"]), float(run[f"wte_grad_head_{when}"])) for run in runs]
        return [table / (table + head) for table, head in both]

    return (
        f"The loss fell by {spread(fall)} nats, of which unused tokens {spread(unseen)}: {spread(shares, '.1%')} "
        f"(n={len(runs)} seeds). Of the norms of the embedding's two gradients, the look-up's is "
        f"{spread(lookup('first'), '.1%')} before the first step and {spread(lookup('last'), '.1%')} before the last."
    )


def speed_table(runs: Sequence[Run]) -> str:
    """Speed, first step and memory by batch size."""
    rows = ["| batch | tokens/s | first step / median step | peak memory, MiB | n |", "|--:|--:|--:|--:|--:|"]
    for batch in (8, 16, 17, 24):
        alike = having(runs, f"train.batch_size={batch}")
        ratio = [float(run["first_step_ms"]) / float(run["step_ms"]) for run in alike]
        memory = [float(run["peak_memory_bytes"]) / 2**20 for run in alike]
        cells = [spread(column(alike, "tokens_per_second"), ".1f"), spread(ratio, ".2f"), spread(memory, ".0f")]
        rows.append(f"| {batch} | {' | '.join(cells)} | {len(alike)} |")
    return "Mean ± std over seeds:\n\n" + "\n".join(rows)


EXTRAS: dict[str, list[Callable[[Sequence[Run]], str]]] = {
    "weight_tying": [equal_parameters],
    "weight_tying/until": [duration],
    "init_std/until": [duration],
    "residual_scaling": [stream_growth],
    "residual_scaling/gpt2": [stream_growth],
    "first_steps": [unused_share],
    "throughput": [speed_table],
}


# --- reading a finding -----------------------------------------------------------------------------------------------


def runs_of(study: str) -> list[Run]:
    """The rows of a study's record: of `NAME/PART` those of `NAME/PART.csv`."""
    with Record(study).stem.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def facts(study: str, run: Run) -> dict[str, Any]:
    """What a record holds of a run by dotted key: what all its runs share, and its own."""
    told = json.loads(Record(study).stem.with_suffix(".json").read_text())
    return told["shared"] | {key: json.loads(text) for key, text in run.items() if "." in key and text}


def effect(study: str, key: str, arm: str, metric: str) -> Run:
    """One row of a study's results."""
    with Record(study).results.open(newline="") as file:
        rows = csv.DictReader(file)
        return next(row for row in rows if (row["key"], row["arm"], row["metric"]) == (key, arm, metric))


def having(rows: Sequence[Run], *overrides: str) -> list[Run]:
    """The runs that were started with these overrides, `True` and `true` being one value."""
    return [row for row in rows if set(overrides) <= set(row["overrides"].lower().split())]


def column(rows: Sequence[Run], key: str) -> list[float]:
    """A figure of every run."""
    return [float(row[key]) for row in rows]


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Mean and standard deviation over runs."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def main(argv: list[str]) -> None:
    """See the module's docstring."""
    if argv[:1] == ["bench"]:
        publish_bench()
    elif argv[:1] == ["keys"]:
        replace_block(HERE.parent / "conf" / "README.md", "keys", key_tables())
    elif argv[:1] == ["findings"]:
        publish_findings()
    else:
        publish(argv[0], [Path(text) for text in argv[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
