"""Reading and writing the reference set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.reference.families import FAMILIES, Family

__all__ = ["FOLDER", "Problem", "declarations", "load", "save"]

FOLDER = Path(__file__).parent
Declarations = dict[str, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Problem:
    """A model with its data and their log p(x).

    Attributes:
        name: Of the model.
        program: Its Pyro programs, `program.model` and `program.guide`, float64.
        x: Data [N, X], float64; NaN where an entry is missing.
        log_prob: log p(x) [N], float64, nats.
        stderr: Standard errors of `log_prob` [N], float64; zero where it is exact.
        declaration: What models.yaml says of it.
    """

    name: str
    program: Family
    x: Tensor
    log_prob: Tensor
    stderr: Tensor
    declaration: dict[str, Any]


def declarations(folder: Path = FOLDER) -> Declarations:
    """All models by name: kind, family, options, latents, data, truth and its error."""
    return yaml.safe_load((folder / "models.yaml").read_text())


def load(name: str, folder: Path = FOLDER) -> Problem:
    """The model of that name.

    Raises:
        ValueError: If there is none.
    """
    known = declarations(folder)
    if name not in known:
        raise ValueError(f"no model {name!r}: expected one of {', '.join(known)}")
    declaration, parts = known[name], load_file(folder / "models" / f"{name}.safetensors")
    weights = {n.removeprefix("weights."): t for n, t in parts.items() if n.startswith("weights.")}
    program = FAMILIES[declaration["family"]](weights, **declaration["options"]).double()
    x, truth = parts["x"].double(), (parts["log_prob"], parts["stderr"])
    return Problem(name, program, x, *truth, declaration)


def save(
    problem: Problem, weights: dict[str, Tensor], order: list[str], folder: Path = FOLDER
) -> None:
    """Writes the tensors of a model, and its declaration among the others, in `order`."""
    parts = {f"weights.{n}": t.detach().clone().contiguous() for n, t in weights.items()}
    parts |= {"x": problem.x, "log_prob": problem.log_prob, "stderr": problem.stderr}
    (folder / "models").mkdir(exist_ok=True)
    save_file(parts, folder / "models" / f"{problem.name}.safetensors")
    path = folder / "models.yaml"
    known = declarations(folder) if path.exists() else {}
    known[problem.name] = problem.declaration
    known = {name: known[name] for name in order if name in known}
    path.write_text(yaml.safe_dump(known, sort_keys=False))
