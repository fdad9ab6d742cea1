"""All code that depends on Hydra's internals: its parser, its loader, its launchers, its own command. No torch.

Hydra takes 0.1 s to compose one configuration. The jobs of a sweep mostly differ in plain values. So Hydra composes one
job for each combination of groups, and `_Base` makes the others by changing the values in it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from importlib import resources
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar, cast

import hydra
from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import env_override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gpt2exp import choices
from gpt2exp.config import RunConfig
from gpt2exp.files import replacing
from gpt2exp.run import process, record, secret, tracking
from gpt2exp.schema import explain, group_of, keys, kind_of, leaves, parse, plain, put, refuse
from gpt2exp.section import CHOICES, TARGET, BadRequest, Section, home, typed
from gpt2exp.sweep import engines

CONF = "gpt2exp.conf"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
SECTIONS = [item.name for item in fields(RunConfig)]
SectionT = TypeVar("SectionT", bound=Section)


def register() -> None:
    """Make the schema and the resolvers of conf/ known to Hydra; every process that runs a job calls this."""
    schema = copy.deepcopy(_schema())
    schema.wandb.update(tracking.defaults())
    ConfigStore.instance().store("schema", node=schema)
    # two launches in the same second get two folders
    resolvers = {"folder_name": lambda: f"{datetime.now():%Y-%m-%d/%H-%M-%S}-{token_hex(2)}", **engines.resolvers()}
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, use_cache=name == "folder_name", replace=True)


@functools.cache
def _schema() -> DictConfig:
    """The schema, without defaults from the environment. Also registers the schema of each choice with Hydra."""
    schema = OmegaConf.structured(RunConfig)
    for section, ours in CHOICES.items():
        OmegaConf.update(schema, section, OmegaConf.structured(kind_of(section)), merge=False)  # takes any choice
        for name, choice in ours.items():
            node = OmegaConf.structured(choice)
            OmegaConf.set_struct(node, True)
            ConfigStore.instance().store(f"{name}_schema", group=group_of(section), node=node)
    for section in choices.LEADING:  # the keys of a choice from outside are not known before its code is loaded
        OmegaConf.set_struct(OmegaConf.select(schema, section), False)
    return cast(DictConfig, schema)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line with Hydra's parser; BadRequest for an unknown flag."""
    parser = process.strict(get_args_parser(), "gpt2exp")
    parser.add_argument("--trust", action="store_true", help="run the code that the folder of resume= names")
    return parser.parse_args([_located(word) for word in argv])


def _located(word: str) -> str:
    """The path of a package folder given in Hydra's way, such as pkg://gpt2exp.examples."""
    found = re.fullmatch(r"(--config-dir=)?pkg://(gpt2exp\.\w+)", word)
    package = importlib.util.find_spec(found[2]) if found else None
    return f"{found[1] or ''}{Path(package.origin).parent}" if found and package and package.origin else word


@dataclass(frozen=True)
class Job:
    """One run of a request."""

    overrides: tuple[str, ...]
    config: RunConfig
    unresolved: dict[str, Any] | None = None  # `config` before interpolation, for the folder; None: it is written there
    hydra: dict[str, Any] = field(default_factory=dict)  # Hydra's section, for the folder; empty: it is written there
    folder: str = ""  # its name in the sweep's folder; empty for a run alone, and for what a sweeper has yet to propose
    reused: dict[str, Any] = field(default_factory=dict)  # an earlier run taken as this one: see `reuse.found`
    done: bool = False  # it ended in an earlier launch, and is not run again


