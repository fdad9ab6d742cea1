"""How long a training step of GPT-2 takes on a GPU, and how much memory: a model with eight free numbers.

Operations over what the arithmetic units reach, bytes over what memory and links reach, and two waits. `page.py` fits
the numbers to what others published and predicts by them; nothing here was run on a GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from gpt2exp.config import LOSS_ROWS, ModelConfig
from gpt2exp.model import size
from gpt2exp.training.hardware import PEAK_TFLOPS

# --- the hardware, as published --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpu:
    """A GPU in a box of eight, SXM: bytes, and bytes a second. Peaks of arithmetic are `PEAK_TFLOPS` of `hardware`."""

    memory: float
    bandwidth: float
    nvlink: float
    """One way, to the switch: half of what data sheets print."""
    network: float
    """One way, out of the box, by all eight adapters: NCCL lays a ring through each, and data go round them all."""


GPUS = {
    # data sheets of A100 and H100; adapters of DGX A100 (8 x 200 Gb/s) and DGX H100 (8 x 400 Gb/s): user guides
    "A100": Gpu(80 * 2**30, 2.039e12, 300e9, 200e9),
    "A100 40GB": Gpu(40 * 2**30, 1.555e12, 300e9, 200e9),
    "H100": Gpu(80 * 2**30, 3.35e12, 450e9, 400e9),
}
MEMORY_RATE = 0.85
"""Of the peak, what a kernel that only moves data gets; a guess that `Fitted` could not tell from its other numbers."""
LINK_RATE = 0.8
"""Of the line rate, what NCCL gets: "protocol overhead (~20%)", github.com/NVIDIA/nccl-tests/issues/212."""


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """A step somewhere; the defaults are how this program would run it on CUDA."""

    model: ModelConfig
    gpu: str
    gpus: int
    precision: str
    batch: int
    """Sequences a GPU holds at once."""
    seq_len: int = 1024
    accumulation: int = 1
    mode: str = "compiled"
    """Or `eager`, an operation a kernel."""
    attention: str = "fused"
    """Or `unfused`: scores and probabilities stand in memory."""
    adamw: str = "fused"
    """Or `foreach`, an operation a kernel."""
    parallel: str = "ddp"
    """Or `fsdp`: weights, gradients and moments in shares, a block's weights gathered when it is due."""
    loss: str = "chunks"
    """`model.loss`, or `whole`: the logits of the batch stand at once, and their loss is compiled with the model."""

    @property
    def tokens(self) -> int:
        """Of a GPU's micro-batch."""
        return self.batch * self.seq_len

    @property
    def step_tokens(self) -> int:
        """Of all GPUs and micro-batches."""
        return self.tokens * self.accumulation * self.gpus

    @property
    def size(self) -> int:
        """Bytes of an activation that a matrix product reads."""
        return 2 if self.precision == "bf16" else 4

    @functools.cached_property  # once: a fit asks thousands of times
    def parameters(self) -> int:
        """Of the model."""
        return size.parameters(self.model)["total"]

    @functools.cached_property
    def flops(self) -> int:
        """Of a token's forward and backward pass."""
        return size.flops_per_token(self.model, self.seq_len)

    @property
    def chip(self) -> str:
        """The GPU without its memory."""
        return self.gpu.split()[0]

    @property
    def peak(self) -> float:
        """Floating-point operations a second of one GPU, dense."""
        return PEAK_TFLOPS[self.chip][self.precision] * 1e12


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """The free numbers. An efficiency is a share of the peak that a very wide model's matrix products reach."""

    bf16_a100: float = 0.7
    bf16_h100: float = 0.6
    tf32: float = 0.7
    fp32: float = 0.9
    half_width: float = 100.0
    """`n_embd` at which the products are half as efficient as at infinity."""
    attention: float = 0.5
    """Efficiency of fused attention over that of the other products."""
    host_ms: float = 7.0
    """Of a step, in which the GPU waits for Python: the loss is read, batch and optimizer begun."""
    wait_ms: float = 4.0
    """Of a step, for each doubling of the GPUs: latency, and waiting for the slowest."""


BOUNDS = Fitted(0.3, 0.3, 0.3, 0.3, 1, 0.1, 0.1, 0.1), Fitted(0.869, 0.803, 0.869, 1, 1000, 1, 50, 50)
"""No efficiency in bf16 above the best product measured: 86.9 % of the A100's peak, 80.3 % of the H100's
(github.com/stas00/ml-engineering, compute/accelerator, MAMF)."""

PASSES = {"eager": 60, "compiled": 47}
"""Times n_embd numbers that are read or written for a token in a block, forward and backward, outside the products:
LayerNorms, residual sums, GELU (four wide), biases' gradients, and copies where nothing fuses them."""
SCORE_PASSES = {"eager": 20, "compiled": 10}
"""The same of unfused attention, times n_head x seq_len: scale, mask, softmax and their gradients."""
ADAMW_BYTES = {"fused": 28, "foreach": 80}
"""Moved a parameter: gradient, weight and moments read, all but the gradient written; or every operation on its own."""


