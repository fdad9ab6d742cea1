"""The configuration: bounds of fields, defaults, choices, and how a command line is composed into jobs."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support import SMALL, read, run

from gpt2exp import config, schema, section
from gpt2exp.config import InitScheme, ModelConfig, RunConfig
from gpt2exp.model import size
from gpt2exp.section import BadRequest, Section, option
from gpt2exp.sweep import request as requests
from gpt2exp.sweep import resume
from gpt2exp.sweep.composing import SECTIONS, arguments
from gpt2exp.sweep.overrides import as_meant
from gpt2exp.training import distributed

CONF = Path(requests.__file__).parents[2] / "conf"


def make(*args: str) -> requests.Request:
    """The plan of a command line; flags first, as the program puts them."""
    return requests.new_request(arguments(args))


def only(*args: str) -> RunConfig:
    """The configuration of a command line with one job."""
    (job,) = make(*args).jobs
    return job.config


def test_defaults_are_the_schemas() -> None:
    assert only() == RunConfig()


def test_nothing_of_one_request_is_in_the_next() -> None:
    """A request does not change what is cached for all requests of the process."""
    first = only("optimizer=sgd", "optimizer.lr=1", "optimizer.momentum=0.5", "wandb.tags=[a]", "train.steps=7")
    first.wandb.tags.append("b")
    today, _ = schema.stored({"optimizer": {"name": "sgd"}})
    assert today["optimizer"] | {"lr": 1.0, "momentum": 0.5} == schema.plain(first.optimizer)
    today["optimizer"]["lr"] = today["train"]["steps"] = 9
    assert only() == schema.parse({}) == RunConfig()
    assert schema.stored({}) == (schema.plain(RunConfig()), {})


GROUP_FILES = sorted([*CONF.glob("*/*.yaml"), *CONF.glob("model/*/*.yaml")])


def test_there_are_group_files() -> None:
    assert {path.parent.name for path in GROUP_FILES} >= {"model", "init", "precision", "data", "optimizer", "wandb"}
    assert sorted(CONF.glob("*.yaml")) == [CONF / "config.yaml"]


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_composes(path: Path) -> None:
    group, name = path.parent.relative_to(CONF).as_posix(), path.stem
    needed = {"text": ["data.path=book"], "hub": ["data.path=book"], "pretrained": ["init.path=folder"]}
    jobs = make(f"{group}={name}", *needed.get(name, [])).jobs
    assert jobs
    section = schema.at(schema.plain(jobs[0].config), group.replace("/", "."))
    if section is not None:  # a section's file: every value of it arrives
        written = {key: value for key, value in OmegaConf.load(path).items() if key != "defaults"}
        assert written.items() <= section.items()
        assert group == "wandb" or section.get("name", name) in (name, name.partition("_")[0])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes(name: str, parameters: int) -> None:
    assert size.parameters(only(f"model={name}").model)["total"] == parameters


def test_a_value_with_spaces_asks_for_quotes() -> None:
    with pytest.raises(BadRequest, match=r"^data\.path=a b\.txt \(1\): cannot be read .* quote values"):
        make("data.path=a b.txt (1)")
    assert only("data=text", "data.path='a b.txt (1)'").data.path == "a b.txt (1)"


@dataclass(kw_only=True, slots=True)
class LimitsConfig(Section):
    """A section with every kind of bound."""

    count: int = option(3, "a count", at_least=1)
    rate: float = option(0.5, "a rate", above=0)
    share: float = option(0.1, "a share", at_least=0, below=1)
    pair: list[float] = option([0.9, 0.999], "two shares", at_least=0, below=1)
    most: int | None = option(None, "a count or none", at_least=2)
    batch: int | str = option(4, "a count, or auto", at_least=1, choices=("auto",))
    switch: bool | str = option("auto", "a switch", choices=("auto", True, False))
    word: str = option("free", "any text")


class TestBounds:
    """A field's bounds, said once where it is declared, are enforced in every section by `section.check`."""

    @pytest.mark.parametrize(
        ("name", "value", "line"),
        [
            ("count", 0, "limits.count=0: must be at least 1; try limits.count=3"),
            ("rate", 0.0, "limits.rate=0.0: must be a finite number above 0; try limits.rate=0.5"),
            ("rate", math.nan, "limits.rate=nan: must be a finite number above 0; try limits.rate=0.5"),
            ("rate", math.inf, "limits.rate=inf: must be a finite number above 0; try limits.rate=0.5"),
            ("share", -0.1, "limits.share=-0.1: must be a finite number at least 0 and below 1; try limits.share=0.1"),
            ("share", 1.0, "limits.share=1.0: must be a finite number at least 0 and below 1; try limits.share=0.1"),
            ("pair", [0.9, 1.0], "limits.pair=[0.9,1.0]: must be a finite number at least 0 and below 1; try "),
            ("pair", [0.9, math.nan], "limits.pair=[0.9,nan]: must be a finite number"),
            ("most", 1, "limits.most=1: must be at least 2; try limits.most=null"),
            ("batch", 0, "limits.batch=0: must be at least 1, or auto; try limits.batch=4"),
            ("batch", "all", "limits.batch=all: must be at least 1, or auto; try limits.batch=4"),
            ("switch", "on", "limits.switch=on: no such value; choose one of auto, true, false"),
            ("switch", 1, "limits.switch=1: no such value; choose one of auto, true, false"),
        ],
    )
    def test_outside(self, name: str, value: object, line: str) -> None:
        with pytest.raises(BadRequest) as caught:
            LimitsConfig(**{name: value})
        assert str(caught.value).startswith(line)

    @pytest.mark.parametrize(
        "given",
        [
            {},
            {"count": 1, "rate": 1e-9, "share": 0.0, "pair": [0.0, 0.5]},
            {"most": 2, "batch": "auto", "switch": True},
            {"batch": 10**400, "switch": False, "word": ""},
        ],
    )
    def test_inside(self, given: dict[str, Any]) -> None:
        LimitsConfig(**given)

    def test_the_sections_have_them(self) -> None:
        """Every number of the schema is bounded, and every key has a help text."""
        for part in (RunConfig(), *(getattr(RunConfig(), name) for name in SECTIONS)):
            if not isinstance(part, Section):
                continue
            for item in dataclasses.fields(part):
                number = {"int", "float"} & set(re.findall(r"\w+", str(item.type)))
                bounded = {item.metadata.get("at_least"), item.metadata.get("above")} != {None}
                assert bounded or not number, item.name
        assert all(len(about) > 3 for _, _, about in schema.options())


