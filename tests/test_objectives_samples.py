"""Objectives of one and of many draws, against exact values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, two_sites
from families import POSTERIORS, PRIORS, draw, make, name, triples
from pyro.infer import SVI, RenyiELBO
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence
from training.training_cases import QUIET, make_data, make_vae

from pyro_vae.densities import Densities, densities
from pyro_vae.objectives import (
    CIWAE,
    ELBO,
    IWAE,
    MIWAE,
    PIWAE,
    Capacity,
    DReG,
    FreeBits,
    Linear,
    Objective,
    Renyi,
    StickingTheLanding,
)
from pyro_vae.posteriors import FlowPosterior, FullNormal
from pyro_vae.priors import MixtureOfGaussians
from pyro_vae.training import fit

pytestmark = pytest.mark.usefixtures("float64")

B, D, F, M, L, N = 7, 2, 5, 3, 5, 23
K = M * L
OURS = [
    CIWAE, Capacity, DReG, FreeBits, IWAE, MIWAE, PIWAE, Renyi, StickingTheLanding
]  # fmt: skip
BOUNDS = [
    *(IWAE(K), IWAE(1), DReG(K), CIWAE(0.3, K), MIWAE(K, M), PIWAE(K, M), StickingTheLanding()),
    *(Renyi(0.5, K), Renyi(2.0, K), FreeBits(0.5, on="datum"), Capacity(0.0, 1.5)),
]
Gradients = dict[str, Tensor]


def label(objective: Objective) -> str:
    return f"{type(objective).__name__}-{objective.num_particles}"


# --- a hierarchy whose gradients are known -----------------------------------------------------


class Chain(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(h z2, r), x ~ N(g z1, s); the guide draws z1 given x, then z2."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.ParameterDict(
            {k: torch.tensor(v) for k, v in {"h": 0.8, "r": 0.6, "g": 1.3, "s": 0.5}.items()}
        )
        start = {"a": 0.3, "b": 0.2, "u": 0.7, "c": 0.4, "e": 0.3, "v": 0.9}
        self.phi = nn.ParameterDict({k: torch.tensor(v) for k, v in start.items()})

    def prior(self, theta: Gradients, z1: Tensor | float) -> dist.Normal:
        return dist.Normal(theta["h"] * z1, theta["r"])

    def model(self, x: Tensor) -> None:
        theta = self.theta
        with pyro.plate("data", len(x), dim=-1):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(theta["h"] * z2, theta["r"]))
            pyro.sample("x", dist.Normal(theta["g"] * z1, theta["s"]), obs=x)

    def guide(self, x: Tensor) -> None:
        phi = self.phi
        with pyro.plate("data", len(x), dim=-1):
            z1 = pyro.sample("z1", dist.Normal(phi["a"] * x + phi["b"], phi["u"]))
            pyro.sample("z2", dist.Normal(phi["c"] * z1 + phi["e"] * x, phi["v"]))

    def values(self) -> tuple[Gradients, Gradients]:
        """theta and phi as plain tensors that want gradients."""
        return tuple(  # type: ignore[return-value]
            {k: p.detach().clone().requires_grad_() for k, p in group.items()}
            for group in (self.theta, self.phi)
        )


def log_normal(value: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale)
    return -0.5 * ((value - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def log_joint(theta: Gradients, z1: Tensor, z2: Tensor, x: Tensor) -> Tensor:
    upper = log_normal(z2, 0.0, 1.0) + log_normal(z1, theta["h"] * z2, theta["r"])
    return upper + log_normal(x, theta["g"] * z1, theta["s"])


def log_guide(phi: Gradients, z1: Tensor, z2: Tensor, x: Tensor) -> Tensor:
    loc = phi["c"] * z1 + phi["e"] * x
    return log_normal(z1, phi["a"] * x + phi["b"], phi["u"]) + log_normal(z2, loc, phi["v"])


def pull(total: Tensor, given: Gradients) -> Gradients:
    found = torch.autograd.grad(
        total, list(given.values()), retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return dict(zip(given, found, strict=True))


class Hand:
    """log w of the draws of one trace, and its derivatives, from the definitions alone."""

    def __init__(self, chain: Chain, d: Densities, x: Tensor) -> None:
        self.theta, self.phi = chain.values()
        phi = self.phi
        z1, z2 = (d.sites[n].value.detach() for n in ("z1", "z2"))
        with torch.no_grad():  # the noise
            e1 = (z1 - phi["a"] * x - phi["b"]) / phi["u"]
            e2 = (z2 - phi["c"] * z1 - phi["e"] * x) / phi["v"]
        self.z1 = phi["a"] * x + phi["b"] + phi["u"] * e1
        self.z2 = phi["c"] * self.z1 + phi["e"] * x + phi["v"] * e2
        fixed = [z1.clone().requires_grad_(), z2.clone().requires_grad_()]
        stopped = {k: p.detach() for k, p in phi.items()}
        log_p = log_joint({k: p.detach() for k, p in self.theta.items()}, *fixed, x)
        log_q = log_guide(stopped, *fixed, x)
        self.slopes_p = torch.autograd.grad(log_p.sum(), fixed)
        self.slopes_q = torch.autograd.grad(log_q.sum(), fixed)
        self.log_p_fixed = log_joint(self.theta, z1, z2, x)
        self.log_q_fixed = log_guide(phi, z1, z2, x)
        self.log_w = (log_p - log_q).detach()

    def through(self, weights: Tensor) -> Gradients:
        """sum_k weights_k (d log w_k / d z_k) (d z_k / d phi)."""
        slopes = [p - q for p, q in zip(self.slopes_p, self.slopes_q)]
        total = weights * (slopes[0] * self.z1 + slopes[1] * self.z2)
        return pull(total.sum(), self.phi)

    def score(self, weights: Tensor) -> Gradients:
        """sum_k weights_k (d log q(z_k) / d phi), the draws fixed."""
        return pull((weights * self.log_q_fixed).sum(), self.phi)

    def whole(self, weights: Tensor) -> Gradients:
        """sum_k weights_k (d log w_k / d phi), in all its ways."""
        score = self.score(weights)
        return {k: g - score[k] for k, g in self.through(weights).items()}

    def model(self, weights: Tensor) -> Gradients:
        return pull((weights * self.log_p_fixed).sum(), self.theta)


def gradients(objective: Objective, chain: Chain, d: Densities) -> tuple[Gradients, Gradients]:
    """Of the bound, for theta and phi, as training sees it."""
    total = -objective.reduce(d)
    groups = (dict(chain.theta.items()), dict(chain.phi.items()))
    return pull(total, groups[0]), pull(total, groups[1])


def assert_close(found: Gradients, expected: Gradients) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10, msg=key)


def case(num_particles: int, num_data: int = B) -> tuple[Chain, Tensor, Densities]:
    chain, x = Chain(), 2 * torch.randn(num_data)
    return chain, x, densities(chain.model, chain.guide, x, num_particles=num_particles)


def test_gradients_of_iwae_by_hand() -> None:
    chain, x, d = case(K)
    hand = Hand(chain, d, x)
    weights = hand.log_w.softmax(0)
    theta, phi = gradients(IWAE(K), chain, d)
    assert_close(theta, hand.model(weights))
    assert_close(phi, hand.whole(weights))


def test_gradients_of_dreg_by_hand() -> None:
    chain, x, d = case(K)
    hand = Hand(chain, d, x)
    weights = hand.log_w.softmax(0)
    theta, phi = gradients(DReG(K), chain, d)
    assert_close(theta, hand.model(weights))
    assert_close(phi, hand.through(weights**2))


@pytest.mark.parametrize("num_particles", [1, K])
def test_gradients_of_sticking_the_landing_by_hand(num_particles: int) -> None:
    chain, x, d = case(num_particles)
    hand = Hand(chain, d, x)
    weights = torch.full_like(hand.log_w, 1 / num_particles)
    theta, phi = gradients(StickingTheLanding(num_particles=num_particles), chain, d)
    assert_close(theta, hand.model(weights))
    assert_close(phi, hand.through(weights))


def test_gradients_of_piwae_by_hand() -> None:
    chain, x, d = case(K)
    hand = Hand(chain, d, x)
    groups = hand.log_w.reshape(M, L, B).softmax(1).reshape(K, B) / M
    theta, phi = gradients(PIWAE(K, M), chain, d)
    assert_close(theta, hand.model(hand.log_w.softmax(0)))
    assert_close(phi, hand.whole(groups))


def test_gradients_of_miwae_and_renyi_by_hand() -> None:
    chain, x, d = case(K)
    hand = Hand(chain, d, x)
    groups = hand.log_w.reshape(M, L, B).softmax(1).reshape(K, B) / M
    for objective, weights in (
        (MIWAE(K, M), groups),
        (Renyi(0.3, K), (0.7 * hand.log_w).softmax(0)),
        (CIWAE(0.3, K), 0.3 / K + 0.7 * hand.log_w.softmax(0)),
    ):
        theta, phi = gradients(objective, chain, d)
        assert_close(theta, hand.model(weights))
        assert_close(phi, hand.whole(weights))


@pytest.mark.parametrize("num_particles", [1, K])
def test_the_detached_posterior_by_hand(num_particles: int) -> None:
    chain, x, d = case(num_particles)
    hand = Hand(chain, d, x)
    torch.testing.assert_close(d.log_posterior_detached, d.log_posterior)
    weights = torch.rand(num_particles, B)
    q1, q2 = hand.slopes_q
    expected = pull((weights * (q1 * hand.z1 + q2 * hand.z2)).sum(), hand.phi)
    total = (weights * d.log_posterior_detached).sum()
    assert_close(pull(total, dict(chain.phi.items())), expected)
    assert_close(pull(d.log_posterior.sum(), dict(chain.phi.items())), pull_all(hand))


def pull_all(hand: Hand) -> Gradients:
    """d log q / d phi in all its ways: what the slopes must leave untouched."""
    q1, q2 = hand.slopes_q
    return pull((hand.log_q_fixed + q1 * hand.z1 + q2 * hand.z2).sum(), hand.phi)


class Three(nn.Module):
    """A guide of three sites, each of which moves all that come after."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Parameter(torch.tensor([0.7, 0.5, 0.3]))

    def locs(self, phi: Tensor, z: list[Tensor]) -> Tensor:
        return phi[len(z)] * (1 + sum((z_i**2 for z_i in z), torch.zeros(())))

    def run(self, guide: bool, x: Tensor) -> None:
        drawn: list[Tensor] = []
        with pyro.plate("data", len(x), dim=-1):
            for i in range(3):
                loc = self.locs(self.phi, drawn) if guide else torch.tensor(0.0)
                drawn.append(pyro.sample(f"z{i}", dist.Normal(loc, 0.8)))
            if not guide:
                pyro.sample("x", dist.Normal(sum(drawn), 1.0), obs=x)

    def model(self, x: Tensor) -> None:
        self.run(False, x)

    def guide(self, x: Tensor) -> None:
        self.run(True, x)


