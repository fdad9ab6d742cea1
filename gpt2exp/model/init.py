"""How the weights of GPT-2 start. `init_check` compares what was drawn with the published rules."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from gpt2exp.choices import Outside, call
from gpt2exp.config import InitConfig, InitScheme
from gpt2exp.model.gpt import GPT
from gpt2exp.section import BadRequest, show


def initialise(model: GPT, config: InitConfig, seed: int) -> None:
    """Fill every parameter of `model` in place. Weights start nowhere else.

    | tensor                      | gpt2, openai           | xavier           | torch                         |
    |-----------------------------|------------------------|------------------|-------------------------------|
    | c_attn, c_fc, lm_head, wte  | N(0, std)              | N(0, 1/sqrt(in)) | U(-1/sqrt(in), 1/sqrt(in))    |
    | c_proj (flag `residual`)    | the same, times (2·n_layer)^-0.5 if `residual_scaling`                 |||
    | wpe                         | N(0, position_std)     | likewise         | N(0, 1)                       |
    | biases                      | 0                      | 0                | U(-1/sqrt(in), 1/sqrt(in))    |
    | LayerNorm weight, bias      | 1, 0                   | 1, 0             | 1, 0                          |

    Code from outside gets each parameter as it starts under `gpt2`, and may change it in place.

    Under `torch`, an untied `wte` is N(0, 1), as any nn.Embedding. A tied one is the head's tensor and is drawn as the
    head, as in the tutorial.

    Each parameter is drawn on the CPU from a generator of its own, seeded by `seed` and its name. So a change of tying,
    scaling or device changes no other parameter, and draws can run in parallel.

    Raises:
        BadRequest: a parameter this function does not know.
    """
    draws = [
        (name, parameter, *rule_of(name, parameter, model, config)) for name, parameter in model.named_parameters()
    ]

    def fill(name: str, parameter: Tensor, kind: str, scale: float) -> None:
        generator = torch.Generator().manual_seed(_seed_of(name, seed))
        # always drawn in fp32 on the CPU, so that every device and precision starts from the same numbers
        in_place = parameter.device.type == "cpu" and parameter.dtype is torch.float32
        value = parameter.data if in_place else torch.empty(parameter.shape, dtype=torch.float32)
        if kind == "normal":
            value.normal_(0.0, scale, generator=generator)
        elif kind == "uniform":
            value.uniform_(-scale, scale, generator=generator)
        else:
            value.fill_(scale)
        if not in_place:
            parameter.data.copy_(value)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda draw: fill(*draw), draws))
    if isinstance(config, Outside):
        _by_code(model, config, seed)


def _by_code(model: GPT, config: InitConfig, seed: int) -> None:
    """Let code from outside change parameters that GPT-2's rule has filled: a copy in fp32 on the CPU, one at a time.

    PyTorch's random generator starts anew for each, by `seed` and the parameter's name.
    """
    for name, parameter in model.named_parameters():
        value = parameter.detach().to("cpu", torch.float32, copy=True)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(_seed_of(name, seed))
            call(config, name, value)
        if not bool(value.isfinite().all()):
            raise ValueError(f"it left {name} with values that are not finite")
        parameter.data.copy_(value)


def rule_of(name: str, parameter: Tensor, model: GPT, config: InitConfig) -> tuple[str, float]:
    """How one parameter starts: ("normal", std), ("uniform", bound) or ("constant", value)."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    of_torch = config.scheme is InitScheme.torch
    if leaf in (own := getattr(module, "starts", {})):
        return "constant", own[leaf]
    if leaf not in ("weight", "bias") or not isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm):
        remedy = f"let its module have starts = {{'{leaf}': VALUE}}, or make it of nn.Linear, nn.Embedding or a norm"
        raise BadRequest(f"{name}: no rule says how this parameter starts; {remedy}")
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return "constant", 1.0 if leaf == "weight" else 0.0
    if isinstance(module, nn.Embedding):
        if owner.startswith("transformer.wpe"):
            return "normal", 1.0 if config.position_std is None else config.position_std
        if of_torch and not model.config.tie_weights:
            return "normal", 1.0
    fan_in = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
    if leaf == "bias":
        return ("uniform", 1 / math.sqrt(fan_in)) if of_torch else ("constant", 0.0)
    scale = 1 / math.sqrt(fan_in) if config.std is None else config.std
    if config.residual_scaling and getattr(module, "residual", False):
        scale *= (2 * model.config.n_layer) ** -0.5  # two additions to the stream per layer
    return "uniform" if of_torch else "normal", scale


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the model by name; `BadRequest` if a name or shape is not the model's."""
    parameters = dict(model.named_parameters())
    if (untied := "lm_head.weight" in parameters) != ("lm_head.weight" in weights):
        why = f"the weights saved are {'tied' if untied else 'not tied'}; try model.tie_weights={show(untied)}"
        raise BadRequest(f"model.tie_weights={show(not untied)}: {why}")
    for name in dict.fromkeys([*parameters, *weights]):
        ours, theirs = (tuple(held[name].shape) if name in held else "absent" for held in (parameters, weights))
        if ours != theirs:
            raise BadRequest(
                f"model: {name} is {theirs} in the checkpoint, {ours} in the model; give the model.* keys the run had"
            )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
