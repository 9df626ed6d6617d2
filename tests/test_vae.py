"""The VAE as a pair of Pyro programs, and its everyday methods."""

from __future__ import annotations

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import LIKELIHOODS, POSTERIORS, PRIORS, draw, each_once, make, name
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from pyro_vae import networks, posteriors, priors
from pyro_vae.densities import densities
from pyro_vae.likelihoods import Bernoulli, Normal
from pyro_vae.networks import MLP, Conv, ConvTranspose
from pyro_vae.objectives import ELBO
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.priors import Normal as NormalPrior
from pyro_vae.priors import Prior, StandardNormal, VampPrior
from pyro_vae.training import fit
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

B, K, D, F = 7, 11, 2, 7
DRAWS = 50_021


def state(vae: VAE) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in vae.named_parameters()}


def moved(vae: VAE, start: dict[str, Tensor]) -> dict[str, bool]:
    return {key: not torch.equal(p, start[key]) for key, p in vae.named_parameters()}


def svi(vae: VAE, objective: object) -> SVI:
    return SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), loss=objective)


def convolutional() -> VAE:
    return VAE(
        StandardNormal(D),
        Bernoulli(ConvTranspose(D, (3, 7, 5), channels=(4,), hidden=(5,)), (3, 7, 5)),
        DiagonalNormal(Conv((3, 7, 5), 2 * D, channels=(4,), hidden=(5,)), D),
    )


# --- the programs ------------------------------------------------------------------------------


@pytest.mark.parametrize("data_shape", [(7,), (2, 3, 5)])
def test_sites_plate_and_shapes(data_shape: tuple[int, ...]) -> None:
    vae = make(data_shape=data_shape)
    x = draw(vae, B)
    with pyro.plate("particles", K, dim=-2):
        guide = poutine.trace(vae.guide).get_trace(x)
    with poutine.replay(trace=guide), pyro.plate("particles", K, dim=-2):
        model = poutine.trace(vae.model).get_trace(x)
    assert guide.nodes["_RETURN"]["value"].shape == (K, B, D)
    assert model.nodes["z"]["value"] is guide.nodes["z"]["value"]
    assert model.nodes["z"]["fn"].batch_shape == (K, B)
    assert model.nodes["x"]["is_observed"]
    assert torch.equal(model.nodes["x"]["value"], x)
    assert (model.nodes["x"]["fn"].batch_shape, model.nodes["x"]["fn"].event_shape) == (
        (K, B),
        data_shape,
    )
    sites = {key for key, site in model.nodes.items() if site["type"] == "sample"}
    assert sites == {"z", "x", "data"}


def test_the_model_draws_what_it_is_not_given() -> None:
    vae, given = make(), make(condition_dim=3)
    assert vae.model(size=5).shape == (5, F)
    assert vae.model().shape == (1, F)
    assert given.model(y=torch.randn(5, 3)).shape == (5, F)


@pytest.mark.parametrize("prior", PRIORS, ids=name)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=name)
def test_programs_given_y(prior: type, posterior: type) -> None:
    vae = make(prior=prior, posterior=posterior, condition_dim=3)
    y = torch.randn(B, 3)
    x = vae.sample(B, y)
    assert x.shape == (B, F)
    for objective in (ELBO(num_particles=K), Trace_ELBO()):
        torch.manual_seed(1)
        first = objective.loss(vae.model, vae.guide, x, y)
        torch.manual_seed(1)
        assert objective.loss(vae.model, vae.guide, x, y + 1) != first
    assert vae.reconstruct(x, y).shape == (B, F)
    with pytest.raises(ValueError, match="got none"):
        vae.model(x)
    with pytest.raises(ValueError, match="got none"):
        vae.guide(x)


@pytest.mark.parametrize("prior", PRIORS, ids=name)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=name)
def test_y_that_nothing_looks_at_is_refused(prior: type, posterior: type) -> None:
    vae = make(prior=prior, posterior=posterior)
    x, y = draw(vae, B), torch.randn(B, 3)
    refused = r"y of shape \[7, 3\] .* give its networks condition_dim"
    for call in (vae.model, vae.guide, vae.encode, vae.reconstruct):
        with pytest.raises(ValueError, match=refused):
            call(x, y)
    with pytest.raises(ValueError, match=refused):
        vae.sample(B, y)
    with pytest.raises(ValueError, match=refused):
        vae.model(y=y)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_one_network_may_look_at_y(part: str) -> None:
    networks = {
        "encoder": MLP(F, 2 * D, condition_dim=3 * (part == "encoder")),
        "decoder": MLP(D, F, condition_dim=3 * (part == "decoder")),
    }
    posterior = DiagonalNormal(networks["encoder"], D)
    vae = VAE(StandardNormal(D), Bernoulli(networks["decoder"], (F,)), posterior)
    assert vae.reconstruct(torch.zeros(B, F), torch.randn(B, 3)).shape == (B, F)


