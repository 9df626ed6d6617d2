"""The modes of each posterior."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.proposal import CONVERGED, NEWTON_STEPS, Adam, laplace
from pyro_vae.estimators.target import Target, gradients

GUIDE_DRAWS = 32  # draws from which the guide's mean is estimated
PRIOR_DRAWS = 500
LIKELY_DRAWS = 128  # of these, picked in proportion to p(x | u), from which starts are taken
FIRST_STEPS, FIRST_LR = 50, 0.1  # Adam's first climb, in units of the prior's spread
STEPS, LR = 50, 1.0  # later climbs, in units of the first mode's covariance
EPS = 1e-8
MORE_STARTS, MOST_ROUNDS = 16, 8  # starts of a further round, and most such rounds
PATIENCE = 8  # starts for each known mode that end the search if they find no new one
MOST_MODES = 24  # number above which the search gives up
MOST_LINES = 64  # most coordinates, and most principal directions, that are walked along
UNINFORMED = 0.05  # largest |log variance| of a direction that the data do not inform
MOST_EXCHANGED = 24  # most informed coordinates, of which pairs are exchanged
LINE_POSITIONS = (-2.5, -1.25, 0.0, 1.25, 2.5)  # positions along a line, from the prior's median
LINE_STEPS = (2.5, 4.5, 6.5, 8.5)  # steps from a mode along a line, in its standard deviations
BARRIER = 0.5  # nats by which the density must dip between two modes
NEGLIGIBLE_NATS = 20.0  # nats below the highest mode, where others are dropped


class Modes(NamedTuple):
    """The distinct modes of B posteriors, M in all.

    Attributes:
        row: Index of the datum of each mode [M].
        u: Positions of the modes [M, D].
        tril: Factors of the covariances there [M, D, D], inverses of the negative Hessians.
        simple: log p(x) of B data by simple Monte Carlo from the prior's draws: an estimate that
            is well below it missed something.
        search_ended: Whether the search ended because nothing new was found [B].
    """

    row: Tensor
    u: Tensor
    tril: Tensor
    prior_evidence: Evidence
    search_ended: Tensor


def find_modes(target: Target, num_starts: int) -> Modes:
    """Climbs to the modes from the guide, from draws of the prior, and from beyond valleys.

    The first mode is climbed to from the guide's mean and from the best of 500 draws of the
    prior. Its covariance is the metric of all later climbs. Half of these start beyond a valley
    of the density: on straight lines from a known mode along the most informed coordinates and
    the principal directions of the covariance, with the mode's mirror image about the prior's
    centre; at a mode with two coordinates exchanged; or at a mode reflected in another. The
    others start from likely draws of the prior, the farthest first. Data with more than one mode
    are searched again, sixteen starts a round, each round from another mode, until eight starts
    for each known mode have found nothing new: a mode of equal share is then missed once in a
    thousand times. `num_starts` counts the starts of each datum after the first mode; with 1 there
    is no search.
    """
    draws, log_prior, log_likelihood = target.draw_prior(PRIOR_DRAWS)
    prior_evidence = summarise(log_likelihood.cpu(), "importance sampling, prior", "lower bound")
    gumbel = -torch.empty_like(log_likelihood).exponential_().log()
    likely = _gather(draws, (log_likelihood + gumbel).topk(LIKELY_DRAWS, 0).indices).nan_to_num()
    best = _gather(draws, (log_prior + log_likelihood).argmax(0, keepdim=True)).nan_to_num()
    guide = target.draw_guide(GUIDE_DRAWS)
    mean = torch.where(guide.isfinite(), guide, torch.nan).nanmean(0, keepdim=True).nan_to_num()
    prior_mean = target.prior_mean
    centre = torch.where(prior_mean.isnan(), draws.nan_to_num().median(0).values, prior_mean)
    search = _Search(target, torch.cat([mean, best]), likely, centre)
    row, u, search_ended = search.run(num_starts)
    return Modes(row, *search.polished(row, u), prior_evidence, search_ended)


def search_cost(dim: int, num_starts: int = 5) -> int:
    """Returns how often the search evaluates the model for a datum of one mode."""
    lines, exchanged = 2 * min(dim, MOST_LINES), min(dim, MOST_EXCHANGED)
    points = len(LINE_POSITIONS) + 1 + 2 * len(LINE_STEPS)  # on each line
    walks = lines * points + exchanged * (exchanged - 1) // 2 + MORE_STARTS
    number = num_starts + 1
    climbs = 2 * FIRST_STEPS + NEWTON_STEPS * (dim + 6) + number * (STEPS + 3)
    return PRIOR_DRAWS + climbs + walks + 3 * number * (number + 1) // 2


class _Search:
    """The search for the modes of B posteriors.

    Args:
        target: The posteriors.
        first: Starts of the first mode [2, B, D].
        likely: Draws of the prior [R, B, D], picked in proportion to p(x | u).
        centre: The prior's mean or median [B, D].
    """

    def __init__(self, target: Target, first: Tensor, likely: Tensor, centre: Tensor) -> None:
        self.target, self.likely, self.centre = target, likely, centre
        identity = torch.eye(target.dim).to(first).expand(target.num_data, -1, -1)
        climbed = _climb(target, first, identity, FIRST_STEPS, FIRST_LR)
        highest = target.log_joint(climbed).argmax(0, keepdim=True)
        top, self.tril = laplace(target, _gather(climbed, highest)[0])
        self.known, self.lower = top.unsqueeze(0), _gather(climbed, 1 - highest)
        self.lines, self.pairs = _directions(self.tril)
        self.spread = torch.einsum("bij,rbi->rbj", self.tril, self.lines).norm(dim=-1)

    def run(self, num_starts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns row [M] and position [M, D] of each mode, and whose search ended [B]."""
        rows = torch.arange(self.centre.shape[0], device=self.centre.device)
        search_ended = torch.zeros_like(rows, dtype=torch.bool)
        if num_starts == 1:
            return rows, self.known[0], search_ended
        known, number, fruitless, found = self.known, torch.ones_like(rows), 0 * rows, []
        for origin in range(MOST_ROUNDS + 1):
            u, keep = self._extend(rows, known, MORE_STARTS if origin else num_starts, origin)
            fruitless = torch.where(keep.sum(0) > number, 0, fruitless + MORE_STARTS)
            number = keep.sum(0)
            ended = fruitless >= PATIENCE * number
            over = ended | (number > MOST_MODES) | (origin == MOST_ROUNDS)
            search_ended[rows] = ended
            found.append((rows[over], u[:, over], keep[:, over]))
            if over.all():
                break
            rows, number, fruitless = rows[~over], number[~over], fruitless[~over]
            known = u[: int(number.max()), ~over]  # the distinct ones come first
        row = torch.cat([rows.expand(keep.shape)[keep] for rows, _, keep in found])
        return row, torch.cat([u[keep] for _, u, keep in found]), search_ended

    def polished(self, row: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the modes [M, D] climbed to the top, and factors of their covariances [M, D, D].

        The only mode of a row stays where the first climb led, unless another climb led higher.
        """
        top, tril = self.known[0, row], self.tril[row]
        height, first = self.target.rows(row).log_joint(torch.stack([u, top]))
        new = ((row == row[:, None]).sum(1) > 1) | (height - first > CONVERGED)
        u = torch.where(new.unsqueeze(-1), u, top)
        for part in new.nonzero()[:, 0].split(self.target.num_data) if new.any() else ():
            target = self.target.rows(row[part])
            climbed = _climb(target, u[part].unsqueeze(0), tril[part], STEPS, LR / 4)[0]
            u[part], tril[part] = laplace(target, climbed)
        return u, tril

    def _extend(
        self, rows: Tensor, known: Tensor, number: int, origin: int
    ) -> tuple[Tensor, Tensor]:
        """Climbs on; returns points [S, R, D], modes first, and which are modes [S, R]."""
        target = self.target.rows(rows)
        starts = self._starts(target, rows, known, number, origin % len(known))
        starts = starts if origin else torch.cat([starts, self.lower[:, rows]])
        tril = self.tril[rows]
        more = _climb(target, starts, tril, STEPS, _step_sizes(tril, starts - known[0]))
        return _distinct_modes(target, torch.cat([known, more]))

    def _starts(
        self, target: Target, rows: Tensor, known: Tensor, number: int, origin: int
    ) -> Tensor:
        """Returns points beyond valleys, then likely draws far from all others."""
        mode, centre = known[origin], self.centre[rows]
        lines, pairs, spread = (t[:, rows] for t in (self.lines, self.pairs, self.spread))
        others = torch.cat([known[:origin], known[origin + 1 : number]])
        candidates = [
            _beyond_valleys(target, mode, lines, spread, centre),
            _exchanges(target, mode, pairs, centre),
            _reflections(target, mode, others),
        ]
        points, height = map(torch.cat, zip(*candidates))
        separate = _is_separate(target, others, points, height)
        height, order = torch.where(separate, height, -torch.inf).sort(0, descending=True)
        beyond, likely, starts = _gather(points, order), self.likely[:, rows], list(known)
        for i in range(number):
            distance = torch.stack([(likely - start).norm(dim=-1) for start in starts]).amin(0)
            start = _gather(likely, distance.argmax(0, keepdim=True))[0]
            if i < min(number // 2, len(height)):
                start = torch.where(height[i].isfinite().unsqueeze(-1), beyond[i], start)
            starts.append(start)
        return torch.stack(starts[len(known) :])


def _directions(tril: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit vectors to walk along [R, B, D], and those between two coordinates [P, B, D].

    The lines are along the coordinates and principal directions whose spread differs most from
    the prior's, without those that the data inform nowhere in the batch.
    """
    D = tril.shape[-1]
    covariance = tril @ tril.mT
    axis_order, num_axes = _most_informed(covariance.diagonal(dim1=-2, dim2=-1))
    axes = torch.eye(D, dtype=tril.dtype, device=tril.device)[axis_order]
    variance, vectors = torch.linalg.eigh(covariance)
    vector_order, num_vectors = _most_informed(variance)
    vectors = _gather(vectors.permute(2, 0, 1), vector_order.T).transpose(0, 1)
    number = min(D, MOST_EXCHANGED)
    a, b = torch.triu_indices(number, number, 1, device=tril.device)
    pairs = (axes[:, a] - axes[:, b]) / 2**0.5
    lines = torch.cat([axes[:, :num_axes], vectors[:, :num_vectors]], 1)
    return lines.transpose(0, 1), pairs.transpose(0, 1)


def _most_informed(variance: Tensor) -> tuple[Tensor, int]:
    """Returns the order of variances [B, D], least like 1 first, and how many to keep."""
    size, order = variance.log().abs().sort(-1, descending=True)
    return order, min(MOST_LINES, max(1, int((size > UNINFORMED).sum(-1).max())))


def _beyond_valleys(
    target: Target, mode: Tensor, lines: Tensor, spread: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the highest point beyond a valley on each line [R, B, D], and its height [R, B].

    The height is minus infinity where there is no valley.
    """
    offset = ((mode - centre) * lines).sum(-1)  # [R, B]
    strides = mode.new_tensor([*(-s for s in LINE_STEPS), *LINE_STEPS]).view(-1, 1, 1) * spread
    fixed = mode.new_tensor(LINE_POSITIONS).view(-1, 1, 1) - offset
    steps = torch.cat([fixed, -2 * offset.unsqueeze(0), strides]).sort(0).values  # and the mirror
    points = mode + steps.unsqueeze(-1) * lines
    height = target.log_joint(points.flatten(0, 1)).view(steps.shape)
    ahead = torch.where(steps > 0, height, torch.inf).cummin(0).values
    behind = torch.where(steps < 0, height, torch.inf).flip(0).cummin(0).values.flip(0)
    valley = torch.where(steps > 0, ahead, behind)
    highest, best = torch.where(valley < height - BARRIER, height, -torch.inf).max(0)
    return points.gather(0, best.unsqueeze(-1).expand_as(lines).unsqueeze(0))[0], highest


def _exchanges(
    target: Target, mode: Tensor, pairs: Tensor, centre: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the mode with two coordinates exchanged, for the best pairs, and its heights."""
    half_path = ((mode - centre) * pairs).sum(-1, keepdim=True) * pairs
    if not len(pairs):
        return half_path, half_path[..., 0]
    height, best = target.log_joint(mode - 2 * half_path).sort(0, descending=True)
    half_path, height = _gather(half_path, best[:MORE_STARTS]), height[:MORE_STARTS]
    valid = target.log_joint(mode - half_path) < height - BARRIER
    return mode - 2 * half_path, torch.where(valid, height, -torch.inf)


def _reflections(target: Target, mode: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Returns reflections of the mode in `others` and of these in it, with their heights."""
    points = torch.cat([2 * mode - others, 2 * others - mode])
    if not len(points):
        return points, points[..., 0]
    height = target.log_joint(points)
    origins = torch.cat([mode.expand_as(others), others])
    valid = _lowest_between(target, origins, points, 1) < height - BARRIER
    return points, torch.where(valid, height, -torch.inf)


def _is_separate(target: Target, known: Tensor, points: Tensor, height: Tensor) -> Tensor:
    """Returns whether a valley lies between each point [R, B, D] and every known mode."""
    separate = height > -torch.inf
    rows = separate.any(0).nonzero()[:, 0]
    if not len(rows):
        return separate
    part = target.rows(rows)
    for mode in known[:, rows]:
        lowest = _lowest_between(part, mode, points[:, rows], 7)
        separate[:, rows] &= lowest < height[:, rows] - BARRIER
    return separate


def _climb(
    target: Target, starts: Tensor, tril: Tensor, num_steps: int, lr: Tensor | float
) -> Tensor:
    """Returns where Adam leads from the starts [S, B, D]; the start itself if not higher.

    The first step is of size `lr`, for all or for each start [S, B, 1], in the metric of factors
    `tril` [B, D, D].
    """
    offset, points = torch.zeros_like(starts), starts
    adam = Adam([offset], num_steps=num_steps, lr=1.0, eps=EPS)
    for _ in range(num_steps):
        (grad,) = gradients(lambda u: (target.log_joint(u),), points, target.draws_at_once)[1]
        adam.ascend(torch.einsum("bji,kbj->kbi", tril, grad))
        points = starts + lr * torch.einsum("bij,kbj->kbi", tril, offset)
    better = target.log_joint(points) > target.log_joint(starts)
    return torch.where(better.unsqueeze(-1), points, starts)


def _step_sizes(tril: Tensor, difference: Tensor) -> Tensor:
    """Returns step sizes [S, B, 1] with which climbs can reach twice as far as a mode is."""
    whitened = torch.linalg.solve_triangular(tril, difference.permute(1, 2, 0), upper=False)
    return (4 / STEPS * whitened.abs().amax(1).T.unsqueeze(-1)).clamp(min=LR)


def _distinct_modes(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts the points [S, B, D]; returns them and which are distinct modes [S, B].

    A point is distinct if the density dips on the way to every higher mode; the highest always
    is. Distinct modes come first, from the highest down.
    """
    height, order = target.log_joint(u).sort(0, descending=True)
    u = _gather(u, order)
    keep = height > height[0] - NEGLIGIBLE_NATS
    keep[0] = True
    for lower in range(1, len(u)):
        dips = _lowest_between(target, u[lower], u[:lower], 3) < height[lower] - BARRIER
        keep[lower] &= (~keep[:lower] | dips).all(0)
    order = (~keep).int().sort(dim=0, stable=True).indices
    return _gather(u, order), keep.gather(0, order)


def _lowest_between(target: Target, a: Tensor, b: Tensor, number: int) -> Tensor:
    """Returns the lowest log density [R, B] at `number` points between a and b [R, B, D]."""
    path = torch.cat([a.lerp(b, t / (number + 1)) for t in range(1, number + 1)])
    return target.log_joint(path).unflatten(0, (number, -1)).amin(0)


def _gather(u: Tensor, index: Tensor) -> Tensor:
    """Takes points [R, B, D] at the indices [R, B] of each datum from points [S, B, D]."""
    return u.take_along_dim(index.unsqueeze(-1), 0)
