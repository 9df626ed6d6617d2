"""The KL in parts, with a total correlation between groups of latents and one inside each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.aggregate import AggregateObjective
from pyro_vae.objectives.schedules import Schedule

__all__ = ["HierarchicallyFactorized"]


class HierarchicallyFactorized(AggregateObjective):
    r"""ELBO with weights on the dependence between groups of latents and inside them.

    .. math:: \log p(x \mid z) - \alpha \log \frac{q(z \mid x)}{q(z)}
        - \beta \log \frac{q(z)}{\prod_G q(z_G)}
        - \gamma \sum_G \log \frac{q(z_G)}{\prod_{d \in G} q(z_d)}
        - \delta \log \frac{\prod_d q(z_d)}{p(z)}

    averaged over draws of z, with q(z) estimated from the batch. With all weights one it is the
    sampled ELBO, exactly. Without groups it is `BetaTC`. The paper's terms hold p(z) over its
    own dimensions too; under a prior that factorises they are these. Cost: that of `BetaTC`,
    and as much again for the groups.

    Args:
        groups: Dimensions of each group, such as [[0, 1], [2, 3, 4]]; one that is in no group
            is a group of its own.
        alpha: Weight of the mutual information of data and latents.
        beta: Weight of the total correlation between groups.
        gamma: Weight of the total correlation inside groups.
        delta: Weight of the mismatch of the product of q(z_d) with the prior.
        estimator: "stratified", unbiased in q(z), or "weighted".
        num_data: Rows of the training data; None: as `fit` says.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If a weight is negative, a group is empty, or a dimension is in two; on use,
            if a dimension is beyond the latent size, or as `AggregateObjective` says.

    References:
        Esmaeili et al. Structured disentangled representations. 2019.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor
    delta: Tensor

    def __init__(
        self,
        groups: Sequence[Sequence[int]] = (),
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 6.0,
        gamma: float | Schedule = 1.0,
        delta: float | Schedule = 1.0,
        estimator: str = "stratified",
        num_data: int | None = None,
        num_particles: int = 1,
    ) -> None:
        super().__init__(estimator, num_data, num_particles)
        self.groups = [list(group) for group in groups]
        _check(self.groups)
        self.add_weight("alpha", alpha)
        self.add_weight("beta", beta)
        self.add_weight("gamma", gamma)
        self.add_weight("delta", delta)

    def bound(self, d: Densities) -> Tensor:
        """Mean of the weighted terms over draws, [B]."""
        joint, each = self.log_aggregate(d), self.log_marginals(d)
        product = each.sum(-1)
        grouped = self._grouped(d, each)
        information = self.alpha * (d.log_posterior - joint)
        between, inside = self.beta * (joint - grouped), self.gamma * (grouped - product)
        mismatch = self.delta * (product - d.log_prior)
        return (d.log_likelihood - information - between - inside - mismatch).mean(0)

    def _grouped(self, d: Densities, each: Tensor) -> Tensor:
        """Estimates of the sum over groups of log q(z_G) [K, B]."""
        size = each.shape[-1]
        inside = [dim for group in self.groups for dim in group]
        if beyond := [dim for dim in inside if dim >= size]:
            raise ValueError(
                f"groups must hold dimensions from 0 to {size - 1}, the latent size less one; "
                f"got {beyond}: give a larger latent size, or other groups"
            )
        alone = [dim for dim in range(size) if dim not in inside]
        parts = [self.log_aggregate(d, group) for group in self.groups]
        return torch.stack([*parts, *(each[..., dim] for dim in alone)]).sum(0)


def _check(groups: list[list[int]]) -> None:
    dims = [dim for group in groups for dim in group]
    if any(not group for group in groups) or any(dim < 0 for dim in dims):
        raise ValueError(f"groups must be lists of dimensions from 0, none empty; got {groups}")
    if twice := sorted({dim for dim in dims if dims.count(dim) > 1}):
        raise ValueError(f"a dimension must be in one group at most; {twice} is in several")
