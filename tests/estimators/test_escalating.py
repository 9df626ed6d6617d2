"""Walks, components and pilots: what makes draws enough, held to exact posteriors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from worlds import World, data, linear, misses, quadrature, square

from pyro_vae.densities import evaluating
from pyro_vae.estimators import escalating, hmc, log_evidence, refined_importance_sampling
from pyro_vae.estimators.evidence import summarise
from pyro_vae.estimators.proposal import Proposal, _fit_weights, add_components, laplace
from pyro_vae.estimators.refined import Fit, _widen
from pyro_vae.estimators.target import Target

pytestmark = pytest.mark.usefixtures("float64")
CPU = torch.device("cpu")


def target_of(world: World) -> Target:
    return Target(world.model, world.guide, world.x, chunk_size=30_000)


def one(loc: Tensor, tril: Tensor) -> Proposal:
    return Proposal(torch.zeros(1, len(loc)), loc.unsqueeze(0), tril.unsqueeze(0))


def fit_of(target: Target, proposal: Proposal) -> Fit:
    weights = target.draw_prior(500)[2]
    complete = torch.ones(target.num_data, dtype=torch.bool)
    return Fit(target, proposal, summarise(weights, "prior", "lower bound"), complete)


def test_walks_stay_in_the_posterior() -> None:
    """From exact draws every point of a walk is one."""
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=401))
        loc, tril = laplace(target, target.draw_guide(1)[0])
        exact = loc + torch.einsum("bij,kbj->kbi", tril, torch.randn(97, *loc.shape))
        points = hmc.walk(target, exact, torch.zeros(97, 401), tril)
        white = torch.linalg.solve_triangular(tril, (points - loc).permute(1, 2, 0), upper=False)
    assert points.shape == (hmc.WALKS * hmc.MOVES, 401, 3)
    last = white[..., -hmc.WALKS :]
    assert abs(last.mean()) < 5 * last.numel() ** -0.5
    assert abs(last.var() - 1) < 5 * (2 / last.numel()) ** 0.5
    assert ((points[-hmc.WALKS :] - points[: hmc.WALKS]).abs() > 1e-6).double().mean() > 0.9


def test_walks_start_where_the_weights_are_and_leave() -> None:
    """One draw has all of the weight; where there is no weight there may be no number."""
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=53))
        loc, tril = laplace(target, target.draw_guide(1)[0])
        draws = torch.stack([torch.full_like(loc, torch.nan), loc])
        weights = torch.tensor([[-torch.inf], [0.0]]).expand(2, 53)
        points = hmc.walk(target, draws, weights, tril)
    assert points.isfinite().all()
    white = torch.linalg.solve_triangular(tril, (points - loc).permute(1, 2, 0), upper=False)
    assert white[..., -hmc.WALKS :].var() > 0.8


def test_walks_start_at_the_largest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of seven draws all, the heaviest again; of nineteen the heaviest, whatever their share."""
    stay = lambda at, point, beta, **_: (point, torch.ones_like(point.log_joint))  # noqa: E731
    monkeypatch.setattr(hmc, "hmc_step", stay)
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=2))
        tril = torch.eye(3).expand(2, 3, 3)
        for number in (7, 19):
            weights = 9 * torch.randn(number, 2)
            draws = weights.unsqueeze(-1).expand(number, 2, 3)
            start = hmc.walk(target, draws, weights, tril)[: hmc.WALKS, :, 0]
            order = weights.sort(0, descending=True).values
            torch.testing.assert_close(start, torch.cat([order, order])[: hmc.WALKS])


def test_the_cost_of_walks_is_what_they_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=5))
        loc, tril = laplace(target, target.draw_guide(1)[0])
        fit = fit_of(target, one(loc, tril))
        run = target.run_log_joint
        monkeypatch.setattr(target, "run_log_joint", lambda u: (seen.append(len(u)), run(u))[1])
        points = hmc.walk(target, loc.expand(3, 5, 3), torch.zeros(3, 5), tril)
        fit.log_weights(points, 1000)
    assert sum(seen) + len(points) == hmc.WALK_COST


