"""Runs programs with K particles: together in a plate, or folded into the rows of the data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.densities.programs import (
    Latents,
    Program,
    Sites,
    evaluating,
    is_random,
    sample_sites,
)

__all__ = ["folds", "listed_values", "trial_result", "run_program"]

BatchedRun = Callable[..., poutine.Trace]  # `run_program` with its program and data bound

TRIAL_PARTICLES = 3  # particles in a trial run of a program
SMALL = 0.01  # a layer of smaller weights lets too little through to show in densities
TOLERANCE = 1e-3  # on log densities: matrix products of another size round differently


def run_program(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    handler: AbstractContextManager[Any] | None = None,
    *,
    fold: bool | None = None,
) -> poutine.Trace:
    """Returns the trace of a program run with K particles; its sites have batch shape [K, B].

    A program that broadcasts sees the data once, and latents with a leading dimension of
    particles. Any other program is folded: it sees K * B rows as if there were so many data.

    Args:
        program: A model or a guide.
        x: Data [B, *E].
        y: Condition of each datum [B, C], or None.
        num_particles: Particles K.
        handler: Sets the values of sites, such as `poutine.condition(data=...)`.
        fold: Whether to fold; None to find out by trial runs, once for each program.

    Raises:
        ValueError: If the program can run with several particles in neither way.
    """
    K = num_particles
    fold = folds(program, x, y, K) if fold is None else fold
    args = [part for part in (x, y) if part is not None]
    if fold:
        args = [part.expand(K, *part.shape).flatten(0, 1) for part in args]
    particles = ParticlePlate("particles", K, dim=-2)
    with handler or nullcontext(), particles, poutine.trace() as tracer:
        with Fold(K) if fold else nullcontext():
            program(*args)
    return tracer.trace


def folds(program: Program, x: Tensor, y: Tensor | None, num_particles: int = 1) -> bool:
    """Returns whether a program must be folded to run with several particles.

    Raises:
        ValueError: If the program can run with several particles in neither way.
    """
    answer = trial_result(program, x, y).fold
    if not isinstance(answer, str) or num_particles == 1:
        return bool(answer)
    raise ValueError(
        f"{getattr(program, '__qualname__', program)} runs with one particle alone, neither with "
        f"latents [particles, data, *event] nor on the rows of x repeated ({answer}): let its "
        "plate be of size len(x), and its operations act on the last dimensions, as "
        "torch.cat([z, y.expand(*z.shape[:-1], -1)], -1)"
    )


class TrialResult(NamedTuple):
    """What trial runs on one row and on two rows have shown about a program.

    Attributes:
        fold: Whether the program must be folded; a message if folding fails too; None if it could
            not be tried.
        latents: For each latent site, its values [C, *event] if it is to be summed out, else None.
    """

    fold: bool | str | None = None
    latents: dict[str, Tensor | None] = {}


_trial_results: WeakKeyDictionary[Any, dict[Any, TrialResult]] = WeakKeyDictionary()


def trial_result(program: Program, x: Tensor, y: Tensor | None) -> TrialResult:
    """Returns what is known of a program, found out once and kept while its owner lives.

    Nothing can be tried on an `x` that is being traced: a program not tried before then counts
    as one that broadcasts.
    """
    owner, method = getattr(program, "__self__", program), getattr(program, "__func__", None)
    key = method, y is None, x.dtype, x.device
    try:
        cached = _trial_results.setdefault(owner, {})
    except TypeError:  # the owner takes no weak references: the program is tried at each call
        cached = {}
    if key in cached:
        return cached[key]
    traced = type(x) not in (Tensor, nn.Parameter)  # a stand-in without numbers to try
    result = TrialResult() if traced else _try_program(program, x, y)
    if result.fold is not None:
        cached[key] = result
    return result


def _try_program(program: Program, x: Tensor, y: Tensor | None) -> TrialResult:
    """Tries a program on the first rows; its errors are ignored, for the real run raises them.

    Where a layer starts at zero, densities do not show what those before it do to latents. Such a
    program is folded, if it can be.
    """
    fold: bool | str | None = None
    latents: Sites = {}
    hiding: list[nn.Module] = []  # layers of weights near zero

    def look(module: nn.Module, _: Any) -> None:
        weight: Any = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and bool((weight.abs() < SMALL).all()):
            hiding.append(module)

    evaluation = evaluating(program, seed=None, device=x.device)
    with poutine.block(), evaluation, register_module_forward_pre_hook(look):
        for num_rows in (1, 2):
            rows = torch.arange(num_rows, device=x.device) % len(x)
            run = partial(run_program, program, x[rows], None if y is None else y[rows])
            try:
                singles = [
                    sample_sites(run(1, fold=True), "program") for _ in range(TRIAL_PARTICLES)
                ]
                latents = {n: s for n, s in singles[0].items() if not s["is_observed"]}
                draws = _cat([{n: sites[n]["value"] for n in latents} for sites in singles])
                expected = _cat([_log_probs(sites) for sites in singles])
            except Exception:
                fold = None
                break
            fold = bool(_batched_error(run, draws, expected, fold=False))
            if fold or hiding:
                error = _batched_error(run, draws, expected, fold=True)
                fold = not error or (fold and error)
            if fold:
                break
    return TrialResult(fold, {n: listed_values(n, s) for n, s in latents.items()})


def listed_values(name: str, site: dict[str, Any]) -> Tensor | None:
    """Returns the values [C, *event] of a site with `infer={"enumerate": "parallel"}`, else None.

    Raises:
        ValueError: If the site cannot list its values.
    """
    fn = site["fn"]
    if site["infer"].get("enumerate") != "parallel":
        return None
    try:
        support = fn.enumerate_support(expand=False).detach()
    except NotImplementedError:
        raise ValueError(
            f"site {name!r} cannot be summed out, for {type(fn).__name__} has no list of values: "
            "leave infer={'enumerate': 'parallel'} out, or give Categorical, Bernoulli or "
            "Binomial, of one total for all rows"
        ) from None
    return support.reshape(len(support), *fn.event_shape)


def _batched_error(run: BatchedRun, latents: Latents, expected: Latents, *, fold: bool) -> str:
    """Returns what is wrong with a run of all particles together; empty if nothing."""
    try:
        trace = run(TRIAL_PARTICLES, poutine.condition(data=latents), fold=fold)
        batched = _log_probs(sample_sites(trace, "program"))
        same = [
            log_prob.shape == batched[name].shape
            and torch.allclose(batched[name], log_prob, TOLERANCE, TOLERANCE, equal_nan=True)
            for name, log_prob in expected.items()
        ]
    except Exception as error:
        return " ".join(str(error).splitlines()[:1]) or type(error).__name__
    return "" if all(same) else "which changes the densities"


def _cat(parts: list[Latents]) -> Latents:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _log_probs(sites: Sites) -> Latents:
    """Returns the log density of each site, leaving out those that can score only own draws."""
    log_probs = {}
    for name, site in sites.items():
        try:  # a copy, for a flow returns the density that it kept for its own draw
            log_probs[name] = site["fn"].log_prob(site["value"].clone())
        except (KeyError, NotImplementedError):
            continue
    return log_probs


class ParticlePlate(IndepMessenger):
    """The plate of particles, outside the plate "data": a `pyro.plate` without subsampling."""

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        fn = msg["fn"]
        if isinstance(fn, TorchDistributionMixin) and fn.batch_shape[:-1] != (self.size,):
            msg["infer"]["constant"] = fn  # the distribution is the same for every particle
            BroadcastMessenger._pyro_sample(msg)


class Fold(Messenger):
    """Lets a program see K * B rows, and the handlers outside it K particles of B data."""

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.num_particles = num_particles

    def _pyro_sample(self, msg: Any) -> None:
        K, fn = self.num_particles, msg["fn"]
        if K > 1 and site_is_subsample(msg):
            msg["stop"] = True  # handlers outside must not see a subsample of K * B rows
        if not (is_random(msg) and msg["cond_indep_stack"]):
            return
        if msg["value"] is not None:
            shape = torch.broadcast_shapes(msg["value"].shape, fn.shape())
            msg["value"] = msg["value"].expand(shape).unflatten(0, (K, -1))
        if K > 1:
            frames = msg["cond_indep_stack"]
            if subsampled := [frame.name for frame in frames if frame.size != frame.full_size]:
                raise ValueError(f"the plate {subsampled[0]!r} is subsampled")
            rows = [frame.size // K for frame in frames]
            msg["fn"] = _unfolded(fn, K)
            msg["cond_indep_stack"] = tuple(
                frame._replace(size=size, full_size=size) for frame, size in zip(frames, rows)
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_random(msg) and msg["cond_indep_stack"]:
            msg["value"] = msg["value"].flatten(0, 1)


def _unfolded(fn: Any, num_particles: int) -> dist.TorchDistribution:
    """Returns `fn`, of batch [K * B], with batch [K, B]; a Normal stays Normal, for its KL."""
    base = fn.base_dist if type(fn) is dist.Independent else fn
    if type(base) is not dist.Normal:
        return Unfolded(fn, num_particles)
    loc, scale = (p.unflatten(0, (num_particles, -1)) for p in (base.loc, base.scale))
    return dist.Normal(loc, scale).to_event(len(fn.event_shape))


class Unfolded(dist.TorchDistribution):
    """Wraps any distribution of batch [K * B] into one of batch [K, B]."""

    arg_constraints = {}

    def __init__(self, base: Any, num_particles: int) -> None:
        rows = base.batch_shape.numel() // num_particles
        super().__init__(Size([num_particles, rows]), base.event_shape)
        self.base_dist, self.has_rsample = base, base.has_rsample
        self.drawn: tuple[Tensor | None, Tensor | None] = None, None  # the last draw and its rows

    @property
    def support(self) -> Any:
        return self.base_dist.support

    def enumerate_support(self, expand: bool = True) -> Tensor:
        return self.base_dist.enumerate_support(expand=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        rows = self.base_dist(sample_shape)
        value = rows.unflatten(len(sample_shape), self.batch_shape)
        self.drawn = value, rows
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        drawn, rows = self.drawn
        if value is not drawn or rows is None:
            dim = -len(self.event_shape) - 1
            shape = torch.broadcast_shapes(value.shape, self.shape())
            rows = value.expand(shape).flatten(dim - 1, dim)
        return self.base_dist.log_prob(rows).unflatten(-1, self.batch_shape)
