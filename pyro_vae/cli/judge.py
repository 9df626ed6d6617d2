"""log p(x) of rows of a run, and what is said of it, for all commands that judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae.data import Data, Splits, spread
from pyro_vae.estimators import Evidence, column_log_prob, log_evidence
from pyro_vae.vae import VAE

__all__ = ["by_column", "estimate", "held_out", "rows_of", "shifted", "shown"]


def held_out(splits: Splits, part: str, limit: int | None) -> Data:
    """Rows that stand for a part, with their noise drawn once."""
    data: Data = getattr(splits, part)
    return data.subset(spread(len(data), limit, splits.seed)).fixed()


def rows_of(splits: Splits, part: str, data: Data) -> str:
    """Which rows of a part these are, in words."""
    whole = len(getattr(splits, part))
    if len(data) == whole:
        return f"all {whole} rows of the {part} part"
    return f"{len(data)} of {whole} rows of the {part} part, spread over it (seed {splits.seed})"


def estimate(vae: VAE, data: Data, options: Namespace) -> Evidence:
    """log p(x) of all rows, by the one estimator to call."""
    names = ("tolerance", "chunk_size", "compile", "devices", "seed")
    asked = {name: options[name] for name in names}
    return log_evidence(vae, *data.batch(), progress=shown(options), **asked)


def shown(options: Namespace) -> bool:
    """Whether progress is shown: where asked for, and the output is not JSON."""
    return bool(options.progress and not options.get("json"))


def shifted(evidence: Evidence, data: Data) -> Evidence:
    """Evidence in the units of the data before their transform."""
    return replace(evidence, log_prob=evidence.log_prob + data.log_jacobians)


def by_column(vae: VAE, data: Data, **options: Any) -> Tensor:
    """log p(x_c | the other columns) [N, C] in the units of the data; NaN where one is missing.

    Raises:
        ValueError: If the data are no table.
    """
    if len(data.data_shape) != 1:
        raise ValueError("columns are those of tables: leave --columns out")
    found = column_log_prob(vae, *data.batch(), **options)
    return found + torch.as_tensor(data.transform.log_slope()).to(found)
