"""A sweep runs the combinations that its design says: the jobs are those of sets written here. So are those of keys
that move together, of a study, of a resumed sweep and of `sweep.until`. The comparison pairs them as the design means.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support import SMALL, read, without_figures
from test_engines import here, the_sweep

from gpt2exp import api
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch, request, resume

TINY = [text for text in SMALL if not text.startswith(("model.n_embd", "model.n_layer"))]
TINY += ["train.steps=3", "data.max_tokens=3000", "wandb.mode=disabled"]
SIZES = "sweep.together=model.n_embd=16,32;optimizer.lr=1e-3,5e-4"
Job = tuple[int, tuple[Any, ...]]


def asked(*words: str) -> request.Request:
    """The request of a command line, as the command reads it."""
    args, _ = launch.parsed(words)
    found = resume.resumed_request(args) or request.new_request(args)
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
        found = asked("-m", "seed=1,2", "model.n_layer=1,2", SIZES, *TINY)
        keys = (*self.KEYS, "model.n_layer")
        assert sorted(settings(found, *keys)) == sorted(
            (seed, (*arm, layers)) for seed in (1, 2) for layers in (1, 2) for arm in self.ARMS
        )
        assert found.folders[0] == "000_model.n_embd=16,model.n_layer=1,optimizer.lr=0.001,seed=1"

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
        found = asked("-m", "sweep.together=optimizer=adamw,sgd;model.n_layer=range(1,3)", *TINY)
        assert [(type(job.config.optimizer).__name__, job.config.model.n_layer) for job in found.jobs] == [
            ("AdamW", 1),
            ("SGD", 2),
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
            (["-m", "sweep.together=model.n_embd=16,32"], r"sweep\.together=\[model\.n_embd=16,32\]: one key has"),
            (["-m", "sweep.together=model.n_embd;optimizer.lr=1,2"], r"sweep\.together=model\.n_embd: must be KEY=A,B"),
            (["-m", "sweep.together=model.n_embed=16,32;optimizer.lr=1e-3,5e-4"],
             r"model\.n_embed=16: no such key; did you mean model\.n_embd"),
            (["-m", "sweep.together=model.n_embd=16,x;optimizer.lr=1e-3,5e-4"], r"model\.n_embd=x: must be a whole"),
            (["-m", "sweep.together=model.n_embd=16,32;seed=1,2"], r"sweep\.together: seed=1 is no arm to compare"),
            (["-m", "sweep.together=model.n_embd=16,32;wandb.project=a,b"], r"sweep\.together: wandb\.project=a is no"),
            ([SIZES], r"sweep\.together=\[model\.n_embd=16,32,optimizer\.lr=1e-3,5e-4\]: one run has no arms"),
            (["-m", SIZES, "hydra/sweeper=lr_search"], r"sweep\.together=.*: it takes the basic sweeper"),
        ],
    )  # fmt: skip
    def test_refused(self, words: list[str], line: str) -> None:
        with pytest.raises(BadRequest, match=f"^{line}"):
            asked(*words, *TINY)

    @pytest.fixture(scope="class")
    @staticmethod
    def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A study in a file of the user's own, run."""
        folder = tmp_path_factory.mktemp("together")
        (folder / "mine" / "experiment").mkdir(parents=True)
        text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2\n"
        text += "sweep:\n  together:\n  - model.n_embd=16,32,16\n  - optimizer.lr=1e-3,5e-4,1e-2\n"
        (folder / "mine" / "experiment" / "sizes.yaml").write_text(text)
        words = ["--config-dir", "mine", "experiment=sizes", "model.n_layer=1", *TINY]
        code, _, err = here(folder, *words, figures=True)
        assert (code, err) == (0, "")
        return the_sweep(folder)

    def test_compared(self, swept: Path) -> None:
        """One axis with readable arms, whose differences are those of a t test over the seeds' losses, taken here."""
        result = read(swept / "comparison.json")
        assert result["swept"] == {
            "model.n_embd + optimizer.lr": ["n_embd=16 lr=0.001", "n_embd=32 lr=0.0005", "lr=0.01"]
        }
        losses: dict[tuple[int, float], list[float]] = {}
        for seed in (1, 2):
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
        every = {(seed, arm) for seed in (1, 2, 4) for arm in arms}
        assert set(settings(more, *self.KEYS)) == every
        assert len(more.jobs) == len(every) == len(set(more.folders))
        assert {job.config.seed for job in more.jobs if job.done} == {1, 2}
        assert sum(job.done for job in more.jobs) == 6
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
        words = [SIZES, "sweep.until=answered", "sweep.min_seeds=2", "sweep.max_seeds=2", *TINY]
        with without_figures():
            runs = api.sweep(["model.n_layer=1", *words], tmp_path / "sweep")
        known = record.Sweep.read(tmp_path / "sweep")
        assert known is not None
        assert known.rule["axes"] == {
            "model.n_embd + optimizer.lr": [
                "model.n_embd=16 optimizer.lr=0.001",
                "model.n_embd=32 optimizer.lr=0.0005",
            ]
        }
        assert len(runs.rows) == 4
        (note, *_) = runs.compare().notes
        assert "until each arm of model.n_embd + optimizer.lr has a verdict" in note

    def test_dry(self, tmp_path: Path) -> None:
        code, out, _ = here(tmp_path, "-m", SIZES, *TINY, "dry_run=true")
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


