"""Disentanglement, completeness and informativeness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole
from pyro_vae.metrics.factors import check

__all__ = ["DCI", "dci"]


@dataclass(frozen=True, eq=False)
class DCI:
    """Three numbers between 0 and 1, and what they were read off.

    Attributes:
        disentanglement: Whether a dimension matters for one factor only.
        completeness: Whether a factor needs one dimension only.
        informativeness: Accuracy of the factors' prediction on rows that were not fitted to.
        train_accuracy: The same on those that were.
        importance: Of each dimension for each factor [D, F]; a column sums to one, or is zero
            where nothing predicts.
        variant: The predictor.
        factors: Names of the factors.
        num_train: Rows fitted to.
        num_test: Rows scored.
        seed: Of the split and of the trees.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    train_accuracy: float
    importance: Tensor = field(repr=False)
    variant: str
    factors: tuple[str, ...]
    num_train: int
    num_test: int
    seed: int


def dci(
    means: Tensor,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    num_train: int | None = None,
    num_test: int | None = None,
    num_trees: int = 100,
    seed: int = 0,
) -> DCI:
    r"""Disentanglement, completeness and informativeness by gradient-boosted trees.

    Trees predict each factor from the whole code; R is the importance of each dimension.

    .. math:: \sum_d \rho_d \, (1 - H_F(R_{d \cdot})), \qquad
        \sum_f \rho_f \, (1 - H_D(R_{\cdot f}))

    with entropies of the normalised rows and columns, in units of their largest, and weights rho
    their share of all importance. Cost: trees for each value of each factor, minutes for 10,000
    rows of tens of values.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        num_train: Rows fitted to; two thirds of them, 10,000 at most, if None.
        num_test: Rows scored; what is left, 5,000 at most, if None.
        num_trees: Rounds of boosting.
        seed: Of the split and of the trees.

    Raises:
        ValueError: If the shapes do not fit, or the rows do not suffice.

    References:
        Eastwood and Williams. A framework for the quantitative evaluation of disentangled
        representations. 2018.
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019 (the predictor).
    """
    codes, values, labels = check(means, factors, names, num_trees=num_trees, seed=seed)
    check_whole(optional=True, num_train=num_train, num_test=num_test)
    N = len(codes)
    num_train = min(10_000, 2 * N // 3) if num_train is None else num_train
    num_test = min(5_000, N - num_train) if num_test is None else num_test
    if min(num_train, num_test) < 1 or num_train + num_test > N:
        raise ValueError(
            f"expected at most {N} rows for training and test, at least one each; got {num_train} "
            f"and {num_test}"
        )
    order = np.random.default_rng(seed).permutation(N)
    fitted, scored = order[:num_train], order[num_train : num_train + num_test]
    fits = [_boost(codes.numpy(), v.numpy(), fitted, scored, num_trees, seed) for v in values.T]
    importance = torch.from_numpy(np.stack([fit[0] for fit in fits], 1))
    train, test = np.mean([fit[1:] for fit in fits], 0)
    return DCI(
        _concentration(importance),
        _concentration(importance.T),
        float(test),
        float(train),
        importance,
        f"gradient-boosted trees, {num_trees} rounds",
        labels,
        num_train,
        num_test,
        seed,
    )


def _boost(
    x: np.ndarray, v: np.ndarray, fitted: np.ndarray, scored: np.ndarray, num_trees: int, seed: int
) -> tuple[np.ndarray, float, float]:
    """Importance [D], and accuracy on the rows fitted to and on the others."""
    from sklearn.ensemble import GradientBoostingClassifier

    if len(np.unique(v[fitted])) == 1:
        known = v[fitted][0]
        return np.zeros(x.shape[1]), 1.0, float((v[scored] == known).mean())
    trees = GradientBoostingClassifier(n_estimators=num_trees, random_state=seed)
    trees.fit(x[fitted], v[fitted])
    scores = (trees.score(x[rows], v[rows]) for rows in (fitted, scored))
    importance = trees.feature_importances_.clip(min=0)  # rounding leaves some below
    return importance, *map(float, scores)  # type: ignore[return-value]


def _concentration(importance: Tensor) -> float:
    """Weighted mean over rows of one less their normalised entropy; zero without importance."""
    total = importance.sum()
    if total == 0 or importance.shape[1] < 2:
        return float(total > 0)
    share = importance / importance.sum(1, keepdim=True).clamp(min=1e-300)
    entropy = torch.special.entr(share).sum(1) / np.log(importance.shape[1])
    return (importance.sum(1) / total * (1 - entropy)).sum().item()
