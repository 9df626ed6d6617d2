"""Likelihoods of real numbers, by location and scale, and of numbers between zero and one."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_choice, check_real
from pyro_vae.likelihoods.base import Likelihood

LARGE_DEVIATION = 10.0  # standard deviation of data that a decoder takes long to reach
ScaleOption = float | Literal["learned", "per_dimension", "predicted"]
MeanOption = Literal["identity", "sigmoid", "tanh"]
Link = Callable[[Tensor], Tensor]
LINKS: dict[str, tuple[Link, Link]] = {  # from raw parameters to means, and back
    "identity": (lambda raw: raw, lambda mean: mean),
    "sigmoid": (torch.sigmoid, lambda mean: torch.logit(mean.clamp(0.001, 0.999))),
    "tanh": (torch.tanh, lambda mean: torch.atanh(mean.clamp(-0.999, 0.999))),
}


class LocationScale(Likelihood):
    """Base of Normal, Laplace, StudentT and LogNormal: a mean and a scale with a floor.

    Args:
        decoder: Network to the mean, and to the scale if that is "predicted".
        data_shape: Shape of one datum.
        scale: A number; or "learned", one for all dimensions, "per_dimension", one for each, or
            "predicted" by the decoder for each datum.
        mean: How raw parameters become means: "identity", "sigmoid" into (0, 1) or "tanh"
            into (-1, 1).
        min_scale: Floor of a scale that is not fixed: without one the density is unbounded.
        standardise: Whether the mean and the scale are in units of the data: `initialise` then
            measures the mean and deviation of each dimension. This changes no density.
        resolution: For values that are rounded or repeated, the width of the interval around x
            whose probability replaces the density, in the units of x; a list has one for each
            channel; None for densities.
    """

    rounded_support = Likelihood.support  # the support if a resolution is given

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        scale: ScaleOption = 1.0,
        mean: MeanOption = "identity",
        min_scale: float = 0.01,
        standardise: bool = False,
        resolution: float | list[float] | None = None,
    ) -> None:
        super().__init__(decoder, data_shape)
        options = ("learned", "per_dimension", "predicted")
        if isinstance(scale, str) and scale not in options:
            raise ValueError(f"scale must be a positive number or one of {options}; got {scale!r}")
        if not isinstance(scale, str):
            check_real(above=0, scale=scale)
        check_real(0, min_scale=min_scale)
        check_choice(LINKS, mean=mean)
        self.scale_option, self.mean_option, self.min_scale = scale, mean, min_scale
        self.standardise, self.resolution = standardise, resolution
        if resolution is not None:
            self.support, (channels, *rest) = self.rounded_support, self.data_shape
            widths = resolution if isinstance(resolution, list) else [resolution] * channels
            for width in widths:
                check_real(above=0, resolution=width)
            if len(widths) != channels:
                raise ValueError(
                    f"resolution must be a number, or one for each of the {channels} channels; "
                    f"got {len(widths)}"
                )
            numbers = torch.tensor(widths, dtype=torch.float64).view(channels, *[1] * len(rest))
            self.width = nn.Buffer(numbers, persistent=False)
        if standardise:
            self.centre = nn.Buffer(torch.zeros(self.data_shape))
            self.spread = nn.Buffer(torch.ones(self.data_shape))
        if isinstance(scale, int | float):
            self.fixed_scale = nn.Buffer(torch.tensor(float(scale)))
        elif scale != "predicted":
            shape = self.data_shape if scale == "per_dimension" else ()
            self.raw_scale = nn.Parameter(torch.zeros(shape))

    @classmethod
    def num_params(cls, scale: ScaleOption = 1.0) -> int:
        """Returns 1 for the mean, 2 if the decoder predicts the scale too."""
        return 2 if scale == "predicted" else 1

    @abstractmethod
    def family(self, mean: Tensor, scale: Tensor) -> Any:
        """Returns the distribution of each dimension."""

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns the distribution, independent over dimensions."""
        mean, *predicted = self.raw(z, y, self.num_params(self.scale_option))
        mean = LINKS[self.mean_option][0](mean)
        if isinstance(self.scale_option, int | float):
            scale = self.fixed_scale.expand(mean.shape)
        else:
            raw = predicted[0] if predicted else self.raw_scale
            scale = (self.min_scale + F.softplus(raw)).expand(mean.shape)
        if self.standardise:
            mean, scale = self.centre + self.spread * mean, self.spread * scale
        each = self.family(mean, scale)
        if self.resolution is not None:
            each = distributions.Interval(each, self.width)
        return each.to_event(len(self.data_shape))

    def line(self, x: Tensor) -> Tensor:
        """Maps `x` to the real line, where the mean and the scale apply."""
        return x

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the mean of the data, through the inverse of its link."""
        mean = torch.zeros_like(x[0]) if self.standardise else self.line(x).mean(0)
        return LINKS[self.mean_option][1](mean)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Starts the decoder at the average datum, and a learned scale at the data's deviation."""
        super().initialise(x)
        deviation, mean = torch.std_mean(self.line(x), 0, correction=0)
        if self.standardise:
            deviation = torch.where(deviation > 0, deviation, 1.0)
            self.centre.copy_(mean)
            self.spread.copy_(deviation)
            deviation = deviation / self.spread
        if (widest := deviation.max().item()) > LARGE_DEVIATION:
            message = (
                f"values deviate by up to {widest:.3g} from their mean, where a decoder's outputs "
                "start near 1: standardise the data, or divide them by their scale"
            )
            warnings.warn(message, UserWarning, stacklevel=2)
        if hasattr(self, "raw_scale"):
            variance = deviation.pow(2)
            one = self.scale_option == "learned"
            excess = ((variance.mean() if one else variance).sqrt() - self.min_scale).clamp(1e-3)
            self.raw_scale.copy_(excess + torch.log(-torch.expm1(-excess)))


