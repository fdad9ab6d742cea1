"""What a run measures: `METRICS`, the table of its figures, and `Summary`, the type of its summary. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, Required, cast

from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from gpt2exp.section import TARGET


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure of a run: how it is named, summarised, shown and compared."""

    key: str  # in metrics.jsonl, in summary.json, or in both
    of: str = ""  # the figure of each step that it summarises, by `how`; empty: it summarises none
    how: Callable[[Sequence[float]], float] = lambda values: values[-1]
    measured: bool = False  # a figure of the run as a whole (`Record.measured`): its speed or memory
    name: str = ""  # in a sentence
    unit: str = ""  # in which it is shown
    scale: float = 1.0  # its value divided by this is in that unit
    better: Literal["", "lower", "higher"] = ""
    step: str = ""  # format in a step's line; empty: not shown there
    column: str = ""  # head of its column in tables of runs; empty: not shown there
    form: str = ".4f"  # format in those tables and at a run's end
    compared: str = ""  # in what it compares two arms: loss, speed, memory, or its own name; empty: not compared
    ratio: bool = False  # compared as arm over baseline, on a log scale

    @property
    def best(self) -> str | None:
        """How wandb summarises the steps' values: not at all if the run's own summary has the same name."""
        if self.of == self.key or self.measured:
            return "none"
        return {"lower": "min", "higher": "max"}.get(self.better)


METRICS = (
    Metric(key="step", step="step {:5d}"),
    Metric(key="loss", unit="nats", better="lower", step="loss {:9.6f}"),
    Metric(key="loss_first", of="loss", how=lambda values: values[0], unit="nats", better="lower"),
    Metric(key="loss_last", of="loss", unit="nats", better="lower"),
    Metric(key="loss_mean_last10", of="loss", how=lambda values: statistics.fmean(values[-10:]), unit="nats",
           name="loss, the mean of the last ten steps", better="lower", column="loss", compared="loss"),
    Metric(key="step_ms", measured=True, unit="ms", better="lower", step="{:9.2f} ms", form=".1f"),
    Metric(key="first_step_ms", measured=True, unit="ms", better="lower", form=".0f"),
    Metric(key="tokens_per_second", measured=True, name="speed", unit="tokens/s", better="higher",
           step="{:11,.1f} tok/s", column="tokens/s", form=",.1f", compared="speed", ratio=True),
    Metric(key="grad_norm", step="norm {:.4f}"),
    Metric(key="loss_unseen", unit="nats", better="lower", step="unused tokens {:.4f}"),
    Metric(key="val_loss", of="val_loss", name="validation loss", unit="nats", better="lower",
           step="val loss {:.4f}", column="val loss", compared="loss"),
    Metric(key="loss_unseen_first", of="loss_unseen", how=lambda values: values[0], unit="nats", better="lower"),
    Metric(key="loss_unseen_last", of="loss_unseen", unit="nats", better="lower"),
    Metric(key="timed_steps", measured=True, form="d"),
    Metric(key="speed_disturbed", measured=True, better="lower", form=".0%"),
    Metric(key="mfu", measured=True, better="higher", form=".1%"),
    Metric(key="peak_memory_bytes", measured=True, name="memory", unit="MiB", scale=2.0**20, better="lower",
           column="peak MiB", form=",.0f", compared="memory"),
)  # fmt: skip
"""The figures of a run, in the order in which a step's line shows them."""

COLUMNS = [row for of in ("loss", "speed", "memory") for row in METRICS if row.column and row.compared == of]
"""The figures that tables of runs show, in their order."""

BY_KEY = {metric.key: metric for metric in METRICS}
MEASURED = tuple(metric.key for metric in METRICS if metric.measured)  # about speed and memory, null until measured


