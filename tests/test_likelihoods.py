"""Laws of every likelihood."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from families import LIKELIHOODS, Raw, draw, make, name
from pyro.distributions import Distribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vae import likelihoods
from pyro_vae.data.transforms import Dequantise
from pyro_vae.likelihoods import Likelihood
from pyro_vae.likelihoods.real import LocationScale
from pyro_vae.networks import MLP, ConvTranspose

pytestmark = pytest.mark.usefixtures("float64")

SCALAR = [cls for cls in LIKELIHOODS if cls is not likelihoods.Columns]
each = pytest.mark.parametrize("cls", SCALAR, ids=name)
location_scale = pytest.mark.parametrize(
    "cls",
    [c for c in LIKELIHOODS if issubclass(c, LocationScale) and c is not likelihoods.LogNormal],
    ids=name,
)
DRAWS = 200_000


def of_raw(cls: type, rows: int = 11, spread: float = 0.5, **options: object) -> Distribution:
    """p(x) of one dimension at `rows` random raw parameters."""
    likelihood = cls(Raw(), (1,), **options)
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        count = cls.num_params(**options)
        return likelihood(spread * torch.randn(rows, count)).base_dist


def points(p: Distribution) -> tuple[Tensor, Tensor]:
    """Values over the support of `p` [R, 1] and their weights in a sum or integral, [M, R, 1]."""
    low = getattr(p.support, "lower_bound", -math.inf)
    high = getattr(p.support, "upper_bound", math.inf)
    if p.support.is_discrete:
        count = 2 if p.support is constraints.boolean else min(high, 20_000) + 1
        x = torch.arange(float(count)).view(-1, 1, 1)
        return x, torch.ones_like(x)
    if low == 0.0 and high == math.inf:
        t = torch.linspace(-40, 40, 20_001).view(-1, 1, 1)
        return t.exp(), t.exp() * 80 / 20_000
    if low == -math.inf:  # a kink, if any, is at the mean
        t = torch.linspace(-18, 18, 20_001).view(-1, 1, 1)
        return p.mean + t.sinh(), t.cosh() * 36 / 20_000
    t = torch.linspace(-34, 34, 20_001).view(-1, 1, 1)
    return torch.sigmoid(t), torch.sigmoid(t) * torch.sigmoid(-t) * 68 / 20_000


def moments(p: Distribution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Total mass, mean, variance and fourth central moment, by `points`."""
    x, weight = points(p)
    mass = p.log_prob(x.expand(-1, *p.batch_shape)).exp() * weight
    mean = (mass * x).sum(0)
    return mass.sum(0), mean, (mass * (x - mean) ** 2).sum(0), (mass * (x - mean) ** 4).sum(0)


@each
def test_density_normalises_and_mean_is_that_of_the_density(cls: type) -> None:
    p = of_raw(cls)
    total, mean, _, _ = moments(p)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(p.mean, mean, rtol=1e-6, atol=1e-6)


@each
def test_draws_have_the_mean_and_variance_of_the_density(cls: type) -> None:
    p = of_raw(cls)
    _, mean, variance, fourth = moments(p)
    x = p.sample((DRAWS,))
    assert (abs(x.mean(0) - mean) < 5 * (variance / DRAWS).sqrt()).all()
    stderr = ((fourth - variance**2) / DRAWS).sqrt()
    assert (abs(x.var(0) - variance) < 5 * stderr + 1e-12).all()


@each
def test_draws_fall_below_a_value_as_often_as_the_density_says(cls: type) -> None:
    p = of_raw(cls)
    x = p.sample((DRAWS,))
    value, weight = points(p)
    mass = p.log_prob(value.expand(-1, *p.batch_shape)).exp() * weight
    for quantile in (0.05, 0.5, 0.95):
        edge = x[:1009].quantile(quantile, 0)
        edge = edge.floor() + 0.5 if p.support.is_discrete else edge
        truth = (mass * (value < edge)).sum(0)
        got = (x[1009:] < edge).double().mean(0)
        stderr = (truth * (1 - truth) / (DRAWS - 1009)).clamp(min=0).sqrt()
        grid = 1e-6 if p.support.is_discrete else 3e-3  # of the quadrature's last interval
        assert (abs(got - truth) < 5 * stderr + grid).all()


