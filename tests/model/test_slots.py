"""Another part in a slot of the model (attention, MLP, norm, position) is counted, initialised, checked, recorded and
compared as GPT-2's own is. The examples in experiments/choices compute what transformers' own layers do.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import SMALL, losses, read, run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gpt2exp import choices, export, sample, schema, section
from gpt2exp.config import InitConfig, InitScheme, ModelConfig, RunConfig
from gpt2exp.model import huggingface, size
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.model.init_check import check_init, expected_std
from gpt2exp.section import BadRequest
from gpt2exp.sweep import composing
from gpt2exp.sweep import request as requests

EXAMPLES = Path(__file__).parents[2] / "experiments" / "choices"
TINY = ["model=nano", "model.n_layer=2", "model.n_head=2", "model.n_embd=16", "model.block_size=32"]
OF_SLOT = {
    "mlp": ["relu2", "swiglu"],
    "attention": ["qk_norm", "rotary"],
    "norm": ["rmsnorm"],
    "position": ["sinusoidal", "none"],
}
EACH = [f"model/{slot}={name}" for slot, names in OF_SLOT.items() for name in names]
MIXED = ["model/mlp=swiglu", "model/attention=rotary", "model/norm=rmsnorm", "model/position=none"]


@pytest.fixture(autouse=True)
def _nothing_stays_admitted() -> Iterator[None]:
    yield
    choices.allow()
    choices.trust(False)


def asked(*words: str, folder: Path = EXAMPLES) -> RunConfig:
    """The configuration of a command line with one job."""
    choices.allow(folder)
    return _composed(folder, words)


@functools.cache
def _composed(folder: Path, words: tuple[str, ...]) -> RunConfig:
    (job,) = requests.new_request(composing.arguments(["--config-dir", str(folder), *TINY, *words])).jobs
    return job.config


def own(folder: Path, text: str, keys: str = "", slot: str = "mlp") -> Path:
    """A user's folder whose choice `mine` of a slot is the class Mine in `text`."""
    (folder / "model" / slot).mkdir(parents=True)
    (folder / "mine.py").write_text("import torch\nfrom torch import nn\n" + text)
    (folder / "model" / slot / "mine.yaml").write_text(f"_target_: mine.Mine\n{keys}")
    return folder


def module(words: str, *more: str) -> tuple[Any, ModelConfig]:
    """The module of a slot's choice, its weights drawn."""
    model = asked(words, *more).model
    gpt = GPT(model)
    initialise(gpt, InitConfig(std=0.5), seed=1)
    block = gpt.transformer.h[0]
    slot = words.removeprefix("model/").partition("=")[0]
    return {"mlp": block.mlp, "attention": block.attn, "norm": block.ln_1, "position": gpt.transformer.wpe}[slot], model


def stream(channels: int = 16) -> Tensor:
    return torch.randn(2, 8, channels, generator=torch.Generator().manual_seed(0))


def test_exact_gelu_is_the_function_that_gpt2s_tanh_form_approximates() -> None:
    """By its definition, x times the normal distribution's share below x; the two differ by 5e-4 at most."""
    ours, _ = module("model/mlp=exact_gelu")
    x = torch.linspace(-6, 6, 2000, dtype=torch.float64)
    defined, near = x * torch.special.ndtr(x), nn.functional.gelu(x, approximate="tanh")
    assert 1e-4 < (defined - near).abs().max() < 5e-4
    inside = ours.c_fc(stream())
    torch.testing.assert_close(ours(stream()), ours.c_proj(inside * torch.special.ndtr(inside)))
    plain, _ = module("model/mlp=gpt2")
    assert not torch.equal(ours(stream()), plain(stream())), "the same weights, another function"


