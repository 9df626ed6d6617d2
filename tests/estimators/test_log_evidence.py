"""log_evidence: right or doubtful; and what every estimator leaves as it found it."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import Tensor, nn
from worlds import WORLDS, data, dirichlet_multinomial, linear, misses, square

from pyro_vae import likelihoods, networks, posteriors, priors
from pyro_vae.densities import scale_latents
from pyro_vae.estimators import (
    annealed_importance_sampling,
    bidirectional,
    log_evidence,
    refined_importance_sampling,
)
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

ESTIMATORS = [
    refined_importance_sampling,
    annealed_importance_sampling,
    bidirectional,
    log_evidence,
]


@pytest.mark.parametrize("name", WORLDS)
def test_what_is_reliable_is_right(name: str) -> None:
    world = WORLDS[name]()
    e = log_evidence(world.model, world.guide, world.x)
    assert misses(e.log_prob, e.stderr, world.truth) < 5
    assert abs(e.mean() - world.truth.mean().item()) < 0.02
    assert e.verdict.count("reliable") >= len(world.x) - 1
    reliable = torch.tensor([verdict == "reliable" for verdict in e.verdict])
    assert (e.stderr[reliable] < 0.05).all()
    assert (e.khat[reliable] < e.khat_threshold[reliable]).all()


def test_the_regret_is_the_distance_of_the_guide() -> None:
    exact = LinearGaussian.draw(2, 5)
    x = exact.vae.sample(101)

    def guide(x: Tensor) -> Tensor:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", exact.proposal(x, shift=0.3, width=1.2))

    found = log_evidence(exact.vae.model, guide, x, audit=False).extras["regret"]
    q = exact.proposal(x, shift=0.3, width=1.2)
    truth = dist.kl.kl_divergence(q, exact.posterior(x)).detach()
    error = found - truth
    assert abs(error.mean()) < 3.5 * error.std() / 101**0.5
    assert error.std() < 1


def test_work_goes_where_it_is_needed() -> None:
    world = square()
    e = log_evidence(world.model, world.guide, world.x, tolerance=0.01)
    assert len(set(e.num_samples.tolist())) > 1
    assert misses(e.log_prob, e.stderr, world.truth) < 5


@pytest.mark.parametrize("radius", [1.5, pytest.param(2.5, marks=pytest.mark.slow)])
def test_a_ring_is_right_or_doubtful(radius: float) -> None:
    """A sharp likelihood of the radius in two dimensions defeats any Gaussian."""

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.03), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x, r = torch.tensor([radius]), torch.linspace(1e-3, 9, 100_001)
    e = log_evidence(model, guide, x, tolerance=0.05, audit=False)
    log_radius = dist.Chi2(torch.tensor(2.0)).log_prob(r**2) + (2 * r).log()
    truth = log_radius + dist.Normal(r, 0.03).log_prob(x[:, None])
    truth = truth.logsumexp(-1) + (r[1] - r[0]).log()
    assert abs(e.log_prob - truth) < 5 * e.stderr.clamp(max=0.1) or e.verdict == ["doubtful"]


def test_a_tolerance_out_of_reach_is_doubtful() -> None:
    world = linear()
    e = log_evidence(world.model, world.guide, world.x, tolerance=1e-6, budget=5000)
    assert set(e.verdict) == {"doubtful"}
    assert max(e.num_samples.tolist()) < 5000
    assert misses(e.log_prob, e.stderr, world.truth) < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"budget": 100}, "budget must be at least 3.* got 100"),
        ({"audit": None}, "audit must be True, False or an Audit; got None"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    world = linear()
    with pytest.raises(ValueError, match=message):
        log_evidence(world.model, world.guide, world.x, **options)


@pytest.mark.parametrize("estimate", ESTIMATORS[:2])
def test_chunks_change_nothing_but_the_noise(estimate: Callable) -> None:
    world = linear(0.7, 0.5, 0.7)
    whole = estimate(world.model, world.guide, world.x)
    parts = estimate(world.model, world.guide, world.x, chunk_size=211)
    noise = (whole.stderr**2 + parts.stderr**2).sqrt()
    assert ((whole.log_prob - parts.log_prob).abs() < 5 * noise).all()


def rows_at_once(vae: VAE, run: Callable) -> int:
    seen = []
    hook = vae.likelihood.decoder.register_forward_hook(
        lambda module, args, output: seen.append(args[0].shape[:-1].numel())
    )
    run()
    hook.remove()
    return max(seen)


def small_vae(condition_dim: int = 0) -> VAE:
    """With dropout, so that its mode matters, and a mixture as its prior."""
    decoder = networks.MLP(2, 5, (7,), condition_dim=condition_dim)
    encoder = networks.MLP(5, 4, (7,), condition_dim=condition_dim)
    decoder.hidden.append(nn.Dropout(0.5))
    return VAE(
        priors.MixtureOfGaussians(2, num_components=3),
        likelihoods.Bernoulli(decoder, (5,)),
        posteriors.DiagonalNormal(encoder, 2),
    )


def test_the_model_sees_no_more_rows_than_asked() -> None:
    vae, x = small_vae(), torch.ones(11, 5)
    seen = rows_at_once(vae, lambda: log_evidence(vae.model, vae.guide, x, chunk_size=407))
    assert 200 < seen <= 407


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_a_vae_with_labels_is_left_as_it_was(estimate: Callable) -> None:
    vae = small_vae(condition_dim=3)
    x, y = (torch.rand(5, 5) < 0.5).double(), torch.eye(3)[torch.arange(5) % 3]
    vae.posterior.requires_grad_(False)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    few = {} if estimate in ESTIMATORS[::3] else {"num_temperatures": 5, "num_chains": 7}
    results = [estimate(vae.model, vae.guide, x, y, seed=3, **few) for _ in range(2)]
    for result in results:
        value = result.lower if hasattr(result, "lower") else result.log_prob
        assert value.isfinite().all()
        assert torch.equal(
            value,
            getattr(results[0], "lower", None)
            if hasattr(result, "lower")
            else results[0].log_prob,
        )
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in vae.modules())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in vae.parameters())
    assert all(p.requires_grad for p in vae.likelihood.parameters())
    assert not any(p.requires_grad for p in vae.posterior.parameters())
    assert all(torch.equal(before[n], v) for n, v in vae.state_dict().items())
    assert len(pyro.get_param_store()) == 0
    assert pyro.distributions.is_validation_enabled()


def test_everything_is_back_after_an_error() -> None:
    vae, x = small_vae(), torch.ones(3, 5)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="budget"):
        log_evidence(vae.model, vae.guide, x, budget=1)
    assert vae.training
    assert torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("estimate", ESTIMATORS[:2])
def test_weights_in_the_programs_do_not_count(estimate: Callable) -> None:
    """At beta = 1, whatever scales the model and the guide carry."""
    world = linear(0.7, 0.5, 0.7, num_data=5)
    plain = estimate(world.model, world.guide, world.x)
    scaled = estimate(scale_latents(world.model, 4.0), scale_latents(world.guide, 4.0), world.x)
    torch.testing.assert_close(plain.log_prob, scaled.log_prob)


def test_another_seed_draws_others() -> None:
    world = linear(num_data=3)
    one, two = (
        log_evidence(world.model, world.guide, world.x, seed=seed, audit=False) for seed in (1, 2)
    )
    assert not torch.equal(one.log_prob, two.log_prob)


def test_sparse_latents_are_right_in_single_precision() -> None:
    torch.set_default_dtype(torch.float32)  # whose least number many parts are below
    world = dirichlet_multinomial((0.1, 0.05, 0.2, 0.1), 0.3)
    found = log_evidence(world.model, world.guide, world.x)
    assert found.verdict.count("reliable") > 10
    assert misses(found.log_prob, found.stderr, world.truth) < 4.5
