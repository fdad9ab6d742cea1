"""Makes a trainer from a checked configuration: estimates memory, decides each `auto`, builds the parts."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp.choices import Outside
from gpt2exp.config import InitConfig, InitScheme, ModelConfig, ProductLibrary, RunConfig
from gpt2exp.data import tokens
from gpt2exp.model import huggingface, size
from gpt2exp.section import AUTO, BadRequest
from gpt2exp.training import distributed

if TYPE_CHECKING:
    import torch

    from gpt2exp.model.gpt import GPT
    from gpt2exp.run.checkpoint import Checkpoint
    from gpt2exp.training.precision import Precision
    from gpt2exp.training.trainer import Trainer


@dataclass(frozen=True)
class Hardware:
    """What a memory estimate depends on other than the configuration."""

    kind: str  # cpu, cuda or mps
    unfused_attention: bool = False  # under emulated TF32: attention keeps its scores and probabilities
    free: int | None = None  # bytes that a process of the run may take in all; None if that is not known


def smallest(config: RunConfig) -> RunConfig:
    """The configuration with a batch of one sequence, if the batch is `auto`."""
    return replace(config, train=replace(config.train, batch_size=1)) if config.train.batch_size == AUTO else config


def check_text(config: RunConfig, source: tokens.TokenFile) -> None:
    """Raise `BadRequest` if the text is too short for a batch, or has ids that the model has no embedding for."""
    tokens.check_fits(source.tokens, config.data, config.train)
    if source.max_token >= config.model.vocab_size:
        why = f"token {source.max_token} of {source.name} needs at least {source.max_token + 1}"
        raise BadRequest(f"model.vocab_size={config.model.vocab_size}: {why}; try model.vocab_size=50257")


def check_weights(init: InitConfig, model: ModelConfig) -> None:
    """Raise `BadRequest` if `init` names weights that do not exist or are not this model's."""
    if init.scheme is InitScheme.pretrained:
        huggingface.check(huggingface.find(str(init.path)), model)


@dataclass(frozen=True)
class Ready:
    """A configuration on this machine, with its text tokenised and its precision set."""

    config: RunConfig  # with each `auto` decided
    device: torch.device
    got: Precision
    source: tokens.TokenFile
    here: Hardware
    need: int  # estimated peak memory in bytes


