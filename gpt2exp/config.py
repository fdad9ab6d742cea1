"""Every key that can be asked for: a typed section for each part of the package, which checks its own values.

Hydra composes `conf/` by these dataclasses; `gpt2exp.schema.parse` makes the result a `RunConfig`. The other modules
receive their own section and read its attributes. No torch.
"""

from __future__ import annotations

import dataclasses
import pkgutil
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any, ClassVar

from gpt2exp.section import AUTO, SWITCH, Section, choice_of, chosen, default_of, home, option, require, typed

LOSS_ROWS = 1024  # `train.loss_chunk=auto`; 512 cost 4 % of the head's time at GPT-2's size, 256 cost 10 %


class InitScheme(StrEnum):
    """Where the standard deviations of the initial weights come from."""

    gpt2 = auto()  # N(0, init.std), as the tutorial: position embeddings too
    openai = auto()  # the same with position embeddings at 0.01, as OpenAI's code
    xavier = auto()  # N(0, 1/sqrt(fan_in)) for every matrix
    torch = auto()  # what nn.Linear and nn.Embedding do when left alone
    pretrained = auto()  # the weights at init.path


class PrecisionName(StrEnum):
    """How matrix products are computed: a row a precision, its columns in the order of `__new__`'s arguments."""

    weights: str  # the type of weights, gradients and moments
    autocast: str | None  # what the forward pass is cast to, by PyTorch's automatic mixed precision
    matmul: str  # the argument of `torch.set_float32_matmul_precision`

    fp32 = "fp32", "float32", None, "highest"  # IEEE single precision
    tf32 = "tf32", "float32", None, "high"  # operands cropped to 10 mantissa bits, products accumulated in fp32
    medium = "medium", "float32", None, "medium"  # bf16 inside the product, where the hardware does that
    bf16 = "bf16", "float32", "bfloat16", "highest"  # activations and products in bf16
    fp16 = "fp16", "float32", "float16", "highest"  # the same in fp16, with the loss scaled
    fp64 = "fp64", "float64", None, "highest"  # everything in double precision: the reference trajectory

    def __new__(cls, name: str, weights: str, autocast: str | None, matmul: str) -> PrecisionName:
        member = str.__new__(cls, name)
        member._value_ = name
        member.weights, member.autocast, member.matmul = weights, autocast, matmul
        return member

    @property
    def bytes(self) -> int:
        """Bytes of a weight."""
        return int(self.weights[-2:]) // 8


class Distributed(StrEnum):
    """How several processes share one run."""

    ddp = auto()  # each has the whole model and a part of the batch
    fsdp = auto()  # parameters, gradients and moments are sharded too: for models that one device cannot hold


Fallback = StrEnum("Fallback", "emulate error")
Rounding = StrEnum("Rounding", "truncate nearest")
ProductLibrary = StrEnum("ProductLibrary", "auto torch onednn")
DataName = StrEnum("DataName", "tinyshakespeare gutenberg text hub")
DataOrder = StrEnum("DataOrder", "sequential shuffled")
DeviceName = StrEnum("DeviceName", "auto cpu cuda mps")
Schedule = StrEnum("Schedule", "constant cosine")
Better = StrEnum("Better", "lower higher")
WandbMode = StrEnum("WandbMode", "auto online offline disabled")


@dataclass(kw_only=True, slots=True)
class SlotConfig(Section):
    """A choice of one part of the model: a module of (B, T, C) to (B, T, C), and its keys."""

    name: str = option("gpt2", "chosen by model/SLOT=NAME")
    inside: ClassVar[str] = "model."
    target: ClassVar[str]  # `package.module:Class`, called with the model's config and the keys but `name`

    def build(self, model: ModelConfig) -> Any:
        """The module, a new one at each call."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "name"}
        return pkgutil.resolve_name(self.target)(model, **own)


@choice_of("model.attention")
@dataclass(kw_only=True, slots=True)
class AttentionConfig(SlotConfig):
    """The slot of a block that mixes the tokens of a sequence."""

    target: ClassVar[str] = "gpt2exp.model.gpt:CausalSelfAttention"


@choice_of("model.mlp")
@dataclass(kw_only=True, slots=True)
class MLPConfig(SlotConfig):
    """The slot of a block that transforms each token by itself."""

    target: ClassVar[str] = "gpt2exp.model.gpt:MLP"


@choice_of("model.mlp")
@dataclass(kw_only=True, slots=True)
class ExactGELU(MLPConfig):
    """GPT-2's MLP with exact GELU, which the tanh form approximates."""

    name: str = option("exact_gelu", "chosen by model/mlp=exact_gelu")
    target: ClassVar[str] = "gpt2exp.model.gpt:ExactGELU"


