"""Who may import whom, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pyro_vae
from pyro_vae import arguments

ROOT = Path(pyro_vae.__file__).parent
ANYTHING = {"*"}
TABLES = {"numpy", "safetensors", "rich"}
ALLOWED: dict[str, set[str]] = {
    "distributions": {"torch", "pyro", "zuko"},
    "networks": {"torch", "arguments"},
    "priors": {"torch", "arguments", "pyro", "distributions"},
    "likelihoods": {"torch", "arguments", "pyro", "distributions"},
    "posteriors": {"torch", "arguments", "pyro", "distributions"},
    "hierarchy": {"torch", "pyro", "distributions", "priors", "posteriors"},
    "classes": {
        *("torch", "arguments", "pyro", "distributions"),
        *("priors", "likelihoods", "posteriors", "hierarchy", "vae"),
    },
    "vae": {
        *("torch", "arguments", "pyro", "distributions", "runtime"),
        *("priors", "likelihoods", "posteriors", "hierarchy"),
    },
    "densities": {"torch", "arguments", "pyro", "runtime"},
    "marginals": {"torch"},
    "compiling": {"torch", "pyro"},
    "runtime": {"torch", "numpy", "arguments"},
    "arguments": {"torch", "numpy"},
    "processes": {"torch", "runtime"},
    "objectives": {"torch", "arguments", "pyro", "densities", "marginals"},
    "estimators": {
        "arviz",
        "pandas",
        "torch",
        "pyro",
        "densities",
        "compiling",
        "processes",
        "runtime",
        "files",
        "arguments",
        "scipy",
        *TABLES,
    },
    "metrics": {
        *("torch", "pyro", "sklearn", "scipy", "numpy", "densities", "marginals", "runtime"),
        "arguments",
    },
    "data": {
        *("torch", "arguments", "torchvision", "sklearn", "PIL", "numpy", "scipy"),
        *("anndata", "pyarrow", "yaml", "runtime", "files"),
    },
    "training": {
        *("torch", "pyro", "densities", "objectives", "estimators", "compiling", "processes"),
        *("runtime", "files", "arguments"),
        *TABLES,
    },
    "plots": {"torch", "matplotlib", "files"},
    "explorer": {"torch"},
    "files": set(),
    "options": ANYTHING,
    "config": ANYTHING,
    "cli": ANYTHING,
    "sklearn": ANYTHING,
    "__main__": ANYTHING,
    "__init__": ANYTHING,
}
STANDARD = set(sys.stdlib_module_names)
FILES = sorted(ROOT.rglob("*.py"))


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def layer(path: Path) -> str:
    """The module or package at the top of the tree that `path` belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Layers of ours and packages of others that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{label(path)}: imports are absolute"
            modules = [node.module or ""]
            if node.module == "pyro_vae":
                names = {alias.name for alias in node.names} - {"__version__"}
                modules = [f"pyro_vae.{name}" for name in names]
        else:
            continue
        for module in modules:
            first, *rest = module.split(".")
            yield rest[0] if first == "pyro_vae" and rest else first


def test_imports_point_down() -> None:
    wrong = {}
    for path in FILES:
        allowed = ALLOWED[layer(path)]
        extra = set(imported(path)) - STANDARD - allowed - {layer(path)}
        if allowed is not ANYTHING and extra:
            wrong[label(path)] = sorted(extra)
    assert not wrong, f"what each may not import: {wrong}"


def test_every_permission_is_used() -> None:
    for own, allowed in ALLOWED.items():
        used = {name for path in FILES if layer(path) == own for name in imported(path)}
        assert allowed is ANYTHING or allowed <= used, f"{own} imports no {allowed - used}"


def test_the_top_is_imported_by_nobody_below() -> None:
    for path in FILES:
        top = {name for name in ALLOWED if ALLOWED[name] is ANYTHING}
        if layer(path) not in top:
            assert not {"config", "cli", "__main__"} & set(imported(path)), label(path)


def test_only_the_vae_samples() -> None:
    samplers = {
        label(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pyro.sample"
    }
    assert samplers == {"vae.py", "classes.py"}


def test_the_vae_takes_base_classes_only() -> None:
    names = {
        alias.name
        for node in ast.walk(ast.parse((ROOT / "vae.py").read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pyro_vae")
        for alias in node.names
    }
    assert names - {*vars(arguments), "check_fits"} == {
        *("Prior", "Likelihood", "Posterior"),
        *("Layers", "Lowest", "Inference", "Joint"),
    }
