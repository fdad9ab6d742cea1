"""The built wheel contains every file, and the program runs from an empty folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import SMALL, read, surroundings, the_run

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of what git tracks, so that nothing unlisted gets in and the checkout stays clean."""
    copy = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(copy / "out"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (built,) = (copy / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed."""
    place = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    return place


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    copy = wheel.parent.parent
    assert "gpt2exp/py.typed" in names
    assert "gpt2exp/conf/model/nano.yaml" in names
    assert not [name for name in names if name.endswith(".md")], "the folders' pages are for the checkout"
    for path in (path for path in (copy / "gpt2exp").rglob("*") if path.is_file() and path.suffix != ".md"):
        assert path.relative_to(copy).as_posix() in names
    for path in (path for path in (copy / "conf").rglob("*") if path.is_file() and path.suffix != ".md"):
        assert f"gpt2exp/{path.relative_to(copy).as_posix()}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gpt2exp"}, (
        "no tests, no runs, no conf beside it"
    )
    (licence,) = [name for name in names if name.endswith("LICENSE")]
    assert ".dist-info/" in licence


def test_runs_from_an_empty_folder(site: Path, tmp_path: Path) -> None:
    """With a choice of the examples in it."""
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = surroundings(tmp_path / "home", PYTHONPATH=str(site))
    where = "import gpt2exp, gpt2exp.conf; print(gpt2exp.__file__, gpt2exp.conf.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert all(Path(path).is_relative_to(site) for path in done.stdout.split())
    done = subprocess.run(
        [
            site / "bin" / "gpt2exp",
            "--config-dir",
            "pkg://gpt2exp.examples",
            *SMALL,
            "train.steps=3",
            "model/mlp=swiglu",
        ],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    summary = read(the_run(folder) / "summary.json")
    assert (summary["state"], summary["steps"]) == ("done", 3)
    assert summary["git"] is None, "there is no checkout to speak of"
    assert Path(summary["config"]["model"]["mlp"]["_source_"]).is_relative_to(site)
