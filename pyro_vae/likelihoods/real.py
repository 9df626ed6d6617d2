"""Likelihoods of real numbers, by location and scale."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution

from pyro_vae.arguments import check_real
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["Laplace", "LocationScale", "Normal", "StudentT"]

LARGE = 10.0  # deviation of data that a decoder takes long to reach
ScaleOption = float | Literal["learned", "per_dimension", "predicted"]
MeanOption = Literal["identity", "sigmoid", "tanh"]


class LocationScale(Likelihood):
    """What Normal, Laplace and StudentT share: a mean and a scale with a floor.

    Args:
        decoder: Network to the mean, and to the scale if that is "predicted".
        data_shape: Shape of one datum.
        scale: A fixed number; "learned", one for all; "per_dimension", one for each; or
            "predicted" by the decoder for each datum.
        mean: How raw parameters become means: "identity", "sigmoid" into (0, 1) or "tanh"
            into (-1, 1).
        min_scale: Floor of a scale that is not fixed: without one the density is unbounded.
    """

    fixed_scale: Tensor

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        scale: ScaleOption = 1.0,
        mean: MeanOption = "identity",
        min_scale: float = 0.01,
    ) -> None:
        super().__init__(decoder, data_shape)
        options = ("learned", "per_dimension", "predicted")
        if isinstance(scale, str) and scale not in options:
            raise ValueError(f"scale must be a positive number or one of {options}; got {scale!r}")
        if not isinstance(scale, str):
            check_real(above=0, scale=scale)
        check_real(0, min_scale=min_scale)
        if mean not in ("identity", "sigmoid", "tanh"):
            raise ValueError(f"mean must be 'identity', 'sigmoid' or 'tanh'; got {mean!r}")
        self.scale_option, self.mean_option, self.min_scale = scale, mean, min_scale
        if isinstance(scale, int | float):
            self.register_buffer("fixed_scale", torch.tensor(float(scale)))
        elif scale != "predicted":
            shape = self.data_shape if scale == "per_dimension" else ()
            self.raw_scale = nn.Parameter(torch.zeros(shape))

    @classmethod
    def num_params(cls, scale: ScaleOption = 1.0) -> int:
        """The mean, and the scale if the decoder predicts it."""
        return 2 if scale == "predicted" else 1

    @abstractmethod
    def distribution(self, mean: Tensor, scale: Tensor) -> TorchDistribution:
        """The distribution of each dimension."""

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """The distribution, independent over dimensions."""
        raw = self.raw(z, y, self.num_params(self.scale_option))
        links = {"identity": lambda m: m, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
        mean, predicted = raw if len(raw) == 2 else (raw.squeeze(0), None)
        scale = self._scale(predicted).expand(mean.shape)
        each = self.distribution(links[self.mean_option](mean), scale)
        return each.to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """The mean of the data, through the inverse of its link."""
        mean = x.mean(0)
        if self.mean_option == "sigmoid":
            return torch.logit(mean.clamp(0.001, 0.999))
        return torch.atanh(mean.clamp(-0.999, 0.999)) if self.mean_option == "tanh" else mean

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """The decoder's start as for every likelihood; a learned scale is the data's deviation."""
        super().initialise(x)
        if (widest := x.std(0, correction=0).max().item()) > LARGE:
            message = (
                f"values deviate by up to {widest:.3g} from their mean, where a decoder's outputs "
                "start near 1: standardise the data, or divide them by their scale"
            )
            warnings.warn(message, UserWarning, stacklevel=2)
        if hasattr(self, "raw_scale"):
            variance = x.var(0, correction=0)
            one = self.scale_option == "learned"
            excess = ((variance.mean() if one else variance).sqrt() - self.min_scale).clamp(1e-3)
            self.raw_scale.copy_(excess + torch.log(-torch.expm1(-excess)))

    def _scale(self, predicted: Tensor | None) -> Tensor:
        if isinstance(self.scale_option, int | float):
            return self.fixed_scale
        raw = self.raw_scale if predicted is None else predicted
        return self.min_scale + F.softplus(raw)


class Normal(LocationScale):
    r"""Normal, :math:`p(x \mid z) = \mathcal{N}(x; \mu(z), \sigma^2)`.

    Args: see `LocationScale`; `scale=1.0` is the squared error, "learned" the sigma-VAE.

    References:
        Kingma and Welling. Auto-encoding variational Bayes. 2013.
        Rybkin et al. Simple and effective VAE training with calibrated decoders. 2021.
    """

    def distribution(self, mean: Tensor, scale: Tensor) -> TorchDistribution:
        """N(mean, scale^2)."""
        return dist.Normal(mean, scale)


class Laplace(LocationScale):
    r"""Laplace, :math:`p(x \mid z) = \tfrac{1}{2 b} e^{-|x - \mu(z)| / b}`.

    Args: see `LocationScale`.
    """

    def distribution(self, mean: Tensor, scale: Tensor) -> TorchDistribution:
        """Laplace(mean, scale)."""
        return dist.Laplace(mean, scale)


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
    ) -> None:
        super().__init__(decoder, data_shape, scale, mean, min_scale)
        self.raw_df = nn.Parameter(torch.tensor(3.0))

    def distribution(self, mean: Tensor, scale: Tensor) -> TorchDistribution:
        """t(df, mean, scale)."""
        df = 2.01 + F.softplus(self.raw_df)
        return dist.StudentT(df.expand(mean.shape), mean, scale)
