"""A sweep runs the combinations that its design says, of keys that move together too: the jobs are those of sets written
here, also until it is answered, gone on with, or from a preset; the comparison pairs them as the design means.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support import SMALL, read
from test_engines import here, the_sweep

from gpt2exp import api
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch, request, resume

TINY = [*SMALL, "train.steps=3", "train.batch_size=1", "train.seq_len=8", "data.max_tokens=3000", "wandb.mode=disabled"]
SIZES = "sweep.together=model.n_embd=16,32;optimizer.lr=1e-3,5e-4"
Job = tuple[int, tuple[Any, ...]]


def asked(*words: str) -> request.Request:
    """The request of a command line, as the command reads it."""
    args, _ = launch.parsed(words)
    found = resume.make(args) or request.make(args)
    assert isinstance(found, request.Request)
    return found


def settings(of: request.Request, *keys: str) -> list[Job]:
    """Of each job its seed and what it has at these keys of its configuration."""
    found = []
    for job in of.jobs:
        values = []
        for key in keys:
            section, name = key.split(".")
            values.append(getattr(getattr(job.config, section), name))
        found.append((job.config.seed, tuple(values)))
    return found


class TestTogether:
    """`sweep.together`: keys that move together are one axis."""

    KEYS = ("model.n_embd", "optimizer.lr")
    ARMS = ((16, 1e-3), (32, 5e-4))

    def test_jobs(self) -> None:
        """Every arm with every value of the other axes and every seed, and no other mixture of the keys."""
        found = asked("-m", "seed=1,2", "model.n_layer=1,2", SIZES, *TINY[:1], *TINY[2:3], *TINY[4:])
        keys = (*self.KEYS, "model.n_layer")
        assert sorted(settings(found, *keys)) == sorted(
            (seed, (*arm, layers)) for seed in (1, 2) for layers in (1, 2) for arm in self.ARMS
        )
        assert found.names[0] == "000_model.n_embd=16,model.n_layer=1,optimizer.lr=0.001,seed=1"

    @pytest.mark.parametrize(
        "typed",
        [
            'sweep.together="model.n_embd=16,32;optimizer.lr=1e-3,5e-4"',
            "sweep.together=['model.n_embd=16,32','optimizer.lr=1e-3,5e-4']",
            "sweep.together= model.n_embd=16,32 ; optimizer.lr=1e-3,5e-4; ",
        ],
    )
    def test_other_ways_to_write_it(self, typed: str) -> None:
        assert settings(asked("-m", typed, *TINY), *self.KEYS) == [(1337, arm) for arm in self.ARMS]

    def test_groups_and_ranges(self) -> None:
        found = asked("-m", "sweep.together=optimizer=adamw,sgd;model.n_layer=range(1,3)", *TINY[:1], *TINY[2:])
        assert [(type(job.config.optimizer).__name__, job.config.model.n_layer) for job in found.jobs] == [
            ("AdamwConfig", 1),
            ("SgdConfig", 2),
        ]

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["-m", "sweep.together=model.n_embd=16,32,48;optimizer.lr=1e-3,5e-4"],
             r"sweep\.together: model\.n_embd has 3, optimizer\.lr has 2; give each key as many values as there are"),
            (["-m", "sweep.together=model.n_embd=16,32;model.n_embd=1,2"],
             r"sweep\.together=model\.n_embd=16,32: its key is there twice; name each key once"),
            (["-m", SIZES, "optimizer.lr=1e-3,1e-4"],
             r"optimizer\.lr=0\.001: optimizer\.lr is in sweep\.together too; name it in one of the two"),
            (["-m", SIZES, "optimizer.lr=1e-3"], r"optimizer\.lr=0\.001: optimizer\.lr is in sweep\.together too"),
            (["-m", "sweep.together=model.n_embd=16,32"], r"sweep\.together=\[model\.n_embd=16,32\]: one key has nothing"),
            (["-m", "sweep.together=model.n_embd;optimizer.lr=1,2"], r"sweep\.together=model\.n_embd: must be KEY=A,B"),
            (["-m", "sweep.together=model.n_embed=16,32;optimizer.lr=1e-3,5e-4"],
             r"model\.n_embed=16: no such key; did you mean model\.n_embd"),
            (["-m", "sweep.together=model.n_embd=16,x;optimizer.lr=1e-3,5e-4"], r"model\.n_embd=x: must be a whole"),
            (["-m", "sweep.together=model.n_embd=16,32;seed=1,2"], r"sweep\.together: seed=1 is no arm to compare"),
            (["-m", "sweep.together=model.n_embd=16,32;wandb.project=a,b"], r"sweep\.together: wandb\.project=a is no"),
            ([SIZES], r"sweep\.together=\[model\.n_embd=16,32,optimizer\.lr=1e-3,5e-4\]: one run has no arms; add -m"),
            (["-m", SIZES, "hydra/sweeper=lr_search"], r"sweep\.together=.*: it takes the basic sweeper"),
        ],
    )  # fmt: skip
    def test_refused(self, words: list[str], line: str) -> None:
        with pytest.raises(BadRequest, match=f"^{line}"):
            asked(*words, *TINY[:1], *TINY[2:3], *TINY[4:])

    @pytest.fixture(scope="class")
    def swept(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A study in a file of the user's own, run."""
        folder = tmp_path_factory.mktemp("together")
        (folder / "mine" / "experiment").mkdir(parents=True)
        text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2,3\n"
        text += "sweep:\n  together:\n  - model.n_embd=16,32,16\n  - optimizer.lr=1e-3,5e-4,1e-2\n"
        (folder / "mine" / "experiment" / "sizes.yaml").write_text(text)
        rest = [text for text in TINY if not text.startswith("model.n_embd")]
        code, out, err = here(folder, "--config-dir", "mine", "experiment=sizes", *rest)
        assert (code, err) == (0, "")
        assert "lr=0.01 against n_embd=16 lr=0.001" in out, "what an arm shares with the baseline is not repeated"
        return the_sweep(folder)

    def test_compared(self, swept: Path) -> None:
        """One axis with readable arms, whose differences are those of a t test over the seeds' losses, taken here."""
        result = read(swept / "comparison.json")
        assert result["swept"] == {
            "model.n_embd + optimizer.lr": ["n_embd=16 lr=0.001", "n_embd=32 lr=0.0005", "lr=0.01"]
        }
        losses: dict[tuple[int, float], list[float]] = {}
        for seed in (1, 2, 3):
            for path in sorted(swept.glob(f"*seed={seed}/summary.json")):
                of = read(path)
                where = of["config"]["model"]["n_embd"], of["config"]["optimizer"]["lr"]
                losses.setdefault(where, []).append(of["loss_mean_last10"])
        base = np.array(losses[16, 0.001])
        arms = {"n_embd=32 lr=0.0005": losses[32, 0.0005], "lr=0.01": losses[16, 0.01]}
        rows = {row["arm"]: row for row in result["axes"] if row["metric"] == "loss_mean_last10"}
        assert rows.keys() == arms.keys()
        for arm, values in arms.items():
            expected = stats.ttest_rel(values, base)
            low, high = expected.confidence_interval(0.95)
            assert rows[arm]["mean_difference"] == pytest.approx(float(np.mean(np.array(values) - base)))
            assert rows[arm]["ci95"] == pytest.approx([low, high])
            assert rows[arm]["baseline"] == "n_embd=16 lr=0.001"

    def test_shown(self, swept: Path) -> None:
        """In each form of the report, under names that tell the arms apart."""
        with (swept / "comparison.csv").open(encoding="utf-8") as file:
            assert {(row["key"], row["arm"]) for row in csv.DictReader(file)} == {
                ("model.n_embd + optimizer.lr", arm) for arm in ("n_embd=32 lr=0.0005", "lr=0.01")
            }
        for page in ("report.md", "report.html"):
            text = (swept / page).read_text(encoding="utf-8")
            assert "n_embd=32 lr=0.0005" in text
            assert "model.n_embd + optimizer.lr=" not in text
        assert (swept / "figures" / "1-model.n-embd-optimizer.lr-loss.png").is_file()

    def test_gone_on_with(self, swept: Path) -> None:
        """More arms and more seeds; nothing that is done is run again, and the new command line asks for all."""
        more = asked(f"resume={swept}", "seed=4", "sweep.together=optimizer.lr=1e-4;model.n_embd=64")
        arms = ((16, 1e-3), (32, 5e-4), (16, 1e-2), (64, 1e-4))
        every = {(seed, arm) for seed in (1, 2, 3, 4) for arm in arms}
        assert set(settings(more, *self.KEYS)) == every
        assert len(more.jobs) == len(every) == len(set(more.names))
        assert {job.config.seed for job in more.jobs if job.done} == {1, 2, 3}
        assert sum(job.done for job in more.jobs) == 9
        again = asked(*more.argv)
        assert set(settings(again, *self.KEYS)) == every

    @pytest.mark.parametrize(
        ("word", "line"),
        [
            ("sweep.together=model.n_embd=64;model.n_layer=1", r"sweep\.together: model\.n_embd, model\.n_layer: the"),
            ("model.n_embd=64", r"model\.n_embd=64: model\.n_embd is in sweep\.together too"),
        ],
    )
    def test_what_it_does_not_go_on_with(self, word: str, line: str, swept: Path) -> None:
        with pytest.raises(BadRequest, match=f"^{line}"):
            asked(f"resume={swept}", word)

    def test_until_it_is_answered(self, tmp_path: Path) -> None:
        """The rule names the axis; from Python."""
        words = [SIZES, "sweep.until=answered", "sweep.max_seeds=3", *TINY[:1], *TINY[2:3], *TINY[4:]]
        runs = api.sweep(["model.n_layer=1", *words], tmp_path / "sweep")
        known = record.Sweep.read(tmp_path / "sweep")
        assert known is not None
        assert known.rule["axes"] == {
            "model.n_embd + optimizer.lr": [
                "model.n_embd=16 optimizer.lr=0.001",
                "model.n_embd=32 optimizer.lr=0.0005",
            ]
        }
        assert len(runs.rows) == 6
        (note, *_) = runs.compare().notes
        assert "until each arm of model.n_embd + optimizer.lr has a verdict" in note

    def test_dry(self, tmp_path: Path) -> None:
        rest = [text for text in TINY if not text.startswith("model.n_embd")]
        code, out, _ = here(tmp_path, "-m", SIZES, *rest, "dry_run=true")
        assert code == 0
        assert "model.n_embd=32 optimizer.lr=0.0005" in " ".join(out.split())
        assert "sweep.together" not in out
        assert not any(tmp_path.iterdir())

    def test_lead_s_baseline(self) -> None:
        """An arm of defaults is the baseline, the first else, as with any axis."""
        from gpt2exp.compare.rows import axes_of
        from gpt2exp.schema import plain

        def named(together: str) -> dict[str, list[str]]:
            jobs = asked("-m", f"sweep.together={together}", "wandb.mode=disabled").jobs
            return axes_of(
                [
                    {"config": plain(job.config), "overrides": list(job.overrides), "folder": "", "state": "done"}
                    for job in jobs
                ]
            )

        untied = "model.tie_weights=true,false,false,false;model.n_embd=768,768,640,768;"
        assert named(f"{untied}model.n_head=12,12,10,12;model.n_layer=12,12,12,7") == {
            "model.tie_weights + model.n_embd + model.n_head + model.n_layer": [
                "tie_weights=true n_embd=768 n_head=12 n_layer=12",
                "tie_weights=false",
                "tie_weights=false n_embd=640 n_head=10",
                "tie_weights=false n_layer=7",
            ]
        }
        (arms,) = named("model.n_layer=6,12;optimizer.lr=1e-3,3e-4").values()
        assert arms[0] == "n_layer=12 lr=0.0003"
        (arms,) = named("model.n_layer=6,8;optimizer.lr=1e-3,1e-4").values()
        assert arms == ["n_layer=6 lr=0.001", "n_layer=8 lr=0.0001"]
