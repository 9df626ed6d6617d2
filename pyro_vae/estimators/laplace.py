"""The curvature of each posterior at its mode."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.estimators.target import Target

__all__ = ["curvature", "factor", "laplace"]

FLOOR, CEILING = 0.5, 1e12  # of the eigenvalues of the precision, in units of the prior's
ROUNDS = 3
CONVERGED = 0.01  # nats that a Newton step promises
STEP_SIZES = (1.0, 0.5, 0.2, 0.05)


def laplace(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Modes [B, D], polished by Newton's steps from `u`, and covariance factors [B, D, D].

    The covariance is the inverse of the exact negative Hessian, |eigenvalues| floored at 0.5:
    a saddle or a flat direction still gets a finite width. Each of at most three rounds costs
    D gradients and their own gradients.
    """
    for _ in range(ROUNDS):
        slope, precision = curvature(target, u)
        tril = factor(precision)
        promised = (tril.mT @ slope.unsqueeze(-1)).pow(2).sum((-2, -1)) / 2
        if bool((promised < CONVERGED).all()):
            break
        u = _newton(target, u, tril @ (tril.mT @ slope.unsqueeze(-1)))
    return u, tril


def curvature(target: Target, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [B, D] and negative Hessian [B, D, D] of log p(x, u) at `u` [B, D]."""
    columns = torch.arange(u.shape[1], device=u.device)
    parts = [_rows(target, u, part) for part in columns.split(target.draws_at_once)]
    hessian = torch.cat([rows for _, rows in parts]).transpose(0, 1)
    return parts[0][0], -(hessian + hessian.mT) / 2


def _rows(target: Target, u: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient [B, D], and the rows [R, B, D] of the Hessian of some columns, all at once."""
    leaf = u.expand(len(columns), *u.shape).detach().requires_grad_()
    with torch.enable_grad():
        value = target.run_log_joint(leaf).sum()
        (slope,) = torch.autograd.grad(value, leaf, create_graph=True)
        column = slope.gather(-1, columns.view(-1, 1, 1).expand(-1, len(u), 1)).sum()
    if not column.requires_grad:  # linear in u
        return slope[0], torch.zeros_like(slope)
    (rows,) = torch.autograd.grad(column, leaf, materialize_grads=True)
    return slope[0].detach(), rows


def factor(precision: Tensor) -> Tensor:
    """Cholesky factor [B, D, D] of the inverse of a precision, its |eigenvalues| floored."""
    values, vectors = torch.linalg.eigh(precision.nan_to_num(0.0, 0.0, 0.0))
    variance = 1 / values.abs().clamp(FLOOR, CEILING)
    return torch.linalg.cholesky((vectors * variance.unsqueeze(-2)) @ vectors.mT)


def _newton(target: Target, u: Tensor, step: Tensor) -> Tensor:
    """The best of a few lengths of the step, or none."""
    sizes = u.new_tensor((0.0, *STEP_SIZES)).view(-1, 1, 1)
    tried = u + sizes * step.squeeze(-1)
    best = target.log_joint(tried).nan_to_num(-torch.inf).argmax(0)
    return tried[best, torch.arange(len(u), device=u.device)]