def mirrored() -> tuple[Target, Proposal, World]:
    """Two modes in one dimension, of which the proposal has the upper."""
    world = square(num_data=11)
    world = World(world.model, world.guide, world.x[5:], world.truth[5:])
    target = target_of(world)
    loc, tril = laplace(target, world.x.sqrt())
    return target, one(loc, tril), world


def test_components_are_added_where_weights_are_largest() -> None:
    with evaluating(seed=0, device=CPU):
        target, proposal, world = mirrored()
        few = fit_of(target, proposal).importance_sampling(4000, 0.05)
        visited = -proposal.loc.expand(3, -1, -1)
        richer = add_components(target, proposal, visited)
        evidence = fit_of(target, richer).importance_sampling(4000, 0.05)
        lower = torch.where(richer.loc[..., 0] < 0, richer.log_weight.exp(), 0.0).sum(0)
        grid = torch.linspace(-4, 4, 4001)
        density = richer.log_prob(grid.view(-1, 1, 1).expand(-1, len(world.x), 1)).exp()
    assert (few.khat > 0.7).any() or (few.stderr > 0.05).any()
    assert misses(evidence.log_prob, evidence.stderr, world.truth) < 4
    assert (evidence.stderr < 0.03).all()
    assert ((lower - 0.5).abs() < 0.25).all()
    torch.testing.assert_close(
        density.sum(0) * (grid[1] - grid[0]), torch.ones(len(world.x)), atol=2e-3, rtol=0
    )


def test_components_take_over_from_a_proposal_that_is_elsewhere() -> None:
    with evaluating(seed=0, device=CPU):
        target = target_of(linear())
        loc, tril = laplace(target, target.draw_guide(1)[0])
        astray = one(loc + 8 * tril[..., 0], 0.5 * tril)
        richer = add_components(target, astray, loc.expand(2, -1, -1))
    share = richer.log_weight.exp()
    assert (share[0] < 0.1).all()
    assert len(share) < 8  # draws of the first proposal count as its own
    torch.testing.assert_close(share.sum(0), torch.ones(13))


def test_a_proposal_that_fits_gets_no_component() -> None:
    with evaluating(seed=0, device=CPU):
        target = target_of(linear())
        loc, tril = laplace(target, target.draw_guide(1)[0])
        proposal = one(loc, 1.1 * tril)
        richer = add_components(target, proposal, loc.expand(2, -1, -1))
    assert richer.loc.shape == (1, *loc.shape)
    torch.testing.assert_close(richer.log_weight, proposal.log_weight)


def test_weights_of_components_are_those_of_the_density_that_they_make_up() -> None:
    """p = 0.2 t + 0.8 t', which overlap; the first has made two draws for each of the second."""
    places, tril = torch.tensor([0.0, 2.5]).view(2, 1, 1), torch.ones(1, 1, 1)
    parts = [one(place, tril) for place in places]
    u = torch.cat([parts[0].draw(20_000), parts[1].draw(10_000)])
    density = torch.stack([part.log_prob(u) for part in parts])
    share = torch.tensor([0.2, 0.8])
    log_p = (density + share.log().view(2, 1, 1)).logsumexp(0)
    found = _fit_weights(parts, density, log_p)
    assert torch.equal(found.loc, places)
    torch.testing.assert_close(found.log_weight.exp()[:, 0], share, atol=0.03, rtol=0)


def test_a_pilot_sees_the_variance_that_its_draws_do_not() -> None:
    """Half of the posterior is where the proposal is not: the draws agree, a walk does not."""
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=7))
        loc, tril = laplace(target, target.draw_guide(1)[0])
        good, _ = escalating._pilot(fit_of(target, one(loc, 1.1 * tril)), 0.05, 400)
        narrow, visited = escalating._pilot(fit_of(target, one(loc, 0.4 * tril)), 0.05, 400)
    assert visited.shape == (hmc.WALKS * hmc.MOVES, 7, 3)
    assert (good > 10).all()
    assert (good < 1000).all()
    assert (narrow > 2000).all()


