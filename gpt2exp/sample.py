"""The command `gpt2exp-sample`: prints text as it is drawn from a run's newest checkpoint or a Hugging Face folder."""

from __future__ import annotations

import codecs
import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2exp import choices
from gpt2exp.config import DeviceName, ModelConfig
from gpt2exp.data import tokens
from gpt2exp.model import huggingface
from gpt2exp.run import process, record, terminal
from gpt2exp.section import BadRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gpt2exp.model.gpt import GPT


def load(folder: Path) -> GPT:
    """The model of a run, or of a folder with `config.json` and weights, in float32; `BadRequest` if it is neither."""
    theirs = None
    if (folder / huggingface.CONFIG).is_file():
        theirs = huggingface.find(str(folder), key="")
        # untied: a head that the files lack is then a copy of `wte`
        config = replace(huggingface.from_hf(theirs.config, theirs.said), tie_weights=False)
        huggingface.check(theirs, config)
    else:
        record.check_run(folder)
    import torch

    from gpt2exp.model import init
    from gpt2exp.model.gpt import GPT
    from gpt2exp.run import checkpoint
    from gpt2exp.training import hardware

    if theirs is not None:
        weights = huggingface.read(theirs, config)
    else:
        config, saved = checkpoint.of_run(folder)
        weights = saved.weights()
    with torch.device(hardware.resolve_device(DeviceName.auto)):
        gpt = GPT(config)
    init.load_weights(gpt, weights)
    return gpt


def generate(
    model: GPT, prompt: Sequence[int], *, temperature: float = 1.0, top_k: int | None = None, seed: int = 1337
) -> Iterator[int]:
    """Ids that follow `prompt`, without end, each drawn given the `block_size` before it.

    Ids beyond the tokenizer's, which a padded vocabulary has, are never drawn. Draws are made on the CPU by a generator
    of their own: the same weights, prompt and seed give the same ids. `BadRequest` if the logits are not finite.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    while True:
        with torch.no_grad():
            x = model.transformer(ids[:, -model.config.block_size :])
            logits = model.lm_head(x[0, -1])[: tokens.END_OF_TEXT + 1].float().cpu()
        if not bool(logits.isfinite().all()):
            raise BadRequest("the model's logits are not finite: it has diverged; name an earlier run of it")
        number = pick(logits, temperature, top_k, generator)
        yield number
        ids = torch.cat([ids, ids.new_tensor([[number]])], dim=1)


def pick(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """An id by its logits (V,): the likeliest at temperature 0, else drawn, among the `top_k` likeliest if given."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.double().topk(min(top_k or len(logits), len(logits)))  # sorted
    shares = ((values - values[0]) / temperature).softmax(-1)
    return int(ids[shares.multinomial(1, generator=generator)])


def text_of(ids: Iterable[int]) -> Iterator[str]:
    """The text of the ids, each character as soon as it is whole: a character may take several tokens.

    Ends at `<|endoftext|>`. Bytes that are no UTF-8, and control characters that a terminal would obey, become `�`.
    """
    encoding = tokens.gpt2_encoding()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for number in itertools.takewhile(lambda number: number != tokens.END_OF_TEXT, ids):
        yield terminal.printable(decoder.decode(encoding.decode_single_token_bytes(number)), "\t\n")
    yield terminal.printable(decoder.decode(b"", final=True), "\t\n")


def _prompt(text: str, config: ModelConfig) -> list[int]:
    """The ids of a prompt; for an empty one `<|endoftext|>`, after which GPT-2 begins a text."""
    ids = tokens.gpt2_encoding().encode(text, allowed_special="all") or [tokens.END_OF_TEXT]
    if max(ids) >= config.vocab_size:
        why = f"has token {max(ids)}, and the model knows {config.vocab_size:,}"
        raise BadRequest(f"--prompt {text!r}: {why}; try other words")
    return ids


def main() -> None:
    """The console script `gpt2exp-sample`."""
    sys.exit(command(sys.argv[1:]))


def command(argv: list[str]) -> int:
    """Carry out a command line; for the exit code see `gpt2exp.run.process.carry_out`."""
    what = "Generate text from the newest checkpoint of a run, or from a Hugging Face folder of GPT-2 weights."
    example = 'runs/2026-01-31/12-00-00-abcd --prompt "To be" --tokens 200 --temperature 0.8'
    parser = process.parser("gpt2exp-sample", what, example)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="a run's folder, or one with config.json and weights")
    add("--prompt", default="\n", help="what the text begins with (a new line); '' for <|endoftext|>")
    add("--tokens", type=int, default=100, metavar="N", help="tokens at most; ends at <|endoftext|> (100)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0: always the likeliest token (1)")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens alone (all)")
    add("--seed", type=int, default=1337, metavar="S", help="the same seed gives the same text (1337)")
    add("--trust", action="store_true", help="run the code that the run's model names")

    def sample() -> None:
        args = parser.parse_args(argv)
        warm = math.isfinite(args.temperature) and args.temperature >= 0
        for flag, value, ok, bounds, example in (
            ("--tokens", args.tokens, args.tokens >= 1, "be at least 1", 100),
            ("--temperature", args.temperature, warm, "be a number of 0 or more", 0.8),
            ("--top-k", args.top_k, args.top_k is None or args.top_k >= 1, "be at least 1", 50),
            ("--seed", args.seed, 0 <= args.seed < 2**63, "lie in [0, 2^63)", 1337),
        ):
            if not ok:
                raise BadRequest(f"{flag} {value}: must {bounds}; try {flag} {example}")
        choices.allow(Path.cwd())
        choices.trust(args.trust)
        model = load(args.run)
        prompt = _prompt(args.prompt, model.config)
        ids = generate(model, prompt, temperature=args.temperature, top_k=args.top_k, seed=args.seed)
        out = terminal.Patient(sys.stdout)
        shown = terminal.printable(args.prompt, "\t\n")
        for part in itertools.chain([shown], text_of(itertools.islice(ids, args.tokens)), ["\n"]):
            out.write(part)
            out.flush()
            if out.gone:
                break

    return process.carry_out("gpt2exp-sample", sample)


if __name__ == "__main__":
    main()
