"""Objectives of the aggregate posterior, against sums over all batches and closed forms."""

from __future__ import annotations

import copy
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import two_sites
from families import draw, make
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torch.optim import Adam
from training.training_cases import QUIET, Stop, make_vae, noisy_data, same, weights

from pyro_vae.densities import Densities, Site, densities
from pyro_vae.distributions import FullNormal
from pyro_vae.objectives import (
    DIP,
    ELBO,
    BetaTC,
    FactorVAE,
    HierarchicallyFactorized,
    InfoVAE,
    Objective,
    aggregate,
)
from pyro_vae.objectives.aggregate import mmd, permute_dimensions
from pyro_vae.objectives.base import draws
from pyro_vae.posteriors import FlowPosterior
from pyro_vae.posteriors import FullNormal as FullPosterior
from pyro_vae.priors import MixtureOfGaussians, StandardNormal
from pyro_vae.training import fit

pytestmark = pytest.mark.usefixtures("float64")

N, B, D = 5, 3, 2


def of(z: Tensor, q: Distribution, prior: Distribution | None = None) -> Densities:
    """The densities of draws z [K, B, D] of q, batch [B], without data."""
    K, rows, size = z.shape
    prior = dist.Normal(torch.zeros(size), 1.0).to_event(1) if prior is None else prior
    site = Site(z, q.expand((K, rows)), prior.expand((K, rows)))
    return Densities({"z": site}, {}, K, rows, 1.0, [], True)


def posterior(full: bool, size: int = D) -> Distribution:
    """q(z | x_n) of N data, overlapping and unlike."""
    loc = 1.5 * torch.randn(N, size)
    if not full:
        return dist.Normal(loc, 0.4 + torch.rand(N, size)).to_event(1)
    return FullNormal(loc, scale_tril=torch.randn(N, size, size).tril(-1) + torch.eye(size))


def at(q: Distribution, rows: list[int]) -> Distribution:
    """Some of the data."""
    if isinstance(q, FullNormal):
        return FullNormal(q.loc[rows], scale_tril=q.scale_tril[rows])
    return dist.Normal(q.base_dist.loc[rows], q.base_dist.scale[rows]).to_event(1)


def batches(own: int) -> list[list[int]]:
    """Every batch of B of the N data that `own` is in."""
    return [list(rows) for rows in combinations(range(N), B) if own in rows]


def mean_estimate(
    q: Distribution, z: Tensor, own: int, objective: Any, dims: list[int] | None
) -> Tensor:
    """Mean over all batches of the estimate of q(z_dims) at draws z [K, D] of datum `own`."""
    estimates = []
    for rows in batches(own):
        place = rows.index(own)
        d = of(z.unsqueeze(1).expand(-1, B, -1), at(q, rows))
        estimates.append(objective.log_aggregate(d, dims)[:, place].exp())
    return torch.stack(estimates).mean(0)


def truth(q: Distribution, z: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """q(z_dims | x_n) [K, N], and q(z_dims) [K]."""
    covariance = getattr(q, "covariance_matrix", torch.diag_embed(q.variance))
    part = dist.MultivariateNormal(q.mean[:, dims], covariance[:, dims][:, :, dims])
    pairs = part.log_prob(z[:, None, dims]).exp()
    return pairs, pairs.mean(1)


def check_unbiased(q: Distribution, objective: Any) -> None:
    z = 2 * torch.randn(11, q.event_shape[0])
    for own in range(N):
        for dims in ([0], [1], [0, 1]):
            _, exact = truth(q, z, dims)
            ratio = mean_estimate(q, z, own, objective, dims) / exact
            torch.testing.assert_close(ratio, torch.ones(11))


# --- estimators --------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_stratified_is_unbiased_over_batches(full: bool) -> None:
    check_unbiased(posterior(full), BetaTC(num_data=N))


def published(estimator: str, batch_size: int, num_data: int, like: Tensor) -> Tensor:
    """The stratified weights as they were published in code: 1 / N in the first column."""
    M = batch_size - 1
    strat = (num_data - M) / (num_data * M)
    W = torch.full((batch_size, batch_size), 1 / M)
    W.view(-1)[:: M + 1] = 1 / num_data
    W.view(-1)[1 :: M + 1] = strat
    W[M - 1, 0] = strat
    return W.to(like)


def test_the_published_weights_would_be_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "estimator_weights", published)
    with pytest.raises(AssertionError, match="not close"):
        check_unbiased(posterior(False), BetaTC(num_data=N))


