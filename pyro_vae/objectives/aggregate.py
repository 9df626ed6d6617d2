"""Objectives of the aggregate posterior q(z), which they estimate from a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Adam, Optimizer

from pyro_vae.arguments import as_plain, check_choice, check_real, check_whole
from pyro_vae.densities import Densities
from pyro_vae.marginals import marginals, pair_log_prob, pair_marginals
from pyro_vae.objectives.base import AverageGradients, Objective, draws, only_site
from pyro_vae.objectives.schedules import Schedule


def estimator_weights(
    estimator: str, batch_size: int, num_data: int, like: Tensor | None = None
) -> Tensor:
    r"""Returns weights w [B, B] for :math:`\hat q(z_i) = \sum_j w_{ij} q(z_i \mid x_j)`.

    - "weighted": :math:`1 / (N B)` everywhere. The estimate is far too low: by a factor B where
      the q(z | x_n) do not overlap, by a factor N where they coincide. A sum of several
      logarithms, such as a total correlation, has this error in each of them.
    - "stratified": :math:`1 / N` for the datum that z was drawn from, and
      :math:`(N - 1) / (N (B - 1))` for each other one, so that :math:`E[\hat q(z)] = q(z)` over
      batches. Its logarithm is still too low on average, by Jensen's inequality. Chen et al.
      give one of the others, the last, a weight of its own. These weights are the average of
      theirs over all orders of the batch: as unbiased, with less variance.

    A batch of one row tells nothing of the other data: w = 1.

    Args:
        estimator: "weighted" or "stratified".
        batch_size: B.
        num_data: N, at least B.
        like: A tensor of the wanted type and device; those of torch's default if None.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
        Esmaeili et al. Structured disentangled representations. 2019.
    """
    B, N = batch_size, num_data
    weights = torch.empty(B, B) if like is None else like.new_empty(B, B)
    if B == 1:
        return weights.fill_(1.0)
    if estimator == "weighted":
        return weights.fill_(1 / (N * B))
    return weights.fill_((N - 1) / (N * (B - 1))).fill_diagonal_(1 / N)


class BetaTC(Objective):
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
        estimator: "stratified", unbiased in q(z), or "weighted": see `estimator_weights`.
        num_data: Rows N of the training data. None: the number that `prepare` was given, else the
            size of the plate "data", which is the batch's own unless it is subsampled.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If a weight is negative or the estimator unknown; on use, if N is below the
            rows of the batch, there are several latent sites, or the guide's densities of
            single dimensions are not known.

    References:
        Chen et al. Isolating sources of disentanglement in variational autoencoders. 2018.
    """

    batch_level = True

    def __init__(
        self,
        alpha: float | Schedule = 1.0,
        beta: float | Schedule = 6.0,
        gamma: float | Schedule = 1.0,
        estimator: str = "stratified",
        num_data: int | None = None,
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles)
        check_choice(("stratified", "weighted"), estimator=estimator)
        check_whole(optional=True, num_data=num_data)
        self.estimator, self.num_data = estimator, num_data
        self._prepared_num_data: int | None = None
        self.alpha = self.add_weight("alpha", alpha)
        self.beta = self.add_weight("beta", beta)
        self.gamma = self.add_weight("gamma", gamma)

    def prepare(self, num_data: int, steps_per_epoch: int) -> None:
        """Sets the number of training data, unless `num_data` was given."""
        super().prepare(num_data, steps_per_epoch)
        self._prepared_num_data = num_data

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean of the weighted terms over draws, [B]."""
        joint, product = self.log_aggregate(d), self.log_marginals(d).sum(-1)
        information = d.log_posterior - joint
        correlation = joint - product
        mismatch = product - d.log_prior
        penalty = self.alpha * information + self.beta * correlation + self.gamma * mismatch
        return (d.log_likelihood - penalty).mean(0)

    def log_marginals(self, d: Densities) -> Tensor:
        """Returns estimates of log q(z_d) [K, B, D], in nats."""
        return self._log_weighted_sum(d, pair_marginals(only_site(d).guide, draws(d)))

    def log_aggregate(self, d: Densities, dims: Sequence[int] | None = None) -> Tensor:
        """Returns estimates of log q(z) [K, B], or of log q(z_G) of the dimensions `dims`."""
        return self._log_weighted_sum(d, pair_log_prob(only_site(d).guide, draws(d), dims))

    def _log_weighted_sum(self, d: Densities, log_prob: Tensor) -> Tensor:
        """Returns the log of the weighted sum over data, the third dimension of `log_prob`."""
        weights = estimator_weights(self.estimator, d.num_data, self._data_size(d), log_prob)
        log_weights = weights.log().reshape(*weights.shape, *[1] * (log_prob.ndim - 3))
        return (log_prob + log_weights).logsumexp(2)

    def _data_size(self, d: Densities) -> int:
        size = self.num_data or self._prepared_num_data or round(d.scale * d.num_data)
        if size < d.num_data:
            raise ValueError(
                f"num_data must be at least the {d.num_data} rows of the batch; got {size}: "
                "give the number of training data"
            )
        return size


class HierarchicallyFactorized(BetaTC):
    r"""ELBO with weights on the dependence between groups of latents and inside them.

    .. math:: \log p(x \mid z) - \alpha \log \frac{q(z \mid x)}{q(z)}
        - \beta \log \frac{q(z)}{\prod_G q(z_G)}
        - \gamma \sum_G \log \frac{q(z_G)}{\prod_{d \in G} q(z_d)}
        - \delta \log \frac{\prod_d q(z_d)}{p(z)}

    averaged over draws of z, with q(z) estimated from the batch. With all weights one it is the
    sampled ELBO, exactly. Without groups it is `BetaTC`. The paper's terms contain p(z) and its
    marginals too; under a prior that factorises they equal these. Cost: that of `BetaTC`, and
    as much again for the groups.

    Args:
        groups: Dimensions of each group, such as [[0, 1], [2, 3, 4]]; one that is in no group
            is a group of its own.
        alpha: Weight of the mutual information of data and latents.
        beta: Weight of the total correlation between groups.
        gamma: Weight of the total correlation inside groups.
        delta: Weight of the mismatch of the product of q(z_d) with the prior.
        estimator: As in `BetaTC`.
        num_data: As in `BetaTC`.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If a group is empty, or a dimension is in two; on use, if a dimension is
            beyond the latent size; or as `BetaTC` says.

    References:
        Esmaeili et al. Structured disentangled representations. 2019.
    """

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
        super().__init__(alpha, beta, gamma, estimator, num_data, num_particles)
        self.delta = self.add_weight("delta", delta)
        plain = [as_plain(group) for group in groups]
        self.groups = [list(group) if isinstance(group, Sequence) else [] for group in plain]
        dims = [dim for group in self.groups for dim in group]
        if not all(self.groups) or not all(isinstance(dim, int) and dim >= 0 for dim in dims):
            raise ValueError(
                "groups must be lists of dimensions from 0, none empty, such as [[0, 1], [2]]; "
                f"got {list(groups)}"
            )
        if repeated := sorted({dim for dim in dims if dims.count(dim) > 1}):
            raise ValueError(f"a dimension must be in one group at most; {repeated} is in several")

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean of the weighted terms over draws, [B]."""
        joint, log_marginals = self.log_aggregate(d), self.log_marginals(d)
        in_groups = [dim for group in self.groups for dim in group]
        size = log_marginals.shape[-1]
        if beyond := [dim for dim in in_groups if dim >= size]:
            raise ValueError(
                f"groups must hold dimensions from 0 to {size - 1}, the latent size less one; "
                f"got {beyond}: give a larger latent size, or other groups"
            )
        parts = [self.log_aggregate(d, group) for group in self.groups]
        parts += [log_marginals[..., dim] for dim in range(size) if dim not in in_groups]
        product, grouped = log_marginals.sum(-1), torch.stack(parts).sum(0)
        information = self.alpha * (d.log_posterior - joint)
        between, within = self.beta * (joint - grouped), self.gamma * (grouped - product)
        mismatch = self.delta * (product - d.log_prior)
        return (d.log_likelihood - information - between - within - mismatch).mean(0)


