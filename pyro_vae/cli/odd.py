"""Which column makes a row of a table odd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Data, spread
from pyro_vae.estimators import Evidence, column_log_prob
from pyro_vae.vae import VAE

__all__ = ["by_column", "missing_columns", "odd_rows"]

ODD, OTHERS = 5, 100  # rows that are shown, and those that say what is usual


def by_column(vae: VAE, data: Data, **options: Any) -> Tensor:
    """log p(x_c | the other columns) [N, C] in the units of the data; NaN where one is missing.

    Raises:
        ValueError: If the data are no table.
    """
    if len(data.data_shape) != 1:
        raise ValueError("columns are those of tables: leave --columns out")
    x, y = data.batch(torch.arange(len(data)))
    found = column_log_prob(vae, x, y, **options)
    return found + torch.as_tensor(data.transform.log_slope()).to(found)


def odd_rows(vae: VAE, data: Data, evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of least log p(x), and the column that is farthest below its usual log p."""
    if data.schema is None:
        return []
    lowest = evidence.log_prob.argsort()[:ODD]
    shown = torch.cat([lowest, spread(len(data), OTHERS, 0)])
    each = by_column(vae, data.subset(shown))
    below = (each - each.nanmedian(0).values)[: len(lowest)].nan_to_num(torch.inf)
    cells = data.schema.decode(data.transform.inverse(data.x[lowest].float()))
    columns = below.argmin(1).tolist()
    names = list(data.schema.columns)
    return [
        {
            "row": data.rows[row].item(),
            "log_prob": evidence.log_prob[row].item(),
            "column": names[column],
            "cell": str(cells[names[column]][i]),
            "column_log_prob": each[i, column].item(),
        }
        for i, (row, column) in enumerate(zip(lowest.tolist(), columns))
    ]


def missing_columns(data: Data) -> dict[str, float]:
    """The share of rows that lack each column, where some do."""
    if data.columns is None or not data.missing:
        return {}
    shares = data.x.isnan().double().mean(0).tolist()
    return {name: share for name, share in zip(data.columns, shares) if share}
