"""One way to run a program with K particles, whether or not it takes a dimension for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Size, Tensor

from pyro_vae.densities.evaluating import evaluating
from pyro_vae.densities.programs import (
    ParticlePlate,
    Program,
    is_random,
    is_traced,
    known_of,
    program_args,
    sample_sites,
)
from pyro_vae.densities.result import Latents

__all__ = ["folds", "run_program"]

TRIED = 3  # particles
TOLERANCE = 1e-3  # of log densities: products of other sizes are rounded otherwise
Run = Callable[..., poutine.Trace]  # `run_program` of a program and data


def run_program(
    program: Program,
    x: Tensor,
    y: Tensor | None,
    num_particles: int,
    handler: AbstractContextManager[Any] | None = None,
    *,
    fold: bool | None = None,
) -> poutine.Trace:
    """The trace of a program, the values and distributions of its sites [K, B].

    A program that broadcasts sees the data once, and latents with a leading dimension of
    particles. Any other is folded: it sees K * B rows as though there were so many data.

    Args:
        program: A model or a guide.
        x: Data [B, *E].
        y: What is conditioned on [B, C], or None.
        num_particles: Particles K.
        handler: Gives sites their values, such as `poutine.condition(data=...)`.
        fold: Whether to fold; None to find out, once for each program.

    Raises:
        ValueError: If several particles can be run in neither way.
    """
    if fold is None:
        fold = folds(program, x, y, num_particles)
    args = program_args(x, y)
    particles = ParticlePlate("particles", num_particles, dim=-2)
    with handler or nullcontext(), particles, poutine.trace() as tracer:
        if fold:
            with Fold(num_particles):
                program(*(part.expand(num_particles, *part.shape).flatten(0, 1) for part in args))
        else:
            program(*args)
    return tracer.trace


def folds(program: Program, x: Tensor, y: Tensor | None, num_particles: int = 1) -> bool:
    """Whether a program must be folded, found out from a few runs on one row and on two.

    What is traced must have been tried before; else it counts as a program that broadcasts.

    Raises:
        ValueError: If several particles can be run in neither way.
    """
    known, key = known_of(program), ("folds", y is None)
    if key not in known:
        found = None if is_traced(x) else _try(program, x, y)
        if found is None:
            return False
        known[key] = found
    answer = known[key]
    if isinstance(answer, bool) or num_particles == 1:
        return bool(answer)
    raise ValueError(
        f"{getattr(program, '__qualname__', program)} runs with one particle alone, neither with "
        f"latents [particles, data, *event] nor on the rows of x repeated ({answer}): let its "
        "plate be of size len(x), and its operations act on the last dimensions, as "
        "torch.cat([z, y.expand(*z.shape[:-1], -1)], -1)"
    )


def _try(program: Program, x: Tensor, y: Tensor | None) -> bool | str | None:
    """Whether a program must be folded; what is wrong, if that is not right either.

    None where it cannot be run on these data, which the run itself will show: others may do.
    """
    no_cast = torch.autocast(x.device.type, enabled=False)
    with poutine.block(), evaluating(program, seed=None, device=x.device), no_cast:
        for num_rows in (1, 2):
            rows = torch.arange(num_rows, device=x.device) % len(x)
            run = partial(run_program, program, x[rows], None if y is None else y[rows])
            try:
                alone = [sample_sites(run(1, fold=True), "program") for _ in range(TRIED)]
                draws = [
                    {n: site["value"] for n, site in sites.items() if not site["is_observed"]}
                    for sites in alone
                ]
                truth = _stacked([_scores(run, 1, z, fold=True) for z in draws])
            except Exception:
                return None
            if _fault(run, _stacked(draws), truth, fold=False):
                return _fault(run, _stacked(draws), truth, fold=True) or True
    return False


def _fault(run: Run, latents: Latents, truth: Latents, *, fold: bool) -> str:
    """What is wrong with a run of all particles together; empty if nothing."""
    try:
        together = _scores(run, TRIED, latents, fold=fold)
        same = [
            score.shape == together[name].shape
            and torch.allclose(together[name], score, TOLERANCE, TOLERANCE, equal_nan=True)
            for name, score in truth.items()
        ]
    except Exception as error:
        return " ".join(str(error).splitlines()[:1]) or type(error).__name__
    return "" if all(same) else "which changes the densities"


def _stacked(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _scores(run: Run, num_particles: int, latents: Latents, *, fold: bool) -> dict[str, Tensor]:
    """Log density of each site, but of those that can score nothing but their own draws."""
    trace = run(num_particles, poutine.condition(data=latents), fold=fold)
    scores = {}
    for name, site in sample_sites(trace, "program").items():
        try:
            scores[name] = site["fn"].log_prob(site["value"])
        except (KeyError, NotImplementedError):
            continue
    return scores


class Fold(Messenger):
    """Shows a program K * B rows, and the handlers outside it K particles of B data.

    Args:
        num_particles: K. With one, the program sees the data as they are.
    """

    def __init__(self, num_particles: int) -> None:
        super().__init__()
        self.num_particles = num_particles

    def _pyro_sample(self, msg: Any) -> None:
        K, fn = self.num_particles, msg["fn"]
        if K > 1 and site_is_subsample(msg):
            msg["stop"] = True  # its rows are not those of a program that broadcasts
        if not (is_random(msg) and msg["cond_indep_stack"]):
            return
        if msg["value"] is not None:
            shape = torch.broadcast_shapes(msg["value"].shape, fn.shape())
            msg["value"] = msg["value"].expand(shape).unflatten(0, (K, -1))
        if K > 1:
            frames = msg["cond_indep_stack"]
            if cut := [frame.name for frame in frames if frame.size != frame.full_size]:
                raise ValueError(f"the plate {cut[0]!r} is subsampled")
            rows = [frame.size // K for frame in frames]
            msg["fn"] = _unfolded(fn, K)
            msg["cond_indep_stack"] = tuple(
                frame._replace(size=size, full_size=size) for frame, size in zip(frames, rows)
            )

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_random(msg) and msg["cond_indep_stack"]:
            msg["value"] = msg["value"].flatten(0, 1)


def _unfolded(fn: Any, num_particles: int) -> dist.TorchDistribution:
    """A distribution of batch [K * B] as one of batch [K, B]: a Normal stays one, for its KL."""
    base = fn.base_dist if type(fn) is dist.Independent else fn
    if type(base) is not dist.Normal:
        return Unfolded(fn, num_particles)
    loc, scale = (p.unflatten(0, (num_particles, -1)) for p in (base.loc, base.scale))
    return dist.Normal(loc, scale).to_event(len(fn.event_shape))


class Unfolded(dist.TorchDistribution):
    """Any distribution of batch [K * B], with batch [K, B]."""

    arg_constraints = {}

    def __init__(self, base: Any, num_particles: int) -> None:
        rows = base.batch_shape.numel() // num_particles
        super().__init__(Size([num_particles, rows]), base.event_shape, validate_args=False)
        self.base_dist, self.has_rsample = base, base.has_rsample
        self.drawn: tuple[Tensor | None, Tensor | None] = None, None  # flows know their own draw

    @property
    def support(self) -> Any:
        return self.base_dist.support

    @property
    def mean(self) -> Tensor:
        return self.base_dist.mean.unflatten(0, self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._draw(self.base_dist.rsample(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._draw(self.base_dist.sample(sample_shape))

    def _draw(self, rows: Tensor) -> Tensor:
        dim = rows.ndim - len(self.event_shape) - 1
        value = rows.unflatten(dim, self.batch_shape)
        self.drawn = value, rows
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        drawn, rows = self.drawn
        if value is not drawn or rows is None:
            dim = -len(self.event_shape) - 1
            shape = torch.broadcast_shapes(value.shape, self.shape())
            rows = value.expand(shape).flatten(dim - 1, dim)
        return self.base_dist.log_prob(rows).unflatten(-1, self.batch_shape)
