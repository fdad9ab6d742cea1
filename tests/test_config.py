"""A request is checked whole before anything runs: the composed values, and what is said of those that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from gpt2exp import config
from gpt2exp.config import BadRequest, InitScheme, ModelConfig, RunConfig
from gpt2exp.sweep import request as requests

CONF = Path(requests.__file__).parents[2] / "conf"


def make(*args: str) -> requests.Plan:
    """The plan of a command line; flags first, as the program puts them."""
    return requests.make(get_args_parser().parse_args(args))


def only(*args: str) -> RunConfig:
    """The configuration of a command line with one job."""
    (job,) = make(*args).jobs
    return job.config


def test_defaults_are_the_schemas() -> None:
    assert only() == RunConfig()


GROUP_FILES = sorted(CONF.glob("*/*.yaml"))


def test_there_are_group_files() -> None:
    assert {path.parent.name for path in GROUP_FILES} >= {"model", "init", "precision", "data", "optimizer", "wandb"}
    assert sorted(CONF.glob("*.yaml")) == [CONF / "config.yaml"]


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_file_composes(path: Path) -> None:
    group, name = path.parent.name, path.stem
    needed = {"text": ["data.path=book"], "hub": ["data.path=book"], "pretrained": ["init.path=folder"]}
    jobs = make(f"{group}={name}", *needed.get(name, [])).jobs
    assert jobs
    if hasattr(RunConfig(), group):  # a section's file: every value of it arrives
        section = config.plain(jobs[0].config)[group]
        assert dict(OmegaConf.load(path)).items() <= section.items()


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
    assert only(f"model={name}").model.parameters["total"] == parameters


def test_a_value_with_spaces_asks_for_quotes() -> None:
    with pytest.raises(BadRequest, match=r"^data\.path=a b\.txt \(1\): cannot be read .* quote values"):
        make("data.path=a b.txt (1)")
    assert only("data=text", "data.path='a b.txt (1)'").data.path == "a b.txt (1)"


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

    keys = list(config.keys())
    assert keys == leaves(config.plain(RunConfig()))
    assert {"seed", "dry_run", "model.tie_weights", "wandb.dir", "sweep.isolate"} <= set(keys)


def test_plain_survives_json() -> None:
    import json

    plain = config.plain(RunConfig())
    assert json.loads(json.dumps(plain)) == plain
    assert config.parse(plain) == RunConfig()


def test_flops_by_hand() -> None:
    model = ModelConfig(n_layer=1, n_head=1, n_embd=2, block_size=8, vocab_size=5)
    # products per token: c_attn 2x6, c_proj 2x2, c_fc 2x8, mlp c_proj 8x2, head 2x5; attention 2 products of T x 2
    weights = 12 + 4 + 16 + 16 + 10
    assert model.flops_per_token(seq_len=4) == 6 * weights + 6 * (2 * 4 * 2)


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
        assert first.names == ["000_seed=1", "001_seed=2"]
        assert requests.numbered(3, "precision=tf32,seed=2") == "003_precision=tf32,seed=2"
        assert requests.numbered(0, "") == "000"
        assert requests.numbered(12, "data.path=../a b/c") == "012_data.path=.._a_b_c"
        assert len(requests.numbered(0, "x" * 500)) <= 110


@pytest.mark.parametrize("there", [True, False])
def test_claimed(tmp_path: Path, there: bool) -> None:
    """A folder is new or empty before, holds the request inside, and is not taken twice."""
    folder = tmp_path / "runs" / "run"
    if there:
        folder.mkdir(parents=True)
    request = make(f"hydra.run.dir={folder}", "model=nano", "seed=5")
    with requests.claimed(request, []):
        recorded = config.parse(OmegaConf.load(folder / ".hydra" / "config.yaml"))
        assert recorded == request.jobs[0].config
        assert "seed=5" in OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.cwd == str(Path.cwd())
    before = sorted(tmp_path.rglob("*"))
    (folder / "summary.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"^hydra\.run\.dir=.*: already holds files"), requests.claimed(request, []):
        pass
    beneath = make(f"hydra.run.dir={folder}/summary.json/x")
    refused = r"^hydra\.run\.dir=.*choose a folder that can be written"
    with pytest.raises(BadRequest, match=refused), requests.claimed(beneath, []):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted([*before, folder / "summary.json"])


@pytest.mark.parametrize("value", [None, True, False, 3, 0.5, "text", InitScheme.xavier])
def test_show_is_what_is_typed(value: object) -> None:
    typed = {None: "null", True: "true", False: "false", InitScheme.xavier: "xavier"}
    assert config.show(value) == typed.get(value, str(value))


def test_estimate_grows_with_the_request() -> None:
    from gpt2exp.training import setup

    def need(*args: str) -> int:
        return setup.memory(only(*args), on_cpu=True, unfused_attention=False)

    assert need() > 16 * 124_439_808
    assert need("train.batch_size=64") > need("train.batch_size=8") > 0
    assert need("model.tie_weights=false") > need()
    assert math.isfinite(need("model=gpt2-xl"))
