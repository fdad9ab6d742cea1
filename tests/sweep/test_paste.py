"""Every command that is printed can be pasted into a shell, whatever characters the path has."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import SMALL, read, run, surroundings, the_run

from gpt2exp.compare import report
from gpt2exp.config import DataConfig
from gpt2exp.run import terminal
from gpt2exp.section import BadRequest, typed
from gpt2exp.sweep import resume
from gpt2exp.sweep.composing import arguments, open_composer
from gpt2exp.sweep.overrides import parse_overrides

NAMES = [
    "plain",
    "a=b",
    "a,b",
    "two words",
    "[x]",
    "{x: 1}",
    "(y)",
    "it's",
    'say "hi"',
    "~",
    "~root",
    "-m",
    "--help",
    "null",
    "true",
    "2024_01_15",
    "1e3",
    "007",
    ".5",
    "$HOME",
    "${seed}",
    "`id`",
    "back\\slash",
    "end\\",
    "end\\'",
    "*",
    "a;b",
    "a&b",
    "#c",
    "é",
    ":x",
    "@p",
    "!h",
    "choice(a)",
    " blank ",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bash(line: str) -> list[str]:
    """The words of a printed command, as bash splits it."""
    show = f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    done = subprocess.run(["bash", "-c", f"{show} {line}"], capture_output=True, text=True, check=True)
    words: list[str] = json.loads(done.stdout)
    return words


def said(request: list[str]) -> str:
    """The line that refuses a `resume=`."""
    with pytest.raises(BadRequest) as refused:
        resume.resumed_request(arguments(request))
    return str(refused.value)


def test_a_plain_command_stays_plain() -> None:
    assert terminal.to_go_on(Path("runs/2026-11-27/09-05-20-ab12").absolute()) == (
        "gpt2exp resume=runs/2026-11-27/09-05-20-ab12"
    )


@pytest.mark.parametrize("name", ["a=b, c", "[x] it's", '"', "~", "~root", "-m", "2024_01_15", "$HOME"])
def test_resume(name: str, here: Path) -> None:
    """Pasted, it names the same folder; so does the hint after a folder above it was named."""
    folder = here / name
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text("seed: [")
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    program, *words = bash(terminal.to_go_on(folder))
    assert program == "gpt2exp"
    assert f"{folder}: its .hydra/config.yaml" in said(words)
    hint = said([f"resume={here}"])
    assert f"{folder}: its .hydra/config.yaml" in said(bash(hint.partition("such as ")[2]))


def test_commands_of_other_programs(here: Path) -> None:
    """`wandb sync` and `gpt2exp-compare` get the folder as one argument that is no flag."""
    for name in NAMES:
        (here / name).mkdir()
    arguments = bash(" ".join(terminal.pasted("gpt2exp-compare", here / name) for name in NAMES))
    assert arguments[::2] == ["gpt2exp-compare"] * len(NAMES)
    for name, argument in zip(NAMES, arguments[1::2], strict=True):
        assert Path(argument).samefile(here / name), name
        assert not argument.startswith(("-", "~"))


def test_an_override() -> None:
    """`typed` is read back by Hydra as the same text, one value of no sweep; so is a hint that holds one."""
    with open_composer(arguments([])) as composer:
        for name in NAMES:
            with pytest.raises(BadRequest) as refused:
                DataConfig(path=name)
            section, hint = bash(str(refused.value).partition("; try ")[2])
            assert section == "data=text"
            for text in (typed("data.path", name), hint):
                (override,) = parse_overrides(composer, [text])
                assert (override.key_or_group, override.value()) == ("data.path", name)
                assert not override.is_sweep_override()


def test_the_printed_lines_of_a_run_and_a_sweep(here: Path) -> None:
    """A run in a folder of every kind of character: its own command, `wandb sync` and `resume=`, each pasted."""
    place = here / "it's [a] = b, c"
    folder = f"hydra.run.dir='{place}'".replace("it's", r"it\'s")
    done = run(here, *SMALL, "train.steps=2", "checkpoint.save_last=true", folder, "wandb.name='x y'")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert bash(lines[0]) == [
        "gpt2exp",
        *SMALL,
        "train.steps=2",
        "checkpoint.save_last=true",
        folder,
        "wandb.name='x y'",
    ]
    (sync,) = [line for line in lines if line.startswith("to upload: ")]
    *program, uploaded = bash(sync.removeprefix("to upload: "))
    assert program == ["wandb", "sync"]
    assert (here / uploaded).samefile(next(place.glob("wandb/offline-run-*")))
    line = terminal.to_go_on(place).replace("gpt2exp", f"{shlex.quote(sys.executable)} -m gpt2exp.train", 1)
    again = subprocess.run(
        ["bash", "-c", f"{line} train.steps=3"],
        cwd=here,
        env=surroundings(here / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (again.returncode, again.stderr) == (0, "")
    assert read(the_run(here) / "summary.json")["steps"] == 3
    assert report.commands([read(place / "summary.json") | {"folder": str(place)}])[0] == shlex.join(
        ["gpt2exp", *read(place / "summary.json")["overrides"]]
    )
