"""A checkpoint is complete or absent, whatever fails while it is written; damage is found by its hashes; a failed
checkpoint never stops training; and training from a checkpoint equals training without a stop, bit for bit.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support import SMALL, read, run
from torch import Tensor

from gpt2exp.config import (
    CheckpointConfig,
    DataConfig,
    DataOrder,
    InitConfig,
    ModelConfig,
    PrecisionConfig,
    ProductLibrary,
    RunConfig,
    TrainConfig,
)
from gpt2exp.data.batches import Windows
from gpt2exp.model import init
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.run import checkpoint, record
from gpt2exp.section import BadRequest
from gpt2exp.training import distributed, hardware, optimizer_state, setup
from gpt2exp.training.optimizers import AdamW
from gpt2exp.training.trainer import Trainer

CPU = torch.device("cpu")


def tensors(value: float = 1.0, size: int = 1000) -> dict[str, Tensor]:
    """Something to save."""
    return {"a": torch.full((size,), value), "b": torch.arange(6.0).view(2, 3) + value}


def save(run: Path, step: int, value: float = 1.0) -> Path:
    """A checkpoint written by hand."""
    return checkpoint.write(run, tensors(value), tensors(-value), {"step": step, "config": {"seed": 3}})


def saver(run: Path, from_step: int = 0, *, background: bool = False, **config: Any) -> checkpoint.Saver:
    """A saver of a run."""
    return checkpoint.Saver(run, CheckpointConfig(**config), from_step, background=background)


def names(run: Path) -> list[str]:
    """The names in the folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def trained(steps: int, *, tie: bool = True, autocast: torch.dtype | None = None, total: int = 9) -> Trainer:
    """A trainer with some steps done."""
    gpt = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=8, block_size=16, vocab_size=50, tie_weights=tie))
    initialise(gpt, InitConfig(), 0)
    train = TrainConfig(batch_size=2, seq_len=8, steps=total, grad_accum_steps=2)
    text = (torch.arange(2000) ** 2 % 47).numpy().astype("<u2")
    batches = Windows(text, train, DataConfig(order=DataOrder.shuffled), 0, CPU)
    trainer = Trainer(gpt, batches, RunConfig(train=train, optimizer=AdamW(lr=1e-2)), autocast=autocast)
    for _ in range(steps):
        trainer.step()
    return trainer


