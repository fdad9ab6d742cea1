"""The check of the initial weights: their std against the published rules, and whether head and wte are one tensor."""

from __future__ import annotations

import math

from torch import Tensor, nn

from gpt2exp.config import InitConfig, InitScheme, ModelConfig
from gpt2exp.model.gpt import GPT
from gpt2exp.model.size import gpt2_slots


class InitError(RuntimeError):
    """The initial weights are not what the configuration says."""


def norm(tensor: Tensor) -> float:
    """Euclidean norm, a row at a time: one fp32 sum over the 38 million squares of `wte` is off by 0.2 %."""
    return math.sqrt(float(tensor.norm(dim=-1).square().sum()))


def expected_std(model: ModelConfig, init: InitConfig) -> dict[str, float]:
    """The standard deviation each kind of GPT-2's weights should start with, from the published rules alone.

    A slot with another module than GPT-2's is left out, since no rule is published for it. This function shares no code
    with `rule_of`, which goes by flags on modules, so that each can catch a fault of the other: Hugging Face's GPT-2
    skipped residual scaling for years without a word (huggingface/transformers#47458).
    """
    c = model.n_embd
    residual = (2 * model.n_layer) ** -0.5 if init.residual_scaling else 1.0
    uniform = math.sqrt(1 / 3) if init.scheme is InitScheme.torch else 1.0  # std of U(-1, 1)

    def matrix(fan_in: int) -> float:
        return uniform / math.sqrt(fan_in) if init.std is None else init.std

    wte = 1.0 if init.scheme is InitScheme.torch and not model.tie_weights else matrix(c)
    expected = {
        "wte": wte,
        "wpe": 1.0 if init.position_std is None else init.position_std,
        "attn.c_attn": matrix(c),
        "attn.c_proj": residual * matrix(c),
        "mlp.c_fc": matrix(c),
        "mlp.c_proj": residual * matrix(4 * c),
        "lm_head": matrix(c),
    }
    usual, slots = gpt2_slots(model), {"wpe": "position", "attn": "attention", "mlp": "mlp"}
    filled = {part for part, slot in slots.items() if getattr(model, slot) != getattr(usual, slot)}
    return {kind: std for kind, std in expected.items() if kind.partition(".")[0] not in filled}


def check_tying(model: GPT) -> dict[str, bool]:
    """Whether `lm_head.weight` and `wte.weight` are one tensor, and equal; `InitError` if not as configured."""
    head, wte = model.lm_head.weight, model.transformer.wte.weight
    one = head.data_ptr() == wte.data_ptr()
    if one != model.config.tie_weights:
        must = "be one tensor" if model.config.tie_weights else "be two tensors"
        raise InitError(
            f"initialisation: lm_head.weight and wte.weight must {must}; a weight was put in another's place"
        )
    return {"same_pointer": one, "all_equal": head.equal(wte)}


def check_init(model: GPT, init: InitConfig) -> dict[str, float]:
    """Measured std of each kind of weight; `InitError` if it is off, or a bias or norm does not start at its constant.

    The tolerance is six standard errors of a sample's std, 1/sqrt(2n) relative for n draws.
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
                "a module misses its flag or a rule of model.init.rule_of is off"
            )
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        biased = isinstance(bias, Tensor) and bool(bias.any())
        if isinstance(module, nn.LayerNorm) and (biased or not bool((module.weight == 1).all())):
            raise InitError(f"initialisation: {name} must start with weight 1 and bias 0")
        if isinstance(module, nn.Linear) and init.scheme is not InitScheme.torch and biased:
            raise InitError(f"initialisation: {name}.bias must start at 0")
    return measured
