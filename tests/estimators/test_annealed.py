"""Annealed importance sampling and its bidirectional form against exact log p(x)."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from worlds import WORLDS, World, data, linear, misses, quadrature

from pyro_vae.densities import evaluating
from pyro_vae.estimators import annealed_importance_sampling, bidirectional
from pyro_vae.estimators.annealed import STARTS, Bracket, Path, make_start
from pyro_vae.estimators.hmc import Point, hmc_step
from pyro_vae.estimators.target import Target

pytestmark = pytest.mark.usefixtures("float64")

CPU = torch.device("cpu")


def logarithm() -> World:
    """No number for z > 1: a density of zero there, into which the moves run."""

    def model(x: Tensor) -> None:
        with data(len(x)), pyro.validation_enabled(False):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal((1 - z).log(), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(1 - x.exp(), 0.01))

    x = torch.linspace(-2.5, 1.0, 11)
    prior = dist.Normal(torch.zeros(()), 1.0)

    def log_density(z: Tensor) -> Tensor:
        value = prior.log_prob(z) + dist.Normal((1 - z).log(), 0.5).log_prob(x[:, None])
        return value.T

    return World(model, guide, x, quadrature(log_density, -9.0, 1 - 1e-9))


@pytest.mark.parametrize("name", WORLDS)
def test_the_truth_is_found_in_every_world(name: str) -> None:
    world = WORLDS[name]()
    e = annealed_importance_sampling(world.model, world.guide, world.x, num_chains=211)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert abs(e.mean() - world.truth.mean().item()) < 0.02
    assert e.verdict.count("reliable") >= len(world.x) - 3
    assert e.num_samples.tolist() == [211] * len(world.x)


GUIDES = [(0.0, 1.0), (1.0, 0.5), (0.0, 3.0)]


@pytest.mark.parametrize("guide", GUIDES, ids=str)
@pytest.mark.parametrize("start", STARTS)
def test_every_start_from_any_guide(start: str, guide: tuple[float, float]) -> None:
    """Each schedule with each start and each guide."""
    world = linear(0.7, *guide, num_data=7)
    schedule = ["sigmoid", "linear"][([*STARTS].index(start) + GUIDES.index(guide)) % 2]
    e = annealed_importance_sampling(
        world.model,
        world.guide,
        world.x,
        num_temperatures=67,
        num_chains=103,
        start=start,
        schedule=schedule,
    )
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert abs(e.mean() - world.truth.mean().item()) < 4 * e.mean_stderr()[0] + 0.005
    assert set(e.verdict) == ({"reliable"} if start == "refined" else {"lower bound"})


@pytest.mark.parametrize("start", STARTS)
def test_weights_are_unbiased_both_ways_at_few_temperatures(start: str) -> None:
    """E[w] = p(x) forward, E[1 / w] = 1 / p(x) from exact draws, whatever the moves do."""
    world = linear(2.0, 0.3, 1.2, latent_dim=2, data_dim=3, num_data=3)
    C = 4001
    with evaluating(seed=0, device=CPU):
        target = Target(world.model, world.guide, world.x, chunk_size=10_000)
        path = Path(make_start(start, target), 3, 2, "linear")
        exact = exact_posterior(world, target, C)
        forward = (path.forward(C) - world.truth).exp()
        reverse = (world.truth - path.reverse(exact)).exp()
    for ratio in (forward, reverse):
        assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / C**0.5).all()
        assert (ratio.std(0) > 0.05).all()


def exact_posterior(world: World, target: Target, num_draws: int) -> Tensor:
    """Exact draws by rejection-free means: simple Monte Carlo, resampled from many."""
    u, _, log_likelihood = target.draw_prior(200_003)
    index = torch.multinomial(torch.softmax(log_likelihood, 0).T, num_draws, True).T
    return u.gather(0, index.unsqueeze(-1).expand(-1, -1, target.dim))


def test_where_the_model_is_no_number_nothing_is_averaged_in() -> None:
    world = logarithm()
    for start in ("prior", "refined"):
        e = annealed_importance_sampling(
            world.model, world.guide, world.x, start=start, num_temperatures=53, num_chains=211
        )
        assert misses(e.log_prob, e.stderr, world.truth) < 5


def test_a_proposal_that_is_no_number_is_rejected() -> None:
    """Chains of the first datum move to NaN and stay; those of the second go on."""

    def at(u: Tensor) -> Point:
        value = -u.square().sum(-1) / 2 * torch.tensor([torch.nan, 1.0])
        return Point(u, value, value, -u, -u)

    u = torch.randn(11, 2, 3)
    known = -u.square().sum(-1) / 2
    moved, probability = hmc_step(
        at,
        Point(u, known, known, -u, -u),
        0.5,
        step_size=torch.tensor([0.1, 0.1]),
        scale_tril=torch.eye(3).expand(2, 3, 3),
        num_leapfrog=3,
    )
    assert torch.equal(moved.u[:, 0], u[:, 0])
    assert moved.log_joint.isfinite().all()
    assert (probability[:, 0] == 0).all()
    assert (probability[:, 1] > 0.9).all()
    assert (moved.u[:, 1] != u[:, 1]).any()


def test_moves_leave_the_density_as_it_is() -> None:
    """A thousand chains at a Gaussian with a coarse step: acceptance must correct it."""
    scale = torch.tensor([0.5, 2.0])

    def at(u: Tensor) -> Point:
        value = -(u / scale).square().sum(-1) / 2
        slope = -u / scale**2
        return Point(u, torch.zeros_like(value), value, torch.zeros_like(u), slope)

    point = at(scale * torch.randn(4001, 3, 2))
    accepted = []
    for _ in range(10):
        point, probability = hmc_step(
            at,
            point,
            1.0,
            step_size=torch.tensor([0.3, 0.7, 0.9]),
            scale_tril=torch.eye(2).expand(3, 2, 2),
            num_leapfrog=2,
        )
        accepted.append(probability.mean(0))
    variance = point.u.square().mean(0) / scale**2
    assert ((variance - 1).abs() < 5 * (2 / 4001) ** 0.5).all()
    assert accepted[-1][2] < 0.9


def test_step_sizes_are_set_for_each_datum_and_kept() -> None:
    world = linear(sigma=0.3)
    with evaluating(seed=0, device=CPU):
        path = Path(
            make_start("prior", Target(world.model, world.guide, world.x)), 23, 2, "linear"
        )
        before = path.step_sizes.clone()
        path.forward(5)
    assert path.step_sizes.shape == (24, 13)
    assert torch.equal(before, path.step_sizes)
    assert (before[-1].std() > 0).all()
    assert (before[-1] < before[1]).all()


@pytest.mark.parametrize("start", STARTS)
def test_bounds_bracket_the_truth_on_average(start: str) -> None:
    world = linear(0.7, 0.3, 0.7, num_data=3)
    b = bidirectional(world.model, world.guide, world.x, num_data=61, start=start, num_chains=11)
    assert len(b) == len(b.x) == 61
    truth = evidence(b.x)
    for error in (truth - b.lower, b.upper - truth):
        assert error.mean() > -3 * error.std() / 61**0.5
        assert error.mean() < 2.5
        ratio = (-error).exp()  # unbiased: w / p(x) forward, p(x) / w back
        assert abs(ratio.mean() - 1) < 5 * ratio.std() / 61**0.5
    lower, upper, gap = b.mean()
    assert gap == pytest.approx(upper - lower)
    assert gap > -3 * b.mean_stderr()[2]
    assert f"gap {gap:.3f}" in repr(b)


def test_one_datum_has_no_standard_error_over_data() -> None:
    one = Bracket(torch.tensor([-2.0]), torch.tensor([-1.5]), torch.zeros(1, 1))
    assert one.mean() == (-2.0, -1.5, 0.5)
    assert all(map(math.isnan, one.mean_stderr()))


def evidence(x: Tensor) -> Tensor:
    """log p(x) of other data in the linear world of sigma 0.7."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(3, 5, generator=generator)
    covariance = W.T @ W + 0.49 * torch.eye(5)
    return dist.MultivariateNormal(torch.zeros(5), covariance).log_prob(x)


