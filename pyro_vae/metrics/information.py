"""Disentanglement as mutual information of latents and factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import one_hot

from pyro_vae.arguments import as_rows, check_whole
from pyro_vae.marginals import marginals, pair_marginals
from pyro_vae.metrics.decomposition import check_posterior, draws_of, log_mean


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


def mig(
    posterior: Distribution,
    factors: Tensor,
    names: Sequence[str] | None = None,
    *,
    without: Sequence[str] = ("shape",),
    num_samples: int = 1,
    num_rows: int | None = None,
    seed: int = 0,
) -> Score:
    r"""Mutual information gap of draws of z, of Chen et al.

    .. math:: \frac1F \sum_f \frac{I(z_{d_1(f)}; v_f) - I(z_{d_2(f)}; v_f)}{H(v_f)}

    where d_1 and d_2 are the dimensions of most and next information on factor f, and I is that
    of continuous z_d with q(z_d) and q(z_d | v_f) aggregated over all data; the paper leaves
    out the factor shape. Two to four times `mig_of_means` on the same model is usual.

    Args:
        posterior: q(z | x_n) of all data, batch [N], event (D,), a diagonal or full Normal.
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        without: Those, by name, that are left out; unknown names are ignored.
        num_samples: Draws of z for each datum.
        num_rows: Data to draw from; all if None.
        seed: Of the draws.

    Raises:
        ValueError: If the shapes do not fit, a factor has one value, or D is 1.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
    """
    means = marginals(posterior).loc
    _, values, labels = check(means, factors, names, num_samples=num_samples, seed=seed)
    kept = [f for f, label in enumerate(labels) if label not in without]
    if not kept:
        raise ValueError(f"expected a factor that is not left out; got {labels} without {without}")
    part = values[:, kept]
    information = factor_information(
        posterior, part, num_samples=num_samples, num_rows=num_rows, seed=seed
    )
    gaps = relative_gap(information, part)
    return Score(
        "mig",
        gaps.mean().item(),
        "Chen et al. 2018: draws of z, aggregate posterior",
        tuple(labels[f] for f in kept),
        len(factors),
        seed=seed,
        num_samples=num_samples * (num_rows or len(factors)),
        per_factor=gaps,
        matrix=information,
    )


def mig_of_means(
    means: Tensor, factors: Tensor, names: Sequence[str] | None = None, *, bins: int = 20
) -> Score:
    """Mutual information gap of posterior means in a histogram, of Locatello et al.

    As `mig`, with the information between a factor and the mean's bin, over all factors.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Of the factors.
        bins: Bins of equal width over the range of each dimension.

    Raises:
        ValueError: If the shapes do not fit, a factor has one value, or D is 1.

    References:
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019.
    """
    codes, values, labels = check(means, factors, names, bins=bins)
    information = information_matrix(values, discretise(codes, bins))
    gaps = relative_gap(information, values)
    return Score(
        "mig",
        gaps.mean().item(),
        "Locatello et al. 2019: histogram of posterior means",
        labels,
        len(codes),
        bins=bins,
        per_factor=gaps,
        matrix=information,
    )


def factor_information(
    posterior: Distribution,
    factors: Tensor,
    *,
    num_samples: int = 1,
    num_rows: int | None = None,
    seed: int = 0,
) -> Tensor:
    r"""Mutual information I(z_d; v_f) of draws of z with each factor, in nats, [F, D].

    .. math:: E \log q(z_d \mid v_f) - E \log q(z_d), \quad
        q(z_d \mid v) = \mathrm{mean}_{n: v_f(n) = v} \, q(z_d \mid x_n)

    over all N data: a mean over draws, so zero information may come out a little below zero.
    Arguments are those of `mig`. Cost: N^2 D densities for each draw, and a matrix product.
    """
    check_posterior(posterior)
    means, values, _ = check(marginals(posterior).loc, factors)
    device = marginals(posterior).loc.device
    members = [one_hot(v.unique(return_inverse=True)[1]).double().to(device) for v in values.T]
    total = torch.zeros(len(members), means.shape[1], dtype=torch.float64, device=device)
    number = 0
    with torch.no_grad():
        for own, z in draws_of(posterior, num_samples, num_rows, seed):
            number += len(z)
            pairs = pair_marginals(posterior, z).double()
            marginal = log_mean(pairs)
            for f, member in enumerate(members):
                total[f] += (_log_mean_within(pairs, member, own) - marginal).sum(0)
    return (total / number).cpu()


def _log_mean_within(pairs: Tensor, member: Tensor, own: Tensor) -> Tensor:
    """Log mean of `pairs` [m, N, D] over the data of each draw's own factor value, [m, D]."""
    highest = pairs.amax(1, keepdim=True)
    same = member[own] / member.sum(0)  # [m, V]: the value, over its number of data
    within = torch.einsum("mnd,nv,mv->md", (pairs - highest).exp(), member, same)
    return within.log() + highest.squeeze(1)


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


def discretise(codes: Tensor, bins: int) -> Tensor:
    """Each column of `codes` [N, D] in `bins` bins of equal width over its range, int64."""
    low, high = codes.min(0).values, codes.max(0).values
    width = torch.where(high > low, high - low, 1.0)
    return ((codes - low) / width * bins).long().clamp(max=bins - 1)


def entropies(values: Tensor) -> Tensor:
    """Of the empirical distribution of each column of `values` int64 [N, F], in nats, [F]."""
    shares = [v.unique(return_counts=True)[1].double() / len(v) for v in values.T]
    return torch.stack([-(p * p.log()).sum() for p in shares])


def information_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Mutual information of columns of `first` [N, F] with those of `second` [N, D], [F, D].

    .. math:: I(a; b) = H(a) + H(b) - H(a, b)

    in nats, of the empirical distribution of int64 values; biased upwards by about
    (cells - 1) / (2 N) in a table that has more cells than rows and columns.
    """
    pairs = [entropies(a.unsqueeze(1) * (second.max() + 1) + second) for a in first.T]
    apart = entropies(first).unsqueeze(1) + entropies(second)
    return (apart - torch.stack(pairs)).clamp(min=0)  # below by rounding alone


def gap(scores: Tensor) -> Tensor:
    """The largest of each row of `scores` [F, D] less the second largest, [F]."""
    if scores.shape[1] < 2:
        raise ValueError("expected at least two latent dimensions, for a gap between two")
    first, second = scores.topk(2, dim=1).values.T
    return first - second


def relative_gap(information: Tensor, factors: Tensor) -> Tensor:
    """`gap` of the information on each of `factors` [N, F], in units of its entropy, [F]."""
    entropy = entropies(factors)
    if (entropy == 0).any():
        constant = (entropy == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"expected factors that vary; column(s) {constant} have one value: leave them out"
        )
    return gap(information) / entropy
