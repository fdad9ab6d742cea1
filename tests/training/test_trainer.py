"""The training step: accumulation equals one batch. Parameter groups, learning rate, clipping, time, tokens, memory and
the loss of unseen tokens are correct.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gpt2exp.config import DataConfig, InitConfig, ModelConfig, RunConfig, Schedule, TrainConfig
from gpt2exp.data import batches as windows
from gpt2exp.data import tokens
from gpt2exp.data.batches import Windows
from gpt2exp.model import size
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.run import job as jobs
from gpt2exp.section import AUTO
from gpt2exp.training import distributed, hardware, load, measures, optimizers, setup
from gpt2exp.training.optimizers import AdamW
from gpt2exp.training.precision import Precision, cast
from gpt2exp.training.trainer import Diverged, Trainer

CPU = torch.device("cpu")
WORDS = 211
ALWAYS = {"step", "lr", "loss", "tokens", "step_ms", "tokens_per_second"}
if load.waited() is not None:
    ALWAYS.add("waited_ms")
COSINE = {"schedule": Schedule.cosine}


def stream(length: int = 3000) -> tokens.Tokens:
    """A text over the even ones of 211 words: something to learn, and words that never occur."""
    return (2 * np.random.default_rng(0).zipf(1.5, length).clip(max=WORDS // 2)).astype("<u2")


def model(tie: bool = True, **shape: int) -> GPT:
    """A tiny GPT, initialised."""
    gpt = GPT(
        ModelConfig(
            **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "vocab_size": WORDS, **shape}, tie_weights=tie
        )
    )
    initialise(gpt, InitConfig(), seed=0)
    return gpt


def trainer(
    gpt: GPT | None = None,
    text: tokens.Tokens | None = None,
    *,
    optimizer: AdamW | None = None,
    seen: Tensor | None = None,
    validation: tokens.Tokens | None = None,
    **train: int,
) -> Trainer:
    """A trainer on the text in order."""
    config = TrainConfig(**{"batch_size": 4, "seq_len": 16, "steps": 5, **train})
    text = stream() if text is None else text
    held_out = 0 if validation is None else len(validation)
    whole = text if validation is None else np.concatenate([text, validation])
    batches = Windows(whole, config, DataConfig(val_fraction=held_out / len(whole)), 0, CPU)
    asked = RunConfig(train=config, optimizer=optimizer or AdamW(), data=DataConfig(val_fraction=held_out / len(whole)))
    return Trainer(gpt or model(), batches, asked, seen=seen)


def state(gpt: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights by name."""
    return {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}


def by_hand(
    gpt: GPT,
    text: tokens.Tokens,
    steps: int,
    B: int,  # noqa: N803
    T: int,  # noqa: N803
    clip: float = math.inf,
    **adamw: Any,
) -> list[float]:
    """The textbook's loop: dense autograd, PyTorch's AdamW on its two groups, batches by slicing. No lever."""
    matrices = [p for name, p in gpt.named_parameters() if p.dim() == 2]
    vectors = [p for name, p in gpt.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
        foreach=False,
        fused=False,
        **adamw,
    )
    losses = []
    for step in range(steps):
        part = torch.from_numpy(text[step * B * T : (step + 1) * B * T + 1].astype(np.int64))
        logits = gpt(part[:-1].view(B, T))
        loss = F.cross_entropy(logits.flatten(0, 1), part[1:])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_blocks_are_compiled_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    trainer()
    assert compiled == []
    job = trainer(compile=True)
    assert compiled == list(job.model.transformer.h)


def test_training_moves_no_global_random_state() -> None:
    before = torch.get_rng_state()
    text = stream()
    list(trainer(seen=torch.from_numpy(np.unique(text).astype(np.int64)), validation=text[:200]).fit())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("tie", [True, False])
