"""What a command line asks for: the jobs, each composed and checked, and the folder they go to.

Hydra writes a run's folder before it calls the program, and composes a sweep's jobs one batch at a time. Here the
whole request is composed first, with Hydra's own loader, so that a mistake in the last job of a sweep is answered in
a second, with nothing written. No torch.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import errno
import itertools
import json
import os
import re
import secrets
import shlex
import shutil
import time
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from gpt2exp.config import (
    CHOICES,
    BadRequest,
    InitConfig,
    InitScheme,
    RunConfig,
    check_key,
    choices_with,
    default_of,
    explain,
    home,
    keys,
    owner,
    parse,
    plain,
    quoted,
    require,
    show,
    typed,
)
from gpt2exp.files import beside, replacing, write_json
from gpt2exp.run import process, secret, tracking
from gpt2exp.run.record import SWEEP
from gpt2exp.sweep import engines

CONF = "gpt2exp.conf"
SECTIONS = [field.name for field in dataclasses.fields(RunConfig)]
SUBDIR = "${job_folder:${hydra.sweep.dir},${hydra.job.num},${hydra.overrides.task}}"
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def register() -> None:
    """Make the schema and the folder names known to Hydra; every process that runs a job calls this."""
    schema = OmegaConf.structured(RunConfig)
    schema.wandb.update(tracking.defaults())
    for section, choices in CHOICES.items():
        schema[section] = OmegaConf.structured(typing.get_type_hints(RunConfig)[section])  # any choice can be merged
        for name, choice in choices.items():
            ConfigStore.instance().store(f"{name}_schema", group=section, node=choice)
    ConfigStore.instance().store("schema", node=schema)
    OmegaConf.register_new_resolver("folder_name", folder_name, use_cache=True, replace=True)
    OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
    for name, share in engines.shares().items():
        OmegaConf.register_new_resolver(name, share, replace=True)


def folder_name() -> str:
    """Day, time and four random hex digits: two launches in the same second get two folders."""
    return f"{datetime.now():%Y-%m-%d/%H-%M-%S}-{secrets.token_hex(2)}"


def job_folder(sweep: str, number: int, overrides: Sequence[str]) -> str:
    """The folder of a job in its sweep: the one its `sweep.json` names, else by number and what the sweeper chose."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        request = json.loads((Path(sweep) / SWEEP).read_text(encoding="utf-8"))
        if "folders" in request:
            return str(request["folders"][int(number)])
        overrides = [text for text in overrides if text not in request["jobs"][0]]  # those are the same in every job
    return numbered(int(number), ",".join(sorted(overrides)))


def numbered(number: int, overrides: str) -> str:
    """`NUM_slug`, such as `003_precision=tf32,seed=2`."""
    slug = re.sub(r"[^\w.=,+-]+", "_", overrides).strip("_.")[:100]
    return f"{number:03d}_{slug}" if slug else f"{number:03d}"


@dataclass(frozen=True)
class Job:
    """One run of a request."""

    overrides: tuple[str, ...]
    config: RunConfig
    folder: str = ""
    """Its name in the sweep's folder; empty for a run alone, and where a sweeper makes up the jobs as it goes."""
    done: bool = False
    """An earlier launch came to its end: it is kept and not run again."""


@dataclass(frozen=True)
class Plan:
    """A checked request: its jobs, whether they form a sweep, and where the results go."""

    jobs: tuple[Job, ...]
    multirun: bool
    folder: Path
    local: bool
    """The jobs run on this machine, one after another."""

    texts: tuple[str, ...] = ()
    """The overrides for Hydra's command line."""
    composed: DictConfig | None = None
    """Of a run alone: its configuration, Hydra's section with it."""
    resumed: bool = False
    """The folder is there, and is gone on with."""
    cwd: Path | None = None
    """Where the relative paths of the configuration start, if not here."""
    config_dir: str | None = None
    """The `--config-dir` that the request was first made with."""
    notes: tuple[str, ...] = ()
    """What the user should know before it begins."""
    launcher: DictConfig | None = None
    """Of a sweep: what starts its jobs, and the settings of it."""

    @property
    def names(self) -> list[str]:
        """The folders of a sweep's jobs, by number; empty where a sweeper makes up the jobs as it goes."""
        return [job.folder for job in self.jobs if job.folder]

    @property
    def pins(self) -> list[str]:
        """Overrides for Hydra's command line: the folders, which it would draw anew, and that we write `.hydra`."""
        folder = self.folder if self.local else self.folder.absolute()  # a worker may start elsewhere
        pins = [typed(f"hydra.{'sweep' if self.multirun else 'run'}.dir", folder), "hydra.output_subdir=null"]
        if self.resumed:  # its jobs have their names from us
            pins.append(f"hydra.sweep.subdir='{SUBDIR}'")
        return pins


