"""The configuration by dotted key: lists keys, reads and writes values, reads older versions. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import typing
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any

from gpt2exp.config import RunConfig
from gpt2exp.section import CHOICES, SOURCE, TARGET, BadRequest, Section, chosen, class_of, default_of, show


def at(tree: Any, key: str) -> Any:
    """What nested dicts have at a dotted key, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def put(tree: dict[str, Any], key: str, value: object) -> None:
    """Set the value of nested dicts at a dotted key; the dicts must exist."""
    *sections, name = key.split(".")
    (at(tree, ".".join(sections)) if sections else tree)[name] = value


def options(cls: type[Section] = RunConfig) -> Iterator[tuple[str, Any, str]]:
    """Every key of the schema, such as `model.n_layer`, its default, and its help with the values to choose from."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        kind = hints[item.name]
        if isinstance(kind, type) and issubclass(kind, Section):
            known: dict[str, None] = {}
            section = cls.key(item.name)
            for name, choice in CHOICES.get(section, {"": kind}).items():
                of_choice = f" ({group_of(section)}={name})" if known else ""
                new = [option for option in options(choice) if option[0] not in known]
                yield from ((key, default, f"{about}{of_choice}") for key, default, about in new)
                known |= dict.fromkeys(key for key, _, _ in new)
            continue
        switch = item.metadata["choices"] if item.metadata["at_least"] is None else ()
        choices = list(kind) if isinstance(kind, type) and issubclass(kind, StrEnum) else switch
        listed = f" ({', '.join(map(show, choices))})" if choices else ""
        yield cls.key(item.name), default_of(item), item.metadata["help"] + listed


def group_of(section: str) -> str:
    """The config group of a section: `model/mlp` for `model.mlp`."""
    return section.replace(".", "/")


def choices_with(key: str) -> list[str]:
    """The names of the choices of a key's section whose class has that key."""
    section, _, name = key.rpartition(".")
    return [choice for choice, cls in CHOICES.get(section, {}).items() if name in cls.__dataclass_fields__]


def owner(key: str) -> tuple[type[Section], str]:
    """The class that has a dotted key of the schema as a field, and the field's name."""
    section, _, name = key.rpartition(".")
    if found := choices_with(key):
        return CHOICES[section][found[0]], name
    return kind_of(section), name


@functools.cache  # reading type hints takes a millisecond, and each count of a model needs it four times
def kind_of(section: str) -> type[Section]:
    """The class that a section is declared with, the base of its choices; `RunConfig` for ""."""
    kind: type[Section] = RunConfig
    for part in filter(None, section.split(".")):
        kind = typing.get_type_hints(kind)[part]
    return kind


@functools.cache
def keys() -> tuple[str, ...]:
    """Every dotted key of the schema, such as `model.n_layer`."""
    return tuple(key for key, _, _ in options())


ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "lr_decay_iters": "optimizer.schedule_steps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "sequence_length": "train.seq_len",
    "dtype": "precision",
}
"""Our keys by the names that other projects give them."""


def check_key(key: str, value: object) -> None:
    """Raise `BadRequest` unless `key` is a key of the schema, naming the nearest that is."""
    known = list(keys())
    if key in known:
        return
    if key in CHOICES:
        raise BadRequest(f"{key}={show(value)}: a choice of files; write {group_of(key)}={show(value)}")
    section = key.split(".")[0]
    inside = [name for name in known if name.startswith(f"{section}.")]
    if key == section and inside:
        raise BadRequest(f"{key}={show(value)}: a section, not a value; set one of {', '.join(inside)}")
    part = key.rsplit(".", 1)[-1]
    # the last part alone too, so that lr and n_layers find optimizer.lr and model.n_layer
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    near += [last[name] for name in difflib.get_close_matches(part, last, n=2, cutoff=0.75)]
    if part in ELSEWHERE:
        near = [ELSEWHERE[part]]
    hint = f"keys of {section}: {', '.join(inside)}" if inside else "gpt2exp --help lists the keys"
    if near:
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?"
    raise BadRequest(f"{key}={show(value)}: no such key; {hint}")


