"""Estimates log p(x) with as much work as each datum needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyro_vae.estimators.annealed import PILOT_CHAINS, Path, refined
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.hmc import WALK_COST, WALKS, walk
from pyro_vae.estimators.modes import search_cost
from pyro_vae.estimators.proposal import components_cost, fit_cost
from pyro_vae.estimators.refined import AGAIN_STEPS, METHOD, Fit, fit_proposal
from pyro_vae.estimators.target import SCALE_DRAWS, Target

PILOT, SECOND = 400, 2000  # draws of the first pilot and of later ones, which are not scored
NUMBERS = 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12_000, 16_000, 24_000, 32_000, 48_000, 64_000
ENOUGH = 8000  # most draws of the first proposal: if more are needed it is improved
AGAIN = 4000  # fewest draws of an improved proposal
AIS_CHAINS, AIS_TEMPERATURES, AIS_LEAPFROG = 384, 20, 3  # annealed importance sampling
AIS_COST = (AIS_CHAINS + PILOT_CHAINS) * AIS_TEMPERATURES * AIS_LEAPFROG
TWICE = 2000  # needed draws above which a second walk starts where the first one led
MARGIN = 0.8  # share of the tolerance that a pilot aims at
TRUSTED = 0.6  # largest k-hat that is trusted; weights have no variance above 0.5
KHAT = 0.7  # k-hat of a later pilot above which its variance is not believed


def escalate(
    target: Target, tolerance: float, budget: float = math.inf, exact: Tensor | None = None
) -> Evidence:
    """Estimates log p(x) of B data with as many draws as a pilot says each of them needs.

    The proposal is improved where many draws are needed, or where the error stays too large.

    Args:
        target: The posteriors of the data.
        tolerance: Largest standard error.
        budget: Most evaluations of the model for one datum.
        exact: A draw of each posterior [1, B, D], whose log weight goes to the extra "exact".

    Raises:
        ValueError: If the budget is too small.
    """
    improvements: list[Callable[[Fit, Tensor], Fit] | None] = [
        lambda fit, _: fit.again(),
        Fit.with_components,
        None,
    ]
    if budget < math.inf:
        stages, budget = _affordable(budget, target.dim)
        improvements = [*improvements[: stages - 1], None]
    fit = fit_proposal(target)
    parts: list[Evidence] = []
    rows = last = torch.arange(target.num_data)  # last: index of each datum's last estimate
    for stage, improve in enumerate(improvements):
        needed, visited = _pilot(fit, tolerance, SECOND if stage else PILOT)
        needed = needed.clamp(min=AGAIN if stage else 0)
        hard = (needed > (AGAIN if stage else ENOUGH)) & (improve is not None)
        part = _by_need(fit, needed.masked_fill(hard, 0), tolerance, budget, exact)
        last = last.index_copy(0, rows, sum(len(p) for p in parts) + torch.arange(len(rows)))
        parts.append(part)
        trusted = part.khat < part.khat_threshold.clamp(max=TRUSTED)
        short = (hard | ~trusted | ~(part.stderr < tolerance)).nonzero()[:, 0]
        if improve is None or not len(short):
            break
        rows, fit = rows[short], improve(fit.rows(short), visited[:, short])
        exact = None if exact is None else exact[:, short]
    return Evidence.cat(parts).rows(last)


def _affordable(budget: float, dim: int) -> tuple[int, float]:
    """Returns how many proposals can be tried, and the evaluations left for the last's draws."""
    least = SCALE_DRAWS + search_cost(dim) + fit_cost(dim)
    left, stages = budget - least - PILOT - 2 * WALK_COST, 1
    if left < NUMBERS[0]:
        raise ValueError(
            f"budget must be at least {budget - left + NUMBERS[0]:.0f} evaluations of the model "
            f"for each datum, at {dim} latent dimensions; got {budget}: raise it, or use "
            "importance_sampling"
        )
    for cost in (fit_cost(dim, AGAIN_STEPS), components_cost(dim)):
        after = left - ENOUGH - cost - SECOND - 2 * WALK_COST
        if after < AGAIN:
            break
        left, stages = after, stages + 1
    return stages, left