class TestAsMeant:
    """Names that Hydra's grammar would read as something else reach the configuration as they were typed."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *((key, "2024_01_15") for key in ("wandb.name", "wandb.group", "wandb.project", "wandb.entity")),
            *((key, "1e10") for key in ("data.revision", "data.subset", "data.split", "data.field")),
            *((key, value) for key in ("wandb.name", "data.path") for value in ("true", "1.50", ".5", "007", "1_0 b")),
            *(("data.path", value) for value in ("a=b.txt", "a b (1).txt", "it's.txt", "a#b&c;d!.txt", "ü\\b")),
        ],
    )
    def test_a_name_stays(self, key: str, value: str) -> None:
        given = {"data.path": "x", key: value}
        got = only("data=hub", *(as_meant(f"{name}={text}") for name, text in given.items()))
        assert schema.plain(got)[key.partition(".")[0]][key.partition(".")[2]] == value

    def test_in_lists_and_sweeps(self) -> None:
        assert only(as_meant("wandb.tags=[2024_01_15,b,1e3,'1_0']")).wandb.tags == [
            "2024_01_15",
            "b",
            "1e3",
            "1_0",
        ]
        names = [job.config.wandb.name for job in make("-m", as_meant("wandb.name=1_0,b,None")).jobs]
        assert names == ["1_0", "b", None]

    @pytest.mark.parametrize("key", ["wandb.name", "resume", "init.path", "data.max_tokens", "train.tokens_per_step"])
    def test_none_is_null(self, key: str) -> None:
        assert operator.attrgetter(key)(only(as_meant(f"{key}=None"))) is None

    @pytest.mark.parametrize(
        "text",
        [
            *("train.steps=1_000", "optimizer.lr=1e-3", "seed=1,2", "train.compile=true", "model.tie_weights=false"),
            *("wandb.name='None'", "wandb.name=${seed}", "wandb.tags=[a,b]", "data.path=a,b", "--config-dir=1_0", "-m"),
            *(
                "hydra.run.dir=out/1-a",
                "data.path=.",
                "model=nano",
                "+study=mine",
                "wandb.name=null",
                "train.steps=None",
                "hydra.job.name=1_0",
            ),
        ],
    )
    def test_the_rest_is_left_alone(self, text: str) -> None:
        assert as_meant(text) == text

    def test_a_file_that_is_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The name of a file or folder is its name, whatever is in it, also under `~`; null stays null."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("a,b.txt", "[x].txt", "null"):
            (tmp_path / name).write_text("text")
            for key in ("data.path", "init.path", "resume", "wandb.dir"):
                (override,) = OverridesParser.create().parse_overrides([as_meant(f"{key}={name}")])
                assert override.value() == (None if name == "null" else name)
        assert only("data=text", as_meant("data.path=~/a,b.txt")).data.path == "~/a,b.txt"

    def test_output_folders(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        for name, folder in (("~/out", tmp_path / "out"), ("2024_01", Path("2024_01")), ("a,b", Path("a,b"))):
            assert make(as_meant(f"hydra.run.dir={name}")).folder == folder
            assert make("-m", "seed=1,2", as_meant(f"hydra.sweep.dir={name}")).folder == folder
        assert only("wandb.dir='~/w'").wandb.dir == str(tmp_path / "w")

    def test_the_command_reads_so(self, tmp_path: Path) -> None:
        """The real one: a folder under the home, not one called ~; a text with a comma; a name that is no number."""
        here = tmp_path / "here"
        here.mkdir()
        (here / "a,b.txt").write_text("It was the best of times, it was the worst of times. " * 40)
        more = ["data=text", "data.path=a,b.txt", "wandb.name=2024_01_15", "resume=None", "train.steps=1"]
        done = run(here, *SMALL, *more, "wandb.mode=disabled", "hydra.run.dir=~/out")
        assert (done.returncode, done.stderr) == (0, "")
        summary = read(tmp_path / "home" / "out" / "summary.json")
        assert summary["config"]["wandb"]["name"] == "2024_01_15"
        assert summary["config"]["data"]["path"] == "a,b.txt"
        assert [path.name for path in here.iterdir()] == ["a,b.txt"]


def test_hydra_has_nothing_to_warn_of() -> None:
    """We use no setting that Hydra 1.4 removes."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make("-m", "seed=1,2")
    ours = [path.read_text(encoding="utf-8") for path in (*CONF.rglob("*.yaml"), *CONF.parent.glob("gpt2exp/**/*.py"))]
    assert not any("override_dirname" in text for text in ours)


