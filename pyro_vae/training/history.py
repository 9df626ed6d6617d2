"""The record of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

__all__ = ["COLUMNS", "History"]

COLUMNS = (
    "epoch",
    "step",
    "seconds",
    "lr",
    "elbo",
    "reconstruction",
    "kl",
    "objective",
    "validation_elbo",
    "validation_reconstruction",
    "validation_kl",
    "active_units",
)


@dataclass
class History:
    """What `fit` measured, a row per epoch; `history["elbo"]` is a column.

    All are means per datum in nats at beta = 1, but `objective`, which is what was maximised.
    Training columns are running means over the epoch, validation ones are taken at its end.

    Attributes:
        rows: By column name; None where nothing was measured.
        num_units: Latent units of all sites; None if the guide's distributions have no mean.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_units: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        if not self.rows:
            return "History(0 epochs)"
        names = ("elbo", "kl", "validation_elbo")
        shown = [f"{n} {self.final[n]:.2f}" for n in names if self.final[n] is not None]
        kept = f"weights of epoch {self.best_epoch or len(self)}: {', '.join(shown)} nats"
        if self.active_units is not None:
            kept += f"; {self.active_units} of {self.num_units} units active"
        return f"History({len(self)} epochs; {kept})"

    def __getitem__(self, column: str) -> list[Any]:
        if column not in COLUMNS:
            raise ValueError(f"no column {column!r}: expected one of {', '.join(COLUMNS)}")
        return [row[column] for row in self.rows]

    @property
    def best_epoch(self) -> int | None:
        """The epoch (from 1) of the highest validation ELBO, the first of equals, or None."""
        elbos = [_finite(row["validation_elbo"]) for row in self.rows]
        if not self.rows or self.rows[0]["validation_elbo"] is None:
            return None
        return 1 + max(range(len(elbos)), key=elbos.__getitem__)

    @property
    def final(self) -> dict[str, Any]:
        """The row of the weights that `fit` leaves: the best epoch's, else the last one's."""
        return self.rows[(self.best_epoch or len(self.rows)) - 1]

    @property
    def active_units(self) -> int | None:
        """Latent units in use in the weights that `fit` leaves, or None where not measured."""
        return self.final["active_units"] if self.rows else None


def _finite(elbo: float | None) -> float:
    return elbo if elbo is not None and math.isfinite(elbo) else -math.inf
