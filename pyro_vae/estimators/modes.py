"""The modes of each posterior."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.estimators.ascent import ascend
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.importance import summarise
from pyro_vae.estimators.target import Target, gradients

__all__ = ["Modes", "find_modes", "search_cost"]

GUIDE_DRAWS = 32  # behind the guide's mean
PRIOR_DRAWS = 1000
LIKELY_DRAWS = 128  # of them, from which the starts are picked
MORE_STARTS, ROUNDS = 16, 8
PATIENCE = 8  # starts without a new mode that end the search, for each mode that is known
STEPS = 150
LR = 0.1
EPS = 1e-8
BARRIER = 0.5  # nats by which the density dips between two modes
NEGLIGIBLE = 20.0  # nats below the highest mode


@dataclass(frozen=True, eq=False)
class Modes:
    """The distinct modes of B posteriors, M in all.

    Attributes:
        row: The datum of each [M].
        u: Where it is [M, D].
        simple: log p(x) by simple Monte Carlo from the prior's draws, of B data: an estimate
            that is well below it missed something.
        complete: Whether the search ended because nothing new was found [B].
    """

    row: Tensor
    u: Tensor
    simple: Evidence
    complete: Tensor


def find_modes(target: Target, num_starts: int) -> Modes:
    """Climbs log p(x, u) from the guide's mean and from draws of the prior.

    The draws are the best of 1000, then, of 128 that are sampled from them in proportion to
    p(x | u), those farthest from every other start. Data of which these found more than one
    mode are searched again from the 128, sixteen a round, until eight starts for each known mode
    have found nothing new: a mode of equal share is then missed once in a thousand times.

    Args:
        target: The posteriors.
        num_starts: Starts of each datum in the first round; 1 is the guide's mean alone, which
            is no search.
    """
    draws, log_prior, log_likelihood = target.draw_prior(PRIOR_DRAWS)
    simple = summarise(log_likelihood.cpu(), "importance sampling, prior", "lower bound")
    gumbel = -torch.empty_like(log_likelihood).exponential_().log()
    likely = _gather(draws, (log_likelihood + gumbel).topk(LIKELY_DRAWS, 0).indices).nan_to_num()
    best = _gather(draws, (log_prior + log_likelihood).argmax(0, keepdim=True)).nan_to_num()
    starts = _starts(target, best, likely, num_starts)
    row, u, complete = _search(target, starts, likely[: MORE_STARTS * ROUNDS].split(MORE_STARTS))
    return Modes(row, u, simple, complete)


def _search(
    target: Target, starts: Tensor, rounds: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The row [M] and place [M, D] of each mode, and whether a row's search ended [B]."""
    rows = torch.arange(starts.shape[1], device=starts.device)
    complete = torch.full_like(rows, len(starts) > 1, dtype=torch.bool)
    part, found = target, []
    u, keep = _distinct(part, _climb(part, starts))
    number = keep.sum(0)
    fruitless = torch.where(number == 1, PATIENCE, 0)  # starts since the last new mode
    for more in rounds:
        again = fruitless < PATIENCE * number
        found.append(_flat(rows[~again], u[:, ~again], keep[:, ~again]))
        rows, number, fruitless = rows[again], number[again], fruitless[again]
        if not len(rows):
            break
        part = target.rows(rows)
        known = u[: int(number.max()), again]  # the distinct ones come first
        u, keep = _distinct(part, torch.cat([known, _climb(part, more[:, rows])]))
        fruitless = torch.where(keep.sum(0) > number, 0, fruitless + len(more))
        number = keep.sum(0)
    else:
        complete[rows] = fruitless >= PATIENCE * number
        found.append(_flat(rows, u, keep))
    row, place = (torch.cat(parts) for parts in zip(*found))
    return row, place, complete


def _flat(rows: Tensor, u: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    which, column = keep.nonzero().T
    return rows[column], u[which, column]


def _climb(target: Target, starts: Tensor) -> Tensor:
    """Where Adam leads from the starts [S, B, D]; the start itself where that is no higher."""
    u = starts.clone()

    def slopes() -> tuple[Tensor, ...]:
        return gradients(lambda u: (target.log_joint(u),), u, target.draws_at_once)[1]

    ascend([u], slopes, num_steps=STEPS, lr=LR, eps=EPS)
    better = target.log_joint(u) > target.log_joint(starts)
    return torch.where(better.unsqueeze(-1), u, starts)


def search_cost(num_starts: int) -> int:
    """Evaluations of the model for one datum."""
    barriers = 3 * num_starts * (num_starts - 1) // 2
    return PRIOR_DRAWS + num_starts * (STEPS + 3) + barriers


def _starts(target: Target, best: Tensor, likely: Tensor, num_starts: int) -> Tensor:
    """Starts [S, B, D]: the guide's mean, the best draw, and likely draws far from the rest."""
    guide = target.draw_guide(GUIDE_DRAWS)
    mean = torch.where(guide.isfinite(), guide, torch.nan).nanmean(0).nan_to_num()
    starts = [mean, best[0]][:num_starts]
    while len(starts) < num_starts:
        distance = torch.stack([(likely - start).norm(dim=-1) for start in starts]).amin(0)
        starts.append(_gather(likely, distance.argmax(0, keepdim=True))[0])
    return torch.stack(starts)


def _distinct(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """The points [S, B, D] in another order, and which are modes of their own [S, B].

    A point is one if the density dips on the way to every higher mode; the highest always is.
    The modes come first, from the highest down.
    """
    height, order = target.log_joint(u).sort(0, descending=True)
    u = _gather(u, order)
    keep = height > height[0] - NEGLIGIBLE
    keep[0] = True
    for lower in range(1, len(u)):
        way = torch.cat([u[:lower].lerp(u[lower], t) for t in (0.25, 0.5, 0.75)])
        valley = target.log_joint(way).unflatten(0, (3, lower)).amin(0)
        keep[lower] &= (~keep[:lower] | (valley < height[lower] - BARRIER)).all(0)
    order = (~keep).int().sort(dim=0, stable=True).indices
    return _gather(u, order), keep.gather(0, order)


def _gather(u: Tensor, index: Tensor) -> Tensor:
    """Of points [S, B, D] those of each datum's indices [R, B], [R, B, D]."""
    return u.gather(0, index.unsqueeze(-1).expand(-1, -1, u.shape[-1]))