def _pilot(fit: Fit, tolerance: float, number: int) -> tuple[Tensor, Tensor]:
    r"""Returns how many draws give the tolerated standard error [B], and the points of walks.

    The relative variance of a weight is estimated in two ways, and the larger counts: from draws
    of the proposal, which do not show where it does not reach; and from walks through the
    posterior, where the average relative weight is that variance plus one,

    .. math:: \operatorname{Var}_q \frac{w}{p(x)} = \mathbb{E}_{p(u \mid x)} \frac{w}{p(x)} - 1

    Walks start at the largest weights, and move on to where the proposal does not reach if the
    posterior has mass there. Where more than 2000 draws are needed, a second walk starts at the
    largest weights of the first, and the two are averaged.

    No draw of the pilot is scored, so that what it happens to show has no part in the estimate.

    Returns:
        The number of draws [B], infinity where their variance is not believed; and the points
        of the walks [R, B, D].
    """
    places, weights = map(torch.cat, zip(*fit.scored(number)))
    pilot = summarise(weights.cpu(), METHOD, "doubtful")
    draws_for = (MARGIN * tolerance) ** -2  # draws needed per unit of variance
    visited = walk(fit.target, places, weights, fit.proposal.scale_tril)
    found = fit.log_weights(visited, NUMBERS[0])
    spread = number * pilot.stderr.square()
    beyond = (found[WALKS:].cpu() - pilot.log_prob).exp().mean(0) - 1  # without the first move
    rows = (draws_for * torch.maximum(spread, beyond) > TWICE).nonzero()[:, 0]
    if len(rows):
        part = fit.rows(rows)
        seen = torch.cat([places, visited])[:, rows], torch.cat([weights, found])[:, rows]
        visited[:, rows] = again = walk(part.target, *seen, part.proposal.scale_tril)
        found = part.log_weights(again, NUMBERS[0])[WALKS:].cpu()
        second = (found - pilot.log_prob[rows]).exp().mean(0) - 1
        beyond[rows] = (beyond[rows] + second) / 2
    needed = draws_for * torch.maximum(spread, beyond)
    if number > PILOT:
        needed = torch.where(pilot.khat < KHAT, needed, torch.inf)
    return needed, visited


def _by_need(
    fit: Fit, needed: Tensor, tolerance: float, budget: float, exact: Tensor | None
) -> Evidence:
    """Returns evidence of B data, each with the fewest draws that are enough, or with AIS."""
    numbers = [n for n in NUMBERS if n <= budget]
    level = torch.searchsorted(torch.tensor(numbers).double(), needed.double())
    if AIS_COST > budget:
        level = level.clamp(max=len(numbers) - 1)
    parts, order = [], []
    for i in level.unique().tolist():
        rows = (level == i).nonzero()[:, 0]
        part = fit.rows(rows)
        weigh: Callable[[Tensor], Tensor]
        if i < len(numbers):
            evidence = part.importance_sampling(numbers[i], tolerance, TRUSTED)
            weigh = partial(part.log_weights, num_samples=numbers[i])
        else:
            path = Path(refined(part), AIS_TEMPERATURES, AIS_LEAPFROG, "sigmoid")
            evidence = summarise(path.forward(AIS_CHAINS).cpu(), "annealed, refined", "doubtful")
            evidence, weigh = part.judge(evidence, tolerance, TRUSTED), path.reverse
        if exact is not None:
            evidence = replace(evidence, extras={"exact": weigh(exact[:, rows])[0].cpu()})
        parts.append(evidence)
        order.append(rows)
    return Evidence.cat(parts).rows(torch.cat(order).argsort())