@choice_of("model.norm")
@dataclass(kw_only=True, slots=True)
class NormConfig(SlotConfig):
    """The slot that normalises before attention, MLP and head."""

    target: ClassVar[str] = "gpt2exp.model.gpt:LayerNorm"


@choice_of("model.position")
@dataclass(kw_only=True, slots=True)
class PositionConfig(SlotConfig):
    """The slot that adds its position to each embedded token."""

    target: ClassVar[str] = "gpt2exp.model.gpt:Positions"


@dataclass(kw_only=True, slots=True)
class ModelConfig(Section):
    """The shape of GPT-2 (Radford et al. 2019); the defaults are the 124M model's."""

    n_layer: int = option(12, "transformer blocks", at_least=1)
    n_head: int = option(12, "attention heads a block", at_least=1)
    n_embd: int = option(768, "width of the residual stream, a multiple of model.n_head", at_least=1)
    block_size: int = option(1024, "longest sequence: rows of wpe", at_least=1)
    vocab_size: int = option(50257, "rows of wte: 50,000 BPE merges, 256 bytes and <|endoftext|>", at_least=1)
    tie_weights: bool = option(True, "use wte as lm_head too (Press and Wolf 2017), as GPT-2 does")
    bias: bool = option(True, "biases in matrices and norms, as GPT-2 has")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    mlp: MLPConfig = field(default_factory=MLPConfig)
    norm: NormConfig = field(default_factory=NormConfig)
    position: PositionConfig = field(default_factory=PositionConfig)

    def agree(self) -> None:
        heads = self.n_head
        near = sorted({max(1, self.n_embd // heads) * heads, (self.n_embd // heads + 1) * heads})
        remedy = f"try model.n_embd={' or '.join(map(str, near))}, or a model.n_head that divides it"
        self.require(self.n_embd % heads == 0, "n_embd", f"not divisible by model.n_head={heads}", remedy)


@dataclass(kw_only=True, slots=True)
class InitConfig(Section):
    """How the weights start."""

    scheme: InitScheme = option(InitScheme.gpt2, "where the initial weights come from; chosen by init=NAME")
    std: float | None = option(0.02, "std of matrices and token embeddings; null where the scheme derives it", above=0)
    position_std: float | None = option(0.02, "std of wpe; null: the scheme's own", above=0)
    residual_scaling: bool = option(True, "scale the std of a block's two c_proj by (2*n_layer)^-0.5, as GPT-2 does")
    path: str | None = option(None, "init=pretrained: a folder, or a hub id, of Hugging Face GPT-2 weights")

    def agree(self) -> None:
        if self.scheme is InitScheme.pretrained:
            remedy = "try init=pretrained init.path=FOLDER, or a hub id such as gpt2"
            self.require(bool(self.path), "path", "init=pretrained needs to know where they are", remedy)
        why, unused = UNUSED.get(self.scheme, ("needs a number", ()))
        for name in unused or ("std", "position_std"):
            value = getattr(self, name)
            ok = value in (None, False) if unused else value is not None
            remedy = "leave it out, or use init=gpt2" if unused else f"try init.{name}=0.02"
            self.require(ok, name, f"init={self.scheme} {why}", remedy)


UNUSED = {
    InitScheme.xavier: ("derives it from each matrix's shape", ("std",)),
    InitScheme.torch: ("has PyTorch's own", ("std", "position_std")),
    InitScheme.pretrained: ("draws nothing", ("std", "position_std", "residual_scaling")),
}
"""By scheme: keys of `InitConfig` that it does not use, and why."""


@dataclass(kw_only=True, slots=True)
class PrecisionConfig(Section):
    """How matrix products are computed; `gpt2exp.training.precision` measures what the hardware computes."""

    name: PrecisionName = option(PrecisionName.fp32, "how matrix products are computed; chosen by precision=NAME")
    fallback: Fallback = option(Fallback.emulate, "what tf32 does where the hardware has none")
    rounding: Rounding = option(Rounding.truncate, "emulated TF32: crop the mantissa, or round it to nearest even")
    library: ProductLibrary = option(
        ProductLibrary.auto, "library for fp32 products on a CPU; auto: onednn on AMD's, else torch (PyTorch's own)"
    )


@dataclass(kw_only=True, slots=True)
class DataConfig(Section):
    """The text that is trained on, and its order."""

    name: DataName = option(DataName.tinyshakespeare, "where the text comes from; chosen by data=NAME")
    path: str | None = option(None, "data=text: a text, JSONL or Parquet file, or a folder; data=hub: OWNER/NAME")
    field: str = option("text", "the field of a row (JSONL, Parquet, data=hub) that holds a document")
    subset: str | None = option(None, "data=hub: the dataset's configuration, where it has several")
    split: str = option("train", "data=hub: the split to read")
    revision: str | None = option(None, "data=hub: a branch, tag or commit, looked up once; null: the main branch")
    max_tokens: int | None = option(None, "read no more tokens than this; null: all", at_least=2)
    val_fraction: float = option(0.0, "share of the tokens, from the end, for validation; 0: none", at_least=0, below=1)
    order: DataOrder = option(DataOrder.sequential, "order of text windows; shuffled: anew for each seed and epoch")
    redraw: int = option(0, "data.order=shuffled: the number of another permutation of the same seed", at_least=0)

    def agree(self) -> None:
        shuffled, why = self.order is DataOrder.shuffled, f"data.order={self.order} draws no permutation"
        self.require(shuffled or self.redraw == 0, "redraw", why, "add data.order=shuffled")
        self.require(bool(self.field), "field", "must not be empty", "try data.field=text")
        for key, usual in (("subset", None), ("split", "train"), ("revision", None)):
            ok = self.name is DataName.hub or getattr(self, key) == usual
            remedy = "leave it out, or try data=hub data.path=OWNER/NAME"
            self.require(ok, key, f"data={self.name} has none", remedy)
        needed = {DataName.text: ("where the text is", "FILE_OR_FOLDER"), DataName.hub: ("which dataset", "OWNER/NAME")}
        if self.name in needed:
            what, example = needed[self.name]
            why, remedy = f"data={self.name} needs to know {what}", f"try data={self.name} data.path={example}"
            self.require(bool(self.path), "path", why, remedy)
        else:
            why = f"data={self.name} has a text of its own"
            self.require(self.path is None, "path", why, f"try data=text {shlex.quote(typed('data.path', self.path))}")
            self.require(self.field == "text", "field", why, "leave it out")

    @property
    def text(self) -> tuple[Any, ...]:
        """The values that decide which tokens there are; equal in jobs that share a text."""
        order = ("val_fraction", "order", "redraw")
        return tuple(repr(getattr(self, name)) for name in self.__dataclass_fields__ if name not in order)


@dataclass(kw_only=True, slots=True)
class TrainConfig(Section):
    """How long to train, in which batches, on which device."""

    batch_size: int | str = option(4, "sequences in a micro-batch; auto: as many as fit", at_least=1, choices=(AUTO,))
    seq_len: int = option(32, "tokens in a sequence, at most model.block_size", at_least=1)
    steps: int = option(50, "optimizer steps", at_least=1)
    grad_accum_steps: int = option(1, "micro-batches whose mean gradient makes one step", at_least=1)
    tokens_per_step: int | None = option(None, "tokens a step; sets grad_accum_steps; null: not fixed", at_least=1)
    device: DeviceName = option(DeviceName.auto, "where to compute; auto: cuda, then mps, then cpu")
    compile: bool | str = option(AUTO, "torch.compile the blocks; auto: on CUDA, from 1,000 steps on", choices=SWITCH)
    loss_chunk: int | str = option(AUTO, "rows of logits in memory at a time; auto: 1024", at_least=1, choices=(AUTO,))
    pad_vocab: bool | str = option(
        AUTO, "pad the head with zero rows to a multiple of 64; auto: if faster", choices=SWITCH
    )
    activation_checkpointing: bool | str = option(AUTO, "recompute activations; auto: to fit in memory", choices=SWITCH)
    log_every: int = option(1, "steps between printed lines and wandb points; metrics.jsonl has every step", at_least=1)
    eval_every: int = option(0, "steps between validations; 0: only after the last step", at_least=0)
    measure_every: int = option(10, "steps between measures such as grad_norm; first and last too", at_least=1)
    warmup_steps: int = option(3, "first steps left out of the timing; the last step is always kept", at_least=0)

    def agree(self) -> None:
        """With `tokens_per_step`, sets `grad_accum_steps` once the batch is known."""
        if (tokens := self.tokens_per_step) is None:
            return
        part = self.seq_len * (1 if self.batch_size == AUTO else self.sequences)
        why = f"not a multiple of train.batch_size={self.batch_size} x train.seq_len={self.seq_len}"
        near = max(part, round(tokens / part) * part)
        self.require(tokens % part == 0, "tokens_per_step", why, f"try train.tokens_per_step={near}")
        if self.batch_size != AUTO:
            pieces = tokens // part
            why = f"train.tokens_per_step={tokens} makes it {pieces}"
            self.require(self.grad_accum_steps in (1, pieces), "grad_accum_steps", why, "leave one of them out")
            self.grad_accum_steps = pieces

    @property
    def sequences(self) -> int:
        """`batch_size` as the number it is, or has become (`gpt2exp.training.setup.fit`)."""
        assert isinstance(self.batch_size, int), "train.batch_size=auto was not made a number"
        return self.batch_size

    @property
    def loss_rows(self) -> int:
        """`loss_chunk` as a number."""
        return LOSS_ROWS if self.loss_chunk == AUTO else int(self.loss_chunk)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens in one forward and backward pass."""
        return self.sequences * self.seq_len

    @property
    def step_tokens(self) -> int:
        """Tokens in one optimizer step."""
        return self.micro_batch_tokens * self.grad_accum_steps


@dataclass(kw_only=True, slots=True)
class OptimizerConfig(Section):
    """The keys of every optimizer; the choices are in `gpt2exp.training.optimizers`."""

    name: str = option("", "chosen by optimizer=NAME")
    lr: float = option(3e-4, "learning rate; under a schedule the peak", above=0)
    grad_clip: float = option(0.0, "clip the gradient's global norm to this; 0: no clipping", at_least=0)
    schedule: str = option("constant", "the rate's schedule: constant, cosine, or a file of yours in group schedule")
    warmup_steps: int = option(0, "cosine: steps of linear warm-up", at_least=0)
    min_lr: float = option(0.0, "cosine: where the learning rate ends", at_least=0)
    schedule_steps: int | None = option(None, "cosine: steps until min_lr is reached; null: train.steps", at_least=1)
    moments: ClassVar[int] = 2  # numbers that it keeps for each weight; for code from outside, 2 is a guess

    def agree(self) -> None:
        for name in ("warmup_steps", "min_lr", "schedule_steps"):
            ok, why = self.schedule == Schedule.cosine, f"has no meaning under optimizer.schedule={self.schedule}"
            self.require(ok or not getattr(self, name), name, why, "add optimizer.schedule=cosine")
        why = f"above the peak optimizer.lr={self.lr}"
        self.require(self.min_lr <= self.lr, "min_lr", why, "try optimizer.min_lr=0")

    def build(self, model: Any) -> list[Any]:
        """PyTorch optimizers that together step every parameter of `model` once."""
        raise NotImplementedError


@dataclass(kw_only=True, slots=True)
class ScheduleConfig(Section):
    """The keys of a schedule from outside; `optimizer.schedule` chooses it."""

    name: str = option("", "the same as optimizer.schedule, if that is a file of yours")


@dataclass(kw_only=True, slots=True)
class MetricConfig(Section):
    """A metric from outside, measured every `train.measure_every` steps and compared."""

    name: str = option("", "chosen by metric=NAME, a file of yours")
    unit: str = option("", "metric=NAME: the unit of its values in tables")
    better: Better = option(Better.lower, "metric=NAME: which values are better")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig(Section):
    """When a run's whole state goes to disk: 12 bytes a parameter, so 1.5 GB for GPT-2 124M (4 of them the weights)."""

    every: int = option(0, "steps between checkpoints; 0: none, except when a signal stops the run", at_least=0)
    keep: int = option(2, "how many of the newest to keep", at_least=1)
    save_last: bool = option(False, "save the end too: needed to sample from the run, export it or add steps to it")


@dataclass(kw_only=True, slots=True)
class WandbConfig(Section):
    """The copy of a run on Weights & Biases; the local files are the record."""

    mode: WandbMode = option(WandbMode.auto, "auto: WANDB_MODE, else online with credentials, else offline")
    project: str = option("gpt2exp", "project on the server")
    group: str | None = option(None, "group of runs; null: a sweep's folder")
    name: str | None = option(None, "the run's name; null: its overrides")
    tags: list[str] = option([], "tags")
    entity: str | None = option(None, "team or user; null: the account's default")
    dir: str | None = option(None, "folder for wandb's own files; null: the run's")

    def agree(self) -> None:
        self.dir = home(self.dir) if self.dir else None  # wandb would make a folder called ~
        # wandb's own rules: it would refuse only once training begins, and record nothing
        ok = not set(self.project) & set("/\\#?%:") and 1 <= len(self.project) <= 128
        why = "must be 1 to 128 characters and none of / \\ # ? % :"
        self.require(ok, "project", why, "try wandb.project=gpt2exp")
        ok = all(1 <= len(tag) <= 64 for tag in self.tags)
        self.require(ok, "tags", "a tag must have 1 to 64 characters", "try wandb.tags=[short,words]")


class Design(StrEnum):
    """Which combinations of a sweep's arms are run."""

    product = "product"
    one_at_a_time = "one_at_a_time"
    leave_one_out = "leave_one_out"


TOGETHER = " + "  # joins the keys of an axis of several keys (`sweep.together`) in its name


def moving(together: Iterable[str]) -> list[str]:
    """The keys of `sweep.together`."""
    return [text.partition("=")[0].strip() for text in together]


CONTROL = "data.redraw"
"""The key in which the control (`sweep.control`) differs from the baseline.

Both permutations of a seed are draws of one kind, and the weights are the same. So the paired difference is centred at
zero. If intervals exclude zero more often than one time in twenty, the pairs or the intervals are wrong. The check
cannot see what all runs have in common. Arms share the data order, so their differences vary less than the control's.
"""


@dataclass(kw_only=True, slots=True)
class SweepConfig(Section):
    """Which jobs a sweep has, and how they are run and compared."""

    together: list[str] = option(
        [], "keys that are one axis: 'model.n_embd=64,128;optimizer.lr=1e-3,5e-4'; in a file a list"
    )
    design: Design = option(Design.product, "product: every combination; else a baseline, and one change at a time")
    control: bool = option(False, "an A/A check: the baseline again in another data order must be indistinguishable")
    fail_fast: bool = option(False, "start no further job once one has failed or diverged")
    isolate: bool = option(False, "run each job in a process of its own")
    margin: float | None = option(None, "nats within which a difference in the loss counts as none", above=0)
    over: str | None = option(None, "a budget as an axis: with train.steps=50,100,200 arms have a verdict within each")
    until: str | None = option(None, "answered: seeds 1, 2, ... until each axis has a verdict", choices=("answered",))
    min_seeds: int = option(3, "sweep.until: seeds before the first look", at_least=2)
    max_seeds: int | None = option(None, "sweep.until: how many seeds at most; null: 30", at_least=2, below=1001)
    max_hours: float | None = option(None, "sweep.until: hours after which no seed is begun", above=0)
    prior: str | None = option(None, "an earlier sweep, by whose std to say what 3, 5, 10, 20 seeds can tell")
    reuse: list[str] = option([], "FOLDER,...: runs there of the same configuration are reused, not run again")
    tune: str | None = option(None, "KEY=A,B,C: each arm is compared at its own best value, found on sweep.tune_seeds")
    tune_seeds: list[int] = option(
        [101, 102], "sweep.tune: seeds of the tuning, which are not compared; 2 means 101,102", at_least=0
    )

    def agree(self) -> None:
        needs = dict.fromkeys(("min_seeds", "max_seeds", "max_hours"), ("until", "answered"))
        for name, (other, example) in {**needs, "tune_seeds": ("tune", "optimizer.lr=1e-4,1e-3")}.items():
            ok = getattr(self, other) is not None or getattr(self, name) == default_of(self.__dataclass_fields__[name])
            self.require(ok, name, f"has no meaning without sweep.{other}", f"add sweep.{other}={example}")
        if self.tune is not None:
            self._check_tune(self.tune)
        keys = moving(self.together)
        for key, text in zip(keys, self.together, strict=True):
            require("=" in text, "sweep.together", text, "must be KEY=A,B", "separate several by a semicolon")
            require(keys.count(key) == 1, "sweep.together", text, "its key is there twice", "name each key once")
        remedy = "add another, or sweep it by itself"
        self.require(len(keys) != 1, "together", "one key has nothing to move with", remedy)
        most, why = self.looks.stop - 1, f"fewer than sweep.min_seeds={self.min_seeds}"
        require(self.min_seeds <= most, "sweep.max_seeds", most, why, f"try sweep.max_seeds={2 * self.min_seeds}")

    def _check_tune(self, tune: str) -> None:
        key, values = key_and_values(tune)
        numbers = [float(value) for value in values if re.fullmatch(r"-?[\d.]*\d(e[+-]?\d+)?", value)]
        ok = bool(key) and len(numbers) == len(values) == len({*numbers}) > 1
        remedy = f'try sweep.tune="{key or "optimizer.lr"}=1e-4,3e-4,1e-3"'
        self.require(ok, "tune", "must be a key and two different numbers or more, KEY=A,B,C", remedy)
        ok = len({*self.tune_seeds}) == len(self.tune_seeds) > 0
        self.require(ok, "tune_seeds", "must be different seeds", "try sweep.tune_seeds=101,102")

    @property
    def budget(self) -> str:
        """The key of `over`; empty without."""
        return key_and_values(self.over)[0]

    @property
    def looks(self) -> range:
        """Numbers of seeds at which a sweep that runs until it is answered looks."""
        return range(self.min_seeds, (self.max_seeds or 30) + 1)


def key_and_values(text: str | None) -> tuple[str, list[str]]:
    """The key that `sweep.tune` or `sweep.over` names, and its values as typed; both empty if it is null."""
    key, _, values = (text or "").partition("=")
    return key.strip(), [value.strip() for value in values.split(",") if value.strip()]


@dataclass(kw_only=True, slots=True)
class RunConfig(Section):
    """The configuration of one run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: chosen("optimizer")())
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    distributed: Distributed = option(Distributed.ddp, "how the processes that torchrun started share a run")
    seed: int = option(1337, "seeds the initial weights and the shuffled order", at_least=0, below=2**63)
    resume: str | None = option(None, "a run or sweep folder to resume; what is done there is kept")
    dry_run: bool = option(False, "print what would run and train nothing")

    def agree(self) -> None:
        longest, schedule, train = self.model.block_size, self.optimizer.schedule, self.train
        why, remedy = f"longer than model.block_size={longest}", f"try train.seq_len={longest} or less"
        self.require(train.seq_len <= longest, "train.seq_len", why, remedy)
        why = "there is no validation data with data.val_fraction=0"
        ok = train.eval_every == 0 or self.data.val_fraction > 0
        self.require(ok, "train.eval_every", why, "add data.val_fraction=0.1")
        why = "data.order=sequential has no other order that is as good as the first"
        ok = not self.sweep.control or self.data.order is DataOrder.shuffled
        self.require(ok, "sweep.control", why, "add data.order=shuffled")
        known = [*Schedule, *filter(None, [self.schedule.name])]
        remedy = f"choose one of {', '.join(known)}, or name a file in the folder schedule of --config-dir"
        self.require(schedule in known, "optimizer.schedule", "no such schedule", remedy)
        name = self.schedule.name
        require(name in ("", schedule), "schedule", name, "is not chosen", f"write optimizer.schedule={name}")
        if schedule == Schedule.cosine:
            length = self.optimizer.schedule_steps
            why = f"shorter than train.steps={train.steps}, and after it the rate would be optimizer.min_lr=0"
            ok = length is None or train.steps <= length or self.optimizer.min_lr > 0
            self.require(ok, "optimizer.schedule_steps", why, f"try optimizer.schedule_steps={train.steps} or more")
            steps = length or train.steps
            why = f"longer than {'optimizer.schedule_steps' if length else 'the run, train.steps'}={steps}"
            remedy = f"try optimizer.warmup_steps={steps // 10}"
            self.require(self.optimizer.warmup_steps <= steps, "optimizer.warmup_steps", why, remedy)
