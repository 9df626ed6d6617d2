"""What a metric returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Score"]


@dataclass(frozen=True, eq=False)
class Score:
    """A number between 0 and 1 (sampled ones may leave it by their error), and how it came about.

    Scores of different variants, bins, or factors do not compare.

    Attributes:
        metric: Its name.
        value: The score.
        variant: Which published definition.
        factors: Names of the factors that it is over.
        num_data: Rows N that it saw.
        seed: Of what was drawn or fitted, or None if nothing was.
        bins: Bins of a code's histogram, or None.
        num_samples: Draws or votes, or None.
        per_factor: Its parts [F], where it is their mean.
        matrix: What it was read off [F, D], such as mutual information in nats.
        stderr: Standard error over draws, or None.
    """

    metric: str
    value: float
    variant: str
    factors: tuple[str, ...]
    num_data: int
    seed: int | None = None
    bins: int | None = None
    num_samples: int | None = None
    per_factor: Tensor | None = field(default=None, repr=False)
    matrix: Tensor | None = field(default=None, repr=False)
    stderr: float | None = None
