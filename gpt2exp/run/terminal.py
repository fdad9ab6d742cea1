"""What is printed: the header, a line a step, the closing table. The same text goes to `run.log`. No torch."""

from __future__ import annotations

import io
import logging
import math
import os
import re
import shlex
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gpt2exp import choices
from gpt2exp.config import InitScheme, RunConfig, TrainConfig
from gpt2exp.run.metrics import BY_KEY, COLUMNS, METRICS, Summary, from_outside, judged, shown
from gpt2exp.schema import plain
from gpt2exp.section import SOURCE, typed
from gpt2exp.training import distributed, load

log = logging.getLogger("gpt2exp")


class _Lines(logging.Handler):
    """Warnings and errors as lines of a console, with the traceback of an error if `traces`."""

    def __init__(self, console: Console, *, traces: bool) -> None:
        super().__init__(logging.WARNING)
        self.console, self.traces = console, traces

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(f"{record.levelname.lower()}: {record.getMessage()}")
        self.console.print(Text(line, style="yellow"), soft_wrap=True)
        if self.traces and record.exc_info:
            self.console.print(Text(logging.Formatter().formatException(record.exc_info)), soft_wrap=True)


class Patient:
    """A text stream that raises nothing: once its reader is gone or its disk is full, it drops what is written.

    `gone`: whether that has happened.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self.gone = stream, False
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal does not have becomes `?`

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError:  # what is buffered goes to /dev/null, now and at the interpreter's exit
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self.gone = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def terminal(*, stderr: bool = False) -> Console:
    """The console of this process. In a pipe or a notebook it has no colour, and is wide enough for our lines."""
    stream = sys.stderr if stderr else sys.stdout
    # a notebook's stream calls itself a terminal, but cannot move a cursor
    forced = None if isinstance(stream, io.TextIOWrapper) else False
    patient = cast(TextIO, Patient(stream))
    console = Console(file=patient, stderr=stderr, highlight=False, force_jupyter=False, force_terminal=forced)
    if not console.is_terminal:
        console.width = max(console.width, 110)
    return console


def say(text: str) -> None:
    """Print a text on standard output as it is, its lines unbroken."""
    terminal().print(text, markup=False, soft_wrap=True)


def show_warnings(*, traces: bool = False) -> None:
    """Print the package's warnings on standard error; a second call changes nothing."""
    log.propagate = False
    if not any(isinstance(handler, _Lines) for handler in log.handlers):
        log.addHandler(_Lines(terminal(stderr=True), traces=traces))


