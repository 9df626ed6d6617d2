"""Disentanglement measured by how well factors are predicted from latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole
from pyro_vae.metrics.information import Score, check_codes, gap

LEAST_STD = 0.05  # least standard deviation of a dimension's means that lets it vote


def sap(
    means: Tensor,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    categorical: Sequence[str] = ("shape",),
    seed: int = 0,
) -> Score:
    """Computes how much better the best dimension predicts a factor than the next best.

    An ordered factor is predicted by a straight line, and scored by its squared correlation. A
    categorical one of V values is predicted by V - 1 thresholds, fitted to half the rows, and
    scored on the others by balanced accuracy, whose chance level is 1 / V: such a factor
    contributes at most 1 - 1 / V.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        categorical: Names of the factors whose values have no order.
        seed: Seed of the split into halves.

    Raises:
        ValueError: If the shapes do not fit, or D is 1.

    References:
        Kumar, Sattigeri and Balakrishnan. Variational inference of disentangled latent concepts
        from unlabeled observations. 2018.
    """
    codes, values, labels = check_codes(means, factors, names, seed=seed)
    rows = [
        _threshold_accuracy(codes, v, seed)
        if label in categorical
        else _squared_correlation(codes, v.double())
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


def _squared_correlation(codes: Tensor, factor: Tensor) -> Tensor:
    """Returns the squared correlation of each dimension with the factor [D]; 0 if constant."""
    centred, target = codes - codes.mean(0), factor - factor.mean()
    covariance = target @ centred
    scale = centred.pow(2).sum(0) * target.pow(2).sum()
    return torch.where(scale > 0, covariance.pow(2) / scale, 0.0)


def _threshold_accuracy(codes: Tensor, factor: Tensor, seed: int) -> Tensor:
    """Returns the balanced accuracy of thresholds on each dimension [D]."""
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
        scores.append(recall_score(v[scored], guess, labels=np.unique(v[scored]), average="macro"))
    return torch.tensor(scores, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class DCI:
    """Three scores between 0 and 1, and what they were computed from.

    Attributes:
        disentanglement: Whether a dimension matters for one factor only.
        completeness: Whether a factor needs one dimension only.
        informativeness: Accuracy of the factors' prediction on test rows.
        train_accuracy: Accuracy on the rows that were fitted to.
        importance: Importance of each dimension for each factor [D, F]; columns sum to one, or to
            zero where nothing predicts the factor.
        variant: The predictor.
        factors: Names of the factors.
        num_train: Rows fitted to.
        num_test: Rows scored.
        seed: Seed of the split and of the trees.
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
    r"""Computes disentanglement, completeness and informativeness by gradient-boosted trees.

    Trees predict each factor from the whole code; R is the importance of each dimension.

    .. math:: \sum_d \rho_d \, (1 - H_F(R_{d \cdot})), \qquad
        \sum_f \rho_f \, (1 - H_D(R_{\cdot f}))

    where H are entropies of the normalised rows and columns, divided by their maximum, and the
    weights rho are their shares of all importance. Cost: trees for each value of each factor,
    minutes for 10,000 rows of tens of values.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        num_train: Rows to fit to; two thirds of all, at most 10,000, if None.
        num_test: Rows to score; those left, at most 5,000, if None.
        num_trees: Rounds of boosting.
        seed: Seed of the split and of the trees.

    Raises:
        ValueError: If the shapes do not fit, or the rows do not suffice.

    References:
        Eastwood and Williams. A framework for the quantitative evaluation of disentangled
        representations. 2018.
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019 (the predictor).
    """
    codes, values, labels = check_codes(means, factors, names, num_trees=num_trees, seed=seed)
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
    x = codes.numpy()
    fits = [_fit_trees(x, v.numpy(), fitted, scored, num_trees, seed) for v in values.T]
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


def _fit_trees(
    x: np.ndarray, v: np.ndarray, fitted: np.ndarray, scored: np.ndarray, num_trees: int, seed: int
) -> tuple[np.ndarray, float, float]:
    """Returns the importance [D], and the accuracy on the rows fitted to and on the others."""
    from sklearn.ensemble import GradientBoostingClassifier

    if len(np.unique(v[fitted])) == 1:
        constant = v[fitted][0]
        return np.zeros(x.shape[1]), 1.0, float((v[scored] == constant).mean())
    trees = GradientBoostingClassifier(n_estimators=num_trees, random_state=seed)
    trees.fit(x[fitted], v[fitted])
    scores = (trees.score(x[rows], v[rows]) for rows in (fitted, scored))
    importance = trees.feature_importances_.clip(min=0)  # rounding leaves some negative
    return importance, *map(float, scores)  # type: ignore[return-value]


