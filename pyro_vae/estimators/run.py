"""How estimators are run: what they are given, in batches, in processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.arguments import TakesVAE, as_rows, check_real, check_whole, programs
from pyro_vae.densities import Densities, Program, densities, evaluating
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.target import ROWS, Compiled, Target
from pyro_vae.processes import check_processes, in_processes
from pyro_vae.runtime import alone, forked, is_small, keep_memory, seed_generators, threads

__all__ = [
    "check_support",
    "estimator",
    "exact_without_data",
    "map_batches",
    "map_targets",
    "track",
]

DRAWS_AT_ONCE = 4  # draws of each datum that make up the rows that the model sees at once
STEP = 100  # rows of a usual step of training, by which models are small for `fit`, too
LAYER = 2_000_000  # numbers of the widest layer at once: more falls out of cache
NUMBERS = 5_000_000  # coordinates of a thousand draws of a batch
WHOLE = ("budget", "chunk_size", "devices")
P = ParamSpec("P")
T = TypeVar("T")


def estimator(function: Callable[Concatenate[Program, Program, P], T]) -> TakesVAE[P, T]:
    """Lets a function of (model, guide, x, y, *, ...) be called as (vae, x, y, ...) too.

    x and y may be tensors, arrays, frames or lists; they and the numbers are checked, by name.
    Pyro's own checks are on, whatever flags are set: a density of data that are impossible is no
    number to report. They are flags of the process, so that other threads wait. Small modules
    on the CPU get one thread of torch.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **options: Any) -> T:
        bound = signature.bind(*programs(args, options), **options)
        given = bound.arguments
        x = given["x"] = as_rows("x", given["x"], missing=True)  # the model refuses what it must
        if given.get("y") is not None:
            y = given["y"] = as_rows("y", given["y"])
            if len(y) != len(x):
                raise ValueError(f"y must have a row for each of the {len(x)} of x; got {len(y)}")
        for name, value in given.items():
            optional = signature.parameters[name].default is None
            if name.startswith("num_") or name in WHOLE:
                check_whole(optional=optional, **{name: value})
            elif name == "seed":
                check_whole(0, optional=True, seed=value)
            elif name == "tolerance":
                check_real(above=0, tolerance=value)
        weights = weights_of(given["model"], given["guide"])
        small = bool(weights) and x.device.type == "cpu" and is_small(weights, STEP)
        with alone, pyro.validation_enabled(True), threads(1) if small else nullcontext():
            found = function(*bound.args, **bound.kwargs)
            if isinstance(found, Evidence):
                parts = given["model"], given["guide"], x, given.get("y")
                return exact_without_data(found, *parts).of(x)  # type: ignore[return-value]
            return found

    return call


def weights_of(*programs: Any) -> list[Tensor]:
    """The parameters of the modules whose methods the programs are."""
    modules = (getattr(program, "__self__", None) for program in programs)
    return [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]


def exact_without_data(
    evidence: Evidence, model: Program, guide: Program, x: Tensor, y: Tensor | None
) -> Evidence:
    """The evidence, where nothing of a datum was observed replaced by what is known: 0."""
    rows = x.isnan().flatten(1).all(1).nonzero()[:, 0] if x.ndim > 1 else ()
    if not len(rows):
        return evidence
    with evaluating(model, guide, seed=0, device=x.device):
        d = densities(model, guide, x[rows], None if y is None else y[rows], num_particles=2)
        rows = rows[(d.log_likelihood == 0).all(0)].cpu()  # models may observe something else
    return evidence.known(rows, 0.0, "nothing observed")


def check_support(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, chunk_size: int
) -> Densities:
    """One run of the programs on all rows, with Pyro's checks: before hours of work, not after.

    Returns:
        What the run of the last rows gave.

    Raises:
        ValueError: If the model has no density at some of the data, or cannot be run.
    """
    with evaluating(model, guide, seed=0, device=x.device):
        for rows in torch.arange(len(x), device=x.device).split(chunk_size):
            d = densities(model, guide, x[rows], None if y is None else y[rows])
            _ = d.log_likelihood, d.log_prior
    return d


def map_targets(
    estimate: Callable[[Target], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    chunk_size: int | None,
    seed: int | None,
    compile: bool = False,
    **options: Any,
) -> list[T]:
    """What `estimate` gives for the posteriors of each batch of data, as by `map_batches`.

    The programs see `chunk_size` rows at once; or, of narrow layers, whose calls take the time,
    as many more as the processor's cache holds.
    """
    rows, weights = chunk_size or 2 * ROWS, weights_of(model, guide)
    if chunk_size is None and weights and all(p.ndim <= 2 for p in weights):
        widest = max(x[0].numel(), *(max(p.shape, default=1) for p in weights))
        rows = min(max(rows, LAYER // widest), 16 * ROWS)
    check_support(model, guide, x, y, rows)
    with evaluating(model, guide, seed=seed, device=x.device):
        first = Target(model, guide, x[:4], None if y is None else y[:4], chunk_size=rows)
    fast = Compiled() if compile else None
    target = partial(Target, chunk_size=rows, sites=first.sites, fast=fast)
    size = min((chunk_size or 2 * ROWS) // DRAWS_AT_ONCE, NUMBERS // (1000 * first.dim))
    given: dict[str, Any] = {"size": max(1, size), "seed": seed, **options}
    return map_batches(partial(_on_target, estimate, target), model, guide, x, y, **given)


def _on_target(estimate: Callable[[Target], T], target: Callable[..., Target], *given: Any) -> T:
    return estimate(target(*given))


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
    if devices > 1:
        check_processes(devices, x.device.type)
        for program in (model, guide):
            if not isinstance(getattr(program, "__self__", program), nn.Module):
                raise ValueError(
                    "with several devices model and guide must be methods of a torch module, "
                    f"which takes their weights to the other processes; got {program!r}"
                )
    size = -(-len(x) // -(-len(x) // size))  # of as many batches, all alike
    if seed is None:
        with forked(x.device):  # the current state stays as it is
            seed = int(torch.randint(2**62, (), device=x.device))
    work = Work(estimate, model, guide, x, y, size, seed, title if progress else None)
    if devices == 1 or len(x) <= size:
        return work()
    store = pyro.get_param_store().get_state()
    first, *rest = work.split(devices)  # of which this process does the first
    indices = [i for i in range(devices) if i != (x.device.index or 0)]
    parts = [replace(part, store=store) for part in rest]
    results: list[T] = []
    found = in_processes(
        Work.__call__, parts, x.device.type, indices, lambda: results.extend(first())
    )
    return results + [result for part in found for result in part]


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
    store: Any = None  # the state of Pyro's store, for another process

    def __call__(self) -> list[T]:
        """The estimates."""
        batches = torch.arange(len(self.x), device=self.x.device).split(self.size)
        results = []
        keep_memory()
        if self.store is not None:
            pyro.get_param_store().set_state(self.store)
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
        split: list[Work[T]] = []
        for numbers in torch.arange(-(-len(self.x) // self.size)).tensor_split(parts):
            if len(numbers):
                first, rows = int(numbers[0]), numbers[[0, -1]] * self.size
                some = slice(int(rows[0]), int(rows[1]) + self.size)
                x, y = self.x[some].clone(), None if self.y is None else self.y[some].clone()
                title = None if split else self.title
                split.append(replace(self, x=x, y=y, number=first, title=title))
        return split


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The items, with a progress bar if asked for."""
    if not show:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description)