def from_outside(config: Mapping[str, Any]) -> tuple[Metric, ...]:
    """The metric from outside that a run's plain configuration names, or none."""
    own = config.get("metric", {})
    if TARGET not in own:
        return ()
    name = own["name"]
    said = {"name": name, "unit": own["unit"], "better": own["better"], "step": f"{name} {{:.4f}}", "compared": name}
    return (Metric(key=name, of=name, **said),)


def losses(steps: Sequence[Mapping[str, Any]], more: Sequence[Metric] = ()) -> dict[str, float | None]:
    """The summary's losses, and the figures `more`, from the steps' metrics; null where no step measured one."""
    found: dict[str, float | None] = {}
    for metric in (*METRICS, *more):
        if metric.of:
            values = [step[metric.of] for step in steps if metric.of in step]
            found[metric.key] = metric.how(values) if values else None
    return found


class Status(TypedDict):
    """`status.json`: the state, steps done, the error if any, and the process."""

    state: str
    step: int
    error: str | None
    updated: NotRequired[float]  # seconds since 1970
    pid: NotRequired[int]
    machine: NotRequired[str]


class Quantiles(TypedDict):
    """Of the timed steps, in milliseconds."""

    median: float
    p10: float
    p90: float


class Arithmetic(TypedDict):
    """The precision in which a run's matrix products were computed."""

    effective: str
    emulated: bool
    requested: NotRequired[str]
    matmul_relative_error: NotRequired[float]


class Summary(TypedDict, total=False):
    """`summary.json`; one by an older version lacks fields, which are then null.

    A run without one is read as what its `status.json` says: `state`, `step` and `error`.
    """

    name: str  # its folder, relative to the one that was read; `name` and `step` are not in the file
    step: int
    state: Required[str]
    error: Required[str | None]
    overrides: list[str]
    config: dict[str, Any]
    seed: int
    steps: int
    tokens: int
    loss_first: float | None
    loss_last: float | None
    loss_mean_last10: float | None
    val_loss: float | None
    loss_unseen_first: float | None
    loss_unseen_last: float | None
    step_ms: Quantiles | None
    first_step_ms: float | None
    tokens_per_second: float | None
    timed_steps: int | None
    speed_disturbed: float | None
    mfu: float | None
    peak_memory_bytes: int | None
    flops_per_token: int
    parameters: dict[str, int]
    precision: Arithmetic
    data: dict[str, Any]
    device: str
    processes: int
    threads: int
    machine: str
    platform: str
    versions: dict[str, str]
    environment: dict[str, str]
    git: Any  # `commit` and `dirty`; null without a checkout
    wall_seconds: dict[str, float]
    started: str
    parts: list[dict[str, Any]]
    reused: dict[str, Any]
    """Of a run that another sweep ran: `from`, its folder, and whether it `shared` its machine (`sweep.reuse`)."""


TAKEN = {*BY_KEY, *Summary.__annotations__, "lr", "waited_ms", "residual_rms", "wte_grad_lookup", "wte_grad_head"}
"""Names in `metrics.jsonl` and `summary.json` that no metric from outside can have."""

ALWAYS = ("overrides", "config", "started", "wall_seconds")
DONE = (*ALWAYS, "steps", "tokens", "parameters", "precision", "data", "device", "threads")
"""Fields that the summary of a finished run must have; any other summary must have `ALWAYS`."""


def number_of(summary: Mapping[str, Any], key: str) -> float | None:
    """A figure of a run by its key in `METRICS`; None where it was not measured."""
    return cast("float | None", summary.get(key))


def shown(summary: Mapping[str, Any], key: str, form: str | None = None) -> str:
    """A figure as tables of runs show it, or by another format, without its unit; – where it was not measured."""
    value, metric = number_of(summary, key), BY_KEY[key]
    return "–" if value is None else format(value / metric.scale if metric.scale != 1 else value, form or metric.form)


def judged(summary: Summary) -> str:
    """The key of the loss by which a run is judged: the validation loss if there is one, else the last steps' mean."""
    return "loss_mean_last10" if summary.get("val_loss") is None else "val_loss"