@pytest.mark.parametrize("size", [2, B, N])
def test_stratified_averages_the_papers_weights_over_the_order_of_the_others(size: int) -> None:
    # own 1 / N, then 1 / M each, and the last (N - M) / (N M)
    M = size - 1
    others = (M - 1) / M + (N - M) / (N * M)
    w = aggregate.estimator_weights("stratified", size, N)
    torch.testing.assert_close(w.sum(1), torch.ones(size))
    torch.testing.assert_close(w.diagonal(), torch.full((size,), 1 / N))
    torch.testing.assert_close(w[0, 1:], torch.full((M,), others / M))
    w = aggregate.estimator_weights("weighted", size, N)
    torch.testing.assert_close(w, torch.full((size, size), 1 / (N * size)))


@pytest.mark.parametrize("full", [False, True])
def test_weighted_is_biased_by_what_is_known(full: bool) -> None:
    q = posterior(full)
    z = 2 * torch.randn(11, D)
    objective = BetaTC(num_data=N, estimator="weighted")
    for own in range(N):
        pairs, exact = truth(q, z, [0, 1])
        rest = N * exact - pairs[:, own]
        expected = (pairs[:, own] + (B - 1) / (N - 1) * rest) / (N * B)
        torch.testing.assert_close(mean_estimate(q, z, own, objective, None), expected)


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
@pytest.mark.parametrize("apart", [False, True])
def test_the_total_correlation_where_posteriors_are_one_or_far_apart(
    estimator: str, apart: bool
) -> None:
    loc = torch.arange(B)[:, None].expand(B, 3) * (1000.0 if apart else 0.0)
    q = dist.Normal(loc, 1.0).to_event(1)
    d = of(q.sample((7,)), q)
    objective = BetaTC(num_data=N, estimator=estimator)
    found = objective.log_aggregate(d) - objective.log_marginals(d).sum(-1)
    exact = 2 * math.log(N) if apart else 0.0
    offset = 2 * math.log(B if apart else N) if estimator == "weighted" else 0.0
    torch.testing.assert_close(found, torch.full((7, B), exact + offset))


def test_the_expected_total_correlation_over_all_batches() -> None:
    """Biased, low for the joint and each part by Jensen; by how much is known by quadrature."""
    q = posterior(False)
    nodes, mass = gauss_hermite(31)
    means = {"stratified": [], "weighted": []}
    exact = []
    for own in range(N):
        z = q.mean[own] + q.stddev[own] * nodes
        exact.append(mass @ log_ratio_of(truth(q, z, [0, 1])[1], q, z))
        for estimator, found in means.items():
            objective = BetaTC(num_data=N, estimator=estimator)
            for rows in batches(own):
                d = of(z.unsqueeze(1).expand(-1, B, -1), at(q, rows))
                value = objective.log_aggregate(d) - objective.log_marginals(d).sum(-1)
                by_hand = mass @ by_loops(q, z, rows, own, estimator)
                found.append(mass @ value[:, rows.index(own)])
                assert abs(found[-1] - by_hand) < 1e-12
    bias = {e: torch.stack(found).mean() - torch.stack(exact).mean() for e, found in means.items()}
    assert abs(bias["stratified"]) < 0.15
    assert bias["weighted"] > math.log(B)


def gauss_hermite(count: int) -> tuple[Tensor, Tensor]:
    """Nodes [count^2, 2] and masses of the unit Normal in two dimensions."""
    import numpy as np

    x, w = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(count))
    w = w / w.sum()
    return torch.cartesian_prod(x, x), torch.cartesian_prod(w, w).prod(-1)


def log_ratio_of(joint: Tensor, q: Distribution, z: Tensor) -> Tensor:
    each = [truth(q, z, [dim])[1].log() for dim in range(D)]
    return joint.log() - sum(each)