def _concentration(importance: Tensor) -> float:
    """Averages one minus the normalised entropy of rows, weighted; zero without importance."""
    total = importance.sum()
    if total == 0 or importance.shape[1] < 2:
        return float(total > 0)
    share = importance / importance.sum(1, keepdim=True).clamp(min=1e-300)
    entropy = torch.special.entr(share).sum(1) / np.log(importance.shape[1])
    return (importance.sum(1) / total * (1 - entropy)).sum().item()


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
    """Computes the accuracy of guessing the fixed factor from the dimension that varies least.

    A vote holds one random factor at one value, takes `batch_size` rows with it, and notes the
    dimension whose variance, divided by that over all data, is least. Each dimension then stands
    for the factor with which it was noted most often. Dimensions of a standard deviation below
    0.05 over all data have no vote, as in disentanglement_lib, which compares the root of the
    variance with its `prune_dims.threshold` of 0.05. If none is left, the commonest factor is
    always guessed.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        num_votes: Votes that say what a dimension stands for; the paper takes 800.
        num_test: Votes that are scored, as many as in Locatello et al. 2019.
        batch_size: Rows of a vote, drawn with replacement.
        seed: Seed of the votes.

    Raises:
        ValueError: If the shapes do not fit.

    References:
        Kim and Mnih. Disentangling by factorising. 2018.
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019. With disentanglement_lib.
    """
    numbers = {"num_votes": num_votes, "num_test": num_test, "batch_size": batch_size}
    codes, values, labels = check_codes(means, factors, names, seed=seed, **numbers)
    variance = codes.var(0)
    fixed, rows = _draw_votes(values, num_votes + num_test, batch_size, seed)
    share = (codes[rows].var(1) / variance).where(variance.sqrt() >= LEAST_STD, torch.inf)
    least_varying = share.argmin(1)  # 0 if no dimension has a vote
    table = torch.zeros(codes.shape[1], values.shape[1])
    votes = least_varying[:num_votes], fixed[:num_votes]
    table.index_put_(votes, torch.ones(()), accumulate=True)
    correct = table.argmax(1)[least_varying[num_votes:]] == fixed[num_votes:]
    return Score(
        "factor_vae_score",
        correct.double().mean().item(),
        "Kim and Mnih 2018: majority vote of the dimension of least variance",
        labels,
        len(codes),
        seed=seed,
        num_samples=num_votes + num_test,
        stderr=_stderr(correct),
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
    """Computes the accuracy of a linear classifier of the fixed factor, from row differences.

    A vote holds one factor at one value in both rows of each of `batch_size` pairs, and takes
    the mean absolute difference of the pairs' posterior means. The classifier is logistic
    regression. A rotated code may score high too: factors need not align with dimensions.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        num_votes: Votes that the classifier is fitted to.
        num_test: Votes that are scored.
        batch_size: Pairs of a vote.
        seed: Seed of the votes.

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
    codes, values, labels = check_codes(means, factors, names, seed=seed, **numbers)
    if len(labels) < 2:
        raise ValueError("expected at least two factors, to tell one from another; got one")
    fixed, rows = _draw_votes(values, num_votes + num_test, 2 * batch_size, seed)
    pairs = codes[rows].unflatten(1, (batch_size, 2))
    inputs = (pairs[:, :, 0] - pairs[:, :, 1]).abs().mean(1).numpy()
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    classifier.fit(inputs[:num_votes], fixed[:num_votes].numpy())
    correct = torch.from_numpy(classifier.predict(inputs[num_votes:])) == fixed[num_votes:]
    return Score(
        "beta_vae_score",
        correct.double().mean().item(),
        "Higgins et al. 2017: logistic regression on mean absolute differences",
        labels,
        len(codes),
        seed=seed,
        num_samples=num_votes + num_test,
        stderr=_stderr(correct),
    )


def _draw_votes(factors: Tensor, num_votes: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns a factor for each vote [V], and rows that share a value of it [V, size]."""
    generator = np.random.default_rng(seed)
    fixed = generator.integers(factors.shape[1], size=num_votes)
    rows = np.empty((num_votes, size), dtype=np.int64)
    for f, values in enumerate(factors.T.numpy()):
        order = np.argsort(values, kind="stable")
        _, starts, counts = np.unique(values[order], return_index=True, return_counts=True)
        chosen = fixed == f
        value = generator.integers(len(starts), size=chosen.sum())
        place = generator.random((len(value), size)) * counts[value, None]
        rows[chosen] = order[starts[value, None] + place.astype(np.int64)]
    return torch.from_numpy(fixed), torch.from_numpy(rows)


def _stderr(correct: Tensor) -> float:
    return (correct.double().var() / len(correct)).sqrt().item()
