"""Densities that Pyro lacks, and KL rules between them: all on classes of our own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, constraints, register_kl, transform_to

from pyro_vae.generators import forked

__all__ = [
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Draw",
    "Flow",
    "FullNormal",
    "Incomplete",
    "Interval",
    "Joint",
    "Label",
    "Levels",
    "MixtureOfDiagonalNormals",
    "MixtureOfLogistics",
    "OfTotal",
    "Product",
    "Rows",
    "flow_family",
    "mixture",
]


Shape = Size | list[int] | tuple[int, ...]
Draw = Callable[[str, Any], Tensor]  # of a name and a distribution


class Bernoulli(dist.Bernoulli):
    r"""Pyro's Bernoulli, its log mass with half the passes over the logits.

    .. math:: \log p(x; \eta) = \log \sigma((2 x - 1) \, \eta), \qquad x \in \{0, 1\}

    Nothing cancels in it, however large the logit; nor is `value` ever as large as the draws.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        sign = 2 * value.to(self.logits.dtype) - 1
        return F.logsigmoid(sign * self.logits)


class ContinuousBernoulli(TorchDistribution):
    r"""Continuous Bernoulli on [0, 1], by its logits.

    .. math:: \log p(x; \eta) = \eta x - \log \frac{e^\eta - 1}{\eta}

    torch's own clamps the probability, which costs 0.6 nats a pixel at a logit of 30.

    References:
        Loaiza-Ganem and Cunningham. The continuous Bernoulli: fixing a pervasive error in
        variational autoencoders. 2019.
    """

    arg_constraints = {"logits": constraints.real}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> ContinuousBernoulli:
        """The same distribution over a larger batch."""
        return type(self)(self.logits.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value` in nats."""
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * value - self._log_normaliser()

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws by the inverse of the cumulative distribution, of the nearer end."""
        a = self.logits.abs().clamp(min=1e-3)
        u = torch.rand(self._extended_shape(sample_shape), dtype=a.dtype, device=a.device)
        near = torch.log1p(u * torch.expm1(-a)) / -a  # density falls from 0
        x = torch.where(self.logits > 0, 1 - near, near)
        return torch.where(self.logits.abs() < 1e-3, u + self.logits * u * (u - 1) / -2, x)

    @property
    def mean(self) -> Tensor:
        """E[x] = 1 / (1 - exp(-logit)) - 1 / logit."""
        small = self.logits.abs() < 0.05
        eta = torch.where(small, torch.ones_like(self.logits), self.logits)
        series = 0.5 + self.logits / 12 - self.logits**3 / 720
        return torch.where(small, series, -1 / torch.expm1(-eta) - 1 / eta)

    def _log_normaliser(self) -> Tensor:
        small = self.logits.abs() < 0.05
        eta = torch.where(small, torch.ones_like(self.logits), self.logits)
        a = eta.abs()
        exact = eta.relu() + torch.log(-torch.expm1(-a) / a)
        series = self.logits / 2 + self.logits**2 / 24 - self.logits**4 / 2880
        return torch.where(small, series, exact)


class DiscretizedLogistic(TorchDistribution):
    r"""Logistic distribution integrated over each of `levels` bins, on {0, ..., levels - 1}.

    .. math:: P(k) = \sigma\big(\tfrac{k + 1/2 - \mu}{s}\big)
        - \sigma\big(\tfrac{k - 1/2 - \mu}{s}\big)

    with the lowest and highest bins reaching to infinity, so that the masses sum to one.
    Location and scale are in units of levels.

    References:
        Kingma et al. Improved variational inference with inverse autoregressive flow. 2016.
        Salimans et al. PixelCNN++. 2017.
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int = 256, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> DiscretizedLogistic:
        """The same distribution over a larger batch."""
        loc, scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        return type(self)(loc, scale, self.levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log mass of `value` in nats; exact in the tails, where a difference would vanish."""
        if self._validate_args:
            self._validate_sample(value)
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b))
        above = F.logsigmoid((value + 0.5 - self.loc) / self.scale)
        below = F.logsigmoid(-(value - 0.5 - self.loc) / self.scale)
        width = torch.log(-torch.expm1(-1 / self.scale))
        inside = above + below + width
        return torch.where(value <= 0, above, torch.where(value >= self.levels - 1, below, inside))

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Rounded and clipped logistic draws."""
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
    """A mixture of `DiscretizedLogistic`, whose last batch dimension is that of `logits`."""

    def __init__(
        self, logits: Tensor, each: DiscretizedLogistic, validate_args: bool | None = None
    ) -> None:
        super().__init__(dist.Categorical(logits=logits), each, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Integers from 0 to levels - 1."""
        return self.component_distribution.support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> MixtureOfLogistics:
        """The same distribution over a larger batch."""
        each = self.component_distribution
        shape = (*batch_shape, each.batch_shape[-1])
        logits = self.mixture_distribution.logits.expand(shape)
        return type(self)(logits, each.expand(shape), validate_args=False)

    @property
    def variance(self) -> Tensor:
        """Not known in closed form."""
        raise NotImplementedError


class Levels(dist.Categorical):
    """Categorical over the integers 0, ..., C - 1 as numbers: draws are, and it has a mean."""

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws, of the precision of the probabilities."""
        return super().sample(sample_shape).to(self.probs.dtype)

    @property
    def mean(self) -> Tensor:
        """E[k]."""
        k = torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)
        return self.probs @ k


class Interval(TorchDistribution):
    r"""Probability of the interval of a given width around a value.

    .. math:: P(x) = F(x + w / 2) - F(x - w / 2)

    The masses of the multiples of the width sum to one, so that nothing here can exceed 0 nats,
    however often a value is repeated. They are taken in float64 and in the nearer tail, where the
    difference is exact. Draws are multiples of the width; `mean` is that before rounding.

    Args:
        base: Normal, Laplace or LogNormal; of the last, what lies below 0 is left out.
        width: Width w of an interval, which broadcasts to the batch.

    Raises:
        ValueError: If `base` is of another family.
    """

    arg_constraints = {}

    def __init__(
        self, base: Any, width: float | Tensor, validate_args: bool | None = None
    ) -> None:
        if not isinstance(base, dist.Normal | dist.Laplace | dist.LogNormal):
            raise ValueError(
                f"Interval needs a Normal, Laplace or LogNormal; got {type(base).__name__}"
            )
        self.base, self.width = base, width
        super().__init__(base.batch_shape, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of the base, 0 included where values are positive."""
        positive = isinstance(self.base, dist.LogNormal)
        return constraints.nonnegative if positive else constraints.real

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Interval:
        """The same distribution over a larger batch."""
        return type(self)(self.base.expand(Size(batch_shape)), self.width, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability in nats of the interval around `value`."""
        centre = value.double()
        low, high = self._score(centre - self.width / 2), self._score(centre + self.width / 2)
        upper = low + high > 0  # there both ends are mirrored into the lower tail
        low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
        below, above = self._log_cdf(low), self._log_cdf(high)
        gap = (above - below).clamp(min=1e-30)
        return (above + torch.log(-torch.expm1(-gap))).to(self.base.loc.dtype)

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws, rounded to multiples of the width."""
        return (self.base.sample(Size(sample_shape)) / self.width).round() * self.width

    @property
    def mean(self) -> Tensor:
        """Mean before rounding."""
        return self.base.mean

    def _score(self, x: Tensor) -> Tensor:
        x = x.clamp(min=1e-300).log() if isinstance(self.base, dist.LogNormal) else x
        return (x - self.base.loc.double()) / self.base.scale.double()

    def _log_cdf(self, score: Tensor) -> Tensor:
        if not isinstance(self.base, dist.Laplace):
            return torch.special.log_ndtr(score)
        down = score.clamp(max=0) - math.log(2)
        return torch.where(score < 0, down, torch.log1p(-0.5 * torch.exp(-score.clamp(min=0))))


class Product(TorchDistribution):
    r"""Independent columns of several families, one column an entry of the batch [*S, C].

    .. math:: \log p(x) = \sum_c \log p_c(x_c)

    `to_event(1)` makes it a distribution of rows. As the mean of levels their mode is taken,
    for codes of categories have none.

    Args:
        parts: Scalar distributions, of batch [*S, C_k] each.
        columns: For each part, the numbers of its C_k columns.
    """

    arg_constraints = {}

    def __init__(
        self,
        parts: Sequence[Any],
        columns: Sequence[Sequence[int]],
        validate_args: bool | None = None,
    ) -> None:
        self.parts, self.columns = parts, columns
        self.order = _inverse([c for part in columns for c in part])
        batch = Size((*parts[0].batch_shape[:-1], len(self.order)))
        super().__init__(batch, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Rows of numbers, each column within the support of its part."""
        return Rows([p.support for p in self.parts], self.columns)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Product:
        """The same distribution over a larger batch."""
        parts = [p.expand((*batch_shape[:-1], p.batch_shape[-1])) for p in self.parts]
        return type(self)(parts, self.columns, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of each entry of `value` [*S, C] in nats."""
        pairs = zip(self.parts, self.columns)
        return self._joined([p.log_prob(value[..., _run(columns)]) for p, columns in pairs])

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws of each column."""
        return self._joined([p.sample(Size(sample_shape)) for p in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of each column, or mode of levels."""
        means = [p.mode if isinstance(p, Levels) else p.mean for p in self.parts]
        return self._joined([m.to(means[0].dtype) for m in means])

    def _joined(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts, -1)
        return joined if self.order == sorted(self.order) else joined[..., self.order]


class Rows(constraints.Constraint):
    """Rows whose columns are each within their own support; arguments as in `Product`."""

    def __init__(
        self, parts: Sequence[constraints.Constraint], columns: Sequence[Sequence[int]]
    ) -> None:
        self.parts, self.columns = parts, columns
        self.order = _inverse([c for part in columns for c in part])

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether every column is."""
        return all(part.is_discrete for part in self.parts)

    def check(self, value: Tensor) -> Tensor:
        """Whether each entry is in the support of its column."""
        pairs = zip(self.parts, self.columns)
        return torch.cat([p.check(value[..., c]) for p, c in pairs], -1)[..., self.order]


def _run(numbers: Sequence[int]) -> Sequence[int] | slice:
    """Numbers as a slice, where they rise one by one."""
    whole = slice(numbers[0], numbers[-1] + 1)
    return whole if list(numbers) == list(range(whole.start, whole.stop)) else numbers


def _inverse(order: Sequence[int]) -> list[int]:
    """Where each number of a permutation stands."""
    return sorted(range(len(order)), key=lambda i: order[i])


class Incomplete(TorchDistribution):
    r"""The marginal density of the entries that are not NaN; NaN declares a missing one.

    .. math:: \log p(x) = \sum_{e \,:\, x_e \text{ observed}} \log p(x_e)

    Missing entries add neither to the density nor to its gradients: they are put at a point of
    the support before their densities are taken, and left out after. Draws and moments are
    those of `base`, of all entries.

    Args:
        base: Distribution with batch \*S, independent over the entries of its event \*E, such as
            `Normal(mean, scale).to_event(1)`.

    Raises:
        ValueError: If the entries of `base` are not independent.
    """

    arg_constraints = {}

    def __init__(self, base: Any, validate_args: bool | None = None) -> None:
        self.base, self.each = base, base
        while isinstance(self.each, Independent):
            self.each = self.each.base_dist
        if self.each.event_shape:
            raise ValueError(
                "Incomplete needs a distribution whose entries are independent, such as "
                f"Normal(mean, scale).to_event(1); got {type(self.each).__name__}: give the "
                "marginal of what is observed yourself"
            )
        super().__init__(base.batch_shape, base.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws of `base` have gradients."""
        return self.base.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        """That of complete values."""
        return self.base.support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Incomplete:
        """The same distribution over a larger batch."""
        return type(self)(self.base.expand(Size(batch_shape)), validate_args=False)

    def entry_log_prob(self, value: Tensor) -> Tensor:
        """Log density of each entry of `value` in nats [*S, *E]; 0 where it is missing."""
        observed = ~value.isnan()
        log_prob = self.each.log_prob(torch.where(observed, value, _inside(self.each, value)))
        return torch.where(observed, log_prob, torch.zeros_like(log_prob))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats [*S] of the entries of `value` [*S, *E] that are not NaN."""
        log_prob = self.entry_log_prob(value)
        return log_prob.flatten(-len(self.event_shape)).sum(-1) if self.event_shape else log_prob

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Complete draws."""
        return self.base.sample(Size(sample_shape))

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Complete draws, reparameterised."""
        return self.base.rsample(Size(sample_shape))

    @property
    def mean(self) -> Tensor:
        """Mean of complete values."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """Variance of complete values."""
        return self.base.variance


def _inside(each: Any, like: Tensor) -> Tensor:
    """A point of the support of scalar distributions, in the type of `like`."""
    if isinstance(each, Product):
        pairs = zip(each.parts, each.columns)
        return torch.stack([_inside(p, like) for p, c in pairs for _ in c])[each.order]
    if each.support.is_discrete:
        return like.new_zeros(()) + getattr(each.support, "lower_bound", 0)
    return transform_to(each.support)(like.new_zeros(()))


class OfTotal(TorchDistribution):
    r"""Counts x given their own total: p(x | sum of x), as a density of x.

    .. math:: \log p(x) = \log p_{l}(x), \qquad l = \textstyle\sum_e x_e

    Draws take a total of `total` first, which they need not sum to.

    Args:
        make: From totals [*S] to counts, batch \*S and event \*E.
        total: Distribution of totals, batch \*S.
    """

    arg_constraints = {}
    given_value = True  # the density is conditioned on a part of the value

    def __init__(
        self, make: Callable[[Tensor], Any], total: Any, validate_args: bool | None = None
    ) -> None:
        self.make, self.total = make, total
        self.typical = make(total.mean)
        shapes = self.typical.batch_shape, self.typical.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """That of the counts."""
        return self.typical.support

    def expand(self, batch_shape: Shape, _instance: Any = None) -> OfTotal:
        """The same distribution over a larger batch."""
        total = self.total.expand(Size(batch_shape))
        return type(self)(self.make, total, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density in nats [*S] of counts [*S, *E] given their totals."""
        total = value.flatten(value.ndim - len(self.event_shape)).sum(-1)
        return self.make(total).log_prob(value)

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Counts of drawn totals."""
        return self.make(self.total.sample(Size(sample_shape))).sample()

    @property
    def mean(self) -> Tensor:
        """Mean at the mean total."""
        return self.typical.mean

    @property
    def variance(self) -> Tensor:
        """Variance at the mean total."""
        return self.typical.variance


class FullNormal(dist.MultivariateNormal):
    """Normal with a full covariance; knows its KL to a diagonal Normal."""


@register_kl(FullNormal, torch.distributions.Independent)
def _kl_full_diagonal(q: FullNormal, p: torch.distributions.Independent) -> Tensor:
    base = p.base_dist
    if not isinstance(base, torch.distributions.Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    scaled = q.scale_tril / base.scale.unsqueeze(-1)
    log_det = base.scale.log().sum(-1) - q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    mismatch = ((q.loc - base.loc) / base.scale).pow(2).sum(-1)
    return log_det + 0.5 * (scaled.pow(2).sum((-2, -1)) + mismatch - q.event_shape[0])


class MixtureOfDiagonalNormals(TorchDistribution):
    r"""Mixture of diagonal Normals, its density by matrix products.

    .. math:: p(z) = \sum_{c=1}^{C} \pi_c \prod_{d=1}^{D} \mathcal{N}(z_d; \mu_{cd}, \sigma_{cd}^2)

    The square is expanded so that nothing of shape [*S, C, D] is ever formed; products are in
    float64, where the expansion is exact to 1e-5 nats (float32 loses 0.01 nats at C = 500).

    Args:
        logits: Unnormalised log weights [C].
        loc: Means [C, D].
        scale: Standard deviations [C, D].
        batch_shape: Batch over which the one mixture is repeated.
    """

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale: Tensor,
        batch_shape: Shape = Size(),
        validate_args: bool | None = None,
    ) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(Size(batch_shape), loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> MixtureOfDiagonalNormals:
        """The same mixture over a larger batch."""
        return type(self)(self.logits, self.loc, self.scale, batch_shape, validate_args=False)

    def component_log_prob(self, value: Tensor) -> Tensor:
        """Log weight plus log density of each component, [*S, C]."""
        centre = self.loc.detach().mean(0).double()
        z, loc, scale = value.double() - centre, self.loc.double() - centre, self.scale.double()
        precision = scale.pow(-2)
        square = z.pow(2) @ precision.T - 2 * z @ (loc * precision).T
        constant = (loc.pow(2) * precision + 2 * scale.log() + math.log(2 * math.pi)).sum(-1)
        return torch.log_softmax(self.logits.double(), -1) - 0.5 * (square + constant)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value` [*S, D] in nats, [*S]."""
        if self._validate_args:
            self._validate_sample(value)
        log_prob = self.component_log_prob(value).logsumexp(-1).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws of a component, then of its Normal."""
        with torch.no_grad():
            c = dist.Categorical(logits=self.logits).sample(Size(sample_shape) + self.batch_shape)
            return torch.normal(self.loc[c], self.scale[c])

    @property
    def mean(self) -> Tensor:
        """Weighted mean of the components, [*batch, D]."""
        return (torch.softmax(self.logits, -1) @ self.loc).expand(self._extended_shape())


class Label(TorchDistribution):
    """What is said of a class: its number, or -1 where nothing is said; log mass 0 or -inf.

    Args:
        classes: One-hot vectors of the classes [*S, C].
    """

    arg_constraints = {}

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """Numbers of classes, and -1."""
        return constraints.integer_interval(-1, self.classes.shape[-1] - 1)

    def __init__(self, classes: Tensor, validate_args: bool | None = None) -> None:
        self.classes = classes
        super().__init__(classes.shape[:-1], validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Label:
        """The same for a larger batch."""
        return Label(self.classes.expand(*batch_shape, -1), validate_args=False)

    def sample(self, sample_shape: Shape = ()) -> Tensor:
        """The class."""
        return self.classes.argmax(-1).expand(*sample_shape, *self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Whether the class is `value`, in nats."""
        fits = (self.classes.argmax(-1) == value) | (value < 0)
        return fits.to(self.classes.dtype).log()


def mixture(logits: Tensor, components: Distribution) -> Distribution:
    """Mixture of the last batch dimension of `components` [*S, C], event (D,), weights [C]."""
    base = getattr(components, "base_dist", None)
    if isinstance(base, torch.distributions.Normal) and len(components.batch_shape) == 1:
        return MixtureOfDiagonalNormals(logits, base.loc, base.scale)
    weights = dist.Categorical(logits=logits.expand(components.batch_shape))
    return dist.MixtureSameFamily(weights, components)


class Flow(TorchDistribution):
    """A zuko flow as a Pyro distribution.

    The density of the last draw is kept, so that scoring one's own sample costs nothing and
    is differentiated through the sampling path; any other value is scored by the flow itself.

    Args:
        flow: The torch distribution that a zuko flow returns when called.
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, flow: Any, validate_args: bool | None = None) -> None:
        self.flow = flow
        self._last: tuple[Tensor, Tensor] | None = None
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Flow:
        """The same flow over a larger batch."""
        return type(self)(self.flow.expand(Size(batch_shape)), validate_args=False)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Reparameterised draws [*sample, *batch, D]."""
        z, log_prob = self.flow.rsample_and_log_prob(Size(sample_shape))
        self._last = (z, log_prob)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value` in nats."""
        if self._last is not None and self._last[0] is value:
            if self._last[1].requires_grad or not torch.is_grad_enabled():
                return self._last[1]  # else drawn without gradient, and now scored with one
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # zuko does not
        return self.flow.log_prob(value.expand(*lead, *self.event_shape))

    @property
    def mean(self) -> Tensor:
        """E[z] by the average of 1000 draws of a fixed seed; the caller's RNG is untouched."""
        base = getattr(self.flow, "base", self.flow)
        with forked(base.mean.device, 0), torch.no_grad():
            return self.flow.sample(Size((1000,))).mean(0)


class Joint(TorchDistribution):
    r"""Several vectors as one, each drawn given those before it: p(z1, z2) = p(z2) p(z1 | z2).

    Its mean holds, for each vector, the mean given the means of the vectors before it. That is
    E[z] where conditional means are affine, and an embedding in any case. Its variance is that
    of each vector given the same.

    Args:
        program: Calls its argument `draw(name, distribution)` for one vector after another; it
            returns the vector, for the distributions of later ones.
        sizes: Length of each vector, in the order in which they are joined.
        batch_shape: That of the first vector's distribution.
    """

    arg_constraints = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        program: Callable[[Draw], Any],
        sizes: dict[str, int],
        batch_shape: Shape = Size(),
        validate_args: bool | None = None,
    ) -> None:
        self.program, self.sizes = program, sizes
        event_shape = Size([sum(sizes.values())])
        super().__init__(Size(batch_shape), event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Joint:
        """The same distribution over a larger batch."""
        return type(self)(self.program, self.sizes, Size(batch_shape), validate_args=False)

    def draw(self, pick: Draw) -> Tensor:
        """The vectors that `pick(name, distribution)` gives, one after another, joined."""
        drawn: dict[str, Tensor] = {}

        def keep(name: str, fn: Any) -> Tensor:
            drawn[name] = pick(name, fn)
            return drawn[name]

        self.program(keep)
        return torch.cat([drawn[name] for name in self.sizes], -1)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """The vectors [*S, D] of which `value` [*S, D1 + D2 + ...] is joined, by name."""
        return dict(zip(self.sizes, value.split(list(self.sizes.values()), -1)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of `value` in nats, the sum of those of the vectors."""
        given, terms = self.split(value), []

        def pick(name: str, fn: Any) -> Tensor:
            terms.append(fn.log_prob(given[name]))
            return given[name]

        self.draw(pick)
        lead = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return sum(terms[1:], terms[0]).expand(lead)

    def rsample(self, sample_shape: Shape = Size()) -> Tensor:
        """Reparameterised draws [*sample, *batch, D1 + D2 + ...]."""
        shape = Size(sample_shape) + self.batch_shape
        return self.draw(lambda _, fn: fn.rsample(_more(shape, fn)))

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws, also of distributions that are not reparameterised."""
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            return self.draw(lambda _, fn: fn.sample(_more(shape, fn)))

    @property
    def mean(self) -> Tensor:
        """Each vector's mean given the means of those before it."""
        return self.draw(lambda _, fn: self._wide(fn, fn.mean))

    @property
    def variance(self) -> Tensor:
        """Each vector's variance given the means of those before it."""
        found: dict[str, Tensor] = {}

        def pick(name: str, fn: Any) -> Tensor:
            found[name] = self._wide(fn, fn.variance)
            return self._wide(fn, fn.mean)

        self.draw(pick)
        return torch.cat([found[name] for name in self.sizes], -1)

    def _wide(self, fn: Any, value: Tensor) -> Tensor:
        return value.expand(*self.batch_shape, *fn.event_shape)


def _more(shape: Size, fn: Any) -> Size:
    """The dimensions of `shape` that come before the batch of a distribution."""
    return shape[: len(shape) - len(fn.batch_shape)]


def flow_family(name: str) -> Any:
    """The zuko class `name`; importing zuko leaves torch's argument validation as it was."""
    validate = torch.distributions.Distribution._validate_args
    try:
        from zuko import flows
    except ImportError as error:
        raise ImportError("flows need zuko: pip install 'pyro-vae[flows]'") from error
    finally:
        torch.distributions.Distribution._validate_args = validate
    if not isinstance(getattr(flows, name, None), type):
        raise ValueError(f"zuko has no flow {name!r}: choose, for example, 'NSF', 'MAF' or 'NICE'")
    return getattr(flows, name)
