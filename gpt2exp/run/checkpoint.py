"""A run's whole state on disk, from which it resumes as if it had never stopped.

`RUN/checkpoints/step_000050/` holds `model.safetensors` (the weights under Hugging Face's names, a tied tensor once),
`training.safetensors` (the optimizers' tensors) and `state.json` (the step, facts to read, each file's sha256). Nothing
in it is ever unpickled. The folder is written under another name, synced and renamed: it is whole or absent.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gpt2exp import choices
from gpt2exp.config import CheckpointConfig, ModelConfig
from gpt2exp.files import beside, sha256, write_json
from gpt2exp.run.record import CHECKPOINTS, saved
from gpt2exp.schema import parse, stored
from gpt2exp.section import BadRequest, first_line, show
from gpt2exp.training import hardware

SPARE = 2**20  # bytes left free on the disk: a checkpoint that filled it would leave no room for the metrics
WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
log = logging.getLogger("gpt2exp")


class Damaged(ValueError):
    """A checkpoint whose files are not as they were written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its `state.json` says."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state["step"])

    def model(self, said: str) -> ModelConfig:
        """The model whose weights these are; `BadRequest` if it cannot be built here, with `said`, the run."""
        today, unknown = stored(self.state["config"])
        if odd := [key for key in unknown if key.startswith("model.")]:
            why = f"its model has {odd[0]}={show(unknown[odd[0]])}, which this version does not know"
            raise BadRequest(f"{said}: {why}; use the version that trained it")
        choices.admit({"model": today["model"]})
        return parse({"model": today["model"]}).model

    def weights(self) -> dict[str, Tensor]:
        """Parameters by name, on the CPU."""
        return load_file(self.folder / WEIGHTS)

    def training(self) -> dict[str, Tensor]:
        """What training needs beside the weights, by name, on the CPU."""
        tensors = load_file(self.folder / TRAINING)
        # earlier versions kept torch's random state, which no step uses
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("random.")}


def newest(run: Path, *, at_most: int | None = None) -> Checkpoint | None:
    """The newest checkpoint that is whole, of at most `at_most` steps; a warning for each damaged one."""
    for step, folder in saved(run).items():
        if at_most is not None and step > at_most:
            log.warning("%s is passed over: metrics.jsonl ends at step %d", folder.name, at_most)
            continue
        try:
            return read(folder)
        except Damaged as error:
            log.warning("%s is damaged (%s); trying the one before", folder.name, error)
    return None


def of_run(run: Path) -> tuple[ModelConfig, Checkpoint]:
    """The model of a run (`record.check_run`) and its newest whole checkpoint; `BadRequest` if none is whole."""
    found = newest(run)
    if found is None:
        raise BadRequest(f"{run}: every checkpoint of it is damaged; copy the folder again, or name another run")
    return found.model(str(run)), found


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a `step_N` folder; `Damaged` if one of its bytes is not what was written."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        hashes = state.pop("sha256")
        found = {name: sha256(folder / name) for name in (WEIGHTS, TRAINING)} | {STATE: _sha256_of(state)}
        wrong = [name for name in found if found[name] != hashes[name]]
    except OSError as error:
        raise Damaged(f"{Path(error.filename or folder).name}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{STATE} cannot be read") from error
    if wrong:
        raise Damaged(f"{wrong[0]} is not what was written")
    return Checkpoint(folder, state)


def _sha256_of(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def write(run: Path, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Write the checkpoint of `state["step"]` steps and return its folder; one of the same step is replaced.

    Raises:
        OSError, SafetensorError: it could not be written; what lay there before is as it was.
    """
    target = run / CHECKPOINTS / f"step_{state['step']:06d}"
    part = beside(target)
    try:
        part.mkdir(parents=True)
        needed = _bytes(weights, training)
        if shutil.disk_usage(part).free < needed + SPARE:
            raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and not free", str(target))
        save_file(dict(weights), part / WEIGHTS)
        save_file(dict(training), part / TRAINING)
        hashes = {name: sha256(part / name) for name in (WEIGHTS, TRAINING)}
        write_json(part / STATE, {**state, "sha256": {**hashes, STATE: _sha256_of(state)}})
        for path in (part / WEIGHTS, part / TRAINING, part / STATE, part):
            if path.suffix == ".safetensors":
                shutil.copymode(part / STATE, path)  # safetensors lets the owner alone read its files
            _sync(path)
        if target.exists():
            _remove(target)
        part.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _remove(folder: Path) -> None:
    """Delete a checkpoint, renaming it first: a process killed half-way leaves no half of one."""
    shutil.rmtree(folder.rename(beside(folder)))


def _bytes(*parts: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for part in parts for tensor in part.values())


def _sync(path: Path) -> None:
    """Flush a file, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Saver:
    """Saves a run as it goes. A failure is one warning: training goes on, and the older checkpoints stay.

    With an accelerator, the state is copied to host memory, and a thread writes it while the next steps run. On a CPU
    that thread would take cores from the step being timed, so the state is written between two steps, off the clock.
    This is also done where the copy does not fit in memory.
    """

    def __init__(self, run: Path, config: CheckpointConfig, from_step: int, *, background: bool) -> None:
        """`from_step`: steps already done. Checkpoints of later steps are deleted: these steps are trained again."""
        self.run, self.keep, self.background = run, config.keep, background
        self.last = from_step  # steps done at the newest checkpoint
        self._thread: threading.Thread | None = None
        self._failed = False
        beyond = [folder for step, folder in saved(run).items() if step > from_step]
        for folder in (*run.glob(f"{CHECKPOINTS}/.step_*.part"), *beyond):  # .part: of a process killed while it wrote
            shutil.rmtree(folder, ignore_errors=True)

    def save(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Save the state after `state["step"]` steps, unless it is saved already."""
        self.wait()
        if state["step"] == self.last:
            return
        if not all(bool(weight.isfinite().all()) for weight in weights.values()):
            return  # the update overflowed: the next step fails with that, and the last good checkpoint stays
        free = hardware.free_memory(torch.device("cpu")) or 0
        if self.background and free > 2 * _bytes(weights, training):
            weights, training = (
                {name: tensor.detach().to("cpu", copy=True) for name, tensor in part.items()}
                for part in (weights, training)
            )
            self._thread = threading.Thread(target=self._write, args=(weights, training, state))
            self._thread.start()
        else:
            self._write(weights, training, state)

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, weights: Mapping[str, Tensor], training: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        try:
            write(self.run, weights, training, state)
            self.last = state["step"]
            for folder in list(saved(self.run).values())[self.keep :]:
                _remove(folder)
        except (OSError, SafetensorError) as error:
            if not self._failed:
                why = getattr(error, "strerror", None) or first_line(error)
                log.warning("no checkpoint at step %d (%s); training goes on", state["step"], why)
            self._failed = True
