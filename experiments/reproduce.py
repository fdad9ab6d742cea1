"""Do the findings' losses come out again? `python experiments/reproduce.py [STUDY ...]`, by default of every record.

Of each record it makes one run again, with the recorded configuration and seed, on as many threads, by the code of this
checkout, and compares the losses to the last digit. A processor of another kind adds in another order: there the
difference is told and no fault. Neither is one below 1e-6 nats, because validation has summed in another order since
28 November 2026. Runs from before `precision.library` multiply as then, by PyTorch's choice. `--run NAME` chooses
another run than the first. Exit code 1: a loss is another one on the processor of the record.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from publish import HERE, facts, runs_of

from gpt2exp.schema import is_housekeeping

LOSSES = ("loss_first", "loss_last", "loss_mean_last10", "val_loss")
AGAIN = """
import json, sys, gpt2exp
from gpt2exp.schema import parse, stored
config, lost = stored(json.loads(sys.argv[1]))
assert not lost, f"keys of another version: {lost}"
row = gpt2exp.run(parse(config), sys.argv[2])
assert row["state"] == "done", row["error"]
"""
"""A process of its own: the threads are those it starts with."""


def studies() -> list[str]:
    """Every record of the findings as `NAME` or `NAME/PART`."""
    found = [path for path in sorted(HERE.glob("*/*.json")) if path.with_suffix(".csv").is_file()]
    whole = [path for path in found if path.name == "runs.json" or "config.seed" in header(path.with_suffix(".csv"))]
    return [f"{path.parent.name}{'' if path.stem == 'runs' else f'/{path.stem}'}" for path in whole]


def header(path: Path) -> list[str]:
    """The names of a table's columns."""
    return path.read_text(encoding="utf-8").partition("\n")[0].split(",")


def again(known: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The summary of the same run, made here."""
    config: dict[str, Any] = {}
    for key, value in known.items():
        group, _, key = key.partition(".")
        if group == "config" and not is_housekeeping(key):
            *sections, name = key.split(".")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            section[name] = value
    config.setdefault("precision", {}).setdefault("library", "torch")  # of records from before there was a choice
    threads = str(known["threads"])
    told = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
    command = [sys.executable, "-c", AGAIN, json.dumps(config), str(folder)]
    subprocess.run(command, env=told, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def comes_out(study: str, name: str | None) -> bool:
    """Make a recorded run again and tell its losses; False if they differ on the processor of the record."""
    run = next(run for run in runs_of(study) if name in (None, run["name"]))
    known = facts(study, run)
    with tempfile.TemporaryDirectory() as folder:
        summary = again(known, Path(folder) / "run")
    most = max((summary[key] - float(run[key]) for key in LOSSES if run.get(key)), key=abs)
    elsewhere = "" if summary["device"] == known["device"] else f" (recorded on {known['device']})"
    print(f"{study}: {run['name']}: {f'differs by {most:+.2g} nats' if most else 'equal'}{elsewhere}", flush=True)
    return abs(most) < 1e-6 or bool(elsewhere)


def main() -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help="such as precision or weight_tying/gpt2")
    parser.add_argument("--run", metavar="NAME", help="the run of a record that is made again; the first by default")
    args = parser.parse_args()
    told = [comes_out(study, args.run) for study in args.studies or studies()]
    return int(not all(told))


if __name__ == "__main__":
    sys.exit(main())
