"""Runs estimators: on checked arguments, in batches, at each value of a discrete latent."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from operator import call
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.arguments import TakesVAE, as_rows, check_real, check_whole, programs
from pyro_vae.densities import (
    Densities,
    Program,
    check_values,
    densities,
    evaluating,
    log_weights,
    run_program,
    summed_values,
)
from pyro_vae.estimators.coordinates import is_discrete
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.target import CHUNK_ROWS, Compiler, Target
from pyro_vae.processes import check_processes, in_processes
from pyro_vae.runtime import (
    forked,
    is_small,
    keep_memory,
    process_lock,
    seed_generators,
    seed_of,
    threads,
)

DRAWS_AT_ONCE = 4  # draws of each datum of a batch that the model sees at once
STEP_ROWS = 100  # rows of a usual training step, by which `is_small` judges the model
WIDEST_LAYER = 2_000_000  # numbers in the widest layer at once: more do not fit into cache
MOST_COORDINATES = 8_000_000  # most coordinates of a thousand draws of a batch
TRIAL_DRAWS = 16  # draws of a datum; if all are impossible, the model excludes the datum
WHOLE_NUMBERS = ("budget", "chunk_size", "devices")  # arguments, besides names with num_
Values = dict[str, Tensor]
P = ParamSpec("P")
T = TypeVar("T")


def estimator(function: Callable[Concatenate[Program, Program, P], T]) -> TakesVAE[P, T]:
    """Lets a function of (model, guide, x, y, *, ...) be called as (vae, x, y, ...) too.

    x and y may be tensors, arrays, frames or lists; they and all numbers are checked. Pyro's
    own checks are on, whatever flags are set, so that impossible data are refused. These are
    flags of the process, so that other threads wait. Small modules on the CPU get one thread of
    torch.
    """
    signature = inspect.signature(function)

    @wraps(function)
    @torch.inference_mode(False)
    def checked(*args: Any, **options: Any) -> T:
        bound = signature.bind(*programs(args, options), **options)
        bound.apply_defaults()
        arguments = bound.arguments
        x = arguments["x"] = as_rows("x", arguments["x"], missing=True)  # the model may refuse NaN
        y = arguments["y"] = None if arguments["y"] is None else as_rows("y", arguments["y"])
        if y is not None and len(y) != len(x):
            raise ValueError(f"y must have a row for each of the {len(x)} of x; got {len(y)}")
        for name, value in arguments.items():
            if name.startswith("num_") or name in WHOLE_NUMBERS:
                optional = signature.parameters[name].default is None
                check_whole(optional=optional, **{name: value})
            elif name == "seed":
                check_whole(0, optional=True, seed=value)
            elif name == "tolerance":
                check_real(above=0, tolerance=value)
        parameters = parameters_of(arguments["model"], arguments["guide"])
        small = bool(parameters) and x.device.type == "cpu" and is_small(parameters, STEP_ROWS)
        with process_lock, pyro.validation_enabled(True), threads(1) if small else nullcontext():
            found = function(*bound.args, **bound.kwargs)
            if isinstance(found, Evidence):
                parts = arguments["model"], arguments["guide"], x, y
                return exact_without_data(found, *parts).of(x)  # type: ignore[return-value]
            return found

    return checked


def parameters_of(*programs: Any) -> list[Tensor]:
    """Returns the parameters of the modules whose methods the programs are."""
    modules = (getattr(program, "__self__", None) for program in programs)
    return [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]


def exact_without_data(
    evidence: Evidence, model: Program, guide: Program, x: Tensor, y: Tensor | None
) -> Evidence:
    """Returns the evidence with log p(x) = 0 exactly for data without an observed entry."""
    rows = x.isnan().unsqueeze(-1).flatten(1).all(1).nonzero()[:, 0]
    if not len(rows):
        return evidence
    with evaluating(model, guide, seed=0, device=x.device):
        d = densities(model, guide, x[rows], None if y is None else y[rows])
        if len(d.observed) > 1 and any(is_discrete(site.model) for site in d.sites.values()):
            return evidence  # one draw of a class does not tell whether a label is known
        each = (d.each or d).observed  # models may observe more than x, such as a label
        scores = torch.stack([each[name][0].log_prob(each[name][1]) for name in d.observed])
        rows = rows[(scores == 0).flatten(0, 1).all(0)].cpu()
    return evidence.known(rows, 0.0, "nothing observed")


def check_support(
    model: Program, guide: Program, x: Tensor, y: Tensor | None, chunk_size: int
) -> Densities:
    """Runs the programs once on all rows with Pyro's checks, to fail before hours of work.

    Returns:
        The densities of the last rows.

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
    chunk_size: int | None,
    compile: bool,
    devices: int,
    seed: int | None,
    progress: bool,
    title: str = "log p(x)",
) -> list[T]:
    """Returns the results of `estimate` on the `Target` of each batch, by `map_batches`.

    The programs see `chunk_size` rows at once. If that is None and all layers are narrow, they
    see as many more as the processor's cache holds, for then the calls take most of the time.
    """
    rows, parameters = chunk_size or 2 * CHUNK_ROWS, parameters_of(model, guide)
    if chunk_size is None and parameters and all(p.ndim <= 2 for p in parameters):
        widest = max(x[0].numel(), *(max(p.shape, default=1) for p in parameters))
        rows = min(max(rows, WIDEST_LAYER // widest), 16 * CHUNK_ROWS)
    check_support(model, guide, x, y, rows)
    with evaluating(model, guide, seed=seed, device=x.device):
        first = Target(model, guide, x[:4], None if y is None else y[:4], chunk_size=rows)
    compiler = Compiler() if compile else None
    target = partial(Target, chunk_size=rows, sites=first.sites, compiler=compiler)
    size = (chunk_size or 2 * CHUNK_ROWS) // DRAWS_AT_ONCE
    size = max(1, min(size, MOST_COORDINATES // (1000 * first.dim)))
    on_batch = partial(_estimate_target, estimate, target)
    return map_batches(on_batch, model, guide, x, y, size, devices, seed, progress, title)


def _estimate_target(
    estimate: Callable[[Target], T], target: Callable[..., Target], *args: Any
) -> T:
    return estimate(target(*args))


def map_batches(
    estimate: Callable[[Program, Program, Tensor, Tensor | None], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    size: int,
    devices: int,
    seed: int | None,
    progress: bool,
    title: str = "log p(x)",
) -> list[T]:
    """Returns the results of `estimate` on each batch of `size` data, in order.

    The noise of a batch depends on the seed and its number, not on the process that draws it.
    Modes, random state, parameters and Pyro's store are afterwards as they were.

    Raises:
        ValueError: If there are too few devices, or the programs cannot be sent to them.
    """
    if devices > 1:
        check_processes(devices, x.device.type)
        for program in (model, guide):
            if not isinstance(getattr(program, "__self__", program), nn.Module):
                raise ValueError(
                    "with several devices model and guide must be methods of a torch module, "
                    f"which takes their weights to the other processes; got {program!r}"
                )
    size = -(-len(x) // -(-len(x) // size))  # as many batches, of equal size
    if seed is None:
        with forked(x.device):  # the current state stays as it is
            seed = int(torch.randint(2**62, (), device=x.device))
    work = partial(_estimate_batches, estimate, model, guide, size=size, seed=seed)
    title = title if progress else ""
    if devices == 1 or len(x) <= size:
        return work(x, y, title=title)
    store = pyro.get_param_store().get_state()
    first, *rest = _split_batches(x, y, size, devices)  # this process does the first
    indices = [i for i in range(devices) if i != (x.device.index or 0)]
    parts = [partial(work, *share, store=store) for share in rest]
    results: list[T] = []
    meanwhile = partial(work, *first, title=title)
    found = in_processes(call, parts, x.device.type, indices, lambda: results.extend(meanwhile()))
    return results + [result for part in found for result in part]


def _split_batches(
    x: Tensor, y: Tensor | None, size: int, number: int
) -> list[tuple[Tensor, Tensor | None, int]]:
    """Splits data into at most `number` parts of whole batches, with each first batch's number."""
    shares = []
    for batches in torch.arange(-(-len(x) // size)).tensor_split(number):
        if len(batches):
            rows = slice(int(batches[0]) * size, (int(batches[-1]) + 1) * size)
            y_rows = None if y is None else y[rows].clone()
            shares.append((x[rows].clone(), y_rows, int(batches[0])))
    return shares


def _estimate_batches(
    estimate: Callable[[Program, Program, Tensor, Tensor | None], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    first: int = 0,
    *,
    size: int,
    seed: int,
    title: str = "",
    store: Any = None,
) -> list[T]:
    """Estimates batches of data, numbered from `first`, here or in another process."""
    results = []
    keep_memory()
    if store is not None:
        pyro.get_param_store().set_state(store)
    batches = torch.arange(len(x), device=x.device).split(size)
    with (
        pyro.validation_enabled(True),  # in other processes too
        evaluating(model, guide, seed=None, device=x.device),
    ):
        for number, rows in enumerate(track(batches, title, bool(title)), first):
            seed_generators(x.device, seed_of(seed % 2**64, number))
            results.append(estimate(model, guide, x[rows], None if y is None else y[rows]))
    return results


def summed(function: Callable[P, T]) -> Callable[P, T]:
    """Makes an estimator run at each value of the discrete latents that a model sums out.

    The results are then combined by the class method `mixed` of their class.
    """

    @wraps(function)
    def over_values(*inputs: Any, **options: Any) -> T:
        model, _, x, y = inputs
        values = summed_values(model, x, y)
        if not values:
            return function(*inputs, **options)
        parts = for_each_value(function, values, *inputs, **options)
        with forked(torch.device("cpu"), options["seed"]):
            mixed: T = type(parts[0]).mixed(parts)
        return mixed

    return over_values


class ProgramsAtValue(nn.Module):
    """A model and a guide with discrete latents fixed at one value, which the model observes."""

    def __init__(self, model: Program, guide: Program, values: Values) -> None:
        super().__init__()
        self.programs, self.values = (model, guide), values
        owners = {id(o): o for o in (getattr(p, "__self__", p) for p in self.programs)}
        self.owners = nn.ModuleList(o for o in owners.values() if isinstance(o, nn.Module))

    def model(self, *args: Any) -> Any:
        """Runs the model, which observes the value."""
        with ObserveValue(self.values, hidden=False):
            return self.programs[0](*args)

    def guide(self, *args: Any) -> Any:
        """Runs the guide, given the value."""
        with ObserveValue(self.values, hidden=True):
            return self.programs[1](*args)


class ObserveValue(Messenger):
    """Fixes sites at a value; handlers outside see them as observed, or if hidden not at all."""

    def __init__(self, values: Values, hidden: bool) -> None:
        super().__init__()
        self.values, self.hidden = values, hidden

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            value = self.values[msg["name"]]
            msg["value"] = value.expand(*msg["fn"].batch_shape, *value.shape)
            msg["is_observed"], msg["stop"] = True, self.hidden


def for_each_value(
    function: Callable[..., Any],
    values: Values,
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    seed: int | None,
    progress: bool = False,
    **options: Any,
) -> list[Any]:
    """Returns the results of an estimator at each joint value c, such as of log p(x, c).

    Data for which the model excludes a value, such as by a known label, are marked as excluded.
    `values` holds the joint values [C, *event] of each site; all else is for the estimator.
    """
    with evaluating(model, guide, seed=0, device=x.device):
        for rows in torch.arange(len(x), device=x.device).split(CHUNK_ROWS):
            args = x[rows], None if y is None else y[rows]
            nodes: Any = run_program(model, *args, 1).nodes
            check_values(model, *args, nodes)
    parts, count = [], len(next(iter(values.values())))
    for c in track(range(count), f"{count} values", progress):
        one = ProgramsAtValue(model, guide, {n: v[c] for n, v in values.items()})
        run = partial(function, seed=None if seed is None else seed + c, **options)
        parts.append(_run_where_possible(run, one.model, one.guide, x, y))
    possible = next((part for part in parts if part is not None), None)
    if possible is None:
        raise ValueError(f"the model excludes all data at every value of {sorted(values)}")
    return [
        possible.excluded(torch.arange(len(possible))) if part is None else part for part in parts
    ]


def _run_where_possible(
    run: Callable[..., Any], model: Program, guide: Program, x: Tensor, y: Tensor | None
) -> Any:
    """Runs an estimator on the data that the model does not exclude; None if there are none."""
    if y is None:
        return run(model=model, guide=guide, x=x, y=y)
    possible = _possible(model, guide, x, y)
    rows = possible.nonzero()[:, 0]
    if not len(rows):
        return None
    found = run(model=model, guide=guide, x=x[rows], y=y[rows])
    position = (possible.cumsum(0) - 1).clamp(min=0).cpu()
    return found.rows(position).excluded((~possible).nonzero()[:, 0].cpu())


def _possible(model: Program, guide: Program, x: Tensor, y: Tensor) -> Tensor:
    """Returns which data [N] the model does not exclude, such as by a known label."""
    with evaluating(model, guide, seed=0, device=x.device):
        run = partial(log_weights, num_particles=TRIAL_DRAWS, chunk_size=CHUNK_ROWS)
        pairs = zip(x.split(CHUNK_ROWS), y.split(CHUNK_ROWS))
        parts = [run(model, guide, *pair).amax(0) for pair in pairs]
    return torch.cat(parts) != -torch.inf  # NaN is not excluded: the estimator refuses it


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """Returns the items, with a progress bar if asked for."""
    if not show:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description)
