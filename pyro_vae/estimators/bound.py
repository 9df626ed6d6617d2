"""The evidence lower bound and its two terms, measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vae.densities import Program, densities
from pyro_vae.estimators.evaluating import evaluating

__all__ = ["Bound", "evidence_lower_bound"]


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
    """
    batch = max(1, chunk_size // num_samples)
    reconstruction, kl, rules = [], [], {}
    with evaluating(model, guide, seed=seed, device=x.device):
        for start in range(0, len(x), batch):
            xb, yb = x[start : start + batch], None if y is None else y[start : start + batch]
            d = densities(model, guide, xb, yb, num_particles=num_samples)
            reconstruction.append(d.log_likelihood.mean(0).double().cpu())
            kl.append(torch.stack(list(d.kl().values())).sum(0).double().cpu())
            rules = d.kl_rules
    first, second = torch.cat(reconstruction), torch.cat(kl)
    return Bound(first - second, first, second, rules)