def test_the_detached_posterior_of_three_sites() -> None:
    three, x = Three(), torch.randn(B)
    d = densities(three.model, three.guide, x, num_particles=K)
    stopped, z = three.phi.detach(), [d.sites[f"z{i}"].value for i in range(3)]
    log_q = sum(log_normal(z[i], three.locs(stopped, z[:i]), 0.8) for i in range(3))
    (expected,) = torch.autograd.grad(log_q.sum(), three.phi, retain_graph=True)
    (found,) = torch.autograd.grad(d.log_posterior_detached.sum(), three.phi)
    torch.testing.assert_close(found, expected)


def test_a_flat_posterior_has_no_gradient_through_its_draws() -> None:
    width = torch.tensor([1.0, 2.0, 5.0], requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 3, dim=-1):
            pyro.sample("z", dist.Uniform(-width, width))

    d = densities(model, guide, torch.randn(3), num_particles=K)
    torch.testing.assert_close(d.log_posterior_detached, -(2 * width).log().expand(K, 3))
    value = d.sites["z"].value
    (grad,) = torch.autograd.grad(
        (d.log_posterior_detached + value).sum(), [width], retain_graph=True
    )
    torch.testing.assert_close(grad, (value / width).sum(0))


def test_no_gradient_is_asked_where_none_is_kept() -> None:
    chain, x = Chain(), torch.randn(B)
    with torch.no_grad():
        d = densities(chain.model, chain.guide, x, num_particles=K)
        assert d.log_posterior_detached is d.log_posterior
        assert d.through_latents(d.log_posterior).eq(0).all()


