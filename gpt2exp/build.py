"""From a checked configuration to a trainer ready to step: what a run and `gpt2exp-bench` have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpt2exp import estimate, heap, hub, parallel, tokens
from gpt2exp.config import AUTO, BadRequest, InitConfig, InitScheme, ModelConfig, RunConfig

if TYPE_CHECKING:
    import torch

    from gpt2exp.checkpoint import Checkpoint
    from gpt2exp.model import GPT
    from gpt2exp.precision import Precision
    from gpt2exp.trainer import Trainer


def prepare_heap(config: RunConfig) -> int | None:
    """Make the heap ready for a run, before torch is imported; the bytes that were free before."""
    heap.give_back()
    free = heap.available()
    free = None if free is None else free // parallel.local_size()
    if heap.computes_here(config.train.device):
        how = {"on_cpu": True, "unfused_attention": False}
        likely = estimate.fit(config, free, 2**30, **how)
        heap.prepare(
            estimate.memory(likely, **how) - estimate.PROCESS_BYTES,
            certain=16 * config.model.parameters["total"],
            steps=config.train.steps,
            tight=likely.train.activation_checkpointing is True,
        )
    return free


def smallest(config: RunConfig) -> RunConfig:
    """With a batch of one sequence where the batch is left open."""
    return replace(config, train=replace(config.train, batch_size=1)) if config.train.batch_size == AUTO else config


def check_text(config: RunConfig, source: tokens.TokenFile) -> None:
    """Raise `BadRequest` if the text is too short for a batch, or has ids that the model has no embedding for."""
    tokens.check_fits(source.tokens, config.data, config.train)
    if source.max_token >= config.model.vocab_size:
        why = f"token {source.max_token} of {source.name} needs at least {source.max_token + 1}"
        raise BadRequest(f"model.vocab_size={config.model.vocab_size}: {why}; try model.vocab_size=50257")


def check_weights(init: InitConfig, model: ModelConfig) -> None:
    """Raise `BadRequest` if `init` names weights that are not there, or not this model's."""
    if init.scheme is InitScheme.pretrained:
        hub.check(hub.find(str(init.path)), model)


def settled(
    config: RunConfig, device: torch.device, got: Precision, source: tokens.TokenFile, free: int | None
) -> tuple[RunConfig, int]:
    """`config` with every `auto` of its `train` decided, and its estimated peak memory in bytes."""
    from gpt2exp import runtime

    how = {"on_cpu": device.type == "cpu", "unfused_attention": got.emulated}
    training = source.tokens - tokens.held_out(source.tokens, config.data.val_fraction)
    config = estimate.fit(config, free, (training - 1) // config.train.seq_len, **how)
    config = replace(config, train=runtime.settle(config.train, device))
    return config, estimate.memory(config, **how)


def trainer(
    config: RunConfig,
    device: torch.device,
    got: Precision,
    source: tokens.TokenFile,
    saved: Checkpoint | None = None,
) -> Trainer:
    """The trainer of a settled configuration, at its first step or with the weights of a checkpoint.

    Called, and stepped, inside `precision.applied`, which gave `got`.
    """
    import torch

    from gpt2exp import data, model, runtime
    from gpt2exp.trainer import Trainer

    train_tokens, val_tokens = data.split(source.map(), config.data.val_fraction)
    with torch.device(device):
        gpt = model.GPT(config.model).to(got.weights)
    if runtime.pads_vocabulary(config.model.pad_vocab, device) and not parallel.shards(config.distributed):
        gpt.pad_vocabulary()
    origin = start(gpt, config, saved)
    return Trainer(
        gpt,
        data.Batches(
            train_tokens, config.train, config.data.order, config.seed, device, parallel.rank(), parallel.size()
        ),
        config.train,
        config.optimizer,
        seen=torch.from_numpy(source.seen()).to(device),
        validation=val_tokens if len(val_tokens) else None,
        autocast=got.autocast,
        origin=origin,
        distributed=config.distributed,
    )


def start(gpt: GPT, config: RunConfig, saved: Checkpoint | None = None) -> dict[str, Any]:
    """Give the model its first weights, or a checkpoint's; where they came from and how they are tied, for the record.

    Raises:
        BadRequest: `init.path` holds no weights of this model, or the checkpoint's are of another.
        diagnostics.InitError: the weights are not what the configuration says.
    """
    from gpt2exp import checkpoint, diagnostics, model

    if not parallel.first():
        return {}  # it takes them from the first
    origin: dict[str, Any] = {"source": None, "files": [], "sha256": None}
    if saved is not None:
        if saved.model(str(saved.folder)) != config.model:
            raise BadRequest(f"{saved.folder}: a checkpoint of another model; give the model.* keys the run had")
        checkpoint.load_weights(gpt, saved.weights())
        origin = saved.state.get("init", origin)
    elif config.init.scheme is InitScheme.pretrained:
        origin = hub.load(gpt, config.init)
    else:
        model.initialise(gpt, config.init, config.seed)
        diagnostics.check_init(gpt, config.init)
    return {"scheme": config.init.scheme.value, **origin, "tying": diagnostics.check_tying(gpt)}
