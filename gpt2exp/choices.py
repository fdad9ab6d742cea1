"""Choices from outside: a class or function of the user's, named by `_target_` in a YAML file of the user's.

`mine/optimizer/lion.yaml` with `_target_: my_choices.Lion` makes `gpt2exp --config-dir mine optimizer=lion` a choice.
`my_choices.py` lies in `mine` or in the current folder. The section then has its usual keys and the arguments of
`Lion`, which are typed and checked by its signature. The section's class is made here from both.

A file in `conf/` may name code too, but only the package's: `gpt2exp.model.init.NAME`.

A configuration records the file and its sha256, and runs only with that very code. Code may run if it is in a folder
that the command line names (`allow`). Code elsewhere that a run folder names may run only if the user said `--trust`,
or in a process that a process of ours started for the run. No torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.machinery
import inspect
import pkgutil
import re
import shlex
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, make_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from gpt2exp.config import SlotConfig
from gpt2exp.schema import kind_of
from gpt2exp.section import OUTSIDE, SHA256, SOURCE, TARGET, BadRequest, Section, first_line, option

LEADING: dict[str, tuple[str, ...]] = {
    "optimizer": ("params",),
    "schedule": ("step", "steps"),
    "metric": ("model", "batch"),
    "init": ("name", "parameter"),
    "data": (),
    **{f"model.{slot}": ("config",) for slot in ("attention", "mlp", "norm", "position")},
}
"""By section, the arguments that the code is called with by position; its other parameters are keys of the section."""

PLAIN = (int, float, bool, str)
CHECKED = {"int", "float", "bool", "str", "list", "dict", "class", "None", "NoneType", "Optional", "typing"}
"""Words of annotations that OmegaConf can check."""


class Outside:
    """Base of a section's class that is made from code from outside; says how to call that code."""

    __slots__ = ()
    code: ClassVar[Callable[..., Any]]  # the class or function
    arguments: ClassVar[tuple[str, ...]]  # fields that it is called with, by name
    tuples: ClassVar[tuple[str, ...]]  # those of them that the code gets as tuples and the section has as lists
    needed: ClassVar[frozenset[str]]  # those of them that have no default


class Refused(BadRequest):
    """Code that may not run here, or is not what a configuration recorded."""


_folders: list[Path] = []  # folders in which modules are looked for, and whose code may run
_trusting = False  # whether the file that a configuration recorded may run, wherever it is
_loaded: dict[str, tuple[Path, str]] = {}  # modules that were loaded here: file and sha256, by name
_added: set[str] = set()  # folders that were added to `sys.path` here


def allow(*folders: Path | str | None) -> None:
    """Let code in these folders run in this process, instead of the folders allowed before."""
    _folders[:] = [Path(folder).absolute() for folder in folders if folder is not None]


def trust(recorded: bool = True) -> None:
    """Set whether code may run in this process from any file that a configuration recorded."""
    global _trusting
    _trusting = recorded


# --- in a configuration ----------------------------------------------------------------------------------------------


def found_in(config: Mapping[str, Any], place: str = "") -> dict[str, Mapping[str, Any]]:
    """The sections of a plain configuration that are choices from outside, by dotted key."""
    found: dict[str, Mapping[str, Any]] = {}
    for name, inside in config.items():
        if isinstance(inside, Mapping):
            found |= {f"{place}{name}": inside} if TARGET in inside else found_in(inside, f"{place}{name}.")
    return found


def describe(section: str, values: Mapping[str, Any], name: str) -> dict[str, str]:
    """Name, source and sha256 of a section composed from `name`.yaml; `BadRequest` if its module is not there."""
    target = str(values[TARGET])
    if _is_ours(section, target, name):
        return {"name": name, SOURCE: "", SHA256: ""}
    key, module = f"{section}.{TARGET}={target}", target.rpartition(".")[0]
    there = [path for folder in _folders if (path := folder / f"{module}.py").is_file()]
    if not there:
        places = " or ".join(str(folder) for folder in _folders)
        raise BadRequest(f"{key}: no {module}.py in {places}; put it there, or mend the name")
    return {"name": name, SOURCE: str(there[0]), SHA256: hashlib.sha256(there[0].read_bytes()).hexdigest()}


