"""The tutorial's claims, each with the measurement it is held against.

`python experiments/claims.py` rewrites their table in `experiments/README.md` from the findings' records.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from publish import HERE, column, effect, having, replace_block, runs_of, spread

from gpt2exp.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gpt2exp.data import assets, tokens
from gpt2exp.model import size
from gpt2exp.training import setup

NEEDS = "needs a GPU"


@dataclass
class Claim:
    """A claim of the tutorial, and how to hold the runs against it: figure, n, verdict."""

    text: str
    finding: str
    measure: Callable[[], tuple[str, int, str]]


def holds(ok: bool) -> str:
    """In the table's words."""
    return "holds" if ok else "does not hold"


def epochs() -> tuple[str, int, str]:
    count = tokens.prepare(DataConfig()).tokens
    small, large = (count - 1) // (4 * 32), (count - 1) // (16 * 1024)
    return f"{small:,} batches of 4 x 32, {large} of 16 x 1024", 1, holds(abs(small - 2600) < 100 and large == 20)


def compression() -> tuple[str, int, str]:
    size = len(assets.fetch(assets.TINY_SHAKESPEARE).read_bytes())
    count = tokens.prepare(DataConfig()).tokens
    return f"{size:,} bytes, {count:,} tokens: {size / count:.2f} to 1", 1, holds(2.5 < size / count < 3.5)


def tied_parameters() -> tuple[str, int, str]:
    tied, untied = (size.parameters(ModelConfig(tie_weights=tie))["total"] for tie in (True, False))
    text = f"{untied - tied:,} fewer: {(untied - tied) / tied:.0%} of the tied model, {(untied - tied) / untied:.0%} of"
    return f"{text} the untied", 1, holds(abs((untied - tied) / tied - 0.3) < 0.02)


def start() -> tuple[str, int, str]:
    first = column(runs_of("first_steps"), "loss_first")
    return f"{spread(first)}, ln 50257 = {math.log(50257):.3f}", len(first), holds(all(10.8 < x < 11.1 for x in first))


def fifty_steps() -> tuple[str, int, str]:
    runs = runs_of("first_steps")
    last, mean = column(runs, "loss_last"), column(runs, "loss_mean_last10")
    text = f"last step {spread(last)}, mean of the last ten {spread(mean)}"
    return text, len(last), holds(abs(statistics.fmean(last) - 6.6) < 0.2)


def unused_tokens() -> tuple[str, int, str]:
    runs = runs_of("first_steps")
    shares = [
        (float(run["loss_unseen_first"]) - float(run["loss_unseen_last"]))
        / (float(run["loss_first"]) - float(run["loss_last"]))
        for run in runs
    ]
    return f"{spread(shares, '.1%')} of the fall", len(shares), holds(statistics.fmean(shares) > 0.5)


def _loss(row: dict[str, str]) -> str:
    low, high = float(row["ci95_low"]), float(row["ci95_high"])
    return f"{float(row['mean_difference']):+.2g} nats ({low:.2g} to {high:.2g})"


def worse(row: dict[str, str]) -> str:
    """Whether an arm is worse, as a claim says: by the verdict of its row."""
    return {"worse": "holds", "better": "does not hold"}.get(row["verdict"], "not seen here")


def tying() -> tuple[str, int, str]:
    row = effect("weight_tying", "model.tie_weights", "false", "val_loss")
    return f"untied {_loss(row)}, nano model", int(row["n_seeds"]), worse(row)


def stream() -> tuple[str, int, str]:
    runs = runs_of("residual_scaling")

    def growth(scaling: str) -> float:
        return statistics.fmean(
            float(run["stream_first_last_block"]) / float(run["stream_first_embedded"])
            for run in having(runs, f"init.residual_scaling={scaling}", "model.n_layer=48")
        )

    scaled, plain = growth("true"), growth("false")
    text = f"at init and 48 layers it grows {scaled:.2f} times scaled, {plain:.1f} times not"
    return text, len(having(runs, "model.n_layer=48")) // 2, holds(scaled < plain / 2)


