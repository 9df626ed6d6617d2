"""Programs as their authors write them, against the same ones written for leading dimensions."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from pyro_vae import fit, importance_sampling, log_evidence
from pyro_vae.densities import Densities, densities, draw_latents, folds, log_joint
from pyro_vae.densities.particles import Unfolded
from pyro_vae.objectives import ELBO, IWAE, BetaTC, DReG, Objective

B, D, F, C = 17, 2, 12, 3
QUIET = {"progress": False, "accelerator": "cpu"}


def rows(size: int) -> pyro.plate:
    return pyro.plate("data", size, dim=-1)


class Program(nn.Module):
    """A VAE of F binary numbers: its decoder does not broadcast, unless it is told to."""

    conditional = False

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__()
        self.broadcasts = broadcasts
        self.encoder = nn.Linear(F + C * self.conditional, 2 * D)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        raise NotImplementedError

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.logits(x, z, y)).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        given = x if y is None else torch.cat([x, y], -1)
        loc, raw = self.encoder(given).chunk(2, -1)
        with rows(len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


class Joined(Program):
    """A conditional VAE."""

    conditional = True

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__(broadcasts)
        self.decoder = nn.Linear(D + C, F)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        y = y.expand(*z.shape[:-1], C) if self.broadcasts else y
        return self.decoder(torch.cat([z, y], -1))


class Normalised(Program):
    """Batch norm in the decoder, with as many features as a batch may have rows."""

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__(broadcasts)
        self.first, self.norm = nn.Linear(D, B), nn.BatchNorm1d(B)
        self.last = nn.Linear(B, F)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        h = self.first(z)
        h = self.norm(h.flatten(0, -2)).view(h.shape) if self.broadcasts else self.norm(h)
        return self.last(leaky_relu(h))


class Viewed(Program):
    """A decoder of convolutions."""

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__(broadcasts)
        self.first, self.conv = nn.Linear(D, 20), nn.ConvTranspose2d(5, 3, 2, 1)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        h = leaky_relu(self.first(z))
        if self.broadcasts:
            return self.pixels(h.view(-1, 5, 2, 2))[:, :, :2].reshape(*z.shape[:-1], F)
        return self.pixels(h.view(len(x), 5, 2, 2))[:, :, :2].reshape(len(x), F)

    def pixels(self, h: Tensor) -> Tensor:
        return self.conv(h)[..., :2]


class Weighed(Program):
    """Its softmax is over the data, once there is a leading dimension: no error shows it."""

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__(broadcasts)
        self.first, self.last = nn.Linear(D, 7), nn.Linear(7, F)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return 5 * self.last(self.first(z).softmax(-1 if self.broadcasts else 1))


class TwoLayers(Program):
    """A second latent, drawn given the first by a guide that does not broadcast."""

    def __init__(self, broadcasts: bool = False) -> None:
        super().__init__(broadcasts)
        self.above, self.last = nn.Linear(F + D, 2 * D), nn.Linear(2 * D, F)
        self.most_rows = 0

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            w = pyro.sample("w", dist.Laplace(z, 1.0).to_event(1))
            logits = self.last(torch.cat([z, w], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        self.most_rows = max(self.most_rows, len(x))
        loc, raw = self.encoder(x).chunk(2, -1)
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))
            x = x.expand(*z.shape[:-1], F) if self.broadcasts else x
            loc, raw = self.above(torch.cat([z, x], -1)).chunk(2, -1)
            pyro.sample("w", dist.Laplace(loc, raw.exp()).to_event(1))


PROGRAMS = [Joined, Normalised, Viewed, Weighed, TwoLayers]


def pair(kind: type[Program]) -> tuple[Program, Program]:
    """The program as written, and the one that broadcasts, with the same weights."""
    torch.manual_seed(1)
    written, broadcasts = kind(), kind(broadcasts=True)
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.normal_(0, 0.3)
    broadcasts.load_state_dict(written.state_dict())
    return written, broadcasts


def data(kind: type[Program], size: int = B) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(2)
    x = torch.bernoulli(torch.full((size, F), 0.4), generator=generator)
    return x, torch.randn(size, C, generator=generator) if kind.conditional else None


def seeded(program: Program, *batch: Tensor | None, num_particles: int) -> Densities:
    torch.manual_seed(3)
    return densities(program.model, program.guide, *batch, num_particles=num_particles)


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize("kind", PROGRAMS)
def test_densities_are_those_of_the_program_that_broadcasts(
    kind: type[Program], num_particles: int
) -> None:
    batch = data(kind)
    d, truth = (seeded(program, *batch, num_particles=num_particles) for program in pair(kind))
    for name, site in d.sites.items():
        assert site.value.shape == site.guide.batch_shape + (D,) == (num_particles, B, D)
        assert site.model.batch_shape == (num_particles, B)
        torch.testing.assert_close(site.value, truth.sites[name].value)
    for term in ("log_likelihood", "log_prior", "log_posterior", "log_posterior_detached"):
        torch.testing.assert_close(getattr(d, term), getattr(truth, term))
    torch.testing.assert_close(d.kl("sampled"), truth.kl("sampled"))
    torch.testing.assert_close(d.kl()["z"], truth.kl()["z"])
    assert (d.num_data, d.scale, d.num_particles) == (B, 1.0, num_particles)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_each_particle_is_that_of_a_run_of_its_own(kind: type[Program]) -> None:
    program, (x, y) = pair(kind)[0].eval(), data(kind)
    latents, log_q = draw_latents(program.guide, x, y, num_particles=5)
    joint = log_joint(program.model, x, y, latents)
    for k in range(5):
        one = {name: z[k : k + 1] for name, z in latents.items()}
        torch.testing.assert_close(joint[k], log_joint(program.model, x, y, one)[0])
        torch.testing.assert_close(log_q[k], log_joint(program.guide, x, y, one)[0])


@pytest.mark.parametrize(
    "objective", [ELBO(), IWAE(3), DReG(3), BetaTC()], ids=lambda o: type(o).__name__
)
@pytest.mark.parametrize("kind", PROGRAMS)
def test_training_is_that_of_the_program_that_broadcasts(
    kind: type[Program], objective: Objective
) -> None:
    if isinstance(objective, BetaTC) and kind is TwoLayers:
        pytest.skip("needs one latent")
    x, y = data(kind, 2 * B)
    programs = pair(kind)
    for program in programs:
        fit(program, x if y is None else (x, y), objective, epochs=2, batch_size=B, **QUIET)
    written, truth = (program.state_dict() for program in programs)
    for name, weight in truth.items():
        torch.testing.assert_close(written[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", PROGRAMS)
def test_evidence_is_that_of_the_program_that_broadcasts(kind: type[Program]) -> None:
    batch = data(kind, 2)
    for estimate in (importance_sampling, log_evidence):
        options = {"num_samples": 2000} if estimate is importance_sampling else {}
        found, truth = (estimate(p.model, p.guide, *batch, **options) for p in pair(kind))
        error = 5 * (found.stderr**2 + truth.stderr**2).sqrt() + 1e-3
        assert (abs(found.log_prob - truth.log_prob) < error).all()
        assert found.verdict == truth.verdict


def test_a_guide_that_is_folded_sees_no_more_rows_than_the_model() -> None:
    program, (x, _) = pair(TwoLayers)[0], data(TwoLayers, 3)
    importance_sampling(program.model, program.guide, x, num_samples=500, chunk_size=100)
    assert program.most_rows == 100


def test_draws_of_a_guide_that_is_folded_come_in_chunks() -> None:
    program, (x, _) = pair(TwoLayers)[0], data(TwoLayers, 10)
    draws, log_prob = draw_latents(program.guide, x, num_particles=7, chunk_size=35)
    assert program.most_rows == 30
    assert (draws["z"].shape, log_prob.shape) == ((7, 10, D), (7, 10))


def test_a_program_that_broadcasts_is_given_its_rows_once() -> None:
    program, (x, _) = pair(TwoLayers)[1], data(TwoLayers)
    densities(program.model, program.guide, x, num_particles=7)
    assert program.most_rows == B


def test_finding_out_changes_nothing() -> None:
    program, (x, _) = pair(Normalised)[0], data(Normalised)
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    torch.manual_seed(3)
    folds(program.model, x, None)
    assert all(torch.equal(before[name], now) for name, now in program.state_dict().items())
    assert program.norm.training
    assert torch.initial_seed() == 3
    state = torch.get_rng_state()
    assert torch.equal(torch.manual_seed(3).get_state(), state)


def test_what_is_traced_counts_as_broadcasting_and_is_tried_later() -> None:
    class Traced(Tensor):
        pass

    program, (x, _) = pair(Normalised)[0], data(Normalised)
    assert not folds(program.model, x.as_subclass(Traced), None)
    assert folds(program.model, x, None)


def test_what_can_be_run_in_neither_way_runs_with_one_particle_and_says_what_to_write() -> None:
    def model(x: Tensor) -> None:
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            logits = len(x) * z.view(len(x), D).sum(-1, keepdim=True)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with rows(len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))

    x, _ = data(Viewed)
    assert densities(model, guide, x).log_weights.shape == (1, B)
    with pytest.raises(ValueError, match="model runs with one particle alone.*changes the dens"):
        densities(model, guide, x, num_particles=3)


def test_what_a_program_says_of_more_rows_is_passed_on() -> None:
    def model(x: Tensor) -> None:
        if len(x) > 1:
            raise RuntimeError("one row at a time, please")
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))
            logits = z.view(len(x), D).sum(-1, keepdim=True)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with rows(len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(D), 1.0).to_event(1))

    with pytest.raises(ValueError, match="neither .*one row at a time, please"):
        densities(model, guide, data(Viewed)[0][:1], num_particles=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Joined, TwoLayers])
def test_a_compiled_step_of_a_folded_program_is_the_eager_one(kind: type[Program]) -> None:
    x, y = data(kind)
    batch = (x,) if y is None else (x, y)
    programs = pair(kind)[0], pair(kind)[0]
    for program, compile in zip(programs, (False, True), strict=True):
        task = batch if y is not None else x
        fit(program, task, IWAE(3), epochs=5, batch_size=B, compile=compile, **QUIET)
    eager, compiled = (program.state_dict() for program in programs)
    for name, weight in eager.items():
        torch.testing.assert_close(compiled[name], weight, rtol=1e-3, atol=1e-4)


def test_data_that_a_program_cannot_take_teach_nothing_of_it() -> None:
    program, x, y = Joined(), torch.ones(B, F), torch.ones(B, C)
    with pytest.raises((RuntimeError, ValueError)):
        densities(program.model, program.guide, x[:, 1:], y, num_particles=2)
    assert folds(program.model, x, y)
    assert (
        densities(program.model, program.guide, x, y, num_particles=2).log_weights.isfinite().all()
    )


def test_densities_that_are_no_number_are_no_reason_to_fold() -> None:
    def model(x: Tensor) -> None:
        with rows(len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, torch.nan, validate_args=False), obs=x)

    assert folds(model, torch.ones(B), None, num_particles=5) is False


class StartsAtZero(Program):
    """Its decoder ignores z until it is trained, and must not take its softmax over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(D, F)
        nn.init.zeros_(self.decoder.weight)

    def logits(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.decoder(z.softmax(1))


def test_a_program_whose_weights_start_at_zero_is_folded() -> None:
    program = StartsAtZero()
    for model in (program.model, lambda x: program.model(x)):
        assert folds(model, data(Viewed)[0], None)


def test_a_folded_distribution_gives_the_density_of_its_draw_and_of_other_values() -> None:
    base = dist.Gamma(torch.arange(1.0, 7.0), 1.0)
    p = Unfolded(base, 2)
    for value in (p.rsample(), torch.rand(2, 3)):
        truth = base.log_prob(value.flatten()).unflatten(0, (2, 3))
        torch.testing.assert_close(p.log_prob(value), truth)


def test_a_folded_flow_of_no_inverse_gives_the_density_of_its_draw() -> None:
    base, planar = dist.Normal(torch.zeros(6, D), 1.0).to_event(1), dist.transforms.planar(D)
    p = Unfolded(dist.TransformedDistribution(base, [planar]), 2)
    torch.manual_seed(3)
    noise = base.sample()
    torch.manual_seed(3)
    value = p.rsample()
    found = p.log_prob(value)  # now, for a planar flow knows the inverse of its last draw alone
    torch.testing.assert_close(value.flatten(0, 1), planar(noise))
    jacobian = torch.stack([torch.autograd.functional.jacobian(planar, row) for row in noise])
    truth = base.log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(found.flatten(), truth)
