"""`gpt2exp-sample`: one seed gives one text, temperature 0 equals transformers' greedy search, characters are printed
whole, and no id beyond the tokenizer is drawn.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers  # each class is imported when it is first named
from support import SMALL, surroundings

from gpt2exp import export, sample
from gpt2exp.config import InitConfig, ModelConfig
from gpt2exp.data import tokens
from gpt2exp.model.gpt import GPT
from gpt2exp.model.init import initialise
from gpt2exp.section import BadRequest
from gpt2exp.sweep import launch

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=64)


def built(**changes: object) -> GPT:
    """A model whose choices differ from token to token."""
    known = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 64, **changes}
    model = GPT(ModelConfig(**known))
    initialise(model, InitConfig(std=0.4, position_std=0.4), seed=0)
    return model


def first(count: int, model: GPT, prompt: list[int], **how: object) -> list[int]:
    """The first ids of what follows."""
    return list(itertools.islice(sample.generate(model, prompt, **how), count))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint."""
    folder = tmp_path_factory.mktemp("run") / "run"
    words = ["train.steps=3", "checkpoint.save_last=true", "wandb.mode=disabled", "init.std=0.4", "train.seq_len=64"]
    assert launch.command([*SMALL, *words, f"hydra.run.dir={folder}"]) == 0
    return folder


# --- ids -------------------------------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_generates(place: Path, tmp_path: Path) -> None:
    """By the export, so that both ways of loading are compared."""
    out = tmp_path / "out"
    assert export.command([str(place), str(out)]) == 0
    prompt = tokens.gpt2_encoding().encode("First Citizen:")
    ours = first(20, sample.load(place), prompt, temperature=0)
    assert len(set(ours)) > 3
    hf = transformers.GPT2LMHeadModel.from_pretrained(out).generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False
    )
    assert hf[0].tolist() == prompt + ours
    assert first(20, sample.load(out), prompt, temperature=0) == ours


