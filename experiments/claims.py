"""The tutorial's claims, each with the measurement it is held against.

`python experiments/claims.py` rewrites their table in `experiments/README.md` from the findings' records.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from publish import HERE, column, effect, facts, having, replace_block, runs_of, spread

from gpt2exp.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gpt2exp.data import assets, tokens
from gpt2exp.model import size
from gpt2exp.training import setup

NEEDS = "needs a GPU"
Measured = tuple[str, int, str]
"""Figure, n, verdict."""


@dataclass
class Claim:
    """A claim of the tutorial, and how to hold the runs against it. One held against two models has two of these."""

    text: str
    study: str
    measure: Callable[[str], Measured]
    """Of its study's record."""
    trained: bool = True
    """False: it follows from sizes and counts, without a run."""


@dataclass
class Card:
    """A claim about a GPU, held against what `gpu.py` measured once it was run."""

    text: str
    needs: tuple[str, ...]
    """Its stages."""
    measure: Callable[[Stages], Measured]
    before: Callable[[], str] = lambda: "not run"
    """What stands there until then."""


Stages = dict[str, dict[str, Any]]
"""Of `gpu/results.json`, by name, those that were run."""


def holds(ok: bool) -> str:
    """In the table's words."""
    return "holds" if ok else "does not hold"


def epochs(study: str) -> Measured:
    count = tokens.prepare(DataConfig()).tokens
    small, large = (count - 1) // (4 * 32), (count - 1) // (16 * 1024)
    return f"{small:,} batches of 4 x 32, {large} of 16 x 1024", 1, holds(abs(small - 2600) < 100 and large == 20)


def compression(study: str) -> Measured:
    size = len(assets.fetch(assets.TINY_SHAKESPEARE).read_bytes())
    count = tokens.prepare(DataConfig()).tokens
    return f"{size:,} bytes, {count:,} tokens: {size / count:.2f} to 1", 1, holds(2.5 < size / count < 3.5)


def tied_parameters(study: str) -> Measured:
    tied, untied = (size.parameters(ModelConfig(tie_weights=tie))["total"] for tie in (True, False))
    text = f"{untied - tied:,} fewer: {(untied - tied) / tied:.0%} of the tied model, {(untied - tied) / untied:.0%} of"
    return f"{text} the untied", 1, holds(abs((untied - tied) / tied - 0.3) < 0.02)


def start(study: str) -> Measured:
    first = column(runs_of(study), "loss_first")
    return f"{spread(first)}, ln 50257 = {math.log(50257):.3f}", len(first), holds(all(10.8 < x < 11.1 for x in first))


def fifty_steps(study: str) -> Measured:
    runs = runs_of(study)
    last, mean = column(runs, "loss_last"), column(runs, "loss_mean_last10")
    text = f"last step {spread(last)}, mean of the last ten {spread(mean)}"
    return text, len(last), holds(abs(statistics.fmean(last) - 6.6) < 0.2)


def unused_tokens(study: str) -> Measured:
    runs = runs_of(study)
    shares = [
        (float(run["loss_unseen_first"]) - float(run["loss_unseen_last"]))
        / (float(run["loss_first"]) - float(run["loss_last"]))
        for run in runs
    ]
    return f"{spread(shares, '.1%')} of the fall", len(shares), holds(statistics.fmean(shares) > 0.5)


def _loss(row: Mapping[str, Any]) -> str:
    low, high = float(row["ci95_low"]), float(row["ci95_high"])
    return f"{float(row['mean_difference']):+.2g} nats ({low:.2g} to {high:.2g})"


def _speed(row: Mapping[str, Any]) -> str:
    ratio, low, high = (float(row[key]) for key in ("speed_ratio", "ci95_low", "ci95_high"))
    return f"{ratio:.3f} of 16's tokens/s ({low:.3f} to {high:.3f})"


def worse(row: Mapping[str, Any]) -> str:
    """Whether an arm is worse, as a claim says: by the verdict of its row."""
    return {"worse": "holds", "better": "does not hold"}.get(row["verdict"], "not seen here")


def tying(study: str) -> Measured:
    row = effect(study, "model.tie_weights", "false", "val_loss")
    return f"untied {_loss(row)}", int(row["n_seeds"]), worse(row)


