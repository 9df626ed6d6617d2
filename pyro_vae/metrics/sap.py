"""Separated attribute predictability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae.metrics.factors import check, gap
from pyro_vae.metrics.score import Score

__all__ = ["sap"]


def sap(
    means: Tensor,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    categorical: Sequence[str] = ("shape",),
    seed: int = 0,
) -> Score:
    """How much better the best single dimension predicts a factor than the next best.

    An ordered factor is predicted by a straight line, and scored by its squared correlation; a
    categorical one by as many thresholds as it has values less one, fitted to half the rows and
    scored on the others by balanced accuracy, of which 1 / (values) is chance: such a factor
    adds at most 1 less that.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        categorical: Those, by name, whose values have no order.
        seed: Of the halves.

    Raises:
        ValueError: If the shapes do not fit, or D is 1.

    References:
        Kumar, Sattigeri and Balakrishnan. Variational inference of disentangled latent concepts
        from unlabeled observations. 2018.
    """
    codes, values, labels = check(means, factors, names, seed=seed)
    rows = [
        _by_thresholds(codes, v, seed) if label in categorical else _by_lines(codes, v.double())
        for label, v in zip(labels, values.T)
    ]
    matrix = torch.stack(rows)
    gaps = gap(matrix)
    return Score(
        "sap",
        gaps.mean().item(),
        "Kumar et al. 2018: squared correlation, thresholds for categorical factors",
        labels,
        len(codes),
        seed=seed,
        per_factor=gaps,
        matrix=matrix,
    )


def _by_lines(codes: Tensor, factor: Tensor) -> Tensor:
    """Squared correlation of each dimension with the factor [D]; zero for a constant one."""
    centred, target = codes - codes.mean(0), factor - factor.mean()
    covariance = target @ centred
    scale = centred.pow(2).sum(0) * target.pow(2).sum()
    return torch.where(scale > 0, covariance.pow(2) / scale, 0.0)


def _by_thresholds(codes: Tensor, factor: Tensor, seed: int) -> Tensor:
    """Balanced accuracy of thresholds on each dimension [D]."""
    from sklearn.metrics import recall_score
    from sklearn.tree import DecisionTreeClassifier

    leaves = max(2, len(factor.unique()))
    order = np.random.default_rng(seed).permutation(len(codes))
    fitted, scored = np.array_split(order, 2)
    x, v = codes.numpy(), factor.numpy()
    scores = []
    for column in x.T:
        tree = DecisionTreeClassifier(
            max_leaf_nodes=leaves, class_weight="balanced", random_state=seed
        ).fit(column[fitted, None], v[fitted])
        guess = tree.predict(column[scored, None])
        scores.append(recall_score(v[scored], guess, average="macro", zero_division=0))
    return torch.tensor(scores, dtype=torch.float64)
