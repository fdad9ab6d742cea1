"""The MLP with a squared ReLU in place of GELU (So et al. 2021, Primer)."""

import torch.nn.functional as F
from torch import Tensor

from gpt2exp.model.gpt import MLP


class SquaredReLU(MLP):
    """The same two matrices, and so as many parameters and products as GPT-2's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(F.relu(self.c_fc(x)).square())