def exact_elbo(theta: Gradients, phi: Gradients, x: Tensor) -> Tensor:
    m1, v1 = phi["a"] * x + phi["b"], phi["u"] ** 2
    m2, v2 = phi["c"] * m1 + phi["e"] * x, phi["c"] ** 2 * v1 + phi["v"] ** 2
    h, r, g, s, both = theta["h"], theta["r"], theta["g"], theta["s"], phi["c"] * v1
    upper = m2**2 + v2
    middle = ((m1 - h * m2) ** 2 + v1 + h**2 * v2 - 2 * h * both) / r**2 + 2 * r.log()
    lower = ((x - g * m1) ** 2 + g**2 * v1) / s**2 + 2 * s.log()
    entropy = phi["u"].log() + phi["v"].log() + 1
    return entropy - 0.5 * (upper + middle + lower + math.log(2 * math.pi))


def mean_gradient(objective: Objective, x: float, rows: int = 1009) -> tuple[Tensor, Tensor]:
    """Mean over many draws, and its standard error, of the gradient at one datum."""
    chain, found = Chain(), []
    for _ in range(101):
        batch = torch.full((rows,), x)
        d = densities(chain.model, chain.guide, batch, num_particles=objective.num_particles)
        theta, phi = gradients(objective, chain, d)
        found.append(torch.stack([*theta.values(), *phi.values()]) / rows)
    each = torch.stack(found)
    return each.mean(0), each.std(0) / len(each) ** 0.5


