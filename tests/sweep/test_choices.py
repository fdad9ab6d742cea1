"""A choice from outside is one module and one YAML file. It is checked by its signature and recorded with its code's
sha256. Runs, resume, sweeps, workers, several processes and comparisons treat it like ours. Its code runs only where
the command line allows it; a comparison runs none.
"""

from __future__ import annotations

import hashlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import SMALL, at_step, finish, in_ranks, losses, read, run, start, typed_in

import gpt2exp
from gpt2exp import choices, export, sample, schema, section
from gpt2exp.compare import __main__ as comparing
from gpt2exp.config import ModelConfig, RunConfig
from gpt2exp.model import init
from gpt2exp.model.gpt import GPT
from gpt2exp.run import record
from gpt2exp.sweep import composing, launch
from gpt2exp.sweep import request as requests
from gpt2exp.training import outside

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "experiments" / "choices"
QUIET = "wandb.mode=disabled"

CODE = '''
import torch

class Signs(torch.optim.Optimizer):
    """Steps by the sign of a momentum."""
    def __init__(self, params, lr, decay: float = 0.9, pair: tuple[float, float] = (0.5, 0.5), note: str | None = None):
        super().__init__(params, {"lr": lr, "decay": decay, "seen": 0})
        assert isinstance(pair, tuple)
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["seen"] += 1
            for weight in group["params"]:
                kept = self.state[weight]
                kept["count"] = kept.get("count", 0) + 1
                if weight.dim() > 1:
                    kept["rows"] = kept.get("rows", 0) + weight.grad.abs().sum(1)
                kept["sum"] = kept["sum"] * group["decay"] + weight.grad if "sum" in kept else weight.grad.clone()
                weight.add_(kept["sum"].sign(), alpha=-group["lr"] / group["seen"] ** 0.5 / kept["count"] ** 0.1)

def half(name, parameter, scale: float = 0.5):
    """Matrices at half the std."""
    if parameter.dim() == 2:
        parameter.normal_(std=0.02 * scale)

def count(words: int = 3000):
    yield " ".join(map(str, range(words)))
    yield list(range(100))

def spread(model, batch):
    """Of the logits."""
    return model(batch[0]).std()

def linear(step, steps, end=0.0):
    return 1 - (1 - end) * step / max(1, steps - 1)
'''
FILES = {
    "optimizer/signs": "_target_: my_choices.Signs\nlr: 1e-3\n",
    "init/half": "_target_: my_choices.half\n",
    "data/count": "_target_: my_choices.count\n",
    "metric/spread": "_target_: my_choices.spread\nunit: logits\nbetter: higher\n",
    "schedule/linear": "_target_: my_choices.linear\n",
}
ALL = ["optimizer=signs", "init=half", "data=count", "metric=spread", "optimizer.schedule=linear", "schedule.end=0.5"]


