"""The parts of the KL, against quadrature over aggregate posteriors that are known mixtures."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from pyro_vae.distributions import FullNormal, MixtureOfDiagonalNormals
from pyro_vae.metrics import decomposition, elbo_decomposition

pytestmark = pytest.mark.usefixtures("float64")

GRID = torch.linspace(-9, 9, 451, dtype=torch.float64)
PARTS = ("kl", "mutual_information", "aggregate_kl", "total_correlation", "dimension_wise_kl")


def unit(size: int) -> Distribution:
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def diagonal() -> Distribution:
    loc = torch.tensor([[-1.5, -1.0], [0.3, 0.4], [1.2, 2.0], [1.0, 0.5], [-0.2, -2.0]])
    scale = torch.tensor([[0.4, 0.7], [0.9, 0.3], [0.5, 0.5], [0.6, 0.4], [0.3, 0.8]])
    return dist.Normal(loc, scale).to_event(1)


def full() -> Distribution:
    q = diagonal()
    tril = torch.diag_embed(q.base_dist.scale)
    tril[:, 1, 0] = torch.tensor([0.5, -0.4, 0.3, 0.6, -0.7])
    return FullNormal(q.mean, scale_tril=tril)


def mixture() -> Distribution:
    loc, scale = torch.tensor([[-1.0, -1.0], [1.0, 1.5]]), torch.tensor([[1.0, 0.8], [0.9, 1.1]])
    return MixtureOfDiagonalNormals(torch.tensor([0.3, -0.2]), loc, scale)


def quadrature(q: Distribution, p: Distribution) -> dict[str, float]:
    """The parts by sums over a grid; the mixtures' tails end inside it."""
    cell = (GRID[1] - GRID[0]).item()
    z = torch.cartesian_prod(GRID, GRID)
    pairs = q.log_prob(z[:, None]).exp()  # [grid, N]
    joint = pairs.mean(1)
    table = joint.reshape(len(GRID), -1)
    assert abs(table.sum() * cell**2 - 1) < 1e-9
    each = [table.sum(1) * cell, table.sum(0) * cell]
    product = torch.cartesian_prod(*each).prod(-1)

    def mean(weight: Tensor, of: Tensor) -> float:
        return (torch.where(weight > 1e-300, weight * of, 0.0).sum() * cell**2).item()

    given = sum(mean(pairs[:, n] / pairs.shape[1], pairs[:, n].log()) for n in range(len(q.mean)))
    terms = {
        "mutual_information": given - mean(joint, joint.log()),
        "total_correlation": mean(joint, joint.log() - product.log()),
        "dimension_wise_kl": mean(joint, product.log() - p.log_prob(z)),
    }
    aggregate = mean(joint, joint.log() - p.log_prob(z))
    normal = dist.Normal(0.0, 1.0).log_prob(GRID)
    ones = [((m * (m.log() - normal)).nan_to_num().sum() * cell).item() for m in each]
    kl = sum(terms.values())
    return {**terms, "kl": kl, "aggregate_kl": aggregate, "z0": ones[0], "z1": ones[1]}


@pytest.mark.parametrize("make_prior", [lambda: unit(2), mixture], ids=["unit", "mixture"])
@pytest.mark.parametrize("posterior", [diagonal, full])
def test_every_part_is_that_of_quadrature(posterior: Any, make_prior: Any) -> None:
    q, prior = posterior(), make_prior()
    truth = quadrature(q, prior)
    found = elbo_decomposition(q, prior, num_samples=20_011)
    for name in PARTS:
        term = getattr(found, name)
        assert abs(term.value - truth[name]) < 5 * term.stderr_draws, name
        assert term.stderr_draws < 0.01
    if isinstance(prior, MixtureOfDiagonalNormals):
        assert found.per_dimension is None
    else:
        per_dimension = torch.tensor([truth["z0"], truth["z1"]])
        assert abs(found.per_dimension - per_dimension).max() < 0.03
        assert found.per_dimension.sum().item() == pytest.approx(found.dimension_wise_kl.value)
        exact = kl_divergence(q, prior).mean()
        assert abs(found.kl.value - exact) < 5 * found.kl.stderr_draws


def test_the_parts_sum_to_the_kl_exactly() -> None:
    found = elbo_decomposition(full(), mixture(), num_samples=3)
    parts = [getattr(found, name).value for name in PARTS]
    kl, information, aggregate, correlation, mismatch = parts
    assert kl == pytest.approx(information + aggregate, abs=1e-12)
    assert aggregate == pytest.approx(correlation + mismatch, abs=1e-12)


def test_the_error_over_draws_is_that_of_repetitions() -> None:
    runs = [elbo_decomposition(diagonal(), unit(2), num_samples=11, seed=s) for s in range(301)]
    for name in PARTS:
        values = torch.tensor([getattr(run, name).value for run in runs])
        said = torch.tensor([getattr(run, name).stderr_draws for run in runs]).pow(2).mean() ** 0.5
        assert 0.8 < said / values.std() < 1.25, name