def test_matrices_and_embeddings_decay_and_the_rest_does_not(tie: bool) -> None:
    gpt = model(tie)
    (optimizer,) = AdamW(weight_decay=0.3, betas=[0.8, 0.95], eps=1e-6, lr=0.01).build(gpt)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in gpt.named_parameters():
        leaf_decays = name.endswith(".weight") and ".ln_" not in name
        assert decay.pop(id(parameter)) == (0.3 if leaf_decays else 0.0), name
    assert not decay
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    # without a gradient's push a step is the decay alone: weights shrink by lr times the rate
    before = state(gpt)
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in state(gpt).items():
        factor = 1 - 0.01 * 0.3 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter, factor * before[name], atol=1e-8, rtol=1e-6)


class TestLearningRate:
    """A pure function of the step."""

    def test_constant(self) -> None:
        assert {optimizers.learning_rate(AdamW(lr=0.1), step, 50) for step in range(50)} == {0.1}

    def test_cosine_at_its_turning_points(self) -> None:
        config = AdamW(lr=1.0, min_lr=0.1, warmup_steps=10, **COSINE)
        rate = [optimizers.learning_rate(config, step, 111) for step in range(111)]
        assert rate[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
        assert rate[10] == 1.0  # the peak after the warm-up
        assert rate[60] == pytest.approx(0.55)  # half way
        assert rate[110] == pytest.approx(0.1)  # the last step of all
        assert all(a > b for a, b in itertools.pairwise(rate[10:]))

    @settings(deadline=None, max_examples=200, derandomize=True)
    @given(data=st.data())
    def test_cosine_stays_within_its_bounds(self, data: st.DataObject) -> None:
        steps = data.draw(st.integers(1, 300))
        warmup = data.draw(st.integers(0, steps))
        lr = data.draw(st.floats(1e-6, 10))
        config = AdamW(lr=lr, min_lr=lr * data.draw(st.floats(0, 1)), warmup_steps=warmup, **COSINE)
        rate = [optimizers.learning_rate(config, step, steps) for step in range(steps)]
        slack = 1e-12 * lr
        assert all(0 < r <= lr + slack for r in rate[:warmup])
        assert all(config.min_lr - slack <= r <= lr + slack for r in rate[warmup:])
        assert all(a <= b + slack for a, b in itertools.pairwise(rate[:warmup]))
        assert all(a >= b - slack for a, b in itertools.pairwise(rate[warmup:]))
        if warmup > 0:
            assert rate[0] == pytest.approx(lr / warmup)

    def test_the_first_steps_of_a_longer_schedule(self) -> None:
        config = AdamW(lr=1.0, min_lr=0.1, warmup_steps=3, **COSINE)
        long = replace(config, schedule_steps=40)
        assert [optimizers.learning_rate(long, step, 10) for step in range(40)] == [
            optimizers.learning_rate(config, step, 40) for step in range(40)
        ]
        assert [row["lr"] for row in trainer(optimizer=long, steps=4).fit()] == [
            optimizers.learning_rate(config, step, 40) for step in range(4)
        ]

    def test_after_the_schedule_the_lowest_rate_stays(self) -> None:
        config = AdamW(lr=1.0, min_lr=0.1, schedule_steps=5, **COSINE)
        rate = [optimizers.learning_rate(config, step, 9) for step in range(9)]
        assert rate[4:] == pytest.approx([0.1] * 5)
        assert rate[3] > 0.2

    def test_the_optimizer_is_given_it(self) -> None:
        config = AdamW(lr=0.01, warmup_steps=2, min_lr=0.001, **COSINE)
        job = trainer(optimizer=config, steps=6)
        for row in job.fit():
            expected = optimizers.learning_rate(config, row["step"], 6)
            assert row["lr"] == expected
            assert [group["lr"] for group in job.optimizers[0].param_groups] == [expected] * 2


def test_clipping_bounds_the_gradient_that_is_applied_and_only_then() -> None:
    free, bound = trainer(), trainer(optimizer=AdamW(grad_clip=0.05))
    free.step()
    bound.step()
    natural = measures.grad_norm(free.model)
    assert natural > 0.5
    assert measures.grad_norm(bound.model) == pytest.approx(0.05, rel=1e-4)
    for ours, theirs in zip(bound.model.parameters(), free.model.parameters(), strict=True):  # shortened, not turned
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad * (0.05 / natural), atol=1e-7, rtol=1e-3)
    loose = trainer(optimizer=AdamW(grad_clip=100.0))
    loose.step()
    assert measures.grad_norm(loose.model) == pytest.approx(natural, rel=1e-6)


