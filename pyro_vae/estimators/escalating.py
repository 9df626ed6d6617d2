"""Estimates log p(x) with as much work as each datum needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyro_vae.estimators.annealed import PILOT_CHAINS, Path, refined_start
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.hmc import WALK_COST, WALKS, walk
from pyro_vae.estimators.modes import search_cost
from pyro_vae.estimators.proposal import components_cost, fit_cost
from pyro_vae.estimators.refined import METHOD, REFIT_STEPS, Fit, fit_proposal
from pyro_vae.estimators.target import SCALE_DRAWS, Target

PILOT_DRAWS, LATER_PILOT_DRAWS = 400, 2000  # of the first pilot and of later ones; not scored
DRAWS = 1000, 1500, 2000, 3000, 4000, 6000, 8000, 12_000, 16_000, 24_000, 32_000, 48_000, 64_000
MOST_FIRST_DRAWS = 8000  # most draws of the first proposal: if more are needed it is improved
LEAST_LATER_DRAWS = 4000  # fewest draws of an improved proposal
AIS_CHAINS, AIS_TEMPERATURES, AIS_LEAPFROG = 384, 20, 3  # annealed importance sampling
AIS_COST = (AIS_CHAINS + PILOT_CHAINS) * AIS_TEMPERATURES * AIS_LEAPFROG
SECOND_WALK = 2000  # needed draws above which a second walk starts where the first one led
MARGIN = 0.8  # share of the tolerance that a pilot aims at
TRUSTED_KHAT = 0.6  # largest k-hat that is trusted; weights have no variance above 0.5
PILOT_KHAT = 0.7  # k-hat of a later pilot above which its variance is not believed


def escalate(
    target: Target, tolerance: float, budget: int | None = None, exact: Tensor | None = None
) -> Evidence:
    """Estimates log p(x) of B data with as many draws as a pilot says each of them needs.

    The proposal is improved where many draws are needed, or where the error stays too large.

    Args:
        target: The posteriors of the data.
        tolerance: Largest standard error.
        budget: Most evaluations of the model for one datum, or None.
        exact: A draw of each posterior [1, B, D], whose log weight goes to the extra "exact".

    Raises:
        ValueError: If the budget is too small.
    """
    improvements: list[Callable[[Fit, Tensor], Fit] | None] = [
        lambda fit, _: fit.refit(),
        Fit.with_components,
        None,
    ]
    most_draws = math.inf
    if budget is not None:
        stages, most_draws = _affordable(budget, target.dim)
        improvements = [*improvements[: stages - 1], None]
    fit = fit_proposal(target)
    parts: list[Evidence] = []
    rows = last = torch.arange(target.num_data)  # last: index of each datum's last estimate
    for stage, improve in enumerate(improvements):
        needed, visited = _pilot(fit, tolerance, LATER_PILOT_DRAWS if stage else PILOT_DRAWS)
        needed = needed.clamp(min=LEAST_LATER_DRAWS if stage else 0)
        most = LEAST_LATER_DRAWS if stage else MOST_FIRST_DRAWS
        hard = (needed > most) & (improve is not None)
        part = _estimate_by_need(fit, needed.masked_fill(hard, 0), tolerance, most_draws, exact)
        last = last.index_copy(0, rows, sum(len(p) for p in parts) + torch.arange(len(rows)))
        parts.append(part)
        trusted = part.khat < part.khat_threshold.clamp(max=TRUSTED_KHAT)
        unreliable = (hard | ~trusted | ~(part.stderr < tolerance)).nonzero()[:, 0]
        if improve is None or not len(unreliable):
            break
        rows, fit = rows[unreliable], improve(fit.rows(unreliable), visited[:, unreliable])
        exact = None if exact is None else exact[:, unreliable]
    return Evidence.cat(parts).rows(last)


def _affordable(budget: int, dim: int) -> tuple[int, float]:
    """Returns how many proposals can be tried, and the evaluations left for the last's draws."""
    least = SCALE_DRAWS + search_cost(dim) + fit_cost(dim)
    left, stages = budget - least - PILOT_DRAWS - 2 * WALK_COST, 1
    if left < DRAWS[0]:
        raise ValueError(
            f"budget must be at least {budget - left + DRAWS[0]:.0f} evaluations of the model "
            f"for each datum, at {dim} latent dimensions; got {budget}: raise it, or use "
            "importance_sampling"
        )
    for cost in (fit_cost(dim, REFIT_STEPS), components_cost(dim)):
        after = left - MOST_FIRST_DRAWS - cost - LATER_PILOT_DRAWS - 2 * WALK_COST
        if after < LEAST_LATER_DRAWS:
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
    draws, weights = map(torch.cat, zip(*fit.weighted_draws(number)))
    pilot = summarise(weights.cpu(), METHOD, "doubtful")
    draws_for = (MARGIN * tolerance) ** -2  # draws needed per unit of variance
    visited = walk(fit.target, draws, weights, fit.proposal.scale_tril)
    walk_weights = fit.log_weights(visited, DRAWS[0])
    draw_variance = number * pilot.stderr.square()
    # without the first move
    walk_variance = (walk_weights[WALKS:].cpu() - pilot.log_prob).exp().mean(0) - 1
    rows = (draws_for * torch.maximum(draw_variance, walk_variance) > SECOND_WALK).nonzero()[:, 0]
    if len(rows):
        part = fit.rows(rows)
        seen = torch.cat([draws, visited])[:, rows], torch.cat([weights, walk_weights])[:, rows]
        visited[:, rows] = again = walk(part.target, *seen, part.proposal.scale_tril)
        walk_weights = part.log_weights(again, DRAWS[0])[WALKS:].cpu()
        second = (walk_weights - pilot.log_prob[rows]).exp().mean(0) - 1
        walk_variance[rows] = (walk_variance[rows] + second) / 2
    needed = draws_for * torch.maximum(draw_variance, walk_variance)
    if number > PILOT_DRAWS:
        needed = torch.where(pilot.khat < PILOT_KHAT, needed, torch.inf)
    return needed, visited


def _estimate_by_need(
    fit: Fit, needed: Tensor, tolerance: float, most_draws: float, exact: Tensor | None
) -> Evidence:
    """Returns evidence of B data, each with the fewest draws that are enough, or with AIS."""
    numbers = [n for n in DRAWS if n <= most_draws]
    level = torch.searchsorted(torch.tensor(numbers).double(), needed.double())
    if AIS_COST > most_draws:
        level = level.clamp(max=len(numbers) - 1)
    parts, order = [], []
    for i in level.unique().tolist():
        rows = (level == i).nonzero()[:, 0]
        part = fit.rows(rows)
        log_weights: Callable[[Tensor], Tensor]
        if i < len(numbers):
            evidence = part.importance_sampling(numbers[i], tolerance, TRUSTED_KHAT)
            log_weights = partial(part.log_weights, num_samples=numbers[i])
        else:
            path = Path(refined_start(part), AIS_TEMPERATURES, AIS_LEAPFROG, "sigmoid")
            evidence = summarise(path.forward(AIS_CHAINS).cpu(), "annealed, refined", "doubtful")
            evidence, log_weights = part.judge(evidence, tolerance, TRUSTED_KHAT), path.reverse
        if exact is not None:
            evidence = replace(evidence, extras={"exact": log_weights(exact[:, rows])[0].cpu()})
        parts.append(evidence)
        order.append(rows)
    return Evidence.cat(parts).rows(torch.cat(order).argsort())
