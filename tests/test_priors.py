"""Laws of every prior."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from families import POSTERIORS, PRIORS, draws, make, name, sampling_error
from torch import nn

from pyro_vae.networks import MLP
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import (
    Laplace,
    MixtureOfGaussians,
    Normal,
    Prior,
    StandardNormal,
    StudentT,
    VampPrior,
)
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

each = pytest.mark.parametrize("cls", PRIORS, ids=name)
posterior = pytest.mark.parametrize("posterior", POSTERIORS, ids=name)


def build(cls: type, latent_dim: int = 2) -> Prior:
    """The prior of a VAE with all of its parameters moved from their start."""
    vae = make(prior=cls, latent_dim=latent_dim)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return vae.prior


def vamp(num_components: int = 5, condition_dim: int = 0, **options: object) -> VampPrior:
    encoder = MLP(3, 4, (5,), condition_dim=condition_dim, **options)
    return VampPrior(DiagonalNormal(encoder, 2), (3,), num_components)


@each
def test_density_normalises_and_the_sampler_and_mean_fit_it(cls: type) -> None:
    p = build(cls)()
    z = p.sample((draws(p),))
    assert (abs(z.mean(0) - p.mean) < 5 * sampling_error(p, z)).all()
    centre, width = z[:1009].mean(0), z[:1009].std(0)
    reference = dist.Normal(centre, 0.6 * width).to_event(1)
    with torch.no_grad():
        ratio = (reference.log_prob(z) - p.log_prob(z)).exp()
    assert abs(ratio.mean() - 1) < 5 * ratio.std() / len(z) ** 0.5


@each
@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("lead", [(), (5,), (2, 5)])
def test_shapes(cls: type, latent_dim: int, lead: tuple[int, ...]) -> None:
    p = build(cls, latent_dim)()
    assert (p.batch_shape, p.event_shape) == ((), (latent_dim,))
    z = p.sample(lead)
    assert z.shape == (*lead, latent_dim)
    assert p.log_prob(z).shape == lead
    expanded = p.expand(lead)
    assert expanded.batch_shape == lead
    assert expanded.sample((7,)).shape == (7, *lead, latent_dim)
    torch.testing.assert_close(expanded.log_prob(z), p.log_prob(z.clone()))
    assert expanded.log_prob(z.reshape(-1, latent_dim)[0]).shape == lead


@each
def test_draws_of_a_batch_differ(cls: type) -> None:
    z = build(cls)().expand((5,)).sample()
    assert len(z.unique(dim=0)) == 5


@each
def test_every_parameter_gets_a_gradient(cls: type) -> None:
    prior = build(cls)
    z = torch.randn(7, 2, requires_grad=True)
    prior().log_prob(z).sum().backward()
    assert (z.grad != 0).all()
    for key, parameter in prior.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@each
def test_state_dict_gives_the_same_density(cls: type) -> None:
    vae, other = make(prior=cls), make(prior=cls)
    vae.initialise(torch.randint(2, (23, 7)).double())
    z = torch.randn(5, 2)
    other.load_state_dict(vae.state_dict())
    assert torch.equal(vae.prior().log_prob(z), other.prior().log_prob(z))


@each
def test_density_and_draws_have_the_parameters_precision(cls: type) -> None:
    vae = make(prior=cls).float()
    z = vae.prior().sample((5,))
    assert z.dtype == torch.float32
    assert vae.prior().log_prob(z).dtype == torch.float32


@posterior
def test_vamp_prior_is_the_average_posterior_of_its_inputs(posterior: type) -> None:
    vae = make(prior=VampPrior, posterior=posterior)
    z = torch.randn(5, 2)
    q = vae.posterior(vae.prior.inputs)
    truth = q.log_prob(z[:, None]).logsumexp(-1) - math.log(len(vae.prior.inputs))
    torch.testing.assert_close(vae.prior().log_prob(z), truth)


@posterior
def test_vamp_prior_given_y_is_a_mixture_for_each_row(posterior: type) -> None:
    encoder = MLP(3, posterior.num_params(2), (5,), condition_dim=4)
    q = posterior(encoder, 2)
    prior = VampPrior(q, (3,), 11)
    y, z = torch.randn(5, 4), torch.randn(5, 2)
    p = prior(y)
    assert (p.batch_shape, p.event_shape) == ((5,), (2,))
    for i in range(5):
        components = q(prior.inputs, y[i].expand(11, 4))
        truth = components.log_prob(z[i]).logsumexp(0) - math.log(11)
        torch.testing.assert_close(p.log_prob(z)[i], truth)
    with pytest.raises(ValueError, match="got none"):
        prior()


def test_vamp_prior_starts_at_data_and_stays_in_their_range() -> None:
    prior = vamp(97)
    x = torch.tensor([[-3.0, 1.0, 5.0], [2.0, 0.0, 1.0]])
    prior.initialise(x)
    gap = torch.cdist(prior.inputs.detach(), x).min(1).values
    assert gap.max() < 0.01 * 8 * 3**0.5 + 1e-12
    with torch.no_grad():
        prior.raw_inputs.mul_(1e6)
    assert prior.inputs.min() == -3
    assert prior.inputs.max() == 5


def test_vamp_prior_keeps_a_given_range() -> None:
    prior = VampPrior(DiagonalNormal(MLP(3, 4), 2), (3,), 5, data_range=(0.0, 255.0))
    prior.initialise(torch.rand(7, 3) * 100 + 50)
    assert (prior.low, prior.high) == (0, 255)


def test_vamp_prior_takes_constant_data() -> None:
    prior = vamp()
    prior.initialise(torch.full((7, 3), 0.5))
    assert prior().log_prob(torch.zeros(2)).isfinite()
    assert abs(prior.inputs - 0.5).max() < 0.02


def test_vamp_prior_uses_batch_statistics_without_changing_them() -> None:
    prior = vamp(norm="batch")
    prior.posterior(torch.randn(13, 3))
    before = {k: v.clone() for k, v in prior.posterior.state_dict().items()}
    training = prior().log_prob(torch.zeros(2))
    assert all(m.training for m in prior.posterior.modules())
    assert all(torch.equal(v, before[k]) for k, v in prior.posterior.state_dict().items())
    prior.posterior.eval()
    assert torch.equal(prior().log_prob(torch.zeros(2)), training)
    assert not any(m.training for m in prior.posterior.modules())


def test_vamp_prior_does_not_own_the_posterior() -> None:
    prior = vamp()
    assert [key for key, _ in prior.named_parameters()] == ["raw_inputs"]


def test_vamp_prior_of_another_vae_is_refused() -> None:
    first, second = make(prior=VampPrior), make()
    with pytest.raises(ValueError, match="another VAE's posterior"):
        VAE(first.prior, second.likelihood, second.posterior)


def test_components_of_a_mixture_start_apart() -> None:
    prior = MixtureOfGaussians(3, 7)
    assert torch.cdist(prior.loc, prior.loc).fill_diagonal_(1).min() > 0.05


@pytest.mark.parametrize(
    ("build_wrong", "message"),
    [
        (lambda: MixtureOfGaussians(2, 0), "num_components must be at least 1; got 0"),
        (lambda: vamp(0), "num_components must be at least 1; got 0"),
        (lambda: StudentT(2, df=0), "df must be positive; got 0"),
        (
            lambda: VampPrior(nn.Identity(), (3,), 5, data_range=(1.0, 1.0)),
            "low < high",
        ),
    ],
)
def test_wrong_options_are_refused(build_wrong: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_wrong()


def test_closed_forms() -> None:
    z = torch.randn(5, 3)
    unit = -0.5 * (z**2 + math.log(2 * math.pi)).sum(-1)
    torch.testing.assert_close(StandardNormal(3)().log_prob(z), unit)
    torch.testing.assert_close(Normal(3)().log_prob(z), unit)
    torch.testing.assert_close(Laplace(3)().log_prob(z), -z.abs().sum(-1) - 3 * math.log(2))
