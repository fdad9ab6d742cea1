"""The head and the loss in one operation, some rows at a time, so that the logits of a batch never stand whole.

Plainly computed, N rows of V logits, their log-softmax and its gradient take 3·N·V numbers: at 4 x 1024 tokens of
GPT-2 2.5 GB, more than its weights. The loss is a scalar and the last thing computed, so its gradient can be taken in
the forward pass, chunk by chunk in one buffer (Liger-Kernel, Hsu et al. 2024; `F.linear_cross_entropy` is PyTorch's
own, slower at a few hundred rows for it fills and adds to the weight's gradient: 142 ms against 115 at 128 rows of
GPT-2, `gpt2exp-bench` times the step).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy in nats of a linear head, with the gradients of both its operands."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, padded: Tensor | None
    ) -> Tensor:
        """`x` (N, C), `weight` (V, C), `targets` (N,) to a scalar, `rows` of the N at a time.

        The products are computed in `dtype`, the softmax in at least fp32. `padded` (P, C): the memory that `weight`
        is the beginning of, with rows of zeros after it, for products of a size the hardware likes; the logits of
        those rows take no part.
        """
        with torch.autocast(x.device.type, enabled=False):
            return _forward(ctx, x, weight, targets, rows, dtype, padded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients found in `forward`, times that of the loss; once only."""
        (scale,) = gradients
        found: tuple[Tensor | None, Tensor | None] = ctx.found
        (by_x, by_weight), ctx.found = found, None
        if by_x is not None:
            by_x = by_x * scale
        # on a CPU the scale is known, and a pass over the whole head can be saved
        if by_weight is not None and (scale.device.type != "cpu" or float(scale) != 1.0):
            by_weight.mul_(scale)
        return by_x, by_weight, None, None, None, None


def _forward(
    ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, padded: Tensor | None
) -> Tensor:
    wants_x, wants_weight = ctx.needs_input_grad[:2]
    words, count = len(weight), len(x)
    weights = (weight if padded is None else padded).to(dtype)
    logits = torch.empty(min(rows, count), len(weights), dtype=dtype, device=x.device)
    by_x = torch.empty_like(x) if wants_x else None
    by_weight: Tensor | None = None
    total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=x.device)
    for start in range(0, count, rows):
        part, target = x[start : start + rows].to(dtype), targets[start : start + rows, None]
        logit = torch.mm(part, weights.t(), out=logits[: len(part)])
        of_words = logit[:, :words]
        p = of_words.to(total.dtype)  # the same memory unless the products are of lower precision
        chosen, top = p.gather(1, target), p.amax(1, keepdim=True)
        norm = p.sub_(top).exp_().sum(1, keepdim=True)
        total += (norm.log() + top - chosen).sum()
        if not (wants_x or wants_weight):
            continue
        p.mul_(1 / (count * norm)).scatter_add_(1, target, p.new_full(target.shape, -1 / count))
        if p is not of_words:
            of_words.copy_(p)
        logit[:, words:] = 0
        if by_x is not None:
            by_x[start : start + rows] = torch.mm(logit, weights)
        if not wants_weight:
            continue
        if by_weight is None:
            by_weight = torch.mm(logit.t(), part).to(weight.dtype)
        elif dtype is weight.dtype:
            by_weight.addmm_(logit.t(), part)
        else:
            by_weight += torch.mm(logit.t(), part)
    ctx.found = by_x, None if by_weight is None else by_weight[:words]
    return total / count
