"""An optimizer is a choice of the group `optimizer`, with keys of its own; a checkpoint holds its whole state."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import SMALL, losses, read, run
from torch import Tensor

from gpt2exp import schema
from gpt2exp.config import OptimizerConfig, RunConfig
from gpt2exp.section import BadRequest
from gpt2exp.sweep import composing
from gpt2exp.sweep import request as requests
from gpt2exp.training import optimizer_state
from gpt2exp.training.optimizers import SGD, AdamW


def only(*args: str) -> RunConfig:
    """The configuration of a command line with one job; flags first, as the program puts them."""
    (job,) = requests.new_request(composing.arguments(args)).jobs
    return job.config


def test_a_step_of_sgd_is_numpys() -> None:
    """Momentum, Nesterov's look ahead, and decay of matrices alone."""
    rng = np.random.default_rng(0)
    model = torch.nn.Linear(3, 2)
    (made,) = SGD(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05).build(model)
    weights = [p.detach().numpy().astype(np.float64) for p in model.parameters()]
    buffers: list[Any] = [None, None]
    for _ in range(4):
        for number, parameter in enumerate(model.parameters()):
            gradient = rng.normal(size=parameter.shape)
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            gradient = gradient + (0.05 * weights[number] if parameter.dim() == 2 else 0)
            before = buffers[number]
            buffers[number] = gradient if before is None else 0.8 * before + gradient
            weights[number] = weights[number] - 0.1 * (gradient + 0.8 * buffers[number])
        made.step()
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        (AdamW(lr=0.1), {"step", "exp_avg", "exp_avg_sq"}),
        (SGD(lr=0.1), {"momentum_buffer"}),
        (SGD(lr=0.1, momentum=0.0), set()),
    ],
    ids=["adamw", "sgd", "sgd without momentum"],
)
def test_what_it_keeps_goes_in_and_out(asked: OptimizerConfig, keys: set[str]) -> None:
    def stepped(steps: int, tensors: dict[str, Tensor] | None = None) -> tuple[torch.nn.Linear, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        made = asked.build(model)
        if tensors is not None:
            optimizer_state.restore(model, made, tensors)
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            for one in made:
                one.step()
        return model, optimizer_state.state(model, made)

    _, once = stepped(1)
    assert {name.partition(".")[0] for name in once} == keys
    copies = {name: tensor.clone() for name, tensor in once.items()}
    _, twice = stepped(1, copies)
    assert not copies, "no second copy is left"
    assert twice.keys() == once.keys()
    _, expected = stepped(2)
    assert all(torch.equal(twice[name], expected[name]) for name in expected)
    with pytest.raises(BadRequest, match=r"odd\.weight is not kept by this optimizer"):
        stepped(1, {**once, "odd.weight": torch.ones(2, 3)})


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_does_without_dynamo(tmp_path: Path, name: str) -> None:
    """PyTorch's optimizers import it, which takes a second, to keep it from tracing what nothing traces here."""
    program = [sys.executable, "-X", "importtime", "-m", "gpt2exp.train"]
    done = run(tmp_path, *SMALL, f"optimizer={name}", "train.steps=2", "wandb.mode=disabled", program=program)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.returncode == 0, done.stderr
    assert "torch" in imported
    assert "torch._dynamo" not in imported


def test_its_moments_are_counted() -> None:
    for asked in (AdamW(), SGD()):
        model = torch.nn.Linear(30, 20)
        (made,) = asked.build(model)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        made.step()
        kept = sum(tensor.numel() for tensor in optimizer_state.state(model, [made]).values() if tensor.dim())
        assert kept == asked.moments * sum(p.numel() for p in model.parameters())


def test_a_stored_configuration_has_the_keys_of_its_choice() -> None:
    asked = schema.plain(schema.parse({"optimizer": {"name": "sgd", "momentum": 0.5}}))
    today, unknown = schema.stored(asked)
    assert (today, unknown) == (asked, {})
    assert schema.parse(today).optimizer == SGD(momentum=0.5)
    _, unknown = schema.stored({"optimizer": {"name": "sgd", "betas": [0.9, 0.999]}})
    assert unknown == {"optimizer.betas": [0.9, 0.999]}


def test_a_run_with_sgd_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    asked = (*SMALL, "optimizer=sgd", "optimizer.momentum=0.5", "checkpoint.save_last=true", "wandb.mode=disabled")
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder, steps in ((whole, 4), (part, 2)):
        assert run(tmp_path, *asked, f"train.steps={steps}", f"hydra.run.dir={folder}").returncode == 0
    assert read(whole / "summary.json")["config"]["optimizer"]["momentum"] == 0.5
    again = run(tmp_path, f"resume={part}", "train.steps=4")
    assert again.returncode == 0, again.stderr
    assert losses(part) == losses(whole)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("optimizer=sgd", "optimizer.betas=[0.9,0.95]"), r"^optimizer\.betas: a key of optimizer=adamw alone"),
        (("optimizer.momentum=0.5",), r"^optimizer\.momentum: a key of optimizer=sgd alone"),
        (("optimizer.name=sgd",), r"write optimizer=sgd$"),
        (("optimizer=sdg",), r"did you mean optimizer=sgd\? Choices: adamw, sgd$"),
        (("optimizer=sgd", "optimizer.momentum=high"), r"^optimizer\.momentum=high: must be a number"),
        (("optimizer=sgd", "optimizer.momentum=1"), r"^optimizer\.momentum=1\.0: must be a finite number at least 0"),
        (("optimizer=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"), r"^optimizer\.nesterov=true: needs"),
    ],
)
def test_bad_requests(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(BadRequest, match=said) as refused:
        only(*words)
    assert len(str(refused.value).splitlines()) == 1


def test_a_users_own_file(tmp_path: Path) -> None:
    """With the keys that all have, or with all of a choice's by `defaults`."""
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "slow.yaml").write_text("name: adamw\nlr: 1e-5\n")
    (tmp_path / "optimizer" / "plain.yaml").write_text("defaults: [sgd_schema]\nmomentum: 0.0\n")
    for name, expected in (("slow", AdamW(lr=1e-5)), ("plain", SGD(momentum=0.0))):
        assert only("--config-dir", str(tmp_path), f"optimizer={name}").optimizer == expected