class Composer:
    """Hydra's loader over the packaged configuration and `--config-dir`."""

    def __init__(self, path: Any, name: str, folder: Path | None = None) -> None:
        self.loader, self.name, self.folder = ConfigLoaderImpl(path), name, folder

    def offered(self, group: str) -> list[str]:
        """The choices of a group by name; of `experiment` also those a folder below: `weight_tying/gpt2`."""
        options = self.loader.repository.get_group_options  # the loader's own method copies all groups at each call
        names = [name for name in options(group) if not name.endswith("_schema")]
        below = options(group, ObjectType.GROUP) if group == "experiment" else []
        return names + [f"{folder}/{name}" for folder in below for name in options(f"{group}/{folder}")]

    def may_have(self, key: str) -> bool:
        """Whether a key may be an argument of code that a choice of its section names by `_target_`."""
        section, _, name = key.rpartition(".")
        known = section in choices.LEADING and kind_of(section).__dataclass_fields__
        if not known or name in known:
            return False
        places = [Path(str(resources.files(CONF))), *([self.folder] if self.folder else [])]
        files = itertools.chain.from_iterable((place / group_of(section)).glob("*.yaml") for place in places)
        return any(TARGET.encode() in path.read_bytes() for path in files)

    def compose(self, texts: Sequence[str], *, multirun: bool = False) -> DictConfig:
        """Compose a command line; keys with several values keep their defaults."""
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        load = functools.partial(self.loader.load_configuration, self.name, run_mode=mode)
        return self._with_schedule(functools.partial(load, validate_sweep_overrides=False), texts)

    def _with_schedule(self, load: Callable[[list[str]], DictConfig], texts: Sequence[str]) -> DictConfig:
        """Compose, with the file of the group `schedule` that `optimizer.schedule` names, if there is one."""
        composed = load(list(texts))
        named = composed.optimizer.schedule
        known = [] if "${" in named else self.offered("schedule")
        return load([*texts, f"schedule={named}"]) if named in known else composed

    def jobs(self, master: DictConfig, jobs: Iterable[Sequence[str]]) -> Iterator[Job]:
        """The jobs of a sweep, from the overrides of each."""
        read = functools.cache(OverridesParser.create().parse_override)
        files = {"optimizer.schedule"} if self.offered("schedule") else set[str]()
        simple, bases = set(keys()) - files, dict[tuple[str, ...], _Base]()
        load = functools.partial(self.loader.load_sweep_config, master)
        for texts in jobs:
            overrides = [read(text) for text in texts]
            values = {one.key_or_group: one.value() for one in overrides if _is_plain(one, simple)}
            shape = *values, *(text for text, one in zip(texts, overrides, strict=True) if not _is_plain(one, simple))
            if shape not in bases:
                bases[shape] = _Base(identified(self._with_schedule(load, texts)), values)
            yield bases[shape].job(overrides, values)


def _is_plain(override: Override, simple: set[str]) -> bool:
    """Whether an override gives one of these keys a value, and does nothing else."""
    known = override.type is OverrideType.CHANGE and override.package is None and override.key_or_group in simple
    return known and "${" not in str(override.input_line) and override.value() != "???"


class _Base:
    """A job that Hydra composed. `job` makes others with the same groups and keys by changing its values."""

    def __init__(self, composed: DictConfig, values: dict[str, Any]) -> None:
        self.values, self.config, self.hydra = values, checked(composed), as_plain(composed.hydra)
        # what is left out depends on this job's overrides, and Hydra 1.4 has it no longer
        self.hydra["job"] = {key: self.hydra["job"][key] for key in ("name", "chdir", "env_set", "env_copy")}
        self.unresolved = _without_hydra(composed)
        values_now = as_plain(self.unresolved)
        self.outside = bool(choices.found_in(values_now))
        """Whether it has a choice from outside: then `unresolved` has no types, but `config` has."""
        self.following = [key for key, value in leaves(values_now).items() if "${" in str(value)]
        self.following += ["train.grad_accum_steps"]  # set by train.tokens_per_step
        """Keys whose values follow those of other keys."""

    def job(self, overrides: Sequence[Override], values: dict[str, Any]) -> Job:
        """The job with these values, of the same keys as the base's."""
        changed = {key: value for key, value in values.items() if repr(value) != repr(self.values[key])}
        for key, value in changed.items():
            value = _of_type(self.config, key, value) if self.outside else value
            OmegaConf.update(self.unresolved, key, value, merge=True)
        self.values = values
        live = {key: _value(self.unresolved, key) for key in (*changed, *self.following)}
        secret.check_values(live)
        self.config = with_values(self.config, live)
        told = (str(override.input_line) for override in overrides if not override.is_hydra_override())
        return Job(tuple(told), self.config, as_plain(self.unresolved), self.hydra)


def _of_type(config: RunConfig, key: str, value: object) -> Any:
    """A value converted to its key's type: 1 to 1.0 for a float."""
    *sections, name = key.split(".")
    node = schema_of(type(functools.reduce(getattr, sections, config)))
    OmegaConf.update(node, name, value)
    return _value(node, name)


schema_of: Callable[[Any], Any] = functools.cache(OmegaConf.structured)
"""A section's class as a node of OmegaConf, which checks values written to it. The values it holds do not matter."""


def _value(tree: DictConfig, key: str) -> Any:
    found: Any = OmegaConf.select(tree, key)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found


def with_values(section: SectionT, values: dict[str, Any]) -> SectionT:
    """A configuration with other values by dotted key, checked anew."""
    here = {key: value for key, value in values.items() if "." not in key}
    for name in {key.partition(".")[0] for key in values if "." in key}:
        inside = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        here[name] = with_values(getattr(section, name), inside)
    return replace(section, **here) if here else section


