"""The command `gpt2exp-export`: writes a run's newest checkpoint as a folder that transformers loads."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpt2exp import choices
from gpt2exp.config import ModelConfig
from gpt2exp.data import assets
from gpt2exp.data.tokens import END_OF_TEXT
from gpt2exp.files import beside, write_json
from gpt2exp.model import huggingface, size
from gpt2exp.run import process, record, terminal
from gpt2exp.schema import group_of, is_housekeeping
from gpt2exp.section import BadRequest, override_key, require

WORDS = END_OF_TEXT + 1  # ids of GPT-2's tokenizer; `<|endoftext|>` is the last


def write(run: Path, out: Path) -> int:
    """Export a run to `out`, a new or empty folder, and return the steps behind its weights.

    Weights are always float32. Rows that pad the vocabulary are left out, since no text has those ids. Raises
    `BadRequest` if the run, its model or `out` do not fit, `AssetError` if the tokenizer's files cannot be fetched,
    OSError if `out` cannot be written; then it is unchanged.
    """
    record.check_run(run)
    _check(run, out)
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from gpt2exp.run import checkpoint

    model, saved = checkpoint.of_run(run)
    if model.vocab_size < WORDS:
        why = f"model.vocab_size={model.vocab_size} is less than the {WORDS} ids that GPT-2's tokenizer writes"
        raise BadRequest(f"{run}: {why}; train with model.vocab_size={WORDS}")
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.block_size, "add_prefix_space": False}
    described = {
        huggingface.CONFIG: architecture(model),
        "generation_config.json": {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT},
        "tokenizer_config.json": tokenizer,
    }
    copied = {"vocab.json": assets.fetch(assets.ENCODER_JSON), "merges.txt": assets.fetch(assets.VOCAB_BPE)}
    part, weights = beside(out.absolute()), huggingface.WEIGHTS[0]
    try:
        part.mkdir(parents=True)
        cut = {huggingface.WTE: WORDS, huggingface.HEAD: WORDS}
        theirs = {
            name: huggingface.transposed(name, tensor[: cut.get(name)]).float().contiguous()
            for name, tensor in saved.weights().items()
        }
        save_file(theirs, part / weights, metadata={"format": "pt"})
        for name, value in described.items():
            write_json(part / name, value)
        for name, source in copied.items():
            shutil.copyfile(source, part / name)
        (part / "README.md").write_text(card(record.row(run, run), model, saved.state), encoding="utf-8")
        shutil.copymode(part / huggingface.CONFIG, part / weights)  # safetensors lets the owner alone read its files
        if out.exists():
            out.rmdir()  # empty, or this fails
        part.rename(out.absolute())
    except SafetensorError as error:  # safetensors raises it in place of an OSError
        raise OSError(errno.EIO, str(error), str(out)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return saved.step


def _check(run: Path, out: Path) -> None:
    """Refuse a folder that holds something, and a run whose model has a choice that is not GPT-2's."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        why = "already holds files, and nothing is overwritten" if out.is_dir() else "a file"
        raise BadRequest(f"{out}: {why}; name a new folder")
    for section, values in choices.found_in({"model": record.read_plain_config(run)[0]["model"]}).items():
        group = group_of(section)
        require(False, group, values["name"], "Hugging Face's GPT-2 has no such choice", f"it takes {group}=gpt2")


def architecture(model: ModelConfig) -> dict[str, Any]:
    """`config.json`: the keys from which transformers builds this model, without dropout; `BadRequest` as `to_hf`."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **huggingface.to_hf(replace(model, vocab_size=WORDS)),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
        "dtype": "float32",
    }


def card(row: Mapping[str, Any], model: ModelConfig, state: Mapping[str, Any]) -> str:
    """A model card from a run's summary and the checkpoint's state: what it is, how it was made, how to use it."""
    config, data, got = state["config"], state["data"], state["precision"]
    losses = {"validation loss": row.get("val_loss"), "mean loss of the last ten steps": row.get("loss_mean_last10")}
    known = row.get("state") == "done" and row.get("steps") == state["step"]  # else the losses are of another step
    reached = [f"{label} {value:.4f} nats" for label, value in losses.items() if known and value is not None]
    private = ("hydra", "data.path", "init.path")  # places on the machine that trained it
    typed = {text: override_key(text) for text in row.get("overrides", [])}
    told = [text for text, key in typed.items() if not (is_housekeeping(key) or key.startswith(private))]
    rows = {
        "shape": f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, {model.block_size} positions, "
        f"{size.parameters(model)['total']:,} parameters",
        "embedding and head": "one tensor" if model.tie_weights else "two tensors",
        "text": f"{data['name']}, {data['tokens']:,} tokens, sha256 `{data['sha256']}`",
        "trained": f"{state['step']:,} steps, seed {config['seed']}, precision {got['effective']}"
        + (" (emulated)" if got["emulated"] else ""),
        "reached": "; ".join(reached) or "not measured at this step",
        "request": f"`{terminal.pasted('gpt2exp', *told)}`",
        "versions": ", ".join(f"{name} {version}" for name, version in state["versions"].items()),
    }
    table = "\n".join(f"| {label} | {text} |" for label, text in rows.items())
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, gpt2exp]
---

# GPT-2, trained with gpt2exp on {data["name"]}

| | |
|---|---|
{table}

```python
from transformers import pipeline

print(pipeline("text-generation", model="THIS_FOLDER")("Once upon a time", max_new_tokens=40)[0]["generated_text"])
```
"""


def main() -> None:
    """The console script `gpt2exp-export`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Carry out a command line; for the exit code see `gpt2exp.run.process.carry_out`."""
    what = (
        "Write the newest checkpoint of a run as a Hugging Face folder, which transformers loads, and init=pretrained."
    )
    parser = process.parser("gpt2exp-export", what, "runs/2026-01-31/12-00-00-abcd my-gpt2")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run's folder that holds a checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a folder that is new or empty")

    def export() -> None:
        args = parser.parse_args(argv)
        with process.writing(f"{args.out}: cannot be written", "name another folder"):
            step = write(args.run, args.out)
        text = f"{args.out}: the weights after step {step}, for transformers' from_pretrained, pipeline, or init.path"
        terminal.say(text)

    return process.carry_out("gpt2exp-export", export)


if __name__ == "__main__":
    main()
