"""A request that cannot be carried out: exit code 2, one line that names the key and the remedy, nothing written.

The table is the whole promise. Each row is a command line as a user types it, carried out by the real command in a
folder that holds texts, configuration files and runs in every state of disrepair; afterwards nothing there is new or
changed. To extend it, add a row, and what it needs to `world`.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support import PROGRAM, run

from gpt2exp import conclude, train

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the row says it lacks")


class Bad(NamedTuple):
    """A bad request: the line as typed, how the answer starts, what of the remedy it must hold."""

    line: str
    start: str
    remedy: str


REQUESTS = [
    Bad(*row)
    for row in (
        ("sed=3", "sed=3: no such key", "did you mean seed?"),
        ("+sed=3", "sed=3: no such key", "did you mean seed?"),
        ("++sed=3", "sed=3: no such key", "did you mean seed?"),
        ("lr=0.1", "lr=0.1: no such key", "did you mean optimizer.lr?"),
        ("n_layers=3", "n_layers=3: no such key", "model.n_layer"),
        ("learning_rate=0.1", "learning_rate=0.1: no such key", "did you mean optimizer.lr?"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate=0.1: no such key", "did you mean optimizer.lr?"),
        ("train.max_iters=9", "train.max_iters=9: no such key", "did you mean train.steps?"),
        ("frobnicate=1", "frobnicate=1: no such key", "gpt2exp --help"),
        ("frobnicate.much=1", "frobnicate.much=1: no such key", "gpt2exp --help"),
        ("model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
        ("+model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
        ("++model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
        ("+model.typo=3", "model.typo=3: no such key", "keys of model: model.n_layer, model.n_head"),
        ("train.step=4", "train.step=4: no such key", "train.steps"),
        ("precision.falback=error", "precision.falback=error: no such key", "precision.fallback"),
        ("+seed=3", "+seed=3: the key is there already", "leave out the +: seed=3"),
        ("+model=nano", "+model=nano: the key is there already", "leave out the +: model=nano"),
        ("train=3", "train=3: a section, not a value", "train.steps"),
        ("sweep=true", "sweep=true: a section, not a value", "sweep.fail_fast, sweep.isolate"),
        ("train={steps:3}", "train={'steps': 3}: a section, not a value", "train.steps"),
        ("model={n_layer:3}", "model={'n_layer': 3}: no such choice", "choose one of gpt2,"),
        ("model=nanoo", "model=nanoo: no such choice", "did you mean model=nano?"),
        ("model=", "model=: no such choice", "choose one of gpt2,"),
        ("++model=nanoo", "model=nanoo: no such choice", "did you mean model=nano?"),
        ("init=kaiming", "init=kaiming: no such choice", "openai"),
        ("precision=tf23", "precision=tf23: no such choice", "did you mean precision=tf32?"),
        ("data=shakespeare", "data=shakespeare: no such choice", "did you mean data=tinyshakespeare?"),
        ("optimizer=sgd", "optimizer=sgd: no such choice", "adamw"),
        ("wandb=on", "wandb=on: no such choice", "choose one of default"),
        ("train.steps=many", "train.steps=many: must be a whole number", "the default is 50"),
        ("train.steps=2.5", "train.steps=2.5: must be a whole number", "the default is 50"),
        ("train.steps=true", "train.steps=true: must be a whole number", "the default is 50"),
        ("train.steps=null", "train.steps=null: must be a whole number", "the default is 50"),
        ("train.steps=", "train.steps=: must be a whole number", "the default is 50"),
        ("train.steps=[1,2]", "train.steps=[1, 2]: must be a whole number", "the default is 50"),
        ("optimizer.lr=fast", "optimizer.lr=fast: must be a number", "the default is 0.0003"),
        ("optimizer.lr=true", "optimizer.lr=true: must be a number", "the default is 0.0003"),
        ("model.tie_weights=maybe", "model.tie_weights=maybe: must be true or false", "the default is true"),
        ("model.tie_weights=2", "model.tie_weights=2: must be true or false", "the default is true"),
        ("dry_run=perhaps", "dry_run=perhaps: must be true or false", "the default is false"),
        ("train.device=gpu", "train.device=gpu: no such value", "choose one of auto, cpu, cuda, mps"),
        ("precision.rounding=up", "precision.rounding=up: no such value", "truncate, nearest"),
        ("precision.fallback=ignore", "precision.fallback=ignore: no such value", "emulate, error"),
        ("wandb.mode=maybe", "wandb.mode=maybe: no such value", "auto, online, offline, disabled"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list", "optimizer.betas=[0.9,0.999]"),
        ("optimizer.betas=[a,b]", "optimizer.betas=['a', 'b']: must be a list", "optimizer.betas=[0.9,0.999]"),
        ("wandb.tags=one", "wandb.tags=one: must be a list", "wandb.tags=[]"),
        ("wandb.name=[a]", "wandb.name=['a']: must be text", "the default is null"),
        ("train.steps=0", "train.steps=0: must be at least 1", "try train.steps=1"),
        ("train.steps=-3", "train.steps=-3: must be at least 1", "try train.steps=1"),
        ("train.batch_size=0", "train.batch_size=0: must be a whole number of at least 1", "try train.batch_size=4"),
        ("train.batch_size=2.5", "train.batch_size=2.5: must be a whole number or auto", "the default is 4"),
        ("train.compile=maybe", "train.compile=maybe: no such value", "choose one of auto, true, false"),
        ("model.pad_vocab=64", "model.pad_vocab=64: must be true or false or auto", "the default is auto"),
        ("train.loss_chunk=none", "train.loss_chunk=none: must be a whole number", "train.loss_chunk=auto"),
        ("train.tokens_per_step=100", "train.tokens_per_step=100: not a multiple", "try train.tokens_per_step=128"),
        ("train.seq_len=0", "train.seq_len=0: must be at least 1", "try train.seq_len=1"),
        ("train.grad_accum_steps=0", "train.grad_accum_steps=0: must be at least 1", "try train.grad_accum_steps=1"),
        ("train.log_every=0", "train.log_every=0: must be at least 1", "try train.log_every=1"),
        ("train.measure_every=0", "train.measure_every=0: must be at least 1", "try train.measure_every=1"),
        ("train.eval_every=-1", "train.eval_every=-1: must be a finite number, zero or more", "try train.eval_every=0"),
        ("train.warmup_steps=-1", "train.warmup_steps=-1: must be a finite number", "try train.warmup_steps=0"),
        ("model.n_layer=0", "model.n_layer=0: must be at least 1", "try model.n_layer=1"),
        ("model.n_head=0", "model.n_head=0: must be at least 1", "try model.n_head=1"),
        ("model.vocab_size=-1", "model.vocab_size=-1: must be at least 1", "try model.vocab_size=1"),
        ("optimizer.lr=0", "optimizer.lr=0.0: must be a finite number above 0", "try optimizer.lr=3e-4"),
        ("optimizer.lr=-1e-3", "optimizer.lr=-0.001: must be a finite number above 0", "try optimizer.lr=3e-4"),
        ("optimizer.lr=nan", "optimizer.lr=nan: must be a finite number above 0", "try optimizer.lr=3e-4"),
        ("optimizer.lr=inf", "optimizer.lr=inf: must be a finite number above 0", "try optimizer.lr=3e-4"),
        ("optimizer.eps=0", "optimizer.eps=0.0: must be a finite number above 0", "try optimizer.eps=1e-8"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers in [0, 1)", "optimizer.betas=[0.9,0.95]"),
        ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]: must be two numbers", "optimizer.betas=[0.9,0.95]"),
        ("optimizer.betas=[0.9,nan]", "optimizer.betas=[0.9, nan]: must be two numbers", "optimizer.betas=[0.9,0.95]"),
        ("optimizer.grad_clip=nan", "optimizer.grad_clip=nan: must be a finite number", "try optimizer.grad_clip=0"),
        (
            "optimizer.weight_decay=-0.1",
            "optimizer.weight_decay=-0.1: must be a finite",
            "try optimizer.weight_decay=0",
        ),
        ("optimizer.weight_decay=inf", "optimizer.weight_decay=inf: must be a finite", "try optimizer.weight_decay=0"),
        ("init.std=0", "init.std=0.0: must be a finite number above 0", "try init.std=0.02"),
        ("init.std=nan", "init.std=nan: must be a finite number above 0", "try init.std=0.02"),
        (
            "init.position_std=-1",
            "init.position_std=-1.0: must be a finite number above 0",
            "try init.position_std=0.02",
        ),
        ("data.val_fraction=1", "data.val_fraction=1.0: must lie in [0, 1)", "try data.val_fraction=0.1"),
        ("data.val_fraction=-0.1", "data.val_fraction=-0.1: must lie in [0, 1)", "try data.val_fraction=0.1"),
        ("data.val_fraction=nan", "data.val_fraction=nan: must lie in [0, 1)", "try data.val_fraction=0.1"),
        ("seed=-1", "seed=-1: must lie in [0, 2^63)", "try seed=1337"),
        ("seed=9223372036854775808", "seed=9223372036854775808: must lie in [0, 2^63)", "try seed=1337"),
        ("seed=1.5", "seed=1.5: must be a whole number", "the default is 1337"),
        ("seed=null", "seed=null: must be a whole number", "the default is 1337"),
        ("wandb.project=''", "wandb.project='': must not be empty", "try wandb.project=gpt2exp"),
        ("model.n_embd=100", "model.n_embd=100: not divisible by model.n_head=12", "try model.n_embd=96 or 108"),
        ("model.n_head=7", "model.n_embd=768: not divisible by model.n_head=7", "a model.n_head that divides it"),
        ("train.seq_len=1025", "train.seq_len=1025: longer than model.block_size=1024", "try train.seq_len=1024"),
        (
            "model=nano train.seq_len=257",
            "train.seq_len=257: longer than model.block_size=256",
            "try train.seq_len=256",
        ),
        ("train.eval_every=5", "train.eval_every=5: there is no validation data", "add data.val_fraction=0.1"),
        ("optimizer.warmup_steps=5", "optimizer.warmup_steps=5: has no meaning", "add optimizer.schedule=cosine"),
        ("optimizer.min_lr=1e-5", "optimizer.min_lr=1e-05: has no meaning", "add optimizer.schedule=cosine"),
        (
            "optimizer.schedule=cosine optimizer.min_lr=1",
            "optimizer.min_lr=1.0: above the peak optimizer.lr=0.0003",
            "try optimizer.min_lr=0",
        ),
        (
            "optimizer.schedule=cosine optimizer.warmup_steps=51",
            "optimizer.warmup_steps=51: longer than the run, train.steps=50",
            "try optimizer.warmup_steps=5",
        ),
        ("init.std=null", "init.std=null: init=gpt2 needs a number", "try init.std=0.02"),
        (
            "init=openai init.position_std=null",
            "init.position_std=null: init=openai needs a number",
            "try init.position",
        ),
        ("init=xavier init.std=0.02", "init.std=0.02: init=xavier derives it", "leave it out, or use init=gpt2"),
        ("init=torch init.std=0.02", "init.std=0.02: init=torch derives it", "leave it out, or use init=gpt2"),
        ("init=torch init.position_std=0.02", "init.position_std=0.02: init=torch is PyTorch's own", "leave it out"),
        ("init=pretrained", "init.path=null: init=pretrained needs to know where they are", "init.path=FOLDER"),
        ("init=pretrained init.path=x init.std=0.02", "init.std=0.02: init=pretrained draws nothing", "use init=gpt2"),
        (
            "init=pretrained init.path=x init.position_std=1",
            "init.position_std=1.0: init=pretrained draws",
            "leave it out",
        ),
        (
            "init=pretrained init.path=x init.residual_scaling=true",
            "init.residual_scaling=true: init=pretrained draws nothing",
            "leave it out",
        ),
        ("init.path=folder", "init.path=folder: init=gpt2 draws its weights", "add init=pretrained"),
        ("-m init=gpt2,torch init.path=folder", "init.path=folder: init=gpt2 draws its weights", "add init=pretrained"),
        ("init=pretrained init.path=./nowhere", "init.path=./nowhere: no such folder", "config.json and model.safe"),
        ("init=pretrained init.path=book.txt", "init.path=book.txt: a file", "name the folder that it lies in"),
        ("-m seed=1,2 init=pretrained init.path=./nowhere", "init.path=./nowhere: no such folder", "a hub id such as"),
        ("init.scheme=xavier", "init.std=0.02: init=xavier derives it", "leave it out, or use init=gpt2"),
        (
            "data=text",
            "data.path=null: data=text needs to know where the text is",
            "data=text data.path=FILE_OR_FOLDER",
        ),
        (
            "data.path=book.txt",
            "data.path=book.txt: data=tinyshakespeare has a text",
            "try data=text data.path=book.txt",
        ),
        ("~seed", "~seed: a key cannot be deleted", "seed=VALUE"),
        ("~model", "~model: a key cannot be deleted", "model=VALUE"),
        ("~train.steps=50", "~train.steps: a key cannot be deleted", "train.steps=VALUE"),
        ("train.steps=1,2", "train.steps=1,2: several values make a sweep", "add -m"),
        ("model=nano,gpt2", "model=nano,gpt2: several values make a sweep", "add -m"),
        ("seed=range(3)", "seed=range(3): several values make a sweep", "add -m"),
        ("-m seed=interval(0,1)", "seed=interval(0,1): the basic sweeper takes lists", "write seed=A,B"),
        ("-m train.steps=2,0", "train.steps=0: must be at least 1", "try train.steps=1"),
        ("-m seed=1,x", "seed=x: must be a whole number", "the default is 1337"),
        ("-m precision=fp32,int3", "precision=int3: no such choice", "fp32, "),
        ("-m model.n_head=12,7 seed=1,2", "model.n_embd=768: not divisible by model.n_head=7", "try model.n_embd="),
        ("steps", "steps: cannot be read as an override", "write KEY=VALUE"),
        ("=3", "=3: cannot be read as an override", "write KEY=VALUE"),
        ("model.n_layer=[1", "model.n_layer=[1: cannot be read as an override", "write KEY=VALUE"),
        ("train.steps=${nope}", "train.steps: Interpolation key 'nope' not found", ""),
        ("--config-dir nowhere", "--config-dir nowhere: no such folder", "name a folder of YAML files"),
        ("--config-name nowhere", "Cannot find primary config 'nowhere'", "search path"),
        ("hydra.run.dirr=x", "Could not override 'hydra.run.dirr'", "+hydra.run.dirr=x"),
    )
]

FLAGS = [
    Bad("--frob", "unrecognized arguments: --frob", "gpt2exp --help"),
    Bad("--cfg nothing", "argument --cfg/-c: invalid choice: 'nothing'", "gpt2exp --help"),
    Bad("--cfg", "argument --cfg/-c: expected one argument", "gpt2exp --help"),
    Bad("--run -m seed=1", "--run --multirun: cannot be asked for together", "leave out all but one"),
    Bad("-m --cfg job", "--multirun --cfg: cannot be asked for together", "leave out all but one"),
    Bad("--resolve", "--resolve: shapes what --cfg prints", "add --cfg job"),
    Bad("--package model", "--package: shapes what --cfg prints", "add --cfg job"),
    Bad("--config-path conf", "--config-path conf: hides the shipped groups", "--config-dir"),
    Bad("--config-dir book.txt", "--config-dir book.txt: no such folder", "name a folder of YAML files"),
    Bad("--config-dir conf model=list", "In 'model/list': ValidationError", "ModelConfig"),
    Bad("--config-dir conf model=broken", "--config-dir conf: while parsing a flow sequence", "broken.yaml"),
    Bad("--config-dir conf model=latin", "--config-dir conf: 'utf-8' codec", "plain YAML in UTF-8"),
    Bad("--config-dir conf model=binary", "--config-dir conf: ", "plain YAML in UTF-8"),
    Bad("--config-dir conf model=python", "--config-dir conf: could not determine a constructor", "plain YAML"),
    Bad("hydra.output_subdir=null", "hydra.output_subdir=null: a run is known by", "leave it out"),
    Bad("hydra/launcher=nope", "In 'hydra/config': Could not find 'hydra/launcher/nope'", "basic"),
    Bad("-m hydra.launcher._target_=a.B", "hydra.launcher._target_=a.B: no such launcher", "BasicLauncher"),
    Bad("-m hydra.sweeper._target_=a.B", "hydra.sweeper._target_=a.B: no such sweeper", "BasicSweeper"),
    Bad("-m seed=1,2 hydra.sweep.subdir=x", "hydra.sweep.subdir=x: two jobs", "name ${hydra.job.num} in it"),
    Bad("hydra.run.dir=book.txt", "hydra.run.dir=book.txt: Not a directory", "choose a folder that can be written"),
    Bad("hydra.run.dir=book.txt/x", "hydra.run.dir=book.txt/x: Not a directory", "choose a folder that can be"),
    Bad("hydra.run.dir=/proc/x", "hydra.run.dir=/proc/x: No such file", "choose a folder that can be written"),
    Bad("hydra.run.dir=done", "hydra.run.dir=done: already holds files", "choose a new folder"),
    Bad("-m seed=1,2 hydra.sweep.dir=done", "hydra.sweep.dir=done: already holds files", "choose a new folder"),
    Bad("-m seed=1,2 hydra.sweep.dir=/proc/x", "hydra.sweep.dir=/proc/x: No such file", "that can be written"),
    Bad("seed=${oc.env:NO_SUCH_VARIABLE}", "seed: KeyError raised while resolving", "NO_SUCH_VARIABLE"),
    Bad("wandb.project=a/b", "wandb.project=a/b: must be at most 128 characters", "try wandb.project=gpt2exp"),
    Bad(f"wandb.project={'x' * 129}", "wandb.project=xxx", "must be at most 128 characters"),
    Bad("\"wandb.tags=['']\"", "wandb.tags=['']: a tag must have 1 to 64", "try wandb.tags=[short,words]"),
    Bad(f"wandb.tags=[{'x' * 65}]", "wandb.tags=['xxx", "a tag must have 1 to 64 characters"),
]
"""Of Hydra's own flags and settings, of files of configuration, and of where the results go."""

