"""Hugging Face's GPT-2: converts between our configuration and theirs, and reads their weights.

A folder, or a hub id, holds `config.json` and the weights: `model.safetensors`, or `pytorch_model.bin` (read with
`weights_only=True`: a pickle could otherwise run code), each in one file or in shards with an index. Hugging Face
stores four matrices of a block as Conv1D, (in, out), the transpose of ours. Names in OpenAI's own upload lack the
prefix `transformer.`, and names of a model that was saved inside a wrapper have the wrapper's prefix. Weights are
checked before a run writes anything.
"""

from __future__ import annotations

import contextlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp.config import InitConfig, ModelConfig, SlotConfig
from gpt2exp.files import TIMEOUT, joint, sha256
from gpt2exp.section import BadRequest, first_line, require, show

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2exp.model.gpt import GPT


CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the preferred file first; `NAME.index.json` lists its shards
WTE, HEAD = "transformer.wte.weight", "lm_head.weight"
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Names, by their ends, of the matrices that Hugging Face keeps as (in, out)."""

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|model|gpt"
    r"|base_model|state_dict)\."
)
"""Prefixes that wrappers add: DDP, torch.compile, FSDP, activation checkpoints, Fabric, Lightning, PEFT."""

MASKS = (".attn.bias", ".attn.masked_bias")  # constants that older files hold with the weights

KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "tie_weights": "tie_word_embeddings",
}
"""Our keys of `model` and Hugging Face's of `config.json`; the defaults are the same (GPT2Config's)."""

SHAPE = [key for key in KEYS if key != "tie_weights"]  # weights and model must agree in these; tied weights load untied

GPT2: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""Values of `config.json` that our architecture has, transformers' default first."""


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that build `model`; `BadRequest` if it has what they cannot say."""
    default = type(model)()
    for name in (item.name for item in fields(model) if item.name not in KEYS):
        value, usual, key = getattr(model, name), getattr(default, name), f"model.{name}"
        if isinstance(value, SlotConfig):
            ok, key, value, usual = value == usual, f"model/{name}", value.name, usual.name
        else:
            ok = value == usual
        require(ok, key, value, "Hugging Face's GPT-2 has no such choice", f"it takes {key}={show(usual)}")
    keys = {theirs: getattr(model, ours) for ours, theirs in KEYS.items()}
    return keys | {key: known[0] for key, known in GPT2.items()} | {"n_inner": None}


def from_hf(config: Mapping[str, Any], said: str = CONFIG) -> ModelConfig:
    """The model that a `config.json` describes, at a place called `said`; `BadRequest` if it is no GPT-2."""
    kind = config.get("model_type", "gpt2")
    if kind != "gpt2":
        raise BadRequest(f"{said}: its {CONFIG} says model_type={kind}; name weights of GPT-2")
    for key, known in GPT2.items():
        if (value := config.get(key, known[0])) not in known:
            why = f"{key}={show(value)} where GPT-2 has {show(known[0])}"
            raise BadRequest(f"{said}: another architecture, {why}; name weights of GPT-2")
    shape = {ours: config.get(KEYS[ours], getattr(ModelConfig(), ours)) for ours in SHAPE}
    if not all(type(value) is int and value > 0 for value in shape.values()):
        raise BadRequest(
            f"{said}: its {CONFIG} has no whole numbers for {', '.join(KEYS[key] for key in SHAPE)}; mend it"
        )
    if config.get("n_inner") not in (None, 4 * shape["n_embd"]):
        why = f"n_inner={config['n_inner']} where GPT-2 has 4 times n_embd"
        raise BadRequest(f"{said}: another architecture, {why}; name weights of GPT-2")
    try:
        return ModelConfig(**shape, tie_weights=config.get(KEYS["tie_weights"]) is not False)
    except BadRequest as error:
        raise BadRequest(f"{said}: its {CONFIG} fits no model ({error})") from error


@dataclass(frozen=True)
class Weights:
    """A folder with weights."""

    said: str  # how the request named it, for errors: `init.path=FOLDER`
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    @property
    def pickled(self) -> bool:
        """Whether the files are PyTorch's, not safetensors."""
        return self.files[0].suffix == ".bin"

    def refused(self, text: str) -> BadRequest:
        """The error that says what is wrong with it, and what to do."""
        return BadRequest(f"{self.said}: {text}")

    def damaged(self, file: Path, error: Exception) -> BadRequest:
        """The error for a file that a library could not read."""
        why = f"{file.name} is damaged or holds no weights ({first_line(error)[:120]})"
        return self.refused(f"{why}; copy or download it again")

    def complete(self) -> Weights:
        """The same with `config` read and `files` found; `BadRequest` if one is missing or cannot be read."""
        found = replace(self, config=self._json(CONFIG))
        for name in WEIGHTS:
            if (self.folder / name).is_file():
                return replace(found, files=(self.folder / name,))
            index = f"{name}.index.json"
            if (self.folder / index).is_file():
                known = self._json(index).get("weight_map")
                names = sorted({str(shard) for shard in known.values()}) if isinstance(known, dict) else []
                if not names or any(Path(shard).name != shard for shard in names):  # it lies beside its index
                    raise self.refused(f"its {index} names no shards; copy or download it again")
                files = [self.folder / shard for shard in names]
                if missing := [file.name for file in files if not file.is_file()]:
                    raise self.refused(f"{missing[0]} is missing, of {len(files)} in {index}; put it there")
                return replace(found, files=tuple(files))
        raise self.refused(f"has no {' or '.join(WEIGHTS)}; name a folder with GPT-2's weights")

    def _json(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError
        except FileNotFoundError as error:
            raise self.refused(f"has no {name}; name a folder that transformers wrote, or a hub id") from error
        except (OSError, ValueError, RecursionError) as error:
            raise self.refused(f"its {name} cannot be read; copy or download it again") from error
        return found


# --- finding ---------------------------------------------------------------------------------------------------------


def find(path: str, key: str = "init.path=") -> Weights:
    """The weights in a folder, or of a hub id, typed after `key`; `BadRequest` if there are none, or not whole."""
    found = Weights(f"{key}{path}", Path(path).expanduser())
    if found.folder.is_dir():
        return found.complete()
    if found.folder.exists():
        raise found.refused(f"a file; name the folder that it lies in, with {CONFIG} beside the weights")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise found.refused(f"no such folder; name one with {CONFIG} and {WEIGHTS[0]}, or a hub id such as gpt2")
    return _of_hub(found, path)


def _of_hub(asked: Weights, name: str) -> Weights:
    """The weights of a hub id from Hugging Face's cache, or else downloaded: the needed files, all of one commit."""
    try:
        from huggingface_hub import constants, errors, snapshot_download
    except ImportError as error:
        remedy = "name a folder, or pip install 'gpt2exp[hub]' to load it by its hub id"
        raise asked.refused(f"no such folder; {remedy}") from error

    def fetched(kind: str, *, here: bool = False) -> Weights:
        stem, suffix = kind.split(".")
        patterns = [CONFIG, kind, f"{kind}.index.json", f"{stem}-*-of-*.{suffix}"]
        folder = snapshot_download(name, allow_patterns=patterns, local_files_only=here, etag_timeout=TIMEOUT)
        return replace(asked, folder=Path(folder)).complete()

    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError, BadRequest):  # once cached, an id's weights stay
            return fetched(WEIGHTS[0], here=True)
        try:
            return fetched(WEIGHTS[0])
        except BadRequest:
            return fetched(WEIGHTS[1])
    except errors.RepositoryNotFoundError as error:  # private ones look the same
        remedy = "check the spelling, or log in with hf auth login if it is private"
        raise asked.refused(f"neither a folder nor a model on {constants.ENDPOINT}; {remedy}") from error
    except errors.HFValidationError as error:
        raise asked.refused("neither a folder nor a hub id; name one, such as gpt2") from error
    except BadRequest:
        raise
    except Exception as error:  # whatever the HTTP client of the library's version raises
        why = f"no such folder, and {constants.ENDPOINT} did not answer ({type(error).__name__})"
        raise asked.refused(f"{why}; name a folder, or try again with a network") from error


