"""A KL that is held at a capacity."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective, check_kl, total_kl
from pyro_vae.objectives.schedules import Schedule

__all__ = ["Capacity"]


class Capacity(Objective):
    r"""Holds the KL of each datum at a capacity, which usually grows.

    .. math:: \frac1K \sum_{k=1}^K \log p(x \mid z_k)
        - \gamma \, \big| \mathrm{KL}(q(z \mid x) \| p(z)) - C \big|

    Near the capacity it is above the ELBO, and no lower bound. As published, it is
    `Capacity(gamma=1000.0, capacity=Linear(end=25.0, length=100_000))`.

    Args:
        capacity: C in nats, zero or more; a number or a schedule.
        gamma: Weight of the distance, zero or more; a number or a schedule.
        kl: "analytic", "sampled" (the absolute value of a sampled KL is biased upwards), or
            "auto": analytic where there is a rule for the pair.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If a weight is out of range; on first use, if `kl` is "analytic" without a
            rule.

    References:
        Burgess et al. Understanding disentangling in beta-VAE. 2018.
    """

    capacity: Tensor
    gamma: Tensor

    def __init__(
        self,
        capacity: float | Schedule = 25.0,
        gamma: float | Schedule = 1000.0,
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        self.add_weight("capacity", capacity)
        self.add_weight("gamma", gamma)
        self.kl = check_kl(kl)

    def bound(self, d: Densities) -> Tensor:
        """Mean reconstruction less gamma times the distance of the KL from C, [B]."""
        distance = (total_kl(d, self.kl) - self.capacity).abs()
        return d.log_likelihood.mean(0) - self.gamma * distance
