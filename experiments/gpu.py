"""All that needs a GPU, in one command: `python experiments/gpu.py`, meant to take under ten minutes on one H100.

It runs the tests marked `gpu`, asks whether the card crops or rounds to TF32, times the loss, runs the precision and
throughput studies and `gpt2exp-bench` at the tutorial's 16 x 1024, and writes `experiments/gpu/`: `results.json`, a CSV
a study, and a page that shows each of `scaling/announced.csv`'s predictions beside its measurement. Then it rewrites
the table of claims. A stage for which no time is left is not run, and the page says so; `--only STAGE ...` runs some
and keeps what the folder has of the others. `--rehearse` runs every line at a tiny scale on the CPU, into a temporary
folder.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

import claims  # noqa: E402
import publish  # noqa: E402

from gpt2exp.compare import report  # noqa: E402
from gpt2exp.compare.comparison import read  # noqa: E402
from gpt2exp.compare.stopping import compared  # noqa: E402
from gpt2exp.config import LOSS_ROWS, PrecisionConfig, PrecisionName, Rounding  # noqa: E402
from gpt2exp.files import write_json  # noqa: E402
from gpt2exp.model.loss import HeadLoss  # noqa: E402
from gpt2exp.run import record  # noqa: E402
from gpt2exp.training import hardware, precision  # noqa: E402

Result = dict[str, Any]


# --- how much is run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """What differs between the run on a card and its rehearsal."""

    device: str
    tests: tuple[str, ...]
    """What pytest is asked for."""
    size: tuple[str, ...]
    """Overrides of every study and of the bench."""
    precision: tuple[str, ...]
    throughput: tuple[str, ...]
    benches: tuple[tuple[str, bool], ...]
    """Precision, and whether both contestants are compiled."""
    pairs: int
    steps: int
    """Of a process of the bench."""
    loss: tuple[int, int, int]
    """Tokens, width and vocabulary at which the loss is timed."""
    environment: dict[str, str] = field(default_factory=dict)


FULL = Scale(
    device="cuda",
    tests=("-m", "gpu"),
    size=("model=gpt2", "train.batch_size=16", "train.seq_len=1024"),
    precision=("precision=fp32,tf32,bf16", "seed=range(1,6)", "train.steps=50"),
    throughput=("train.batch_size=16,17,8,24", "precision=tf32", "seed=range(1,4)", "train.steps=20"),
    benches=(("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True), ("tf32", True)),
    pairs=2,
    steps=12,
    loss=(16 * 1024, 768, 50257),
)
TINY = ("model=nano", "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "train.batch_size=2", "train.seq_len=16")
REHEARSAL = Scale(
    device="cpu",
    tests=("-m", "not gpu and not slow", "-k", "rounding"),
    size=TINY,
    precision=("precision=fp32,tf32", "seed=1,2", "train.steps=2", "data.val_fraction=0.002"),
    throughput=("train.batch_size=16,17", "seed=1,2", "train.steps=2"),
    benches=(("fp32", True),),
    pairs=1,
    steps=3,
    loss=(64, 16, 211),
    environment={"TORCHDYNAMO_DISABLE": "1"},  # torch.compile then returns what it is given: no half minute of g++
)


@dataclass
class Session:
    """A run of this script."""

    scale: Scale
    work: Path
    """For what the stages leave and nobody keeps."""
    out: Path
    ends: float
    """`time.monotonic()` at which the last process is stopped."""
    peer: Sequence[str] = ()
    """Options of `gpt2exp-bench` for a peer of the caller's."""

    def run(self, *line: str) -> subprocess.CompletedProcess[str]:
        """A command to its end; with all it started it is ended when the time is over.

        Raises:
            subprocess.TimeoutExpired: that was the case.
        """
        words, pipe = [sys.executable, *line], subprocess.PIPE
        env = {**os.environ, **self.scale.environment}
        group = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)
        try:
            out, err = group.communicate(timeout=max(0.0, self.ends - time.monotonic()))
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
            group.communicate()
            raise
        return subprocess.CompletedProcess(words, group.returncode, out, err)

    def must(self, *line: str) -> None:
        """The same of a command that has to succeed.

        Raises:
            RuntimeError: it did not; with its last words.
        """
        done = self.run(*line)
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


# --- the stages ------------------------------------------------------------------------------------------------------


