"""The command `gpt2exp-compare`: compare the runs below a folder and write what came of it."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2exp.compare import report
from gpt2exp.compare.comparison import Comparison, compare, read
from gpt2exp.config import BadRequest
from gpt2exp.files import replacing, write_json
from gpt2exp.run import terminal
from gpt2exp.run.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("gpt2exp")


def main() -> None:
    """The console script `gpt2exp-compare`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Compare the runs under the folders named; exit code 0, or 2 for a bad request."""
    from gpt2exp.run import process

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
        out = args.out or args.folders[0]
        comparison = compare(read(args.folders), margin=args.margin, out=out)
        write(comparison, out)
    except (BadRequest, OSError) as problem:
        why = str(problem)
        if isinstance(problem, OSError):
            why = f"cannot write the comparison ({problem.strerror or problem}); name a folder with --out"
        terminal.refuse(why, program="gpt2exp-compare", trace=full_error)
        return 2
    report.show(comparison, terminal.terminal(), out)
    return 0


def write(comparison: Comparison, out: Path) -> list[report.Section]:
    """`comparison.json`, `comparison.csv`, `report.md`, `report.html` and `figures/` in the folder, each file whole.

    Returns what was drawn.
    """
    out.mkdir(parents=True, exist_ok=True)
    from gpt2exp.compare import figures  # with matplotlib: half a second

    sections = figures.draw(comparison)
    write_json(out / "comparison.json", report.finite(comparison.as_dict()))
    text = report.markdown(comparison, out, sections)
    files = {f"figures/{item.name}.png": item.png for section in sections for item in section.drawings}
    files["comparison.csv"] = report.table(comparison).encode()
    files["report.md"] = text.encode()
    files["report.html"] = report.page(text, comparison, out, sections).encode()
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        with replacing(out / name) as part:
            part.write_bytes(content)
    return sections


def conclude(sweep: Path, console: Console) -> Path | None:
    """Compare a sweep's runs, write, show and mirror the report; after a line of warning instead, if that fails.

    The runs are done and recorded by then, so no failure here may change what the sweep's command says of them; it
    says itself which runs failed. Returns wandb's folder to upload, as `report.mirror`.
    """
    again = f"{terminal.pasted('gpt2exp-compare', sweep.absolute())} tries again"
    try:
        comparison = compare(read([sweep]))
        sections = write(comparison, sweep)
        report.show(comparison, console, sweep, failed=False)
        return report.mirror(comparison, sweep, sections)
    except (BadRequest, OSError) as error:
        log.warning("no comparison: %s; %s", printable(error), again)
    except Exception as error:
        log.warning("no comparison: %s: %s; %s", type(error).__name__, printable(error), again, exc_info=True)
    return None


if __name__ == "__main__":
    main()
