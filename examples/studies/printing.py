"""What the studies share: their options, and the cells and tables of their results."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from pyro_vae import Evidence


def study_options(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser of the options that most studies have, with these defaults."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--root", default="data", help="folder of the named data sets")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, help="images for log p(x)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--out", help="where tables and figures go")
    parser.add_argument("--smoke", action="store_true", help="small data, a few epochs")
    parser.set_defaults(compile=None, **defaults)  # None: `fit` chooses
    return parser


def with_error(values: Tensor, digits: int = 2) -> str:
    """Formats the mean over rows and its standard error."""
    stderr = values.std().item() / len(values) ** 0.5
    return f"{values.mean():.{digits}f} +- {stderr:.{digits}f}"


def numbers(evidence: Evidence) -> dict[str, float]:
    """Returns the mean log p(x), its Monte Carlo error and its standard error, as cells."""
    names = ("log p(x)", "+- Monte Carlo", "+- data")
    return dict(zip(names, (evidence.mean(), *evidence.mean_stderr())))


def with_errors(evidence: Evidence) -> str:
    """Formats the mean log p(x), its Monte Carlo error and its standard error over rows."""
    return " +- ".join(f"{value:.2f}" for value in numbers(evidence).values())


def verdicts(evidence: Evidence) -> str:
    """Formats how many rows have each verdict."""
    return ", ".join(f"{n} {word}" for word, n in Counter(evidence.verdict).items())


def show(rows: Sequence[Mapping[str, Any]], title: str, width: int, digits: int = 2) -> None:
    """Prints rows, each a mapping from column to cell; floats with `digits` decimals."""
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = (f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console(width=width).print(table)
