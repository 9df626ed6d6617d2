"""Bounds made of importance weights, and gradients of them that suit many draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.arguments import check_whole
from pyro_vae.densities import Densities, log_mean_exp
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.schedules import Schedule

ALPHA_TOLERANCE = 1e-6  # distance of alpha from 1 below which the limit is taken


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
        """Returns the log of the mean weight, [B]."""
        return log_mean_exp(d.log_weights)


class DReG(IWAE):
    r"""Importance-weighted bound; the guide learns from doubly reparameterised gradients.

    With weights normalised over draws, :math:`\bar w_k = w_k / \sum_j w_j`, the gradients are

    .. math:: \nabla_\phi = \sum_{k=1}^K \bar w_k^2 \,
        \frac{\partial \log w_k}{\partial z_k} \frac{\partial z_k}{\partial \phi}, \qquad
        \nabla_\theta = \sum_{k=1}^K \bar w_k \, \nabla_\theta \log p(x, z_k).

    Both are unbiased for those of `IWAE`, and the first has a signal-to-noise ratio that does not
    fall as K grows.

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
        """Returns a tensor [B] with the two gradients; its value means nothing."""
        d = d.each or d
        weights = d.log_weights.detach().softmax(0)
        log_joint = (d.log_likelihood + d.log_prior).masked_fill(weights == 0, 0.0)  # not -inf
        path = d.through_latents(log_joint)
        model_term = weights * (log_joint - path)
        guide_term = weights**2 * (path - d.log_posterior_detached)
        return (model_term + guide_term).sum(0)


class CIWAE(Objective):
    r"""A weighted mean of the ELBO and the importance-weighted bound over the same draws.

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

    def __init__(self, beta: float | Schedule = 0.5, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        self.beta = self.add_weight("beta", beta, most=1.0)

    def bound(self, d: Densities) -> Tensor:
        """Returns the weighted mean, [B]."""
        log_w = d.log_weights
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)


class MIWAE(Objective):
    r"""The mean of M importance-weighted bounds, each of L = K / M draws.

    .. math:: \frac1M \sum_{m=1}^M \log \frac1L \sum_{l=1}^L w_{ml}, \qquad
        w = \frac{p(x \mid z) \, p(z)}{q(z \mid x)}

    One group is `IWAE`; as many groups as draws are the sampled ELBO. Mattei and Frellsen (2019)
    use the name MIWAE for something else: `IWAE` on rows with missing entries.

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
        check_whole(num_groups=num_groups)
        if num_particles % num_groups:
            raise ValueError(
                f"num_groups must divide num_particles, all draws together: got {num_groups} "
                f"groups of {num_particles} draws"
            )
        self.num_groups = num_groups

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean of the groups' bounds, [B]."""
        return self.mean_of_groups(d.log_weights)

    def mean_of_groups(self, log_weights: Tensor) -> Tensor:
        """Returns the mean of the groups' importance-weighted bounds [B], from weights [K, B]."""
        groups = log_weights.unflatten(0, (self.num_groups, -1))
        return log_mean_exp(groups.transpose(0, 1)).mean(0)


class PIWAE(MIWAE):
    r"""`IWAE` of all draws for the model, `MIWAE` of the same draws for the guide.

    .. math:: \nabla_\theta \log \frac{1}{K} \sum_{k=1}^K w_k \qquad\text{and}\qquad
        \nabla_\phi \frac1M \sum_{m=1}^M \log \frac1L \sum_{l=1}^L w_{ml}, \qquad K = M L

    The tight bound suits the model; the looser one gives the guide a less noisy gradient. The
    reported value is the tight one. A parameter of both gets the sum of the two gradients.

    Args:
        num_particles: Draws of z for each datum, K, in all groups together.
        num_groups: M, a divisor of K.

    Raises:
        ValueError: If `num_groups` does not divide `num_particles`.

    Cost: one more backward pass through the decoder.

    References:
        Rainforth et al. Tighter variational bounds are not necessarily better. 2018.
    """

    def bound(self, d: Densities) -> Tensor:
        """Returns the log of the mean weight, [B]."""
        return log_mean_exp(d.log_weights)

    def surrogate(self, d: Densities) -> Tensor:
        """Returns a tensor [B] with the two gradients; its value means nothing."""
        log_joint = d.log_likelihood + d.log_prior
        path = d.through_latents(log_joint)
        log_w = d.log_weights.detach()
        model_term = (log_w.softmax(0) * (log_joint - path)).sum(0)
        guide_term = path - d.log_posterior
        return model_term + self.mean_of_groups(log_w + guide_term - guide_term.detach())


class Renyi(Objective):
    r"""Variational Renyi bound: from the importance-weighted bound to the ELBO and beyond.

    .. math:: \frac{1}{1 - \alpha} \log \frac1K \sum_{k=1}^K w_k^{1 - \alpha}, \qquad
        w_k = \frac{p(x \mid z_k) \, p(z_k)}{q(z_k \mid x)}

    At alpha = 0 it is `IWAE`, at 1 the sampled ELBO. It falls as alpha grows. For alpha < 0 it
    need not be below log p(x).

    Args:
        alpha: Order of the divergence; a number or a schedule.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If `alpha` is not finite.

    References:
        Li and Turner. Renyi divergence variational inference. 2016.
    """

    def __init__(self, alpha: float | Schedule = 0.5, num_particles: int = 5) -> None:
        super().__init__(num_particles)
        self.alpha = self.add_weight("alpha", alpha, least=-math.inf)

    def bound(self, d: Densities) -> Tensor:
        """Returns the log of the power mean of the weights, [B]."""
        order = 1 - self.alpha
        near = order.abs() < ALPHA_TOLERANCE
        order = torch.where(near, torch.ones_like(order), order)
        log_w = d.log_weights.double()  # small orders lose digits
        power = log_mean_exp(order * log_w) / order
        return torch.where(near, log_w.mean(0), power).to(d.log_weights.dtype)