def stream(study: str) -> Measured:
    runs = runs_of(study)
    deepest = max(int(facts(study, run)["config.model.n_layer"]) for run in runs)

    def growth(scaling: str) -> float:
        return statistics.fmean(
            float(run["stream_first_last_block"]) / float(run["stream_first_embedded"])
            for run in having(runs, f"init.residual_scaling={scaling}", f"model.n_layer={deepest}")
        )

    scaled, plain = growth("true"), growth("false")
    text = f"at init and {deepest} layers it grows {scaled:.3g} times scaled, {plain:.3g} times not"
    return text, len(having(runs, f"model.n_layer={deepest}")) // 2, holds(scaled < plain / 2)


def scaling(study: str) -> Measured:
    row = effect(study, "init.residual_scaling", "false", "val_loss")
    return f"unscaled {_loss(row)}", int(row["n_seeds"]), worse(row)


def own_init(study: str) -> Measured:
    row = effect(study, "init", "torch", "val_loss")
    return f"PyTorch's own {_loss(row)}", int(row["n_seeds"]), worse(row)


def tf32(study: str) -> Measured:
    return told_apart(effect(study, "precision", "tf32", "val_loss"))


def told_apart(row: Mapping[str, Any]) -> Measured:
    told, std = row["verdict"] in ("better", "worse"), float(row["seed_std"])
    unpaired = "does not hold" if abs(float(row["mean_difference"])) > std else "holds unpaired"
    verdict = unpaired if told else {"indistinguishable": "holds"}.get(row["verdict"], "not seen here")
    return f"{_loss(row)} at equal seeds, whose own std is {std:.2g}", int(row["n_seeds"]), verdict


def near_xavier(study: str) -> Measured:
    return f"1/√768 = {768**-0.5:.4f}, 1/√1600 = {1600**-0.5:.4f}", 1, holds(0.5 < 0.02 * 768**0.5 < 2)


def first_iteration(study: str) -> Measured:
    runs = runs_of(study)
    ratios = [float(run["first_step_ms"]) / float(run["step_ms"]) for run in runs]
    return f"{spread(ratios, '.2f')} times the median step", len(ratios), holds(statistics.fmean(ratios) > 1.1)


def seventeen(study: str) -> Measured:
    row = effect(study, "train.batch_size", "17", "tokens_per_second")
    return f"{_speed(row)}, on a CPU", int(row["n_seeds"]), worse(row)


def thousand_ms(study: str) -> Measured:
    return f"{16 * 1024:,} tokens/s", 1, holds(False)


# --- on a card: what `gpu.py` measured, or what was said before ------------------------------------------------------


def tf32_speed(stages: Stages) -> Measured:
    full, short = (stages[f"bench {name}"]["steps"][0]["ms"] for name in ("fp32", "tf32"))
    text = f"{full:.0f} to {short:.0f} ms: {full / short:.1f} times"
    return text, len(stages["bench fp32"]["rounds"]), holds(2.5 < full / short < 8)


def tf32_speed_said() -> str:
    alone = {"gpu": "A100", "model": "gpt2", "gpus": "1"}
    full, short = (
        next(row for row in runs_of("scaling/predictions") if {**alone, "precision": name}.items() <= row.items())
        for name in ("fp32", "tf32")
    )
    ratio = float(full["step_ms"]) / float(short["step_ms"])
    return f"not run; predicted {ratio:.1f} times for this program on an A100"


def memory(stages: Stages) -> Measured:
    peak = stages["bench fp32"]["steps"][0]["gb"]
    text = f"{peak:.0f} GB with fused attention and the loss in chunks"
    return text, len(stages["bench fp32"]["rounds"]), holds(abs(peak - 35) < 5)


def memory_said() -> str:
    config = RunConfig(train=TrainConfig(batch_size=16, seq_len=1024))
    need = setup.memory(config, setup.Hardware("cuda"))
    (same,) = (row for row in runs_of("scaling/checks") if (row["series"], row["unit"]) == ("tutorial", "GB"))
    predicted = f"predicted {float(same['predicted']):.0f} GB as the tutorial computes it"
    return f"not run; {predicted}, estimated {need / 1e9:.0f} GB with fused attention"


def rounding(stages: Stages) -> Measured:
    found = stages["rounding"]
    sides = found["left"], found["right"]
    return f"the left operand: {sides[0]}, the right: {sides[1]}", 1, holds(sides == ("crops", "crops"))


def tf32_on_a_card(stages: Stages) -> Measured:
    return told_apart(_of(stages, "precision", "tf32", "val_loss"))


def seventeen_on_a_card(stages: Stages) -> Measured:
    row = _of(stages, "throughput", "17", "tokens_per_second")
    if not row["ci95_low"]:
        return f"not compared: {row['reason']}", int(row["n_seeds"]), worse(row)
    return _speed(row), int(row["n_seeds"]), worse(row)


