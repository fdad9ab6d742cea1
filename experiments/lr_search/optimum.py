"""The optimum of a search, and how sure it is: `python experiments/lr_search/optimum.py SWEEP`.

SWEEP is a finished sweep over one numeric key (`hydra/sweeper=lr_search`, or any list of values), or what
`gpt2exp-compare` wrote of one. A parabola in the key's logarithm is fitted to the losses of the values nearest to the
best; it prints where that is least, with a 95 % interval, and the sweep over seeds that makes it surer.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

FEWEST = 5
"""Values a parabola is fitted to: they leave two degrees of freedom."""


def vertex(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Where the parabola of least squares is least, with its 95 % interval: (low, at, high).

    The interval is the delta method's: the vertex -b/2c as a function of the fitted b and c, with their covariance.
    None if the parabola has no least, or not between the points.
    """
    places, centre = np.array(x), float(np.mean(x))  # centred, or the columns would be nearly parallel
    (c, b, _), covariance = np.polyfit(places - centre, y, 2, cov=True)
    at = centre - b / (2 * c)
    if c <= 0 or not places.min() <= at <= places.max():
        return None
    slope = np.array([b / (2 * c**2), -1 / (2 * c), 0])
    reach = float(stdtrit(len(x) - 3, 0.975)) * math.sqrt(float(slope @ covariance @ slope))
    return at - reach, float(at), at + reach


def optimum(comparison: dict[str, Any]) -> str:
    """What a `comparison.json` says of its search.

    Raises:
        ValueError: it is no sweep over one key with at least five numbers above 0 and their losses.
    """
    keys, metric = list(comparison["swept"]), comparison["metric"]
    if len(keys) != 1:
        raise ValueError(f"a search is over one key, not {', '.join(keys) or 'none'}")
    tried = {}
    for row in comparison["runs"]:
        told = dict(text.lstrip("+").split("=", 1) for text in row["overrides"])
        if row["state"] == "done" and row.get(metric) is not None:
            tried[math.log(float(told[keys[0]]))] = float(row[metric]), row
    if len(tried) < FEWEST:
        raise ValueError(f"{len(tried)} values with a loss; {FEWEST} are needed")
    best = min(tried, key=lambda x: tried[x][0])
    near = sorted(tried, key=lambda x: abs(x - best))[: max(FEWEST, len(tried) // 2)]
    loss, row = tried[best]
    text = f"of {len(tried)} values tried, {keys[0]}={math.exp(best):.3g} ended with the least {metric}, {loss:.4f}"
    found = vertex(near, [tried[x][0] for x in near])
    if found is None:
        return f"{text}; the least is not between the values around it: search beyond them"
    low, at, high = (f"{math.exp(x):.3g}" for x in found)
    text += f"; a parabola in its logarithm through the {len(near)} values nearest to it is least at {at}"
    kept = [word for word in row["overrides"] if word.lstrip("+").partition("=")[0] not in (keys[0], "seed")]
    arms = ",".join(dict.fromkeys((low, at, high)))
    surer = shlex.join(["gpt2exp", "-m", "seed=1,2,3,4,5", f"{keys[0]}={arms}", *kept])
    return f"{text} (95 % interval {low} to {high}); to be surer: {surer}"


if __name__ == "__main__":
    try:
        print(optimum(json.loads((Path(sys.argv[1]) / "comparison.json").read_text(encoding="utf-8"))))
    except (IndexError, OSError, ValueError, KeyError) as error:
        sys.exit(f"optimum.py SWEEP: {error}")
