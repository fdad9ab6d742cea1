"""A request is checked whole before anything runs: the composed values, and what is said of those that cannot be."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from gpt2exp import config, plan
from gpt2exp.config import BadRequest, InitScheme, ModelConfig, RunConfig

CONF = Path(plan.__file__).parent.parent / "conf"


def make(*args: str) -> plan.Plan:
    """The plan of a command line; flags first, as the program puts them."""
    return plan.make(get_args_parser().parse_args(args))


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
    jobs = make(f"{group}={name}", *(["data.path=book.txt"] if name == "text" else [])).jobs
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


BAD: list[tuple[str, str, str]] = [
    # the command line; how the line starts, naming key and value; what of the remedy it must hold
    ("sed=3", "sed=3: no such key", "did you mean seed?"),
    ("+sed=3", "sed=3: no such key", "did you mean seed?"),
    ("++sed=3", "sed=3: no such key", "did you mean seed?"),
    ("lr=0.1", "lr=0.1: no such key", "did you mean optimizer.lr?"),
    ("n_layers=3", "n_layers=3: no such key", "model.n_layer"),
    ("learning_rate=0.1", "learning_rate=0.1: no such key", "did you mean optimizer.lr?"),
    ("optimizer.learning_rate=0.1", "optimizer.learning_rate=0.1: no such key", "did you mean optimizer.lr?"),
    ("train.max_iters=9", "train.max_iters=9: no such key", "did you mean train.steps?"),
    ("frobnicate=1", "frobnicate=1: no such key", "gpt2exp --help"),
    ("frobnicate.much=1", "frobnicate.much=1: no such key", "gpt2exp --help"),
    ("model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
    ("+model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
    ("++model.n_layers=3", "model.n_layers=3: no such key", "did you mean model.n_layer?"),
    ("+model.typo=3", "model.typo=3: no such key", "keys of model: model.n_layer, model.n_head"),
    ("train.step=4", "train.step=4: no such key", "train.steps"),
    ("precision.falback=error", "precision.falback=error: no such key", "precision.fallback"),
    ("+seed=3", "+seed=3: the key is there already", "leave out the +: seed=3"),
    ("+model=nano", "+model=nano: the key is there already", "leave out the +: model=nano"),
    ("train=3", "train=3: a section, not a value", "train.steps"),
    ("sweep=true", "sweep=true: a section, not a value", "sweep.fail_fast, sweep.isolate"),
    ("train={steps:3}", "train={'steps': 3}: a section, not a value", "train.steps"),
    ("model={n_layer:3}", "model={'n_layer': 3}: no such choice", "choose one of gpt2,"),
    ("model=nanoo", "model=nanoo: no such choice", "did you mean model=nano?"),
    ("model=", "model=: no such choice", "choose one of gpt2,"),
    ("++model=nanoo", "model=nanoo: no such choice", "did you mean model=nano?"),
    ("init=kaiming", "init=kaiming: no such choice", "openai"),
    ("precision=tf23", "precision=tf23: no such choice", "did you mean precision=tf32?"),
    ("data=shakespeare", "data=shakespeare: no such choice", "did you mean data=tinyshakespeare?"),
    ("optimizer=sgd", "optimizer=sgd: no such choice", "adamw"),
    ("wandb=on", "wandb=on: no such choice", "choose one of default"),
    ("train.steps=many", "train.steps=many: must be a whole number", "the default is 50"),
    ("train.steps=2.5", "train.steps=2.5: must be a whole number", "the default is 50"),
    ("train.steps=true", "train.steps=true: must be a whole number", "the default is 50"),
    ("train.steps=null", "train.steps=null: must be a whole number", "the default is 50"),
    ("train.steps=", "train.steps=: must be a whole number", "the default is 50"),
    ("train.steps=[1,2]", "train.steps=[1, 2]: must be a whole number", "the default is 50"),
    ("optimizer.lr=fast", "optimizer.lr=fast: must be a number", "the default is 0.0003"),
    ("optimizer.lr=true", "optimizer.lr=true: must be a number", "the default is 0.0003"),
    ("model.tie_weights=maybe", "model.tie_weights=maybe: must be true or false", "the default is true"),
    ("model.tie_weights=2", "model.tie_weights=2: must be true or false", "the default is true"),
    ("dry_run=perhaps", "dry_run=perhaps: must be true or false", "the default is false"),
    ("train.device=gpu", "train.device=gpu: no such value", "choose one of auto, cpu, cuda, mps"),
    ("precision.rounding=up", "precision.rounding=up: no such value", "truncate, nearest"),
    ("precision.fallback=ignore", "precision.fallback=ignore: no such value", "emulate, error"),
    ("wandb.mode=maybe", "wandb.mode=maybe: no such value", "auto, online, offline, disabled"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list", "optimizer.betas=[0.9,0.999]"),
    ("optimizer.betas=[a,b]", "optimizer.betas=['a', 'b']: must be a list", "optimizer.betas=[0.9,0.999]"),
    ("wandb.tags=one", "wandb.tags=one: must be a list", "wandb.tags=[]"),
    ("wandb.name=[a]", "wandb.name=['a']: must be text", "the default is null"),
    ("train.steps=0", "train.steps=0: must be at least 1", "try train.steps=1"),
    ("train.steps=-3", "train.steps=-3: must be at least 1", "try train.steps=1"),
    ("train.batch_size=0", "train.batch_size=0: must be at least 1", "try train.batch_size=1"),
    ("train.seq_len=0", "train.seq_len=0: must be at least 1", "try train.seq_len=1"),
    ("train.grad_accum_steps=0", "train.grad_accum_steps=0: must be at least 1", "try train.grad_accum_steps=1"),
    ("train.log_every=0", "train.log_every=0: must be at least 1", "try train.log_every=1"),
    ("train.measure_every=0", "train.measure_every=0: must be at least 1", "try train.measure_every=1"),
    ("train.eval_every=-1", "train.eval_every=-1: must be a finite number, zero or more", "try train.eval_every=0"),
    ("train.warmup_steps=-1", "train.warmup_steps=-1: must be a finite number", "try train.warmup_steps=0"),
    ("model.n_layer=0", "model.n_layer=0: must be at least 1", "try model.n_layer=1"),
    ("model.n_head=0", "model.n_head=0: must be at least 1", "try model.n_head=1"),
    ("model.vocab_size=-1", "model.vocab_size=-1: must be at least 1", "try model.vocab_size=1"),
    ("optimizer.lr=0", "optimizer.lr=0.0: must be a finite number above 0", "try optimizer.lr=3e-4"),
    ("optimizer.lr=-1e-3", "optimizer.lr=-0.001: must be a finite number above 0", "try optimizer.lr=3e-4"),
    ("optimizer.lr=nan", "optimizer.lr=nan: must be a finite number above 0", "try optimizer.lr=3e-4"),
    ("optimizer.lr=inf", "optimizer.lr=inf: must be a finite number above 0", "try optimizer.lr=3e-4"),
    ("optimizer.eps=0", "optimizer.eps=0.0: must be a finite number above 0", "try optimizer.eps=1e-8"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be two numbers in [0, 1)", "optimizer.betas=[0.9,0.95]"),
    ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]: must be two numbers", "optimizer.betas=[0.9,0.95]"),
    ("optimizer.betas=[0.9,nan]", "optimizer.betas=[0.9, nan]: must be two numbers", "optimizer.betas=[0.9,0.95]"),
    ("optimizer.grad_clip=nan", "optimizer.grad_clip=nan: must be a finite number", "try optimizer.grad_clip=0"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay=-0.1: must be a finite", "try optimizer.weight_decay=0"),
    ("optimizer.weight_decay=inf", "optimizer.weight_decay=inf: must be a finite", "try optimizer.weight_decay=0"),
    ("init.std=0", "init.std=0.0: must be a finite number above 0", "try init.std=0.02"),
    ("init.std=nan", "init.std=nan: must be a finite number above 0", "try init.std=0.02"),
    ("init.position_std=-1", "init.position_std=-1.0: must be a finite number above 0", "try init.position_std=0.02"),
    ("data.val_fraction=1", "data.val_fraction=1.0: must lie in [0, 1)", "try data.val_fraction=0.1"),
    ("data.val_fraction=-0.1", "data.val_fraction=-0.1: must lie in [0, 1)", "try data.val_fraction=0.1"),
    ("data.val_fraction=nan", "data.val_fraction=nan: must lie in [0, 1)", "try data.val_fraction=0.1"),
    ("seed=-1", "seed=-1: must lie in [0, 2^63)", "try seed=1337"),
    ("seed=9223372036854775808", "seed=9223372036854775808: must lie in [0, 2^63)", "try seed=1337"),
    ("seed=1.5", "seed=1.5: must be a whole number", "the default is 1337"),
    ("seed=null", "seed=null: must be a whole number", "the default is 1337"),
    ("wandb.project=''", "wandb.project='': must not be empty", "try wandb.project=gpt2exp"),
    ("model.n_embd=100", "model.n_embd=100: not divisible by model.n_head=12", "try model.n_embd=96 or 108"),
    ("model.n_head=7", "model.n_embd=768: not divisible by model.n_head=7", "a model.n_head that divides it"),
    ("train.seq_len=1025", "train.seq_len=1025: longer than model.block_size=1024", "try train.seq_len=1024"),
    ("model=nano train.seq_len=257", "train.seq_len=257: longer than model.block_size=256", "try train.seq_len=256"),
    ("train.eval_every=5", "train.eval_every=5: there is no validation data", "add data.val_fraction=0.1"),
    ("optimizer.warmup_steps=5", "optimizer.warmup_steps=5: has no meaning", "add optimizer.schedule=cosine"),
    ("optimizer.min_lr=1e-5", "optimizer.min_lr=1e-05: has no meaning", "add optimizer.schedule=cosine"),
    (
        "optimizer.schedule=cosine optimizer.min_lr=1",
        "optimizer.min_lr=1.0: above the peak optimizer.lr=0.0003",
        "try optimizer.min_lr=0",
    ),
    (
        "optimizer.schedule=cosine optimizer.warmup_steps=51",
        "optimizer.warmup_steps=51: longer than the run, train.steps=50",
        "try optimizer.warmup_steps=5",
    ),
    ("init.std=null", "init.std=null: init=gpt2 needs a number", "try init.std=0.02"),
    ("init=openai init.position_std=null", "init.position_std=null: init=openai needs a number", "try init.position"),
    ("init=xavier init.std=0.02", "init.std=0.02: init=xavier derives it", "leave it out, or use init=gpt2"),
    ("init=torch init.std=0.02", "init.std=0.02: init=torch derives it", "leave it out, or use init=gpt2"),
    ("init=torch init.position_std=0.02", "init.position_std=0.02: init=torch is PyTorch's own", "leave it out"),
    ("init.scheme=xavier", "init.std=0.02: init=xavier derives it", "leave it out, or use init=gpt2"),
    ("data=text", "data.path=null: data=text needs to know where the text is", "data=text data.path=FILE_OR_FOLDER"),
    ("data.path=book.txt", "data.path=book.txt: data=tinyshakespeare has a text", "try data=text data.path=book.txt"),
    ("~seed", "~seed: a key cannot be deleted", "seed=VALUE"),
    ("~model", "~model: a key cannot be deleted", "model=VALUE"),
    ("~train.steps=50", "~train.steps: a key cannot be deleted", "train.steps=VALUE"),
    ("train.steps=1,2", "train.steps=1,2: several values make a sweep", "add -m"),
    ("model=nano,gpt2", "model=nano,gpt2: several values make a sweep", "add -m"),
    ("seed=range(3)", "seed=range(3): several values make a sweep", "add -m"),
    ("-m seed=interval(0,1)", "seed=interval(0,1): the basic sweeper takes lists", "write seed=A,B"),
    ("-m train.steps=2,0", "train.steps=0: must be at least 1", "try train.steps=1"),
    ("-m seed=1,x", "seed=x: must be a whole number", "the default is 1337"),
    ("-m precision=fp32,int3", "precision=int3: no such choice", "fp32, "),
    ("-m model.n_head=12,7 seed=1,2", "model.n_embd=768: not divisible by model.n_head=7", "try model.n_embd="),
    ("steps", "steps: cannot be read as an override", "write KEY=VALUE"),
    ("=3", "=3: cannot be read as an override", "write KEY=VALUE"),
    ("model.n_layer=[1", "model.n_layer=[1: cannot be read as an override", "write KEY=VALUE"),
    ("train.steps=${nope}", "train.steps: Interpolation key 'nope' not found", ""),
    ("--config-dir nowhere", "--config-dir nowhere: no such folder", "name a folder of YAML files"),
    ("--config-name nowhere", "Cannot find primary config 'nowhere'", "search path"),
    ("hydra.run.dirr=x", "Could not override 'hydra.run.dirr'", "+hydra.run.dirr=x"),
]


@pytest.mark.parametrize(("line", "start", "remedy"), BAD, ids=[line for line, _, _ in BAD])
def test_bad_request(line: str, start: str, remedy: str) -> None:
    with pytest.raises(BadRequest) as caught:
        make(*line.split())
    text = str(caught.value)
    assert text.startswith(start)
    assert remedy in text.removeprefix(start)
    assert len(text.splitlines()) == 1


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
        assert plan.numbered(3, "precision=tf32,seed=2") == "003_precision=tf32,seed=2"
        assert plan.numbered(0, "") == "000"
        assert plan.numbered(12, "data.path=../a b/c") == "012_data.path=.._a_b_c"
        assert len(plan.numbered(0, "x" * 500)) <= 110


@pytest.mark.parametrize("there", [True, False])
def test_claimed(tmp_path: Path, there: bool) -> None:
    """A folder is new or empty before, holds the request inside, and is not taken twice."""
    folder = tmp_path / "runs" / "run"
    if there:
        folder.mkdir(parents=True)
    request = make(f"hydra.run.dir={folder}", "model=nano", "seed=5")
    with plan.claimed(request, []):
        recorded = config.parse(OmegaConf.load(folder / ".hydra" / "config.yaml"))
        assert recorded == request.jobs[0].config
        assert "seed=5" in OmegaConf.load(folder / ".hydra" / "overrides.yaml")
        assert OmegaConf.load(folder / ".hydra" / "hydra.yaml").hydra.runtime.cwd == str(Path.cwd())
    before = sorted(tmp_path.rglob("*"))
    (folder / "summary.json").write_text("{}")
    with pytest.raises(BadRequest, match=r"^hydra\.run\.dir=.*: already holds files"), plan.claimed(request, []):
        pass
    beneath = make(f"hydra.run.dir={folder}/summary.json/x")
    refused = r"^hydra\.run\.dir=.*choose a folder that can be written"
    with pytest.raises(BadRequest, match=refused), plan.claimed(beneath, []):
        pass
    assert sorted(tmp_path.rglob("*")) == sorted([*before, folder / "summary.json"])


@pytest.mark.parametrize("value", [None, True, False, 3, 0.5, "text", InitScheme.xavier])
def test_show_is_what_is_typed(value: object) -> None:
    typed = {None: "null", True: "true", False: "false", InitScheme.xavier: "xavier"}
    assert config.show(value) == typed.get(value, str(value))


def test_estimate_grows_with_the_request() -> None:
    from gpt2exp import estimate

    def need(*args: str) -> int:
        return estimate.memory(only(*args), on_cpu=True, unfused_attention=False)

    assert need() > 16 * 124_439_808
    assert need("train.batch_size=64") > need("train.batch_size=8") > 0
    assert need("model.tie_weights=false") > need()
    assert math.isfinite(need("model=gpt2-xl"))