class TestExamples:
    def test_swiglu_is_llamas(self) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        ours, _ = module("model/mlp=swiglu", "model.mlp.hidden=24")
        theirs = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, mlp_bias=True))
        pairs = {theirs.gate_proj: ours.c_gate, theirs.up_proj: ours.c_fc, theirs.down_proj: ours.c_proj}
        for layer, of_ours in pairs.items():
            layer.load_state_dict(of_ours.state_dict())
        torch.testing.assert_close(ours(stream()), theirs(stream()))

    def test_swiglu_holds_as_much_as_gpt2s(self) -> None:
        ours, model = module("model/mlp=swiglu", "model.n_embd=48", "model.bias=false")
        assert sum(p.numel() for p in ours.parameters()) == 8 * model.n_embd**2

    def test_relu2_is_transformers(self) -> None:
        from transformers.activations import ACT2FN

        ours, _ = module("model/mlp=relu2")
        torch.testing.assert_close(ours(stream()), ours.c_proj(ACT2FN["relu2"](ours.c_fc(stream()))))

    def test_rmsnorm_is_llamas(self) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        ours, _ = module("model/norm=rmsnorm")
        theirs = LlamaRMSNorm(16, eps=1e-5)
        with torch.no_grad():
            theirs.weight.copy_(ours.weight.copy_(torch.linspace(0.5, 2, 16)))
        torch.testing.assert_close(ours(stream() * 3), theirs(stream() * 3))

    def test_rotary_turns_as_llama(self) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

        ours, _ = module("model/attention=rotary")
        theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=16, num_attention_heads=2, max_position_embeddings=32))
        q, k, v = super(type(ours), ours).heads(stream())
        cos, sin = theirs(v, torch.arange(8)[None])
        for got, want in zip(ours.heads(stream()), (*apply_rotary_pos_emb(q, k, cos, sin), v), strict=True):
            torch.testing.assert_close(got, want)
        with pytest.raises(BadRequest, match=r"^model\.n_head=16: heads are 1 wide"):
            asked("model/attention=rotary", "model.n_head=16")

    def test_scores_under_rotary_depend_on_the_distance_alone(self) -> None:
        ours, _ = module("model/attention=rotary")
        same = torch.ones(1, 1, 8, 8)
        scores = (ours.turned(same) @ ours.turned(same).mT)[0, 0]
        for distance in range(8):
            along = scores.diagonal(distance)
            torch.testing.assert_close(along, along[:1].expand_as(along))

    def test_qk_norm_is_qwens(self) -> None:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

        ours, _ = module("model/attention=qk_norm")
        q, k, v = super(type(ours), ours).heads(stream())
        norm = Qwen3RMSNorm(8, eps=1e-6)
        for got, want in zip(ours.heads(stream()), (norm(q), norm(k), v), strict=True):
            torch.testing.assert_close(got, want)

    def test_sines_are_marians(self) -> None:
        from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

        ours, _ = module("model/position=sinusoidal", "model.position.scale=1.0")
        theirs = MarianSinusoidalPositionalEmbedding(32, 16)
        theirs.weight = nn.Parameter(theirs.create_weight(), requires_grad=False)
        table = (ours(torch.zeros(1, 8, 16))[0] / math.sqrt(2)).detach()
        sines, cosines = theirs.weight[:8].chunk(2, -1)
        torch.testing.assert_close(table[:, 0::2], sines, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(table[:, 1::2], cosines, atol=1e-5, rtol=1e-5)
        assert float(ours.table.square().mean().sqrt()) == pytest.approx(1.0)

    def test_nothing_is_added(self) -> None:
        ours, _ = module("model/position=none")
        assert torch.equal(ours(stream()), stream())

    def test_each_is_short(self) -> None:
        """At most 40 lines of Python and one YAML file for each."""
        assert all(len(path.read_text().splitlines()) <= 40 for path in EXAMPLES.glob("*.py"))
        for slot, names in OF_SLOT.items():
            assert {path.stem for path in (EXAMPLES / "model" / slot).glob("*.yaml")} == set(names)


class TestCounts:
    @pytest.mark.parametrize("words", [[], ["model.bias=false"], *([one] for one in EACH), MIXED])
    def test_are_those_of_the_whole_model(self, words: list[str]) -> None:
        model = asked(*words).model
        with torch.device("meta"):
            gpt = GPT(model)
            with FlopCounterMode(display=False) as counter:
                gpt(torch.zeros(1, 8, dtype=torch.long))
        counted = size.parameters(model)
        assert counted["total"] == sum(p.numel() for p in gpt.parameters())
        assert counted["wpe"] == sum(p.numel() for p in gpt.transformer.wpe.parameters())
        assert 8 * size.flops_per_token(model, 8) == 3 * counter.get_total_flops()

    def test_a_shape_is_counted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        size.parameters(asked("model/mlp=swiglu").model)
        monkeypatch.setattr(size, "_on_meta", lambda *_: pytest.fail("counted again"))
        size.parameters(asked("model/mlp=swiglu", "seed=2").model)

    @pytest.mark.parametrize("words", [*EACH, "model.bias=false"])
    def test_what_backward_keeps_is_what_a_real_pass_keeps(self, words: str) -> None:
        def real(model: ModelConfig) -> int:
            block, held = GPT(model).transformer.h[0], list[Tensor]()
            for parameter in block.parameters():
                nn.init.normal_(parameter)

            def keep(tensor: Tensor) -> Tensor:
                held.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                block(torch.randn(1, 8, model.n_embd, requires_grad=True))
            known = {t.data_ptr() for t in (*block.parameters(), *block.buffers())}
            sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.itemsize for t in held}
            return sum(number for place, number in sizes.items() if place not in known)

        model = asked(words).model
        expected = (real(model) - real(replace(size.gpt2_slots(model), bias=model.bias))) / 8
        assert size.kept_beyond_gpt2(model, 8) == pytest.approx(expected, abs=1)
        assert (size.kept_beyond_gpt2(model, 8) == 0) == (words in ("model/mlp=relu2", "model.bias=false", *EACH[-2:]))

    def test_scores_that_a_class_keeps_are_in_the_memory(self, tmp_path: Path) -> None:
        text = """
from gpt2exp.model.gpt import CausalSelfAttention
class Mine(CausalSelfAttention):
    def forward(self, x):
        q, k, v = self.heads(x)
        y = (q @ k.mT + torch.full((x.size(1), x.size(1)), -torch.inf, device=x.device).triu(1)).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))
"""
        model = asked("model/attention=mine", folder=own(tmp_path, text, slot="attention")).model
        assert size.kept_beyond_gpt2(model, 32) >= model.n_head * 30  # of a row of 32, for every head