class Normal(LocationScale):
    r"""Normal, :math:`p(x \mid z) = \mathcal{N}(x; \mu(z), \sigma^2)`.

    Args: see `LocationScale`; `scale=1.0` is the squared error, "learned" the sigma-VAE.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
        Rybkin et al. Simple and effective VAE training with calibrated decoders. 2021.
    """

    family: Any = dist.Normal


class Laplace(LocationScale):
    r"""Laplace, :math:`p(x \mid z) = \tfrac{1}{2 b} e^{-|x - \mu(z)| / b}`.

    Args: see `LocationScale`.
    """

    family: Any = dist.Laplace


class LogNormal(LocationScale):
    r"""Log-normal, :math:`p(\log x \mid z) = \mathcal{N}(\log x; \mu(z), \sigma^2)`.

    With a `resolution` 0 is allowed: it stands for the interval from 0 to half the resolution.

    Args: see `LocationScale`; mean and scale are those of the logarithm.

    References:
        Nazabal et al. Handling incomplete heterogeneous data using VAEs. 2020.
    """

    family: Any = dist.LogNormal
    support = constraints.interval(2.0**-126, 2.0**127)
    support_name = "positive numbers"
    rounded_support = constraints.interval(0.0, 2.0**127)
    remedy = "shift them, or choose Normal; for zeros give a resolution"

    def line(self, x: Tensor) -> Tensor:
        """Returns log x, or the log of half the resolution where x is below that."""
        return x.clamp(2.0**-126 if self.resolution is None else (self.width / 2).to(x)).log()


class StudentT(LocationScale):
    """Student's t with a learned number of degrees of freedom, above 2; robust to outliers.

    Args: see `LocationScale`.

    References:
        Takahashi et al. Student-t variational autoencoder for robust density estimation. 2018.
    """

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        scale: ScaleOption = 1.0,
        mean: MeanOption = "identity",
        min_scale: float = 0.01,
        standardise: bool = False,
    ) -> None:
        super().__init__(decoder, data_shape, scale, mean, min_scale, standardise)
        self.raw_df = nn.Parameter(torch.tensor(3.0))

    def family(self, mean: Tensor, scale: Tensor) -> Distribution:
        """Returns t(df, mean, scale)."""
        df = 2.01 + F.softplus(self.raw_df)
        return dist.StudentT(df.expand(mean.shape), mean, scale)


class LogitMeanLikelihood(Likelihood):
    """Base of likelihoods whose first raw parameter is the logit of a mean, or nearly so.

    Args:
        decoder: Network to raw parameters.
        data_shape: Shape of one datum.
    """

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the logit of the mean of the data."""
        return torch.logit(x.mean(0).clamp(0.001, 0.999))


class Bernoulli(LogitMeanLikelihood):
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
        """Returns a Bernoulli with logits."""
        logits = self.raw(z, y).squeeze(0)
        return distributions.Bernoulli(logits=logits).to_event(len(self.data_shape))


class ContinuousBernoulli(LogitMeanLikelihood):
    """Continuous Bernoulli on [0, 1]; see `distributions.ContinuousBernoulli`.

    Args:
        decoder: Network to the logits.
        data_shape: Shape of one datum.
    """

    support = constraints.unit_interval
    support_name = "[0, 1]"
    remedy = "rescale them"

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns a continuous Bernoulli with logits."""
        logits = self.raw(z, y).squeeze(0)
        return distributions.ContinuousBernoulli(logits).to_event(len(self.data_shape))


class Beta(LogitMeanLikelihood):
    r"""Beta on (0, 1) by a mean m (a sigmoid) and a concentration c (a softplus).

    .. math:: p(x \mid z) = \mathrm{Beta}\big(x;\, \epsilon + m c,\, \epsilon + (1 - m) c\big)

    epsilon is `min_concentration`, a floor of both shape parameters: one below 1 makes the density
    unbounded at an end of the interval.

    Args:
        decoder: Network to the raw mean and concentration.
        data_shape: Shape of one datum.
        min_concentration: Floor of both shape parameters.
    """

    support = distributions.Beta.ends
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
        """Returns 2, for mean and concentration."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns a Beta by mean and concentration."""
        mean, concentration = self.raw(z, y, 2)
        mean, concentration = torch.sigmoid(mean), F.softplus(concentration + 2)
        alpha = self.min_concentration + mean * concentration
        beta = self.min_concentration + (1 - mean) * concentration
        return distributions.Beta(alpha, beta).to_event(len(self.data_shape))
