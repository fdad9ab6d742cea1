"""How often each way to infer errs when one looks after every seed, and how many seeds it takes: by simulation.

`python experiments/sequential/simulate.py` writes the CSV files and the tables of the page beside it.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gpt2exp.compare.inference import (
    ALPHA,
    POWER,
    Floats,
    Inference,
    e_values,
    moments,
    nominal,
    nominal_p,
    power_to_tell,
    reach,
)

sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import replace_block, write_rows

FOLDER = Path(__file__).parent
FIRST, MOST = 3, 30
"""Looks are after every seed from the first to the last of these."""
Row = dict[str, str]
NOISES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails (t, 5 d.f.)": lambda rng, shape: rng.standard_t(5, shape),
    "skewed (exponential)": lambda rng, shape: rng.exponential(1, shape) - 1,
}
PROCEDURES: dict[str, tuple[Inference, int]] = {
    "t test at every look": ("fixed", MOST),
    "declared, at most 10": ("declared", 10),
    "declared, at most 20": ("declared", 20),
    "declared, at most 30": ("declared", 30),
    "open-ended": ("open", MOST),
}


def looks(most: int) -> tuple[int, ...]:
    """The looks of a sweep of at most so many seeds."""
    return tuple(range(FIRST, most + 1))


def outside(differences: Floats, inference: Inference, most: int) -> np.ndarray:
    """For each sweep (a row) and look, whether zero is outside the interval; shape (sweeps, looks)."""
    path = moments(differences[:, :most])
    if inference == "open":
        return (e_values(path.share) > 1 / ALPHA)[:, FIRST - 1 :]
    level = nominal(looks(most)) if inference == "declared" else ALPHA
    return (nominal_p(path.share) < level)[:, FIRST - 1 :]


def errors(sweeps: int, seed: int) -> list[Row]:
    """Of null sweeps, by noise and procedure: the share that errs at any look, and the coverage at each."""
    rows = []
    for noise, draw in NOISES.items():
        differences = draw(np.random.default_rng(seed), (sweeps, MOST))
        for name, (inference, most) in PROCEDURES.items():
            wrong = outside(differences, inference, most)
            rows.append(
                {
                    "noise": noise,
                    "procedure": name,
                    "sweeps": str(sweeps),
                    "err": f"{wrong.any(axis=1).mean():.4f}",
                    "least_coverage": f"{1 - wrong.mean(axis=0).max():.4f}",
                }
            )
    return rows


def seeds(sweeps: int, seed: int, effects: Sequence[float] = (0.5, 1, 2, 3)) -> list[Row]:
    """By effect, in paired standard deviations: seeds of the fixed design, and of sweeps stopped at an answer.

    Each sequential design has the least maximum with which it answers as often as the fixed one.
    """
    rows = []
    for effect in effects:
        fixed = next(n for n in range(2, 100) if power_to_tell(effect, 1, n, reach(n, "fixed")) >= POWER)
        power = power_to_tell(effect, 1, fixed, reach(fixed, "fixed"))
        differences = np.random.default_rng(seed).standard_normal((sweeps, max(3 * fixed, MOST))) + effect
        ends = {"design": "fixed", "most": str(fixed), "answered": f"{power:.3f}", "mean_seeds": str(fixed)}
        found = [ends]
        for design in ("declared", "open"):
            every = (stopped(differences, design, most) for most in range(max(fixed, FIRST), differences.shape[1] + 1))
            found.append(next(ends for ends in every if float(ends["answered"]) >= power))
        found += [stopped(differences, design, MOST) for design in ("declared", "open")]
        rows += [{"effect": f"{effect:g}", **ends} for ends in found]
    return rows


def stopped(differences: Floats, design: Inference, most: int) -> Row:
    """Sweeps that end at the first look with zero outside the interval, or at the most."""
    answered = outside(differences, design, most)
    any_look = answered.any(axis=1)
    ends = np.where(any_look, answered.argmax(axis=1) + FIRST, most)
    return {
        "design": design,
        "most": str(most),
        "answered": f"{any_look.mean():.3f}",
        "mean_seeds": f"{ends.mean():.1f}",
    }


def equal(sweeps: int, seed: int, margins: Sequence[float] = (1, 2)) -> list[Row]:
    """Sweeps called indistinguishable, by margin in paired stds, at no difference and at one of the margin's size."""
    noise = np.random.default_rng(seed).standard_normal((sweeps, MOST))
    rows = []
    for margin in margins:
        for design in ("declared", "open"):
            times = np.array([reach(n, design, looks(MOST)) for n in looks(MOST)])
            found = []
            for difference in (0, margin):
                path = moments(noise + difference)
                inside = np.abs(path.mean[:, FIRST - 1 :]) + times * path.error[:, FIRST - 1 :] <= margin
                any_look = inside.any(axis=1)
                found.append((any_look.mean(), np.where(any_look, inside.argmax(axis=1) + FIRST, MOST).mean()))
            (right, mean_seeds), (wrong, _) = found
            rows.append({"margin": f"{margin:g}", "design": design, "called": f"{right:.3f}"})
            rows[-1] |= {"mean_seeds": f"{mean_seeds:.1f}", "called_at_the_margin": f"{wrong:.4f}"}
    return rows


def tables(error_rows: Sequence[Row], seed_rows: Sequence[Row], equal_rows: Sequence[Row]) -> str:
    """The page's tables, in Markdown."""
    lines = [f"| procedure | {' | '.join(f'errs: {noise}' for noise in NOISES)} | least coverage at one look, normal |"]
    lines.append("|---|" + "--:|" * (len(NOISES) + 1))
    for procedure in PROCEDURES:
        of = {row["noise"]: row for row in error_rows if row["procedure"] == procedure}
        cells = [f"{float(of[noise]['err']):.1%}" for noise in NOISES]
        lines.append(f"| {procedure} | {' | '.join(cells)} | {float(of['normal']['least_coverage']):.1%} |")
    lines += [
        "",
        "| effect, paired stds | fixed | declared | open-ended | declared, at most 30 | open-ended, at most 30 |",
    ]
    lines.append("|--:|--:|--:|--:|--:|--:|")
    for effect in dict.fromkeys(row["effect"] for row in seed_rows):
        cells = [
            f"{row['mean_seeds']} of {row['most']}, {float(row['answered']):.1%}"
            for row in seed_rows
            if row["effect"] == effect
        ]
        lines.append(f"| {effect} | {' | '.join(cells)} |")
    lines += [
        "",
        "| margin, paired stds | design | called at no difference | mean seeds | called at the margin itself |",
    ]
    lines.append("|--:|---|--:|--:|--:|")
    for row in equal_rows:
        called, wrong = float(row["called"]), float(row["called_at_the_margin"])
        lines.append(f"| {row['margin']} | {row['design']} | {called:.0%} | {row['mean_seeds']} | {wrong:.1%} |")
    return "\n".join(lines)


def read(name: str) -> list[Row]:
    """The committed rows."""
    with (FOLDER / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


FILES: dict[str, Callable[[], list[Row]]] = {
    "errors.csv": lambda: errors(200_000, 15),
    "seeds.csv": lambda: seeds(20_000, 15),
    "equal.csv": lambda: equal(20_000, 15),
}


def main() -> None:
    """Simulate, and write the page's figures."""
    for name, simulate in FILES.items():
        write_rows(FOLDER / name, simulate())
    replace_block(FOLDER / "README.md", "tables", tables(*map(read, FILES)))


if __name__ == "__main__":
    main()
