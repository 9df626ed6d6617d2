"""The variational Renyi bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.iwae import log_mean_exp
from pyro_vae.objectives.schedules import Schedule

__all__ = ["Renyi"]

NEAR = 1e-6  # of alpha to 1, where the limit is taken


class Renyi(Objective):
    r"""Variational Renyi bound, between the importance-weighted bound and beyond the ELBO.

    .. math:: \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}, \qquad
        w_k = \frac{p(x \mid z_k) \, p(z_k)}{q(z_k \mid x)}

    At alpha = 0 it is `IWAE`, at 1 the sampled ELBO. It falls as alpha grows, and for
    alpha < 0 it need not be below log p(x).

    Args:
        alpha: Order of the divergence; a number or a schedule.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If `alpha` is not finite.

    References:
        Li and Turner. Renyi divergence variational inference. 2016.
    """

    alpha: Tensor

    def __init__(self, alpha: float | Schedule = 0.5, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        self.add_weight("alpha", alpha, least=-math.inf)

    def bound(self, d: Densities) -> Tensor:
        """Log of the power mean of the weights, [B]."""
        order = 1 - self.alpha
        near = order.abs() < NEAR
        order = torch.where(near, torch.ones_like(order), order)
        log_w = d.log_weights.double()  # small orders cancel
        power = log_mean_exp(order * log_w) / order
        return torch.where(near, log_w.mean(0), power).to(d.log_weights.dtype)
