"""The command `gpt2exp-bench`: times the real training step, a peer's beside it, and the machine's own limits.

Every contestant runs in a process of its own, in turn, so that neither sees the other's memory or threads, and ratios
are taken pair by pair: the machine's drift hits both halves of a pair. Ours is `Trainer.step` on the trainer that a
run builds (`gpt2exp.training.setup`), never a copy.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from gpt2exp.config import BadRequest, RunConfig, plain, require
from gpt2exp.data import tokens
from gpt2exp.data.assets import AssetError
from gpt2exp.model import huggingface
from gpt2exp.run import terminal
from gpt2exp.sweep.composing import arguments
from gpt2exp.sweep.request import as_meant, make
from gpt2exp.training import setup

if TYPE_CHECKING:
    from gpt2exp.data.batches import Batches
    from gpt2exp.training.precision import Precision

UNTIMED = 2
"""First steps of a process that are left out."""
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"),
    "AdamW": ("aten::_fused_adamw_", "Optimizer.step#AdamW.step", "aten::_foreach_add_"),
    "attention": ("aten::_scaled_dot_product", "aten::_efficient_attention", "aten::_flash_attention"),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("aten::native_layer_norm",),
    "softmax and loss": ("aten::exp_", "aten::sub_", "aten::amax", "aten::gather", "aten::scatter", "HeadLoss"),
    "copies and zeros": ("aten::copy_", "aten::fill_", "aten::cat", "aten::zero_"),
    "sums and additions": ("aten::sum", "aten::add", "aten::index_add_", "aten::mul"),
}
"""Operators of a profile by what they are for; the rest is dispatch, autograd and Python."""

Result = dict[str, Any]


class ContestantError(RuntimeError):
    """A process that was to be timed could not be run, failed, or said nothing of use."""


def main() -> None:
    """The console script."""
    sys.exit(command(sys.argv[1:]))


def command(argv: Sequence[str]) -> int:
    """Carry out a command line; 0 done, 1 a contestant failed, 2 a bad request. The last line printed is JSON."""
    parser = _parser()
    args = parser.parse_intermixed_args(argv)  # overrides may follow options
    try:
        config = _compose(args.overrides)
        name, why = config.optimizer.name, "the peers and the floor are timed with AdamW"
        require(name == "adamw", "optimizer", name, why, "leave it out")
        tokens.prepare(config.data)
        setup.check_weights(config.init, config.model)
        if args.child:
            print(json.dumps(CHILDREN[args.child](config, args.steps, args.compile)))
            return 0
        return _bench(config, args, argv)
    except (BadRequest, AssetError, ContestantError) as error:
        terminal.refuse(str(error), program="gpt2exp-bench", trace=terminal.wants_traces())
        return 2 if isinstance(error, BadRequest) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpt2exp-bench",
        description="Time the training step of any configuration, and a peer's beside it.",
        epilog="example: gpt2exp-bench train.batch_size=4 train.seq_len=256 --peer hf --pairs 3 --roofline",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for gpt2exp; none: GPT-2 124M, 4 x 32")
    parser.add_argument("--peer", choices=["hf"], help="transformers' GPT2LMHeadModel with fused AdamW (extra `bench`)")
    parser.add_argument("--compile", action="store_true", help="the peer compiled by torch.compile")
    parser.add_argument(
        "--peer-command", metavar="TEXT", help="any command whose last line is JSON with `ms_median` (and more)"
    )
    parser.add_argument("--peer-name", metavar="TEXT", default="peer", help="what the tables call that command")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="rounds, ours and the peer in turn (3)")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="steps in each process (12)")
    parser.add_argument(
        "--beside", type=int, metavar="N", help="N of ours at once as well: how much longer a step takes"
    )
    parser.add_argument("--verify", action="store_true", help="hold our losses against the plain path's, step by step")
    parser.add_argument("--roofline", action="store_true", help="this machine's own limits, and where the time goes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the JSON to a file as well")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    return parser


def _compose(overrides: Sequence[str]) -> RunConfig:
    request = make(arguments([as_meant(text) for text in overrides]))
    if request.multirun:
        raise BadRequest("gpt2exp-bench times one configuration; give every key one value")
    return request.jobs[0].config


def _bench(config: RunConfig, args: argparse.Namespace, argv: Sequence[str]) -> int:
    if args.steps <= UNTIMED or args.pairs < 1:
        raise BadRequest(f"--steps {args.steps} --pairs {args.pairs}: at least {UNTIMED + 1} steps and one pair")
    if args.beside is not None and args.beside < 2:
        raise BadRequest(f"--beside {args.beside}: at least two at once; one is timed anyway")
    child = [sys.executable, "-m", "gpt2exp.bench", *args.overrides, "--steps", str(args.steps), "--child"]
    contestants = {"gpt2exp": [*child, "ours"]}
    if args.peer:
        contestants["hf, compiled" if args.compile else "hf"] = [*child, "hf", *(["--compile"] if args.compile else [])]
    if args.peer_command:
        contestants[args.peer_name] = shlex.split(args.peer_command)
    rounds, together = [], []
    for _ in range(args.pairs):
        rounds.append({name: _timed(line) for name, line in contestants.items()})
        if args.beside:
            together.append([found["ms_median"] for found in _at_once([*child, "beside"], args.beside)])
    asked = plain(config)
    result: Result = {"command": shlex.join(["gpt2exp-bench", *argv])}
    result |= {"model": asked["model"], "train": asked["train"], "processor": _processor(), "rounds": rounds}
    console = terminal.terminal()
    console.print(_contest(rounds))
    if len(contestants) > 1:
        result["ratios"] = {name: _ratios(rounds, name) for name in contestants if name != "gpt2exp"}
        console.print(_ratio_table(result["ratios"]))
    if args.beside:
        longer = _spread(
            [max(found) / row["gpt2exp"]["ms_median"] for found, row in zip(together, rounds, strict=True)]
        )
        result["beside"] = {"processes": args.beside, "ms_medians": together, "ratio": longer}
        spread = f"{longer['min']:.2f} to {longer['max']:.2f}, {args.pairs} pairs"
        console.print(f"{args.beside} at once: a step takes {longer['median']:.2f} times as long as alone ({spread})")
    if args.verify:
        found, plain_losses = (_timed([*child, name])["losses"] for name in ("ours", "plain"))
        worst = max(abs(one / other - 1) for one, other in zip(found, plain_losses, strict=True))
        result["verified"] = {"steps": len(found), "largest_relative_difference": worst}
        console.print(f"losses of {len(found)} steps are off the plain path's by at most {worst:.1e}, relative")
    if args.roofline:
        roof = _timed([*child, "roofline"])
        best = statistics.median(row["gpt2exp"]["ms_median"] for row in rounds)
        result["roofline"] = roof | {"step_ms": best, "fraction": roof["floor_ms"] / best}
        console.print(_roof_table(result["roofline"]))
    text = json.dumps(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _timed(line: Sequence[str]) -> Result:
    """The JSON on the last line of a command's output, and how long the whole process took, in seconds."""
    start = time.perf_counter()
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ContestantError(f"{shlex.join(line)}: {error.strerror}") from error
    return _said(line, done.returncode, done.stdout, done.stderr) | {"process_seconds": time.perf_counter() - start}