# --- checking --------------------------------------------------------------------------------------------------------


def check(found: Weights, model: ModelConfig) -> None:
    """Raise `BadRequest` unless the weights are `model`'s by `config.json` and the names and shapes in the files.

    A pickle is read whole for that. So is a file with a head if the weights are tied: the head must equal `wte`.
    """
    _check_config(found, model)
    if found.pickled:
        read(found, model)
        return
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for file in found.files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for ours, name in _renamed(found, opened.keys()).items():
                    shapes[ours] = tuple(opened.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise found.damaged(file, error) from error
    _check_shapes(found, shapes, model)
    if HEAD in shapes and model.tie_weights:
        read(found, model)


def _check_config(found: Weights, model: ModelConfig) -> None:
    to_hf(model)  # raises if `model` is another architecture, which its shapes may not show
    theirs = from_hf(found.config, found.said)
    wrong = [key for key in SHAPE if getattr(model, key) != getattr(theirs, key)]
    if wrong:
        key = wrong[0]
        why = f"{found.said} has {getattr(theirs, key)}"
        raise BadRequest(f"model.{key}={getattr(model, key)}: {why}; try {_size(theirs, model)}")


def _size(theirs: ModelConfig, model: ModelConfig) -> str:
    """What to type for their shape: a size by its name, or each key that differs."""
    from yaml import safe_load  # type: ignore[import-untyped]

    wanted = {key: getattr(theirs, key) for key in SHAPE}
    vocabulary = wanted.pop("vocab_size")
    for file in sorted((resources.files("gpt2exp.conf") / "model").iterdir(), key=lambda item: item.name):
        if file.name.endswith(".yaml"):
            size = safe_load(file.read_text(encoding="utf-8"))
            if all(size.get(key) == value for key, value in wanted.items()):
                rest = "" if vocabulary == ModelConfig().vocab_size else f" model.vocab_size={vocabulary}"
                return f"model={file.name.removesuffix('.yaml')}{rest}"
    wanted["vocab_size"] = vocabulary
    return " ".join(f"model.{key}={value}" for key, value in wanted.items() if getattr(model, key) != value)


def _check_shapes(found: Weights, shapes: Mapping[str, Sequence[int]], model: ModelConfig) -> None:
    """Compare names (ours) and shapes (Hugging Face's) with those of the model."""
    import torch

    from gpt2exp.model.gpt import GPT

    with torch.device("meta"):
        ours = dict(GPT(replace(model, tie_weights=False)).named_parameters())
    if HEAD not in shapes and from_hf(found.config, found.said).tie_weights:
        del ours[HEAD]
    expected = {name: tuple(transposed(name, tensor).shape) for name, tensor in ours.items()}
    named = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(MASKS)}
    for name in (*sorted(expected.keys() - named.keys()), *sorted(named)):
        if name not in named:
            short = name.removeprefix("transformer.")
            if wrapped := next((other for other in sorted(named) if other.endswith(f".{short}")), None):
                prefix = wrapped.removeprefix("transformer.").removesuffix(short)
                why = f"its names begin with {prefix}, which no known wrapper puts there"
                raise found.refused(f"{why}; take it off and save the weights again")
            raise found.refused(f"{name} is missing from its weights; copy or download them again")
        if name not in expected:
            raise found.refused(f"{name} is no part of GPT-2 with the shape in its {CONFIG}; name other weights")
        if named[name] != expected[name]:
            why = f"{name} is {named[name]}, where its {CONFIG} makes it {expected[name]}"
            raise found.refused(f"{why}; copy or download both again")