def by_loops(q: Distribution, z: Tensor, rows: list[int], own: int, estimator: str) -> Tensor:
    def estimate(dims: list[int]) -> Tensor:
        pairs = truth(q, z, dims)[0]
        total = torch.zeros(len(z))
        for row in rows:
            if estimator == "weighted":
                weight = 1 / (N * B)
            else:
                weight = 1 / N if row == own else (N - 1) / (N * (B - 1))
            total = total + weight * pairs[:, row]
        return total.log()

    return estimate([0, 1]) - estimate([0]) - estimate([1])


# --- weights of one (or none) give back the ELBO, exactly ----------------------------------------

PLAIN: dict[str, tuple[Objective, str]] = {
    "BetaTC": (BetaTC(1, 1, 1), "sampled"),
    "BetaTC weighted": (BetaTC(1, 1, 1, "weighted"), "sampled"),
    "HF": (HierarchicallyFactorized([[0, 2]], 1, 1, 1, 1), "sampled"),
    "HF weighted": (HierarchicallyFactorized([[2, 1, 0]], 1, 1, 1, 1, "weighted"), "sampled"),
    "DIP I": (DIP(0, 0, "I"), "auto"),
    "DIP II": (DIP(0, 0, "II"), "auto"),
    "InfoVAE": (InfoVAE(0, 1), "auto"),
    "FactorVAE": (FactorVAE(0, width=7, layers=1), "auto"),
}


@pytest.mark.parametrize("guide", [None, FullPosterior])
@pytest.mark.parametrize("prior", [StandardNormal, MixtureOfGaussians])
@pytest.mark.parametrize("name", PLAIN)
def test_weights_of_one_give_the_elbo(name: str, prior: type, guide: type | None) -> None:
    objective, kl = PLAIN[name]
    vae = make(prior, latent_dim=3, **({} if guide is None else {"posterior": guide}))
    x = draw(vae, 7)
    d = densities(vae.model, vae.guide, x, num_particles=2)
    objective.prepare(23, 4)
    objective.start(d)
    expected = ELBO(kl=kl, num_particles=2).bound(d)
    torch.testing.assert_close(objective.bound(d), expected, rtol=1e-10, atol=1e-10)
    both = [
        torch.autograd.grad(bound.sum(), list(vae.parameters()), retain_graph=True)
        for bound in (objective.bound(d), expected)
    ]
    for a, b in zip(*both):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_no_groups_is_beta_tc() -> None:
    d = of(torch.randn(2, B, 4), at(posterior(True, 4), [0, 1, 3]))
    first = BetaTC(0.3, 2.0, 0.7, num_data=N).bound(d)
    for groups in ((), [[2]], [[3], [0]]):
        second = HierarchicallyFactorized(groups, 0.3, 2.0, 5.0, 0.7, num_data=N).bound(d)
        torch.testing.assert_close(first, second)


def test_one_group_of_all_has_nothing_between() -> None:
    d = of(torch.randn(2, B, 4), at(posterior(True, 4), [0, 1, 3]))
    first = BetaTC(0.3, 2.0, 0.7, num_data=N).bound(d)
    second = HierarchicallyFactorized([[1, 0, 3, 2]], 0.3, 9.0, 2.0, 0.7, num_data=N).bound(d)
    torch.testing.assert_close(first, second)


def test_each_weight_weighs_its_own_term() -> None:
    q = at(posterior(False, 3), [0, 2, 4])
    d = of(torch.randn(4, B, 3), q)
    base = HierarchicallyFactorized([[0, 1]], 0, 0, 0, 0, num_data=N)
    w = aggregate.estimator_weights("stratified", B, N)
    pairs = q.base_dist.log_prob(d.sites["z"].value.unsqueeze(2))  # [K, B, B, D]
    joint, group = (
        (pairs[..., dims].sum(-1).exp() * w).sum(2).log() for dims in ([0, 1, 2], [0, 1])
    )
    each = (pairs.exp() * w[..., None]).sum(2).log()
    terms = {
        "alpha": d.log_posterior - joint,
        "beta": joint - group - each[..., 2],
        "gamma": group - each[..., :2].sum(-1),
        "delta": each.sum(-1) - d.log_prior,
    }
    for name, term in terms.items():
        getattr(base, name).fill_(1.0)
        torch.testing.assert_close(base.bound(d), -term.mean(0))
        getattr(base, name).fill_(0.0)


