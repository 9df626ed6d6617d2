"""The evidence lower bound, and variants with another KL term or gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.arguments import check_choice, check_whole
from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.schedules import Schedule


class ELBO(Objective):
    r"""Evidence lower bound; that of the beta-VAE where beta is not one.

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

    def __init__(
        self, beta: float | Schedule = 1.0, kl: str = "auto", num_particles: int = 1
    ) -> None:
        super().__init__(num_particles, kl)
        self.beta = self.add_weight("beta", beta)

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean log likelihood minus beta times the KL, [B]."""
        return d.log_likelihood.mean(0) - self.beta * self.total_kl(d)


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

    def __init__(
        self,
        capacity: float | Schedule = 25.0,
        gamma: float | Schedule = 1000.0,
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles, kl)
        self.capacity = self.add_weight("capacity", capacity)
        self.gamma = self.add_weight("gamma", gamma)

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean log likelihood minus gamma times the distance of the KL from C, [B]."""
        distance = (self.total_kl(d) - self.capacity).abs()
        return d.log_likelihood.mean(0) - self.gamma * distance


class FreeBits(Objective):
    r"""Evidence lower bound whose KL counts at least a floor, so that a KL below gains nothing.

    For groups j of latent dimensions, with the average over the batch or without it,

    .. math:: \frac1K \sum_{k=1}^K \log p(x_b \mid z_{bk}) - \sum_j \max\Big(\lambda, \,
        \frac1B \sum_{b'=1}^B \mathrm{KL}_{b'j} \Big) \quad\text{or}\quad
        \dots - \sum_j \max(\lambda, \, \mathrm{KL}_{bj})

    Args:
        free_nats: Floor lambda of each group in nats, zero or more; a number or a schedule.
        group_size: Dimensions that share a floor: 1 to give each dimension its own, None to give
            each latent site one. Smaller groups than a site need a prior and a posterior that
            factorise over dimensions, and a size that divides theirs.
        on: Whether the floor holds for the mean KL over the "batch" (as published; all data then
            have the same KL term), or for the KL of each "datum".
        kl: "analytic", "sampled", or "auto": analytic where there is a rule for the pair.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If an argument is out of range; on first use, if `kl` is "analytic" without
            a rule, or the latents cannot be grouped by `group_size`.

    References:
        Kingma et al. Improved variational inference with inverse autoregressive flow. 2016.
    """

    def __init__(
        self,
        free_nats: float | Schedule = 1.0,
        group_size: int | None = None,
        on: str = "batch",
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles, kl)
        check_whole(optional=True, group_size=group_size)
        check_choice(("batch", "datum"), on=on)
        self.free_nats = self.add_weight("free_nats", free_nats)
        self.group_size = group_size
        self.on = on
        self.batch_level = on == "batch"

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean log likelihood minus the KL, or the floor where that is larger, [B]."""
        if self.group_size is None:
            groups = torch.stack([*d.kl(self.kl).values()], -1)
        else:
            sites = d.kl_by_dimension(self.kl)
            for name, kl in sites.items():
                if kl.shape[-1] % self.group_size:
                    raise ValueError(
                        f"group_size must divide the {kl.shape[-1]} dimensions of site {name!r}; "
                        f"got {self.group_size}"
                    )
            by_dimension = torch.cat([*sites.values()], -1)
            groups = by_dimension.unflatten(-1, (-1, self.group_size)).sum(-1)
        if self.on == "batch":
            groups = groups.mean(0).expand_as(groups)
        return d.log_likelihood.mean(0) - torch.maximum(groups, self.free_nats).sum(-1)


class StickingTheLanding(Objective):
    r"""The sampled ELBO, with a gradient for the guide through the draws alone.

    .. math:: \frac1K \sum_{k=1}^K \big[ \log p(x \mid z_k)
        - \beta \, (\log q_{\mathrm{stop}(\phi)}(z_k \mid x) - \log p(z_k)) \big],
        \qquad z_k \sim q_\phi(z \mid x)

    The part of the gradient that is left out has expectation zero, so that the rest is
    unbiased; at beta = 1 and the exact posterior the rest is zero for every draw.

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

    def __init__(self, beta: float | Schedule = 1.0, num_particles: int = 1) -> None:
        super().__init__(num_particles)
        self.beta = self.add_weight("beta", beta)

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean log likelihood minus beta times the sampled KL, [B]."""
        return (d.log_likelihood - self.beta * (d.log_posterior - d.log_prior)).mean(0)

    def surrogate(self, d: Densities) -> Tensor:
        """Returns the same value, without the gradient of the guide's own parameters, [B]."""
        kl = d.log_posterior_detached - d.log_prior
        return (d.log_likelihood - self.beta * kl).mean(0)