class TestWhatIsWritten:
    """The files and what they hold."""

    def test_a_round_trip(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 50)
        assert folder == tmp_path / "checkpoints" / "step_000050"
        assert sorted(path.name for path in folder.iterdir()) == [
            "model.safetensors",
            "state.json",
            "training.safetensors",
        ]
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert (found.step, found.state["config"]) == (50, {"seed": 3})
        for name, tensor in tensors().items():
            assert torch.equal(found.weights()[name], tensor)
        assert torch.equal(found.training()["a"], tensors(-1.0)["a"])
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who may read one may read all"

    def test_hashes_are_those_of_the_files(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 1)
        hashes = json.loads((folder / "state.json").read_text())["sha256"]
        done = subprocess.run(
            ["sha256sum", "model.safetensors", "training.safetensors"], cwd=folder, capture_output=True, text=True
        )
        assert dict(line.split()[::-1] for line in done.stdout.splitlines()).items() <= hashes.items()

    @pytest.mark.parametrize("tie", [True, False])
    def test_names_are_hugging_faces_and_a_tied_tensor_comes_once(self, tmp_path: Path, tie: bool) -> None:
        trainer = trained(1, tie=tie)
        folder = checkpoint.write(tmp_path, *trainer.state())
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = set(file.keys())
        assert "transformer.wte.weight" in found
        assert "transformer.h.1.attn.c_attn.bias" in found
        assert ("lm_head.weight" in found) is not tie
        with safe_open(folder / "training.safetensors", "pt") as file:
            moments = set(file.keys())
        assert {f"{key}.{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in found} <= moments
        weights = (folder / "model.safetensors").stat().st_size
        assert (folder / "training.safetensors").stat().st_size < 2 * weights + 20_000, "12 bytes a parameter in all"

    def test_the_same_step_again_takes_its_place(self, tmp_path: Path) -> None:
        save(tmp_path, 5, 1.0)
        save(tmp_path, 5, 2.0)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert found.weights()["a"][0] == 2.0
        assert names(tmp_path) == ["step_000005"]


class TestDamage:
    """Every byte is checked, and the checkpoint before it is used instead."""

    @pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
    @pytest.mark.parametrize("harm", ["flip", "truncate", "empty", "remove"])
    def test_it_is_seen(self, tmp_path: Path, file: str, harm: str, caplog: pytest.LogCaptureFixture) -> None:
        logging.getLogger("gpt2exp").propagate = True
        save(tmp_path, 1, 1.0)
        path = save(tmp_path, 2, 2.0) / file
        data = bytearray(path.read_bytes())
        if harm == "flip":
            at = data.index(b'"seed": 3') + 8 if file == "state.json" else len(data) - 3
            data[at] ^= 1
        cut = {"flip": len(data), "truncate": len(data) - 7, "empty": 0, "remove": 0}[harm]
        path.write_bytes(data[:cut])
        if harm == "remove":
            path.unlink()
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert (found.step, float(found.weights()["a"][0])) == (1, 1.0)
        assert "step_000002 is damaged" in caplog.text

    def test_none_is_whole(self, tmp_path: Path) -> None:
        (save(tmp_path, 1) / "state.json").write_text("[]")
        assert checkpoint.newest(tmp_path) is None

    def test_steps_that_the_metrics_lack(self, tmp_path: Path) -> None:
        for step in (10, 20):
            save(tmp_path, step)
        found = checkpoint.newest(tmp_path, at_most=19)
        assert found is not None
        assert found.step == 10

    def test_what_lies_beyond_is_deleted(self, tmp_path: Path) -> None:
        """A run that goes on from before a damaged checkpoint trains those steps again."""
        for step in (10, 20):
            save(tmp_path, step)
        writing = saver(tmp_path, 10, keep=1)
        writing.save(tensors(), tensors(), {"step": 15})
        assert names(tmp_path) == ["step_000015"]


class TestSaver:
    """Saving during a run."""

    @pytest.mark.parametrize("background", [False, True])
    def test_it_keeps_the_newest(self, tmp_path: Path, background: bool) -> None:
        writing = saver(tmp_path, keep=2, background=background)
        weights = tensors(0.0)
        for step in (1, 2, 3, 4):
            writing.save(weights, tensors(), {"step": step})
            for tensor in weights.values():
                tensor.add_(1)  # training goes on while a thread writes: it has a copy
        writing.wait()
        assert names(tmp_path) == ["step_000003", "step_000004"]
        for step, folder in record.saved(tmp_path).items():
            assert float(checkpoint.read(folder).weights()["a"][0]) == step - 1

    def test_the_background_is_another_thread(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import threading

        threads = []
        real = checkpoint.write
        monkeypatch.setattr(
            checkpoint, "write", lambda *args: threads.append(threading.current_thread()) or real(*args)
        )
        for background in (True, False):
            writing = saver(tmp_path / str(background), background=background)
            writing.save(tensors(), tensors(), {"step": 1})
            writing.wait()
        assert threads[0] is not threading.main_thread()
        assert threads[1] is threading.main_thread()

    def test_no_room_for_a_copy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then it is written between two steps."""
        monkeypatch.setattr(hardware, "free_memory", lambda _: 100)
        writing = saver(tmp_path, background=True)
        writing.save(tensors(), tensors(), {"step": 1})
        assert names(tmp_path) == ["step_000001"], "before wait()"

    def test_a_step_is_saved_once(self, tmp_path: Path) -> None:
        writing = saver(tmp_path)
        writing.save(tensors(), tensors(), {"step": 1})
        before = (tmp_path / "checkpoints" / "step_000001").stat().st_ino
        writing.save(tensors(2.0), tensors(), {"step": 1})
        assert (tmp_path / "checkpoints" / "step_000001").stat().st_ino == before

    def test_weights_that_are_no_numbers_are_not_saved(self, tmp_path: Path) -> None:
        """Else the last good checkpoint would be deleted for a worthless one."""
        writing = saver(tmp_path, keep=1)
        writing.save(tensors(), tensors(), {"step": 1})
        writing.save(tensors(float("nan")), tensors(), {"step": 2})
        assert names(tmp_path) == ["step_000001"]

    def test_what_a_killed_process_left_is_cleared(self, tmp_path: Path) -> None:
        left = tmp_path / "checkpoints" / ".step_000007.123-abc.part"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_bytes(b"half")
        assert checkpoint.newest(tmp_path) is None
        saver(tmp_path)
        assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


class TestTrouble:
    """The disk fills, the folder is taken away, the right to write is lost."""

    @pytest.mark.parametrize("known", [True, False])
    def test_disk_full(
        self, small_disk: Path, known: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seen beforehand, or met while writing where something else takes the room: one warning, the older intact."""
        logging.getLogger("gpt2exp").propagate = True
        if not known:
            monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 2**40))
        monkeypatch.setattr(checkpoint, "SPARE", 20_000)  # the usual reserve is larger than this disk
        writing = saver(small_disk)
        writing.save(tensors(), tensors(), {"step": 1})
        for step in (2, 3):
            writing.save(tensors(2.0, 5_000_000), tensors(), {"step": step})
        found = checkpoint.newest(small_disk)
        assert found is not None
        assert (found.step, float(found.weights()["a"][0])) == (1, 1.0)
        assert names(small_disk) == ["step_000001"]
        assert [entry.levelname for entry in caplog.records] == ["WARNING"]
        assert "no checkpoint at step 2" in caplog.text
        (small_disk / "metrics.jsonl").write_text("room for the next steps\n" * 100)

    def test_disk_full_in_a_run(self, small_disk: Path, tmp_path: Path) -> None:
        """One checkpoint of 9.7 MB fits, the two after it do not: the run ends well, and the one is whole."""
        args = [*SMALL, "train.steps=6", "checkpoint.every=2", "wandb.mode=disabled"]
        done = run(tmp_path / "here", *args, f"hydra.run.dir={small_disk}/run")
        assert done.returncode == 0
        (warning,) = done.stderr.splitlines()
        assert warning.startswith("warning: no checkpoint at step 4 (10 MB are needed and not free); training goes on")
        assert read(small_disk / "run" / "summary.json")["state"] == "done"
        assert names(small_disk / "run") == ["step_000002"]
        found = checkpoint.newest(small_disk / "run")
        assert found is not None

    def test_a_disk_without_room_is_not_filled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The room that is left is for the metrics."""
        free = checkpoint.SPARE + checkpoint._bytes(tensors(), tensors())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        save(tmp_path, 1)
        free -= 1
        with pytest.raises(OSError, match="MB are needed and not free"):
            save(tmp_path, 2)
        assert names(tmp_path) == ["step_000001"]

    def test_a_file_in_the_way(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        logging.getLogger("gpt2exp").propagate = True
        (tmp_path / "checkpoints").write_text("")
        writing = saver(tmp_path)
        writing.save(tensors(), tensors(), {"step": 1})
        assert "training goes on" in caplog.text

    def test_permission_lost(self) -> None:
        """As a user other than root, who may write everywhere."""
        if os.geteuid() != 0:
            pytest.skip("needs root to become another user")
        script = """
