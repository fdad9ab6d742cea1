"""A stopped run that is resumed ends bit for bit like one that was not stopped; a resumed sweep keeps its finished jobs
and does the others; a resume that would change the run is refused; two processes never work on one folder.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors.torch import load_file
from support import (
    SMALL,
    OfflineRun,
    at_step,
    finish,
    losses,
    read,
    run,
    run_folders,
    shell_code,
    start,
    the_run,
)

from gpt2exp.run import process as processes
from gpt2exp.run import record
from gpt2exp.section import BadRequest
from gpt2exp.sweep import request as requests
from gpt2exp.sweep import resume
from gpt2exp.sweep.composing import arguments
from gpt2exp.training import load

QUIET = "wandb.mode=disabled"
STEPS = "train.steps=16"
LAST = "checkpoint.save_last=true"
MODES = {
    "everything": [
        "train.grad_accum_steps=2",
        "train.batch_size=2",
        "data.order=shuffled",
        "data.val_fraction=0.002",
        "train.eval_every=9",
        "optimizer.schedule=cosine",
        "optimizer.warmup_steps=9",
        "optimizer.grad_clip=1.0",
        "model.tie_weights=false",
    ],
    "fp16": ["precision=fp16"],
}


def stopped(folder: Path, *args: str, number: int = signal.SIGTERM) -> Path:
    """A run in `folder` that a signal stopped on the way."""
    process = start(folder, *args, held=":5")
    with at_step(folder, process) as (found, held):
        held.send_signal(number)
    done = finish(process)
    assert shell_code(done) == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: 137}[number], done.stderr
    return found


def end_of(folder: Path) -> dict[str, bytes]:
    """Weights and optimizer state at the end of a run, bit for bit; torch seeds its own generator at random."""
    (newest, *_) = record.saved(folder).values()
    tensors = load_file(newest / "model.safetensors") | load_file(newest / "training.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if not name.startswith("random.")}


def content(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder but locks."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def asked(*args: str) -> requests.Request:
    """The plan of a request to go on."""
    request = resume.resumed_request(arguments(list(args)))
    assert request is not None
    return request


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps with a checkpoint after the fourth and at the end."""
    folder = tmp_path_factory.mktemp("done") / "here"
    more = ["train.steps=6", "checkpoint.every=4", LAST, QUIET]
    assert run(folder, *SMALL, *more).returncode == 0
    return the_run(folder)


@pytest.mark.parametrize("mode", ["everything", pytest.param("fp16", marks=pytest.mark.slow)])
def test_bit_for_bit(mode: str, tmp_path: Path) -> None:
    """Stopped by a signal and resumed, from another folder and with nothing typed again."""
    args = [*SMALL, *MODES[mode], STEPS, LAST, "train.measure_every=7"]
    assert run(tmp_path / "whole", *args, QUIET).returncode == 0
    whole = the_run(tmp_path / "whole")
    part = stopped(tmp_path / "here", *args, number=signal.SIGINT if mode == "fp16" else signal.SIGTERM)
    summary, status = read(part / "summary.json"), read(part / "status.json")
    assert summary["state"] == status["state"] == "interrupted"
    steps = summary["steps"]
    assert list(record.saved(part)) == [steps], "the state at the stop was saved"
    assert f"resume={part.relative_to(tmp_path / 'here')}" in (part / "run.log").read_text(), "and it says how to go on"
    (tmp_path / "elsewhere").mkdir()
    again = run(tmp_path / "elsewhere", f"resume={part}")
    assert (again.returncode, again.stderr) == (0, "")
    assert f"from step_{steps:06d}" in again.stdout
    assert not list((tmp_path / "elsewhere").iterdir())
    assert losses(part) == losses(whole)
    assert [row["step"] for row in read(part / "metrics.jsonl")] == list(range(16))
    assert end_of(part) == end_of(whole)
    summary, expected = read(part / "summary.json"), read(whole / "summary.json")
    for key in ("state", "steps", "tokens", "loss_first", "loss_last", "val_loss", "loss_unseen_last", "config"):
        if key != "config":
            assert summary[key] == expected[key], key
    assert [entry["from_step"] for entry in summary["parts"]] == [0, steps]
    assert [entry["from_step"] for entry in expected["parts"]] == [0]
    rows = read(part / "metrics.jsonl")
    timed = [row for row in rows if row["step"] not in (0, 1, 2, steps, steps + 1, steps + 2)]  # each part warms up
    calm = [row for row in timed if row.get("waited_ms", 0) <= load.DISTURBED * row["step_ms"]]
    assert summary["timed_steps"] == (len(calm) if 2 * len(calm) >= len(timed) else len(timed))
    assert summary["wall_seconds"]["train"] == pytest.approx(sum(entry["train"] for entry in summary["parts"]))


