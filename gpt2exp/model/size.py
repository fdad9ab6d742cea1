"""What a model holds and computes, counted on the modules themselves: on PyTorch's meta device, without their numbers.

A count is made once for each shape; blocks are alike, so one stands for all. It is also where a class in a slot is
tried, before a run begins: one that cannot be built, or maps (B, T, C) to another shape, is a `BadRequest`.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gpt2exp.config import BadRequest, InitConfig, ModelConfig, first_line, group_of, show

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gpt2exp.model.gpt import GPT

_shapes: dict[str, Any] = {}


def _once(count: Any) -> Any:
    """Remember a count by the arguments' text: a configuration can be changed, so it has no hash."""

    @functools.wraps(count)
    def known(*args: Any) -> Any:
        key = f"{count.__name__} {args}"
        if key not in _shapes:
            _shapes[key] = count(*args)
        return _shapes[key]

    return known