def test_where_a_walk_leads_counts_in_a_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The average weight over points of the posterior is one more than the variance."""
    with evaluating(seed=0, device=CPU):
        world = linear(sigma=0.02, num_data=3, shift=9.0)
        target = target_of(world)
        loc, tril = laplace(target, world.x.new_zeros(3, 3))
        fit = fit_of(target, one(loc, 0.6 * tril))
        points = torch.stack([*[loc] * hmc.WALKS, loc, loc + 4 * tril[..., 0]])
        monkeypatch.setattr(escalating, "walk", lambda *args: points.clone())
        needed, visited = escalating._pilot(fit, 0.05, 400)
        relative = (fit.log_weights(points, 1000) - world.truth).exp()
    assert torch.equal(visited, points)
    assert (relative[-1] > 20).all()
    expected = (relative[-2:].mean(0) - 1) / (escalating.MARGIN * 0.05) ** 2
    torch.testing.assert_close(needed, expected, rtol=0.5, atol=0)


def test_a_second_walk_counts_as_the_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both walks stay at the mode, where the weight exceeds p(x) by a known share."""
    with evaluating(seed=0, device=CPU):
        world = linear(num_data=3)
        target = target_of(world)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        fit = fit_of(target, one(loc, 1.1 * tril))
        points = torch.stack([loc] * (hmc.WALKS + 2))
        monkeypatch.setattr(escalating, "walk", lambda *args: points.clone())
        needed, _ = escalating._pilot(fit, 0.005, 4000)
        excess = (fit.log_weights(points, 1000) - world.truth).exp()[0] - 1
    assert (excess > 0.2).all()
    torch.testing.assert_close(needed * (escalating.MARGIN * 0.005) ** 2, excess, rtol=0.1, atol=0)


def test_a_second_fit_mends_every_component_beside_the_first() -> None:
    with evaluating(seed=0, device=CPU):
        target = target_of(linear(num_data=3))
        loc, tril = laplace(target, target.draw_guide(1)[0])
        poor = Proposal(
            torch.tensor([[0.5, 1.0, 0.5], [0.5, 0.0, 0.5]]).log(),
            torch.stack([loc + tril[..., 0], loc - tril[..., 0]]),
            torch.stack([1.7 * tril, 0.6 * tril]),
        )
        first = fit_of(target, poor)
        both = first.refit().proposal
    torch.testing.assert_close(both.log_weight.logsumexp(0), torch.zeros(3))
    torch.testing.assert_close(both.log_weight[:2], poor.log_weight - math.log(2))
    torch.testing.assert_close(both.loc[:2], poor.loc)
    torch.testing.assert_close(both.tril[:2], poor.tril)
    kept = poor.log_weight.isfinite()
    assert torch.equal(both.log_weight[2:].isfinite(), kept)
    away = torch.linalg.solve(tril, (both.loc[2:] - loc).unsqueeze(-1)).norm(dim=(-2, -1))
    assert (away[kept] < 0.1).all()
    scale = torch.linalg.solve(_widen(tril), both.tril[2:])[kept].diagonal(dim1=-2, dim2=-1)
    assert ((scale > 0.93) & (scale < 1.07)).all()


def test_a_pilot_follows_large_weights_into_a_tail_that_its_draws_hardly_reach() -> None:
    """Two fifths of each posterior have weights above 10, but two draws of a hundred."""
    with evaluating(seed=0, device=CPU):
        world = linear(sigma=0.02, num_data=101)
        target = target_of(world)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        fit = fit_of(target, one(loc, tril * torch.tensor([0.35, 0.35, 1.0])))
        needed, _ = escalating._pilot(fit, 0.05, 400)
        exact = loc + torch.einsum("bij,kbj->kbi", tril, torch.randn(500, *loc.shape))
        relative = (fit.log_weights(exact, 1000) - world.truth).exp()
    assert ((relative > 10).double().mean() - 0.41).abs() < 0.02
    variance = relative.mean() - 1
    low, middle = needed.quantile(torch.tensor([0.15, 0.5])) * (escalating.MARGIN * 0.05) ** 2
    assert low > variance / 4
    assert middle < 2 * variance


