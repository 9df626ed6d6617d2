"""Densities and KL rules of our own against closed forms, quadrature and high precision."""

from __future__ import annotations

import math
import subprocess
import sys

import mpmath
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

from pyro_vae.distributions import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Flow,
    FullNormal,
    Levels,
    MixtureOfDiagonalNormals,
    NegativeBinomial,
    Poisson,
    flow_family,
    make_flow,
    mixture,
)

ONES = torch.ones(3)
LOGITS = (-300.0, -30.0, -3.0, -0.051, -0.049, -1e-3, -1e-6, 0.0, 9e-4, 0.02, 0.05, 1.0, 30.0)


def continuous_bernoulli_log_prob(logit: float, x: float) -> float:
    if logit == 0:
        return 0.0
    with mpmath.workdps(50):
        eta = mpmath.mpf(logit)
        return float(eta * mpmath.mpf(x) - mpmath.log(mpmath.expm1(eta) / eta))


def continuous_bernoulli_mean(logit: float) -> float:
    if logit == 0:
        return 0.5
    with mpmath.workdps(50):
        eta = mpmath.mpf(logit)
        return float(1 / (1 - mpmath.exp(-eta)) - 1 / eta)


@pytest.mark.parametrize("logit", [-700.0, -30.0, -1e-3, 0.0, 0.7, 17.0, 90.0, 700.0])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_in_high_precision(logit: float, value: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([logit], dtype=dtype, requires_grad=True)
    found = Bernoulli(logits=logits).log_prob(torch.tensor([value], dtype=dtype))
    (slope,) = torch.autograd.grad(found.sum(), logits)
    eta = mpmath.mpf(logits.item())
    error, tiny = 4 * torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    exact = -mpmath.log1p(mpmath.exp((1 - 2 * value) * eta))
    assert found.item() == pytest.approx(float(exact), rel=error, abs=tiny)
    exact = (2 * value - 1) / (1 + mpmath.exp((2 * value - 1) * eta))
    assert slope.item() == pytest.approx(float(exact), rel=error, abs=error)


def test_bernoulli_is_pyros() -> None:
    logits, value = torch.randn(7, 1, 11), torch.bernoulli(torch.full((5, 11), 0.3))
    ours, pyros = Bernoulli(logits=logits), dist.Bernoulli(logits=logits)
    torch.testing.assert_close(ours.log_prob(value), pyros.log_prob(value.expand(7, 5, 11)))
    assert isinstance(ours.expand((7, 5, 11)), Bernoulli)
    assert torch.equal(ours.mean, pyros.mean)
    for dtype in (torch.uint8, torch.int64, torch.bool):
        assert torch.equal(ours.log_prob(value.to(dtype)), ours.log_prob(value))


@pytest.mark.parametrize("logit", LOGITS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 3e-6), (torch.float64, 1e-10)])
def test_continuous_bernoulli_in_high_precision(
    logit: float, dtype: torch.dtype, error: float
) -> None:
    given = torch.tensor(logit, dtype=dtype)
    p = ContinuousBernoulli(given)
    for x in (0.0, 0.25, 1.0):
        truth = continuous_bernoulli_log_prob(given.item(), x)
        got = p.log_prob(torch.tensor(x, dtype=dtype)).item()
        assert abs(got - truth) < error * max(1, abs(truth))
    assert abs(p.mean.item() - continuous_bernoulli_mean(given.item())) < error


@pytest.mark.parametrize("logit", LOGITS)
def test_continuous_bernoulli_sampler(logit: float) -> None:
    x = ContinuousBernoulli(torch.tensor(logit)).rsample((200_000,)).double()
    assert x.min() >= 0
    assert x.max() <= 1
    stderr = x.std() / len(x) ** 0.5
    assert abs(x.mean() - continuous_bernoulli_mean(logit)) < 5 * stderr


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("logit", [-30.0, -1.0, -9e-4, 0.0, 9e-4, 1.0, 30.0])
def test_continuous_bernoulli_draws_are_quantiles(logit: float) -> None:
    given = torch.full((997,), logit, requires_grad=True)
    x = ContinuousBernoulli(given).rsample()
    (gradient,) = torch.autograd.grad(x.sum(), given)
    h = 1e-5
    torch.manual_seed(1)
    above = ContinuousBernoulli(given.detach() + h).rsample()
    torch.manual_seed(1)
    below = ContinuousBernoulli(given.detach() - h).rsample()
    torch.manual_seed(1)
    x = ContinuousBernoulli(given).rsample()
    (gradient,) = torch.autograd.grad(x.sum(), given)
    torch.testing.assert_close(gradient, (above - below) / (2 * h), atol=1e-6, rtol=1e-6)


