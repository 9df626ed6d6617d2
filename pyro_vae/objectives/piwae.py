"""The importance-weighted bound for the model, the mean of several for the guide."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.iwae import IWAE
from pyro_vae.objectives.miwae import check_groups, mean_bound

__all__ = ["PIWAE"]


class PIWAE(IWAE):
    r"""`IWAE` of all draws for the model, `MIWAE` of the same draws for the guide.

    .. math:: \nabla_\theta \log \frac{1}{K} \sum_{k=1}^K w_k \qquad\text{and}\qquad
        \nabla_\phi \frac1M \sum_{m=1}^M \log \frac1L \sum_{l=1}^L w_{ml}, \qquad K = M L

    The tight bound suits the model, the looser one's gradient is less noisy for the guide.
    What is reported is the tight one. Parameters of both count once in each.

    Args:
        num_particles: Draws of z for each datum, K, in all groups together.
        num_groups: M, a divisor of K.

    Raises:
        ValueError: If `num_groups` does not divide `num_particles`.

    Cost: one more backward pass through the decoder.

    References:
        Rainforth et al. Tighter variational bounds are not necessarily better. 2018.
    """

    def __init__(self, num_particles: int = 6, num_groups: int = 2) -> None:
        super().__init__(num_particles)
        self.num_groups = check_groups(num_groups, num_particles)

    def surrogate(self, d: Densities) -> Tensor:
        """A number with the two gradients, [B]."""
        log_joint = d.log_likelihood + d.log_prior
        path = d.through_latents(log_joint)
        log_w = d.log_weights.detach()
        model = (log_w.softmax(0) * (log_joint - path)).sum(0)
        guide = path - d.log_posterior
        return model + mean_bound(log_w + guide - guide.detach(), self.num_groups)
