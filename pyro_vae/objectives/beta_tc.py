"""The KL in three parts, each with its weight."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities
from pyro_vae.objectives.aggregate import AggregateObjective
from pyro_vae.objectives.schedules import Schedule

__all__ = ["BetaTC"]


class BetaTC(AggregateObjective):
    r"""ELBO with weights on mutual information, total correlation and dimension-wise KL.

    .. math:: \log p(x \mid z) - \alpha \log \frac{q(z \mid x)}{q(z)}
        - \beta \log \frac{q(z)}{\prod_d q(z_d)} - \gamma \log \frac{\prod_d q(z_d)}{p(z)}

    averaged over draws of z, with q(z) estimated from the batch. With all weights one it is the
    sampled ELBO, exactly, whatever the estimator. The three parts are biased as numbers (see
    `estimator_weights`): read them off `metrics.elbo_decomposition`, not off this bound. Under
    a prior that does not factorise the last part is the whole mismatch of q(z_1) ... q(z_D)
    with p(z). Cost: B^2 D densities for each of K draws.

    Args:
        alpha: Weight of the mutual information of data and latents.
        beta: Weight of the total correlation.
        gamma: Weight of the dimension-wise KL.
        estimator: "stratified", unbiased in q(z), or "weighted".
        num_data: Rows of the training data; None: as `fit` says.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If a weight is negative, or as `AggregateObjective` says.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
    """

    alpha: Tensor
    beta: Tensor
    gamma: Tensor

    def __init__(
        self,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 6.0,
        gamma: float | Schedule = 1.0,
        estimator: str = "stratified",
        num_data: int | None = None,
        num_particles: int = 1,
    ) -> None:
        super().__init__(estimator, num_data, num_particles)
        self.add_weight("alpha", alpha)
        self.add_weight("beta", beta)
        self.add_weight("gamma", gamma)

    def bound(self, d: Densities) -> Tensor:
        """Mean of the weighted terms over draws, [B]."""
        joint, product = self.log_aggregate(d), self.log_marginals(d).sum(-1)
        information = d.log_posterior - joint
        correlation = joint - product
        mismatch = product - d.log_prior
        penalty = self.alpha * information + self.beta * correlation + self.gamma * mismatch
        return (d.log_likelihood - penalty).mean(0)
