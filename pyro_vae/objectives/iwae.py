"""The importance-weighted bound."""

from __future__ import annotations

import math

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective

__all__ = ["IWAE", "log_mean_exp"]


class IWAE(Objective):
    r"""Importance-weighted bound: tighter than the ELBO, and tighter with every draw.

    .. math:: \log \frac1K \sum_{k=1}^K w_k, \qquad
        w_k = \frac{p(x \mid z_k) \, p(z_k)}{q(z_k \mid x)}

    One draw gives the sampled ELBO. Its gradient for the guide gets noisier, relative to its
    size, as K grows; `DReG` and `PIWAE` are the remedies.

    Args:
        num_particles: Draws of z for each datum, K.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
        Rainforth et al. Tighter variational bounds are not necessarily better. 2018.
    """

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)

    def bound(self, d: Densities) -> Tensor:
        """Log of the mean weight, [B]."""
        return log_mean_exp(d.log_weights)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Log of the mean over the first dimension, of numbers given by their logs."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))
