"""`sweep.reuse`: an earlier run that equals a job of the sweep is taken, and the job is not run. No torch.

The job's folder gets a copy of that run's record. The run itself stays as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2exp.files import replacing, write_json
from gpt2exp.run import record
from gpt2exp.schema import flatten, plain
from gpt2exp.section import BadRequest, home, show
from gpt2exp.sweep.composing import Job

COMPUTING = ("code", "torch", "numpy", "tiktoken")  # a run's losses may depend on the versions of these


def found(jobs: Sequence[Job], texts: Mapping[tuple[Any, ...], str], own: Path) -> tuple[list[Job], list[str]]:
    """The jobs, each with the earlier run that is taken for it, if any; and lines that say which runs were taken.

    A run is taken if it ended and its configuration, its text and the versions in `COMPUTING` are the job's. Keys that
    change no result may differ. If it ran on other hardware or beside other runs, its speed is not compared.

    Args:
        jobs: The jobs to do. Their `sweep.reuse` names the folders to search.
        texts: The sha256 of each `data.text`.
        own: The sweep's own folder, whose runs are not earlier ones.

    Raises:
        BadRequest: a folder is not there, or holds no run.
    """
    from gpt2exp.compare.comparison import contended
    from gpt2exp.compare.rows import read, with_todays_keys

    places = list(dict.fromkeys(place for job in jobs for place in job.config.sweep.reuse))
    wanted = [(job, flatten(plain(job.config))) for job in sorted(jobs, key=lambda job: job.folder)]
    taken, lines, now = dict[str, dict[str, Any]](), list[str](), record.facts()["versions"] if places else {}
    for place in places:
        try:
            rows = [with_todays_keys(row) for row in read([Path(home(place))])]
        except BadRequest as error:
            raise BadRequest(f"sweep.reuse={place}: {str(error).partition(': ')[2]}") from error
        shared, hindered, before = contended([row for row in rows if "config" in row]), Counter[str](), len(taken)
        for row in sorted(rows, key=lambda row: str(row.get("started")), reverse=True):
            if own.resolve() in Path(row["folder"]).parents:
                continue
            job, hindrance = _match(row, wanted, texts, now)
            if job.folder in taken and not hindrance:
                hindrance = "another run of the same settings and seed is taken"
            if hindrance:
                hindered[hindrance] += 1
            else:
                taken[job.folder] = {"from": row["folder"], "shared": row["folder"] in shared}
        lines.append(f"{len(taken) - before} of {len(rows)} runs are taken from {place}, and not run")
        lines += [f"{place}: not taken, {count}: {hindrance}" for hindrance, count in hindered.most_common()]
    return [replace(job, reused=taken.get(job.folder, {})) for job in jobs], lines


def _match(
    row: Mapping[str, Any],
    wanted: Sequence[tuple[Job, dict[str, Any]]],
    texts: Mapping[tuple[Any, ...], str],
    now: Mapping[str, str],
) -> tuple[Job, str]:
    """The job most like a run, and how they differ; an empty text if they do not.

    `now`: the versions in this process.
    """
    if row["state"] not in ("done", "diverged") or "versions" not in row:
        return wanted[0][0], f"its state is {row['state']}"
    has = flatten(row["config"]) | {key: f"{show(value)} (no key today)" for key, value in row.get("gone", {}).items()}
    differ = [[key for key in has.keys() | of.keys() if has.get(key) != of.get(key)] for _, of in wanted]
    at = min(range(len(wanted)), key=lambda number: len(differ[number]))
    job, of = wanted[at]
    if differ[at]:
        each = (f"{key}={show(has.get(key))}, here {show(of.get(key))}" for key in sorted(differ[at]))
        return job, "; ".join(each)
    if row["data"]["sha256"] != texts[job.config.data.text]:
        return job, "it was trained on another text (sha256)"
    for name in COMPUTING:
        then = row["versions"].get(name, "not recorded")
        if then != now[name]:
            return job, f"{'the code of gpt2exp' if name == 'code' else name} was {then}, here {now[name]}"
    return job, ""


def take(job: Job, folder: Path) -> None:
    """Copy the record of the run taken for a job into the job's folder; `summary.json`, by which it is done, last."""
    source = Path(job.reused["from"])
    summary = {**record.read_summary(source), "overrides": list(job.overrides), "config": plain(job.config)}
    for name in ("metrics.jsonl", "status.json"):
        if (source / name).is_file():
            with replacing(folder / name) as part:
                part.write_bytes((source / name).read_bytes())
    write_json(folder / "summary.json", {**summary, "reused": dict(job.reused)})
