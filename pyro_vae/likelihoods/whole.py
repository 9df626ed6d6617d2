"""Likelihoods of whole numbers: counts, and levels from 0 up to a highest one."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from pyro_vae import distributions
from pyro_vae.arguments import check_choice, check_real, check_whole
from pyro_vae.distributions import OfTotal
from pyro_vae.likelihoods.base import Likelihood

LIBRARIES = ("none", "observed", "latent")
DISPERSIONS = ("gene", "cell", "shared")
MIN_GAP = 1e-3  # floor of the distance between neighbouring thresholds
ZERO_LOG_ODDS = -2.0  # initial log odds of an inflated zero


class Counts(Likelihood):
    r"""Counts with mean exp(raw), or with shares softmax(raw) of a total l.

    .. math:: \mathbb{E}[x_g \mid z] = \exp(f_g(z)) \quad\text{or}\quad
        \mathbb{E}[x_g \mid z, l] = l \cdot \mathrm{softmax}(f(z))_g

    With `library="observed"` l is the sum of x itself, and log p(x) is that of x given its sum,
    which does not compare with other log p(x). With `library="latent"` l is a latent of each
    datum, site "library" of the model. It is LogNormal with the mean and spread of the log totals
    of the training data; its guide is a LogNormal about the total of x. The encoder sees
    log(1 + x).
    """

    support = constraints.nonnegative_integer
    support_name = "{0, 1, 2, ...}"
    remedy = "counts must be whole and not negative"
    old_defaults: ClassVar[dict[str, Any]] = {"log_inputs": False}
    num_rates = 1  # raw parameters of each count, without the log odds of an inflated zero

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        zero_inflated: bool = False,
        library: str = "none",
        log_inputs: bool = True,
    ) -> None:
        super().__init__(decoder, data_shape)
        check_choice(LIBRARIES, library=library)
        self.zero_inflated, self.library, self.log_inputs = zero_inflated, library, log_inputs
        self.conditioned_on = "its total" if library == "observed" else ""
        if library != "none":
            self.log_total = nn.Buffer(torch.tensor([0.0, 1.0]))  # mean, spread of log totals
        if library == "latent":
            self.raw_guide = nn.Parameter(torch.zeros(3))  # shift, spread, spread at low totals

    def inputs(self, x: Tensor) -> Tensor:
        """Returns log(1 + x), and the mask where entries may be missing."""
        return super().inputs(x.log1p() if self.log_inputs else x)

    def check(self, x: Tensor) -> None:
        """Raises a ValueError if `x` is outside the support, or an observed total is zero."""
        super().check(x)
        if self.library != "observed":
            return
        total = x.flatten(x.ndim - len(self.data_shape)).sum(-1)
        for bad, what in ((total.isnan(), "lack values"), (total == 0, "are all zero")):
            if bool(bad.any()):
                raise ValueError(
                    'library="observed" needs counts and their total in every row; '
                    f'{int(bad.sum())} row(s) {what}: remove them, or take library="latent"'
                )

    def latents(self) -> dict[str, Distribution]:
        """Returns the prior of each datum's total, where that is a latent of the model."""
        return {"library": dist.LogNormal(*self.log_total)} if self.library == "latent" else {}

    def propose(self, x: Tensor) -> dict[str, Distribution]:
        """Returns the guide of `latents`, batch [*S], from data `x` [*S, *E]."""
        if self.library != "latent":
            return {}
        total = x.nan_to_num(0).flatten(x.ndim - len(self.data_shape)).sum(-1)
        shift, spread, low_total = self.raw_guide
        scale = F.softplus(spread - 3) + F.softplus(low_total) / (1 + total).sqrt()
        return {"library": dist.LogNormal((1 + total).log() + shift, scale)}

    def forward(
        self, z: Tensor, y: Tensor | None = None, library: Tensor | None = None
    ) -> Distribution:
        """Returns p(x | z, y), given the total [*S] too where that is a latent."""
        log_rate, *rest = self.raw(z, y, self.num_rates + self.zero_inflated)
        log_rate = log_rate if self.library == "none" else self._log_share(log_rate)
        event = len(self.data_shape)

        def distribution(total: Tensor | None) -> Any:
            rate = log_rate if total is None else log_rate + total.log()[(..., *[None] * event)]
            each = self.counts(rate, *rest[: self.num_rates - 1])
            if self.zero_inflated:
                each = dist.ZeroInflatedDistribution(each, gate_logits=rest[-1])
            return each.to_event(event)

        if self.library == "none" or library is not None:
            return distribution(library)
        return OfTotal(distribution, dist.LogNormal(*self.log_total).expand(z.shape[:-1]))

    def shares(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Returns the expected share of each count in the total [*S, *E]."""
        return self._log_share(self.raw(z, y, self.num_rates + self.zero_inflated)[0]).exp()

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the log of the mean, and log odds that add few zeros."""
        first, rest = x.mean(0).clamp(min=0.01).log(), [0.0] * (self.num_rates - 1)
        rest += [ZERO_LOG_ODDS] * self.zero_inflated
        return torch.cat([first, *(torch.full_like(first, value) for value in rest)])

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Starts at the average datum, and measures the totals of training data `x` [N, *E]."""
        super().initialise(x)
        if self.library != "none":
            total = x.flatten(1).sum(1).clamp(min=1)
            spread = total.log().std() if len(total) > 1 else torch.ones(())
            self.log_total.copy_(torch.stack([total.log().mean(), spread.clamp(min=0.01)]))

    def _log_share(self, log_rate: Tensor) -> Tensor:
        first = log_rate.ndim - len(self.data_shape)
        return log_rate.flatten(first).log_softmax(-1).view_as(log_rate)

    @abstractmethod
    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Returns the distribution of each entry, of mean exp(log_rate)."""


class Poisson(Counts):
    """Poisson counts.

    Args:
        decoder: Network to the log rate.
        data_shape: Shape of one datum.
        zero_inflated: Whether to add zeros, with log odds that the decoder predicts.
        library: "none", "observed" (the total of x is given) or "latent"; see `Counts`.
        log_inputs: Whether the encoder sees log(1 + x) and not x.
    """

    @classmethod
    def num_params(cls, zero_inflated: bool = False) -> int:
        """Returns 1 for the log rate, 2 with the log odds of an inflated zero."""
        return 1 + zero_inflated

    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Returns a Poisson by its log rate."""
        return distributions.Poisson(log_rate)


class NegativeBinomial(Counts):
    r"""Overdispersed counts, with mean m and dispersion r.

    .. math:: \mathrm{Var}[x \mid z] = m + m^2 / r

    Its log mass is computed in float64, but not in training steps: there float32 gives the same
    gradients in 0.8 of the time, and values that are off by up to 0.8 nats for a count of 10^6.

    Args:
        decoder: Network to the log mean, and to the raw dispersion if that is "cell".
        data_shape: Shape of one datum.
        min_dispersion: Floor of r.
        zero_inflated: Whether to add zeros, with log odds that the decoder predicts.
        dispersion: "gene", one r for each entry of a datum; "cell", one from z for each entry of
            each datum; or "shared", one for all.
        library: "none", "observed" (the total of x is given) or "latent"; see `Counts`.
        log_inputs: Whether the encoder sees log(1 + x) and not x.

    References:
        Lopez et al. Deep generative modeling for single-cell transcriptomics. 2018.
    """

    old_defaults: ClassVar[dict[str, Any]] = {**Counts.old_defaults, "dispersion": "cell"}

    def __init__(
        self,
        decoder: nn.Module,
        data_shape: tuple[int, ...],
        min_dispersion: float = 1e-3,
        zero_inflated: bool = False,
        dispersion: str = "gene",
        library: str = "none",
        log_inputs: bool = True,
    ) -> None:
        super().__init__(decoder, data_shape, zero_inflated, library, log_inputs)
        check_real(0, min_dispersion=min_dispersion)
        check_choice(DISPERSIONS, dispersion=dispersion)
        self.min_dispersion, self.dispersion = min_dispersion, dispersion
        if dispersion == "cell":
            self.num_rates = 2
        else:
            shape = self.data_shape if dispersion == "gene" else ()
            self.raw_dispersion = nn.Parameter(torch.zeros(shape))

    @classmethod
    def num_params(cls, zero_inflated: bool = False, dispersion: str = "gene") -> int:
        """Counts the log mean, the dispersion if "cell", and the log odds of inflated zeros."""
        return 1 + (dispersion == "cell") + zero_inflated

    def counts(self, log_rate: Tensor, *rest: Tensor) -> Any:
        """Returns a negative binomial by log mean and dispersion."""
        raw = rest[0] if rest else self.raw_dispersion
        r = self.min_dispersion + F.softplus(raw)
        logits = log_rate - r.log()
        if self.training and torch.is_grad_enabled():
            return dist.NegativeBinomial(r.expand(logits.shape), logits=logits)
        return distributions.NegativeBinomial(r, logits)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Starts dispersions too, where they match mean and variance of data `x` [N, *E]."""
        super().initialise(x)
        if self.dispersion != "cell" and len(x) > 1:
            mean, variance = x.mean(0), x.var(0)
            r = (mean.square() / (variance - mean).clamp(min=1e-6)).clamp(0.05, 50)
            r = r if self.dispersion == "gene" else r.log().mean().exp()
            self.raw_dispersion.copy_(r.expm1().log())


class LevelLikelihood(Likelihood):
    """Base of likelihoods of levels, which have a number of levels and so a support.

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


class DiscretizedLogistic(LevelLikelihood):
    """Logistic in bins, on the integers 0 to levels - 1; see `distributions.DiscretizedLogistic`.

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
        """Returns 2, for location and scale."""
        return 2

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns the logistic in bins."""
        return self._logistic(*self.raw(z, y, 2)).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the mean level, as a number between -1/2 and 1/2."""
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
        """Returns how many weights, locations and scales there are."""
        return 3 * components

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns the mixture of logistics in bins."""
        raw = self.raw(z, y, 3 * self.components).movedim(0, -1)
        loc, logits, scale = raw.unflatten(-1, (3, self.components)).unbind(-2)
        weights, each = dist.Categorical(logits=logits), self._logistic(loc, scale)
        return distributions.MixtureOfLogistics(weights, each).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns locations about the mean level, a twentieth of all levels apart."""
        start, steps = super().raw_start(x), torch.arange(self.components) / 20
        return torch.cat([start + step for step in steps - steps.mean()])


class Categorical(LevelLikelihood):
    """An unrestricted distribution over the integers 0 to levels - 1 in each dimension.

    Args:
        decoder: Network to `levels` logits per channel.
        data_shape: Shape of one datum.
        levels: Number of levels.
    """

    @classmethod
    def num_params(cls, levels: int = 256) -> int:
        """Returns the number of logits, one per level."""
        return levels

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns a categorical over levels."""
        logits = self.raw(z, y, self.levels).movedim(0, -1)
        return distributions.Levels(logits=logits).to_event(len(self.data_shape))

    def raw_start(self, x: Tensor) -> Tensor:
        """Returns the log frequency of each level, with one pseudo-count spread over them."""
        counts = torch.stack([(x == k).sum(0) for k in range(self.levels)]).to(x.dtype)
        return torch.log((counts + 1 / self.levels) / (len(x) + 1)).flatten(0, 1)


class Ordinal(LevelLikelihood):
    r"""Ordered levels 0 to levels - 1, by a cumulative logit with thresholds for each channel.

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

    @property
    def thresholds(self) -> Tensor:
        """Thresholds of each channel, in rising order [C, levels - 1]."""
        first, rest = self.raw_thresholds[:, :1], self.raw_thresholds[:, 1:]
        return torch.cat([first, MIN_GAP + F.softplus(rest)], -1).cumsum(-1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Distribution:
        """Returns levels with the differences of neighbouring cumulative probabilities."""
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
        """Returns locations: the mean distance of each position from its channel's thresholds."""
        cumulative = self._cumulative(x)
        thresholds = self.thresholds.T.unflatten(1, (-1, *(1,) * (x.ndim - 2)))
        distance = thresholds.to(cumulative) - torch.logit(cumulative)
        weight = cumulative * (1 - cumulative)  # inverse variance of a logit
        return (weight * distance).sum(0) / weight.sum(0)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Sets the thresholds of each channel to match the frequencies of its levels."""
        channels = x.movedim(1, -1).flatten(0, -2)
        self._set_thresholds(torch.logit(self._cumulative(channels)).T)
        super().initialise(x)

    @torch.no_grad()
    def _set_thresholds(self, thresholds: Tensor) -> None:
        gaps = (thresholds.diff(dim=-1) - MIN_GAP).clamp(min=1e-3)
        raw = gaps + torch.log(-torch.expm1(-gaps))
        self.raw_thresholds.copy_(torch.cat([thresholds[:, :1], raw], -1))

    def _cumulative(self, x: Tensor) -> Tensor:
        """Returns the share of `x` up to each level but the last, with one pseudo-count in all."""
        steps = torch.arange(1, self.levels, device=x.device) / self.levels
        counts = torch.stack([(x <= k).sum(0) for k in range(self.levels - 1)])
        return (counts + steps.view(-1, *(1,) * (x.ndim - 1))) / (len(x) + 1)
