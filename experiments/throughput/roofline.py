"""The training step against this machine's own limits: `python experiments/throughput/roofline.py KEY=VALUE ...`.

The floor is the step's matrix products alone, on warm operands, plus AdamW on one flat tensor. A profile of real steps
shows where the time goes; the profiler slows a step, so its rows are shares. `--bench FILE` adds the result to what
`gpt2exp-bench --out FILE` wrote for the same configuration and takes the step's time from there; else the step is timed
first. `--verify` holds the losses of our step against those of the plain way to write it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2exp import bench
from gpt2exp.bench import Result
from gpt2exp.config import RunConfig
from gpt2exp.model import size
from gpt2exp.run import process, terminal
from gpt2exp.training import optimizers, setup

PROFILED = 4
"""Steps under the profiler."""

REST = "dispatch, autograd, Python"

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_", "mkldnn"),
    "AdamW": ("aten::_fused_adamw_", "Optimizer.step#AdamW.step", "aten::_foreach_add_"),
    "attention": ("aten::_scaled_dot_product", "aten::_efficient_attention", "aten::_flash_attention"),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("aten::native_layer_norm",),
    "softmax and loss": ("aten::exp_", "aten::sub_", "aten::amax", "aten::gather", "aten::scatter", "HeadLoss"),
    "copies and zeros": ("aten::copy_", "aten::fill_", "aten::cat", "aten::zero_"),
    "sums and additions": ("aten::sum", "aten::add", "aten::index_add_", "aten::mul"),
}
"""Operators of a profile by what they are for; all others are `REST`."""


def main(argv: Sequence[str]) -> int:
    """Carry out a command line; the last line printed is JSON."""
    parser = process.parser("roofline.py", "The training step against this machine's limits.", "train.seq_len=256")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for gpt2exp; none: GPT-2 124M, 4 x 32")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="steps that are timed (12)")
    parser.add_argument("--verify", action="store_true", help="hold our losses against the plain path's, step by step")
    parser.add_argument("--bench", type=Path, metavar="FILE", help="add the result to this file of gpt2exp-bench --out")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)  # the process that --verify starts

    def measure() -> None:
        args = parser.parse_intermixed_args(argv)
        config = bench.asked_for(args.overrides)
        if args.plain:
            return bench.print_result(plain(config, args.steps), None)
        result = json.loads(args.bench.read_text(encoding="utf-8")) if args.bench else {}
        result = result or bench.facts(config, ["roofline.py", *argv])
        if "rounds" not in result or args.verify:
            ours = bench.timed(bench.child(args.overrides, args.steps, "ours"))
            result.setdefault("rounds", [{"gpt2exp": ours}])
        if args.verify:
            line = [sys.executable, __file__, *args.overrides, "--steps", str(args.steps), "--plain"]
            result["verified"] = verified(ours["losses"], bench.timed(line)["losses"])
        step_ms = statistics.median(row["gpt2exp"]["ms_median"] for row in result["rounds"])
        roof = roofline(config)
        result["roofline"] = roof | {"step_ms": step_ms, "fraction": roof["floor_ms"] / step_ms}
        terminal.terminal().print(table(result["roofline"]))
        return bench.print_result(result, args.bench)

    return process.carry_out("roofline.py", measure)


def verified(ours: Sequence[float], plain: Sequence[float]) -> Result:
    """How far the losses of our step are off the plain path's."""
    worst = max(abs(one / other - 1) for one, other in zip(ours, plain, strict=True))
    print(f"losses of {len(ours)} steps are off the plain path's by at most {worst:.1e}, relative")
    return {"steps": len(ours), "largest_relative_difference": worst}


def plain(config: RunConfig, steps: int) -> Result:
    """The same model on the same batches the plain way: whole logits, dense gradients, AdamW tensor by tensor."""
    import torch

    with setup.ready(config) as ready:
        job, _origin = setup.trainer(ready)
        model, rates = job.model, config.optimizer
        model.transformer.gradient_in_place = model.transformer.recompute = False
        assert isinstance(rates, optimizers.AdamW)
        groups = optimizers.decay_groups(model, rates.weight_decay)
        betas = (rates.betas[0], rates.betas[1])
        optimizer = torch.optim.AdamW(groups, lr=rates.lr, betas=betas, eps=rates.eps, foreach=False, fused=False)
        return bench.plain_steps(ready, model, optimizer, steps)