def tests(session: Session) -> Result:
    """The tests marked `gpu`: how each ended, and what it printed."""
    file = session.work / "tests.xml"
    done = session.run(
        *("-m", "pytest", str(HERE.parent / "tests" / "gpu"), "-n", "0", "-o", "junit_logging=system-out"),
        *("--junitxml", str(file), *session.scale.tests),
    )
    if done.returncode not in (0, 1):
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    cases = {}
    for case in ET.parse(file).getroot().iter("testcase"):
        ended = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        why = (case.find(ended).get("message") or "").partition("\n")[0] if ended != "passed" else ""
        said = [line for line in (case.findtext("system-out") or "").splitlines() if line.startswith("measured: ")]
        cases[str(case.get("name"))] = {"ended": ended, "why": why, "said": said}
    return {"cases": cases}


ENDINGS = (0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x1FFF)
"""Of the 13 bits that TF32 lacks: none, little, just under, exactly, just over a half, nearly one."""


def operands() -> Tensor:
    """Numbers (256, 256) of both signs and seven exponents, under whose last kept bit stands each of `ENDINGS`."""
    generator = torch.Generator().manual_seed(0)
    shape = (256, 256)
    sign, exponent, kept = (torch.randint(0, most, shape, generator=generator) for most in (2, 7, 2**10))
    ending = torch.tensor(ENDINGS)[torch.randint(0, len(ENDINGS), shape, generator=generator)]
    bits = (sign << 31) | ((exponent + 124) << 23) | (kept << 13) | ending
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def away(x: Tensor) -> Tensor:
    """Float32 to 10 bits of mantissa, to nearest and ties away from zero: PTX's cvt.rna.tf32.f32."""
    return ((x.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "keeps all bits": lambda x: x,
    "crops": lambda x: precision.to_tf32(x, Rounding.truncate),
    "rounds to nearest, ties to even": lambda x: precision.to_tf32(x, Rounding.nearest),
    "rounds to nearest, ties away from zero": away,
}


def rule_of(product: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> dict[str, str]:
    """What a matrix product does to its left and right operand: one of `RULES`, or `other`.

    The other operand is the identity, so that each result is one product by 1 and zeros, exact in every format: what
    comes out is what the operand was taken as.
    """
    numbers, one = operands(), torch.eye(256)
    pairs = {"left": (numbers, one), "right": (one, numbers)}
    found = {}
    for side, (a, b) in pairs.items():
        got = product(a.to(device), b.to(device)).cpu()
        found[side] = next((rule for rule, made in RULES.items() if torch.equal(got, made(numbers))), "other")
    return found


def rounding(session: Session) -> Result:
    """Whether the card crops or rounds where it takes fp32 to TF32; the emulation's default is `truncate`."""
    device = torch.device(session.scale.device)
    with precision.applied(PrecisionConfig(name=PrecisionName.tf32), device) as got:
        return {**rule_of(torch.matmul, device), "emulated": got.emulated, "default": PrecisionConfig().rounding.value}


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """As anyone writes it: all logits at once."""
    return F.cross_entropy(F.linear(x.to(dtype), weight.to(dtype)).float(), targets)


def in_rows(rows: int) -> Callable[..., Tensor]:
    """The program's own loss, so many rows at a time."""
    return lambda x, weight, targets, dtype: HeadLoss.apply(x, weight, targets, rows, dtype, None)  # type: ignore[no-any-return]


def loss_ways(tokens: int) -> dict[str, Callable[..., Tensor]]:
    """The ways to compute the loss of so many tokens: in chunks, of which `auto` takes 1024 rows, and plainly."""
    chunks = {f"{rows} rows": in_rows(rows) for rows in (LOSS_ROWS // 4, LOSS_ROWS, 4 * LOSS_ROWS) if rows < tokens}
    return {**chunks, "all rows": in_rows(tokens), "plain": plain_loss}


def loss_times(device: torch.device, sizes: tuple[int, int, int], repeats: int = 5) -> list[Result]:
    """Milliseconds (median) and peak memory of head and loss, forward and backward, each way, in fp32 and bf16."""
    tokens, width, words = sizes
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    weight = (0.02 * torch.randn(words, width, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(words, (tokens,), generator=generator).to(device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, way in loss_ways(tokens).items():
            hardware.reset_peak_memory(device)
            times = []
            for _ in range(repeats + 1):
                x.grad = weight.grad = None
                hardware.synchronize(device)
                start = time.perf_counter()
                way(x, weight, targets, dtype).backward()
                hardware.synchronize(device)
                times.append(1e3 * (time.perf_counter() - start))
            peak = hardware.peak_memory(device) / 1e9
            rows.append({"loss": name, "in": str(dtype)[6:], "ms": statistics.median(times[1:]), "peak_gb": peak})
    return rows


def loss(session: Session) -> Result:
    """The loss in chunks beside the plain one: which should `auto` take on a card?"""
    return {"rows": loss_times(torch.device(session.scale.device), session.scale.loss)}


def study(session: Session, name: str, *overrides: str) -> Result:
    """A shipped study at the scale's size; its results and runs as CSV, its table and verdicts for the page."""
    folder = session.work / name
    common = (f"train.device={session.scale.device}", "wandb.mode=disabled", f"hydra.sweep.dir={folder}")
    session.must("-m", "gpt2exp.train", f"experiment={name}", *session.scale.size, *overrides, *common)
    comparison = compared(read([folder]))
    (session.out / f"{name}.csv").write_text(report.table(comparison), encoding="utf-8")
    publish.write_record(comparison, session.out / f"{name}_runs")
    command = shlex.join(["gpt2exp", f"experiment={name}", *session.scale.size, *overrides])
    return {
        "command": command,
        "steps": steps_of(comparison.runs),
        "effects": list(csv.DictReader(io.StringIO(report.table(comparison)))),
        "verdicts": report.verdicts(comparison),
        "table": report.effects(comparison),
    }


def steps_of(runs: Sequence[Result]) -> list[Result]:
    """Step and peak memory by precision and batch, the medians of the runs that are done."""
    alike: dict[tuple[bool, str, int], list[Result]] = {}
    for run in runs:
        if run["state"] == "done":
            key = run["settled"]["compile"], run["precision"]["requested"], run["settled"]["batch_size"]
            alike.setdefault(key, []).append(run)
    return [
        {
            "mode": "compiled" if compiled else "eager",
            "precision": name,
            "batch": batch,
            "ms": statistics.median(run["step_ms"]["median"] for run in having),
            "gb": statistics.median(run["peak_memory_bytes"] for run in having) / 1e9,
        }
        for (compiled, name, batch), having in alike.items()
    ]


def precision_study(session: Session) -> Result:
    """Can TF32 be told apart from fp32, in hardware?"""
    return study(session, "precision", *session.scale.precision)


def throughput(session: Session) -> Result:
    """Tokens a second at four batch sizes, 17 beside 16."""
    return study(session, "throughput", *session.scale.throughput)


def bench(session: Session, name: str, compiled: bool) -> Result:
    """`gpt2exp-bench` beside transformers' GPT-2, and beside the caller's peer."""
    scale, file = session.scale, session.work / f"{name}_{compiled}.json"
    line = [*scale.size, f"precision={name}", f"train.compile={str(compiled).lower()}", f"train.device={scale.device}"]
    line += ["--peer", "hf", *(["--compile"] if compiled else []), *session.peer]
    line += ["--pairs", str(scale.pairs), "--steps", str(scale.steps)]
    session.must("-m", "gpt2exp.bench", *line, "--out", str(file))
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    mine = [row["gpt2exp"] for row in found["rounds"]]
    step, peak = (statistics.median(row[key] for row in mine) for key in ("ms_median", "peak_rss_mib"))
    told = {"mode": "compiled" if compiled else "eager", "precision": name, "batch": found["train"]["batch_size"]}
    return {"precision": name, "steps": [told | {"ms": step, "gb": peak * 2**20 / 1e9}], **found}


def stages(scale: Scale) -> dict[str, Callable[[Session], Result]]:
    """By name, the most telling first: the time may end before the last."""
    found: dict[str, Callable[[Session], Result]] = {"rounding": rounding, "tests": tests, "loss": loss}
    found["precision"] = precision_study
    for name, compiled in scale.benches:
        title = f"bench {name}{', compiled' if compiled else ''}"
        found[title] = lambda session, name=name, compiled=compiled: bench(session, name, compiled)  # type: ignore[misc]
        if title == "bench bf16":
            found["throughput"] = throughput
    return {**found, "throughput": throughput}


# --- the page --------------------------------------------------------------------------------------------------------


def page(results: Result) -> str:
    """Every stage in a section; of one that was not run, why."""
    about, done = results["about"], results["stages"]
    parts = ["# On a GPU", "**A rehearsal on a CPU: the figures say only that every line ran.**"]
    if not about["rehearsal"]:
        parts[1] = f"Measured on one {about['device']}, in {about['minutes']:.1f} minutes."
    parts += [
        f"```\npython experiments/gpu.py\n```\n\nCommit {about['commit']}, {about['started']}, {about['versions']}."
    ]
    missing = [f"- {name}: not run, {one['not_run']}" for name, one in done.items() if "not_run" in one]
    parts += ["\n".join(missing)] if missing else []
    run = {name: one for name, one in done.items() if "not_run" not in one}
    if any("steps" in one for one in run.values()):
        parts.append(beside_predictions(run, about))
    for name, write in SECTIONS.items():
        having = {key: one for key, one in run.items() if key.split()[0] == name}
        if having:
            parts.append(write(having, about))
    return "\n\n".join(parts) + "\n"


def beside_predictions(having: Result, about: Result) -> str:
    """Each step that was measured beside what the scaling page said of it."""
    chip = next((gpu for gpu in ("A100", "H100") if gpu in about["device"] or about["rehearsal"]), None)
    with (HERE / "scaling" / "announced.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"] == chip]
    told = {(row["mode"], row["precision"], int(row["batch"])): row for row in rows}
    lines = ["| step | by | predicted, ms | measured, ms | off | predicted, GB | measured, GB | off |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, one in ((name, step) for name, stage in having.items() for step in stage.get("steps", [])):
        before = told.get((one["mode"], one["precision"], one["batch"]))
        cells = [f"{one['precision']}, {one['mode']}, batch {one['batch']}", name.split()[0]]
        for key, value, form in (("step_ms", one["ms"], ",.0f"), ("memory_gb", one["gb"], ".1f")):
            said = None if before is None else float(before[key])
            predicted, off = ("", "") if said is None else (f"{said:{form}}", f"{said / value - 1:+.0%}")
            cells += [predicted, f"{value:{form}}", off]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        "The predictions are those of [scaling](../scaling/README.md), written before this was run; *off*: prediction"
    )
    text += " over measurement." + ("" if chip else " No prediction was made for this card.")
    return "\n\n".join(["## Prediction beside measurement", text, "\n".join(lines)])


def bench_section(having: Result, _: Result) -> str:
    """A row a peer: steps pair by pair."""
    lines = ["| step | our step, ms | peer | its step over ours, pair by pair | pairs |", "|---|--:|---|---|--:|"]
    for one in having.values():
        (step,) = one["steps"]
        for peer, ratio in one["ratios"].items():
            found = ratio["ms_median"]  # ours over theirs
            spread = f"{1 / found['median']:.2f} ({1 / found['max']:.2f} to {1 / found['min']:.2f})"
            cells = [f"{one['precision']}, {step['mode']}", f"{step['ms']:,.0f}", peer, spread, str(found["n"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "## Beside the peers\n\n" + "\n".join(lines)


def tests_section(having: Result, _: Result) -> str:
    """Counts, each that did not pass, and what the others printed."""
    cases = having["tests"]["cases"]
    ends = [one["ended"] for one in cases.values()]
    passed, skipped = ends.count("passed"), ends.count("skipped")
    lines = [f"{passed} passed, {skipped} skipped, {len(ends) - passed - skipped} failed."]
    lines += [f"- `{name}` {one['ended']}: {one['why']}" for name, one in cases.items() if one["ended"] != "passed"]
    lines += [f"- `{name}` {line}" for name, one in cases.items() for line in one["said"]]
    return "## Tests\n\n" + "\n".join([lines[0], "", *lines[1:]])


def rounding_section(having: Result, _: Result) -> str:
    """One sentence."""
    found = having["rounding"]
    said = f"the card {found['left']}"
    if found["left"] != found["right"]:
        said = f"the card {found['left']} the left operand and {found['right']} the right one"
    how = " (emulated)" if found["emulated"] else ""
    return f"## Crop or round?\n\nTaking fp32 to TF32 {said}{how}; the emulation's default is `{found['default']}`."


def loss_section(having: Result, _: Result) -> str:
    """A row each way."""
    rows = having["loss"]["rows"]
    lines = ["| loss | in | ms | peak memory, GB |", "|---|---|--:|--:|"]
    lines += [f"| {row['loss']} | {row['in']} | {row['ms']:.2f} | {row['peak_gb']:.2f} |" for row in rows]
    best = min((row for row in rows if row["in"] == "float32"), key=lambda row: row["ms"])["loss"]
    return f"## The loss in chunks\n\nIn fp32 the fastest is: {best}. `auto` takes {LOSS_ROWS} rows.\n\n" + "\n".join(
        lines
    )


def study_section(having: Result, _: Result) -> str:
    """The study's verdicts and table."""
    ((name, found),) = having.items()
    body = "\n".join([*found["verdicts"], "", *found["table"]])
    return f"## The {name} study\n\n```\n{found['command']}\n```\n\n{body}"


SECTIONS: dict[str, Callable[[Result, Result], str]] = {
    "bench": bench_section,
    "rounding": rounding_section,
    "precision": study_section,
    "throughput": study_section,
    "loss": loss_section,
    "tests": tests_section,
}


# --- the command -----------------------------------------------------------------------------------------------------


def carry_out(session: Session, only: Sequence[str], rehearsal: bool) -> Result:
    """Run the stages, writing results and page after each, so that nothing is lost to what ends the script."""
    began, file = time.monotonic(), session.out / "results.json"
    facts = record.facts()
    about = {"rehearsal": rehearsal, "device": hardware.device_name(torch.device(session.scale.device))}
    git = facts["git"] or {"commit": "unknown", "dirty": True}
    about["commit"] = f"{git['commit']}{', changed' if git['dirty'] else ''}"
    about["started"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    about["versions"] = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    results = json.loads(file.read_text(encoding="utf-8")) if only and file.is_file() else {"stages": {}}
    for name, stage in stages(session.scale).items():
        if only and name not in only:
            continue
        start = time.monotonic()
        try:
            if start > session.ends:
                raise subprocess.TimeoutExpired(name, 0)
            found = stage(session)
        except subprocess.TimeoutExpired:
            found = {"not_run": "the time was over"}
        except Exception as error:  # one stage's fault is told of, and leaves the others
            found = {"not_run": f"{type(error).__name__}: {error}"}
        results["stages"][name] = {**found, "seconds": round(time.monotonic() - start, 1)}
        results["about"] = about | {"minutes": (time.monotonic() - began) / 60}
        write_json(file, results)
        (session.out / "README.md").write_text(page(results), encoding="utf-8")
        print(f"{name}: {found.get('not_run', 'done')} ({time.monotonic() - start:.0f} s)", flush=True)
    return results


def main(argv: Sequence[str]) -> int:
    """See the module's docstring; 1 if a stage or a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="a tiny scale on the CPU, into a temporary folder")
    parser.add_argument("--out", type=Path, help="another folder than experiments/gpu")
    parser.add_argument("--minutes", type=float, default=10.0, help="when to stop (10)")
    known = [*stages(FULL), *stages(REHEARSAL)]
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", choices=known, help=", ".join(stages(FULL)))
    parser.add_argument("--peer-command", help="passed on to gpt2exp-bench: a peer of your own")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here; --rehearse runs every line on the CPU")
    with tempfile.TemporaryDirectory() as temporary:
        out = args.out or (Path(temporary) / "gpu" if args.rehearse else HERE / "gpu")
        out.mkdir(parents=True, exist_ok=True)
        peer = ["--peer-command", args.peer_command] if args.peer_command else []
        ends = time.monotonic() + 60 * args.minutes
        session = Session(REHEARSAL if args.rehearse else FULL, Path(temporary), out, ends, peer)
        results = carry_out(session, args.only, args.rehearse)
        index = out.parent / "README.md"
        if args.rehearse:  # the table of claims is written as well, where nobody reads it
            shutil.copy(HERE / "README.md", index)
        if index.is_file():
            publish.replace_block(index, "claims", claims.index(results))
    cases = results["stages"].get("tests", {}).get("cases", {}).values()
    failed = any("not_run" in one for one in results["stages"].values())
    return int(failed or any(one["ended"] in ("failure", "error") for one in cases))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
