"""What Weights & Biases receives, read back from its offline file; and a failing wandb never stops training."""

from __future__ import annotations

import http.server
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    SMALL,
    OfflineRun,
    at_step,
    finish,
    losses,
    offline_records,
    read,
    run,
    run_folders,
    start,
    the_run,
)

from gpt2exp.config import RunConfig, WandbConfig, WandbMode
from gpt2exp.run import tracking
from gpt2exp.schema import plain

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account, no netrc, nothing in the environment."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The package's warnings."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    log = logging.getLogger("gpt2exp")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


class TestOfflineFile:
    """Every step and fact of one run; 60 steps fill several of the file's 32 KiB blocks."""

    @pytest.fixture(scope="class")
    @staticmethod
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The run's folder."""
        here = tmp_path_factory.mktemp("offline") / "here"
        named = ["wandb.group=my group", "wandb.name=my run", "wandb.tags=[red,green]", "wandb.project=my-project"]
        done = run(here, *SMALL, "train.steps=60", "train.seq_len=8", "data.val_fraction=0.001", *named)
        assert (done.returncode, done.stderr) == (0, "")
        assert "\nwandb      offline\n" in done.stdout
        return the_run(here)

    @pytest.fixture(scope="class")
    @staticmethod
    def sent(folder: Path) -> OfflineRun:
        """What wandb wrote of it."""
        return OfflineRun(folder)

    def test_history_is_the_metrics(self, folder: Path, sent: OfflineRun) -> None:
        assert sent.file.stat().st_size > 32768
        rows = read(folder / "metrics.jsonl")
        assert len(sent.history) == len(rows) == 60
        for row, got in zip(rows, sent.history, strict=True):
            assert got["_step"] == row["step"]
            assert {key: got[key] for key in ("step", "tokens", "loss", "tokens_per_second")} == {
                key: row[key] for key in ("step", "tokens", "loss", "tokens_per_second")
            }
            for key, value in row.items():  # a list is a curve an element
                assert (
                    got[key] if not isinstance(value, list) else [got[f"{key}/{i}"] for i in range(len(value))]
                ) == value

    def test_config_is_resolved_and_plain(self, folder: Path, sent: OfflineRun) -> None:
        config = read(folder / "summary.json")["config"]
        assert {key: sent.config[key] for key in config} == config
        assert sent.config["model"]["n_embd"] == 16
        assert sent.config["facts"]["parameters"]["total"] == 811_728
        assert sent.config["facts"]["precision"]["effective"] == "fp32"
        assert config.keys() == plain(RunConfig()).keys()

    def test_summary(self, folder: Path, sent: OfflineRun) -> None:
        summary = read(folder / "summary.json")
        for key in ("state", "loss_first", "loss_last", "loss_mean_last10", "val_loss", "steps", "peak_memory_bytes"):
            assert sent.summary[key] == summary[key]
        for key in ("tokens_per_second", "step_ms"):  # the run's, not the last step's of the same name
            assert sent.summary[key] == summary[key]

    def test_names(self, sent: OfflineRun) -> None:
        entry = sent.run
        assert (entry.project, entry.run_group, entry.display_name) == ("my-project", "my group", "my run")
        assert sorted(entry.tags) == ["green", "red"]
        assert entry.job_type == "train"

    def test_axes(self, sent: OfflineRun) -> None:
        """Everything is drawn over tokens; the step stays available."""
        named = {metric.name or metric.glob_name: metric for metric in sent.metrics}
        assert {"tokens", "step", "*"} <= named.keys()
        assert named["*"].step_metric == "tokens"
        assert named["*"].options.step_sync
        for name, least in {"loss": True, "grad_norm": False, "val_loss": False}.items():
            assert named[name].step_metric == "tokens"
            assert named[name].summary.min is least
        assert named["val_loss"].summary.none, "the summary's is the run's"

    def test_closed(self, sent: OfflineRun) -> None:
        assert sent.exit_codes == [0]

    def test_nothing_of_the_machine(self, folder: Path) -> None:
        """No host name, user or arguments beside what the record allows."""
        assert not list(folder.rglob("wandb-metadata.json"))


