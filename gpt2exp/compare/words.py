"""A comparison in words: its numbers, sentences and tables, which every form of the report shows. No torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gpt2exp.compare.comparison import MEMORY, SPEED, Comparison, Distance, Interaction
from gpt2exp.compare.effect import Effect
from gpt2exp.compare.inference import LARGEST
from gpt2exp.compare.rows import cell_of
from gpt2exp.compare.tuned import typed
from gpt2exp.config import TOGETHER
from gpt2exp.run.metrics import BY_KEY, COLUMNS, number_of, shown
from gpt2exp.run.terminal import printable
from gpt2exp.section import override_key

SIGNS = {"better": "▲", "worse": "▼", "indistinguishable": "≈", "inconclusive": "?", "not_comparable": "–", "": "·"}
OTHERS = {"budget": "⇢", "interaction": "×", "from fp64": "↔"}  # signs of the sentences that are no verdicts
UNJUDGED = "unjudged"  # stands for the verdict in a row of what an arm is worth, which has none
WORTH = "compute, or steps alone: above 1 the arm is worth that many times the baseline's"  # how to read such a row


class Table(NamedTuple):
    """A table as text: rows by column name, the columns to align right, and notes below."""

    rows: list[dict[str, str]]
    numbers: Sequence[str]
    notes: Sequence[str] = ()


class Sentence(NamedTuple):
    """A finding in plain words; `verdict`: as `Effect.verdict`, or empty, or one of `OTHERS`."""

    verdict: str
    text: str


# --- numbers ---------------------------------------------------------------------------------------------------------


def spell(value: float, resolution: float = 0.0, *, sign: bool = False) -> str:
    """Format a number to two significant digits of its uncertainty `resolution` (of itself if 0).

    Below about 1e-5 the form is scientific.
    """
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"

    def exponent(of: float) -> int:
        """The power of ten of its first digit, after rounding to two digits."""
        return int(f"{of:.1e}".partition("e")[2])

    plus, decimals = "+" if sign else "", 1 - exponent(resolution if resolution > 0 else value)
    if decimals > 6:
        digits = min(max(0, exponent(value) + decimals), 3)
        mantissa, _, power = f"{value:{plus}.{digits}e}".partition("e")
        return f"{mantissa.replace('-', '−')}e{int(power)}"
    text = f"{value:{plus},.{max(0, decimals)}f}"
    rounded_to_nothing = not text.strip("+-0.,")
    return (text.lstrip("+-") if rounded_to_nothing else text).replace("-", "−")


def probability(value: float | None) -> str:
    """A p value as `=0.039` or `<0.001`; empty if unknown."""
    if value is None or value < 0.001:
        return "" if value is None else "<0.001"
    return f"={value:.2g}" if value < 0.995 else "=1"


def amounts(effect: Effect | Interaction, *, sign: bool = True) -> tuple[str, str]:
    """The difference (or ratio) and its 95 % interval as text, to the digits they are known to; empty where unknown.

    In nats, MiB or times the baseline's speed. Without `sign`, a fall is given as its size.
    """
    ratio = getattr(effect, "speed_ratio", None)
    mean = effect.mean_difference if ratio is None else ratio
    if mean is None:
        return "", ""
    values = [value / BY_KEY[effect.metric].scale for value in (mean, *(effect.ci95 or []))]
    resolution = (values[2] - values[1]) / 2 if effect.ci95 else 0.0
    resolution = resolution or abs(values[0]) / 10
    if ratio is not None:
        resolution = max(0.01, min(resolution, 0.5))  # a ratio to two or three decimals
    if mean < 0 and not sign:
        values = [-values[0], *(-bound for bound in reversed(values[1:]))]
    text, *bounds = (spell(value, resolution, sign=sign and ratio is None) for value in values)
    return text, " to ".join(bounds)


def worth(loss: Effect) -> tuple[str, str, str]:
    """What an arm is worth in the baseline's compute, or steps alone: which, how many times, the 95 % interval."""
    of, factor, interval = "compute", loss.compute_multiplier, loss.compute_multiplier_ci95
    if factor is None:
        of, factor, interval = "steps", loss.steps_factor, loss.steps_factor_ci95
    if factor is None:
        return "", "", ""
    low, high = interval or (None, None)
    resolution = max(0.01, min((high - low) / 2 if low is not None and high is not None else factor / 10, 0.5))
    text, *ends = (spell(value or 0.0, resolution) for value in (factor, low, high))
    if interval is None or None not in (low, high):
        return of, text, " to ".join(ends) if interval else ""
    return of, "–", f"below {ends[1]}" if high is not None else f"above {ends[0]}" if low is not None else "unknown"