TEXTS = [
    Bad(f"data=text data.path={name}", f"data.path={name}: {start}", remedy)
    for name, start, remedy in (
        ("missing.txt", "no such file or folder", "name a UTF-8 text file or a folder"),
        ("empty.txt", "the text has 0 tokens", "give a longer text"),
        ("letter.txt", "the text has 1 token;", "give a longer text"),
        ("latin.txt", "latin.txt is not UTF-8 at byte 3", "iconv"),
        ("utf16.txt", "utf16.txt is not UTF-8 at byte 0", "iconv"),
        ("zeros.txt", "zeros.txt holds zero bytes", "name UTF-8 text files"),
        ("void", "the folder holds no files", "name one with UTF-8 text files"),
        ("hidden", "the folder holds no files", "name one with UTF-8 text files"),
        ("mixed", "picture.png is not UTF-8 at byte 0", "iconv"),
        ("pipe", "neither a file nor a folder", "name a UTF-8 text file or a folder"),
        ("/dev/zero", "neither a file nor a folder", "name a UTF-8 text file or a folder"),
        ("loop", "cannot be read (Too many levels", "name a readable UTF-8 text file"),
        ("dangling", "no such file or folder", "name a UTF-8 text file or a folder"),
        ("book.txt/x", "cannot be read (Not a directory)", "name a readable UTF-8 text file"),
        ("x" * 300, "cannot be read (File name too long)", "name a readable UTF-8 text file"),
    )
] + [
    Bad("data=text \"data.path='~nobody_/x'\"", "data.path=~nobody_/x: no such file or folder", "name a UTF-8 text"),
    Bad("data=text data.path=/proc/self/mem", "data.path=/proc/self/mem: cannot be read", "a readable UTF-8 text file"),
    Bad("data=text data.path=rows.jsonl", "data.field=text: rows.jsonl line 1 has no", "try data.field=body"),
    Bad("data=text data.path=rows.jsonl data.field=", "data.field='': must not be empty", "try data.field=text"),
    Bad("data=text data.path=book.txt data.split=dev", "data.split=dev: data=text has none", "try data=hub"),
    Bad("data.field=body", "data.field=body: data=tinyshakespeare has a text of its own", "leave it out"),
    Bad("data.max_tokens=1", "data.max_tokens=1: a target needs at least 2", "try data.max_tokens=1000000"),
    Bad("data=hub", "data.path=null: data=hub needs to know which dataset", "try data=hub data.path=OWNER/NAME"),
    Bad("data=hub data.path=mixed data.revision=v1", "data.revision=v1: mixed is a folder here", "leave it out"),
    Bad("data=text data.path=short.txt", "train.batch_size=4: a batch of 4 x 32", "try train.seq_len=1"),
    Bad("train.seq_len=256 train.batch_size=9999", "train.batch_size=9999: a batch of", "try train.batch_size=1320"),
    Bad("data.val_fraction=1e-5", "data.val_fraction=1e-05: leaves 3 tokens", "or 0"),
    Bad("model.vocab_size=100", "model.vocab_size=100: token 50255 of", "try model.vocab_size=50257"),
    Bad("-m model.vocab_size=50257,100", "model.vocab_size=100: token 50255 of", "try model.vocab_size=50257"),
]
"""Of what is trained on."""

