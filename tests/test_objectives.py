"""Laws of every objective; the ELBO against Pyro's own and against closed forms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, two_sites
from families import OBJECTIVES, draw, make, name
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_vae.densities import densities, scale_latents
from pyro_vae.distributions import FullNormal
from pyro_vae.objectives import ELBO, Objective
from pyro_vae.priors import FlowPrior, MixtureOfGaussians
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

each = pytest.mark.parametrize("cls", OBJECTIVES, ids=name)
B, K, D, F, N = 7, 11, 2, 5, 23


def value_and_gradient(loss: Callable[[], Tensor], vae: VAE) -> tuple[Tensor, list[Tensor]]:
    """Of a loss whose draws start from one seed."""
    torch.manual_seed(1)
    value = loss()
    given = list(vae.parameters())
    gradient = torch.autograd.grad(value, given, allow_unused=True, materialize_grads=True)
    return value.detach(), list(gradient)


def assert_equal(first: tuple, second: tuple) -> None:
    torch.testing.assert_close(first[0], second[0], rtol=1e-10, atol=1e-10)
    for a, b in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def pyros(cls: type, num_particles: int) -> pyro.infer.ELBO:
    return cls(num_particles=num_particles, vectorize_particles=True, max_plate_nesting=1)


def build(cls: type, vae: VAE, x: Tensor, y: Tensor | None = None, **options: object) -> Objective:
    """An objective ready for its first step."""
    objective = cls(**options)
    objective.prepare(N, 5)
    if objective.own_step:
        objective.start(densities(vae.model, vae.guide, x, y))
    return objective


# --- laws --------------------------------------------------------------------------------------


@each
def test_svi_takes_the_step_of_the_differentiable_loss(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    objective = build(cls, vae, x)
    loss, gradient = value_and_gradient(
        lambda: objective.differentiable_loss(vae.model, vae.guide, x), vae
    )
    start = [p.detach().clone() for p in vae.parameters()]
    svi = SVI(vae.model, vae.guide, pyro.optim.SGD({"lr": 1e-3}), loss=objective)
    if objective.own_step:
        with pytest.raises(ValueError, match="second player"):
            svi.step(x)
        return
    torch.manual_seed(1)
    assert svi.evaluate_loss(x) == pytest.approx(loss.item(), rel=1e-10)
    assert all(torch.equal(p, s) for p, s in zip(vae.parameters(), start))
    torch.manual_seed(1)
    assert svi.step(x) == pytest.approx(loss.item(), rel=1e-10)
    for p, s, g in zip(vae.parameters(), start, gradient, strict=True):
        torch.testing.assert_close(p.detach(), s - 1e-3 * g, rtol=1e-9, atol=1e-12)


@each
def test_the_loss_is_minus_the_bound_summed_over_data(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    objective = build(cls, vae, x)
    torch.manual_seed(1)
    bound = objective.bound(
        densities(vae.model, vae.guide, x, num_particles=objective.num_particles)
    )
    assert bound.shape == (B,)
    torch.manual_seed(1)
    loss = objective.loss(vae.model, vae.guide, x)
    assert isinstance(loss, float)
    assert loss == pytest.approx(-bound.sum().item(), rel=1e-10)


@each
def test_the_loss_leaves_parameters_gradients_and_the_store(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    before = copy.deepcopy(vae.state_dict())
    objective = build(cls, vae, x)
    objective.loss(vae.model, vae.guide, x)
    objective.differentiable_loss(vae.model, vae.guide, x).backward()
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert len(pyro.get_param_store()) == 0


@each
def test_weights_inside_the_programs_are_refused(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    model, guide = scale_latents(vae.model, 0.3), scale_latents(vae.guide, 0.3)
    with pytest.raises(ValueError, match="site 'z' is scaled by 0.3 inside the program"):
        build(cls, vae, x).differentiable_loss(model, guide, x)
    for weight in (2.0, torch.tensor(2.0)):
        with pytest.raises(ValueError, match="scaled by .*2"):
            build(cls, vae, x).differentiable_loss(poutine.scale(vae.model, weight), vae.guide, x)
    with pytest.raises(ValueError, match="site 'z' is scaled by 2.0"):
        build(cls, vae, x).differentiable_loss(vae.model, poutine.scale(vae.guide, 2.0), x)


@each
@pytest.mark.parametrize("num_particles", [0, -3])
def test_no_particles_are_refused(cls: type, num_particles: int) -> None:
    with pytest.raises(ValueError, match=f"num_particles must be at least 1; got {num_particles}"):
        cls(num_particles=num_particles)


@each
def test_the_guide_and_the_encoder_run_once_whatever_the_particles(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    rows: list[int] = []
    vae.posterior.encoder.register_forward_hook(lambda _, args, out: rows.append(args[0].numel()))
    objective = build(cls, vae, x, num_particles=6 * cls().num_particles)
    objective.loss(vae.model, vae.guide, x)  # which tries the programs
    rows.clear()
    objective.loss(vae.model, vae.guide, x)
    assert rows == [B * 7]


@each
def test_the_loss_given_y_depends_on_it(cls: type) -> None:
    vae = make(condition_dim=3)
    y = torch.randn(B, 3)
    x = draw(vae, B, y=y)
    objective, losses = build(cls, vae, x, y), []
    for given in (y, y + 1):
        torch.manual_seed(1)
        losses.append(objective.loss(vae.model, vae.guide, x, given))
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="got none"):
        objective.loss(vae.model, vae.guide, x)


@each
@pytest.mark.parametrize("factor", [1, 10])  # with ten, 23 / 7 is not what it was
def test_a_subsampled_plate_scales_the_loss(cls: type, factor: int) -> None:
    vae = make()
    x = draw(vae, B)

    def model(x: Tensor) -> None:
        with pyro.plate("data", N, subsample=x):
            pyro.sample("x", vae.likelihood(pyro.sample("z", vae.prior())), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", N, subsample=x):
            pyro.sample("z", vae.posterior(x))

    objective = build(cls, vae, x, num_particles=factor * cls().num_particles)
    loss, gradient = value_and_gradient(
        lambda: objective.differentiable_loss(vae.model, vae.guide, x), vae
    )
    scaled = value_and_gradient(lambda: objective.differentiable_loss(model, guide, x), vae)
    assert_equal(scaled, (loss * N / B, [g * N / B for g in gradient]))


# --- the ELBO ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, K])
@pytest.mark.parametrize(
    ("kl", "cls"), [("sampled", Trace_ELBO), ("analytic", TraceMeanField_ELBO)]
)
def test_elbo_is_pyros(kl: str, cls: type, num_particles: int) -> None:
    vae = make()
    x = draw(vae, B)
    ours, theirs = ELBO(kl=kl, num_particles=num_particles), pyros(cls, num_particles)
    assert_equal(
        value_and_gradient(lambda: ours.differentiable_loss(vae.model, vae.guide, x), vae),
        value_and_gradient(lambda: theirs.differentiable_loss(vae.model, vae.guide, x), vae),
    )


@pytest.mark.parametrize("beta", [0, 0.3, 4.0])
@pytest.mark.parametrize("num_particles", [1, K])
@pytest.mark.parametrize(
    ("kl", "cls"), [("sampled", Trace_ELBO), ("analytic", TraceMeanField_ELBO)]
)
def test_beta_is_the_scale_of_the_latents_on_both_sides(
    kl: str, cls: type, num_particles: int, beta: float
) -> None:
    vae = make()
    x = draw(vae, B)
    ours, theirs = ELBO(beta, kl, num_particles), pyros(cls, num_particles)
    model, guide = scale_latents(vae.model, beta), scale_latents(vae.guide, beta)
    assert_equal(
        value_and_gradient(lambda: ours.differentiable_loss(vae.model, vae.guide, x), vae),
        value_and_gradient(lambda: theirs.differentiable_loss(model, guide, x), vae),
    )


@pytest.mark.parametrize("beta", [0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("kl", ["analytic", "sampled"])
def test_elbo_of_the_linear_gaussian_model_in_closed_form(beta: float, kl: str) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    q = exact.proposal(x, None, 0.3, 1.3)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", FullNormal(q.loc, scale_tril=q.scale_tril))

    noise = dist.Normal(q.loc @ exact.weight.T + exact.offset(), exact.sigma).to_event(1)
    spread = exact.weight @ q.covariance_matrix @ exact.weight.T
    fit = noise.log_prob(x) - spread.diagonal(0, 1, 2).sum(-1) / (2 * exact.sigma**2)
    unit = dist.MultivariateNormal(torch.zeros(D), torch.eye(D))
    truth = fit - beta * kl_divergence(q, unit)

    many = 20_011
    d = densities(exact.vae.model, guide, x, num_particles=many)
    bound = ELBO(beta, kl, many).bound(d)
    each_bound = d.log_likelihood
    if kl == "sampled":
        each_bound = each_bound - beta * (d.log_posterior - d.log_prior)
    stderr = each_bound.std(0) / many**0.5
    assert (abs(bound - truth) < 5 * stderr).all()
    assert stderr.max() < 0.1


def test_elbo_at_the_exact_posterior_is_the_evidence() -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    loss = ELBO(kl="sampled").loss(exact.vae.model, exact.guide(), x)
    assert loss == pytest.approx(-exact.log_evidence(x).sum().item(), abs=1e-9)


def test_the_rule_in_use_is_analytic_where_there_is_one() -> None:
    vae, mixed = make(), make(prior=MixtureOfGaussians)
    x = draw(vae, B)
    for pair, rule in ((vae, "analytic"), (mixed, "sampled")):
        losses = []
        for kl in ("auto", rule):
            torch.manual_seed(1)
            losses.append(ELBO(kl=kl).loss(pair.model, pair.guide, x))
        assert losses[0] == losses[1]
        assert densities(pair.model, pair.guide, x).kl_rules == {"z": rule}


@pytest.mark.parametrize(
    ("prior", "pair"),
    [
        (MixtureOfGaussians, r"Independent\(Normal\) to MixtureOfDiagonalNormals at site 'z'"),
        (FlowPrior, r"Independent\(Normal\) to Flow at site 'z'"),
    ],
)
def test_an_analytic_kl_without_a_rule_names_the_pair(prior: type, pair: str) -> None:
    vae = make(prior=prior)
    with pytest.raises(ValueError, match=f"no analytic KL from {pair}"):
        ELBO(kl="analytic").loss(vae.model, vae.guide, draw(vae, B))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_hierarchy_is_bounded_without_bias(reverse: bool) -> None:
    model, guide, evidence = two_sites(reverse)
    x = 2 * torch.randn(B)
    if reverse:  # sampled, and exact with any number of particles
        loss = ELBO().loss(model, guide, x)
        assert loss == pytest.approx(-evidence(x).sum().item(), abs=1e-9)
        return
    losses = torch.tensor([ELBO().loss(model, guide, x) for _ in range(503)])
    stderr = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() + evidence(x).sum()) < 5 * stderr
    assert ELBO(kl="analytic").loss(model, guide, x) != ELBO(kl="sampled").loss(model, guide, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -0.1}, "beta must be zero or more; got -0.1"),
        ({"kl": "mc"}, "kl must be 'auto', 'analytic' or 'sampled'; got 'mc'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELBO(**options)


def test_an_objective_is_moved_and_saved_as_a_module() -> None:
    first, second = ELBO(beta=0.3), ELBO()
    second.load_state_dict(first.state_dict())
    assert second.beta == 0.3
