"""Attention whose queries and keys are normalised, head by head (Henry et al. 2020; Dehghani et al. 2023)."""

from torch import Tensor, nn

from gpt2exp.config import ModelConfig
from gpt2exp.model.gpt import CausalSelfAttention


class QKNorm(CausalSelfAttention):
    """RMSNorm of each head's query and key, with a learnt scale for each, so that scores cannot grow without bound."""

    def __init__(self, config: ModelConfig, eps: float = 1e-6) -> None:
        super().__init__(config)
        self.q_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=eps)
        self.k_norm = nn.RMSNorm(config.n_embd // config.n_head, eps=eps)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each head (B, H, T, C/H), from (B, T, C)."""
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v