def subject(key: str, arm: str) -> str:
    """`key=arm`; an arm of keys that move together says so itself."""
    return printable(arm if TOGETHER in key else f"{key}={arm}")


def deviations(effect: Effect) -> str:
    """The arm's seed-to-seed std, and the baseline's in brackets: a pooled one would hide that they differ."""
    arm, baseline = (deviation(std, effect.metric) for std in (effect.arm_std, effect.baseline_std))
    return f"{arm} ({baseline})" if arm and baseline else arm or baseline


def deviation(std: float | None, key: str) -> str:
    """A seed-to-seed std in the metric's unit, in per cent of the speed; empty if unknown."""
    if std is None:
        return ""
    metric = BY_KEY[key]
    return f"{spell(std * 100)} %" if metric.ratio else spell(std / metric.scale)


def counted(number: int, thing: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


# --- sentences -------------------------------------------------------------------------------------------------------


def findings(comparison: Comparison) -> list[Sentence]:
    """All that a comparison says in sentences: verdicts, interactions, distances from fp64."""
    distances = (Sentence("from fp64", distance_sentence(item)) for item in comparison.distances)
    return [*sentences(comparison), *interactions(comparison), *distances]


def sentences(comparison: Comparison) -> list[Sentence]:
    """A sentence for each arm: the loss first, then what it costs. If there are no arms, one for all runs."""
    if comparison.searched or not comparison.axes:
        text = _overview(comparison)
        return [Sentence("", text)] if text else []
    found, said = list[Sentence](), set[tuple[str, str]]()
    for effects in by_arm(comparison):
        loss = effects[comparison.metric]
        costs = "".join(_costs(effects, loss))
        if loss.tuning and (loss.key, loss.tuning) not in said:  # once an axis
            said.add((loss.key, loss.tuning))
            costs += f", {loss.tuning}"
        found.append(Sentence(loss.verdict or "", _sentence(loss, costs, comparison.margin)))
    return found


def by_arm(comparison: Comparison) -> Iterable[dict[str, Effect]]:
    """The effects of each arm in each budget, by metric."""
    arms: dict[tuple[str, str, str], dict[str, Effect]] = {}
    for effect in comparison.axes:
        arms.setdefault((effect.key, effect.arm, effect.budget), {})[effect.metric] = effect
    return arms.values()


def _sentence(loss: Effect, costs: str, margin: float | None) -> str:
    name, base = subject(loss.key, loss.arm), printable(loss.baseline)
    std = deviation(loss.seed_std, loss.metric)
    difference, interval = amounts(loss)
    size, size_interval = amounts(loss, sign=False)
    reason = printable(loss.reason).replace("the seed-to-seed std", f"the seed-to-seed std {std}".strip(), 1)
    tested = f"n={counted(loss.n_seeds, 'seed')}, p{probability(loss.p_holm)})"
    at = f"at {printable(loss.budget)} " * bool(loss.budget)
    if loss.control and loss.ci95 is None:
        return f"A/A check {at}without an answer: {reason}."
    if loss.control:
        failed = loss.verdict in ("better", "worse")
        text = f"A/A check {at}{'failed' if failed else 'passed'}: with another data order ({name}) the baseline"
        text += f" differs from itself by {difference} nats (95 % interval {interval}, {tested}"
        return f"{text}; one in twenty fails by chance, else doubt the verdicts below." if failed else f"{text}."
    if loss.verdict in ("better", "worse"):
        text = f"{name} is {loss.verdict} than {base} by {size} nats (95 % interval {size_interval}, {tested}"
        text += f", {reason}{costs}" if reason else costs
        text += "" if "seed-to-seed" in reason else f"; the seed-to-seed std is {deviations(loss) or std}"
    elif loss.verdict in ("indistinguishable", "inconclusive"):
        undecided = loss.verdict == "inconclusive"
        text = f"{name} against {base} is undecided" if undecided else f"{name} cannot be told apart from {base}"
        text += f": a difference of {difference} nats (95 % interval {interval}, {tested}{costs}; {reason}"
    elif loss.verdict == "not_comparable":
        text = f"{name} and {base} cannot be compared: {reason}{costs}"
    else:
        where = "above" if (loss.mean_difference or 0) > 0 else "below"
        text = f"{name} ended {size} nats {where} {base} ({reason}){costs}"
    return f"{at}{'; '.join([text, *_remarks(loss, margin)])}."


def _remarks(loss: Effect, margin: float | None) -> Iterable[str]:
    """Clauses: whether pairing lost, what the arm is worth, how the difference moves along the run, what is missing."""
    comparable = loss.verdict != "not_comparable"
    if comparable and loss.pair_correlation is not None and loss.pair_correlation < 0:
        yield "the two arms go against each other over the seeds (r below 0): unpaired runs would do better"
    of, factor, interval = worth(loss)
    if factor == "–":
        yield f"worth {interval} times the baseline's {of}"
    elif of:
        at = " at the baseline's final loss" if float(factor) > 1 else ""
        yield f"worth {factor} times the baseline's {of}{at}" + (f" (95 % interval {interval})" if interval else "")
    if comparable and loss.trend is not None:
        change, low, high = loss.trend
        late = "over the last half of the run the difference"
        near, far = sorted((abs(low), abs(high)))
        size, *ends = (spell(value, (far - near) / 2) for value in (abs(change), near, far))
        if low > 0 or high < 0:
            way = "grows" if (change > 0) == ((loss.mean_difference or 0) > 0) else "fades"
            yield f"{late} {way} by {size} nats (95 % interval {' to '.join(ends)})"
        elif margin is not None and far <= margin:
            yield f"{late} holds within ±{margin:g} nats"
    if loss.dropped_pairs:
        yield f"{counted(loss.dropped_pairs, 'pair')} dropped, since a run did not finish"


def _costs(effects: dict[str, Effect], loss: Effect) -> Iterable[str]:
    """Speed, memory and parameters of an arm, as clauses."""
    speed, memory = effects[SPEED.key], effects[MEMORY.key]
    if speed.speed_ratio is not None and speed.verdict != "not_comparable":
        ratio, interval = amounts(speed)
        if abs(speed.speed_ratio - 1) >= 0.01:
            ratio = spell(speed.speed_ratio, 0.5)
        yield f", at {ratio} {'times' if float(ratio) > 1 else 'of'} the speed"
        if speed.verdict not in ("better", "worse", None):
            yield f" ({interval}: {speed.verdict})"
    elif speed.reason and speed.reason != loss.reason:
        yield f"; speed not compared ({speed.reason})"
    if memory.verdict in ("better", "worse") and memory.mean_difference and memory.baseline_mean:
        share = abs(memory.mean_difference) / memory.baseline_mean
        if share >= 0.005:
            more = "more" if memory.mean_difference > 0 else "less"
            yield f", with {amounts(memory, sign=False)[0]} MiB ({share:.1%}) {more} memory"
    if extra := loss.parameters.get("arm", 0) - loss.parameters.get("baseline", 0):
        yield f", with {abs(extra):,} {'more' if extra > 0 else 'fewer'} parameters"


def _overview(comparison: Comparison) -> str:
    """For runs without arms: the best value of a search, or the mean loss over seeds; empty if none finished."""
    losses = ((number_of(row, comparison.metric), row) for row in comparison.runs if row["state"] == "done")
    tried = [(loss, row["overrides"]) for loss, row in losses if loss is not None]
    if not tried:
        return ""
    name = BY_KEY[comparison.metric].name
    if comparison.searched:
        ((key, _),), (loss, overrides) = comparison.swept.items(), min(tried)
        arm = next((text for text in overrides if override_key(text) == key), key)
        text = f"of {len(tried)} values tried, {printable(arm)} ended with the least {name}"
        return f"{text}, {spell(loss, 0.001)}; each ran once, so that no two can be told apart."
    values = [loss for loss, _ in tried]
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    text = f"{name}: {spell(statistics.fmean(values), std or 0.005)} nats"
    known = f"on average over {counted(len(values), 'run')}, seed-to-seed std {spell(std)}"
    return f"{text} {known}." if len(values) > 1 else f"{text} in one run."


def interactions(comparison: Comparison) -> Iterable[Sentence]:
    """Whether an arm's effect changes from the least budget to the largest, and with an arm of another axis.

    With budgets each arm has a sentence. With other axes only a large interaction has one.
    """
    margin, over = comparison.margin, comparison.over
    for item in comparison.interactions:
        if item.ci95 is None:
            continue
        (low, high), (one, other) = item.ci95, map(subject, item.keys, item.arms)
        (difference, interval), (size, _) = amounts(item), amounts(item, sign=False)
        how = f"{size} nats {'higher' if item.mean_difference > 0 else 'lower'}"
        sure = f"95 % interval {interval}, n={counted(item.n_seeds, 'seed')}, p{probability(item.p_value)}, uncorrected"
        if over in item.keys:
            first, *_, last = comparison.swept[over]
            at = item.keys.index(over)
            text = f"from {over}={first} to {last} the effect of {(one, other)[1 - at]} on the loss"
            if margin is not None and -margin <= low and high <= margin:
                text += f" holds within ±{margin:g} nats"
            elif low <= 0 <= high:
                text += f" may or may not change: a difference of {difference} nats"
            else:
                text += f" changes: at {last} it is {how} than at {first}"
            if item.arms[at] == last:
                yield Sentence("budget", f"{text} ({sure}).")
        elif item.large:
            base = printable(comparison.swept[item.keys[1]][0])
            yield Sentence(
                "interaction", f"under {other} the effect of {one} on the loss is {how} than under {base} ({sure})."
            )


def distance_sentence(item: Distance) -> str:
    """How far a precision strays from fp64, in plain words."""
    std = "" if item.seed_std is None else f"; between seeds fp64's own losses have a std of {spell(item.seed_std)}"
    return (
        f"{subject('precision', item.arm)} strays from fp64's training loss at the same seed and step by "
        f"{spell(item.mean)} nats on average and {spell(item.largest)} at most "
        f"(n={counted(item.n_seeds, 'seed')}{std})."
    )


def failures(comparison: Comparison) -> list[tuple[str, str]]:
    """Name and fate of every run that did not finish."""
    told = []
    for row in comparison.failed:
        fate = printable(row["state"])
        if row["state"] != "not run":
            fate += f" {'at' if row['state'] == 'running' else 'after'} step {row['step'] or 0}"
        told.append((printable(row["name"]), f"{fate}: {printable(row['error'])}" if row["error"] else fate))
    return told


def title(comparison: Comparison) -> str:
    """The question: the swept keys."""
    checks = {one.key for one in comparison.axes if one.control}
    return " × ".join(printable(key) for key in comparison.swept if key not in checks) or "One setting, several seeds"


def summary(comparison: Comparison) -> str:
    """How many runs there are and what is compared."""
    runs, seeds = counted(len(comparison.runs), "run"), counted(len(comparison.seeds), "seed")
    text = f"{runs}, {len(comparison.runs) - len(comparison.failed)} finished, {seeds}"
    if not comparison.axes:
        return text
    margin = "no margin stated" if comparison.margin is None else f"margin ±{comparison.margin:g} nats"
    return f"{text}; compared in {BY_KEY[comparison.metric].name}, {margin}"


# --- tables ----------------------------------------------------------------------------------------------------------


def effects_table(comparison: Comparison, metrics: Sequence[str] = ()) -> Table:
    """A row for each axis, arm and metric (of `metrics`, if given); after an arm's rows, one of what it is worth.

    The notes are the reasons of the verdicts. A row refers to its reason by number, since most rows share one.
    """
    rows = list[dict[str, str]]()
    for effects in () if comparison.searched else by_arm(comparison):  # in a search values differ by chance
        rows += map(_effect_row, effects.values())
        rows += [_worth_row(effect) for effect in effects.values() if worth(effect)[0]]
    rows = [row for row in rows if row["metric"] in metrics or not metrics]
    reasons = list(dict.fromkeys(row["reason"] for row in rows if row["reason"]))
    for row in rows:
        row["reason"] = f"[{reasons.index(row['reason']) + 1}]" if row["reason"] else ""
    return Table(rows, ("n", "difference", "p", "seed std", "r", "saved"), reasons)


def _effect_row(effect: Effect) -> dict[str, str]:
    metric, r, saved = BY_KEY[effect.metric], effect.pair_correlation, effect.seeds_saved
    beyond = "" if effect.ci95 is None else f">{LARGEST - effect.n_seeds:,}"
    difference, interval = amounts(effect)
    return {
        "axis": printable(effect.key),
        "arms": f"{printable(effect.arm)} against {printable(effect.baseline)}"
        + f", {effect.budget}" * bool(effect.budget),
        "metric": f"{metric.compared}, {'ratio' if metric.ratio else metric.unit}",
        "n": str(effect.n_seeds) + (f" ({effect.n_pairs})" if effect.n_pairs != effect.n_seeds else ""),
        "difference": difference,
        "95 % interval": interval,
        "p": probability(effect.p_holm).removeprefix("="),
        "seed std": deviations(effect),
        "r": "" if r is None else f"{r:.3g}".replace("-", "−"),
        "saved": beyond if saved is None else str(saved).replace("-", "−"),
        "verdict": effect.verdict or "",
        "reason": printable(effect.reason),
    }


def _worth_row(loss: Effect) -> dict[str, str]:
    of, factor, interval = worth(loss)
    row = _effect_row(loss) | {"metric": f"{of}, ratio", "difference": factor, "95 % interval": interval}
    row |= dict.fromkeys(("p", "seed std", "r", "saved"), "")
    return row | {"verdict": UNJUDGED, "reason": printable(loss.multiplier_reason)}


def tuning_table(comparison: Comparison) -> Table:
    """A row an arm: over the tuning seeds its loss at each value, and the value at which it is compared."""
    values = sorted({value for curve in comparison.tuning for value in curve.losses}, key=float)
    rows = [
        {"arm": curve.arm}
        | {value: _tuning_cell(curve.losses.get(value, [])) for value in values}
        | {"best": curve.best or "–"}
        for curve in comparison.tuning
    ]
    return Table(rows, (*values, "best"))


def _tuning_cell(losses: Sequence[float | str]) -> str:
    """The mean loss with its std over seeds, or the states of runs that have no loss."""
    states = Counter(loss for loss in losses if isinstance(loss, str))
    if states or not losses:
        return ", ".join(f"{printable(state)} ({count} of {len(losses)})" for state, count in states.items()) or "–"
    known = [float(loss) for loss in losses]
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    return spell(statistics.fmean(known), std or 0.005) + (f" ± {spell(std)}" if std else "")


def interactions_table(comparison: Comparison) -> Table:
    """A row for each two arms of two axes."""
    rows = []
    for item in comparison.interactions:
        (one, other), (difference, interval) = map(subject, item.keys, item.arms), amounts(item)
        row = {"effect of": one, "changed by": other, "n": str(item.n_seeds), "difference, nats": difference}
        p = probability(item.p_value).removeprefix("=")
        rows.append(row | {"95 % interval": interval, "p": p, "size": "large" if item.large else ""})
    return Table(rows, ("n", "difference, nats", "p"))


def runs_table(comparison: Comparison) -> Table:
    """A row a run, its name first."""
    rows, numbers = [], ("seed", *(metric.column for metric in COLUMNS), "seconds")
    tuned = list(dict.fromkeys(row["tuned"] for row in comparison.runs if "tuned" in row))
    for row in comparison.runs:
        seed, arms = cell_of(row, comparison.swept) if "config" in row else ("", [""] * len(comparison.swept))
        cells = {"run": row["name"], "state": row["state"]} | dict(zip(comparison.swept, arms, strict=True))
        cells |= {key: typed(row, key) if "config" in row else "" for key in tuned}
        seconds = f"{row['wall_seconds']['total']:,.1f}" if "wall_seconds" in row else "–"
        figures = (str(seed), *(shown(row, metric.key) for metric in COLUMNS), seconds)
        shown_ = {printable(name): printable(cell) for name, cell in cells.items()}
        rows.append(shown_ | dict(zip(numbers, figures, strict=True)))
    return Table(rows, numbers)


def name_of(verdict: str) -> str:
    """A verdict as people read it."""
    return "" if verdict == UNJUDGED else verdict.replace("_", " ") or "no verdict"
