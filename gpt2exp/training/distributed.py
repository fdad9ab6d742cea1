"""Several processes that train one model, a device each, started by torchrun: ranks, collectives, DDP and FSDP2.

Every process computes its rows of each batch. Rank 0 alone plans, reads and writes the run's folder and prints; the
others receive what they need by broadcast. With one process every function here returns its input unchanged.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from gpt2exp.config import Distributed, RunConfig
from gpt2exp.section import BadRequest, first_line, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


TIMEOUT = timedelta(hours=6)  # of a collective: rank 0 may tokenise for long. A process that died is noticed at once
T = TypeVar("T")
_alone = False
_sent = False  # whether rank 0 has broadcast the task


def rank() -> int:
    """The number of this process among all of the run's."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this process computes for itself: `world_size` is 1, and nothing is sent."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is rank 0, the process that plans, writes and prints."""
    return rank() == 0


def program() -> str:
    """The command that starts this run, without its overrides."""
    return "gpt2exp" if world_size() == 1 else f"torchrun --nproc-per-node {local_world_size()} -m gpt2exp.train"


def is_peer_lost(problem: Exception) -> bool:
    """Whether an exception says that another process of the run is gone."""
    import torch.distributed as dist

    return world_size() > 1 and (isinstance(problem, dist.DistError) or "/gloo/" in str(problem))


def is_sharded(how: Distributed) -> bool:
    """Whether each process of this run holds only a part of the model."""
    return how is Distributed.fsdp and world_size() > 1


def check(config: RunConfig) -> None:
    """Raise `BadRequest` for a batch that the processes cannot share equally."""
    batch, processes = config.train.batch_size, world_size()
    if isinstance(batch, int):
        near = max(1, batch // processes) * processes
        why = f"torchrun started {processes} processes, and each takes an equal part"
        require(batch % processes == 0, "train.batch_size", batch, why, f"try train.batch_size={near}")


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Let the processes communicate inside the block: GPUs by NCCL, CPUs by gloo; `BadRequest` if they do not meet."""
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo"
    if torch.cuda.is_available() and local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())
        backend += ",cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        why = f"the processes do not meet ({first_line(error)})"
        raise BadRequest(f"WORLD_SIZE={world_size()}: {why}; start them by torchrun") from error
    yield
    # not after an exception: both calls would wait for a peer that may be gone
    dist.barrier()  # a rank that exits while others still send sometimes aborts (seen with gloo, four ranks)
    dist.destroy_process_group()


def broadcast(value: T | None = None) -> T:
    """Send rank 0's object to every rank, and return it; the argument of the other ranks is ignored."""
    global _sent
    if world_size() > 1:
        import torch.distributed as dist

        _sent = True
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    return value  # type: ignore[return-value]


def release_followers() -> None:
    """If rank 0 has sent no task, send None, so that the other ranks exit."""
    if world_size() > 1 and not _sent:
        broadcast(None)


def all_max(*numbers: int | bool) -> list[int]:
    """The largest of each number over all processes."""
    if world_size() == 1:
        return [int(number) for number in numbers]
    import torch
    import torch.distributed as dist

    tensor = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(number) for number in tensor]


def all_mean(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all processes."""
    return tensor if world_size() == 1 else all_sum(tensor) / world_size()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        import torch.distributed as dist

        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks; each must have the same number of rows."""
    every = tensor.new_zeros(world_size(), *tensor.shape)
    every[rank()] = tensor
    return all_sum(every).flatten(0, 1)


def wrap(model: nn.Module, how: Distributed, device: torch.device) -> nn.Module:
    """Wrap `model` in DDP, or shard it by FSDP2, with rank 0's weights on all ranks. One process: `model` itself.

    A call takes this process's rows, and backward leaves in `.grad` the mean over all processes. Under DDP each process
    has all of it. Under FSDP each of N processes keeps an N-th of every parameter, gradient and moment, and a block's
    parameters are whole only while it computes.
    """
    if world_size() == 1:
        return model
    if how is Distributed.ddp:
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model, gradient_as_bucket_view=True)
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in model.parameters():
        dist.broadcast(parameter.detach(), 0)
    mesh = init_device_mesh(device.type, (world_size(),))
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def gradient_sync(module: nn.Module, on: bool) -> Iterator[None]:
    """Average gradients over the processes in this block if `on`, else accumulate them locally (DDP's `no_sync`)."""
    if world_size() == 1:
        yield
    elif hasattr(module, "no_sync"):  # DDP
        with contextlib.nullcontext() if on else module.no_sync():  # type: ignore[operator]
            yield
    else:
        module.set_requires_gradient_sync(on)  # type: ignore[operator]
        yield


def reshard(model: nn.Module) -> None:
    """Free the full parameters that FSDP keeps after a forward pass without backward."""
    if hasattr(model, "reshard"):
        model.reshard()  # type: ignore[operator]


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes; any other as it is."""
    return tensor.full_tensor() if _is_shard(tensor) else tensor  # type: ignore[attr-defined]


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors on rank 0, the sharded ones on its CPU; the other ranks get an empty dict."""
    kept = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)  # one at a time: all of them may not fit on one device
        if is_main():
            kept[name] = full.cpu() if _is_shard(tensor) else full
    return kept


def broadcast_like(value: Tensor | None, like: Tensor) -> Tensor:
    """Rank 0's tensor on every rank, on `like`'s device and sharded as it is; `ValueError` if rank 0 has none."""
    import torch

    if value is None and is_main():
        raise ValueError("rank 0 has no tensor to broadcast")
    value = torch.empty(like.shape, dtype=like.dtype, device=like.device) if value is None else value
    value = value.to(like.device, copy=True)
    if _is_shard(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    if world_size() > 1:
        import torch.distributed as dist

        dist.broadcast(value, 0)
    return value


def _is_shard(tensor: Tensor) -> bool:
    return world_size() > 1 and hasattr(tensor, "full_tensor")