@contextlib.contextmanager
def composing(args: argparse.Namespace) -> Iterator[ConfigLoaderImpl]:
    """Hydra's loader over the packaged configuration and `--config-dir`; its errors become a `BadRequest`."""
    _check_flags(args)
    register()  # the environment may have changed since
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise BadRequest(f"--config-dir {args.config_dir}: no such folder; name a folder of YAML files")
    try:
        # Hydra 1.3 takes a missing version_base for 1.1's ways; 1.4 wants it gone: then delete it here and in launch
        with initialize_config_module(CONF, version_base="1.3", job_name="gpt2exp"):
            path = create_config_search_path(f"pkg://{CONF}")
            if args.config_dir:  # as Hydra's main does, after ours, so that its groups add choices
                path.prepend("command-line", f"file://{Path(args.config_dir).absolute()}", anchor="schema")
            yield ConfigLoaderImpl(path)
    except (HydraException, OmegaConfBaseException) as error:
        choice = error.missing_cfg_file if isinstance(error, MissingConfigException) else None
        if remedy := engines.missing(choice or ""):
            raise BadRequest(f"{choice}: that plugin of Hydra's is not installed; {remedy}") from error
        text = explain(error)
        if not_there := re.match(r"Could not override '([\w.]+)'", text):
            key = not_there[1]
            if names := choices_with(key):
                why = f"a key of {key.rpartition('.')[0]}={' and '.join(names)} alone"
                raise BadRequest(f"{key}: {why}; leave it out, or make that choice") from error
        found = re.match(r"In '((\w+)/[^']+)': .*Key '(\w+)' not in '\w+'", text)
        if found and found[3] in ("hydra", found[2], *SECTIONS):
            why = f"its keys land in {found[2]}, which has no {found[3]}"
            text = f"{found[1]}.yaml: {why}; begin the file of a study with the line # @package _global_"
        raise BadRequest(text) from error
    except (YAMLError, UnicodeDecodeError) as error:  # a file of the user's own
        where = f"--config-dir {args.config_dir}" if args.config_dir else "hydra.searchpath"
        why = " ".join(str(error).split())
        raise BadRequest(f"{where}: {why}; mend that file: it must be plain YAML in UTF-8") from error


def make(args: argparse.Namespace) -> Plan:
    """The plan behind Hydra's parsed command line.

    Raises:
        BadRequest: anything in the request that cannot be carried out.
    """
    with composing(args) as loader:
        check(loader, read(loader, args.overrides))
        return compose(loader, args.config_name or "config", args.overrides, multirun=args.multirun)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of Hydra's that cannot be carried out here, or not together."""
    if args.experimental_rerun:
        raise BadRequest("--experimental-rerun: reads a pickle, which can run any code; repeat the run's overrides")
    if args.config_path:
        raise BadRequest(f"--config-path {args.config_path}: hides the shipped groups; add yours with --config-dir")
    modes = {"--run": args.run, "--multirun": args.multirun, "--cfg": args.cfg, "--info": args.info}
    asked = [flag for flag, given in modes.items() if given]
    if len(asked) > 1:
        raise BadRequest(f"{' '.join(asked)}: cannot be asked for together; leave out all but one")
    for flag, given in (("--package", args.package), ("--resolve", args.resolve)):
        if given and not args.cfg:
            raise BadRequest(f"{flag}: shapes what --cfg prints; add --cfg job")


OUTPUT = ("hydra.run.dir", "hydra.sweep.dir")
PLACES = ("data.path", "init.path", "resume", "wandb.dir")
ELEMENT = re.compile(r"""'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|[^][(),'"]+""")