def _renamed(found: Weights, names: Iterable[str]) -> dict[str, str]:
    """The names in a file by our names; `BadRequest` if two are of one tensor, with a wrapper's prefix and without."""
    renamed: dict[str, str] = {}
    for name in names:
        bare = WRAPPERS.sub("", name)
        ours = bare if bare.startswith("transformer.") or bare == HEAD else f"transformer.{bare}"
        if (other := renamed.setdefault(ours, name)) != name:
            raise found.refused(f"holds both {other} and {name}; save the weights of one model")
    return renamed


# --- reading ---------------------------------------------------------------------------------------------------------


def read(found: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """The parameters of `model` by name, on the CPU, in our layout and the files' own types; `BadRequest` as `check`.

    With tied weights, the head must equal `wte` and is left out. Untied, a head that the files lack is a copy of `wte`.
    """
    tensors: dict[str, Tensor] = {}
    for file in found.files:
        held = _load(found, file)
        tensors |= {ours: held[name] for ours, name in _renamed(found, held).items()}
    _check_shapes(found, {name: tensor.shape for name, tensor in tensors.items()}, model)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(MASKS)}
    head = tensors.pop(HEAD, tensors[WTE])
    if not model.tie_weights:
        tensors[HEAD] = head
    elif not head.equal(tensors[WTE]):
        why = f"{found.said} has an lm_head.weight that is not its wte.weight"
        raise BadRequest(f"model.tie_weights=true: {why}; try model.tie_weights=false")
    return {name: transposed(name, tensor) for name, tensor in tensors.items()}


def _load(found: Weights, file: Path) -> dict[str, Tensor]:
    import torch
    from safetensors.torch import load_file

    try:
        if not found.pickled:
            return load_file(file)
        # the older of PyTorch's two formats, which OpenAI's first upload has, cannot be mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        if type(error).__name__ == "UnpicklingError" and "Unsupported" in str(error):
            why = f"{file.name} holds more than tensors, which could run code, so it is not opened"
            raise found.refused(f"{why}; name weights as safetensors") from error
        raise found.damaged(file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise found.damaged(file, ValueError("no tensors by name"))
    return tensors


def transposed(name: str, tensor: Tensor) -> Tensor:
    """A tensor of ours in Hugging Face's layout, or back: both are the same transpose."""
    return tensor.T if name.endswith(CONV1D) else tensor


def load(gpt: GPT, config: InitConfig) -> dict[str, Any]:
    """Load the weights at `init.path` into `gpt`; returns where they came from. `BadRequest` as `find` and `read`."""
    from gpt2exp.model import init

    found = find(str(config.path))
    _check_config(found, gpt.config)
    init.load_weights(gpt, read(found, gpt.config))
    return {
        "source": config.path,
        "files": [file.name for file in found.files],
        "sha256": joint([sha256(file) for file in found.files]),
    }