# --- where N comes from ------------------------------------------------------------------------


def test_num_data_is_given_or_told_or_that_of_the_plate() -> None:
    d = of(torch.randn(2, B, D), at(posterior(False), [0, 1, 3]))
    reference = {size: BetaTC(num_data=size).bound(d) for size in (B, N, 23)}
    objective = BetaTC()
    torch.testing.assert_close(objective.bound(d), reference[B])
    d.scale = 23 / B
    torch.testing.assert_close(objective.bound(d), reference[23])
    objective.prepare(N, 2)
    torch.testing.assert_close(objective.bound(d), reference[N])
    given = BetaTC(num_data=23)
    given.prepare(N, 2)
    torch.testing.assert_close(given.bound(d), reference[23])
    assert not torch.allclose(reference[N], reference[23])


def test_fit_tells_it() -> None:
    objective = BetaTC()
    fit(make_vae(), noisy_data(53), objective, epochs=1, batch_size=13, **QUIET)
    assert objective._data_size(of(torch.randn(1, B, D), at(posterior(False), [0, 1, 2]))) == 53


def test_a_batch_of_one_row_counts_as_all() -> None:
    d = of(torch.randn(2, 1, D), at(posterior(False), [1]))
    for objective in (BetaTC(num_data=N), BetaTC(num_data=N, estimator="weighted")):
        torch.testing.assert_close(objective.log_aggregate(d), d.log_posterior)
    for objective in (DIP(), InfoVAE()):
        assert objective.bound(d).isfinite().all()


# --- moments and kernels -----------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
def test_dip_knows_the_covariance(full: bool) -> None:
    q = posterior(full)
    many = 100_003
    d = of(q.sample((many,)), q)
    z = d.sites["z"].value.flatten(0, 1)
    stderr = 2 * z.pow(2).mean(0).max() / (many * N) ** 0.5
    assert (abs(torch.cov(z.T) - DIP(kind="II").covariance(d)) < 5 * stderr).all()
    means = torch.cov(q.mean.T, correction=0)
    torch.testing.assert_close(DIP(kind="I").covariance(d), means)


def test_dip_penalises_what_it_says() -> None:
    loc = torch.tensor([[1.0, 0.5], [-1.0, -0.5]])
    d = of(torch.zeros(1, 2, 2), dist.Normal(loc, 0.1).to_event(1))
    base = DIP(0, 0).bound(d)
    # covariance of the means: [[1, 0.5], [0.5, 0.25]]
    torch.testing.assert_close(base - DIP(1, 0, "I").bound(d), torch.full((2,), 2 * 0.5**2))
    torch.testing.assert_close(base - DIP(0, 1, "I").bound(d), torch.full((2,), 0.75**2))
    expected = torch.full((2,), 0.01**2 + 0.74**2)
    torch.testing.assert_close(base - DIP(0, 1, "II").bound(d), expected)


def kernel_mean(m: float, s: float, t: float, h: float) -> float:
    """E k(z, w) of z ~ N(m, s^2) and w ~ N(0, t^2)."""
    v = h**2 + s**2 + t**2
    return h / v**0.5 * math.exp(-(m**2) / (2 * v))


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize(("m", "s"), [(0.0, 1.0), (0.7, 0.5)])
def test_mmd_is_unbiased(m: float, s: float, K: int) -> None:
    """Draws of a datum lie near one another: q(z) is N(m, s^2), q(z | x_n) a tenth as wide."""
    h, n, repeats = 0.8, 5, 4001
    found = []
    for _ in range(repeats):
        means = m + s * 0.99**0.5 * torch.randn(n, 2)
        z = means + s * 0.1 * torch.randn(K, n, 2)
        found.append(mmd(z, torch.randn(K, n, 2), h))
    mean, std = torch.stack(found).mean(), torch.stack(found).std()
    exact = kernel_mean(0, s, s, h) ** 2 + kernel_mean(0, 1, 1, h) ** 2
    exact -= 2 * kernel_mean(m, s, 1, h) ** 2
    assert abs(mean - exact) < 4 * std / repeats**0.5


