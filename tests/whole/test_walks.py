"""Adding a choice takes the steps that gpt2exp/README.md says and no more: each is performed here, in a folder of the
user's, and with the same code in a copy of the package.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from support import SMALL, read, run, run_folders

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "gpt2exp" / "README.md").read_text(encoding="utf-8")
PARTS = PAGE.split("## Adding a choice")[1].split("\n## ")[0].split("\n### ")[1:]
WALKS = {part.splitlines()[0]: part for part in PARTS}
MODULES = {
    "An optimizer": "training/optimizers.py",
    "A schedule": "training/optimizers.py",
    "An init scheme": "model/init.py",
    "A data source": "data/sources.py",
    "A metric": "training/trainer.py",
    "What stands in a slot of the model": "model/gpt.py",
}
"""Where the code goes in the package."""


def files(walk: str) -> dict[str, str]:
    """The files of a walk by name; at most 15 lines of them."""
    found = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", WALKS[walk], re.M | re.S))
    assert len(found) == 2, "a module and a YAML file"
    assert sum(bool(line.strip()) for text in found.values() for line in text.splitlines()) <= 15
    return found


def words(walk: str) -> list[str]:
    """The walk's command without the program, on the smallest model, with one seed and two steps."""
    (line,) = re.findall(r"^```bash\ngpt2exp (.*)\n```$", WALKS[walk], re.M)
    kept = [word for word in shlex.split(line) if not word.startswith(("seed=", "model=nano", "data.val"))]
    sweep = ["hydra.sweep.dir=there"] if "-m" in kept else ["hydra.run.dir=there"]
    return [*kept, *SMALL, "train.steps=2", "train.seq_len=16", "wandb.mode=disabled", *sweep]


def copied(folder: Path) -> tuple[Path, dict[str, str]]:
    """The package in a folder, and the environment that makes a command use it."""
    shutil.copytree(ROOT / "gpt2exp", folder / "gpt2exp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", folder / "gpt2exp" / "conf", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "gpt2exp", {"PYTHONPATH": str(folder)}


def test_the_walks_are_all_here() -> None:
    assert WALKS.keys() == {*MODULES, "A precision"}


@pytest.mark.parametrize("walk", MODULES)
def test_outside(walk: str, tmp_path: Path) -> None:
    for name, text in files(walk).items():
        (tmp_path / "work" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / name).write_text(text)
    done = run(tmp_path / "work", *words(walk))
    assert done.returncode == 0, done.stderr
    asked = [read(folder / "summary.json") for folder in run_folders(tmp_path / "work" / "there")]
    assert any(summary["outside"] for summary in asked)
    if walk == "A metric":
        assert all("accuracy" in summary for summary in asked)


@pytest.mark.slow
def test_in_the_package(tmp_path: Path) -> None:
    """All in one copy: the code at the end of a module, the YAML file in conf/; the precision as the page has it."""
    package, environment = copied(tmp_path / "copy")
    asked: dict[str, str] = {}
    for walk in [*MODULES, "A precision"]:
        (code, text), (file, keys) = files(walk).items()
        module = package / MODULES.get(walk, "config.py")
        if walk == "A precision":
            before = re.search(r"^    fp64 = .*\n", module.read_text(), re.M)
            assert before is not None
            module.write_text(module.read_text().replace(before[0], before[0] + text))
        else:
            module.write_text(f"{module.read_text()}\n\n{text}")
            place = "gpt2exp." + MODULES[walk].removesuffix(".py").replace("/", ".")
            keys = keys.replace(f"_target_: {Path(code).stem}.", f"_target_: {place}.")
        target = package / "conf" / file.removeprefix("mine/").removeprefix("conf/")
        target.parent.mkdir(exist_ok=True)
        target.write_text(keys)
        chosen = [word.partition("=") for word in words(walk) if "=" in word]
        asked |= {key: value.rpartition(",")[2] for key, _, value in chosen}
    del asked["hydra.sweep.dir"], asked["optimizer.lr"]
    line = [f"{key}={value}" for key, value in asked.items()]
    done = run(tmp_path / "work", *line, program=[sys.executable, "-m", "gpt2exp.train"], **environment)
    assert done.returncode == 0, done.stderr
    summary = read(tmp_path / "work" / "there" / "summary.json")
    assert len(summary["outside"]) == len(MODULES)
    assert "accuracy" in summary
    assert summary["precision"]["requested"] == "bf16_medium"
