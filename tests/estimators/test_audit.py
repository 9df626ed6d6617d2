"""The audit sees what the verdict cannot; the coordinates make tails and idle units easy."""

from __future__ import annotations

from types import MethodType

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import StickBreakingTransform
from worlds import World, data, linear

from pyro_vae import build
from pyro_vae.densities import evaluating
from pyro_vae.estimators import audit, log_evidence, modes
from pyro_vae.estimators.coordinates import LogStickBreaking
from pyro_vae.estimators.log_evidence import AUDITS
from pyro_vae.estimators.target import Target
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")


def mirror(latent_dim: int, sigma: float = 0.1) -> World:
    """x = (|z_1|, the others mixed) + noise: twice the evidence of one of the two modes."""
    W = torch.randn(latent_dim - 1, latent_dim)
    rest = dist.MultivariateNormal(
        torch.zeros(latent_dim), W.T @ W + sigma**2 * torch.eye(latent_dim)
    )

    def loc(z: Tensor) -> Tensor:
        return torch.cat([z[..., :1].abs(), z[..., 1:] @ W], -1)

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(loc(z), sigma).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            loc = torch.cat([x[:, :1], x.new_zeros(len(x), latent_dim - 1)], -1)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    x = loc(torch.randn(17, latent_dim)) + sigma * torch.randn(17, latent_dim + 1)
    spread = (1 + sigma**2) ** 0.5
    side = sigma / spread  # posterior deviation of the folded unit
    share = torch.special.ndtr(x[:, :1] / spread**2 / side)
    folded = dist.Normal(0.0, spread).log_prob(x[:, :1]) + (2 * share).log()
    return World(model, guide, x, folded[:, 0] + rest.log_prob(x[:, 1:]))


def test_two_mirrored_modes_are_both_found_in_many_dimensions() -> None:
    world = mirror(41)
    e = log_evidence(world.model, world.guide, world.x)
    error = (e.log_prob - world.truth).abs()
    assert (error < 5 * e.stderr + 1e-3).all()
    assert e.verdict.count("reliable") >= 16
    assert e.audit.startswith("passed: of 24 simulated data")


def test_what_misses_a_mode_is_not_called_reliable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that stops at the guide's mode: each value is log 2 low, and nothing shows it."""
    world = mirror(11)

    def first(self: object, num_starts: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.arange(self.known.shape[1])  # type: ignore[attr-defined]
        return rows, self.known[0], torch.ones_like(rows, dtype=torch.bool)  # type: ignore[attr-defined]

    monkeypatch.setattr(modes._Search, "run", first)
    monkeypatch.setattr("pyro_vae.estimators.refined.add_components", lambda t, q, u: q)
    blind = log_evidence(world.model, world.guide, world.x, audit=False)
    assert blind.verdict.count("reliable") > 8
    assert (blind.log_prob - world.truth < -0.5).sum() > 8
    e = log_evidence(world.model, world.guide, world.x)
    assert set(e.verdict) == {"doubtful"}
    assert e.audit.startswith("FAILED")


def test_exact_draws_bracket_log_px() -> None:
    """Lower and upper bounds are within their errors of the closed form, which lies between."""
    world = linear(num_data=7)
    result = audit(world.model, world.guide, world.x, num_data=53)
    assert len(result) == 53
    assert result.passed
    assert (result.gap > -0.01).all()
    assert result.gap.mean() < 0.0025
    assert 0.3 < result.gap.mean() / result.evidence.stderr.square().mean() < 3


def spike_and_slab() -> dist.Distribution:
    parts = dist.Normal(torch.zeros(2), torch.tensor([0.02, 1.0]))
    fn = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts)
    return fn.expand([3]).to_event(1)


IDLE = {
    "Student's t": lambda: dist.StudentT(2.0, torch.zeros(3), 1.0).to_event(1),
    "Laplace": lambda: dist.Laplace(torch.zeros(3), 0.7).to_event(1),
    "Gamma": lambda: dist.Gamma(torch.full((3,), 0.4), 2.0).to_event(1),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([0.1, 0.3, 0.2, 0.5])),
    "spike and slab": spike_and_slab,
}


