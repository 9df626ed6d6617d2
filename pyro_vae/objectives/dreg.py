"""The importance-weighted bound with a gradient fit for many draws."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.iwae import IWAE

__all__ = ["DReG"]


class DReG(IWAE):
    r"""Importance-weighted bound; the guide learns from doubly reparameterised gradients.

    With weights normalised over draws, :math:`\bar w_k = w_k / \sum_j w_j`, the gradients are

    .. math:: \nabla_\phi = \sum_{k=1}^K \bar w_k^2 \,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
        \nabla_\theta = \sum_{k=1}^K \bar w_k \, \nabla_\theta \log p(x, z_k).

    Both are unbiased for those of `IWAE`, and the first does not drown in noise as K grows.

    Args:
        num_particles: Draws of z for each datum, K, two or more.

    Raises:
        ValueError: If `num_particles` is below two; on first use, if a distribution of the
            guide cannot score a point that it did not draw.

    Cost: one more density of the latents, and one more backward pass through the decoder.

    References:
        Tucker et al. Doubly reparameterized gradient estimators for Monte Carlo objectives.
        2019.
    """

    def __init__(self, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        if num_particles == 1:
            raise ValueError(
                "DReG needs num_particles of at least 2; got 1, for which use StickingTheLanding"
            )

    def surrogate(self, d: Densities) -> Tensor:
        """A number with the two gradients, [B]."""
        log_joint = d.log_likelihood + d.log_prior
        path = d.through_latents(log_joint)
        weights = d.log_weights.detach().softmax(0)
        model = weights * (log_joint - path)
        guide = weights**2 * (path - d.log_posterior_detached)
        return (model + guide).sum(0)
