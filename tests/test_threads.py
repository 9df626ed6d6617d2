"""Several threads of one process: each gets what it would get alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from contextlib import suppress
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae import build, fit, importance_sampling, log_evidence
from pyro_vae.training import State
from pyro_vae.vae import VAE


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.bernoulli(torch.full((61, 7), 0.4), generator=generator)


def train(vae: VAE, seed: int, nested: list[Tensor] | None = None) -> Tensor:
    """The weights, in one vector."""

    def look(state: State) -> None:
        if nested is not None:
            nested.append(importance_sampling(*programs(state.vae), data(), num_samples=3).mean())

    options: dict[str, Any] = {"progress": False, "accelerator": "cpu", "callbacks": [look]}
    fit(vae, data(), epochs=3, batch_size=11, seed=seed, **options)
    return torch.cat([p.detach().flatten() for p in vae.parameters()])


def programs(vae: Any) -> tuple[Any, Any]:
    return vae.model, vae.guide


def judge(vae: VAE) -> Tensor:
    return log_evidence(*programs(vae), data()[:3], budget=6000, tolerance=5.0).log_prob


def made(seed: int) -> VAE:
    """A small VAE, without torch's own generator, which threads share."""
    generator = torch.Generator().manual_seed(seed)
    vae = build((7,), 2)
    for parameter in vae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return vae


def test_two_threads_get_what_each_gets_alone() -> None:
    def tasks() -> list[Callable[[], Tensor]]:
        vaes = [made(seed) for seed in (1, 3, 2, 3)]  # to build draws from the shared generator
        works = partial(train, seed=1), judge, partial(train, seed=2), judge
        return [partial(work, vae) for work, vae in zip(works, vaes, strict=True)]

    alone, ready = [task() for task in tasks()], tasks()
    with ThreadPoolExecutor(len(ready)) as threads:
        together = [future.result() for future in [threads.submit(task) for task in ready]]
    for first, second in zip(alone, together, strict=True):
        assert torch.equal(first, second)


def test_a_callback_may_estimate() -> None:
    nested: list[Tensor] = []
    assert torch.equal(train(made(1), 1), train(made(1), 1, nested))
    assert len(nested) == 3


def test_an_estimate_that_waits_leaves_the_flags_of_a_training_alone() -> None:
    flag, seen = "validate_distributions_pyro", []

    def start_another(_: State) -> None:
        other = threads.submit(judge, vae)
        with suppress(TimeoutError):
            other.result(timeout=0.5)
        seen.append(pyro.settings.get(flag))

    before, vae = pyro.settings.get(flag), made(3)
    with ThreadPoolExecutor(1) as threads:
        options: dict[str, Any] = {"progress": False, "accelerator": "cpu"}
        fit(made(1), data(), epochs=1, callbacks=[start_another], **options)
    assert (seen, pyro.settings.get(flag)) == ([False], before)