def as_meant(text: str) -> str:
    """An argument of the command line in Hydra's grammar, where that would read a name as something else.

    `wandb.name=2024_01_15` would be the number 20240115, `resume=None` a folder called None, `hydra.run.dir=~/x` an
    error, and a comma in the name of a file that is there would part it in two. What is quoted stays as it is.
    """
    key, _, value = text.partition("=")
    bare = key.lstrip("+")
    if not value or "${" in value or value[0] in "'\"" or bare not in (*OUTPUT, *keys()):
        return text
    parser = OverridesParser.create()
    if bare in OUTPUT or (bare in PLACES and value != "null" and os.path.exists(home(value))):  # noqa: PTH110
        with contextlib.suppress(HydraException):
            read = parser.parse_override(text)
            if not read.is_sweep_override() and read.value() == value:
                return text
        return f"{key}={quoted(value)}"
    expected = kinds(bare)

    def name(found: re.Match[str]) -> str:
        part = found[0].strip()
        if part == "None" and type(None) in expected:
            return "null"
        try:
            number = parser.parse_rule(part, "primitive")
        except HydraException:
            return found[0]
        otherwise = isinstance(number, int | float) and str(number) != part and is_text(expected)
        return quoted(part) if otherwise else found[0]

    value = ELEMENT.sub(name, value)
    try:
        parser.parse_override(f"{key}={value}")
    except HydraException:  # a character that the grammar does not know
        return f"{key}={quoted(value)}" if is_text(expected) and not set(value) & set(",[{") else text
    return f"{key}={value}"


def check(loader: ConfigLoader, overrides: Sequence[Override]) -> None:
    """Refuse an override that cannot be right; BadRequest."""
    for override in overrides:
        _check(loader, override)


def read(loader: ConfigLoader, texts: Sequence[str]) -> list[Override]:
    """Overrides as typed; BadRequest for a text that is none."""
    parser = OverridesParser.create(config_loader=loader)
    overrides = []
    for text in texts:
        try:
            parsed = parser.parse_overrides([text])
            if not parsed[0].key_or_group:
                raise HydraException("no key")
            overrides += parsed
        except HydraException as error:
            hint = f"write KEY=VALUE, and quote values with special characters: {example(text)}"
            raise BadRequest(f"{text}: cannot be read as an override; {hint}") from error
    return overrides


def example(text: str) -> str:
    """An override with its value quoted, to be pasted into a shell."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        key, value = "data.path", "my file.txt"
    return shlex.quote(f"{key}={quoted(value)}" if set(value) & set('"\\') else f'{key}="{value}"')


def values(override: Override) -> list[Any]:
    """What an override gives its key: the choices of a list, or the one."""
    return list(override.sweep_iterator()) if override.is_discrete_sweep() else [override.value()]


def _check(loader: ConfigLoader, override: Override) -> None:
    """Refuse an override whose key, choice or type is wrong, with a line better than the composer's."""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        if override.is_choice_sweep():
            raise BadRequest(f"{override.input_line}: a sweep has one {key}; name one, quoted if it holds a comma")
        return
    choices = [name for name in loader.get_group_options(key) if not name.endswith("_schema")]
    group, _, part = key.rpartition(".")
    if group in CHOICES and part == "name":
        name = show(override.value())
        raise BadRequest(f"{key}={name}: a choice brings keys of its own; write {group}={name}")
    if override.type is OverrideType.DEL:
        raise BadRequest(f"~{key}: a key cannot be deleted; give it another value instead: {key}=VALUE")
    if override.is_sweep_override() and not override.is_discrete_sweep():
        return  # intervals and the like belong to another sweeper, which checks them
    for value in values(override):
        if choices:
            _check_choice(key, value, choices)
        else:
            check_key(key, value)
            _check_type(key, value)
        if override.is_add() and (not choices or key in (*SECTIONS, "experiment")):
            again = shlex.quote((override.input_line or "").lstrip("+"))
            raise BadRequest(f"+{key}={show(value)}: the key is there already; leave out the +: {again}")


def _check_choice(group: str, value: Any, choices: list[str]) -> None:
    if isinstance(value, (dict, list)) or str(value) not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {group}={near[0]}? Choices: " if near else "choose one of "
        raise BadRequest(f"{group}={show(value)}: no such choice; {hint}{', '.join(choices)}")


def _check_type(key: str, value: Any) -> None:
    if isinstance(value, str) and "${" in value:
        return  # an interpolation: its type shows once composed
    expected = kinds(key)
    section, name = owner(key)
    default = default_of(section.__dataclass_fields__[name])
    try:
        if isinstance(value, bool) and not {bool, str} & set(expected):
            raise ValueError("a bool is no number")
        if isinstance(value, (int, float)) and expected == (bool,) and value not in (0, 1):
            raise ValueError("a number is no bool")
        OmegaConf.update(OmegaConf.structured(section), name, value)
    except (OmegaConfBaseException, ValueError) as error:
        shown = show(default)
        for kind in expected:
            if isinstance(kind, type) and issubclass(kind, Enum):
                raise BadRequest(f"{key}={show(value)}: no such value; choose one of {', '.join(kind)}") from error
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        wanted = names.get(expected[0], f"a list, such as {key}={shown}") + " or auto" * (expected[1:] == (str,))
        raise BadRequest(f"{key}={show(value)}: must be {wanted}; the default is {shown}") from error