def admit(config: Mapping[str, Any]) -> None:
    """Load the code that a plain configuration names, and make its sections' classes known to `schema.parse`.

    Raises `Refused` for code that may not run here or was changed, `BadRequest` for code that does not fit its section.
    """
    for section, values in found_in(config).items():
        target, known = str(values[TARGET]), str(values.get(SHA256))
        if (section, target, known) not in OUTSIDE:
            ours = _is_ours(section, target, values.get("name"))
            code = pkgutil.resolve_name(target) if ours else _code(section, target, values)
            OUTSIDE[section, target, known] = _section(section, target, code)
        if missing := sorted(OUTSIDE[section, target, known].needed - values.keys()):
            raise BadRequest(f"{section}.{missing[0]}: {target} needs it; give it in the YAML file, or type it")


def about(config: Section, place: str = "") -> dict[str, str]:
    """Each choice from outside in a configuration, by dotted key: its name, and the first line of its docstring."""
    found: dict[str, str] = {}
    for item in fields(config):
        inside = getattr(config, item.name)
        if isinstance(inside, Outside):
            text = inspect.getdoc(inside.code) or ""
            found[f"{place}{item.name}"] = f"{inside.name}: {first_line(text)}"  # type: ignore[attr-defined]
        elif isinstance(inside, Section):
            found |= about(inside, f"{place}{item.name}.")
    return found


def call(section: Any, *leading: Any) -> Any:
    """Call the code of a choice from outside with these arguments and then the section's keys."""
    given = {name: getattr(section, name) for name in section.arguments}
    given |= {name: tuple(given[name]) for name in section.tuples if given[name] is not None}
    return section.code(*leading, **given)


# --- from code to a section ------------------------------------------------------------------------------------------


def _is_ours(section: str, target: str, name: object) -> bool:
    """Whether a file of the package names this code; `BadRequest` if no file may name it."""
    key, (module, _, attribute) = f"{section}.{TARGET}={target}", target.rpartition(".")
    if section not in LEADING:
        raise BadRequest(f"{key}: no choice from outside can be made here; it can be of {', '.join(LEADING)}")
    if not target.startswith("gpt2exp.") or not re.fullmatch(r"[\w-]+", str(name)):
        if module.isidentifier() and attribute.isidentifier():  # so it cannot lead to another folder
            return False
        raise BadRequest(f"{key}: must be MODULE.NAME, as my_choices.Lion in a file my_choices.py")
    file = resources.files("gpt2exp.conf").joinpath(*section.split("."), f"{name}.yaml")
    if file.is_file() and f"{TARGET}: {target}\n" in file.read_text("utf-8"):
        return True
    raise BadRequest(f"{key}: no file of the package's names that code; write a function of your own around it")


def _code(section: str, target: str, values: Mapping[str, Any]) -> Any:
    """The class or function that `target` names, from a file with the recorded sha256."""
    module, _, name = target.rpartition(".")
    recorded, sha256 = Path(str(values.get(SOURCE))), str(values.get(SHA256))
    said = f"{section}.{TARGET}={target}"
    places = [folder / f"{module}.py" for folder in _folders]
    places += [recorded] if _trusting else []
    there = [path for path in places if path.is_file()]
    if not there:
        remedy = f"add --trust (gpt2exp: or --config-dir {shlex.quote(str(recorded.parent))})"
        raise Refused(f"{said} would run code of {recorded}; if it is yours, {remedy}")
    text = {path: path.read_bytes() for path in there}
    same = [path for path in there if hashlib.sha256(text[path]).hexdigest() == sha256]
    if not same:
        now = hashlib.sha256(text[there[0]]).hexdigest()
        why = f"{there[0]} is not the code of before (sha256 {sha256[:8]} then, {now[:8]} now)"
        raise Refused(f"{said}: {why}; put that code back, or start a new run")
    found = getattr(_module(said, same[0], text[same[0]], sha256), name, None)
    if not callable(found):
        raise BadRequest(f"{said}: {same[0]} has no class or function {name}")
    return found


def _module(said: str, path: Path, text: bytes, sha256: str) -> types.ModuleType:
    """Import a module from the bytes that were hashed, never from a compiled file beside it."""
    name = path.stem
    if _loaded.get(name) == (path, sha256):
        return sys.modules[name]
    if name not in _loaded and _is_installed(name, path):
        raise BadRequest(f"{said}: {name} is the name of an installed module too; rename {path.name}")
    module = types.ModuleType(name)
    module.__file__ = str(path)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a module beside it hides no installed one
        _added.add(str(path.parent))
    sys.modules[name] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        why = f"{path} raised {type(error).__name__} as it was imported: {first_line(error)}"
        raise BadRequest(f"{said}: {why}") from error
    _loaded[name] = path, sha256
    return module


