"""Distributions of one number: pixels, levels, rounded values, labels."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

Shape = Size | list[int] | tuple[int, ...]
TAIL_START = 25.0  # standard deviations from which the tail of a Normal is approximated
NARROW = 1e-7  # standard deviations below which an interval's mass is its density times its width
TINY = 1e-300  # floor of numbers whose logarithm is taken


class ExpandByArguments:
    """A distribution whose `expand` makes it anew from its arguments, expanded.

    Attributes:
        argument_names: Names of the arguments, in order. Shapes of tensors and distributions
            among them begin with the batch; all else stays as it is.
    """

    argument_names: ClassVar[tuple[str, ...]]

    def expand(self: Any, batch_shape: Shape, _instance: Any = None) -> Any:
        """Returns the same distribution over a larger batch."""
        first, expanded = len(self.batch_shape), []
        for value in (getattr(self, name) for name in self.argument_names):
            if isinstance(value, Tensor):
                value = value.expand(*batch_shape, *value.shape[first:])
            elif isinstance(value, Distribution):
                value = value.expand(Size((*batch_shape, *value.batch_shape[first:])))
            expanded.append(value)
        return type(self)(*expanded, validate_args=False)


class Bernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli with a log mass that passes over the logits half as often.

    .. math:: \log p(x; \eta) = \log \sigma((2 x - 1) \, \eta), \qquad x \in \{0, 1\}

    No digits cancel, however large the logit, and `value` is not expanded to the shape of draws.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log mass of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        sign = 2 * value.to(self.logits.dtype) - 1
        return F.logsigmoid(sign * self.logits)


class Beta(dist.Beta):
    """Pyro's Beta, whose draws stay as far from 0 and 1 as dequantised data do."""

    ends = constraints.interval(2.0**-32, 1 - 2.0**-24)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Returns reparameterised draws [*sample, *batch]."""
        z = super().rsample(Size(sample_shape))
        return z.clamp(self.ends.lower_bound, self.ends.upper_bound)


class Poisson(ExpandByArguments, dist.Poisson):
    r"""Pyro's Poisson by its log rate, with a log mass in float64.

    .. math:: \log p(x; \eta) = \eta x - e^\eta - \log x!

    It is right for rates beyond float32, and where large terms cancel: at x = 10^6 float32 is off
    by half a nat.
    """

    argument_names = ("log_rate",)

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log mass of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, eta = value.double(), self.log_rate.double()
        return (eta * x - eta.exp() - torch.lgamma(x + 1)).to(self.log_rate.dtype)


class NegativeBinomial(ExpandByArguments, dist.NegativeBinomial):
    r"""Pyro's negative binomial by dispersion r and log odds, with a log mass in float64.

    .. math:: \log p(x; r, \eta) = \eta x - (r + x) \log(1 + e^\eta)
        + \log \Gamma(r + x) - \log \Gamma(r) - \log x!

    It is right where large terms cancel: at x = 10^6 float32 is off by 0.8 nats. A dispersion that
    many entries share is not repeated for them.
    """

    argument_names = ("dispersion", "logits")

    def __init__(
        self, dispersion: Tensor, logits: Tensor, validate_args: bool | None = None
    ) -> None:
        self.dispersion = dispersion
        super().__init__(dispersion, logits=logits, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log mass of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        x, r, eta = value.double(), self.dispersion.double(), self.logits.double()
        log_ways = torch.lgamma(r + x) - torch.lgamma(x + 1) - torch.lgamma(r)
        log_mass = eta * x - (r + x) * F.softplus(eta, threshold=40) + log_ways
        return log_mass.to(self.logits.dtype)


class ContinuousBernoulli(ExpandByArguments, TorchDistribution):
    r"""Continuous Bernoulli on [0, 1], by its logits.

    .. math:: \log p(x; \eta) = \eta x - \log \frac{e^\eta - 1}{\eta}

    torch's own class clamps the probability, which costs 0.6 nats a pixel at a logit of 30.

    References:
        Loaiza-Ganem and Cunningham. The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders. 2019.
    """

    argument_names = ("logits",)
    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        small = self.logits.abs() < 0.05
        eta = torch.where(small, torch.ones_like(self.logits), self.logits)
        exact = eta.relu() + torch.log(-torch.expm1(-eta.abs()) / eta.abs())
        series = self.logits / 2 + self.logits**2 / 24 - self.logits**4 / 2880
        return self.logits * value - torch.where(small, series, exact)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws by inverting the cumulative distribution, starting from the denser end."""
        a = self.logits.abs().clamp(min=1e-3)
        u = torch.rand(self._extended_shape(sample_shape), dtype=a.dtype, device=a.device)
        near = torch.log1p(u * torch.expm1(-a)) / -a  # the density falls from 0 on
        x = torch.where(self.logits > 0, 1 - near, near)
        return torch.where(self.logits.abs() < 1e-3, u + self.logits * u * (u - 1) / -2, x)

    @property
    def mean(self) -> Tensor:
        """E[x] = 1 / (1 - exp(-logit)) - 1 / logit."""
        small = self.logits.abs() < 0.05
        eta = torch.where(small, torch.ones_like(self.logits), self.logits)
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        return torch.where(small, series, -1 / torch.expm1(-eta) - 1 / eta)


