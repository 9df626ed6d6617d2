"""The ELBO, with a gradient that loses its noise as the posterior becomes exact."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.schedules import Schedule

__all__ = ["StickingTheLanding"]


class StickingTheLanding(Objective):
    r"""The sampled ELBO, its gradient through the draws alone.

    .. math:: \frac1K \sum_{k=1}^K \big[ \log p(x \mid z_k)
        - \beta \, (\log q_{\mathrm{stop}(\phi)}(z_k \mid x) - \log p(z_k)) \big],
        \qquad z_k \sim q_\phi(z \mid x)

    What is left out of the gradient has expectation zero, so that it is unbiased; at beta = 1
    and the exact posterior it is zero for every draw.

    Args:
        beta: Weight of the KL, zero or more; a number or a schedule.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If `beta` is negative; on first use, if a distribution of the guide cannot
            score a point that it did not draw.

    Cost: one more density of the latents; a flow is inverted for it.

    References:
        Roeder, Wu and Duvenaud. Sticking the landing: simple, lower-variance gradient
        estimators for variational inference. 2017.
    """

    beta: Tensor

    def __init__(self, beta: float | Schedule = 1.0, num_particles: int = 1) -> None:
        super().__init__(num_particles)
        self.add_weight("beta", beta)

    def bound(self, d: Densities) -> Tensor:
        """Mean reconstruction less beta times the sampled KL, [B]."""
        return self._bound(d, d.log_posterior)

    def surrogate(self, d: Densities) -> Tensor:
        """The same, without the gradient of the guide's own parameters, [B]."""
        return self._bound(d, d.log_posterior_detached)

    def _bound(self, d: Densities, log_posterior: Tensor) -> Tensor:
        return (d.log_likelihood - self.beta * (log_posterior - d.log_prior)).mean(0)
