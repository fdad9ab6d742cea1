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

from gpt2exp.config import DataOrder, TrainConfig
from gpt2exp.data.tokens import Tokens, held_out


def split(tokens: Tokens, val_fraction: float) -> tuple[Tokens, Tokens]:
    """Training tokens and, from the end of the text, `val_fraction` of it for validation."""
    cut = len(tokens) - held_out(len(tokens), val_fraction)
    return tokens[:cut], tokens[cut:]


class Batches:
    """Micro-batches of `batch_size` windows of `seq_len` tokens, by number.

    Sequential order is build-nanogpt's loader: consecutive batches that wrap to the start when the next would run
    past the end, the remainder left out. Shuffled order deals the same windows by a permutation drawn anew for each
    epoch from (seed, epoch).
    """

    def __init__(
        self,
        tokens: Tokens,
        train: TrainConfig,
        order: DataOrder,
        seed: int,
        device: torch.device,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """`rank` of `processes`: which equal share of every batch's rows this process reads."""
        self.tokens = tokens
        self.rank, self.processes = rank, processes
        self.batch_size, self.seq_len = train.sequences, train.seq_len
        self.order, self.seed, self.device = order, seed, device
        self.per_epoch = (len(tokens) - 1) // (self.batch_size * self.seq_len)
        """Batches in an epoch."""
        self._ahead: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._permutation: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def prefetch(self, number: int) -> None:
        """Have micro-batch `number` on its way to the device while that is still busy with the one before."""
        self._ahead = number, self._read(number)

    def at(self, number: int) -> tuple[Tensor, Tensor]:
        """Micro-batch `number`, counted from 0 over all epochs: inputs and targets, each (B / processes, T) int64."""
        if self._ahead is not None and self._ahead[0] == number:
            return self._ahead[1]
        return self._read(number)

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(number, self.per_epoch)
        rows = self.batch_size // self.processes
        windows = index * self.batch_size + np.arange(self.rank * rows, (self.rank + 1) * rows)
        if self.order is DataOrder.shuffled:
            windows = self._shuffled(epoch)[windows]
        return gather(self.tokens, windows, self.seq_len, self.device)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._permutation = epoch, generator.permutation((len(self.tokens) - 1) // self.seq_len)
        return self._permutation[1]


def validation_windows(
    tokens: Tokens, seq_len: int, batch_size: int, device: torch.device, rank: int = 0, processes: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every window of the validation tokens once, in order: (inputs, targets) of up to `batch_size` rows.

    The windows depend on the text and `seq_len` alone, so every run with these is judged on the same ones. Of several
    processes each reads its share of a batch's rows, which in the last batch may be none.
    """
    windows = np.arange((len(tokens) - 1) // seq_len)
    for start in range(0, len(windows), batch_size):
        rows = np.array_split(windows[start : start + batch_size], processes)[rank]
        yield gather(tokens, rows, seq_len, device)


def gather(tokens: Tokens, windows: npt.NDArray[np.int64], seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of `seq_len` + 1 tokens from each window's start, as inputs and targets (B, T) on `device`."""
    rows = windows[:, None] * seq_len + np.arange(seq_len + 1)
    batch = torch.from_numpy(tokens[rows].astype(np.int64))
    if device.type == "cuda":
        batch = batch.pin_memory()  # lets the copy run beside the computation
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]
