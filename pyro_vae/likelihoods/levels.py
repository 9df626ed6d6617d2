"""Likelihoods of levels: the integers from 0 up to a highest one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_real, check_whole
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["Categorical", "DiscretizedLogistic", "MixtureOfLogistics", "Ordinal"]

MIN_GAP = 1e-3  # between neighbouring thresholds


class Levelled(Likelihood):
    """What likelihoods of levels share: their number, and so their support.

    Args:
        decoder: Network to raw parameters.
        data_shape: Shape of one datum.
        levels: Number of levels.
    """

    support: constraints.Constraint = constraints.nonnegative_integer  # below `levels`
    remedy = "use raw integer levels and set `levels`"

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...], levels: int = 256) -> None:
        super().__init__(decoder, data_shape)
        check_whole(2, levels=levels)
        self.levels = levels
        self.support = constraints.integer_interval(0, levels - 1)
        self.support_name = f"{{0, ..., {levels - 1}}}"


class DiscretizedLogistic(Levelled):
    """Logistic in bins, on the integers 0 to levels - 1; see `distributions`.

    Args:
        decoder: Network to location and scale, in units of (levels - 1).
        data_shape: Shape of one datum.
        levels: Number of levels; masses sum to one over them.
        min_scale: Floor of the scale, in units of (levels - 1).
    """

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        levels: int = 256,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__(decoder, data_shape, levels)
        check_real(0, min_scale=min_scale)
        self.min_scale = min_scale

    @classmethod
    def num_params(cls) -> int:
        """Location and scale."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Logistic in bins."""
        return self._logistic(*self.raw(z, y, 2)).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """The mean level, between -1/2 and 1/2."""
        return x.mean(0) / (self.levels - 1) - 0.5

    def _logistic(self, loc: Tensor, scale: Tensor) -> distributions.DiscretizedLogistic:
        unit = self.levels - 1
        scale = unit * (self.min_scale + 0.1 * F.softplus(scale))
        return distributions.DiscretizedLogistic(unit * (0.5 + loc), scale, self.levels)


class MixtureOfLogistics(DiscretizedLogistic):
    """A mixture of logistics in bins for each entry, on the integers 0 to levels - 1.

    The colours of a pixel are independent given z, unlike in PixelCNN++.

    Args:
        decoder: Network to weight, location and scale of each component.
        data_shape: Shape of one datum.
        levels: Number of levels.
        min_scale: Floor of the scales, in units of (levels - 1).
        components: Number of components.

    References:
        Salimans et al. PixelCNN++: improving the PixelCNN with discretized logistic mixture
        likelihood and other modifications. 2017.
    """

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        levels: int = 256,
        min_scale: float = 1e-3,
        components: int = 5,
    ) -> None:
        super().__init__(decoder, data_shape, levels, min_scale)
        check_whole(components=components)
        self.components = components

    @classmethod
    def num_params(cls, components: int = 5) -> int:
        """Weight, location and scale of each component."""
        return 3 * components

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Mixture of logistics in bins."""
        raw = self.raw(z, y, 3 * self.components).movedim(0, -1)
        loc, logits, scale = raw.unflatten(-1, (3, self.components)).unbind(-2)
        each = distributions.MixtureOfLogistics(logits, self._logistic(loc, scale))
        return each.to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Locations about the mean level, a twentieth of all levels apart."""
        start, steps = super().raw_start(x), torch.arange(self.components) / 20
        return torch.cat([start + step for step in steps - steps.mean()])


class Categorical(Levelled):
    """A free distribution over the integers 0 to levels - 1 in each dimension.

    Args:
        decoder: Network to `levels` logits per channel.
        data_shape: Shape of one datum.
        levels: Number of levels.
    """

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


class Ordinal(Levelled):
    r"""Ordered levels 0 to levels - 1, by a cumulative logit with thresholds of each channel.

    .. math:: P(x \le k \mid z) = \sigma(\theta_k - f(z)), \qquad
        \theta_0 < \theta_1 < \dots < \theta_{\mathrm{levels} - 2}

    Args:
        decoder: Network to the location f.
        data_shape: Shape of one datum.
        levels: Number of levels.

    References:
        McCullagh. Regression models for ordinal data. 1980.
    """

    def __init__(self, decoder: nn.Module, data_shape: tuple[int, ...], levels: int = 256) -> None:
        super().__init__(decoder, data_shape, levels)
        self.raw_thresholds = nn.Parameter(torch.empty(self.data_shape[0], levels - 1))
        cumulative = torch.arange(1, levels) / levels
        self._set_thresholds(torch.logit(cumulative).expand_as(self.raw_thresholds))

    @classmethod
    def num_params(cls) -> int:
        """The location."""
        return 1

    @property
    def thresholds(self) -> Tensor:
        """Thresholds of each channel, rising, [C, levels - 1]."""
        first, rest = self.raw_thresholds[:, :1], self.raw_thresholds[:, 1:]
        return torch.cat([first, MIN_GAP + F.softplus(rest)], -1).cumsum(-1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Levels by the differences of neighbouring cumulative probabilities."""
        location = self.raw(z, y).squeeze(0).unsqueeze(-1)
        rest = (1,) * (len(self.data_shape) - 1)
        edges = self.thresholds.unflatten(0, (-1, *rest)) - location
        below = F.logsigmoid(edges)
        above = below - edges
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        width = torch.log(-torch.expm1(-edges.diff(dim=-1)))
        inside = below[..., 1:] + above[..., :-1] + width
        logits = torch.cat([below[..., :1], inside, above[..., -1:]], -1)
        return distributions.Levels(logits=logits).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """The location of each position: its mean distance from its channel's thresholds."""
        cumulative = self._cumulative(x)
        thresholds = self.thresholds.T.unflatten(1, (-1, *(1,) * (x.ndim - 2)))
        distance = thresholds.to(cumulative) - torch.logit(cumulative)
        weight = cumulative * (1 - cumulative)  # inverse variance of a logit
        return (weight * distance).sum(0) / weight.sum(0)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """The thresholds of each channel are those of its frequencies."""
        channels = x.movedim(1, -1).flatten(0, -2)
        self._set_thresholds(torch.logit(self._cumulative(channels)).T)
        super().initialise(x)

    @torch.no_grad()
    def _set_thresholds(self, thresholds: Tensor) -> None:
        gaps = (thresholds.diff(dim=-1) - MIN_GAP).clamp(min=1e-3)
        raw = gaps + torch.log(-torch.expm1(-gaps))
        self.raw_thresholds.copy_(torch.cat([thresholds[:, :1], raw], -1))

    def _cumulative(self, x: Tensor) -> Tensor:
        """Share of `x` up to each level but the last, one pseudo-count spread over all."""
        steps = torch.arange(1, self.levels, device=x.device) / self.levels
        counts = torch.stack([(x <= k).sum(0) for k in range(self.levels - 1)])
        return (counts + steps.view(-1, *(1,) * (x.ndim - 1))) / (len(x) + 1)
