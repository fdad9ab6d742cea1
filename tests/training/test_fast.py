"""Every fast path of the training step gives the losses and weights of a plain loop over 20 steps.

The plain loop is written out here: whole logits, `F.cross_entropy`, autograd's own gradients, AdamW one tensor at a
time. Compared with it: the loss in chunks, the embedding's gradient added in place, the padded vocabulary, activation
checkpointing, compiled blocks and micro-batches, in fp32, bf16 and emulated TF32. Also: what `auto` is set to.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2exp.config import DataConfig, InitConfig, ModelConfig, PrecisionConfig, PrecisionName, RunConfig, TrainConfig
from gpt2exp.data.batches import Windows
from gpt2exp.model import loss as loss_
from gpt2exp.model import size
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.model.loss import HeadLoss
from gpt2exp.section import BadRequest
from gpt2exp.training import hardware, precision, setup
from gpt2exp.training.optimizers import AdamW
from gpt2exp.training.trainer import Trainer

CPU = torch.device("cpu")
WORDS = 211  # no multiple of anything
TOKENS = np.resize(np.random.default_rng(0).integers(0, WORDS, 97), 3000).astype("<u2")  # learnt in a few steps
STEPS = 20


def gpt(tie: bool) -> GPT:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32, vocab_size=WORDS, tie_weights=tie))
    initialise(model, InitConfig(), seed=3)
    return model


def batches(train: TrainConfig) -> Windows:
    return Windows(TOKENS, train, DataConfig(), 0, CPU)


def plain(tie: bool, autocast: torch.dtype | None = None) -> tuple[list[float], GPT]:
    """Losses of `STEPS` steps of 8 x 16 tokens, and the model after them."""
    model, source = gpt(tie), batches(TrainConfig(batch_size=8, seq_len=16))
    decays = [p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decays[0], "weight_decay": 0.01}, {"params": decays[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, eps=EPS, foreach=False, fused=False)
    losses = []
    for step in range(STEPS):
        x, y = source.train(step)
        optimizer.zero_grad()
        with precision.cast(CPU, autocast):
            logits = model(x)
        loss = F.cross_entropy(logits.float().view(-1, WORDS), y.reshape(-1))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


def fast(tie: bool, pad: bool = False, autocast: torch.dtype | None = None, **train: int | bool) -> Trainer:
    model = gpt(tie)
    if pad:
        model.pad_vocabulary()
    config = TrainConfig(**{"batch_size": 8, "seq_len": 16, "steps": STEPS, **train})  # type: ignore[arg-type]
    return Trainer(
        model, batches(config), RunConfig(train=config, optimizer=AdamW(lr=3e-3, eps=EPS)), autocast=autocast
    )


EPS = 1e-5
"""Added to AdamW's denominator: at 1e-8 a weight whose gradient is rounding error alone makes full steps."""

PATHS = {
    "as it comes": {},
    "chunked": {"loss_chunk": 48},
    "a row at a time": {"loss_chunk": 1},
    "padded": {"pad": True},
    "recomputed": {"activation_checkpointing": True},
    "micro-batches": {"batch_size": 2, "grad_accum_steps": 4},
    "all": {"pad": True, "loss_chunk": 7, "activation_checkpointing": True, "batch_size": 2, "grad_accum_steps": 4},
}


@pytest.mark.parametrize(("path", "tie"), [*((path, True) for path in PATHS), ("padded", False), ("all", False)])
def test_trains_as_the_plain_path(path: str, tie: bool) -> None:
    expected, reference = plain(tie)
    job = fast(tie, **PATHS[path])  # type: ignore[arg-type]
    assert [float(job.step()) for _ in range(STEPS)] == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 0.5  # it learnt something, so that the weights had to agree
    for (name, one), two in zip(job.model.named_parameters(), reference.parameters(), strict=True):
        if name.endswith("c_attn.bias"):
            continue  # the key's third has no gradient but rounding errors, of which AdamW makes full steps
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_blocks_train_as_the_plain_path() -> None:
    """Together with the other fast paths; test_card.py has compiled blocks alone."""
    expected, _ = plain(True)
    job = fast(True, compile=True, **LEVERS)
    try:
        assert [float(job.step()) for _ in range(STEPS)] == pytest.approx(expected, rel=1e-5)
    finally:
        torch._dynamo.reset()


