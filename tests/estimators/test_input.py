"""What estimators are given as data: numbers of any type, and clear refusals of the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import make
from torch import Tensor

from pyro_vae.data import load_data
from pyro_vae.estimators import (
    annealed_importance_sampling,
    bidirectional,
    evidence_lower_bound,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
)

ESTIMATORS = [
    annealed_importance_sampling,
    bidirectional,
    evidence_lower_bound,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
]
N, F = 5, 7
X = (torch.rand(N, F, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def numbers(estimate: Callable, x: Tensor, **options: Any) -> Tensor:
    vae = make()
    result = estimate(vae.model, vae.guide, x, **options)
    names = ("log_prob", "elbo", "lower")
    return next(getattr(result, name) for name in names if hasattr(result, name))


@pytest.mark.parametrize("estimate", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float64])
def test_a_vae_takes_numbers_of_any_type(estimate: Callable, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    found = numbers(estimate, X.to(dtype))
    torch.manual_seed(3)
    assert torch.equal(found, numbers(estimate, X))


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_what_are_no_data_is_refused(estimate: Callable) -> None:
    splits = load_data("digits", limit=11)
    vae = make()
    for x in (splits, splits.train, X.numpy(), None):
        with pytest.raises(ValueError, match=f"got {type(x).__name__}: of a data set give rows"):
            estimate(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=r"at least one row; got shape \[0, 7\]"):
        estimate(vae.model, vae.guide, X[:0])
    vae = make(condition_dim=3)
    with pytest.raises(ValueError, match="y must have a row for each of the 5 of x; got 4"):
        estimate(vae.model, vae.guide, X, torch.randn(N - 1, 3))
    with pytest.raises(ValueError, match="y must be a tensor .*; got list"):
        estimate(vae.model, vae.guide, X, [[1.0, 2.0, 3.0]] * N)


def test_a_program_of_one_s_own_gets_its_integers() -> None:
    rate = torch.tensor([0.5, 2.0, 7.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(rate[x[:, 0]] * z.exp()), obs=x[:, 1])  # x is an index

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.tensor([[0, 1], [1, 3], [2, 5]])
    assert importance_sampling(model, guide, x).log_prob.shape == (3,)
