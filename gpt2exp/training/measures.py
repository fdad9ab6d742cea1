"""Measures of a model in training other than the loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gpt2exp.model.gpt import GPT
from gpt2exp.model.init_check import norm
from gpt2exp.model.loss import log_sum_exp, logits_in_parts
from gpt2exp.training import distributed as dist


def of_trace(model: GPT, seen: Tensor, idx: Tensor | None, scale: float) -> dict[str, Any]:
    """What the trace of a pass tells, after its backward pass and before the weights change; the trace is used up.

    `seen` (S,): the ids that occur. With the pass's tokens `idx` (B, T), of a model that is not sharded: the residual
    stream (`residual_rms`, n_layer + 1 numbers) and the embedding's two gradients too. `scale`: of the gradients.
    """
    trace, model.transformer.trace = model.transformer.trace, None
    assert trace is not None
    measured: dict[str, Any] = {"loss_unseen": loss_unseen(trace.out, dist.full_tensor(model.lm_head.weight), seen)}
    if idx is not None:
        measured["residual_rms"] = [float(dist.all_mean(square).sqrt()) for square in trace.mean_squares]
        norms = embedding_gradients(model, trace.rows, idx, scale)
        # a scaled step may overflow
        measured |= {key: value for key, value in norms.items() if math.isfinite(value)}
    return measured


def loss_unseen(x: Tensor, weight: Tensor, seen: Tensor) -> float:
    """The part of the loss that is due to tokens which never occur in the data, in nats per token.

    The loss of a target y is -log p(y | seen) - log p(seen): choosing among the tokens that occur, and choosing one of
    them at all. This is the mean of the second term. The head `weight` (V, C) reads `x` (B, T, C); `seen` (S,) are the
    ids that occur. Giving no probability to the other ids can lower the loss by this much and no more.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    occurs = torch.zeros(len(weight), dtype=torch.bool, device=x.device).index_fill_(0, seen, True)
    of_all = of_seen = torch.tensor(-torch.inf, device=x.device)
    for start, logit in logits_in_parts(x.flatten(0, 1), weight, dtype):
        of_all = torch.logaddexp(of_all, log_sum_exp(logit))
        of_seen = torch.logaddexp(of_seen, logit[:, occurs[start : start + logit.size(1)]].logsumexp(1))
    return float(dist.all_mean((of_all - of_seen).mean()))


def grad_norm(model: nn.Module) -> float:
    """Euclidean norm of the whole gradient as it stands."""
    return math.hypot(*(norm(dist.full_tensor(p.grad)) for p in model.parameters() if p.grad is not None))


def embedding_gradients(model: GPT, rows: Tensor, idx: Tensor, scale: float) -> dict[str, float]:
    """Norms of the gradients that the token embedding gets as look-up table and as head, by one backward pass.

    Tied, the two add up in one tensor; untied, they belong to two. Their sizes tell which use of the embedding has more
    influence on it. `rows` (B, T, C), whose gradient was kept, are the embeddings of `idx` (B, T). All gradients are
    `scale` times those of the loss. With several processes, each passes its part of the batch.
    """
    assert rows.grad is not None
    idx, by_row = dist.all_rows(idx.flatten()), dist.all_rows(rows.grad.flatten(0, 1)) / dist.world_size()
    tokens, place = torch.unique(idx, return_inverse=True)
    lookup = by_row.new_zeros(len(tokens), by_row.size(1)).index_add_(0, place, by_row)  # a token's positions add up
    assert model.lm_head.weight.grad is not None
    head = dist.all_mean(model.lm_head.weight.grad)
    lengths = head.norm(dim=-1)
    if model.config.tie_weights:  # `head` is the sum of both: take the look-up's part from the rows that have one
        lengths[tokens] = (head[tokens] - lookup).norm(dim=-1)
    return {"wte_grad_lookup": norm(lookup) / scale, "wte_grad_head": norm(lengths[:, None]) / scale}
