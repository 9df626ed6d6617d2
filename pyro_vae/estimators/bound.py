"""The evidence lower bound and its two terms, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.densities import Program, densities
from pyro_vae.densities.evaluating import evaluating
from pyro_vae.estimators.given import estimator

__all__ = ["Bound", "evidence_lower_bound", "lower_bound"]


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
    return lower_bound(
        model, guide, x, y, num_samples=num_samples, chunk_size=chunk_size, seed=seed
    )


def lower_bound(
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    num_samples: int = 1,
    chunk_size: int = 1000,
    seed: int | None = 0,
) -> Bound:
    """As `evidence_lower_bound`, of what is known to be data."""
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
