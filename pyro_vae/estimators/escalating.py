"""As much work as each datum needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.estimators.annealed import (
    ACCEPTANCE,
    GAIN,
    PILOT_CHAINS,
    Path,
    Point,
    hmc_step,
    refined,
)
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.proposal import components_cost
from pyro_vae.estimators.refined import METHOD, Fit, again_cost, fit_cost, fit_proposal
from pyro_vae.estimators.target import Target, gradients

__all__ = ["Result", "escalate", "walk", "walk_cost"]

PILOT, SECOND = 400, 2000  # draws that choose the number of draws, and are not scored
NUMBERS = 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12_000, 16_000, 24_000, 32_000, 48_000, 64_000
ENOUGH = 8000  # draws that have to be, or else the proposal is improved
AGAIN = 4000  # draws of an improved proposal, at least
AIS_CHAINS, AIS_TEMPERATURES, AIS_LEAPFROG = 384, 20, 3  # of annealing
AIS_COST = (AIS_CHAINS + PILOT_CHAINS) * AIS_TEMPERATURES * AIS_LEAPFROG
TWICE = 2000  # draws above which a second walk starts where the first one led
MARGIN = 0.8  # of the tolerance, that a pilot must promise
TRUSTED = 0.6  # k-hat, near that at which the variance of the weights ends (0.5)
KHAT = 0.7  # of a pilot of many draws, above which its variance is not believed
WALKS, MOVES, LEAPFROG = 8, 6, 3  # short walks, whose step sizes follow the acceptance


@dataclass(frozen=True, eq=False)
class Result:
    """What came of a batch.

    Attributes:
        evidence: Of B data.
        log_weight: Of one exact draw of each posterior [B]; NaN where none was given.
    """

    evidence: Evidence
    log_weight: Tensor

    def short(self, tolerance: float) -> Tensor:
        """Whether the draws were not enough [B]."""
        good = self.evidence.khat < self.evidence.khat_threshold.clamp(max=TRUSTED)
        return ~(good & (self.evidence.stderr < tolerance))

    def put(self, rows: Tensor, new: Result) -> Result:
        """The same with other results of some rows."""
        index = torch.arange(len(self.evidence))
        index[rows] = len(index) + torch.arange(len(rows))
        log_weight = torch.cat([self.log_weight, new.log_weight])[index]
        return Result(Evidence.cat([self.evidence, new.evidence]).rows(index), log_weight)


def escalate(
    target: Target, tolerance: float, budget: float = math.inf, exact: Tensor | None = None
) -> Result:
    """log p(x) of B data with as many draws as a pilot says each of them needs.

    Args:
        target: Their posteriors.
        tolerance: Largest standard error.
        budget: Most evaluations of the model for one datum.
        exact: A draw of each posterior [1, B, D], whose weight is to be known.

    Raises:
        ValueError: If the budget is below the least.
    """
    left = budget - fit_cost(target.dim) - PILOT - 2 * walk_cost()
    if left < NUMBERS[0]:
        raise ValueError(
            f"budget must be at least {budget - left + NUMBERS[0]:.0f} evaluations of the model "
            f"for each datum, at {target.dim} latent dimensions; got {budget}: raise it, or use "
            "importance_sampling"
        )
    improvements: list[Callable[[Fit, Tensor], Fit]] = []
    for improve, cost in (
        (lambda fit, _: fit.again(), again_cost(target.dim)),
        (Fit.with_components, components_cost(target.dim)),
    ):
        after = left - ENOUGH - cost - SECOND - 2 * walk_cost()
        if after < AGAIN:
            break
        improvements, left = [*improvements, improve], after
    return _staged(fit_proposal(target), PILOT, improvements, tolerance, left, exact)


def _staged(
    fit: Fit,
    pilot: int,
    improvements: Sequence[Callable[[Fit, Tensor], Fit]],
    tolerance: float,
    budget: float,
    exact: Tensor | None,
) -> Result:
    """Results of B data; where many draws are needed, or too few were made, after improvements."""
    needed, visited = _pilot(fit, tolerance, pilot)
    if pilot > PILOT:
        needed = needed.clamp(min=AGAIN)
    hard = (needed > (ENOUGH if pilot == PILOT else AGAIN)) & bool(improvements)
    result = _by_need(fit, needed.masked_fill(hard, 0), tolerance, budget, exact)
    rows = (result.short(tolerance) | hard).nonzero()[:, 0]
    if not improvements or not len(rows):
        return result
    better = improvements[0](fit.rows(rows), visited[:, rows])
    exact = None if exact is None else exact[:, rows]
    return result.put(rows, _staged(better, SECOND, improvements[1:], tolerance, budget, exact))


def _pilot(fit: Fit, tolerance: float, number: int) -> tuple[Tensor, Tensor]:
    r"""Draws that bring the standard error below the tolerance [B], and where walks led.

    The relative variance of a weight is estimated twice, and the larger counts: from draws of
    the proposal, which do not see where it does not reach; and from walks through the
    posterior, over which the average weight is one more than it,

    .. math:: \operatorname{Var}_q \frac{w}{p(x)} = \mathbb{E}_{p(u \mid x)} \frac{w}{p(x)} - 1

    Walks start at the largest weights, from where they go on into what the proposal does not
    reach, if the posterior has mass there, and come back if it has none. Where more than 2000
    draws are needed a second one starts at the largest weights of the first, and both count.

    No draw of the pilot is scored, so that what it happens to show has no part in the estimate.

    Returns:
        The number of draws [B], infinity where their variance is not believed; and the points
        of the walks [R, B, D].
    """
    places, weights = fit.draw_with_places(number)
    pilot = summarise(weights.cpu(), METHOD, "doubtful")
    draws_for = (MARGIN * tolerance) ** -2  # a unit of variance
    visited, found = _walked(fit, places, weights)
    spread = number * pilot.stderr.square()
    beyond = _variance(found, pilot)
    rows = (draws_for * torch.maximum(spread, beyond) > TWICE).nonzero()[:, 0]
    if len(rows):
        seen = torch.cat([places, visited])[:, rows], torch.cat([weights, found])[:, rows]
        visited[:, rows], found = _walked(fit.rows(rows), *seen)
        beyond[rows] = (beyond[rows] + _variance(found, pilot.rows(rows))) / 2
    needed = draws_for * torch.maximum(spread, beyond)
    if number > PILOT:
        needed = torch.where(pilot.khat < KHAT, needed, torch.inf)
    return needed, visited


def _walked(fit: Fit, places: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The points of walks [R, B, D], and their log weights [R, B]."""
    visited = walk(fit.target, places, log_weights, fit.proposal.scale_tril)
    return visited, fit.log_weights(visited, NUMBERS[0])


