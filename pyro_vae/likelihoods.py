"""Likelihoods: z -> p(x | z)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Laplace",
    "Likelihood",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
]

ScaleOption = float | Literal["learned", "per_dimension", "predicted"]
MeanOption = Literal["identity", "sigmoid", "tanh"]


class Finite(constraints.Constraint):
    """Numbers that are neither NaN nor infinite."""

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is finite."""
        return value.isfinite()


class Likelihood(nn.Module):
    """A distribution over data x [*S, *E] for latents z [*S, D].

    A subclass says how many raw parameters it needs per channel (`num_params`), what data it
    supports (`support` and its name in words), builds the distribution from `self.raw(z, y)`
    in `forward`, and says in `raw_start` which raw parameters give the average datum. Every
    option has a default. `Bernoulli` is the one to read.

    Args:
        decoder: Network from z (and `y`) to raw parameters (num_params * C, *rest), where the
            datum has shape (C, *rest).
        data_shape: Shape of one datum.
    """

    support: constraints.Constraint = Finite()
    support_name = "finite numbers"
    remedy = "remove them"

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.decoder = decoder
        self.data_shape = tuple(data_shape)

    @classmethod
    @abstractmethod
    def num_params(cls) -> int:
        """Raw parameters per channel."""

    @abstractmethod
    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x | z, y), batch *S, event *E."""

    @abstractmethod
    def raw_start(self, x: Tensor) -> Tensor:
        """First raw parameters, [k * C, *rest], that give the average of `x` [N, C, *rest]."""

    def raw(self, z: Tensor, y: Tensor | None, count: int = 1) -> Tensor:
        """The decoder's output [*S, P * C, *rest] as P = count parameters, [P, *S, C, *rest]."""
        raw = self.decoder(z, y)
        raw = raw.float() if raw.dtype in (torch.float16, torch.bfloat16) else raw
        channel = raw.ndim - len(self.data_shape)
        channels, *rest = self.data_shape
        if raw.shape[channel:] != (count * channels, *rest):
            raise ValueError(
                f"decoder gives {tuple(raw.shape[z.ndim - 1 :])}, which does not fit data of "
                f"shape {self.data_shape}: its out_shape must be the data's, with "
                f"num_params = {count} times the channels"
            )
        return raw.unflatten(channel, (count, channels)).movedim(channel, 0)

    def check(self, x: Tensor) -> None:
        """Raises a ValueError if `x` is outside the support."""
        if tuple(x.shape[x.ndim - len(self.data_shape) :]) != self.data_shape:
            raise ValueError(
                f"likelihood {type(self).__name__} was built for data of shape "
                f"{self.data_shape}; got {tuple(x.shape[1:])}"
            )
        if not bool(self.support.check(x).all()):
            raise ValueError(
                f"likelihood {type(self).__name__} needs data in {self.support_name}; got values "
                f"in [{x.min().item():g}, {x.max().item():g}]: {self.remedy}"
            )

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets the decoder's output bias to the average of training data `x` [N, *E]."""
        bias = getattr(self.decoder, "output_bias", None)
        if bias is None:
            return
        if bias.shape[1:] != self.data_shape[1:]:  # one bias for all positions of a channel
            x = x.movedim(1, -1).flatten(0, -2)[(...,) + (None,) * (bias.ndim - 1)]
        start = self.raw_start(x)
        bias[: len(start)] = start.to(bias)


class Bernoulli(Likelihood):
    r"""Independent binary variables, :math:`p(x=1 \mid z) = \sigma(f(z))`.

    Args:
        decoder: Network to the logits.
        data_shape: Shape of one datum.
    """

    support = constraints.boolean
    support_name = "{0, 1}"
    remedy = "binarise them or use ContinuousBernoulli, Normal or DiscretizedLogistic"

    @classmethod
    def num_params(cls) -> int:
        """The logit."""
        return 1

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Bernoulli with logits."""
        (logits,) = self.raw(z, y)
        return dist.Bernoulli(logits=logits).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Logit of the mean."""
        return torch.logit(x.mean(0).clamp(0.001, 0.999))


