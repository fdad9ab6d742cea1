"""Places without a learnt table: sines (Vaswani et al. 2017), or nothing."""

import math

import torch
from torch import Tensor, nn

from gpt2exp.config import ModelConfig


class Sinusoidal(nn.Module):
    """Adds sines and cosines of wavelengths from 2 pi to `base` times that, their root mean square `scale`.

    The default is what GPT-2's learnt places begin with, so that the two differ in shape and not in size.
    """

    def __init__(self, config: ModelConfig, base: float = 10000.0, scale: float = 0.02) -> None:
        super().__init__()
        half = math.ceil(config.n_embd / 2)
        speeds = base ** (-torch.arange(half).float() * 2 / config.n_embd)
        angles = torch.outer(torch.arange(config.block_size).float(), speeds)
        table = torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, : config.n_embd]
        self.register_buffer("table", scale * math.sqrt(2) * table, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, T, C) to the same with their places."""
        return x + self.table[: x.size(1)]


class NoPosition(nn.Identity):
    """Adds nothing: only the causal mask tells places apart (Haviv et al. 2022), or model/attention=rotary does."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
