"""Hugging Face's GPT-2 weights: where they lie, whether they are this model, and the way in.

A folder, or a hub id, holds `config.json` and the weights: `model.safetensors`, or `pytorch_model.bin` (read with
`weights_only=True`: a pickle could otherwise run code), either one also in shards with an index. Hugging Face keeps
four matrices of a block as Conv1D, (in, out), which is the transpose of ours; OpenAI's own upload lacks the
`transformer.` prefix, and a model saved inside a wrapper has the wrapper's. Finding and checking need no torch: a wrong
folder is answered before anything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp.config import BadRequest, InitConfig, ModelConfig, first_line, require, show
from gpt2exp.files import TIMEOUT, sha256

if TYPE_CHECKING:
    from torch import Tensor

    from gpt2exp.model.gpt import GPT


CONFIG = "config.json"

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The files that weights lie in, the better one first; `NAME.index.json` tells of shards."""

WTE, HEAD = "transformer.wte.weight", "lm_head.weight"

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Names, by their ends, of the matrices that Hugging Face keeps as (in, out)."""

WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|model|gpt"
    r"|base_model|state_dict)\."
)
"""What wrappers put into names: DDP, torch.compile, FSDP, activation checkpoints, Fabric, Lightning, PEFT."""

MASKS = (".attn.bias", ".attn.masked_bias")
"""Constants that older files hold beside the weights."""

KEYS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "tie_weights": "tie_word_embeddings",
}
"""Our keys of `model` by Hugging Face's of `config.json`, with the same default on both sides (GPT2Config's)."""

SHAPE = [key for key in KEYS if key != "tie_weights"]
"""Those that weights must share with the model they go into: tied ones can go into an untied one."""

GPT2: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
"""What makes the architecture ours, by key of `config.json` (transformers' GPT2Config), its default first."""


def to_hf(model: ModelConfig) -> dict[str, Any]:
    """The keys of `config.json` that make transformers build `model`.

    Raises:
        BadRequest: a key of `model` that has none there is not at its default.
    """
    default = type(model)()
    for name in (item.name for item in fields(model) if item.name not in KEYS):
        value, usual = getattr(model, name), getattr(default, name)
        why, remedy = "Hugging Face's GPT-2 has no such choice", f"it takes model.{name}={show(usual)}"
        require(value == usual, f"model.{name}", value, why, remedy)
    keys = {theirs: getattr(model, ours) for ours, theirs in KEYS.items()}
    return keys | {key: known[0] for key, known in GPT2.items()} | {"n_inner": None}


def from_hf(config: Mapping[str, Any], said: str = CONFIG) -> ModelConfig:
    """The model that a `config.json` describes; `said` names its place in errors.

    Raises:
        BadRequest: it is another architecture, or no whole numbers.
    """
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
    """A folder with weights, complete: nothing of it was read but `config.json` and an index."""

    said: str
    """How the request named it, for errors: `init.path=FOLDER`."""
    folder: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]

    @property
    def pickled(self) -> bool:
        """Whether the files are PyTorch's, not safetensors."""
        return self.files[0].suffix == ".bin"

    @property
    def sha256(self) -> str:
        """Of the file, or of the shards' hashes in order."""
        hashes = [sha256(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(bytes.fromhex("".join(hashes))).hexdigest()


# --- finding ---------------------------------------------------------------------------------------------------------


def find(path: str, key: str = "init.path=") -> Weights:
    """The weights in a folder, or of a hub id; `key` is what `path` was typed after.

    Raises:
        BadRequest: there are none, something is missing or cannot be read, or the hub has no such id or no answer.
    """
    said, folder = f"{key}{path}", Path(path).expanduser()
    if folder.is_dir():
        return _complete(said, folder)
    if folder.exists():
        raise BadRequest(f"{said}: a file; name the folder that it lies in, with {CONFIG} beside the weights")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise BadRequest(f"{said}: no such folder; name one with {CONFIG} and {WEIGHTS[0]}, or a hub id such as gpt2")
    return _of_hub(said, path)


def _complete(said: str, folder: Path) -> Weights:
    """A folder's weights once every file they need is there."""
    config = _json(said, folder / CONFIG)
    for name in WEIGHTS:
        if (folder / name).is_file():
            return Weights(said, folder, config, (folder / name,))
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / shard for shard in _shards(said, index)]
            if missing := [file.name for file in files if not file.is_file()]:
                raise BadRequest(f"{said}: {missing[0]} is missing, of {len(files)} in {index.name}; put it there")
            return Weights(said, folder, config, tuple(files))
    raise BadRequest(f"{said}: has no {' or '.join(WEIGHTS)}; name a folder with GPT-2's weights")


def _json(said: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError
    except FileNotFoundError as error:
        raise BadRequest(f"{said}: has no {path.name}; name a folder that transformers wrote, or a hub id") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadRequest(f"{said}: its {path.name} cannot be read; copy or download it again") from error
    return found


def _shards(said: str, index: Path) -> list[str]:
    found = _json(said, index).get("weight_map")
    names = sorted({str(name) for name in found.values()}) if isinstance(found, dict) else []
    if not names or any(Path(name).name != name for name in names):  # a shard lies beside its index, nowhere else
        raise BadRequest(f"{said}: its {index.name} names no shards; copy or download it again")
    return names


def _of_hub(said: str, name: str) -> Weights:
    """The weights of a hub id from Hugging Face's cache, or else downloaded: the needed files, all of one commit."""
    try:
        from huggingface_hub import HfApi, constants, errors, hf_hub_download
    except ImportError as error:
        remedy = "name a folder, or pip install 'gpt2exp[hub]' to load it by its hub id"
        raise BadRequest(f"{said}: no such folder; {remedy}") from error

    try:
        with contextlib.suppress(errors.EntryNotFoundError, BadRequest):  # once here, an id stays what it was
            return _complete(said, Path(hf_hub_download(name, CONFIG, local_files_only=True)).parent)
        about = HfApi().model_info(name, timeout=TIMEOUT)

        def fetch(file: str) -> Path:
            return Path(hf_hub_download(name, file, revision=about.sha))

        there = {item.rfilename for item in about.siblings or ()}
        for file in WEIGHTS:
            if file in there:
                fetch(file)
                break
            if f"{file}.index.json" in there:
                for shard in _shards(said, fetch(f"{file}.index.json")):
                    fetch(shard)
                break
        if CONFIG in there:
            hf_hub_download(name, CONFIG)  # asked for by its branch, so that the cache knows which commit that is
            return _complete(said, fetch(CONFIG).parent)
    except BadRequest:
        raise
    except errors.RepositoryNotFoundError as error:  # private ones look the same
        remedy = "check the spelling, or log in with hf auth login if it is private"
        raise BadRequest(f"{said}: neither a folder nor a model on {constants.ENDPOINT}; {remedy}") from error
    except errors.HFValidationError as error:
        raise BadRequest(f"{said}: neither a folder nor a hub id; name one, such as gpt2") from error
    except Exception as error:  # of whichever HTTP client the library's version stands on
        why = f"no such folder, and {constants.ENDPOINT} did not answer ({type(error).__name__})"
        raise BadRequest(f"{said}: {why}; name a folder, or try again with a network") from error
    raise BadRequest(f"{said}: has no {CONFIG}; name a model that transformers wrote")


# --- checking --------------------------------------------------------------------------------------------------------


def check(found: Weights, model: ModelConfig) -> None:
    """Refuse weights that are not `model`'s, from `config.json` and the names and shapes in the files.

    Where those do not tell (a pickle, or a head beside tied weights) the files are read, which imports torch.

    Raises:
        BadRequest: it is another architecture or size, or a file is damaged; or the head differs from `wte`.
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
            raise _damaged(found, file, error) from error
    _check_shapes(found, shapes, model)
    if HEAD in shapes and model.tie_weights:
        read(found, model)


def _check_config(found: Weights, model: ModelConfig) -> None:
    to_hf(model)  # or the weights are of another architecture, whatever their shapes
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
    """Names as ours, shapes as Hugging Face's."""
    c, t, v = model.n_embd, model.block_size, model.vocab_size
    block: dict[str, tuple[int, ...]] = {f"{ln}.{leaf}": (c,) for ln in ("ln_1", "ln_2") for leaf in ("weight", "bias")}
    for name, (rows, columns) in zip(CONV1D, ((c, 3 * c), (c, c), (c, 4 * c), (4 * c, c)), strict=True):
        block |= {name: (rows, columns), name.replace("weight", "bias"): (columns,)}
    expected: dict[str, tuple[int, ...]] = {WTE: (v, c), "transformer.wpe.weight": (t, c)}
    expected |= {f"transformer.ln_f.{leaf}": (c,) for leaf in ("weight", "bias")}
    expected |= {f"transformer.h.{n}.{name}": of for n in range(model.n_layer) for name, of in block.items()}
    if HEAD in shapes or not from_hf(found.config, found.said).tie_weights:
        expected[HEAD] = (v, c)
    named = {name: tuple(shape) for name, shape in shapes.items() if not name.endswith(MASKS)}
    for name in (*sorted(expected.keys() - named.keys()), *sorted(named)):
        if name not in named:
            short = name.removeprefix("transformer.")
            if wrapped := next((other for other in sorted(named) if other.endswith(f".{short}")), None):
                prefix = wrapped.removeprefix("transformer.").removesuffix(short)
                why = f"its names begin with {prefix}, which no known wrapper puts there"
                raise BadRequest(f"{found.said}: {why}; take it off and save the weights again")
            raise BadRequest(f"{found.said}: {name} is missing from its weights; copy or download them again")
        if name not in expected:
            raise BadRequest(
                f"{found.said}: {name} is no part of GPT-2 with the shape in its {CONFIG}; name other weights"
            )
        if named[name] != expected[name]:
            why = f"{name} is {named[name]}, where its {CONFIG} makes it {expected[name]}"
            raise BadRequest(f"{found.said}: {why}; copy or download both again")


def _ours(name: str) -> str:
    """A name in a file as this package has it, the parts that wrappers put into it taken out."""
    name = WRAPPERS.sub("", name)
    return name if name.startswith("transformer.") or name == HEAD else f"transformer.{name}"


def _renamed(found: Weights, names: Iterable[str]) -> dict[str, str]:
    """Names in a file by ours.

    Raises:
        BadRequest: two of them are the same tensor's, one of them wrapped.
    """
    renamed: dict[str, str] = {}
    for name in names:
        if (other := renamed.setdefault(_ours(name), name)) != name:
            raise BadRequest(f"{found.said}: holds both {other} and {name}; save the weights of one model")
    return renamed


def _damaged(found: Weights, file: Path, error: Exception) -> BadRequest:
    why = first_line(error)[:120]
    return BadRequest(f"{found.said}: {file.name} is damaged or holds no weights ({why}); copy or download it again")


# --- reading ---------------------------------------------------------------------------------------------------------


def read(found: Weights, model: ModelConfig) -> dict[str, Tensor]:
    """The parameters of `model` by name, on the CPU, transposed to our layout and in the files' own types.

    Tied, the head is left out, once it is seen to equal `wte`; untied, one that the files leave out is `wte` again.

    Raises:
        BadRequest: a file is damaged, or is a pickle of more than tensors; a name or shape is not the model's; the head
            differs from `wte` and `model.tie_weights` is true.
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
    except Exception as error:  # whatever a damaged file sets off in its library
        if type(error).__name__ == "UnpicklingError" and "Unsupported" in str(error):
            why = f"{file.name} holds more than tensors, which could run code, so it is not opened"
            raise BadRequest(f"{found.said}: {why}; name weights as safetensors") from error
        raise _damaged(found, file, error) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise _damaged(found, file, ValueError("no tensors by name"))
    return tensors


def transposed(name: str, tensor: Tensor) -> Tensor:
    """A tensor under one of our names in Hugging Face's layout, or one of theirs in ours: the way is the same."""
    return tensor.T if name.endswith(CONV1D) else tensor


def load(gpt: GPT, config: InitConfig) -> dict[str, Any]:
    """Give `gpt` the weights at `init.path`; where they came from, for the record.

    Raises:
        BadRequest: as `find` and `read`.
    """
    from gpt2exp.model import init

    found = find(str(config.path))
    _check_config(found, gpt.config)
    init.load_weights(gpt, read(found, gpt.config))
    return {"source": config.path, "files": [file.name for file in found.files], "sha256": found.sha256}