LEVERS: dict[str, Any] = {"loss_chunk": 48, "pad": True, "activation_checkpointing": True}


def test_bf16_trains_as_plain_autocast() -> None:
    """Both round to bf16, at other places: equal to the rounding, an eighth of a per cent."""
    expected, _ = plain(True, torch.bfloat16)
    job = fast(True, autocast=torch.bfloat16, **LEVERS)
    assert [float(job.step()) for _ in range(STEPS)] == pytest.approx(expected, rel=4e-3)


def test_emulated_tf32_rounds_the_heads_operands_too() -> None:
    with precision.applied(PrecisionConfig(name=PrecisionName.tf32), CPU) as got:
        assert got.emulated
        expected, _ = plain(True)
        job = fast(True, **LEVERS)
        assert [float(job.step()) for _ in range(STEPS)] == pytest.approx(expected, rel=1e-5)
    exact, _ = plain(True)
    assert expected != pytest.approx(exact, rel=1e-5)  # the tolerance tells the two arithmetics apart


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 40),
    rows=st.integers(1, 50),
    pad=st.integers(0, 9),
    scale=st.sampled_from([1.0, 0.25]),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    seed=st.integers(0, 99),
)
def test_the_chunked_loss_is_cross_entropy(
    count: int, rows: int, pad: int, scale: float, spread: float, seed: int
) -> None:
    """Value and both gradients, for any number of rows, chunk, padding, factor and size of logits."""
    generator = torch.Generator().manual_seed(seed)

    def operands() -> tuple[Tensor, Tensor]:
        generator.manual_seed(seed)
        x = torch.randn(count, 8, generator=generator, dtype=torch.float64) * spread
        return x.requires_grad_(), torch.randn(13, 8, generator=generator, dtype=torch.float64).requires_grad_()

    targets = torch.randint(13, (count,), generator=generator)
    (x, weight), (x2, weight2) = operands(), operands()
    padded = F.pad(weight.detach(), (0, 0, 0, pad)) if pad else None
    loss = HeadLoss.apply(x, weight, targets, rows, torch.float64, padded)
    expected = F.cross_entropy(x2 @ weight2.T, targets)
    torch.testing.assert_close(loss, expected)
    (loss * scale).backward()
    (expected * scale).backward()
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(weight.grad, weight2.grad)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_alone_is_the_trainings(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """For words that fill no whole part; the sums are in fp32, whatever the products are in."""
    monkeypatch.setattr(loss_, "WORDS", 5)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, 8, generator=generator) for size in (40, 13))
    targets = torch.randint(13, (40,), generator=generator)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.cross_entropy((x.to(dtype) @ weight.to(dtype).T).to(wide), targets)
    got = loss_.loss_alone(x, weight, targets, dtype)
    assert got.dtype is wide
    assert float(got) == pytest.approx(float(expected), rel=1e-6)


class Products(TorchDispatchMode):
    """The shapes of the results of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by PyTorch for each operation."""
        result = func(*args, **(kwargs or {}))
        if "mm" in func.name():
            self.shapes.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("tie", [True, False])
def test_without_gradients_only_the_loss_is_computed(tie: bool) -> None:
    model = gpt(tie)
    idx = torch.zeros(2, 9, dtype=torch.int64)
    with Products() as training:
        model(idx[:, :-1], idx[:, 1:])
    assert (WORDS, 32) in training.shapes, "the head's gradient is taken in the forward pass"
    with torch.no_grad(), Products() as judging:
        loss = model(idx[:, :-1], idx[:, 1:])
    assert (WORDS, 32) not in judging.shapes
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item())


@pytest.mark.parametrize("tie", [True, False])
def test_padding_shows_nowhere(tie: bool) -> None:
    job = fast(tie, pad=True)
    for _ in range(5):
        job.step()
    model = job.model
    padded = model._padded
    assert padded is not None
    assert len(padded) == 256
    assert not padded[WORDS:].any()  # never touched
    assert model.lm_head.weight.shape == (WORDS, 32)
    assert model.lm_head.weight.data_ptr() == padded.data_ptr()  # one memory: the head reads what was trained
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, WORDS)
    assert {value.shape[0] for name, value in model.state_dict().items() if "wte" in name or "lm_head" in name} == {
        WORDS
    }
    assert sum(p.numel() for p in model.parameters()) == size.parameters(model.config)["total"]