class ShiftedPrior(Prior):
    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Normal(torch.zeros(D) if y is None else y, 1.0).to_event(1)


class ShiftedBernoulli(Bernoulli):
    def forward(self, z: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        return super().forward(z if y is None else z + y)


class ShiftedNormal(DiagonalNormal):
    def forward(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        q = super().forward(x)
        return q if y is None else dist.Normal(q.mean + y, q.stddev).to_event(1)


class Summing(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.network(x) if y is None else self.network(x) + y.sum(-1, keepdim=True)


class AnyPosterior(nn.Module):
    """No subclass of Posterior."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.body = nn.Linear(F, 2 * D) if weights else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        raw = x.new_zeros(len(x), 2 * D) if self.body is None else self.body(x)
        loc, scale = raw.chunk(2, -1)
        return dist.Normal(loc, scale.exp()).to_event(1)


@pytest.mark.parametrize("weights", [True, False])
def test_a_posterior_may_be_any_module(weights: bool) -> None:
    vae = VAE(StandardNormal(D), Bernoulli(MLP(D, F), (F,)), AnyPosterior(weights))
    for x in (torch.ones(B, F), torch.ones(B, F, dtype=torch.uint8), torch.ones(B, F).float()):
        assert vae.encode(x).mean.dtype == torch.float64
        assert densities(vae.model, vae.guide, x).log_weights.dtype == torch.float64


@pytest.mark.parametrize("part", ["prior", "likelihood", "posterior", "encoder", "decoder"])
def test_a_part_of_one_s_own_may_look_at_y(part: str) -> None:
    encoder, decoder = MLP(F, 2 * D), MLP(D, F)
    encoder = Summing(encoder) if part == "encoder" else encoder
    decoder = Summing(decoder) if part == "decoder" else decoder
    likelihood = ShiftedBernoulli if part == "likelihood" else Bernoulli
    posterior = ShiftedNormal if part == "posterior" else DiagonalNormal
    prior = ShiftedPrior() if part == "prior" else StandardNormal(D)
    vae = VAE(prior, likelihood(decoder, (F,)), posterior(encoder, D))
    x, y = draw(vae, B), torch.randn(B, D)
    torch.manual_seed(1)
    first = ELBO().loss(vae.model, vae.guide, x, y)
    torch.manual_seed(1)
    assert ELBO().loss(vae.model, vae.guide, x, y + 1) != first


class Own(VAE):
    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int = 1) -> Tensor:
        return super().model(x, None, size) if y is None else super().model(x - y, None, size)


def test_a_vae_of_one_s_own_may_look_at_y() -> None:
    vae = make()
    own = Own(vae.prior, vae.likelihood, vae.posterior)
    x = draw(vae, B)
    assert ELBO().loss(own.model, own.guide, x, torch.zeros(B, F)) > 0


class Cube(Prior):
    def forward(self, y: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Uniform(-torch.ones(D), torch.ones(D)).to_event(1)


def test_a_posterior_outside_the_prior_s_support_is_refused() -> None:
    posterior = DiagonalNormal(MLP(F, 2 * D), D)
    vae = VAE(Cube(), Bernoulli(MLP(D, F), (F,)), posterior)
    x = draw(vae, B)
    with pytest.raises(ValueError, match="prior Cube has no density.* posterior DiagonalNormal"):
        ELBO().loss(vae.model, vae.guide, x)
    with pyro.validation_enabled(False):
        assert ELBO().loss(vae.model, vae.guide, x) == torch.inf


def test_data_outside_the_support_stop_the_model_and_initialise() -> None:
    vae = make()
    x = torch.rand(B, F)
    with pytest.raises(ValueError, match="binarise them or use"):
        vae.model(x)
    with pytest.raises(ValueError, match="binarise them or use"):
        vae.initialise(x)
    with pytest.raises(ValueError, match=r"data of shape \(7,\); got \(6,\)"):
        vae.model(x[:, 1:])
    assert not vae.initialised


# --- everyday methods --------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [ELBO(), Trace_ELBO()], ids=["ELBO", "Trace_ELBO"])
def test_a_datum_without_rows_is_refused(objective: object) -> None:
    vae = make()
    with pytest.raises(ValueError, match=r"a row for each datum: give x\[None\]; got \[7\]"):
        svi(vae, objective).step(draw(vae, B)[0])


def test_sample_draws_from_its_own_prior() -> None:
    decoder = MLP(D, D, ())
    decoder.output.weight.data, decoder.output.bias.data = torch.eye(D), torch.zeros(D)
    prior = NormalPrior(D)
    prior.loc.data, prior.log_scale.data = torch.tensor([3.0, -5.0]), torch.tensor([0.7, -0.7])
    vae = VAE(prior, Normal(decoder, (D,), scale=0.5), DiagonalNormal(MLP(D, 2 * D), D))
    with torch.no_grad():
        x, means = vae.sample(DRAWS), vae.sample(DRAWS, mean=True)
    for value, noise in ((x, 0.25), (means, 0.0)):
        variance = prior.log_scale.exp() ** 2 + noise
        assert (abs(value.mean(0) - prior.loc) < 5 * (variance / DRAWS).sqrt()).all()
        assert (abs(value.var(0) - variance) < 5 * variance * (2 / DRAWS) ** 0.5).all()


def test_sample_given_y_has_a_row_for_each() -> None:
    vae = make(condition_dim=3)
    with pytest.raises(ValueError, match="one row per draw: 5; got 4"):
        vae.sample(5, torch.randn(4, 3))


def test_reconstructions() -> None:
    vae = make()
    x = draw(vae, B)
    q = vae.encode(x)
    assert torch.equal(vae.reconstruct(x), vae.likelihood(q.mean).mean)
    draws = vae.reconstruct(x, num_samples=2003)
    assert draws.shape == (2003, B, F)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    many = vae.likelihood(q.sample((20_011,))).mean.mean(0)
    assert (abs(draws.mean(0) - many) < 5 * 0.5 * (1 / 2003 + 1 / 20_011) ** 0.5).all()


@pytest.mark.parametrize(("prior", "likelihood"), each_once(PRIORS, LIKELIHOODS))
def test_initialise_measures_once(prior: type, likelihood: type) -> None:
    vae = make(prior=prior, likelihood=likelihood)
    first, second = draw(vae, 13), draw(vae, 13)
    vae.initialise(first)
    assert vae.initialised
    before = copy.deepcopy(vae.state_dict())
    vae.initialise(second)
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    other = make(prior=prior, likelihood=likelihood)
    other.load_state_dict(before)
    other.initialise(second)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize("prior", PRIORS, ids=name)
@pytest.mark.parametrize("posterior", POSTERIORS, ids=name)
def test_no_tensor_has_two_names(prior: type, posterior: type) -> None:
    vae = make(prior=prior, posterior=posterior)
    tensors = list(vae.named_parameters(remove_duplicate=False))
    assert len({id(p) for _, p in tensors}) == len(tensors)
    assert set(vae.state_dict()) == {
        *(k for k, _ in tensors),
        *(k for k, _ in vae.named_buffers(remove_duplicate=False)),
    }


# --- several VAEs in one process ---------------------------------------------------------------


@pytest.mark.parametrize("objective", [ELBO(), Trace_ELBO()], ids=["ELBO", "Trace_ELBO"])
@pytest.mark.parametrize("way", ["second", "deep copy"])
def test_another_vae_trains_and_leaves_the_first(objective: object, way: str) -> None:
    first = make(prior=VampPrior)
    x = draw(first, B)
    svi(first, objective).step(x)
    other = make(prior=VampPrior) if way == "second" else copy.deepcopy(first)
    starts = state(first), state(other)
    trainer = svi(other, objective)
    trainer.step(x)
    trainer.step(x)
    assert all(moved(other, starts[1]).values())
    assert not any(moved(first, starts[0]).values())
    start = state(first), state(other)
    svi(first, objective).step(x)
    assert all(moved(first, start[0]).values())
    assert not any(moved(other, start[1]).values())


@pytest.mark.parametrize("objective", [ELBO(), Trace_ELBO()], ids=["ELBO", "Trace_ELBO"])
def test_channels_last_weights_train(objective: object) -> None:
    vae = convolutional().to(memory_format=torch.channels_last)
    weight = vae.posterior.encoder.convolutions[0].weight
    assert not weight.is_contiguous()
    x = draw(vae, B)
    start = state(vae)
    trainer = svi(vae, objective)
    trainer.step(x)
    trainer.step(x)
    assert moved(vae, start) == dict.fromkeys(start, True)


def test_a_deep_copy_uses_its_own_posterior() -> None:
    vae = make(prior=VampPrior)
    other = copy.deepcopy(vae)
    assert other.prior.posterior is other.posterior
    assert other.prior.posterior is not vae.posterior
    z = torch.randn(5, D)
    before = vae.prior().log_prob(z)
    with torch.no_grad():
        other.posterior.encoder.output.bias.add_(1)
    assert torch.equal(vae.prior().log_prob(z), before)
    assert not torch.equal(other.prior().log_prob(z), before)


def test_what_pyro_has_trained_is_pickled() -> None:
    vae = make()
    x = draw(vae, B)
    svi(vae, Trace_ELBO()).step(x)
    again = pickle.loads(pickle.dumps(vae))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), vae.parameters()))
    svi(again, Trace_ELBO()).step(x)


def test_frozen_parameters_stay() -> None:
    vae = make()
    vae.likelihood.requires_grad_(False)
    x = draw(vae, B)
    start = state(vae)
    svi(vae, ELBO()).step(x)
    assert {k for k, m in moved(vae, start).items() if m} == {
        k for k in start if k.startswith("posterior.")
    }


def test_a_replaced_parameter_is_the_one_that_trains() -> None:
    vae = make()
    x = draw(vae, B)
    trainer = svi(vae, Trace_ELBO())
    trainer.step(x)
    vae.posterior.encoder.output.bias = nn.Parameter(torch.randn(2 * D))
    start = state(vae)
    trainer.step(x)
    assert all(moved(vae, start).values())


def test_running_the_programs_without_inference_registers_nothing() -> None:
    vae = make()
    vae.guide(draw(vae, B))
    vae.model()
    assert len(pyro.get_param_store()) == 0


def test_a_model_keeps_its_parameters_precision() -> None:
    vae = make(prior=VampPrior).float()
    x = torch.randint(2, (B, F)).float()
    vae.initialise(x)
    loss = ELBO().differentiable_loss(vae.model, vae.guide, x)
    loss.backward()
    assert {p.grad.dtype for p in vae.parameters()} == {torch.float32}
    assert vae.sample(3).dtype == torch.float32


def test_an_encoder_of_the_wrong_size_is_refused() -> None:
    for kind, wanted in ((posteriors.DiagonalNormal, 4), (posteriors.FullNormal, 5)):
        encoder = networks.MLP(7, 3, (5,))
        vae = make()
        vae.posterior = kind(encoder, 2)
        words = f"{kind.__name__} of 2 latents needs an encoder of {wanted} outputs; got 3"
        with pytest.raises(ValueError, match=words):
            vae.encode(torch.zeros(3, 7))


@pytest.mark.parametrize("latents", [1, 3])
def test_a_prior_of_another_size_is_refused(latents: int) -> None:
    vae = make()
    vae.prior = priors.StandardNormal(latents)
    with pytest.raises(ValueError, match=f"StandardNormal is over {latents} latents.* over 2"):
        fit(vae, torch.zeros(5, 7), epochs=1, progress=False)


def test_rows_of_other_kinds_are_taken() -> None:
    vae, x = make(condition_dim=3), torch.randint(2, (5, 7)).float()
    y = torch.randn(5, 3)
    for rows in (torch.Tensor.numpy, torch.Tensor.tolist):
        for given in ((rows(x), rows(y)), (rows(x), y), (x, rows(y))):
            assert torch.equal(vae.encode(*given).mean, vae.encode(x, y).mean)
            assert torch.equal(vae.reconstruct(*given), vae.reconstruct(x, y))
    with pytest.raises(ValueError, match="x must be finite; 5 row"):
        vae.encode(x / 0, y)
    with pytest.raises(ValueError, match="y must have a row for each of the input"):
        vae.encode(x, y[:4])
    with pytest.raises(ValueError, match="x must be a tensor, array, frame or list .*; got str"):
        vae.encode("x", y)
