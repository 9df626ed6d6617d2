"""What every estimator is given: programs, rows and numbers, checked in one place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyro
from torch import Tensor

from pyro_vae.arguments import TakesVAE, as_rows, check_real, check_whole, programs
from pyro_vae.densities import Program, densities, evaluating, summed_values
from pyro_vae.estimators.classes import over_values
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.generators import alone

__all__ = ["estimator"]

SUMMED = {  # estimators of log p(x), whose results are summed over the values of a latent
    "importance_sampling",
    "refined_importance_sampling",
    "annealed_importance_sampling",
    "log_evidence",
}
REFUSED = {"audit", "bidirectional"}
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
        with alone, pyro.validation_enabled(True):
            found = _found(function, bound)
            if isinstance(found, Evidence) and "model" in given:
                parts = given["model"], given["guide"], x, given.get("y")
                return exact_without_data(found, *parts)  # type: ignore[return-value]
            return found

    return call


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
