"""The MLP with a gate: one matrix's output, through SiLU, multiplies another's (Shazeer 2020), as in Llama."""

import torch.nn.functional as F
from torch import Tensor, nn

from gpt2exp.config import ModelConfig
from gpt2exp.model.gpt import Linear


class SwiGLU(nn.Module):
    """Three matrices of inner width `hidden`; null: 8/3 of n_embd, so that they hold as much as GPT-2's two."""

    def __init__(self, config: ModelConfig, hidden: int | None = None) -> None:
        super().__init__()
        width = config.n_embd
        hidden = round(8 * width / 3) if hidden is None else hidden
        self.c_gate = Linear(width, hidden, config.bias)
        self.c_fc = Linear(width, hidden, config.bias)
        self.c_proj = Linear(hidden, width, config.bias)
        self.c_proj.residual = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(F.silu(self.c_gate(x)) * self.c_fc(x))
