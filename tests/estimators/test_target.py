"""The density over unconstrained vectors integrates to what it should."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform, Transform, biject_to, constraints
from worlds import WORLDS, data, gamma_poisson, linear, misses

from pyro_vae.densities import evaluating
from pyro_vae.estimators.coordinates import is_discrete
from pyro_vae.estimators.target import Target, gradients

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _inside() -> object:
    with evaluating(seed=0, device=torch.device("cpu")):
        yield


def test_densities_of_a_positive_latent_integrate_in_its_new_coordinate() -> None:
    world = gamma_poisson()
    target = Target(world.model, world.guide, world.x)
    u = torch.linspace(-60, 30, 20_001)[:, None, None].expand(-1, len(world.x), 1)
    cell = math.log(90 / 20_000)
    run = target.run_model(u)
    log_prior, log_likelihood = run.log_prior, run.log_likelihood
    for log_density, expected in (
        (target.log_joint(u), world.truth),
        (log_prior + log_likelihood, world.truth),
        (log_prior, torch.zeros(17)),
        (target.log_guide(u), torch.zeros(17)),
    ):
        torch.testing.assert_close(log_density.logsumexp(0) + cell, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", WORLDS)
def test_weights_of_prior_draws_average_to_the_evidence(name: str) -> None:
    world = WORLDS[name]()
    target = Target(world.model, world.guide, world.x, chunk_size=301)
    u, log_prior, log_likelihood = target.draw_prior(5003)
    assert u.shape == (5003, len(world.x), target.dim)
    torch.testing.assert_close(log_prior + log_likelihood, target.log_joint(u))
    weight = (log_likelihood - world.truth).exp()
    assert ((weight.mean(0) - 1).abs() < 5 * weight.std(0) / 5003**0.5 + 1e-3).all()


@pytest.mark.parametrize("name", WORLDS)
def test_the_guide_scores_what_it_draws(name: str) -> None:
    world = WORLDS[name]()
    target = Target(world.model, world.guide, world.x)
    u = target.draw_guide(2003)
    latents, log_det = target._latents(u)
    torch.testing.assert_close(target.vector(latents), u)
    assert target.log_guide(u).isfinite().all()
    assert log_det.shape == (2003, len(world.x))


def test_coordinates_are_in_units_of_the_prior() -> None:
    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(5 * torch.ones(3), 100.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    target = Target(model, guide, torch.zeros(101, 3))
    assert 90 < target.scale.mean() < 110


def test_gradients_are_those_of_the_density_in_any_chunks() -> None:
    world = WORLDS["funnel"]()
    target = Target(world.model, world.guide, world.x)
    u = target.draw_guide(7)
    (value,), (slope,) = gradients(lambda u: (target.log_joint(u),), u, 2)
    step = 1e-6 * torch.randn_like(u)
    change = target.log_joint(u + step) - target.log_joint(u - step)
    torch.testing.assert_close(change, 2 * (slope * step).sum(-1), atol=1e-11, rtol=1e-4)
    torch.testing.assert_close(value, target.log_joint(u))


def test_gradients_are_those_of_each_of_several_densities() -> None:
    u, constant = torch.randn(5, 2, 3), torch.ones(5, 2, requires_grad=True)

    def densities(u: Tensor) -> tuple[Tensor, ...]:
        both = u.square().sum(-1).exp()
        return both, both.log(), constant[: len(u)] * 7

    values, slopes = gradients(densities, u, 2)
    square = u.square().sum(-1)
    expected = (square.exp(), square, torch.full((5, 2), 7.0))
    torch.testing.assert_close(values, expected)
    expected = (2 * u * square.exp().unsqueeze(-1), 2 * u, torch.zeros(5, 2, 3))
    torch.testing.assert_close(slopes, expected)
    assert constant.grad is None


def test_a_distribution_that_states_no_support_is_not_known_to_be_discrete() -> None:
    class Bare(TorchDistribution):
        arg_constraints = {}

    fns = [Bare(), dist.Normal(0.0, 1.0), dist.Poisson(2.0), dist.Bernoulli(torch.ones(2) / 2)]
    assert [is_discrete(fn) for fn in [*fns, fns[-1].to_event(1)]] == [False] * 2 + [True] * 3


def test_rows_take_what_they_are_conditioned_on_along() -> None:
    world = linear()

    def model(x: Tensor, y: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + y, 1.0).to_event(1), obs=x[:, :3])

    target = Target(model, lambda x, y: world.guide(x), world.x, torch.randn(13, 3))
    u, some = target.draw_guide(7), torch.tensor([11, 2, 5])
    part = target.rows(some)
    torch.testing.assert_close(part.log_joint(u[:, some]), target.log_joint(u)[:, some])
    torch.testing.assert_close(part.log_guide(u[:, some]), target.log_guide(u)[:, some])


def test_single_precision_is_within_a_thousandth() -> None:
    world = linear(sigma=0.01, latent_dim=5, data_dim=101)
    x = world.x.float()
    double = Target(world.model, world.guide, x.double())
    single = Target(world.model, world.guide, x, scale=double.scale)
    u = double.draw_guide(17)
    assert (single.log_joint(u) - double.log_joint(u)).abs().max() < 1e-3
    assert (single.log_guide(u) - double.log_guide(u)).abs().max() < 3e-3


def discrete(x: Tensor) -> None:
    with data(len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(c.double(), 1.0), obs=x)


def discrete_guide(x: Tensor) -> None:
    with data(len(x)):
        pyro.sample("c", dist.Categorical(torch.ones(3) / 3))


def moving(x: Tensor) -> None:
    with data(len(x)):
        a = pyro.sample("a", dist.Gamma(torch.ones(()), 1.0))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def angle(x: Tensor) -> None:
    with data(len(x)):
        a = pyro.sample("a", dist.VonMises(0.0, 1.0))
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


def missing(x: Tensor) -> None:
    with data(len(x)):
        pyro.sample("a", dist.Gamma(torch.ones(()), 1.0))


def outside(x: Tensor) -> None:
    a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
    with data(len(x)):
        pyro.sample("x", dist.Normal(a, 1.0), obs=x)


@pytest.mark.parametrize(
    ("model", "guide", "message"),
    [
        (discrete, discrete_guide, "site 'c' is discrete .*sum it out"),
        (moving, pyro.poutine.block(moving, hide=["x"]), "support of site 'b' depends on another"),
        (moving, missing, "same latent sites; \\['b'\\]"),
        (outside, missing, "plate 'data'"),
        (angle, pyro.poutine.block(angle, hide=["x"]), "prior VonMises has no finite mass on its"),
    ],
)
def test_programs_that_have_no_such_density_are_refused(
    model: object, guide: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Target(model, guide, torch.zeros(5))


@pytest.mark.parametrize(
    "prior", [dist.Laplace(0.0, 0.1), dist.Gamma(400.0, 1.0), dist.Gamma(20.0, 1.0)]
)
def test_narrow_priors_of_many_dimensions_have_a_finite_mass(prior: TorchDistribution) -> None:
    def model(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", prior.expand([31]).to_event(1))
            pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x)

    Target(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(5))


@pytest.mark.parametrize(
    ("base", "transforms"),
    [
        (dist.Exponential(torch.arange(1.0, 6.0)), [AffineTransform(1.0, -1.0)]),
        (dist.Normal(torch.zeros(5), 3.0), [biject_to(constraints.interval(-1.0, 2.0))]),
        (dist.Normal(torch.zeros(5), 1.0), [AffineTransform(0.5, 2.0)]),
        (dist.Exponential(torch.arange(1.0, 6.0)), [ExpTransform()]),
        (
            dist.TransformedDistribution(
                dist.Exponential(torch.arange(1.0, 6.0)), [AffineTransform(1.0, 2.0)]
            ),
            [ExpTransform()],
        ),
        (dist.Beta(0.5 * torch.ones(5), 0.5), [AffineTransform(-1.0, 3.0)]),
        (dist.Beta(0.5 * torch.ones(5), 0.5), [AffineTransform(0.5, -2.0)]),
        (dist.Gamma(0.6 * torch.ones(5), 1.0), [AffineTransform(1.0, 2.0)]),
    ],
)
def test_moved_and_scaled_priors_integrate_to_one(
    base: TorchDistribution, transforms: list[Transform]
) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.TransformedDistribution(base, transforms))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    target = Target(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(5))
    u = torch.linspace(-60, 60, 40_001)[:, None, None].expand(-1, 5, 1)  # to edges of supports
    mass = target.run_model(u).log_prior.logsumexp(0) + math.log(120 / 40_000)
    torch.testing.assert_close(mass, torch.zeros(5), atol=1e-3, rtol=0)


def test_a_scaled_simplex_keeps_all_its_parts() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            base, scale = dist.Dirichlet(torch.ones(3)), AffineTransform(0.0, 2.0, event_dim=1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [scale]))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    target = Target(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(5))
    line = torch.linspace(-12, 12, 201)
    u = torch.cartesian_prod(line, line)[:, None].expand(-1, 5, 2)
    mass = target.run_model(u).log_prior.logsumexp(0) + 2 * math.log(24 / 200)
    torch.testing.assert_close(mass, torch.zeros(5), atol=1e-3, rtol=0)


def test_angles_are_refused() -> None:
    def many(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.VonMises(torch.zeros(19), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(a.sum(-1), 1.0), obs=x)

    def moved(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.VonMises(x + torch.arange(5.0), 1.5))
            pyro.sample("x", dist.Normal(a.cos(), 1.0), obs=x)

    def mixed(x: Tensor) -> None:
        with data(len(x)):
            parts = dist.VonMises(x[:, None] + torch.arange(2 * len(x)).view(-1, 2), 2.0)
            a = pyro.sample("a", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
            pyro.sample("x", dist.Normal(a.cos(), 1.0), obs=x)

    for model, kind in ((many, "VonMises"), (moved, "VonMises"), (mixed, "MixtureSameFamily")):
        with pytest.raises(ValueError, match=f"{kind} has no finite mass"):
            Target(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(5))


def test_zeros_of_a_matrix_stay_zeros() -> None:
    def model(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.LKJCholesky(3, torch.ones(())))
            pyro.sample("x", dist.Normal(a[..., 1, 0], 1.0), obs=x)

    target = Target(model, pyro.poutine.block(model, hide=["x"]), torch.zeros(5))
    (values,) = target._latents(torch.zeros(2, 5, 3))[0].values()
    assert (values.triu(1) == 0).all()
    assert target.log_joint(torch.zeros(2, 5, 3)).isfinite().all()


def test_a_model_that_is_no_number_is_refused() -> None:
    def flat(x: Tensor) -> None:
        with data(len(x)), pyro.validation_enabled(False):
            a = pyro.sample("a", dist.Gamma(torch.ones(()), 1.0))
            pyro.sample("x", dist.Normal(a * math.nan, 1.0), obs=x)

    with pyro.validation_enabled(False):
        with pytest.raises(ValueError, match="NaN at a draw of the guide for 5 of 5 data"):
            Target(flat, missing, torch.zeros(5))


def test_a_prior_may_have_no_mass_in_a_part_of_its_support() -> None:
    class Within(dist.Uniform):
        support = constraints.real

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", Within(-1.0, 1.0, validate_args=False))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(0.4 * x.tanh(), 0.2))

    x = torch.tensor([0.0, 2.0])
    _, _, log_likelihood = Target(model, guide, x).draw_prior(20_000)
    truth = (dist.Normal(x, 0.5).cdf(torch.ones(2)) - dist.Normal(x, 0.5).cdf(-torch.ones(2))) / 2
    torch.testing.assert_close(log_likelihood.exp().mean(0), truth, rtol=0.05, atol=0)


@pytest.mark.parametrize("learned", [False, True])
def test_a_likelihood_without_gradient_is_refused(learned: bool) -> None:
    scale = torch.ones((), requires_grad=learned)

    def model(x: Tensor) -> None:
        with data(len(x)):
            a = pyro.sample("a", dist.Gamma(torch.ones(()), 1.0))
            pyro.sample("x", dist.Normal(a.detach(), scale), obs=x)

    target = Target(model, missing, torch.zeros(5))
    with pytest.raises(ValueError, match="no gradient with respect to z.*importance_sampling"):
        target.check_gradient()


def test_misses_counts_standard_errors() -> None:
    assert misses(torch.ones(2), torch.tensor([0.1, 0.2]), torch.zeros(2)) > 9
