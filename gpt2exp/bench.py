"""The command `gpt2exp-bench`: times the real training step, and a peer's.

Each contestant runs in a process of its own, so that they share no memory and no threads. They take turns, and ratios
are taken pair by pair, so that the machine's drift affects both of a pair. Ours is `Trainer.step` on the trainer that a
run builds. `experiments/throughput/` uses parts of this module to measure the machine's limits and runs side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2exp.config import ProductLibrary, RunConfig
from gpt2exp.data import tokens
from gpt2exp.model import huggingface
from gpt2exp.run import process, terminal
from gpt2exp.schema import plain
from gpt2exp.section import BadRequest, require
from gpt2exp.sweep.composing import arguments
from gpt2exp.sweep.overrides import as_meant
from gpt2exp.sweep.request import new_request
from gpt2exp.training import setup

if TYPE_CHECKING:
    import torch


UNTIMED = 2  # first steps of a process that are left out
PEAK = "peak_rss_mib"
COMPARED = {"ms_median": "step time", "process_seconds": "whole process", PEAK: "peak memory"}  # compared as ratios
Result = dict[str, Any]


class ContestantError(OSError):
    """A process to be timed could not be started, failed, or printed no result (exit code 1)."""


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    """The console script."""
    sys.exit(command(sys.argv[1:]))


def command(argv: Sequence[str]) -> int:
    """Carry out a command line; for the exit code see `process.carry_out`. The last line printed is JSON."""
    parser = _parser()

    def bench() -> None:
        args = parser.parse_intermixed_args(argv)  # overrides may follow options
        config = asked_for(args.overrides)
        result = CHILDREN[args.child](config, args) if args.child else _bench(config, args, argv)
        print_result(result, args.out)

    return process.carry_out("gpt2exp-bench", bench)


def print_result(result: Result, out: Path | None) -> None:
    """Print a result as JSON, the last line of output, and write it to the file `out` too if there is one."""
    text = json.dumps(result)
    if out:
        with process.writing(f"--out {out}: cannot be written", "name another file"):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
    print(text)


def _parser() -> argparse.ArgumentParser:
    what = "Time the training step of any configuration, and a peer's beside it."
    parser = process.parser("gpt2exp-bench", what, "train.batch_size=4 train.seq_len=256 --peer hf --pairs 3")
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as for gpt2exp; none: GPT-2 124M, 4 x 32")
    add("--peer", choices=["hf"], help="transformers' GPT2LMHeadModel with fused AdamW (extra `bench`)")
    add("--compile", action="store_true", help="the peer compiled by torch.compile")
    add("--peer-command", metavar="TEXT", help="any command whose last line is JSON with `ms_median` (and more)")
    add("--peer-name", metavar="TEXT", default="peer", help="what the tables call that command")
    add("--pairs", type=int, default=3, metavar="N", help="rounds, ours and the peer in turn (3)")
    add("--steps", type=int, default=12, metavar="N", help="steps in each process (12)")
    add("--out", type=Path, metavar="FILE", help="the JSON to a file as well")
    add("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    return parser


def asked_for(overrides: Sequence[str]) -> RunConfig:
    """The configuration that a command line asks for, its text tokenised; `BadRequest` if it is wrong, or several."""
    request = new_request(arguments([as_meant(text) for text in overrides]))
    if request.multirun:
        raise BadRequest("gpt2exp-bench times one configuration; give every key one value")
    config = request.jobs[0].config
    name, why = config.optimizer.name, "the peers and the floor are timed with AdamW"
    require(name == "adamw", "optimizer", name, why, "leave it out")
    tokens.prepare(config.data)
    setup.check_weights(config.init, config.model)
    return config


def _bench(config: RunConfig, args: argparse.Namespace, argv: Sequence[str]) -> Result:
    if args.steps <= UNTIMED or args.pairs < 1:
        raise BadRequest(f"--steps {args.steps} --pairs {args.pairs}: at least {UNTIMED + 1} steps and one pair")
    contestants = {"gpt2exp": child(args.overrides, args.steps, "ours")}
    if args.peer:
        hf = child(args.overrides, args.steps, "hf")
        contestants["hf, compiled" if args.compile else "hf"] = [*hf, *(["--compile"] if args.compile else [])]
    if args.peer_command:
        contestants[args.peer_name] = shlex.split(args.peer_command)
    rounds = [{name: timed(line) for name, line in contestants.items()} for _ in range(args.pairs)]
    result = facts(config, ["gpt2exp-bench", *argv]) | {"rounds": rounds}
    console = terminal.terminal()
    console.print(terminal.table([_figures(name, [row[name] for row in rounds]) for name in contestants]))
    if len(contestants) > 1:
        result["ratios"] = {name: _ratios(rounds, name) for name in contestants if name != "gpt2exp"}
        rows = [_ratio_row(name, *one) for name, figures in result["ratios"].items() for one in figures.items()]
        console.print(terminal.table(rows))
    return result


def facts(config: RunConfig, words: Sequence[str]) -> Result:
    """What is measured, and on which processor."""
    import torch

    from gpt2exp.training import hardware

    processor = f"{hardware.device_name(torch.device('cpu'))}, {torch.backends.cpu.get_cpu_capability()}"
    asked = {key: value for key, value in plain(config).items() if key in ("model", "train")}
    return {"command": shlex.join(words), **asked, "processor": f"{processor}, {torch.get_num_threads()} threads"}


# --- processes -------------------------------------------------------------------------------------------------------


def child(overrides: Sequence[str], steps: int, which: str) -> list[str]:
    """The command line of a process that carries out one of `CHILDREN`."""
    return [sys.executable, "-m", "gpt2exp.bench", *overrides, "--steps", str(steps), "--child", which]


def timed(line: Sequence[str]) -> Result:
    """Run a command; returns the JSON on the last line of its output, and the seconds that the process took."""
    start = time.perf_counter()
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ContestantError(f"{shlex.join(line)}: {error.strerror}") from error
    return printed(line, done.returncode, done.stdout, done.stderr) | {"process_seconds": time.perf_counter() - start}


def printed(line: Sequence[str], code: int, out: str, err: str) -> Result:
    """The JSON on the last line of a command's output."""
    if code != 0:
        last = err.strip().splitlines() or [f"exit code {code}"]
        raise ContestantError(f"{shlex.join(line)}: {last[-1]}")
    try:
        result: Result = json.loads(out.strip().splitlines()[-1])
        return {"first_ms": 0.0, "peak_rss_mib": None, **result, "ms_median": result["ms_median"]}
    except (ValueError, IndexError, KeyError, TypeError) as error:
        why = "its last line of output is no JSON object with `ms_median`"
        raise ContestantError(f"{shlex.join(line)}: {why}") from error


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median and the range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def _ratios(rounds: Sequence[Mapping[str, Result]], peer: str) -> dict[str, dict[str, float]]:
    """Ours over the peer's, pair by pair: step, whole process, peak memory."""
    pairs = {key: [row["gpt2exp"][key] / row[peer][key] for row in rounds if row[peer].get(key)] for key in COMPARED}
    return {key: spread(ratios) for key, ratios in pairs.items() if ratios}