def test_the_error_over_data_is_that_of_fresh_rows() -> None:
    """Of the KL, whose data are independent: the parts look at one another's."""
    values, said = [], []
    for seed in range(301):
        generator = torch.Generator().manual_seed(seed)
        loc = torch.randn(31, 2, generator=generator, dtype=torch.float64)
        found = elbo_decomposition(dist.Normal(loc, 0.5).to_event(1), unit(2), seed=seed)
        values.append(found.kl.value)
        said.append(found.kl.stderr_data)
    ratio = torch.tensor(said).pow(2).mean().sqrt() / torch.tensor(values).std()
    assert 0.85 < ratio < 1.18


def test_a_grid_of_one_scale_has_no_total_correlation() -> None:
    loc = torch.cartesian_prod(torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.0, 3.0]))
    found = elbo_decomposition(dist.Normal(loc, 0.3).to_event(1), unit(2), num_samples=7)
    assert abs(found.total_correlation.value) < 1e-12
    assert found.total_correlation.stderr_draws < 1e-12


def test_data_far_apart_share_all_their_information() -> None:
    loc = 100.0 * torch.arange(7)[:, None].expand(-1, 3)
    found = elbo_decomposition(dist.Normal(loc, 1.0).to_event(1), unit(3))
    assert found.mutual_information.value == pytest.approx(math.log(7), abs=1e-12)
    assert found.total_correlation.value == pytest.approx(2 * math.log(7), abs=1e-12)


def test_a_collapsed_posterior_has_none() -> None:
    q = dist.Normal(torch.zeros(7, 3), 1.0).to_event(1)
    found = elbo_decomposition(q, unit(3))
    for name in PARTS:
        assert abs(getattr(found, name).value) < 1e-12
    assert abs(found.per_dimension).max() < 1e-12


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = elbo_decomposition(full(), unit(2), num_samples=13)
    monkeypatch.setattr(decomposition, "CHUNK_ENTRIES", 77)  # seven draws at once
    parts = elbo_decomposition(full(), unit(2), num_samples=13)
    for name in PARTS:
        assert getattr(whole, name).value == pytest.approx(getattr(parts, name).value, abs=1e-12)
    torch.testing.assert_close(whole.per_dimension, parts.per_dimension)


def test_some_rows_stand_for_all() -> None:
    loc = torch.randn(1009, 2)
    q = dist.Normal(loc, 0.3).to_event(1)
    every = elbo_decomposition(q, unit(2), num_samples=5)
    some = elbo_decomposition(q, unit(2), num_samples=5, num_rows=211)
    for name in PARTS:
        a, b = getattr(every, name), getattr(some, name)
        assert abs(a.value - b.value) < 5 * (a.stderr_data**2 + b.stderr_data**2) ** 0.5
        assert b.stderr_data > a.stderr_data


def test_the_same_seed_gives_the_same_and_leaves_the_generator() -> None:
    state = torch.get_rng_state()
    first, second, other = (elbo_decomposition(full(), unit(2), seed=s) for s in (3, 3, 4))
    assert first.kl == second.kl != other.kl
    assert torch.equal(state, torch.get_rng_state())
    assert first.num_data == 5
    assert first.seed == 3
    assert str(first.kl).count("+-") == 2


def laplace() -> Distribution:
    return dist.Laplace(torch.zeros(5, 2), 1.0).to_event(1)


@pytest.mark.parametrize(
    ("posterior", "size", "options", "message"),
    [
        (lambda: unit(2), 2, {}, r"batch \[N\] and event \(D,\); got \(\) and \(2,\)"),
        (diagonal, 3, {}, r"prior must have batch \(\) and event \(2,\)"),
        (diagonal, 2, {"num_samples": 1}, "num_samples must be at least 2"),
        (diagonal, 2, {"num_rows": 6}, "num_rows must be from 2 to the 5 data; got 6"),
        (laplace, 2, {}, "of Laplace are not known"),
    ],
)
def test_what_does_not_fit_is_refused(
    posterior: Any, size: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        elbo_decomposition(posterior(), unit(size), **options)


def test_a_posterior_that_is_not_finite_is_refused() -> None:
    loc = torch.zeros(5, 2)
    loc[3, 1] = torch.nan
    q = dist.Normal(loc, 1.0, validate_args=False).to_event(1)
    with pytest.raises(ValueError, match="finite parameters"):
        elbo_decomposition(q, unit(2))


def test_any_prior_of_independent_dimensions_has_them_one_by_one() -> None:
    q, prior = diagonal(), dist.Laplace(torch.zeros(2), 1.0).to_event(1)
    found = elbo_decomposition(q, prior, num_samples=20_011)
    assert found.per_dimension.sum().item() == pytest.approx(found.dimension_wise_kl.value)
    assert (found.per_dimension > 0).all()
    assert abs(found.aggregate_kl.value - quadrature(q, prior)["aggregate_kl"]) < 0.02
    assert elbo_decomposition(q, mixture()).per_dimension is None


@pytest.mark.parametrize(("apart", "reached"), [(0.0, False), (1.0, False), (50.0, True)])
def test_the_ceiling_of_the_mutual_information_is_noticed(apart: float, reached: bool) -> None:
    q = dist.Normal(apart * torch.arange(11.0)[:, None].expand(11, 2), 1.0).to_event(1)
    found = elbo_decomposition(q, unit(2))
    assert found.ceiling == pytest.approx(math.log(11))
    assert found.at_ceiling is reached
