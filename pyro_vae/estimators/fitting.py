"""A Gaussian with a full covariance, fitted to each posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.estimators.ascent import ascend
from pyro_vae.estimators.target import Target, gradients

__all__ = ["fit_gaussian"]

STEPS = 100
DRAWS = 8
LR = 0.1
EPS = 1.0  # slopes are in nats for a standard deviation
CHECKS = 64  # draws of the comparison at the end


def fit_gaussian(target: Target, loc: Tensor, tril: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""The Gaussian of highest ELBO, from a first one, which is kept where that is better.

    .. math:: u = \mu + A (m + L \epsilon), \qquad
        \nabla_m = \mathbb{E}[g], \quad \nabla_L = \mathbb{E}[g \epsilon^\top], \quad
        g = A^\top \nabla_u \log p(x, u) + L^{-\top} \epsilon

    in coordinates whitened by the first Gaussian, :math:`\mathcal{N}(\mu, A A^\top)`. The
    gradient is that of sticking the landing, without noise where the fit is exact.

    Args:
        target: The posteriors of B data.
        loc: Mean of the first Gaussian [B, D].
        tril: Cholesky factor of its covariance [B, D, D].

    Returns:
        Mean [B, D], Cholesky factor [B, D, D], and the bound [B] in nats.

    References:
        Roeder, Wu and Duvenaud. Sticking the landing. 2017.
    """
    B, D = loc.shape
    mean = torch.zeros_like(loc)
    below = torch.zeros_like(tril)  # L, with the logarithm of its diagonal

    def slopes() -> tuple[Tensor, Tensor]:
        noise = torch.randn(DRAWS, B, D, dtype=loc.dtype, device=loc.device)
        factor = _factor(below)
        u = _move(noise, loc + _times(tril, mean), tril @ factor)
        (slope,) = gradients(lambda u: (target.log_joint(u),), u, target.draws_at_once)[1]
        noise = noise.permute(1, 2, 0)
        pull = torch.linalg.solve_triangular(factor.mT, noise, upper=True)
        g = (tril.mT @ slope.permute(1, 2, 0) + pull).nan_to_num(0.0, 0.0, 0.0)
        outer = (g @ noise.mT / DRAWS).tril()
        diagonal = torch.diag_embed((outer * factor).diagonal(dim1=-2, dim2=-1))
        return g.mean(-1), outer.tril(-1) + diagonal

    ascend([mean, below], slopes, num_steps=STEPS, lr=LR, eps=EPS)
    noise = torch.randn(CHECKS, B, D, dtype=loc.dtype, device=loc.device)
    fitted = loc + _times(tril, mean), tril @ _factor(below)
    before, after = _bound(target, noise, loc, tril), _bound(target, noise, *fitted)
    better = (after > before).view(-1, 1)
    loc = torch.where(better, fitted[0], loc)
    tril = torch.where(better.unsqueeze(-1), fitted[1], tril)
    return loc, tril, torch.maximum(before, after)


def _bound(target: Target, noise: Tensor, loc: Tensor, tril: Tensor) -> Tensor:
    """The ELBO [B] of a Gaussian, at draws made of the noise [K, B, D]."""
    entropy = (noise.pow(2).sum(-1) + loc.shape[-1] * math.log(2 * math.pi)) / 2
    log_det = tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return (target.log_joint(_move(noise, loc, tril)) + entropy).mean(0) + log_det


def _move(noise: Tensor, loc: Tensor, tril: Tensor) -> Tensor:
    return loc + torch.einsum("bij,kbj->kbi", tril, noise)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _factor(below: Tensor) -> Tensor:
    return below.tril(-1) + torch.diag_embed(below.diagonal(dim1=-2, dim2=-1).exp())
