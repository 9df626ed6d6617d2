"""The posterior of each datum as a density over one unconstrained vector."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.densities import (
    Densities,
    Latents,
    Program,
    complete_data,
    densities,
    draw_latents,
    entry_log_prob,
    log_joint,
    run_program,
    sites_at,
)
from pyro_vae.estimators.coordinates import (
    Coordinates,
    coordinates,
    holds_tensor,
    is_delta,
    normal_units,
)

__all__ = ["ROWS", "Run", "Target", "gradients"]

ROWS = 1000  # rows decoded at once: 250 to 2500 are equally fast, more falls out of cache
SCALE_DRAWS = 64  # prior draws behind the unit of each coordinate
NORMAL_IQR = 1.349  # distance between the quartiles of a unit Normal


class Target:
    r"""log p(x, u) and log q(u | x) of B data over one unconstrained vector u [K, B, D].

    The latent sites are mapped to real vectors by `biject_to` of the model's support, joined,
    and measured in units of the prior's spread, so that every coordinate is of order one:

    .. math:: \log p(x, u) = \log p(x, z(u)) + \log \left| \det \frac{dz}{du} \right|

    Programs run at their own precision, all else is float64. Where log p(x, z) is not a number,
    away from the draws of the guide, it counts as minus infinity. To be used inside
    `evaluating`; the model sees at most `chunk_size` rows at a time, or one draw of each datum.
    `prior_mean` [B, D] is NaN where it is not known.

    Args:
        model: Pyro model, as in `importance_sampling`; every latent continuous.
        guide: Pyro guide.
        x: Data [B, *E].
        y: What is conditioned on [B, C], or None.
        chunk_size: Draws times data that the model sees at once.
        scale: Units of the coordinates [B, D]; from draws of the prior if None.
        sites: Coordinates of other data of the same programs, to use the same maps; or None.
        fast: What evaluates log p(x, u), compiled; None for the model itself.

    Raises:
        ValueError: If a latent is discrete, or its support depends on another latent or has no
            unconstrained coordinates; if log p(x, z) is NaN at a draw of the guide.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        x: Tensor,
        y: Tensor | None = None,
        *,
        chunk_size: int = ROWS,
        scale: Tensor | None = None,
        sites: dict[str, Coordinates] | None = None,
        fast: Callable[[Target, Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.guide, self.x, self.y = model, guide, x, y
        self.chunk_size, self.num_data = chunk_size, len(x)
        with torch.no_grad():
            first = densities(model, guide, x, y)
            _check_value(first)
            with pyro.validation_enabled(False):
                second = densities(model, guide, x, y)
            self.sites = coordinates(first, second, sites)
            self.observed = list(first.observed)
            self.fixed = not any(holds_tensor(site.transform) for site in self.sites.values())
            self.fast = fast if self.fixed else None
            self.dim = max(site.columns.stop for site in self.sites.values())
            self.guide_is_density = not any(is_delta(s.guide) for s in second.sites.values())
            self.scale = x.new_ones(len(x), self.dim, dtype=torch.float64)
            mean, deviation = normal_units(self.sites, first, second)
            if scale is None:
                unknown = deviation.isnan()
                scale = deviation
                if unknown.any():
                    scale = torch.where(unknown, self._prior_scale(), deviation)
            self.scale, self.prior_mean = scale, mean / scale

    def rows(self, index: Tensor) -> Target:
        """The target of some of the data, in the same units."""
        y = None if self.y is None else self.y[index]
        if not self.fixed:
            return self._anew(self.x[index], y, self.scale[index])
        part = copy.copy(self)
        part.x, part.y, part.num_data = self.x[index], y, len(self.scale[index])
        part.scale, part.prior_mean = self.scale[index], self.prior_mean[index]
        vars(part).pop("_only_guide", None)
        return part

    def without(self, entries: tuple[Tensor, ...]) -> Target:
        """The target of the data less some entries, in the same units."""
        return self.of(self.x.index_put(entries, self.x.new_tensor(torch.nan)))

    def of(self, x: Tensor) -> Target:
        """The target of as many other data, in the same units."""
        return self._anew(x, self.y, self.scale)

    def _anew(self, x: Tensor, y: Tensor | None, scale: Tensor) -> Target:
        given: dict[str, Any]
        given = {"chunk_size": self.chunk_size, "scale": scale, "sites": self.sites}
        return Target(self.model, self.guide, x, y, **given, fast=self.fast)

    @cached_property
    def _only_guide(self) -> Any:
        """The distribution of a guide of one site, which spares the encoder; else None."""
        if len(self.sites) > 1:
            return None
        with torch.no_grad(), pyro.validation_enabled(False):
            nodes: Any = run_program(self.guide, self.x, self.y, 1).nodes
        return nodes[next(iter(self.sites))]["fn"]

    @property
    def draws_at_once(self) -> int:
        """Draws of all data that make up `chunk_size` rows."""
        return max(1, self.chunk_size // self.num_data)

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u) [K, B]."""
        run = self.run_log_joint if self.fast is None else partial(self.fast, self)
        return torch.cat([run(part) for part in u.split(self.draws_at_once)])

    def log_guide(self, u: Tensor) -> Tensor:
        """log q(u | x) [K, B]."""
        latents, log_det = self._latents(u)
        with pyro.validation_enabled(False):
            if self._only_guide is not None:
                (value,) = latents.values()
                log_prob = self._only_guide.log_prob(value)
            else:
                log_prob = log_joint(self.guide, self.x, self.y, latents)
        return _never_nan(log_prob.double() + log_det)

    def log_prior(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x | u), each [K, B], from one run of the model."""
        run = self.at(u)
        return run.log_prior, run.log_likelihood

    def at(self, u: Tensor) -> Run:
        """One run of the model at u."""
        latents, log_det = self._latents(u)
        with pyro.validation_enabled(False):
            return Run(sites_at(self.model, self.x, self.y, latents), self.x, latents, log_det)

    def check_gradient(self) -> None:
        """Raises a ValueError if the likelihood has no gradient with respect to the latents."""
        u = self.draw_guide(1).requires_grad_()
        with torch.enable_grad():
            likelihood = self.log_prior(u)[1].sum()
        if likelihood.requires_grad:
            if torch.autograd.grad(likelihood, u, allow_unused=True)[0] is not None:
                return
        raise ValueError(
            "log p(x | z) has no gradient with respect to z, which this estimator needs: "
            "use importance_sampling, which does not"
        )

    def draw_guide(self, num_draws: int) -> Tensor:
        """Draws of the guide [K, B, D]."""
        with pyro.validation_enabled(False), torch.no_grad():
            options = {"num_particles": num_draws, "chunk_size": self.chunk_size}
            latents, _ = draw_latents(self.guide, self.x, self.y, **options)
        return self.vector(latents)

    def draw_prior(self, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draws of the prior u [K, B, D], and log p(u) and log p(x | u) [K, B] at each."""
        parts = []
        for done in range(0, num_draws, self.draws_at_once):
            u, run = self.run_prior(min(self.draws_at_once, num_draws - done))
            parts.append((u, run.log_prior, run.log_likelihood))
        draws, log_prior, log_likelihood = (torch.cat(part) for part in zip(*parts))
        return draws, log_prior, log_likelihood

    def run_prior(self, num_draws: int) -> tuple[Tensor, Run]:
        """Draws of the prior u [K, B, D], of one chunk, and the run of the model behind them."""
        with torch.no_grad(), pyro.validation_enabled(False):
            nodes: Any = run_program(self.model, self.x, self.y, num_draws).nodes
            values = {name: nodes[name]["value"] for name in self.sites}
            u = self.vector(values)
            sites = {name: nodes[name] for name in [*self.sites, *self.observed]}
            return u, Run(sites, self.x, values, self._latents(u)[1])

    def vector(self, latents: dict[str, Tensor]) -> Tensor:
        """u [K, B, D] of latents by site [K, B, *]."""
        free = [site.inverse(latents[name]) for name, site in self.sites.items()]
        return torch.cat(free, -1) / self.scale

    def run_log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u) [K, B], of one chunk, by a run of the model."""
        latents, log_det = self._latents(u)
        with pyro.validation_enabled(False):
            return _never_nan(log_joint(self.model, self.x, self.y, latents).double() + log_det)

    def _latents(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Constrained latents by site, and log |dz / du| [K, B]."""
        log_det = self.scale.log().sum(-1).expand(u.shape[:2])
        raw, latents = u * self.scale, {}
        for name, site in self.sites.items():
            latents[name], jacobian = site(raw[..., site.columns])
            log_det = log_det + jacobian
        return latents, log_det

    def _prior_scale(self) -> Tensor:
        draws = self.draw_prior(SCALE_DRAWS)[0]
        quartiles = draws.nan_to_num().quantile(draws.new_tensor([0.25, 0.75]), dim=0)
        spread = (quartiles[1] - quartiles[0]) / NORMAL_IQR
        return torch.where((spread > 0) & spread.isfinite(), spread, torch.ones_like(spread))


def gradients(
    density: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, draws_at_once: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Log densities [K, B] at `u` [K, B, D] and their gradients [K, B, D].

    With respect to `u` alone: nothing is added to the `.grad` of a parameter.

    Args:
        density: From u to one or more log densities, rows independent.
        u: Points.
        draws_at_once: Points of each datum that are evaluated together.

    Returns:
        The densities, and as many gradients.
    """
    values, slopes = [], []
    for part in u.split(draws_at_once):
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            found = density(leaf)
            grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
            slopes.append([grad(value.sum(), leaf)[0] for value in found])
        values.append([value.detach() for value in found])
    return tuple(map(torch.cat, zip(*values))), tuple(map(torch.cat, zip(*slopes)))


def _never_nan(log_prob: Tensor) -> Tensor:
    return log_prob.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _check_value(d: Densities) -> None:
    if bad := (d.log_likelihood + d.log_prior).isnan().any(0).sum().item():
        raise ValueError(
            f"log p(x, z) is NaN at a draw of the guide for {bad} of {d.num_data} data: "
            "check the model there, and the data for NaN"
        )


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a model at u [K, B, D]: what it says of u, and of the data there.

    Attributes:
        sites: The sites of the model.
        x: Data [B, *E].
        latents: The latents at u, by site.
        log_det: log |dz / du| [K, B].
    """

    sites: dict[str, Any]
    x: Tensor
    latents: Latents
    log_det: Tensor

    @property
    def log_prior(self) -> Tensor:
        """log p(u) [K, B]."""
        return self._scores(self.latents, self.log_det)

    @property
    def log_likelihood(self) -> Tensor:
        """log p(x | u) [K, B]."""
        observed = [name for name in self.sites if name not in self.latents]
        return self._scores(observed, torch.zeros_like(self.log_det))

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u) [K, B]."""
        return _never_nan(self.log_prior + self.log_likelihood)

    def complete(self) -> Tensor:
        """The data [K, B, *E] with what is missing drawn from p(x | u)."""
        with pyro.validation_enabled(False):
            return complete_data(self.sites, self.x, self.latents)

    def entry_log_prob(self) -> Tensor:
        """log p(x_e | u) of each entry [K, B, *E]."""
        with pyro.validation_enabled(False):
            return entry_log_prob(self.sites, self.x, self.latents)

    def _scores(self, names: Iterable[str], first: Tensor) -> Tensor:
        with pyro.validation_enabled(False):
            found = (self.sites[n]["fn"].log_prob(self.sites[n]["value"]) for n in names)
            return _never_nan(sum(found, first))