def _variance(log_weights: Tensor, pilot: Evidence) -> Tensor:
    """The relative variance of a weight [B], from the log weights of walks after one move."""
    return (log_weights[WALKS:].cpu() - pilot.log_prob).exp().mean(0) - 1


def _by_need(
    fit: Fit, needed: Tensor, tolerance: float, budget: float, exact: Tensor | None
) -> Result:
    """Results of B data, each with the fewest draws that are enough, or with chains."""
    numbers = torch.tensor([n for n in NUMBERS if n <= budget])
    level = torch.searchsorted(numbers.double(), needed.double())
    if AIS_COST > budget:
        level = level.clamp(max=len(numbers) - 1)
    parts, order = [], []
    for i in level.unique().tolist():
        rows = (level == i).nonzero()[:, 0]
        part = fit.rows(rows)
        stars = None if exact is None else exact[:, rows]
        if i < len(numbers):
            parts.append(_draws(part, int(numbers[i]), tolerance, stars))
        else:
            parts.append(_chains(part, tolerance, stars))
        order.append(rows)
    index = torch.cat(order).argsort()
    log_weight = torch.cat([part.log_weight for part in parts])[index]
    return Result(Evidence.cat([part.evidence for part in parts]).rows(index), log_weight)


def _draws(fit: Fit, number: int, tolerance: float, exact: Tensor | None) -> Result:
    evidence = fit.importance_sampling(number, tolerance, TRUSTED)
    if exact is None:
        return Result(evidence, torch.full_like(evidence.log_prob, torch.nan))
    return Result(evidence, fit.log_weights(exact, number)[0].cpu())


def _chains(fit: Fit, tolerance: float, exact: Tensor | None) -> Result:
    path = Path(refined(fit), AIS_TEMPERATURES, AIS_LEAPFROG, "sigmoid")
    weights = path.forward(AIS_CHAINS).cpu()
    evidence = summarise(weights, "annealed, refined", "doubtful")
    evidence = fit.judge(evidence, tolerance, TRUSTED)
    if exact is None:
        return Result(evidence, torch.full_like(evidence.log_prob, torch.nan))
    return Result(evidence, path.reverse(exact)[0].cpu())


def walk(target: Target, draws: Tensor, log_weights: Tensor, scale_tril: Tensor) -> Tensor:
    """Points [R, B, D] that Hamiltonian Monte Carlo visits in each posterior.

    The chains start at the draws of largest weight, and move on from there, also to where no
    draw has been. Where a proposal reaches all of the posterior they are among its draws after
    a few moves; where it does not, they stay where weights are large.

    Args:
        target: The posteriors.
        draws: Draws of the proposals [K, B, D].
        log_weights: Their importance weights [K, B].
        scale_tril: Metric of the moves [B, D, D].
    """
    height, start = log_weights.nan_to_num(-torch.inf, neginf=-torch.inf).topk(
        min(WALKS, len(draws)), 0
    )
    start = torch.where(height > -torch.inf, start, start[:1])
    start = start[torch.arange(WALKS, device=start.device) % len(start)].unsqueeze(-1)
    point = _at(target, draws.gather(0, start.expand(-1, -1, draws.shape[-1])))
    size = torch.full_like(target.scale[:, 0], target.dim**-0.25)
    visited = []
    for _ in range(MOVES):
        point, probability = hmc_step(
            lambda u: _at(target, u),
            point,
            1,
            step_size=size,
            scale_tril=scale_tril,
            num_leapfrog=LEAPFROG,
        )
        size = size * (GAIN * (probability.mean(0) - ACCEPTANCE)).exp()
        visited.append(point.u)
    return torch.cat(visited)


def walk_cost() -> int:
    """Evaluations of the model for one datum."""
    return WALKS * (1 + MOVES * (LEAPFROG + 1))


def _at(target: Target, u: Tensor) -> Point:
    (value,), (slope,) = gradients(lambda v: (target.log_joint(v),), u, target.draws_at_once)
    return Point(u, value, value, slope, slope)
