"""The configuration: one typed section per room of the package, each checking its own values.

Hydra composes `conf/` onto these dataclasses; `parse` turns the result into a plain `RunConfig`. Everything
downstream receives its own section and reads attributes. A wrong value raises `BadRequest`, whose text names the
key, the value, why it cannot be used and what to type instead. This module imports nothing else of the package
and no torch, so that a typo is answered in a moment.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any


class BadRequest(ValueError):
    """A request that cannot be carried out as typed; its text is the one line the user sees (exit code 2)."""


def show(value: object) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value.value if isinstance(value, Enum) else value)


def require(ok: bool, key: str, value: object, reason: str, remedy: str) -> None:
    """Raise `BadRequest` naming key, value, reason and remedy unless `ok`."""
    if not ok:
        raise BadRequest(f"{key}={show(value)}: {reason}; {remedy}")


def _positive(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{section}.{name}", value, "must be at least 1", f"try {section}.{name}=1 or more")


def _not_negative(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value >= 0
        require(ok, f"{section}.{name}", value, "must be a finite number, zero or more", f"try {section}.{name}=0")


AUTO = "auto"
"""What the program is to choose for itself."""
LOSS_ROWS = 1024
"""`train.loss_chunk=auto`: 512 rows at a time cost 4 % of the head's time at GPT-2's size, 256 cost 10 %."""


def _switch(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = value == AUTO or isinstance(value, bool)
        require(ok, f"{section}.{name}", value, "no such value", "choose one of auto, true, false")


def _count_or_auto(section: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = value == AUTO or (isinstance(value, int) and value >= 1)
        remedy = f"try {section}.{name}=4 or {section}.{name}=auto"
        require(ok, f"{section}.{name}", value, "must be a whole number of at least 1, or auto", remedy)


class InitScheme(Enum):
    """Where the standard deviations of the initial weights come from."""

    gpt2 = "gpt2"  # N(0, init.std), as the tutorial: position embeddings too
    openai = "openai"  # the same with position embeddings at 0.01, as OpenAI's code
    xavier = "xavier"  # N(0, 1/sqrt(fan_in)) for every matrix
    torch = "torch"  # what nn.Linear and nn.Embedding do when left alone
    pretrained = "pretrained"  # the weights at init.path


class PrecisionName(Enum):
    """How matrix products are computed."""

    fp32 = "fp32"  # IEEE single precision
    tf32 = "tf32"  # operands cropped to 10 mantissa bits, products accumulated in fp32
    medium = "medium"  # fp32 tensors, bf16 inside the product, where the hardware does that
    bf16 = "bf16"  # autocast: activations and products in bf16, weights in fp32
    fp16 = "fp16"  # autocast to fp16, with the loss scaled
    fp64 = "fp64"  # everything in double precision: the reference trajectory


class Fallback(Enum):
    """What `tf32` does on hardware that has none."""

    emulate = "emulate"
    error = "error"


class Rounding(Enum):
    """How the emulation takes an operand to 10 mantissa bits."""

    truncate = "truncate"
    nearest = "nearest"


class DataName(Enum):
    """Where the text comes from."""

    tinyshakespeare = "tinyshakespeare"
    text = "text"
    hub = "hub"


class DataOrder(Enum):
    """In which order the training windows are read."""

    sequential = "sequential"
    shuffled = "shuffled"


class DeviceName(Enum):
    """Which device to compute on; `auto` takes cuda, then mps, then cpu."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Distributed(Enum):
    """How several processes share one run."""

    ddp = "ddp"  # each has the whole model and a part of the batch
    fsdp = "fsdp"  # parameters, gradients and moments are shared out too: for models that one device cannot hold


class OptimizerName(Enum):
    """The optimizers on offer."""

    adamw = "adamw"


class Schedule(Enum):
    """The learning rate as a function of the step."""

    constant = "constant"
    cosine = "cosine"


