"""The norm that divides by the root mean square alone (Zhang and Sennrich 2019): no mean taken out, no shift."""

from torch import nn

from gpt2exp.config import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Each token's channels to mean square 1, then a learnt scale."""

    def __init__(self, config: ModelConfig, eps: float = 1e-5) -> None:
        super().__init__(config.n_embd, eps=eps)
