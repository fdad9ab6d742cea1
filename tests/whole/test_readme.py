"""The pages are right: each command in them is a valid request, some are run, and every link and file named exists."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from filelock import FileLock
from support import SMALL, read, run, run_folders

from gpt2exp import bench, choices, export, sample, schema, section
from gpt2exp.compare import __main__ as comparing
from gpt2exp.sweep import composing, help, resume
from gpt2exp.sweep import request as requests
from gpt2exp.sweep.overrides import as_meant

ROOT = Path(__file__).parents[2]
PLACES = (
    "*.md",
    "conf/**/*.md",
    "gpt2exp/**/*.md",
    "tests/**/*.md",
    "experiments/throughput/**/*.md",
    "experiments/choices/*.md",
)
PAGES = {path: path.read_text(encoding="utf-8") for place in PLACES for path in sorted(ROOT.glob(place))}
README = PAGES[ROOT / "README.md"]
WALKS = re.compile(r"^## Adding a choice\n.*?(?=^## )", re.M | re.S)
"""What test_walks.py performs."""
SHOWN = [WALKS.sub("", page) for page in PAGES.values()]
BLOCKS = [block for page in SHOWN for block in re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)]
LINES = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
INLINE = [text for page in SHOWN for text in re.findall(r"`((?:gpt2exp[\w-]*|torchrun) [^`]+)`", page)]
COMMANDS = sorted({re.split(r" +# ", line)[0] for line in [*LINES, *INLINE] if not line.startswith("python3 ")})
REQUESTS = [line for line in COMMANDS if re.match(r"gpt2exp |torchrun ", line) and not line.endswith(" --help")]
"""Requests to the program itself; the rest are for its other commands."""


def others(program: str) -> list[list[str]]:
    """What follows the name of one of the other commands, for each time that a page shows it."""
    return [shlex.split(line)[1:] for line in COMMANDS if line.startswith(f"{program} ")]


def arguments(line: str) -> list[str]:
    """What follows the program's name; flags first, as the program puts them."""
    words = shlex.split(line)
    words = words[words.index("gpt2exp.train") + 1 if "gpt2exp.train" in words else 1 :]
    return sorted(words, key=lambda word: word not in ("-m", "--multirun"))


def small(words: list[str]) -> list[str]:
    """The same request on the smallest model, for two steps and at most two values an axis."""
    words = [re.sub(r"^([^=]+=[^,\[(]+,[^,]+),.*", r"\1", word) for word in words]
    swept = {word.partition("=")[0] for word in words if "," in word}
    given = [word for word in words if "=" in word and word.partition("=")[0] in swept]
    words = [word.replace("val_fraction=0.1", "val_fraction=0.001") for word in words]
    shrunk = [*SMALL, "train.steps=2"]
    shrunk = [word for word in shrunk if word.partition("=")[0] not in swept]
    return [word for word in words if word not in given] + given + shrunk


def one_seed(words: list[str]) -> list[str]:
    """The same request with seed 1 alone, or as many as it may take: other seeds compose alike."""
    if "sweep.until=answered" in words:
        return words
    words = [re.sub("^seed=.*", "seed=1", word) for word in words]
    study = any(word.startswith("experiment=") for word in words) and "seed=1" not in words
    return [*words, "seed=1"] if study else words