class WandbMode(Enum):
    """`auto` is online where credentials are found, else offline."""

    auto = "auto"
    online = "online"
    offline = "offline"
    disabled = "disabled"


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """The shape of GPT-2 (Radford et al. 2019); the defaults are the 124M model's."""

    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads per block."""
    n_embd: int = 768
    """Width of the residual stream; a multiple of `n_head`."""
    block_size: int = 1024
    """Longest sequence: rows of `wpe`."""
    vocab_size: int = 50257
    """50,000 BPE merges, 256 bytes and `<|endoftext|>`: rows of `wte`."""
    tie_weights: bool = True
    """Use `wte` as `lm_head` too (Press and Wolf 2017), as GPT-2 does."""
    pad_vocab: bool | str = AUTO
    """Let the head's weight go on in memory with zeros to a multiple of 64 rows, for products of a rounder size;
    auto: on CUDA, and on processors with AVX2 alone. Counts, checkpoints and probabilities know V words only."""

    def __post_init__(self) -> None:
        _switch("model", self, "pad_vocab")
        _positive("model", self, "n_layer", "n_head", "n_embd", "block_size", "vocab_size")
        heads = self.n_head
        near = sorted({max(1, self.n_embd // heads) * heads, (self.n_embd // heads + 1) * heads})
        require(
            self.n_embd % heads == 0,
            "model.n_embd",
            self.n_embd,
            f"not divisible by model.n_head={heads}",
            f"try model.n_embd={' or '.join(map(str, near))}, or a model.n_head that divides it",
        )

    @property
    def parameters(self) -> dict[str, int]:
        """Parameter counts by part; `total` counts a tied tensor once, `without_tying` as two."""
        c, v = self.n_embd, self.vocab_size
        # a block: c_attn c x 3c, attn.c_proj c x c, c_fc c x 4c, mlp.c_proj 4c x c; biases 3c+c+4c+c; two LayerNorms
        block = 12 * c * c + 13 * c
        parts = {"wte": v * c, "wpe": self.block_size * c, "blocks": self.n_layer * block, "ln_f": 2 * c}
        untied = sum(parts.values()) + v * c
        total = untied - v * c if self.tie_weights else untied
        return {"total": total, "without_tying": untied, "lm_head": v * c, **parts}

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations of one token's forward and backward pass.

        Six per weight of a matrix product (two forward, four backward), and 12·n_layer·n_embd·seq_len for
        attention's two products, the causal half not discounted: Chowdhery et al. 2022 (PaLM), appendix B. The
        embedding look-ups cost nothing; the head counts whether tied or not.
        """
        c = self.n_embd
        return 6 * (self.n_layer * 12 * c * c + self.vocab_size * c) + 12 * self.n_layer * c * seq_len


@dataclass(kw_only=True, slots=True)
class InitConfig:
    """How the weights start."""

    scheme: InitScheme = InitScheme.gpt2
    """Chosen by `init=NAME`."""
    std: float | None = 0.02
    """Standard deviation of matrices and token embeddings; null where the scheme derives it from the shape."""
    position_std: float | None = 0.02
    """Standard deviation of `wpe`; null for the scheme's own."""
    residual_scaling: bool = True
    """Multiply the std of both `c_proj` of a block by (2·n_layer)^-0.5 (GPT-2 paper, section 2.3)."""
    path: str | None = None
    """For `init=pretrained`: a folder, or a hub id, of Hugging Face GPT-2 weights. In a sweep over `init` the other
    arms have it too, unused; `gpt2exp.sweep.request` refuses it where no arm uses it."""

    def __post_init__(self) -> None:
        for name in ("std", "position_std"):
            value = getattr(self, name)
            ok = value is None or (math.isfinite(value) and value > 0)
            require(ok, f"init.{name}", value, "must be a finite number above 0", f"try init.{name}=0.02")
        scheme = self.scheme.value
        if self.scheme is InitScheme.pretrained:
            remedy = "try init=pretrained init.path=FOLDER, or a hub id such as gpt2"
            require(bool(self.path), "init.path", self.path, "init=pretrained needs to know where they are", remedy)
            for name, none in (("std", None), ("position_std", None), ("residual_scaling", False)):
                value, why = getattr(self, name), "init=pretrained draws nothing"
                require(value is none, f"init.{name}", value, why, "leave it out, or use init=gpt2")
        elif self.scheme in (InitScheme.gpt2, InitScheme.openai):
            for name in ("std", "position_std"):
                value = getattr(self, name)
                remedy = f"try init.{name}=0.02"
                require(value is not None, f"init.{name}", value, f"init={scheme} needs a number", remedy)
        else:
            why = f"init={scheme} derives it from each matrix's shape"
            require(self.std is None, "init.std", self.std, why, "leave it out, or use init=gpt2")
        if self.scheme is InitScheme.torch:
            why = "init=torch is PyTorch's own N(0, 1) embedding"
            require(self.position_std is None, "init.position_std", self.position_std, why, "leave it out")


