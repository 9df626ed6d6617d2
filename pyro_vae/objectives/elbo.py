"""The evidence lower bound, with a weight on its KL."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective, check_kl, total_kl
from pyro_vae.objectives.schedules import Schedule

__all__ = ["ELBO"]


class ELBO(Objective):
    r"""Evidence lower bound; the beta-VAE for another weight than one.

    .. math:: \frac1K \sum_{k=1}^K \log p(x \mid z_k) - \beta \, \mathrm{KL}(q(z \mid x) \| p(z))

    Args:
        beta: Weight of the KL, zero or more; a number or a schedule.
        kl: "analytic", "sampled", or "auto": analytic where there is a rule for the pair.
        num_particles: Draws of z for each datum, the L of the first reference.

    Raises:
        ValueError: If `beta` is negative; on first use, if `kl` is "analytic" without a rule.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
        Higgins et al. beta-VAE. 2017.
    """

    beta: Tensor

    def __init__(
        self, beta: float | Schedule = 1.0, kl: str = "auto", num_particles: int = 1
    ) -> None:
        super().__init__(num_particles)
        self.add_weight("beta", beta)
        self.kl = check_kl(kl)

    def bound(self, d: Densities) -> Tensor:
        """Mean reconstruction less beta times the KL, [B]."""
        return d.log_likelihood.mean(0) - self.beta * total_kl(d, self.kl)
