"""Token file to batches: (x, y) pairs of windows and the same windows shifted by one.

A batch is a pure function of its number, so the position in the data is one integer, every arm of a comparison reads
the same tokens, and nothing touches a global random state.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2exp.config import BadRequest, DataConfig, DataOrder, TrainConfig

Tokens = npt.NDArray[np.uint16]


def split(tokens: Tokens, val_fraction: float) -> tuple[Tokens, Tokens]:
    """Training tokens and, from the end of the text, `val_fraction` of it for validation."""
    cut = len(tokens) - round(len(tokens) * val_fraction)
    return tokens[:cut], tokens[cut:]


def check_fits(tokens: int, data: DataConfig, train: TrainConfig) -> None:
    """Raise `BadRequest` if one micro-batch, or one validation window, is larger than its part of the data."""
    val = round(tokens * data.val_fraction)
    need = train.tokens_per_micro_batch + 1  # the last input needs a target
    if tokens - val < need:
        most = (tokens - val - 1) // train.seq_len
        remedy = f"try train.batch_size={most}" if most else f"try train.seq_len={max(1, tokens - val - 1)}"
        size = f"a batch of {train.batch_size} x {train.seq_len} + 1 = {need:,} tokens is larger than the data"
        raise BadRequest(f"train.batch_size={train.batch_size}: {size}, {tokens - val:,} training tokens; {remedy}")
    if val and val < train.seq_len + 1:
        why = f"leaves {val:,} tokens, too few for one window of train.seq_len={train.seq_len} and its target"
        enough = min(0.5, round((train.seq_len + 2) / tokens + 0.005, 2))
        raise BadRequest(f"data.val_fraction={data.val_fraction}: {why}; try data.val_fraction={enough} or 0")


class Batches:
    """Micro-batches of `batch_size` windows of `seq_len` tokens, by number.

    Sequential order is build-nanogpt's loader: consecutive batches that wrap to the start when the next would run
    past the end, the remainder left out. Shuffled order deals the same windows by a permutation drawn anew for each
    epoch from (seed, epoch).
    """

    def __init__(self, tokens: Tokens, train: TrainConfig, order: DataOrder, seed: int, device: torch.device) -> None:
        self.tokens = tokens
        self.batch_size, self.seq_len = train.batch_size, train.seq_len
        self.order, self.seed, self.device = order, seed, device
        self.per_epoch = (len(tokens) - 1) // (self.batch_size * self.seq_len)
        """Batches in an epoch."""
        self._permutation: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """Micro-batch `number`, counted from 0 over all epochs: inputs and targets, each (B, T) int64."""
        epoch, index = divmod(number, self.per_epoch)
        windows = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        if self.order is DataOrder.shuffled:
            windows = self._shuffled(epoch)[windows]
        return gather(self.tokens, windows, self.seq_len, self.device)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._permutation = epoch, generator.permutation((len(self.tokens) - 1) // self.seq_len)
        return self._permutation[1]


def validation_windows(
    tokens: Tokens, seq_len: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of the validation tokens once, in order: (inputs, targets) of up to `batch_size` rows.

    The windows depend on the text and `seq_len` alone, so every run with these is judged on the same ones.
    """
    windows = np.arange((len(tokens) - 1) // seq_len)
    for start in range(0, len(windows), batch_size):
        yield gather(tokens, windows[start : start + batch_size], seq_len, device)


def gather(
    tokens: Tokens, windows: npt.NDArray[np.int64], seq_len: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of `seq_len` + 1 tokens from each window's start, as inputs and targets (B, T) on `device`."""
    rows = windows[:, None] * seq_len + np.arange(seq_len + 1)
    batch = torch.from_numpy(tokens[rows].astype(np.int64))
    if device.type == "cuda":  # pinned memory lets the copy run beside the computation
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]
