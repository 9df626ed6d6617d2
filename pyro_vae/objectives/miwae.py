"""The mean of several importance-weighted bounds."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.iwae import log_mean_exp

__all__ = ["MIWAE", "check_groups", "mean_bound"]


class MIWAE(Objective):
    r"""The mean of M importance-weighted bounds, of L = K / M draws each.

    .. math:: \frac1M \sum_{m=1}^M \log \frac1L \sum_{l=1}^L w_{ml}, \qquad
        w = \frac{p(x \mid z) \, p(z)}{q(z \mid x)}

    One group is `IWAE`; as many groups as draws are the sampled ELBO.

    Args:
        num_particles: Draws of z for each datum, K, in all groups together.
        num_groups: M, a divisor of K.

    Raises:
        ValueError: If `num_groups` does not divide `num_particles`.

    References:
        Rainforth et al. Tighter variational bounds are not necessarily better. 2018.
    """

    def __init__(self, num_particles: int = 6, num_groups: int = 2) -> None:
        super().__init__(num_particles)
        self.num_groups = check_groups(num_groups, num_particles)

    def bound(self, d: Densities) -> Tensor:
        """The mean of the groups' bounds, [B]."""
        return mean_bound(d.log_weights, self.num_groups)


def mean_bound(log_weights: Tensor, num_groups: int) -> Tensor:
    """Mean over groups of the importance-weighted bounds of `log_weights` [K, B], [B]."""
    groups = log_weights.reshape(num_groups, -1, *log_weights.shape[1:])
    return log_mean_exp(groups.transpose(0, 1)).mean(0)


def check_groups(num_groups: int, num_particles: int) -> int:
    """`num_groups`, if that many equal groups can be made of the particles."""
    if num_groups < 1 or num_particles % num_groups:
        raise ValueError(
            f"num_groups must divide num_particles, all draws together: got {num_groups} "
            f"groups of {num_particles} draws"
        )
    return num_groups