CUBE = ["model.n_layer=1,2,3", "model.n_embd=16,32", "optimizer.lr=1e-3,3e-3"]
KEYS = ("model.n_layer", "model.n_embd", "optimizer.lr")
BASE = (1, 16, 1e-3)
SHUFFLED = ["data.order=shuffled", "sweep.control=true"]


class TestDesign:
    """`sweep.design`: a baseline, and one change at a time."""

    STAR = (BASE, (2, 16, 1e-3), (3, 16, 1e-3), (1, 32, 1e-3), (1, 16, 3e-3))

    def test_one_at_a_time(self) -> None:
        """1 + the sum of (arms - 1) jobs a seed."""
        found = asked("-m", *CUBE, "seed=1,2,3", "sweep.design=one_at_a_time", *TINY)
        assert len(found.jobs) == 3 * (1 + 2 + 1 + 1)
        assert set(settings(found, *KEYS)) == {(seed, arm) for seed in (1, 2, 3) for arm in self.STAR}
        assert settings(found, *KEYS)[0] == (1, BASE)

    def test_leave_one_out(self) -> None:
        """The full set is the last of each."""
        two = ["model.n_layer=1,2", *CUBE[1:]]
        found = asked("-m", *two, "seed=1,2", "sweep.design=leave_one_out", *TINY)
        expected = [(2, 32, 3e-3), (1, 32, 3e-3), (2, 16, 3e-3), (2, 32, 1e-3)]
        assert settings(found, *KEYS) == [(seed, arm) for seed in (1, 2) for arm in expected]

    def test_the_product_stays_as_it_was(self) -> None:
        found, expected = asked("-m", *CUBE, "seed=1,2", *TINY), []
        for layers in (1, 2, 3):
            for width in (16, 32):
                expected += [(seed, (layers, width, lr)) for lr in (1e-3, 3e-3) for seed in (1, 2)]
        assert settings(found, *KEYS) == expected

    def test_with_keys_that_move_together(self) -> None:
        """They are one change."""
        found = asked("-m", "model.n_layer=1,2", SIZES, "sweep.design=one_at_a_time", *TINY)
        assert [arm for _, arm in settings(found, *KEYS)] == [BASE, (2, 16, 1e-3), (1, 32, 5e-4)]

    def test_at_each_budget(self) -> None:
        """A budget is no change: each has the whole design, and its control."""
        words = ["-m", *CUBE[:2], "sweep.over=train.steps=2,4", "sweep.design=one_at_a_time", *SHUFFLED, "seed=1,2"]
        rest = [text for text in TINY if not text.startswith("train.steps")]
        found = settings(asked(*words, *rest), "model.n_layer", "model.n_embd", "data.redraw", "train.steps")
        star = ((1, 16, 0), (1, 16, 1), (2, 16, 0), (3, 16, 0), (1, 32, 0))
        assert sorted(found) == sorted((seed, (*arm, steps)) for seed in (1, 2) for arm in star for steps in (2, 4))

    @pytest.mark.parametrize(
        ("words", "line"),
        [
            (["-m", *CUBE, "sweep.design=leave_one_out"],
             r"sweep\.design=leave_one_out: model\.n_layer has 3 values, so that nobody knows which"),
            (["-m", "seed=1,2", "sweep.design=one_at_a_time"], r"sweep\.design=one_at_a_time: nothing varies"),
            (["sweep.design=one_at_a_time"], r"sweep\.design=one_at_a_time: one run has no arms to compare; add -m"),
            (["-m", *CUBE, "sweep.design=star"], r"sweep\.design=star: no such value; choose one of product, one_at"),
            (["-m", *CUBE, "sweep.design=product,leave_one_out"], r"sweep\.design=product, sweep\.design=leave_one"),
            (["-m", *CUBE, "sweep.control=true"], r"sweep\.control=true: data\.order=sequential has no other order"),
            (["-m", *CUBE, *SHUFFLED, "data.redraw=1"], r"data\.redraw=1: sweep\.control=true sets it; leave one"),
            (["data.redraw=1"], r"data\.redraw=1: data\.order=sequential draws no permutation; add"),
        ],
    )  # fmt: skip
    def test_refused(self, words: list[str], line: str) -> None:
        with pytest.raises(BadRequest, match=f"^{line}"):
            asked(*words, *TINY)

    @pytest.fixture(scope="class")
    @staticmethod
    def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Two axes, one at a time, with a control."""
        folder = tmp_path_factory.mktemp("design")
        words = ["-m", "seed=1,2", "model.n_layer=2,1", "optimizer.lr=3e-3,3e-4", "sweep.design=one_at_a_time"]
        code, out, err = here(folder, *words, *SHUFFLED, "model.n_embd=16", *TINY)
        assert (code, err) == (0, "")
        assert out.index("A/A check") < out.rindex("model.n_layer=1 ")
        return the_sweep(folder)

    def test_compared(self, swept: Path) -> None:
        """Each arm against the baseline's runs; the baseline is the first value, though another is the default."""
        result = read(swept / "comparison.json")
        assert result["swept"] == {
            "data.redraw": ["0", "1"],
            "model.n_layer": ["2", "1"],
            "optimizer.lr": ["0.003", "0.0003"],
        }
        found: dict[tuple[int, int, float], list[float]] = {}
        for path in sorted(swept.glob("*/summary.json")):
            of = read(path)
            config = of["config"]
            where = config["data"]["redraw"], config["model"]["n_layer"], config["optimizer"]["lr"]
            found.setdefault(where, []).append(of["loss_mean_last10"])
        base = np.array(found[0, 2, 3e-3])
        arms = {"data.redraw": (1, 2, 3e-3), "model.n_layer": (0, 1, 3e-3), "optimizer.lr": (0, 2, 3e-4)}
        losses = [row for row in result["axes"] if row["metric"] == "loss_mean_last10"]
        assert [row["key"] for row in losses] == list(arms), "the control is the first"
        assert sorted(found) == sorted([(0, 2, 3e-3), *arms.values()])
        for row in losses:
            expected = stats.ttest_rel(found[arms[row["key"]]], base)
            assert row["mean_difference"] == pytest.approx(float(np.mean(np.array(found[arms[row["key"]]]) - base)))
            assert row["p_value"] == pytest.approx(expected.pvalue)
            assert (row["n_seeds"], row["n_pairs"], row["dropped_pairs"]) == (2, 2, 0)
            assert row["control"] == (row["key"] == "data.redraw")
        control, *others = losses
        assert control["p_holm"] == control["p_value"], "it takes nothing from the others"
        smaller, larger = sorted(row["p_value"] for row in others)
        assert sorted(row["p_holm"] for row in others) == pytest.approx([2 * smaller, max(2 * smaller, larger)])
        assert result["interactions"] == []

    def test_shown(self, swept: Path) -> None:
        for page in ("report.md", "report.html"):
            text = (swept / page).read_text(encoding="utf-8")
            verdicts = text[text.index("A/A check") :]
            assert verdicts.index("with another data order (data.redraw=1) the baseline differs from itself by") < 40
            assert "model.n_layer=1" in verdicts

    def test_the_control_shares_the_weights_and_nothing_of_the_order(self, swept: Path) -> None:
        """The first loss differs by the batch alone; the permutations are those of numpy, drawn here."""
        for seed in (1, 2):
            (one,) = swept.glob(f"???_model.n_layer=2,optimizer.lr=0.003,seed={seed}")
            (other,) = swept.glob(f"*data.redraw=1*seed={seed}")
            first, second = (read(folder / "summary.json") for folder in sorted((one, other)))
            assert first["config"]["seed"] == second["config"]["seed"] == seed
            assert first["loss_first"] != second["loss_first"]
        before, drawn = (np.random.default_rng([7, 0, *more]).permutation(50).tolist() for more in ([], [1]))
        assert orders(redraw=0) == before
        assert orders(redraw=1) == drawn
        assert before != drawn

    def test_a_pair_that_failed_is_dropped(self, swept: Path, tmp_path: Path) -> None:
        """Counted among the runs that the design has, not among those that it never had."""
        import shutil

        from gpt2exp.compare.comparison import compare
        from gpt2exp.compare.comparison import read as rows_of

        copy = tmp_path / "copy"
        shutil.copytree(swept, copy)
        (lost,) = copy.glob("*model.n_layer=1*seed=2")
        (lost / "summary.json").unlink()
        (lost / "status.json").write_text('{"state": "failed", "step": 1, "error": "lost"}')
        rows = {row.key: row for row in compare(rows_of([copy])).axes if row.metric == "loss_mean_last10"}
        assert {key: (row.n_seeds, row.dropped_pairs) for key, row in rows.items()} == {
            "data.redraw": (2, 0),
            "model.n_layer": (1, 1),
            "optimizer.lr": (2, 0),
        }

    def test_gone_on_with(self, swept: Path) -> None:
        """A new seed gets the whole design, a new arm the baseline's settings of the other axes."""
        more = asked(f"resume={swept}", "seed=4", "model.n_layer=3")
        keys = ("data.redraw", "model.n_layer", "optimizer.lr")
        star = ((0, 2, 3e-3), (1, 2, 3e-3), (0, 1, 3e-3), (0, 3, 3e-3), (0, 2, 3e-4))
        every = {(seed, arm) for seed in (1, 2, 4) for arm in star}
        assert set(settings(more, *keys)) == every
        assert len(more.jobs) == len(every) == len(set(more.folders))
        again = asked(*more.argv)
        assert set(settings(again, *keys)) == every
        with pytest.raises(BadRequest, match=r"^sweep\.design=product: that was decided before the first run"):
            asked(f"resume={swept}", "sweep.design=product")

    def test_the_command_of_a_full_set(self, tmp_path: Path) -> None:
        """Typed again it has the same full set."""
        words = ["-m", "model.n_layer=1,2", "optimizer.lr=1e-3,3e-3", "sweep.design=leave_one_out", "model.n_embd=16"]
        assert here(tmp_path, *words, "sweep.fail_fast=true", "seed=1", *TINY)[0] == 0
        sweep = the_sweep(tmp_path)
        assert read(sweep / "comparison.json")["swept"] == {
            "model.n_layer": ["2", "1"],
            "optimizer.lr": ["0.003", "0.001"],
        }
        again = asked(*asked(f"resume={sweep}", "seed=2").argv)
        assert settings(again, *KEYS)[0] == (1, (2, 16, 3e-3))

    def test_until_it_is_answered(self, tmp_path: Path) -> None:
        """No seed is run for the control's sake."""
        words = ["-m", "optimizer.lr=1e-4,3e-3", "sweep.until=answered", "sweep.max_seeds=6", *SHUFFLED]
        code, out, _ = here(tmp_path, *words, "model.n_layer=1", "model.n_embd=16", *TINY, "train.steps=8")
        assert code == 0
        result = read(the_sweep(tmp_path) / "comparison.json")
        assert len(result["seeds"]) < 6
        assert "every arm has its verdict" in out
        assert {row["key"] for row in result["axes"]} == {"data.redraw", "optimizer.lr"}


