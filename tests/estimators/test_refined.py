"""Refined importance sampling against exact log p(x), from good guides and bad ones."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from worlds import WORLDS, World, data, linear, misses, square, three_modes

from pyro_vae.densities import evaluating
from pyro_vae.estimators import refined_importance_sampling
from pyro_vae.estimators.modes import find_modes
from pyro_vae.estimators.proposal import Proposal, curvature, fit_gaussian, laplace
from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.target import Target

pytestmark = pytest.mark.usefixtures("float64")

CPU = torch.device("cpu")


def fit(world: World, num_starts: int = 4) -> Fit:
    return fit_proposal(Target(world.model, world.guide, world.x), num_starts)


@pytest.mark.parametrize("name", WORLDS)
def test_the_truth_is_found_in_every_world(name: str) -> None:
    world = WORLDS[name]()
    e = refined_importance_sampling(world.model, world.guide, world.x, num_samples=4001)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert abs(e.mean() - world.truth.mean().item()) < 0.02
    assert "reliable" in e.verdict
    assert e.num_samples.tolist() == [4001] * len(world.x)


@pytest.mark.parametrize(
    ("sigma", "shift", "width"),
    [(1.0, 5.0, 0.5), (1.0, -3.0, 4.0), (0.1, 0.0, 0.2), (0.1, -3.0, 4.0), (0.01, 0.0, 1.0),
     (0.01, 5.0, 0.5)],
)  # fmt: skip
def test_no_guide_is_too_bad(sigma: float, shift: float, width: float) -> None:
    world = linear(sigma, shift, width)
    e = refined_importance_sampling(world.model, world.guide, world.x)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert abs(e.mean() - world.truth.mean().item()) < 0.02
    assert set(e.verdict) == {"reliable"}


def test_single_precision_programs() -> None:
    world = linear(sigma=0.05)
    e = refined_importance_sampling(world.model, world.guide, world.x.float())
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert e.log_prob.dtype == torch.float64


def test_a_hundred_latents() -> None:
    world = linear(0.3, 1.0, 0.5, latent_dim=101, data_dim=151, num_data=5)
    e = refined_importance_sampling(world.model, world.guide, world.x)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert set(e.verdict) == {"reliable"}


def test_weights_are_unbiased_whatever_the_fit() -> None:
    """E[w] = p(x) for a proposal that is moved and stretched, draws of the guide included."""
    world = linear(num_data=3)
    with evaluating(seed=0, device=CPU):
        good = fit(world)
        old = good.proposal
        bad = Proposal(old.log_weight, old.loc + 0.3, 1.5 * old.tril)
        moved = Fit(good.target, bad, good.prior_evidence, good.search_ended)
        weights = torch.cat([weights for _, weights in moved.weighted_draws(20_011)]).exp()
    ratio = weights / world.truth.exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 20_011**0.5).all()
    assert (ratio.std(0) > 0.1).all()


def test_a_proposal_scores_what_it_draws() -> None:
    """A mixture of two t in two dimensions integrates to one, and draws are from it."""
    tril = torch.tensor([[[0.5, 0.0], [0.3, 0.4]], [[1.0, 0.0], [-0.5, 0.7]]]).unsqueeze(1)
    loc = torch.tensor([[[-2.0, 0.0]], [[2.0, 1.0]]])
    proposal = Proposal(torch.tensor([[0.3], [0.7]]).log(), loc, tril)
    axis = torch.linspace(-25, 25, 801)
    grid = torch.cartesian_prod(axis, axis)
    density = proposal.log_prob(grid[:, None])[:, 0].exp() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(density.sum(), torch.tensor(1.0), atol=1e-3, rtol=0)
    draws = proposal.draw(40_009)[:, 0]
    mean, share = density @ grid, density[grid[:, 0] > 0].sum()
    torch.testing.assert_close(draws.mean(0), mean, atol=0.06, rtol=0)
    assert abs((draws[:, 0] > 0).double().mean() - share) < 0.015
    torch.testing.assert_close(draws.T.cov(), _covariance(grid, density), atol=0.1, rtol=0.05)


def _covariance(grid: Tensor, density: Tensor) -> Tensor:
    return (grid - density @ grid).T @ ((grid - density @ grid) * density[:, None])


def test_the_mode_and_curvature_of_a_gaussian_posterior_are_exact() -> None:
    world = linear(sigma=0.1)
    with evaluating(seed=0, device=CPU):
        target = Target(world.model, world.guide, world.x)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        slope, precision = curvature(target, loc)
        loc_fit, tril_fit, bound = fit_gaussian(target, loc, tril)
    assert slope.abs().max() < 1e-6
    torch.testing.assert_close(tril @ tril.mT @ precision, torch.eye(3).expand(13, 3, 3))
    torch.testing.assert_close(bound, world.truth)  # the ELBO is tight
    torch.testing.assert_close((loc_fit, tril_fit), (loc, tril), atol=1e-4, rtol=0)


@pytest.mark.parametrize("width", [0.6, 2.5])
def test_fitting_finds_the_posterior_from_a_wrong_start(width: float) -> None:
    world = linear()
    with evaluating(seed=0, device=CPU):
        target = Target(world.model, world.guide, world.x)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        found = fit_gaussian(target, loc + width * tril.sum(-1), width * tril)
    torch.testing.assert_close(found[1], tril, atol=0.05, rtol=0)
    torch.testing.assert_close(found[2], world.truth, atol=0.1, rtol=0)  # the start: 1 to 14 low


def test_fitting_does_not_lower_the_bound() -> None:
    world = WORLDS["bernoulli"]()
    with evaluating(seed=0, device=CPU):
        target = Target(world.model, world.guide, world.x)
        modes = find_modes(target, 1)
        loc, tril = laplace(target, modes.u)
        bound = fit_gaussian(target, loc, 0.5 * tril)[2]
    assert (bound < world.truth + 0.3).all()
    assert (bound > world.truth - 1.5).all()


def test_all_modes_are_found() -> None:
    """Four in two dimensions, from a guide that knows one."""
    world = square(2, num_data=7, sigma=0.05)
    x, truth = world.x[1:], world.truth[1:]
    with evaluating(seed=0, device=CPU):
        modes = find_modes(Target(world.model, world.guide, x), 4)
    for row in range(6):
        assert len(modes.u[modes.row == row].sign().unique(dim=0)) == 4
    assert modes.search_ended.all()
    e = refined_importance_sampling(world.model, world.guide, x)
    assert misses(e.log_prob, e.stderr, truth) < 5
    assert set(e.verdict) == {"reliable"}


def test_modes_that_are_too_many_to_find_are_said_to_be_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """128 of them in seven dimensions."""
    monkeypatch.setattr("pyro_vae.estimators.modes.MOST_ROUNDS", 1)
    world = square(7, num_data=3, sigma=0.05)
    e = refined_importance_sampling(world.model, world.guide, world.x[1:])
    assert (e.log_prob < world.truth[1:] - 0.3).all()
    assert set(e.verdict) == {"doubtful"}


def test_one_start_is_no_search() -> None:
    world = linear()
    e = refined_importance_sampling(world.model, world.guide, world.x, num_starts=1)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert set(e.verdict) == {"doubtful"}


@pytest.mark.parametrize("num_starts", [1, 2])
def test_draws_of_the_prior_make_up_for_a_missed_mode(num_starts: int) -> None:
    world = three_modes()
    e = refined_importance_sampling(
        world.model, world.guide, world.x, num_starts=num_starts, num_samples=4001
    )
    assert misses(e.log_prob, e.stderr, world.truth) < 5


def test_standard_errors_cover_the_truth_as_often_as_they_say() -> None:
    world = linear(num_data=211)
    e = refined_importance_sampling(world.model, world.guide, world.x, num_samples=211)
    share = ((e.log_prob - world.truth).abs() < 2 * e.stderr).double().mean()
    assert 0.88 < share < 0.99


def test_a_guide_without_density_is_a_start_only() -> None:
    world = linear()

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Delta(x[:, :3], event_dim=1))

    e = refined_importance_sampling(world.model, guide, world.x)
    assert misses(e.log_prob, e.stderr, world.truth) < 5


@pytest.mark.parametrize("num_samples", [1, 2, 11])
def test_few_draws_have_no_khat_and_no_trust(num_samples: int) -> None:
    world = linear()
    e = refined_importance_sampling(world.model, world.guide, world.x, num_samples=num_samples)
    assert e.khat.isnan().all()
    assert set(e.verdict) == {"doubtful"}


def test_two_draws_are_of_the_proposal_and_a_third_is_of_each() -> None:
    with evaluating(seed=0, device=CPU):
        found = fit(linear(num_data=3), 1)
    assert [found._split_draws(number) for number in (2, 3)] == [(2, 0, 0), (1, 1, 1)]


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"num_starts": 0}, {"chunk_size": 0}])
def test_wrong_numbers_are_refused(options: dict[str, int]) -> None:
    world = linear()
    with pytest.raises(ValueError, match="must be at least 1; got"):
        refined_importance_sampling(world.model, world.guide, world.x, **options)


def test_no_data_are_refused() -> None:
    world = linear()
    with pytest.raises(ValueError, match="x must have at least one row"):
        refined_importance_sampling(world.model, world.guide, world.x[:0])
