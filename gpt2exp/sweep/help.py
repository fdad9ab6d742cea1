"""What `gpt2exp --help` says: the groups, every key, some examples; all but the examples from conf/ and the schema."""

from __future__ import annotations

import shutil
import textwrap
from importlib import resources
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from gpt2exp.schema import options
from gpt2exp.section import show

EXAMPLES = """\
  gpt2exp                                              GPT-2 124M, 50 steps on Tiny Shakespeare
  gpt2exp model=nano train.steps=200                   seconds on a laptop
  gpt2exp data=text data.path=book.txt data.val_fraction=0.1
  gpt2exp -m precision=fp32,tf32 seed=1,2,3 model=nano   a sweep: every combination
  gpt2exp -m init=gpt2,openai sweep.until=answered     as many seeds as the answer needs
  gpt2exp experiment=weight_tying                      a shipped study: a sweep by itself"""


def text(folder: Path | None = None) -> str:
    """The whole page, with the choices in the user's folder."""
    return f"""\
gpt2exp trains GPT-2 and tells whether a choice mattered.

usage: gpt2exp [-m] [KEY=VALUE ...]

groups, each a choice of files (default first):
{groups(folder)}

keys, with their defaults:
{keys()}

flags: --config-dir DIR  your own folder of choices, its modules beside them; see the README's "Adding a choice"
       --trust         run the code that the folder of resume= names, wherever it lies
       -m, --multirun  run every combination of comma-separated values
       torchrun --nproc-per-node 8 -m gpt2exp.train ...   one run on 8 GPUs, shared out by distributed=ddp or fsdp
       --cfg job       print the configuration
       --hydra-help    Hydra's own flags

examples:
{EXAMPLES}

A run leaves runs/DAY/TIME-ID/ with summary.json, metrics.jsonl and run.log; a sweep leaves sweeps/DAY/TIME-ID/ with
a folder a run. Exit code: 0 done, 1 a run failed, 2 a bad request, 130 interrupted (143 by SIGTERM)."""


def groups(folder: Path | None = None) -> str:
    """A line a group: its choices, those in the user's folder too."""
    conf = resources.files("gpt2exp.conf")
    lines = []
    for default in OmegaConf.create((conf / "config.yaml").read_text(encoding="utf-8")).defaults:
        if isinstance(default, DictConfig) and (group := str(next(iter(default)))) and " " not in group:
            places = [place / group for place in (conf, folder) if place is not None and (place / group).is_dir()]
            names = sorted({item.name for place in places for item in place.iterdir()})
            members = [name.removesuffix(".yaml") for name in names if name.endswith(".yaml")]
            if members:
                lines.append(f"  {group}={'|'.join(sorted(members, key=lambda name: name != default[group]))}")
    return "\n".join(lines)


def keys() -> str:
    """Every key, its default and its help, wrapped to the terminal."""
    width = max(80, min(120, shutil.get_terminal_size().columns))
    return "\n".join(
        textwrap.fill(about, width, initial_indent=f"  {key + '=' + show(default):36} ", subsequent_indent=" " * 39)
        for key, default, about in options()
    )
