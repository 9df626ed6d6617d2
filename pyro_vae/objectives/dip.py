"""Decorrelated latents by their first two moments."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.marginals import marginals
from pyro_vae.objectives.base import Objective, check_kl, total_kl
from pyro_vae.objectives.latent import only_site
from pyro_vae.objectives.schedules import Schedule

__all__ = ["DIP"]


class DIP(Objective):
    r"""ELBO less the distance of the latents' covariance from the identity.

    .. math:: \mathrm{ELBO} - \lambda_{od} \sum_{i \neq j} C_{ij}^2
        - \lambda_d \sum_i (C_{ii} - 1)^2

    with C the covariance over the batch (divisor B) of the posterior means in kind "I"; in kind
    "II" that of z, which adds the mean of the posterior covariances. A batch estimates C with
    an error of order 1 / sqrt(B), so the penalty is biased upwards. With both weights zero it
    is the ELBO, exactly.

    Args:
        off_diagonal: Weight of the squared covariances.
        diagonal: Weight of the squared distances of the variances from one; the paper takes
            10 times the other weight for "I" and the same for "II".
        kind: "I" or "II".
        kl: As in `ELBO`.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If a weight is negative or `kind` unknown; on use, if there are several
            latent sites or the moments of the guide are not known, as for a flow.

    References:
        Kumar, Sattigeri and Balakrishnan. Variational inference of disentangled latent concepts
        from unlabeled observations. 2018.
    """

    batch_level = True
    off_diagonal: Tensor
    diagonal: Tensor

    def __init__(
        self,
        off_diagonal: float | Schedule = 10.0,
        diagonal: float | Schedule = 10.0,
        kind: str = "II",
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        if kind not in ("I", "II"):
            raise ValueError(f"kind must be 'I' or 'II'; got {kind!r}")
        self.add_weight("off_diagonal", off_diagonal)
        self.add_weight("diagonal", diagonal)
        self.kind, self.kl = kind, check_kl(kl)

    def bound(self, d: Densities) -> Tensor:
        """The ELBO less the penalty, [B]."""
        covariance = self.covariance(d)
        variance = covariance.diagonal()
        off = covariance.pow(2).sum() - variance.pow(2).sum()
        penalty = self.off_diagonal * off + self.diagonal * (variance - 1).pow(2).sum()
        return d.log_likelihood.mean(0) - total_kl(d, self.kl) - penalty

    def covariance(self, d: Densities) -> Tensor:
        """C [D, D] of the batch."""
        q = only_site(d).guide
        each = marginals(q)
        means = each.loc.flatten(0, -2)
        centred = means - means.mean(0)  # torch.cov looks at the values, which stops a trace
        between = centred.T @ centred / len(means)
        if self.kind == "I":
            return between
        full = getattr(q, "covariance_matrix", None)
        inside = torch.diag_embed(each.variance) if full is None else full
        return between + inside.flatten(0, -3).mean(0)
