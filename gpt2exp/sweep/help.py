"""What `gpt2exp --help` says: the groups, the keys people change, five examples."""

from __future__ import annotations

from importlib import resources

EXAMPLES = """\
  gpt2exp                                              GPT-2 124M, 50 steps on Tiny Shakespeare
  gpt2exp model=nano train.steps=200                   seconds on a laptop
  gpt2exp data=text data.path=book.txt data.val_fraction=0.1
  gpt2exp -m precision=fp32,tf32 seed=1,2,3 model=nano   a sweep: every combination
  gpt2exp experiment=weight_tying                      a shipped study: a sweep by itself"""

KEYS = """\
  model.tie_weights=true         one matrix as token embedding and head, or two
  init.residual_scaling=true     scale residual projections by (2*n_layer)^-0.5
  precision.fallback=emulate     TF32 where there is none: emulate it, or error
  data.val_fraction=0.0          share of the text kept for validation
  train.batch_size=4             sequences in a micro-batch
  train.seq_len=32               tokens in a sequence
  train.steps=50                 optimizer steps
  train.device=auto              auto, cpu, cuda, mps
  optimizer.lr=3e-4              learning rate
  seed=1337                      initial weights and shuffled order"""


def text() -> str:
    """The whole page."""
    return f"""\
gpt2exp trains GPT-2 and tells whether a choice mattered.

usage: gpt2exp [-m] [KEY=VALUE ...]

groups, each a choice of files (default first):
{groups()}

keys people change, with their defaults (all of them: gpt2exp --cfg job):
{KEYS}

examples:
{EXAMPLES}

flags: -m, --multirun  run every combination of comma-separated values
       dry_run=true    print the runs and train nothing
       resume=FOLDER   go on with a run or a sweep that was stopped; what is done is kept
       torchrun --nproc-per-node 8 -m gpt2exp.train ...   one run on 8 GPUs, shared out by distributed=ddp or fsdp
       --cfg job       print the configuration
       --hydra-help    Hydra's own flags

A run leaves runs/DAY/TIME-ID/ with summary.json, metrics.jsonl and run.log; a sweep leaves sweeps/DAY/TIME-ID/ with
a folder a run. Exit code: 0 done, 1 a run failed, 2 a bad request, 130 interrupted (143 by SIGTERM)."""


def groups() -> str:
    """The groups of the packaged configuration with their members, a line each."""
    defaults = {"model": "gpt2", "init": "gpt2", "precision": "fp32", "data": "tinyshakespeare"}
    lines = []
    for group in ("model", "init", "precision", "data", "optimizer", "wandb", "experiment"):
        files = sorted(item.name for item in (resources.files("gpt2exp.conf") / group).iterdir())
        members = [name.removesuffix(".yaml") for name in files if name.endswith(".yaml")]
        members.sort(key=lambda name: name != defaults.get(group))
        lines.append(f"  {group}={'|'.join(members)}")
    return "\n".join(lines)
