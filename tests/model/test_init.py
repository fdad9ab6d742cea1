"""Initial weights have the documented distributions; changing tying, scaling or a std changes only the tensors it
names; no global random state moves; and a model whose residual scaling was lost is refused
(huggingface/transformers#47458).
"""

from __future__ import annotations

import itertools
import math
import random
from importlib.resources import files

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from gpt2exp.config import InitConfig, InitScheme, ModelConfig
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.model.init_check import InitError, check_init, expected_std

SCHEMES = [scheme.value for scheme in InitScheme if scheme is not InitScheme.pretrained]  # which draws nothing


def of_scheme(name: str, **changes: object) -> InitConfig:
    """The section that `init=NAME` ships, with changes."""
    shipped = OmegaConf.create((files("gpt2exp.conf.init") / f"{name}.yaml").read_text())
    merged = OmegaConf.merge(OmegaConf.structured(InitConfig), shipped, changes)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, InitConfig)
    return config


def built(init: InitConfig, seed: int = 1337, *, tie: bool = True, n_layer: int = 2, n_embd: int = 64) -> GPT:
    """A model of 1,009 words, initialised."""
    shape = ModelConfig(n_layer=n_layer, n_head=2, n_embd=n_embd, block_size=64, vocab_size=1009, tie_weights=tie)
    model = GPT(shape)
    initialise(model, init, seed)
    return model