def discretized_logistic_log_prob(loc: float, scale: float, k: int, levels: int) -> float:
    with mpmath.workdps(2000):
        loc, scale = mpmath.mpf(loc), mpmath.mpf(scale)

        def cdf(edge: float) -> mpmath.mpf:
            return 1 / (1 + mpmath.exp(-(mpmath.mpf(edge) - loc) / scale))

        low = cdf(k - 0.5) if k > 0 else mpmath.mpf(0)
        high = cdf(k + 0.5) if k < levels - 1 else mpmath.mpf(1)
        return float(mpmath.log(high - low))


@pytest.mark.parametrize("scale", [0.25, 3.0, 700.0])
@pytest.mark.parametrize("loc", [-300.0, 0.0, 101.3, 255.0, 600.0])
def test_discretized_logistic_in_high_precision(loc: float, scale: float) -> None:
    k = torch.tensor([0.0, 1.0, 100.0, 101.0, 254.0, 255.0])
    mean, width = torch.tensor(loc), torch.tensor(scale)
    truth = torch.tensor(
        [discretized_logistic_log_prob(mean.item(), scale, int(i), 256) for i in k],
        dtype=torch.float64,
    )
    single = DiscretizedLogistic(mean, width).log_prob(k)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-5, atol=1e-5)
    double = DiscretizedLogistic(mean.double(), width.double()).log_prob(k.double())
    torch.testing.assert_close(double, truth, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("loc", [-3000.0, 0.4, 255.0, 4000.0])
@pytest.mark.parametrize("scale", [0.02, 1.0, 500.0])
def test_discretized_logistic_sums_to_one_and_has_a_gradient(loc: float, scale: float) -> None:
    given = torch.tensor([loc, scale], requires_grad=True)
    log_mass = DiscretizedLogistic(*given).log_prob(torch.arange(256.0))
    assert abs(log_mass.logsumexp(0).item()) < 1e-5
    log_mass.sum().backward()
    assert given.grad.isfinite().all()


def test_discretized_logistic_mean_is_the_sum_over_its_levels() -> None:
    loc = torch.tensor([-3.0, 0.0, 5.2, 12.0, 20.0], dtype=torch.float64)
    p = DiscretizedLogistic(loc, torch.tensor(1.7, dtype=torch.float64), levels=13)
    k = torch.arange(13, dtype=torch.float64)
    truth = (p.log_prob(k[:, None]).exp() * k[:, None]).sum(0)
    torch.testing.assert_close(p.mean, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("log_rate", [-200.0, -3.0, 2.0, 13.8, 80.0])
@pytest.mark.parametrize("value", [0.0, 3.0, 1e6])
def test_poisson_in_high_precision(log_rate: float, value: float) -> None:
    eta = torch.tensor(log_rate, requires_grad=True)
    found = Poisson(eta).log_prob(torch.tensor(value))
    rate = mpmath.exp(eta.item())
    exact = eta.item() * value - rate - mpmath.loggamma(value + 1)
    torch.testing.assert_close(found.item(), float(exact), rtol=1e-6, atol=1e-6)
    (slope,) = torch.autograd.grad(found, eta)
    torch.testing.assert_close(slope.item(), float(value - rate), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("log_odds", [-20.0, -1.0, 0.5, 13.8, 21.0])
@pytest.mark.parametrize("dispersion", [1e-3, 2.0, 50.0])
@pytest.mark.parametrize("value", [0.0, 3.0, 1e6])
def test_negative_binomial_in_high_precision(
    value: float, dispersion: float, log_odds: float
) -> None:
    r, eta = (torch.tensor(given, requires_grad=True) for given in (dispersion, log_odds))
    found = NegativeBinomial(r, eta).log_prob(torch.tensor(value))
    a, b = mpmath.mpf(r.item()), mpmath.mpf(eta.item())
    ways = mpmath.loggamma(a + value) - mpmath.loggamma(a) - mpmath.loggamma(value + 1)
    exact = b * value - (a + value) * mpmath.log(1 + mpmath.exp(b)) + ways
    torch.testing.assert_close(found.item(), float(exact), rtol=1e-6, atol=1e-6)
    slopes = torch.autograd.grad(found, [r, eta])
    by_eta = value - (a + value) / (1 + mpmath.exp(-b))
    by_r = mpmath.digamma(a + value) - mpmath.digamma(a) - mpmath.log(1 + mpmath.exp(b))
    for slope, exact in zip(slopes, (by_r, by_eta)):
        torch.testing.assert_close(slope.item(), float(exact), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "given"),
    [
        (Bernoulli, {"logits": ONES}),
        (Poisson, {"log_rate": ONES}),
        (NegativeBinomial, {"dispersion": ONES, "logits": ONES}),
    ],
)
def test_values_outside_the_support_are_refused_where_arguments_are_validated(
    family: type, given: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match="support"):
        family(**given, validate_args=True).log_prob(ONES / 2)
    assert family(**given, validate_args=False).log_prob(ONES / 2).isfinite().all()


def test_levels_have_a_mean() -> None:
    p = Levels(logits=torch.tensor([0.1, 0.2, 0.7]).log())
    assert abs(p.mean.item() - 1.6) < 1e-6


def test_draws_of_levels_are_as_frequent_as_their_probabilities() -> None:
    probs = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.7, 0.0], [0.5, 0.0, 0.3, 1e-3, 0.0, 0.199]])
    draws = Levels(logits=probs.log()).sample(torch.Size([100_000]))
    assert (draws.shape, draws.dtype) == ((100_000, 2), probs.dtype)
    shares = torch.nn.functional.one_hot(draws.long(), 6).double().mean(0)
    assert ((shares - probs).abs() <= 4 * (probs * (1 - probs) / 100_000).sqrt()).all()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_levels_of_no_probability_are_not_drawn(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(shape, u))
    assert Levels(torch.tensor([0.0, 1.0, 0.0])).sample() == 1


