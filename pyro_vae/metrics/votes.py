"""Scores by classifiers of which factor is held fixed: FactorVAE's and beta-VAE's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae.metrics.factors import check
from pyro_vae.metrics.score import Score

__all__ = ["beta_vae_score", "factor_vae_score"]

PRUNED = 0.05  # least standard deviation of a posterior mean that has a vote


def factor_vae_score(
    means: Tensor,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    num_votes: int = 10_000,
    num_test: int = 5_000,
    batch_size: int = 64,
    seed: int = 0,
) -> Score:
    """Accuracy of telling the fixed factor from the dimension that varies least.

    A vote holds one factor, chosen at random, at one value, takes `batch_size` rows of it, and
    notes the dimension of least variance over the variance over all data. Each dimension then
    stands for the factor it was noted with most often. Dimensions of a standard deviation below
    0.05 over all data have no vote, as in disentanglement_lib, which compares the root of the
    variance with its `prune_dims.threshold` of 0.05; with none left the score is that of the
    commonest factor.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        num_votes: Votes that say what a dimension stands for; the paper takes 800.
        num_test: Votes that are scored, as many as in Locatello et al. 2019.
        batch_size: Rows of a vote, drawn with replacement.
        seed: Of the votes.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Kim and Mnih. Disentangling by factorising. 2018.
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019. With disentanglement_lib.
    """
    numbers = {"num_votes": num_votes, "num_test": num_test, "batch_size": batch_size}
    codes, values, labels = check(means, factors, names, seed=seed, **numbers)
    F, variance = values.shape[1], codes.var(0)
    alive = variance.sqrt() >= PRUNED
    kinds, rows = _fixed(values, num_votes + num_test, batch_size, seed)
    if alive.any():
        noted = (codes[:, alive][rows].var(1) / variance[alive]).argmin(1)
    else:
        noted = torch.zeros(len(kinds), dtype=torch.long)
    table = torch.zeros(int(noted.max()) + 1, F)
    table.index_put_((noted[:num_votes], kinds[:num_votes]), torch.ones(()), accumulate=True)
    right = table.argmax(1)[noted[num_votes:]] == kinds[num_votes:]
    return Score(
        "factor_vae_score",
        right.double().mean().item(),
        "Kim and Mnih 2018: majority vote of the dimension of least variance",
        labels,
        len(codes),
        seed=seed,
        num_samples=num_votes + num_test,
        stderr=_stderr(right),
    )


def beta_vae_score(
    means: Tensor,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    num_votes: int = 10_000,
    num_test: int = 5_000,
    batch_size: int = 64,
    seed: int = 0,
) -> Score:
    """Accuracy of a linear classifier of the fixed factor, from differences of pairs.

    A vote holds one factor at one value in both rows of each of `batch_size` pairs, and takes
    the mean absolute difference of their means. The classifier is logistic regression. A
    rotated code may score high: it need not align with the dimensions.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        num_votes: Votes that the classifier is fitted to.
        num_test: Votes that are scored.
        batch_size: Pairs of a vote.
        seed: Of the votes.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Higgins et al. beta-VAE: learning basic visual concepts with a constrained variational
        framework. 2017.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    numbers = {"num_votes": num_votes, "num_test": num_test, "batch_size": batch_size}
    codes, values, labels = check(means, factors, names, seed=seed, **numbers)
    kinds, rows = _fixed(values, num_votes + num_test, 2 * batch_size, seed)
    pairs = codes[rows].unflatten(1, (batch_size, 2))
    inputs = (pairs[:, :, 0] - pairs[:, :, 1]).abs().mean(1).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    classifier.fit(inputs[:num_votes], kinds[:num_votes].numpy())
    right = torch.from_numpy(classifier.predict(inputs[num_votes:])) == kinds[num_votes:]
    return Score(
        "beta_vae_score",
        right.double().mean().item(),
        "Higgins et al. 2017: logistic regression on mean absolute differences",
        labels,
        len(codes),
        seed=seed,
        num_samples=num_votes + num_test,
        stderr=_stderr(right),
    )


def _fixed(factors: Tensor, num_votes: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """A factor for each vote [V], and rows that share a value of it [V, size]."""
    generator = np.random.default_rng(seed)
    kinds = generator.integers(factors.shape[1], size=num_votes)
    rows = np.empty((num_votes, size), dtype=np.int64)
    for f, values in enumerate(factors.T.numpy()):
        order = np.argsort(values, kind="stable")
        _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
        mine = kinds == f
        value = generator.integers(len(starts), size=mine.sum())
        place = generator.random((len(value), size)) * counts[value, None]
        rows[mine] = order[starts[value, None] + place.astype(np.int64)]
    return torch.from_numpy(kinds), torch.from_numpy(rows)


def _stderr(right: Tensor) -> float:
    return (right.double().var() / len(right)).sqrt().item()
