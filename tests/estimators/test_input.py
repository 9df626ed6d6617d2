"""What estimators are given as data: numbers of any type, and clear refusals of the rest."""

from __future__ import annotations

import inspect
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from families import make
from torch import Tensor

from pyro_vae.data import load_data
from pyro_vae.densities import densities
from pyro_vae.estimators import (
    annealed_importance_sampling,
    bidirectional,
    evidence_lower_bound,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
)
from pyro_vae.estimators.run import estimator
from pyro_vae.likelihoods import ContinuousBernoulli

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
    return value(estimate(vae.model, vae.guide, x, **options))


def value(result: Any) -> Tensor:
    names = ("log_prob", "elbo", "lower")
    return next(getattr(result, name) for name in names if hasattr(result, name))


FAST = evidence_lower_bound, importance_sampling
TYPED = [
    *((e, torch.int64) for e in FAST),
    *(pytest.param(e, torch.int64, marks=pytest.mark.slow) for e in ESTIMATORS if e not in FAST),
    *((importance_sampling, dtype) for dtype in (torch.uint8, torch.bool, torch.float64)),
]


@pytest.mark.parametrize(("estimate", "dtype"), TYPED)
def test_a_vae_takes_numbers_of_any_type(estimate: Callable, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    found = numbers(estimate, X.to(dtype))
    torch.manual_seed(3)
    assert torch.equal(found, numbers(estimate, X))


@pytest.mark.parametrize("estimate", [importance_sampling, refined_importance_sampling])
def test_the_caller_s_modes_of_torch_change_no_number(estimate: Callable) -> None:
    vae, way = make(likelihood=ContinuousBernoulli), {"num_samples": 50}
    expected = value(estimate(vae, X, **way))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value(estimate(vae, X, **way)), expected)
    with torch.inference_mode():
        for x in (X, X.clone(), X.tolist()):  # the second has no gradients ever after
            assert torch.equal(value(estimate(vae, x, **way)), expected)


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_what_are_no_data_is_refused(estimate: Callable) -> None:
    splits = load_data("digits", limit=11)
    vae = make()
    for x in (splits, splits.train, None):
        with pytest.raises(ValueError, match=f"got {type(x).__name__}: of a data set give rows"):
            estimate(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match=r"at least one row; got shape \[0, 7\]"):
        estimate(vae.model, vae.guide, X[:0])
    vae = make(condition_dim=3)
    with pytest.raises(ValueError, match="y must have a row for each of the 5 of x; got 4"):
        estimate(vae.model, vae.guide, X, torch.randn(N - 1, 3))
    with pytest.raises(ValueError, match="y must be a tensor, array, .*; got dict"):
        estimate(vae.model, vae.guide, X, {"y": 1})
    with pytest.raises(ValueError, match=r"y must be finite; 2 row\(s\) .* first \[0, 3\]"):
        estimate(vae.model, vae.guide, X, torch.tensor([[torch.nan], [1], [1], [torch.inf], [1]]))


@estimator
def probe(model: Any, guide: Any, x: Tensor, y: Tensor | None = None, *, seed: int = 0) -> Any:
    """What an estimator sees of its arguments."""
    return model, guide, x, y, seed


@pytest.mark.parametrize("estimate", ESTIMATORS)
def test_every_estimator_checks_its_arguments_by_the_one_rule(estimate: Callable) -> None:
    assert estimate.__wrapped__.__name__ == estimate.__name__
    assert list(inspect.signature(estimate).parameters)[:4] == ["model", "guide", "x", "y"]
    with pytest.raises(ValueError, match="model must be a Pyro program.*; got NoneType"):
        estimate(None, None, X)
    with pytest.raises(ValueError, match="seed must be a whole number, at least 0; got 'a'"):
        estimate(make(), X, seed="a")