class DIP(Objective):
    r"""ELBO minus the squared distance of the latents' covariance from the identity.

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

    def __init__(
        self,
        off_diagonal: float | Schedule = 10.0,
        diagonal: float | Schedule = 10.0,
        kind: str = "II",
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles, kl)
        check_choice(("I", "II"), kind=kind)
        self.off_diagonal = self.add_weight("off_diagonal", off_diagonal)
        self.diagonal = self.add_weight("diagonal", diagonal)
        self.kind = kind

    def bound(self, d: Densities) -> Tensor:
        """Returns the ELBO minus the penalty, [B]."""
        covariance = self.covariance(d)
        variance = covariance.diagonal()
        off = covariance.pow(2).sum() - variance.pow(2).sum()
        penalty = self.off_diagonal * off + self.diagonal * (variance - 1).pow(2).sum()
        return d.log_likelihood.mean(0) - self.total_kl(d) - penalty

    def covariance(self, d: Densities) -> Tensor:
        """Returns the covariance C [D, D] of the batch."""
        q = only_site(d).guide
        each = marginals(q)
        means = each.loc.flatten(0, -2)
        centred = means - means.mean(0)  # torch.cov reads values, which cannot be traced
        between = centred.T @ centred / len(means)
        if self.kind == "I":
            return between
        full = getattr(q, "covariance_matrix", None)
        within = torch.diag_embed(each.variance) if full is None else full
        return between + within.flatten(0, -3).mean(0)


class InfoVAE(Objective):
    r"""Log likelihood, minus a KL for each datum and a divergence of q(z) from p(z).

    .. math:: E_q \log p(x \mid z) - (1 - \alpha) \, \mathrm{KL}(q(z \mid x) \| p(z))
        - (\alpha + \lambda - 1) \, \mathrm{MMD}(q(z), p(z))

    with the squared maximum mean discrepancy (MMD) of a Gaussian kernel, between the draws of
    the batch and as many draws of the prior. Pairs of draws of one datum are left out, so that
    it is unbiased for any number of particles. With alpha = 0 and lambda = 1 it is the ELBO,
    exactly; with alpha = 1 the MMD-VAE. A learned prior learns from the KL alone, for its draws
    carry no gradient. Cost: (K B)^2 kernels, three times.

    Args:
        alpha: Amount, from 0 to 1, by which the weight of the KL is lowered.
        divergence: Lambda above, at least 1.
        bandwidth: Standard deviation of the kernel; None: sqrt(D), for which prior draws of unit
            variance have a kernel of about 1 / e.
        kl: As in `ELBO`.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If an option is out of its range; on use, if there are several latent sites.

    References:
        Zhao, Song and Ermon. InfoVAE: balancing learning and inference in variational
        autoencoders. 2019.
        Gretton et al. A kernel two-sample test. 2012.
    """

    batch_level = True

    def __init__(
        self,
        alpha: float | Schedule = 0.5,
        divergence: float | Schedule = 100.0,
        bandwidth: float | None = None,
        kl: str = "auto",
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles, kl)
        check_real(above=0, optional=True, bandwidth=bandwidth)
        self.alpha = self.add_weight("alpha", alpha, most=1.0)
        self.divergence = self.add_weight("divergence", divergence, least=1.0)
        self.bandwidth = bandwidth

    def bound(self, d: Densities) -> Tensor:
        """Returns the mean log likelihood minus both penalties, [B]."""
        z = draws(d)
        prior = only_site(d).model.sample().reshape(z.shape)
        gap = mmd(z, prior, self.bandwidth or z.shape[-1] ** 0.5)
        weight = self.alpha + self.divergence - 1
        penalty = (1 - self.alpha) * self.total_kl(d) + weight * gap
        return d.log_likelihood.mean(0) - penalty


def mmd(first: Tensor, second: Tensor, bandwidth: float) -> Tensor:
    r"""Returns the unbiased squared MMD of two distributions, from draws [K, B, D].

    .. math:: E[k(z, z')] + E[k(w, w')] - 2 E[k(z, w)], \quad
        k(z, w) = \exp\big(-\|z - w\|^2 / (2 h^2)\big)

    over pairs from different data, as only these are independent. It is zero for a single
    datum, which has no such pair.
    """
    if first.shape[1] == 1:
        return first.new_zeros(())
    within = sum(_mean_kernel(part, part, bandwidth) for part in (first, second))
    return within - 2 * _mean_kernel(first, second, bandwidth)


def _mean_kernel(first: Tensor, second: Tensor, bandwidth: float) -> Tensor:
    K, B, _ = first.shape
    pairs = first.flatten(0, 1).unsqueeze(1) - second.flatten(0, 1)
    kernel = torch.exp(-pairs.pow(2).sum(-1) / (2 * bandwidth**2)).view(K, B, K, B)
    same = kernel.diagonal(dim1=1, dim2=3)
    return (kernel.sum() - same.sum()) / (K * K * B * (B - 1))


class FactorVAE(Objective):
    r"""ELBO minus a discriminator's estimate of the total correlation.

    .. math:: \mathrm{ELBO} - \gamma \, E_{q(z)} \log \frac{D(z)}{1 - D(z)}

    D tells draws of q(z) from draws whose dimensions are each permuted over the batch, which
    come from the product of the q(z_d). For the best D the logarithm is that of the ratio of the
    two densities; a D that lags behind makes the penalty too small. With gamma = 0 it is the
    ELBO, exactly. The guide may be any.

    `fit` trains D after each step of the model, on the same draws (the paper permutes a second
    batch). In a loop of one's own: `start(d)` once, then `after_step(d)` after each step.

    Args:
        gamma: Weight of the total correlation.
        kl: As in `ELBO`.
        width: Units of each of the discriminator's hidden layers.
        layers: Number of the discriminator's hidden layers.
        adversary_lr: Learning rate of the discriminator's Adam, of decays 0.5 and 0.9.
        num_particles: Draws of z for each datum.

    Raises:
        ValueError: If an option is out of its range; on use, if `start` was not called, or in
            `pyro.infer.SVI`, which does not train D.

    References:
        Kim and Mnih. Disentangling by factorising. 2018.
    """

    batch_level = True
    own_step = True

    def __init__(
        self,
        gamma: float | Schedule = 10.0,
        kl: str = "auto",
        width: int = 1000,
        layers: int = 5,
        adversary_lr: float = 1e-4,
        num_particles: int = 1,
    ) -> None:
        super().__init__(num_particles, kl)
        check_whole(width=width, layers=layers)
        check_real(above=0, adversary_lr=adversary_lr)
        self.gamma = self.add_weight("gamma", gamma)
        self.width, self.layers, self.adversary_lr = width, layers, adversary_lr
        self.discriminator: nn.Module | None = None
        self.adversary: Optimizer | None = None  # optimiser of the discriminator

    def start(self, d: Densities) -> None:
        """Creates a discriminator for the latent size of `d`, and its optimiser."""
        z = draws(d)
        sizes = [z.shape[-1], *[self.width] * self.layers]
        hidden = [
            layer
            for inner, outer in zip(sizes, sizes[1:])
            for layer in (nn.Linear(inner, outer), nn.LeakyReLU(0.2))
        ]
        self.discriminator = nn.Sequential(*hidden, nn.Linear(self.width, 1)).to(z)
        weights = self.discriminator.parameters()
        self.adversary = Adam(weights, lr=self.adversary_lr, betas=(0.5, 0.9))

    def after_step(self, d: Densities, average: AverageGradients | None = None) -> None:
        """Trains the discriminator by one step, on the draws of `d`."""
        network = self._network()
        assert self.adversary is not None
        self.adversary_loss(d).backward()
        if average is not None:
            average(list(network.parameters()))
        self.adversary.step()
        self.adversary.zero_grad()

    def get_extra_state(self) -> dict[str, Any] | None:
        """Returns the state of the discriminator's optimiser, or None."""
        return None if self.adversary is None else self.adversary.state_dict()

    def set_extra_state(self, state: dict[str, Any] | None) -> None:
        """Restores the state of the discriminator's optimiser, if there is one."""
        if self.adversary is not None and state is not None:
            self.adversary.load_state_dict(state)

    def bound(self, d: Densities) -> Tensor:
        """Returns the ELBO minus gamma times the estimated log ratio, [B]."""
        elbo = d.log_likelihood.mean(0) - self.total_kl(d)
        return elbo - self.gamma * self.log_ratio(draws(d)).mean(0)

    def log_ratio(self, z: Tensor) -> Tensor:
        """Estimates log q(z) / prod q(z_d) [*S] of z [*S, D]; no gradient of D's weights."""
        network = self._network()
        frozen = {name: p.detach() for name, p in network.named_parameters()}
        return functional_call(network, frozen, z).squeeze(-1)

    def adversary_loss(self, d: Densities) -> Tensor:
        """Returns the cross entropy of D, in nats, on the draws of `d` and on them permuted."""
        network = self._network()
        z = draws(d).detach().flatten(0, 1)
        joint, product = network(z), network(permute_dimensions(z))
        return 0.5 * (F.softplus(-joint) + F.softplus(product)).mean()

    def _network(self) -> nn.Module:
        if self.discriminator is None:
            raise ValueError(
                "FactorVAE needs a second player, its discriminator, which is not there yet: "
                "train with fit(), or call start(d) first"
            )
        return self.discriminator


def permute_dimensions(z: Tensor) -> Tensor:
    """Returns draws z [n, D] with each column in a random order of its own."""
    order = torch.rand(z.shape, device=z.device).argsort(0)
    return z.gather(0, order)
