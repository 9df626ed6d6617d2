"""The jackknife against all subsets; the bound at fewer samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from worlds import linear

from pyro_vae.densities import log_mean_exp
from pyro_vae.estimators import convergence, importance_sampling, jackknife

pytestmark = pytest.mark.usefixtures("float64")


def by_subsets(log_weights: Tensor, order: int) -> Tensor:
    K = len(log_weights)
    total = torch.zeros(log_weights.shape[1])
    for j in range(order + 1):
        subsets = itertools.combinations(range(K), K - j)
        average = torch.stack([log_mean_exp(log_weights[list(s)]) for s in subsets]).mean(0)
        factor = (-1) ** j * (K - j) ** order
        total += factor / (math.factorial(order - j) * math.factorial(j)) * average
    return total


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("scale", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("num_samples", [3, 17, 41])
def test_jackknife_is_that_of_all_subsets(num_samples: int, scale: float, order: int) -> None:
    log_weights = scale * torch.randn(num_samples, 5) - 1000
    torch.testing.assert_close(
        jackknife(log_weights, order), by_subsets(log_weights, order), atol=1e-8, rtol=0
    )


def test_jackknife_takes_away_the_bias() -> None:
    """Of the mean of exp(normal) weights; the bound's leading bias is -(e - 1) / 2K."""
    log_weights = torch.randn(31, 20_011) - 0.5
    bias = [log_mean_exp(log_weights).mean()]
    bias += [jackknife(log_weights, order).mean() for order in (1, 2)]
    assert abs(bias[0] + (math.e - 1) / 62) < 0.01
    assert abs(bias[1]) < abs(bias[0]) / 2
    assert abs(bias[2]) < abs(bias[0]) / 2


@pytest.mark.parametrize(("order", "num_samples"), [(0, 7), (3, 7), (1, 1), (2, 2)])
def test_jackknife_of_too_few_is_refused(order: int, num_samples: int) -> None:
    with pytest.raises(ValueError, match="order must be 1 or 2 and K larger"):
        jackknife(torch.zeros(num_samples, 2), order)


def test_convergence_averages_over_disjoint_blocks() -> None:
    log_weights = torch.randn(1013, 3)
    bounds = convergence(log_weights)
    assert list(bounds) == [10, 101, 1013]
    blocks = torch.stack([log_mean_exp(part) for part in log_weights.split(101)[:10]])
    torch.testing.assert_close(bounds[101], blocks.mean(0))
    torch.testing.assert_close(bounds[1013], log_mean_exp(log_weights))
    assert list(convergence(log_weights[:7])) == [7]


def test_importance_sampling_shows_its_convergence() -> None:
    world = linear(width=0.7)
    e = importance_sampling(world.model, world.guide, world.x, num_samples=1009, chunk_size=503)
    assert set(e.extras) == {"bound_10", "bound_100", "jackknife_1", "jackknife_2"}
    assert all(value.shape == (13,) for value in e.extras.values())
    assert e.extras["bound_10"].mean() < e.extras["bound_100"].mean() < e.mean()
    assert set(e.verdict) == {"lower bound"}


def test_the_progress_bar_changes_nothing(capsys: pytest.CaptureFixture) -> None:
    world = linear()
    shown, hidden = (
        importance_sampling(world.model, world.guide, world.x, num_samples=11, progress=progress)
        for progress in (True, False)
    )
    assert torch.equal(shown.log_prob, hidden.log_prob)
    assert "importance sampling, guide" in capsys.readouterr().out