def _is_installed(name: str, path: Path) -> bool:
    """Whether Python finds a module of that name outside the folders of choices."""
    places = [place for place in sys.path if place and place not in {*_added, *map(str, _folders)}]
    found = importlib.machinery.PathFinder.find_spec(name, places)
    return name in (*sys.builtin_module_names, "gpt2exp") or (found is not None and found.origin != str(path))


def _section(section: str, target: str, code: Any) -> type[Section]:
    """The section's class for a choice: its usual fields, and `code`'s parameters; `BadRequest` if these do not fit."""
    base = kind_of(section)
    parameters = _parameters(f"{section}.{TARGET}={target}", code, LEADING[section])
    hints: dict[str, Any] = {}
    with contextlib.suppress(Exception):  # an annotation may name something imported for type checkers alone
        hints = typing.get_type_hints(code.__init__ if inspect.isclass(code) else code)
    fields: dict[str, tuple[str, Any, Any]] = {}
    for parameter in parameters:
        if parameter.name not in base.__dataclass_fields__:
            default = "???" if parameter.default is parameter.empty else parameter.default
            default = list(default) if isinstance(default, tuple) else default
            kind = _kind(parameter, hints.get(parameter.name))
            fields[parameter.name] = parameter.name, kind, option(default, f"argument of {target}")
    tuples = [of.name for of in parameters if tuple in (type(of.default), typing.get_origin(hints.get(of.name)))]
    namespace: dict[str, Any] = {
        "code": staticmethod(code),
        "arguments": tuple(item.name for item in parameters),
        "tuples": tuple(tuples),
        "needed": frozenset(item.name for item in parameters if item.default is item.empty and item.name in fields),
    }
    if issubclass(base, SlotConfig):
        namespace["build"] = call
    for name in ("name", TARGET, SOURCE, SHA256):
        fields[name] = name, str, option("", "of the file that made the choice, and of the code that it names")
    name = f"{target.rpartition('.')[2]} from outside"
    return make_dataclass(name, list(fields.values()), bases=(base, Outside), namespace=namespace, kw_only=True)


def _parameters(said: str, code: Any, leading: tuple[str, ...]) -> list[inspect.Parameter]:
    """The parameters of a class or function that are keys: all but the first, which it is called with by position."""
    call = f"it is called as {said.rpartition('.')[2]}({', '.join((*leading, 'KEY=VALUE'))})"
    try:
        signature = inspect.signature(code)
        signature.bind_partial(*leading)
    except (TypeError, ValueError) as error:
        raise BadRequest(f"{said}: {call}, but {first_line(error)}") from error
    rest = list(signature.parameters.values())[len(leading) :]
    named = [item for item in rest if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    if odd := [item.name for item in named if item.name == "name" or item.name.startswith("_")]:
        raise BadRequest(f"{said}: its parameter {odd[0]} cannot be a key; rename it")
    return [item for item in named if item.default is item.empty or _is_plain(item.default)]


def _is_plain(value: Any) -> bool:
    """Whether a default can be written in YAML; a parameter whose default cannot is no key."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in PLAIN


def _kind(parameter: inspect.Parameter, hint: Any) -> Any:
    """The type that a key is checked against: the annotation, a tuple as a list, where OmegaConf can check that.

    Else the type of the default where that is plain, else any.
    """
    default = parameter.default
    parts = [part for part in typing.get_args(hint) if part is not Ellipsis]
    if typing.get_origin(hint) is tuple and len(set(parts)) == 1:
        hint = list[parts[0]]  # type: ignore[valid-type]
    elif hint in (None, Any) or not set(re.findall(r"\w+", str(hint))) <= CHECKED:
        inside = {type(value) for value in default} if isinstance(default, (list, tuple)) else set()
        hint = type(default) if type(default) in PLAIN else Any
        hint = list[inside.pop()] if len(inside) == 1 and inside <= set(PLAIN) else hint  # type: ignore[misc]
    return hint | None if default is None and hint is not Any else hint
