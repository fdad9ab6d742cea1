"""What is measured about a model, off the training clock."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2exp import parallel
from gpt2exp.config import InitConfig, InitScheme, ModelConfig
from gpt2exp.model import GPT


class InitError(RuntimeError):
    """The initial weights are not what the configuration says."""


def norm(tensor: Tensor) -> float:
    """Euclidean norm, a row at a time: one fp32 sum over the 38 million squares of `wte` is off by 0.2 %."""
    return math.sqrt(float(tensor.norm(dim=-1).square().sum()))


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
        return float(parallel.mean(torch.cat(shares).mean()))


def grad_norm(model: nn.Module) -> float:
    """Euclidean norm of the whole gradient as it stands."""
    return math.hypot(*(norm(parallel.whole(p.grad)) for p in model.parameters() if p.grad is not None))


def first_look(model: GPT, idx: Tensor, targets: Tensor) -> dict[str, float | list[float]]:
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
        rms.append(float(parallel.mean(x.detach().float().square().mean()).sqrt()))
    loss = model.loss(transformer.ln_f(x), head, targets)
    by_row, by_head = torch.autograd.grad(loss, [rows, head])
    by_token = torch.zeros_like(by_head).index_add_(0, idx.reshape(-1), by_row.flatten(0, 1))  # its positions add up
    lookup, head_use = (norm(parallel.mean(gradient)) for gradient in (by_token, by_head))
    return {"residual_rms": rms, "wte_grad_lookup": lookup, "wte_grad_head": head_use}


def expected_std(model: ModelConfig, init: InitConfig) -> dict[str, float]:
    """The standard deviation each kind of weight should start with, from the published rules alone.

    Kept apart from `gpt2exp.model.rule_of`, which goes by flags on modules, so that one can catch the other: Hugging
    Face's GPT-2 skipped residual scaling for years without a word (huggingface/transformers#47458).
    """
    c = model.n_embd
    residual = (2 * model.n_layer) ** -0.5 if init.residual_scaling else 1.0
    uniform = math.sqrt(1 / 3) if init.scheme is InitScheme.torch else 1.0  # std of U(-1, 1)

    def matrix(fan_in: int) -> float:
        return uniform / math.sqrt(fan_in) if init.std is None else init.std

    wte = 1.0 if init.scheme is InitScheme.torch and not model.tie_weights else matrix(c)
    return {
        "wte": wte,
        "wpe": 1.0 if init.position_std is None else init.position_std,
        "attn.c_attn": matrix(c),
        "attn.c_proj": residual * matrix(c),
        "mlp.c_fc": matrix(c),
        "mlp.c_proj": residual * matrix(4 * c),
        "lm_head": matrix(c),
    }


def check_tying(model: GPT) -> dict[str, bool]:
    """Whether `lm_head.weight` and `wte.weight` are one tensor (`same_pointer`) and `all_equal`.

    Raises:
        InitError: they are not one where the model ties them, or one where it does not.
    """
    head, wte = model.lm_head.weight, model.transformer.wte.weight
    one = head.data_ptr() == wte.data_ptr()
    if one != model.config.tie_weights:
        must = "be one tensor" if model.config.tie_weights else "be two tensors"
        raise InitError(
            f"initialisation: lm_head.weight and wte.weight must {must}; a weight was put in another's place"
        )
    return {"same_pointer": one, "all_equal": head.equal(wte)}


def check_init(model: GPT, init: InitConfig) -> dict[str, float]:
    """Measured std of each kind of weight, held against `expected_std`; biases and LayerNorms against their constants.

    The tolerance is six standard errors of a sample's std, 1/sqrt(2n) relative for n draws.

    Raises:
        InitError: a kind is off, naming it, what was measured and what was expected.
    """
    expected = expected_std(model.config, init)
    values: dict[str, list[Tensor]] = {kind: [] for kind in expected}
    for name, module in model.named_modules():
        kind = next((kind for kind in expected if name.endswith(kind)), None)
        if kind:
            values[kind].append(module.weight.detach())
    measured = {}
    for kind, tensors in values.items():
        count = sum(tensor.numel() for tensor in tensors)
        square = sum(norm(tensor) ** 2 for tensor in tensors)  # the mean is zero by design
        measured[kind] = math.sqrt(square / count)
        if abs(measured[kind] / expected[kind] - 1) > 6 / math.sqrt(2 * count):
            raise InitError(
                f"initialisation: the std of {kind} is {measured[kind]:.5f}, expected {expected[kind]:.5f}; "
                "a module misses its flag or a rule of gpt2exp.model.rule_of is off"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and not (bool((module.weight == 1).all()) and not module.bias.any()):
            raise InitError(f"initialisation: {name} must start with weight 1 and bias 0")
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear) and bias is not None and init.scheme is not InitScheme.torch and bias.any():
            raise InitError(f"initialisation: {name}.bias must start at 0")
    return measured
