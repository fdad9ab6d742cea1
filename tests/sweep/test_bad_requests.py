"""A bad request ends with exit code 2 and one line that names the key and the remedy; nothing is written.

Each row is a command line as a user types it, run in a folder with texts, configuration files and damaged runs; the
folder must be unchanged afterwards. Bounds of single fields are in test_config.py.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import COMPARE, PROGRAM, run

from gpt2exp.compare import __main__ as conclude
from gpt2exp.sweep import launch

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the row says it lacks")


class Bad(NamedTuple):
    """A bad request: the line as typed, how the answer starts, what of the remedy it must hold."""

    line: str
    start: str
    remedy: str


REQUESTS = [
    Bad("sed=3", "sed=3: no such key", "did you mean seed?"),
    Bad("++model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
    Bad("lr=0.1", "lr=0.1: no such key", "did you mean optimizer.lr?"),
    Bad("train.max_iters=9", "train.max_iters=9: no such key", "did you mean train.steps?"),
    Bad("frobnicate.much=1", "frobnicate.much=1: no such key", "gpt2exp --help"),
    Bad("+model.typo=3", "model.typo=3: no such key", "keys of model: model.n_layer, model.n_head"),
    Bad("+seed=3", "+seed=3: the key is there already", "leave out the +: seed=3"),
    Bad("+experiment=precision", "+experiment=precision: the key is there", "leave out the +: experiment=precision"),
    Bad("sweep=true", "sweep=true: a section, not a value", "sweep.fail_fast, sweep.isolate, sweep.margin"),
    Bad("model={n_layer:3}", "model={'n_layer': 3}: no such choice", "choose one of gpt2,"),
    Bad("model=nanoo", "model=nanoo: no such choice", "did you mean model=nano?"),
    Bad("experiment=null", "experiment=null: no such choice", "choose one of first_steps, "),
    Bad("train.steps=2.5", "train.steps=2.5: must be a whole number", "the default is 50"),
    Bad("train.steps=null", "train.steps=null: must be a whole number", "the default is 50"),
    Bad("train.steps=", "train.steps=: must be a whole number", "the default is 50"),
    Bad("optimizer.lr=fast", "optimizer.lr=fast: must be a number", "the default is 0.0003"),
    Bad("optimizer.lr=true", "optimizer.lr=true: must be a number", "the default is 0.0003"),
    Bad("model.tie_weights=2", "model.tie_weights=2: must be true or false", "the default is true"),
    Bad("train.device=gpu", "train.device=gpu: no such value", "choose one of auto, cpu, cuda, mps"),
    Bad("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list", "optimizer.betas=[0.9,0.999]"),
    Bad("optimizer.betas=[a,b]", "optimizer.betas=[a,b]: must be a list", "optimizer.betas=[0.9,0.999]"),
    Bad("wandb.name=[a]", "wandb.name=[a]: must be text", "the default is null"),
    Bad("train.batch_size=2.5", "train.batch_size=2.5: must be a whole number or auto", "the default is 4"),
    Bad("train.compile=maybe", "train.compile=maybe: no such value", "choose one of auto, true, false"),
    Bad("train.pad_vocab=64", "train.pad_vocab=64: must be true or false or auto", "the default is auto"),
    Bad("train.loss_chunk=none", "train.loss_chunk=none: must be at least 1, or auto", "train.loss_chunk=auto"),
    Bad("train.steps=0", "train.steps=0: must be at least 1", "try train.steps=50"),
    Bad("optimizer.lr=0", "optimizer.lr=0.0: must be a finite number above 0", "try optimizer.lr=0.0003"),
    Bad("seed=9223372036854775808", "seed=9223372036854775808: must be at least 0 and below", "try seed=1337"),
    Bad("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers", "optimizer.betas=[0.9,0.95]"),
    Bad("train.tokens_per_step=100", "train.tokens_per_step=100: not a multiple", "try train.tokens_per_step=128"),
    Bad("wandb.project=''", "wandb.project='': must be 1 to 128 characters", "try wandb.project=gpt2exp"),
    Bad("wandb.project=a/b", "wandb.project=a/b: must be 1 to 128 characters", "try wandb.project=gpt2exp"),
    Bad(f"wandb.tags=[{'x' * 65}]", "wandb.tags=[xxx", "a tag must have 1 to 64 characters"),
    Bad("model.n_head=7", "model.n_embd=768: not divisible by model.n_head=7", "a model.n_head that divides it"),
    Bad("model=nano train.seq_len=257", "train.seq_len=257: longer than model.block_size=256", "try train.seq_len=256"),
    Bad("train.eval_every=5", "train.eval_every=5: there is no validation data", "add data.val_fraction=0.1"),
    Bad("optimizer.min_lr=1e-5", "optimizer.min_lr=1e-05: has no meaning", "add optimizer.schedule=cosine"),
    Bad(
        "optimizer.schedule=cosine optimizer.min_lr=1",
        "optimizer.min_lr=1.0: above the peak optimizer.lr=0.0003",
        "try optimizer.min_lr=0",
    ),
    Bad(
        "optimizer.schedule=cosine optimizer.warmup_steps=51",
        "optimizer.warmup_steps=51: longer than the run, train.steps=50",
        "try optimizer.warmup_steps=5",
    ),
    Bad("optimizer.schedule_steps=99", "optimizer.schedule_steps=99: has no meaning", "add optimizer.schedule=cosine"),
    Bad(
        "optimizer.schedule=cosine optimizer.schedule_steps=49",
        "optimizer.schedule_steps=49: shorter than train.steps=50",
        "try optimizer.schedule_steps=50 or more",
    ),
    Bad(
        "optimizer.schedule=cosine optimizer.schedule_steps=60 optimizer.warmup_steps=61",
        "optimizer.warmup_steps=61: longer than optimizer.schedule_steps=60",
        "try optimizer.warmup_steps=6",
    ),
    Bad("init.std=None", "init.std=null: init=gpt2 needs a number", "try init.std=0.02"),
    Bad("init=xavier init.std=0.02", "init.std=0.02: init=xavier derives it", "leave it out, or use init=gpt2"),
    Bad("init=torch init.position_std=1", "init.position_std=1.0: init=torch has PyTorch's own", "leave it out"),
    Bad(
        "init=pretrained init.path=x init.residual_scaling=true",
        "init.residual_scaling=true: init=pretrained draws nothing",
        "leave it out",
    ),
    Bad("init=pretrained", "init.path=null: init=pretrained needs to know where they are", "init.path=FOLDER"),
    Bad("-m init=gpt2,torch init.path=folder", "init.path=folder: init=gpt2 draws its weights", "add init=pretrained"),
    Bad("init=pretrained init.path=./nowhere", "init.path=./nowhere: no such folder", "config.json and model.safe"),
    Bad("init=pretrained init.path=book.txt", "init.path=book.txt: a file", "name the folder that it lies in"),
    Bad("~train.steps=50", "~train.steps: a key cannot be deleted", "train.steps=VALUE"),
    Bad("seed=range(3)", "seed=range(3): several values make a sweep", "add -m to run every one of them"),
    Bad("data.path=a,b.txt", "data.path=a,b.txt: several values make a sweep", "'data.path=\"a,b.txt\"'"),
    Bad("-m seed=interval(0,1)", "seed=interval(0,1): the basic sweeper takes lists", "write seed=A,B"),
    Bad("-m seed=1,x", "seed=x: must be a whole number", "the default is 1337"),
    Bad("-m precision=fp32,int3", "precision=int3: no such choice", "fp32, "),
    Bad("-m model.n_head=12,7 seed=1,2", "model.n_embd=768: not divisible by model.n_head=7", "try model.n_embd="),
    Bad(
        "-m experiment=precision,weight_tying",
        "experiment=precision,weight_tying: each is a sweep of its own",
        "start one at a time, such as gpt2exp experiment=precision",
    ),
    Bad("experiment=throughput,precision", "experiment=throughput,precision: each is a sweep", "one at a time"),
    Bad("steps", "steps: cannot be read as an override", "write KEY=VALUE"),
    Bad("=3", "=3: cannot be read as an override", "write KEY=VALUE"),
    Bad("wandb.tags=[a(]", "wandb.tags=[a(]: cannot be read as an override", "'wandb.tags=\"[a(]\"'"),
    Bad("train.steps=${nope}", "train.steps: Interpolation key 'nope' not found", ""),
]

FLAGS = [
    Bad("--frob", "unrecognized arguments: --frob", "gpt2exp --help"),
    Bad("--cfg nothing", "argument --cfg/-c: invalid choice: 'nothing'", "gpt2exp --help"),
    Bad("--run -m seed=1", "--run --multirun: cannot be asked for together", "leave out all but one"),
    Bad("--package model", "--package: shapes what --cfg prints", "add --cfg job"),
    Bad("--config-path conf", "--config-path conf: hides the shipped groups", "--config-dir"),
    Bad("--config-name nowhere", "Cannot find primary config 'nowhere'", "search path"),
    Bad("--config-dir nowhere", "--config-dir nowhere: no such folder", "name a folder of YAML files"),
    Bad("--config-dir conf model=list", "In 'model/list': ValidationError", "ModelConfig"),
    Bad("--config-dir conf model=broken", "--config-dir conf: while parsing a flow sequence", "broken.yaml"),
    Bad("--config-dir conf model=latin", "--config-dir conf: 'utf-8' codec", "plain YAML in UTF-8"),
    Bad("--config-dir conf model=python", "--config-dir conf: could not determine a constructor", "plain YAML"),
    Bad("--config-dir conf experiment=bare", "experiment/bare.yaml: its keys land in", "line # @package _global_"),
    Bad("--config-dir conf +study=bare", "study/bare.yaml: its keys land in study", "the line # @package _global_"),
    Bad("--config-dir conf model=study", "model/study.yaml: its keys land in model", "the line # @package _global_"),
    Bad("--config-dir conf +study=idle", "seed=1,2: the axes of a study", "add -m"),
    Bad("-m --config-dir conf +study=idle,idle", "+study=idle,idle: each is a sweep of its own", "gpt2exp +study=idle"),
    Bad("hydra.run.dirr=x", "Could not override 'hydra.run.dirr'", "+hydra.run.dirr=x"),
    Bad("hydra.output_subdir=null", "hydra.output_subdir=null: a run is known by", "leave it out"),
    Bad("hydra.job.chdir=true", "hydra.job.chdir=true: relative paths", "leave it out"),
    Bad("hydra.verbose=true", "hydra.verbose=true: has no effect without a launcher", "leave it out"),
    Bad("hydra/job_logging=default", "hydra/job_logging=default: has no effect", "leave it out"),
    Bad("hydra/launcher=nope", "In 'hydra/config': Could not find 'hydra/launcher/nope'", "basic"),
    Bad("-m hydra/launcher=basic,joblib", "hydra/launcher=basic,joblib: a sweep has one", "name one"),
    Bad("-m hydra.launcher._target_=a.B", "hydra.launcher._target_=a.B: no such launcher", "BasicLauncher"),
    Bad("-m hydra.sweeper._target_=a.B", "hydra.sweeper._target_=a.B: no such sweeper", "BasicSweeper"),
    Bad("-m seed=1,2 hydra.sweep.subdir=x", "hydra.sweep.subdir=x: resume= and the comparison", "leave it out"),
    Bad("sweep.until=answered", "sweep.until=answered: one run has no arms to compare", "add -m, and what to compare"),
    Bad("-m sweep.until=answered", "sweep.until=answered: nothing varies but the seed", "add what to compare"),
    Bad("-m sweep.until=often init=gpt2,torch", "sweep.until=often: no such value", "choose one of answered"),
    Bad("-m sweep.until=answered init=gpt2,torch seed=1,2", "sweep.until=answered: it takes the seeds", "out seed=1,2"),
    Bad("-m sweep.until=answered,null init=gpt2,torch", "sweep.until=answered, sweep.until=null: it says", "one value"),
    Bad(
        "-m sweep.until=answered init=gpt2,torch sweep.margin=1,2",
        "sweep.margin=1, sweep.margin=2: it says which jobs there are",
        "one value",
    ),
    Bad("-m sweep.until=answered hydra/sweeper=lr_search", "sweep.until=answered: it takes the basic sweeper", ""),
    Bad(
        "-m sweep.until=answered init=gpt2,torch sweep.max_seeds=2",
        "sweep.max_seeds=2: fewer than sweep.min_seeds=3",
        "try sweep.max_seeds=6",
    ),
    Bad("-m init=gpt2,torch sweep.max_hours=2", "sweep.max_hours=2.0: has no meaning", "add sweep.until=answered"),
    Bad("sweep.over=train.steps=5,6", "sweep.over=train.steps=5,6: one run has no arms to compare", "add -m"),
    Bad("-m init=gpt2,torch sweep.over=train.steps", "sweep.over=train.steps: must be KEY=A,B", "steps=50,100,200"),
    Bad("-m init=gpt2,torch sweep.over=train.steps=5", "sweep.over=train.steps=5: one value is no axis", "50,100,200"),
    Bad("-m init=gpt2,torch sweep.over=train.stepz=5,6", "train.stepz=5: no such key", "did you mean train.steps?"),
    Bad("-m init=gpt2,torch sweep.over=seed=5,6", "sweep.over=seed=5,6: seed is no number that makes", "50,100,200"),
    Bad(
        "-m init=gpt2,torch sweep.over=model=nano,gpt2", "sweep.over=model=nano,gpt2: model is no number", "50,100,200"
    ),
    Bad("-m seed=1,2 sweep.over=train.steps=5,6", "sweep.over=train.steps=5,6: nothing else varies", "tie_weights="),
    Bad(
        "-m init=gpt2,torch train.steps=3 sweep.over=train.steps=5,6",
        "sweep.over=train.steps=5,6: train.steps is given twice",
        "leave out train.steps=",
    ),
    Bad("dry_run=true sweep.prior=nowhere", "sweep.prior=nowhere: no such folder", "name run or sweep folders"),
    Bad("hydra.run.dir=~/book.txt", "hydra.run.dir=", "choose a folder that can be written"),
    Bad("hydra.run.dir=/proc/x", "hydra.run.dir=/proc/x: No such file", "choose a folder that can be written"),
    Bad("hydra.run.dir=done", "hydra.run.dir=done: already holds files", "choose a new folder"),
    Bad("-m seed=1,2 hydra.sweep.dir=~/done", "hydra.sweep.dir=", "already holds files"),
    Bad("seed=${oc.env:NO_SUCH_VARIABLE}", "seed: KeyError raised while resolving", "NO_SUCH_VARIABLE"),
]
"""Of Hydra's own flags and settings, of files of configuration, and of where the results go."""

