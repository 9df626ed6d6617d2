"""What measures of disentanglement share: checked codes and factors, and a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_vae.arguments import as_rows, check_whole

__all__ = ["Score", "check", "discretise", "entropy", "gap", "information_matrix"]


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


def check(
    codes: Tensor, factors: Tensor, names: Sequence[str] | None = None, **numbers: Any
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Codes [N, D] in float64, factors [N, F] in int64, on the CPU, and the factors' names.

    Other arguments must be whole numbers from 1; a seed from 0.

    Raises:
        ValueError: If the shapes do not fit, a code is not finite, a factor is not a whole number,
            there are fewer than two rows or not as many names as factors.
    """
    codes, factors = as_rows("means", codes), as_rows("factors", factors)
    check_whole(0, seed=numbers.pop("seed", 0))
    check_whole(**numbers)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or len(codes) < 2:
        raise ValueError(
            "expected codes [N, D] and factors [N, F] of the same N, at least 2; got "
            f"{list(codes.shape)} and {list(factors.shape)}"
        )
    if not torch.equal(factors.long().to(factors.dtype), factors):
        raise ValueError("expected factors that are whole numbers: give the index of each value")
    count = factors.shape[1]
    if names is None:
        names = [f"factor {f}" for f in range(count)]
    if isinstance(names, str) or not isinstance(names, Sequence) or len(names) != count:
        raise ValueError(f"expected a name for each of the {count} factors; got {names!r}")
    labels = tuple(map(str, names))
    return codes.detach().cpu().double(), factors.detach().cpu().long(), labels


def discretise(codes: Tensor, bins: int) -> Tensor:
    """Each column of `codes` [N, D] in `bins` bins of equal width over its range, int64."""
    low, high = codes.min(0).values, codes.max(0).values
    width = torch.where(high > low, high - low, 1.0)
    return ((codes - low) / width * bins).long().clamp(max=bins - 1)


def entropy(values: Tensor) -> Tensor:
    """Entropy of the empirical distribution of `values` int64 [N], in nats."""
    p = values.unique(return_counts=True)[1].double() / len(values)
    return -(p * p.log()).sum()


def information_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Mutual information of columns of `first` [N, F] with those of `second` [N, D], [F, D].

    .. math:: I(a; b) = H(a) + H(b) - H(a, b)

    in nats, of the empirical distribution of int64 values; biased upwards by about
    (cells - 1) / (2 N) in a table that has more cells than rows and columns.
    """
    rows = []
    for a in first.T:
        joint = [entropy(a * (b.max() + 1) + b) for b in second.T]
        rows.append([entropy(a) + entropy(b) - ab for b, ab in zip(second.T, joint)])
    return torch.tensor(rows, dtype=torch.float64).clamp(min=0)  # below by rounding alone


def gap(scores: Tensor) -> Tensor:
    """The largest of each row of `scores` [F, D] less the second largest, [F]."""
    if scores.shape[1] < 2:
        raise ValueError("expected at least two latent dimensions, for a gap between two")
    first, second = scores.topk(2, dim=1).values.T
    return first - second