def orders(redraw: int) -> list[int]:
    """In which order a text of 50 windows is read in the first epoch, by the first token of each window."""
    import torch

    from gpt2exp.config import DataConfig, DataOrder, TrainConfig
    from gpt2exp.data.batches import Windows

    tokens: Any = np.arange(401, dtype=np.uint16)
    train, data = TrainConfig(batch_size=1, seq_len=8), DataConfig(order=DataOrder.shuffled, redraw=redraw)
    windows = Windows(tokens, train, data, 7, torch.device("cpu"))
    return [int(windows.train(number)[0][0, 0]) // 8 for number in range(50)]


@pytest.mark.parametrize(("shift", "failed"), [(0.0, False), (0.2, True)])
def test_what_a_control_says(shift: float, failed: bool) -> None:
    """It fails if the two orders differ by more than their own scatter."""
    from gpt2exp.compare import words
    from gpt2exp.compare.effect import Effect, judge
    from gpt2exp.compare.inference import infer

    differences = [shift + value for value in (0.01, -0.02, 0.015, -0.01, 0.005)]
    found = infer(differences)
    effect = Effect("data.redraw", "0", "1", "loss_mean_last10", control=True, n_seeds=5)
    effect.differences = dict(zip("12345", differences, strict=True))
    effect.mean_difference, effect.ci95, effect.p_value = found.mean, [found.low, found.high], found.p
    effect.p_holm = found.p
    judge(effect, lower_is_better=True, margin=None)
    said = words._sentence(effect, "", None)
    assert said.startswith(f"A/A check {'failed' if failed else 'passed'}: with another data order (data.redraw=1) the")
    assert ("doubt the verdicts" in said) == failed
    assert "seeds in all" not in said