TEXTS = [
    Bad(f"data=text data.path={name}", f"data.path={name}: {start}", remedy)
    for name, start, remedy in (
        ("missing.txt", "no such file or folder", "name a UTF-8 text file or a folder"),
        ("empty.txt", "the text has 0 tokens", "give a longer text"),
        ("latin.txt", "latin.txt is not UTF-8 at byte 3", "iconv -f LATIN1 -t UTF-8 latin.txt > OUT"),
        ("utf16.txt", "utf16.txt is UTF-16", "iconv -f UTF-16 -t UTF-8 utf16.txt > OUT"),
        ("zeros.txt", "zeros.txt holds zero bytes", "name UTF-8 text files"),
        ("void", "the folder holds no files", "name one with UTF-8 text files"),
        ("hidden", "the folder holds no files", "name one with UTF-8 text files"),
        ("mixed", "picture.png is a picture", "name text files"),
        ("pipe", "neither a file nor a folder", "name a UTF-8 text file or a folder"),
        ("loop", "cannot be read (Too many levels", "name a readable UTF-8 text file"),
        ("x" * 300, "cannot be read (File name too long)", "name a readable UTF-8 text file"),
    )
] + [
    Bad("data=text", "data.path=null: data=text needs to know where the text is", "data=text data.path=FILE_OR_FOLDER"),
    Bad("data=hub", "data.path=null: data=hub needs to know which dataset", "try data=hub data.path=OWNER/NAME"),
    Bad("data.path=book.txt", "data.path=book.txt: data=tinyshakespeare has a", "try data=text data.path=book.txt"),
    Bad("data=text data.path=~nobody_/x", "data.path=~nobody_/x: no such file or folder", "name a UTF-8 text"),
    Bad("data=text data.path=/proc/self/mem", "data.path=/proc/self/mem: mem cannot be read", "files that are whole"),
    Bad("data=text data.path=rows.jsonl", "data.field=text: rows.jsonl line 1 has no", "try data.field=body"),
    Bad("data=text data.path=rows.jsonl data.field=", "data.field='': must not be empty", "try data.field=text"),
    Bad("data=text data.path=book.txt data.split=dev", "data.split=dev: data=text has none", "try data=hub"),
    Bad("data.field=body", "data.field=body: data=tinyshakespeare has a text of its own", "leave it out"),
    Bad("data=hub data.path=mixed data.revision=v1", "data.revision=v1: mixed is a folder here", "leave it out"),
    Bad("train.seq_len=256 train.batch_size=9999", "train.batch_size=9999: a batch of", "try train.batch_size=1320"),
    Bad("data.val_fraction=1e-5", "data.val_fraction=1e-05: leaves 3 tokens", "or 0"),
    Bad("-m model.vocab_size=50257,100", "model.vocab_size=100: token 50255 of", "try model.vocab_size=50257"),
]
"""Of what is trained on."""

