"""Ranks of exact draws among a guide's: uniform for an exact guide, known for a narrow one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import LinearGaussian
from torch import Tensor

import pyro_vae
from pyro_vae import plots
from pyro_vae.distributions import Incomplete
from pyro_vae.metrics import Calibration, calibration, p_values

N = 1009


def world(width: float = 1.0) -> tuple[LinearGaussian, Callable[[Tensor], Any]]:
    torch.manual_seed(0)
    exact = LinearGaussian.draw(2, 5, 0.7)

    def guide(x: Tensor) -> Any:
        q = exact.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            tril = torch.tensor([1.0, width]).diag() @ q.scale_tril
            return pyro.sample("z", dist.MultivariateNormal(q.loc, scale_tril=tril))

    return exact, guide


def run(width: float = 1.0, **options: Any) -> Calibration:
    exact, guide = world(width)
    x = torch.zeros(7, 5)
    return calibration(exact.vae.model, guide, x, num_data=N, **options)


def test_an_exact_guide_is_uniform() -> None:
    found = run()
    assert found.ranks.shape == (N, 3)
    assert found.names == ("z 0", "z 1", "log p(x, z)")
    assert found.p_value.min() > 0.01
    for level in (0.5, 0.9):
        error = (level * (1 - level) / N) ** 0.5
        assert ((found.coverage(level) - level).abs() < 3 * error).all()


def test_a_guide_of_half_the_spread_covers_what_it_must() -> None:
    found = run(0.5)
    normal = dist.Normal(0.0, 1.0)
    for level in (0.5, 0.9):
        inside = 0.5 * normal.icdf(torch.tensor((1 + level) / 2))
        truth = (2 * normal.cdf(inside) - 1).item()
        error = (truth * (1 - truth) / N) ** 0.5
        assert abs(found.coverage(level)[1].item() - truth) < 3 * error + 0.5 / found.num_draws
        assert abs(found.coverage(level)[0].item() - level) < 4 * (0.25 / N) ** 0.5
    assert found.p_value[1] < 1e-6 < found.p_value[0]
    assert found.worst in ("z 1", "log p(x, z)")
    assert "90 % intervals hold" in repr(found)


def test_the_joint_density_sees_a_wrong_correlation() -> None:
    exact, _ = world()
    weight = exact.vae.likelihood.decoder.output.weight
    weight.data[:, 1] = weight.data[:, 0] + 0.3 * weight.data[:, 1]

    def guide(x: Tensor) -> Any:  # the right marginals, as though independent
        q = exact.posterior(x)
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Normal(q.loc, q.variance.sqrt()).to_event(1))

    found = calibration(exact.vae.model, guide, torch.zeros(7, 5), num_data=N)
    assert found.p_value[:2].min() > 0.01
    assert found.worst == "log p(x, z)"
    assert found.p_value[2] < 1e-3


def test_ties_are_ranked_by_chance() -> None:
    """Two values, and a guide that is the posterior: that of the model without data."""

    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Bernoulli(0.3))
            return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> Any:
        with pyro.plate("data", len(x), dim=-1):
            return pyro.sample("z", dist.Bernoulli(0.3))

    found = calibration(model, guide, torch.zeros(N), num_data=N, num_draws=31)
    assert found.p_value.min() > 0.01


def test_it_leaves_no_trace_and_repeats_itself() -> None:
    exact, guide = world()
    before = torch.get_rng_state()
    found = [calibration(exact.vae.model, guide, torch.zeros(7, 5), num_data=11) for _ in range(2)]
    assert torch.equal(found[0].ranks, found[1].ranks)
    assert torch.equal(before, torch.get_rng_state())
    assert not pyro.get_param_store()


def test_conditions_are_used_in_turn() -> None:
    vae = pyro_vae.build((5,), 2, likelihood="Normal", condition_dim=3)
    found = calibration(vae, torch.zeros(7, 5), torch.rand(7, 3), num_data=13, num_draws=3)
    assert found.ranks.shape == (13, 3)
    assert found.ranks.max() <= 3


def test_what_cannot_be_simulated_is_refused() -> None:
    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("a", dist.Normal(z, 1.0), obs=x[:, 0])

    _, guide = world()
    with pytest.raises(ValueError, match="one observed site is x itself"):
        calibration(model, guide, torch.zeros(7, 5))
    with pytest.raises(ValueError, match="latents that are summed out"):
        calibration(pyro_vae.build((5,), 2, classes=3), torch.zeros(7, 5))
    with pytest.raises(ValueError, match="level must be below 1"):
        run(num_draws=3).coverage(1.0)


def test_the_figure_names_the_worst() -> None:
    found = run(0.5, num_draws=19)
    figure = plots.calibration(found.uniforms, found.names)
    (ax,) = figure.axes
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert named[0] in ("z 1", "log p(x, z)")


@pytest.mark.parametrize("aware", [True, False])
def test_a_guide_of_rows_with_missing_entries(aware: bool) -> None:
    def model(x: Tensor) -> Any:
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            fn = Incomplete(dist.Normal(z.expand(*z.shape[:-1], 5), 1.0).to_event(1))
            return pyro.sample("x", fn, obs=x)

    def guide(x: Tensor) -> Any:
        seen = (~x.isnan()).sum(-1, keepdim=True) if aware else torch.full((len(x), 1), 5)
        with pyro.plate("data", len(x), dim=-1):
            precision = 1.0 + seen
            loc = x.nansum(-1, keepdim=True) / precision
            return pyro.sample("z", dist.Normal(loc, precision**-0.5).to_event(1))

    x = torch.zeros(7, 5)
    x[1, :3] = x[3, 4] = x[5, 1:] = x[6] = torch.nan
    found = calibration(model, guide, x, num_data=N)
    off = (found.coverage(0.9)[0].item() - 0.9) / (0.09 / N) ** 0.5
    assert (abs(off) < 3 and found.p_value.min() > 0.01) if aware else off < -6


def test_missing_entries_are_refused_by_a_vae_without() -> None:
    x = torch.zeros(7, 5)
    x[1, 3] = torch.nan
    with pytest.raises(ValueError, match="missing=True"):
        calibration(world()[0].vae, x)


def test_a_row_of_no_number_has_no_p_value() -> None:
    found = p_values(torch.tensor([torch.nan, -torch.inf, 2.0]), torch.tensor([0.0, 1.0, 3.0]))
    assert found[0].isnan()
    assert found[1:].tolist() == [0.25, 0.75]
