"""A request that names or holds a credential is refused, so that no record holds one. Its value is not printed.

A request is written to many places (`sweep.json`, `.hydra/`, `summary.json`, wandb, the report), so it is checked
before any of them. Credentials belong in the environment or in `wandb login`, where wandb finds them by itself.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2exp.section import BadRequest

NAME = r"[\w-]*(?:api[_-]?key|access[_-]?key|private[_-]?key|token(?!s)|secret|passw|credential)[\w-]*"
"""What a key or an environment variable is called that holds a credential (`tokens` are counted, not kept secret)."""

SHORTEST = 8  # characters that a credential has at least; a value such as `true` is none


def check_typed(texts: Iterable[str]) -> None:
    """Raise `BadRequest` if an override, or a mapping inside one, sets a key that names a credential, or holds one."""
    for text in texts:
        if found := re.search(rf"(?:^|[{{,~+@/\s'\"])((?:[\w-]+\.)*{NAME})['\"]?\s*[=:]", text, re.IGNORECASE):
            _refuse_name(found[1])
        check_values(text, text.partition("=")[0])


def check_values(tree: Any, key: str = "") -> None:
    """Raise `BadRequest` if a composed configuration names or holds a credential; `key`: where in it `tree` is."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            inside = f"{key}.{name}".lstrip(".")
            if value is not None and re.fullmatch(NAME, str(name), re.IGNORECASE):
                _refuse_name(inside)
            check_values(value, inside)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            check_values(value, key)
    elif isinstance(tree, str) and len(tree) >= SHORTEST:
        for name, value in os.environ.items():
            known = len(value) >= SHORTEST and value in tree and re.fullmatch(NAME, name, re.IGNORECASE)
            if known and not Path(value).exists():  # a path to a credential is no credential
                raise BadRequest(f"{key}: holds the value of {name}, which no record may keep; leave it out")


def _refuse_name(key: str) -> None:
    remedy = "set WANDB_API_KEY in the environment, or run wandb login"
    raise BadRequest(f"{key}: credentials are no part of a request, which is kept on disk; {remedy}")