@pytest.mark.parametrize(
    "objective",
    [StickingTheLanding(), StickingTheLanding(num_particles=3), ELBO(kl="sampled"), IWAE(1)],
    ids=label,
)
def test_the_mean_gradient_is_that_of_the_exact_elbo(objective: Objective) -> None:
    theta, phi = Chain().values()
    exact = exact_elbo(theta, phi, torch.tensor(1.7))
    truth = torch.stack([*pull(exact, theta).values(), *pull(exact, phi).values()])
    mean, stderr = mean_gradient(objective, 1.7)
    assert (abs(mean - truth) < 5 * stderr).all()
    assert (stderr < 0.02 * truth.abs().max()).all()


def test_dreg_has_the_mean_gradient_of_iwae_with_less_noise() -> None:
    mean, stderr = mean_gradient(IWAE(3), 1.7)
    ours, ours_stderr = mean_gradient(DReG(3), 1.7)
    assert (abs(mean - ours) < 5 * (stderr**2 + ours_stderr**2).sqrt()).all()
    assert ours_stderr[4:].pow(2).sum() < 0.5 * stderr[4:].pow(2).sum()  # of the guide


# --- any program -------------------------------------------------------------------------------


def test_at_the_exact_posterior_the_landing_sticks() -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    q = exact.posterior(x)
    loc = q.loc.clone().requires_grad_()
    tril = q.scale_tril.clone().requires_grad_()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    for objective, zero in ((StickingTheLanding(), True), (DReG(K), True), (IWAE(K), False)):
        loss = objective.differentiable_loss(exact.vae.model, guide, x)
        found = torch.autograd.grad(loss, [loc, tril])
        assert all((g.abs().max() < 1e-9) == zero for g in found)


def of_parameters(x: Tensor) -> None:
    """A guide whose parameters are in Pyro's store alone."""
    loc = pyro.param("loc", torch.full((D,), 0.3))
    scale = pyro.param("scale", torch.full((D,), 0.6), constraint=constraints.positive)
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(loc, scale).to_event(1))


@pytest.mark.parametrize("objective", [StickingTheLanding(), DReG(K), PIWAE(K, M)], ids=label)
def test_guides_of_plain_functions(objective: Objective) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    svi = SVI(exact.vae.model, of_parameters, pyro.optim.Adam({"lr": 1e-2}), loss=objective)
    first = svi.evaluate_loss(x)
    for _ in range(100):
        svi.step(x)
    assert svi.evaluate_loss(x) < first - 1
    assert pyro.param("loc").ne(0.3).all()