def test_the_variance_of_a_pilot_is_exact_on_average() -> None:
    """One dimension, where the variance of the weights is an integral."""
    with evaluating(seed=0, device=CPU):
        world = linear(num_data=1)
        rows = world.x.expand(17, -1)
        target = Target(world.model, world.guide, rows, chunk_size=30_000)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        fit = fit_of(target, one(loc, 1.4 * tril))
        needed, _ = escalating._pilot(fit, 0.05, 400)
        weights = torch.cat([weights for _, weights in fit.weighted_draws(3000)]).exp()
    variance = (weights.var() / weights.mean() ** 2).item()
    found = needed.median().item() * (escalating.MARGIN * 0.05) ** 2
    assert variance < found < 1.6 * variance  # the larger of two estimates


def test_a_small_budget_is_for_one_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    pilots, run = [], escalating._pilot
    monkeypatch.setattr(escalating, "_pilot", lambda *args: (pilots.append(args), run(*args))[1])
    with evaluating(seed=0, device=CPU):
        escalating.escalate(target_of(linear(num_data=2)), 1e-6, 5000)
    assert len(pilots) == 1


def test_draws_follow_the_need_and_rows_stay_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escalating, "DRAWS", (1000, 2000))
    monkeypatch.setattr(escalating, "AIS_CHAINS", 31)
    with evaluating(seed=0, device=CPU):
        world = linear(num_data=5)
        target = target_of(world)
        loc, tril = laplace(target, target.draw_guide(1)[0])
        fit = fit_of(target, one(loc, 1.1 * tril))
        needed = torch.tensor([1500.0, torch.inf, 0.0, 2000.0, 2001.0])
        exact = loc.unsqueeze(0)
        result = escalating._estimate_by_need(fit, needed, 0.05, math.inf, exact)
        poor = escalating._estimate_by_need(fit, needed, 0.05, 1999, exact)
    assert result.num_samples.tolist() == [2000, 31, 1000, 2000, 31]
    assert poor.num_samples.tolist() == [1000] * 5
    error = (result.log_prob - world.truth).abs()
    assert (error < 5 * result.stderr + 1e-3).all()
    expected = fit.log_weights(exact, 1000)[0][[2]]
    torch.testing.assert_close(result.extras["exact"][[2]], expected)
    assert result.extras["exact"].isfinite().all()


def banana(num_data: int) -> World:
    """x = z_1 + z_2^2 + noise, the same datum again and again."""
    x = torch.full((num_data, 1), 2.0)

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = (z[..., 0] + z[..., 1].square()).unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, 0.2).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(x.expand(-1, 2) / 2, 1.0).to_event(1))

    def log_density(z: Tensor) -> Tensor:
        noise = dist.Normal(z.square(), 1.04**0.5)
        return (dist.Normal(0.0, 1.0).log_prob(z) + noise.log_prob(x[:1])).T

    return World(model, guide, x, quadrature(log_density, -8.0, 8.0).expand(num_data))


@pytest.mark.parametrize(
    ("repeats", "tolerance"), [(37, 0.15), pytest.param(241, 0.05, marks=pytest.mark.slow)]
)
def test_choosing_the_number_of_draws_costs_no_coverage(repeats: int, tolerance: float) -> None:
    """Over repeats of one datum: as often within two standard errors as a fixed number."""
    world = banana(repeats)
    e = log_evidence(world.model, world.guide, world.x, tolerance=tolerance, audit=False)
    fixed = refined_importance_sampling(world.model, world.guide, world.x)
    covered, usual = (
        ((r.log_prob - world.truth).abs() < 2 * r.stderr).double().mean() for r in (e, fixed)
    )
    assert covered > min(usual, 0.95) - 3 * (0.05 / repeats) ** 0.5
    ratio = (e.log_prob - world.truth).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / repeats**0.5