class TestStart:
    @pytest.mark.parametrize("words", [*EACH, "model.bias=false"])
    @pytest.mark.parametrize("scheme", ["gpt2", "xavier", "torch"])
    def test_every_parameter_has_a_rule(self, words: str, scheme: str) -> None:
        asked_for = asked(words, f"init={scheme}")
        gpt = GPT(asked_for.model)
        initialise(gpt, asked_for.init, seed=3)
        assert check_init(gpt, asked_for.init).keys() == expected_std(asked_for.model, asked_for.init).keys()
        for name, kept in gpt.named_parameters():
            assert bool(kept.isfinite().all()), name

    def test_what_writes_into_the_stream_is_scaled_down(self) -> None:
        gpt = GPT(asked("model/mlp=swiglu", "model.n_layer=8").model)
        initialise(gpt, InitConfig(), seed=3)
        mlp = gpt.transformer.h[0].mlp
        assert float(mlp.c_proj.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.1)
        assert float(mlp.c_gate.weight.detach().std()) == pytest.approx(0.02, rel=0.1)

    def test_the_check_is_of_gpt2s_own(self) -> None:
        init = InitConfig(scheme=InitScheme.gpt2)
        kinds = expected_std(asked().model, init).keys()
        assert kinds - expected_std(asked("model/mlp=swiglu").model, init).keys() == {"mlp.c_fc", "mlp.c_proj"}
        assert kinds - expected_std(asked("model/position=none").model, init).keys() == {"wpe"}

    def test_other_slots_start_alike(self) -> None:
        """Another MLP changes no draw of attention's: the runs stay paired."""
        drawn = []
        for words in ("model/mlp=gpt2", "model/mlp=swiglu"):
            gpt = GPT(asked(words).model)
            initialise(gpt, InitConfig(), seed=3)
            drawn.append({name: p for name, p in gpt.named_parameters() if ".mlp." not in name})
        assert drawn[0].keys() == drawn[1].keys()
        assert all(torch.equal(p, drawn[1][name]) for name, p in drawn[0].items())

    def test_a_parameter_says_where_it_starts(self, tmp_path: Path) -> None:
        text = """
class Mine(nn.Module):
    starts = {"gain": 0.5}
    def __init__(self, config):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(config.n_embd))
    def forward(self, x):
        return self.gain * x
"""
        gpt = GPT(asked("model/mlp=mine", folder=own(tmp_path, text)).model)
        initialise(gpt, InitConfig(), seed=3)
        assert bool((gpt.transformer.h[1].mlp.gain == 0.5).all())