import os, pathlib, tempfile, torch
from gpt2exp.run import checkpoint
from gpt2exp.config import CheckpointConfig
run = pathlib.Path(tempfile.mkdtemp())
saver = checkpoint.Saver(run, CheckpointConfig(), 0, background=False)
one = {"a": torch.ones(10)}
saver.save(one, one, {"step": 1})
for path in (run, run / "checkpoints"):
    os.chown(path, 65534, 65534)
os.setuid(65534)
(run / "checkpoints").chmod(0o500)
saver.save(one, one, {"step": 2})
saver.save(one, one, {"step": 3})
(run / "checkpoints").chmod(0o700)
print(sorted(path.name for path in (run / "checkpoints").iterdir()), checkpoint.newest(run).step)
saver.save(one, one, {"step": 4})
print(checkpoint.newest(run).step)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.stdout.splitlines() == ["['step_000001'] 1", "4"], done.stderr
        assert done.stderr.count("training goes on") == 1
        assert "Permission denied" in done.stderr


class TestRestore:
    """Steps after a checkpoint are those without one, to the last bit."""

    @pytest.mark.parametrize("autocast", [None, torch.float16])
    @pytest.mark.parametrize("tie", [True, False])
    def test_bit_for_bit(self, tmp_path: Path, tie: bool, autocast: torch.dtype | None) -> None:
        whole, first = trained(9, tie=tie, autocast=autocast), trained(4, tie=tie, autocast=autocast)
        weights, training, numbers = first.state()
        assert numbers["micro_batches"] == 8
        checkpoint.write(tmp_path, weights, training, json.loads(json.dumps(numbers)))
        found = checkpoint.newest(tmp_path)
        assert found is not None
        second = trained(0, tie=tie, autocast=autocast)
        init.load_weights(second.model, found.weights())
        second.restore(found.training(), found.state)
        for _ in range(5):
            second.step()
        for (name, one), (_, other) in zip(
            whole.model.named_parameters(), second.model.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
        states = [optimizer_state.state(job.model, job.optimizers) for job in (whole, second)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert whole.scaler.state_dict() == second.scaler.state_dict()

    def test_equal_runs_leave_equal_files(self, tmp_path: Path) -> None:
        """Whatever else the process drew."""
        for name in ("one", "other"):
            torch.rand(7)
            checkpoint.write(tmp_path / name, *trained(2).state())
        for file in ("model.safetensors", "training.safetensors"):
            one, other = (tmp_path / name / "checkpoints/step_000002" / file for name in ("one", "other"))
            assert one.read_bytes() == other.read_bytes(), file

    def test_a_checkpoint_with_the_random_state(self, tmp_path: Path) -> None:
        """As earlier versions wrote it."""
        weights, training, numbers = trained(4).state()
        checkpoint.write(tmp_path, weights, training | {"random.cpu": torch.get_rng_state()}, numbers)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        second = trained(0)
        second.restore(found.training(), found.state)
        assert second.steps_done == 4
        assert optimizer_state.state(second.model, second.optimizers).keys() == training.keys()

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"exp_avg.transformer.wte.weight": None}, r"exp_avg\.transformer\.wte\.weight is not in it"),
            ({"momentum.transformer.wte.weight": torch.zeros(50, 8)}, r"momentum\.\S+ is not kept by this optimizer"),
            (
                {"exp_avg.transformer.wte.weight": torch.zeros(8)},
                r"exp_avg\.\S+ is \(\(8,\), .*, not \(\(50, 8\)",
            ),
            ({"step.transformer.wte.weight": torch.zeros((), dtype=torch.int64)}, r"step\.\S+ is .*int64"),
            (None, r"is not in it"),
        ],
        ids=["missing", "extra", "shape", "type", "none"],
    )
    def test_another_optimizers_state(self, change: dict[str, Tensor | None] | None, said: str) -> None:
        _weights, training, numbers = trained(2).state()
        changed = {} if change is None else training | change
        changed = {key: value for key, value in changed.items() if value is not None}
        second = trained(0)
        with pytest.raises(BadRequest, match=rf"the optimizer's state in the checkpoint: .*{said}.*start a new run"):
            second.restore(changed, numbers)
        assert not second.optimizers[0].state, "nothing was taken from it"

    def test_before_the_first_step_that_did_not_overflow(self) -> None:
        """In fp16 the first steps may be skipped while the scale falls: there are no moments yet."""
        first = trained(0, autocast=torch.float16)
        _weights, training, numbers = first.state()
        assert training == {}
        second = trained(0, autocast=torch.float16)
        second.restore(training, numbers)
        assert float(second.step()) == float(first.step())

    def test_nothing_is_made_up_for_the_other_processes(self) -> None:
        with pytest.raises(ValueError, match="no tensor to broadcast"):
            distributed.broadcast_like(None, torch.zeros(3))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"tie_weights": False}, r"model\.tie_weights=false: .*are tied.*try model\.tie_weights=true"),
            ({"n_embd": 16}, r"model: transformer\.wte\.weight is \(50, 8\) in the checkpoint, \(50, 16\) in the mod"),
            ({"n_layer": 3}, r"model: transformer\.h\.2\.\S+ is absent in the checkpoint"),
        ],
    )
    def test_another_model(self, change: dict[str, Any], said: str) -> None:
        weights = dict(trained(0).model.named_parameters())
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 8, "block_size": 16, "vocab_size": 50} | change
        with pytest.raises(BadRequest, match=said):
            init.load_weights(GPT(ModelConfig(**shape)), weights)

    def test_untied_into_tied(self) -> None:
        with pytest.raises(BadRequest, match=r"model\.tie_weights=true: .*try model\.tie_weights=false"):
            init.load_weights(trained(0).model, dict(trained(0, tie=False).model.named_parameters()))


def test_what_the_first_part_settled_is_kept() -> None:
    state = {"settled": {"batch_size": 2, "compile": True, "of another version": 1}, "precision": {"library": "onednn"}}
    began = setup.as_begun(RunConfig(train=TrainConfig(batch_size="auto")), state)
    assert (began.train.batch_size, began.train.compile, began.precision.library) == (2, True, "onednn")
    for asked in ProductLibrary:  # a checkpoint from before there was a choice
        config = RunConfig(precision=PrecisionConfig(library=asked))
        assert setup.as_begun(config, {"settled": {}, "precision": {}}).precision.library == "torch"
