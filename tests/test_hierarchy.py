"""Several layers of latents, against exact values for each order of inference."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from families import OBJECTIVES, ORDERS, accepted, draw, layered, make, name
from torch import Tensor, nn
from training.training_cases import QUIET

from pyro_vae import (
    bidirectional,
    build,
    importance_sampling,
    likelihoods,
    log_evidence,
    networks,
)
from pyro_vae.densities import densities
from pyro_vae.hierarchy import BottomUp, Ladder, Layers, Lowest, TopDown
from pyro_vae.objectives import ELBO, IWAE, FreeBits
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import ConditionalNormal, StandardNormal
from pyro_vae.training import fit
from pyro_vae.vae import VAE

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:posterior collapse"),  # of trainings of an epoch
]

B, F, K = 7, 5, 3
SIZES = (3, 2, 4)
each_order = pytest.mark.parametrize("order", ORDERS, ids=name)


def linear(in_dim: int, out_dim: int, condition_dim: int = 0) -> networks.MLP:
    """A linear network to be written into."""
    return networks.MLP(in_dim, out_dim, (), condition_dim=condition_dim)


def write(network: networks.MLP, slopes: list[float], start: float, scale: float) -> None:
    """Makes the network of one Normal give mean `slopes` @ inputs + start, and this scale."""
    with torch.no_grad():
        network.output.weight.copy_(torch.tensor([slopes, [0.0] * len(slopes)]))
        network.output.bias.copy_(torch.tensor([start, math.log(math.expm1(scale - 1e-4))]))


def scales(network: networks.MLP, scale: float) -> Tensor:
    """Makes the network of Normals linear with one scale; returns its weight and bias."""
    size = len(network.output.bias) // 2
    with torch.no_grad():
        network.output.weight.normal_()
        network.output.weight[size:] = 0
        network.output.bias.normal_()
        network.output.bias[size:] = math.log(math.expm1(scale - 1e-4))
    return network.output.weight.detach()[:size], network.output.bias.detach()[:size]


def linear_gaussian(
    order: type, sizes: tuple[int, ...] = SIZES
) -> tuple[VAE, dist.MultivariateNormal]:
    """Three linear layers under a linear Normal, and p(x)."""
    flat = {"class_path": "MLP", "init_args": {"hidden": []}}
    normal = {"class_path": "Normal", "init_args": {"scale": 0.6}}
    vae = layered(order, sizes, data_shape=F, likelihood=normal, decoder=flat)
    loc, covariance = torch.zeros(sizes[-1]), torch.eye(sizes[-1])
    for prior, scale in ((vae.prior.layers[1], 0.7), (vae.prior.layers[0], 0.4)):
        A, b = scales(prior.network, scale)
        loc, covariance = A @ loc + b, A @ covariance @ A.T + scale**2 * torch.eye(len(b))
    output = vae.likelihood.decoder.decoder.output
    C, c = output.weight.detach(), output.bias.detach()
    noise = 0.6**2 * torch.eye(F)
    return vae, dist.MultivariateNormal(C @ loc + c, C @ covariance @ C.T + noise)


def test_linear_layers_have_the_moments_of_their_closed_form() -> None:
    vae, truth = linear_gaussian(TopDown)
    x = vae.sample(100_003)
    error = x.std(0) / len(x) ** 0.5
    assert ((x.mean(0) - truth.mean).abs() < 5 * error).all()
    wrong = (torch.cov(x.T) - truth.covariance_matrix).abs() / truth.covariance_matrix.abs().max()
    assert wrong.max() < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [SIZES, (67, 71, 61)])  # 199 joined latents
def test_linear_layers_have_the_evidence_of_their_closed_form(sizes: tuple[int, ...]) -> None:
    vae, truth = linear_gaussian(TopDown, sizes)
    x = vae.sample(B)
    found = log_evidence(vae, x, audit=False)
    deviation = (found.log_prob - truth.log_prob(x)) / found.stderr.clamp(min=1e-6)
    assert deviation.abs().max() < 4
    assert found.verdict == ["reliable"] * B


def one_and_one(order: type) -> tuple[VAE, Any]:
    """z2 ~ N(0, 1), z1 ~ N(a z2, s), x ~ N(c z1, t), its exact posterior in each order, p(x)."""
    a, s, c, t = 0.8, 0.6, 1.3, 0.5
    encoders = [linear(*read[0], 2, read[1]) for read in order.reads((1,), (1, 1))]
    network, decoder = linear(1, 2), linear(2, 1)
    write(network, [a], 0.0, s)
    with torch.no_grad():
        decoder.output.weight.copy_(torch.tensor([[c, 0.0]]))
        decoder.output.bias.zero_()
    first = a**2 + s**2  # variance of z1
    noise = c**2 * s**2 + t**2  # variance of x given z2
    top, middle = 1 / (1 + (a * c) ** 2 / noise), 1 / (1 / s**2 + c**2 / t**2)
    variance = 1 / (1 / first + c**2 / t**2)
    if order is BottomUp:
        write(encoders[0], [variance * c / t**2], 0.0, variance**0.5)
        write(encoders[1], [a / first], 0.0, s / first**0.5)
    else:
        write(encoders[1], [top * a * c / noise], 0.0, top**0.5)
    if order is TopDown:
        write(encoders[0], [middle * c / t**2, middle * a / s**2], 0.0, middle**0.5)
    if order is Ladder:  # what x alone says of z1 is its likelihood
        write(encoders[0], [1 / c], 0.0, t / c)
    prior = Layers([ConditionalNormal(network, 1), StandardNormal(1)])
    posterior = order([DiagonalNormal(e, 1) for e in encoders], prior)
    vae = VAE(prior, likelihoods.Normal(decoder, (1,), scale=t), posterior)
    return vae, dist.Normal(0.0, (c**2 * first + t**2) ** 0.5)


@each_order
def test_an_exact_posterior_has_weights_without_spread(order: type) -> None:
    vae, truth = one_and_one(order)
    x = vae.sample(B)
    weights = densities(vae, x, num_particles=K).log_weights
    exact = truth.log_prob(x.squeeze(-1)).expand(K, B)
    torch.testing.assert_close(weights, exact, rtol=0, atol=1e-9)


# --- a nonlinear model of two scalar layers, summed on a grid -----------------------------------


def grid(points: int = 101, reach: float = 14.0) -> tuple[Tensor, float]:
    """Points [points^2, 2] of both latents, and the log area of each."""
    line = torch.linspace(-reach, reach, points)
    return torch.cartesian_prod(line, line), 2 * math.log((2 * reach) / (points - 1))


def curved(order: type, skip: bool) -> VAE:
    """Scalar layers z1 and z2, a model with large weights, and a guide that is wide."""
    vae = layered(order, (1, 1), data_shape=F, skip=skip)
    with torch.no_grad():
        for parameter in (*vae.prior.parameters(), *vae.likelihood.parameters()):
            parameter.mul_(2)
        vae.prior.layers[0].network.output.weight[1] = 0  # one scale, which the grid resolves
        vae.prior.layers[0].network.output.bias[1] = 0
        for q in vae.posterior.layers:
            q.encoder.output.bias[1] = 1.5
    return vae


@pytest.mark.parametrize("skip", [False, True])
@each_order
def test_densities_and_evidence_against_quadrature(order: type, skip: bool) -> None:
    vae = curved(order, skip)
    x = vae.sample(3)
    z, area = grid()
    with torch.no_grad():
        prior, posterior = vae.prior().log_prob(z), vae.encode(x).log_prob(z.unsqueeze(1))
        joint = prior + vae.likelihood(z).log_prob(x.unsqueeze(1))  # [B, points^2]
    assert abs(prior.logsumexp(0) + area) < 1e-6
    assert (posterior.logsumexp(0) + area).abs().max() < 1e-6
    truth = joint.logsumexp(-1) + area
    plain = importance_sampling(vae, x, num_samples=10_007)
    assert ((plain.log_prob - truth) / plain.stderr).abs().max() < 4
    weights = (posterior + area).exp()
    draws = vae.encode(x).sample((20_003,))
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - weights.T @ z).abs() < 5 * error).all()


# --- a top layer that says nothing, and sites ---------------------------------------------------


class Idle(StandardNormal):
    """N(0, I), whatever lies above."""

    latent_dim = 2


class Nothing(DiagonalNormal):
    """N(0, I), whatever is seen."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> dist.Independent:
        return dist.Normal(torch.zeros(len(x), 3), 1.0).to_event(1)


