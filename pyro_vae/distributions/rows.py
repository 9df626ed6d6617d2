"""Distributions of a row: columns of several kinds, missing entries, counts of a total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import Independent, constraints, transform_to

from pyro_vae.distributions.scalars import ExpandByArguments, Levels, Shape


class Rows(constraints.Constraint):
    """The support of rows, each of whose columns has a support of its own.

    Args:
        parts: Supports of scalars, each of one or several columns.
        columns: For each support, the indices of its columns.
    """

    def __init__(
        self, parts: Sequence[constraints.Constraint], columns: Sequence[Sequence[int]]
    ) -> None:
        self.parts, self.columns = parts, columns
        joined = [c for part in columns for c in part]
        self.order = sorted(range(len(joined)), key=lambda i: joined[i])  # place of each column

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        """Whether every column is discrete."""
        return all(part.is_discrete for part in self.parts)

    def check(self, value: Tensor) -> Tensor:
        """Returns whether each entry is in the support of its column."""
        pairs = zip(self.parts, self.columns)
        return torch.cat([p.check(value[..., c]) for p, c in pairs], -1)[..., self.order]


class Product(TorchDistribution):
    r"""Independent columns of several families, each an entry of the batch [*S, C].

    .. math:: \log p(x) = \sum_c \log p_c(x_c)

    `to_event(1)` makes it a distribution of rows. `mean` is the mode in columns of `Levels`, for
    the mean of codes of categories means nothing.

    Args:
        parts: Scalar distributions, each of batch [*S, C_k].
        support: Their supports, and for each the indices of its C_k columns.
    """

    arg_constraints = {}
    support: Any = constraints.real

    def __init__(
        self, parts: Sequence[Any], support: Rows, validate_args: bool | None = None
    ) -> None:
        self.parts, self.support = parts, support
        self.columns, self.order = support.columns, support.order
        batch = Size((*parts[0].batch_shape[:-1], len(self.order)))
        super().__init__(batch, validate_args=validate_args)

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Product:
        """Returns the same distribution over a larger batch."""
        parts = [p.expand((*batch_shape[:-1], p.batch_shape[-1])) for p in self.parts]
        return type(self)(parts, self.support, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each entry of `value` [*S, C] in nats."""
        pairs = zip(self.parts, self.columns)
        return self._in_order([p.log_prob(value[..., _as_slice(columns)]) for p, columns in pairs])

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws all columns."""
        return self._in_order([p.sample(Size(sample_shape)) for p in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of each column, or mode of levels."""
        kind = self.parts[0].mean.dtype
        means = [p.mode if isinstance(p, Levels) else p.mean for p in self.parts]
        return self._in_order([m.to(kind) for m in means])

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts, -1)
        if self.order == sorted(self.order):
            return joined
        return joined.index_select(-1, torch.tensor(self.order, device=joined.device))


def _as_slice(numbers: Sequence[int]) -> Sequence[int] | slice:
    """Returns indices as a slice, if they rise one by one."""
    whole = slice(numbers[0], numbers[-1] + 1)
    return whole if list(numbers) == list(range(whole.start, whole.stop)) else numbers


class Incomplete(dist.Independent):
    r"""The marginal density of the entries that are not NaN, which stands for a missing entry.

    .. math:: \log p(x) = \sum_{e \,:\, x_e \text{ observed}} \log p(x_e)

    Missing entries add neither to the density nor to its gradients: each is scored at some point
    of the support instead, and left out of the sum. Draws and moments are those of `base`, of all
    entries.

    Args:
        base: Distribution with batch \*S, independent over the entries of its event \*E, such as
            `Normal(mean, scale).to_event(1)`.

    Raises:
        ValueError: If the entries of `base` are not independent.
    """

    def __init__(self, base: Any) -> None:
        each = base
        while isinstance(each, Independent):
            each = each.base_dist
        if each.event_shape:
            raise ValueError(
                "Incomplete needs a distribution whose entries are independent, such as "
                f"Normal(mean, scale).to_event(1); got {type(each).__name__}: give the "
                "marginal of what is observed yourself"
            )
        super().__init__(each, len(base.event_shape))

    def expand(self, batch_shape: Shape, _instance: Any = None) -> Incomplete:
        """Returns the same distribution over a larger batch."""
        each = self.base_dist.expand(Size(batch_shape) + self.event_shape)
        return type(self)(each.to_event(len(self.event_shape)))

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> Incomplete:
        """Returns the same density with the last batch dimensions (all if None) in the event."""
        number = reinterpreted_batch_ndims
        number = len(self.batch_shape) if number is None else number
        return type(self)(self.base_dist.to_event(len(self.event_shape) + number))

    def entry_log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density of each entry of `value` in nats [*S, *E]; 0 if missing."""
        observed = ~value.isnan()
        filled = torch.where(observed, value, _support_point(self.base_dist, value))
        log_prob = self.base_dist.log_prob(filled)
        return torch.where(observed, log_prob, torch.zeros_like(log_prob))

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats [*S] of the entries of `value` [*S, *E] not NaN."""
        log_prob = self.entry_log_prob(value)
        return log_prob.flatten(-len(self.event_shape)).sum(-1) if self.event_shape else log_prob


def _support_point(each: Any, like: Tensor) -> Tensor:
    """Returns a point in the support of scalar distributions, in the type of `like`."""
    if isinstance(each, Product):
        pairs = zip(each.parts, each.columns)
        return torch.cat([_support_point(p, like).expand(len(c)) for p, c in pairs])[each.order]
    if each.support.is_discrete:
        return like.new_zeros(()) + getattr(each.support, "lower_bound", 0)
    return transform_to(each.support)(like.new_zeros(()))


class OfTotal(ExpandByArguments, TorchDistribution):
    r"""Counts x given their own total: p(x | sum of x), as a density of x.

    .. math:: \log p(x) = \log p_{l}(x), \qquad l = \textstyle\sum_e x_e

    `sample` draws a total from `total` first; the counts need not sum to it.

    Args:
        make: Function from totals [*S] to the distribution of counts, batch \*S and event \*E.
        total: Distribution of totals, batch \*S.
    """

    argument_names = ("make", "total")
    arg_constraints = {}
    given_value = True  # the density is conditioned on a part of the value

    def __init__(
        self, make: Callable[[Tensor], Any], total: Any, validate_args: bool | None = None
    ) -> None:
        self.make, self.total = make, total
        self.at_mean_total = make(total.mean)
        shapes = self.at_mean_total.batch_shape, self.at_mean_total.event_shape
        super().__init__(*shapes, validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The support of the counts."""
        return self.at_mean_total.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns the log density in nats [*S] of counts [*S, *E] given their totals."""
        total = value.flatten(value.ndim - len(self.event_shape)).sum(-1)
        return self.make(total).log_prob(value)

    def sample(self, sample_shape: Shape = Size()) -> Tensor:
        """Draws totals, then counts."""
        return self.make(self.total.sample(Size(sample_shape))).sample()

    @property
    def mean(self) -> Tensor:
        """Mean at the mean total."""
        return self.at_mean_total.mean

    @property
    def variance(self) -> Tensor:
        """Variance at the mean total."""
        return self.at_mean_total.variance