def write(folder: Path, code: str = CODE, files: dict[str, str] = FILES) -> Path:
    """A user's config folder."""
    for name, text in {**{f"{name}.yaml": text for name, text in files.items()}, "my_choices.py": code}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test, no code may run here, and Python looks for modules where it did."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    choices.allow()
    choices.trust(False)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `mine` in the current one."""
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "mine")


def only(*args: str) -> RunConfig:
    """The configuration of a command line with one job."""
    parsed = composing.arguments(args)
    choices.allow(composing.config_folder(parsed), Path.cwd())
    (job,) = requests.new_request(parsed).jobs
    return job.config


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line that refuses a command, which wrote nothing."""
    before = sorted(Path.cwd().rglob("*"))
    code = launch.command([*args])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    (line,) = err.splitlines()
    assert sorted(Path.cwd().rglob("*")) == before
    return line


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "optimizer.dekay=0.5",
            "optimizer.dekay=0.5: Signs from outside has no such key; did you mean optimizer.decay?",
        ),
        ("optimizer.decay=high", "optimizer.decay: Value 'high' of type 'str' could not be converted to Float"),
        ("optimizer.pair=[a,b]", "optimizer.pair[0]: Value 'a' of type 'str' could not be converted to Float"),
        ("optimizer.lr=0", "optimizer.lr=0.0: must be a finite number above 0"),
        ("optimizer.betas=[0.9,0.95]", "optimizer.betas: a key of optimizer=adamw alone"),
        ("optimizer.min_lr=0.1", "optimizer.min_lr=0.1: has no meaning under optimizer.schedule=constant"),
        ("optimizer._target_=os.system", "optimizer._target_=os.system: a choice brings keys of its own"),
        ("+optimizer._target_=os.system", "optimizer._target_=os.system: a choice brings keys of its own"),
        ("optimizer=sings", "optimizer=sings: no such choice; did you mean optimizer=signs?"),
        ("optimizer.schedule=liner", "optimizer.schedule=liner: no such schedule"),
        ("schedule=linear", "schedule=linear: is not chosen; write optimizer.schedule=linear"),
        ("schedule.end=0.5", "schedule.end=0.5: no such key"),
    ],
)
def test_keys_are_checked(typed: str, said: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--config-dir", "mine", "model=nano", "optimizer=signs", typed)
    assert line.startswith(f"gpt2exp: {said}"), line


def test_keys_have_the_signatures_types_and_defaults(mine: Path) -> None:
    asked: Any = only("--config-dir", "mine", "optimizer=signs", "optimizer.pair=[1,2]").optimizer
    assert (asked.name, asked.lr, asked.decay, asked.pair, asked.note) == ("signs", 1e-3, 0.9, [1.0, 2.0], None)
    assert asked._source_ == str(mine / "my_choices.py")
    (mine / "optimizer" / "more.yaml").write_text("_target_: my_choices.Signs\ndecay: 0.25\nnote: x\n")
    again: Any = only("--config-dir", "mine", "optimizer=more").optimizer
    assert (again.lr, again.decay, again.note) == (3e-4, 0.25, "x")


BAD = {
    "import math\nraise RuntimeError('no\\nluck')": "my_choices.py raised RuntimeError as it was imported: no",
    "def Sings(params): ...": "my_choices.py has no class or function Signs",
    "def Signs(): ...": "it is called as Signs(params, KEY=VALUE), but too many positional arguments",
    "def Signs(params, need): ...": "optimizer.need: my_choices.Signs needs it",
    "def Signs(params): return 3": "optimizer=signs: it returned int, where a torch.optim.Optimizer",
    "def Signs(params): return params.shape": "optimizer=signs: its code raised AttributeError: 'list' object",
    "import torch\ndef Signs(params, lr): return torch.optim.SGD(params[1:], lr=lr)": "to 0 optimizers",
    "def Signs(params, name): ...": "its parameter name cannot be a key; rename it",
    "def Signs(params:": "my_choices.py raised SyntaxError",
}


@pytest.mark.parametrize("code", BAD, ids=range(len(BAD)))
def test_bad_modules_are_one_line(code: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "my_choices.py").write_text(code)
    assert BAD[code] in refused(capsys, "--config-dir", "mine", "model=nano", "optimizer=signs")


OTHERS = {
    "init=half": (
        "def half(name, parameter): parameter.fill_(float('nan'))",
        "init=half: it left transformer.wte.weight",
    ),
    "metric=spread": ("def spread(model, batch): return 'much'", "metric=spread: its code raised"),
    "optimizer.schedule=linear": ("def linear(step, steps): return -1", "it returned -1.0 for step 0 of 50"),
    "data=count": ("def count(): yield 3.5", "data=count: its code yielded float, neither a text nor token ids"),
}


@pytest.mark.parametrize("typed", OTHERS)
def test_other_bad_code_is_one_line(typed: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = OTHERS[typed]
    (mine / "my_choices.py").write_text(code)
    assert said in refused(capsys, "--config-dir", "mine", "model=nano", typed)


@pytest.mark.parametrize("name", ["loss", "config", "seed", "two words"])
def test_a_metrics_name_is_its_own(name: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "metric" / "spread.yaml").rename(mine / "metric" / f"{name}.yaml")
    assert "is recorded under its name" in refused(capsys, "--config-dir", "mine", "model=nano", f"metric='{name}'")


def test_a_module_that_is_missing_or_hides_another(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "my_choices.py").rename(mine / "scipy.py")
    flags = ["--config-dir", "mine", "model=nano", "optimizer=signs"]
    assert f"no my_choices.py in {mine} or {mine.parent}; put it there" in refused(capsys, *flags)
    (mine / "optimizer" / "signs.yaml").write_text("_target_: scipy.Signs\n")
    assert "scipy is the name of an installed module too; rename scipy.py" in refused(capsys, *flags)
    (mine / "optimizer" / "signs.yaml").write_text("_target_: torch.optim.SGD\n")
    assert "optimizer._target_=torch.optim.SGD: must be MODULE.NAME" in refused(capsys, *flags)
    (mine / "precision").mkdir()
    (mine / "precision" / "odd.yaml").write_text("_target_: my.odd\n")
    assert "precision" in refused(capsys, "--config-dir", "mine", "precision=odd")


STRANGERS = {
    "optimizer": ("../strangers/evil.Signs", "must be MODULE.NAME"),
    "train": ("my_choices.Signs", "no choice from outside can be made here"),
    "init": ("gpt2exp.export.write", "no file of the package's names that code"),
    "data": ("os.system", "would run code of"),
}


@pytest.mark.parametrize("section", STRANGERS)
def test_a_strangers_folder_runs_nothing(section: str, mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it names is refused, also where it lies beside and has the sha256 recorded."""
    target, said = STRANGERS[section]
    evil = Path.cwd() / "strangers" / "evil.py"
    evil.parent.mkdir()
    evil.write_text("raise SystemExit(9)")
    asked = schema.plain(RunConfig())
    sha256 = hashlib.sha256(evil.read_bytes()).hexdigest()
    asked[section] |= {"name": "../../strangers/x", "_target_": target, "_source_": str(evil), "_sha256_": sha256}
    (evil.parent / ".hydra").mkdir()
    (evil.parent / ".hydra" / "config.yaml").write_text(json.dumps(asked))
    (evil.parent / ".hydra" / "overrides.yaml").write_text("[]")
    line = refused(capsys, "resume=strangers")
    if section != "init":
        assert said in line, line
    assert comparing.command(["strangers"]) == 2, "there is nothing to compare"
    assert "wait for one to finish" in capsys.readouterr().err


def test_help_lists_them_and_runs_none(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "my_choices.py").write_text("raise SystemExit(9)")
    assert launch.command(["--config-dir", "mine", "--help"]) == 0
    out = capsys.readouterr().out
    for line in ("optimizer=adamw|sgd|signs", "metric=spread", "schedule=linear"):
        assert line in out.replace("signs|sgd", "sgd|signs"), line
    assert launch.command(["--config-dir", "mine", "model=nano", "optimizer.typo=1"]) == 2, "nor does another choice"


def end_of(folder: Path) -> dict[str, bytes]:
    """Weights and optimizer state at the end of a run, bit for bit."""
    (newest, *_) = record.saved(folder).values()
    tensors = load_file(newest / "model.safetensors") | load_file(newest / "training.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_killed_it_goes_on_bit_for_bit_from_elsewhere(tmp_path: Path) -> None:
    """All kinds at once; the optimizer keeps numbers and a tensor of another shape. Without permission no code runs."""
    write(tmp_path / "here" / "mine")
    args = [
        "--config-dir",
        "mine",
        *SMALL,
        *ALL,
        "train.steps=12",
        "train.batch_size=2",
        QUIET,
        "checkpoint.save_last=true",
    ]
    assert run(tmp_path / "here", *args, "hydra.run.dir=whole").returncode == 0
    process = start(tmp_path / "here", *args, "hydra.run.dir=part", "checkpoint.every=4", held=":6")
    with at_step(tmp_path / "here" / "part", process) as (part, held):
        held.send_signal(signal.SIGKILL)
    finish(process)
    no = run(tmp_path / "else", f"resume={part}")
    assert no.returncode == 2
    assert f"would run code of {tmp_path}/here/mine/my_choices.py; if it is yours, add --trust" in no.stderr
    again = run(tmp_path / "else", "--trust", f"resume={part}")
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "here" / "whole"
    assert losses(part) == losses(whole)
    assert end_of(part) == end_of(whole)
    summary = read(part / "summary.json")
    assert summary["config"]["optimizer"]["_sha256_"] == read(whole / "summary.json")["config"]["schedule"]["_sha256_"]
    assert summary["outside"]["optimizer"] == "signs: Steps by the sign of a momentum."
    rows = read(part / "metrics.jsonl")
    assert summary["spread"] == rows[-1]["spread"] != rows[0]["spread"]
    assert [row["step"] for row in rows if "spread" in row] == [0, 10, 11]
    assert rows[0]["lr"] == pytest.approx(1e-3)
    assert rows[-1]["lr"] == pytest.approx(0.5e-3)
    (tmp_path / "here" / "mine" / "my_choices.py").write_text(f"{CODE}\n# other code\n")
    other = run(tmp_path / "else", "--config-dir", str(tmp_path / "here" / "mine"), f"resume={part}", "train.steps=14")
    assert other.returncode == 2
    assert "my_choices.py is not the code of before" in other.stderr


@pytest.mark.parametrize("how", [[], pytest.param(["hydra/launcher=workers"], marks=pytest.mark.slow)])
def test_a_sweep_ends_in_verdicts(how: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The comparison can be made again without the code, and refuses runs of changed code."""
    folder = tmp_path / "work"
    write(folder / "mine")
    asked = ["--config-dir", "mine", *SMALL, "metric=spread", "train.steps=4", QUIET]
    done = run(folder, *asked, "-m", "optimizer=adamw,signs", "seed=1,2", "hydra.sweep.dir=swept", *how)
    assert done.returncode == 0, done.stderr
    before = read(folder / "swept" / "comparison.json")
    verdicts = {row["metric"]: row["verdict"] for row in before["axes"]}
    assert verdicts["spread"] in ("better", "worse", "indistinguishable", "inconclusive")
    assert verdicts["loss_mean_last10"] in ("better", "worse", "indistinguishable", "inconclusive")
    assert "spread, logits" in (folder / "swept" / "report.md").read_text()
    if how:  # by other processes than the sweep's own
        return
    code = (folder / "mine" / "my_choices.py").read_text()
    (folder / "mine" / "my_choices.py").write_text("raise SystemExit(9)")
    assert comparing.command([str(folder / "swept")]) == 0
    assert read(folder / "swept" / "comparison.json")["axes"] == before["axes"]
    (folder / "mine" / "my_choices.py").write_text(f"{code}\n# changed\n")
    more = run(folder, "--config-dir", "mine", "resume=swept", "seed=5")
    assert more.returncode == 2
    assert "is not the code of before" in more.stderr
    assert run(folder, *asked, "optimizer=signs", "seed=4", "hydra.run.dir=other").returncode == 0
    capsys.readouterr()
    assert comparing.command([str(folder / "swept"), str(folder / "other"), "--out", str(tmp_path / "both")]) == 2
    said = "optimizer._target_=my_choices.Signs: its code was changed between the runs"
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_an_isolated_job_takes_them(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    words = ["--config-dir", "mine", *SMALL, "metric=spread", "optimizer=signs", "train.steps=2", QUIET]
    done = run(tmp_path, "-m", *words, "seed=1", "sweep.isolate=true", "hydra.sweep.dir=swept")
    assert done.returncode == 0, done.stderr
    assert "spread" in read(tmp_path / "swept" / "000" / "summary.json")


def test_a_run_from_python_takes_them(mine: Path) -> None:
    """As the command: the same losses, and overrides that name the choice, so that the run can be gone on with."""
    words = [*SMALL, QUIET, "train.steps=3", "optimizer=signs", "optimizer.decay=0.5", "init=half"]
    words.append("checkpoint.save_last=true")
    summary = gpt2exp.run(gpt2exp.compose("--config-dir", str(mine), *words), "by-hand")
    assert summary["error"] is None
    assert {"optimizer=signs", "optimizer.decay=0.5", "init=half", "train.steps=3"} <= set(summary["overrides"])
    assert not [text for text in summary["overrides"] if "_=" in text or text.startswith("optimizer.name")]
    assert launch.command(["--config-dir", str(mine), *words, "hydra.run.dir=typed"]) == 0
    assert losses(Path("by-hand")) == losses(Path("typed"))
    again = ["--config-dir", str(mine), "resume=by-hand", "train.steps=4"]
    assert launch.command(again) == 0
    assert len(losses(Path("by-hand"))) == 4


def test_samples_and_exports_run_no_code_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither runs an optimizer's code; sampling runs a slot's class, and the export refuses it."""
    for name, typed in (("first", "optimizer=lion"), ("second", "model/mlp=swiglu")):
        args = [*SMALL, typed, "train.steps=1", "checkpoint.save_last=true", QUIET, f"hydra.run.dir={name}"]
        assert run(tmp_path, "--config-dir", str(EXAMPLES), *args).returncode == 0
    monkeypatch.chdir(tmp_path)
    assert export.command(["first", "out"]) == 0
    assert sample.command(["first", "--tokens", "1"]) == 0
    assert export.command(["second", "more"]) == 2
    assert (
        "model/mlp=swiglu: Hugging Face's GPT-2 has no such choice; it takes model/mlp=gpt2" in capsys.readouterr().err
    )
    section.OUTSIDE.clear()  # as in a new process
    assert sample.command(["second", "--tokens", "1"]) == 2
    assert f"would run code of {EXAMPLES}/swiglu.py" in capsys.readouterr().err
    assert sample.command(["second", "--tokens", "1", "--trust"]) == 0


def test_schedules_of_ours_and_others_are_one_axis(mine: Path) -> None:
    args = ["-m", "--config-dir", "mine", "optimizer.schedule=constant,cosine,linear", "schedule.end=0.5", "seed=1,2"]
    parsed = composing.arguments(args)
    choices.allow(composing.config_folder(parsed))
    with pytest.raises(Exception, match=r"schedule\.end=0\.5: no such key"):
        requests.new_request(parsed)  # of two of the three
    parsed.overrides.remove("schedule.end=0.5")
    found = [job.config for job in requests.new_request(parsed).jobs]
    assert [one.schedule.name for one in found] == ["", "", "", "", "linear", "linear"]


@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    write(tmp_path / "work" / "mine")
    args = ["--config-dir", "mine", *SMALL, *ALL, "train.steps=8", QUIET]
    in_ranks(2, typed_in, tmp_path / "work", *args, "hydra.run.dir=two")
    done = run(tmp_path / "work", *args, "hydra.run.dir=one")
    assert done.returncode == 0, done.stderr
    two, one = (torch.tensor(losses(tmp_path / "work" / name)) for name in ("two", "one"))
    torch.testing.assert_close(two, one, rtol=1e-4, atol=0)


# --- the examples ----------------------------------------------------------------------------------------------------


def example(*args: str) -> RunConfig:
    """The configuration of a command line over `experiments/choices`."""
    return only("--config-dir", str(EXAMPLES), *args)


def test_a_step_of_lion_is_numpys() -> None:
    asked: Any = example("optimizer=lion", "optimizer.lr=0.01", "optimizer.weight_decay=0.2").optimizer
    rng, model = np.random.default_rng(0), torch.nn.Linear(3, 2)
    (made,) = outside.optimizer(asked, model)
    weights = [p.detach().numpy().astype(np.float64) for p in model.parameters()]
    momenta = [np.zeros_like(weight) for weight in weights]
    for _ in range(4):
        for number, parameter in enumerate(model.parameters()):
            gradient = rng.normal(size=parameter.shape)
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            step = np.sign(0.9 * momenta[number] + 0.1 * gradient)
            decay = 0.2 if parameter.dim() == 2 else 0.0
            weights[number] = weights[number] * (1 - 0.01 * decay) - 0.01 * step
            momenta[number] = 0.99 * momenta[number] + 0.01 * gradient
        made.step()
    for parameter, expected in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_step_of_muon_is_orthogonal() -> None:
    """The update of a matrix has singular values near one, by the momentum's own directions; the rest is AdamW's."""
    asked: Any = example("optimizer=muon", "optimizer.lr=0.01", "optimizer.weight_decay=0").optimizer
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=40))
    init.initialise(model, RunConfig().init, seed=1)
    made = outside.optimizer(asked, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for one in made:
        one.step()
    for name, parameter in model.named_parameters():
        step, gradient = (before[name] - parameter.detach()) / 0.01, parameter.grad
        assert gradient is not None
        if name.startswith("transformer.h.") and parameter.dim() == 2:
            step /= 0.2 * max(parameter.shape) ** 0.5  # scaled to the size of AdamW's
            u, _, v = torch.linalg.svd(gradient.double(), full_matrices=False)
            along = torch.diagonal(u.T @ step.double() @ v.T)
            assert 0.5 < float(along.min()) < float(along.max()) < 1.4, name
            assert float((step.double() - u @ torch.diag(along) @ v).norm()) < 0.2 * float(step.norm()), name
        else:  # the first step of AdamW is the gradient's sign
            torch.testing.assert_close(step, gradient.sign(), rtol=1e-2, atol=1e-2)
    assert "in bf16 whatever precision says" in choices.about(example("optimizer=muon"))["optimizer"]


def test_schedules_by_hand() -> None:
    linear, wsd = (example(f"optimizer.schedule={name}", "schedule.warmup=2").schedule for name in ("linear", "wsd"))
    assert [outside.rate(linear, step, 7) for step in range(7)] == [0.5, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [outside.rate(wsd, step, 10) for step in range(10)] == [0.5, *[1] * 7, 0.5, 0]


def test_entropy_by_hand() -> None:
    asked = example("metric=entropy")
    logits = torch.tensor([[[0.0, np.log(3.0)], [5.0, 5.0]]])
    found = outside.measure(asked.metric, lambda idx: logits, (torch.zeros(1, 2), torch.zeros(1, 2)))  # type: ignore[arg-type]
    assert found == {"entropy": pytest.approx((-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)) + np.log(2)) / 2)}