@pytest.mark.parametrize("rows", [Tensor.numpy, Tensor.tolist, list, "frame"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int32, torch.bool])
def test_arrays_lists_and_frames_are_rows(rows: Any, dtype: torch.dtype) -> None:
    if rows == "frame":
        frame = pytest.importorskip("pandas").DataFrame
        rows = lambda x: frame(x.numpy())  # noqa: E731
    given = X.to(dtype)
    _, _, x, y, _ = probe(make(), rows(given), rows(given[:, :3]))
    kinds = {torch.bool: torch.bool, torch.int32: torch.int64}
    assert x.dtype is y.dtype is kinds.get(dtype, torch.float32)
    assert torch.equal(x, X.to(x.dtype))
    assert torch.equal(y, X[:, :3].to(x.dtype))


def test_a_tensor_is_passed_on_as_it_is() -> None:
    for x in (X, X.long(), X.double(), X[:, 0]):
        assert probe(make(), x)[2] is x


def test_a_vae_stands_for_its_programs() -> None:
    vae = make(condition_dim=3)
    y = torch.randn(N, 3)
    calls: list[Any] = [
        ((vae.model, vae.guide, X, y), {"seed": 3}),
        ((vae, X, y), {"seed": 3}),
        ((vae,), {"x": X, "y": y, "seed": 3}),
        ((vae, X), {"y": y, "seed": 3}),
        ((), {"model": vae.model, "guide": vae.guide, "x": X, "y": y, "seed": 3}),
        ((vae.model,), {"guide": vae.guide, "x": X, "y": y, "seed": 3}),
    ]
    for args, options in calls:
        assert probe(*args, **options) == (vae.model, vae.guide, X, y, 3)
    for args in ((vae.model, X, y), (X,), ()):
        with pytest.raises(ValueError, match=r"(model|guide) must be a Pyro program"):
            probe(*args)
    with pytest.raises(TypeError, match="'x'"):
        probe(vae)
    found, expected = (
        value(importance_sampling(*p, X, y)) for p in ((vae,), (vae.model, vae.guide))
    )
    assert torch.equal(found, expected)
    torch.manual_seed(0)
    found = densities(vae, X, y).log_prior
    torch.manual_seed(0)
    assert torch.equal(found, densities(vae.model, vae.guide, X, y).log_prior)


@pytest.mark.parametrize("estimate", [e for e in ESTIMATORS if e is not bidirectional])
@pytest.mark.parametrize("row", [0, 4])
@pytest.mark.parametrize("bad", [-7.0, 0.5, 2.0])
def test_impossible_data_are_refused_whatever_the_flags(
    estimate: Callable, row: int, bad: float
) -> None:
    vae, x = make(), X.clone()
    x[row, 3] = bad
    before = pyro.distributions.is_validation_enabled()
    with pyro.validation_enabled(False):
        for data in (x, x[row : row + 1]):
            with pytest.raises(ValueError, match="likelihood Bernoulli needs data in {0, 1}"):
                estimate(vae, data)
        assert not pyro.distributions.is_validation_enabled()
    assert pyro.distributions.is_validation_enabled() is before


@pytest.mark.parametrize("compile", [False, True])
def test_every_row_of_a_program_of_one_s_own_is_checked(compile: bool) -> None:
    class Own(torch.nn.Module):
        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Poisson(z.exp()), obs=x[:, 0])

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    x = torch.ones(5003, 1)
    x[-1] = -1
    for estimate in (log_evidence, importance_sampling):
        began = time.monotonic()
        with pyro.validation_enabled(False), pytest.raises(ValueError, match="support"):
            estimate(Own(), x, compile=compile)
        assert time.monotonic() - began < 5  # before any work


@pytest.mark.slow
def test_impossible_data_are_refused_by_an_optimised_python() -> None:
    script = "import torch, pyro_vae; v = pyro_vae.build(4, 2)"
    script += "; pyro_vae.log_evidence(v, torch.full((3, 4), -7.0))"
    done = subprocess.run([sys.executable, "-O", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "likelihood Bernoulli needs data in {0, 1}" in done.stderr


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
