"""Tokens to batches: windows of the text as inputs, and the same windows shifted by one token as targets.

A batch is a function of its number alone, so the position in the data is one integer, every arm of a comparison reads
the same tokens, and no global random state is used.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gpt2exp.config import DataConfig, DataOrder, TrainConfig
from gpt2exp.data.tokens import Tokens, held_out


class Windows:
    """The training batches and the validation windows of a text, of `train.seq_len` tokens each.

    The last `data.val_fraction` of the tokens is for validation. Sequential order is build-nanogpt's loader:
    consecutive batches, which start again from the first when the next would run past the end; the remainder is left
    out. Shuffled order is a permutation of the same windows, drawn anew for each epoch from (seed, epoch); with
    `data.redraw` it is another one.
    """

    def __init__(
        self,
        tokens: Tokens,
        train: TrainConfig,
        data: DataConfig,
        seed: int,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """`share`: this process's rank and the number of processes; each reads an equal share of a batch's rows."""
        cut = len(tokens) - held_out(len(tokens), data.val_fraction)
        self.training, self.held_out = tokens[:cut], tokens[cut:]
        self.redraw = [data.redraw] if data.redraw else []
        self.train_config, self.order, self.seed, self.device, self.share = train, data.order, seed, device, share
        self.per_epoch = (cut - 1) // train.micro_batch_tokens  # batches in an epoch
        self._ahead: tuple[int, tuple[Tensor, Tensor]] | None = None
        self._permutation: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def train(self, number: int) -> tuple[Tensor, Tensor]:
        """Micro-batch `number`, counted from 0 over all epochs: inputs and targets, each (B / processes, T) int64."""
        if self._ahead is not None and self._ahead[0] == number:
            return self._ahead[1]
        return self._read(number)

    def prefetch(self, number: int) -> None:
        """Start copying micro-batch `number` to the device while the device still computes the one before."""
        self._ahead = number, self._read(number)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every validation window once, in order: inputs and targets, each (rows, T) int64.

        The windows depend on the text and `seq_len` alone, so that all runs with these are judged on the same ones.
        Without gradients a batch takes little memory. So it may be larger than a training batch: up to `loss_rows`
        tokens a process. A process's share of the last batch may be empty.
        """
        train, (rank, processes) = self.train_config, self.share
        batch = max(train.sequences, processes * (train.loss_rows // train.seq_len))
        windows = np.arange((len(self.held_out) - 1) // train.seq_len)
        for start in range(0, len(windows), batch):
            rows = np.array_split(windows[start : start + batch], processes)[rank]
            yield gather(self.held_out, rows, train.seq_len, self.device)

    def _read(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(number, self.per_epoch)
        (rank, processes), batch = self.share, self.train_config.sequences
        rows = batch // processes
        windows = index * batch + np.arange(rank * rows, (rank + 1) * rows)
        if self.order is DataOrder.shuffled:
            windows = self._shuffled(epoch)[windows]
        return gather(self.training, windows, self.train_config.seq_len, self.device)

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._permutation[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch, *self.redraw])
            windows = (len(self.training) - 1) // self.train_config.seq_len
            self._permutation = epoch, generator.permutation(windows)
        return self._permutation[1]


def gather(tokens: Tokens, windows: npt.NDArray[np.int64], seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of `seq_len` + 1 tokens from each window's start, as inputs and targets (B, T) on `device`."""
    rows = windows[:, None] * seq_len + np.arange(seq_len + 1)
    batch = torch.from_numpy(tokens[rows].astype(np.int64))
    if device.type == "cuda":
        batch = batch.pin_memory()  # lets the copy run beside the computation
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1], batch[:, 1:]
