"""Attention that sees places by turning queries and keys (Su et al. 2021): use it with model/position=none."""

import torch
from torch import Tensor

from gpt2exp.config import ModelConfig
from gpt2exp.model.gpt import CausalSelfAttention
from gpt2exp.section import BadRequest


class Rotary(CausalSelfAttention):
    """Turns channel i of a head's first half, with channel i of its second, by place times base^(-2i/width), as Llama.

    The score of two tokens then depends on how far apart they are, not on where.
    """

    def __init__(self, config: ModelConfig, base: float = 10000.0) -> None:
        super().__init__(config)
        width = config.n_embd // config.n_head
        if width % 2:
            raise BadRequest(
                f"model.n_head={config.n_head}: heads are {width} wide; model/attention=rotary turns pairs"
            )
        speeds = base ** (-torch.arange(0, width, 2).float() / width)
        angles = torch.outer(torch.arange(config.block_size).float(), speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each head (B, H, T, C/H), from (B, T, C)."""
        q, k, v = super().heads(x)
        return self.turned(q), self.turned(k), v

    def turned(self, x: Tensor) -> Tensor:
        """Heads (B, H, T, C/H), each turned by its place."""
        one, other = x.chunk(2, -1)
        cos, sin = self.cos[: x.size(-2)], self.sin[: x.size(-2)]
        return (x * cos + torch.cat([-other, one], -1) * sin).to(x.dtype)
