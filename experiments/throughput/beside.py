"""How much longer a step takes beside other runs: `python experiments/throughput/beside.py 2 KEY=VALUE ...`.

In each round the step is timed alone and in several processes at once, which begin together.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2exp import bench
from gpt2exp.bench import Result
from gpt2exp.run import process
from gpt2exp.section import BadRequest


def main(argv: Sequence[str]) -> int:
    """Carry out a command line; the last line printed is JSON."""
    parser = process.parser("beside.py", "Time the training step alone, and in several processes at once.", "2")
    parser.add_argument("processes", type=int, metavar="N", help="how many at once")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for gpt2exp; none: GPT-2 124M, 4 x 32")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="rounds (3)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="steps in each process (12)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to a file as well")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)

    def measure() -> None:
        args = parser.parse_intermixed_args(argv)
        config = bench.asked_for(args.overrides)
        if args.child:
            return bench.print_result(bench.ours(config, args, when_told), None)
        if args.processes < 2 or args.pairs < 1 or args.steps <= bench.UNTIMED:
            least = f"at least two processes, one pair and {bench.UNTIMED + 1} steps"
            raise BadRequest(f"{args.processes} --pairs {args.pairs} --steps {args.steps}: {least}")
        line = [sys.executable, __file__, "2", *args.overrides, "--steps", str(args.steps), "--child"]
        alone, together = [], []
        for _ in range(args.pairs):
            alone.append(bench.timed(bench.child(args.overrides, args.steps, "ours"))["ms_median"])
            together.append([found["ms_median"] for found in at_once(line, args.processes)])
        ratio = bench.spread([max(several) / one for several, one in zip(together, alone, strict=True)])
        range_ = f"{ratio['min']:.2f} to {ratio['max']:.2f}, {args.pairs} pairs"
        print(f"{args.processes} at once: a step takes {ratio['median']:.2f} times as long as alone ({range_})")
        figures = {"processes": args.processes, "alone": alone, "ms_medians": together, "ratio": ratio}
        return bench.print_result(bench.facts(config, ["beside.py", *argv]) | figures, args.out)

    return process.carry_out("beside.py", measure)


def when_told() -> None:
    """Say that the trainer is built, and wait for the line by which all begin."""
    print("built", flush=True)
    sys.stdin.readline()


def at_once(line: Sequence[str], copies: int) -> list[Result]:
    """The results of several processes of one command, all of which wait for a line before they begin their steps."""
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as ended:
        started = []
        for _ in range(copies):
            started.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
            ended.callback(started[-1].kill)
        for each in started:
            assert each.stdout is not None
            each.stdout.readline()  # it is built
        for each in started:
            assert each.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it failed, which its exit code will say
                each.stdin.write("begin\n")
                each.stdin.flush()
        texts = [each.communicate() for each in started]
        return [bench.printed(line, each.returncode, *of) for each, of in zip(started, texts, strict=True)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