def compose(words: list[str]) -> requests.Request:
    """The checked plan of a request."""
    args = composing.arguments([as_meant(word) for word in words])
    choices.allow(composing.config_folder(args), Path.cwd())
    return resume.resumed_request(args) or requests.new_request(args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a sweep, made by commands of the pages, and with what other commands name."""
    own = tmp_path_factory.getbasetemp()  # shared by pytest's processes: the first makes it for all
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "pages"
    with FileLock(f"{folder}.lock"):
        if not (folder / "sweeps").exists():
            _make(folder)
    return folder


def _make(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "srun").touch(mode=0o755)  # Slurm's, for its launcher
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times. " * 200)
    (folder / "corpus").symlink_to(folder / "book.txt")
    (folder / "my_conf" / "model").mkdir(parents=True)
    nano = (ROOT / "conf" / "model" / "nano.yaml").read_text()
    (folder / "my_conf" / "model" / "mine.yaml").write_text(nano)
    (folder / "experiments").symlink_to(ROOT / "experiments")
    for line, jobs in {
        "gpt2exp model=nano train.steps=200 checkpoint.save_last=true": 1,
        "gpt2exp -m model=nano precision=fp32,tf32 seed=1,2,3 data.val_fraction=0.1": 4,
    }.items():
        assert line in REQUESTS
        before = len(run_folders(folder))
        done = run(folder, *small(arguments(line)), "wandb.mode=disabled")
        assert (done.returncode, done.stderr) == (0, "")
        assert len(run_folders(folder)) == before + jobs


def placed(text: str, folder: Path) -> str:
    """A command with the folders that the fixture made for DAY/TIME-ID."""
    (made, *_), (job, *_) = (run_folders(folder / kind) for kind in ("runs", "sweeps"))
    text = text.replace("runs/DAY/TIME-ID", str(made.relative_to(folder)))
    return text.replace("sweeps/DAY/TIME-ID", str(job.parent.relative_to(folder)))


def test_there_are_commands() -> None:
    assert len(REQUESTS) > 40
    for program in ("compare", "export", "sample", "bench"):
        assert others(f"gpt2exp-{program}")


@pytest.mark.parametrize("line", REQUESTS)
def test_every_command_is_a_request(line: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It composes, with a launcher's plugin and program there."""
    monkeypatch.chdir(trained)
    monkeypatch.setattr("sys.path", [*sys.path])  # modules from outside put their folders there
    monkeypatch.setenv("PATH", str(trained), prepend=":")
    jobs = compose(one_seed(arguments(placed(line, trained)))).jobs
    assert jobs
    if line.startswith("torchrun "):  # they run on SMALL in test_parallel.py
        assert len(jobs) == 1
        assert jobs[0].config.train.sequences % 8 == 0


def test_the_other_commands_run(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the run and the sweep that the fixture made, in the order of a reader."""
    monkeypatch.chdir(trained)
    (words,) = others("gpt2exp-export")
    assert export.command([placed(word, trained) for word in words]) == 0
    for words in others("gpt2exp-sample"):
        assert sample.command([*(placed(word, trained) for word in words), "--tokens", "3"]) == 0
    for words in others("gpt2exp-compare"):
        assert comparing.command(words) == 0
    assert len(read(trained / "sweeps" / "comparison.json")["runs"]) == 4
    done = run(trained, placed("resume=runs/DAY/TIME-ID", trained), "train.steps=3", "wandb.mode=disabled")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_bench_takes_them() -> None:
    """They run on SMALL in test_bench.py."""
    for words in others("gpt2exp-bench"):
        assert len(compose(bench._parser().parse_intermixed_args(words).overrides).jobs) == 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_page_names_is_there(path: Path) -> None:
    """Its links, and every Python file in it."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGES[path]):
        assert (path.parent / target).exists(), target
    if "experiments" not in path.parts:  # which names files of other projects
        for name in re.findall(r"`([\w/]+\.py|\.\./[\w/]+)`", PAGES[path]):
            assert any((place / name).exists() for place in (path.parent, ROOT, ROOT / "gpt2exp")), name


def test_the_refusal_shown_is_real() -> None:
    shown = re.findall(r"^\$ gpt2exp (.+)\ngpt2exp: (.+)$", "\n".join(PAGES.values()), re.MULTILINE)
    assert shown
    for words, line in shown:
        with pytest.raises(section.BadRequest) as caught:
            compose(shlex.split(words))
        assert str(caught.value) == line


@pytest.mark.parametrize("page", ["README.md", "conf/README.md"])
def test_every_choice_is_in_its_groups_row(page: str) -> None:
    """Each file of a group, in the table of groups."""
    rows = {row.split("`")[1]: row for row in PAGES[ROOT / page].splitlines() if row.startswith("| `")}
    for path in (ROOT / "conf").rglob("*.yaml"):
        group, _, name = path.relative_to(ROOT / "conf").with_suffix("").as_posix().rpartition("/")
        if group.startswith("experiment/"):  # a study of the same question, at another scale
            group, _, name = "experiment", *f"{group}/{name}".partition("/")[1:]
        if group not in ("", "wandb"):
            row = rows.get(group) or next(row for row in rows.values() if f"`{group}`" in row)
            assert f"`{name}`" in row, path


def test_help_says_what_the_schema_says() -> None:
    """Every key with the default that it has, and its choices; the groups with all members, the default first."""
    page = help.text()
    for key, default, _ in schema.options():
        assert f"\n  {key}={section.show(default)} " in page
    assert "(auto, cpu, cuda, mps)" in " ".join(page.split())
    for group, first in (("model", "gpt2"), ("init", "gpt2"), ("precision", "fp32"), ("data", "tinyshakespeare")):
        shown = re.search(rf"^  {group}=(\S+)$", page, re.MULTILINE)
        assert shown is not None
        names = shown[1].split("|")
        assert names[0] == first
        assert set(names) == {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}
    for line in help.EXAMPLES.splitlines():
        assert compose(one_seed(arguments(re.split(r" {3,}", line.strip())[0]))).jobs


def test_every_fault_has_its_test() -> None:
    """Each row of the table of faults names a test that is there."""
    rows = [line for line in PAGES[ROOT / "tests" / "README.md"].splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.fullmatch(r"\| [^|]+ \| [^|]+ \| `(test_\w+\.py)::(test_\w+)` \|", row)
        assert named is not None, row
        (file,) = (ROOT / "tests").rglob(named[1])
        assert re.search(rf"^ *def {named[2]}\(", file.read_text(encoding="utf-8"), re.MULTILINE), row


def test_readme_fits_in_a_sitting() -> None:
    assert len(README.splitlines()) <= 150


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
