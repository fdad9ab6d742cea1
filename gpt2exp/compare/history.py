"""How often runs were compared before the last of them was planned: an interval depends on it. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2exp.compare.inference import Interval, infer
from gpt2exp.compare.rows import Grid, Row
from gpt2exp.run.record import Sweep


@dataclass(frozen=True)
class History:
    """The comparisons so far.

    `looks`: as `Comparison.looks`. `schedule`: the numbers of seeds at which looks were declared (`sweep.json`). If one
    of several sweeps declared looks, it is (0,): the design of one sweep does not hold for all, and no look is at 0.
    """

    looks: list[dict[str, Any]]
    schedule: tuple[int, ...]

    def infer(self, values: Sequence[float], key: str, arms: Sequence[str]) -> tuple[Interval, list[int]]:
        """The interval of these arms' differences, and the numbers of seeds at which looks count.

        Those are all declared looks, or the earlier looks at these arms before this many seeds were planned. A look at
        a sweep that still ran, or was broken off, does not count if the seeds planned by then are all there are now.
        """
        n = len(values)
        earlier = [look for look in self.looks if 1 < look["seeds"] < n and look["planned"] < n]
        looks = sorted({look["seeds"] for look in earlier if {*arms} <= {*look["arms"].get(key, ())}})
        found = infer(values, looks, self.schedule)
        return found, list(self.schedule) if found.inference == "declared" else looks


def history(rows: Sequence[Row], grid: Grid, out: Path | None = None) -> History:
    """The comparisons of some runs: those that their sweeps and the folder `out` have, and this one as the last."""
    sweeps = dict.fromkeys(Path(row["folder"]).parent for row in rows)
    folders = dict.fromkeys([*sweeps, *([out.resolve()] if out else [])])
    looks = [look for folder in folders for look in _looks(folder / "comparison.json")]
    planned, schedule = {f"seed={seed}" for seed, _ in grid.planned}, tuple[int, ...]()
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # another program's sweep.json
        for known in filter(None, map(Sweep.read, sweeps)):
            planned |= {text for job in known.jobs for text in job if text.startswith("seed=")}
            declared = tuple(map(int, known.looks))
            schedule = declared if len(sweeps) == 1 else (0,) if declared else schedule
    looks.append({"seeds": len(grid.seeds), "planned": len(planned), "arms": dict(grid.axes)})
    return History([look for at, look in enumerate(looks) if look not in looks[:at]], schedule)


def _looks(path: Path) -> list[dict[str, Any]]:
    """The looks that an earlier comparison recorded; one of an older version is a look itself."""
    with contextlib.suppress(OSError, KeyError, TypeError, ValueError, AttributeError):  # none, or another program's
        old: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        seeds = {run["seed"] for run in old["runs"] if "seed" in run}
        itself = {"seeds": len(old["seeds"]), "planned": len(seeds), "arms": old["swept"]}
        return [
            {name: int(look[name]) for name in ("seeds", "planned")}
            | {"arms": {key: list(arms) for key, arms in look["arms"].items()}}
            for look in old.get("looks", [itself])
        ]
    return []