@each
@pytest.mark.parametrize("lead", [(), (5,), (3, 5)])
@pytest.mark.parametrize("data_shape", [(7,), (2, 3, 5)])
def test_shapes(cls: type, lead: tuple[int, ...], data_shape: tuple[int, ...]) -> None:
    likelihood = make(likelihood=cls, data_shape=data_shape).likelihood
    z = torch.randn(*lead, 2)
    p = likelihood(z)
    assert (p.batch_shape, p.event_shape) == (lead, data_shape)
    x = p.sample()
    assert x.shape == (*lead, *data_shape)
    assert p.mean.shape == (*lead, *data_shape)
    assert p.log_prob(x).shape == lead
    expanded = p.expand((11, *lead))
    assert expanded.sample().shape == (11, *lead, *data_shape)
    torch.testing.assert_close(expanded.log_prob(x), p.log_prob(x).expand(11, *lead))


@each
def test_the_log_density_is_summed_over_the_datum(cls: type) -> None:
    likelihood = make(likelihood=cls, data_shape=(2, 3, 5)).likelihood
    p = likelihood(torch.randn(5, 2))
    x = p.sample()
    each_log_prob = p.base_dist.log_prob(x)
    assert each_log_prob.shape == (5, 2, 3, 5)
    torch.testing.assert_close(p.log_prob(x), each_log_prob.sum((1, 2, 3)))


@each
def test_rows_and_positions_are_independent(cls: type) -> None:
    likelihood = cls(Raw(), (2, 3))
    raw = torch.randn(5, 2 * cls.num_params(), 3)
    likelihood.decoder.forward = lambda z, y: raw
    p = likelihood(torch.zeros(5, 4))
    x = p.sample()
    before = p.base_dist.log_prob(x)
    raw = raw.clone()
    raw[1, 1::2, 2] *= 2  # every parameter of channel 1, position 2, row 1
    after = likelihood(torch.zeros(5, 4)).base_dist.log_prob(x)
    changed = before != after
    assert changed[1, 1, 2]
    assert changed.sum() == 1


@each
def test_every_parameter_gets_a_gradient(cls: type) -> None:
    vae = make(likelihood=cls)
    x = draw(vae, 13)
    vae.likelihood(torch.randn(13, 2)).log_prob(x).sum().backward()
    for key, parameter in vae.likelihood.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@each
def test_state_dict_gives_the_same_density(cls: type) -> None:
    first, second = make(likelihood=cls), make(likelihood=cls)
    x, z = draw(first, 5), torch.randn(5, 2)
    first.initialise(x)
    second.likelihood.load_state_dict(first.likelihood.state_dict())
    assert torch.equal(first.likelihood(z).log_prob(x), second.likelihood(z).log_prob(x))


@each
def test_the_density_depends_on_the_condition(cls: type) -> None:
    likelihood = make(likelihood=cls, condition_dim=3).likelihood
    z, y = torch.randn(5, 2), torch.randn(5, 3)
    x = likelihood(z, y).sample()
    assert (likelihood(z, y).log_prob(x) != likelihood(z, y + 1).log_prob(x)).all()
    with pytest.raises(ValueError, match="got none"):
        likelihood(z)


@each
@pytest.mark.parametrize("convolutions", [False, True])
def test_initialise_starts_the_output_at_the_average_datum(cls: type, convolutions: bool) -> None:
    shape, count = (2, 3, 5), cls.num_params()
    if convolutions:
        decoder = ConvTranspose(2, (2 * count, 3, 5), channels=(3,), hidden=())
        last = decoder.convolutions[-1]
    else:
        decoder = MLP(2, (2 * count, 3, 5), (7,))
        last = decoder.output
    torch.nn.init.zeros_(last.weight)
    likelihood = cls(decoder, shape)
    varied = cls(Raw(), shape)(0.3 * torch.randn(2 * count, 3, 5))  # from position to position
    x = varied.sample((503,))
    likelihood.initialise(x)
    truth = x.mean((0, 2, 3), keepdim=True) if convolutions else x.mean(0, keepdim=True)
    got = likelihood(torch.zeros(1, 2)).mean.detach()
    assert ((got - truth).abs() < 0.2 * x.std()).all()  # some means are not the raw ones
    pair = torch.stack([got.flatten(), truth.expand_as(got).flatten()])
    assert torch.corrcoef(pair).min() > 0.99


