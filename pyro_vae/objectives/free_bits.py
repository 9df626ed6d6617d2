"""A KL that is free up to a floor."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.base import Objective, check_kl
from pyro_vae.objectives.schedules import Schedule

__all__ = ["FreeBits"]


class FreeBits(Objective):
    r"""Evidence lower bound whose KL costs at least a floor, so that falling below gains nothing.

    For groups j of latent dimensions, with the average over the batch or without,

    .. math:: \frac1K \sum_{k=1}^K \log p(x_b \mid z_{bk}) - \sum_j \max\Big(\lambda, \,
        \frac1B \sum_{b'=1}^B \mathrm{KL}_{b'j} \Big) \quad\text{or}\quad
        \dots - \sum_j \max(\lambda, \, \mathrm{KL}_{bj})

    Args:
        free_nats: Floor lambda of each group in nats, zero or more; a number or a schedule.
        group_size: Dimensions that share a floor: 1 for each dimension of its own, None for
            each latent site as a whole. Smaller groups than a site need a prior and a posterior
            that factorise over dimensions, and a size that divides theirs.
        on: What has the floor: the mean over the "batch" (as published; the number is then one
            of the batch), or the KL of each "datum".
        kl: "analytic", "sampled", or "auto": analytic where there is a rule for the pair.
        num_particles: Draws of z for each datum, K.

    Raises:
        ValueError: If an argument is out of range; on first use, if `kl` is "analytic" without
            a rule, or the latents cannot be grouped so.

    References:
        Kingma et al. Improved variational inference with inverse autoregressive flow. 2016.
    """

    free_nats: Tensor

    def __init__(
        self,
        free_nats: float | Schedule = 1.0,
        group_size: int | None = None,
        on: str = "batch",
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, or None; got {group_size}")
        if on not in ("batch", "datum"):
            raise ValueError(f"on must be 'batch' or 'datum'; got {on!r}")
        self.add_weight("free_nats", free_nats)
        self.group_size = group_size
        self.on = on
        self.kl = check_kl(kl)
        self.batch_level = on == "batch"

    def bound(self, d: Densities) -> Tensor:
        """Mean reconstruction less the KL above its floors, [B]."""
        kl = self._groups(d)
        if self.on == "batch":
            kl = kl.mean(0).expand_as(kl)
        return d.log_likelihood.mean(0) - torch.maximum(kl, self.free_nats).sum(-1)

    def _groups(self, d: Densities) -> Tensor:
        """KL of each group [B, J]."""
        if self.group_size is None:
            return torch.stack(list(d.kl(self.kl).values()), -1)
        sites = d.kl_by_dimension(self.kl)
        return torch.cat([self._grouped(name, kl) for name, kl in sites.items()], -1)

    def _grouped(self, name: str, kl: Tensor) -> Tensor:
        assert self.group_size is not None
        if kl.shape[-1] % self.group_size:
            raise ValueError(
                f"group_size must divide the {kl.shape[-1]} dimensions of site {name!r}; "
                f"got {self.group_size}"
            )
        return kl.unflatten(-1, (-1, self.group_size)).sum(-1)