# --- what a process does ---------------------------------------------------------------------------------------------


def ours(config: RunConfig, args: argparse.Namespace, begin: Callable[[], object] = lambda: None) -> Result:
    """Step times of the trainer that a run of `config` builds; `begin` is called once it is built."""
    with setup.ready(config) as ready:
        trainer, _origin = setup.trainer(ready)
        begin()
        done = [trainer.timed_step() for _ in range(args.steps)]
        losses, times = [float(loss) for loss, *_ in done], [seconds * 1e3 for _, seconds, *_ in done]
        return result_of(losses, times, ready.config, ready.device) | {"estimated_mib": ready.need / 2**20}


def hf(config: RunConfig, args: argparse.Namespace) -> Result:
    """Step times of transformers' GPT-2 of the same size on the same batches, eager or compiled."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise BadRequest("--peer hf: transformers is not installed; pip install 'gpt2exp[bench]'") from error
    import torch

    config = replace(config, precision=replace(config.precision, library=ProductLibrary.torch))  # as users of it have
    quiet: Result = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    with setup.ready(config) as ready, torch.device(ready.device):
        model: Any = GPT2LMHeadModel(GPT2Config(**huggingface.to_hf(config.model), **quiet))
        forward = torch.compile(model) if args.compile else model
        (optimizer,) = config.optimizer.build(model)
        return plain_steps(ready, lambda x: forward(x).logits, optimizer, args.steps)


def plain_steps(ready: setup.Ready, logits_of: Callable[[Any], Any], optimizer: Any, steps: int) -> Result:
    """Step times of the plain way: whole logits and their cross-entropy for each micro-batch, then the optimizer."""
    import torch.nn.functional as F

    from gpt2exp.data.batches import Windows
    from gpt2exp.training import precision

    config, device = ready.config, ready.device
    windows = Windows(ready.source.map(), config.train, config.data, config.seed, device)
    pieces, numbers = config.train.grad_accum_steps, itertools.count()

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        total: Any = 0.0
        for _ in range(pieces):
            x, y = windows.train(next(numbers))
            with precision.cast(device, ready.got.autocast):
                logits = logits_of(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), y.reshape(-1)) / pieces
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        optimizer.step()
        return total

    losses, times = timed_calls(step, steps, device)
    return result_of([float(loss) for loss in losses], times, config, device)


def timed_calls(call: Callable[[], Any], repeats: int, device: torch.device) -> tuple[list[Any], list[float]]:
    """Call a function repeatedly; returns its results and its times in ms, the device synchronised before and after."""
    from gpt2exp.training import hardware

    found, times = [], []
    for _ in range(repeats):
        hardware.synchronize(device)
        start = time.perf_counter()
        found.append(call())
        hardware.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return found, times


def result_of(losses: list[float], times: list[float], config: RunConfig, device: torch.device) -> Result:
    """The result that a timed process prints."""
    from gpt2exp.training import hardware

    median = statistics.median(times[UNTIMED:])
    return {
        "ms_median": median,
        "first_ms": times[0],
        "tokens_per_second": config.train.step_tokens / median * 1e3,
        "peak_rss_mib": hardware.peak_memory(device) / 2**20,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "losses": losses,
    }


CHILDREN = {"ours": ours, "hf": hf}


# --- tables ----------------------------------------------------------------------------------------------------------


def _figures(name: str, rows: Sequence[Result]) -> dict[str, str]:
    """A contestant's row: the medians of its rounds."""
    ms = spread([row["ms_median"] for row in rows])
    median = {key: statistics.median(row[key] or 0 for row in rows) for key in ("first_ms", "process_seconds", PEAK)}
    return {
        "": name,
        "step ms, median of medians": f"{ms['median']:.1f}",
        "lowest to highest": f"{ms['min']:.1f} to {ms['max']:.1f}",
        "first step ms": f"{median['first_ms']:.0f}",
        "process s": f"{median['process_seconds']:.1f}",
        "peak MiB": f"{median[PEAK]:.0f}",
    }


def _ratio_row(peer: str, key: str, ratio: Mapping[str, float]) -> dict[str, str]:
    return {
        "gpt2exp over": peer,
        "figure": COMPARED[key],
        "ratio, median of pairs": f"{ratio['median']:.3f}",
        "lowest to highest": f"{ratio['min']:.3f} to {ratio['max']:.3f}",
        "pairs": f"{ratio['n']:.0f}",
    }


if __name__ == "__main__":
    main()
