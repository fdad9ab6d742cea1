"""How often runs were compared before the last of them was planned: what an interval needs to know. No torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2exp.run import record


@dataclass(frozen=True)
class History:
    """What was looked at, and what was declared, before the seeds there are now were all run.

    `looks`: as `Comparison.looks`. `schedule`: numbers of seeds at which looks were declared, by `sweep.json`;
    of several sweeps of which one declared looks a 0: no number of seeds is one then.
    """

    looks: list[dict[str, Any]]
    schedule: tuple[int, ...]

    def of(self, n: int, key: str, arms: Sequence[str]) -> list[int]:
        """Numbers of seeds at which these arms were compared before as many as n were planned.

        A look at a sweep that was broken off, or still ran, changes nothing if it ends with the seeds planned by then.
        """
        return sorted(
            {
                look["seeds"]
                for look in self.looks
                if 1 < look["seeds"] < n and look["planned"] < n and {*arms} <= {*look["arms"].get(key, ())}
            }
        )


def history(
    sweeps: Sequence[Path], arms: Mapping[str, list[str]], seeds: int, planned: Iterable[int], out: Path | None
) -> History:
    """Of the runs in some sweeps, by their `comparison.json` and `sweep.json` and an earlier comparison in `out`.

    This comparison is the last look: at that many `seeds` with these `arms`, when the seeds `planned` had a folder.
    """
    folders = dict.fromkeys([*sweeps, *([out.resolve()] if out else [])])
    looks = [look for folder in folders for look in _looks(_json(folder / "comparison.json"))]
    asked, schedule = {f"seed={seed}" for seed in planned}, tuple[int, ...]()
    with contextlib.suppress(AttributeError, TypeError, ValueError):  # another program's
        for sweep in sweeps:
            request = _json(sweep / record.SWEEP)
            asked |= {text for job in request.get("jobs", []) for text in job if text.startswith("seed=")}
            declared = tuple(map(int, request.get("looks", [])))
            schedule = declared if len(sweeps) == 1 else (0,) if declared else schedule
    looks.append({"seeds": seeds, "planned": len(asked), "arms": dict(arms)})
    return History([look for at, look in enumerate(looks) if look not in looks[:at]], schedule)


def _looks(old: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that an earlier comparison recorded; an older version's is one itself. None if it is another program's."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        seeds = {run["seed"] for run in old["runs"] if "seed" in run}
        itself = {"seeds": len(old["seeds"]), "planned": len(seeds), "arms": old["swept"]}
        return [
            {name: int(look[name]) for name in ("seeds", "planned")}
            | {"arms": {key: list(arms) for key, arms in look["arms"].items()}}
            for look in old.get("looks", [itself])
        ]
    return []


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