@pytest.mark.parametrize("name", IDLE)
def test_an_idle_prior_is_standard_normal_in_its_coordinates(name: str) -> None:
    """log p(u) is that of a standard Normal, and u and the value make each other."""
    prior = IDLE[name]()

    def model(x: Tensor) -> None:
        with data(len(x)):
            z = pyro.sample("z", prior)
            loc = 0.0 * z[..., :2]  # with a gradient, which is 0
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with data(len(x)):
            pyro.sample("z", prior)

    x = torch.randn(5, 2)
    with evaluating(model, guide, seed=0, device=x.device):
        target = Target(model, guide, x)
        u, log_prior, _ = target.draw_prior(401)
        again = target.run_model(u).log_prior
    normal = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    torch.testing.assert_close(log_prior, normal, atol=0.1, rtol=0)
    assert (log_prior - normal).abs().mean() < 3e-3
    torch.testing.assert_close(log_prior, again, atol=1e-6, rtol=0)
    e = log_evidence(model, guide, x, audit=False)
    truth = dist.Normal(0.0, 1.0).log_prob(x).sum(-1)
    assert ((e.log_prob - truth).abs() < 5 * e.stderr + 1e-3).all()
    assert set(e.verdict) == {"reliable"}


@pytest.mark.parametrize("fixed", [True, False])
def test_a_prior_has_normal_scores_if_it_is_the_same_for_all_data(fixed: bool) -> None:
    def prior(x: Tensor) -> None:
        pyro.sample("z", dist.Laplace(0.0 * x if fixed else x, 1.0).to_event(1))

    def guide(x: Tensor) -> None:
        with data(len(x)):
            prior(x)

    def model(x: Tensor) -> None:
        with data(len(x)):
            prior(x)
            pyro.sample("x", dist.Normal(x, 1.0).to_event(1), obs=x)

    target = Target(model, guide, torch.randn(5, 2))
    assert (target.sites["z"].scores is not None) == fixed


def test_sticks_are_torchs_where_torch_is_exact() -> None:
    v = torch.randn(7, 4)
    sticks, torchs = LogStickBreaking(), StickBreakingTransform()
    p = sticks(v)
    offset = torch.arange(4, 0, -1).log()  # torch moves its logits by this
    torch.testing.assert_close(p, torchs(v + offset))
    torch.testing.assert_close(sticks.inv(p), v)
    jacobian = torch.stack([torch.autograd.functional.jacobian(sticks, row)[:-1] for row in v])
    torch.testing.assert_close(sticks.log_abs_det_jacobian(v, p), jacobian.logdet())
    corner = torch.tensor([1e-40, 1.0, 1e-200])
    torch.testing.assert_close(sticks(sticks.inv(corner)), corner, rtol=1e-9, atol=0)


def test_a_model_that_observes_anything_else_is_not_audited() -> None:
    world = linear(num_data=3)

    def model(x: Tensor) -> None:
        world.model(2 * x)

    def guide(x: Tensor) -> None:
        world.guide(2 * x)

    e = log_evidence(model, guide, world.x)
    assert e.audit.startswith("none: data are simulated for models whose one observed site is x")
    with pytest.raises(ValueError, match="one observed site is x"):
        audit(model, guide, world.x)


def test_an_audit_is_kept_for_the_weights_it_was_made_with(small: VAE) -> None:
    x = (torch.rand(3, 5) < 0.5).double()
    first = log_evidence(small.model, small.guide, x)
    kept = AUDITS[small]
    log_evidence(small.model, small.guide, x)
    assert AUDITS[small] is kept
    assert first.audit == str(kept[1])
    with torch.no_grad():
        next(small.parameters()).add_(0.1)
    log_evidence(small.model, small.guide, x)
    assert AUDITS[small] is not kept


@pytest.fixture
def small() -> VAE:
    return build(5, 2).double()


def test_an_audit_is_of_its_programs(small: VAE) -> None:
    """Of one module, but with another guide."""
    x = (torch.rand(3, 5) < 0.5).double()
    log_evidence(small.model, small.guide, x)
    kept = AUDITS[small]

    def other(self: VAE, x: Tensor) -> Tensor:
        return self.guide(1 - x)

    log_evidence(small.model, MethodType(other, small), x)
    assert AUDITS[small][0] != kept[0]
