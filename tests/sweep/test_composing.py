"""Hydra composes a sweep once for each combination of groups, and yet every job is what Hydra would compose for it
alone: its configuration, and what its `.hydra` holds.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf

from gpt2exp import schema, section
from gpt2exp.run import record
from gpt2exp.sweep import composing, request
from gpt2exp.sweep.overrides import as_meant

AXES: dict[str, list[str]] = {
    "model": ["nano", "gpt2"],
    "precision": ["fp32", "tf32", "bf16"],
    "init": ["gpt2", "xavier"],
    "seed": ["1", "2", "3"],
    "model.n_layer": ["1", "2"],
    "model.tie_weights": ["true", "False"],
    "optimizer.lr": ["1e-3", "0.01", "${optimizer.eps}"],
    "optimizer.min_lr": ["0", "${optimizer.lr}"],
    "optimizer.betas": ["[0.9,0.95]", "[0.8,0.99]"],
    "optimizer.warmup_steps": ["0", "7"],
    "train.batch_size": ["2", "auto"],
    "wandb.name": ["a", "'b, c'", "null", "run-${seed}"],
    "wandb.tags": ["[x]", "[y,${seed}]"],
    "wandb.group": ["'2024_01'", "'1e3'"],
}


@pytest.mark.parametrize("number", [0, 1, 3, 7])  # which have every key among them
def test_as_composed_alone(number: int, tmp_path: Path) -> None:
    """Several random jobs in one sweep, some keys in all of them: equal to Hydra's own, in memory and on disk."""
    chance = random.Random(number)
    keys = chance.sample(list(AXES), 6)
    texts = [f"{key}={chance.choice(AXES[key])}" for key in set(AXES) - set(keys) if chance.random() < 0.4]
    texts += ["optimizer.schedule=cosine"]  # else min_lr has no meaning
    jobs = [[f"{key}={chance.choice(AXES[key])}" for key in keys if chance.random() < 0.95] + texts for _ in range(5)]
    with composing.open_composer(composing.arguments(["-m"])) as composer:
        master = composer.compose([], multirun=True)
        for place, (told, got) in enumerate(zip(jobs, composer.jobs(master, jobs), strict=True)):
            alone = composer.loader.load_configuration("config", told, run_mode=RunMode.RUN)
            own = OmegaConf.masked_copy(alone, composing.SECTIONS)
            assert got.config == schema.parse(own)
            folder = tmp_path / str(place)
            composing.write_hydra_folder(folder, got)
            assert OmegaConf.load(folder / ".hydra" / "config.yaml") == OmegaConf.create(OmegaConf.to_yaml(own))
            assert OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml")) == told
            settings = OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra
            assert OmegaConf.to_container(settings.overrides)["task"] == told
            assert settings.runtime.choices == alone.hydra.runtime.choices
            assert record.read_config(folder)[::2] == (got.config, told)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=range(1,31)"], 1),
        (
            [
                "seed=range(1,31)",
                "optimizer.lr=1e-3,3e-3",
                "optimizer.min_lr=${optimizer.lr}",
                "optimizer.schedule=cosine",
            ],
            1,
        ),
        (["seed=range(1,11)", "precision=fp32,tf32,bf16"], 3),
    ],
)
def test_how_often_hydra_composes(words: list[str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the sweep, and once for each combination of groups."""
    composed: list[int] = []
    real = composing.ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        composing.ConfigLoaderImpl, "load_configuration", lambda *a, **k: (composed.append(1), real(*a, **k))[1]
    )
    jobs = request.new_request(composing.arguments(["-m", "model=nano", *words])).jobs
    assert len(composed) == 1 + expected
    assert len({job.folder for job in jobs}) == len(jobs)


def test_tokens_per_step_as_an_axis() -> None:
    """The value of `grad_accum_steps` that the first job gets is not the next job's."""
    jobs = request.new_request(composing.arguments(["-m", "model=nano", "train.tokens_per_step=256,512,128"])).jobs
    assert [job.config.train.grad_accum_steps for job in jobs] == [2, 4, 1]


def test_a_bad_value_in_the_last_job() -> None:
    """It is refused, though Hydra composed only the first job."""
    with pytest.raises(section.BadRequest, match=r"^train\.seq_len=4096: "):
        request.new_request(composing.arguments(["-m", "model=gpt2", "train.seq_len=32,64,4096"]))


def test_a_budget_is_one_more_axis() -> None:
    """`sweep.over`: the product with it, ascending, however it was typed; `sweep.until` counts it as no question."""
    typed = ["-m", as_meant("sweep.over=train.steps=20,5,10"), "model.tie_weights=true,false", "seed=1,2"]
    asked = request.new_request(composing.arguments(typed))
    of = [(job.config.seed, job.config.model.tie_weights, job.config.train.steps) for job in asked.jobs]
    assert sorted(of) == sorted(
        (seed, tied, steps) for seed in (1, 2) for tied in (True, False) for steps in (5, 10, 20)
    )
    assert [steps for _, _, steps in of[:3]] == [5, 10, 20]
    assert all(job.config.sweep.over == "train.steps=20,5,10" for job in asked.jobs)
    until = request.new_request(composing.arguments([*typed[:3], "sweep.until=answered", "sweep.max_seeds=3"]))
    assert list(until.stopping_rule["axes"]) == ["model.tie_weights"]
    assert len(until.jobs) == 3 * 2 * 3
