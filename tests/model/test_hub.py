"""Hugging Face weights: what transformers saved loads here with equal logits and loss, in each file format; what was
trained here is exported as the same model; wrong or damaged weights are refused in one line; no pickle runs code.
"""

from __future__ import annotations

import dataclasses
import enum
import http.server
import json
import pickle
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers  # each class is imported when it is first named
from safetensors.torch import load_file, save_file
from support import SMALL, read, run, run_folders, the_run
from torch import Tensor

from gpt2exp import export, sample, schema
from gpt2exp.config import DataConfig, InitConfig, InitScheme, ModelConfig, RunConfig
from gpt2exp.data import tokens
from gpt2exp.files import sha256
from gpt2exp.model import huggingface, init, size
from gpt2exp.model.gpt import GPT
from gpt2exp.run import checkpoint, record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch
from gpt2exp.training import setup

QUIET = [*SMALL, "wandb.mode=disabled", "train.steps=2"]
SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=64, tie_weights=True)


def theirs(*, tie: bool = True, **other: object) -> transformers.GPT2LMHeadModel:
    """The smallest model as transformers has it, its weights large enough that attention is far from uniform."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 64, "initializer_range": 0.3, **other}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, tie_word_embeddings=tie)).eval()
    with torch.no_grad():  # no bias at 0, no LayerNorm at 1: each has to be in its place
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Folders that transformers wrote, tied and not."""
    folder = tmp_path_factory.mktemp("saved")
    for tie in (True, False):
        theirs(tie=tie).save_pretrained(folder / str(tie))
    return {tie: folder / str(tie) for tie in (True, False)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, where a run leaves its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def ours(folder: Path, *, tie: bool = True, shape: ModelConfig = SHAPE) -> GPT:
    """Our model with the weights in a folder, loaded as a run does."""
    asked = RunConfig(
        model=dataclasses.replace(shape, tie_weights=tie),
        init=InitConfig(
            scheme=InitScheme.pretrained, path=str(folder), std=None, position_std=None, residual_scaling=False
        ),
    )
    setup.check_weights(asked.init, asked.model)
    gpt = GPT(asked.model)
    setup.start(gpt, asked)
    return gpt


def ids(rows: int = 2, length: int = 48) -> Tensor:
    """Tokens of the whole vocabulary."""
    return torch.randint(50257, (rows, length), generator=torch.Generator().manual_seed(0))


def assert_same(gpt: GPT, hf: transformers.GPT2LMHeadModel) -> None:
    """Logits to 1e-5."""
    with torch.no_grad():
        torch.testing.assert_close(gpt(ids()), hf(ids()).logits, atol=1e-5, rtol=1e-5)


# --- one table -------------------------------------------------------------------------------------------------------


class Activation(enum.StrEnum):
    """A choice that a later version might offer."""

    gelu = "gelu"
    relu2 = "relu2"


@dataclasses.dataclass(kw_only=True, slots=True)
class Wider(ModelConfig):
    """A model with a key that the table of Hugging Face's names does not have."""

    activation: Activation = Activation.gelu


def test_the_table_is_the_same_both_ways() -> None:
    odd = ModelConfig(n_layer=3, n_head=2, n_embd=10, block_size=7, vocab_size=50300, tie_weights=False)
    for model in (ModelConfig(), odd):
        assert huggingface.from_hf(huggingface.to_hf(model)) == model
        made = transformers.GPT2Config(**huggingface.to_hf(model)).to_dict()
        assert huggingface.from_hf(made) == model
    assert huggingface.from_hf({}) == ModelConfig() == huggingface.from_hf(transformers.GPT2Config().to_dict())
    known = {item.name for item in dataclasses.fields(ModelConfig)}
    assert known - huggingface.KEYS.keys() == {"bias", *size.SLOTS}  # refused: test_slots.py


def test_what_the_table_does_not_know_is_neither_exported_nor_loaded(saved: dict[bool, Path]) -> None:
    shape = {item.name: getattr(SHAPE, item.name) for item in dataclasses.fields(SHAPE)}
    usual, other = Wider(**shape), Wider(**shape, activation=Activation.relu2)
    assert export.architecture(usual) == export.architecture(SHAPE)
    huggingface.check(huggingface.find(str(saved[True])), usual)
    said = r"^model\.activation=relu2: Hugging Face's GPT-2 has no such choice; it takes model\.activation=gelu"
    with pytest.raises(BadRequest, match=said):
        export.architecture(other)
    with pytest.raises(BadRequest, match=said):
        huggingface.check(huggingface.find(str(saved[True])), other)


def test_a_checkpoint_of_another_versions_model_is_not_guessed_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a run is not exported, sampled from or resumed; a key that only moved is no obstacle."""
    place = trained()
    (folder,) = record.saved(place).values()
    state = checkpoint.read(folder).state
    state["config"]["model"]["activation"] = "relu2"
    written = checkpoint.Checkpoint(folder, state)
    checkpoint.write(place, written.weights(), written.training(), state)
    capsys.readouterr()
    for command, words in ((export.command, [str(place), "out"]), (sample.command, [str(place)])):
        assert command(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert f"{place}: its model has model.activation=relu2, which this version does not know" in err
        assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert launch.command([f"resume={place}", "train.steps=3"]) == 1
    assert "which this version does not know" in read(place / "summary.json")["error"]
    monkeypatch.setitem(schema.MOVED, "model.activation", "wandb.name")
    assert checkpoint.of_run(place)[0] == dataclasses.replace(SHAPE, tie_weights=True)


def test_a_checkpoint_goes_on_as_the_model_it_is(tmp_path: Path) -> None:
    """The number of heads changes no shape: the weights would fit a wrong model."""
    place = trained()
    path = place / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("n_head: 2", "n_head: 4"))
    assert launch.command([f"resume={place}", "train.steps=3"]) == 1
    assert "a checkpoint of another model" in read(place / "summary.json")["error"]


# --- in --------------------------------------------------------------------------------------------------------------


def as_saved(source: Path, folder: Path, form: str) -> Path:
    """The weights of a folder in another of the forms they come in."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if form == "one file":
        return folder
    (folder / "model.safetensors").unlink()
    kind = "pytorch_model.bin" if "bin" in form else "model.safetensors"
    if "bare" in form:  # OpenAI's own upload: no prefix, and the causal masks beside the weights
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(2)}
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if "wrapped" in form:  # as DDP, compile, FSDP and activation checkpoints name them, one around the other
        tensors = {name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."): held for name, held in tensors.items()}
        tensors = {name.replace(".h.1.", ".h.1._fsdp_wrapped_module."): held for name, held in tensors.items()}
        around = form.partition("wrapped ")[2]
        tensors = {f"{around}{name}": tensor for name, tensor in tensors.items()}
    if "with head" in form:
        tensors.setdefault("lm_head.weight", tensors["transformer.wte.weight"])

    def write(part: dict[str, Tensor], name: str) -> None:
        if kind.endswith(".bin"):
            torch.save(part, folder / name, _use_new_zipfile_serialization="old" not in form)
        else:
            save_file({name: tensor.clone() for name, tensor in part.items()}, folder / name, metadata={"format": "pt"})

    if "shards" not in form:
        write(tensors, kind)
        return folder
    stem, _, suffix = kind.partition(".")
    names = sorted(tensors)
    parts = {f"{stem}-{n + 1:05d}-of-00003.{suffix}": names[n::3] for n in range(3)}
    for file, held in parts.items():
        write({name: tensors[name] for name in held}, file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMS = ["one file", "shards", "bin", "bin old", "bin shards", "bare", "bin bare old", "with head", "bin with head"]
FORMS += [
    "wrapped module._orig_mod.",
    "bare wrapped module.",
    "bin wrapped _orig_mod.module.",
    "wrapped model.",
    "wrapped ",
]


@pytest.mark.parametrize(
    ("form", "tie"),
    [*((form, True) for form in FORMS), *((form, False) for form in ("shards", "bin bare old", "wrapped module."))],
)
def test_logits_equal_transformers_in_every_form(form: str, tie: bool, saved: dict[bool, Path], tmp_path: Path) -> None:
    folder = as_saved(saved[tie], tmp_path / "weights", form)
    gpt = ours(folder, tie=tie)
    assert_same(gpt, theirs(tie=tie))
    assert (gpt.lm_head.weight.data_ptr() == gpt.transformer.wte.weight.data_ptr()) == tie


def test_tied_weights_come_untied_into_two_equal_ones(saved: dict[bool, Path]) -> None:
    gpt = ours(saved[True], tie=False)
    head, wte = gpt.lm_head.weight, gpt.transformer.wte.weight
    assert head.data_ptr() != wte.data_ptr()
    assert head.equal(wte)
    assert_same(gpt, theirs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    model = theirs().to(dtype)
    model.save_pretrained(tmp_path / "half")
    assert_same(ours(tmp_path / "half"), model.float())


@pytest.mark.parametrize("size", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_names_and_shapes_of_the_four_sizes(size: str) -> None:
    """A file's names and shapes are compared with transformers'; for a wrong size the error names the right one."""
    from gpt2exp.sweep import request
    from gpt2exp.sweep.composing import arguments

    (job,) = request.new_request(arguments([f"model={size}"])).jobs
    model = job.config.model
    known = transformers.GPT2Config(n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd)
    with torch.device("meta"):
        state = transformers.GPT2LMHeadModel(known).state_dict()
    found = huggingface.Weights("x", Path(), known.to_dict(), ())
    huggingface._check_shapes(found, {name: tensor.shape for name, tensor in state.items()}, model)
    huggingface._check_config(found, model)
    with pytest.raises(BadRequest, match=rf"^model\.n_layer=2: x has {model.n_layer}; try model={size}$"):
        huggingface._check_config(found, SHAPE)


def test_lm_head_torn_from_wte_is_noticed(saved: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model itself is checked: a loader that gave a tied head a separate tensor would be caught."""

    def careless(gpt: GPT, weights: dict[str, Tensor]) -> None:
        gpt.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, strict=True)
        gpt.lm_head.weight = torch.nn.Parameter(gpt.lm_head.weight.detach().clone())

    monkeypatch.setattr(init, "load_weights", careless)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight and wte\.weight must be one tensor"):
        ours(saved[True])


@pytest.mark.parametrize("tie", [True, False])
def test_the_first_loss_is_the_one_transformers_computes(
    tie: bool, saved: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the run's own first batch; also what is recorded and printed of head and embedding."""
    words = ["init=pretrained", f"init.path={saved[tie]}", f"model.tie_weights={str(tie).lower()}"]
    assert launch.command([*QUIET, *words]) == 0
    out = capsys.readouterr().out
    summary = read(the_run(tmp_path) / "summary.json")
    text = torch.from_numpy(tokens.prepare(DataConfig()).map()[: 2 * 8 + 1].astype("int64"))
    x, y = text[:-1].view(2, 8), text[1:].view(2, 8)  # the batch of SMALL
    with torch.no_grad():
        logits = theirs(tie=tie)(x).logits
    expected = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()))
    assert summary["loss_first"] == pytest.approx(expected, abs=1e-5)
    origin = summary["init"]
    assert origin["source"] == str(saved[tie])
    assert origin["sha256"] == sha256(saved[tie] / "model.safetensors")
    assert origin["tying"] == {"same_pointer": tie, "all_equal": tie}
    how = "one tensor (same data pointer), all elements equal" if tie else "two tensors, their elements differ"
    assert f"lm_head.weight and wte.weight: {how}" in out
    assert f"init pretrained from {saved[tie]}" in out


def test_a_run_goes_on_without_the_folder_it_began_with(saved: dict[bool, Path], tmp_path: Path) -> None:
    """A relative `init.path` is found from where the run was started; a checkpoint then has the weights."""
    shutil.copytree(saved[True], tmp_path / "mine")
    words = ["init=pretrained", "init.path=mine", "checkpoint.save_last=true"]
    assert launch.command([*QUIET, *words]) == 0
    folder = the_run(tmp_path)
    (tmp_path / "mine").rename(tmp_path / "gone")
    assert launch.command([f"resume={folder}", "train.steps=4"]) == 0
    summary = read(folder / "summary.json")
    assert (summary["state"], summary["steps"]) == ("done", 4)
    assert summary["init"]["source"] == "mine"
    assert launch.command([*QUIET, *words]) == 2


def test_from_scratch_against_pretrained_in_one_line(saved: dict[bool, Path], tmp_path: Path) -> None:
    """By a relative folder; `init.path` is no axis."""
    shutil.copytree(saved[True], tmp_path / "mine")
    assert launch.command([*QUIET, "-m", "init=gpt2,pretrained", "init.path=mine"]) == 0
    (found,) = tmp_path.rglob("comparison.json")
    assert read(found)["swept"] == {"init": ["gpt2", "pretrained"]}
    sources = [read(folder / "summary.json")["init"]["source"] for folder in run_folders(tmp_path)]
    assert sources == [None, "mine"]


# --- refused ---------------------------------------------------------------------------------------------------------


class Evil:
    """Leaves a trace if its pickle is opened."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        """Run code."""
        return (exec, ("open('ran', 'w')",))


def spoilt(folder: Path, how: str) -> None:
    """Damage done to a folder of weights."""
    weights, about = folder / "model.safetensors", folder / "config.json"
    known = json.loads(about.read_text())
    tensors = load_file(weights)
    if how == "half":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif how in ("half bin", "evil", "nested"):
        weights.unlink()
        torch.save({"model": tensors} if how == "nested" else tensors, folder / "pytorch_model.bin")
        whole = (folder / "pytorch_model.bin").read_bytes()
        if how == "half bin":
            (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
        elif how == "evil":
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"wte.weight": Evil()}, protocol=2))
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        about.unlink()
    elif how == "config no JSON":
        about.write_text("{")
    elif how == "a shard short":
        as_saved(folder, folder / "in", "shards")
        weights.unlink()
        for file in (folder / "in").iterdir():
            shutil.move(file, folder / file.name)
        (folder / "model-00002-of-00003.safetensors").unlink()
    elif how == "a shard elsewhere":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    elif how == "other head":
        save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"] + 1}, weights)
    elif how == "a tensor less":
        del tensors["transformer.h.1.mlp.c_fc.bias"]
        save_file(tensors, weights)
    elif how == "a wrapper unknown":
        save_file({f"net.{name}": tensor for name, tensor in tensors.items()}, weights)
    elif how == "twice":
        save_file(tensors | {f"module.{name}": tensor.clone() for name, tensor in tensors.items()}, weights)
    elif how == "a tensor more":
        save_file(tensors | {"score.weight": torch.ones(2)}, weights)
    elif how == "transposed":
        name = "transformer.h.0.attn.c_attn.weight"
        save_file(tensors | {name: tensors[name].T.contiguous()}, weights)
    else:
        about.write_text(json.dumps(known | json.loads(how)))


BAD = [
    ("half", "init.path=bad: model.safetensors is damaged", "copy or download it again"),
    ("half bin", "init.path=bad: pytorch_model.bin is damaged", "copy or download it again"),
    ("nested", "init.path=bad: pytorch_model.bin is damaged or holds no weights (no tensors", "copy or download"),
    ("evil", "init.path=bad: pytorch_model.bin holds more than tensors, which could run code", "as safetensors"),
    (
        "no weights",
        "init.path=bad: has no model.safetensors or pytorch_model.bin",
        "name a folder with GPT-2's weights",
    ),
    ("no config", "init.path=bad: has no config.json", "name a folder that transformers wrote"),
    ("config no JSON", "init.path=bad: its config.json cannot be read", "copy or download it again"),
    ("a shard short", "init.path=bad: model-00002-of-00003.safetensors is missing, of 3", "put it there"),
    ("a shard elsewhere", "init.path=bad: its model.safetensors.index.json names no shards", "download it again"),
    ("other head", "model.tie_weights=true: init.path=bad has an lm_head.weight", "try model.tie_weights=false"),
    ("a tensor less", "init.path=bad: transformer.h.1.mlp.c_fc.bias is missing", "copy or download"),
    (
        "a wrapper unknown",
        "init.path=bad: its names begin with net.transformer., which no known wrapper",
        "take it off",
    ),
    ("twice", "init.path=bad: holds both module.transformer.h.0.attn.c_attn.bias and transformer.h.0", "of one model"),
    ("a tensor more", "init.path=bad: transformer.score.weight is no part of GPT-2", "name other weights"),
    ("transposed", "init.path=bad: transformer.h.0.attn.c_attn.weight is (48, 16)", "copy or download both again"),
    ('{"model_type": "llama"}', "init.path=bad: its config.json says model_type=llama", "name weights of GPT-2"),
    ('{"activation_function": "relu"}', "init.path=bad: another architecture, activation_function=relu", "GPT-2"),
    ('{"layer_norm_epsilon": 1e-6}', "init.path=bad: another architecture, layer_norm_epsilon=1e-06", "GPT-2"),
    ('{"scale_attn_by_inverse_layer_idx": true}', "init.path=bad: another architecture, scale_attn_by", "GPT-2"),
    ('{"n_inner": 32}', "init.path=bad: another architecture, n_inner=32 where GPT-2 has 4 times n_embd", "GPT-2"),
    ('{"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}', "model.n_layer=2: ", "try model=gpt2"),
    ('{"n_head": 4}', "model.n_head=2: init.path=bad has 4", "try model.n_head=4"),
    ('{"vocab_size": 50304}', "model.vocab_size=50257: init.path=bad has 50304", "try model.vocab_size=50304"),
    ('{"n_embd": "wide"}', "init.path=bad: its config.json has no whole numbers", "mend it"),
]


@pytest.mark.parametrize(("how", "start", "remedy"), BAD, ids=[row[0][:40] for row in BAD])
def test_refused_before_anything_is_written(
    how: str, start: str, remedy: str, saved: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(saved[True], tmp_path / "bad")
    spoilt(tmp_path / "bad", how)
    before = sorted(tmp_path.rglob("*"))
    assert launch.command([*QUIET, "init=pretrained", "init.path=bad"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(f"gpt2exp: {start}")
    assert remedy in line.removeprefix(f"gpt2exp: {start}")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_head_of_its_own_trains_untied(saved: dict[bool, Path], tmp_path: Path) -> None:
    """The remedy in the error about a differing head works."""
    shutil.copytree(saved[True], tmp_path / "bad")
    spoilt(tmp_path / "bad", "other head")
    assert launch.command([*QUIET, "init=pretrained", "init.path=bad", "model.tie_weights=false"]) == 0


# --- by hub id -------------------------------------------------------------------------------------------------------


class Hub(http.server.SimpleHTTPRequestHandler):
    """The part of huggingface.co that serves one model, `someone/tiny`, from a folder."""

    folder: Path
    asked: list[str]
    commit = "a" * 40

    def do_HEAD(self) -> None:
        """Answer with a file's headers."""
        self.answer(body=False)

    def do_GET(self) -> None:
        """Answer with a file, or with the list of the model's files."""
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        """By path."""
        self.asked.append(self.path)
        name = re.fullmatch(r"/someone/tiny/resolve/\w+/([\w.-]+)", self.path)
        file = self.folder / name[1] if name else None
        if self.path.startswith("/api/models/someone/tiny/tree/"):
            facts = {"type": "file", "oid": "0" * 40}
            data = json.dumps(
                [{**facts, "path": path.name, "size": path.stat().st_size} for path in self.folder.iterdir()]
            ).encode()
        elif self.path.startswith("/api/models/someone/tiny"):
            files = [{"rfilename": path.name} for path in self.folder.iterdir()]
            data = json.dumps({"id": "someone/tiny", "sha": self.commit, "siblings": files}).encode()
        elif file is not None and file.is_file():
            data = file.read_bytes()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if name else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{len(data)}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def served(saved: dict[bool, Path], tmp_path: Path) -> Iterator[http.server.ThreadingHTTPServer]:
    """The address of a server with the model and with files that are not needed."""
    Hub.folder, Hub.asked = as_saved(saved[True], tmp_path / "remote", "shards"), []
    (Hub.folder / "pytorch_model.bin").write_bytes(b"large")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.server_close()


def test_a_hub_id(served: http.server.ThreadingHTTPServer, tmp_path: Path) -> None:
    """Only the needed files are fetched, once; then the cache is enough, without a server."""
    address = f"http://127.0.0.1:{served.server_address[1]}"
    around = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    words = [*QUIET, "init=pretrained", "init.path=someone/tiny"]
    first = run(tmp_path / "a", *words, **around)
    assert first.returncode == 0, first.stderr
    assert not any("pytorch_model" in path for path in Hub.asked)
    assert sum(path.endswith(".safetensors") for path in Hub.asked) <= 6, "a HEAD and a GET for each of three shards"
    unknown = run(tmp_path / "b", *QUIET, "init=pretrained", "init.path=someone/else", **around)
    assert unknown.returncode == 2
    assert unknown.stderr.startswith(f"gpt2exp: init.path=someone/else: neither a folder nor a model on {address}")
    served.shutdown()
    served.server_close()
    again = run(tmp_path / "c", *words, **around)
    assert (again.returncode, again.stderr) == (0, "")
    assert (
        read(the_run(tmp_path / "c") / "summary.json")["loss_last"]
        == (read(the_run(tmp_path / "a") / "summary.json")["loss_last"])
    )
    nobody = run(tmp_path / "d", *QUIET, "init=pretrained", "init.path=someone/other", **around)
    assert (nobody.returncode, len(nobody.stderr.splitlines())) == (2, 1)
    assert f"no such folder, and {address} did not answer" in nobody.stderr
    assert not run_folders(tmp_path / "d")


def test_a_hub_id_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert launch.command([*QUIET, "init=pretrained", "init.path=gpt2"]) == 2
    assert "no such folder; name a folder, or pip install 'gpt2exp[hub]'" in capsys.readouterr().err


# --- out -------------------------------------------------------------------------------------------------------------


def trained(*words: str) -> Path:
    """A run with a checkpoint, in a folder of its own."""
    place = Path(f"run{len(list(Path.cwd().iterdir()))}").absolute()
    assert launch.command([*QUIET, "init.std=0.2", "checkpoint.save_last=true", f"hydra.run.dir={place}", *words]) == 0
    return place


@pytest.mark.parametrize(
    "words",
    [(), ("model.tie_weights=false",), ("model.vocab_size=50304",), ("train.pad_vocab=true",), ("precision=fp64",)],
    ids=["tied", "untied", "padded vocabulary", "padded head", "fp64"],
)
def test_an_exported_run_is_the_same_model_there(words: tuple[str, ...], tmp_path: Path) -> None:
    place, out = trained(*words), tmp_path / "out"
    assert export.command([str(place), str(out)]) == 0
    hf, loading = transformers.GPT2LMHeadModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    tied = "model.tie_weights=false" not in words
    assert (hf.lm_head.weight.data_ptr() == hf.transformer.wte.weight.data_ptr()) == tied
    assert ("lm_head.weight" in load_file(out / "model.safetensors")) == (not tied)
    held = load_file(out / "model.safetensors").values()
    assert {tensor.dtype for tensor in held} == {hf.dtype} == {torch.float32}
    assert read(out / "config.json")["tie_word_embeddings"] == tied
    shape, saved = checkpoint.of_run(place)
    gpt = GPT(shape)
    init.load_weights(gpt, saved.weights())
    with torch.no_grad():
        got = hf.eval()(ids()).logits
        assert got.shape[-1] == 50257
        torch.testing.assert_close(got, gpt(ids())[..., :50257], atol=1e-5, rtol=1e-5)
    assert_same(ours(out, tie=tied), hf)  # and back in


def test_the_pipeline_writes_text_and_the_tokenizer_is_gpt2s(tmp_path: Path) -> None:
    """Offline."""
    shutil.copy(__file__, tmp_path / "mine.txt")
    place, out = trained("train.steps=5", "data=text", f"data.path={tmp_path / 'mine.txt'}"), tmp_path / "out"
    assert export.command([str(place), str(out)]) == 0
    (found,) = transformers.pipeline("text-generation", model=str(out))("First", max_new_tokens=8, do_sample=False)
    assert re.fullmatch(r"First.+", found["generated_text"], re.DOTALL)
    words = "Hello world, naïve 日本語 🦜<|endoftext|>  two  spaces\n"
    expected = tokens.gpt2_encoding().encode(words, allowed_special="all")
    assert transformers.AutoTokenizer.from_pretrained(out)(words).input_ids == expected
    card = (out / "README.md").read_text()
    summary = read(place / "summary.json")
    assert "5 steps, seed 1337, precision fp32" in card
    assert summary["data"]["sha256"] in card
    assert f"mean loss of the last ten steps {summary['loss_mean_last10']:.4f}" in card
    assert str(tmp_path) not in card, "no place on this machine"


def test_export_refused(tmp_path: Path, saved: dict[bool, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One line, code 2, and the folder is not changed."""
    place = trained("data=text", f"data.path={Path(__file__)}", "model.vocab_size=50256")
    assert launch.command([*QUIET, "hydra.run.dir=sweep/000"]) == 0
    Path("sweep/sweep.json").write_text('{"jobs": [["seed=1"]]}')
    capsys.readouterr()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    rows = [
        (["nowhere", "out"], "nowhere: no such folder", "runs/DAY/TIME-ID"),
        (["sweep", "out"], "sweep: a sweep; name one, such as sweep/00", ""),
        (["sweep/000", "out"], "sweep/000: this run saved no checkpoint", "checkpoint.save_last=true"),
        ([f"{place}/checkpoints", "out"], f"{place}/checkpoints: holds checkpoints of a run", f"name the run: {place}"),
        ([f"{place}/checkpoints/step_000002", "out"], f"{place}/checkpoints/step", f"name the run: {place}"),
        ([str(saved[True]), "out"], f"{saved[True]}: not a run's folder", "runs/DAY/TIME-ID"),
        ([str(place), "out"], f"{place}: model.vocab_size=50256 is less than the 50257", "model.vocab_size=50257"),
        ([str(place), "full"], "full: already holds files", "name a new folder"),
        ([str(place), "full/mine.txt"], "full/mine.txt: a file", "name a new folder"),
        ([str(place)], "the following arguments are required: OUT_DIR", "gpt2exp-export --help"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for words, start, remedy in rows:
        assert export.command(words) == 2
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert out == ""
        assert line.startswith(f"gpt2exp-export: {start}"), line
        assert remedy in line
        assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before it is exported, with a warning; if none is whole, nothing is exported."""
    place = trained("train.steps=4", "checkpoint.every=2")
    newest, older = place / "checkpoints/step_000004", place / "checkpoints/step_000002"
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert export.command([str(place), "out"]) == 0
    out, err = capsys.readouterr()
    assert "the weights after step 2" in out
    assert "step_000004 is damaged" in err
    shutil.rmtree(older)
    assert export.command([str(place), "other"]) == 2
    assert "every checkpoint of it is damaged" in capsys.readouterr().err
    assert not Path("other").exists()


def test_without_room_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that fails on the way, as on a full disk."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    place = trained()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "copyfile", full)
    assert export.command([str(place), "out"]) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_cannot_be_written_is_a_bad_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = trained()
    (tmp_path / "file").touch()
    assert export.command([str(place), "file/out"]) == 2
    assert capsys.readouterr().err.startswith("gpt2exp-export: file/out: cannot be written (")
