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

    `looks`: as `Comparison.looks`. `schedule`: the numbers of seeds at which looks were declared (`sweep.json`). If the
    runs are of several sweeps and one declared looks, it is (0,), which fits no look: a design is of one sweep alone.
    """

    looks: list[dict[str, Any]]
    schedule: tuple[int, ...]

    def infer(self, values: Sequence[float], key: str, arms: Sequence[str]) -> tuple[Interval, list[int]]:
        """The interval of these arms' differences, and the numbers of seeds at the looks that count.

        If looks were declared, all of these count. Else an earlier look at these arms counts if more seeds were planned
        after it. So a look at a sweep that was still running, or was broken off, does not count by itself.
        """
        n = len(values)
        earlier = [look for look in self.looks if 1 < look["seeds"] < n and look["planned"] < n]
        looks = sorted({look["seeds"] for look in earlier if {*arms} <= {*look["arms"].get(key, ())}})
        found = infer(values, looks, self.schedule)
        return found, list(self.schedule) if found.inference == "declared" else looks


def history(rows: Sequence[Row], grid: Grid, out: Path | None = None) -> History:
    """The comparisons of these runs: those recorded in their sweeps and in the folder `out`, then this one."""
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
    """The looks that an earlier comparison recorded; if it is of a version that recorded none, it is the only look."""
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
