"""Whether a dimension of the code depends on one factor only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.metrics.factors import check, discretise, information_matrix
from pyro_vae.metrics.score import Score

__all__ = ["modularity"]


def modularity(
    means: Tensor, factors: Tensor, names: Sequence[str] | None = None, *, bins: int = 20
) -> Score:
    r"""One less the share of a dimension's squared information that is on other factors.

    .. math:: \frac1D \sum_d \Big(1 - \frac{\sum_{f \neq f^*} I_{fd}^2}{(F - 1) I_{f^* d}^2}\Big)

    with f* the factor of most information on dimension d, in nats, and bins as in
    `mig_of_means`. A dimension that has no information on any factor counts as zero. A copied
    dimension costs nothing.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F], two or more of them.
        names: Of the factors.
        bins: Bins of equal width over the range of each dimension.

    Raises:
        ValueError: If the shapes do not fit, or there is one factor.

    References:
        Ridgeway and Mozer. Learning deep disentangled embeddings with the F-statistic loss. 2018.
    """
    codes, values, labels = check(means, factors, names, bins=bins)
    if len(labels) < 2:
        raise ValueError("expected at least two factors: with one, every code is modular")
    information = information_matrix(values, discretise(codes, bins))
    square = information.pow(2)
    highest = square.amax(0)
    others = (square.sum(0) - highest) / (len(labels) - 1)
    each = torch.where(highest > 1e-20, 1 - others / highest, 0.0)
    return Score(
        "modularity",
        each.mean().item(),
        "Ridgeway and Mozer 2018: histogram of posterior means",
        labels,
        len(codes),
        bins=bins,
        matrix=information,
    )