def test_a_folder_of_transformers_untied(tmp_path: Path) -> None:
    shape = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, n_positions=64, tie_word_embeddings=False, initializer_range=0.4
    )
    hf = transformers.GPT2LMHeadModel(shape)
    hf.save_pretrained(tmp_path)
    expected = hf.eval().generate(torch.tensor([[7, 8]]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert [7, 8, *first(9, sample.load(tmp_path), [7, 8], temperature=0)] == expected[0].tolist()


def test_one_seed_one_text() -> None:
    model = built()
    texts = [first(16, model, [1, 2], seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_frequencies_are_the_softmax_at_that_temperature() -> None:
    """By 20,000 draws from one distribution; five standard errors."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, top_k in ((1.0, None), (0.5, None), (2.0, 2), (1.0, 99)):
        drawn = torch.tensor([sample.pick(logits, temperature, top_k, generator) for _ in range(20_000)])
        kept = logits if top_k is None or top_k > 4 else logits[:top_k]
        expected = (kept / temperature).softmax(0)
        got = drawn.bincount(minlength=4)[: len(kept)] / 20_000
        assert drawn.max() < len(kept)
        assert ((got - expected).abs() < 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_a_tiny_temperature_is_greedy_and_no_fault() -> None:
    generator = torch.Generator().manual_seed(0)
    assert sample.pick(torch.tensor([0.0, 3.0, 2.9]), 1e-300, None, generator) == 1


def test_top_1_is_greedy() -> None:
    model = built()
    assert first(12, model, [5], top_k=1, seed=3) == first(12, model, [5], temperature=0)


def test_longer_than_the_block() -> None:
    """What the model sees is the last `block_size` ids: the text goes on, as if the ones before were not there."""
    model, long = built(), list(range(1000, 1100))
    assert first(8, model, long, seed=5) == first(8, model, long[-64:], seed=5)
    assert len(first(70, model, [1], seed=5)) == 70


def test_no_id_beyond_the_tokenizers() -> None:
    """A padded vocabulary's rows, made the likeliest of all."""
    model = built(vocab_size=50304)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[50257:] = 100.0
        assert int(model(torch.tensor([[1]]))[0, -1].argmax()) >= 50257
    assert max(first(30, model, [1])) < 50257
    assert max(first(5, model, [1], temperature=0)) < 50257


def test_weights_that_are_no_numbers() -> None:
    model = built()
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = float("nan")
    with pytest.raises(BadRequest, match="diverged"):
        first(1, model, [1])


# --- text ------------------------------------------------------------------------------------------------------------


def test_characters_arrive_whole() -> None:
    """🦜 and 龘 take several tokens each: no part of one is shown, nothing is lost."""
    words = "naïve 🦜 龘 done"
    ids = tokens.gpt2_encoding().encode(words)
    parts = list(sample.text_of(ids))
    assert len(ids) > len(words.split()) + 2
    assert "".join(parts) == words
    assert "�" not in "".join(parts)
    assert len([part for part in parts if part]) > 4, "as they come, not at the end"
    cut = list(sample.text_of(tokens.gpt2_encoding().encode("🦜")[:-1]))
    assert "".join(cut) == "�"


def test_the_text_ends_at_end_of_text_and_obeys_no_control_character() -> None:
    encoding = tokens.gpt2_encoding()
    ids = [*encoding.encode("a\x1b[31m\nb\tc"), tokens.END_OF_TEXT, *encoding.encode("never")]
    assert "".join(sample.text_of(ids)) == "a�[31m\nb\tc"


# --- the command -----------------------------------------------------------------------------------------------------


def test_it_prints_the_prompt_and_what_follows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(place), "--prompt", "O Romeo, ", "--tokens", "12", "--top-k", "50", "--temperature", "0.9"]
    texts = []
    for seed in ("1", "1", "2"):
        assert sample.command([*words, "--seed", seed]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        texts.append(out)
    assert texts[0] == texts[1] != texts[2]
    assert re.fullmatch(r"O Romeo, .+\n", texts[0], re.DOTALL)
    ids = first(12, sample.load(place), tokens.gpt2_encoding().encode("O Romeo, "), temperature=0.9, top_k=50, seed=1)
    assert texts[0] == f"O Romeo, {''.join(sample.text_of(ids))}\n"
    assert sample.command([str(place), "--prompt", "", "--tokens", "3"]) == 0


@pytest.mark.parametrize(
    ("words", "start", "remedy"),
    [
        (["--tokens", "0"], "--tokens 0: must be at least 1", "try --tokens 100"),
        (["--temperature", "-1"], "--temperature -1.0: must be a number of 0 or more", "try --temperature 0.8"),
        (["--temperature", "nan"], "--temperature nan: must be", "try --temperature 0.8"),
        (["--temperature", "warm"], "argument --temperature: invalid float value", "gpt2exp-sample --help"),
        (["--top-k", "0"], "--top-k 0: must be at least 1", "try --top-k 50"),
        (["--seed", "-1"], "--seed -1: must lie in [0, 2^63)", "try --seed 1337"),
        (["--length", "3"], "unrecognized arguments: --length 3", "gpt2exp-sample --help"),
    ],
)
def test_refused(words: list[str], start: str, remedy: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.command([str(place), *words]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith(f"gpt2exp-sample: {start}")
    assert remedy in line


def test_folders_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    for folder, start in (
        (tmp_path / "none", f"{tmp_path / 'none'}: no such folder"),
        (place.parent, f"{place.parent}: a folder above runs; name one, such as {place}"),
        (place / "checkpoints", f"{place / 'checkpoints'}: holds checkpoints of a run; name the run: {place}"),
        (tmp_path, f"{tmp_path}: has no model.safetensors"),
    ):
        assert sample.command([str(folder)]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert err.startswith(f"gpt2exp-sample: {start}")


def test_a_prompt_beyond_a_small_vocabulary() -> None:
    with pytest.raises(
        BadRequest, match=r"--prompt 'Hello': has token 15496, and the model knows 300; try other words"
    ):
        sample._prompt("Hello", ModelConfig(vocab_size=300))


def test_the_reader_leaves_and_help_needs_no_torch(place: Path, tmp_path: Path) -> None:
    """`gpt2exp-sample RUN | head -c 20` ends, quietly, long before a million tokens are made."""
    command = [sys.executable, "-m", "gpt2exp.sample", str(place), "--tokens", "1000000"]
    made = subprocess.Popen(
        command, env=surroundings(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    assert made.stdout is not None
    assert made.stdout.read(20)
    made.stdout.close()
    assert made.stderr is not None
    assert made.stderr.read() == b""
    assert made.wait(timeout=60) == 0
    for module in ("sample", "export"):
        code = f"import sys, gpt2exp.{module} as m; m.command(['nowhere', 'x'][:{1 + (module == 'export')}])"
        code += "; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stdout == "False\n"
        assert "nowhere: no such folder" in done.stderr