def tf32() -> tuple[str, int, str]:
    row = effect("precision", "precision", "tf32", "val_loss")
    told, std = row["verdict"] in ("better", "worse"), float(row["seed_std"])
    unpaired = "does not hold" if abs(float(row["mean_difference"])) > std else "holds unpaired"
    verdict = unpaired if told else {"indistinguishable": "holds"}.get(row["verdict"], "not seen here")
    return f"{_loss(row)} at equal seeds, whose own std is {std:.2g}", int(row["n_seeds"]), verdict


def near_xavier() -> tuple[str, int, str]:
    return f"1/√768 = {768**-0.5:.4f}, 1/√1600 = {1600**-0.5:.4f}", 1, holds(0.5 < 0.02 * 768**0.5 < 2)


def first_iteration() -> tuple[str, int, str]:
    runs = runs_of("throughput")
    ratios = [float(run["first_step_ms"]) / float(run["step_ms"]) for run in runs]
    return f"{spread(ratios, '.2f')} times the median step", len(ratios), holds(statistics.fmean(ratios) > 1.1)


def seventeen() -> tuple[str, int, str]:
    row = effect("throughput", "train.batch_size", "17", "tokens_per_second")
    ratio, low, high = (float(row[key]) for key in ("speed_ratio", "ci95_low", "ci95_high"))
    return f"{ratio:.3f} of 16's tokens/s ({low:.3f} to {high:.3f}), on a CPU", int(row["n_seeds"]), worse(row)


def tf32_speed() -> tuple[str, int, str]:
    alone = {"gpu": "A100", "model": "gpt2", "gpus": "1"}
    full, short = (
        next(row for row in runs_of("scaling", "predictions") if {**alone, "precision": name}.items() <= row.items())
        for name in ("fp32", "tf32")
    )
    ratio = float(full["step_ms"]) / float(short["step_ms"])
    return f"not run; predicted {ratio:.1f} times for this program on an A100", 0, NEEDS


def memory() -> tuple[str, int, str]:
    config = RunConfig(train=TrainConfig(batch_size=16, seq_len=1024))
    need = setup.memory(config, setup.Hardware("cuda"))
    (same,) = (row for row in runs_of("scaling", "checks") if (row["series"], row["unit"]) == ("tutorial", "GB"))
    predicted = f"predicted {float(same['predicted']):.0f} GB as the tutorial computes it"
    return f"not run; {predicted}, estimated {need / 1e9:.0f} GB with fused attention", 0, NEEDS


CLAIMS = [
    Claim("338,000 tokens are 2,600 batches an epoch, and 20 at 16 x 1024", "first_steps", epochs),
    Claim("The text compresses 3 to 1", "first_steps", compression),
    Claim("The loss starts near ln V", "first_steps", start),
    Claim("After 50 steps the loss is about 6.6", "first_steps", fifty_steps),
    Claim("Unused tokens are probably most of the first gain", "first_steps", unused_tokens),
    Claim("Tying saves 40 million parameters, 30 %", "weight_tying", tied_parameters),
    Claim("Tying trains better", "weight_tying", tying),
    Claim("Scaling residual projections controls the stream's growth", "residual_scaling", stream),
    Claim("0.02 is in the vicinity of 1/√d", "init_std", near_xavier),
    Claim("TF32 cannot be told apart from fp32", "precision", tf32),
    Claim("TF32 is up to 8 times faster (1000 to 333 ms a step)", "scaling", tf32_speed),
    Claim("The first iteration is slower", "throughput", first_iteration),
    Claim("A batch of 17 runs inefficiently", "throughput", seventeen),
    Claim(
        "16 x 1024 tokens in 1000 ms are 163,000 tokens/s", "throughput", lambda: ("16,384 tokens/s", 1, holds(False))
    ),
    Claim("16 x 1024 in fp32 takes about 35 GB", "scaling", memory),
]


def index() -> str:
    """The table of claims."""
    rows = ["| claim | measured | n | verdict | finding |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        figure, n, verdict = claim.measure()
        rows.append(f"| {claim.text} | {figure} | {n} | **{verdict}** | [{claim.finding}]({claim.finding}/README.md) |")
    return "\n".join(rows)


if __name__ == "__main__":
    replace_block(HERE / "README.md", "claims", index())
