"""The command `gpt2exp-compare`: compare the runs below a folder and write what came of it."""

from __future__ import annotations

import logging
import math
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2exp.compare.comparison import (
    Comparison,
    compare,
    read,
)
from gpt2exp.compare.report import _write, mirror, show
from gpt2exp.config import BadRequest
from gpt2exp.run import terminal
from gpt2exp.run.terminal import clean

if TYPE_CHECKING:
    from rich.console import Console


log = logging.getLogger("gpt2exp")


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script `gpt2exp-compare`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Compare the runs under the folders named; exit code 0, or 2 for a bad request."""
    from gpt2exp.run import process, terminal

    parser = process.parser(
        "gpt2exp-compare",
        "Compare the runs under one or more run or sweep folders, finished or not, and write comparison.json, "
        "comparison.csv, report.md and report.html.",
        "sweeps/2026-01-31/12-00-00-abcd --margin 0.01",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run or sweep folder, or one above")
    parser.add_argument("--margin", type=float, help="loss differences inside ±MARGIN nats count as none")
    parser.add_argument("--out", type=Path, help="where to write (default: the first DIR)")

    full_error = terminal.wants_traces()
    try:
        args = parser.parse_args(argv)
        if args.margin is not None and not (math.isfinite(args.margin) and args.margin > 0):
            raise BadRequest(f"--margin {args.margin}: must be a number of nats above 0; try --margin 0.01")
        comparison = compare(read(args.folders), margin=args.margin)
        out = args.out or args.folders[0]
        out.mkdir(parents=True, exist_ok=True)
        write(comparison, out)
    except BadRequest as problem:
        terminal.refuse(str(problem), program="gpt2exp-compare", trace=full_error)
        return 2
    except OSError as problem:
        why = f"cannot write the comparison ({problem.strerror or problem}); name a folder with --out"
        terminal.refuse(why, program="gpt2exp-compare", trace=full_error)
        return 2
    show(comparison, terminal.terminal(), out)
    return 0


# --- files -----------------------------------------------------------------------------------------------------------


def write(comparison: Comparison, out: Path) -> None:
    """`comparison.json`, `comparison.csv`, `report.md`, `report.html` and `figures/` in the folder, each whole."""
    from gpt2exp.compare import figures

    _write(comparison, out, figures.draw(comparison))


# --- the end of a sweep ----------------------------------------------------------------------------------------------


def conclude(sweep: Path, console: Console) -> None:
    """Compare a sweep's runs, write, show and mirror the report; after a line of warning instead, if that fails.

    The runs are done and recorded by then, so no failure here may change what the sweep's command says of them; it
    says itself which runs failed.
    """
    again = f"gpt2exp-compare {shlex.quote(terminal.short(sweep.absolute()))} tries again"
    try:
        from gpt2exp.compare import figures

        comparison = compare(read([sweep]))
        sections = figures.draw(comparison)
        _write(comparison, sweep, sections)
        show(comparison, console, sweep, failed=False)
        mirror(comparison, sweep, sections)
    except (BadRequest, OSError) as error:
        log.warning("no comparison: %s; %s", clean(error), again)
    except Exception as error:
        log.warning("no comparison: %s: %s; %s", type(error).__name__, clean(error), again, exc_info=True)


if __name__ == "__main__":
    main()
