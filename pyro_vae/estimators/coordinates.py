"""The unconstrained coordinates of latent sites."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pyro.distributions import (
    Normal,
    SineBivariateVonMises,
    TransformedDistribution,
    VonMises,
)
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Transform,
    biject_to,
    constraints,
)
from torch.distributions.transforms import identity_transform

from pyro_vae.densities import Densities, Site, factors

PRIOR_DRAWS = 64  # draws of a prior, from which its centre and spread are estimated
PAIRS = 4  # pairs of draws, which show whether coordinates are independent
ROUNDING = 1e-3  # relative difference of log densities that counts as rounding
TABLE_HALF_WIDTH, TABLE_STEP = 8.0, 0.01  # half-width and spacing of the table of Normal scores
INTEGRAL_HALF_WIDTH, INTEGRAL_POINTS = 40.0, 16_001  # of the cumulative sum, in arsinh of v
NEWTON_STEPS = 6  # Newton steps of the inverse map
ANGLES = (VonMises, SineBivariateVonMises)  # whose stated support is the real line
SHAPE_POINTS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)  # where marginals are compared


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Where one latent site lies in the vector u, and how its value follows from u.

    Attributes:
        columns: Columns of u that belong to the site.
        shape: Shape of the unconstrained value of one draw.
        transform: Map from the unconstrained value to the support.
        dtype: Type of the program's own value.
        scores: Map to Normal scores, if the site's prior has one.
    """

    columns: slice
    shape: torch.Size
    transform: Transform
    dtype: torch.dtype
    scores: NormalScores | None

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the value at the site's part of u [K, B, n], and log |d value / du| [K, B]."""
        raw, log_det = u, u.new_zeros(u.shape[:2])
        if self.scores is not None:
            raw, log_slope = self.scores(u)
            log_det = log_slope.sum(-1)
        unconstrained = raw.reshape(*u.shape[:2], *self.shape)
        value = self.transform(unconstrained)
        jacobian = self.transform.log_abs_det_jacobian(unconstrained, value)
        value = value.to(self.dtype)
        inner: Any = getattr(self.transform, "base_transform", self.transform)
        if not _is_identity(inner) and inner.codomain.event_dim < 2:
            # a number may round to 0, where densities break; zeros of a matrix belong to it
            least = torch.full_like(value, torch.finfo(self.dtype).tiny).copysign(value)
            value = torch.where(value == 0, least, value)
        # so it may to another edge of an interval, if the program then takes its transform back
        if isinstance(inner, ComposeTransform) and inner.domain.event_dim == 0:
            ends = (torch.full_like(unconstrained[:1], v) for v in (-torch.inf, 0.0, torch.inf))
            low, middle, high = (self.transform(end).to(self.dtype).detach() for end in ends)
            edges = torch.stack([low, high])
            margin = 4 * torch.finfo(self.dtype).eps * edges.abs().nan_to_num(posinf=0).amax(0)
            edges = edges + (middle - edges).sign() * margin
            value = value.clamp(edges.amin(0), edges.amax(0))
        return value, log_det + jacobian.reshape(*u.shape[:2], -1).sum(-1)

    def inverse(self, value: Tensor) -> Tensor:
        """Returns the site's part of u [K, B, n] for a value [K, B, *event]."""
        unconstrained = self.transform.inv(value.double()).reshape(*value.shape[:2], -1)
        return unconstrained if self.scores is None else self.scores.inverse(unconstrained)


