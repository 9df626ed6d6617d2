"""The evidence lower bound, with a weight on its KL."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective

__all__ = ["ELBO"]


class ELBO(Objective):
    r"""Evidence lower bound; the beta-VAE for another weight than one.

    .. math:: \frac1K \sum_{k=1}^K \log p(x \mid z_k) - \beta \, \mathrm{KL}(q(z \mid x) \| p(z))

    Args:
        beta: Weight of the KL, zero or more.
        kl: "analytic", "sampled", or "auto": analytic where there is a rule for the pair.
        num_particles: Draws of z for each datum, the L of the first reference.

    Raises:
        ValueError: If `beta` is negative; on first use, if `kl` is "analytic" without a rule.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
        Higgins et al. beta-VAE. 2017.
    """

    beta: Tensor

    def __init__(self, beta: float = 1.0, kl: str = "auto", num_particles: int = 1) -> None:
        super().__init__(num_particles)
        if beta < 0:
            raise ValueError(f"beta must be zero or more; got {beta}")
        if kl not in ("auto", "analytic", "sampled"):
            raise ValueError(f"kl must be 'auto', 'analytic' or 'sampled'; got {kl!r}")
        self.register_buffer("beta", torch.tensor(float(beta), dtype=torch.float64))
        self.kl = kl

    def bound(self, d: Densities) -> Tensor:
        """Mean reconstruction less beta times the KL, [B]."""
        kl = torch.stack(list(d.kl(self.kl).values())).sum(0)
        return d.log_likelihood.mean(0) - self.beta * kl
