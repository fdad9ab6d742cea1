"""The overrides of a command line: quoted as the user means them, parsed, and each checked by itself. No torch."""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt2exp.schema import check_key, group_of, keys, owner
from gpt2exp.section import CHOICES, BadRequest, default_of, home, quoted, show, typed
from gpt2exp.sweep import composing
from gpt2exp.sweep.composing import SECTIONS, Composer, is_hydra

LOGGING = ("hydra.verbose", "hydra/job_logging")  # have an effect only in a launcher's workers
OUTPUT = ("hydra.run.dir", "hydra.sweep.dir")
LISTS = {"sweep.together": ";", "sweep.reuse": ","}  # lists that may be typed as one text, with their separators
PLACES = ("data.path", "init.path", "resume", "sweep.prior", "wandb.dir")
QUOTES = "'\""
ELEMENT = re.compile(r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^][(),'"]+""")


def as_meant(text: str) -> str:
    """An argument in Hydra's grammar, quoted where Hydra would read a text as something else.

    Hydra would read `wandb.name=2024_01_15` as the number 20240115 and `resume=None` as a folder called None. It would
    refuse `hydra.run.dir=~/x`, and split the name of a file at a comma. What the user has quoted stays as it is.
    """
    key, _, value = text.partition("=")
    bare = key.lstrip("+")
    if bare in LISTS and value[:1] != "[":
        text = value.strip(QUOTES)
        parts = [text] if os.path.exists(home(text)) else text.split(LISTS[bare])  # noqa: PTH110
        return typed(key, [part.strip() for part in parts if part.strip()])
    if bare in ("sweep.over", "sweep.tune") and "=" in value and value[0] not in QUOTES:
        return f"{key}={quoted(value)}"
    if bare == "sweep.tune_seeds" and re.fullmatch(r"[\d, ]+", value):
        seeds = value if "," in value else ",".join(map(str, range(101, 101 + int(value))))
        return f"{key}=[{seeds}]"
    if not value or "${" in value or value[0] in QUOTES or bare not in (*OUTPUT, *keys()):
        return text
    parser = OverridesParser.create()
    if bare in OUTPUT or (bare in PLACES and value != "null" and os.path.exists(home(value))):  # noqa: PTH110
        return typed(key, value)
    expected = key_types(bare)

    def name(found: re.Match[str]) -> str:
        part = found[0].strip()
        if part == "None" and type(None) in expected:
            return "null"
        try:
            number = parser.parse_rule(part, "primitive")
        except HydraException:
            return found[0]
        otherwise = isinstance(number, int | float) and str(number) != part and takes_text(expected)
        return quoted(part) if otherwise else found[0]

    value = ELEMENT.sub(name, value)
    try:
        parser.parse_override(f"{key}={value}")
    except HydraException:  # a character that the grammar does not know
        return f"{key}={quoted(value)}" if takes_text(expected) and not set(value) & set(",[{") else text
    return f"{key}={value}"


def parse_overrides(composer: Composer, texts: Sequence[str]) -> list[Override]:
    """The texts as Hydra's overrides, each checked by itself; `BadRequest` for one that is no override or is wrong."""
    parser = OverridesParser.create(config_loader=composer.loader)
    overrides = []
    for text in texts:
        try:
            parsed = parser.parse_overrides([text])
            if not parsed[0].key_or_group:
                raise HydraException("no key")
        except HydraException as error:
            hint = f"write KEY=VALUE, and quote values with special characters: {example(text)}"
            raise BadRequest(f"{text}: cannot be read as an override; {hint}") from error
        overrides += parsed
    for override in overrides:
        _check(composer, override)
    return overrides


def example(text: str) -> str:
    """An override with its value quoted, to be pasted into a shell."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        key, value = "data.path", "my file.txt"
    return shlex.quote(f"{key}={quoted(value)}" if set(value) & set('"\\') else f'{key}="{value}"')


def values_of(override: Override) -> list[Any]:
    """The values that an override gives its key, one or several."""
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]


def _check(composer: Composer, override: Override) -> None:
    """Refuse an override whose key, choice or type is wrong, in one line: Hydra's own has several."""
    key = override.key_or_group
    if is_hydra(key):
        if override.is_choice_sweep():
            raise BadRequest(f"{override.input_line}: a sweep has one {key}; name one, quoted if it holds a comma")
        return
    offered = composer.offered(key)
    group, _, part = key.rpartition(".")
    if (group in CHOICES and part == "name") or part.startswith("_"):
        name = show(override.value())
        again = f"write {group_of(group)}={name if part == 'name' else 'NAME, with NAME.yaml in that group'}"
        raise BadRequest(f"{key}={name}: a choice brings keys of its own; {again}")
    if override.type is OverrideType.DEL:
        raise BadRequest(f"~{key}: a key cannot be deleted; give it another value instead: {key}=VALUE")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return  # an interval, say, is for another sweeper, which checks it
    for number, value in enumerate(values_of(override)):
        if offered:
            _check_choice(key, value, offered)
        elif not composer.may_have(key):
            if number == 0:
                check_key(key, value)
            _check_type(key, value)
        if override.is_add() and (not offered or key in (*SECTIONS, "experiment")):
            again = shlex.quote((override.input_line or "").lstrip("+"))
            raise BadRequest(f"+{key}={show(value)}: the key is there already; leave out the +: {again}")


def _check_choice(group: str, value: Any, choices: list[str]) -> None:
    if isinstance(value, (dict, list)) or str(value) not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {group}={near[0]}? Choices: " if near else "choose one of "
        raise BadRequest(f"{group}={show(value)}: no such choice; {hint}{', '.join(choices)}")


def _check_type(key: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        return  # an interpolation, whose type is known once it is composed
    expected, (section, name) = key_types(key), owner(key)
    try:
        if isinstance(value, bool) and not {bool, str} & set(expected):
            raise ValueError("a bool is no number")
        if isinstance(value, (int, float)) and expected == (bool,) and value not in (0, 1):
            raise ValueError("a number is no bool")
        OmegaConf.update(composing.schema_of(section), name, value)
    except (OmegaConfBaseException, ValueError) as error:
        shown = show(default_of(section.__dataclass_fields__[name]))
        for kind in expected:
            if isinstance(kind, type) and issubclass(kind, Enum):
                raise BadRequest(f"{key}={show(value)}: no such value; choose one of {', '.join(kind)}") from error
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        wanted = names.get(expected[0], f"a list, such as {key}={shown}") + " or auto" * (expected[1:] == (str,))
        raise BadRequest(f"{key}={show(value)}: must be {wanted}; the default is {shown}") from error


@functools.cache
def key_types(key: str) -> tuple[Any, ...]:
    """The types that a key takes, with NoneType if it may be null."""
    section, name = owner(key)
    hint = typing.get_type_hints(section)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def takes_text(kinds: tuple[Any, ...]) -> bool:
    """Whether a key of these types takes any text, not only `auto` beside a number."""
    return list[str] in kinds or (str in kinds and not {int, bool} & set(kinds))
