"""Likelihoods of levels: the integers from 0 up to a highest one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_real, check_whole
from pyro_vae.likelihoods.base import Likelihood

__all__ = ["Categorical", "DiscretizedLogistic", "MixtureOfLogistics"]


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
        check_whole(2, levels=levels)
        check_real(0, min_scale=min_scale)
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
        check_whole(2, levels=levels)
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
