"""Bounds of log p(x) from draws of the guide, or of the prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import unwrap

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_vae.arguments import check_choice
from pyro_vae.densities import (
    Latents,
    Program,
    densities,
    evaluating,
    log_joint,
    log_mean_exp,
    log_weights,
)
from pyro_vae.estimators.coordinates import base_distribution, is_discrete
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.run import check_support, estimator, map_batches, summed
from pyro_vae.estimators.target import CHUNK_ROWS, Compiler
from pyro_vae.runtime import check_fits

MOST_DRAWS = 50_000  # most draws held at once; for more the guide runs again
NUM_LARGEST = 8  # largest weights, whose pairs are summed one by one


@estimator
@summed
def importance_sampling(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 5000,
    chunk_size: int | None = None,
    proposal: str = "guide",
    compile: bool = False,
    devices: int = 1,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    r"""Estimates log p(x) of each datum by importance sampling.

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
        \qquad z_k \sim q(z \mid x)

    The average weight is unbiased for p(x). Its logarithm is too low, by about half its squared
    standard error where that is small, and by much more where the proposal misses a part of the
    posterior. The weights cannot show what was never visited: with the guide or the prior as the
    proposal the result is a lower bound, and its verdict says so. `extras` show whether the bound
    still rises at K ("bound_50" and "bound_500" for K = 5000), and the jackknife's estimates of
    its limit ("jackknife_1", "jackknife_2").

    Weights are at beta = 1 whatever the training, in eval mode. The guide runs once per datum
    (up to 50,000 draws); memory is that of `chunk_size` rows of the model and the draws.

    Args:
        model: Pyro model called with (x) or (x, y), all its sites inside one plate "data"; or
            a VAE, which stands for its model and guide: importance_sampling(vae, x, y).
        guide: Pyro guide called with the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: Condition of each datum [N, C], or None.
        num_samples: Draws K for each datum.
        proposal: "guide", or "prior" for simple Monte Carlo.
        chunk_size: As in `log_evidence`.
        compile: As in `log_evidence`; not for the prior as proposal.
        devices: As in `log_evidence`.
        seed: As in `log_evidence`.
        progress: As in `log_evidence`.

    Returns:
        Evidence of N data, in nats.

    Raises:
        ValueError: If K or `chunk_size` is below one, `proposal` is unknown, or the programs
            have no weight per datum (see `densities`).

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """
    rows = CHUNK_ROWS if chunk_size is None else chunk_size
    check_fits(16 * num_samples, f"{num_samples} draws")
    check_choice(("guide", "prior"), proposal=proposal)
    if proposal == "guide":
        d = check_support(model, guide, x, y, rows)
        sites = {n: s for n, s in d.sites.items() if not is_discrete(s.model)}
        if points := [
            n for n, s in sites.items() if isinstance(base_distribution(s.guide), Delta)
        ]:
            raise ValueError(
                f"the guide is a Delta at {points}, which has no density, so that its weights "
                "bound nothing: use log_evidence, which starts there"
            )
    joint = partial(compiled_joint, Compiler()) if compile else log_joint
    estimate = partial(_estimate, num_samples=num_samples, rows=rows)
    estimate = partial(estimate, proposal=proposal, joint=joint)
    size, title = max(1, rows // num_samples), f"importance sampling, {proposal}"
    parts = map_batches(estimate, model, guide, x, y, size, devices, seed, progress, title)
    return Evidence.cat(parts)


def _estimate(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    num_samples: int,
    rows: int,
    proposal: str,
    joint: Callable[[Program, Tensor, Tensor | None, Latents], Tensor],
) -> Evidence:
    """Returns the evidence of the data of one batch."""
    draw_from = guide if proposal == "guide" else None
    run = partial(log_weights, model, draw_from, x, y, chunk_size=rows, joint=joint)
    blocks = torch.ones(num_samples).split(MOST_DRAWS)
    weights = torch.cat([run(num_particles=len(block)).double().cpu() for block in blocks])
    bounds = convergence(weights).items()
    extras = {f"bound_{k}": bound for k, bound in bounds if k < num_samples}
    for order in range(1, min(3, num_samples)):
        extras[f"jackknife_{order}"] = jackknife(weights, order)
    evidence = summarise(weights, f"importance sampling, {proposal}", "lower bound")
    return replace(evidence, extras=extras)


def compiled_joint(
    compiler: Compiler, model: Program, x: Tensor, y: Tensor | None, latents: Latents
) -> Tensor:
    """Computes `log_joint` without gradients, compiled for the shapes that come often."""

    def joint(x: Tensor, *tensors: Tensor) -> Tensor:
        values = dict(zip(latents, tensors))
        return log_joint(model, x, tensors[-1] if len(tensors) > len(latents) else None, values)

    return compiler(joint, model, x, *latents.values(), *([] if y is None else [y]))


@dataclass(frozen=True, eq=False)
class Bound:
    """The beta = 1 bound of each datum, in nats, on the CPU.

    Attributes:
        elbo: Reconstruction minus KL [N].
        reconstruction: E_q log p(x | z) [N].
        kl: KL(q || p) [N], of all sites.
        rules: How the KL of each site was computed, "analytic" or "sampled".
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor
    rules: dict[str, str]


