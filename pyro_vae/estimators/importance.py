"""log p(x) by importance sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.densities import Program, log_weights
from pyro_vae.estimators.diagnostics import (
    effective_sample_size,
    log_mean_exp,
    log_mean_exp_stderr,
    pareto_khat,
)
from pyro_vae.estimators.evaluating import evaluating
from pyro_vae.estimators.evidence import Evidence

__all__ = ["importance_sampling", "summarise"]

ROWS = 1000  # rows decoded at once: from 250 to 2500 are equally fast, more falls out of cache
DRAWS = 50_000  # draws held at once: more run the guide again


def importance_sampling(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_samples: int = 5000,
    chunk_size: int | None = None,
    proposal: str = "guide",
    seed: int | None = 0,
) -> Evidence:
    r"""log p(x) of each datum by importance sampling.

    .. math:: \log p(x) \approx \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)},
        \qquad z_k \sim q(z \mid x)

    The average weight is unbiased for p(x); its logarithm is low, by about half its squared
    standard error where that is small, and by much more where the proposal misses a part of
    the posterior. Nothing in the weights shows what was never visited: with the guide or the
    prior as the proposal the result is a lower bound, and its verdict says so.

    Weights are at beta = 1 whatever the training, in eval mode. The guide runs once per datum
    (up to 50,000 draws); memory is that of `chunk_size` rows of the model and the draws.

    Args:
        model: Pyro model of (x) or (x, y), all its sites inside one plate "data".
        guide: Pyro guide of the same arguments.
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
        num_samples: Draws K for each datum.
        chunk_size: Draws times data that the model sees at once; the result does not depend
            on it but through the noise.
        proposal: "guide", or "prior" for simple Monte Carlo.
        seed: Of the draws.

    Returns:
        Evidence of N data, in nats.

    Raises:
        ValueError: If K or `chunk_size` is below one, `proposal` is unknown, or the programs
            have no weight per datum (see `densities`).

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """
    rows = ROWS if chunk_size is None else chunk_size
    if num_samples < 1 or rows < 1:
        raise ValueError(
            f"num_samples and chunk_size must be at least 1; got {num_samples} and {rows}"
        )
    if proposal not in ("guide", "prior"):
        raise ValueError(f"proposal must be 'guide' or 'prior'; got {proposal!r}")
    draw_from = guide if proposal == "guide" else None
    method = f"importance sampling, {proposal}"
    batch = max(1, rows // num_samples)
    parts = []
    with evaluating(model, guide, seed=seed, device=x.device):
        for start in range(0, len(x), batch):
            xb, yb = x[start : start + batch], None if y is None else y[start : start + batch]
            blocks = []
            for done in range(0, num_samples, DRAWS):
                draws = min(DRAWS, num_samples - done)
                weights = log_weights(
                    model, draw_from, xb, yb, num_particles=draws, chunk_size=rows
                )
                blocks.append(weights.double().cpu())
            parts.append(summarise(torch.cat(blocks), method, "lower bound"))
    return Evidence.cat(parts)


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