class DiscretizedLogistic(ExpandByArguments, TorchDistribution):
    r"""Logistic distribution integrated over each of `levels` bins, on {0, ..., levels - 1}.

    .. math:: P(k) = \sigma\big(\tfrac{k + 1/2 - \mu}{s}\big)
        - \sigma\big(\tfrac{k - 1/2 - \mu}{s}\big)

    with the lowest and highest bins reaching to infinity, so that the masses sum to one.
    Location and scale are in units of levels.

    References:
        Kingma et al. Improved variational inference with inverse autoregressive flow. 2016.
        Salimans et al. PixelCNN++. 2017.
    """

    argument_names = ("loc", "scale", "levels")
    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support: constraints.Constraint = constraints.nonnegative_integer  # below `levels`

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels, self.support = levels, constraints.integer_interval(0, levels - 1)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log mass of `value` in nats, exact in the tails too."""
        if self._validate_args:
            self._validate_sample(value)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        above = F.logsigmoid((value + 0.5 - self.loc) / self.scale)
        below = F.logsigmoid(-(value - 0.5 - self.loc) / self.scale)
        width = torch.log(-torch.expm1(-1 / self.scale))
        inside = above + below + width
        return torch.where(value <= 0, above, torch.where(value >= self.levels - 1, below, inside))

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws logistic numbers, rounded and clipped."""
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            tiny = torch.finfo(self.loc.dtype).eps
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            draws = self.loc + self.scale * torch.logit(u, eps=tiny)
            return draws.round().clamp(0, self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """E[k], the sum of P(k >= j) over j = 1, ..., levels - 1."""
        total = torch.zeros_like(self.loc)
        for edge in range(1, self.levels):
            total = total + torch.sigmoid((self.loc - edge + 0.5) / self.scale)
        return total


class MixtureOfLogistics(dist.MixtureSameFamily):
    """A mixture of `DiscretizedLogistic` over the last batch dimension."""

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to levels - 1."""
        return self.component_distribution.support


class Levels(dist.Categorical):
    """Categorical over 0, ..., C - 1 as floating-point numbers, with a mean."""

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws by inverting the cumulative distribution, in the type of the probabilities."""
        with torch.no_grad():
            below = self.probs.cumsum(-1)
            shape = self._extended_shape(sample_shape)
            u = 1 - torch.rand(shape, dtype=below.dtype, device=below.device)  # above 0
            level = u * below[..., -1]  # the rounded sum is not 1
            return (below < level.unsqueeze(-1)).sum(-1, dtype=below.dtype)

    @property
    def mean(self) -> Tensor:
        """E[k]."""
        k = torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
        return self.probs @ k


class Interval(ExpandByArguments, TorchDistribution):
    r"""Probability of the interval of a given width around a value.

    .. math:: P(x) = F(x + w / 2) - F(x - w / 2)

    The masses of the multiples of the width sum to one, so that no log mass exceeds 0 nats,
    however often a value is repeated. They are computed in float64 and in the nearer tail, where
    the difference is exact. Draws are multiples of the width; `mean` is that before rounding.

    Args:
        base: Normal, Laplace or LogNormal; for the last, an interval has no mass below 0.
        width: Width w of an interval, which broadcasts to the batch.

    Raises:
        ValueError: If `base` is of another family.
    """

    argument_names = ("base", "width")
    arg_constraints = {}
    support: constraints.Constraint = constraints.real

    def __init__(
        self, base: Any, width: float | Tensor, validate_args: bool | None = None
    ) -> None:
        if not isinstance(base, dist.Normal | dist.Laplace | dist.LogNormal):
            raise ValueError(
                f"Interval needs a Normal, Laplace or LogNormal; got {type(base).__name__}"
            )
        self.base, self.width = base, width
        if isinstance(base, dist.LogNormal):
            self.support = constraints.nonnegative
        super().__init__(base.batch_shape, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log probability in nats of the interval around `value`."""
        centre = value.double()
        low, high = self._score(centre - self.width / 2), self._score(centre + self.width / 2)
        middle, unit = (low + high) / 2, self.base.scale.double()
        if isinstance(self.base, dist.LogNormal):
            unit = unit * centre.clamp(min=2.0**-126)
        width = torch.where(self.width < NARROW * unit, self.width / unit, high - low)
        mirror = 1 - 2 * (middle < 0).to(middle.dtype)
        log_mass = _log_laplace_mass if isinstance(self.base, dist.Laplace) else _log_normal_mass
        return log_mass(mirror * middle - width / 2, width).to(self.base.loc.dtype)

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws values, rounded to multiples of the width."""
        draws = self.base.sample(Size(sample_shape))
        width = torch.as_tensor(self.width).to(draws)
        return (draws / width).round() * width

    @property
    def mean(self) -> Tensor:
        """Mean before rounding."""
        return self.base.mean

    def _score(self, x: Tensor) -> Tensor:
        x = x.clamp(min=1e-300).log() if isinstance(self.base, dist.LogNormal) else x
        return (x - self.base.loc.double()) / self.base.scale.double()


def _log_normal_mass(near: Tensor, width: Tensor) -> Tensor:
    """Returns the log mass of N(0, 1) on [near, near + width], in the upper tail or about 0.

    Up to near = 25 it is the difference of two erfc; beyond, the integral of
    exp(-near t - t^2 / 2) with the square to second order, which is right to 1e-6. erfc and its
    derivatives take a fifth of the time of those of `log_ndtr`.
    """
    start = near.clamp(max=TAIL_START) / math.sqrt(2)
    mass = torch.erfc(start) - torch.erfc(start + width / math.sqrt(2))
    far = near.clamp(min=TAIL_START)
    u = far * width
    share = -torch.expm1(-u).clamp(max=-TINY)  # share of the tail, as if exponential
    correction = (1 - (1 - share) * (1 + u + u.square() / 2)) / (share * far.square())
    correction = correction / (1 + 2.5 * correction)
    beyond = torch.log(share / far) - far.square() / 2 - math.log(2 * math.pi) / 2 - correction
    log_mass = torch.where(near > TAIL_START, beyond, torch.log(mass.clamp(min=TINY) / 2))
    point = width.log() - (near + width / 2).square() / 2 - math.log(2 * math.pi) / 2
    return torch.where(width < NARROW, point, log_mass)


def _log_laplace_mass(near: Tensor, width: Tensor) -> Tensor:
    """Returns the log mass of a unit Laplace on [near, near + width], as `_log_normal_mass`."""
    beyond = torch.log(-torch.expm1(-width).clamp(max=-TINY) / 2) - near.clamp(min=0)
    start = near.clamp(max=0)
    mass = -torch.expm1(start) - torch.expm1(-start - width)
    return torch.where(near > 0, beyond, torch.log(mass.clamp(min=TINY) / 2))


class Label(ExpandByArguments, TorchDistribution):
    """A label: the number of the class, or -1 where it is unknown; log mass 0 or -inf.

    Args:
        classes: One-hot vectors of the classes [*S, C].
    """

    argument_names = ("classes",)
    arg_constraints = {}

    support: constraints.Constraint = constraints.nonnegative_integer  # or -1

    def __init__(self, classes: Tensor, validate_args: bool | None = None) -> None:
        self.classes = classes
        self.support = constraints.integer_interval(-1, classes.shape[-1] - 1)
        super().__init__(classes.shape[:-1], validate_args=validate_args)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """Returns the class."""
        return self.classes.argmax(-1).expand(*sample_shape, *self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns 0 where the label `value` is the class or unknown, -inf elsewhere."""
        fits = (self.classes.argmax(-1) == value) | (value < 0)
        return fits.to(self.classes.dtype).log()