def weights(model: GPT) -> dict[str, Tensor]:
    """Every parameter by name; a tied one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def differing(a: GPT, b: GPT) -> set[str]:
    """Names of parameters that only one has, or that differ in a bit."""
    ours, theirs = weights(a), weights(b)
    return {n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or not ours[n].equal(theirs[n])}


def projections(model: GPT) -> set[str]:
    """The weights that write into the residual stream."""
    return {name for name in weights(model) if name.endswith("c_proj.weight")}


@pytest.mark.parametrize("scheme", ["gpt2", "openai", "xavier"])
def test_tying_changes_nothing_but_the_head(scheme: str) -> None:
    init = of_scheme(scheme)
    assert differing(built(init), built(init, tie=False)) == {"lm_head.weight"}


def test_tying_under_torch_changes_the_embeddings_alone() -> None:
    # untied, wte is an nn.Embedding's N(0, 1); tied, it is the head's
    init = of_scheme("torch")
    assert differing(built(init), built(init, tie=False)) == {"lm_head.weight", "transformer.wte.weight"}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("n_layer", [1, 2, 5])
def test_residual_scaling_changes_the_projections_by_its_factor_alone(scheme: str, n_layer: int) -> None:
    on = built(of_scheme(scheme, residual_scaling=True), n_layer=n_layer)
    off = built(of_scheme(scheme, residual_scaling=False), n_layer=n_layer)
    changed = differing(on, off)
    assert changed == projections(on)
    assert len(changed) == 2 * n_layer
    factor = (2 * n_layer) ** -0.5
    for name in changed:
        torch.testing.assert_close(weights(on)[name], factor * weights(off)[name], rtol=5e-7, atol=0)


def test_a_std_changes_what_it_names_alone() -> None:
    base = built(InitConfig())
    wpe = "transformer.wpe.weight"
    assert differing(base, built(InitConfig(position_std=0.01))) == {wpe}
    matrices = {name for name, weight in weights(base).items() if weight.dim() == 2} - {wpe}
    assert differing(base, built(InitConfig(std=0.04))) == matrices
    assert differing(built(of_scheme("gpt2")), built(of_scheme("openai"))) == {wpe}


def test_depth_leaves_the_layers_that_both_have() -> None:
    init = InitConfig(residual_scaling=False)
    shallow, deep = weights(built(init)), weights(built(init, n_layer=5))
    assert all(weight.equal(deep[name]) for name, weight in shallow.items())


def test_seeds_differ_in_every_random_tensor_and_repeat() -> None:
    init = InitConfig()
    first = built(init, seed=0)
    assert not differing(first, built(init, seed=0))
    random_ones = {name for name, weight in weights(first).items() if weight.dim() == 2}
    for seed in (1, 1337, 2**63 - 1):
        assert differing(first, built(init, seed=seed)) == random_ones
    drawn = [weights(first)[name].flatten()[:4].tolist() for name in random_ones]
    scaled = {tuple(np.array(values) / values[0]) for values in drawn}
    assert len(scaled) == len(drawn)  # no two tensors share their draws


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_global_random_state_moves(scheme: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    built(of_scheme(scheme), tie=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.parametrize("n_layer", [1, 3, 12])
def test_residual_projections_std_with_scaling_on_and_off(n_layer: int) -> None:
    for scaling, expected in ((True, 0.02 / math.sqrt(2 * n_layer)), (False, 0.02)):
        model = built(InitConfig(residual_scaling=scaling), n_layer=n_layer)
        for name in projections(model):
            assert float(weights(model)[name].std()) == pytest.approx(expected, rel=0.05)
        assert float(weights(model)["transformer.h.0.mlp.c_fc.weight"].std()) == pytest.approx(0.02, rel=0.05)


def test_twelve_layers_give_the_papers_number() -> None:
    expected = expected_std(ModelConfig(), InitConfig())
    assert expected["attn.c_proj"] == expected["mlp.c_proj"] == pytest.approx(0.004082, abs=1e-6)


def test_stds_of_the_schemes() -> None:
    """Written out by hand for n_embd=64, two layers: 1/sqrt(64) = 0.125, 1/sqrt(256) = 0.0625, scaling 0.5."""
    third = math.sqrt(1 / 3)  # std of U(-1, 1)
    by_hand = {  # c_attn, attn.c_proj, c_fc, mlp.c_proj, wte, wpe, lm_head
        "gpt2": (0.02, 0.01, 0.02, 0.01, 0.02, 0.02, 0.02),
        "openai": (0.02, 0.01, 0.02, 0.01, 0.02, 0.01, 0.02),
        "xavier": (0.125, 0.0625, 0.125, 0.03125, 0.125, 0.02, 0.125),
        "torch": (0.125 * third, 0.125 * third, 0.125 * third, 0.0625 * third, 1.0, 1.0, 0.125 * third),
    }
    for scheme, expected in by_hand.items():
        model = built(of_scheme(scheme), tie=False)
        block, top = model.transformer.h[1], model.transformer
        modules = (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, top.wte, top.wpe)
        got = [float(module.weight.detach().std()) for module in (*modules, model.lm_head)]
        assert got == pytest.approx(expected, rel=0.05), scheme


def test_torch_scheme_is_what_pytorch_does_when_left_alone() -> None:
    left_alone: nn.Module
    for name, module in built(of_scheme("torch"), tie=False).named_modules():
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            if isinstance(module, nn.Linear):
                left_alone = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
                bound = 1 / math.sqrt(module.in_features)
                for parameter in module.parameters():  # uniform up to the documented bound, not some normal
                    assert 0.9 * bound < float(parameter.abs().max()) <= bound, name
            elif isinstance(module, nn.Embedding):
                left_alone = nn.Embedding(module.num_embeddings, module.embedding_dim)
                assert 3 < float(module.weight.abs().max()) < 6, name
            else:
                continue
            for ours, theirs in zip(module.parameters(), left_alone.parameters(), strict=True):
                tolerance = 8 / math.sqrt(2 * ours.numel())
                assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=tolerance), name


@pytest.mark.parametrize("scheme", ["gpt2", "openai", "xavier"])
def test_biases_start_at_zero_and_layernorms_at_one(scheme: str) -> None:
    for name, weight in weights(built(of_scheme(scheme))).items():
        if weight.dim() == 1:
            constant = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            assert weight.eq(constant).all(), name


def test_a_parameter_without_a_rule_raises(tiny: ModelConfig) -> None:
    model = GPT(tiny)
    model.transformer.h[0].gate = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.gate\.weight: no rule"):
        initialise(model, InitConfig(), seed=0)


@pytest.mark.parametrize(("scheme", "tie", "scaling"), [*itertools.product(SCHEMES, (True, False), (True, False))])
def test_check_passes_for_every_choice(scheme: str, tie: bool, scaling: bool) -> None:
    for seed in range(3):
        init = of_scheme(scheme, residual_scaling=scaling)
        measured = check_init(built(init, seed=seed, tie=tie), init)
        assert measured == pytest.approx(expected_std(built(init, tie=tie).config, init), rel=0.1)


@pytest.mark.parametrize("kind", ["attn", "mlp"])
def test_check_stops_a_run_whose_projections_lost_their_flag(kind: str) -> None:
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=1009))
    for block in model.transformer.h:
        getattr(block, kind).c_proj.residual = False
    initialise(model, InitConfig(), seed=0)
    with pytest.raises(InitError, match=rf"std of {kind}\.c_proj is 0\.0[12]\d+, expected 0\.01000"):
        check_init(model, InitConfig())


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("transformer.h.1.mlp.c_fc.bias", r"h\.1\.mlp\.c_fc\.bias must start at 0"),
        ("transformer.h.0.ln_2.bias", r"h\.0\.ln_2 must start with weight 1 and bias 0"),
        ("transformer.ln_f.weight", r"ln_f must start with weight 1 and bias 0"),
        ("transformer.wte.weight", "std of wte"),
        ("transformer.wpe.weight", "std of wpe"),
    ],
)
def test_check_stops_a_run_that_starts_elsewhere(name: str, what: str) -> None:
    model = built(InitConfig())
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 0.5 if model.get_parameter(name).dim() == 1 else 20.0
    with pytest.raises(InitError, match=what):
        check_init(model, InitConfig())


def test_the_tutorials_toy_grows_to_ten_and_scaled_stays_at_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for scale, low, high in ((1.0, 9.0, 11.0), (100**-0.5, 0.9, 1.1)):
        x = torch.zeros(768)
        for _ in range(100):
            x += scale * torch.randn(768, generator=generator)
        assert low < float(x.std()) < high


def test_scaling_keeps_the_real_residual_stream_from_growing_with_depth() -> None:
    """The toy in the model itself, 16 blocks deep, with a std of 0.2 so that what a block adds shows.

    Asserted: what is added to the stream grows as the square root of depth (16 blocks add about four times what one
    adds), and scaling multiplies all of it by (2·16)^-0.5, so that 32 additions make about the size of one unscaled.
    """
    idx = torch.randint(1009, (4, 32), generator=torch.Generator().manual_seed(0))
    added = {}
    for scaling in (True, False):
        gpt = built(InitConfig(std=0.2, position_std=0.2, residual_scaling=scaling), n_layer=16)
        gpt.transformer.traced = True
        gpt(idx, idx)
        assert gpt.transformer.trace is not None
        rms = [float(square.sqrt()) for square in gpt.transformer.trace.mean_squares]
        assert len(rms) == 17
        assert rms == sorted(rms)
        assert rms[0] == pytest.approx(math.hypot(0.2, 0.2), rel=0.05)  # as embedded: wte plus wpe
        added[scaling] = math.sqrt(rms[-1] ** 2 - rms[0] ** 2)
        # additions of equal size: after 16 blocks the square root of 16 times what one block added
        one = math.sqrt(rms[1] ** 2 - rms[0] ** 2)
        assert added[scaling] == pytest.approx(4 * one, rel=0.2)
    assert added[False] / added[True] == pytest.approx(math.sqrt(32), rel=0.2)