def roofline(config: RunConfig) -> Result:
    """What this machine needs at least for the step (`floor_ms`), and a profile of it in milliseconds a step."""
    with setup.ready(config) as ready:
        config, device = ready.config, ready.device
        parts = profiled(setup.trainer(ready)[0], device)
        products = list(matrix_products(config, device))
        adamw = adamw_ms(config, device)
    for product in products:
        product["gflops_per_second"] = product["gflop"] / product["ms"] * 1e3
    rate = sum(p["gflop"] for p in products) / sum(p["ms"] for p in products)  # GFLOP per ms
    model, train = config.model, config.train
    # scores and weighted values, the causal half: twice forward, and twice and a half that backward
    attention_gflop = 3.5 * 2 * train.micro_batch_tokens * train.seq_len * model.n_embd * model.n_layer / 1e9
    matmul = sum(product["ms"] for product in products) + attention_gflop / rate
    return {
        "floor_ms": matmul * train.grad_accum_steps + adamw,
        "matmul_ms": matmul,
        "adamw_ms": adamw,
        "adamw_gb_per_second": 28 * size.parameters(model)["total"] / adamw / 1e6,  # reads four, writes three floats
        "products": products,
        "parts": parts,
    }


def profiled(job: Any, device: Any) -> dict[str, float]:
    """Milliseconds a step by kind of operator."""
    from torch.profiler import ProfilerActivity, profile

    bench.timed_calls(job.step, bench.UNTIMED + 3, device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as found:
        bench.timed_calls(job.step, PROFILED, device)
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for event in found.key_averages():
        name = event.key
        meant = (kind for kind, names in KINDS.items() if any(re.match(rf"{n}(_|::|$)", name) for n in names))
        kinds[next(meant, REST)] += (event.self_cpu_time_total + event.self_device_time_total) / PROFILED / 1e3
    return kinds


def matrix_products(config: RunConfig, device: Any) -> Iterator[Result]:
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
        for part, left, right in (("forward", x, w.t()), ("by input", g, w), ("by weight", g.t(), x)):
            milliseconds = warm_ms(lambda a=left, b=right: torch.mm(a, b), device)
            gflop = 2 * n * fan_in * fan_out / 1e9
            yield {"layer": name, "part": part, "times": times, "ms": milliseconds * times, "gflop": gflop * times}


def adamw_ms(config: RunConfig, device: Any) -> float:
    """AdamW on one tensor with as many numbers as the model."""
    import torch

    flat = torch.nn.Parameter(torch.zeros(size.parameters(config.model)["total"], device=device))
    flat.grad = torch.ones_like(flat)
    return warm_ms(torch.optim.AdamW([flat], fused=True).step, device)


def warm_ms(call: Callable[[], Any], device: Any) -> float:
    """The fewest milliseconds of several calls: the first ones fill caches, and pages that were not in use."""
    return min(bench.timed_calls(call, 12, device)[1])


def table(roof: Result) -> Any:
    """The limits, and the profile's shares."""
    rate = sum(p["gflop"] for p in roof["products"]) / sum(p["ms"] for p in roof["products"]) * 1e3
    rows = [
        ("matrix products alone", roof["matmul_ms"], f"{rate:,.0f} GFLOP/s"),
        ("AdamW on one flat tensor", roof["adamw_ms"], f"{roof['adamw_gb_per_second']:.0f} GB/s"),
        ("floor", roof["floor_ms"], f"the step is at {roof['fraction']:.2f} of it"),
    ]
    total = sum(roof["parts"].values())
    for kind, ms in sorted(roof["parts"].items(), key=lambda item: -item[1]):
        rows.append((f"  profiled: {kind}", ms, f"{ms / total:.1%}"))
    return terminal.table([{"limit of this machine": name, "ms": f"{ms:.1f}", "": what} for name, ms, what in rows])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