def test_the_gap_shrinks_with_the_temperatures() -> None:
    world = linear(0.5)
    gaps = [
        bidirectional(
            world.model,
            world.guide,
            world.x,
            num_data=23,
            start="prior",
            num_temperatures=num_temperatures,
            num_chains=7,
        ).mean()[2]
        for num_temperatures in (5, 150)
    ]
    assert gaps[1] < gaps[0] / 3


def test_simulated_data_are_the_models() -> None:
    world = linear(0.7, num_data=1)
    with evaluating(seed=0, device=CPU):
        template = Target(world.model, world.guide, world.x.expand(3001, -1))
        target, exact = template.simulated()
    assert exact.shape == (1, 3001, 3)
    assert torch.allclose(exact.mean(), torch.zeros(()), atol=0.1)
    centred = evidence(target.x)
    entropy = evidence(torch.zeros(1, 5)) - 2.5
    assert (centred.mean() - entropy).abs() < 0.2


def test_models_that_observe_other_than_x_are_not_simulated() -> None:
    world = linear()

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("first", dist.Normal(z[..., 0], 1.0), obs=x[:, 0])

    with pytest.raises(ValueError, match="one observed site is x itself.*'first'"):
        bidirectional(model, world.guide, world.x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_temperatures": 0}, "num_temperatures must be at least 1; got 0"),
        ({"num_chains": 0}, "num_chains must be at least 1; got 0"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1; got 0"),
        ({"start": "posterior"}, "start must be 'prior', 'guide' or 'refined'; got 'posterior'"),
        ({"schedule": "cosine"}, "schedule must be 'sigmoid' or 'linear'; got 'cosine'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    world = linear()
    for estimate in (annealed_importance_sampling, bidirectional):
        with pytest.raises(ValueError, match=message):
            estimate(world.model, world.guide, world.x, **options)


def test_a_guide_without_density_starts_no_path() -> None:
    world = linear()

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Delta(x[:, :3], event_dim=1))

    with pytest.raises(ValueError, match="the guide is a Delta"):
        annealed_importance_sampling(world.model, guide, world.x, start="guide")