def test_zero_is_a_seed() -> None:
    assert only("seed=0").seed == 0
    assert [job.config.seed for job in make("-m", "seed=0,1").jobs] == [0, 1]


def test_values_reach_the_configuration() -> None:
    got = only("init=xavier", "optimizer.lr=1e-3", "model.tie_weights=false", "wandb.tags=[a,b]", "++seed=5")
    assert got.init.scheme is InitScheme.xavier
    assert got.init.std is None
    assert (got.optimizer.lr, got.model.tie_weights, got.wandb.tags, got.seed) == (1e-3, False, ["a", "b"], 5)


def test_keys_lists_all() -> None:
    def leaves(tree: dict[str, object], prefix: str = "") -> list[str]:
        found: list[str] = []
        for key, value in tree.items():
            found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
        return found

    keys = list(schema.keys())
    of_others = {"optimizer.momentum", "optimizer.nesterov"}  # of optimizer=sgd alone
    assert [key for key in keys if key not in of_others] == leaves(schema.plain(RunConfig()))
    assert of_others < set(keys)
    assert {"seed", "dry_run", "model.tie_weights", "wandb.dir", "sweep.isolate"} <= set(keys)


def test_plain_survives_json() -> None:
    import json

    plain = schema.plain(RunConfig())
    assert json.loads(json.dumps(plain)) == plain
    assert schema.parse(plain) == RunConfig()