def step(setup: Setup, fitted: Fitted) -> dict[str, float]:
    """Milliseconds of a step by what takes them."""
    model, gpu = setup.model, GPUS[setup.gpu]
    layers, width, parameters = model.n_layer, model.n_embd, setup.parameters
    efficiency = getattr(fitted, f"bf16_{setup.chip.lower()}" if setup.precision == "bf16" else setup.precision)
    rate = setup.peak * efficiency * width / (width + fitted.half_width)
    attention = 12 * layers * width * setup.seq_len
    products = setup.flops - attention
    if setup.attention == "fused":  # half of it is masked, and backward computes the scores again: 7 products for 6
        attention *= 7 / 12 / fitted.attention
    moved = PASSES[setup.mode] * layers * width * setup.size + _logit_bytes(setup) * model.vocab_size
    if setup.attention == "unfused":
        moved += SCORE_PASSES[setup.mode] * layers * model.n_head * setup.seq_len * setup.size
    casts = 8 * parameters if setup.precision == "bf16" else 0  # weights to bf16, their gradients back
    bandwidth = gpu.bandwidth * MEMORY_RATE
    compute = setup.tokens * (products + attention) / rate
    traffic = (setup.tokens * moved + casts) / bandwidth
    sharded = setup.gpus if setup.parallel == "fsdp" else 1
    seconds = {
        "products": setup.accumulation * compute,
        "memory traffic": setup.accumulation * traffic,
        "AdamW": ADAMW_BYTES[setup.adamw] * parameters / sharded / bandwidth,
        "host": fitted.host_ms / 1e3,
        "links": _not_hidden(setup, compute + traffic),
        "waiting": fitted.wait_ms / 1e3 * math.log2(setup.gpus),
    }
    return {part: 1e3 * value for part, value in seconds.items()}


def _logit_bytes(setup: Setup) -> float:
    """Moved a logit by its products and the loss, forward and backward."""
    if setup.loss == "chunks":  # operation by operation; the head's gradient is added to once a chunk
        products, softmax, summing = (6, 44, 12) if setup.size == 2 else (12, 32, 8)
        return products + softmax + summing * setup.model.n_embd / LOSS_ROWS
    return 32 if setup.mode == "eager" else 7 * setup.size  # eager: eight passes in fp32, whatever the products are in


def _not_hidden(setup: Setup, micro_batch: float) -> float:
    """Seconds that transfers last longer than the computation they run beside, a third of it forward.

    A ring moves (N-1)/N of the fp32 weights or gradients through every link to gather or to scatter them once.
    """
    gpu = GPUS[setup.gpu]
    bus = LINK_RATE * (gpu.nvlink if setup.gpus <= 8 else gpu.network)
    once = 4 * setup.parameters * (setup.gpus - 1) / setup.gpus / bus
    if setup.parallel == "fsdp":
        return setup.accumulation * (max(0.0, once - micro_batch / 3) + max(0.0, 2 * once - micro_batch * 2 / 3))
    return max(0.0, 2 * once - micro_batch * 2 / 3)


def milliseconds(setup: Setup, fitted: Fitted) -> float:
    """Of a step, predicted."""
    return sum(step(setup, fitted).values())


def tokens_per_second(setup: Setup, fitted: Fitted) -> float:
    """Of all GPUs, predicted."""
    return 1e3 * setup.step_tokens / milliseconds(setup, fitted)


def mfu(setup: Setup, fitted: Fitted) -> float:
    """Model FLOPs over the peak, as `gpt2exp` itself counts them."""
    achieved = tokens_per_second(setup, fitted) * setup.flops
    return achieved / (setup.gpus * setup.peak)


# --- memory ----------------------------------------------------------------------------------------------------------


def memory(setup: Setup) -> float:
    """Peak bytes of the allocator on each GPU, nothing fitted.

    `estimate.memory` without its margins, with what only a GPU has: half-precision activations (a block keeps 64 bytes
    a token and unit of width in fp32, 36 under autocast, and the bf16 copies of its weights: counted by autograd's own
    hooks in `test_scaling.py`), DDP's buckets, FSDP's shares and gathered blocks, logits that stand whole.
    """
    model, half = setup.model, setup.precision == "bf16"
    layers, width, total = model.n_layer, model.n_embd, setup.parameters
    block = 36 * width if half else 64 * width
    busy = 0
    if setup.attention == "unfused":  # probabilities, and their bf16 copy; q, k, v and output copied for the products
        scores = model.n_head * setup.seq_len
        block += scores * (6 if half else 4) + 4 * width * setup.size
        busy = 8 * scores  # of the block that backward is at
    logit = 2 * setup.size if setup.mode == "compiled" else 10 if half else 12
    logits = (setup.tokens if setup.loss == "whole" else min(setup.tokens, LOSS_ROWS)) * model.vocab_size * logit
    activations = setup.tokens * (layers * block + busy + 8 * width) + logits
    copies = 2 * total if half else 0
    sharded = setup.parallel == "fsdp"
    share = total / (setup.gpus if sharded else 1)
    gathered = 4 * (2 * 12 * width**2 + model.vocab_size * width) if sharded else 0  # two blocks and the embedding
    buckets = 4 * total if setup.parallel == "ddp" and setup.gpus > 1 else 0  # gradients' memory, never given back
    head = 4 * model.vocab_size * width
    backward_begins, backward_ends = 12 * share + buckets + activations + head, 16 * share
    return copies + gathered + max(backward_begins, backward_ends)