@dataclass(frozen=True, eq=False)
class NormalScores:
    r"""An increasing map of each coordinate, under which its prior is a standard Normal.

    .. math:: v = F^{-1}(\Phi(u)), \qquad F(v) = \int_{-\infty}^v p(v') \, dv'

    A latent that the data do not inform then has a standard Normal as its posterior, whatever
    its prior's tails or modes. The map is a monotone cubic between knots, and a straight line
    beyond 8 standard deviations. Its Jacobian is exact, so that densities are exact however
    coarse the knots.

    Attributes:
        value: v at the knots [n, G].
        slope: dv / du there [n, G].

    References:
        Fritsch and Carlson. Monotone piecewise cubic interpolation. 1980.
    """

    value: Tensor
    slope: Tensor

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns v [*, n] at u [*, n], and log dv / du."""
        n, G = self.value.shape
        position = (u.nan_to_num(0.0) + TABLE_HALF_WIDTH) / TABLE_STEP
        left = position.detach().floor().clamp(0, G - 2).long()
        at = left + G * torch.arange(n, device=u.device)
        value, slope = (table.to(u.device).view(-1) for table in (self.value, self.slope))
        slope = TABLE_STEP * slope
        v, m, rise = value[at], slope[at], value[at + 1] - value[at]
        square, cube = 3 * rise - 2 * m - slope[at + 1], m + slope[at + 1] - 2 * rise
        t = (position - left).clamp(0, 1)
        derivative = m + t * (2 * square + t * 3 * cube)
        v = v + t * (m + t * (square + t * cube)) + (position - left - t) * derivative
        return v, (derivative / TABLE_STEP).log()

    def inverse(self, v: Tensor) -> Tensor:
        """Returns u [*, n] at v [*, n]."""
        columns, knots = v.movedim(-1, 0).contiguous(), self.value.to(v.device)
        left = torch.searchsorted(knots, columns.flatten(1)).view(columns.shape) - 1
        left = left.movedim(0, -1).clamp(0, knots.shape[1] - 2)
        low = left * TABLE_STEP - TABLE_HALF_WIDTH
        beyond = (v < knots[:, 0]) | (v > knots[:, -1])
        u = low + TABLE_STEP / 2
        for _ in range(NEWTON_STEPS):
            found, log_slope = self(u)
            u = u + (v - found) / log_slope.exp()
            u = torch.where(beyond, u, u.clamp(low, low + TABLE_STEP))
        return u


class LogStickBreaking(Transform):
    r"""Stick-breaking map from real vectors to the simplex, without torch's rounding near corners.

    .. math:: v_i = \log p_i - \log \sum_{j > i} p_j, \qquad
        \log p_i = \log \sigma(v_i) + \sum_{j < i} \log \sigma(-v_j)

    Under a Dirichlet the v_i are independent.
    """

    domain, codomain = constraints.real_vector, constraints.simplex
    bijective = True

    def _call(self, v: Tensor) -> Tensor:
        return (_log_remaining(v) + F.pad(F.logsigmoid(v), (0, 1))).exp()

    def _inverse(self, p: Tensor) -> Tensor:
        log_p = p.log()
        rest = log_p.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
        return log_p[..., :-1] - rest

    def log_abs_det_jacobian(self, v: Tensor, p: Tensor) -> Tensor:
        """Returns log |dp / dv|, without the last part of p, [*]."""
        return (F.logsigmoid(v) + F.logsigmoid(-v) + _log_remaining(v)[..., :-1]).sum(-1)


def _log_remaining(v: Tensor) -> Tensor:
    """Returns the log of what is left of the stick before each part [*, n + 1]."""
    return F.pad(F.logsigmoid(-v).cumsum(-1), (1, 0))


def coordinates(
    first: Densities, second: Densities, known: dict[str, Coordinates] | None = None
) -> tuple[dict[str, Coordinates], Tensor, Tensor]:
    """Returns the coordinates of each latent, and its prior's mean and deviation there [B, D].

    Mean and standard deviation are known for Normal scores, and for Normal sites that depend on
    no other latent; else they are NaN.

    Args:
        first: Densities of one run.
        second: Densities of another run, whose latents differ.
        known: Coordinates from other data, whose maps to Normal scores are kept.

    Raises:
        ValueError: If a latent is discrete, or its support depends on another latent, has no
            unconstrained coordinates or, as that of an angle, infinite mass.
    """
    sites: dict[str, Coordinates] = {}
    moments = []
    start = 0
    for name, site in first.sites.items():
        transform, other = (_transform(name, d.sites[name]) for d in (first, second))
        unconstrained = transform.inv(site.value.double())
        if not torch.equal(transform(unconstrained), other(unconstrained)):
            raise ValueError(
                f"the support of site {name!r} depends on another latent; it must be fixed: "
                "draw the site on a fixed support and move it in the model"
            )
        columns = slice(start, start + unconstrained[0, 0].numel())
        coords = Coordinates(columns, unconstrained.shape[2:], transform, site.value.dtype, None)
        priors = site.model, second.sites[name].model
        scores = known[name].scores if known else _normal_scores(coords, *priors)
        sites[name] = coords = replace(coords, scores=scores)
        start = columns.stop
        each = _prior_moments(coords, unconstrained, *priors)
        moments.append(each.reshape(*each.shape[:2], -1))
    mean, deviation = torch.cat(moments, -1)
    return sites, mean, deviation


def _prior_moments(
    coords: Coordinates, unconstrained: Tensor, first: Distribution, second: Distribution
) -> Tensor:
    """Returns mean and standard deviation of the prior [2, B, *], or NaN."""
    if coords.scores is not None:
        return torch.stack([torch.zeros_like(unconstrained[0]), torch.ones_like(unconstrained[0])])
    if _is_normal(coords, first) and _is_normal(coords, second):
        moments, other = (
            torch.stack([part.expand_as(unconstrained)[0] for part in (fn.mean, fn.stddev)])
            for fn in (first, second)
        )
        if torch.equal(moments, other):
            return moments.double()
    return torch.full_like(unconstrained[0], torch.nan).expand(2, *unconstrained.shape[1:])


def _is_normal(coords: Coordinates, fn: Distribution) -> bool:
    return isinstance(factors(fn), Normal) and _is_identity(coords.transform)


def _is_identity(transform: Any) -> bool:
    return getattr(transform, "base_transform", transform) is identity_transform


def holds_tensor(transform: Any) -> bool:
    """Returns whether a transform may differ between batches, as one to bounds of each datum."""
    parts = getattr(transform, "parts", [getattr(transform, "base_transform", None)])
    own = any(isinstance(value, Tensor) for value in vars(transform).values())
    return own or any(holds_tensor(part) for part in parts if part is not None)


def _transform(name: str, site: Site) -> Transform:
    base = base_distribution(site.model)
    kind = type(base).__name__
    if any(is_discrete(fn) for fn in (site.model, site.guide)):
        raise ValueError(
            f"latent site {name!r} is discrete ({kind}), where gradients are needed: sum it out "
            "(infer={'enumerate': 'parallel'} in the model, or a mixture as a distribution), "
            "or use importance_sampling"
        )
    if isinstance(base_distribution(getattr(base, "component_distribution", base)), ANGLES):
        raise _infinite_mass(site.model)
    try:
        return _to_support(site.model)
    except NotImplementedError:
        raise ValueError(
            f"latent site {name!r} ({kind}) has no unconstrained coordinates for its support "
            f"{site.model.support}: use importance_sampling"
        ) from None


def _infinite_mass(fn: Any) -> ValueError:
    return ValueError(
        f"the prior {type(base_distribution(fn)).__name__} has no finite mass on its "
        f"support {fn.support}, "
        "as that of an angle: use importance_sampling, with a guide of the same kind"
    )


def _to_support(fn: Any) -> Transform:
    """Returns the map from unconstrained values to the support of `fn`.

    That of a transformed distribution is where its last transform takes the support before it:
    torch states all values of the transform, such as the real line for a shifted Exponential.
    """
    each: Any = factors(fn)
    parts = [p for t in getattr(each, "transforms", ()) for p in getattr(t, "parts", [t])]
    if parts and type(each) is TransformedDistribution:  # others state their support
        base = each.base_dist
        before = _to_support(TransformedDistribution(base, parts[:-1]) if parts[1:] else base)
        if not _is_identity(before):
            return ComposeTransform([before, parts[-1]])
    support = _component_support(fn.support)
    return LogStickBreaking() if support is constraints.simplex else biject_to(support)


def _component_support(support: Any) -> Any:
    """Returns the support of a mixture as that of its components."""
    if not hasattr(support, "base_constraint"):
        return support
    inner = _component_support(support.base_constraint)
    if isinstance(support, constraints.independent):
        return constraints.independent(inner, support.reinterpreted_batch_ndims)
    return inner


def base_distribution(fn: Any) -> Any:
    """Returns the distribution inside independent, expanded or transformed ones."""
    return base_distribution(fn.base_dist) if hasattr(fn, "base_dist") else fn


def is_discrete(fn: Any) -> bool:
    """Returns whether a distribution is known to be discrete."""
    try:
        return bool(fn.support and fn.support.is_discrete)
    except NotImplementedError:  # no support is stated
        return False


def _normal_scores(
    coords: Coordinates, fn: Distribution, other: Distribution
) -> NormalScores | None:
    """Returns the map of a site whose prior is fixed and factorises, unless it is Normal."""
    if _is_normal(coords, fn) or holds_tensor(coords.transform):
        return None
    draws = torch.cat([fn.sample()[:1, :1] for _ in range(PRIOR_DRAWS)]).double()
    v = coords.inverse(draws)[:, 0]
    first, again = _log_prior(coords, fn, v), _log_prior(coords, other, v)
    fixed = _close(first, first[:, :1]) and _close(first, again)
    if not fixed or not _factorises(coords, fn, v[:PAIRS], v[-PAIRS:]):
        return None
    centre, n = v.median(0).values, v.shape[1]
    points, each = centre.repeat(n, len(SHAPE_POINTS), 1), torch.arange(n)
    points[each, :, each] = centre.new_tensor(SHAPE_POINTS)
    shapes = _log_prior(coords, fn, points.flatten(0, 1))[:, 0].view(n, -1)
    shapes = shapes - shapes[:, :1]
    if _close(shapes.diff(n=3), torch.zeros_like(shapes[:, 3:])):
        return None
    spread = v.quantile(0.75, 0) - v.quantile(0.25, 0)
    tables: list[Any] = []
    for i, shape in enumerate(shapes):  # coordinates of one shape share a table
        same = next((j for j, other in enumerate(shapes[:i]) if _close(other, shape)), i)
        tables.append(tables[same] if same < i else _score_table(coords, fn, centre, spread[i], i))
    value, slope = (torch.stack(column) for column in zip(*tables))
    usable = bool((slope > 0).all() and slope.isfinite().all())
    return NormalScores(value, slope) if usable else None


def _score_table(
    coords: Coordinates, fn: Distribution, centre: Tensor, spread: Tensor, i: int
) -> Any:
    """Returns knots and slopes of v = F^{-1}(Phi(u)), from log p(v) along one coordinate."""
    from scipy.interpolate import PchipInterpolator  # slow to import, so only here

    end = INTEGRAL_HALF_WIDTH
    grid = torch.linspace(-end, end, INTEGRAL_POINTS, dtype=centre.dtype, device=centre.device)
    points = centre.repeat(INTEGRAL_POINTS, 1)
    points[:, i] += spread * grid.sinh()
    log_mass = _log_prior(coords, fn, points)[:, 0] + grid.cosh().log()
    log_mass = torch.where(log_mass.isfinite(), log_mass, -torch.inf)
    if log_mass[grid.abs() > 0.9 * end].max() == log_mass.max() > -torch.inf:
        raise _infinite_mass(fn)
    mass = (log_mass - log_mass.max()).exp()
    steps = mass[1:] + mass[:-1]
    below, above = steps.cumsum(0), steps.flip(0).cumsum(0).flip(0)
    below = torch.cat([below.new_zeros(1), below]) / steps.sum()
    above = torch.cat([above, above.new_zeros(1)]) / steps.sum()
    score = torch.where(below < 0.5, torch.special.ndtri(below), -torch.special.ndtri(above))
    rising = score.isfinite()
    rising[1:] &= score[1:] > score[:-1]
    knots = np.arange(round(2 * TABLE_HALF_WIDTH / TABLE_STEP) + 1) * TABLE_STEP - TABLE_HALF_WIDTH
    u, v = (each[rising].cpu().numpy() for each in (score, points[:, i]))
    value = PchipInterpolator(u, v)(knots)
    slope = PchipInterpolator(knots, value).derivative()(knots)
    return tuple(torch.from_numpy(part).to(centre) for part in (value, slope))


def _log_prior(coords: Coordinates, fn: Any, v: Tensor) -> Tensor:
    """Returns log p(v) [S, B] of a site at unconstrained values [S, n], the same for all data.

    Far out a value may round to the edge of the support, where there is no mass.
    """
    value, log_det = coords(v.unsqueeze(1))
    inside = fn.support.check(value)
    middle, _ = coords(torch.zeros_like(v[:1]).unsqueeze(1))
    masked = inside[(...,) + (None,) * len(fn.event_shape)]
    log_prob = fn.log_prob(torch.where(masked, value, middle.to(value)))
    return torch.where(inside, log_prob.double() + log_det, -torch.inf)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= ROUNDING * (1 + a.abs())).all())


def _factorises(coords: Coordinates, fn: Distribution, a: Tensor, b: Tensor) -> bool:
    """Returns whether exchanging a coordinate between draws [S, n] keeps the joint density."""
    n = a.shape[-1]
    swap = torch.eye(n, dtype=torch.bool, device=a.device)
    pairs = [torch.where(swap, y[:, None], x[:, None]).reshape(-1, n) for x, y in ((a, b), (b, a))]
    swapped, plain = (
        torch.stack([_log_prior(coords, fn, v)[:, 0] for v in vs]).sum(0) for vs in (pairs, (a, b))
    )
    return bool(swapped.isfinite().all()) and _close(plain.repeat_interleave(n), swapped)
