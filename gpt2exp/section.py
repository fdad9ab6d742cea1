"""The parts of every section of the configuration: options with bounds and help, checks, choices by name.

A wrong value raises `BadRequest`. Its text names the key, the value, why it cannot be used, and what to type instead.
This module imports nothing else of the package and no torch, so that a typo is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar


class BadRequest(ValueError):
    """A request that cannot be carried out as typed; its text is the one line the user sees (exit code 2)."""


def show(value: object) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(map(show, value))}]" if isinstance(value, list) else str(value)


def override_key(text: str) -> str:
    """The key of an override as it is typed: `KEY=VALUE`, or `+KEY=VALUE`."""
    return text.lstrip("+").partition("=")[0]


def quoted(text: str) -> str:
    """Any text quoted so that Hydra's grammar reads it back: there, a backslash escapes only before a quote."""
    return "'" + re.sub(r"(\\*)'", r"\1\1\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def typed(key: str, value: object) -> str:
    """`key=value` in Hydra's grammar; a text is quoted if it would else be read as something other than a text."""
    if isinstance(value, list):
        return f"{key}=[{','.join(quoted(part) if isinstance(part, str) else show(part) for part in value)}]"
    text = show(value)
    if value is None or isinstance(value, bool | int | float):
        return f"{key}={text}"
    plain = re.fullmatch(r"\.{1,2}|\.{0,2}/[\w./+-]*|[a-z_][\w./+-]*", text, re.ASCII | re.IGNORECASE)
    if not plain or text.lower() in ("null", "true", "false", "nan", "inf"):
        text = quoted(text)
    return f"{key}={text}"


def first_line(error: object) -> str:
    """An exception's first line that is not blank, or its type's name if it has no text."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def require(ok: bool, key: str, value: object, reason: str, remedy: str) -> None:
    """Raise `BadRequest` naming key, value, reason and remedy unless `ok`."""
    if not ok:
        raise BadRequest(f"{key}={show(value)}: {reason}; {remedy}")


def home(path: str) -> str:
    """A path with a leading `~` expanded; unchanged if the user that it names does not exist."""
    return os.path.expanduser(path)  # noqa: PTH111 - Path's raises if the user does not exist


AUTO = "auto"  # the program chooses the value
SWITCH = (AUTO, True, False)  # values of a switch that the program may choose


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[Any, ...] = (),
) -> Any:
    """A field of a section: its default, its help (one clause), and its bounds, which `check` enforces.

    Bounds hold for a number, or each number of a list; null passes if the type allows it. If there are bounds,
    `choices` are allowed besides numbers within them, else they are the only values allowed.
    """
    facts = {"help": help, "at_least": at_least, "above": above, "below": below, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=facts)
    return field(default=default, metadata=facts)


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}  # how a value compares to each limit


def check(section: Section) -> None:
    """Raise `BadRequest` for the first value of a section that is outside its option's bounds."""
    for item in dataclasses.fields(section):
        value, choices = getattr(section, item.name), item.metadata.get("choices", ())
        limits = {name: limit for name in BOUNDS if (limit := item.metadata.get(name)) is not None}
        if value is None or not (limits or choices):
            continue
        reason, remedy = "no such value", f"choose one of {', '.join(map(show, choices))}"
        if limits:
            said = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
            reason = ", or ".join([f"must be {'' if 'int' in str(item.type) else 'a finite number '}{said}", *choices])
            remedy = f"try {section.key(item.name)}={show(default_of(item))}"
        for part in value if isinstance(value, list) else [value]:
            number = isinstance(part, int) or (isinstance(part, float) and math.isfinite(part))
            within = number and all(BOUNDS[name](part, limit) for name, limit in limits.items())
            chosen = (type(part), part) in [(type(choice), choice) for choice in choices]  # 1 is not True
            require(chosen or bool(limits and within), section.key(item.name), value, reason, remedy)


def default_of(item: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass's field."""
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


@dataclass(kw_only=True, slots=True)
class Section:
    """A part of the configuration; values are checked as it is made, each alone and then against one another."""

    def __post_init__(self) -> None:
        check(self)
        self.agree()

    def agree(self) -> None:
        """Raise `BadRequest` unless the values go together."""

    def require(self, ok: bool, name: str, reason: str, remedy: str) -> None:
        """Raise `BadRequest` about the field `name` of this section, or of one inside, unless `ok`."""
        value = operator.attrgetter(name)(self)
        require(ok, self.key(name), "''" if value == "" else value, reason, remedy)

    inside: ClassVar[str] = ""  # the section around it, with a dot

    @classmethod
    def key(cls, name: str) -> str:
        """The dotted key of a field, such as `model.n_layer`; in a choice's class, the key in its section."""
        named = next(base.__name__ for base in cls.__mro__ if base.__name__.endswith("Config"))
        section = named.removesuffix("Config").lower()
        return name if section == "run" else f"{cls.inside}{section}.{name}"


Chosen = TypeVar("Chosen", bound=Section)
CHOICES: dict[str, dict[str, type[Section]]] = {}
"""By section, such as `optimizer` or `model.mlp`: its classes by the name of the choice, the default first."""


def choice_of(section: str) -> Callable[[type[Chosen]], type[Chosen]]:
    """Register a subclass of a section's class as a choice, named by the default of its field `name`."""

    def register(cls: type[Chosen]) -> type[Chosen]:
        name = next(item for item in dataclasses.fields(cls) if item.name == "name")
        CHOICES.setdefault(section, {})[name.default] = cls  # type: ignore[index]
        return cls

    return register


def chosen(section: str, name: object = None) -> type[Any]:
    """The class of a choice by name, or of the section's default; `BadRequest` for an unknown name."""
    choices = CHOICES[section]
    remedy = f"choose one of {', '.join(choices)}"
    require(name is None or name in choices, f"{section}.name", name, "no such choice", remedy)
    return choices[str(name)] if name is not None else next(iter(choices.values()))


OUTSIDE: dict[tuple[str, str, str], type[Any]] = {}  # by section, `_target_`, `_sha256_`: classes of admitted code


TARGET, SOURCE, SHA256 = "_target_", "_source_", "_sha256_"  # of code from outside: MODULE.NAME, its file, its hash


def class_of(section: str, values: Mapping[str, Any]) -> type[Any]:
    """The class that a section with these values has: a choice of ours, or one from outside that was admitted."""
    if TARGET not in values:
        return chosen(section, values.get("name"))
    target, source = values[TARGET], values.get(SOURCE)
    found = OUTSIDE.get((section, target, values.get(SHA256, "")))
    if found is None:
        raise BadRequest(f"{section}.{TARGET}={target}: its code, {source}, was not admitted to this process")
    return found