def kinds(key: str) -> tuple[Any, ...]:
    """The types that a key of the schema takes, None's among them where it may be null."""
    section, name = owner(key)
    hint = typing.get_type_hints(section)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def is_text(kinds: tuple[Any, ...]) -> bool:
    """Whether a key of these types holds a text of the user's, or several; `auto` beside a number is none."""
    return list[str] in kinds or (str in kinds and not {int, bool} & set(kinds))


def compose(loader: ConfigLoaderImpl, name: str, texts: Sequence[str], *, multirun: bool) -> Plan:
    """The plan of overrides that were checked one by one."""
    texts = list(texts)
    master = loader.load_configuration(name, texts, run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False)
    multirun = multirun or master.hydra.mode == RunMode.MULTIRUN
    for override in read(loader, texts):
        if override.is_sweep_override():
            _check_several(loader, name, override, multirun=multirun)
    if not multirun and (brought := preset(master)):
        raise BadRequest(f"{' '.join(brought)}: the axes of a study or a sweeper make a sweep; add -m")
    secret.check_values(OmegaConf.to_container(master.hydra, resolve=False), "hydra")
    _check_hydra(master.hydra)
    # an interpolation in hydra.run.dir may name hydra.job.*, so resolve within the whole configuration
    folder = Path(home(str(master.hydra.sweep.dir if multirun else master.hydra.run.dir)))
    composed = None
    if multirun and master.hydra.sweeper._target_ == BASIC_SWEEPER:
        jobs = tuple(_jobs(loader, master, axes(loader, [*preset(master), *texts])))
    else:
        kept = [override.input_line or "" for override in read(loader, texts) if not override.is_sweep_override()]
        composed = loader.load_configuration(name, kept, run_mode=RunMode.RUN)
        jobs = (Job(tuple(texts), _run_config(composed)),)
    if not multirun or jobs[0].folder:  # all the jobs are known
        _check_path_used([job.config.init for job in jobs])
    if not multirun:
        return Plan(jobs, multirun, folder, True, tuple(texts), composed)
    launcher = master.hydra.launcher
    for job in jobs:
        engines.check(launcher, job.config.train.device)
    return Plan(jobs, multirun, folder, launcher._target_ == engines.BASIC, tuple(texts), launcher=launcher)


def _check_several(loader: ConfigLoaderImpl, name: str, override: Override, *, multirun: bool) -> None:
    """Refuse several values of a key that has one, and of a group whose files are sweeps: a job takes no axes along."""
    key, text = override.key_or_group, str(override.input_line)
    group = not key.startswith("hydra/") and key not in SECTIONS and loader.get_group_options(key)
    for value in values(override) if group and override.is_discrete_sweep() else ():
        one = f"{override.get_key_element()}={value}"
        if preset(loader.load_configuration(name, [one], run_mode=RunMode.MULTIRUN)):
            raise BadRequest(f"{text}: each is a sweep of its own; start one at a time, such as gpt2exp {one}")
    if not multirun:
        remedy = "add -m to run every one of them"
        if key in keys() and is_text(kinds(key)):
            remedy += f", or quote a comma that is part of it: {example(text)}"
        raise BadRequest(f"{text}: several values make a sweep; {remedy}")


def _check_path_used(inits: Sequence[InitConfig]) -> None:
    """Refuse an `init.path` that no job reads; in a sweep over `init` it is for the arm that does."""
    if any(init.scheme is InitScheme.pretrained for init in inits):
        return
    for init in inits:
        why = f"init={show(init.scheme)} draws its weights"
        require(init.path is None, "init.path", init.path, why, "add init=pretrained")


def _check_hydra(settings: DictConfig) -> None:
    """Refuse settings of Hydra's own under which no run could be kept or begun."""
    place = settings.output_subdir
    require(place == ".hydra", "hydra.output_subdir", place, "a run is known by its folder .hydra", "leave it out")
    why, remedy = "relative paths would start in the run's folder", "leave it out, and set hydra.run.dir"
    require(not settings.job.chdir, "hydra.job.chdir", settings.job.chdir, why, remedy)
    known = sorted(Plugins.instance().class_name_to_class)
    for part in ("launcher", "sweeper"):
        target = settings[part]._target_
        there = [name for name in known if part in name.rpartition(".")[2].lower()]
        why, remedy = f"no such {part} is installed", f"choose one of {', '.join(there)}"
        require(target in known, f"hydra.{part}._target_", target, why, remedy)


