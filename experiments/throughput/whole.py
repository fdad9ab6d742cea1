"""A whole command's time beside other programs', from start to exit.

    python experiments/throughput/whole.py JOB 'gpt2exp KEY=VALUE ...' NAME='COMMAND' ... --rounds 3

The commands run in turn, each in an empty folder of its own, so that a machine's drift meets all alike; ratios are
taken round by round. The rows of JOB in `bench/whole.csv` are replaced, and the table of `bench/README.md` is written
anew; with `--page` alone only that. Of absolute paths in the commands the last part is kept. The time of gpt2exp's
steps is the sum of `step_ms` in its runs' `metrics.jsonl`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import replace_block, write_rows

from gpt2exp.bench import spread
from gpt2exp.training.hardware import device_name

TABLE, PAGE = (Path(__file__).parent / "bench" / name for name in ("whole.csv", "README.md"))
OURS = "gpt2exp"


def timed(command: str) -> dict[str, Any]:
    """The seconds of a command, and of all steps that gpt2exp's runs in its folder took."""
    with tempfile.TemporaryDirectory() as folder:
        told = os.environ | {"WANDB_MODE": "offline"}
        start = time.perf_counter()
        done = subprocess.run(shlex.split(command), cwd=folder, env=told, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stderr[-2000:]}")
        files = Path(folder).rglob("metrics.jsonl")
        steps = [json.loads(line)["step_ms"] / 1e3 for file in files for line in file.read_text().splitlines()]
    return {"seconds": round(seconds, 2), "of_steps": round(sum(steps), 2) if steps else None}


def table(rows: list[dict[str, str]]) -> str:
    """Medians over the rounds with their range, a row a command."""
    lines = ["| job | command | seconds | gpt2exp's time over its | beside its steps, s |", "|---|---|--:|--:|--:|"]
    for job, name in dict.fromkeys((row["job"], row["name"]) for row in rows):
        own, ours = ([row for row in rows if row["job"] == job and row["name"] == one] for one in (name, OURS))
        seconds = [float(row["seconds"]) for row in own]
        ratio = spread([float(a["seconds"]) / b for a, b in zip(ours, seconds, strict=True)])
        rest = [float(row["seconds"]) - float(row["of_steps"]) for row in own if row["of_steps"]]
        cells = [job, name, f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"]
        cells.append("" if name == OURS else f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})")
        cells.append(f"{statistics.median(rest):.1f}" if rest else "")
        lines.append(f"| {' | '.join(cells)} |")
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]
        told = "; ".join(dict.fromkeys(f"{row['name']}: `{row['command']}`" for row in own))
        when = f"{own[0]['day']}, commit {own[0]['commit']}, {own[0]['processor']}"
        lines += ["", f"{job} ({when}, rounds: {own[-1]['round']}). {told}"]
    return "\n".join(lines)


def main() -> None:
    """Carry out a command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("job", nargs="?", help="what the table calls the work that all commands do")
    parser.add_argument("command", nargs="?", default=OURS, help="gpt2exp's, `gpt2exp KEY=VALUE ...`")
    parser.add_argument("others", nargs="*", metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the table")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if TABLE.is_file():
        with TABLE.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["job"] != args.job]
    if not args.page:
        commands = {OURS: args.command} | dict(one.split("=", 1) for one in args.others)
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        about = {"day": f"{time.strftime('%Y-%m-%d')}", "commit": commit.stdout.strip()}
        about["processor"] = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
        for number in range(args.rounds):
            for name, command in commands.items():
                found = timed(command)
                print(name, *found.values(), flush=True)
                words = [Path(word).name if word.startswith("/") else word for word in shlex.split(command)]
                own = {"job": args.job, "name": name, "command": shlex.join(words), "round": number + 1}
                rows.append(own | found | about)
        write_rows(TABLE, rows)
    with TABLE.open(newline="") as file:
        replace_block(PAGE, "whole", table(list(csv.DictReader(file))))


if __name__ == "__main__":
    main()
