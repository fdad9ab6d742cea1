"""GPT-2 as OpenAI wrote it (Radford et al. 2019; github.com/openai/gpt-2, src/model.py), with Hugging Face's names.

Read it from top to bottom: attention, MLP, norm and positions, which are the slots that `config` may fill with another
class; then block and GPT. Shapes: B sequences, T tokens, C = n_embd channels, H heads, V words in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpt2exp.config import ModelConfig
from gpt2exp.model.loss import HeadLoss, loss_alone


class Linear(nn.Linear):
    """`nn.Linear` without PyTorch's own draw: `initialise` sets every weight, and no global random state moves."""

    residual = False  # True: it writes into the residual stream, so its initial std is scaled down with depth

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class Embedding(nn.Embedding):
    """`nn.Embedding` without PyTorch's own draw."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and those before it (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, config.bias)  # query, key and value of all heads at once
        self.c_proj = Linear(config.n_embd, config.n_embd, config.bias)
        self.c_proj.residual = True
        self.n_head = config.n_head

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of each head (B, H, T, C/H), from (B, T, C)."""
        return self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4).unbind()  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two layers around GELU in its tanh form (Hendrycks and Gimpel 2016), four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, config.bias)
        self.c_proj.residual = True

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class ExactGELU(MLP):
    """The same around GELU itself, by the error function, which the tanh form approximates to 5e-4."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x)))  # type: ignore[no-any-return]


class LayerNorm(nn.LayerNorm):
    """Normalises each token's channels to mean 0 and variance 1, then scales and shifts (Ba, Kiros and Hinton 2016)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.n_embd, bias=config.bias)


class Positions(Embedding):
    """A learnt vector for each place in the sequence, added to the token that stands there."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.block_size, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Embedded tokens (B, T, C) to the same with their places."""
        return x + super().forward(torch.arange(x.size(1), device=x.device))


class Block(nn.Module):
    """Attention, then MLP: each reads the normalised residual stream and adds its output to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = config.norm.build(config)
        self.attn = config.attention.build(config)
        self.ln_2 = config.norm.build(config)
        self.mlp = config.mlp.build(config)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to (B, T, C)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


def _look_up(weight: Tensor, idx: Tensor) -> Tensor:
    """Rows `idx` of a tied embedding. Their backward adds the rows' gradient directly into `weight.grad`.

    Autograd would fill a dense gradient of all V rows for the look-up and add it to the head's, which takes a fifth of
    a CPU step at small batches. The head is the last layer, so its gradient is in `weight.grad` before this one comes;
    in the other order the sum would be the same. `torch.autograd.grad` and hooks on `weight` do not see this gradient.
    """
    rows = F.embedding(idx, weight.detach())
    if torch.is_grad_enabled():

        def add(gradient: Tensor) -> None:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, idx.reshape(-1), gradient.reshape(-1, gradient.size(-1)))

        rows.requires_grad_().register_hook(add)  # type: ignore[no-untyped-call]
    return rows


@dataclass
class Trace:
    """Tensors of a forward pass that are measured after it (`gpt2exp.training.measures`)."""

    rows: Tensor  # the embedded tokens (B, T, C); after the backward pass their gradient is in `rows.grad`
    mean_squares: list[Tensor]  # of the residual stream as embedded, then after each block
    out: Tensor  # what the head reads (B, T, C)


class Transformer(nn.Module):
    """Token and position embeddings, the blocks, and a last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = config.position.build(config)
        self.h = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = config.norm.build(config)
        self.gradient_in_place = False  # see `_look_up`: for tied weights trained by `loss.backward()` alone
        self.recompute = False  # keep only a block's input and compute the rest again in backward (Chen et al. 2016)
        self.traced = False  # True: the next forward pass sets `trace`
        self.trace: Trace | None = None

    def forward(self, idx: Tensor) -> Tensor:
        """Tokens (B, T) to what the head reads, (B, T, C)."""
        rows = _look_up(self.wte.weight, idx) if self.gradient_in_place else F.embedding(idx, self.wte.weight)
        if not self.traced:
            *_, x = self.stream(rows)
            return self.ln_f(x)  # type: ignore[no-any-return]
        rows.retain_grad()
        squares = []
        for x in self.stream(rows):
            squares.append(x.detach().float().square().mean())
        out: Tensor = self.ln_f(x)
        self.trace, self.traced = Trace(rows, squares, out.detach()), False
        return out

    def stream(self, rows: Tensor) -> Iterator[Tensor]:
        """The residual stream (B, T, C) as embedded, then after each block; `rows`: the tokens' embeddings."""
        x = self.wpe(rows)
        yield x
        for block in self.h:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
            else:
                x = block(x)
            yield x


class GPT(nn.Module):
    """The transformer and the head over the vocabulary. The weights are uninitialised memory until `initialise`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight  # one tensor, used twice; both gradients add

        self.loss_rows = 1024  # rows of logits that are in memory at a time while the loss is computed
        self._padded: Tensor | None = None

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of tokens (B, T); with targets (B, T), their mean cross-entropy in nats instead."""
        x = self.transformer(idx)
        return self.lm_head(x) if targets is None else self.loss(x, self.lm_head.weight, targets)

    def loss(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of a head `weight` (V, C) that reads `x` (B, T, C), against targets (B, T)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x, targets = x.flatten(0, 1), targets.flatten()
        # checked here: inside an autograd function it cannot be seen whether a gradient will be computed
        if not torch.is_grad_enabled():
            return loss_alone(x, weight, targets, dtype)
        if dtype is torch.float16:  # its gradient must be scaled before the head, not after
            return F.cross_entropy(F.linear(x, weight).float(), targets)
        padded = self._padded if weight is self.lm_head.weight else None
        return HeadLoss.apply(x, weight, targets, self.loss_rows, dtype, padded)  # type: ignore[no-any-return, no-untyped-call]

    def pad_vocabulary(self, multiple: int = 64) -> None:
        """Store the head's weight in a buffer padded with zero rows, of a size at which products are faster.

        The parameter itself keeps its V rows: nothing that counts, saves, draws or optimises it sees the padding.
        Call it when the model is on its device in its type.
        """
        weight = self.lm_head.weight
        self._padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % multiple))
        weight.data = self._padded[: len(weight)]
