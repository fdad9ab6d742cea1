"""Says when a sweep that runs until it is answered ends, and what a number of seeds could tell. No torch.

The end depends only on what was decided before the first run (`sweep.json`) and on the runs that have ended. So a
sweep that was killed and resumed, or whose seeds end out of order, ends at the same seed with the same verdicts.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpt2exp.compare.comparison import Comparison, Row, at_looks, compare, read
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.inference import LARGEST, Inference, reach, tells, upper_std
from gpt2exp.compare.tuned import separate
from gpt2exp.compare.words import amounts, counted, spell, subject
from gpt2exp.run import record
from gpt2exp.section import BadRequest, show

ENDED = ("done", "diverged", "failed")  # states of runs that have ended
COUNTS = (3, 5, 10, 20)  # numbers of seeds of which `prior` says what they can tell


@dataclass(frozen=True)
class Progress:
    """How far a sweep is. It has got past a seed once all runs of this and all earlier seeds have ended."""

    seeds: int = 0  # how many it has got past
    effects: Sequence[Effect] = ()  # the loss of each arm against its baseline, over those seeds
    why: str = ""  # why the sweep ends with them; empty if it goes on

    def lines(self, most: int) -> list[str]:
        """Each arm's interval in a line, and about how many seeds more it will take; then why the sweep ends."""
        said = []
        for one in self.effects:
            difference, interval = amounts(one)
            more = f", more than {most} seeds in all" * (one.verdict == "inconclusive")
            if one.n_needed is not None:
                more = f", about {counted(one.n_needed - one.n_seeds, 'more seed')}"
            verdict = (one.verdict or one.reason).replace("_", " ")
            arms = f"{subject(one.key, one.arm)} against {one.baseline}" + f" at {one.budget}" * bool(one.budget)
            said.append(f"seed {self.seeds} of at most {most}: {arms}: {difference} ({interval}) nats, {verdict}{more}")
        return said + [f"seed {self.seeds} is the last: {self.why}"] * bool(self.why)


def decide(known: record.Sweep, rows: Sequence[Row]) -> Progress:
    """Whether a sweep ends, and at which seed; else how far it is.

    It looks at the seeds 1 to n, for each n from the first declared look on. It ends at the first n at which each arm
    is answered. More seeds do not answer an arm that cannot be compared, so that counts as answered too.
    """
    ended = {Path(row["folder"]).name: row for row in rows if row["state"] in ENDED}
    whole = itertools.takewhile(lambda names: ended.keys() >= {*names}, known.by_seed.values())
    names = list(itertools.islice(whole, known.rule["max_seeds"]))
    numbers, found = range(known.looks[0], len(names) + 1), Progress(len(names))
    with contextlib.suppress(BadRequest):  # the comparison at the sweep's end says why the runs cannot be compared
        looks = at_looks([ended[name] for name in itertools.chain(*names)], numbers) if numbers else []
        for n, effects in zip(numbers, looks, strict=True):
            found = Progress(n, effects)
            asked = [one for one in effects if not one.control] or effects
            if all(one.verdict not in (None, "inconclusive") for one in asked):
                return replace(found, why="every arm has its verdict")
    hours = known.rule["max_hours"]
    if len(names) == known.rule["max_seeds"]:
        return replace(found, why="sweep.max_seeds is reached")
    over = names and hours is not None and time.time() - known.launched > 3600 * hours
    return replace(found, why=f"sweep.max_hours={show(hours)} is over") if over else found


def progress(sweep: Path) -> Progress:
    """How a sweep that runs until it is answered stands."""
    known, rows = record.Sweep.read(sweep), list[Row]()
    with contextlib.suppress(BadRequest):  # no run has begun
        rows, _ = separate(read([sweep]))
    return decide(known, rows) if known and known.looks else Progress()


def compared(rows: Sequence[Row], *, margin: float | None = None, out: Path | None = None) -> Comparison:
    """The comparison of runs; of a sweep that runs until it is answered, up to its last seed and with its rule."""
    runs, trials = separate(rows)
    sweeps = {Path(row["folder"]).parent for row in runs}
    known = record.Sweep.read(next(iter(sweeps))) if len(sweeps) == 1 else None
    if known is None or not known.looks:
        return compare(rows, margin=margin, out=out)
    at, there = decide(known, runs), {Path(row["folder"]).name for row in runs}
    beyond = list(known.by_seed.items())[at.seeds :] if at.why else []
    late = {name for _, names in beyond for name in names}
    kept = [row for row in runs if Path(row["folder"]).name not in late]
    comparison = compare([*kept, *trials], margin=margin, out=out)
    axes, nats = ", ".join(known.rule["axes"]), known.rule["margin"]
    within = "no margin" if nats is None else f"a margin of ±{nats:g} nats"
    rule = f"decided before the first run: seeds 1, 2, 3, ... until each arm of {axes} has a verdict, with {within}"
    rule += f" and a look after every seed from {known.looks[0]} to {known.looks[-1]}"
    more = f"; later up to {most}" if (most := known.rule["max_seeds"]) > known.looks[-1] else ""
    comparison.notes[:0] = [rule + more, f"after {at.seeds} seeds {f'it ended: {at.why}' if at.why else 'it goes on'}"]
    if left := ", ".join(str(seed) for seed, names in beyond if there & {*names}):
        comparison.notes.append(f"seeds begun by then, left out of the comparison: {left}")
    return comparison


def prior(folder: Path, looks: Sequence[int]) -> list[dict[str, str]]:
    """What each number of seeds can tell, by the std of an earlier sweep's differences: rows of a table.

    In brackets, the same by the upper 80 % limit of that std. `looks`: those of the declared design.

    Raises:
        BadRequest: the folder holds no arms with two seeds or more.
    """
    try:
        (earlier,) = at_looks(read([folder]), [LARGEST])
    except BadRequest as error:
        raise BadRequest(f"sweep.prior={folder}: {str(error).removeprefix(f'{folder}: ')}") from error
    designs: dict[Inference, tuple[int, ...]] = {"fixed": COUNTS, "declared": tuple(looks)}
    table = list[dict[str, str]]()
    for one in (effect for effect in earlier if len(effect.differences) > 1):
        std = statistics.stdev(one.scaled)
        both = std, upper_std(std, len(one.differences))
        for design, at in designs.items():
            told = {
                str(n): "{} ({})".format(*(spell(tells(each, n, reach(n, design, at))) for each in both))
                for n in COUNTS
                if n in at
            }
            row = {"run": f"{subject(one.key, one.arm)} against {one.baseline}", "seeds": design}
            table.append(row | dict.fromkeys(map(str, COUNTS), "–") | told)
    if not table:
        raise BadRequest(f"sweep.prior={folder}: no arm in it has two seeds or more; name a sweep over several seeds")
    return table
