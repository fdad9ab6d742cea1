"""gpt2exp: does this choice matter? Paired experiments on GPT-2 pre-training. In Python: `help(gpt2exp.api)`."""

import types
from importlib import import_module
from typing import TYPE_CHECKING, Any

import gpt2exp.training.optimizers  # noqa: F401 - registers its choices with `gpt2exp.section`
from gpt2exp.config import RunConfig
from gpt2exp.section import BadRequest

if TYPE_CHECKING:
    from gpt2exp.api import Runs, compose, load, run, sweep, trainer

__all__ = ["BadRequest", "RunConfig", "Runs", "compose", "load", "run", "sweep", "trainer"]


class _Callable(types.ModuleType):
    """A subpackage with the name of a function of `gpt2exp.api`: calling it calls that function."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return getattr(import_module("gpt2exp.api"), self.__name__.rpartition(".")[2])(*args, **settings)


for _name in ("run", "sweep"):
    import_module(f"gpt2exp.{_name}").__class__ = _Callable


def __getattr__(name: str) -> Any:
    if name not in (*__all__, "api"):
        raise AttributeError(f"module 'gpt2exp' has no attribute {name!r}")
    api = import_module("gpt2exp.api")
    return api if name == "api" else getattr(api, name)
