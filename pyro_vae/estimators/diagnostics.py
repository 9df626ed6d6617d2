"""What importance weights say about their own average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["effective_sample_size", "log_mean_exp", "log_mean_exp_stderr", "pareto_khat"]


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """log of the average weight [B], of log weights [K, B]."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""Effective sample size [B], :math:`(\sum w)^2 / \sum w^2`, of log weights [K, B]."""
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp()


def log_mean_exp_stderr(log_weights: Tensor) -> Tensor:
    r"""Standard error [B] of `log_mean_exp`, by the delta method.

    .. math:: \frac{s_w}{\sqrt{K} \, \bar w}, \qquad s_w^2 = \frac{1}{K-1} \sum (w - \bar w)^2

    NaN for one weight. It says nothing of a tail that was not visited.
    """
    K = len(log_weights)
    if K == 1:
        return torch.full_like(log_weights[0], math.nan)
    relative = (log_weights - log_mean_exp(log_weights)).exp() - 1
    return (relative.pow(2).sum(0) / (K * (K - 1))).sqrt()


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Shape [B] of a generalised Pareto fitted to the tail of the weights, of logs [K, B].

    The tail is the largest min(K / 5, 3 sqrt(K)) weights. Below 25 weights there is no tail to
    fit: NaN. Equal weights have none either: -inf.

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry. Pareto smoothed importance sampling. 2024.
        Zhang and Stephens. A new and efficient estimation method for the generalized Pareto
        distribution. 2009.
    """
    K = len(log_weights)
    tail = math.ceil(min(K / 5, 3 * math.sqrt(K)))
    if tail < 5:
        return torch.full_like(log_weights[0], math.nan)
    top = log_weights.double().topk(tail + 1, 0).values
    weights = (top - top[0]).exp()
    cutoff = weights[-1].clamp(min=torch.finfo(torch.float64).tiny)
    khat = [_pareto_shape((w[w > c] - c).flip(0)) for w, c in zip(weights.T, cutoff)]
    return torch.stack(khat).to(log_weights.dtype)


def _pareto_shape(excess: Tensor) -> Tensor:
    """Posterior mean of the shape, of excesses in rising order, with a weak prior at 1/2."""
    n = len(excess)
    if n == 0:
        return excess.new_tensor(-math.inf)
    if n < 5:
        return excess.new_tensor(math.inf)
    count = 30 + int(n**0.5)
    grid = torch.arange(1, count + 1, dtype=excess.dtype)
    b = 1 - (count / (grid - 0.5)).sqrt()
    b = b / (3 * excess[int(n / 4 + 0.5) - 1]) + 1 / excess[-1]
    k = torch.log1p(-b[:, None] * excess).mean(1)
    log_profile = n * ((-b / k).log() - k - 1)
    b_mean = (torch.softmax(log_profile, 0) * b).sum()
    shape = torch.log1p(-b_mean * excess).mean()
    return (n * shape + 5) / (n + 10)
