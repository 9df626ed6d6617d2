"""What is worth a word about data before they are trained on."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import constraints

from pyro_vae.config import option_names
from pyro_vae.data import Data, spread

__all__ = ["hints"]

ROWS = 10_000  # that are looked at
TENFOLD = 10.0  # totals of rows, between their first and last per cent
FEW = 10  # values of a column that looks like codes


def hints(data: Data, likelihood: type) -> list[str]:
    """One line each on what a table will make a model learn that nobody asked for."""
    if len(data.data_shape) != 1 or data.levels is not None or data.schema is not None:
        return []
    x = data.x[spread(len(data), ROWS, 0)].double()
    support: constraints.Constraint = likelihood.support  # type: ignore[attr-defined]
    if support is constraints.nonnegative_integer and "levels" not in option_names(likelihood):
        return _totals(x) if data.y is None else []
    whole_line = bool(support.check(x.new_tensor([-10.0, 10.0])).all())
    return _codes(x, data.columns, likelihood.__name__) if whole_line else []


def _totals(x: Tensor) -> list[str]:
    low, high = x.nansum(1).quantile(x.new_tensor([0.01, 0.99])).tolist()
    if high < TENFOLD * max(low, 1.0):
        return []
    return [
        f"the sums of rows go from {low:.0f} to {high:.0f}: the latents will tell large rows from "
        "small before kinds of rows; to set size aside give its logarithm as y, and --conditional "
        "true"
    ]


def _codes(x: Tensor, columns: tuple[str, ...] | None, likelihood: str) -> list[str]:
    whole = ((x == x.round()) | x.isnan()).all(0).nonzero().flatten().tolist()
    counts = {d: len(x[~x[:, d].isnan(), d].unique()) for d in whole}
    few = [d for d, count in counts.items() if count <= min(FEW, len(x) // 3)]
    if not few:
        return []
    names = ", ".join(columns[d] if columns else f"number {d} (from 0)" for d in few[:5])
    names += ", ..." if len(few) > 5 else ""
    return [
        f"{len(few)} column(s) hold at most {FEW} whole numbers, as codes do ({names}): under "
        f"{likelihood} their density, and log p(x), can grow without bound; leave them out, or "
        "give them as y"
    ]