def test_wandb_goes_on_beside_the_first_part(tmp_path: Path) -> None:
    """A run of its own in the same group, which names the one before."""
    part = stopped(tmp_path / "here", *SMALL, STEPS, "wandb.group=mine")
    first = OfflineRun(part)
    shutil.move(part / "wandb", part / "before")
    steps = read(part / "summary.json")["steps"]
    assert run(tmp_path / "here", f"resume={part}").returncode == 0
    second = OfflineRun(part)
    assert second.run.run_group == first.run.run_group == "mine"
    assert second.run.run_id != first.run.run_id
    assert second.config["goes_on_from"] == first.run.run_id
    assert f"step {steps}" in second.run.notes
    assert [row["loss"] for row in first.history + second.history] == losses(part)


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Nothing more is saved, and the folder tells what happened; both signals reach it within one step."""
    process = start(tmp_path / "here", *SMALL, "train.steps=9", LAST, QUIET, held=":5")
    with at_step(tmp_path / "here", process) as (part, held):
        held.send_signal(signal.SIGINT)
        held.send_signal(signal.SIGTERM)  # not SIGINT again: two of a kind that wait are one
    assert shell_code(finish(process)) == 143
    assert not record.saved(part)
    assert record.read_status(part)["state"] == "interrupted"
    assert not (part / "summary.json").exists()


class TestDone:
    """A run that is done, and one that shall train on."""

    def test_there_is_nothing_to_do(self, done: Path, tmp_path: Path) -> None:
        before = content(done)
        again = run(tmp_path / "here", f"resume={done}")
        assert (again.returncode, again.stderr) == (0, "")
        assert "is done: 6 of 6 steps; to train on, add train.steps=N above 6" in again.stdout
        assert content(done) == before

    def test_more_steps(self, done: Path, tmp_path: Path) -> None:
        """With a note, and as one run of that many."""
        folder = shutil.copytree(done, tmp_path / "copy")
        again = run(tmp_path / "here", f"resume={folder}", "train.steps=9", "train.log_every=5")
        assert (again.returncode, again.stderr) == (0, "")
        assert "note: train.steps: 9 from here on, 6 before" in again.stdout
        assert run(tmp_path / "whole", *SMALL, "train.steps=9", LAST, QUIET).returncode == 0
        assert losses(folder) == losses(the_run(tmp_path / "whole"))
        assert end_of(folder) == end_of(the_run(tmp_path / "whole"))
        summary = read(folder / "summary.json")
        assert (summary["config"]["train"]["steps"], summary["config"]["train"]["log_every"]) == (9, 5)
        assert "train.steps=9" in summary["overrides"]
        assert record.row(folder, folder)["state"] == "done"

    def test_a_cosine_says_that_its_rates_change(self, done: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(done, tmp_path / "copy")
        path = folder / ".hydra" / "config.yaml"
        path.write_text(path.read_text().replace("schedule: constant", "schedule: cosine"))
        (overrides := folder / ".hydra" / "overrides.yaml").write_text(
            overrides.read_text() + "- optimizer.schedule=cosine\n"
        )
        said = "cosine over the new train.steps"
        assert any(said in note for note in asked(f"resume={folder}", "train.steps=9").notes)
        path.write_text(path.read_text().replace("schedule_steps: null", "schedule_steps: 9"))
        longer = asked(f"resume={folder}", "train.steps=9")
        assert not any(said in note for note in longer.notes), "a schedule of its own length stays"
        assert longer.jobs[0].config.optimizer.schedule_steps == 9

    def test_what_follows_the_steps_keeps_its_value(self, done: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(done, tmp_path / "copy")
        path, overrides = folder / ".hydra" / "config.yaml", folder / ".hydra" / "overrides.yaml"
        path.write_text(path.read_text().replace("grad_clip: 0.0", "grad_clip: ${train.steps}"))
        overrides.write_text(overrides.read_text() + "- optimizer.grad_clip=${train.steps}\n")
        said = r"^optimizer\.grad_clip=9\.0: \S+ began with optimizer\.grad_clip=6\.0; add optimizer\.grad_clip=6\.0 to"
        with pytest.raises(BadRequest, match=said):
            asked(f"resume={folder}", "train.steps=9")
        request = asked(f"resume={folder}", "train.steps=9", "optimizer.grad_clip=6.0")
        assert request.jobs[0].config.optimizer.grad_clip == 6
        assert request.jobs[0].unresolved is not None
        assert request.jobs[0].unresolved["optimizer"]["grad_clip"] == 6

    def test_a_damaged_checkpoint(self, done: Path, tmp_path: Path) -> None:
        """The one before it is used, and that is said; test_checkpoint.py damages each file in each way."""
        file = "training.safetensors"
        folder = shutil.copytree(done, tmp_path / "copy")
        data = bytearray((folder / "checkpoints" / "step_000006" / file).read_bytes())
        data[len(data) // 2] ^= 4
        (folder / "checkpoints" / "step_000006" / file).write_bytes(data)
        again = run(tmp_path / "here", f"resume={folder}", "train.steps=8")
        assert again.returncode == 0
        assert "step_000006 is damaged" in again.stderr
        assert "from step_000004, 4 of 8 steps done" in again.stdout
        assert losses(folder)[:6] == losses(done)
        assert [row["step"] for row in read(folder / "metrics.jsonl")] == list(range(8))


class TestRefused:
    """One line that says what to type, exit code 2, nothing written."""

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["model.n_layer=3"], r"^model\.n_layer=3: \S+ began with model\.n_layer=2; leave it out"),
            (
                ["seed=4", "optimizer.lr=0.1"],
                r"^optimizer\.lr=0\.1, seed=4: \S+ began with optimizer\.lr=0\.0003, seed",
            ),
            (["precision=tf32"], r"^precision\.name=tf32: "),
            (["train.steps=5"], r"^train\.steps=5: 6 steps are done already; try train\.steps=6 or more"),
            (["train.steps=0"], r"^train\.steps=0: must be at least 1"),
            (["seed=1,2"], r"^seed=1,2: \S+ is one run"),
            (["model.n_layerz=3"], r"^model\.n_layerz=3: no such key; did you mean model\.n_layer\?"),
        ],
    )
    def test_another_run(self, done: Path, args: list[str], said: str) -> None:
        with pytest.raises(BadRequest, match=said):
            asked(f"resume={done}", *args)

    def test_typed_again_is_no_difference(self, done: Path) -> None:
        assert asked(f"resume={done}", *SMALL, "train.steps=6").jobs[0].done

    def test_folders(self, done: Path, tmp_path: Path) -> None:
        (tmp_path / "compared").mkdir()
        (tmp_path / "compared" / "comparison.json").write_text("{}")
        broken = shutil.copytree(done, tmp_path / "broken")
        (broken / ".hydra" / "config.yaml").write_text("model: [")
        for folder, said in (
            (tmp_path / "nowhere", "no such folder; name a run's or a sweep's folder"),
            (done / "checkpoints", f"name the run: resume={done.resolve()}"),
            (done / "checkpoints" / "step_000006", f"name the run: resume={done.resolve()}"),
            (done.parent, f"name one, such as resume={done}"),
            (tmp_path / "compared", "not a run's or a sweep's folder"),
            (tmp_path, "a folder above"),
            (done / ".hydra", "not a run's or a sweep's folder"),
            (broken, "cannot be read"),
        ):
            with pytest.raises(BadRequest, match=r"^resume=") as caught:
                asked(f"resume={folder}")
            assert said in str(caught.value)
            assert len(str(caught.value).splitlines()) == 1

    def test_several(self, done: Path) -> None:
        with pytest.raises(BadRequest, match="one folder at a time"):
            asked(f"resume={done},{done.parent}")

    def test_on_the_command_line(self, done: Path, tmp_path: Path) -> None:
        before = content(done)
        refused = run(tmp_path / "here", f"resume={done}", "seed=7")
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("gpt2exp: seed=7: ")
        assert len(refused.stderr.splitlines()) == 1
        assert content(done) == before
        assert not list((tmp_path / "here").iterdir())

    def test_a_dry_run_writes_nothing(self, done: Path, tmp_path: Path) -> None:
        before = content(done)
        dry = run(tmp_path / "here", f"resume={done}", "train.steps=9", "dry_run=true")
        assert dry.returncode == 0
        assert " 9 " in dry.stdout
        assert content(done) == before

    def test_done_without_a_checkpoint(self, done: Path, tmp_path: Path) -> None:
        """Its finished record is not deleted to train again from the start."""
        folder = shutil.copytree(done, tmp_path / "copy")
        shutil.rmtree(folder / "checkpoints")
        with pytest.raises(BadRequest, match=r"kept no checkpoint.*checkpoint\.save_last=true"):
            asked(f"resume={folder}", "train.steps=9")


class TestText:
    """`data=text` by a relative path."""

    @pytest.fixture
    def told(self, tmp_path: Path) -> Path:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "book.txt").write_text("It was the best of times, it was the worst of times. " * 99)
        args = [*SMALL, "data=text", "data.path=book.txt", "train.steps=3", LAST, QUIET]
        assert run(tmp_path / "here", *args).returncode == 0
        return the_run(tmp_path / "here")

    def test_from_another_folder(self, told: Path, tmp_path: Path) -> None:
        again = run(tmp_path / "there", f"resume={told}", "train.steps=5")
        assert (again.returncode, again.stderr) == (0, "")
        assert len(losses(told)) == 5

    def test_another_text(self, told: Path, tmp_path: Path) -> None:
        (tmp_path / "here" / "book.txt").write_text("Call me Ishmael. " * 300)
        before = content(told)
        again = run(tmp_path / "here", f"resume={told}", "train.steps=5")
        assert again.returncode == 2
        assert "data.path=book.txt: not the text that the run began with" in again.stderr
        assert content(told) == before

    def test_moved_away_with_its_text(self, told: Path, tmp_path: Path) -> None:
        """As if moved to another machine: no earlier path exists."""
        away = tmp_path / "away"
        away.mkdir()
        shutil.move(told, away / "run")
        shutil.move(tmp_path / "here" / "book.txt", away / "novel.txt")
        shutil.rmtree(tmp_path / "here")
        again = run(away, "resume=run", "data.path=novel.txt", "train.steps=5")
        assert (again.returncode, again.stderr) == (0, "")
        assert len(losses(away / "run")) == 5


class TestOwner:
    """Which process a folder belongs to."""

    def test_two_go_on_with_one_run(self, tmp_path: Path) -> None:
        part = stopped(tmp_path / "here", *SMALL, STEPS, QUIET)
        process = start(tmp_path / "here", f"resume={part}", held=":9")
        with at_step(tmp_path / "here", process):
            refused = run(tmp_path / "here", f"resume={part}")
        assert finish(process).returncode == 0
        assert refused.returncode == 2
        assert "another process is at work on it" in refused.stderr
        assert [row["step"] for row in read(part / "metrics.jsonl")] == list(range(16))

    def test_a_dead_process(self, tmp_path: Path) -> None:
        """If it is `running` and its lock is free, it was interrupted, even if its process's number is in use again."""
        record.write_status(tmp_path, "running", 3)
        mine = read(tmp_path / "status.json")
        with processes.held(tmp_path):
            assert record.read_status(tmp_path)["state"] == "running"
        found = record.read_status(tmp_path)
        assert (found["state"], found["step"]) == ("interrupted", 3)
        (tmp_path / "status.json").write_text(json.dumps(mine | {"machine": "another"}))
        assert record.read_status(tmp_path)["state"] == "running", "nobody here can know"

    def test_who_asks_stops_nobody(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process gets the lock although another holds it for the moment of asking whether it is free."""
        asking = FileLock(tmp_path / processes.LOCK, thread_local=False)
        asking.acquire()
        assert processes.at_work(tmp_path, {"machine": processes.machine()})
        # its second of patience may pass on a busy machine before the other lets go: here it has a hundred
        monkeypatch.setattr(processes, "FileLock", lambda path, timeout: FileLock(path, timeout=100 * timeout))
        threading.Timer(0.2, functools.partial(asking.release, force=True)).start()
        with processes.held(tmp_path):
            assert processes.at_work(tmp_path, {"machine": processes.machine()})

    def test_a_killed_run_is_shown_as_interrupted(self, tmp_path: Path) -> None:
        part = stopped(tmp_path / "here", *SMALL, STEPS, QUIET, number=signal.SIGKILL)
        assert read(part / "status.json")["state"] == "running"
        row = record.row(part, part)
        assert row["state"] == "interrupted"
        assert "killed" in row["error"]
        again = run(tmp_path / "here", f"resume={part}")
        assert again.returncode == 0
        assert "no checkpoint was saved: its" in again.stdout
        assert [row["step"] for row in read(part / "metrics.jsonl")] == list(range(16))


def stamps(folders: list[Path]) -> list[int]:
    """When the summaries were written."""
    return [(folder / "summary.json").stat().st_mtime_ns for folder in folders]


@pytest.mark.slow
def test_out_of_memory(tmp_path: Path) -> None:
    """The allocator itself refuses, under a limit that the estimate cannot see; smaller, the run would go."""
    args = [*SMALL, "train.batch_size=128", "train.seq_len=64", "train.loss_chunk=8192", "train.steps=2", QUIET]
    done = run(tmp_path / "here", *args, ROOM="800")
    assert done.returncode == 1
    error = read(the_run(tmp_path / "here") / "summary.json")["error"]
    assert re.fullmatch(r"out of memory, where about \d\.\d GiB were expected .*; try train\.batch_size=64", error)
    assert done.stderr.splitlines() == [f"error: {error}"]


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path: Path) -> None:
    """The update of the first step makes weights that are no numbers; the state before it stays."""
    assert run(tmp_path / "here", *SMALL, "train.steps=2", LAST, QUIET).returncode == 0
    folder = the_run(tmp_path / "here")
    config = folder / ".hydra" / "config.yaml"
    config.write_text(re.sub("lr: 0.0003", "lr: 1.0e+38", config.read_text()))
    again = run(tmp_path / "here", f"resume={folder}", "train.steps=9", "checkpoint.every=1", "checkpoint.keep=1")
    assert again.returncode == 1
    assert read(folder / "summary.json")["state"] == "diverged"
    assert list(record.saved(folder)) == [2]


class TestSweep:
    """What is done stays, the rest is done, and axes gain values."""

    def test_it_goes_on(self, tmp_path: Path) -> None:
        """Stopped in its second job: the first is kept, the second goes on from its checkpoint, the others follow."""
        args = ["seed=1,2,3", *SMALL, STEPS, LAST, QUIET]
        process = start(tmp_path / "here", "-m", *args, held="001:5")
        with at_step(tmp_path / "here", process, job=1) as (_, held):
            held.send_signal(signal.SIGTERM)
        assert shell_code(finish(process)) == 143
        first, second, _ = run_folders(tmp_path / "here")
        steps = read(second / "summary.json")["steps"]
        assert steps == 6
        before = content(first)
        again = run(tmp_path / "elsewhere", f"resume={first.parent}", "seed=4")
        assert (again.returncode, again.stderr) == (0, "")
        assert content(first) == before, "what is done is not touched"
        folders = run_folders(first.parent)
        assert [folder.name for folder in folders] == ["000_seed=1", "001_seed=2", "002_seed=3", "003_seed=4"]
        summaries = [read(folder / "summary.json") for folder in folders]
        assert [summary["state"] for summary in summaries] == ["done"] * 4
        assert [[part["from_step"] for part in summary["parts"]] for summary in summaries] == [
            [0],
            [0, steps],
            [0],
            [0],
        ]
        assert "4 of 4 runs done" in again.stdout
        assert len(read(first.parent / "comparison.json")["runs"]) == 4
        alone = run(tmp_path / "alone", *SMALL, STEPS, LAST, "seed=2", QUIET)
        assert alone.returncode == 0
        assert end_of(second) == end_of(the_run(tmp_path / "alone"))
        stamp = stamps(folders)
        assert run(tmp_path / "here", "-m", f"resume={first.parent}").returncode == 0
        assert stamps(folders) == stamp, "nothing is left to do"

    def test_a_new_axis_makes_a_grid(self, tmp_path: Path) -> None:
        """The grid includes the value that the first jobs had, and these jobs count, whatever their numbers."""
        assert run(tmp_path / "here", "-m", "seed=1,2", *SMALL, "train.steps=2", QUIET).returncode == 0
        before = run_folders(tmp_path / "here")
        stamp = stamps(before)
        more = ["seed=2,3", "model.tie_weights=false", "optimizer.lr=0.0003"]  # the last is what they have
        again = run(tmp_path / "here", f"resume={before[0].parent}", *more)
        assert (again.returncode, again.stderr) == (0, "")
        folders = run_folders(tmp_path / "here")
        assert folders[:2] == before
        assert stamps(before) == stamp
        assert len(folders) == 6
        comparison = read(before[0].parent / "comparison.json")
        assert comparison["swept"] == {"model.tie_weights": ["true", "false"]}
        assert comparison["seeds"] == [1, 2, 3]
        assert {effect["n_pairs"] for effect in comparison["axes"]} == {3}

    @pytest.mark.slow
    def test_failed_is_tried_again_and_diverged_is_a_result(self, tmp_path: Path) -> None:
        args = ["optimizer.lr=1e9,1e-3", "seed=1", *SMALL, STEPS, "checkpoint.every=5", "sweep.isolate=true", QUIET]
        process = start(tmp_path / "here", "-m", *args, held="001:6")
        with at_step(tmp_path / "here", process, job=1) as (_, job):
            job.kill()
        assert finish(process).returncode == 1
        first, second = run_folders(tmp_path / "here")
        assert [record.row(folder, folder)["state"] for folder in (first, second)] == ["diverged", "failed"]
        stamp = stamps([first])
        again = run(tmp_path / "here", f"resume={first.parent}")
        assert again.returncode == 1, "one has still diverged"
        assert stamps([first]) == stamp
        summary = read(second / "summary.json")
        assert (summary["state"], summary["steps"], len(summary["parts"])) == ("done", 16, 2)

    def test_a_key_that_is_gone(self, tmp_path: Path) -> None:
        """A release has removed it: the finished jobs are kept, the key is named, and what is to do goes on without."""
        assert run(tmp_path, "-m", "seed=1,2", *SMALL, "train.steps=1", LAST, QUIET).returncode == 0
        folders = run_folders(tmp_path)
        sweep = folders[0].parent

        def had(old: int, folder: Path) -> None:
            config = folder / ".hydra" / "config.yaml"
            text = config.read_text().replace("  old: 1\n", "")
            config.write_text(text.replace("train:\n", f"train:\n  old: {old}\n"))

        for folder in folders:
            had(1, folder)
        request = read(sweep / "sweep.json")
        (sweep / "sweep.json").write_text(json.dumps(request | {"argv": [*request["argv"], "train.old=1"]}))
        asks = asked(f"resume={sweep}", "seed=3")
        assert [(job.config.seed, job.done) for job in asks.jobs] == [(1, True), (2, True), (3, False)]
        [note] = asks.notes
        assert note.startswith("train.old=1: no key of this version")
        alone = asked(f"resume='{folders[0]}'", "train.steps=3")
        assert not alone.jobs[0].done
        assert note in alone.notes
        assert run(tmp_path, f"resume='{folders[0]}'", "train.steps=3").returncode == 0
        assert read(folders[0] / "summary.json")["steps"] == 3
        had(1, folders[0])  # its configuration was written anew
        had(2, folders[1])
        with pytest.raises(BadRequest, match=r"its runs have train\.old=1 and 2, which is no key of this version"):
            asked(f"resume={sweep}")

    def test_values_that_follow_others(self, tmp_path: Path) -> None:
        """The sweep's jobs are found again, and a new seed's follow too."""
        follows = ["optimizer.schedule=cosine", "optimizer.min_lr=${optimizer.lr}", "wandb.name=run-${seed}"]
        args = ["optimizer.lr=1e-3,3e-4", *follows, "seed=1", *SMALL, "train.steps=1", QUIET]
        assert run(tmp_path, "-m", *args).returncode == 0
        sweep = run_folders(tmp_path)[0].parent
        jobs = asked(f"resume={sweep}", "seed=2").jobs
        assert [(job.config.seed, job.config.optimizer.min_lr, job.done) for job in jobs] == [
            (1, 1e-3, True),
            (1, 3e-4, True),
            (2, 1e-3, False),
            (2, 3e-4, False),
        ]
        comparison = read(sweep / "comparison.json")
        assert comparison["swept"] == {"optimizer.lr": ["0.0003", "0.001"]}
        assert {effect["n_pairs"] for effect in comparison["axes"]} == {1}

    @pytest.mark.slow
    def test_two_go_on_with_one_sweep(self, tmp_path: Path) -> None:
        process = start(tmp_path / "here", "-m", "seed=1,2", *SMALL, STEPS, QUIET, held="000:5")
        with at_step(tmp_path / "here", process) as (folder, _):
            refused = run(tmp_path / "here", f"resume={folder.parent}")
        assert finish(process).returncode == 0
        assert refused.returncode == 2
        assert "another process is at work on it" in refused.stderr

    @pytest.mark.slow
    def test_a_study(self, tmp_path: Path) -> None:
        """Its preset axes gain values too, and none of it is run twice."""
        shape = ["model.n_layer=1", "model.n_head=1", "model.n_embd=8", "model.tie_weights=true"]
        args = ["experiment=weight_tying", *shape, "train.steps=2", "seed=1,2", "data.val_fraction=0.001", QUIET]
        assert run(tmp_path / "here", *args).returncode == 0
        sweep = run_folders(tmp_path / "here")[0].parent
        request = asked(f"resume={sweep}", "seed=3", "wandb.mode=offline")
        assert [(job.config.seed, job.done, job.folder[:3]) for job in request.jobs] == [
            (1, True, "000"),
            (2, True, "001"),
            (3, False, "002"),
        ]
        assert {job.config.wandb.mode.value for job in request.jobs} == {"offline"}
        with pytest.raises(BadRequest, match="a study is a sweep of its own"):
            asked(f"resume={sweep}", "experiment=precision")
        with pytest.raises(BadRequest, match=r"^hydra\.sweep\.subdir=x: resume= and the comparison name the folders"):
            asked(f"resume={sweep}", "hydra.sweep.subdir=x")
