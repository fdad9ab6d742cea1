"""What a run measures of its model beside the loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2exp.model.gpt import GPT
from gpt2exp.model.init_check import norm
from gpt2exp.training import distributed as dist


def loss_unseen(model: GPT, idx: Tensor, seen: Tensor) -> float:
    """The part of the loss that tokens cost which never occur in the data, in nats per token.

    The loss of a target y splits into -log p(y | seen) - log p(seen): choosing among the tokens that occur, and
    choosing one of them at all. This is the mean of the second over the positions of `idx` (B, T); `seen` (S,) are the
    ids that occur. Forgetting the others can lower the loss by this much and no more.
    """
    shares = []
    with torch.no_grad():
        for rows in torch.split(idx, max(1, 256 // idx.size(1))):  # in parts: never the memory of the step itself
            logits = model(rows)
            logits = logits.float() if logits.dtype.itemsize == 2 else logits
            shares.append(logits.logsumexp(-1) - logits[..., seen].logsumexp(-1))
        return float(dist.all_mean(torch.cat(shares).mean()))


def grad_norm(model: nn.Module) -> float:
    """Euclidean norm of the whole gradient as it stands."""
    return math.hypot(*(norm(dist.full_tensor(p.grad)) for p in model.parameters() if p.grad is not None))


def stream_and_embedding_gradients(model: GPT, idx: Tensor, targets: Tensor) -> dict[str, float | list[float]]:
    """The residual stream and the token embedding's two gradients on one batch, by one pass through the model.

    `residual_rms`: root mean square of the stream as embedded and after each block, n_layer + 1 numbers.
    `wte_grad_lookup`, `wte_grad_head`: norms of the gradients that the embedding gets as look-up table and as head.
    Tied, the two add up in one tensor; untied, they belong to two. Their sizes tell which use steers it. Of several
    processes each gives its rows of the batch.
    """
    transformer = model.transformer
    rows = F.embedding(idx, transformer.wte.weight.detach()).requires_grad_()
    head = model.lm_head.weight.detach().requires_grad_()
    rms = []
    for x in transformer.stream(idx, rows):
        rms.append(float(dist.all_mean(x.detach().float().square().mean()).sqrt()))
    loss = model.loss(transformer.ln_f(x), head, targets)
    by_row, by_head = torch.autograd.grad(loss, [rows, head])
    by_token = torch.zeros_like(by_head).index_add_(0, idx.reshape(-1), by_row.flatten(0, 1))  # its positions add up
    lookup, head_use = (norm(dist.all_mean(gradient)) for gradient in (by_token, by_head))
    return {"residual_rms": rms, "wte_grad_lookup": lookup, "wte_grad_head": head_use}