COMPARISONS = [
    Bad("", "the following arguments are required: DIR", "gpt2exp-compare --help"),
    Bad("done --frob", "unrecognized arguments: --frob", "gpt2exp-compare --help"),
    Bad("done --margin=0", "--margin 0.0: must be a number of nats above 0", "try --margin 0.01"),
    Bad("done --margin=nan", "--margin nan: must be a number of nats above 0", "try --margin 0.01"),
    Bad("done --margin=wide", "argument --margin: invalid float value: 'wide'", "gpt2exp-compare --help"),
    Bad("missing", "missing: no such folder", "name run or sweep folders"),
    Bad("book.txt", "book.txt: no such folder", "name run or sweep folders"),
    Bad("void", "void: holds no run", "name run or sweep folders"),
    Bad("mixed", "mixed: holds no run", "name run or sweep folders"),
    Bad("done missing", "missing: no such folder", "name run or sweep folders"),
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
        "rows.jsonl": b'{"body": "To be"}',
        "letter.txt": b"a",
        "short.txt": b"To be",
        "latin.txt": b"caf\xe9 au lait",
        "utf16.txt": "It was the best of times".encode("utf-16"),
        "zeros.txt": b"text\x00text",
        "hidden/.secret": b"text",
        "mixed/a.txt": b"It was the best of times",
        "mixed/picture.png": b"\x89PNG\r\n\x1a\n\x00",
        "conf/model/list.yaml": b"- 1\n",
        "conf/model/broken.yaml": b"n_layer: [1\n  n_head: }\n",
        "conf/model/latin.yaml": b"n_layer: 1 # caf\xe9\n",
        "conf/model/binary.yaml": b"n_layer: \x00\x01\n",
        "conf/model/python.yaml": b"n_layer: !!python/object/apply:os.system ['touch pwned']\n",
    }
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "void").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere")
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
def quiet(world: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In that folder, without credentials; the package's logger is put back as it was."""
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HYDRA_"))]:
        monkeypatch.delenv(name)
    log = logging.getLogger("gpt2exp")
    handlers, propagate = list(log.handlers), log.propagate
    yield
    log.handlers[:], log.propagate = handlers, propagate


def seen(folder: Path) -> dict[str, tuple[int, int]]:
    """Whatever lies below a folder, with its size and when it was changed."""
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in found}


