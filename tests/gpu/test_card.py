"""A GPU computes what a CPU does: losses in every precision against float64, also compiled and with a padded
vocabulary. TF32 is told from fp32 and switched back. Batches are copied ahead, checkpoints are written beside the
steps, and memory is as estimated.

A test that takes `device` runs on the CPU as well, so that its logic is tried where there is no GPU; `-m gpu` is for a
machine with one. The package uses no CUDA graphs, so none are tested.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import shared_runs
import support
import torch
from safetensors.torch import load_file
from torch import Tensor

from gpt2exp.config import (
    CheckpointConfig,
    DeviceName,
    Fallback,
    ModelConfig,
    PrecisionConfig,
    PrecisionName,
    RunConfig,
    TrainConfig,
)
from gpt2exp.data.batches import Windows
from gpt2exp.model.init import load_weights
from gpt2exp.run import checkpoint
from gpt2exp.section import BadRequest
from gpt2exp.training import hardware, precision, setup
from gpt2exp.training.optimizers import AdamW
from gpt2exp.training.trainer import Trainer

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64)
SIZE: dict[str, Any] = {"batch_size": 4, "seq_len": 32, "steps": 6}
WITHIN = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 1e-2, "fp16": 3e-3}
"""How far, relatively, a loss of six steps may be off float64's."""


@contextlib.contextmanager
def training(device: str, name: str = "fp32", **train: Any) -> Iterator[Trainer]:
    """The trainer that a run builds, inside its precision."""
    config = RunConfig(
        model=SHAPE,
        precision=PrecisionConfig(name=PrecisionName(name)),
        train=TrainConfig(**{**SIZE, "device": DeviceName(device), **train}),
        optimizer=AdamW(lr=1e-3, eps=1e-5),  # at 1e-8 a weight without gradient makes full steps of rounding errors
    )
    with setup.ready(config) as ready:
        yield setup.trainer(ready)[0]


def losses(device: str, name: str = "fp32", **train: Any) -> list[float]:
    """Of six steps."""
    with training(device, name, **train) as job:
        return [float(job.step()) for _ in range(SIZE["steps"])]


@pytest.fixture(scope="module")
def exact() -> list[float]:
    """The reference: float64 on the CPU."""
    found = losses("cpu", "fp64")
    assert found[-1] < found[0] - 0.05  # it learns, so that later losses depend on every update
    return found