class View:
    """Prints a run on the terminal and, in full, to `run.log`. A context: call its methods inside the block.

    A run alone prints its header, a line a step and its closing table on the terminal. A sweep's job prints a line when
    it begins and a line when it ends.
    """

    def __init__(self, folder: Path, config: RunConfig, overrides: Sequence[str], progress: str | None) -> None:
        """`progress`: the job's place in its sweep; None for a run alone."""
        self.config, self.overrides, self.progress = config, overrides, progress
        self.console = terminal()
        self._file = cast(TextIO, Patient((folder / "run.log").open("a", encoding="utf-8")))
        self._log = Console(file=self._file, width=110, highlight=False, force_jupyter=False)
        self._handler = _Lines(self._log, traces=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_interactive)
        self._task = self._bar.add_task("training", total=config.train.steps, visible=False)
        self._consoles = [self._log] if progress else [self.console, self._log]
        self._metrics = (*METRICS, *from_outside(plain(config)))

    def __enter__(self) -> View:
        log.addHandler(self._handler)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        log.removeHandler(self._handler)
        self._file.close()

    def _print(self, text: str, *consoles: Console, style: str = "") -> None:
        for console in consoles:
            console.print(Text(text, style=style), soft_wrap=True)
        self._file.flush()

    def rows(self, rows: dict[str, str]) -> None:
        """Print labelled lines: as a grid on a terminal, elsewhere each as one unbroken line, for programs."""
        width = max(map(len, rows))
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows.items():
            grid.add_row(label, Text(text))
        for console in self._consoles:
            if console.is_terminal:
                console.print(grid)
            else:
                self._print("\n".join(f"{label:<{width}}  {text}" for label, text in rows.items()), console)
        self._file.flush()

    def header(self, facts: dict[str, Any], folder: Path, config: RunConfig) -> None:
        """Print what is about to run; `config` has no `auto` left."""
        model, train = config.model, config.train
        parameters, precision, data = facts["parameters"], facts["precision"], facts["data"]
        emulated = " (emulated: its speed is not a hardware speed)" if precision["emulated"] else ""
        batch = f"{train.sequences} x {train.seq_len} tokens"
        if train.grad_accum_steps > 1:
            batch += f" x {train.grad_accum_steps} micro-batches"
        if train.activation_checkpointing is True:
            batch += ", activations computed again in backward"
        if train.sequences % 2 and train.sequences > 1:
            batch += "; an even batch, best a power of two, suits most hardware better"
        per_epoch = data["train_tokens"] // train.step_tokens
        shared = f"; {facts['processes']} processes by {facts['distributed']}" if facts["distributed"] else ""
        init = f"{config.init.scheme}, residual scaling {'on' if config.init.residual_scaling else 'off'}"
        if config.init.scheme is InitScheme.pretrained:
            init = f"pretrained from {config.init.path}"
        by = ", multiplied by oneDNN" if precision["library"] == "onednn" else ""
        rows = {
            "model": f"{parameters['total'] / 1e6:,.1f}M parameters: {model.n_layer} layers, {model.n_head} heads, "
            f"{model.n_embd} wide, {'tied' if model.tie_weights else 'untied'}; init {init}, "
            f"seed {config.seed}",
            "device": f"{facts['device']}, {facts['threads']} threads{shared}; "
            f"about {facts['estimated_memory_bytes'] / 2**30:.1f} GiB needed{' by each' if shared else ''}",
            "precision": f"{precision['requested']} requested, {precision['effective']}{emulated}: "
            f"a matrix product is off by {precision['matmul_relative_error']:.1e}{by}",
            "data": f"{data['name']}: {data['train_tokens']:,} tokens to train on, {data['val_tokens']:,} to validate, "
            f"{data['distinct_tokens']:,} of {model.vocab_size:,} ids occur",
            "batch": f"{batch} x {train.steps:,} steps ({per_epoch:,} steps an epoch)",
            "folder": short(folder),
        }
        rows |= facts["outside"]
        self._print(f"{distributed.program()} {pasted(*self.overrides)}".rstrip(), *self._consoles, style="bold")
        if self.progress:
            self._print(f"{self.progress}: {' '.join(self.overrides)}", self.console)
        self.rows(rows)

    def step(self, metrics: dict[str, Any]) -> None:
        """Count a step; print its line if one is due."""
        self._bar.update(self._task, completed=metrics["step"] + 1, visible=True)
        if due(metrics, self.config.train):
            # the tutorial's line: step, loss, milliseconds, tokens per second; then what else was measured
            measured = (row for row in self._metrics if row.step and row.key in metrics)
            self._print(" | ".join(row.step.format(metrics[row.key]) for row in measured), *self._consoles)

    def close(self, summary: Summary, folder: Path, sync: Path | None) -> None:
        """Print the results and what to type next; `sync`: wandb's folder to upload, if it was offline."""
        self._bar.stop()
        self.rows(closing_rows(summary, self.config, folder))
        if self.progress:
            self._print(f"  {closing_line(summary)}", self.console)
        # unbroken lines, to be copied
        if summary["state"] in ("interrupted", "failed"):
            self._print(f"to go on: {to_go_on(folder, self.config)}", *self._consoles)
        if sync is not None:
            self._print(f"to upload: {pasted('wandb', 'sync', sync)}", *self._consoles)


def origin_line(init: dict[str, Any]) -> str:
    """Where a model's weights came from, and whether head and embedding are one."""
    came = "drawn" if init["source"] is None else f"{init['source']} (sha256 {init['sha256'][:8]})"
    equal = "all elements equal" if init["tying"]["all_equal"] else "their elements differ"
    one = "one tensor (same data pointer)" if init["tying"]["same_pointer"] else "two tensors"
    return f"{came}; lm_head.weight and wte.weight: {one}, {equal}"


