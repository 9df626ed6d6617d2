"""The command line: options to run folders, tables and figures."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import Namespace

from pyro_vae.cli.judge import compare, evaluate, score
from pyro_vae.cli.options import PARSERS, check_names, import_modules
from pyro_vae.cli.train import train
from pyro_vae.cli.use import encode, plot, sample
from pyro_vae.config import closest

__all__ = ["run"]

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
        "plot": plot,
    }
    name, *rest = argv
    try:
        if name not in commands:
            raise ValueError(f"unknown command{closest(name, commands)}")
        commands[name](_parse(name, rest))
    except (ValueError, OSError, FloatingPointError, NotImplementedError, ImportError) as error:
        print(f"pyro-vae {name}: {error}", file=sys.stderr)
        return 2
    return 0


def demo(options: Namespace) -> None:
    """Trains on the bundled digits, evaluates and draws."""
    arguments = [f"--{key}={value}" for key, value in DEMO.items()]
    arguments += [f"--run={options.run}"] if options.run else []
    folder = train(_parse("train", arguments))
    evaluate(_parse("evaluate", [str(folder)]))


def _parse(command: str, argv: list[str]) -> Namespace:
    if command == "train":
        argv = _resumed(argv)
    import_modules(argv)
    check_names(argv)
    return PARSERS[command]().parse_args(argv)


def _resumed(argv: list[str]) -> list[str]:
    """With `--resume RUN`, the options of that run come first."""
    for i, argument in enumerate(argv):
        key, _, value = argument.partition("=")
        if key == "--resume":
            folder = value or argv[i + 1]
            return ["--config", str(Path(folder) / "config.yaml"), "--run", folder, *argv]
    return argv