class TestSettling:
    """The value that `auto` gets, by the estimate."""

    HERE = setup.Hardware("cpu")

    def config(self, **train: int | str | bool) -> RunConfig:
        return RunConfig(train=TrainConfig(**{"seq_len": 1024, **train}))  # type: ignore[arg-type]

    def test_a_roomy_machine_recomputes_nothing(self) -> None:
        train = setup.fit(self.config(batch_size=4), setup.Hardware("cpu", free=24 * 2**30), 300).train
        assert (train.batch_size, train.activation_checkpointing, train.loss_chunk) == (4, False, 1024)

    def test_a_tight_one_recomputes_activations(self) -> None:
        config = self.config(batch_size=4)
        free = setup.memory(config, self.HERE) - 2**20
        settled = setup.fit(config, setup.Hardware("cpu", free=free), 300)
        assert settled.train.activation_checkpointing is True
        assert setup.memory(settled, self.HERE) <= free

    def test_what_was_typed_stays(self) -> None:
        typed = self.config(batch_size=4, activation_checkpointing=False, loss_chunk=128)
        assert setup.fit(typed, setup.Hardware("cpu", free=2**20), 300) == typed

    def test_sixteen_sequences_of_1024_tokens_fit_24_gib_in_fp32(self) -> None:
        assert setup.memory(self.config(batch_size=16), self.HERE) < 20 * 2**30

    @settings(max_examples=50, deadline=None)
    @given(free=st.integers(2**31, 2**38), most=st.integers(1, 5000), seq_len=st.sampled_from([32, 100, 1024]))
    def test_the_batch_is_the_largest_nice_one_that_fits(self, free: int, most: int, seq_len: int) -> None:
        config = RunConfig(train=TrainConfig(batch_size="auto", seq_len=seq_len))
        settled = setup.fit(config, setup.Hardware("cpu", free=free), most)
        batch = settled.train.sequences
        assert batch in setup.NICE_BATCHES
        assert batch <= max(1, most)
        need = setup.memory(settled, self.HERE)
        larger = [size for size in setup.NICE_BATCHES if batch < size <= most]
        if need > free:  # even one sequence, computed again, is too much: the caller says so
            assert (batch, settled.train.activation_checkpointing) == (1, True)
        elif larger:
            more = replace(settled, train=replace(settled.train, batch_size=min(larger)))
            assert setup.memory(more, self.HERE) > free

    @pytest.mark.parametrize("tokens", [4096, 16_384, 3 * 1024])
    def test_the_steps_tokens_stay_the_same_whatever_fits(self, tokens: int) -> None:
        for free in (3 * 2**30, 5 * 2**30, 2**34, 2**37):
            config = self.config(batch_size="auto", tokens_per_step=tokens)
            assert setup.fit(config, setup.Hardware("cpu", free=free), 300).train.step_tokens == tokens

    def test_tokens_per_step_sets_the_micro_batches(self) -> None:
        assert TrainConfig(batch_size=4, seq_len=32, tokens_per_step=512).grad_accum_steps == 4
        with pytest.raises(BadRequest, match=r"train\.tokens_per_step=500: not a multiple .* try .*=512"):
            TrainConfig(batch_size=4, seq_len=32, tokens_per_step=500)
        with pytest.raises(BadRequest, match=r"train\.grad_accum_steps=3: .* makes it 4"):
            TrainConfig(batch_size=4, seq_len=32, tokens_per_step=512, grad_accum_steps=3)

    def test_compile_is_left_out_on_a_cpu_and_kept_where_asked_for(self) -> None:
        assert hardware.settle(TrainConfig(steps=10**6), CPU).compile is False
        assert hardware.settle(TrainConfig(compile=True), CPU).compile is True
        cuda = torch.device("cuda")
        assert hardware.settle(TrainConfig(steps=hardware.WORTH_COMPILING), cuda).compile is True
        assert hardware.settle(TrainConfig(steps=50), cuda).compile is False

    def test_padding_is_for_tensor_cores_and_avx2(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert hardware.pads_vocabulary("auto", torch.device("cuda"))
        for capability, pads in (("AVX2", True), ("AVX512", False)):
            monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
            assert hardware.pads_vocabulary("auto", CPU) is pads
        assert hardware.pads_vocabulary(True, CPU)
        assert not hardware.pads_vocabulary(False, torch.device("cuda"))
