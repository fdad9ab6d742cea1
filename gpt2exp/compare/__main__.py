"""The command `gpt2exp-compare`: compare the runs below a folder and write the comparison."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2exp.compare import index, report, words
from gpt2exp.compare.comparison import Comparison, read
from gpt2exp.compare.report import Drawing, mirror, show
from gpt2exp.compare.stopping import compared
from gpt2exp.files import replacing, write_json
from gpt2exp.run import process
from gpt2exp.run.terminal import pasted, printable, short, terminal
from gpt2exp.section import BadRequest

if TYPE_CHECKING:
    from rich.console import Console


log = logging.getLogger("gpt2exp")


def main() -> None:
    """The console script `gpt2exp-compare`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Carry out a command line; for the exit code see `process.carry_out`."""
    parser = process.parser(
        "gpt2exp-compare",
        "Compare the runs under one or more run or sweep folders, finished or not, and write comparison.json, "
        "comparison.csv, report.md and report.html. In them, compute above 1 says that an arm is worth that many times "
        "the baseline's compute.",
        "sweeps/2026-01-31/12-00-00-abcd --margin 0.01",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run or sweep folder, or one above")
    parser.add_argument("--margin", type=float, help="loss differences inside ±MARGIN nats count as none")
    parser.add_argument("--out", type=Path, help="where to write (default: the first DIR)")
    parser.add_argument(
        "--index",
        action="store_true",
        help="compare nothing, but list what the comparisons below each DIR found: index.md, index.html, index.csv",
    )

    def carry_out() -> None:
        args = parser.parse_args(argv)
        if args.margin is not None and not (math.isfinite(args.margin) and args.margin > 0):
            raise BadRequest(f"--margin {args.margin}: must be a number of nats above 0; try --margin 0.01")
        out = args.out or args.folders[0]
        if args.index:
            if args.margin is not None:
                raise BadRequest("--margin: --index compares nothing; leave it out")
            with process.writing("cannot write the index", "name a folder with --out"):
                terminal().print(write_index(args.folders, out), markup=False, soft_wrap=True)
            return
        comparison = compared(read(args.folders), margin=args.margin, out=out)
        with process.writing("cannot write the comparison", "name a folder with --out"):
            write(comparison, out)
        show(comparison, terminal(), out)

    return process.carry_out("gpt2exp-compare", carry_out)


def write(comparison: Comparison, out: Path) -> list[Drawing]:
    """Write `comparison.json`, `comparison.csv`, `report.md`, `report.html` and `figures/`; returns the drawings."""
    out.mkdir(parents=True, exist_ok=True)
    from gpt2exp.compare import figures  # imports matplotlib, which takes half a second

    drawings = figures.draw(comparison)
    text = report.markdown(comparison, out, drawings)
    write_json(out / "comparison.json", report.finite(comparison.as_dict()))
    _write(out / "comparison.csv", report.table(comparison))
    for drawing in drawings:
        _write(out / "figures" / f"{drawing.name}.png", drawing.png)
    _write(out / "report.md", text)
    _write(out / "report.html", report.page(text, words.title(comparison), out, drawings))
    return drawings


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def write_index(folders: Sequence[Path], out: Path) -> str:
    """Write `index.md`, `index.html` and `index.csv` of the comparisons below some folders; returns what to print.

    Raises:
        BadRequest: as `index.below`.
    """
    found, unread = index.below(folders)
    text = index.page(found, unread, out)
    _write(out / "index.csv", index.as_csv(found, out))
    _write(out / "index.md", text)
    _write(out / "index.html", report.page(text, "Findings", out))
    place = printable(short((out / "index.html").absolute()))
    return "\n".join([*(f"note: {printable(line)}" for line in unread), f"{len(found)} arms: {place}"])


def conclude(sweep: Path, console: Console) -> Path | None:
    """Compare the runs of a sweep; write the report, print it and send it to wandb. Returns what `mirror` returns.

    A failure is one warning: the runs are done and recorded, and the sweep's exit code depends on them alone.
    """
    again = f"{pasted('gpt2exp-compare', sweep.absolute())} tries again"
    try:
        comparison = compared(read([sweep]))
        drawings = write(comparison, sweep)
        show(comparison, console, sweep, failed=False)
        return mirror(comparison, sweep, drawings)
    except Exception as error:
        expected = isinstance(error, (BadRequest, OSError))
        why = printable(error if expected else f"{type(error).__name__}: {error}")
        log.warning("no comparison: %s; %s", why, again, exc_info=not expected)
    return None


if __name__ == "__main__":
    main()