def check(bad: Bad, program: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Carry out a row."""
    before = seen(world)
    command = train.command if program == "gpt2exp" else conclude.command
    code = command(shlex.split(bad.line))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    text = line.removeprefix(f"{program}: ")
    assert text != line
    assert text.startswith(bad.start)
    assert bad.remedy in text.removeprefix(bad.start)
    assert seen(world) == before


def test_there_are_many() -> None:
    rows = [*REQUESTS, *FLAGS, *TEXTS, *COMPARISONS]
    assert len({bad.line for bad in rows}) > 180


@pytest.mark.parametrize("bad", [*REQUESTS, *FLAGS, *TEXTS], ids=lambda bad: bad.line[:60])
def test_refused(bad: Bad, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, "gpt2exp", world, capsys)


@pytest.mark.parametrize("bad", COMPARISONS, ids=lambda bad: bad.line[:60])
def test_comparison_refused(bad: Bad, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(bad, "gpt2exp-compare", world, capsys)


@NO_CUDA
@pytest.mark.parametrize("line", ["-m train.device=cpu,cuda", "train.device=cuda dry_run=true"])
def test_a_device_that_is_not_there(line: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(Bad(line, "train.device=cuda: PyTorch sees no such device here", "use auto"), "gpt2exp", world, capsys)


def test_a_text_without_permission(world: Path) -> None:
    """As a user who is not root, to whom everything is permitted."""
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (world / "private.txt").write_text("text" * 200)
    (world / "private.txt").chmod(0)
    done = run(world, "data=text", "data.path=private.txt")
    assert (done.returncode, done.stdout) == (2, "")
    assert "data.path=private.txt: cannot be read (Permission denied)" in done.stderr


COMPARE = [sys.executable, "-m", "gpt2exp.compare"]
PROCESSES: list[tuple[Bad, list[str]]] = [
    (REQUESTS[0], PROGRAM),
    (FLAGS[-4], PROGRAM),
    (TEXTS[3], PROGRAM),
    (TEXTS[9], PROGRAM),
    (COMPARISONS[5], COMPARE),
    (COMPARISONS[12], COMPARE),
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


@pytest.mark.parametrize("name", ["a\\b", "it's", "end\\", "two\\\\", "a\\'b", "ü b"])
def test_a_folder_of_any_name_is_the_one_used(name: str, tmp_path: Path) -> None:
    """What is composed in the plan is what Hydra is told: the pin is read back as it was meant."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from gpt2exp import plan

    pin, _ = plan.Plan((), False, tmp_path / name, True).pins
    (override,) = OverridesParser.create().parse_overrides([pin])
    assert override.value() == str(tmp_path / name)