def checked(composed: DictConfig) -> RunConfig:
    """The checked configuration of one run; BadRequest if it cannot be carried out, or holds a credential."""
    ours = _without_hydra(composed)
    choices.admit(as_plain(ours))
    parsed = parse(ours)
    secret.check_values(plain(parsed))
    return parsed


def _without_hydra(composed: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's section."""
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def job_of(composed: DictConfig, overrides: Iterable[str]) -> Job:
    """The job of one composed configuration that has Hydra's section."""
    return Job(tuple(overrides), checked(composed), as_plain(_without_hydra(composed)), as_plain(composed.hydra))


def identified(composed: DictConfig) -> DictConfig:
    """The configuration, each choice from outside with its file's name and the path and sha256 of its code.

    If there is such a choice the result has no types; `checked` gives each section its own.
    """
    values = as_plain(_without_hydra(composed))
    outside = choices.found_in(values)
    if not outside:
        return composed
    made = composed.hydra.runtime.choices
    for section, chosen in outside.items():
        described = choices.describe(section, chosen, str(made.get(group_of(section))))
        put(values, section, {**chosen, **described})
    result = OmegaConf.create(values)
    OmegaConf.copy_cache(from_config=composed, to_config=result)
    result.hydra = composed.hydra
    OmegaConf.set_struct(result, True)
    return result


def as_plain(composed: Any) -> dict[str, Any]:
    """A configuration as dicts, lists and values, interpolations unresolved."""
    return cast("dict[str, Any]", OmegaConf.to_container(composed, resolve=False, enum_to_str=True))


def is_hydra(key: str) -> bool:
    """Whether a key or group is Hydra's own."""
    return re.split(r"[./]", key.lstrip("+~"), maxsplit=1)[0] == "hydra"


@contextlib.contextmanager
def open_composer(args: argparse.Namespace) -> Iterator[Composer]:
    """Open Hydra's loader; Hydra's errors inside the block become a `BadRequest`."""
    _check_flags(args)
    register()  # again, since the environment may have changed
    folder = config_folder(args)
    try:
        # without version_base Hydra 1.3 behaves as 1.1; 1.4 has no such argument: delete it here and in call_hydra
        with initialize_config_module(CONF, version_base="1.3", job_name="gpt2exp"):
            path = create_config_search_path(f"pkg://{CONF}")
            if folder:  # as Hydra's main does, after ours, so that its groups add choices
                path.prepend("command-line", f"file://{folder}", anchor="schema")
            yield Composer(path, args.config_name or "config", folder)
    except (HydraException, OmegaConfBaseException) as error:
        choice = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
        if remedy := engines.install_hint(choice or ""):
            raise BadRequest(f"{choice}: that plugin of Hydra's is not installed; {remedy}") from error
        text = explain(error)
        unknown = re.match(r"Could not override '([\w.]+)'.*=(\S*)", text)
        if unknown and not is_hydra(unknown[1]):
            refuse(unknown[1], unknown[2])
        found = re.match(r"In '((\w+)/[^']+)': .*Key '(\w+)' not in '\w+'", text)
        if found and found[3] in ("hydra", found[2], *SECTIONS):
            why = f"its keys land in {found[2]}, which has no {found[3]}"
            text = f"{found[1]}.yaml: {why}; begin the file of a study with the line # @package _global_"
        raise BadRequest(text) from error
    except (YAMLError, UnicodeDecodeError) as error:  # a file of the user's own
        where = f"--config-dir {args.config_dir}" if args.config_dir else "hydra.searchpath"
        why = " ".join(str(error).split())
        raise BadRequest(f"{where}: {why}; mend that file: it must be plain YAML in UTF-8") from error


def config_folder(args: argparse.Namespace) -> Path | None:
    """The folder of `--config-dir`, if there is one."""
    if not args.config_dir:
        return None
    folder = Path(home(args.config_dir)).absolute()
    if not folder.is_dir():
        raise BadRequest(f"--config-dir {args.config_dir}: no such folder; name a folder of YAML files")
    return folder


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of Hydra's that cannot be carried out here, or not together."""
    asked = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(args, name)]
    shaping = [f"--{name}" for name in ("package", "resolve") if getattr(args, name)]
    for refused, why in (
        (args.experimental_rerun, "--experimental-rerun: reads a pickle, which can run any code; repeat the overrides"),
        (args.config_path, f"--config-path {args.config_path}: hides the shipped groups; add yours with --config-dir"),
        (len(asked) > 1, f"{' '.join(asked)}: cannot be asked for together; leave out all but one"),
        (shaping and not args.cfg, f"{' '.join(shaping)}: shapes what --cfg prints; add --cfg job"),
    ):
        if refused:
            raise BadRequest(why)


