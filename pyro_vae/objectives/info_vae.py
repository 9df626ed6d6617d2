"""The aggregate posterior drawn to the prior by a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective, check_kl, total_kl
from pyro_vae.objectives.latent import draws, only_site
from pyro_vae.objectives.schedules import Schedule

__all__ = ["InfoVAE", "mmd"]


class InfoVAE(Objective):
    r"""Reconstruction, less a KL for each datum and a divergence of q(z) from p(z).

    .. math:: E_q \log p(x \mid z) - (1 - \alpha) \, \mathrm{KL}(q(z \mid x) \| p(z))
        - (\alpha + \lambda - 1) \, \mathrm{MMD}(q(z), p(z))

    with the squared maximum mean discrepancy of a Gaussian kernel, between the draws of the
    batch and as many of the prior, unbiased for any number of particles: two draws of one datum
    are no pair of draws of q(z). With alpha = 0 and lambda = 1 it is the ELBO, exactly; with
    alpha = 1 the MMD-VAE. A learned prior learns from the KL alone, for its draws carry no
    gradient. Cost: (K B)^2 kernels, thrice.

    Args:
        alpha: From 0 to 1: what is taken off the KL's weight.
        divergence: The lambda above, at least 1.
        bandwidth: Standard deviation of the kernel; None: sqrt(D), for which prior draws of unit
            variance have a kernel of about 1 / e.
        kl: As in `ELBO`.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If an option is out of its range; on use, if there are several latent sites.

    References:
        Zhao, Song and Ermon. InfoVAE: balancing learning and inference in variational
        autoencoders. 2019.
        Gretton et al. A kernel two-sample test. 2012.
    """

    batch_level = True
    alpha: Tensor
    divergence: Tensor

    def __init__(
        self,
        alpha: float | Schedule = 0.5,
        divergence: float | Schedule = 100.0,
        bandwidth: float | None = None,
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        if bandwidth is not None and not bandwidth > 0:
            raise ValueError(f"bandwidth must be positive; got {bandwidth}")
        self.add_weight("alpha", alpha, most=1.0)
        self.add_weight("divergence", divergence, least=1.0)
        self.bandwidth, self.kl = bandwidth, check_kl(kl)

    def bound(self, d: Densities) -> Tensor:
        """Reconstruction less both penalties, [B]."""
        z = draws(d)
        prior = only_site(d).model.sample().reshape(z.shape)
        gap = mmd(z, prior, self.bandwidth or z.shape[-1] ** 0.5)
        weight = self.alpha + self.divergence - 1
        penalty = (1 - self.alpha) * total_kl(d, self.kl) + weight * gap
        return d.log_likelihood.mean(0) - penalty


def mmd(first: Tensor, second: Tensor, bandwidth: float) -> Tensor:
    r"""Unbiased squared maximum mean discrepancy of two distributions, from draws [K, B, D].

    .. math:: E[k(z, z')] + E[k(w, w')] - 2 E[k(z, w)], \quad
        k(z, w) = \exp\big(-\|z - w\|^2 / (2 h^2)\big)

    over pairs from different data, as only these are independent. Zero for a single datum,
    which has no pair.
    """
    if first.shape[1] == 1:
        return first.new_zeros(())
    own = sum(_mean_kernel(part, part, bandwidth) for part in (first, second))
    return own - 2 * _mean_kernel(first, second, bandwidth)


def _mean_kernel(first: Tensor, second: Tensor, bandwidth: float) -> Tensor:
    """The mean kernel of pairs from different data."""
    K, B, _ = first.shape
    pairs = first.flatten(0, 1).unsqueeze(1) - second.flatten(0, 1)
    kernel = torch.exp(-pairs.pow(2).sum(-1) / (2 * bandwidth**2)).view(K, B, K, B)
    same = kernel.diagonal(dim1=1, dim2=3)
    return (kernel.sum() - same.sum()) / (K * K * B * (B - 1))
