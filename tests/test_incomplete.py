"""Missing entries: NaN in the data, the density of the rest, and what an encoder sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import LIKELIHOODS, OBJECTIVES, PRIORS, draw, make, name
from torch import Tensor

from pyro_vae import build
from pyro_vae.arguments import fill_missing
from pyro_vae.densities import densities
from pyro_vae.distributions import Incomplete
from pyro_vae.estimators import importance_sampling, log_evidence
from pyro_vae.likelihoods import Normal
from pyro_vae.training import fit

pytestmark = pytest.mark.usefixtures("float64")

each = pytest.mark.parametrize("cls", LIKELIHOODS, ids=name)
NAN = float("nan")


def holes(x: Tensor, share: float = 0.4) -> Tensor:
    """`x` with entries missing at random, in the second row all of them."""
    x = x.masked_fill(torch.rand(x.shape) < share, NAN)
    x[1] = NAN
    return x


@each
def test_density_is_that_of_what_is_observed(cls: type) -> None:
    vae = make(likelihood=cls)
    x = draw(vae, 11)
    p = vae.likelihood(torch.randn(3, 11, 2))
    hollow = holes(x)
    exact = torch.zeros(3, 11)
    for i, d in product(range(11), range(7)):
        if not hollow[i, d].isnan():
            exact[:, i] += p.base_dist.log_prob(x)[:, i, d]
    found = Incomplete(p)
    torch.testing.assert_close(found.log_prob(hollow), exact)
    assert torch.equal(found.log_prob(hollow)[:, 1], torch.zeros(3))
    assert torch.equal(found.log_prob(x), p.log_prob(x))  # to the bit
    assert torch.equal(found.expand((5, 3, 11)).log_prob(x), p.expand((5, 3, 11)).log_prob(x))
    assert torch.equal(found.mean, p.mean)
    assert found.sample((2,)).shape == (2, 3, 11, 7)


@each
def test_gradients_are_those_of_a_model_of_the_observed_columns(cls: type) -> None:
    vae = make(likelihood=cls)
    x = draw(vae, 5)
    z = torch.randn(5, 2)
    seen = [0, 2, 3, 6]
    hollow = x.clone()
    hollow[:, [1, 4, 5]] = NAN
    parameters = list(vae.likelihood.parameters())
    given = [z.requires_grad_(), *parameters]
    log_prob = Incomplete(vae.likelihood(z)).log_prob(hollow).sum()
    found = torch.autograd.grad(log_prob, given)
    cut = vae.likelihood(z).base_dist.log_prob(x)[:, seen].sum()
    for slope, exact in zip(found, torch.autograd.grad(cut, given)):
        torch.testing.assert_close(slope, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "base",
    [dist.Uniform(2.0, 5.0), dist.Pareto(3.0, 1.0), dist.Gamma(2.0, 2.0), dist.Geometric(0.2)],
    ids=lambda base: type(base).__name__,
)
def test_supports_without_zero(base: dist.TorchDistribution) -> None:
    x = base.sample((7,))
    hollow = x.clone()
    hollow[[0, 3]] = NAN
    found = Incomplete(base.expand((7,)).to_event(1)).log_prob(hollow)
    torch.testing.assert_close(found, base.log_prob(x)[[1, 2, 4, 5, 6]].sum())


def test_masses_are_sums_over_all_completions() -> None:
    p = dist.Bernoulli(torch.rand(6)).to_event(1)
    full = torch.tensor(list(product((0.0, 1.0), repeat=6)))
    x = full[41]
    for observed in full.bool():
        completions = full[((full == x) | ~observed).all(1)]
        found = Incomplete(p).log_prob(x.masked_fill(~observed, NAN))
        torch.testing.assert_close(found, p.log_prob(completions).logsumexp(0))


def test_more_dimensions_of_a_datum_keep_what_is_missing() -> None:
    p = Incomplete(dist.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1))
    x = torch.randn(2, 3, 4)
    x[0, 1], x[1, :, 2] = NAN, NAN
    torch.testing.assert_close(p.to_event(1).log_prob(x), p.log_prob(x).sum(-1))
    torch.testing.assert_close(p.to_event().log_prob(x), p.log_prob(x).sum())
    assert p.to_event(1).event_shape == (3, 4)


def test_entries_that_depend_on_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="Incomplete needs .* got MultivariateNormal: give the"):
        Incomplete(dist.MultivariateNormal(torch.zeros(3), torch.eye(3)))


def test_completed_keeps_the_marginals_of_what_is_observed() -> None:
    x = torch.tensor([[1.0, NAN], [2.0, 5.0], [NAN, NAN], [3.0, 7.0], [NAN, NAN], [NAN, NAN]])
    expected = [[1.0, 5.0], [2.0, 5.0], [3.0, 5.0], [3.0, 7.0], [2.0, 5.0], [3.0, 7.0]]
    assert torch.equal(fill_missing(x), torch.tensor(expected))
    assert torch.equal(fill_missing(x[1:2]), x[1:2])
    with pytest.raises(ValueError, match=r"1 never are, first \[1\] \(from 0\): remove them"):
        fill_missing(x[[0, 2]])


def test_the_encoder_sees_zeros_and_the_mask() -> None:
    x = torch.tensor([[[1.0, NAN], [NAN, 4.0]]])  # one datum [2, 2]
    vae = make(likelihood=Normal, data_shape=(2, 2), missing=True)
    seen = vae.likelihood.inputs(x)
    assert seen.tolist() == [[[1.0, 0.0], [0.0, 4.0], [1.0, 0.0], [0.0, 1.0]]]
    assert vae.posterior.encoder.in_shape == (4, 2)
    assert torch.equal(make(likelihood=Normal).likelihood.inputs(x).isnan(), x.isnan())


@pytest.mark.parametrize("prior", PRIORS, ids=name)
def test_build_and_every_prior(prior: type) -> None:
    vae = build((2, 3), 2, prior.__name__, "Normal", missing=True)
    assert vae.declaration["missing"]
    x = holes(torch.randn(13, 2, 3))
    vae.initialise(x)
    again = build(**vae.declaration)
    again.load_state_dict(vae.state_dict())
    assert torch.equal(again.encode(x).mean, vae.encode(x).mean)
    assert densities(vae, x).log_likelihood.isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_every_objective_takes_incomplete_rows(objective: type) -> None:
    vae = build(5, 2, likelihood="Normal", missing=True)
    before = {key: p.detach().clone() for key, p in vae.named_parameters()}
    fit(vae, holes(torch.randn(31, 5)), objective(), epochs=1, batch_size=31, progress=False)
    still = [key for key, p in vae.named_parameters() if torch.equal(p, before[key])]
    assert not still
    assert all(p.isfinite().all() for p in vae.parameters())


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    x = holes(torch.randn(14, 5))
    weights = []
    for fast in (False, True):
        torch.manual_seed(0)
        vae = build(5, 2, likelihood="Normal", missing=True)
        fit(vae, x, epochs=2, batch_size=7, compile=fast, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    torch.testing.assert_close(*weights)


HINT = r"2 row\(s\) hold NaN .* first \[1, 3\] .* give the VAE missing=True if NaN stands for"


@pytest.mark.parametrize("use", [fit, log_evidence, densities], ids=lambda use: use.__name__)
def test_nan_needs_to_be_declared(use: Callable[..., object]) -> None:
    x = torch.randn(7, 5)
    x[[1, 3], 2] = NAN
    with pytest.raises(ValueError, match=HINT) as error:
        use(make(likelihood=Normal, data_shape=(5,)), x)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("use", [fit, log_evidence, densities], ids=lambda use: use.__name__)
def test_infinite_values_are_refused(use: Callable[..., object]) -> None:
    x = torch.randn(7, 5)
    x[[1, 3], 2] = NAN
    x[3, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"finite; 1 row\(s\) hold infinite values, first \[3\]"):
        use(make(likelihood=Normal, data_shape=(5,), missing=True), x)


def test_the_support_holds_for_what_is_observed() -> None:
    vae = make(missing=True)
    vae.likelihood.check(torch.tensor([[0.0, 1.0, NAN, 1.0, 0.0, NAN, 0.0]]))
    with pytest.raises(ValueError, match=r"needs data in {0, 1}; got values in \[0, 2\]"):
        vae.likelihood.check(torch.tensor([[0.0, 1.0, NAN, 1.0, 0.0, NAN, 2.0]]))


def test_a_known_label_is_observed_where_no_entry_is() -> None:
    """log p(x) was 0 "exactly" for data whose class happened to be drawn as their label."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3)))
            entries = dist.Normal(c.unsqueeze(-1), x.new_ones(2)).to_event(1)
            pyro.sample("x", Incomplete(entries), obs=x)
            pyro.sample("label", dist.Delta(c), obs=y[:, 0])

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))

    x, y = torch.full((23, 2), NAN), torch.ones(23, 1)
    found = importance_sampling(model, guide, x, y, num_samples=5000)
    assert abs(found.log_prob - math.log(0.3)).max() < 5 * found.stderr.max()
    assert {*found.method} == {"importance sampling, guide"}