@each
def test_initialise_leaves_a_decoder_without_output_bias(cls: type) -> None:
    likelihood = cls(Raw(), (1,))
    likelihood.initialise(of_raw(cls, 7).sample())


OUTSIDE = {
    "Bernoulli": [0.5, 2.0, -1.0],
    "ContinuousBernoulli": [-0.01, 1.01, 255.0],
    "Beta": [0.0, 1.0, 1.5],
    "DiscretizedLogistic": [-1.0, 256.0, 0.5],
    "MixtureOfLogistics": [-1.0, 256.0, 0.5],
    "Categorical": [-1.0, 256.0, 0.5],
    "LogNormal": [-1.0, 0.0, math.inf],
    "Ordinal": [-1.0, 256.0, 0.5],
    "Poisson": [-1.0, 0.5, math.inf],
    "NegativeBinomial": [-1.0, 0.5, math.inf],
}


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_outside_the_support_are_refused(cls: type, dtype: torch.dtype) -> None:
    likelihood = cls(Raw(), (3,))
    inside = cls(Raw(), (1,))(torch.zeros(5, 3, cls.num_params())).sample().squeeze(-1).to(dtype)
    likelihood.check(inside)
    for value in [*OUTSIDE.get(cls.__name__, [math.inf, -math.inf]), math.nan]:
        x = inside.clone()
        x[3, 1] = value
        refusal = f"likelihood {cls.__name__} needs data in|data must be finite; 1 row"
        with pytest.raises(ValueError, match=refusal):
            likelihood.check(x)
    with pytest.raises(ValueError, match=r"built for data of shape \(3,\); got \(2,\)"):
        likelihood.check(inside[:, :2])


@each
def test_a_decoder_of_the_wrong_size_is_refused(cls: type) -> None:
    for out_shape in ((cls.num_params() * 2 + 1, 5), (cls.num_params() * 2, 3)):
        with pytest.raises(ValueError, match="does not fit data of shape"):
            cls(MLP(3, out_shape), (2, 5))(torch.randn(7, 3))
    with pytest.raises(ValueError, match="does not fit data of shape"):
        cls(MLP(3, ((cls.num_params() + 1) * 2, 5)), (2, 5))(torch.randn(7, 3))


@location_scale
def test_a_decoder_without_the_predicted_scale_is_refused(cls: type) -> None:
    with pytest.raises(ValueError, match="does not fit data of shape"):
        cls(MLP(3, 5), (5,), scale="predicted")(torch.randn(7, 3))


@location_scale
@pytest.mark.parametrize("scale", [0.3, 2, "learned", "per_dimension", "predicted"])
def test_scale_options(cls: type, scale: str | float) -> None:
    likelihood = cls(Raw(), (3,), scale=scale, min_scale=0.05)
    count = cls.num_params(scale=scale)
    raw = torch.randn(5, 3 * count)
    p = likelihood(raw).base_dist
    truth = 0.05 + math.log(2) if isinstance(scale, str) else float(scale)
    if scale == "predicted":
        assert count == 2
        truth = 0.05 + raw[:, 3:].exp().log1p()
    torch.testing.assert_close(p.scale, torch.as_tensor(truth).expand(5, 3))
    torch.testing.assert_close(p.mean, raw[:, :3])
    learned = {"learned": (), "per_dimension": (3,)}.get(scale)
    shapes = [tuple(v.shape) for k, v in likelihood.named_parameters() if k == "raw_scale"]
    assert shapes == ([] if learned is None else [learned])


