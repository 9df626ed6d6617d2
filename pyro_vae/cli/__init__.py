"""The command line: options to run folders, tables and figures."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jsonargparse import ArgumentError, Namespace

from pyro_vae.cli.conventions import spelled, train_help
from pyro_vae.cli.explore import explore
from pyro_vae.cli.impute import impute
from pyro_vae.cli.judge import classify, compare, evaluate, score
from pyro_vae.cli.options import (
    PARSERS,
    check_names,
    check_options,
    import_modules,
    values,
    with_configs,
)
from pyro_vae.cli.report import report
from pyro_vae.cli.train import train
from pyro_vae.cli.use import encode, plot, sample
from pyro_vae.config import closest
from pyro_vae.files import check_folder

__all__ = ["run"]

ERRORS = (
    ArgumentError,
    ValueError,
    OSError,
    FloatingPointError,
    NotImplementedError,
    ImportError,
)
DEMO = {
    "data": "digits",
    "transform": "dynamic",
    "latent_dim": 10,
    "encoder.hidden": [400],
    "decoder.hidden": [400],
    "epochs": 400,
    "patience": 40,
    "batch_size": 64,
    "lr": 0.002,
}


def run(argv: list[str]) -> int:
    """Runs a command; wrong input is one line, not a traceback."""
    commands = {
        "demo": demo,
        "train": train,
        "evaluate": evaluate,
        "score": score,
        "compare": compare,
        "sample": sample,
        "encode": encode,
        "impute": impute,
        "classify": classify,
        "plot": plot,
        "report": report,
        "explore": explore,
    }
    name, *rest = argv
    try:
        if name not in commands:
            raise ValueError(f"unknown command{closest(name, commands)}")
        options = _parse(name, rest)
        with _short_warnings(), _matrix_products(options):
            commands[name](options)
    except ERRORS as error:
        print(f"pyro-vae {name}: {_line(error)}", file=sys.stderr)
        return 2
    return 0


def demo(options: Namespace) -> None:
    """Trains on the bundled digits, evaluates and draws."""
    arguments = [f"--{key}={value}" for key, value in DEMO.items()]
    arguments += [f"--run={options.run}"] if options.run else []
    folder = train(_parse("train", arguments))
    evaluate(_parse("evaluate", [str(folder)]))


def _parse(command: str, argv: list[str]) -> Namespace:
    argv = spelled(argv)
    if command == "train" and {"-h", "--help"} & set(argv):
        print(train_help(), end="")
        raise SystemExit(0)
    argv = ["--help" if argument == "--help_all" else argument for argument in argv]
    if command == "train":
        argv = _resumed(argv)
    parser = PARSERS[command]()
    check_options(parser, argv)
    import_modules(argv)
    argv = with_configs(argv, parser)
    check_names(argv)
    return parser.parse_args(argv)


def _resumed(argv: list[str]) -> list[str]:
    """With `--resume RUN`, the options of that run come first."""
    for folder in values(argv, "--resume"):
        check_folder(folder)
        declaration = Path(folder) / "config.yaml"
        if not declaration.exists():
            raise ValueError(
                f"{folder} cannot be resumed: it has no config.yaml, which pyro-vae train writes; "
                "give the folder of a run that it began"
            )
        return ["--config", str(declaration), "--run", folder, *argv]
    return argv


@contextmanager
def _matrix_products(options: Namespace) -> Iterator[None]:
    """The precision of matrix products and the threads that a command asks for."""
    import torch

    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    if options.get("threads") is not None:
        most = os.cpu_count() or 1
        if not 1 <= options.threads <= most:
            raise ValueError(
                f"threads must be from 1 to {most}, the processors of this machine; "
                f"got {options.threads}"
            )
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.get("matmul", before[0]))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line, without the place in the source that gave them."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {' '.join(str(message).split())}", file=sys.stderr
        )
        yield


def _line(error: Exception) -> str:
    """An error as one line, without the shapes of all sites, which Pyro adds."""
    return " ".join(str(error).partition("\nTrace Shapes:")[0].split())