COMPARISONS = [
    Bad("", "the following arguments are required: DIR", "gpt2exp-compare --help"),
    Bad("done --margin=nan", "--margin nan: must be a number of nats above 0", "try --margin 0.01"),
    Bad("done --margin=wide", "argument --margin: invalid float value: 'wide'", "gpt2exp-compare --help"),
    Bad("done missing", "missing: no such folder", "name run or sweep folders"),
    Bad("mixed", "mixed: holds no run", "name run or sweep folders"),
    Bad("foreign", "none of the runs has a summary yet", "wait for one to finish"),
    Bad("begun", "none of the runs has a summary yet", "wait for one to finish"),
    Bad("damaged", "damaged: summary.json is missing or damaged", "no overrides"),
    Bad("done other", "the runs also differ in optimizer.eps", "compare folders whose runs share it"),
    Bad("done --out=book.txt", "cannot write the comparison (File exists)", "name a folder with --out"),
]
"""Of `gpt2exp-compare`."""


def leave(folder: Path, config: str, **files: str) -> None:
    """A run's folder: Hydra's record, and files by stem."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of what users have lying about."""
    folder = tmp_path_factory.mktemp("world")
    texts: dict[str, bytes] = {
        "book.txt": b"It was the best of times, it was the worst of times. " * 40,
        "empty.txt": b"",
        "utf16.txt": "to be".encode("utf-16"),
        "rows.jsonl": b'{"body": "To be"}',
        "latin.txt": b"caf\xe9 au lait",
        "zeros.txt": b"text\x00text",
        "hidden/.secret": b"text",
        "mixed/a.txt": b"It was the best of times",
        "mixed/picture.png": b"\x89PNG\r\n\x1a\n\x00",
        "conf/model/list.yaml": b"- 1\n",
        "conf/model/broken.yaml": b"n_layer: [1\n  n_head: }\n",
        "conf/model/latin.yaml": b"n_layer: 1 # caf\xe9\n",
        "conf/experiment/bare.yaml": b"hydra:\n  mode: MULTIRUN\n",
        "conf/study/bare.yaml": b"train:\n  steps: 3\n",
        "conf/model/study.yaml": b"hydra:\n  mode: MULTIRUN\n",
        "conf/study/idle.yaml": b"# @package _global_\nhydra:\n  sweeper:\n    params:\n      seed: 1,2\n",
        "conf/model/python.yaml": b"n_layer: !!python/object/apply:os.system ['touch pwned']\n",
    }
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "void").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    done = run(folder / "first", "model=nano", "model.n_layer=1", "train.steps=1", "wandb.mode=disabled")
    assert done.returncode == 0
    (place,) = (folder / "first").glob("runs/*/*")
    shutil.move(place, folder / "done")
    shutil.rmtree(folder / "first")
    shutil.rmtree(folder / "home", ignore_errors=True)
    shutil.copytree(folder / "done", folder / "other")
    summary = json.loads((folder / "done" / "summary.json").read_text())
    summary["config"]["optimizer"]["eps"] = 1e-6
    (folder / "other" / "summary.json").write_text(json.dumps(summary))
    leave(folder / "foreign", "db: mysql\nport: 3306\n")  # another program's Hydra run
    leave(folder / "begun", "seed: 1\n", status=json.dumps({"state": "running", "step": 3, "error": None}))
    leave(folder / "damaged", "seed: 1\n", summary=json.dumps({"state": "done"}))
    return folder


