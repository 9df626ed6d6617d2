"""How estimators are run: what they are given, for each value of discrete latents, in batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.arguments import TakesVAE, as_rows, check_real, check_whole, programs
from pyro_vae.densities import Program, densities, evaluating, log_weights, summed_values
from pyro_vae.estimators.coordinates import Coordinates
from pyro_vae.estimators.evidence import TENSORS, Evidence
from pyro_vae.estimators.target import ROWS, CompiledTarget, Target
from pyro_vae.generators import alone, forked, seed_generators
from pyro_vae.memory import keep_memory
from pyro_vae.processes import in_processes, is_small, threads

__all__ = [
    "check_support",
    "estimator",
    "for_each_value",
    "map_batches",
    "map_targets",
    "worst",
]

SUMMED = {  # estimators of log p(x), whose results are summed over the values of a latent
    "importance_sampling",
    "refined_importance_sampling",
    "annealed_importance_sampling",
    "log_evidence",
}
REFUSED = {"audit", "bidirectional", "column_log_prob", "impute"}
MATTERS = 1e-3  # posterior probability from which a value's verdict counts
VERDICTS = ["reliable", "lower bound", "doubtful"]  # from the best to the worst
DRAWS_AT_ONCE = 4  # draws of each datum that make up the rows that the model sees at once
STEP = 100  # rows of a usual step of training, by which models are small for `fit`, too
NUMBERS = 5_000_000  # coordinates of a thousand draws of a batch
Values = dict[str, Tensor]
P = ParamSpec("P")
T = TypeVar("T")


def estimator(function: Callable[Concatenate[Program, Program, P], T]) -> TakesVAE[P, T]:
    """Lets a function of (model, guide, x, y, *, ...) be called as (vae, x, y, ...) too.

    x and y may be tensors, arrays, frames or lists; they and the numbers are checked, by name.
    Pyro's own checks are on, whatever flags are set: a density of data that are impossible is no
    number to report. They are flags of the process, so that other threads wait.

    An estimator of log p(x) of a model with discrete latents to be summed out is run for each
    of their values.
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
            check_number(name, value, optional=signature.parameters[name].default is None)
        with alone, pyro.validation_enabled(True), few_threads(given, x):
            found = _found(function, bound)
            if isinstance(found, Evidence) and "model" in given:
                parts = given["model"], given["guide"], x, given.get("y")
                return exact_without_data(found, *parts).of(x)  # type: ignore[return-value]
            return found

    return call


