"""The KL of a model decomposed over all data, and the latent units that it uses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from pyro_vae.arguments import as_rows, check_real, check_whole
from pyro_vae.marginals import marginals, pair_log_prob, pair_marginals
from pyro_vae.runtime import forked

CHUNK_ENTRIES = 2**21  # entries [draws, N, D] that are computed at once
CEILING_MARGIN = 0.1  # nats below log N, from which on the mutual information says little


@dataclass(frozen=True)
class Term:
    """A mean over data, in nats.

    Attributes:
        value: The mean.
        stderr_draws: Its standard error over draws of z, for these data.
        stderr_data: Its standard error over data, draws included.
    """

    value: float
    stderr_draws: float
    stderr_data: float

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.stderr_draws:.3f} +- {self.stderr_data:.3f}"


@dataclass(frozen=True, eq=False)
class Decomposition:
    """KL(q(z | x) || p(z)) averaged over N data, and its parts, which sum to it exactly.

    Attributes:
        kl: The KL itself, estimated from draws.
        mutual_information: Mutual information of z and the index of the datum; at most log N.
        aggregate_kl: KL(q(z) || p(z)), the sum of the next two.
        total_correlation: KL of q(z) from the product of its q(z_d).
        dimension_wise_kl: E log of that product over p(z): the sum of KL(q(z_d) || p(z_d)) where
            the prior factorises; otherwise it is no KL, and often negative.
        per_dimension: KL(q(z_d) || p(z_d)) [D], or None where the prior does not factorise.
        num_data: Number of data N.
        num_samples: Draws of z for each datum that was drawn from.
        seed: Seed of the draws.
    """

    kl: Term
    mutual_information: Term
    aggregate_kl: Term
    total_correlation: Term
    dimension_wise_kl: Term
    per_dimension: Tensor | None = field(repr=False)
    num_data: int
    num_samples: int
    seed: int

    @property
    def ceiling(self) -> float:
        """log N, the most that the mutual information with N data can be."""
        return math.log(self.num_data)

    @property
    def at_ceiling(self) -> bool:
        """Whether the mutual information is so near `ceiling` that more data would show more."""
        return self.mutual_information.value > self.ceiling - CEILING_MARGIN


def elbo_decomposition(
    posterior: Distribution,
    prior: Distribution,
    *,
    num_samples: int = 2,
    num_rows: int | None = None,
    seed: int = 0,
) -> Decomposition:
    r"""Estimates mutual information, total correlation and dimension-wise KL over all data.

    .. math:: \frac1N \sum_n \mathrm{KL}(q(z \mid x_n) \| p(z))
        = I(x; z) + \mathrm{KL}\big(q(z) \| \textstyle\prod_d q(z_d)\big)
        + E \log \frac{\prod_d q(z_d)}{p(z)}, \\ q(z) = \frac1N \sum_n q(z \mid x_n)

    The aggregate posterior is that of all N data, so that the choice of the data is the only bias;
    estimates from a batch, as in `objectives.BetaTC`, are far off. Cost: N^2 D densities for each
    of `num_samples`, computed in chunks.

    Args:
        posterior: q(z | x_n) of all data, batch [N], event (D,), a diagonal or full Normal.
        prior: p(z), batch (), event (D,).
        num_samples: Draws of z for each datum, two or more.
        num_rows: Data to draw from, evenly spaced; all if None. q(z) is over all N either way.
        seed: Seed of the draws; torch's generator is left as it was.

    Raises:
        ValueError: If the shapes do not fit, or the densities of single dimensions are not known.

    References:
        Hoffman and Johnson. ELBO surgery. 2016.
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
    """
    num_data = check_posterior(posterior)
    if prior.batch_shape or prior.event_shape != posterior.event_shape:
        raise ValueError(
            f"prior must have batch () and event {tuple(posterior.event_shape)}; got "
            f"{tuple(prior.batch_shape)} and {tuple(prior.event_shape)}"
        )
    check_whole(2, num_samples=num_samples)
    check_whole(0, seed=seed)
    parts, dimension_terms = [], []
    with torch.no_grad():
        for index, z in draws_of(posterior, num_samples, num_rows, seed):
            terms, each = _terms(posterior, prior, index, z)
            parts.append(terms)
            if isinstance(prior, Independent) and not prior.base_dist.event_shape:
                dimension_terms.append(each - prior.base_dist.log_prob(z))
    means = map(_term, torch.cat(parts, 1).reshape(5, -1, num_samples))
    kl, information, aggregate, correlation, mismatch = means
    kl_and_parts = kl, information, aggregate, correlation, mismatch
    per_dimension = torch.cat(dimension_terms).mean(0) if dimension_terms else None
    return Decomposition(*kl_and_parts, per_dimension, num_data, num_samples, seed)


def _terms(
    posterior: Distribution, prior: Distribution, index: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the KL and its parts at draws z [m, D], [5, m], and log q(z_d) [m, D]."""
    pairs = pair_log_prob(posterior, z).double()
    each = log_mean(pair_marginals(posterior, z))
    conditional, p = pairs.gather(1, index[:, None]).squeeze(1), prior.log_prob(z).double()
    joint, product = log_mean(pairs), each.sum(-1)
    terms = conditional - p, conditional - joint, joint - p, joint - product, product - p
    return torch.stack(terms), each


