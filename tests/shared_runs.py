"""Small trainings whose results must be the same in one process and in several; `several` is what each process does.

torchrun ... shared_runs.py FILE DEVICE CASE ...
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpt2exp import schema
from gpt2exp.training import distributed as dist
from gpt2exp.training import setup

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64}
TRAIN = {
    "batch_size": 8,
    "seq_len": 16,
    "steps": 3,
    "eval_every": 3,
    "activation_checkpointing": False,
}
CASES: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied, clipped, accumulated, shuffled": {
        "model": {"tie_weights": False},
        "optimizer": {"grad_clip": 0.5},
        "train": {"grad_accum_steps": 2},
        "data": {"order": "shuffled"},
    },
    "tf32, accumulated": {"precision": {"name": "tf32"}, "train": {"grad_accum_steps": 2}},
    "bf16, recomputed": {"precision": {"name": "bf16"}, "train": {"activation_checkpointing": True}},
    "fp16": {"precision": {"name": "fp16"}},
    "fp64": {"precision": {"name": "fp64"}},
}


def train(case: str, distributed: str, kind: str = "cpu") -> dict[str, Tensor]:
    """`losses` (steps,), `norms`, `val_loss`, `loss_unseen`, and under `grad.NAME` and `weight.NAME` the last step's.

    In several processes, what the first has of it.
    """
    asked: dict[str, Any] = {
        "model": SMALL,
        "train": {**TRAIN, "device": kind},
        "data": {"val_fraction": 0.002},
        "distributed": distributed,
    }
    for section, values in CASES[case].items():
        asked[section] = {**asked.get(section, {}), **values}
    run = schema.parse(asked)
    with setup.ready(run) as ready:
        job, _origin = setup.trainer(ready)
        rows = list(job.fit())
        gradients = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
        gradients = dist.gather(gradients)
        weights, _tensors, _numbers = job.state()
    found = {
        key: torch.tensor([row[key] for row in rows if key in row]) for key in ("loss", "grad_norm", "loss_unseen")
    }
    found["val_loss"] = torch.tensor(rows[-1]["val_loss"])
    if "wte_grad_head" in rows[0]:
        found["residual_rms"] = torch.tensor(rows[0]["residual_rms"])
        found["wte_grads"] = torch.tensor([rows[0]["wte_grad_lookup"], rows[0]["wte_grad_head"]])
    found |= {f"grad.{name}": gradient for name, gradient in gradients.items()}
    return found | {f"weight.{name}": weight.detach().clone() for name, weight in weights.items()}


def several(file: str, kind: str, *cases: str) -> None:
    """The cases named under DDP and FSDP; the first process writes them all to one safetensors file."""
    torch.set_num_threads(1)
    found: dict[str, Tensor] = {}
    with dist.process_group():
        for distributed in ("ddp", "fsdp"):
            for case in cases:
                result = train(case, distributed, kind)
                found |= {f"{distributed}/{case}/{name}": tensor.contiguous() for name, tensor in result.items()}
    if dist.is_main():
        save_file(found, file)


if __name__ == "__main__":
    several(*sys.argv[1:])
