"""Short walks through each posterior, which show what a proposal does not reach."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.estimators.hmc import Point, hmc_step
from pyro_vae.estimators.target import Target, gradients

__all__ = ["walk", "walk_cost"]

CHAINS, MOVES, LEAPFROG = 8, 6, 3
ACCEPTANCE, GAIN = 0.65, 0.7  # as in annealing: step sizes follow the acceptance


def walk(target: Target, draws: Tensor, log_weights: Tensor, scale_tril: Tensor) -> Tensor:
    """Points [R, B, D] that Hamiltonian Monte Carlo visits in each posterior.

    The chains start at draws that are picked in proportion to their weights, so that they are
    nearly draws of the posterior, and move on from there, also to where no draw has been.

    Args:
        target: The posteriors.
        draws: Draws of the proposals [K, B, D].
        log_weights: Their importance weights [K, B].
        scale_tril: Metric of the moves [B, D, D].
    """
    weights = torch.softmax(log_weights.nan_to_num(-torch.inf), 0)
    start = torch.multinomial(weights.T, CHAINS, True).T.unsqueeze(-1)
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
    return CHAINS * (1 + MOVES * (LEAPFROG + 1))


def _at(target: Target, u: Tensor) -> Point:
    (value,), (slope,) = gradients(lambda v: (target.log_joint(v),), u, target.draws_at_once)
    return Point(u, value, value, slope, slope)