@location_scale
@pytest.mark.parametrize(
    ("mean", "link"), [("identity", lambda x: x), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)]
)
def test_mean_options(cls: type, mean: str, link: object) -> None:
    raw = torch.randn(5, 3)
    torch.testing.assert_close(cls(Raw(), (3,), mean=mean)(raw).mean, link(raw))
    net = MLP(2, 3, ())
    torch.nn.init.zeros_(net.output.weight)
    likelihood = cls(net, (3,), mean=mean)
    likelihood.initialise(link(raw))
    torch.testing.assert_close(likelihood(torch.zeros(2)).mean, link(raw).mean(0))


@pytest.mark.parametrize("levels", [2, 3, 17])
@pytest.mark.parametrize("cls", [likelihoods.Categorical, likelihoods.DiscretizedLogistic])
def test_levels_option(cls: type, levels: int) -> None:
    options = {"levels": levels} if cls is likelihoods.Categorical else {}
    likelihood = cls(Raw(), (1,), levels=levels)
    p = likelihood(torch.randn(5, cls.num_params(**options)))
    k = torch.arange(levels + 0.0).view(-1, 1, 1).expand(-1, 5, 1)
    torch.testing.assert_close(p.log_prob(k).logsumexp(0), torch.zeros(5))
    with pytest.raises(ValueError, match=rf"\{{0, ..., {levels - 1}\}}"):
        likelihood.check(torch.full((5, 1), levels + 0.0))


def test_a_mixture_of_one_logistic_is_the_logistic() -> None:
    raw, k = torch.randn(11, 3), torch.arange(11.0).unsqueeze(1) * 25
    p = likelihoods.MixtureOfLogistics(Raw(), (1,), components=1)(raw)
    q = likelihoods.DiscretizedLogistic(Raw(), (1,))(raw[:, [0, 2]])
    torch.testing.assert_close(p.log_prob(k), q.log_prob(k))


def test_degrees_of_freedom_stay_above_two() -> None:
    likelihood = likelihoods.StudentT(Raw(), (3,), scale=0.7)
    for raw, df in [(-60.0, 2.01), (0.0, 2.01 + math.log(2))]:
        torch.nn.init.constant_(likelihood.raw_df, raw)
        p = likelihood(torch.zeros(5, 3)).base_dist
        torch.testing.assert_close(p.df, torch.full((5, 3), df))
        torch.testing.assert_close(p.variance, torch.full((5, 3), 0.49 * df / (df - 2)))


def test_negative_binomial_by_its_own_formula() -> None:
    raw = torch.randn(5, 2)
    p = likelihoods.NegativeBinomial(Raw(), (1,), min_dispersion=0.1, dispersion="cell")(raw)
    m, r = raw[:, 0].exp(), 0.1 + raw[:, 1].exp().log1p()
    k = torch.arange(5.0)
    truth = torch.lgamma(k + r) - torch.lgamma(k + 1) - torch.lgamma(r)
    truth = truth + r * (r / (r + m)).log() + k * (m / (r + m)).log()
    torch.testing.assert_close(p.log_prob(k.unsqueeze(-1)), truth)
    torch.testing.assert_close(p.base_dist.variance[:, 0], m + m**2 / r)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: likelihoods.Normal(Raw(), (3,), scale=0.0), "scale must be positive; got 0.0"),
        (lambda: likelihoods.Normal(Raw(), (3,), scale="nope"), "got 'nope'"),
        (lambda: likelihoods.Laplace(Raw(), (3,), mean="nope"), "mean must be 'identity'"),
        (lambda: likelihoods.Categorical(Raw(), (3,), levels=1), "levels must be at least 2"),
        (
            lambda: likelihoods.DiscretizedLogistic(Raw(), (3,), levels=1),
            "levels must be at least 2",
        ),
    ],
)
def test_wrong_options_are_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@each
@pytest.mark.parametrize("spread", [30.0, -30.0])
def test_extreme_raw_parameters_give_finite_densities_of_every_datum(
    cls: type, spread: float
) -> None:
    likelihood = cls(Raw(), (1,)).float()
    raw = torch.full((3, cls.num_params()), spread, dtype=torch.float32, requires_grad=True)
    x = cls(Raw(), (1,)).float()(torch.zeros(3, cls.num_params(), dtype=torch.float32)).sample()
    log_prob = likelihood(raw).log_prob(x)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    truth = cls(Raw(), (1,))(raw.detach().double()).log_prob(x.double())
    torch.testing.assert_close(log_prob.detach().double(), truth, rtol=1e-4, atol=1e-4)
    assert raw.grad.isfinite().all()


