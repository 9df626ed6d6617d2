"""Hamiltonian Monte Carlo: one move of many chains, and short walks through posteriors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.estimators.target import Target, gradients

TARGET_ACCEPTANCE = 0.65  # share of accepted moves that step sizes aim at
STEP_SIZE_GAIN = 0.7  # change of log step size per move, in units of the excess acceptance
WALKS, MOVES, LEAPFROG = 8, 6, 3  # short walks, whose step sizes follow the acceptance
WALK_COST = WALKS * (1 + MOVES * (LEAPFROG + 1))  # evaluations of the model for one datum


class Point(NamedTuple):
    """States of C chains for B data, with log densities and gradients there.

    Attributes:
        u: Positions of the chains [C, B, D].
        log_start: Log density of the start [C, B].
        log_joint: log p(x, u) [C, B].
        grad_start: Gradient of `log_start` [C, B, D].
        grad_joint: Gradient of `log_joint` [C, B, D].
    """

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    grad_start: Tensor
    grad_joint: Tensor


def hmc_step(
    evaluate: Callable[[Tensor], Point],
    point: Point,
    beta: float,
    *,
    step_size: Tensor,
    scale_tril: Tensor,
    num_leapfrog: int,
) -> tuple[Point, Tensor]:
    r"""Makes one Hamiltonian move that leaves the density at `beta` invariant.

    The move takes leapfrog steps in coordinates whitened by A, :math:`u = A v`, with unit mass,
    and is accepted or not for each chain and datum. It is rejected if its energy is NaN. Each
    datum has its own step size [B] and factor A [B, D, D].

    Returns:
        The states after the move, and the probability of acceptance [C, B].

    References:
        Neal. MCMC using Hamiltonian dynamics. 2011.
    """
    size, moved = step_size.unsqueeze(-1), point
    momentum = speed = torch.randn_like(point.u)
    for step in range(num_leapfrog + 1):
        if step:
            moved = evaluate(moved.u + size * torch.einsum("bij,kbj->kbi", scale_tril, speed))
        grad = _interpolate(moved.grad_start, moved.grad_joint, beta)
        kick = size / 2 if step in (0, num_leapfrog) else size
        speed = speed + kick * torch.einsum("bji,kbj->kbi", scale_tril, grad)
    after, before = (_interpolate(p.log_start, p.log_joint, beta) for p in (moved, point))
    gain = after - before + (momentum.pow(2) - speed.pow(2)).sum(-1) / 2
    probability = gain.nan_to_num(-torch.inf, torch.inf).clamp(max=0).exp()
    accepted = torch.rand_like(probability) < probability
    masks = {2: accepted, 3: accepted.unsqueeze(-1)}
    kept = Point(*(torch.where(masks[a.ndim], a, b) for a, b in zip(moved, point)))
    return kept, probability


def _interpolate(start: Tensor, joint: Tensor, beta: float) -> Tensor:
    """Returns a log density between the start's and log p(x, u), or its gradient."""
    return joint if beta == 1 else (1 - beta) * start + beta * joint


def walk(target: Target, draws: Tensor, log_weights: Tensor, scale_tril: Tensor) -> Tensor:
    """Returns points [R, B, D] that Hamiltonian Monte Carlo visits in each posterior.

    The chains start at the draws of largest weight, and may move to where there is no draw. Where
    the proposal covers the posterior they are among its draws after a few moves; where it does
    not, they stay where weights are large. `log_weights` [K, B] are those of the draws [K, B, D];
    `scale_tril` [B, D, D] is the metric of the moves.
    """
    log_weights = log_weights.nan_to_num(-torch.inf, neginf=-torch.inf)
    height, start = log_weights.topk(min(WALKS, len(draws)), 0)
    start = torch.where(height > -torch.inf, start, start[:1])
    start = start[torch.arange(WALKS, device=start.device) % len(start)].unsqueeze(-1)

    def evaluate(u: Tensor) -> Point:
        (value,), (grad,) = gradients(lambda v: (target.log_joint(v),), u, target.draws_at_once)
        return Point(u, value, value, grad, grad)

    point = evaluate(draws.take_along_dim(start, 0))
    size = torch.full_like(target.scale[:, 0], target.dim**-0.25)
    visited = []
    for _ in range(MOVES):
        point, probability = hmc_step(
            evaluate, point, 1, step_size=size, scale_tril=scale_tril, num_leapfrog=LEAPFROG
        )
        size = size * (STEP_SIZE_GAIN * (probability.mean(0) - TARGET_ACCEPTANCE)).exp()
        visited.append(point.u)
    return torch.cat(visited)