# --- a run's .hydra --------------------------------------------------------------------------------------------------


def write_hydra_folder(folder: Path, job: Job, place: Path | None = None) -> None:
    """Write a job's `.hydra` as Hydra would, unless it is written; `config.yaml` last: a folder with it is a run's.

    `place`: where the folder will lie, if not where it is.
    """
    if job.unresolved is None:
        return
    overrides = OmegaConf.to_yaml(OmegaConf.create(list(job.overrides)))
    texts = {"overrides.yaml": overrides, "config.yaml": _yaml(job.unresolved)}
    if job.hydra:
        of_job = {
            "overrides": job.hydra["overrides"] | {"task": [text for text in job.overrides if not is_hydra(text)]},
            "runtime": job.hydra["runtime"] | {"output_dir": str((place or folder).absolute())},
        }
        texts = {"hydra.yaml": f"hydra:\n{textwrap.indent(_yaml(job.hydra | of_job), '  ')}"} | texts
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with replacing(folder / ".hydra" / name) as part:
            part.write_text(text, encoding="utf-8")


def _yaml(tree: dict[str, Any]) -> str:
    return "".join(_section(json.dumps({key: value})) for key, value in tree.items())


@functools.lru_cache(1024)
def _section(text: str) -> str:  # cached: most sections are the same in all jobs of a sweep, and YAML is slow
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(text)))


# --- what Hydra still runs: launchers, sweepers, its own flags -------------------------------------------------------


JOB = "gpt2exp_job"  # the key under which a launcher's configuration holds the job


class _Listed:
    """Takes the place of Hydra's loader in a launcher. The one override of a job is the whole job, as JSON."""

    def load_sweep_config(self, master: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        config = copy.deepcopy(master)
        with open_dict(config):
            config[JOB] = sweep_overrides[0].encode()  # bytes: nothing in them is an interpolation
        return config


def start_launcher(master: DictConfig, folder: Path, jobs: Sequence[Job], run_job: Callable[[DictConfig], Any]) -> None:
    """Have the launcher that `master` names call `run_job` for each job of the sweep in `folder`."""
    with open_dict(master):
        master.hydra.sweep.dir = str(folder.absolute())  # a worker may start elsewhere
        master.hydra.output_subdir = None  # we write the folders' `.hydra`
    context = HydraContext(_Listed(), Callbacks())  # type: ignore[arg-type]
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=run_job, config=master)
    handing = ("overrides", "unresolved", "hydra", "folder", "reused")
    as_override = [[json.dumps({name: getattr(job, name) for name in handing})] for job in jobs]
    for done in launcher.launch(as_override, initial_job_idx=0):
        done.return_value  # noqa: B018 - raises what ended the job


def job_from_hydra(cfg: DictConfig, sweep: Path) -> Job:
    """The job in the configuration with which a launcher or a sweeper calls; a sweeper's has no folder yet."""
    choices.trust()  # the process that launched the sweep has checked what may run
    if JOB in cfg:
        handed = json.loads(cfg[JOB])
        values = handed["unresolved"]
        config = checked(OmegaConf.create(values)) if values else record.read_config(sweep / handed["folder"])[0]
        return Job(config=config, **handed | {"overrides": tuple(handed["overrides"])})
    if known := record.Sweep.read(sweep):
        mine = arguments(known.argv).config_dir
        choices.allow(Path(known.cwd, mine) if mine else None, known.cwd)
    composed, settings = identified(cfg), as_plain(HydraConfig.instance().cfg)["hydra"]
    return Job(tuple(HydraConfig.get().overrides.task), checked(composed), as_plain(composed), settings)


def call_hydra(argv: Sequence[str], run_job: Callable[[DictConfig], Any], sweep: Path | None = None) -> None:
    """Run Hydra's own main: it prints what its flags ask, or runs a sweeper, which calls `run_job` for each job.

    Its exceptions are raised here; they do not end the process.
    """
    pins = [] if sweep is None else [typed("hydra.sweep.dir", sweep.absolute()), "hydra.output_subdir=null"]
    before = list(sys.argv)
    sys.argv[1:] = [*map(_located, argv), *pins]
    try:
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            hydra.main(config_path=f"pkg://{CONF}", config_name="config", version_base="1.3")(run_job)()
    finally:
        sys.argv = before


register()