@contextlib.contextmanager
def ready(config: RunConfig, source: tokens.TokenFile | None = None) -> Iterator[Ready]:
    """A block in which a trainer of `config` can be made and run. `source`: its tokens, if the caller has them."""
    from gpt2exp.training import hardware, precision

    device = hardware.resolve_device(config.train.device)
    source = source or tokens.prepare(config.data)
    with precision.applied(config.precision, device) as got:
        free = hardware.free_memory(device)
        if free is not None and device.type != "cuda":
            free = free // distributed.local_world_size() + PROCESS_BYTES  # Python and PyTorch are loaded already
        here = Hardware(device.type, got.emulated, free)
        training = source.tokens - tokens.held_out(source.tokens, config.data.val_fraction)
        config = fit(config, here, (training - 1) // config.train.seq_len)
        config = replace(config, train=hardware.settle(config.train, device))
        yield Ready(config, device, got, source, here, memory(config, here))


def trainer(ready: Ready, saved: Checkpoint | None = None, *, by_hand: bool = False) -> tuple[Trainer, dict[str, Any]]:
    """The trainer, with initial weights or a checkpoint's, and where these came from (`start`).

    Make and step it inside the block of `ready`; with `by_hand` it can be stepped anywhere.
    """
    import torch

    from gpt2exp.data.batches import Windows
    from gpt2exp.model.gpt import GPT
    from gpt2exp.training import hardware, precision
    from gpt2exp.training.trainer import Trainer

    config, device, got, source = ready.config, ready.device, ready.got, ready.source
    if device.type == "cpu":
        hardware.keep_freed_memory(tight=config.train.activation_checkpointing is True)
    with torch.device(device):
        gpt = GPT(config.model).to(got.weights)
    if hardware.pads_vocabulary(config.train.pad_vocab, device) and not distributed.is_sharded(config.distributed):
        gpt.pad_vocabulary()
    origin = start(gpt, config, saved)
    share = distributed.rank(), distributed.world_size()
    windows = Windows(source.map(), config.train, config.data, config.seed, device, share)
    seen = torch.from_numpy(source.seen()).to(device)
    computing = functools.partial(precision.reapplied, config.precision, got) if by_hand else contextlib.nullcontext
    return Trainer(gpt, windows, config, seen=seen, autocast=got.autocast, computing=computing), origin


def start(gpt: GPT, config: RunConfig, saved: Checkpoint | None = None) -> dict[str, Any]:
    """Give the model its initial weights, or a checkpoint's; returns where they came from, for the record.

    Raises `BadRequest` for weights of another model, `InitError` if they are not what the configuration says.
    """
    from gpt2exp.model.init import initialise, load_weights
    from gpt2exp.model.init_check import check_init, check_tying

    if not distributed.is_main():
        return {}  # rank 0 sends the weights
    origin: dict[str, Any] = {"source": None, "files": [], "sha256": None}
    if saved is not None:
        if saved.model(str(saved.folder)) != config.model:
            raise BadRequest(f"{saved.folder}: a checkpoint of another model; give the model.* keys the run had")
        load_weights(gpt, saved.weights())
        origin = saved.state.get("init", origin)
    elif config.init.scheme is InitScheme.pretrained:
        origin = huggingface.load(gpt, config.init)
    else:
        initialise(gpt, config.init, config.seed)
        if not isinstance(config.init, Outside):  # no rule says what its code must draw
            check_init(gpt, config.init)
    return {"scheme": getattr(config.init, "name", config.init.scheme.value), **origin, "tying": check_tying(gpt)}


def _process_bytes() -> int:
    found = importlib.util.find_spec("torch")
    cuda = Path(found.origin).parent / "lib" / "libtorch_cuda.so" if found and found.origin else None
    return (700 if cuda and cuda.exists() else 340) * 2**20  # 681 and 319 MiB measured with PyTorch 2.13


PROCESS_BYTES = _process_bytes()
"""Resident memory of Python with PyTorch and wandb loaded. It counts on a CPU, where the process's memory fills up.
PyTorch built for CUDA, which PyPI gives to Linux, takes twice as much, with or without a GPU."""

SETTLED = ("batch_size", "grad_accum_steps", "loss_chunk", "activation_checkpointing", "compile")  # decided by a run
NICE_BATCHES = sorted([2**power for power in range(13)] + [24, 48], reverse=True)  # for batch_size=auto, largest first


def as_begun(config: RunConfig, state: Mapping[str, Any]) -> RunConfig:
    """`config` with what a checkpoint's `state` says that the run's first part settled."""
    settled = {key: value for key, value in state["settled"].items() if key in SETTLED}
    library = state["precision"].get("library", ProductLibrary.torch)  # of versions that had no other
    precision = replace(config.precision, library=ProductLibrary(library))
    return replace(config, precision=precision, train=replace(config.train, tokens_per_step=None, **settled))


def memory(config: RunConfig, here: Hardware) -> int:
    """Estimated peak bytes of training, for one process of the run.

    Weights, gradients and AdamW's two moments take 16 bytes a parameter (fp64: 32); other optimizers keep fewer
    (`moments`). The peak is at one of two moments: when backward starts, or when all gradients exist.

    When backward starts, all activations and the head's gradient (`gpt2exp.model.loss`) exist, and no other gradient.
    A layer keeps 17·n_embd numbers per token (two LayerNorm inputs and outputs, query, key and value, attention's
    output twice, and the MLP's hidden layer before and after GELU), and what other choices in the slots keep beyond
    that. With checkpointing each layer keeps 1·n_embd, and the one that is recomputed 17·n_embd. Under autocast on a
    GPU all but LayerNorm's inputs take half the bytes, so 10 count instead of 17, and copies of the weights are added;
    on a CPU the measured peak showed neither. Unfused attention keeps scores and probabilities too.

    Under FSDP a process holds its shard of parameters, gradients and moments; the embeddings, the head's gradient and a
    block are whole.
    """
    model, train, parts = config.model, config.train, size.parameters(config.model)
    width, tokens = model.n_embd, train.micro_batch_tokens // distributed.world_size()
    number, cast = config.precision.name.bytes, config.precision.name.autocast
    on_cpu = here.kind == "cpu"
    halves = not on_cpu and cast is not None
    layer = (10 if halves else 17) * width + size.kept_beyond_gpt2(model, train.seq_len) // (2 if halves else 1)
    if here.unfused_attention:
        layer += 3 * model.n_head * train.seq_len + 4 * width
    kept = model.n_layer * width + layer if train.activation_checkpointing is True else model.n_layer * layer
    head = model.vocab_size * width
    rows = min(tokens, train.loss_rows)
    # for a product in emulated TF32, rounded copies of both operands exist too
    logits = rows * model.vocab_size * (2 if here.unfused_attention else 1)
    if cast == "float16":  # not by `HeadLoss`: keeps logits, log-softmax and its gradient
        logits = 3 * tokens * model.vocab_size
    made = head if on_cpu or here.unfused_attention else 0  # the product that becomes the gradient of the head
    backward = tokens * (kept + 3 * width) + head + logits + made
    parameters = parts["total"]
    extra = parameters // 2 if halves else 0
    if distributed.is_sharded(config.distributed):
        extra += parameters - parts["blocks"] + 2 * parts["blocks"] // model.n_layer
        parameters //= distributed.world_size()
    elif distributed.world_size() > 1:  # DDP allocates all gradients before backward
        backward += parameters
    peak = number * ((1 + config.optimizer.moments) * parameters + extra + max(parameters + head // 2, backward))
    return peak + (PROCESS_BYTES if on_cpu else 0)


def fit(config: RunConfig, here: Hardware, most: int) -> RunConfig:
    """`config` with `auto` decided for `train`'s batch size, loss chunk and activation checkpointing.

    The batch is the largest of `NICE_BATCHES` that fits into `here.free`, has at most `most` sequences and divides
    `train.tokens_per_step`. Checkpointing is on only if no batch fits without it. A batch that was given stays, with
    checkpointing if it does not fit without.
    """
    recompute = config.train.activation_checkpointing
    for again in (False, True) if recompute == AUTO else (recompute,):
        for candidate in _batches(config, most):
            settled = _settled(config, batch_size=candidate, activation_checkpointing=again)
            if here.free is None or memory(settled, here) <= here.free:
                return settled
    return _settled(config, batch_size=candidate, activation_checkpointing=recompute is not False)


def _batches(config: RunConfig, most: int) -> Iterator[int]:
    if config.train.batch_size != AUTO:
        yield config.train.sequences
        return
    windows = (config.train.tokens_per_step or 0) // config.train.seq_len
    for share in NICE_BATCHES:  # sequences of one process
        batch = share * distributed.world_size()
        if share == 1 or (batch <= most and windows % batch == 0):
            yield batch


def _settled(config: RunConfig, **choices: Any) -> RunConfig:
    train = config.train
    pieces = train.grad_accum_steps if train.tokens_per_step is None else 1  # 1: `TrainConfig.agree` sets it anew
    return replace(config, train=replace(train, grad_accum_steps=pieces, loss_chunk=train.loss_rows, **choices))


def fitting_batch(config: RunConfig, here: Hardware) -> int | None:
    """The largest batch below `train.batch_size`, a power of two for each process, whose `memory` is at most
    `here.free`; None if not even 1 is.
    """
    share = config.train.sequences // distributed.world_size()
    share = 2 ** ((share - 1).bit_length() - 1) if share > 1 else 0
    while share:
        batch = share * distributed.world_size()
        smaller = replace(config, train=replace(config.train, batch_size=batch, tokens_per_step=None))
        if memory(smaller, here) <= (here.free or 0):
            return batch
        share //= 2
    return None