def test_the_clipped_gradient_is_the_one_the_optimizer_sees() -> None:
    """AdamW's first step is the same for a gradient of any length: those after tell."""
    free, clipped = (by_hand(model(), stream(), 20, 4, 16, clip) for clip in (math.inf, 0.5))
    got = [row["loss"] for row in trainer(steps=20, optimizer=AdamW(grad_clip=0.5)).fit()]
    assert got == pytest.approx(clipped, rel=1e-5)
    assert got != pytest.approx(free, rel=1e-4), "here clipping shows"


def test_the_norm_recorded_is_the_one_before_clipping() -> None:
    natural = next(trainer().fit())["grad_norm"]
    assert next(trainer(optimizer=AdamW(grad_clip=0.05)).fit())["grad_norm"] == pytest.approx(natural, rel=1e-4)


def test_grad_norm_is_the_length_of_all_gradients() -> None:
    gpt = model()
    idx = torch.arange(34).view(2, 17)
    gpt(idx[:, :-1], idx[:, 1:]).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in gpt.parameters() if p.grad is not None)
    assert measures.grad_norm(gpt) == pytest.approx(math.sqrt(squares), rel=1e-6)


@pytest.mark.parametrize(("tie", "pieces"), [(True, 1), (False, 1), (True, 2), (False, 2)])
def test_the_embeddings_two_gradients_are_an_untied_models(tie: bool, pieces: int) -> None:
    """Of the same weights used twice: what each use alone would get from the first micro-batch."""
    job = trainer(model(tie), seen=torch.arange(WORDS), grad_accum_steps=pieces)
    apart = model(tie=False)
    apart.load_state_dict(job.model.state_dict())
    x, y = job.batches.train(0)
    assert len(x.unique()) < x.numel()  # tokens that repeat
    got = next(job.fit())
    apart(x, y).backward()
    for key, weight in (("wte_grad_lookup", apart.transformer.wte.weight), ("wte_grad_head", apart.lm_head.weight)):
        assert weight.grad is not None
        assert got[key] == pytest.approx(float(weight.grad.norm()), rel=1e-5)


def unseen(gpt: GPT, idx: Tensor, seen: Tensor) -> float:
    """`measures.loss_unseen` of tokens."""
    with torch.no_grad():
        return measures.loss_unseen(gpt.transformer(idx), gpt.lm_head.weight, seen)


class TestLossUnseen:
    """What never-occurring tokens cost."""

    @pytest.mark.parametrize("shape", [(3, 16), (1, 32), (40, 16), (2, 1)])
    def test_is_the_seen_tokens_lost_probability(self, shape: tuple[int, int]) -> None:
        gpt = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=WORDS))
        initialise(gpt, InitConfig(std=0.3), seed=0)  # far from uniform
        idx = torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(0))
        seen = torch.tensor([0, 1, 5, 8, 100, 210])
        with torch.no_grad():
            probabilities = gpt.double()(idx).softmax(-1)
        expected = float(-probabilities[..., seen].sum(-1).log().mean())
        assert expected > 1
        assert unseen(gpt.float(), idx, seen) == pytest.approx(expected, rel=1e-5)

    def test_is_nothing_when_every_token_occurs(self) -> None:
        idx = torch.randint(WORDS, (2, 16), generator=torch.Generator().manual_seed(0))
        assert unseen(model(), idx, torch.arange(WORDS)) == pytest.approx(0, abs=1e-6)

    def test_logits_of_a_low_precision_are_summed_in_fp32(self) -> None:
        gpt, seen = model(), torch.arange(0, WORDS, 2)
        idx = torch.randint(WORDS, (4, 16), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), cast(CPU, torch.bfloat16):
            logits = gpt(idx)
            got = unseen(gpt, idx, seen)
        assert logits.dtype is torch.bfloat16
        logits = logits.double()
        expected = float((logits.logsumexp(-1) - logits[..., seen].logsumexp(-1)).mean())
        assert got == pytest.approx(expected, rel=1e-5)

    def test_on_tiny_shakespeare_before_training(self, tiny: ModelConfig) -> None:
        source = tokens.prepare(DataConfig())
        gpt = GPT(tiny)
        initialise(gpt, InitConfig(), seed=0)
        x, y = Windows(source.map(), TrainConfig(), DataConfig(), 0, CPU).train(0)
        got = unseen(gpt, x, torch.from_numpy(source.seen()))
        assert got == pytest.approx(math.log(50257 / 11706), abs=0.01)
        assert float(gpt(x, y).detach()) == pytest.approx(math.log(50257), abs=0.05)


