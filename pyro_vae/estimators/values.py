"""Estimators of models with discrete latents: run for each of their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.densities import Program, evaluating, log_weights, summed_values
from pyro_vae.estimators.run import track
from pyro_vae.estimators.target import ROWS
from pyro_vae.runtime import forked

__all__ = ["for_each_value", "refuse_summed", "summed"]

TRIED = 16  # draws of a datum that all must be impossible, for the model to exclude it
Values = dict[str, Tensor]
P = ParamSpec("P")
T = TypeVar("T")


def summed(function: Callable[P, T]) -> Callable[P, T]:
    """An estimator run for each value of the discrete latents that a model asks to sum out.

    What it gives at each value is mixed, by the method `mixed` of the result.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> T:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        values = summed_values(given["model"], given["x"], given["y"])
        if not values:
            return function(*args, **options)
        parts = for_each_value(function, given, values)
        with forked(torch.device("cpu"), given["seed"]):
            mixed: T = type(parts[0]).mixed(parts)
        return mixed

    return call


def refuse_summed(name: str, model: Program, x: Tensor, y: Tensor | None) -> None:
    """Refuses a model with discrete latents to be summed out, for the estimator of that name."""
    if values := summed_values(model, x, y):
        raise ValueError(
            f"{name} takes no model with discrete latents to be summed out, here "
            f"{sorted(values)}: give it one at a value, by pyro.condition"
        )


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


def for_each_value(
    function: Callable[..., Any], given: dict[str, Any], values: Values
) -> list[Any]:
    """Evidence of log p(x, c) for each joint value c, or imputations given it.

    Data for which the model excludes a value, such as by a known label, are marked so.

    Args:
        function: An estimator.
        given: Its arguments, by name.
        values: Joint values [C, *event] of each site.
    """
    parts, count = [], len(next(iter(values.values())))
    quiet = {"progress": False} if "progress" in given else {}
    for c in track(range(count), f"{count} values", bool(given.get("progress"))):
        one = OneValue(given["model"], given["guide"], {n: v[c] for n, v in values.items()})
        seed = None if given.get("seed") is None else given["seed"] + c
        own = {"model": one.model, "guide": one.guide, "seed": seed}
        parts.append(_where_possible(function, given | own | quiet))
    some = next((part for part in parts if part is not None), None)
    if some is None:
        raise ValueError(f"the model excludes all data at every value of {sorted(values)}")
    return [some.excluded(torch.arange(len(some))) if part is None else part for part in parts]


def _where_possible(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Results of all data, found of those that the model does not exclude; None if it does all."""
    x, y = given["x"], given.get("y")
    if y is None:
        return function(**given)
    possible = _possible(given["model"], given["guide"], x, y)
    rows = possible.nonzero()[:, 0]
    if not len(rows):
        return None
    found = function(**given | {"x": x[rows], "y": y[rows]})
    place = (possible.cumsum(0) - 1).clamp(min=0).cpu()
    return found.rows(place).excluded((~possible).nonzero()[:, 0].cpu())


def _possible(model: Program, guide: Program, x: Tensor, y: Tensor) -> Tensor:
    """Data [N] that the model does not exclude, such as by a known label."""
    with evaluating(model, guide, seed=0, device=x.device):
        parts = [
            log_weights(model, guide, *pair, num_particles=TRIED, chunk_size=ROWS).amax(0)
            for pair in zip(x.split(ROWS), y.split(ROWS))
        ]
    return torch.cat(parts) != -torch.inf  # what is NaN is not excluded: the estimator refuses it