def test_flops_by_hand() -> None:
    model = ModelConfig(n_layer=1, n_head=1, n_embd=2, block_size=8, vocab_size=5)
    # products per token: c_attn 2x6, c_proj 2x2, c_fc 2x8, mlp c_proj 8x2, head 2x5; attention 2 products of T x 2
    weights = 12 + 4 + 16 + 16 + 10
    assert size.flops_per_token(model, 4) == 6 * weights + 6 * (2 * 4 * 2)


class TestSweep:
    """How a request becomes jobs."""

    def test_order_is_hydras(self) -> None:
        jobs = make("-m", "seed=1,2", "model=nano", "precision=tf32,fp32").jobs
        assert [job.overrides for job in jobs] == [
            (f"seed={seed}", "model=nano", f"precision={precision}")
            for seed in (1, 2)
            for precision in ("tf32", "fp32")
        ]
        assert [(job.config.seed, job.config.precision.name.value) for job in jobs] == [
            (1, "tf32"),
            (1, "fp32"),
            (2, "tf32"),
            (2, "fp32"),
        ]

    def test_choice_and_range(self) -> None:
        jobs = make("-m", "seed=range(2,5)", "model=choice(nano,gpt2)").jobs
        assert [job.config.seed for job in jobs] == [2, 2, 3, 3, 4, 4]

    def test_a_list_value_is_one_value(self) -> None:
        (job,) = make("-m", "optimizer.betas=[0.9,0.95]").jobs
        assert job.config.optimizer.betas == [0.9, 0.95]

    def test_presets(self, tmp_path: Path) -> None:
        """A preset in the user's own folder is a sweep by itself; a value typed replaces its axis."""
        study = tmp_path / "study"
        study.mkdir()
        text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 1,2,3\n"
        (study / "mine.yaml").write_text(text + "      precision: fp32,tf32\n")
        preset = ("--config-dir", str(tmp_path), "+study=mine")
        whole = make(*preset)
        assert whole.multirun
        assert [(job.config.seed, job.config.precision.name.value) for job in whole.jobs] == [
            (seed, precision) for seed in (1, 2, 3) for precision in ("fp32", "tf32")
        ]
        replaced = make(*preset, "seed=7")
        assert [(job.config.seed, job.config.precision.name.value) for job in replaced.jobs] == [
            (7, "fp32"),
            (7, "tf32"),
        ]
        assert [job.config.seed for job in make(*preset, "seed=8,9", "precision=tf32").jobs] == [8, 9]

    def test_own_choices(self, tmp_path: Path) -> None:
        """`--config-dir` adds members to a group, which are offered and checked like ours."""
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "mine.yaml").write_text("n_layer: 1\nn_head: 1\nn_embd: 8\nblock_size: 32\n")
        (tmp_path / "model" / "wrong.yaml").write_text("n_layerz: 1\n")
        assert only("--config-dir", str(tmp_path), "model=mine").model.n_embd == 8
        with pytest.raises(BadRequest, match=r"^model=mime: .* did you mean model=mine\?"):
            make("--config-dir", str(tmp_path), "model=mime")
        with pytest.raises(BadRequest, match="n_layerz") as caught:
            make("--config-dir", str(tmp_path), "model=wrong")
        assert len(str(caught.value).splitlines()) == 1

    def test_folders(self) -> None:
        """No two launches share a folder; a job's name holds its swept keys alone, and no surprising character."""
        first, second = make("-m", "seed=1,2", "model=nano"), make("-m", "seed=1,2", "model=nano")
        assert first.folder != second.folder
        assert first.folders == ["000_seed=1", "001_seed=2"]
        assert requests.folder_name(3, "precision=tf32,seed=2") == "003_precision=tf32,seed=2"
        assert requests.folder_name(0, "") == "000"
        assert requests.folder_name(12, "data.path=../a b/c") == "012_data.path=.._a_b_c"
        assert len(requests.folder_name(0, "x" * 500)) <= 110