def short(path: Path) -> str:
    """A path as seen from the current folder where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


STEP = {"step", "lr", "loss", "tokens", "step_ms", "tokens_per_second", "waited_ms"}  # figures that every step has


def due(metrics: dict[str, Any], train: TrainConfig) -> bool:
    """Whether a step is printed and sent to wandb: every `log_every`-th, the last, and any that measured more."""
    number = metrics["step"]
    return number % train.log_every == 0 or number + 1 == train.steps or not metrics.keys() <= STEP


def place(path: Path) -> str:
    """A path as an argument: `short`, but absolute where a shell would see a flag or a home folder."""
    text = short(path)
    return str(path.absolute()) if text.startswith(("-", "~")) else text


def pasted(*words: str | Path) -> str:
    """A command to be pasted into a shell: each word quoted as far as it needs to be."""
    return shlex.join(place(word) if isinstance(word, Path) else word for word in words)


def to_go_on(folder: Path, *configs: RunConfig) -> str:
    """The command that resumes a run or a sweep of these configurations; it allows their code from outside."""
    sources = {values[SOURCE] for config in configs for values in choices.found_in(plain(config)).values()}
    folders = sorted({str(Path(source).parent) for source in sources} - {str(Path.cwd())})
    flags = ["--config-dir", *folders] if len(folders) == 1 else ["--trust"] if folders else []
    return f"{distributed.program()} {pasted(*flags, typed('resume', place(folder)))}"


def closing_rows(summary: Summary, config: RunConfig, folder: Path) -> dict[str, str]:
    """The closing table of a run, label to text."""
    rows = {"state": state_line(summary)}
    figures = {key: shown(summary, key) for key in BY_KEY if key != "step_ms"}
    if summary["loss_first"] is not None:
        vocabulary, data, occur = config.model.vocab_size, summary["data"], summary["data"]["distinct_tokens"]
        rows["loss"] = "{loss_first} → {loss_last}, mean of the last ten {loss_mean_last10}".format(**figures)
        rows["loss"] += f" (a uniform guess costs ln {vocabulary} = {math.log(vocabulary):.3f})"
        rows["for scale"] = f"guessing among the {occur:,} ids that occur {math.log(occur):.3f}"
        rows["for scale"] += f", by frequency {data['unigram_entropy']:.3f}"
        if data["bigram_entropy"] is not None:  # not counted for a long text
            rows["for scale"] += f", by the token before {data['bigram_entropy']:.3f}"
    if summary["val_loss"] is not None:
        rows["validation loss"] = figures["val_loss"]
    if (first := summary["loss_unseen_first"]) is not None:
        gained = first - cast(float, summary["loss_unseen_last"])
        fall = cast(float, summary["loss_first"]) - cast(float, summary["loss_last"])
        share = f", {gained / fall:.0%} of the fall" if fall > 0 else ""
        rows["of it, tokens that never occur"] = "{loss_unseen_first} → {loss_unseen_last}".format(**figures) + share
    if summary["tokens_per_second"] is not None:
        rows["speed"] = _speed(summary)
    if summary["speed_disturbed"]:
        what = "the speed is not this run's own" if load.mostly_disturbed(summary) else "left out of the speed"
        rows["other programs"] = f"{shown(summary, 'speed_disturbed')} of the steps waited for a core: {what}"
    if summary["mfu"] is not None:
        rows["MFU"] = f"{figures['mfu']} of the device's {summary['precision']['effective']} peak"
    if summary["peak_memory_bytes"]:
        rows["peak memory"] = f"{figures['peak_memory_bytes']} MiB"
    wall = summary["wall_seconds"]
    rows["time"] = f"{wall['total']:.1f} s, of which {wall['startup']:.1f} s to start"
    rows["files"] = f"{short(folder)}: summary.json, metrics.jsonl, run.log"
    return rows


def state_line(row: Summary) -> str:
    """A run's state, and its error if it has one."""
    return row["state"] + (f": {row['error']}" if row["error"] else "")


def _speed(summary: Summary) -> str:
    ms = summary["step_ms"] or {"median": math.nan, "p10": math.nan, "p90": math.nan}
    text = f"{shown(summary, 'tokens_per_second')} tokens/s: median step {ms['median']:.1f} ms (p10 {ms['p10']:.1f}, "
    text += f"p90 {ms['p90']:.1f}, n={summary['timed_steps']}), first step {shown(summary, 'first_step_ms')} ms"
    if summary["precision"]["emulated"]:
        text += "; emulated, not a hardware speed"
    return text


def closing_line(summary: Summary) -> str:
    """The line for a job of a sweep that ended."""
    if summary["state"] != "done":
        return state_line(summary)
    loss = judged(summary)
    waited = " while most steps waited for a core" if load.mostly_disturbed(summary) else ""
    speed = f"{shown(summary, 'tokens_per_second')} tokens/s{waited}"
    return f"done: {loss} {shown(summary, loss)}, {speed}, {summary['wall_seconds']['total']:.1f} s"


def runs_table(rows: Iterable[Summary], title: str) -> Table:
    """The table of a sweep's runs, a row each."""
    cells = []
    for row in rows:
        got = row.get("precision")
        arithmetic = f"{got['effective']}{' emulated' if got['emulated'] else ''}" if got else "–"
        figures = {metric.column: shown(row, metric.key) for metric in COLUMNS}
        cells.append({"run": row["name"], "state": row["state"], **figures, "precision": arithmetic})
    return table(cells, title)


def table(rows: Sequence[Mapping[str, str]], title: str | None = None) -> Table:
    """A table of rows with the same columns; figures are aligned to the right."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(rows[0] if rows else ()):
        words = number == 0 or column in ("state", "precision", "figure")
        made.add_column(column, justify="left" if words else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row.values()))
    return made


def wants_traces() -> bool:
    """Whether the user asked for tracebacks, by Hydra's variable."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def printable(text: object, keep: str = "") -> str:
    """A text that is safe to print: control characters become �, and broken Unicode becomes ?.

    `keep`: control characters that stay, such as the line break.
    """
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    whole = re.sub("[\ufffe\uffff]", "�", whole)  # which no XML, so no SVG, can hold
    return "".join("�" if unicodedata.category(char) == "Cc" and char not in keep else char for char in whole)


def refuse(message: str, *, program: str = "gpt2exp", trace: bool = False) -> None:
    """Print one line on standard error; `trace`: print the traceback of the current exception first."""
    if trace:
        traceback.print_exc()
    print(printable(f"{program}: {message}"), file=sys.stderr)
