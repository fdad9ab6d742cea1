"""gpt2exp in Python, in a script or a notebook: what `gpt2exp` and `gpt2exp-compare` do, with results returned.

    config = gpt2exp.compose("model=nano", "train.steps=3")
    trainer = gpt2exp.trainer(config)          # a model in training, to be stepped by hand
    loss = trainer.step()
    summary = gpt2exp.run(config, "runs/a")    # the same training as a run, with a folder
    runs = gpt2exp.sweep(["model=nano", "train.steps=3", "precision=fp32,tf32", "seed=1,2,3"], "sweeps/a")
    pandas.DataFrame(runs.table())
    runs.compare().axes                        # each metric's effect, interval and verdict

A request that cannot be carried out raises `BadRequest`, and nothing is written. A run that fails raises nothing: its
`state` and `error` say so. `run` prints a line a step, `sweep` two lines a job. Ctrl-C, in a notebook "interrupt", lets
them finish the step, save a checkpoint and raise KeyboardInterrupt; a second one raises at once. In a thread no signal
is handled. Precision is a setting of the process, so `run` and `sweep` must not overlap in one process. These two and
`trainer` import torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from gpt2exp import choices, schema
from gpt2exp.compare import comparison, stopping
from gpt2exp.config import RunConfig
from gpt2exp.model import size
from gpt2exp.run import process, record, terminal
from gpt2exp.run.metrics import METRICS, Summary
from gpt2exp.schema import plain, stored
from gpt2exp.section import CHOICES, SHA256, SOURCE, TARGET, BadRequest, show, typed
from gpt2exp.sweep import launch
from gpt2exp.sweep.composing import checked
from gpt2exp.sweep.request import Request, new_request
from gpt2exp.sweep.resume import resumed_request

if TYPE_CHECKING:
    from gpt2exp.training.trainer import Trainer


def compose(*words: str) -> RunConfig:
    """The checked configuration of one run; `words` as after `gpt2exp`: overrides, also `--config-dir DIR`."""
    request = new_request(launch.parsed(words)[0])
    config = request.jobs[0].config
    if request.multirun or config.resume is not None:
        raise BadRequest(f"{' '.join(words)}: several runs, or a resumed one; give it to gpt2exp.sweep")
    return config


def trainer(config: RunConfig) -> Trainer:
    """A new trainer, to be stepped by hand: `step`, `evaluate`, `fit`, `model`. Nothing is written.

    Each call computes in `config.precision` and then restores the process's, so several trainers can take turns.
    Raises `BadRequest` if the text, the weights or this machine do not fit, AssetError if a file could not be fetched.
    """
    from gpt2exp.training import setup

    setup.check_weights(config.init, config.model)
    with setup.ready(config) as ready:
        setup.check_text(ready.config, ready.source)
        return setup.trainer(ready, by_hand=True)[0]


def run(config: RunConfig, folder: str | Path | None = None) -> Summary:
    """Train in a new `folder` (None: below runs/) as `gpt2exp` does, and return what `summary.json` holds.

    Its `overrides` are the keys that differ from the defaults. KeyboardInterrupt: a signal stopped it after it saved.
    """
    args, argv = launch.parsed([typed("hydra.run.dir", str(folder))] if folder is not None else [])
    request, values = new_request(args), plain(config)
    checked_again, overrides = checked(OmegaConf.create(values)), tuple(_overrides(values))
    job = replace(request.jobs[0], config=checked_again, unresolved=values, overrides=overrides)
    size.check(config.model, config.init, config.train.seq_len)
    _carry_out(replace(request, jobs=(job,)), argv)
    return record.row(request.folder, request.folder)


def sweep(words: Sequence[str], folder: str | Path | None = None) -> Runs:
    """Do what `gpt2exp -m WORDS` does, in a new `folder` (None: below sweeps/) or, with `resume=FOLDER`, in that one.

    The comparison is written and printed at the end, as by that command. KeyboardInterrupt: as `run`.
    """
    place = [typed("hydra.sweep.dir", str(folder))] if folder is not None else []
    args, argv = launch.parsed(["-m", *words, *place])
    request = resumed_request(args) or new_request(args)
    _carry_out(request, argv)
    return load(request.folder)


def load(*folders: str | Path) -> Runs:
    """Every run at or below the folders, finished or not; `BadRequest` if there is none."""
    paths = [Path(folder) for folder in folders]
    return Runs(paths, comparison.read(paths))


@dataclass(frozen=True)
class Runs:
    """Runs and what they recorded."""

    folders: list[Path]
    rows: list[comparison.Row]  # the summaries; of a run without one, its state

    def table(self) -> list[dict[str, Any]]:
        """A flat row for each run: name, state, error, folder, seed, the keys that vary among the runs, the figures.

        Losses in nats, tokens per second, the median step in `step_ms`, memory in bytes; None where not measured.
        """
        configs = [schema.flatten(stored(row["config"])[0]) if "config" in row else {} for row in self.rows]
        keys = dict.fromkeys(key for config in configs for key in config)
        varying = ["seed", *(key for key in keys if key != "seed" and len({show(of.get(key)) for of in configs}) > 1)]
        rows = []
        for row, config in zip(self.rows, configs, strict=True):
            about = {key: row.get(key) for key in ("name", "state", "error", "folder")}
            figures: dict[str, Any] = {of.key: row.get(of.key) for of in METRICS if of.of or of.measured}
            figures["step_ms"] = figures["step_ms"] and figures["step_ms"]["median"]
            rows.append(about | {key: config.get(key) for key in varying} | figures)
        return rows

    def compare(self, *, margin: float | None = None, out: str | Path | None = None) -> comparison.Comparison:
        """Pairs, intervals and verdicts; `BadRequest` if the runs cannot be compared.

        `margin`: nats within which a loss difference counts as none. `out`: a folder for the report; None: none.
        """
        from gpt2exp.compare.__main__ import write

        made = stopping.compared(self.rows, margin=margin, out=Path(out or self.folders[0]))
        if out is not None:
            write(made, Path(out))
        return made


def _overrides(config: dict[str, Any]) -> list[str]:
    """The overrides that ask for a plain configuration: its choices, then the keys that differ from theirs."""
    outside = choices.found_in(config)
    usual = {section: next(iter(known)) for section, known in CHOICES.items()}
    names = {section: schema.at(config, f"{section}.name") for section in (*usual, *outside)}
    words = {key: f"{schema.group_of(key)}={name}" for key, name in names.items() if name != usual.get(key)}
    words.pop("schedule", None)  # optimizer.schedule chooses it
    before = schema.leaves(plain(compose(*(words[key] for key in words if not outside.get(key, {}).get(SOURCE)))))
    said = {f"{section}.{name}" for section in names for name in ("name", TARGET, SOURCE, SHA256)}
    changed = {key: value for key, value in schema.leaves(config).items() if before.get(key) != value}
    return [*words.values(), *(typed(key, value) for key, value in changed.items() if key not in said)]


def _carry_out(request: Request, words: list[str]) -> None:
    terminal.show_warnings()
    with process.guest():
        launch.run_request(request, words, time.monotonic())
