"""Likelihoods of counts."""

from __future__ import annotations

import pyro.distributions as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae.arguments import check_real
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["NegativeBinomial", "Poisson"]


class Poisson(Likelihood):
    """Poisson counts with a log-linear rate.

    Args:
        decoder: Network to the log rate.
        data_shape: Shape of one datum.
    """

    support = constraints.nonnegative_integer
    support_name = "{0, 1, 2, ...}"
    remedy = "counts must be whole and not negative"

    @classmethod
    def num_params(cls) -> int:
        """The log rate."""
        return 1

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Poisson(exp(raw))."""
        log_rate = self.raw(z, y).squeeze(0)
        return dist.Poisson(log_rate.exp()).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Log of the mean."""
        return x.mean(0).clamp(min=0.01).log()


class NegativeBinomial(Likelihood):
    r"""Overdispersed counts, with mean m = exp and dispersion r = softplus.

    .. math:: \mathrm{Var}[x \mid z] = m + m^2 / r

    Args:
        decoder: Network to the log mean and the raw dispersion.
        data_shape: Shape of one datum.
        min_dispersion: Floor of r.

    References:
        Lopez et al. Deep generative modeling for single-cell transcriptomics. 2018.
    """

    support = constraints.nonnegative_integer
    support_name = "{0, 1, 2, ...}"
    remedy = "counts must be whole and not negative"

    def __init__(
        self, decoder: nn.Module, data_shape: tuple[int, ...], min_dispersion: float = 1e-3
    ) -> None:
        super().__init__(decoder, data_shape)
        check_real(0, min_dispersion=min_dispersion)
        self.min_dispersion = min_dispersion

    @classmethod
    def num_params(cls) -> int:
        """Log mean and dispersion."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Negative binomial by mean and dispersion."""
        log_mean, raw = self.raw(z, y, 2)
        r = self.min_dispersion + F.softplus(raw)
        return dist.NegativeBinomial(r, logits=log_mean - r.log()).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Log of the mean."""
        return x.mean(0).clamp(min=0.01).log()