LOST = "class Mine(nn.Module):\n    def __init__(self, config, width: int = 4):\n        super().__init__()\n"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        (
            LOST + "    def forward(self, x):\n        return x[:, :, :1]\n",
            [],
            r"model/mlp=mine: maps .* to \(1, 32, 1\)",
        ),
        (LOST + "    def forward(self, x):\n        return x, x\n", [], r"model/mlp=mine: maps .* to tuple"),
        (LOST + "    def forward(self, x, y):\n        return x\n", [], r"model/mlp=mine: TypeError: .*'y'"),
        (LOST + "        raise OSError('no table')\n", [], r"model/mlp=mine: OSError: no table; mend its class"),
        (
            LOST + "        self.gain = nn.Parameter(torch.ones(3))\n    def forward(self, x):\n        return x\n",
            [],
            r"transformer\.h\.0\.mlp\.gain: no rule says how this parameter starts; let its module have starts",
        ),
        (
            LOST + "        self.register_buffer('seen', torch.zeros(3))\n    forward = nn.Identity.forward\n",
            [],
            r"transformer\.h\.0\.mlp\.seen: a buffer, and a checkpoint keeps parameters alone; .*persistent=False",
        ),
        (
            LOST + "        self.drop = nn.Dropout(0.1)\n    def forward(self, x):\n        return self.drop(x)\n",
            [],
            r"transformer\.h\.0\.mlp\.drop: drops at random",
        ),
        (LOST + "    forward = nn.Identity.forward\n", ["model.mlp.width=wide"], r"model\.mlp\.width"),
        (
            LOST + "    forward = nn.Identity.forward\n",
            ["model.mlp.widht=3"],
            r"model\.mlp\.widht=3: .*model\.mlp\.width",
        ),
    ],
)
def test_a_bad_class_is_one_line(text: str, words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"^{said}") as refused:
        asked("model/mlp=mine", *words, folder=own(tmp_path, text))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.mlp=relu2", r"^model\.mlp=relu2: a choice of files; write model/mlp=relu2$"),
        ("model.mlp.name=relu2", r"^model\.mlp\.name=relu2: a choice brings keys of its own; write model/mlp=relu2$"),
        ("model/mlp=rely2", r"did you mean model/mlp=relu2\? Choices: exact_gelu, gpt2, relu2, swiglu$"),
    ],
)
def test_a_choice_is_asked_for_by_its_group(words: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        asked(words)


def test_a_record_from_before_the_slots_is_gpt2() -> None:
    before = schema.plain(RunConfig())
    for key in ("bias", *size.SLOTS):
        del before["model"][key]
    before["model"]["n_layer"] = 3
    today, unknown = schema.stored(before)
    assert (schema.parse(today), unknown) == (RunConfig(model=ModelConfig(n_layer=3)), {})
    kept = schema.plain(asked("model/mlp=swiglu", "model.mlp.hidden=20"))
    assert schema.stored(kept) == (kept, {})


@pytest.mark.parametrize("words", [*EACH, "model.bias=false"])
def test_hugging_faces_gpt2_has_none_of_it(words: str) -> None:
    key = words.partition("=")[0]
    with pytest.raises(
        BadRequest, match=f"^{words}: Hugging Face's GPT-2 has no such choice; it takes {key}=(gpt2|true)$"
    ):
        huggingface.to_hf(asked(words).model)


def test_planning_gpt2_imports_no_torch() -> None:
    code = f"""
import sys
from gpt2exp.sweep import composing, request
request.new_request(composing.arguments(["-m", *{TINY}, "seed=1,2"]))
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_sweep_ends_in_verdicts(tmp_path: Path) -> None:
    """Each arm by its name, with the keys of its choice in the record."""
    words = [
        "model/mlp=gpt2,relu2,swiglu",
        "seed=1,2",
        "data.val_fraction=0.1",
        "train.steps=2",
        "data.max_tokens=2000",
    ]
    done = run(
        tmp_path, "--config-dir", str(EXAMPLES), "-m", *SMALL, *words, "wandb.mode=disabled", "hydra.sweep.dir=s"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "s" / "comparison.json").read_text())
    arms = {(axis["key"], axis["baseline"], axis["arm"]) for axis in found["axes"]}
    assert arms == {("model/mlp", "gpt2", "relu2"), ("model/mlp", "gpt2", "swiglu")}
    assert all(axis["n_pairs"] == 2 for axis in found["axes"] if axis["metric"] == "val_loss")
    one = read(tmp_path / "s" / "004_model_mlp=swiglu,seed=1" / "summary.json")
    assert (one["config"]["model"]["mlp"]["name"], one["config"]["model"]["mlp"]["hidden"]) == ("swiglu", None)
    assert one["parameters"]["blocks"] == 2 * (4 * 16**2 + 4 * 16 + 4 * 16 + 3 * 43 * 16 + 2 * 43 + 16)


def test_a_run_goes_on_as_if_it_had_never_stopped_and_is_sampled_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, *MIXED, "model.mlp.hidden=24", "checkpoint.save_last=true", "wandb.mode=disabled"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder, steps in ((whole, 4), (part, 2)):
        done = run(tmp_path, "--config-dir", str(EXAMPLES), *words, f"train.steps={steps}", f"hydra.run.dir={folder}")
        assert done.returncode == 0, done.stderr
    again = run(tmp_path, "--config-dir", str(EXAMPLES), f"resume={part}", "train.steps=4")
    assert again.returncode == 0, again.stderr
    assert losses(part) == losses(whole)
    assert read(part / "summary.json")["config"]["model"]["mlp"]["hidden"] == 24
    monkeypatch.chdir(tmp_path)
    section.OUTSIDE.clear()  # as in a new process
    assert sample.command([str(part), "--tokens", "3"]) == 2
    assert "would run code of" in capsys.readouterr().err
    assert sample.command(["--trust", str(part), "--tokens", "3"]) == 0
    capsys.readouterr()
    assert export.command([str(part), "out"]) == 2
    assert "Hugging Face's GPT-2 has no such choice; it takes model/attention=gpt2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["train.activation_checkpointing=true", "precision=tf32"], ["train.pad_vocab=true", "precision=bf16"]],
)
def test_with_what_the_trainer_can_do(words: list[str], tmp_path: Path) -> None:
    common = [
        *SMALL,
        *MIXED,
        "model/attention=qk_norm",
        "train.steps=2",
        "wandb.mode=disabled",
        f"hydra.run.dir={tmp_path}/run",
    ]
    done = run(tmp_path, "--config-dir", str(EXAMPLES), *common, *words)
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 2