class ContinuousBernoulli(Likelihood):
    """Continuous Bernoulli on [0, 1]; see `distributions.ContinuousBernoulli`.

    Args:
        decoder: Network to the logits.
        data_shape: Shape of one datum.
    """

    support = constraints.unit_interval
    support_name = "[0, 1]"
    remedy = "rescale them"

    @classmethod
    def num_params(cls) -> int:
        """The logit."""
        return 1

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Continuous Bernoulli with logits."""
        (logits,) = self.raw(z, y)
        return distributions.ContinuousBernoulli(logits).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Logit of the mean: near the logit whose mean it is, and of its sign."""
        return torch.logit(x.mean(0).clamp(0.001, 0.999))


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
        if not (scale in options or (isinstance(scale, int | float) and scale > 0)):
            raise ValueError(f"scale must be a positive number or one of {options}; got {scale!r}")
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
        scale = self._scale(raw[-1]).expand(raw[0].shape)
        each = self.distribution(links[self.mean_option](raw[0]), scale)
        return each.to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """The mean of the data, through the inverse of its link."""
        mean = x.mean(0)
        if self.mean_option == "sigmoid":
            return torch.logit(mean.clamp(0.001, 0.999))
        return torch.atanh(mean.clamp(-0.999, 0.999)) if self.mean_option == "tanh" else mean

    def _scale(self, predicted: Tensor) -> Tensor:
        if isinstance(self.scale_option, int | float):
            return self.fixed_scale
        raw = predicted if self.scale_option == "predicted" else self.raw_scale
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


class Beta(Likelihood):
    r"""Beta on (0, 1) by its mean m = sigmoid and its concentration c = softplus.

    .. math:: p(x \mid z) = \mathrm{Beta}\big(x;\, m c,\, (1 - m) c\big)

    Both shape parameters have a floor of `min_concentration`, for the density at an end of the
    interval is unbounded below one.

    Args:
        decoder: Network to the raw mean and concentration.
        data_shape: Shape of one datum.
        min_concentration: Floor of both shape parameters.
    """

    support = constraints.interval(1e-6, 1 - 1e-6)
    support_name = "the open interval (0, 1)"
    remedy = "dequantise and rescale them"

    def __init__(
        self, decoder: nn.Module, data_shape: tuple[int, ...], min_concentration: float = 0.01
    ) -> None:
        super().__init__(decoder, data_shape)
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

    def raw_start(self, x: Tensor) -> Tensor:
        """Logit of the mean."""
        return torch.logit(x.mean(0).clamp(0.001, 0.999))


class DiscretizedLogistic(Likelihood):
    """Logistic in bins, on the integers 0 to levels - 1; see `distributions`.

    Args:
        decoder: Network to location and scale, in units of (levels - 1).
        data_shape: Shape of one datum.
        levels: Number of levels; masses sum to one over them.
        min_scale: Floor of the scale, in units of (levels - 1).
    """

    support: constraints.Constraint = constraints.nonnegative_integer  # below `levels`

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        levels: int = 256,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(decoder, data_shape)
        _check_levels(levels)
        self.levels, self.min_scale = levels, min_scale
        self.support = constraints.integer_interval(0, levels - 1)
        self.support_name = f"{{0, ..., {levels - 1}}}"
        self.remedy = "use raw integer levels and set `levels`"

    @classmethod
    def num_params(cls) -> int:
        """Location and scale."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Logistic in bins."""
        loc, scale = self.raw(z, y, 2)
        unit = self.levels - 1
        scale = unit * (self.min_scale + 0.1 * F.softplus(scale))
        each = distributions.DiscretizedLogistic(unit * (0.5 + loc), scale, self.levels)
        return each.to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """The mean level, between -1/2 and 1/2."""
        return x.mean(0) / (self.levels - 1) - 0.5


class Categorical(Likelihood):
    """A free distribution over the integers 0 to levels - 1 in each dimension.

    Args:
        decoder: Network to `levels` logits per channel.
        data_shape: Shape of one datum.
        levels: Number of levels.
    """

    support: constraints.Constraint = constraints.nonnegative_integer  # below `levels`

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...], levels: int = 256) -> None:
        super().__init__(decoder, data_shape)
        _check_levels(levels)
        self.levels = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.support_name = f"{{0, ..., {levels - 1}}}"
        self.remedy = "use raw integer levels and set `levels`"

    @classmethod
    def num_params(cls, levels: int = 256) -> int:
        """A logit per level."""
        return levels

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Categorical over levels."""
        logits = self.raw(z, y, self.levels).movedim(0, -1)
        return distributions.Levels(logits=logits).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Log frequency of each level, one pseudo-count spread over them."""
        counts = torch.stack([(x == k).sum(0) for k in range(self.levels)]).to(x.dtype)
        return torch.log((counts + 1 / self.levels) / (len(x) + 1)).flatten(0, 1)


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
        (log_rate,) = self.raw(z, y)
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


def _check_levels(levels: int) -> None:
    if levels < 2:
        raise ValueError(f"levels must be at least 2; got {levels}")
