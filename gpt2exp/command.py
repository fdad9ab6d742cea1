"""How the commands begin and end: arguments read, and every fault one line with its exit code. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from gpt2exp import signals, view
from gpt2exp.assets import AssetError
from gpt2exp.config import BadRequest


def parser(program: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser whose errors are `BadRequest`."""
    made = argparse.ArgumentParser(prog=program, description=description, epilog=f"example: {program} {example}")
    return strict(made, program)


def strict(made: argparse.ArgumentParser, program: str) -> argparse.ArgumentParser:
    """The same parser, its errors made `BadRequest`."""

    def error(message: str) -> NoReturn:
        raise BadRequest(f"{message}; {program} --help shows what can be typed")

    made.error = error  # type: ignore[method-assign]
    return made


def unwritable(error: OSError) -> str:
    """The line for a disk that filled up or a folder that was taken away."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return f"{what}; make room, or name another folder"


def carry_out(program: str, action: Callable[[], int | None], unwritable: Callable[[OSError], str] = unwritable) -> int:
    """Do it; the exit code: its own, else 0 done, 1 a file could not be fetched or written, 2 a bad request, 130/143
    interrupted. `unwritable` makes the line of an `OSError`.
    """
    full_error = view.wants_traces()
    view.show_warnings(traces=full_error)
    try:
        with signals.terminable():
            return action() or 0
    except (BadRequest, AssetError) as error:
        view.refuse(str(error), program=program, trace=full_error)
        return 2 if isinstance(error, BadRequest) else 1
    except OSError as error:
        view.refuse(unwritable(error), program=program, trace=full_error)
        return 1
    except KeyboardInterrupt as interrupt:
        return signals.code(interrupt)
