"""Between the ELBO and the importance-weighted bound."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.iwae import log_mean_exp
from pyro_vae.objectives.schedules import Schedule

__all__ = ["CIWAE"]


class CIWAE(Objective):
    r"""A combination of the ELBO and the importance-weighted bound, of the same draws.

    .. math:: \frac{\beta}{K} \sum_{k=1}^K \log w_k
        + (1 - \beta) \log \frac1K \sum_{k=1}^K w_k, \qquad
        w_k = \frac{p(x \mid z_k) \, p(z_k)}{q(z_k \mid x)}

    Args:
        beta: Share of the ELBO, from 0 (`IWAE`) to 1; a number or a schedule.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If `beta` is outside [0, 1].

    References:
        Rainforth et al. Tighter variational bounds are not necessarily better. 2018.
    """

    beta: Tensor

    def __init__(self, beta: float | Schedule = 0.5, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        self.add_weight("beta", beta, most=1.0)

    def bound(self, d: Densities) -> Tensor:
        """The combination, [B]."""
        log_w = d.log_weights
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)
