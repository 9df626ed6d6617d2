"""Compiled estimators give what eager ones give."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian, two_sites
from torch import Tensor, nn

from pyro_vae.compiling import Traced, compiled
from pyro_vae.densities import log_joint
from pyro_vae.estimators import (
    annealed_importance_sampling,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
)
from pyro_vae.estimators.importance import compiled_joint
from pyro_vae.estimators.target import Compiler, Target

pytestmark = pytest.mark.usefixtures("float64")


def agree(estimate: Callable, *args: Tensor, **options: object) -> None:
    eager = estimate(*args, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = estimate(*args, compile=True, **options)
    torch.testing.assert_close(compiled.log_prob, eager.log_prob, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compiled.stderr, eager.stderr, rtol=1e-6, atol=1e-9)
    assert compiled.verdict == eager.verdict


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimate", "options"),
    [
        (importance_sampling, {"num_samples": 503, "chunk_size": 23}),
        (log_evidence, {"chunk_size": 29}),
    ],
    ids=["importance_sampling", "log_evidence"],
)
def test_a_conditional_vae(estimate: Callable, options: dict) -> None:
    world = LinearGaussian.draw(condition_dim=3)
    x, y = torch.randn(7, 5), torch.randn(7, 3)
    agree(estimate, world.vae.model, world.vae.guide, x, y, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimate", [refined_importance_sampling, annealed_importance_sampling], ids=["refined", "ais"]
)
def test_a_program_of_two_sites(estimate: Callable) -> None:
    model, guide, _ = two_sites(reverse=True)
    agree(estimate, model, guide, torch.randn(5), chunk_size=31)


def test_rare_shapes_are_not_compiled() -> None:
    world = LinearGaussian.draw()
    fast = Compiler()
    for size in range(1, 30):
        x, z = torch.randn(1, 5), {"z": torch.randn(size, 1, 2)}
        expected = log_joint(world.vae.model, x, None, z)
        assert torch.equal(compiled_joint(fast, world.vae.model, x, None, z), expected)
    assert not fast.traced


class Bounded(nn.Module):
    """z ~ U(0, 1 + |x|), on a support of each datum, x ~ N(z, 1)."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1 + x.abs()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Uniform(torch.zeros_like(x), 1 + x.abs()))


def test_supports_that_differ_between_data_are_left_to_the_model() -> None:
    program = Bounded()
    x = torch.randn(3)
    assert Target(program.model, program.guide, x, compiler=Compiler()).compiler is None


def test_what_cannot_be_compiled_is_run_and_said() -> None:
    world = LinearGaussian.draw()

    def model(x: Tensor) -> None:
        assert x.abs().sum().item() >= 0
        world.vae.model(x)

    x = torch.randn(3, 5)
    options = {"num_samples": 97, "chunk_size": 3}
    with pytest.warns(UserWarning, match="compile: the model runs eagerly, for it cannot be tr"):
        found = importance_sampling(model, world.vae.guide, x, compile=True, **options)
    assert torch.equal(
        found.log_prob, importance_sampling(model, world.vae.guide, x, **options).log_prob
    )


@pytest.mark.parametrize(
    "how", [Traced, pytest.param(compiled, marks=pytest.mark.slow)], ids=["traced", "compiled"]
)
def test_the_gradient_is_that_of_whatever_is_made_of_the_density(
    how: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_vae.estimators.target.compiled", how)
    world = LinearGaussian.draw()
    x, u, weight = torch.randn(3, 5), torch.randn(11, 3, 2), torch.rand(11, 3)
    fast = Compiler(uses=1)
    slopes = []
    for density in (
        Target(world.vae.model, world.vae.guide, x, scale=torch.ones(3, 2), compiler=f)
        for f in (None, fast)
    ):
        leaf = u.clone().requires_grad_()
        (weight * density.log_joint(leaf)).sum().backward()
        slopes.append(leaf.grad)
    assert fast.traced
    torch.testing.assert_close(slopes[1], slopes[0])
