"""One run in several processes, a device each, as torchrun starts them: who this one is, and what all agree on.

Every process takes its rows of each batch; the model is spread by PyTorch's DistributedDataParallel, or sharded by its
FSDP2. The first process alone plans, reads and writes the run's folder and prints; the others get from it what they
need. A process alone, the usual case, goes through the same calls, and they leave what they are given as it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from gpt2exp.config import BadRequest, Distributed, RunConfig, first_line, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: as long as the first may take to tokenise a large text. One that dies is
noticed in a moment, by its closed connections and by torchrun."""

T = TypeVar("T")

_sent = False
"""Whether the first process has told the others what to do."""


def rank() -> int:
    """The number of this process among all of the run's."""
    return int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def first() -> bool:
    """Whether this process is the one that plans, writes and prints."""
    return rank() == 0


def program() -> str:
    """How this run was started, its overrides left out."""
    return "gpt2exp" if size() == 1 else f"torchrun --nproc-per-node {local_size()} -m gpt2exp.train"


def lost(problem: Exception) -> bool:
    """Whether an exception says that another process of the run is gone."""
    import torch.distributed as dist

    return size() > 1 and (isinstance(problem, dist.DistError) or "/gloo/" in str(problem))


def shards(how: Distributed) -> bool:
    """Whether a process of this run holds but a part of the model."""
    return how is Distributed.fsdp and size() > 1


def check(config: RunConfig) -> None:
    """Refuse a batch that the processes cannot share alike; BadRequest."""
    batch, processes = config.train.batch_size, size()
    if isinstance(batch, int):
        near = max(1, batch // processes) * processes
        why = f"torchrun started {processes} processes, and each takes an equal part"
        require(batch % processes == 0, "train.batch_size", batch, why, f"try train.batch_size={near}")


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside the block the processes can talk to each other: by NCCL between GPUs, by gloo between CPUs.

    Raises:
        BadRequest: they do not find each other.
    """
    if size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
        backend += ",cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:
        why = f"the processes do not meet ({first_line(error)})"
        raise BadRequest(f"WORLD_SIZE={size()}: {why}; start them by torchrun") from error
    yield
    dist.destroy_process_group()  # not after an exception: a peer may be gone, and would be waited for


def from_first(value: T | None = None) -> T:
    """An object as the first process has it, in all of them; what the others give does not matter."""
    global _sent
    if size() > 1:
        import torch.distributed as dist

        _sent = True
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    return value  # type: ignore[return-value]


def dismiss() -> None:
    """Let the other processes end, if they still wait for their first word."""
    if size() > 1 and not _sent:
        from_first(None)


def largest(*numbers: int | bool) -> list[int]:
    """The largest of each number over all processes."""
    if size() == 1:
        return [int(number) for number in numbers]
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(number) for number in tensor]


def mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return tensor if size() == 1 else total(tensor) / size()


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if size() > 1:
        import torch.distributed as dist

        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def spread(model: nn.Module, how: Distributed, device: torch.device) -> nn.Module:
    """`model`, whose weights count as they are in the first process, made ready to train with the other processes.

    Its call takes this process's rows, and its backward pass leaves in `.grad` the mean over all processes: whole
    under DDP; under FSDP each process keeps an N-th of every parameter, gradient and moment, and the parameters of a
    block come together only while it computes. Alone: `model` itself.
    """
    if size() == 1:
        return model
    if how is Distributed.ddp:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    mesh = init_device_mesh(device.type, (size(),))
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def reducing(module: nn.Module, on: bool) -> Iterator[None]:
    """Backward passes inside the block take the mean over the processes, or with `on` false add up where they are."""
    if size() == 1:
        yield
    elif hasattr(module, "no_sync"):  # DDP
        with contextlib.nullcontext() if on else module.no_sync():  # type: ignore[operator]
            yield
    else:
        module.set_requires_gradient_sync(on)  # type: ignore[operator]
        yield


def reshard(model: nn.Module) -> None:
    """Have a sharded model give back what a forward pass without a backward pass left whole."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its parts from all processes, if it is sharded."""
    return tensor.full_tensor() if _sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each whole; the sharded ones on the CPU of the first process, and nowhere else."""
    kept = {}
    for name, tensor in tensors.items():
        full = whole(tensor)  # one at a time: all of them may not fit on one device
        if first():
            kept[name] = full.cpu() if _sharded(tensor) else full
    return kept


def given(value: Tensor | None, like: Tensor) -> Tensor:
    """What the first process has, in all of them on the device of `like`: this process's shard, if `like` is one."""
    import torch

    value = torch.empty(like.shape, dtype=like.dtype, device=like.device) if value is None else value
    value = value.to(like.device, copy=True)
    if _sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    if size() > 1:
        import torch.distributed as dist

        dist.broadcast(value, 0)
    return value


def _sharded(tensor: Tensor) -> bool:
    return size() > 1 and hasattr(tensor, "full_tensor")
