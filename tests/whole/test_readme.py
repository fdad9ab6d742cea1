"""The README keeps its word: every command in it runs, shrunk to seconds, and CI runs its test command."""

from __future__ import annotations

import operator
import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from support import SMALL, run, run_folders

from gpt2exp import bench, config
from gpt2exp.sweep import help
from gpt2exp.sweep import request as requests

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
COMMANDS = [line for line in LINES if re.match(r"(gpt2exp|python -m gpt2exp\.train)( |$)", line)]
(COMPARE,) = [shlex.split(line)[1:] for line in LINES if line.startswith("gpt2exp-compare ")]
INLINE = [
    text
    for text in re.findall(r"`(gpt2exp(?: [^`]+)?)`", README)
    if text not in COMMANDS and "launcher=slurm" not in text  # is refused without Slurm; test_engines.py runs it
]
"""Commands in running text and tables, without those shown in a block too."""


def arguments(line: str) -> list[str]:
    """What follows the program's name, less a comment; flags first, as the program puts them."""
    words = shlex.split(line, comments=True)
    words = words[3 if words[0] == "python" else 1 :]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def small(words: list[str]) -> list[str]:
    """The same request on the smallest model, for two steps and at most two values an axis."""
    words = [re.sub(r"^([^=]+=[^,\[(]+,[^,]+),.*", r"\1", word) for word in words]
    swept = {word.partition("=")[0] for word in words if "," in word}
    given = [word for word in words if "=" in word and word.partition("=")[0] in swept]
    shrunk = [*SMALL, "train.steps=2", "train.batch_size=2", "train.seq_len=16"]
    if any(word.startswith("experiment=") for word in words):  # a study: two seeds, a few validation windows
        shrunk += [] if "seed" in swept else ["seed=1,2"]
        shrunk += ["data.val_fraction=0.001", "init.residual_scaling=true,false"]
    shrunk = [word for word in shrunk if word.partition("=")[0] not in swept]
    if any(word.startswith("model=") for word in given):  # sizes of several models: only what all of them can take
        shrunk = [word for word in shrunk if not word.startswith("model")] + ["dry_run=true"]
    return [word for word in words if word not in given] + given + shrunk


def compose(words: list[str]) -> requests.Plan:
    """The checked plan of a request."""
    return requests.make(get_args_parser().parse_args(words))


BENCH = [shlex.split(line)[1:] for line in LINES if line.startswith("gpt2exp-bench ")]


@pytest.mark.parametrize("words", BENCH, ids=" ".join)
def test_the_bench_runs(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As typed but for the size; compiling the peer, which takes half a minute, is left to the reader."""
    shrunk = [word for word in words if word != "--compile"]
    assert bench.command([*shrunk, *SMALL, "train.seq_len=16", "--pairs", "1", "--steps", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("{")


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 5
    assert len(LINES) >= 7


@pytest.mark.parametrize("line", [*COMMANDS, *INLINE])
def test_every_command_is_a_request(line: str) -> None:
    """As it stands it composes, whatever the machine."""
    words = arguments(line.replace("my_conf", ".").replace("model=mine", "model=nano"))
    if "--help" not in words:
        assert compose(words).jobs


TORCHRUN = re.findall(r"`torchrun [^`]+ -m gpt2exp\.train ([^`]+)`", README)


@pytest.mark.parametrize("words", TORCHRUN)
def test_every_shared_run_is_a_request(words: str) -> None:
    """They run on SMALL in test_parallel.py."""
    (job,) = compose(shlex.split(words)).jobs
    assert job.config.train.sequences % 8 == 0


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_run(line: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    words = small(arguments(line))
    done = run(folder, *words, "wandb.mode=disabled")
    assert (done.returncode, done.stderr) == (0, "")
    request = compose(words)
    jobs = request.jobs
    if request.multirun and not jobs[0].config.dry_run:
        (report,) = folder.glob("sweeps/*/*/report.html")
        again = run(folder, *COMPARE, program=[sys.executable, "-m", "gpt2exp.compare"])
        assert (again.returncode, again.stderr) == (0, "")
        assert (folder / COMPARE[0] / "comparison.json").stat().st_mtime >= report.stat().st_mtime
    expected = 0 if jobs[0].config.dry_run else len(jobs)
    assert len(run_folders(folder)) == expected


def test_the_refusal_shown_is_real() -> None:
    shown = re.findall(r"^\$ gpt2exp (.+)\ngpt2exp: (.+)$", README, re.MULTILINE)
    assert shown
    for words, line in shown:
        with pytest.raises(config.BadRequest) as caught:
            compose(shlex.split(words))
        assert str(caught.value) == line


def test_every_key_is_in_the_map() -> None:
    """A key that exists is named in the README."""
    table = README[README.index("| group |") : README.index("A wrong key")]
    for key in list(config.keys()):
        name = key.rpartition(".")[2]
        if key in ("init.scheme", "precision.name", "data.name", "optimizer.name"):
            continue  # chosen by the group
        assert re.search(rf"\b{name}\b", table), f"{key} is missing from the README's map"


def test_help_says_what_the_schema_says() -> None:
    """Every key with the default that it has, and its choices; the groups with all members, the default first."""
    page = help.text()
    for key in list(config.keys()):
        assert f"\n  {key}={config.show(operator.attrgetter(key)(config.RunConfig()))} " in page
    assert "(auto, cpu, cuda, mps)" in " ".join(page.split())
    for group, first in (("model", "gpt2"), ("init", "gpt2"), ("precision", "fp32"), ("data", "tinyshakespeare")):
        shown = re.search(rf"^  {group}=(\S+)$", page, re.MULTILINE)
        assert shown is not None
        names = shown[1].split("|")
        assert names[0] == first
        assert set(names) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    for line in help.EXAMPLES.splitlines():
        assert compose(arguments(re.split(r" {3,}", line.strip())[0])).jobs


def test_every_fault_has_its_test() -> None:
    """Each row of the table of faults names a test that is there."""
    section = README[README.index("## When things go wrong") :].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.fullmatch(r"\| [^|]+ \| [^|]+ \| `(test_\w+\.py)::(test_\w+)` \|", row)
        assert named is not None, row
        (file,) = (ROOT / "tests").rglob(named[1])
        assert re.search(rf"^ *def {named[2]}\(", file.read_text(encoding="utf-8"), re.MULTILINE), row


class TestOpeningCommands:
    """The two commands the README opens with, one line each."""

    def test_they_are_the_first_two(self) -> None:
        run_it, test_it = LINES[:2]
        assert run_it.startswith("python3 -m venv ")
        assert run_it.endswith("/bin/gpt2exp")
        assert "[dev]" in test_it
        assert test_it.endswith("/bin/pytest")

    def test_ci_runs_the_second(self) -> None:
        """`.ci/run` takes the line from the README itself, by the mark above its block."""
        script = (ROOT / ".ci" / "run").read_text()
        mark = re.search(r"<!-- test command -->\n```bash\n(.+)\n```", README)
        assert mark is not None
        assert mark[1] == LINES[1]
        assert "<!-- test command -->" in script
        assert "README.md" in script
        assert "pip install" not in script, "what CI installs is what the README's line installs"
        assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