def test_info_vae_of_several_particles_is_unbiased() -> None:
    """q(z) = p(z) exactly: the divergence is zero on average, with three draws of each datum."""
    gaps = []
    for _ in range(301):
        q = dist.Normal(0.96**0.5 * torch.randn(11, D), 0.2).to_event(1)
        d = of(q.sample((3,)), q)
        gaps.append((InfoVAE(1.0, 1.0).bound(d) - InfoVAE(1.0, 11.0).bound(d)).mean() / 10)
    found = torch.stack(gaps)
    assert abs(found.mean()) < 4 * found.std() / 301**0.5


def test_info_vae_takes_off_one_less_alpha_of_the_kl() -> None:
    """Of one datum there is no divergence: what is left is a KL, weighted."""
    q = dist.Normal(torch.randn(1, D), 0.3).to_event(1)
    d = of(q.sample((1,)), q)
    whole, quarter = (InfoVAE(alpha, 1.0).bound(d) for alpha in (0.0, 0.75))
    kl = kl_divergence(q, dist.Normal(torch.zeros(1, D), 1.0).to_event(1))
    torch.testing.assert_close(quarter - whole, 0.75 * kl)


def test_info_vae_draws_the_posterior_to_the_prior() -> None:
    near, far = (dist.Normal(torch.randn(101, D) + shift, 0.1).to_event(1) for shift in (0, 2))
    gaps = []
    for q in (near, far):
        d = of(q.sample((1,)), q)
        gaps.append((InfoVAE(1.0, 0.0 + 1.0).bound(d) - InfoVAE(1.0, 11.0).bound(d)).mean() / 10)
    assert abs(gaps[0]) < 0.05
    assert gaps[1] > 0.3


# --- the discriminator -------------------------------------------------------------------------


def test_the_discriminator_recovers_a_known_total_correlation() -> None:
    rho, objective = 0.8, FactorVAE(width=64, layers=2, adversary_lr=2e-3)
    joint = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, rho], [rho, 1.0]]))

    def some(count: int) -> Densities:
        return of(joint.sample((1, count)), joint.expand((count,)))

    objective.start(some(2))
    optimizer = objective.adversary
    assert optimizer is not None
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 1200)
        optimizer.zero_grad()
        objective.adversary_loss(some(503)).backward()
        optimizer.step()
    z = joint.sample((20_011,))
    exact = joint.log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    found = objective.log_ratio(z).detach()
    truth = -0.5 * math.log(1 - rho**2)  # 0.511
    assert abs(found.mean() - truth) < 0.05
    assert torch.corrcoef(torch.stack([found, exact]))[0, 1] > 0.97


def test_factor_vae_takes_off_gamma_of_the_log_ratio() -> None:
    d = of(torch.randn(4, B, D), at(posterior(True), [0, 1, 3]))
    objective = FactorVAE(3.0, width=7, layers=1)
    objective.start(d)
    found = objective.discriminator(d.sites["z"].value)[..., 0].mean(0)
    torch.testing.assert_close(ELBO().bound(d) - objective.bound(d), 3.0 * found)
    assert abs(found).min() > 1e-3


def test_permuting_keeps_each_dimension_and_breaks_the_rest() -> None:
    z = torch.randn(5003, 1).expand(-1, 3) + torch.tensor([0.0, 5.0, 9.0])
    permuted = permute_dimensions(z)
    assert torch.equal(permuted.sort(0).values, z.sort(0).values)
    assert (abs(torch.corrcoef(permuted.T) - torch.eye(3)) < 5 / 5003**0.5).all()


def test_the_players_do_not_see_each_others_parameters() -> None:
    vae = make()
    objective = FactorVAE(width=7, layers=2)
    d = densities(vae.model, vae.guide, draw(vae, 7))
    objective.start(d)
    own = list(objective.parameters())
    given = {"allow_unused": True, "retain_graph": True}
    first = torch.autograd.grad(objective.reduce(d), [*own, *vae.parameters()], **given)
    assert all(g is None for g in first[: len(own)])
    assert any(g is not None and g.any() for g in first[len(own) :])
    second = torch.autograd.grad(objective.adversary_loss(d), [*own, *vae.parameters()], **given)
    assert all(g is not None for g in second[: len(own)])
    assert all(g is None for g in second[len(own) :])