def draws_of(
    posterior: Distribution, num_samples: int, num_rows: int | None, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Draws from q(z | x_n) for evenly spaced data, in chunks whose pairs with all data fit.

    The draws of a datum follow one another. Arguments are those of `elbo_decomposition`.

    Yields:
        Index of the datum of each draw, int64 [m], and the draws [m, D].
    """
    each = marginals(posterior).loc
    check_whole(optional=True, num_rows=num_rows)
    if num_rows is not None and not 2 <= num_rows <= len(each):
        raise ValueError(f"num_rows must be from 2 to the {len(each)} data; got {num_rows}")
    rows = torch.linspace(0, len(each) - 1, num_rows or len(each), dtype=torch.float64)
    rows = rows.long().to(each.device)
    with forked(rows.device, seed):
        z = posterior.sample(torch.Size((num_samples,)))[:, rows]
    size = max(1, CHUNK_ENTRIES // each.numel())
    index, z = rows.repeat_interleave(num_samples), z.transpose(0, 1).flatten(0, 1)
    yield from zip(index.split(size), z.split(size))


def check_posterior(posterior: Distribution) -> int:
    """Returns the number N of data of a posterior over all of them.

    Raises:
        ValueError: If its shapes do not fit, or a parameter is not finite.
    """
    shapes = posterior.batch_shape, posterior.event_shape
    if any(len(shape) != 1 for shape in shapes) or shapes[0][0] < 2:
        raise ValueError(
            "posterior must be over all data, two or more: batch [N] and event (D,); got "
            f"{tuple(posterior.batch_shape)} and {tuple(posterior.event_shape)}"
        )
    each = marginals(posterior)
    if not (each.loc.isfinite().all() and each.scale.isfinite().all()):
        raise ValueError("posterior must have finite parameters: look at the encoder")
    return len(each.loc)


def log_mean(log_prob: Tensor) -> Tensor:
    """Returns the log of the mean over the data, the second dimension, in float64."""
    return log_prob.double().logsumexp(1) - math.log(log_prob.shape[1])


def _term(values: Tensor) -> Term:
    """Returns the mean of values [R, num_samples] and its standard errors."""
    R, num_samples = values.shape
    over_draws = (values.var(1).mean() / (R * num_samples)).sqrt().item()
    return Term(values.mean().item(), over_draws, values.mean(1).std().item() / R**0.5)


def active_units(posterior_means: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Returns which dimensions are active [D]: :math:`\mathrm{Var}_x(E_q[z_d \mid x])` is large.

    Args:
        posterior_means: E_q[z | x] of N data [N, D].
        threshold: Variance above which a dimension is active.

    Raises:
        ValueError: If there are fewer than two data, or a mean is not finite.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """
    check_real(0, threshold=threshold)
    means = as_rows("posterior_means", posterior_means)
    if len(means) < 2:
        raise ValueError("posterior_means must have two rows or more, for a variance; got 1")
    return torch.var(means, 0) > threshold
