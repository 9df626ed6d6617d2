"""log p(x) by importance sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pyro_vae.densities import Latents, Program, log_joint, log_weights
from pyro_vae.estimators.batches import check_support, map_batches
from pyro_vae.estimators.diagnostics import (
    convergence,
    effective_sample_size,
    jackknife,
    log_mean_exp,
    log_mean_exp_stderr,
    pareto_khat,
)
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.fast import CompiledJoint
from pyro_vae.estimators.given import estimator
from pyro_vae.estimators.target import ROWS
from pyro_vae.memory import check_fits

__all__ = ["importance_sampling", "summarise"]

DRAWS = 50_000  # draws held at once: more run the guide again


@estimator
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
        chunk_size: Draws times data that the model sees at once; the result does not depend
            on it but through the noise.
        proposal: "guide", or "prior" for simple Monte Carlo.
        compile: Whether to compile log p(x, z): some seconds once, less time for each datum
            then; the result is the same to rounding. Not for the prior as proposal.
        devices: Processes that share the data, on CPUs or on the first GPUs, as x is; the result
            is that of one. They are started for this: a script must call under
            `if __name__ == "__main__":`, with methods of a module that can be pickled.
        seed: Of the draws.
        progress: Whether to show a progress bar.

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
        check_support(model, guide, x, y, rows)
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


def summarise(log_weights: Tensor, method: str, verdict: str) -> Evidence:
    """Evidence of B data from all their log weights [K, B], with one logsumexp.

    Raises:
        ValueError: If a weight is NaN or infinitely large.
    """
    if not bool((log_weights < torch.inf).all()):
        bad = (~(log_weights < torch.inf)).any(0).nonzero().flatten().tolist()
        raise ValueError(f"importance weights of data {bad[:5]} are NaN or infinite")
    K, B = log_weights.shape
    return Evidence(
        log_prob=log_mean_exp(log_weights),
        stderr=log_mean_exp_stderr(log_weights),
        ess=effective_sample_size(log_weights),
        khat=pareto_khat(log_weights),
        num_samples=torch.full((B,), K),
        method=[method] * B,
        verdict=[verdict] * B,
    )


def _extras(log_weights: Tensor) -> dict[str, Tensor]:
    """The bound at fewer samples and the jackknife, as far as K allows."""
    K = len(log_weights)
    bounds = {f"bound_{k}": bound for k, bound in convergence(log_weights).items() if k < K}
    orders = [order for order in (1, 2) if order < K]
    return bounds | {f"jackknife_{order}": jackknife(log_weights, order) for order in orders}
