"""Minibatch estimates of the aggregate posterior q(z), which two objectives share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.marginals import pair_log_prob, pair_marginals
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.latent import draws, only_site

__all__ = ["AggregateObjective", "estimator_weights"]


def estimator_weights(
    estimator: str, batch_size: int, num_data: int, like: Tensor | None = None
) -> Tensor:
    r"""Weights w [B, B] of the estimate :math:`\hat q(z_i) = \sum_j w_{ij} q(z_i \mid x_j)`.

    - "weighted": :math:`1 / (N B)` everywhere. Far below q(z): by log B where the q(z | x_n) do
      not overlap, by log N where they are one. Sums of several logarithms, such as a total
      correlation, are off by as many such terms.
    - "stratified": :math:`1 / N` for the datum that z was drawn from, and
      :math:`(N - 1) / (N (B - 1))` for each other one: :math:`E[\hat q(z)] = q(z)` over batches.
      The logarithm stays biased, low, by Jensen's inequality. Chen et al. give one of the
      others, whichever comes last, its own weight; this is the average over their order, which
      is as unbiased and varies less.

    A batch of one row says nothing of the other data: it counts as all of them, w = 1.

    Args:
        estimator: "weighted" or "stratified".
        batch_size: B.
        num_data: N, at least B.
        like: A tensor of the wanted type and device; those of torch's default if None.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
        Esmaeili et al. Structured disentangled representations. 2019.
    """
    B, N = batch_size, num_data
    weights = torch.empty(B, B) if like is None else like.new_empty(B, B)
    if B == 1:
        return weights.fill_(1.0)
    if estimator == "weighted":
        return weights.fill_(1 / (N * B))
    return weights.fill_((N - 1) / (N * (B - 1))).fill_diagonal_(1 / N)


class AggregateObjective(Objective):
    """An objective that estimates q(z) from a batch of q(z | x_n).

    Args:
        estimator: "stratified" or "weighted", see `estimator_weights`.
        num_data: Rows N of the training data. None: what `prepare` was told, else the size of
            the plate "data", which is the batch's own unless it is subsampled.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If the estimator is unknown; on use, if N is below the rows of the batch,
            there are several latent sites, or the guide's densities of single dimensions are
            not known.
    """

    batch_level = True

    def __init__(self, estimator: str, num_data: int | None, num_particles: int) -> None:
        super().__init__(num_particles)
        if estimator not in ("stratified", "weighted"):
            raise ValueError(f"estimator must be 'stratified' or 'weighted'; got {estimator!r}")
        if num_data is not None and num_data < 1:
            raise ValueError(f"num_data must be at least 1; got {num_data}")
        self.estimator = estimator
        self.num_data = num_data
        self._told: int | None = None

    def prepare(self, num_data: int, steps_per_epoch: int) -> None:
        """Takes the number of training data, unless `num_data` was given."""
        super().prepare(num_data, steps_per_epoch)
        self._told = num_data

    def log_marginals(self, d: Densities) -> Tensor:
        """Estimates of log q(z_d) [K, B, D], in nats."""
        return self._average(d, pair_marginals(only_site(d).guide, draws(d)))

    def log_aggregate(self, d: Densities, dims: Sequence[int] | None = None) -> Tensor:
        """Estimates of log q(z), or of log q(z_G) of the dimensions `dims`, [K, B]."""
        return self._average(d, pair_log_prob(only_site(d).guide, draws(d), dims))

    def _average(self, d: Densities, log_prob: Tensor) -> Tensor:
        """Logarithm of the weighted sum over data, the third dimension of `log_prob`."""
        weights = estimator_weights(self.estimator, d.num_data, self._size(d), log_prob)
        log_weights = weights.log().reshape(*weights.shape, *[1] * (log_prob.ndim - 3))
        return (log_prob + log_weights).logsumexp(2)

    def _size(self, d: Densities) -> int:
        size = self.num_data or self._told or round(d.scale * d.num_data)
        if size < d.num_data:
            raise ValueError(
                f"num_data must be at least the {d.num_data} rows of the batch; got {size}: "
                "give the number of training data"
            )
        return size
