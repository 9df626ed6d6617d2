"""More components of a proposal where its weights are largest."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.estimators.laplace import curvature, factor
from pyro_vae.estimators.proposal import Proposal
from pyro_vae.estimators.target import Target

__all__ = ["add_components", "components_cost"]

ROUNDS = 24
DRAWS = 200  # a round, shared by the components
LARGEST = 10.0  # weights, in units of their average, that ask for no more
STEPS = 8  # of the weights of the components
LEAST = 0.01  # of the draws for a component


def add_components(target: Target, proposal: Proposal, visited: Tensor) -> Proposal:
    r"""The proposal with a component at the draw of the largest weight, up to 24 times over.

    Each has the curvature of log p(x, u) at that draw as its precision. All draws so far count
    as draws of the whole mixture; at the end its weights :math:`\pi` maximise

    .. math:: \sum_k \bar w_k \log \sum_c \pi_c \, t(u_k; \mu_c, \Sigma_c)

    by eight steps of expectation maximisation. No draw is scored again.

    Args:
        target: The posteriors.
        proposal: Their proposals.
        visited: Further points [R, B, D] where components may be needed.

    References:
        Raftery and Bao. Estimating and projecting trends in HIV/AIDS generalized epidemics
        using incremental mixture importance sampling. 2010.
        Cappe, Douc, Guillin, Marin and Robert. Adaptive importance sampling in general mixture
        classes. 2008.
    """
    u = torch.cat([proposal.draw(2 * DRAWS), visited])
    log_p = target.log_joint(u)
    density = [proposal.log_prob(u)]  # of the first mixture, then of each component
    extra: list[Proposal] = []
    for _ in range(ROUNDS):
        log_q = torch.logsumexp(torch.stack([density[0] + math.log(2.0), *density[1:]]), 0)
        weight, best = (log_p - log_q).nan_to_num(-torch.inf).max(0)
        average = (log_p - log_q).logsumexp(0) - math.log(len(log_p))
        if bool((weight - average < math.log(LARGEST)).all()):
            break
        loc = u[best, torch.arange(u.shape[1], device=u.device)]
        extra.append(_component(target, loc, proposal.df))
        fresh = extra[-1].draw(DRAWS)
        u, log_p = torch.cat([u, fresh]), torch.cat([log_p, target.log_joint(fresh)])
        sources = [proposal, *extra]
        density = [
            torch.cat([old, source.log_prob(fresh)]) for old, source in zip(density, sources[:-1])
        ] + [extra[-1].log_prob(u)]
    return _weighed([proposal, *extra], torch.stack(density), log_p)


def components_cost(dim: int) -> int:
    """Evaluations of the model for one datum."""
    return 2 * DRAWS + ROUNDS * (DRAWS + dim)


def _component(target: Target, loc: Tensor, df: float) -> Proposal:
    tril = factor(curvature(target, loc)[1])
    return Proposal(loc.new_zeros(1, len(loc)), loc.unsqueeze(0), tril.unsqueeze(0), df)


def _weighed(parts: list[Proposal], density: Tensor, log_p: Tensor) -> Proposal:
    """All components as one mixture, their weights fitted to the weights of the draws."""
    log_pi = torch.full_like(density[:, 0], 1 / len(parts)).log()
    made = density.logsumexp(0)
    weights = torch.softmax((log_p - made).nan_to_num(-torch.inf), 0)
    for _ in range(STEPS):
        share = torch.softmax(density + log_pi.unsqueeze(1), 0)
        log_pi = ((share * weights).sum(1) + LEAST).log().log_softmax(0)
    return Proposal(
        torch.cat([part.log_weight + pi for part, pi in zip(parts, log_pi)]),
        torch.cat([part.loc for part in parts]),
        torch.cat([part.tril for part in parts]),
        parts[0].df,
    )
