"""Estimates from several processes are those of one."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from pyro_vae.estimators import (
    Evidence,
    annealed_importance_sampling,
    bidirectional,
    importance_sampling,
    log_evidence,
    refined_importance_sampling,
)
from pyro_vae.estimators.run import _split_batches


class Gaussian(nn.Module):
    """x = z w + noise, with p(x) in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -1.3]))

    def model(self, x: Tensor, y: Tensor | None = None) -> None:
        shift = 0.0 if y is None else y
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.w + shift, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, y: Tensor | None = None) -> None:
        precision = 1 + self.w**2 / 0.25
        loc = (x - (0.0 if y is None else y)) * self.w / 0.25 / precision
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(loc, 1.2 * precision**-0.5).to_event(1))

    def log_prob(self, x: Tensor) -> Tensor:
        return dist.Normal(0.0, (self.w**2 + 0.25).sqrt()).to_event(1).log_prob(x).detach()


def data(num_rows: int = 31) -> Tensor:
    return torch.randn(num_rows, 2, generator=torch.Generator().manual_seed(0))


def equal(first: Evidence, second: Evidence) -> None:
    for name in ("log_prob", "stderr", "ess", "khat", "num_samples"):
        pair = getattr(first, name), getattr(second, name)
        torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True, msg=name)
    assert first.method == second.method
    assert first.verdict == second.verdict
    assert first.extras.keys() == second.extras.keys()


@pytest.mark.slow
def test_two_processes_estimate_what_one_does() -> None:
    owner, x = Gaussian(), data()
    programs, y = (owner.model, owner.guide), data().flip(0) / 3
    options = {"num_samples": 500, "chunk_size": 2000}
    one, two = (
        importance_sampling(*programs, x, y, devices=devices, **options) for devices in (1, 2)
    )
    equal(one, two)
    shifted = owner.log_prob(x - y)
    assert ((two.log_prob - shifted).abs() < 5 * two.stderr + 0.01).all()
    assert multiprocessing.active_children() == []


FEW = {"num_temperatures": 5, "num_chains": 4}


@pytest.mark.parametrize(
    ("estimate", "options"),
    [
        (importance_sampling, {"num_samples": 30}),
        pytest.param(log_evidence, {"tolerance": 0.5}, marks=pytest.mark.slow),
        pytest.param(refined_importance_sampling, {"num_samples": 30}, marks=pytest.mark.slow),
        pytest.param(annealed_importance_sampling, FEW, marks=pytest.mark.slow),
        (bidirectional, FEW),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_batches_are_estimated_alike_wherever_they_are(
    monkeypatch: pytest.MonkeyPatch, estimate: Callable[..., Any], options: dict[str, Any]
) -> None:
    """Processes without processes: the parts are pickled, and done one after the other."""
    parts: list[int] = []

    def here(
        function: Callable[[Any], Any],
        given: list[Any],
        device: str,
        indices: list[int],
        meanwhile: Callable[[], None],
    ) -> list[Any]:
        assert indices == [1, 2]  # this process takes the first
        parts.append(1 + len(given))
        sent = pickle_and_back(given)
        meanwhile()
        return [function(part) for part in reversed(sent)][::-1]

    monkeypatch.setattr("pyro_vae.estimators.run.in_processes", here)
    monkeypatch.setattr("pyro_vae.estimators.run.check_processes", lambda *_: None)
    owner, x = Gaussian(), data(11)
    results = [
        estimate(owner.model, owner.guide, x, chunk_size=28, devices=devices, **options)
        for devices in (1, 3)
    ]
    assert parts == [2 if estimate is not importance_sampling else 3]
    if isinstance(results[0], Evidence):
        equal(*results)
    else:
        for name in ("lower", "upper", "x"):
            assert torch.equal(*(getattr(result, name) for result in results))


def pickle_and_back(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_parts_are_whole_batches_in_order() -> None:
    for rows in range(1, 23):
        x = torch.arange(rows)[:, None]
        parts = _split_batches(x, x, 3, 4)
        assert torch.equal(torch.cat([part for part, *_ in parts]), x)
        assert all(len(part) % 3 == 0 for part, *_ in parts[:-1])
        assert [number * 3 for *_, number in parts] == [int(part[0]) for part, *_ in parts]


def test_a_seed_of_none_goes_on_from_the_current_state() -> None:
    owner, x = Gaussian(), data(5)
    torch.manual_seed(1)
    first, again = (
        importance_sampling(owner.model, owner.guide, x, num_samples=30, seed=None)
        for _ in range(2)
    )
    torch.rand(1)
    other = importance_sampling(owner.model, owner.guide, x, num_samples=30, seed=None)
    assert torch.equal(first.log_prob, again.log_prob)
    assert not torch.equal(first.log_prob, other.log_prob)


def test_programs_and_devices_that_are_refused() -> None:
    owner, x = Gaussian(), data(5)
    with pytest.raises(ValueError, match="must be methods of a torch module"):
        importance_sampling(lambda x: owner.model(x), owner.guide, x, devices=2)
    owner.function = lambda: None
    with pytest.raises(ValueError, match="cannot be sent there: .*lambda"):
        importance_sampling(owner.model, owner.guide, x, devices=2)
    for devices in (0, 1.5, [0, 1]):
        with pytest.raises(ValueError, match="devices must be (a whole number, )?at least 1"):
            importance_sampling(owner.model, owner.guide, x, devices=devices)  # type: ignore
    with pytest.raises(ValueError, match="devices=1000 were asked for; this machine has"):
        importance_sampling(owner.model, owner.guide, x, devices=1000)
