"""Credentials stay out of requests, and so out of every record: what names or holds one is refused, its value unsaid.

A request reaches many records (`sweep.json`, `.hydra/`, `summary.json`, wandb, the report), so it is checked once, at
the door. Credentials belong into the environment or `wandb login`, where wandb finds them by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2exp.config import BadRequest

NAME = r"[\w-]*(?:api[_-]?key|access[_-]?key|private[_-]?key|token(?!s)|secret|passw|credential)[\w-]*"
"""What a key or an environment variable is called that holds a credential (`tokens` are counted, not kept secret)."""

SHORTEST = 8
"""Characters of a credential; a flag such as `TOKENS=true` is none."""

REMEDY = "set WANDB_API_KEY in the environment, or run wandb login"


def check_typed(texts: Iterable[str]) -> None:
    """Raise `BadRequest` if an override, or a mapping inside one, sets a key that names a credential, or holds one."""
    for text in texts:
        found = re.search(rf"(?:^|[.{{,~+@/\s'\"])({NAME})['\"]?\s*[=:]", text, re.IGNORECASE)
        if found:
            whole = text[: found.end(1)].lstrip("+~") if "=" not in text[: found.start(1)] else found[1]
            raise BadRequest(f"{whole}: credentials are no part of a request, which is kept on disk; {REMEDY}")
        _check_text(text.partition("=")[0], text, _held())


def check_values(tree: Any, key: str = "") -> None:
    """Raise `BadRequest` if a composed configuration names or holds a credential, by dotted key."""
    _check(tree, key, _held())


def _check(tree: Any, key: str, held: Mapping[str, str]) -> None:
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            inside = f"{key}.{name}" if key else str(name)
            if value is not None and re.fullmatch(NAME, str(name), re.IGNORECASE):
                raise BadRequest(f"{inside}: credentials are no part of a configuration; {REMEDY}")
            _check(value, inside, held)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            _check(value, key, held)
    elif isinstance(tree, str):
        _check_text(key, tree, held)


def _held() -> dict[str, str]:
    """The credentials in the environment, by name."""
    return {
        name: value
        for name, value in os.environ.items()
        if len(value) >= SHORTEST and re.fullmatch(NAME, name, re.IGNORECASE)
    }


def _check_text(key: str, text: str, held: Mapping[str, str]) -> None:
    for name, value in held.items():
        if value in text and not Path(value).exists():  # the place of a credential is none
            raise BadRequest(f"{key}: holds the value of {name}, which no record may keep; leave it out")