def test_the_base_class_is_told_from_its_final_classes() -> None:
    assert Likelihood not in LIKELIHOODS
    assert LocationScale not in LIKELIHOODS


@pytest.mark.filterwarnings("ignore:values deviate by up to")
@pytest.mark.parametrize("cls", [likelihoods.Normal, likelihoods.Laplace, likelihoods.StudentT])
@pytest.mark.parametrize("scale", ["learned", "per_dimension"])
def test_a_learned_scale_starts_at_the_deviation_of_the_data(cls: type, scale: str) -> None:
    x = torch.randn(503, 5) * torch.tensor([0.1, 1.0, 2.0, 7.0, 30.0]) + 11
    likelihood = cls(MLP(2, 5), (5,), scale=scale)
    likelihood.initialise(x)
    found = likelihood(torch.zeros(1, 2)).base_dist.scale[0]
    deviation = x.var(0, correction=0)
    expected = deviation.sqrt() if scale == "per_dimension" else deviation.mean().sqrt().expand(5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_beta_takes_dequantised_levels_at_both_ends() -> None:
    ends = Dequantise(256)(torch.tensor([[0.0, 255.0]]), torch.tensor([[0.0, 1 - 2.0**-24]]))
    assert 0 < ends.min() < 1e-6
    likelihood = likelihoods.Beta(MLP(2, 4), (2,))
    likelihood.check(ends)
    assert likelihood(torch.zeros(1, 2)).log_prob(ends).isfinite()


def test_logistics_are_in_units_of_the_highest_level() -> None:
    likelihood = likelihoods.DiscretizedLogistic(Raw(), (1,), levels=7, min_scale=0.25)
    raw = torch.tensor([[0.3, -0.5], [-0.2, 2.0]])
    p = likelihood(raw).base_dist
    torch.testing.assert_close(p.loc[:, 0], 6 * (0.5 + raw[:, 0]))
    torch.testing.assert_close(p.scale[:, 0], 6 * (0.25 + 0.1 * raw[:, 1].exp().log1p()))
    x = torch.randint(0, 7, (11, 1)).double()
    torch.testing.assert_close(6 * (0.5 + likelihood.raw_start(x)), x.mean(0))


@pytest.mark.parametrize("dispersion", ["gene", "shared"])
def test_dispersion_starts_at_that_of_the_data(dispersion: str) -> None:
    r = torch.tensor([2.0, 5.0, 0.7] if dispersion == "gene" else [2.0] * 3)
    mean = torch.tensor([3.0, 10.0, 4.0])
    x = dist.NegativeBinomial(r, logits=mean.log() - r.log()).sample((100_003,))
    likelihood = likelihoods.NegativeBinomial(Raw(), (3,), dispersion=dispersion)
    likelihood.initialise(x)
    p = likelihood(torch.zeros(5, 3)).base_dist
    torch.testing.assert_close(p.total_count, r.expand(5, 3), rtol=0.05, atol=0)


def test_draws_of_a_beta_are_data_that_it_takes() -> None:
    likelihood = likelihoods.Beta(Raw(), (1,))
    p = likelihood(torch.tensor([[-5.0, -5.0], [5.0, -5.0]]))  # nearly all mass at one end
    x = p.sample(torch.Size((1009,)))
    likelihood.check(x.flatten(0, 1))
    assert x.amin() < 1e-9
    assert x.amax() > 1 - 1e-7
    assert p.log_prob(x).isfinite().all()
