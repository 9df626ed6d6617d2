"""Weights of objectives that change while a model trains."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from pyro_vae.arguments import check_choice, check_real, check_whole

Unit = Literal["step", "epoch"]


class Schedule(ABC):
    """A number as a function of the position in training.

    A weight of an objective takes one in place of a number: `ELBO(beta=Linear(length=1000))`.
    It depends on the position alone, so that a resumed training goes on exactly. See
    `Constant` for an example.

    Attributes:
        unit: What positions count: "step", updates of the parameters; or "epoch", passes over
            the data, where positions are fractions too.
    """

    unit: Unit

    @abstractmethod
    def __call__(self, position: float) -> float:
        """Returns the value at `position`, which is zero or more."""

    @property
    @abstractmethod
    def finish(self) -> float:
        """The position from which on the value no longer changes."""

    @property
    @abstractmethod
    def extremes(self) -> tuple[float, float]:
        """The least and the greatest value."""


FIELD_CHECKS: dict[str, Callable[..., None]] = {  # by field; any other field must be finite
    "length": partial(check_real, above=0),
    "delay": partial(check_real, 0),
    "cycles": check_whole,
    "rising": partial(check_real, above=0),
    "unit": partial(check_choice, ("step", "epoch")),
}


class CheckedSchedule(Schedule):
    """A schedule of `start` and `end`, or of one `value`, checked when it is made."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            what = f"{type(self).__name__}: {name}"
            FIELD_CHECKS.get(name, check_real)(**{what: value})
            if name == "rising" and value > 1:
                raise ValueError(f"{what} must be at most 1; got {value}")

    @property
    def extremes(self) -> tuple[float, float]:
        """The two ends, or the value twice."""
        ends = [v for name, v in vars(self).items() if name in ("start", "end", "value")]
        return min(ends), max(ends)


@dataclass(frozen=True)
class Constant(CheckedSchedule):
    """One value throughout.

    Args:
        value: The value.
        unit: "step" or "epoch", without effect.

    Raises:
        ValueError: If `value` is not finite.
    """

    value: float = 1.0
    unit: Unit = "step"

    def __call__(self, position: float) -> float:
        """Returns the value."""
        return self.value

    @property
    def finish(self) -> float:
        """Zero, for the value never moves."""
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Linear(CheckedSchedule):
    r"""A straight line from one value to another, such as a warm-up.

    .. math:: (1 - t) \, \mathrm{start} + t \, \mathrm{end}, \qquad
        t = \min(\max((\mathrm{position} - \mathrm{delay}) / \mathrm{length}, 0), 1)

    Args:
        length: Steps or epochs from one value to the other.
        start: First value, kept until `delay`.
        end: Last value, kept from then on.
        delay: Steps or epochs before the value begins to move.
        unit: "step" or "epoch".

    Raises:
        ValueError: If a number is not finite, `length` not positive, or `delay` negative.

    References:
        Bowman et al. Generating sentences from a continuous space. 2016.
    """

    length: float
    start: float = 0.0
    end: float = 1.0
    delay: float = 0.0
    unit: Unit = "step"

    def __call__(self, position: float) -> float:
        """Returns the value at `position`."""
        return _interpolate(self.start, self.end, (position - self.delay) / self.length)

    @property
    def finish(self) -> float:
        """delay + length."""
        return self.delay + self.length


@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    r"""Half a cosine wave from one value to another: slow at both ends.

    .. math:: (1 - c) \, \mathrm{start} + c \, \mathrm{end}, \qquad c = (1 - \cos \pi t) / 2,

    with t and the arguments as for `Linear`.
    """

    def __call__(self, position: float) -> float:
        """Returns the value at `position`."""
        t = min(max((position - self.delay) / self.length, 0.0), 1.0)
        return _interpolate(self.start, self.end, (1 - math.cos(math.pi * t)) / 2)


@dataclass(frozen=True, kw_only=True)
class Cyclical(CheckedSchedule):
    """Straight lines from one value to another, again and again; then the last value.

    Args:
        length: Steps or epochs of a cycle.
        start: Value at the start of each cycle.
        end: Value at its end.
        cycles: How many cycles.
        rising: Share of a cycle in which the value moves; it then stays at `end` until the next.
        unit: "step" or "epoch".

    Raises:
        ValueError: If a number is not finite, `length` not positive, `cycles` not a whole
            number of at least 1, or `rising` not in (0, 1].

    References:
        Fu et al. Cyclical annealing schedule: a simple approach to mitigating KL vanishing. 2019.
    """

    length: float
    start: float = 0.0
    end: float = 1.0
    cycles: int = 4
    rising: float = 0.5
    unit: Unit = "step"

    def __call__(self, position: float) -> float:
        """Returns the value at `position`."""
        if position >= self.finish:
            return self.end
        within = position % self.length / self.length
        return _interpolate(self.start, self.end, within / self.rising)

    @property
    def finish(self) -> float:
        """length * cycles."""
        return self.length * self.cycles


def _interpolate(start: float, end: float, t: float) -> float:
    """Returns the point at `t` of a line, exactly `start` up to 0 and `end` from 1 on."""
    t = min(max(t, 0.0), 1.0)
    return (1 - t) * start + t * end
