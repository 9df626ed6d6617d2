"""Likelihoods of values between zero and one."""

from __future__ import annotations

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_real
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["Bernoulli", "Beta", "ContinuousBernoulli"]


class OfMean(Likelihood):
    """What these likelihoods share: their first raw parameter is the logit of a mean, or near it.

    Args:
        decoder: Network to raw parameters.
        data_shape: Shape of one datum.
    """

    @classmethod
    def num_params(cls) -> int:
        """The logit."""
        return 1

    def raw_start(self, x: Tensor) -> Tensor:
        """Logit of the mean of the data."""
        return torch.logit(x.mean(0).clamp(0.001, 0.999))


class Bernoulli(OfMean):
    r"""Independent binary variables, :math:`p(x=1 \mid z) = \sigma(f(z))`.

    Args:
        decoder: Network to the logits.
        data_shape: Shape of one datum.
    """

    support = constraints.boolean
    support_name = "{0, 1}"
    remedy = (
        "binarise them or use ContinuousBernoulli, Normal, DiscretizedLogistic, or Columns for a "
        "table"
    )

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Bernoulli with logits."""
        logits = self.raw(z, y).squeeze(0)
        return distributions.Bernoulli(logits=logits).to_event(len(self.data_shape))


class ContinuousBernoulli(OfMean):
    """Continuous Bernoulli on [0, 1]; see `distributions.ContinuousBernoulli`.

    Args:
        decoder: Network to the logits.
        data_shape: Shape of one datum.
    """

    support = constraints.unit_interval
    support_name = "[0, 1]"
    remedy = "rescale them"

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Continuous Bernoulli with logits."""
        logits = self.raw(z, y).squeeze(0)
        return distributions.ContinuousBernoulli(logits).to_event(len(self.data_shape))


class Beta(OfMean):
    r"""Beta on (0, 1) by its mean m = sigmoid and its concentration c = softplus.

    .. math:: p(x \mid z) = \mathrm{Beta}\big(x;\, m c,\, (1 - m) c\big)

    Both shape parameters have a floor of `min_concentration`, for the density at an end of the
    interval is unbounded below one.

    Args:
        decoder: Network to the raw mean and concentration.
        data_shape: Shape of one datum.
        min_concentration: Floor of both shape parameters.
    """

    support = constraints.interval(2.0**-32, 1 - 2.0**-24)  # what dequantise gives
    support_name = "the open interval (0, 1)"
    remedy = "dequantise and rescale them"

    def __init__(
        self, decoder: nn.Module, data_shape: tuple[int, ...], min_concentration: float = 0.01
    ) -> None:
        super().__init__(decoder, data_shape)
        check_real(0, min_concentration=min_concentration)
        self.min_concentration = min_concentration

    @classmethod
    def num_params(cls) -> int:
        """Mean and concentration."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Beta by mean and concentration."""
        mean, concentration = self.raw(z, y, 2)
        mean, concentration = torch.sigmoid(mean), F.softplus(concentration + 2)
        alpha = self.min_concentration + mean * concentration
        beta = self.min_concentration + (1 - mean) * concentration
        return dist.Beta(alpha, beta).to_event(len(self.data_shape))
