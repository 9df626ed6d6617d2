"""Disentanglement measured by mutual information between latents and factors."""

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
    """A score between 0 and 1, or just outside if sampled, and how it was computed.

    Scores of different variants, bins or factors cannot be compared.

    Attributes:
        metric: Name of the metric.
        value: The score.
        variant: The published definition that was used.
        factors: Names of the factors that it is over.
        num_data: Number of rows N.
        seed: Seed of draws and fits, or None if there were none.
        bins: Bins of the histogram of a dimension, or None.
        num_samples: Number of draws or votes, or None.
        per_factor: Scores of the factors [F], if `value` is their mean.
        matrix: Table [F, D] behind the score, such as mutual information in nats.
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


def check_codes(
    codes: Tensor, factors: Tensor, names: Sequence[str] | None = None, **numbers: Any
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Returns codes [N, D] as float64, factors [N, F] as int64, on the CPU, and factors' names.

    The other arguments must be whole numbers from 1 on, a seed from 0 on.

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
    r"""Estimates the mutual information gap of Chen et al. from draws of z.

    .. math:: \frac1F \sum_f \frac{I(z_{d_1(f)}; v_f) - I(z_{d_2(f)}; v_f)}{H(v_f)}

    where d_1 and d_2 are the dimensions of most and next information on factor f, and I is the
    information of continuous z_d, with q(z_d) and q(z_d | v_f) aggregated over all data. The paper
    leaves out the factor shape. It is usually two to four times `mig_of_means` of the same model.

    Args:
        posterior: q(z | x_n) of all data, batch [N], event (D,), a diagonal or full Normal.
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        without: Names of factors that are left out; unknown names are ignored.
        num_samples: Draws of z for each datum.
        num_rows: Number of data to draw from; all if None.
        seed: Seed of the draws.

    Raises:
        ValueError: If the shapes do not fit, a factor has one value, or D is 1.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
    """
    means = marginals(posterior).loc
    _, values, labels = check_codes(means, factors, names, num_samples=num_samples, seed=seed)
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
    """Computes the mutual information gap of Locatello et al. from posterior means in bins.

    It is `mig` with the information between a factor and the bin of the mean, over all factors.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F].
        names: Names of the factors.
        bins: Bins of equal width over the range of each dimension.

    Raises:
        ValueError: If the shapes do not fit, a factor has one value, or D is 1.

    References:
        Locatello et al. Challenging common assumptions in the unsupervised learning of
        disentangled representations. 2019.
    """
    codes, values, labels = check_codes(means, factors, names, bins=bins)
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
    r"""Estimates mutual information I(z_d; v_f) of draws of z with each factor, in nats, [F, D].

    .. math:: E \log q(z_d \mid v_f) - E \log q(z_d), \quad
        q(z_d \mid v) = \mathrm{mean}_{n: v_f(n) = v} \, q(z_d \mid x_n)

    over all N data. It is a mean over draws, so that zero information may come out slightly
    negative. Arguments are those of `mig`. Cost: N^2 D densities per draw, and a matrix product.
    """
    check_posterior(posterior)
    means, values, _ = check_codes(marginals(posterior).loc, factors)
    device = marginals(posterior).loc.device
    members = [one_hot(v.unique(return_inverse=True)[1]).double().to(device) for v in values.T]
    total = torch.zeros(len(members), means.shape[1], dtype=torch.float64, device=device)
    number = 0
    with torch.no_grad():
        for index, z in draws_of(posterior, num_samples, num_rows, seed):
            number += len(z)
            pairs = pair_marginals(posterior, z).double()
            marginal = log_mean(pairs)
            for f, member in enumerate(members):
                total[f] += (_log_mean_within(pairs, member, index) - marginal).sum(0)
    return (total / number).cpu()


def _log_mean_within(pairs: Tensor, member: Tensor, index: Tensor) -> Tensor:
    """Averages `pairs` [m, N, D], as logs, over data of each draw's own factor value, [m, D]."""
    highest = pairs.amax(1, keepdim=True)
    same = member[index] / member.sum(0)  # [m, V]: the value, over its number of data
    within = torch.einsum("mnd,nv,mv->md", (pairs - highest).exp(), member, same)
    return within.log() + highest.squeeze(1)


def modularity(
    means: Tensor, factors: Tensor, names: Sequence[str] | None = None, *, bins: int = 20
) -> Score:
    r"""Computes one minus the share of a dimension's squared information on other factors.

    .. math:: \frac1D \sum_d \Big(1 - \frac{\sum_{f \neq f^*} I_{fd}^2}{(F - 1) I_{f^* d}^2}\Big)

    with f* the factor of most information on dimension d, in nats, and bins as in
    `mig_of_means`. A dimension without information on any factor counts as zero. Two dimensions
    may be on the same factor at no cost.

    Args:
        means: E[z | x_n] [N, D].
        factors: Index of each factor's value [N, F], two or more of them.
        names: Names of the factors.
        bins: Bins of equal width over the range of each dimension.

    Raises:
        ValueError: If the shapes do not fit, or there is one factor.

    References:
        Ridgeway and Mozer. Learning deep disentangled embeddings with the F-statistic loss. 2018.
    """
    codes, values, labels = check_codes(means, factors, names, bins=bins)
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
    """Returns bin numbers of `codes` [N, D], int64: `bins` of equal width over each range."""
    low, high = codes.min(0).values, codes.max(0).values
    width = torch.where(high > low, high - low, 1.0)
    return ((codes - low) / width * bins).long().clamp(max=bins - 1)


def entropies(values: Tensor) -> Tensor:
    """Returns entropies [F], in nats, of the columns of `values` [N, F] (int64) as observed."""
    shares = [v.unique(return_counts=True)[1].double() / len(v) for v in values.T]
    return torch.stack([-(p * p.log()).sum() for p in shares])


def information_matrix(first: Tensor, second: Tensor) -> Tensor:
    r"""Returns mutual information [F, D] of columns of `first` [N, F] and of `second` [N, D].

    .. math:: I(a; b) = H(a) + H(b) - H(a, b)

    in nats, of the empirical distribution of int64 values. It is biased upwards by about
    (A - 1) (B - 1) / (2 N) where a has A values and b has B.
    """
    joint = [entropies(a.unsqueeze(1) * (second.max() + 1) + second) for a in first.T]
    separate = entropies(first).unsqueeze(1) + entropies(second)
    return (separate - torch.stack(joint)).clamp(min=0)  # negative by rounding alone


def gap(scores: Tensor) -> Tensor:
    """Returns the largest minus the second largest of each row of `scores` [F, D], [F]."""
    if scores.shape[1] < 2:
        raise ValueError("expected at least two latent dimensions, for a gap between two")
    first, second = scores.topk(2, dim=1).values.T
    return first - second


def relative_gap(information: Tensor, factors: Tensor) -> Tensor:
    """Returns `gap` of the information on each of `factors` [N, F], over its entropy, [F]."""
    entropy = entropies(factors)
    if (entropy == 0).any():
        constant = (entropy == 0).nonzero().flatten().tolist()
        raise ValueError(
            f"expected factors that vary; column(s) {constant} have one value: leave them out"
        )
    return gap(information) / entropy