@pytest.mark.parametrize("cls", POSTERIORS, ids=name)
def test_the_detached_posterior_of_every_class(cls: type) -> None:
    """Against a copy of the posterior whose parameters are held fixed."""
    vae = make(posterior=cls)
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    given = list(vae.posterior.parameters())
    z = d.sites["z"].value
    stopped = copy.deepcopy(vae.posterior).requires_grad_(False)
    log_q = stopped(x).expand((K, B)).log_prob(z.view_as(z))
    weights = torch.rand(K, B)
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    expected = torch.autograd.grad((weights * log_q).sum(), given, **options)
    found = torch.autograd.grad((weights * d.log_posterior_detached).sum(), given, **options)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(d.log_posterior_detached, log_q, rtol=1e-6, atol=1e-6)
    assert any(g.abs().max() > 1e-3 for g in found)


def test_a_posterior_that_cannot_score_is_named() -> None:
    vae = make()
    x = draw(vae, B)
    planar = dist.transforms.planar(D)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            base = dist.Normal(torch.zeros(len(x), D), 1.0).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [planar]))

    IWAE(K).differentiable_loss(vae.model, guide, x)
    with pytest.raises(ValueError, match="at site 'z' cannot score a point.*can be inverted"):
        DReG(K).differentiable_loss(vae.model, guide, x)


@pytest.mark.parametrize("cls", OURS, ids=name)
def test_draws_that_pass_no_gradient_are_refused(cls: type) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=x))

    x = torch.randn(B)
    with pytest.raises(ValueError, match="site 'z' is drawn by the guide from Bernoulli"):
        cls().differentiable_loss(model, guide, x)
    assert math.isfinite(cls().loss(model, guide, x))


@pytest.mark.parametrize("cls", OURS, ids=name)
def test_one_run_of_the_encoder_is_enough_for_the_gradient(cls: type) -> None:
    vae = make()
    x = draw(vae, B)
    densities(vae.model, vae.guide, x, num_particles=2)  # the programs are tried once
    calls: list[int] = []
    vae.posterior.encoder.register_forward_hook(lambda *_: calls.append(1))
    cls().differentiable_loss(vae.model, vae.guide, x).backward()
    assert calls == [1]


# --- values ------------------------------------------------------------------------------------


