"""Hamiltonian Monte Carlo for many posteriors at once, each chain accepted by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Point", "hmc_step"]


@dataclass(frozen=True, eq=False)
class Point:
    """States of C chains for B data, and what is known there.

    Attributes:
        u: Where they are [C, B, D].
        log_start: Log density of the start [C, B].
        log_joint: log p(x, u) [C, B].
        slope_start: Gradient of the first [C, B, D].
        slope_joint: Gradient of the second [C, B, D].
    """

    u: Tensor
    log_start: Tensor
    log_joint: Tensor
    slope_start: Tensor
    slope_joint: Tensor

    def log_prob(self, beta: float) -> Tensor:
        """Log density between the two, (1 - beta) log start + beta log joint."""
        if beta == 1:
            return self.log_joint
        return (1 - beta) * self.log_start + beta * self.log_joint

    def slope(self, beta: float) -> Tensor:
        """Its gradient."""
        if beta == 1:
            return self.slope_joint
        return (1 - beta) * self.slope_start + beta * self.slope_joint

    def where(self, accepted: Tensor, other: Point) -> Point:
        """This point where `accepted` [C, B], the other elsewhere."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return Point(*(torch.where(_like(accepted, a), a, b) for a, b in pairs))


def hmc_step(
    at: Callable[[Tensor], Point],
    point: Point,
    beta: float,
    *,
    step_size: Tensor,
    scale_tril: Tensor,
    num_leapfrog: int,
) -> tuple[Point, Tensor]:
    r"""One move that leaves the density at `beta` as it is.

    Leapfrog steps in coordinates whitened by A, :math:`u = A v`, with unit mass, then
    acceptance by chain and datum. A proposal whose energy is not a number is rejected.

    Args:
        at: Evaluates a position.
        point: Where the chains are.
        beta: Inverse temperature.
        step_size: Of each datum [B].
        scale_tril: A [B, D, D].
        num_leapfrog: Leapfrog steps.

    Returns:
        Where they are then, and the probability of acceptance [C, B].

    References:
        Neal. MCMC using Hamiltonian dynamics. 2011.
    """
    size = step_size.unsqueeze(-1)
    momentum = torch.randn_like(point.u)
    moved, speed = point, momentum + size / 2 * _white(point.slope(beta), scale_tril)
    for step in range(num_leapfrog):
        moved = at(moved.u + size * torch.einsum("bij,kbj->kbi", scale_tril, speed))
        last = step == num_leapfrog - 1
        speed = speed + (size / 2 if last else size) * _white(moved.slope(beta), scale_tril)
    gain = moved.log_prob(beta) - point.log_prob(beta)
    gain = gain + (momentum.pow(2) - speed.pow(2)).sum(-1) / 2
    probability = gain.nan_to_num(-torch.inf, torch.inf).clamp(max=0).exp()
    accepted = torch.rand_like(probability) < probability
    return moved.where(accepted, point), probability


def _white(slope: Tensor, scale_tril: Tensor) -> Tensor:
    return torch.einsum("bji,kbj->kbi", scale_tril, slope)


def _like(accepted: Tensor, value: Tensor) -> Tensor:
    return accepted if value.ndim == accepted.ndim else accepted.unsqueeze(-1)