class Breaking(FactorVAE):
    """Raises at one step."""

    def __init__(self, at: int = -1) -> None:
        super().__init__(width=5, layers=1, adversary_lr=0.01)
        self.stop_at = at

    def at(self, step: int) -> None:
        if step == self.stop_at:
            raise Stop


@pytest.mark.parametrize("stop_at", [7, 10])  # five steps an epoch
def test_resume_is_exact_with_two_players(tmp_path: Path, stop_at: int) -> None:
    torch.set_default_dtype(torch.float32)
    options = {"epochs": 3, "batch_size": 11, "lr": 0.01, "checkpoint_every": 2, **QUIET}
    whole, first, second = make_vae(), Breaking(), Breaking()
    fit(whole, noisy_data(), first, run=tmp_path / "whole", **options)
    with pytest.raises(Stop):
        fit(make_vae(), noisy_data(), Breaking(stop_at), run=tmp_path / "broken", **options)
    resumed = make_vae(seed=5)
    fit(resumed, noisy_data(), second, run=tmp_path / "broken", resume=True, **options)
    assert same(weights(whole), weights(resumed))
    assert same(weights(first), weights(second))


def test_an_older_run_goes_on_with_two_players(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    options = {"batch_size": 11, "lr": 0.01, **QUIET}
    whole, first, second = make_vae(), Breaking(), Breaking()
    fit(whole, noisy_data(), first, epochs=2, run=tmp_path / "whole", **options)
    fit(make_vae(), noisy_data(), Breaking(), epochs=1, run=tmp_path / "old", **options)
    current = tmp_path / "old" / "checkpoints" / "current.json"
    pointers = json.loads(current.read_text())
    current.write_text(json.dumps(pointers | {"sha256": {}}))
    path = current.parent / pointers["last"] / "state.pt"
    state = torch.load(path, weights_only=True)
    state["adversary"] = state["objective"].pop("_extra_state")  # where it was kept
    torch.save(state, path)
    resumed = make_vae(seed=5)
    again = {"run": tmp_path / "old", "resume": True}
    fit(resumed, noisy_data(), second, epochs=2, **again, **options)
    assert same(weights(whole), weights(resumed))
    assert same(weights(first), weights(second))


def test_after_step_is_a_step_of_the_discriminator() -> None:
    vae = make()
    d = densities(vae.model, vae.guide, draw(vae, 7))
    own = FactorVAE(width=5, layers=2)
    own.start(d)
    by_hand, alone = copy.deepcopy(own), copy.deepcopy(own)
    optimizer = Adam(by_hand.discriminator.parameters(), lr=own.adversary_lr, betas=(0.5, 0.9))
    torch.manual_seed(3)
    by_hand.adversary_loss(d).backward()
    optimizer.step()
    torch.manual_seed(3)
    own.after_step(d)
    assert same(dict(own.named_parameters()), dict(by_hand.named_parameters()))
    before = copy.deepcopy(dict(alone.named_parameters()))
    alone.after_step(d, lambda parameters: [p.grad.zero_() for p in parameters])
    assert same(before, dict(alone.named_parameters()))
    assert not same(before, dict(own.named_parameters()))


def test_a_run_goes_on_with_the_same_groups_only(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    options = {"epochs": 1, "batch_size": 11, "run": tmp_path, **QUIET}
    fit(make_vae(), noisy_data(), HierarchicallyFactorized([[0, 1]]), **options)
    with pytest.raises(ValueError, match=r"'groups': \[\[0, 1\]\].* is .*'groups': \[\[1, 2\]\]"):
        fit(make_vae(), noisy_data(), HierarchicallyFactorized([[1, 2]]), resume=True, **options)


def test_fit_trains_the_discriminator() -> None:
    vae = make(posterior=FullPosterior)
    last = vae.posterior.encoder.output
    with torch.no_grad():  # z1 is 3 z0 and some noise, whatever x
        last.weight.zero_()
        last.bias.copy_(torch.tensor([0.0, 0.0, 0.54, 0.54, 3.0]))
    x = draw(vae, 503)
    objective = FactorVAE(0.0, width=32, layers=2, adversary_lr=3e-3)
    slow = {"lr": 1e-9, "optimizer": "SGD", "precision": "64-true"}
    with pytest.warns(UserWarning, match="collapse"):
        fit(vae, x, objective, epochs=20, batch_size=101, **slow, **QUIET)
    z = draws(densities(vae.model, vae.guide, x, num_particles=11))
    truth = 0.5 * math.log(1 + 9)
    assert truth / 2 < objective.log_ratio(z).mean() < truth + 0.1


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BetaTC, {"beta": -1}, "beta must be zero or more; got -1"),
        (BetaTC, {"estimator": "mss"}, "estimator must be 'stratified' or 'weighted'; got 'mss'"),
        (BetaTC, {"num_data": 0}, "num_data must be at least 1; got 0"),
        (HierarchicallyFactorized, {"groups": [[0, 1], [1]]}, r"\[1\] is in several"),
        (HierarchicallyFactorized, {"groups": [[0, 0]]}, r"\[0\] is in several"),
        (HierarchicallyFactorized, {"groups": [[0], []]}, "none empty"),
        (HierarchicallyFactorized, {"groups": [[-1]]}, "from 0"),
        (HierarchicallyFactorized, {"groups": [0, 1]}, r"lists of dimensions .* got \[0, 1\]"),
        (DIP, {"kind": "III"}, "kind must be 'I' or 'II'; got 'III'"),
        (DIP, {"kl": "mc"}, "kl must be"),
        (InfoVAE, {"alpha": 1.5}, "alpha must be from 0 to 1; got 1.5"),
        (InfoVAE, {"divergence": 0.5}, "divergence must be 1 or more; got 0.5"),
        (InfoVAE, {"bandwidth": 0.0}, "bandwidth must be positive; got 0.0"),
        (FactorVAE, {"layers": 0}, "layers must be at least 1; got 0"),
        (FactorVAE, {"adversary_lr": 0.0}, "adversary_lr must be positive; got 0.0"),
    ],
)
def test_wrong_options_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)


