"""Tables: one likelihood for each column."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from families import LIKELIHOODS, Raw, name
from torch import Tensor

from pyro_vae import build, distributions, likelihoods, log_evidence
from pyro_vae.likelihoods import Columns
from pyro_vae.likelihoods.real import LocationScale
from pyro_vae.networks import MLP

pytestmark = pytest.mark.usefixtures("float64")

SCALAR = [cls for cls in LIKELIHOODS if cls is not Columns]
KINDS = {
    "age": "Normal",
    "job": {"class_path": "Categorical", "init_args": {"levels": 5}},
    "pay": "LogNormal",
    "grade": {"class_path": "Ordinal", "init_args": {"levels": 3}},
    "visits": "NegativeBinomial",
    "member": "Bernoulli",
    "height": "Normal",
}


def table(rows: int = 101) -> Tensor:
    """Rows that fit `KINDS`."""
    columns = [
        40 + 13 * torch.randn(rows),
        torch.randint(5, (rows,)),
        torch.exp(7 + 2 * torch.randn(rows)),
        torch.randint(3, (rows,)),
        torch.poisson(torch.full((rows,), 3.0)),
        torch.bernoulli(torch.full((rows,), 0.3)),
        1.7 + 0.1 * torch.randn(rows),
    ]
    return torch.stack([column.to(torch.float64) for column in columns], 1)


def made(columns: object = KINDS, **options: object) -> object:
    """A small VAE of a table."""
    return build(
        (len(columns),),
        2,
        likelihood={"class_path": "Columns", "init_args": {"columns": columns}},
        encoder={"class_path": "MLP", "init_args": {"hidden": [5]}},
        decoder={"class_path": "MLP", "init_args": {"hidden": [5]}},
        **options,
    ).double()


def test_means_beside_a_first_column_of_categories_are_not_rounded() -> None:
    vae = made({"job": KINDS["job"], "member": "Bernoulli", "height": "Normal"})
    mean = vae.sample(7, mean=True)
    assert mean.dtype == torch.float64
    job, *others = mean.T
    assert torch.equal(job, job.round())
    assert all((other != other.round()).all() for other in others)


def test_a_table_of_categories_alone_starts_without_a_warning() -> None:
    vae, x = made([KINDS["job"]] * 2), torch.randint(5, (31, 2)).double()
    vae.initialise(x)
    assert vae.likelihood.inputs(x).sum(1).tolist() == [2.0] * 31


@pytest.mark.parametrize("cls", SCALAR, ids=name)
def test_every_scalar_likelihood_is_a_kind(cls: type) -> None:
    raw = torch.randn(11, Columns.out_shape((2,), [cls.__name__, cls.__name__])[0])
    found = Columns(Raw(), (2,), [cls.__name__, cls.__name__])
    options = {"scale": "predicted", "standardise": True} if issubclass(cls, LocationScale) else {}
    alone = cls(Raw(), (2,), **options)
    count = cls.out_shape((1,), **options)[0]
    if len(found.parts) == 1:
        expected = alone(raw)
    else:  # parameters of its own: the raw ones stand column by column
        expected = alone(raw.unflatten(-1, (2, count)).transpose(-1, -2).flatten(-2))
    x = expected.sample()
    torch.testing.assert_close(found(raw).log_prob(x), expected.log_prob(x))
    torch.testing.assert_close(found(raw).base_dist.log_prob(x), expected.base_dist.log_prob(x))


def test_a_row_is_the_sum_of_its_columns_in_their_order() -> None:
    vae, x = made(), table()
    vae.initialise(x)
    z = torch.randn(3, 101, 2)
    p = vae.likelihood(z)
    assert (p.batch_shape, p.event_shape) == ((3, 101), (7,))
    each = p.base_dist.log_prob(x)
    torch.testing.assert_close(p.log_prob(x), each.sum(-1))
    raw = vae.likelihood.decoder(z)
    at = 0
    for part, group, size in zip(
        vae.likelihood.parts, vae.likelihood.columns, vae.likelihood.sizes
    ):
        alone = part(raw[..., at : at + size]).base_dist.log_prob(x[:, group])
        torch.testing.assert_close(each[..., group], alone)
        at += size
    assert [0, 6] in vae.likelihood.columns  # both Normal columns are computed as one
    draws = p.sample()
    vae.likelihood.check(draws)
    assert p.expand((2, 3, 101)).sample().shape == (2, 3, 101, 7)
    assert p.mean.shape == (3, 101, 7)


def test_columns_computed_as_one_have_the_densities_of_each_alone() -> None:
    wide = {"class_path": "Normal", "init_args": {"resolution": 0.5}}
    fine = {"class_path": "Normal", "init_args": {"resolution": 0.001}}
    coarse = {"class_path": "LogNormal", "init_args": {"resolution": 3.0}}
    small = {"class_path": "LogNormal", "init_args": {"resolution": 0.02}}
    grade = KINDS["grade"]
    kinds = [wide, small, grade, "NegativeBinomial", fine, coarse, grade, "NegativeBinomial"]
    x = table()[:, [0, 2, 3, 4, 6, 2, 3, 4]]
    x[:, 6:] = x[:, 6:].flip(0)
    x[0, 5] = 0
    raw = [torch.randn(101, Columns.out_shape((1,), [kind])[0]) for kind in kinds]
    found, measures = [], []
    for together, count in ((True, 4), (False, 8)):  # as declared, and as runs had it before
        one = Columns(Raw(), (8,), kinds, together)
        one.initialise(x)
        assert len(one.parts) == count
        pieces = [torch.stack([raw[c] for c in group], -1).flatten(1) for group in one.columns]
        p = one(torch.cat(pieces, 1))
        found.append(p.base_dist.log_prob(x))
        measures.append(one.measure)
        one.check(p.sample())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    assert one.float()(torch.cat(pieces, 1).float()).sample().dtype == torch.float32
    assert measures == [[0.5, 0.02, True, True, 0.001, 3.0, True, True]] * 2


def test_a_decoder_that_ignores_z_is_naive_bayes() -> None:
    vae, x = made(), table(1009)
    vae.initialise(x)
    torch.nn.init.zeros_(vae.likelihood.decoder.output.weight)
    bias = vae.likelihood.decoder.output.bias
    assert bias.shape == (2 + 5 + 2 + 1 + 1 + 1 + 2,)
    torch.nn.init.zeros_(bias)
    vae.likelihood.initialise(x)
    found = vae.likelihood(torch.randn(1009, 2)).base_dist.log_prob(x)
    job, grade, member = (x[:, c].long() for c in (1, 3, 5))
    for column, codes, levels in ((1, job, 5), (3, grade, 3), (5, member, 2)):
        share = torch.bincount(codes, minlength=levels) / len(x)
        torch.testing.assert_close(found[:, column], share[codes].log(), atol=3e-3, rtol=3e-3)
    log_pay = x[:, 2].log()
    scale = (0.01 + math.log(2)) * log_pay.std(correction=0)
    truth = torch.distributions.LogNormal(log_pay.mean(), scale).log_prob(x[:, 2])
    torch.testing.assert_close(found[:, 2], truth)


@pytest.mark.parametrize("factor", [1e-3, 1000.0])
def test_units_change_log_p_by_their_logarithm(factor: float) -> None:
    x = table()
    first, second = made(), made()
    second.load_state_dict(first.state_dict())
    other = x.clone()
    other[:, [0, 2, 6]] *= factor
    first.initialise(x)
    second.initialise(other)
    z = torch.randn(101, 2)
    torch.testing.assert_close(
        second.likelihood(z).log_prob(other) + 3 * math.log(factor),
        first.likelihood(z).log_prob(x),
        rtol=1e-5,
        atol=1e-5,
    )
    torch.testing.assert_close(second.likelihood.inputs(other), first.likelihood.inputs(x))


def test_standardising_changes_no_density() -> None:
    x = 40 + 13 * torch.randn(101, 1)
    inside = likelihoods.Normal(MLP(2, 2, ()), (1,), scale="predicted", standardise=True)
    inside.initialise(x)
    raw = torch.randn(101, 2)
    inside.decoder = Raw()
    mean, scale = x.mean(), x.std(correction=0)
    unit = likelihoods.Normal(Raw(), (1,), scale="predicted")(raw).log_prob((x - mean) / scale)
    torch.testing.assert_close(inside(raw).log_prob(x), unit - scale.log(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("resolution", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("cls", [likelihoods.Normal, likelihoods.Laplace, likelihoods.LogNormal])
def test_intervals_of_a_resolution_sum_to_one(cls: type, resolution: float) -> None:
    likelihood = cls(Raw(), (1,), scale="predicted", resolution=resolution)
    p = likelihood(0.5 * torch.randn(5, 2)).base_dist
    positive = cls is likelihoods.LogNormal
    count = int((2000 if positive else 40) / resolution)
    x = torch.arange(0.0 if positive else -count, count + 1).view(-1, 1, 1) * resolution
    torch.testing.assert_close(p.log_prob(x.expand(-1, 5, 1)).logsumexp(0), torch.zeros(5, 1))
    draws = p.sample((20_011,))
    likelihood.check(draws[0])
    for at in (draws[0, :1, 0], draws[7, 1:2, 0]):
        share = (draws[..., 0] - at).abs().lt(resolution / 2).double().mean(0)
        truth = p.log_prob(at.expand(5).unsqueeze(-1)).exp().squeeze(-1)
        assert ((share - truth).abs() < 5 * (truth * (1 - truth) / 20_011).sqrt() + 1e-9).all()


def test_an_interval_is_the_difference_of_the_cumulative_in_every_tail() -> None:
    base = torch.distributions.Normal(0.3, 0.7)
    p = distributions.Interval(
        likelihoods.Normal(Raw(), (1,), 0.7)(torch.tensor([0.3])).base_dist, 0.2
    )
    x = torch.linspace(-3, 3, 41)
    truth = (base.cdf(x + 0.1) - base.cdf(x - 0.1)).log()
    torch.testing.assert_close(p.log_prob(x), truth, rtol=1e-9, atol=1e-9)
    far = p.log_prob(torch.tensor([30.0, -29.4]))  # mirror images about 0.3
    torch.testing.assert_close(far[0], far[1])
    assert far[0] < -800
    with pytest.raises(ValueError, match="needs a Normal, Laplace or LogNormal; got Normal"):
        distributions.Interval(base, 0.1)


@pytest.mark.parametrize("width", [1e-4, 0.1, 1.0, 20.0])
def test_an_interval_of_a_normal_far_in_the_tail(width: float) -> None:
    """Beside log_ndtr, on both sides of where the one form takes over from the other."""
    near = torch.cat([torch.linspace(-10, 24.9, 101), torch.linspace(25.01, 500, 101)])
    x = torch.cat([near, -near - width]) + width / 2
    p = distributions.Interval(pyro.distributions.Normal(0.0, 1.0), width)
    above, below = torch.special.log_ndtr(-near), torch.special.log_ndtr(-near - width)
    truth = (above + torch.log(-torch.expm1(below - above))).repeat(2)
    error = (p.log_prob(x) - truth).abs()
    close = x.abs() - width / 2 < 25
    assert error[close].max() < 1e-9
    assert error[~close].max() < 1e-6
    slope = x[::7].clone().requires_grad_()
    assert torch.autograd.gradcheck(p.log_prob, slope)
    curve = torch.autograd.functional.hessian(lambda x: p.log_prob(x).sum(), slope).diagonal()
    assert (curve < 1e-3).all()  # a mass of a log-concave density is log-concave


@pytest.mark.parametrize("width", [1e9, 1.1e7, 0.9e7, 1e3, 1.0, 1e-6])
@pytest.mark.parametrize("family", ["Normal", "Laplace", "LogNormal"])
def test_a_narrow_interval_has_the_mass_of_the_density(family: str, width: float) -> None:
    """Also where float64 does not tell its two ends apart."""
    x = torch.tensor([9e14, 1.1e15, 4e15], requires_grad=True)
    loc, scale = (34.5, 0.1) if family == "LogNormal" else (1e15, 1e14)
    base = getattr(pyro.distributions, family)(torch.tensor(loc), torch.tensor(scale))
    found = distributions.Interval(base, width).log_prob(x)
    truth = base.log_prob(x) + math.log(width)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-6)
    slopes = (torch.autograd.grad(part.sum(), x)[0] for part in (found, truth))
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=0)


def test_gradients_of_an_interval_are_those_of_a_finite_difference() -> None:
    x = torch.tensor([[0.0], [2.5], [40.0]])
    raw = torch.randn(3, 2, requires_grad=True)

    def total(raw: Tensor) -> Tensor:
        return likelihoods.LogNormal(Raw(), (1,), "predicted", resolution=1.0)(raw).log_prob(x)

    assert torch.autograd.gradcheck(total, raw)


def test_ordinal_by_its_own_formula() -> None:
    likelihood = likelihoods.Ordinal(Raw(), (2,), levels=5)
    with torch.no_grad():
        likelihood.raw_thresholds.add_(torch.randn(2, 4))
    raw = torch.randn(7, 2)
    p = likelihood(raw).base_dist
    edges = torch.sigmoid(likelihood.thresholds - raw.unsqueeze(-1))
    ends = torch.cat([torch.zeros(7, 2, 1), edges, torch.ones(7, 2, 1)], -1)
    torch.testing.assert_close(p.probs, ends.diff(dim=-1))
    assert (likelihood.thresholds.diff(dim=-1) > 0).all()


def test_an_ordinal_starts_at_the_mean_of_its_logits_by_their_precision() -> None:
    shares = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])  # of three levels at two positions
    x = torch.stack([torch.arange(3.0).repeat_interleave((s * 10**4).int()) for s in shares], 1)
    likelihood = likelihoods.Ordinal(Raw(), (2,), levels=3)
    expected = torch.empty(2)
    for i, cumulative in enumerate(shares.cumsum(-1)[:, :2]):
        distance = likelihood.thresholds[i] - torch.logit(cumulative)
        precision = cumulative * (1 - cumulative)  # of the logit of a share, by the delta method
        expected[i] = (precision * distance).sum() / precision.sum()
    with torch.no_grad():
        found = likelihood.raw_start(x)
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-3)


def test_an_encoder_sees_one_hot_scaled_numbers_and_the_mask() -> None:
    x = table()
    vae = made(missing=True)
    vae.initialise(x)
    x[0, 0] = x[1, 1] = math.nan
    seen = vae.likelihood.inputs(x)
    assert seen.shape == (101, *Columns.input_shape((7,), True, KINDS)) == (101, 6 + 5 + 7)
    numbers, job, mask = seen.split([6, 5, 7], -1)
    assert numbers.abs().max() < 5
    assert (numbers.mean(0).abs() < 0.1).all()
    assert torch.equal(job.sum(-1), (~x[:, 1].isnan()).double())
    assert torch.equal(job[2:].argmax(-1), x[2:, 1].long())
    assert torch.equal(mask, (~x.isnan()).double())
    p = vae.likelihood.observed(vae.likelihood(torch.randn(101, 2)))
    whole = p.base_dist.log_prob(x.nan_to_num(1.0))
    torch.testing.assert_close(p.log_prob(x), torch.where(x.isnan(), 0.0, whole).sum(-1))
    p.log_prob(x).sum().backward()
    assert all(q.grad is None or q.grad.isfinite().all() for q in vae.parameters())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["Normal"], "one likelihood for each of the 2 columns; got 1"),
        (["Normal", "Norml"], "column '1': likelihood 'Norml' is unknown: choose one of"),
        (["Normal", "Columns"], "column '1': likelihood 'Columns' is unknown"),
        ({"a": "Normal", "b": {"class_path": "Poisson", "init_args": {"scale": 1}}},
         "column 'b': Poisson has no option 'scale'"),
        ({"a": "Normal", "b": {"kind": "Poisson"}}, "column 'b' must be a name"),
        ({"a": {"class_path": "Normal", "init_args": {"resolution": -1}}, "b": "Normal"},
         "column 'a': resolution must be positive; got -1"),
        ({"a": {"class_path": "Normal", "init_args": {"resolution": [1.0, 2.0]}}, "b": "Normal"},
         "column 'a': resolution must be a number, or one for each of the 1 channels; got 2"),
    ],
)  # fmt: skip
def test_wrong_columns_are_refused(columns: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Columns(Raw(), (2,), columns)
    with pytest.raises(ValueError, match=message):
        build((2,), 2, likelihood={"class_path": "Columns", "init_args": {"columns": columns}})


def test_a_value_outside_its_support_names_its_column() -> None:
    vae, x = made(), table()
    x[3, 1] = 5
    refusal = r"column 'job', Categorical, needs data in \{0, ..., 4\}; got values in \[0.0, 5.0\]"
    with pytest.raises(ValueError, match=refusal):
        vae.likelihood.check(x)
    vae.likelihood.missing, x[0, 1] = True, torch.nan
    with pytest.raises(ValueError, match=refusal):
        vae.likelihood.check(x)
    x[:, 1] = torch.nan
    vae.likelihood.check(x)
    vae.likelihood.missing = False
    with pytest.raises(ValueError, match=rf"column 'job' lacks values in {len(x)} row"):
        vae.likelihood.check(x)
    with pytest.raises(ValueError, match="the table has 7 columns; got 3"):
        vae.likelihood.check(x[:, :3])
    with pytest.raises(ValueError, match="Columns is for tables"):
        Columns(Raw(), (2, 3))
    with pytest.raises(ValueError, match=r"its out_shape must be \(4,\)"):
        Columns(MLP(3, 5), (2,))(torch.randn(7, 3))


def test_repeated_numbers_under_a_density_are_said() -> None:
    x = table()
    x[:50, 0] = 0
    with pytest.warns(UserWarning, match="column 'age': 50% of rows hold 0, .* a resolution"):
        made().initialise(x)
    made({**KINDS, "age": {"class_path": "Normal", "init_args": {"resolution": 1}}}).initialise(x)


def test_a_declared_table_comes_back_from_its_declaration() -> None:
    vae = made({**KINDS, "education.num": "StudentT"})
    again = build(**vae.declaration)
    assert again.likelihood.names == [*KINDS, "education.num"]
    again.load_state_dict(vae.state_dict())


def test_two_classes_whose_decoder_ignores_z_are_an_exact_mixture() -> None:
    x = table(7)
    x[2, 3] = math.nan
    vae = made(classes=2, missing=True)
    vae.initialise(table())
    with torch.no_grad():
        vae.likelihood.decoder.hidden[0].weight[:, :2] = 0.0
        for weights in vae.class_weights.parameters():
            weights.copy_(torch.randn_like(weights))
    shares = vae.class_weights().log_prob(torch.eye(2))
    each = [
        vae.likelihood.observed(vae.likelihood(torch.zeros(7, 2), hot.expand(7, 2))).log_prob(x)
        for hot in torch.eye(2)
    ]
    truth = (torch.stack(each) + shares.unsqueeze(-1)).logsumexp(0)
    assert (each[0] - each[1]).abs().min() > 1e-3
    found = log_evidence(vae, x, tolerance=0.01)
    assert ((found.log_prob - truth).abs() < 5 * found.stderr + 1e-6).all()
    assert found.stderr.max() < 0.01
