"""Importing the library changes nothing for the process that imports it."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_vae

MODULES = ["pyro_vae"] + [
    module.name
    for module in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae.")
    if not module.name.endswith("__main__")
]

CHECK = """
import importlib, logging, os, random, sys, warnings
import matplotlib, numpy, pyro, rich.console, sklearn.base, torch, torchvision

def state():
    return {
        "torch validation": torch.distributions.Distribution._validate_args,
        "pyro validation": pyro.distributions.is_validation_enabled(),
        "torch state": torch.get_rng_state().tolist(),
        "numpy state": numpy.random.get_state()[1].tolist(),
        "python state": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "environment": dict(os.environ),
        "handlers": list(logging.getLogger().handlers),
        "level": logging.getLogger().level,
        "warnings": list(warnings.filters),
        "parameters": list(pyro.get_param_store().keys()),
        "backend": matplotlib.rcParams._get("backend"),
        "hooks": (sys.excepthook, sys.displayhook),
    }

for name in sys.argv[1:]:
    before = state()
    importlib.import_module(name)
    after = state()
    changed = [key for key in before if before[key] != after[key]]
    assert not changed, f"import {name} changes {changed}"
"""


def run(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(
        command, cwd=Path(pyro_vae.__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_imports_change_nothing() -> None:
    run(CHECK, *MODULES)


def test_the_name_alone_is_cheap() -> None:
    run("import sys, pyro_vae; assert 'torch' not in sys.modules and pyro_vae.__version__")


ALONE = """
import importlib, sys
for name in sys.argv[1:]:
    for loaded in [module for module in sys.modules if module.startswith("pyro_vae")]:
        del sys.modules[loaded]
    importlib.import_module(name)
heavy = {"zuko", "matplotlib", "sklearn", "jsonargparse"} & {*sys.modules}
assert not heavy, heavy
"""


def test_modules_import_alone_and_without_their_extras() -> None:
    names = "priors", "posteriors", "likelihoods", "vae", "objectives"
    run(ALONE, *(f"pyro_vae.{name}" for name in names))