class TestFit:
    """What a run yields."""

    def test_keys_at_the_right_steps(self) -> None:
        train, val = np.split(stream(), [round(0.9 * len(stream()))])
        seen = torch.from_numpy(np.unique(train).astype(np.int64))
        job = trainer(text=train, validation=val, seen=seen, steps=8, measure_every=3, eval_every=2, grad_accum_steps=2)
        rows = list(job.fit())
        assert [row["step"] for row in rows] == list(range(8))
        assert [row["tokens"] for row in rows] == [128 * n for n in range(1, 9)]
        assert all(row.keys() >= ALWAYS for row in rows)
        where: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            for key in row.keys() - ALWAYS:
                where.setdefault(key, []).append(number)
        validated, first_and_validated, all_measured = [1, 3, 5, 7], [0, 1, 3, 5, 7], [0, 1, 3, 5, 6, 7]
        assert where == {
            "grad_norm": all_measured,
            "loss_unseen": all_measured,
            "val_loss": validated,
            "residual_rms": first_and_validated,
            "wte_grad_lookup": first_and_validated,
            "wte_grad_head": first_and_validated,
        }
        assert all(row["tokens_per_second"] == pytest.approx(128 / (row["step_ms"] / 1e3)) for row in rows)
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows

    def test_measuring_and_judging_change_no_loss(self) -> None:
        seen = torch.arange(WORDS)
        watched = trainer(validation=stream()[:100], seen=seen, eval_every=1, measure_every=1, steps=6)
        assert [row["loss"] for row in watched.fit()] == [row["loss"] for row in trainer(steps=6).fit()]

    def test_without_validation_and_seen_there_is_none(self) -> None:
        for row in trainer(measure_every=2).fit():
            assert row.keys() - {"grad_norm"} == ALWAYS

    def test_validation_only_at_the_end_by_default(self) -> None:
        rows = list(trainer(validation=stream()[:100]).fit())
        assert ["val_loss" in row for row in rows] == [False] * 4 + [True]

    def test_loss_and_unseen_are_from_before_the_update(self) -> None:
        job, untouched = trainer(seen=torch.arange(0, WORDS, 2)), model()
        x, y = job.batches.train(0)
        row = next(job.fit())
        assert row["loss"] == pytest.approx(float(untouched(x, y).detach()), rel=1e-6)
        assert row["loss_unseen"] == pytest.approx(unseen(untouched, x, torch.arange(0, WORDS, 2)))
        assert row["loss"] != pytest.approx(float(job.model(x, y).detach()), rel=1e-4)

    def test_it_goes_on_where_it_stands(self) -> None:
        whole = [row["loss"] for row in trainer(steps=6).fit()]
        job = trainer(steps=6)
        first = [row["loss"] for row in itertools.islice(job.fit(), 2)]
        rest = list(job.fit())
        assert [row["step"] for row in rest] == [2, 3, 4, 5]
        assert first + [row["loss"] for row in rest] == whole

    def test_a_huge_learning_rate_diverges_and_says_where(self) -> None:
        job = trainer(optimizer=AdamW(lr=1e30, weight_decay=0.0), steps=20)
        done = []
        with pytest.raises(Diverged, match=r"(loss|grad_norm) became (nan|inf) at step \d+") as failure:
            done.extend(job.fit())
        assert str(failure.value).endswith(f" {len(done)}")
        assert len(done) < 20
        assert all(math.isfinite(row["loss"]) for row in done)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_loss_that_is_no_number_is_not_yielded(self, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
        job = trainer()
        real = job.step
        monkeypatch.setattr(job, "step", lambda measure: real(measure) * (bad if job.steps_done == 3 else 1.0))
        rows = job.fit()
        assert [next(rows)["step"] for _ in range(2)] == [0, 1]
        with pytest.raises(Diverged, match=rf"loss became {bad} at step 2"):
            next(rows)


def test_evaluation_is_the_mean_over_every_window_for_any_batch_size() -> None:
    val = stream(200)  # 12 windows of 16, so that 5 and 8 leave a part of a batch
    results = [trainer(validation=val, batch_size=size).evaluate() for size in (1, 5, 8, 12, 64)]
    gpt = model()
    windows = torch.from_numpy(val[:193].astype(np.int64))
    expected = float(gpt(windows[:-1].view(12, 16), windows[1:].view(12, 16)).detach())
    assert results == pytest.approx([expected] * 5, rel=1e-6)


def test_evaluation_reads_as_many_rows_as_the_loss_takes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """But never fewer than a training step does, and each process as many."""
    text, real = stream(1000), windows.gather
    for batch, chunk, processes, expected in ((2, 80, 1, 5), (8, 80, 1, 8), (2, 10, 1, 2), (4, 80, 2, 5)):
        rows: list[int] = []
        monkeypatch.setattr(windows, "gather", lambda *args, to=rows: (to.append(len(args[1])), real(*args))[1])
        job = trainer(validation=text, batch_size=batch, loss_chunk=chunk)
        job.batches.share = 0, processes
        job.evaluate()
        assert max(rows) == expected


class TestTiming:
    """With a clock that tests wind by hand."""

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        """Advances the trainer's clock."""
        now = 100.0

        def advance(seconds: float) -> None:
            nonlocal now
            now += seconds

        monkeypatch.setattr("gpt2exp.training.trainer.time.perf_counter", lambda: now)
        return advance

    def slowed(
        self, job: Trainer, clock: Callable[[float], None], seconds: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[dict[str, Any]]:
        """A run whose steps take these seconds and everything else a thousand."""
        real_step, real_evaluate, real_unseen = job.step, job.evaluate, measures.loss_unseen

        def step(measure: Callable[[], object] | None) -> Tensor:
            clock(seconds[job.steps_done])
            return real_step(measure)

        def evaluate() -> float:
            clock(1000)
            return real_evaluate()

        def slow_unseen(*args: Any) -> float:
            clock(1000)
            return real_unseen(*args)

        monkeypatch.setattr(job, "step", step)
        monkeypatch.setattr(job, "evaluate", evaluate)
        monkeypatch.setattr(measures, "loss_unseen", slow_unseen)
        return job.fit()

    def test_only_the_step_is_on_the_clock(
        self, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        job = trainer(validation=stream()[:100], seen=torch.arange(WORDS), eval_every=1, measure_every=1)
        for row in self.slowed(job, clock, [5.0, 4.0, 3.0, 2.0, 1.0], monkeypatch):
            assert row["step_ms"] == pytest.approx(1000 * (5 - row["step"]))
            clock(1000)  # what the caller does
        assert job.step_seconds == pytest.approx([5, 4, 3, 2, 1])

    def test_the_device_is_synchronised_at_both_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        events: list[str] = []
        job = trainer(steps=2)
        real = job.step
        monkeypatch.setattr(job, "step", lambda measure: (events.append("step"), real(measure))[1])
        monkeypatch.setattr(hardware, "synchronize", lambda device: events.append("synchronize"))
        monkeypatch.setattr(
            "gpt2exp.training.trainer.time.perf_counter", lambda: events.append("clock") or float(len(events))
        )
        list(job.fit())
        assert events == ["synchronize", "clock", "step", "synchronize", "clock"] * 2

    @pytest.mark.parametrize(
        ("seconds", "warmup", "kept"),
        [
            ([9.0, 8.0, 7.0, 1.0, 3.0, 2.0], 3, [1.0, 3.0, 2.0]),
            ([9.0, 8.0], 3, [8.0]),  # the last step always
            ([9.0], 3, [9.0]),
            ([9.0, 1.0, 2.0], 0, [9.0, 1.0, 2.0]),
        ],
    )
    def test_warm_up_is_left_out(self, seconds: list[float], warmup: int, kept: list[float]) -> None:
        job = trainer(warmup_steps=warmup)
        job.step_seconds = seconds
        timing = job.timing()
        median = statistics.median(kept)
        assert timing["timed_steps"] == len(kept)
        assert timing["first_step_ms"] == 1e3 * seconds[0]
        assert timing["step_ms"]["median"] == 1e3 * median
        assert min(kept) <= timing["step_ms"]["p10"] / 1e3 <= median <= timing["step_ms"]["p90"] / 1e3 <= max(kept)
        assert timing["tokens_per_second"] == pytest.approx(64 / median)

    def test_tokens_are_those_of_every_micro_batch(self) -> None:
        job = trainer(grad_accum_steps=3)
        job.step_seconds = [2.0]
        assert job.timing()["tokens_per_second"] == 3 * 64 / 2

    def test_before_the_first_step_there_is_none(self) -> None:
        empty = dict.fromkeys(("step_ms", "first_step_ms", "tokens_per_second", "speed_disturbed"))
        assert trainer().timing() == {**empty, "timed_steps": 0}

    @pytest.mark.parametrize(
        ("waits", "kept", "share"),
        [
            ([0.0, 0.05, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], 0.0),  # a twentieth of the step is none
            ([0.0, 0.0, 0.4, 0.4], [1.0, 2.0], 0.5),
            ([0.0, 0.3, 0.4, 0.5], [1.0, 2.0, 3.0, 4.0], 0.75),  # most: what is left would be no measurement
            ([None, None, None, None], [1.0, 2.0, 3.0, 4.0], None),
            ([None, None, 0.4, 0.0], [4.0], 0.5),  # known since the run went on, with this version
            ([], [1.0, 2.0, 3.0, 4.0], None),
        ],
    )
    def test_steps_that_waited_for_a_core_are_left_out(
        self, waits: list[float | None], kept: list[float], share: float | None
    ) -> None:
        job = trainer(warmup_steps=1)
        job.step_seconds = [9.0, 1.0, 2.0, 3.0, 4.0]
        job.step_waits = [100.0, *waits] if waits else []  # the warm-up's does not count
        timing = job.timing()
        assert (timing["speed_disturbed"], timing["timed_steps"]) == (share, len(kept))
        assert timing["tokens_per_second"] == pytest.approx(64 / statistics.median(kept))

    def test_the_longest_wait_of_the_processes_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = itertools.count()
        monkeypatch.setattr(load, "waited", lambda: 0.5 * next(clock))
        monkeypatch.setattr(distributed, "all_max", lambda number: [2 * number])
        job = trainer(steps=2)
        assert [row["waited_ms"] for row in job.fit()] == [1000, 1000]
        assert job.step_waits == [1, 1]

    def test_openmp_is_told_what_share_of_the_step_its_threads_waited(
        self, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waited, told = itertools.count(), []
        monkeypatch.setattr(load, "waited", lambda: 0.5 * next(waited))
        job = trainer(steps=2)
        monkeypatch.setattr(job._spinning, "after_step", told.append)
        list(self.slowed(job, clock, [2.0, 1.0], monkeypatch))
        assert told == [0.25, 0.5]

    def test_openmp_is_told_how_many_threads_compute(self, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[int] = []
        monkeypatch.setattr(load, "spinning", told.append)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        trainer()
        assert told == [3]

    def test_a_wait_is_never_negative(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thread that ended takes its waiting out of the sum."""
        sums = iter([5.0, 3.0])
        monkeypatch.setattr(load, "waited", lambda: next(sums))
        assert trainer().timed_step()[2] == 0.0

    def test_an_accelerators_step_waits_for_no_core(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load, "waited", lambda *_: 1.0)
        monkeypatch.setattr(hardware, "synchronize", lambda _: None)
        job = trainer()
        monkeypatch.setattr(job, "step", lambda *_: torch.tensor(1.0))
        job.batches.device = torch.device("cuda")
        assert job.timed_step()[2] is None

    def test_where_the_system_does_not_say_nothing_is_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(load, "waited", lambda: None)
        job = trainer(steps=2)
        assert not any("waited_ms" in row for row in job.fit())
        assert job.timing()["speed_disturbed"] is None

    def test_the_tutorials_throughput(self) -> None:
        job = trainer(batch_size=16, seq_len=32)
        job.step_seconds = [1.0]
        assert job.timing()["tokens_per_second"] == 512
        assert TrainConfig(batch_size=16, seq_len=1024).step_tokens == 16_384  # a second each: not 163,000


class TestMFU:
    """The share of the hardware's peak: of the precision that was got, of all devices."""

    @pytest.fixture
    def a100(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float | None]:
        """The figure on A100s, at a speed that is 312 TFLOP/s."""
        monkeypatch.setattr(hardware, "device_name", lambda _: "NVIDIA A100-SXM4-80GB")
        config = RunConfig()
        speed = 312e12 / size.flops_per_token(config.model, config.train.seq_len)

        def mfu(requested: str, effective: str, processes: int = 1, emulated: bool = False) -> float | None:
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            return jobs._mfu(config, torch.device("cuda"), Precision(requested, effective, emulated, 0, 0), speed)

        return mfu

    def test_is_of_the_precision_that_was_got(self, a100: Callable[..., float | None]) -> None:
        assert a100("bf16", "bf16") == pytest.approx(1.0)
        assert a100("fp16", "fp16") == pytest.approx(1.0)
        assert a100("tf32", "tf32") == pytest.approx(2.0)
        assert a100("medium", "fp32") == pytest.approx(16.0)

    def test_is_of_all_processes(self, a100: Callable[..., float | None]) -> None:
        assert a100("bf16", "bf16", processes=4) == pytest.approx(0.25)

    def test_an_emulated_precision_has_no_peak(self, a100: Callable[..., float | None]) -> None:
        assert a100("tf32", "tf32", emulated=True) is None

    def test_a_processor_and_an_unknown_card_have_no_peak(self, monkeypatch: pytest.MonkeyPatch) -> None:
        got = Precision("bf16", "bf16", False, 0, 0)
        for device, name in (("cpu", "NVIDIA A100-SXM4-80GB"), ("cuda", "A card of tomorrow")):
            monkeypatch.setattr(hardware, "device_name", lambda _, name=name: name)
            assert jobs._mfu(RunConfig(), torch.device(device), got, 1e6) is None


FULL = "out of memory, where about 2.0 GiB were expected to be enough"


@pytest.mark.parametrize(
    ("problem", "batch", "state", "line"),
    [
        (Diverged("loss became nan at step 7"), 4, "diverged", "loss became nan at step 7"),
        (torch.OutOfMemoryError("CUDA"), 4, "failed", f"{FULL}; try train.batch_size=2"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "failed", f"{FULL}; try train.batch_size=2"),
        (torch.OutOfMemoryError("CUDA"), 1, "failed", f"{FULL}; try a smaller model or a shorter train.seq_len"),
        (torch.OutOfMemoryError("CUDA"), AUTO, "failed", f"{FULL}; try train.batch_size=auto"),
        (MemoryError("needs 9 GiB"), 4, "failed", "needs 9 GiB"),
        (PermissionError(13, "Permission denied", "/data/a.txt"), 4, "failed", "/data/a.txt: Permission denied"),
        (OSError(28, "No space left on device"), 4, "failed", "No space left on device"),
        (OSError("closed"), 4, "failed", "OSError: closed"),
        (ValueError("first\nsecond"), 4, "failed", "ValueError: first"),
    ],
)
def test_what_ended_a_run_is_one_line(problem: Exception, batch: int, state: str, line: str) -> None:
    assert jobs._classify(problem, RunConfig(train=TrainConfig(batch_size=batch)), 2**31) == (state, line)


def test_a_process_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = RuntimeError("[/pytorch/third_party/gloo/x.cc] Connection closed by peer")
    assert jobs._classify(problem, RunConfig(), None)[1].startswith("RuntimeError: ")
    monkeypatch.setenv("WORLD_SIZE", "4")
    said = "one of the run's 4 processes ended, or can no longer be reached"
    assert jobs._classify(problem, RunConfig(), None) == ("failed", said)


MEASURE = """
import json, sys, torch
torch.set_num_threads(2)
from gpt2exp.config import ModelConfig, PrecisionConfig, PrecisionName, RunConfig, TrainConfig
from gpt2exp.model import size
from gpt2exp.training import hardware, setup
import wandb
shape, train, name, kept = json.loads(sys.argv[1])
config = RunConfig(
    model=ModelConfig(**shape), train=TrainConfig(**train), precision=PrecisionConfig(name=PrecisionName(name))
)
cpu = torch.device("cpu")
if not kept:
    hardware.keep_freed_memory = lambda **_: False
hardware.reset_peak_memory(cpu)
with setup.ready(config) as ready:
    job, _ = setup.trainer(ready)
    for _ in job.fit():
        pass
need = setup.memory(config, setup.Hardware("cpu", ready.got.emulated))
counted = size.parameters(config.model)["total"]
print(need, hardware.peak_memory(cpu), sum(p.numel() for p in job.model.parameters()), counted)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the resident set is measured through /proc")
@pytest.mark.parametrize(
    ("shape", "train", "name", "kept", "tolerance"),
    [
        ({"n_layer": 4, "n_head": 4, "n_embd": 128}, {"batch_size": 2, "seq_len": 256}, "fp32", False, 0.15),
        pytest.param(
            *({"n_layer": 4, "n_head": 4, "n_embd": 128}, {"batch_size": 1, "seq_len": 256}, "tf32", False, 0.2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(
                {"n_layer": 6, "n_embd": 384, "tie_weights": False},
                {"batch_size": 2, "seq_len": 32},
                "fp32",
                True,
                0.25,
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["activations", "emulated", "weights"],
)
def test_memory_is_estimated(
    shape: dict[str, Any], train: dict[str, Any], name: str, kept: bool, tolerance: float
) -> None:
    """The formula where glibc returns what is freed, and its sum for a run, where freed buffers are kept.

    Large activations are left to the first kind: how far kept buffers fragment the heap differs in every run.
    """
    asked = json.dumps([shape, {**train, "steps": 4}, name, kept])
    done = subprocess.run([sys.executable, "-c", MEASURE, asked], capture_output=True, text=True, check=True)
    estimated, measured, counted, parameters = map(int, done.stdout.split())
    print(f"estimated {estimated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert parameters == counted
    assert estimated == pytest.approx(measured, rel=tolerance)


def test_the_batch_suggested_fits_and_is_a_power_of_two() -> None:
    config = RunConfig(train=TrainConfig(batch_size=48, seq_len=1024))

    def need(batch: int) -> int:
        return setup.memory(replace(config, train=replace(config.train, batch_size=batch)), setup.Hardware("cpu"))

    def suggested(free: int) -> int | None:
        return setup.fitting_batch(config, setup.Hardware("cpu", free=free))

    assert suggested(need(16)) == 16
    assert suggested(need(16) - 1) == 8
    assert suggested(need(1) - 1) is None
    assert suggested(need(1000)) == 32