def preset(master: DictConfig) -> list[str]:
    """The axes that a study brings along, as overrides."""
    return [f"{key}={value}" for key, value in (master.hydra.sweeper.params or {}).items()]


def axes(loader: ConfigLoader, texts: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of a basic sweep by key: one for a constant, several for an axis; of two for a key the later."""
    found: dict[str, list[str]] = {}
    for override in read(loader, texts):
        _check(loader, override)
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                reason = "the basic sweeper takes lists, choice(...) and range(...)"
                raise BadRequest(f"{override.input_line}: {reason}; write {key}=A,B")
            found[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            found[key] = [f"{key}={override.get_value_element_as_str()}"]
    return found


def _jobs(loader: ConfigLoader, master: DictConfig, axes: dict[str, list[str]]) -> Iterator[Job]:
    """Every combination of the axes, in the order in which Hydra's BasicSweeper runs them."""
    constant = {key.lstrip("+") for key, values in axes.items() if len(values) == 1}
    places: set[str] = set()
    for number, combination in enumerate(itertools.product(*axes.values())):
        config = loader.load_sweep_config(master, list(combination))
        with open_dict(config):
            config.hydra.job.num = number
        place = str(config.hydra.sweep.subdir)
        why = "two jobs of the sweep would share a folder"
        require(place not in places, "hydra.sweep.subdir", place, why, "leave it out, or name ${hydra.job.num} in it")
        places.add(place)
        task = tuple(text for text in combination if not text.lstrip("+").startswith(("hydra.", "hydra/")))
        told = sorted(text for text in task if text.lstrip("+").partition("=")[0] not in constant)
        yield Job(task, _run_config(config), numbered(number, ",".join(told)))


def _run_config(config: DictConfig) -> RunConfig:
    parsed = parse({str(key): config._get_node(key) for key in config if key != "hydra"})
    secret.check_values(plain(parsed))
    return parsed


@contextlib.contextmanager
def claimed(plan: Plan, argv: Sequence[str]) -> Iterator[None]:
    """The plan's folder is this process's inside the block; it holds the request: `sweep.json`, or a run's `.hydra`.

    Raises:
        BadRequest: a new folder holds something already or cannot be created; another process is at work on an old one.
    """
    if not plan.resumed:
        try:
            _create(plan, argv)
        except OSError as error:
            key = f"hydra.{'sweep' if plan.multirun else 'run'}.dir"
            why, remedy = error.strerror or str(error), "choose a folder that can be written"
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                why, remedy = "already holds files, and results are never overwritten", "choose a new folder"
            raise BadRequest(f"{key}={plan.folder}: {why}; {remedy}") from error
    with process.held(plan.folder):
        if plan.resumed:
            _write_request(plan, argv, plan.folder)
        yield


def _create(plan: Plan, argv: Sequence[str]) -> None:
    """Make the folder with the request in it, in one act: nobody sees, or is left with, a folder without one."""
    if plan.folder.exists():
        if any(plan.folder.iterdir()):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        _write_request(plan, argv, plan.folder)
        return
    folder = plan.folder.absolute()
    part = beside(folder)
    try:
        part.mkdir(parents=True)
        _write_request(plan, argv, part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_request(plan: Plan, argv: Sequence[str], folder: Path) -> None:
    if plan.multirun:
        request: dict[str, Any] = {"argv": list(argv), "cwd": str(plan.cwd or Path.cwd()), "launched": time.time()}
        request["jobs"] = [list(job.overrides) for job in plan.jobs]
        if plan.names:
            request["folders"] = plan.names
        write_json(folder / SWEEP, request)
    elif plan.composed is not None:
        hydra = OmegaConf.masked_copy(plan.composed, ["hydra"]) if "hydra" in plan.composed else None
        describe(folder, plan.composed, plan.texts, hydra)


def describe(folder: Path, composed: DictConfig, overrides: Sequence[str], hydra: DictConfig | None) -> None:
    """Write a run's `.hydra` as Hydra would, but each file whole, and last the one that makes a folder a run's."""
    texts = {} if hydra is None else {"hydra.yaml": OmegaConf.to_yaml(hydra)}
    own = [str(key) for key in composed if key != "hydra"]
    texts["overrides.yaml"] = OmegaConf.to_yaml(OmegaConf.create(list(overrides)))
    texts["config.yaml"] = OmegaConf.to_yaml(OmegaConf.masked_copy(composed, own))
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        with replacing(folder / ".hydra" / name) as part:
            part.write_text(text, encoding="utf-8")


register()