def parse(plain: Any) -> RunConfig:
    """A plain or composed configuration as a checked `RunConfig`; `BadRequest` for a wrong key, type or value."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        classes: dict[str, type[Section]] = {}
        given: Any = OmegaConf.to_container(OmegaConf.create(plain))  # plain values: the schema has the types
        chosen_ones = _with_choice(given)
        for section in dict.fromkeys([*chosen_ones, *(given.keys() & RunConfig.__dataclass_fields__.keys())]):
            own = at(given, section)
            own = own if isinstance(own, dict) else {}
            cls = class_of(section, own) if section in chosen_ones else kind_of(section)
            for name in own.keys() - cls.__dataclass_fields__.keys() if own else ():
                refuse(f"{section}.{name}", own[name], cls)
            if section in chosen_ones:
                classes[section] = cls
        config = OmegaConf.to_object(OmegaConf.merge(_typed_by(tuple(classes.items())), given))
    except OmegaConfBaseException as error:
        raise BadRequest(explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


@functools.cache  # it takes most of a `parse`, and OmegaConf merges into a copy
def _typed_by(choices: tuple[tuple[str, type[Section]], ...]) -> Any:
    """The schema as OmegaConf checks values against it, with the class of each choice in its section."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(RunConfig)
    for section, cls in choices:
        OmegaConf.update(schema, section, OmegaConf.structured(cls), merge=False)
    return schema


def _with_choice(tree: Mapping[str, Any]) -> list[str]:
    """The sections whose class is chosen: by name, or in this plain configuration from outside."""
    outside = [section for section, _, name in (key.rpartition(".") for key in leaves(tree)) if name == TARGET]
    return list(dict.fromkeys([*CHOICES, *outside]))


def refuse(key: str, value: object, cls: type[Section] | None = None) -> None:
    """Raise `BadRequest` for a key that the choice in its section lacks; `cls`: its class, if from outside."""
    section, _, name = key.rpartition(".")
    if others := choices_with(key):
        why = f"a key of {group_of(section)}={' and '.join(others)} alone"
        raise BadRequest(f"{key}: {why}; leave it out, or make that choice")
    if cls is None or TARGET not in cls.__dataclass_fields__:
        return check_key(key, value)
    known = [item for item in cls.__dataclass_fields__ if not item.startswith("_")]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"did you mean {section}.{near[0]}?" if near else f"its keys: {', '.join(known)}"
    raise BadRequest(f"{key}={show(value)}: {cls.__name__} has no such key; {hint}")


def explain(error: Exception) -> str:
    """An error of OmegaConf, Hydra or datasets, of several lines, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
    key = getattr(error, "full_key", None)
    return f"{key}: {text}" if key and key not in text else text


def plain(config: Section) -> dict[str, Any]:
    """A configuration as JSON's own types: enums by value, sections as dicts."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def defaults(cls: type[Section]) -> dict[str, Any]:
    """A section's defaults, as `plain`."""
    return typing.cast(dict[str, Any], json.loads(_defaults(cls)))  # type: ignore[arg-type] # a class has a hash


@functools.cache  # a comparison needs it for each run
def _defaults(cls: type[Section]) -> str:
    return json.dumps(plain(cls()))


HOUSEKEEPING = ("wandb", "sweep", "dry_run", "resume", "checkpoint", "metric", "train.log_every", "train.measure_every")
"""Keys, or whole sections, that change how a run is kept and shown, not what it computes."""


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """A nested plain configuration by dotted key, housekeeping left out."""
    return {key: value for key, value in leaves(config).items() if not is_housekeeping(key)}


@functools.cache
def is_housekeeping(key: str) -> bool:
    """Whether a dotted key is in `HOUSEKEEPING`, or in a section that is."""
    return key.endswith(f".{SOURCE}") or any(key == name or key.startswith(f"{name}.") for name in HOUSEKEEPING)


MOVED = {"model.pad_vocab": "train.pad_vocab"}  # today's name of a key by its name in earlier versions


def stored(recorded: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration that any version recorded, under today's keys, and those of its keys that do not exist today.

    Keys that it lacks get today's defaults. Both are plain values, interpolations unresolved; `parse` checks them.
    """
    today, unknown = defaults(RunConfig), leaves(recorded)
    for section in _with_choice(recorded):
        own = at(recorded, section)
        if isinstance(own, Mapping) and TARGET in own:  # from outside: its keys are those of its code
            put(today, section, dict(own))
        else:
            with contextlib.suppress(BadRequest):  # a choice of another version, whose keys are unknown here
                put(today, section, defaults(chosen(section, unknown.get(f"{section}.name"))))
    known = leaves(today).keys()
    for old, new in MOVED.items():
        if old in unknown.keys() - known:
            unknown.setdefault(new, unknown.pop(old))
    for key in known & unknown.keys():
        put(today, key, unknown.pop(key))
    return today, unknown


def leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested plain configuration by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def identity(config: RunConfig) -> str:
    """A hash that two configurations share if, and only if, they compute the same thing."""
    return hashlib.sha256(json.dumps(flatten(plain(config)), sort_keys=True).encode()).hexdigest()[:16]