def mean_bound(objective: Objective, exact: LinearGaussian, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B] over many draws of the bound of each datum, and its standard error."""
    times = 2003
    with torch.no_grad():
        many = x.repeat(times, 1)
        guide = exact.guide(0.3, 1.3)
        d = densities(exact.vae.model, guide, many, num_particles=objective.num_particles)
        each = objective.bound(d).reshape(times, len(x))
    return each.mean(0), each.std(0) / times**0.5


@pytest.mark.parametrize("objective", BOUNDS, ids=label)
def test_every_bound_is_below_the_evidence(objective: Objective) -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    mean, stderr = mean_bound(objective, exact, x)
    assert (mean < exact.log_evidence(x) + 5 * stderr).all()
    assert stderr.max() < 0.2


def test_the_importance_weighted_bound_rises_to_the_evidence() -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, 2)
    truth = exact.log_evidence(x)
    found = [mean_bound(IWAE(k), exact, x) for k in (1, 2, 5, 101)]
    for (low, low_error), (high, high_error) in zip(found, found[1:]):
        assert (high - low > 5 * (low_error**2 + high_error**2).sqrt()).all()
    assert (abs(found[-1][0] - truth) < 0.05).all()
    q, p = exact.proposal(x, None, 0.3, 1.3), exact.posterior(x)
    gap = kl_divergence(q, dist.MultivariateNormal(p.loc, scale_tril=p.scale_tril))
    assert (abs(truth - found[0][0] - gap) < 5 * found[0][1]).all()


def bounds(d: Densities, *objectives: Objective) -> list[Tensor]:
    return [objective.bound(d) for objective in objectives]


def test_ends_and_special_cases() -> None:
    exact = LinearGaussian.draw(D, F)
    x = draw(exact.vae, B)
    d = densities(exact.vae.model, exact.guide(0.3, 1.3), x, num_particles=K)
    log_w = d.log_weights
    iwae, elbo = bounds(d, IWAE(K), ELBO(kl="sampled", num_particles=K))
    torch.testing.assert_close(iwae, log_w.exp().mean(0).log())
    same_as_iwae = (MIWAE(K, 1), PIWAE(K, 1), DReG(K), CIWAE(0.0, K), Renyi(0.0, K))
    for bound in bounds(d, *same_as_iwae, PIWAE(K, M)):
        torch.testing.assert_close(bound, iwae)
    at_one = (Renyi(1.0, K), Renyi(1 - 1e-8, K), MIWAE(K, K), CIWAE(1.0, K))
    for bound in bounds(d, *at_one, StickingTheLanding(num_particles=K)):
        torch.testing.assert_close(bound, elbo)
    mixed, groups = bounds(d, CIWAE(0.3, K), MIWAE(K, M))
    torch.testing.assert_close(mixed, 0.3 * elbo + 0.7 * iwae)
    torch.testing.assert_close(groups, log_w.reshape(M, L, B).exp().mean(1).log().mean(0))
    near = Renyi(1 - 1e-4, K).bound(d)  # first order in 1 - alpha
    torch.testing.assert_close(near - elbo, 0.5e-4 * log_w.var(0, correction=0), rtol=0.01, atol=0)
    falling = bounds(d, *(Renyi(alpha, K) for alpha in (-1.0, 0.0, 0.5, 1.0, 2.0)))
    assert all((a > b).all() for a, b in zip(falling, falling[1:]))


def test_renyi_in_single_precision_near_one() -> None:
    torch.set_default_dtype(torch.float32)
    vae = make()
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    assert d.log_weights.dtype == torch.float32
    alphas = [1 + sign * 10**-e for e in range(4, 9) for sign in (-1.0, 1.0)]
    found = torch.stack(bounds(d, *(Renyi(a, K) for a in alphas)))
    assert found.dtype == torch.float32
    assert (abs(found - d.log_weights.mean(0)) < 1e-3).all()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
def test_value_and_gradient_are_those_of_pyros_renyi(alpha: float) -> None:
    vae = make()
    x = draw(vae, B)
    theirs = RenyiELBO(alpha, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    found = []
    for loss in (theirs, Renyi(alpha, K), *([IWAE(K)] if alpha == 0 else [])):
        torch.manual_seed(1)
        value = loss.loss_and_grads(vae.model, vae.guide, x)
        found.append((value, [p.grad.clone() for p in vae.parameters()]))
        vae.zero_grad()
    for value, gradient in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-10)
        for a, b in zip(gradient, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("objective", [*BOUNDS, MIWAE(K, M)], ids=label)
def test_batches_do_not_mix_where_the_number_is_of_a_datum(
    objective: Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not objective.batch_level
    vae = make()
    x = draw(vae, B)
    densities(vae.model, vae.guide, x, num_particles=2)  # the programs are tried once
    noise = torch.randn(objective.num_particles, B, D)
    found = []
    for parts in ((slice(0, B),), (slice(0, 3), slice(3, B))):
        total, bound = torch.zeros(()), []
        for rows in parts:
            given = noise[:, rows]
            path = "torch.distributions.normal._standard_normal"
            monkeypatch.setattr(path, lambda *_, given=given, **__: given)
            d = densities(vae.model, vae.guide, x[rows], num_particles=objective.num_particles)
            bound.append(objective.bound(d))
            total = total + objective.reduce(d)
        gradient = torch.autograd.grad(total, list(vae.parameters()), retain_graph=True)
        found.append((torch.cat(bound), gradient))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-10, atol=1e-10)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- a KL that is held -------------------------------------------------------------------------


def normal_kl(vae: nn.Module, x: Tensor) -> Tensor:
    """KL of a diagonal Normal to the standard one, by dimension [B, D]."""
    q = vae.posterior(x)
    loc, scale = q.base_dist.loc, q.base_dist.scale
    return 0.5 * (loc**2 + scale**2 - 1) - scale.log()


@pytest.mark.parametrize("capacity", [0.0, 0.4, 31.0])
def test_capacity_in_closed_form(capacity: float) -> None:
    vae = make()
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    kl = normal_kl(vae, x).sum(-1)
    expected = d.log_likelihood.mean(0) - 13 * (kl - capacity).abs()
    torch.testing.assert_close(Capacity(capacity, 13.0, num_particles=K).bound(d), expected)
    bias, total = vae.posterior.encoder.output.bias, Capacity(capacity, 13.0).bound(d).sum()
    gradient = torch.autograd.grad(total, bias, retain_graph=True)
    truth = torch.autograd.grad(expected.sum(), bias)
    torch.testing.assert_close(gradient, truth)


def test_capacity_takes_the_sampled_kl_too() -> None:
    vae = make(prior=MixtureOfGaussians)
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    kl = (d.log_posterior - d.log_prior).mean(0)
    expected = d.log_likelihood.mean(0) - 2 * (kl - 0.3).abs()
    torch.testing.assert_close(Capacity(0.3, 2.0, num_particles=K).bound(d), expected)
    with pytest.raises(ValueError, match="no analytic KL"):
        Capacity(kl="analytic").bound(d)


FLOORS = {
    "dimension": (1, lambda kl: kl),
    "pair": (2, lambda kl: kl.reshape(B, 2, 2).sum(-1)),
    "site": (None, lambda kl: kl.sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("group", FLOORS)
@pytest.mark.parametrize("on", ["batch", "datum"])
def test_free_bits_in_closed_form(on: str, group: str) -> None:
    vae = make(latent_dim=4)
    x = draw(vae, B)
    with torch.no_grad():
        for p in vae.posterior.encoder.parameters():
            p.mul_(3)
    size, grouped = FLOORS[group]
    d = densities(vae.model, vae.guide, x, num_particles=K)
    kl = grouped(normal_kl(vae, x))
    middle = (kl.mean(0) if on == "batch" else kl).median().item() * 1.001
    if on == "batch":
        penalty = torch.stack([kl[:, j].mean().clamp(min=middle) for j in range(kl.shape[1])])
        expected = d.log_likelihood.mean(0) - penalty.sum()
    else:
        expected = d.log_likelihood.mean(0) - kl.clamp(min=middle).sum(-1)
    objective = FreeBits(middle, size, on, num_particles=K)
    torch.testing.assert_close(objective.bound(d), expected)
    assert objective.batch_level is (on == "batch")
    given = list(vae.posterior.encoder.parameters())
    found = torch.autograd.grad(objective.bound(d).sum(), given, retain_graph=True)
    for a, b in zip(found, torch.autograd.grad(expected.sum(), given), strict=True):
        torch.testing.assert_close(a, b)


def test_no_free_bits_are_the_elbo_and_many_make_the_kl_free() -> None:
    vae = make(posterior=FullNormal)
    x = draw(vae, B)
    d = densities(vae.model, vae.guide, x, num_particles=K)
    torch.testing.assert_close(FreeBits(0.0, on="datum").bound(d), ELBO().bound(d))
    torch.testing.assert_close(FreeBits(0.0).bound(d).mean(), ELBO().bound(d).mean())
    free = FreeBits(1e3).bound(d) + 1e3
    torch.testing.assert_close(free, d.log_likelihood.mean(0))


def test_free_bits_by_dimension_need_factors() -> None:
    for options in ({"posterior": FullNormal}, {"prior": MixtureOfGaussians}):
        vae = make(**options)
        with pytest.raises(ValueError, match="at site 'z' is not a sum over dimensions"):
            FreeBits(group_size=1).loss(vae.model, vae.guide, draw(vae, B))
    vae = make(latent_dim=3)
    with pytest.raises(ValueError, match="must divide the 3 dimensions of site 'z'; got 2"):
        FreeBits(group_size=2).loss(vae.model, vae.guide, draw(vae, B))


def test_free_bits_of_a_hierarchy_are_by_site() -> None:
    model, guide, _ = two_sites(False)
    x = 2 * torch.randn(B)
    d = densities(model, guide, x, num_particles=K)
    kl = d.kl()
    expected = d.log_likelihood.mean(0) - sum(k.mean().clamp(min=0.5) for k in kl.values())
    torch.testing.assert_close(FreeBits(0.5, num_particles=K).bound(d), expected)
    torch.testing.assert_close(FreeBits(0.5, 1, num_particles=K).bound(d), expected)


# --- wrong input, training ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: DReG(1), "at least 2; got 1, for which use StickingTheLanding"),
        (lambda: MIWAE(K, 4), "got 4 groups of 15 draws"),
        (lambda: PIWAE(K, 0), "num_groups must be at least 1"),
        (lambda: PIWAE(K, -3), "num_groups must be at least 1"),
        (lambda: FreeBits(group_size=0), "group_size must be at least 1; got 0"),
        (lambda: FreeBits(on="row"), "on must be 'batch' or 'datum'; got 'row'"),
        (lambda: FreeBits(kl="mc"), "kl must be"),
        (lambda: Capacity(kl="mc"), "kl must be"),
        (lambda: StickingTheLanding(-1.0), "beta must be zero or more"),
    ],
)
def test_wrong_options_are_refused(make_it: Callable[[], Objective], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize(("cls", "posterior", "prior"), triples(OURS, POSTERIORS, PRIORS))
def test_every_parameter_trains(cls: type, posterior: type, prior: type) -> None:
    many = 500 if cls is FreeBits else 11  # a KL near zero is estimated below its floor
    vae = make(prior, posterior=posterior, data_shape=(3,), hidden=(2,), components=many)
    x = draw(vae, 5)
    vae.initialise(x)
    start = {key: p.detach().clone() for key, p in vae.named_parameters()}
    objective = cls() if cls is not FreeBits else FreeBits(0.0, num_particles=101)
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-3}), loss=objective)
    svi.step(x)
    svi.step(x)
    assert not [key for key, p in vae.named_parameters() if torch.equal(p, start[key])]
    assert all(p.isfinite().all() for p in vae.parameters())


@pytest.mark.parametrize("cls", OURS, ids=name)
def test_fit_improves_it_and_reports_the_elbo_beside(cls: type) -> None:
    options = {"capacity": 1.0, "gamma": 2.0} if cls is Capacity else {}
    training = {"epochs": 15, "batch_size": 19, "lr": 0.01, **QUIET}
    history = fit(make_vae(), make_data(), cls(**options), **training)
    objective, elbo = history["objective"], history["elbo"]
    assert objective[-1] > objective[0] + 0.3
    assert elbo[-1] > elbo[0] + 0.1
    first = history.rows[0]
    assert first["elbo"] == pytest.approx(first["reconstruction"] - first["kl"])
    if cls in (IWAE, DReG, PIWAE, MIWAE, CIWAE, Renyi):
        assert sum(objective) > sum(elbo) + 0.1


def test_the_elbo_beside_is_that_of_all_draws_at_weight_one() -> None:
    vae, x = make_vae(), make_data(19).double()
    vae.double()
    histories = [
        fit(vae, x, objective, epochs=1, batch_size=19, lr=1e-12, seed=3, **QUIET)
        for objective in (
            *(ELBO(num_particles=K), ELBO(Linear(length=1), num_particles=K), IWAE(K)),
            *(DReG(K), PIWAE(K, M), Renyi(2.0, K), Capacity(3.0, num_particles=K)),
        )
    ]
    elbos = [h.final["elbo"] for h in histories]
    assert elbos == pytest.approx([elbos[0]] * len(elbos), rel=1e-9)
    assert histories[0].final["objective"] == pytest.approx(elbos[0], rel=1e-9)


def test_a_flow_posterior_trains_by_every_route_to_the_same_place() -> None:
    """IWAE and DReG have one optimum; on a flow, only right gradients find it."""
    torch.manual_seed(3)
    vae = make(posterior=FlowPosterior, data_shape=(3,))
    x = draw(vae, 5)
    d = densities(vae.model, vae.guide, x.repeat(401, 1), num_particles=3)
    given = list(vae.posterior.parameters())
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    found = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o.reduce(d), given, **options)])
        for o in (IWAE(3), DReG(3))
    ]
    assert torch.cosine_similarity(*found, dim=0) > 0.8
