"""The head and the loss in one operation, some rows at a time, so that a batch's logits are never all in memory.

The plain way keeps N rows of V logits, their log-softmax and its gradient. These 3·N·V numbers are 2.5 GB at 4 x 1024
tokens of GPT-2, more than its weights. The loss is a scalar and the last thing computed, so its gradient can be taken
in the forward pass, chunk by chunk in one buffer (Liger-Kernel, Hsu et al. 2024). PyTorch's own way is
`F.linear_cross_entropy`. It fills the weight's gradient and adds to it, and so is slower at a few hundred rows: 142 ms
against 115 at 128 rows of GPT-2 (`gpt2exp-bench` times the step).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WORDS = 1024
"""Words of the vocabulary at a time where no gradient is wanted. Their logits stay in the processor's cache: the
products took half as long as with 128 rows and all words (AMD EPYC, 64 and 768 channels)."""


def logits_in_parts(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Logits (N, `WORDS`) of `x` (N, C) and a head `weight` (V, C), some words at a time, and the first word's id.

    The products are computed in `dtype` and handed out in at least fp32.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        for start in range(0, len(weight), WORDS):
            logit = torch.mm(x, weight[start : start + WORDS].to(dtype).t())
            yield start, logit.to(torch.promote_types(dtype, torch.float32))


def log_sum_exp(logit: Tensor) -> Tensor:
    """`logit.logsumexp(1)` of (N, W), by log-softmax: one kernel. logsumexp has four and takes 1.5 times as long."""
    return logit[:, 0] - F.log_softmax(logit, 1)[:, 0]


def loss_alone(x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """What `HeadLoss` computes, without gradients: `x` (N, C), `weight` (V, C), `targets` (N,) to a scalar."""
    wide = torch.promote_types(dtype, torch.float32)
    norm = torch.full(targets.shape, -torch.inf, dtype=wide, device=x.device)
    chosen = torch.zeros_like(norm)
    for start, logit in logits_in_parts(x, weight, dtype):
        norm = torch.logaddexp(norm, log_sum_exp(logit))
        place = targets - start
        here = (place >= 0) & (place < logit.size(1))
        chosen += logit.gather(1, place.clamp(0, logit.size(1) - 1)[:, None])[:, 0] * here
    return (norm - chosen).mean()


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of a linear head, with the gradients of both its operands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, padded: Tensor | None
    ) -> Tensor:
        """`x` (N, C), `weight` (V, C), `targets` (N,) to a scalar, `rows` of the N at a time.

        The products are computed in `dtype`, the softmax in at least fp32. `padded` (P, C): the buffer whose first rows
        are `weight` and whose others are zeros, of a size at which products are faster.
        """
        with torch.autocast(x.device.type, enabled=False):
            words, count = len(weight), len(x)
            weights = (weight if padded is None else padded).to(dtype)
            by_x, by_weight = torch.empty_like(x), None
            total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
            for start in range(0, count, rows):
                part, target = x[start : start + rows].to(dtype), targets[start : start + rows, None]
                logit = torch.mm(part, weights.t())
                of_words = logit[:, :words]
                p = of_words.to(total.dtype)  # the same memory unless the products are of lower precision
                chosen, top = p.gather(1, target), p.amax(1, keepdim=True)
                norm = p.sub_(top).exp_().sum(1, keepdim=True)
                total += (norm.log() + top - chosen).sum()
                p.mul_(1 / (count * norm)).scatter_add_(1, target, p.new_full(target.shape, -1 / count))
                if p is not of_words:
                    of_words.copy_(p)
                logit[:, words:] = 0
                by_x[start : start + rows] = torch.mm(logit, weights)
                of_part = torch.mm(logit.t(), part).to(weight.dtype)
                by_weight = of_part if by_weight is None else by_weight.add_(of_part)
                del logit, of_words, p, of_part  # before the next rows' are allocated
            assert by_weight is not None  # there are rows
            ctx.found = by_x, by_weight[:words]
            return total / count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients found in `forward`, times that of the loss; once only."""
        (scale,) = gradients
        (by_x, by_weight), ctx.found = ctx.found, None
        # on a CPU the scale can be read without waiting; if it is 1, a pass over the whole head is saved
        if scale.device.type != "cpu" or float(scale) != 1.0:
            by_weight.mul_(scale)
        return by_x * scale, by_weight, None, None, None, None
