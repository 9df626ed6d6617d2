"""Going through the data in batches that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.densities import Program, densities
from pyro_vae.densities.evaluating import evaluating
from pyro_vae.estimators.coordinates import Coordinates
from pyro_vae.estimators.fast import CompiledTarget
from pyro_vae.estimators.target import ROWS, Target
from pyro_vae.generators import forked, seed_generators
from pyro_vae.memory import keep_memory
from pyro_vae.processes import in_processes

__all__ = ["check_support", "map_batches", "map_targets", "track"]

T = TypeVar("T")
DRAWS_AT_ONCE = 4  # draws of each datum that make up the rows that the model sees at once
NUMBERS = 5_000_000  # coordinates of a thousand draws of a batch


def check_support(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, chunk_size: int
) -> None:
    """One run of the programs on all rows, with Pyro's checks: before hours of work, not after.

    Raises:
        ValueError: If the model has no density at some of the data, or cannot be run.
    """
    with evaluating(model, guide, seed=0, device=x.device):
        for rows in torch.arange(len(x), device=x.device).split(chunk_size):
            d = densities(model, guide, x[rows], None if y is None else y[rows])
            _ = d.log_likelihood, d.log_prior


def map_batches(
    estimate: Callable[[Program, Program, Tensor, Tensor | None], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    size: int,
    seed: int | None,
    devices: int,
    progress: bool,
    title: str = "log p(x)",
) -> list[T]:
    """What `estimate` gives for each batch of `size` data, in order.

    The noise of a batch depends on the seed and its number, not on the process that draws it.
    Modes, random state, parameters and Pyro's store are afterwards as they were.

    Raises:
        ValueError: If there are not so many devices, or the programs cannot be sent to them.
    """
    _check_devices(devices, (model, guide), x.device)
    first = _any_seed(x.device) if seed is None else seed
    work = Work(estimate, model, guide, x, y, size, first, title if progress else None)
    if devices == 1:
        return work()
    store = pyro.get_param_store().get_state()
    parts = [(part, store) for part in work.split(devices)]
    return [result for part in in_processes(_with_store, parts, x.device.type) for result in part]


@dataclass(frozen=True)
class Work(Generic[T]):
    """Batches of data to be estimated, in this process or in another."""

    estimate: Callable[[Program, Program, Tensor, Tensor | None], T]
    model: Program
    guide: Program
    x: Tensor
    y: Tensor | None
    size: int
    seed: int
    title: str | None
    number: int = 0  # of the first batch

    def __call__(self) -> list[T]:
        """The estimates."""
        batches = torch.arange(len(self.x), device=self.x.device).split(self.size)
        results = []
        keep_memory()
        with (
            pyro.validation_enabled(True),  # in other processes too
            evaluating(self.model, self.guide, seed=None, device=self.x.device),
        ):
            for i, rows in enumerate(track(batches, self.title or "", self.title is not None)):
                number = [self.seed % 2**64, self.number + i]
                noise = np.random.SeedSequence(number).generate_state(1, np.uint64)
                seed_generators(self.x.device, int(noise[0]))
                y = None if self.y is None else self.y[rows]
                results.append(self.estimate(self.model, self.guide, self.x[rows], y))
        return results

    def split(self, parts: int) -> list[Work[T]]:
        """The same in at most so many parts, of whole batches; the first shows its progress."""
        batches = torch.arange(-(-len(self.x) // self.size))
        split: list[Work[T]] = []
        for numbers in batches.tensor_split(min(parts, len(batches))):
            rows = slice(int(numbers[0]) * self.size, (int(numbers[-1]) + 1) * self.size)
            split.append(
                replace(
                    self,
                    x=self.x[rows].clone(),
                    y=None if self.y is None else self.y[rows].clone(),
                    number=int(numbers[0]),
                    title=None if split else self.title,
                )
            )
        return split


def _with_store(part: tuple[Work[T], Any]) -> list[T]:
    work, store = part
    pyro.get_param_store().set_state(store)
    return work()


def _any_seed(device: torch.device) -> int:
    """A seed from the current state, which stays as it is."""
    with forked(device):
        return int(torch.randint(2**62, (), device=device))


def _check_devices(devices: int, programs: Sequence[Program], device: torch.device) -> None:
    if devices == 1:
        return
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(
            f"devices={devices}, but this machine has {torch.cuda.device_count()} GPU(s): give as "
            "many, or keep model and data on the CPU, where devices are processes"
        )
    for program in programs:
        if not isinstance(getattr(program, "__self__", program), nn.Module):
            raise ValueError(
                "with several devices model and guide must be methods of a torch module, which "
                f"takes their weights to the other processes; got {program!r}"
            )


def map_targets(
    estimate: Callable[[Target], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    chunk_size: int | None,
    seed: int | None,
    devices: int,
    progress: bool,
    compile: bool = False,
) -> list[T]:
    """What `estimate` gives for the posteriors of each batch of data, as by `map_batches`."""
    rows = 2 * ROWS if chunk_size is None else chunk_size
    check_support(model, guide, x, y, rows)
    with evaluating(model, guide, seed=seed, device=x.device):
        first = Target(model, guide, x[:4], None if y is None else y[:4], chunk_size=rows)
    return map_batches(
        partial(_on_target, estimate, rows, first.sites, CompiledTarget() if compile else None),
        model,
        guide,
        x,
        y,
        size=max(1, min(rows // DRAWS_AT_ONCE, NUMBERS // (1000 * first.dim))),
        seed=seed,
        devices=devices,
        progress=progress,
    )


def _on_target(
    estimate: Callable[[Target], T],
    rows: int,
    sites: dict[str, Coordinates],
    fast: CompiledTarget | None,
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
) -> T:
    return estimate(Target(model, guide, x, y, chunk_size=rows, sites=sites, fast=fast))


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The items, with a progress bar if asked for."""
    if not show:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description)