def few_threads(programs: dict[str, Any], x: Tensor) -> AbstractContextManager[None]:
    """One thread of torch while an estimator works on a small module on the CPU."""
    modules = (getattr(programs.get(name), "__self__", None) for name in ("model", "guide"))
    weights = [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
    small = bool(weights) and x.device.type == "cpu" and is_small(weights, STEP)
    return threads(1) if small else nullcontext()


def _found(function: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    """What a function gives; an estimate of log p(x) for each value of summed latents, summed."""
    given = bound.arguments
    if function.__name__ not in SUMMED | REFUSED:
        return function(*bound.args, **bound.kwargs)
    values = summed_values(given["model"], given["x"], given.get("y"))
    if not values:
        return function(*bound.args, **bound.kwargs)
    if function.__name__ in REFUSED:
        raise ValueError(
            f"{function.__name__} takes no model with discrete latents to be summed out, here "
            f"{sorted(values)}: give it one at a value, by pyro.condition"
        )
    bound.apply_defaults()
    return over_values(function, bound.arguments, values)


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
    return evidence.known(rows, 0.0)


def check_number(name: str, value: Any, optional: bool) -> None:
    """Refuses a number of an estimator that cannot be one; what is none of its numbers passes."""
    if name.startswith("num_") or name in ("budget", "chunk_size", "devices"):
        check_whole(optional=optional, **{name: value})
    elif name == "seed":
        check_whole(0, optional=True, seed=value)
    elif name == "tolerance":
        check_real(above=0, tolerance=value)


class OneValue(nn.Module):
    """A model and a guide with discrete latents at one value, which the model observes."""

    def __init__(self, model: Program, guide: Program, values: Values) -> None:
        super().__init__()
        self.programs, self.values = (model, guide), values
        owners = {id(o): o for o in (getattr(p, "__self__", p) for p in self.programs)}
        self.owners = nn.ModuleList(o for o in owners.values() if isinstance(o, nn.Module))

    def model(self, *args: Any) -> Any:
        """The model, observing the value."""
        with At(self.values, hidden=False):
            return self.programs[0](*args)

    def guide(self, *args: Any) -> Any:
        """The guide, given the value."""
        with At(self.values, hidden=True):
            return self.programs[1](*args)


class At(Messenger):
    """Gives sites a value, and shows them to handlers outside as observed, or not at all."""

    def __init__(self, values: Values, hidden: bool) -> None:
        super().__init__()
        self.values, self.hidden = values, hidden

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = value.expand(*msg["fn"].batch_shape, *value.shape)
            msg["is_observed"], msg["stop"] = True, self.hidden


def over_values(
    function: Callable[..., Evidence], given: dict[str, Any], values: Values
) -> Evidence:
    """Evidence with discrete latents summed out: log p(x) is the logsumexp of log p(x, c).

    The standard error is by the delta method; k-hat and verdict are the worst of the values of
    posterior probability above 0.001.
    """
    parts = for_each_value(function, given, values)
    joint = torch.stack([part.log_prob for part in parts])
    total = joint.logsumexp(0)
    share = (joint - total).exp()
    stderr, ess, khat = (torch.stack([getattr(p, n) for p in parts]) for n in TENSORS[1:4])
    best = share.argmax(0).tolist()
    return Evidence(
        log_prob=total,
        stderr=(share * stderr).square().sum(0).sqrt(),
        ess=1 / (share.square() / ess).sum(0),
        khat=khat.masked_fill(share <= MATTERS, -torch.inf).amax(0),
        num_samples=torch.stack([part.num_samples for part in parts]).sum(0),
        method=[f"{parts[c].method[n]}, sum of {len(parts)}" for n, c in enumerate(best)],
        verdict=worst(parts, share),
        audit=_audits([part.audit for part in parts if part.audit]),
    )


def for_each_value(
    function: Callable[..., Evidence], given: dict[str, Any], values: Values
) -> list[Evidence]:
    """Evidence of log p(x, c) for each joint value c; -inf where the model excludes it.

    Args:
        function: An estimator.
        given: Its arguments, by name.
        values: Joint values [C, *event] of each site.
    """
    parts, count = [], len(next(iter(values.values())))
    for c in track(range(count), f"{count} values", bool(given.get("progress"))):
        one = OneValue(given["model"], given["guide"], {n: v[c] for n, v in values.items()})
        seed = given.get("seed")
        own = {"model": one.model, "guide": one.guide, "seed": None if seed is None else seed + c}
        quiet = {"progress": False} if "progress" in given else {}
        parts.append(_where_possible(function, given | own | quiet))
    return parts


def _where_possible(function: Callable[..., Evidence], given: dict[str, Any]) -> Evidence:
    x, y, N = given["x"], given.get("y"), len(given["x"])
    rows = torch.arange(N, device=x.device)
    if y is not None:
        rows = rows[_possible(given["model"], given["guide"], x, y)]
    impossible = torch.full((N,), -torch.inf, dtype=torch.float64)
    nothing = Evidence(
        log_prob=impossible,
        stderr=torch.zeros_like(impossible),
        ess=torch.ones_like(impossible),
        khat=impossible,
        num_samples=torch.zeros(N, dtype=torch.long),
        method=["excluded by the model"] * N,
        verdict=["reliable"] * N,
    )
    if not len(rows):
        return nothing
    found = function(**given | {"x": x[rows], "y": None if y is None else y[rows]})
    where = torch.full((N,), N)
    where[rows.cpu()] = torch.arange(len(rows))
    both = Evidence.cat([found, nothing])
    chosen = both.rows(torch.where(where < N, where, len(rows) + torch.arange(N)))
    return replace(chosen, audit=found.audit)


def _possible(model: Program, guide: Program, x: Tensor, y: Tensor) -> Tensor:
    """Data [N] that the model does not exclude, such as by a known label."""
    with evaluating(model, guide, seed=0, device=x.device):
        parts = [
            log_weights(model, guide, *pair, num_particles=1, chunk_size=len(pair[0]))[0]
            for pair in zip(x.split(1000), y.split(1000))
        ]
    return torch.cat(parts) > -torch.inf


def _audits(found: list[str]) -> str:
    """One line of the audits of all values: how many there are, and one that failed if any did."""
    if len(set(found)) < 2:
        return "".join(found[:1])
    failed = [audit for audit in found if audit.startswith("FAILED")]
    return f"{(failed or found)[0]} ({len(failed)} of {len(found)} values failed)"


def worst(parts: list[Evidence], share: Tensor) -> list[str]:
    """The worst verdict of each datum among the values that matter."""
    ranks = torch.tensor([[VERDICTS.index(v) for v in part.verdict] for part in parts])
    return [VERDICTS[i] for i in ranks.masked_fill(share <= MATTERS, 0).amax(0).tolist()]


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