@estimator
def evidence_lower_bound(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 1,
    chunk_size: int = 1000,
    seed: int | None = 0,
) -> Bound:
    """Estimates ELBO at beta = 1, reconstruction and KL of each datum by `num_samples` draws.

    Args:
        model: Pyro model; see `importance_sampling`.
        guide: Pyro guide.
        x: Data [N, *E].
        y: Condition of each datum [N, C], or None.
        num_samples: Draws of z for each datum.
        chunk_size: Draws times data that the model sees at once.
        seed: Seed of the draws.

    Raises:
        ValueError: If `num_samples` or `chunk_size` is below one, or the programs have no
            density per datum (see `densities`).
    """
    parts, rules = [], {}
    with evaluating(model, guide, seed=seed, device=x.device):
        for rows in torch.arange(len(x), device=x.device).split(max(1, chunk_size // num_samples)):
            args = x[rows], None if y is None else y[rows]
            total = torch.zeros(2, len(rows), dtype=torch.float64)
            for chunk in torch.ones(num_samples).split(max(1, chunk_size // len(rows))):
                d = densities(model, guide, *args, num_particles=len(chunk))
                if d.num_data != len(rows):
                    raise ValueError(
                        f"the plate 'data' has {d.num_data} rows for {len(rows)} data: an "
                        "estimate for each datum needs all of them; remove the subsampling"
                    )
                kl = torch.stack(list(d.kl().values())).sum(0)
                terms = torch.stack([d.log_likelihood.mean(0), kl])
                total += len(chunk) / num_samples * terms.double().cpu()
                rules = d.kl_rules
            parts.append(total)
    reconstruction, kl = torch.cat(parts, -1)
    return Bound(reconstruction - kl, reconstruction, kl, rules)


unchecked_lower_bound = unwrap(evidence_lower_bound)  # for data that were checked already


def convergence(log_weights: Tensor) -> dict[int, Tensor]:
    r"""Returns the bound :math:`\mathbb{E} \log \frac1k \sum_{i=1}^k w_i` [B] at several k.

    These are k = K/100, K/10 and K, without those below one. The bound is averaged over the K // k
    disjoint blocks of the log weights [K, B]. If it still rises from k to 10 k, it has not
    converged.
    """
    K = len(log_weights)
    sizes = sorted({k for k in (K // 100, K // 10, K) if k > 0})
    blocks = {k: log_weights[: K - K % k].unflatten(0, (-1, k)) for k in sizes}
    return {k: (block.logsumexp(1) - math.log(k)).mean(0) for k, block in blocks.items()}


def jackknife(log_weights: Tensor, order: int = 1) -> Tensor:
    r"""Estimates log p(x) [B] by the jackknife, with a bias of order 1 / K^(order + 1).

    .. math:: K L_K - (K - 1) L_{K-1}, \qquad
        \tfrac12 K^2 L_K - (K - 1)^2 L_{K-1} + \tfrac12 (K - 2)^2 L_{K-2}

    where L_K is `log_mean_exp`, and the others are its averages over all subsets that leave one
    or two weights out: exactly, at a cost that is linear in K. It is no bound, and of no use
    unless the variance of the relative weights is small compared to K.

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
    log_others = _log_share_of_others(ordered)  # log(1 - w_i / sum of w)
    leave_one_out = log_others.mean(0) + math.log(K / (K - 1))  # L_{K-1} - L_K
    if order == 1:
        return full - ((K - 1) * leave_one_out).to(full)
    with_largest = (log_others[0] + _log_share_of_others(ordered[1:])).sum(0)
    odds = (ordered - ordered.logsumexp(0) - log_others)[1:].exp()
    pairs = with_largest + (K - 2) * log_others[1:].sum(0) + _sum_over_pairs(odds)
    leave_two_out = pairs / (K * (K - 1) / 2) + math.log(K / (K - 2))  # L_{K-2} - L_K
    return full + ((K - 2) ** 2 / 2 * leave_two_out - (K - 1) ** 2 * leave_one_out).to(full)


def _log_share_of_others(ordered: Tensor) -> Tensor:
    """Returns log(1 - w_i / sum of w) [K, B] of falling log weights, exact for the first too."""
    total = ordered.logsumexp(0)
    rest = torch.log1p(-(ordered[1:] - total).exp())
    return torch.cat([(ordered[1:].logsumexp(0) - total).unsqueeze(0), rest])


def _sum_over_pairs(odds: Tensor) -> Tensor:
    """Returns the sum over pairs i < j of log(1 - o_i o_j) [B], of falling odds [K, B] below one.

    Pairs with one of the largest odds are summed one by one; the others, whose products are below
    1 / 64, by the series of the logarithm, from sums of powers.
    """
    number = min(NUM_LARGEST, len(odds))
    total = torch.zeros_like(odds[0])
    for i in range(number):
        total = total + torch.log1p(-odds[i] * odds[i + 1 :]).sum(0)
    small = odds[number:]
    power = small
    for n in range(1, 8):
        total = total - (power.sum(0).square() - power.square().sum(0)) / (2 * n)
        power = power * small
    return total
