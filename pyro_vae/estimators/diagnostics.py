"""What importance weights say about their own average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_vae.densities import log_mean_exp

__all__ = [
    "convergence",
    "effective_sample_size",
    "jackknife",
    "log_mean_exp",
    "log_mean_exp_stderr",
    "pareto_khat",
]

LARGEST = 8  # weights whose pairs are taken one by one


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


def convergence(log_weights: Tensor) -> dict[int, Tensor]:
    r"""The bound :math:`\mathbb{E} \log \frac1k \sum_{i=1}^k w_i` [B] at k = K/100, K/10 and K.

    Averaged over the K // k disjoint blocks of the log weights [K, B]. A bound that still rises
    tenfold by tenfold has not arrived. Sizes below one are left out.
    """
    K = len(log_weights)
    sizes = sorted({k for k in (K // 100, K // 10, K) if k > 0})
    blocks = {k: log_weights[: K - K % k].unflatten(0, (-1, k)) for k in sizes}
    return {k: (block.logsumexp(1) - math.log(k)).mean(0) for k, block in blocks.items()}


def jackknife(log_weights: Tensor, order: int = 1) -> Tensor:
    r"""log p(x) [B] by the jackknife over log weights [K, B], its bias of order 1 / K^(order + 1).

    .. math:: K L_K - (K - 1) L_{K-1}, \qquad
        \tfrac12 K^2 L_K - (K - 1)^2 L_{K-1} + \tfrac12 (K - 2)^2 L_{K-2}

    where L_K is `log_mean_exp`, and the others are its averages over all subsets that leave one
    or two weights out: exactly, at a cost that is linear in K. No bound, and of no use where
    the variance of the weights is not small beside K.

    Args:
        log_weights: Log weights [K, B].
        order: 1 or 2.

    Raises:
        ValueError: If the order is another, or K does not exceed it.

    References:
        Nowozin. Debiasing evidence approximations: on importance-weighted autoencoders and
        jackknife variational inference. 2018.
    """
    K = len(log_weights)
    if order not in (1, 2) or K <= order:
        raise ValueError(f"order must be 1 or 2 and K larger; got order {order}, K = {K}")
    full = log_mean_exp(log_weights)
    ordered = log_weights.double().sort(0, descending=True).values
    kept = _log_kept(ordered)  # log(1 - w_i / sum of w)
    one = kept.mean(0) + math.log(K / (K - 1))  # L_{K-1} - L_K
    if order == 1:
        return full - ((K - 1) * one).to(full)
    with_largest = (kept[0] + _log_kept(ordered[1:])).sum(0)
    odds = (ordered - ordered.logsumexp(0) - kept)[1:].exp()
    pairs = with_largest + (K - 2) * kept[1:].sum(0) + _sum_over_pairs(odds)
    two = pairs / (K * (K - 1) / 2) + math.log(K / (K - 2))  # L_{K-2} - L_K
    return full + ((K - 2) ** 2 / 2 * two - (K - 1) ** 2 * one).to(full)


def _log_kept(ordered: Tensor) -> Tensor:
    """log(1 - w_i / sum of w) [K, B] of falling log weights, also where the first is all."""
    total = ordered.logsumexp(0)
    rest = torch.log1p(-(ordered[1:] - total).exp())
    return torch.cat([(ordered[1:].logsumexp(0) - total).unsqueeze(0), rest])


def _sum_over_pairs(odds: Tensor) -> Tensor:
    """Sum over pairs i < j of log(1 - o_i o_j) [B], of falling odds [K, B] below one.

    Pairs with one of the largest one by one; for the rest, whose products are below 1 / 64,
    by the series of the logarithm in sums of powers.
    """
    number = min(LARGEST, len(odds))
    total = torch.zeros_like(odds[0])
    for i in range(number):
        total = total + torch.log1p(-odds[i] * odds[i + 1 :]).sum(0)
    small = odds[number:]
    power = small
    for n in range(1, 8):
        total = total - (power.sum(0).square() - power.square().sum(0)) / (2 * n)
        power = power * small
    return total


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Shape [B] of a generalised Pareto fitted to the tail of the weights, of logs [K, B].

    The tail is the largest min(K / 5, 3 sqrt(K)) weights. Below 21 weights there is no tail to
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