def _of(stages: Stages, study: str, arm: str, metric: str) -> dict[str, Any]:
    return next(row for row in stages[study]["effects"] if (row["arm"], row["metric"]) == (arm, metric))


CLAIMS = [
    Claim("338,000 tokens are 2,600 batches an epoch, and 20 at 16 x 1024", "first_steps", epochs, trained=False),
    Claim("The text compresses 3 to 1", "first_steps", compression, trained=False),
    Claim("The loss starts near ln V", "first_steps", start),
    Claim("After 50 steps the loss is about 6.6", "first_steps", fifty_steps),
    Claim("Unused tokens are probably most of the first gain", "first_steps", unused_tokens),
    Claim("Tying saves 40 million parameters, 30 %", "weight_tying", tied_parameters, trained=False),
    Claim("Tying trains better", "weight_tying/gpt2", tying),
    Claim("Tying trains better", "weight_tying", tying),
    Claim("Tying trains better", "second_text", tying),
    Claim("Scaling residual projections controls the stream's growth", "residual_scaling/gpt2", stream),
    Claim("Scaling residual projections controls the stream's growth", "residual_scaling", stream),
    Claim("... and trains better", "residual_scaling/gpt2", scaling),
    Claim("... and trains better", "residual_scaling", scaling),
    Claim("0.02 is in the vicinity of 1/√d", "init_std", near_xavier, trained=False),
    Claim("GPT-2's init trains better than PyTorch's own", "init_std/gpt2", own_init),
    Claim("GPT-2's init trains better than PyTorch's own", "init_std", own_init),
    Claim("TF32 cannot be told apart from fp32", "precision/gpt2", tf32),
    Claim("TF32 cannot be told apart from fp32", "precision", tf32),
    Card("TF32 cannot be told apart from fp32, in hardware", ("precision",), tf32_on_a_card),
    Card("TF32 crops the mantissa", ("rounding",), rounding),
    Card(
        "TF32 is up to 8 times faster (1000 to 333 ms a step)",
        ("bench fp32", "bench tf32"),
        tf32_speed,
        tf32_speed_said,
    ),
    Claim("The first iteration is slower", "throughput", first_iteration),
    Claim("A batch of 17 runs inefficiently", "throughput", seventeen),
    Card("A batch of 17 runs inefficiently, on a GPU", ("throughput",), seventeen_on_a_card),
    Claim("16 x 1024 tokens in 1000 ms are 163,000 tokens/s", "throughput", thousand_ms, trained=False),
    Card("16 x 1024 in fp32 takes about 35 GB", ("bench fp32",), memory, memory_said),
]


def index(card: Mapping[str, Any] | None = None) -> str:
    """The table of claims; `card`: the results of `gpu.py`, by default those of `gpu/`, where it was run."""
    file = HERE / "gpu" / "results.json"
    if card is None:
        card = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"stages": {}}
    stages = {name: stage for name, stage in card["stages"].items() if "not_run" not in stage}
    rows = [
        "| claim | model | text | measured, 95 % interval | n | verdict | finding |",
        "|---|---|---|---|--:|---|---|",
    ]
    for claim in CLAIMS:
        model = text = "–"
        if isinstance(claim, Claim):
            (figure, n, verdict), finding = claim.measure(claim.study), claim.study.partition("/")[0]
            if claim.trained:
                model, text = trained_on(claim.study)
        elif set(claim.needs) <= set(stages):
            (figure, n, verdict), finding = claim.measure(stages), "gpu"
            figure = f"{figure}, {card['about']['device']}"
        else:
            figure, n, verdict, finding = claim.before(), 0, NEEDS, "scaling"
        cells = claim.text, model, text, figure, str(n), f"**{verdict}**", f"[{finding}]({finding}/README.md)"
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def trained_on(study: str) -> tuple[str, str]:
    """The model and the text of a study's baseline: the preset of its width and heads, and the text's name."""
    known = facts(study, runs_of(study)[0])
    for path in sorted((HERE.parent / "conf" / "model").glob("*.yaml")):
        shape = yaml.safe_load(path.read_text())
        if all(shape[key] == known[f"config.model.{key}"] for key in ("n_embd", "n_head")):
            return path.stem, known["config.data.name"]
    raise ValueError(f"{study}: no preset in conf/model has its width")


if __name__ == "__main__":
    replace_block(HERE / "README.md", "claims", index())
