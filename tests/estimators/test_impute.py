"""Imputation and conditional densities, against probabilistic PCA with missing entries."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_vae import build, column_log_prob, fit, impute, log_conditional, log_evidence
from pyro_vae.distributions import Incomplete
from pyro_vae.estimators import Evidence, importance_sampling
from pyro_vae.networks import MLP
from pyro_vae.posteriors import DiagonalNormal
from pyro_vae.vae import VAE

pytestmark = pytest.mark.usefixtures("float64")

NAN = float("nan")
SIGMA = 0.7


@dataclass
class Ppca:
    """x = W z + b + sigma * noise, some of x missing at random; and its exact conditionals."""

    vae: VAE
    x: Tensor
    full: Tensor
    mean: Tensor
    covariance: Tensor

    def observed(self, row: int) -> tuple[Tensor, Tensor]:
        return ~self.x[row].isnan(), self.x[row].isnan()

    def log_prob(self, row: int, which: Tensor) -> Tensor:
        """log p of some entries of a complete row."""
        if not which.any():
            return torch.zeros(())
        part = MultivariateNormal(self.mean[which], self.covariance[which][:, which])
        return part.log_prob(self.full[row, which])

    def conditional(self, row: int) -> MultivariateNormal:
        """p(x_m | x_o)."""
        o, m = self.observed(row)
        gain = self.covariance[m][:, o] @ self.covariance[o][:, o].inverse()
        mean = self.mean[m] + gain @ (self.x[row, o] - self.mean[o])
        return MultivariateNormal(mean, self.covariance[m][:, m] - gain @ self.covariance[o][:, m])


def ppca(num_data: int, data_dim: int = 5, latent_dim: int = 2) -> Ppca:
    exact = LinearGaussian.draw(latent_dim, data_dim, SIGMA)
    encoder = MLP(2 * data_dim, 2 * latent_dim, (7,))
    q = DiagonalNormal(encoder, latent_dim)
    vae = VAE(exact.vae.prior, exact.vae.likelihood, q, missing=True)
    full = vae.sample(num_data)
    x = full.masked_fill(torch.rand(full.shape) < 0.5, NAN)
    covariance = exact.weight @ exact.weight.T + SIGMA**2 * torch.eye(data_dim)
    return Ppca(vae, x, full, exact.offset(), covariance)


def z_scores(found: Tensor, exact: Tensor, stderr: Tensor) -> float:
    """Root mean square of errors in standard errors."""
    return ((found - exact) / stderr).square().mean().sqrt().item()


def test_log_prob_mean_and_covariance_are_exact() -> None:
    world = ppca(31)
    x = world.x
    x[3] = NAN
    found = impute(world.vae, x, num_draws=3000)
    exact = torch.stack([world.log_prob(i, world.observed(i)[0]) for i in range(31)])
    rest = ~x.isnan().all(1)
    assert z_scores(found.log_prob[rest], exact[rest], found.evidence.stderr[rest]) < 1.4
    assert (found.log_prob[3], found.verdict[3]) == (0.0, "reliable")
    assert torch.equal(found.draws.isnan(), torch.zeros(3000, 31, 5, dtype=torch.bool))
    seen = ~x.isnan()
    assert torch.equal(found.mean[seen], x[seen])
    assert torch.equal(found.draws[:, seen], x[seen].expand(3000, -1))
    assert not found.stderr[seen].any()
    scores, ratios = [], []
    for i in range(31):
        m = x[i].isnan()
        if m.any():
            p = world.conditional(i)
            scores.append((found.mean[i, m] - p.mean) / found.stderr[i, m])
            draws = found.draws[:, i, m]
            whitened = torch.linalg.solve_triangular(p.scale_tril, (draws - p.mean).T, upper=False)
            ratios.append(torch.cov(whitened).reshape(m.sum(), m.sum()) - torch.eye(m.sum()))
    assert torch.cat(scores).square().mean().sqrt() < 1.3
    assert torch.cat(scores).square().mean().sqrt() > 0.7
    error = torch.cat([r.flatten() for r in ratios]).square().mean().sqrt()
    assert error < 2 * (2 / 1500) ** 0.5  # of a covariance from draws, some of them repeated


@pytest.mark.slow
def test_intervals_cover() -> None:
    world = ppca(500, data_dim=20, latent_dim=3)
    found = impute(world.vae, world.x, num_draws=400)
    m = world.x.isnan()
    assert m.sum() > 4800
    inside = (found.quantile(0.05) < world.full) & (world.full < found.quantile(0.95))
    assert 0.88 < inside[m].double().mean() < 0.92
    below = (world.full < found.median)[m].double().mean()
    assert 0.48 < below < 0.52


def test_log_evidence_of_incomplete_rows() -> None:
    world = ppca(41)
    found = log_evidence(world.vae, world.x, audit=False)
    exact = torch.stack([world.log_prob(i, world.observed(i)[0]) for i in range(41)])
    some = found.stderr > 0
    assert 0.6 < z_scores(found.log_prob[some], exact[some], found.stderr[some]) < 1.4
    assert found.verdict.count("reliable") > 38


def test_rows_that_miss_nothing_are_those_of_the_plain_density() -> None:
    world = ppca(7)
    x = world.full
    found = log_evidence(world.vae, x, audit=False)
    plain = VAE(world.vae.prior, world.vae.likelihood, world.vae.posterior)
    plain.encode = world.vae.encode  # of the mask of ones
    plain.likelihood.missing = False
    mask = torch.ones_like(x)
    plain.guide = lambda x, y=None: Guide(world.vae)(torch.cat([x, mask[: len(x)]], -1))
    other = log_evidence(plain.model, plain.guide, x, audit=False)
    assert torch.equal(found.log_prob, other.log_prob)


class Guide:
    """The guide of a VAE given what its encoder sees."""

    def __init__(self, vae: VAE) -> None:
        self.posterior = vae.posterior

    def __call__(self, inputs: Tensor) -> None:
        with pyro.plate("data", len(inputs), dim=-1):
            pyro.sample("z", self.posterior(inputs))


def test_nothing_observed_is_zero_exactly_for_every_estimator() -> None:
    world = ppca(3)
    world.x[1] = NAN
    for estimate in (log_evidence, importance_sampling):
        found = estimate(world.vae, world.x)
        assert (found.log_prob[1], found.stderr[1]) == (0.0, 0.0)
        assert found.verdict[1] == "reliable"


def test_evidences_of_other_missing_entries_do_not_compare(tmp_path: Path) -> None:
    world = ppca(11)
    options = {"num_samples": 7}
    a, b = (importance_sampling(world.vae, world.x, seed=s, **options) for s in (1, 2))
    each = a.log_prob - b.log_prob
    assert a.difference(b) == (each.mean().item(), each.std().item() / 11**0.5)
    a.save(tmp_path / "a.safetensors")
    assert Evidence.load(tmp_path / "a.safetensors").difference(a) == (0.0, 0.0)
    x = world.full.clone()
    x[3, 2], x[7] = NAN, world.x[7]
    other = importance_sampling(world.vae, x, **options)
    whole = importance_sampling(world.vae, world.full, **options)
    assert "missing" not in whole.extras
    both = torch.stack([world.x.isnan(), x.isnan(), x.isnan() & False])
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        many = int((both[i] != both[j]).any(1).sum())
        with pytest.raises(ValueError, match=f"do not compare: {many} of 11 data lack other ent"):
            [a, other, whole][i].difference([a, other, whole][j])
    half = importance_sampling(world.vae, x[:4], **options), whole[4:]
    joined = Evidence.cat(half)
    assert joined.missing.count_nonzero() == 1
    assert torch.equal(joined.missing[:4], other.missing[:4])
    with pytest.raises(ValueError, match="11 and 4 data do not compare"):
        a.difference(half[0])


def test_conditionals_on_other_entries_do_not_compare() -> None:
    world = ppca(3)
    given = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]).bool()
    options = {"audit": False, "tolerance": 0.5}
    a, b = (log_conditional(world.vae, world.full, entries, **options) for entries in given)
    with pytest.raises(ValueError, match="3 of 3 data lack other entries"):
        a.difference(b)
    fewer = world.full.clone()
    fewer[1, 4] = NAN  # an entry whose density is asked for
    c = log_conditional(world.vae, fewer, given[0], **options)
    with pytest.raises(ValueError, match="1 of 3 data lack other entries"):
        a.difference(c)


def test_log_conditional_is_exact() -> None:
    world = ppca(23)
    given = torch.rand(23, 5) < 0.5
    found = log_conditional(world.vae, world.full, given, audit=False)
    every = torch.ones(5, dtype=torch.bool)
    exact = [world.log_prob(i, every) - world.log_prob(i, given[i]) for i in range(23)]
    assert 0.5 < z_scores(found.log_prob, torch.stack(exact), found.stderr) < 1.5
    with pytest.raises(ValueError, match=r"given must be bool, of shape \[5\] or \[23, 5\]; got"):
        log_conditional(world.vae, world.full, torch.ones(5))


def test_column_log_prob_is_exact() -> None:
    world = ppca(11)
    world.full[4, 2] += 9.0  # an odd value
    x = world.full.clone()
    x[7, 1] = NAN
    found = column_log_prob(world.vae, x)
    exact = torch.full_like(found, NAN)
    for i in range(11):
        seen = ~x[i].isnan()
        for c in seen.nonzero().flatten():
            others = seen & (torch.arange(5) != c)
            exact[i, c] = world.log_prob(i, seen) - world.log_prob(i, others)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.15, equal_nan=True)
    assert found[4].argmin() == 2


def test_a_datum_of_one_number_has_its_log_prob_as_its_column() -> None:
    class One:
        missing = False

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", Incomplete(dist.Normal(z, 0.5)), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x), dim=-1):
                pyro.sample("z", dist.Normal(0.8 * x.nan_to_num(), 0.5 + 0.5 * x.isnan()))

    x = torch.tensor([0.0, 1.0, -2.0])
    found = column_log_prob(One().model, One().guide, x)
    truth = dist.Normal(0.0, 1.25**0.5).log_prob(x)
    torch.testing.assert_close(found, truth, rtol=0, atol=0.15)
    filled = impute(One().model, One().guide, torch.tensor([0.3, NAN]))
    assert filled.draws.shape == (100, 2)
    assert (filled.mean[0], filled.stderr[0]) == (0.3, 0.0)
    assert abs(filled.mean[1]) < 4 * filled.stderr[1] < 0.2
    assert filled.log_prob[1] == 0


def test_column_log_prob_needs_no_missing_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """With missing=True each value would get draws of its own, of a row without it."""
    monkeypatch.setattr(
        import_module("pyro_vae.estimators.conditional"), "LARGEST_KHAT", -torch.inf
    )
    x = torch.randn(60, 1) + 0.1 * torch.randn(60, 3)
    vae = build(3, 1, likelihood="Normal")
    fit(vae, x, epochs=150, lr=0.02, progress=False)
    x[4, 2] += 6.0
    found = column_log_prob(vae, x[:9])
    assert found.isfinite().all()
    assert found[4].argmin() == 2
    assert found.argmin() == 14


def test_column_log_prob_of_bits_is_the_sum_over_tables_and_never_above_zero() -> None:
    """A steep decoder, so that many columns get draws of their own."""
    vae = build(4, 2, missing=True, decoder={"class_path": "MLP", "init_args": {"hidden": []}})
    for parameter in vae.likelihood.parameters():
        parameter.data = 6 * torch.randn_like(parameter)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    grid = torch.linspace(-6, 6, 151)
    z = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        joint = vae.likelihood(z).log_prob(bits.unsqueeze(1)) + vae.prior().log_prob(z)
    whole = joint.logsumexp(1).view(2, 2, 2, 2)
    exact = torch.stack([whole.log_softmax(c).flatten() for c in range(4)], 1)
    error = column_log_prob(vae, bits) - exact
    assert (error + exact).max() <= 0
    assert error.abs().max() < 0.2
    assert abs(error.mean() / error.std()) * 64**0.5 < 3


def test_a_binary_table_sums_over_all_completions() -> None:
    vae = build(6, 2, missing=True)
    x = torch.tensor([[0.0, 1, NAN, NAN, 1, NAN], [NAN, NAN, NAN, 1, 0, 0]])
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    completions = x.repeat_interleave(8, 0)
    completions[completions.isnan()] = bits.repeat(2, 1).flatten()
    found = log_evidence(vae, torch.cat([x, completions]), audit=False)
    total = found.log_prob[2:].view(2, 8).logsumexp(1)
    error = found.stderr.square().sum().sqrt()
    assert (found.log_prob[:2] - total).abs().max() < 3 * error
    draws = impute(vae, x, num_draws=1009).draws
    share = (draws[:, 1] == completions[8 + 5]).all(-1).double().mean()
    exact = (found.log_prob[2 + 8 + 5] - total[1]).exp()
    assert abs(share - exact) < 4 * (exact * (1 - exact) / 900).sqrt()


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        p = dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), 0.5).to_event(1)
        pyro.sample("x", Incomplete(p), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.nan_to_num().mean(-1), 0.5))


def test_programs_of_ones_own() -> None:
    x = torch.tensor([[1.0, NAN, 2.0], [NAN, NAN, NAN], [0.3, 0.1, 0.2]])
    found = impute(model, guide, x, num_draws=5)
    precision = 1 + 2 / 0.25
    exact = 3.0 / 0.25 / precision
    assert abs(found.mean[0, 1] - exact) < 4 * found.stderr[0, 1]
    assert torch.equal(found.draws[:, 2], x[2].expand(5, 3))
    assert found.draws.shape == (5, 3, 3)


def go_missing(x: Tensor) -> None:
    """One value, missing where it is large: the mask is Bernoulli(Phi(x))."""
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        p = dist.Normal(z.unsqueeze(-1), 0.5).to_event(1)
        pyro.sample("x", Incomplete(p), obs=x)
        whole = torch.where(x.isnan(), pyro.sample("x_missing", p), x)
        large = dist.Normal(0.0, 1.0).cdf(whole)
        pyro.sample("mask", dist.Bernoulli(large).to_event(1), obs=x.isnan().to(x.dtype))


def guess(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x_missing", dist.Normal(z.unsqueeze(-1), 0.5).to_event(1))


def test_not_missing_at_random() -> None:
    """x ~ N(0, 1.25), missing with probability Phi(x): p(missing) = 1/2, E[x | missing] known."""
    x = torch.tensor([[NAN], [0.4]])
    found = impute(go_missing, guess, x, num_draws=7, num_samples=4000)
    assert abs(found.log_prob[0] - torch.tensor(0.5).log()) < 4 * found.evidence.stderr[0]
    exact = 2 * 1.25 / (2 * torch.pi * (1 + 1.25)) ** 0.5
    assert abs(found.mean[0, 0] - exact) < 4 * found.stderr[0, 0]
    value, unit = x[1, 0], dist.Normal(0.0, 1.0)
    seen = dist.Normal(0.0, 1.25**0.5).log_prob(value) + unit.cdf(-value).log()
    assert abs(found.log_prob[1] - seen) < 4 * found.evidence.stderr[1]


def test_a_model_that_does_not_observe_x_is_refused() -> None:
    def other(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.nan_to_num().sum(-1))

    with pytest.raises(ValueError, match="must have a site that observes x itself"):
        impute(other, guide, torch.randn(3, 3))


def test_another_proposal_is_refused() -> None:
    with pytest.raises(ValueError, match="proposal must be 'refined' or 'guide'; got 'prior'"):
        impute(build(3, 2), torch.ones(1, 3), proposal="prior")


@pytest.mark.parametrize("proposal", ["guide", "refined"])
def test_a_row_that_the_model_excludes_is_refused(proposal: str) -> None:
    def near(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0)).tanh().unsqueeze(-1)
            each = dist.Uniform(z - 1, z + 1, validate_args=False).expand([*z.shape[:-1], 2])
            pyro.sample("x", Incomplete(each.to_event(1)), obs=x)

    def q(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))

    x = torch.tensor([[0.0, NAN], [7.0, NAN], [0.1, 0.2]])
    with pytest.raises(ValueError, match=r"as in a row that begins \[7.0, nan\]"):
        impute(near, q, x, num_draws=2, num_samples=53, proposal=proposal)
    if proposal == "refined":
        found = log_evidence(near, q, x[[0, 2, 1]], audit=False)
        assert found.log_prob.isfinite().tolist() == [True, True, False]
        assert found.log_prob[2] == -torch.inf
        assert found.verdict[2] == "doubtful"