@pytest.fixture(autouse=True)
def quiet(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In that folder, without credentials."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_"))]:
        monkeypatch.delenv(name)


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    """Whatever lies below a folder, with its size and when it was changed."""
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def check(bad: Bad, program: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Carry out a row."""
    before = seen(world)
    command = launch.command if program == "gpt2exp" else conclude.command
    code = command(shlex.split(bad.line))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    text = line.removeprefix(f"{program}: ")
    assert text != line
    assert text.startswith(bad.start)
    assert bad.remedy in text.removeprefix(bad.start)
    assert seen(world) == before


@pytest.mark.parametrize("bad", [*REQUESTS, *FLAGS, *TEXTS], ids=lambda bad: bad.line[:60])
def test_refused(bad: Bad, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, "gpt2exp", world, capsys)


@pytest.mark.parametrize("bad", COMPARISONS, ids=lambda bad: bad.line[:60])
def test_comparison_refused(bad: Bad, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, "gpt2exp-compare", world, capsys)


@NO_CUDA
@pytest.mark.parametrize(
    "bad",
    [
        Bad("-m train.device=cpu,cuda", "train.device=cuda: PyTorch sees no such device here", "use auto or one of: "),
        Bad("train.device=cuda dry_run=true", "train.device=cuda: PyTorch sees no such device here", "use auto"),
        Bad("precision=tf32 precision.fallback=error", "precision=tf32: ", "use precision.fallback=emulate"),
    ],
    ids=lambda bad: bad.line,
)
def test_a_device_that_is_not_there(bad: Bad, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, "gpt2exp", world, capsys)


def test_a_text_without_permission(world: Path) -> None:
    """As a user other than root, who may write everywhere."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (world / "private.txt").write_text("text" * 200)
    (world / "private.txt").chmod(0)
    done = run(world, "data=text", "data.path=private.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.path=private.txt: private.txt cannot be read (Permission denied)" in done.stderr


PROCESSES: list[tuple[Bad, list[str]]] = [
    (REQUESTS[0], PROGRAM),
    (COMPARISONS[3], COMPARE),
]


@pytest.mark.parametrize(("bad", "program"), PROCESSES, ids=[bad.line for bad, _ in PROCESSES])
def test_in_a_process_of_its_own(bad: Bad, program: list[str], world: Path) -> None:
    """The code that a shell sees, and with HYDRA_FULL_ERROR=1 the traceback before the same line."""
    before = seen(world)
    done = run(world, *shlex.split(bad.line), program=program)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    full = run(world, *shlex.split(bad.line), program=program, HYDRA_FULL_ERROR="1")
    assert (full.returncode, full.stdout) == (2, "")
    assert full.stderr.startswith("Traceback (most recent call last):")
    assert full.stderr.splitlines()[-1] == done.stderr.strip()
    assert seen(world) == before


def test_a_control_character_is_not_obeyed(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conclude.command(["no\x1b[31m\nfolder"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt2exp-compare: no�[31m�folder: no such folder")
