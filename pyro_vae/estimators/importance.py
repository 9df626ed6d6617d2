"""Bounds of log p(x) from draws of the guide, or of the prior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import unwrap

import torch
from torch import Tensor

from pyro_vae.densities import Latents, Program, densities, evaluating, log_joint, log_weights
from pyro_vae.estimators.compiled import CompiledJoint
from pyro_vae.estimators.coordinates import is_delta, is_discrete
from pyro_vae.estimators.diagnostics import convergence, jackknife
from pyro_vae.estimators.evidence import Evidence, summarise
from pyro_vae.estimators.run import check_support, estimator, map_batches
from pyro_vae.estimators.target import ROWS
from pyro_vae.estimators.values import summed
from pyro_vae.runtime import check_fits

__all__ = ["Bound", "evidence_lower_bound", "importance_sampling", "lower_bound"]

DRAWS = 50_000  # draws held at once: more run the guide again


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
    r"""log p(x) of each datum by importance sampling.

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
        \qquad z_k \sim q(z \mid x)

    The average weight is unbiased for p(x); its logarithm is low, by about half its squared
    standard error where that is small, and by much more where the proposal misses a part of
    the posterior. Nothing in the weights shows what was never visited: with the guide or the
    prior as the proposal the result is a lower bound, and its verdict says so. What can be seen
    is in `extras`: whether the bound still rises at K ("bound_50" and "bound_500" beside 5000),
    and the jackknife's guess of where it goes ("jackknife_1", "jackknife_2").

    Weights are at beta = 1 whatever the training, in eval mode. The guide runs once per datum
    (up to 50,000 draws); memory is that of `chunk_size` rows of the model and the draws.

    Args:
        model: Pyro model of (x) or (x, y), all its sites inside one plate "data"; or a VAE,
            which stands for its model and guide: importance_sampling(vae, x, y).
        guide: Pyro guide of the same arguments.
        x: Data [N, *E], a tensor, array, frame or list; as is y.
        y: What is conditioned on [N, C], or None.
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
    rows = ROWS if chunk_size is None else chunk_size
    check_fits(16 * num_samples, f"{num_samples} draws")
    if proposal not in ("guide", "prior"):
        raise ValueError(f"proposal must be 'guide' or 'prior'; got {proposal!r}")
    if proposal == "guide":
        d = check_support(model, guide, x, y, rows)
        sites = {name: site for name, site in d.sites.items() if is_delta(site.guide)}
        if points := [name for name, site in sites.items() if not is_discrete(site.model)]:
            raise ValueError(
                f"the guide is a Delta at {points}, which has no density, so that its weights "
                "bound nothing: use log_evidence, which starts there"
            )
    joint = CompiledJoint() if compile else log_joint
    parts = map_batches(
        partial(_estimate, num_samples=num_samples, rows=rows, proposal=proposal, joint=joint),
        model,
        guide,
        x,
        y,
        size=max(1, rows // num_samples),
        seed=seed,
        devices=devices,
        progress=progress,
        title=f"importance sampling, {proposal}",
    )
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
    """Evidence of the data of one batch."""
    draw_from = guide if proposal == "guide" else None
    blocks = []
    for done in range(0, num_samples, DRAWS):
        draws = min(DRAWS, num_samples - done)
        weights = log_weights(
            model, draw_from, x, y, num_particles=draws, chunk_size=rows, joint=joint
        )
        blocks.append(weights.double().cpu())
    weights = torch.cat(blocks)
    evidence = summarise(weights, f"importance sampling, {proposal}", "lower bound")
    return replace(evidence, extras=_extras(weights))


def _extras(log_weights: Tensor) -> dict[str, Tensor]:
    """The bound at fewer samples and the jackknife, as far as K allows."""
    K = len(log_weights)
    bounds = {f"bound_{k}": bound for k, bound in convergence(log_weights).items() if k < K}
    orders = [order for order in (1, 2) if order < K]
    return bounds | {f"jackknife_{order}": jackknife(log_weights, order) for order in orders}


@dataclass(frozen=True, eq=False)
class Bound:
    """The beta = 1 bound of each datum, in nats, on the CPU.

    Attributes:
        elbo: Reconstruction less KL [N].
        reconstruction: E_q log p(x | z) [N].
        kl: KL(q || p) [N], of all sites.
        rules: How the KL of each site was had, "analytic" or "sampled".
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
    """ELBO at beta = 1, reconstruction and KL of each datum, from `num_samples` draws.

    Args:
        model: Pyro model; see `importance_sampling`.
        guide: Pyro guide.
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
        num_samples: Draws of z for each datum.
        chunk_size: Draws times data that the model sees at once.
        seed: Of the draws.

    Raises:
        ValueError: If `num_samples` or `chunk_size` is below one, or the programs have no
            density per datum (see `densities`).
    """
    batch = max(1, chunk_size // num_samples)
    parts, rules = [], {}
    with evaluating(model, guide, seed=seed, device=x.device):
        for start in range(0, len(x), batch):
            xb, yb = x[start : start + batch], None if y is None else y[start : start + batch]
            step = max(1, chunk_size // len(xb))
            total = torch.zeros(2, len(xb), dtype=torch.float64)
            for done in range(0, num_samples, step):
                draws = min(step, num_samples - done)
                d = densities(model, guide, xb, yb, num_particles=draws)
                if d.num_data != len(xb):
                    raise ValueError(
                        f"the plate 'data' has {d.num_data} rows for {len(xb)} data: an estimate "
                        "for each datum needs all of them; remove the subsampling"
                    )
                kl = torch.stack(list(d.kl().values())).sum(0)
                terms = torch.stack([d.log_likelihood.mean(0), kl])
                total += draws / num_samples * terms.double().cpu()
                rules = d.kl_rules
            parts.append(total)
    reconstruction, kl = torch.cat(parts, -1)
    return Bound(reconstruction - kl, reconstruction, kl, rules)


lower_bound = unwrap(evidence_lower_bound)  # of what is known to be data