@dataclass(kw_only=True, slots=True)
class PrecisionConfig:
    """How matrix products are computed; see `gpt2exp.training.precision` for what the hardware made of it."""

    name: PrecisionName = PrecisionName.fp32
    """Chosen by `precision=NAME`."""
    fallback: Fallback = Fallback.emulate
    """What `tf32` does where the hardware has none."""
    rounding: Rounding = Rounding.truncate
    """How emulated TF32 shortens the mantissa: cropped, as the tutorial says, or to nearest even."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """What text is trained on and in which order."""

    name: DataName = DataName.tinyshakespeare
    """Chosen by `data=NAME`."""
    path: str | None = None
    """For `data=text`: a UTF-8 text, JSONL or Parquet file, or a folder of them. For `data=hub`: a dataset of the
    Hugging Face Hub, OWNER/NAME, or a folder that the `datasets` library can load."""
    field: str = "text"
    """The field of a JSONL or Parquet file, or of a dataset's rows, that holds a document."""
    subset: str | None = None
    """For `data=hub`: the dataset's configuration, where it has several."""
    split: str = "train"
    """For `data=hub`: the split to read."""
    revision: str | None = None
    """For `data=hub`: a branch, tag or commit, looked up once; null for its main branch."""
    max_tokens: int | None = None
    """Read no more than so many tokens; null for all."""
    val_fraction: float = 0.0
    """Share of the tokens, taken from the end, kept for validation; 0 trains on all, as the tutorial."""
    order: DataOrder = DataOrder.sequential
    """`sequential` draws no random number; `shuffled` permutes the windows by seed and epoch."""

    def __post_init__(self) -> None:
        value = self.val_fraction
        require(0 <= value < 1, "data.val_fraction", value, "must lie in [0, 1)", "try data.val_fraction=0.1")
        if self.max_tokens is not None:
            why = "a target needs at least 2 tokens"
            require(self.max_tokens >= 2, "data.max_tokens", self.max_tokens, why, "try data.max_tokens=1000000")
        require(bool(self.field), "data.field", "''", "must not be empty", "try data.field=text")
        if self.name is not DataName.hub:
            for key, usual in (("subset", None), ("split", "train"), ("revision", None)):
                value = getattr(self, key)
                why = f"data={self.name.value} has none"
                require(value == usual, f"data.{key}", value, why, "leave it out, or try data=hub data.path=OWNER/NAME")
        if self.name is DataName.text:
            remedy = "try data=text data.path=FILE_OR_FOLDER"
            require(bool(self.path), "data.path", self.path, "data=text needs to know where the text is", remedy)
        elif self.name is DataName.hub:
            remedy = "try data=hub data.path=OWNER/NAME"
            require(bool(self.path), "data.path", self.path, "data=hub needs to know which dataset", remedy)
        else:
            why = f"data={self.name.value} has a text of its own"
            require(self.path is None, "data.path", self.path, why, f"try data=text data.path={self.path}")
            require(self.field == "text", "data.field", self.field, why, "leave it out")

    @property
    def text(self) -> tuple[Any, ...]:
        """What decides which tokens there are: alike in jobs that share a text."""
        return self.name, self.path, self.field, self.subset, self.split, self.revision, self.max_tokens


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How long and in what pieces."""

    batch_size: int | str = 4
    """Sequences in a micro-batch; auto: as many as fit in memory, a power of two, 24 or 48."""
    seq_len: int = 32
    """Tokens in a sequence, at most `model.block_size`."""
    steps: int = 50
    """Optimizer steps."""
    grad_accum_steps: int = 1
    """Micro-batches whose mean gradient makes one step."""
    tokens_per_step: int | None = None
    """Tokens behind a step, where they are to stay the same whatever `batch_size` fits: the rest is accumulated."""
    device: DeviceName = DeviceName.auto
    """Where to compute."""
    compile: bool | str = AUTO
    """`torch.compile` of the blocks; auto: on CUDA, where the run is long enough to win the compilation back."""
    loss_chunk: int | str = AUTO
    """Rows of logits that stand at a time while the loss is computed (`gpt2exp.model.loss`); auto: 1024."""
    activation_checkpointing: bool | str = AUTO
    """Compute a block's activations again in backward instead of keeping them; auto: where the run fits only so."""
    log_every: int = 1
    """Steps between printed lines and wandb points; `metrics.jsonl` has every step."""
    eval_every: int = 0
    """Steps between validations; 0: only after the last step. Needs `data.val_fraction` above 0."""
    measure_every: int = 10
    """Steps between the costlier measures (`grad_norm`, `loss_unseen`), first and last step always."""
    warmup_steps: int = 3
    """First steps left out of the timing figures (the last step is always kept)."""

    def __post_init__(self) -> None:
        _positive("train", self, "seq_len", "steps", "grad_accum_steps", "log_every", "measure_every")
        _not_negative("train", self, "eval_every", "warmup_steps")
        _switch("train", self, "compile", "activation_checkpointing")
        _count_or_auto("train", self, "batch_size", "loss_chunk")
        if self.tokens_per_step is not None:
            self._share_out(self.tokens_per_step)

    def _share_out(self, tokens: int) -> None:
        """`grad_accum_steps` from `tokens_per_step`, as soon as the batch is known."""
        key, sequences = "train.tokens_per_step", 1 if self.batch_size == AUTO else self.sequences
        part = sequences * self.seq_len
        near = max(part, round(tokens / part) * part)
        why = f"not a multiple of train.batch_size={self.batch_size} x train.seq_len={self.seq_len}"
        require(tokens > 0 and tokens % part == 0, key, tokens, why, f"try {key}={near}")
        pieces = tokens // part
        if self.batch_size != AUTO:
            why = f"train.tokens_per_step={tokens} makes it {pieces}"
            given = self.grad_accum_steps
            require(given in (1, pieces), "train.grad_accum_steps", given, why, "leave one of them out")
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
        """Tokens behind one optimizer step."""
        return self.micro_batch_tokens * self.grad_accum_steps


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) with PyTorch's defaults, as the tutorial's 50 steps."""

    name: OptimizerName = OptimizerName.adamw
    """Chosen by `optimizer=NAME`."""
    lr: float = 3e-4
    """Learning rate (the peak, under a schedule)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Decay of the running mean and square of the gradient."""
    eps: float = 1e-8
    """Added to the denominator."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices and embeddings; biases and LayerNorms do not decay."""
    grad_clip: float = 0.0
    """Clip the gradient's global norm to this; 0: no clipping."""
    schedule: Schedule = Schedule.constant
    """The learning rate over the steps."""
    warmup_steps: int = 0
    """`cosine`: steps of linear warm-up."""
    min_lr: float = 0.0
    """`cosine`: where the learning rate ends."""

    def __post_init__(self) -> None:
        for name, usual in (("lr", "3e-4"), ("eps", "1e-8")):
            value = getattr(self, name)
            ok = math.isfinite(value) and value > 0
            require(ok, f"optimizer.{name}", value, "must be a finite number above 0", f"try optimizer.{name}={usual}")
        _not_negative("optimizer", self, "weight_decay", "grad_clip", "warmup_steps", "min_lr")
        ok = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(ok, "optimizer.betas", self.betas, "must be two numbers in [0, 1)", "try optimizer.betas=[0.9,0.95]")
        if self.schedule is Schedule.constant:
            for name in ("warmup_steps", "min_lr"):
                value = getattr(self, name)
                why = "has no meaning under optimizer.schedule=constant"
                require(value == 0, f"optimizer.{name}", value, why, "add optimizer.schedule=cosine")
        why = f"above the peak optimizer.lr={self.lr}"
        require(self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, why, "try optimizer.min_lr=0")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When a run's whole state goes to disk: 12 bytes a parameter, so 1.5 GB for GPT-2 124M (4 of them the weights)."""

    every: int = 0
    """Steps between checkpoints; 0: none on the way. A run that a signal stops is saved in any case."""
    keep: int = 2
    """How many to keep, the newest."""
    save_last: bool = False
    """Save the end too, wherever it falls: needed to sample from the run, export it or add steps to it."""

    def __post_init__(self) -> None:
        _not_negative("checkpoint", self, "every")
        _positive("checkpoint", self, "keep")


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """Where the run is mirrored; the local files are the record."""

    mode: WandbMode = WandbMode.auto
    """`auto`: online with credentials, else offline. A WANDB_MODE in the environment wins over `auto`."""
    project: str = "gpt2exp"
    """Project on the server."""
    group: str | None = None
    """Group of runs; a sweep's runs share its folder's name unless given."""
    name: str | None = None
    """The run's name; its overrides unless given."""
    tags: list[str] = field(default_factory=list)
    """Tags."""
    entity: str | None = None
    """Team or user; the account's default unless given."""
    dir: str | None = None
    """Folder for wandb's own files; the run's folder unless given."""

    def __post_init__(self) -> None:
        require(bool(self.project), "wandb.project", "''", "must not be empty", "try wandb.project=gpt2exp")
        # wandb's own rules, which it would state once training begins, and then record nothing
        ok = not set(self.project) & set("/\\#?%:") and len(self.project) <= 128
        why = "must be at most 128 characters and none of / \\ # ? % :"
        require(ok, "wandb.project", self.project, why, "try wandb.project=gpt2exp")
        for tag in self.tags:
            why = "a tag must have 1 to 64 characters"
            require(1 <= len(tag) <= 64, "wandb.tags", self.tags, why, "try wandb.tags=[short,words]")


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """How the jobs of a multirun are treated."""

    fail_fast: bool = False
    """Start no further job once one has failed or diverged."""
    isolate: bool = False
    """Run each job in a process of its own."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One run, whole."""

    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    distributed: Distributed = Distributed.ddp
    """How the processes that torchrun started share the run (`gpt2exp.training.distributed`)."""
    seed: int = 1337
    """Seeds the initial weights and the shuffled order; 0 is a seed like any other."""
    resume: str | None = None
    """A run or sweep folder to go on with; what is done there is kept. Never part of a run's own configuration."""
    dry_run: bool = False
    """Print what would run and train nothing."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)", "try seed=1337")
        longest = self.model.block_size
        why = f"longer than model.block_size={longest}"
        seq_len = self.train.seq_len
        require(seq_len <= longest, "train.seq_len", seq_len, why, f"try train.seq_len={longest} or less")
        why = "there is no validation data with data.val_fraction=0"
        ok = self.train.eval_every == 0 or self.data.val_fraction > 0
        require(ok, "train.eval_every", self.train.eval_every, why, "add data.val_fraction=0.1")
        if self.optimizer.schedule is Schedule.cosine:
            warmup, steps = self.optimizer.warmup_steps, self.train.steps
            why = f"longer than the run, train.steps={steps}"
            require(warmup <= steps, "optimizer.warmup_steps", warmup, why, f"try optimizer.warmup_steps={steps // 10}")


def keys(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the schema, such as `model.n_layer`."""
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "max_lr": "optimizer.lr",
    "max_steps": "train.steps",
    "max_iters": "train.steps",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "sequence_length": "train.seq_len",
    "dtype": "precision",
}
"""What other projects call our keys."""