@pytest.mark.parametrize("there", [True, False])
def test_request_folder(tmp_path: Path, there: bool) -> None:
    """A folder is new or empty before, holds the request inside, and is not taken twice."""
    folder = tmp_path / "runs" / "run"
    if there:
        folder.mkdir(parents=True)
    request = make(f"hydra.run.dir={folder}", "model=nano", "seed=5")
    with requests.request_folder(request, []):
        recorded = schema.parse(OmegaConf.load(folder / ".hydra" / "config.yaml"))
        assert recorded == request.jobs[0].config
        assert "seed=5" in OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.cwd == str(Path.cwd())
    before = sorted(tmp_path.rglob("*"))
    (folder / "summary.json").write_text("{}")
    with (
        pytest.raises(BadRequest, match=r"^hydra\.run\.dir=.*: already holds files"),
        requests.request_folder(request, []),
    ):
        pass
    beneath = make(f"hydra.run.dir={folder}/summary.json/x")
    refused = r"^hydra\.run\.dir=.*choose a folder that can be written"
    with pytest.raises(BadRequest, match=refused), requests.request_folder(beneath, []):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted([*before, folder / "summary.json"])


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        *((None, "null"), (True, "true"), (False, "false"), (3, "3"), (0.5, "0.5"), ("text", "text")),
        *((InitScheme.xavier, "xavier"), ([0.9, 0.95], "[0.9,0.95]"), (["a", None], "[a,null]")),
    ],
)
def test_show_is_what_is_typed(value: object, typed: str) -> None:
    assert section.show(value) == typed


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n \n  two\n"), "two"),
        (ValueError(), "ValueError"),
        (OSError(" \n"), "OSError"),
        (KeyError("key"), "'key'"),
    ],
)
def test_first_line_of_any_error(error: Exception, line: str) -> None:
    assert section.first_line(error) == line


def test_only_first_line_takes_the_first_line() -> None:
    """An exception without text has no first line: `splitlines()[0]` of one would end in an IndexError."""
    for path in Path(config.__file__).parent.rglob("*.py"):
        assert "splitlines()[0]" not in path.read_text(encoding="utf-8"), path


def test_errors_without_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An error that has no text is named by its type."""
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("seed: 1")

    def fail(*_: object, **__: object) -> None:
        raise ValueError

    args = arguments([f"resume={tmp_path}"])
    with monkeypatch.context() as patch:
        patch.setattr("gpt2exp.sweep.resume.OmegaConf.load", fail)
        with pytest.raises(BadRequest, match=r"cannot be read \(ValueError\)"):
            resume.resumed_request(args)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(BadRequest, match=r"do not meet \(ValueError\)"), distributed.process_group():
        pass


def test_estimate_grows_with_the_request() -> None:
    from gpt2exp.training import setup

    def need(*args: str) -> int:
        return setup.memory(only(*args), setup.Hardware("cpu"))

    assert need() > 16 * 124_439_808
    assert need("train.batch_size=64") > need("train.batch_size=8") > 0
    assert need("model.tie_weights=false") > need()
    assert math.isfinite(need("model=gpt2-xl"))


def test_a_stored_configuration_is_read_under_todays_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing key has its default, an unknown one is returned, a moved one is in its new place."""
    recorded = schema.plain(RunConfig(seed=5))
    del recorded["model"]["tie_weights"], recorded["sweep"]
    recorded["model"]["old"] = {"deep": 1}
    recorded["gone"] = [1, 2]
    today, unknown = schema.stored(recorded)
    assert schema.parse(today) == RunConfig(seed=5)
    assert unknown == {"model.old.deep": 1, "gone": [1, 2]}
    monkeypatch.setitem(schema.MOVED, "model.old.deep", "train.steps")
    del recorded["train"]["steps"]
    assert schema.stored(recorded)[0]["train"]["steps"] == 1
    recorded["optimizer"]["min_lr"], recorded["optimizer"]["schedule"] = "${optimizer.lr}", "cosine"
    assert schema.parse(schema.stored(recorded)[0]).optimizer.min_lr == 3e-4