def _at_once(line: Sequence[str], copies: int) -> list[Result]:
    """What as many processes of one command say that begin their steps together, each when it reads a line."""
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as ended:
        processes = []
        for _ in range(copies):
            processes.append(subprocess.Popen(line, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
            ended.callback(processes[-1].kill)
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()  # it is built
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it failed, which its exit code will say
                process.stdin.write("begin\n")
                process.stdin.flush()
        spoken = [process.communicate() for process in processes]
        return [_said(line, process.returncode, *texts) for process, texts in zip(processes, spoken, strict=True)]


def _said(line: Sequence[str], code: int, out: str, err: str) -> Result:
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


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def _ratios(rounds: Sequence[dict[str, Result]], peer: str) -> dict[str, dict[str, float]]:
    """Ours over the peer's, pair by pair: step, whole process, peak memory."""
    ratios = {}
    for key in ("ms_median", "process_seconds", "peak_rss_mib"):
        pairs = [row["gpt2exp"][key] / row[peer][key] for row in rounds if row[peer].get(key)]
        if pairs:
            ratios[key] = _spread(pairs)
    return ratios


def ours(config: RunConfig, steps: int, _: bool, *, begin: Callable[[], Any] = lambda: None) -> Result:
    """Step times of the trainer that a run of `config` builds; `begin` is called before the first."""
    from gpt2exp.training import hardware, precision

    device, source = hardware.resolve_device(config.train.device), tokens.prepare(config.data)
    with precision.applied(config.precision, device) as got:
        config, need = setup.settled(config, device, setup.Hardware.of(device, got), source)
        job, _origin = setup.trainer(config, device, got, source)
        begin()
        done = [job.timed_step() for _ in range(steps)]
    losses, times = [float(loss) for loss, _, _ in done], [seconds * 1e3 for _, seconds, _ in done]
    return _result(losses, times, hardware.peak_memory(device) / 2**20, config) | {"estimated_mib": need / 2**20}


def beside(config: RunConfig, steps: int, _: bool) -> Result:
    """`ours`, which says that it is built and begins when it is told to: see `_at_once`."""
    return ours(config, steps, False, begin=lambda: (print("built", flush=True), sys.stdin.readline()))


def unoptimised(config: RunConfig, steps: int, _: bool) -> Result:
    """The same model on the same batches the plain way: whole logits, dense gradients, AdamW tensor by tensor."""
    import torch

    from gpt2exp.training import hardware, optimizers, precision

    device, source = hardware.resolve_device(config.train.device), tokens.prepare(config.data)
    with precision.applied(config.precision, device) as got:
        config, _need = setup.settled(config, device, setup.Hardware.of(device, got), source)
        job, _origin = setup.trainer(config, device, got, source)
        model = job.model
        model.transformer.gradient_in_place = model.transformer.recompute = False
        rates = config.optimizer
        assert isinstance(rates, optimizers.AdamW)
        groups = optimizers.decay_groups(model, rates.weight_decay)
        betas = (rates.betas[0], rates.betas[1])
        optimizer = torch.optim.AdamW(groups, lr=rates.lr, betas=betas, eps=rates.eps, foreach=False, fused=False)
        step = _plain_step(model, optimizer, job.batches, config.train.grad_accum_steps, got)
        losses, times = _step(step, steps, lambda: hardware.synchronize(device))
    return _result(losses, times, hardware.peak_memory(device) / 2**20, config)


def hf(config: RunConfig, steps: int, compiled: bool) -> Result:
    """Step times of transformers' GPT-2 of the same size on the same batches, eager or compiled."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise BadRequest("--peer hf: transformers is not installed; pip install 'gpt2exp[bench]'") from error
    import torch

    from gpt2exp.data.batches import Batches
    from gpt2exp.training import hardware, precision

    device, source = hardware.resolve_device(config.train.device), tokens.prepare(config.data)
    quiet: Result = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False}
    with precision.applied(config.precision, device) as got, torch.device(device):
        config, _need = setup.settled(config, device, setup.Hardware.of(device, got), source)
        model: Any = GPT2LMHeadModel(GPT2Config(**huggingface.to_hf(config.model), **quiet))
        forward = torch.compile(model) if compiled else model
        (optimizer,) = config.optimizer.build(model)
        batches = Batches(source.map(), config.train, config.data.order, config.seed, device)
        pieces = config.train.grad_accum_steps
        step = _plain_step(lambda x: forward(x).logits, optimizer, batches, pieces, got)
        losses, times = _step(step, steps, lambda: hardware.synchronize(device))
    return _result(losses, times, hardware.peak_memory(device) / 2**20, config)


def _plain_step(
    logits_of: Callable[[Any], Any], optimizer: Any, batches: Batches, pieces: int, got: Precision
) -> Callable[[], Any]:
    """A step as anyone writes it: `pieces` micro-batches through whole logits and their cross-entropy, then AdamW."""
    import torch
    import torch.nn.functional as F

    from gpt2exp.training import precision

    numbers = itertools.count()

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        losses = []
        for _ in range(pieces):
            x, y = batches.at(next(numbers))
            with precision.cast(batches.device, got.autocast):
                logits = logits_of(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)).float(), y.reshape(-1)) / pieces
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        optimizer.step()
        return torch.stack(losses).sum()

    return step


def _step(step: Callable[[], Any], steps: int, synchronize: Callable[[], None]) -> tuple[list[float], list[float]]:
    losses, times = [], []
    for _ in range(steps):
        synchronize()
        start = time.perf_counter()
        loss = step()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        losses.append(float(loss))
    return losses, times


def _result(losses: list[float], times: list[float], peak_mib: float, config: RunConfig) -> Result:
    median = statistics.median(times[UNTIMED:])
    return {
        "ms_median": median,
        "first_ms": times[0],
        "tokens_per_second": config.train.step_tokens / median * 1e3,
        "peak_rss_mib": peak_mib,
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "losses": losses,
    }


def roofline(config: RunConfig, steps: int, _: bool) -> Result:
    """What this machine needs at least for the step: its matrix products alone, warm, and AdamW on one flat tensor.

    `floor_ms` is their sum. `parts` is a profile of real steps, milliseconds a step by kind of operator; the profiler
    slows a step down, so its shares say where time goes, not how much.
    """
    from torch.profiler import ProfilerActivity, profile

    from gpt2exp.training import hardware, precision

    device, source = hardware.resolve_device(config.train.device), tokens.prepare(config.data)
    with precision.applied(config.precision, device) as got:
        config, _need = setup.settled(config, device, setup.Hardware.of(device, got), source)
        job, _origin = setup.trainer(config, device, got, source)
        unprofiled = _step(job.step, UNTIMED + 3, lambda: hardware.synchronize(device))[1]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with profile(activities=activities) as found:
            for _step_number in range(4):
                job.step()
            hardware.synchronize(device)
        events = found.key_averages()
        spent = {event.key: (event.self_cpu_time_total + event.self_device_time_total) / 4e3 for event in events}
        del job
    kinds: dict[str, float] = dict.fromkeys([*KINDS, "dispatch, autograd, Python"], 0.0)
    for name, milliseconds in spent.items():
        matches = (kind for kind, names in KINDS.items() if any(name == n or name.startswith(f"{n}_") for n in names))
        kinds[next(matches, "dispatch, autograd, Python")] += milliseconds
    with precision.applied(config.precision, device):
        products = list(_products(config, device))
        adamw = _adamw(config, device)
    for product in products:
        product["gflops_per_second"] = product["gflop"] / product["ms"] * 1e3
    rate = sum(p["gflop"] for p in products) / sum(p["ms"] for p in products)  # GFLOP per ms
    model, train = config.model, config.train
    # scores and weighted values, the causal half: twice forward, and twice and a half that backward
    attention_gflop = 3.5 * 2 * train.micro_batch_tokens * train.seq_len * model.n_embd * model.n_layer / 1e9
    matmul_ms = sum(product["ms"] for product in products) + attention_gflop / rate
    floor = matmul_ms * train.grad_accum_steps + adamw
    return {
        "ms_median": statistics.median(unprofiled[UNTIMED:]),
        "floor_ms": floor,
        "matmul_ms": matmul_ms,
        "adamw_ms": adamw,
        "adamw_gb_per_second": 28 * model.parameters["total"] / adamw / 1e6,  # reads four, writes three floats
        "products": products,
        "parts": kinds,
    }


def _products(config: RunConfig, device: Any) -> Iterator[Result]:
    """Forward, by-input and by-weight product of each kind of layer, as often as a micro-batch computes it."""
    import torch

    width, rows = config.model.n_embd, config.train.micro_batch_tokens
    head_rows = min(rows, config.train.loss_rows)
    layers = config.model.n_layer
    for name, fan_in, fan_out, n, times in (
        ("c_attn", width, 3 * width, rows, layers),
        ("attn.c_proj", width, width, rows, layers),
        ("c_fc", width, 4 * width, rows, layers),
        ("mlp.c_proj", 4 * width, width, rows, layers),
        ("lm_head", width, config.model.vocab_size, head_rows, rows / head_rows),
    ):
        x, w, g = (torch.randn(*shape, device=device) for shape in ((n, fan_in), (fan_out, fan_in), (n, fan_out)))
        y, by_x, by_w = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
        for part, left, right, out in (
            ("forward", x, w.t(), y),
            ("by input", g, w, by_x),
            ("by weight", g.t(), x, by_w),
        ):
            milliseconds = _best(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), device)  # type: ignore[misc]
            gflop = 2 * n * fan_in * fan_out / 1e9
            yield {"layer": name, "part": part, "times": times, "ms": milliseconds * times, "gflop": gflop * times}


def _adamw(config: RunConfig, device: Any) -> float:
    import torch

    flat = torch.nn.Parameter(torch.zeros(config.model.parameters["total"], device=device))
    flat.grad = torch.ones_like(flat)
    optimizer = torch.optim.AdamW([flat], fused=True)
    return _best(optimizer.step, device)


def _best(call: Callable[[], Any], device: Any, repeats: int = 7) -> float:
    """Median milliseconds of a call that has been made before."""
    from gpt2exp.training import hardware

    call()
    times = []
    for _ in range(repeats):
        hardware.synchronize(device)
        start = time.perf_counter()
        call()
        hardware.synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


CHILDREN: dict[str, Callable[[RunConfig, int, bool], Result]] = {
    "ours": ours,
    "beside": beside,
    "plain": unoptimised,
    "hf": hf,
    "roofline": roofline,
}


def _processor() -> str:
    import torch

    from gpt2exp.training import hardware

    cpu = torch.device("cpu")
    return f"{hardware.device_name(cpu)}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _contest(rounds: Sequence[dict[str, Result]]) -> Table:
    table = _table("", "step ms, median of medians", "lowest to highest", "first step ms", "process s", "peak MiB")
    for name in rounds[0]:
        rows = [row[name] for row in rounds]
        steps, first = _spread([row["ms_median"] for row in rows]), statistics.median(r["first_ms"] for r in rows)
        seconds = statistics.median(row["process_seconds"] for row in rows)
        peak = statistics.median(row["peak_rss_mib"] or 0 for row in rows)
        spread = f"{steps['min']:.1f} to {steps['max']:.1f}"
        table.add_row(name, f"{steps['median']:.1f}", spread, f"{first:.0f}", f"{seconds:.1f}", f"{peak:.0f}")
    return table


def _ratio_table(ratios: dict[str, dict[str, dict[str, float]]]) -> Table:
    table = _table("gpt2exp over", "figure", "ratio, median of pairs", "lowest to highest", "pairs")
    names = {"ms_median": "step time", "process_seconds": "whole process", "peak_rss_mib": "peak memory"}
    for peer, figures in ratios.items():
        for key, ratio in figures.items():
            spread = f"{ratio['min']:.3f} to {ratio['max']:.3f}"
            table.add_row(peer, names[key], f"{ratio['median']:.3f}", spread, f"{ratio['n']:.0f}")
    return table


def _roof_table(roof: Result) -> Table:
    table = _table("limit of this machine", "ms", "")
    rate = sum(p["gflop"] for p in roof["products"]) / sum(p["ms"] for p in roof["products"]) * 1e3
    table.add_row("matrix products alone", f"{roof['matmul_ms']:.1f}", f"{rate:,.0f} GFLOP/s")
    table.add_row("AdamW on one flat tensor", f"{roof['adamw_ms']:.1f}", f"{roof['adamw_gb_per_second']:.0f} GB/s")
    table.add_row("floor", f"{roof['floor_ms']:.1f}", f"the step is at {roof['fraction']:.2f} of it")
    total = sum(roof["parts"].values())
    for kind, milliseconds in sorted(roof["parts"].items(), key=lambda item: -item[1]):
        table.add_row(f"  profiled: {kind}", f"{milliseconds:.1f}", f"{milliseconds / total:.1%}")
    return table


if __name__ == "__main__":
    main()
