"""What every objective shares: the interface to SVI and to torch's optimisers."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import pyro.infer
import torch
from torch import Tensor, nn

from pyro_vae.arguments import check_choice, check_whole
from pyro_vae.densities import (
    KL_RULES,
    Densities,
    OwnParameters,
    Program,
    Site,
    registered_densities,
)
from pyro_vae.objectives.schedules import Schedule

AverageGradients = Callable[[Sequence[nn.Parameter]], Any]
TAKE_SEVERAL_SITES = (
    *("ELBO", "Capacity", "FreeBits", "StickingTheLanding", "IWAE", "DReG", "CIWAE", "MIWAE"),
    *("PIWAE", "Renyi"),
)
REFUSE_DRAWS_PER_VALUE = ("StickingTheLanding", "PIWAE")  # where a latent is summed out


class Objective(pyro.infer.ELBO, nn.Module):
    """An objective to maximise: one value per datum, in nats.

    `bound` is the reported value; `surrogate` is what is differentiated, where the two differ.
    Both see only `Densities`, so that they work with every model and guide
    whose sites are inside the plate "data". Its weights are declared by `add_weight`: numbers,
    or schedules that move them. See `ELBO` for an example.

    An objective is the loss of `pyro.infer.SVI`, or gives a torch optimiser its
    `differentiable_loss`; a loss is minus the bound, summed over the batch, times the
    subsampling of the plate "data".

    Args:
        num_particles: Draws of z for each datum, K; the guide runs once for all.
        kl: Rule of `total_kl`: "analytic", "sampled", or "auto", analytic where there is a rule
            for the pair.
    """

    batch_level = False  # True if the value of a datum depends on the rest of its batch
    own_step = False  # True if `start` and `after_step` do something: a loop must call them

    def __init__(self, num_particles: int = 1, kl: str = "auto") -> None:
        nn.Module.__init__(self)
        check_whole(num_particles=num_particles)
        check_choice(KL_RULES, kl=kl)
        self.kl = kl
        pyro.infer.ELBO.__init__(self, num_particles=num_particles)
        self.schedules: dict[str, Schedule] = {}
        self.steps_per_epoch: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The constructor's arguments, read from attributes of these names; schedules as such."""
        names = inspect.signature(type(self)).parameters
        return {n: getattr(self, n) for n in names if hasattr(self, n)} | self.schedules

    def extra_repr(self) -> str:
        """Returns the options, as one would write them."""
        plain = {n: v.tolist() if isinstance(v, Tensor) else v for n, v in self.options.items()}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items())

    @abstractmethod
    def bound(self, d: Densities) -> Tensor:
        """Returns the reported value of each datum [B], in nats; larger is better."""

    def surrogate(self, d: Densities) -> Tensor:
        """Returns what is differentiated [B]: the bound, unless a subclass overrides this."""
        return self.bound(d)

    def total_kl(self, d: Densities) -> Tensor:
        """Returns KL(q || p) of all sites together [B], in nats."""
        first, *others = d.kl(self.kl).values()
        return sum(others, first)

    def add_weight(
        self, name: str, value: float | Schedule, least: float = 0.0, most: float = math.inf
    ) -> Tensor:
        """Registers a weight: a float64 buffer `name`, which `at` moves if `value` is a schedule.

        Raises:
            ValueError: If `value` is no number or schedule, not finite, or outside [least, most].
        """
        if isinstance(value, bool) or not isinstance(value, Real | Schedule):
            raise ValueError(
                f"{name} must be a number or a schedule, such as Linear(length=1000); "
                f"got {value!r}"
            )
        low, high = value.extremes if isinstance(value, Schedule) else (value, value)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite; got {value}")
        if low < least or high > most:
            interval = "zero or more" if least == 0 else f"{least:g} or more"
            interval = interval if most == math.inf else f"from {least:g} to {most:g}"
            raise ValueError(f"{name} must be {interval}; got {value}")
        if isinstance(value, Schedule):
            self.schedules[name] = value
            value = value(0)
        self.register_buffer(name, torch.tensor(float(value), dtype=torch.float64))
        return self.get_buffer(name)

    def prepare(self, num_data: int, steps_per_epoch: int) -> None:
        """Sets the size of the training data; `fit` calls it before the first step.

        Args:
            num_data: Rows N that training visits.
            steps_per_epoch: Steps of one pass over them, the unit of schedules that count epochs.
        """
        self.steps_per_epoch = steps_per_epoch

    def at(self, step: int) -> None:
        """Sets the weights that have a schedule to their values at optimisation step `step`.

        `fit` calls it before each step, and a loop around SVI may do so too; losses do not.

        Raises:
            ValueError: If a schedule counts epochs and `prepare` has not been called.
        """
        for name, schedule in self.schedules.items():
            getattr(self, name).fill_(schedule(self._position(name, schedule, step)))

    def unsettled(self, step: int) -> list[str]:
        """Returns the names of weights that still move at or after optimisation step `step`."""
        return [
            name
            for name, schedule in self.schedules.items()
            if self._position(name, schedule, step) < schedule.finish
        ]

    def _position(self, name: str, schedule: Schedule, step: int) -> float:
        if schedule.unit == "step" or step == 0:
            return step
        if self.steps_per_epoch is None:
            raise ValueError(
                f"the schedule of {name} counts epochs, of unknown length: call "
                "prepare(num_data, steps_per_epoch) first, or use unit='step'"
            )
        return step / self.steps_per_epoch

    def start(self, d: Densities) -> None:
        """Creates what the objective itself trains; `fit` calls it before the first step.

        Args:
            d: Densities of a few training rows, for their sizes.
        """

    def after_step(self, d: Densities, average: AverageGradients | None = None) -> None:
        """Trains what the objective itself trains; `fit` calls it after each step of the model.

        Args:
            d: The densities of that step, from before it changed the parameters.
            average: Function that averages gradients of parameters over several devices, in place.
        """

    def reduce(self, d: Densities) -> Tensor:
        """Returns the loss of a batch: minus the bound, with the gradient of minus `surrogate`."""
        self._check(d)
        surrogate = self.surrogate(d)
        if d.label_term is not None:  # it moves the parameters, but not the reported number
            surrogate = surrogate + (d.label_term - d.label_term.detach())
        if type(self).surrogate is Objective.surrogate:
            return surrogate.sum() * -d.scale
        return (self.bound(d).detach() + surrogate - surrogate.detach()).sum() * -d.scale

    def loss(self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None) -> float:
        """Returns the loss, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, x, y).item()

    def differentiable_loss(
        self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Returns the loss, for a torch optimiser; Pyro's parameter store is left alone."""
        with OwnParameters():
            d = registered_densities(model, guide, x, y, num_particles=self.num_particles)
            return self.reduce(d)

    def loss_and_grads(
        self, model: Program, guide: Program, x: Tensor, y: Tensor | None = None
    ) -> float:
        """Adds the gradients of the loss to the parameters and returns it: what SVI calls."""
        if self.own_step:
            raise ValueError(
                f"{type(self).__name__} needs a second player, which pyro.infer.SVI does not "
                "train: use fit(), or a loop that calls after_step() too"
            )
        d = registered_densities(model, guide, x, y, num_particles=self.num_particles)
        loss = self.reduce(d)
        loss.backward()
        return loss.item()

    def _check(self, d: Densities) -> None:
        """Raises a ValueError if a site is scaled, or drawn without a gradient."""
        for name, scale in d.site_scales:
            if isinstance(scale, Tensor) or not math.isclose(scale, d.scale, rel_tol=1e-9):
                raise ValueError(
                    f"site {name!r} is scaled by {scale} inside the program; weights belong to "
                    "the objective: remove the scale and use, for example, ELBO(beta=...)"
                )
        for name, site in d.sites.items():
            if torch.is_grad_enabled() and not site.guide.has_rsample:
                raise ValueError(
                    f"site {name!r} is drawn by the guide from {type(site.guide).__name__}, "
                    "through which no gradient passes: use a reparameterised distribution, "
                    "infer={'enumerate': 'parallel'} to sum it out, or Pyro's Trace_ELBO"
                )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError("objectives work from densities(), not from single traces")


def only_site(d: Densities) -> Site:
    """Returns the latent site of `d`.

    Raises:
        ValueError: If there are several: q(z) of a hierarchy is not a mixture of q(z | x_n)
            whose densities are known.
    """
    if len(d.sites) != 1:
        refusing = () if d.each is None else REFUSE_DRAWS_PER_VALUE
        usable = [name for name in TAKE_SEVERAL_SITES if name not in refusing]
        raise ValueError(
            "the aggregate posterior needs exactly one latent site; the model has "
            f"{sorted(d.sites)}: use one of {', '.join(usable)}"
        )
    return next(iter(d.sites.values()))


def draws(d: Densities) -> Tensor:
    """Returns the draws of the one latent site, flattened to [K, B, D]."""
    return only_site(d).value.reshape(d.num_particles, d.num_data, -1)
