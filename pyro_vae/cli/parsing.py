"""Parses the arguments of a command; names of commands and options are checked first."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from pyro_vae import config
from pyro_vae.arguments import check_whole, closest
from pyro_vae.cli import COMMANDS, DATA, FAMILIES, PARTS
from pyro_vae.files import check_folder, reading

ERRORS = (ArgumentError, ValueError, OSError, FloatingPointError, NotImplementedError, ImportError)
OPTIONS = [option for command in COMMANDS.values() for option in command.options.items()]
FLAGS = {key[2:] for key, known in OPTIONS if known.get("type") in (bool, bool | None)}
SWITCHES = {key[2:] for key, known in OPTIONS if "action" in known} | {"help", "help_all"}
MEMORY_HINT = "ask for fewer rows at once, draws, classes or latents, or for narrower layers"
COLUMN = "--schema."  # before the name of a column, in which dots and dashes stay
MAX_MESSAGE = 1000  # most characters of an error message
MAX_VALUES = 10_000  # most values of a configuration file
TYPED_ONLY = ("config", "print_config")  # options that are typed, and never read from a file
NOT_IN_FILES = (*TYPED_ONLY, "run", "resume", "import")


def run(argv: list[str]) -> int:
    """Runs a command and returns its exit status; wrong input prints a line, not a traceback."""
    name, *rest = argv
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command{closest(name, COMMANDS)}: see pyro-vae --help")
        options = parse(name, rest)
        module, _, function = COMMANDS[name].function.partition(".")
        with _process_settings(options):
            getattr(import_module(f"pyro_vae.cli.{module}"), function)(options)
    except (*ERRORS, MemoryError, RuntimeError) as error:
        line = " ".join(str(error).partition("\nTrace Shapes:")[0].split())  # Pyro adds these
        if not isinstance(error, ERRORS):
            memory = isinstance(error, MemoryError) or "allocate" in line
            if not (memory or "out of memory" in line):
                raise
            line = f"this takes more memory than there is: {MEMORY_HINT}"
        line = config.plain_words(line)
        line = line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]}..."
        print(f"pyro-vae {name}: {line}", file=sys.stderr)
        return 2
    return 0


def parse(command: str, argv: list[str]) -> Namespace:
    """Returns the options of a command; `--help_all` prints help and exits.

    Raises:
        ValueError: If a name is unknown, with the closest known one, or a value does not fit.
    """
    argv = ["--help" if argument == "--help_all" else argument for argument in normalise(argv)]
    parser = make_parser(command)
    known = {*parser.get_defaults().keys(), "help"}
    for argument in argv:
        name, _, value = argument.partition("=")
        option = name.partition(".")[0]
        if option.startswith("--") and option[2:] not in known:
            hint = closest(option, [f"--{one}" for one in known])
            raise ValueError(f"there is no option {option}{hint}: see {parser.prog} --help")
        if name == "--import" and value:
            if os.getcwd() not in sys.path:  # console scripts do not import from here
                sys.path.insert(0, os.getcwd())
            import_module(value)
    return parser.parse_args(argv) if command != "train" else _parse_train(parser, argv)


def _parse_train(parser: ArgumentParser, argv: list[str]) -> Namespace:
    """Returns the options of `train` and of its classes; typed ones override those of files."""
    class_arguments = [argument for argument in argv if re.split("[=.]", argument)[0] in PARTS]
    columns = [argument for argument in argv if argument.startswith(COLUMN)]
    typed = [argument for argument in argv if argument not in (*class_arguments, *columns)]
    declared = dict[str, Any](FAMILIES)
    for content in _file_options(typed, parser):
        declared |= {family: content.pop(family) for family in FAMILIES if family in content}
        parser.set_defaults(content)
    for argument in sorted(class_arguments, key=lambda one: one.partition("=")[0].count(".")):
        name, _, text = argument.partition("=")  # a class comes before its options
        family, *option = name.removeprefix("--").split(".")
        if not text:
            raise ValueError(f"argument {name}: expected one argument")
        if option == ["help"]:
            _print_options(family, text)
        declared[family] = config.declare(family, declared[family], option, text)
    options = parser.parse_args(typed)
    for name, _, kind in (argument.removeprefix(COLUMN).partition("=") for argument in columns):
        entry = parser.parse_args([f"--schema={{{json.dumps(name)}: {kind}}}"]).schema
        options.schema = {**(options.schema or {}), **entry}
    for family in FAMILIES:
        options[family] = config.component(family, declared[family])
    if options.print_config:
        print(yaml.safe_dump(plain_options(options, TYPED_ONLY), sort_keys=False), end="")
        raise SystemExit(0)
    return options


def plain_options(options: Namespace, without: Collection[str]) -> dict[str, Any]:
    """Returns the options of `train` as a configuration file holds them, except `without`."""
    plain = {key: value for key, value in vars(options).items() if key not in without}
    return plain | {family: options[family].plain for family in FAMILIES}


def _file_options(typed: list[str], parser: ArgumentParser) -> Iterator[dict[str, Any]]:
    """Yields the options in files: in the file of the run to resume, then in those of `--config`.

    Options of the likelihood that an older version did not write into the run's file are added.
    """
    run = parser.parse_args(typed).resume
    if run is not None:
        check_folder(run)
        path: Any = Path(run) / "config.yaml"
        if not path.exists():
            raise ValueError(
                f"{run or repr('')} cannot be resumed: it has no config.yaml, which pyro-vae "
                "train writes; give the folder of a run that it began"
            )
        content = _read_yaml(path)
        with reading(path):
            likelihood = config.add_new_options(content.get("likelihood", FAMILIES["likelihood"]))
        content = _checked(path, {**content, "likelihood": likelihood}, parser)
        yield {**content, "run": run}
    for name, _, path in (argument.partition("=") for argument in typed):
        if name == "--config":
            yield _checked(path, _read_yaml(path), parser)


def _print_options(family: str, name: str) -> NoReturn:
    cls = config.named_class(family, name)
    usage = f"pyro-vae train --{family} {cls.__name__} [--{family}.OPTION VALUE ...]"
    parser = ArgumentParser(usage=usage, add_help=False)
    parser.add_class_arguments(cls, skip=config.INJECTED)
    parser.print_help()
    raise SystemExit(0)


def normalise(argv: list[str]) -> list[str]:
    """Returns arguments as the parsers expect them: words joined by `_`, values after `=`.

    `--latent-dim 3` is `--latent_dim=3`, `--compile` is `--compile=true` and `--no-compile` is
    `--compile=false`.
    """
    result, arguments = [], argv[::-1]
    while arguments:
        argument = arguments.pop()
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or len(name) == 2:
            result.append(argument)
            continue
        key = name[2:] if name.startswith(COLUMN) else name[2:].replace("-", "_")
        following = arguments[-1] if arguments else "--"
        if equals:
            result.append(f"--{key}{argument[len(name) :]}")
        elif key.removeprefix("no_") in FLAGS - {key}:
            result.append(f"--{key.removeprefix('no_')}=false")
        elif key in FLAGS and following.lower() not in ("true", "false", "null", "trace"):
            result.append(f"--{key}=true")
        elif key in SWITCHES or following.startswith("--"):
            result.append(f"--{key}")
        else:
            result.append(f"--{key}={arguments.pop()}")
    return result


def make_parser(name: str) -> ArgumentParser:
    """Makes the parser of a command from its entry in `COMMANDS`."""
    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"pyro-vae {name}", exit_on_error=False, allow_abbrev=False, **command.about(name)
    )
    for key, settings in command.options.items():
        if key in PARTS:
            classes = ", ".join(config.components(key[2:]))
            settings = settings | {"help": f"{settings['help']}: {classes}"}
        parser.add_argument(key, **settings)
    return parser


def _checked(path: str | Path, content: dict[str, Any], parser: ArgumentParser) -> dict[str, Any]:
    """Returns the options of a configuration file, after a check of all names and types."""
    defaults = parser.get_defaults().as_dict()
    for key, value in content.items():
        if key in NOT_IN_FILES and value is not None:
            raise ValueError(f"configuration {path} cannot set {key!r}: type --{key} instead")
        if key not in defaults:
            hint = closest(str(key), defaults.keys() - {*NOT_IN_FILES})
            raise ValueError(
                f"configuration {path} has {key!r}, which is no option{hint}: "
                f"see {parser.prog} --help"
            )
        if value is None and defaults[key] is not None:  # jsonargparse takes null for any type
            raise ValueError(f"{path}: {key} cannot be null: leave it out for {defaults[key]!r}")
    others = {key: value for key, value in content.items() if key not in FAMILIES}
    with reading(path):
        components = {f: config.component(f, content[f]) for f in FAMILIES if f in content}
        try:
            typed = parser.parse_object(others).as_dict()
        except ArgumentError as error:
            raise ValueError(str(error)) from error
    return components | {key: typed[key] for key in others}


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML of plain values in which no key is given twice."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Returns a mapping as nodes, with its keys checked."""
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            if str(key.value) in seen:
                line = key.start_mark.line + 1
                raise ValueError(f"line {line} gives {key.value!r} again: keep one of them")
            seen.add(str(key.value))
        return node


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        content = yaml.load(Path(path).read_text(), UniqueKeyLoader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", error)
        raise ValueError(f"configuration {path} cannot be read: {why}") from error
    if not isinstance(content, dict | None):
        raise ValueError(
            f"configuration {path} must hold lines of option: value; got a "
            f"{type(content).__name__}"
        )
    if not _is_small(content):
        raise ValueError(f"configuration {path} holds more than {MAX_VALUES} values, or itself")
    return content or {}


def _is_small(content: Any) -> bool:
    """Returns whether a parser can visit all values: an alias in YAML may stand for billions."""
    count, to_visit = 0, [content]
    while to_visit and count < MAX_VALUES:
        value = to_visit.pop()
        count += 1
        if isinstance(value, dict | list):
            to_visit += value.values() if isinstance(value, dict) else value
    return not to_visit


def data_options(path: Path) -> Namespace:
    """Reads the options of the data from the configuration of a run."""
    parser = make_parser("train")
    content = {key: value for key, value in _read_yaml(path).items() if f"--{key}" in DATA}
    parser.set_defaults(_checked(path, content, parser))
    return parser.get_defaults()


@contextmanager
def _process_settings(options: Namespace) -> Iterator[None]:
    """Sets threads and precision as `options` say, checks devices, prints warnings as one line."""
    import torch

    from pyro_vae.processes import check_processes, uses_cuda
    from pyro_vae.runtime import threads

    precision, number = torch.get_float32_matmul_precision(), options.get("threads")
    most = os.cpu_count() or 1
    devices, kind = options.get("devices", 1), options.get("accelerator", "cpu")
    check_whole(devices=devices)
    check_processes(devices, "cuda" if uses_cuda(kind) else "cpu")
    if number is not None and not 1 <= number <= most:
        raise ValueError(
            f"threads must be from 1 to {most}, the processors of this machine; got {number}"
        )
    torch.set_float32_matmul_precision(options.get("matmul", precision))
    try:
        with threads(number or torch.get_num_threads()), warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(
                f"warning: {' '.join(str(message).split())}", file=sys.stderr
            )
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