def test_a_group_beyond_the_latents_is_refused() -> None:
    vae = make()
    objective = HierarchicallyFactorized([[0, 2]])
    with pytest.raises(ValueError, match=r"dimensions from 0 to 1, .* got \[2\]"):
        objective.loss(vae.model, vae.guide, draw(vae, 7))


def test_fewer_data_than_the_batch_are_refused() -> None:
    vae = make()
    with pytest.raises(ValueError, match="at least the 7 rows of the batch; got 6"):
        BetaTC(num_data=6).loss(vae.model, vae.guide, draw(vae, 7))


def test_groups_may_be_arrays() -> None:
    objective = HierarchicallyFactorized(torch.tensor([[3, 1], [0, 2]]).numpy())
    assert objective.groups == [[3, 1], [0, 2]]


@pytest.mark.parametrize("cls", [BetaTC, HierarchicallyFactorized, DIP])
def test_a_flow_is_refused_by_name(cls: type) -> None:
    vae = make(posterior=FlowPosterior)
    with pytest.raises(ValueError, match="single dimensions of Flow are not known"):
        cls().loss(vae.model, vae.guide, draw(vae, 7))


@pytest.mark.parametrize("cls", [BetaTC, HierarchicallyFactorized, DIP, InfoVAE])
def test_a_hierarchy_is_refused(cls: type) -> None:
    model, guide, _ = two_sites(False)
    with pytest.raises(ValueError, match=r"exactly one latent site; the model has \['z1', 'z2'\]"):
        cls().loss(model, guide, torch.randn(7))


def test_factor_vae_says_that_it_needs_a_second_player() -> None:
    vae = make()
    x = draw(vae, 7)
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({}), loss=FactorVAE())
    with pytest.raises(ValueError, match="needs a second player, which pyro.infer.SVI"):
        svi.step(x)
    with pytest.raises(ValueError, match=r"not there yet: train with fit\(\)"):
        FactorVAE().loss(vae.model, vae.guide, x)