class Deaf(nn.Module):
    """An encoder that is given the layer above and does not look at it."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.encoder(x)


def test_a_top_layer_that_says_nothing_changes_no_bit() -> None:
    one = make(data_shape=(F,))
    prior = Layers([Idle(2), StandardNormal(3)])
    posteriors = [DiagonalNormal(Deaf(one.posterior.encoder), 2), Nothing(nn.Identity(), 3)]
    seen = likelihoods.Bernoulli(Lowest(one.likelihood.decoder, 2), (F,))
    two = VAE(prior, seen, TopDown(posteriors, prior))
    x, found = draw(one, B), []
    for vae in (one, two):
        torch.manual_seed(3)
        if vae is one:
            dist.Normal(torch.zeros(K, B, 3), 1.0).sample()  # the noise of the layer above
        d = densities(vae, x, num_particles=K)
        loss = ELBO().reduce(d)
        slopes = torch.autograd.grad(loss, list(one.likelihood.parameters()))
        weights = d.log_likelihood + d.sites[list(d.sites)[-1]].log_prior
        found.append([d.log_likelihood, weights, sum(d.kl().values()), loss, *slopes])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("condition_dim", [0, 4])
@each_order
def test_the_joint_density_is_that_of_the_sites(order: type, condition_dim: int) -> None:
    vae = layered(order, SIZES, skip=True, condition_dim=condition_dim)
    y = torch.randn(B, condition_dim) if condition_dim else None
    x = vae.sample(B, y)
    d = densities(vae, x, y, num_particles=K)
    assert set(d.sites) == {"z1", "z2", "z3"}
    z = torch.cat([d.sites[f"z{n}"].value for n in (1, 2, 3)], -1)
    q, p = vae.encode(x, y), vae.prior(y)
    assert (q.batch_shape, q.event_shape) == ((B,), (sum(SIZES),))
    torch.testing.assert_close(q.log_prob(z), d.log_posterior)
    torch.testing.assert_close(p.log_prob(z), d.log_prior)
    torch.testing.assert_close(
        q.expand([11, B]).log_prob(z[:1]), d.log_posterior[:1].expand(11, B)
    )
    assert q.rsample((11,)).shape == q.expand([11, B]).sample().shape == (11, B, sum(SIZES))
    assert q.mean.shape == q.variance.shape == vae.prior(y).mean.expand(B, -1).shape
    assert vae.reconstruct(x, y).shape == x.shape
    assert vae.reconstruct(x, y, num_samples=2).shape == (2, *x.shape)


def test_its_mean_is_exact_where_layers_are_linear() -> None:
    vae, _ = linear_gaussian(TopDown)
    p = vae.prior()
    draws = p.sample((100_003,))
    assert ((draws.mean(0) - p.mean).abs() < 5 * draws.std(0) / len(draws) ** 0.5).all()
    lowest = draws[:, : SIZES[0]] - vae.prior.layers[0].network(draws[:, 3:5])[:, :3]
    torch.testing.assert_close(lowest.var(0), p.variance[:3], rtol=0.03, atol=0)


# --- what works for one layer works for several -------------------------------------------------


@pytest.mark.slow
def test_bounds_of_simulated_data_meet() -> None:
    vae = layered(TopDown, skip=True)
    bracket = bidirectional(vae, vae.sample(1), num_data=B, num_chains=17)
    lower, upper, gap = bracket.mean()
    assert gap < 0.2
    assert lower < upper + 4 * bracket.mean_stderr()[2]


def test_objectives_train_layers_or_say_which_do() -> None:
    x = draw(layered(TopDown), 23)
    trained, refusals = set(), set()
    for cls in OBJECTIVES:
        vae = layered(TopDown, condition_dim=0)
        before = copy.deepcopy(vae.state_dict())
        objective = cls(**accepted(cls, num_particles=4, num_groups=2))
        try:
            fit(vae, x, objective, epochs=1, precision="64-true", **QUIET)
        except ValueError as error:
            refusals.add(str(error).partition("the aggregate")[2])
            continue
        trained.add(cls.__name__)
        still = [key for key, p in vae.named_parameters() if torch.equal(p, before[key])]
        assert cls is FreeBits or not still, (cls, still)  # a KL below its floor has no gradient
    (refusal,) = refusals
    assert trained == set(refusal.rpartition("use one of ")[2].split(", "))
    assert "exactly one latent site; the model has ['z1', 'z2']" in refusal


@each_order
def test_kl_and_active_units_are_those_of_all_layers(order: type) -> None:
    vae = layered(order, SIZES)
    x = draw(vae, 23)
    d = densities(vae, x, num_particles=K)
    assert {name: kl.shape for name, kl in d.kl_by_dimension().items()} == {
        f"z{n}": (23, size) for n, size in enumerate(SIZES, 1)
    }
    assert d.same_order is (order is not BottomUp)
    floor = FreeBits(1000.0, group_size=None).bound(d)
    torch.testing.assert_close(floor, d.log_likelihood.mean(0) - 3000)
    history = fit(vae, x, epochs=1, precision="64-true", **QUIET)
    assert history.num_units == sum(SIZES)


@pytest.mark.parametrize("order", [TopDown, Ladder], ids=name)
def test_the_lower_kl_is_analytic_and_right(order: type) -> None:
    vae = layered(order, (1, 2))
    x = draw(vae, 3)
    d = densities(vae, x, num_particles=20_011)
    assert d.kl_rules == {"z1": "analytic", "z2": "analytic"}
    for site in d.sites.values():
        sampled = site.log_posterior - site.log_prior
        error = (sampled - site.analytic_kl).std(0) / 20_011**0.5
        assert ((sampled.mean(0) - site.analytic_kl).abs() < 5 * error).all()


@each_order
def test_a_vamp_prior_is_made_of_the_top_layers_posterior(order: type) -> None:
    prior = {"class_path": "VampPrior", "init_args": {"num_components": 11}}
    vae = layered(order, prior=prior)
    x = draw(vae, 23)
    vae.initialise(x)
    top = vae.prior.layers[-1]
    assert top.posterior is vae.posterior.layers[-1]
    assert top.inputs.shape == (11, 2 if order is BottomUp else 7)
    assert order is BottomUp or (top.low, top.high) == (0, 1)
    other = copy.deepcopy(vae)
    assert other.posterior.prior is other.prior
    assert other.prior.posterior is other.posterior.layers[-1]
    z = vae.prior().sample((5,))
    at = vae.posterior.layers[-1](top.inputs).log_prob(z[:, None, 2:]).logsumexp(-1) - math.log(11)
    below = vae.prior.layers[0](z[:, 2:]).log_prob(z[:, :2])
    torch.testing.assert_close(vae.prior().log_prob(z), at + below)


@each_order
def test_entries_may_be_missing(order: type) -> None:
    vae = layered(order, missing=True)
    x = vae.sample(23)
    x[torch.rand(23, 7) < 0.3] = math.nan
    vae.initialise(x)
    fit(vae, x, IWAE(3), epochs=1, precision="64-true", **QUIET)
    plain = importance_sampling(vae, x[:3], num_samples=101)
    assert plain.log_prob.isfinite().all()


@each_order
def test_images_and_declarations(order: type) -> None:
    networks = {"encoder": "Conv", "decoder": "ConvTranspose"}
    vae = layered(order, data_shape=(2, 7, 5), **networks)
    x = vae.sample(3)
    assert vae.reconstruct(x).shape == (3, 2, 7, 5)
    again = build(**vae.declaration)
    again.load_state_dict(vae.state_dict())
    assert again.declaration == vae.declaration
    assert torch.equal(again.encode(x).mean, vae.encode(x).mean)
    if order is TopDown:
        plain = {"data_shape": (2, 7, 5), "latent_dim": [2, 3], **networks}
        assert build(**plain).declaration == vae.declaration


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"latent_dim": 3}, r"a latent_dim of two sizes or more.* such as \[40, 40\]; got 3"),
        ({"latent_dim": [3]}, r"a latent_dim of two sizes or more.*; got \[3\]"),
        ({"latent_dim": 3, "hierarchy": None, "skip": True}, "a latent_dim of two sizes or more"),
        ({"latent_dim": [3, 0]}, "latent_dim must be at least 1; got 0"),
        ({"hierarchy": "TopDwn"}, "hierarchy 'TopDwn' is unknown, did you mean 'TopDown'"),
        ({"skip": "yes"}, "skip must be True or False; got 'yes'"),
        ({"hierarchy": "Ladder", "posterior": "FlowPosterior"}, "Ladder merges Normals: .* Flow"),
        ({"prior": "ConditionalNormal"}, "ConditionalNormal of the top layer has nothing above"),
    ],
)
def test_wrong_declarations_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        build(**{"data_shape": 7, "latent_dim": [2, 3], "hierarchy": "TopDown", **given})
    assert "\n" not in str(error.value)


def test_lists_that_do_not_fit_are_refused() -> None:
    encoders = [DiagonalNormal(linear(F, 2 * size), size) for size in (2, 3)]
    lower = ConditionalNormal(linear(3, 4), 2)
    prior = Layers([lower, StandardNormal(3)])
    with pytest.raises(ValueError, match="Ladder needs one posterior for each prior; got 1 for 2"):
        Ladder(encoders[:1], prior)
    with pytest.raises(ValueError, match="the prior of z1 must map 2 numbers, those of the layer"):
        Ladder([encoders[0], encoders[0]], prior)
    decoder = likelihoods.Bernoulli(linear(5, F), (F,))
    made = Ladder(encoders, prior)
    for p, q in ((prior, encoders[0]), (StandardNormal(5), made), (Layers(prior.layers), made)):
        with pytest.raises(ValueError, match="a hierarchy needs Layers and an order of inference"):
            VAE(p, decoder, q)
    few = likelihoods.Bernoulli(Lowest(linear(3, F), 3), (F,))
    with pytest.raises(ValueError, match=r"layers \[2, 3\] sees whole ones from z1 on, \[2, 5\]"):
        VAE(prior, few, made)
    with pytest.raises(ValueError, match="prior ConditionalNormal is conditioned on y"):
        lower()


def test_a_resumed_run_is_an_unbroken_one(tmp_path: Path) -> None:
    x, states = draw(layered(Ladder), 23), []
    for epochs in ((3,), (1, 3)):
        torch.manual_seed(3)
        vae = layered(Ladder, prior="VampPrior")
        run = {"run": tmp_path / str(len(epochs)), "resume": True, "precision": "64-true"}
        for number in epochs:
            fit(vae, x, epochs=number, **run, **QUIET)
        states.append(vae.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.slow
def test_compiled_losses_are_those_of_the_eager_step() -> None:
    x = draw(layered(Ladder), 23)
    options = {"epochs": 3, "batch_size": 11, "precision": "64-true", **QUIET}
    elbos = []
    for compiled in (False, True):
        torch.manual_seed(3)
        vae = layered(Ladder, skip=True, prior="VampPrior")
        elbos.append(fit(vae, x, ELBO(), compile=compiled, **options)["elbo"])
    assert elbos[1] == pytest.approx(elbos[0], rel=1e-9)


class Own(nn.Module):
    """An encoder of one's own, which looks at no condition and says so nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(F, 6)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.layer(x)


def test_an_encoder_of_ones_own_fits_any_prior() -> None:
    prior = Layers([ConditionalNormal(linear(3, 4), 2), StandardNormal(3)])
    posteriors = [DiagonalNormal(linear(F, 4, 3), 2), DiagonalNormal(Own(), 3)]
    decoder = Lowest(linear(2, F), 2)
    vae = VAE(prior, likelihoods.Bernoulli(decoder, (F,)), TopDown(posteriors, prior))
    assert densities(vae, torch.ones(B, F)).log_weights.isfinite().all()