def diagonal(*batch: int, dim: int) -> dist.Distribution:
    return dist.Normal(torch.randn(*batch, dim), torch.rand(*batch, dim) + 0.3).to_event(1)


def full(*batch: int, dim: int) -> FullNormal:
    tril = torch.randn(*batch, dim, dim).tril(-1) + torch.diag_embed(torch.rand(*batch, dim) + 0.3)
    return FullNormal(torch.randn(*batch, dim), scale_tril=tril)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_full_normal_kl_to_a_diagonal_is_that_to_the_same_full_normal(
    batch: tuple[int, ...],
) -> None:
    q, p = full(*batch, dim=5), diagonal(*batch, dim=5)
    same = dist.MultivariateNormal(p.base_dist.loc, scale_tril=p.base_dist.scale.diag_embed())
    truth = kl_divergence(dist.MultivariateNormal(q.loc, scale_tril=q.scale_tril), same)
    torch.testing.assert_close(kl_divergence(q, p), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("float64")
def test_full_normal_kl_is_the_average_log_ratio() -> None:
    q, p = full(dim=3), diagonal(dim=3)
    z = q.sample((200_000,))
    ratio = q.log_prob(z) - p.log_prob(z)
    assert abs(ratio.mean() - kl_divergence(q, p)) < 5 * ratio.std() / len(z) ** 0.5


@pytest.mark.usefixtures("float64")
def test_full_normal_kl_is_zero_to_itself_and_unknown_to_others() -> None:
    p = diagonal(dim=3)
    same = FullNormal(p.base_dist.loc, scale_tril=p.base_dist.scale.diag_embed())
    assert abs(kl_divergence(same, p)) < 1e-12
    with pytest.raises(NotImplementedError):
        kl_divergence(same, dist.Laplace(torch.zeros(3), 1).to_event(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prior", [dist.Normal, dist.Laplace])
def test_kl_rules_in_use_match_quadrature(prior: type) -> None:
    q, p = dist.Normal(0.7, 0.4), prior(-0.2, 1.3)
    z = torch.linspace(0.7 - 6, 0.7 + 6, 400_001)
    truth = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    rule = kl_divergence(q.expand([1]).to_event(1), p.expand([1]).to_event(1))
    assert abs(rule - truth) < 1e-8


def reference_mixture(logits: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> object:
    return torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1),
    )


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_fast_mixture_is_the_plain_one(dtype: torch.dtype, error: float, shift: float) -> None:
    C, D, B = 500, 40, 101
    logits = torch.randn(C)
    loc, scale = torch.randn(C, D) * 2 + shift, torch.rand(C, D) + 0.1
    z = loc[torch.randint(C, (B,))] + 0.5 * torch.randn(B, D)
    truth = reference_mixture(logits.double(), loc.double(), scale.double()).log_prob(z.double())
    given = (logits.to(dtype), loc.to(dtype), scale.to(dtype))
    got = MixtureOfDiagonalNormals(*given).log_prob(z.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), truth, atol=error, rtol=error / 100)


@pytest.mark.usefixtures("float64")
def test_fast_mixture_gradients_are_those_of_the_plain_one() -> None:
    given = [torch.randn(7), torch.randn(7, 3), torch.rand(7, 3) + 0.3, torch.randn(11, 3)]
    given = [g.requires_grad_() for g in given]
    fast = MixtureOfDiagonalNormals(*given[:3]).log_prob(given[3]).sum()
    plain = reference_mixture(*given[:3]).log_prob(given[3]).sum()
    for a, b in zip(torch.autograd.grad(fast, given), torch.autograd.grad(plain, given)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64")
def test_fast_mixture_draws_each_component_as_often_as_it_weighs() -> None:
    probs = torch.tensor([0.1, 0.2, 0.7])
    loc = torch.tensor([[-50.0, 0.0], [0.0, 50.0], [50.0, 0.0]])
    p = MixtureOfDiagonalNormals(probs.log(), loc, torch.tensor([[1.0, 2.0]] * 3)).expand([5])
    z = p.sample((20_011,))
    assert z.shape == (20_011, 5, 2)
    nearest = torch.cdist(z.flatten(0, 1), loc).argmin(-1)
    share = torch.bincount(nearest, minlength=3) / len(nearest)
    assert (abs(share - probs) < 5 * (probs * (1 - probs) / len(nearest)).sqrt()).all()
    spread = (z.flatten(0, 1) - loc[nearest])[nearest == 2]
    stderr = torch.tensor([1.0, 2.0]) / (2 * len(spread)) ** 0.5
    assert (abs(spread.std(0) - torch.tensor([1.0, 2.0])) < 5 * stderr).all()
    torch.testing.assert_close(p.mean, (probs @ loc).expand(5, 2))


@pytest.mark.usefixtures("float64")
def test_mixture_over_a_batch_of_components_is_a_mixture_each() -> None:
    components = diagonal(5, 3, dim=2)
    p = mixture(torch.zeros(3), components)
    assert (p.batch_shape, p.event_shape) == ((5,), (2,))
    z = torch.randn(5, 2)
    truth = components.log_prob(z[:, None]).logsumexp(-1) - math.log(3)
    torch.testing.assert_close(p.log_prob(z), truth)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("family", ["NSF", "MAF", "NICE"])
def test_flow_scores_its_own_draw_as_any_other_value(family: str) -> None:
    flow = flow_family(family)(3, transforms=2, hidden_features=(7,))
    p = Flow(flow())
    z = p.rsample((5,))
    torch.testing.assert_close(p.log_prob(z), p.log_prob(z.clone()), rtol=1e-8, atol=1e-8)
    weights = list(flow.parameters())
    own = torch.autograd.grad(p.log_prob(z).sum(), weights, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(p.log_prob(z.clone()).sum(), weights, allow_unused=True)
    for a, b in zip(own, other):
        if a is not None or b is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_flow_scores_a_draw_without_gradient_with_one() -> None:
    flow = flow_family("MAF")(3, transforms=2, hidden_features=(7,))
    p = Flow(flow())
    z = p.sample((5,))
    got = torch.autograd.grad(p.log_prob(z).sum(), list(flow.parameters()))
    truth = torch.autograd.grad(Flow(flow()).log_prob(z).sum(), list(flow.parameters()))
    for a, b in zip(got, truth):
        torch.testing.assert_close(a, b)


def test_flow_mean_leaves_the_random_state() -> None:
    p = Flow(flow_family("MAF")(2, transforms=1, hidden_features=(5,))())
    state = torch.get_rng_state()
    first = p.mean
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, p.mean)


@pytest.mark.parametrize("validate", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_importing_flows_leaves_torch_validation(validate: bool) -> None:
    code = (
        "import sys, torch, pyro, pyro_vae.priors as priors\n"
        "assert 'zuko' not in sys.modules\n"
        f"torch.distributions.Distribution.set_default_validate_args({validate})\n"
        "priors.FlowPrior(2)\n"
        "assert 'zuko' in sys.modules\n"
        f"assert torch.distributions.Distribution._validate_args is {validate}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_flow_is_refused() -> None:
    with pytest.raises(ValueError, match="no flow 'Nope'"):
        flow_family("Nope")
    for name in ("CNF", "Flow"):
        with pytest.raises(ValueError, match=f"zuko's {name} is not made of transforms"):
            make_flow(name, 3, transforms=2, hidden=(7,))
    p = Flow(make_flow("NICE", 3, transforms=2, hidden=(7,))())
    assert p.rsample((5,)).shape == (5, 3)