def test_what_a_step_measured_always_arrives(tmp_path: Path) -> None:
    """With `log_every` above 1 wandb and the terminal get the same steps: its multiples and those with a measure."""
    often = ["train.steps=24", "train.log_every=10", "train.measure_every=9", "train.eval_every=7"]
    done = run(tmp_path / "here", *SMALL, *often, "train.seq_len=8", "data.val_fraction=0.001")
    assert (done.returncode, done.stderr) == (0, "")
    folder = the_run(tmp_path / "here")
    rows, sent = read(folder / "metrics.jsonl"), OfflineRun(folder)
    steps = [0, 6, 9, 10, 13, 18, 20, 23]
    assert [row["step"] for row in sent.history] == steps
    assert [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("step ")] == steps
    for key in ("val_loss", "grad_norm", "loss_unseen", "residual_rms/0", "wte_grad_head"):
        name, _, index = key.partition("/")
        measured = [row[name][int(index)] if index else row[name] for row in rows if name in row]
        assert [row[key] for row in sent.history if key in row] == measured
    assert sum("val_loss" in row for row in rows) == 4


class TestVariables:
    """Each of wandb's variables holds where its key is not typed, or is said not to."""

    def test_of_a_run(self, tmp_path: Path) -> None:
        """What is typed wins; the rest holds, the run's id too, and what does not is one line each."""
        around = {
            "WANDB_PROJECT": "theirs",
            "WANDB_ENTITY": "team",
            "WANDB_NAME": "2024_01_15",
            "WANDB_TAGS": "red, green",
            "WANDB_RUN_GROUP": "a group",
            "WANDB_NOTES": "why",
            "WANDB_JOB_TYPE": "trial",
            "WANDB_RUN_ID": "abc",
            "WANDB_SWEEP_ID": "sweep1",
            "WANDB_DIR": str(tmp_path),
            "WANDB_MODE": "dryrun",
            "WANDB_CONSOLE": "wrap",
            "WANDB_DISABLE_CODE": "true",
        }
        done = run(tmp_path / "here", *SMALL, "train.steps=2", "wandb.entity=mine", **around)
        assert (done.returncode, done.stderr) == (0, "")
        notes = [line for line in done.stdout.splitlines() if line.startswith("note: ")]
        assert notes == ["note: WANDB_CONSOLE=wrap: not used; in gpt2exp it is off"]
        entry = OfflineRun(tmp_path).run
        assert (entry.project, entry.display_name, entry.run_group) == ("theirs", "2024_01_15", "a group")
        assert (list(entry.tags), entry.notes, entry.job_type) == (["red", "green"], "why", "trial")
        assert (entry.run_id, entry.sweep_id, entry.host) == ("abc", "sweep1", "")
        config = read(the_run(tmp_path / "here") / "summary.json")["config"]["wandb"]
        assert (config["project"], config["entity"]) == ("theirs", "mine")

    def test_of_a_sweep(self, tmp_path: Path) -> None:
        """Every job and the comparison has an id of its own, is in no sweep of wandb's, and is named to be uploaded."""
        around = {
            "WANDB_RUN_ID": "abc",
            "WANDB_RESUME": "allow",
            "WANDB_SWEEP_ID": "sweep1",
            "WANDB_DIR": str(tmp_path),
        }
        more = ["-m", "seed=1,2", *SMALL, "train.steps=2"]
        done = run(tmp_path / "here", *more, **around)
        assert (done.returncode, done.stderr) == (0, "")
        (note,) = [line for line in done.stdout.splitlines() if line.startswith("note: WANDB")]
        assert note.startswith("note: WANDB_RUN_ID, WANDB_RESUME, WANDB_SWEEP_ID: not used in a sweep; ")
        kept = sorted((tmp_path / "wandb").glob("offline-run-*"))
        entries = [
            next(r.run for r in offline_records(next(folder.glob("*.wandb"))) if r.HasField("run")) for folder in kept
        ]
        assert sorted(entry.job_type for entry in entries) == ["comparison", "train", "train"]
        assert len({entry.run_id for entry in entries} | {"abc"}) == 4
        assert not any(entry.sweep_id or entry.resume for entry in entries)
        (sync,) = [line for line in done.stdout.splitlines() if line.startswith("to upload: wandb sync ")]
        assert sorted(tmp_path / "here" / word for word in sync.split()[4:]) == kept

    def test_a_run_that_goes_on(self, tmp_path: Path) -> None:
        """It is a new run in wandb, in the project it began with; the line names the variables that are not used."""
        first = run(tmp_path / "here", *SMALL, "train.steps=2", "checkpoint.save_last=true", WANDB_RUN_ID="abc")
        assert first.returncode == 0
        folder = the_run(tmp_path / "here")
        around = {"WANDB_RUN_ID": "abc", "WANDB_PROJECT": "other", "WANDB_NOTES": "why"}
        done = run(tmp_path / "here", f"resume={folder}", "train.steps=4", **around)
        assert (done.returncode, done.stderr) == (0, "")
        assert "note: WANDB_RUN_ID: not used by a resumed run, unless" in done.stdout
        assert "note: WANDB_PROJECT: not used by a resumed run; wandb.project=VALUE changes it" in done.stdout
        files = list(folder.glob("wandb/offline-run-*/*.wandb"))
        entries = {r.run.run_id: r.run for file in files for r in offline_records(file) if r.HasField("run")}
        assert len(entries) == 2
        assert entries.pop("abc").project == "gpt2exp"
        (entry,) = entries.values()
        assert (entry.project, entry.notes) == ("gpt2exp", "why\ngoes on at step 2 from abc")

    def test_nothing_is_passed_over_silently(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every setting that we give wandb has its variables in one of the tables, or takes them over."""
        import wandb

        given: dict[str, Any] = {}
        monkeypatch.setattr(
            wandb, "init", lambda **words: given.update(words) or (_ for _ in ()).throw(OSError("stop"))
        )
        tracking.Mirror(WandbConfig(mode=WandbMode.offline), tmp_path, about("x") | {"notes": "x"}).ready()
        assert given["settings"].init_timeout == 15, "of a server that does not answer"
        fields = given.pop("settings").model_fields_set | given.keys() - {"config"}
        fields = {{"x_": "_"}.get(field[:2], field[:2]) + field[2:] for field in fields}
        known = {name for names in tracking.KEYS.values() for name in names} | tracking.FIXED.keys()
        taken = {"WANDB_MODE", "WANDB_JOB_TYPE", "WANDB_NOTES", "WANDB_INIT_TIMEOUT", "WANDB_SILENT", "WANDB_HOST"}
        assert {f"WANDB_{field.upper()}".replace("_GROUP", "_RUN_GROUP") for field in fields} <= known | taken

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("WANDB_MODE", "nonsense", "WANDB_MODE=nonsense: not used; choose online, offline or disabled"),
            ("WANDB_SAVE_CODE", "1", "WANDB_SAVE_CODE=1: not used; in gpt2exp it is false"),
            ("WANDB_SAVE_CODE", "0", None),
            ("WANDB_DISABLED", "true", "WANDB_DISABLED=true: not used; in gpt2exp it is false"),
            ("WANDB_RUN_ID", "abc", None),
            ("WANDB_PROJECT", "theirs", None),
        ],
    )
    def test_lines(self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str | None) -> None:
        monkeypatch.setenv(name, value)
        assert tracking.ignored(WandbConfig(), sweep=False, resumed=False) == ([said] if said else [])
        assert tracking.ignored(WandbConfig(mode=WandbMode.disabled), sweep=True, resumed=False) == []

    def test_a_value_that_wandb_refuses(self, tmp_path: Path) -> None:
        """One line that names it, and the run goes on."""
        done = run(tmp_path / "here", *SMALL, "train.steps=2", WANDB_RESUME="perhaps")
        assert done.returncode == 0
        (line, *_) = done.stderr.splitlines()
        assert line.startswith("warning: wandb could not start offline (resume: Input should be 'allow', ")

    def test_a_project_that_cannot_be(self, tmp_path: Path) -> None:
        done = run(tmp_path / "here", WANDB_PROJECT="a/b")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("gpt2exp: wandb.project=a/b: must be ")


AGENT = """
import os, signal, sys, threading
import wandb
from gpt2exp import train
from gpt2exp.compare import figures
from gpt2exp.run import process
figures.draw = lambda _: []
wandb.setup()
codes = []
def trial():
    os.environ |= {"WANDB_RUN_ID": "abc", "WANDB_SWEEP_ID": "sweep1"}
    wandb.teardown()
    with process.raising_signals(), process.raising_signals():
        codes.append(train.command([*sys.argv[1:], "hydra.run.dir=alone"]))
        codes.append(train.command(["-m", "seed=1,2", *sys.argv[1:], "hydra.sweep.dir=sweep"]))
thread = threading.Thread(target=trial)
thread.start()
thread.join()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
print(codes)
"""


@pytest.mark.slow
def test_from_a_thread(tmp_path: Path) -> None:
    """A run and a sweep in a thread, as `wandb.agent(function=...)` calls a function: the run is the agent's."""
    program = [sys.executable, "-c", AGENT]
    done = run(tmp_path / "here", *SMALL, "train.steps=2", "wandb.mode=offline", program=program)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[0, 0]"]), done.stderr
    alone = OfflineRun(tmp_path / "here" / "alone").run
    assert (alone.run_id, alone.sweep_id) == ("abc", "sweep1")
    jobs = [OfflineRun(folder).run for folder in run_folders(tmp_path / "here" / "sweep")]
    assert len({job.run_id for job in jobs} | {"abc"}) == 3
    assert not any(job.sweep_id for job in jobs)


def about(name: str) -> dict[str, Any]:
    """What a run tells `wandb.init`."""
    return {"config": {"seed": 3}, "name": name, "group": None, "tags": []}


def closed(folder: Path) -> OfflineRun:
    """A finished run; wandb's own process closes the file a moment after `finish` returns."""
    deadline = time.monotonic() + 30
    while not (finished := OfflineRun(folder)).exit_codes:
        assert time.monotonic() < deadline, "the run was never closed"
        time.sleep(0.05)
    return finished


def test_several_runs_in_one_process(tmp_path: Path) -> None:
    """Each is its own file, closed, a failed one marked as failed."""
    kept = []
    for number, failed in enumerate((False, True, False)):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = tracking.Mirror(WandbConfig(mode=WandbMode.offline), folder, about(f"run {number}"))
        assert files.ready() == "offline"
        files.log({"step": 0, "tokens": 128, "loss": float(number)})
        kept.append(files.finish({"state": "done"}, failed=failed))
    runs = [closed(tmp_path / str(number)) for number in range(3)]
    assert [entry.exit_codes for entry in runs] == [[0], [1], [0]]
    assert [[row["loss"] for row in entry.history] for entry in runs] == [[0.0], [1.0], [2.0]]
    assert [entry.run.display_name for entry in runs] == ["run 0", "run 1", "run 2"]
    assert len({entry.run.run_id for entry in runs}) == 3
    assert kept == [entry.file.parent for entry in runs]


class TestMode:
    """`auto` is online with credentials, else offline; a mode typed is obeyed."""

    def test_without_credentials(self) -> None:
        assert tracking.resolve_mode(WandbConfig()) == "offline"

    def test_with_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        assert tracking.resolve_mode(WandbConfig()) == "online"

    def test_with_netrc(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert tracking.resolve_mode(WandbConfig()) == "online"
        monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
        assert tracking.resolve_mode(WandbConfig()) == "offline", "the key is another server's"

    @pytest.mark.parametrize("mode", ["online", "offline", "disabled"])
    def test_environment_wins_over_auto_alone(self, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
        monkeypatch.setenv("WANDB_MODE", mode)
        assert tracking.resolve_mode(WandbConfig()) == mode
        for typed in (WandbMode.online, WandbMode.offline, WandbMode.disabled):
            assert tracking.resolve_mode(WandbConfig(mode=typed)) == typed.value

    def test_an_unknown_mode_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_MODE", "nonsense")
        assert tracking.resolve_mode(WandbConfig()) == "offline"


def test_disabled_writes_nothing(tmp_path: Path, warnings: list[str]) -> None:
    files = tracking.Mirror(WandbConfig(mode=WandbMode.disabled), tmp_path, about("quiet"))
    assert files.ready() == "disabled"
    files.log({"step": 0, "loss": 1.0})
    assert files.finish({}, failed=False) is None
    assert (list(tmp_path.iterdir()), warnings) == ([], [])


class TestFailingWandb:
    """Whatever it raises is one warning, and training does not notice."""

    def test_at_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]) -> None:
        import wandb

        def fail(**_: Any) -> None:
            raise RuntimeError("no wandb today\nat all")

        monkeypatch.setattr(wandb, "init", fail)
        files = tracking.Mirror(WandbConfig(mode=WandbMode.offline), tmp_path, about("x"))
        assert files.ready() == "disabled"
        files.describe({"a": 1})
        files.log({"step": 0, "loss": 1.0})
        assert files.finish({}, failed=False) is None
        assert warnings == ["wandb could not start offline (no wandb today); going on without it"]

    @pytest.mark.parametrize("method", ["log", "finish"])
    def test_later(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str], method: str) -> None:
        files = tracking.Mirror(WandbConfig(mode=WandbMode.offline), tmp_path, about("x"))
        files.ready()
        real = files._run

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("disk full")

        with monkeypatch.context() as patch:
            patch.setattr(real, method, fail)
            for step in range(3):
                files.log({"step": step, "loss": 1.0})
            files.finish({}, failed=False)
        assert not [one for one in logging.getLogger("wandb").handlers if isinstance(one, logging.FileHandler)]
        real.finish()
        (warning,) = warnings
        assert "disk full" in warning

    def test_an_unreachable_server(self, tmp_path: Path) -> None:
        """Exit code 0, one warning, the local record whole, the offline file there, the key nowhere."""
        surroundings = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
        done = run(tmp_path / "here", *SMALL, "train.steps=3", "wandb.mode=online", **surroundings)
        assert done.returncode == 0
        ours = [line for line in done.stderr.splitlines() if not line.startswith("wandb: ")]
        assert len(ours) == 1
        assert ours[0].startswith("warning: wandb could not start online (")
        assert ours[0].endswith("; going on offline")
        folder = the_run(tmp_path / "here")
        assert read(folder / "summary.json")["state"] == "done"
        assert len(read(folder / "metrics.jsonl")) == 3
        sent = OfflineRun(folder)
        assert ([row["step"] for row in sent.history], sent.exit_codes) == ([0, 1, 2], [0])
        assert "to upload: wandb sync " in done.stdout
        for file in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert KEY.encode() not in file.read_bytes(), file
        assert KEY not in done.stdout + done.stderr

    @pytest.mark.slow
    def test_a_wrong_key(self, tmp_path: Path) -> None:
        """The server refuses the key: the run is offline, and the key is in no file."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        surroundings = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
        done = run(tmp_path / "here", *SMALL, "train.steps=3", "wandb.mode=online", **surroundings)
        server.shutdown()
        assert done.returncode == 0
        (ours,) = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert ours == "warning: wandb could not start online (user is not logged in); going on offline"
        self.kept_offline(tmp_path)
        assert KEY not in done.stdout + done.stderr

    @pytest.mark.slow
    def test_a_key_that_is_none(self, tmp_path: Path) -> None:
        surroundings = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "secret-but-short"}
        done = run(tmp_path / "here", *SMALL, "train.steps=3", "wandb.mode=online", **surroundings)
        assert done.returncode == 0
        assert "could not start online (WANDB_API_KEY invalid" in done.stderr
        self.kept_offline(tmp_path)
        assert "secret-but-short" not in done.stdout + done.stderr

    @pytest.mark.slow
    def test_a_server_that_never_answers(self, tmp_path: Path) -> None:
        """It accepts the connection and says nothing: the run does not wait for ever."""
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            server = f"http://127.0.0.1:{mute.getsockname()[1]}"
            surroundings = {"WANDB_BASE_URL": server, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "2"}
            done = run(tmp_path / "here", *SMALL, "train.steps=3", "wandb.mode=online", **surroundings)
        assert done.returncode == 0
        assert "warning: wandb could not start online (" in done.stderr
        self.kept_offline(tmp_path)

    @staticmethod
    def kept_offline(tmp_path: Path) -> None:
        """The record and wandb's file have all three steps."""
        folder = the_run(tmp_path / "here")
        assert read(folder / "summary.json")["state"] == "done"
        sent = OfflineRun(folder)
        assert ([row["step"] for row in sent.history], sent.exit_codes) == ([0, 1, 2], [0])
        for file in (path for path in tmp_path.rglob("*") if path.is_file()):
            assert not any(key in file.read_bytes() for key in (KEY.encode(), b"secret-but-short")), file

    @pytest.mark.slow
    def test_its_process_is_killed(self, tmp_path: Path) -> None:
        """SIGKILL to wandb's own process in mid-run: one warning, every step recorded, the next job mirrored whole."""
        args = ["-m", "seed=1,2", *SMALL, "train.steps=60", "wandb.mode=offline"]
        process = start(tmp_path / "here", *args, held="000:5")
        with at_step(tmp_path / "here", process) as (_, job):
            os.kill(core(job.pid), signal.SIGKILL)
        done = finish(process)
        assert done.returncode == 0
        lost = r"warning: wandb stopped \((Connection lost|.* reset by peer)\); the local record goes on\n"
        assert re.fullmatch(lost, done.stderr)
        first, second = run_folders(tmp_path / "here")
        assert [read(folder / "summary.json")["state"] for folder in (first, second)] == ["done", "done"]
        assert len(losses(first)) == 60
        sent = OfflineRun(second)
        assert ([row["loss"] for row in sent.history], sent.exit_codes) == (losses(second), [0])


class Stranger(http.server.BaseHTTPRequestHandler):
    """A server that refuses every key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b'{"errors": [{"message": "user is not logged in"}]}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def core(parent: int) -> int:
    """The id of wandb's own process below ours."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            above = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if above == parent and b"wandb-core" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue  # it ended meanwhile
    pytest.skip("no /proc here to find wandb's process in")