def check_key(key: str, value: object) -> None:
    """Raise `BadRequest` unless `key` is a key of the schema, naming the nearest that is."""
    known = list(keys())
    if key in known:
        return
    section = key.split(".")[0]
    inside = [name for name in known if name.startswith(f"{section}.")]
    if key == section and inside:
        raise BadRequest(f"{key}={show(value)}: a section, not a value; set one of {', '.join(inside)}")
    part = key.rsplit(".", 1)[-1]
    # the last part alone too, so that lr and n_layers find optimizer.lr and model.n_layer
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.7)
    near += [last[name] for name in difflib.get_close_matches(part, last, n=2, cutoff=0.75)]
    if part in ELSEWHERE:
        near = [ELSEWHERE[part]]
    hint = f"keys of {section}: {', '.join(inside)}" if inside else "gpt2exp --help lists the keys"
    if near:
        hint = f"did you mean {' or '.join(dict.fromkeys(near))}?"
    raise BadRequest(f"{key}={show(value)}: no such key; {hint}")


def parse(plain: Any) -> RunConfig:
    """A composed configuration, as plain dicts or an OmegaConf node, as a checked `RunConfig`.

    Raises:
        BadRequest: an unknown key, a wrong type, a value out of range or at odds with another.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise BadRequest(explain(error)) from error
    assert isinstance(config, RunConfig)
    return config


def explain(error: Exception) -> str:
    """OmegaConf's and Hydra's several lines as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type", "reference_type")))
    key = getattr(error, "full_key", None)
    return f"{key}: {text}" if key and key not in text else text


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON's own types: enums by value, sections as dicts."""

    def convert(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return value

    return {key: convert(value) for key, value in dataclasses.asdict(config).items()}


HOUSEKEEPING = ("wandb", "sweep", "dry_run", "resume", "checkpoint", "train.log_every", "train.measure_every")
"""Keys, or whole sections, that say how a run is kept and shown, not what it computes."""


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested plain configuration by dotted key, housekeeping left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in HOUSEKEEPING:
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def identity(config: RunConfig) -> str:
    """A hash that two configurations share if, and only if, they compute the same thing."""
    return hashlib.sha256(json.dumps(flatten(plain(config)), sort_keys=True).encode()).hexdigest()[:16]