def off(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", WITHIN)
def test_losses_are_the_references(device: str, name: str, exact: list[float]) -> None:
    distance = off(losses(device, name), exact)
    print(f"measured: {name} is off float64 by {distance:.1e} after {SIZE['steps']} steps")
    assert 0 < distance < WITHIN[name]


def test_tf32_is_set_told_from_fp32_and_put_back(device: str) -> None:
    here = torch.device(device)
    before = precision.probe(here)
    with precision.applied(PrecisionConfig(name=PrecisionName.tf32), here) as short:
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    with precision.applied(PrecisionConfig(), here) as full:
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    print(f"measured: relative errors, matmul and attention: {short} {full}")
    assert (short.effective, short.emulated, full.effective) == ("tf32", device == "cpu", "fp32")
    assert full.matmul_relative_error < 1e-6 < 1e-4 < short.matmul_relative_error < 1e-3
    assert precision.probe(here) == before
    strict = precision.applied(PrecisionConfig(name=PrecisionName.tf32, fallback=Fallback.error), here)
    if device == "cpu":
        with pytest.raises(BadRequest, match="computes fp32 instead"):
            strict.__enter__()
    else:
        with strict as got:
            assert not got.emulated


def test_bf16_keeps_its_weights_in_fp32(device: str) -> None:
    with training(device, "bf16") as job:
        job.step()
        state = job.optimizers[0].state[job.model.lm_head.weight]
        assert {parameter.dtype for parameter in job.model.parameters()} == {torch.float32}
        assert state["exp_avg"].dtype == torch.float32
        assert job.model.lm_head.weight.device.type == device


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_compiled_blocks_compute_the_same(slowly: str, name: str) -> None:
    if (slowly, name) == ("cpu", "bf16"):
        pytest.skip("a CPU's compiler takes half a minute: one precision shows the logic")
    eager = losses(slowly, name, compile=False)
    try:
        assert off(losses(slowly, name, compile=True), eager) < WITHIN[name]
    finally:
        torch._dynamo.reset()


def test_batches_copied_ahead_are_the_batches(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, pin = [], torch.Tensor.pin_memory

    def pin_memory(tensor: Tensor) -> Tensor:
        pinned.append(tensor.shape)
        return pin(tensor)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    with training(device) as job:
        on_card, config = job.batches, RunConfig(train=job.config)
        on_host = Windows(on_card.training, config.train, config.data, 0, torch.device("cpu"))
        job.step()
        assert (on_card._ahead is None) == (device == "cpu")  # a step has begun to copy the next batch
        for number in range(1, 100):
            x, y = on_card.train(number)
            on_card.prefetch(number + 1)
            for got, expected in zip((x, y), on_host.train(number), strict=True):
                assert got.device.type == device
                assert torch.equal(got.cpu(), expected)
    assert bool(pinned) == (device == "cuda")


def test_a_checkpoint_written_beside_the_steps_goes_on(device: str, tmp_path: Path) -> None:
    """It holds the weights of its step, though later steps change them while it is written."""
    with training(device) as job:
        for _ in range(3):
            job.step()
        weights, tensors, numbers = job.state()
        kept = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
        saver = checkpoint.Saver(tmp_path, CheckpointConfig(), 0, background=True)
        saver.save(weights, tensors, numbers)
        assert saver._thread is not None
        after = [float(job.step()) for _ in range(3)]
        saver.wait()
    saved = checkpoint.newest(tmp_path)
    assert saved is not None
    assert saved.step == 3
    found = saved.weights()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    with training(device) as job:
        load_weights(job.model, found)
        job.restore(saved.training(), saved.state)
        assert off([float(job.step()) for _ in range(3)], after) < WITHIN["fp32"]


def test_a_run_goes_on(slowly: str, tmp_path: Path) -> None:
    """The command itself: stopped after four steps of six, resumed, the same losses as without a stop."""
    common = [*support.SMALL, f"train.device={slowly}", "wandb.mode=disabled", "checkpoint.save_last=true"]
    for words in (["train.steps=4", "hydra.run.dir=run"], ["train.steps=6", "hydra.run.dir=whole"]):
        done = support.run(tmp_path / "work", *common, *words)
        assert done.returncode == 0, done.stderr
    done = support.run(tmp_path / "work", "resume=run", "train.steps=6")
    assert done.returncode == 0, done.stderr
    assert off(*(support.losses(tmp_path / "work" / name) for name in ("run", "whole"))) < WITHIN["fp32"]
    summary = support.read(tmp_path / "work" / "whole" / "summary.json")
    assert summary["device"].startswith(f"{slowly}: ")
    known = slowly == "cuda" and hardware.peak_flops(torch.cuda.get_device_name(), "fp32")
    assert (summary["mfu"] is not None) == bool(known)


def test_losses_with_a_padded_vocabulary(device: str) -> None:
    found = {}
    for pad in (False, True):
        with training(device, pad_vocab=pad) as job:
            assert len(job.model.lm_head.weight) == SHAPE.vocab_size
            steps = [job.timed_step() for _ in range(SIZE["steps"])]
        found[pad] = [float(loss) for loss, *_ in steps]
        print(f"measured: pad_vocab={pad} step {1e3 * statistics.median(seconds for _, seconds, _ in steps):.2f} ms")
    assert off(found[True], found[False]) < WITHIN["fp32"]
    assert hardware.pads_vocabulary("auto", torch.device("cuda"))


MEMORY = {
    "nano": ("cpu", ["model=nano", "train.batch_size=2", "train.seq_len=256"]),
    "fp32": ("cuda", ["train.batch_size=16", "train.seq_len=1024"]),
    "bf16": ("cuda", ["train.batch_size=16", "train.seq_len=1024", "precision=bf16"]),
    "recomputed": ("cuda", ["train.batch_size=16", "train.seq_len=1024", "train.activation_checkpointing=true"]),
    "untied": ("cuda", ["train.batch_size=4", "train.seq_len=512", "model.tie_weights=false"]),
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.gpu if kind == "cuda" else pytest.mark.slow)
        for name, (kind, _) in MEMORY.items()
    ],
)
def test_memory_is_as_estimated(case: str) -> None:
    """Within 15 % on a card; a CPU's kept heap fragments otherwise in every run."""
    kind, overrides = MEMORY[case]
    line = [
        sys.executable,
        "-m",
        "gpt2exp.bench",
        *overrides,
        f"train.device={kind}",
        "--steps",
        "4",
        "--child",
        "ours",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"measured: estimated {found['estimated_mib']:.0f} MiB, peak {found['peak_rss_mib']:.0f} MiB")
    assert found["estimated_mib"] == pytest.approx(found["peak_rss_mib"], rel=0.15 if kind == "cuda" else 0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [1, 2])
def test_processes_with_a_card_each_compute_what_one_does(processes: int, tmp_path: Path) -> None:
    if processes > torch.cuda.device_count():
        pytest.skip(f"needs {processes} GPUs, and there is {torch.cuda.device_count()}")
    check_processes(processes, "cuda", tmp_path / "found.safetensors")


@pytest.mark.slow
def test_the_comparison_of_processes_itself(tmp_path: Path) -> None:
    """`tests/whole/test_parallel.py` compares more cases on the CPU."""
    check_processes(1, "cpu", tmp_path / "found.safetensors")


def check_processes(processes: int, device: str, file: Path) -> None:
    """DDP's losses, norms and gradients are those of one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script = [shared_runs.__file__, str(file), device, *CASES]
    subprocess.run([*command, *script], check=True, timeout=300, capture_output=True)
    found = load_file(file)
    for case, within in CASES.items():
        for name, expected in shared_runs.train(case, "ddp", device).items():
            if not name.startswith("weight."):  # AdamW's first steps make a sign of a gradient of any size
                got, expected = found[f"ddp/{case}/{name}"].double().cpu(), expected.double().cpu()
                assert float((got - expected).norm() / expected.norm()) < within, (case, name)


CASES = {"tied": 1e-4, "untied, clipped, accumulated, shuffled": 1e-4, "bf16, recomputed": 1e-2}
