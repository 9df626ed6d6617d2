"""The posterior of each datum as a density over one unconstrained vector."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import pyro
import torch
from pyro.distributions import Delta
from torch import Tensor, nn

from pyro_vae.compiling import CannotCompile, Traced, compiled
from pyro_vae.densities import (
    Latents,
    Program,
    complete_data,
    densities,
    draw_data,
    draw_latents,
    entry_log_prob,
    log_joint,
    run_program,
    sites_at,
)
from pyro_vae.estimators.coordinates import (
    Coordinates,
    base_distribution,
    coordinates,
    holds_tensor,
)

CHUNK_ROWS = 1000  # rows decoded at once: 250 to 2500 are equally fast, more do not fit into cache
SCALE_DRAWS = 64  # prior draws from which the units of the coordinates are estimated
NORMAL_IQR = 1.349  # distance between the quartiles of a unit Normal
CALLS_BEFORE_COMPILING = 20  # evaluations of one shape before it is compiled
MOST_SHAPES = 3  # most shapes that are compiled: others are rare
unchecked = pyro.validation_enabled(False)  # decorates runs of programs after a checked one


class Target:
    r"""log p(x, u) and log q(u | x) of B data over one unconstrained vector u [K, B, D].

    The latent sites are mapped to real vectors by `biject_to` of the model's support, joined,
    and measured in units of the prior's spread, so that every coordinate is of order one:

    .. math:: \log p(x, u) = \log p(x, z(u)) + \log \left| \det \frac{dz}{du} \right|

    Programs run at their own precision, all else is float64. Where log p(x, z) is NaN, at points
    that the guide did not draw, it counts as minus infinity. A target must be used inside
    `evaluating`. The model sees at most `chunk_size` rows at a time, or one draw of each datum.
    `prior_mean` [B, D] is NaN where it is not known.

    Args:
        model: Pyro model, as in `importance_sampling`; every latent continuous.
        guide: Pyro guide.
        x: Data [B, *E].
        y: Condition of each datum [B, C], or None.
        chunk_size: Draws times data that the model sees at once.
        scale: Units of the coordinates [B, D]; from draws of the prior if None.
        sites: Coordinates of other data of the same programs, to use the same maps; or None.
        compiler: Compiler of log p(x, u), used if its maps are the same for all data; or None.

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
        chunk_size: int = CHUNK_ROWS,
        scale: Tensor | None = None,
        sites: dict[str, Coordinates] | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.model, self.guide, self.x, self.y = model, guide, x, y
        self.chunk_size, self.num_data = chunk_size, len(x)
        with torch.no_grad():
            first = densities(model, guide, x, y)
            if bad := (first.log_likelihood + first.log_prior).isnan().any(0).sum().item():
                raise ValueError(
                    f"log p(x, z) is NaN at a draw of the guide for {bad} of {first.num_data} "
                    "data: check the model there, and the data for NaN"
                )
            second = unchecked(densities)(model, guide, x, y)
            self.sites, mean, deviation = coordinates(first, second, sites)
            self.observed = list(first.observed)
            self.same_maps = not any(holds_tensor(site.transform) for site in self.sites.values())
            self.compiler = compiler if self.same_maps else None
            self.dim = mean.shape[-1]
            guides = [base_distribution(site.guide) for site in second.sites.values()]
            self.guide_has_density = not any(isinstance(guide, Delta) for guide in guides)
            self.scale = torch.ones_like(mean)
            if scale is None and (unknown := deviation.isnan()).any():
                draws = self.draw_prior(SCALE_DRAWS)[0].nan_to_num()
                low, high = draws.quantile(draws.new_tensor([0.25, 0.75]), dim=0)
                spread = (high - low) / NORMAL_IQR
                spread = torch.where((spread > 0) & spread.isfinite(), spread, 1.0)
                deviation = torch.where(unknown, spread, deviation)
            self.scale = deviation if scale is None else scale
            self.prior_mean = mean / self.scale

    def rows(self, index: Tensor) -> Target:
        """Returns the target of some of the data, in the same units."""
        part = copy.copy(self)
        part.x, part.y = self.x[index], None if self.y is None else self.y[index]
        part.scale, part.prior_mean = self.scale[index], self.prior_mean[index]
        part.num_data = len(part.x)
        vars(part).pop("_guide_distribution", None)
        return part if self.same_maps else part._with_data(part.x)

    def without_entries(self, entries: tuple[Tensor, ...]) -> Target:
        """Returns the target of the data without some entries, in the same units."""
        return self._with_data(self.x.index_put(entries, self.x.new_tensor(torch.nan)))

    def simulated(self) -> tuple[Target, Tensor]:
        """Simulates data from the model; returns their target and true latents [1, B, D]."""
        x, latents = draw_data(self.model, self.x, self.y)
        target = self._with_data(x)
        return target, target.vector(latents)

    def _with_data(self, x: Tensor) -> Target:
        """Returns the target of as many other data, in the same units."""
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "scale": self.scale}
        return Target(
            self.model, self.guide, x, self.y, sites=self.sites, compiler=self.compiler, **options
        )

    @property
    def draws_at_once(self) -> int:
        """Number of draws of all data that make up `chunk_size` rows."""
        return max(1, self.chunk_size // self.num_data)

    def log_joint(self, u: Tensor) -> Tensor:
        """Returns log p(x, u) [K, B]."""
        run = partial(self._compiled, self.compiler) if self.compiler else self.run_log_joint
        return torch.cat([run(part) for part in u.split(self.draws_at_once)])

    @unchecked
    def run_log_joint(self, u: Tensor) -> Tensor:
        """Returns log p(x, u) [K, B], of one chunk, by a run of the model."""
        latents, log_det = self._latents(u)
        return _nan_to_minus_inf(log_joint(self.model, self.x, self.y, latents).double() + log_det)

    def _compiled(self, compiler: Compiler, u: Tensor) -> Tensor:
        """Returns log p(x, u) [K, B], of one chunk, compiled; differentiable in u alone."""

        def value(u: Tensor, scale: Tensor, x: Tensor, *y: Tensor) -> Tensor:
            target = copy.copy(self)
            target.scale, target.x, target.y = scale, x, y[0] if y else None
            return target.run_log_joint(u)

        def value_and_grad(u: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
            (found,), (grad,) = gradients(lambda v: (value(v, *rest),), u, len(u))
            return found, grad

        inputs = [u.detach(), self.scale, self.x, *([] if self.y is None else [self.y])]
        if u.requires_grad and torch.is_grad_enabled():
            return _WithGradient.apply(u, *compiler(value_and_grad, self.model, *inputs))
        return compiler(value, self.model, *inputs)

    @unchecked
    def log_guide(self, u: Tensor) -> Tensor:
        """Returns log q(u | x) [K, B]."""
        latents, log_det = self._latents(u)
        if len(latents) > 1:
            log_prob = log_joint(self.guide, self.x, self.y, latents)
        else:
            (value,) = latents.values()
            log_prob = self._guide_distribution.log_prob(value)
        return _nan_to_minus_inf(log_prob.double() + log_det)

    @cached_property
    @torch.no_grad()
    def _guide_distribution(self) -> Any:
        """The distribution of a guide of one site, kept so that the encoder runs once."""
        nodes: Any = run_program(self.guide, self.x, self.y, 1).nodes
        return nodes[next(iter(self.sites))]["fn"]

    @unchecked
    def run_model(self, u: Tensor) -> ModelRun:
        """Runs the model at u."""
        latents, log_det = self._latents(u)
        return ModelRun(sites_at(self.model, self.x, self.y, latents), self.x, latents, log_det)

    def check_gradient(self) -> None:
        """Raises a ValueError if the likelihood has no gradient with respect to the latents."""
        u = self.draw_guide(1).requires_grad_()
        with torch.enable_grad():
            likelihood = self.run_model(u).log_likelihood.sum()
        if likelihood.requires_grad:
            if torch.autograd.grad(likelihood, u, allow_unused=True)[0] is not None:
                return
        raise ValueError(
            "log p(x | z) has no gradient with respect to z, which this estimator needs: "
            "use importance_sampling, which does not"
        )

    @unchecked
    @torch.no_grad()
    def draw_guide(self, num_draws: int) -> Tensor:
        """Returns draws of the guide [K, B, D]."""
        options = {"num_particles": num_draws, "chunk_size": self.chunk_size}
        return self.vector(draw_latents(self.guide, self.x, self.y, **options)[0])

    @unchecked
    @torch.no_grad()
    def draw_prior(self, num_draws: int) -> tuple[Tensor, Tensor, Tensor]:
        """Returns draws of the prior u [K, B, D], with log p(u) and log p(x | u) [K, B]."""
        parts = []
        for chunk in torch.ones(num_draws).split(self.draws_at_once):
            nodes: Any = run_program(self.model, self.x, self.y, len(chunk)).nodes
            values = {name: nodes[name]["value"] for name in self.sites}
            sites = {name: nodes[name] for name in [*self.sites, *self.observed]}
            u = self.vector(values)
            run = ModelRun(sites, self.x, values, self._latents(u)[1])
            parts.append((u, run.log_prior, run.log_likelihood))
        u, log_prior, log_likelihood = (torch.cat(part) for part in zip(*parts))
        return u, log_prior, log_likelihood

    def vector(self, latents: Latents) -> Tensor:
        """Returns u [K, B, D] for latents by site [K, B, *]."""
        unconstrained = [site.inverse(latents[name]) for name, site in self.sites.items()]
        return torch.cat(unconstrained, -1) / self.scale

    def _latents(self, u: Tensor) -> tuple[Latents, Tensor]:
        """Returns constrained latents by site, and log |dz / du| [K, B]."""
        log_det = self.scale.log().sum(-1).expand(u.shape[:2])
        raw, latents = u * self.scale, {}
        for name, site in self.sites.items():
            latents[name], jacobian = site(raw[..., site.columns])
            log_det = log_det + jacobian
        return latents, log_det


class ModelRun:
    """A run of a model at u [K, B, D], with the log densities of u and of the data there.

    Attributes:
        log_prior: log p(u) [K, B].
        log_likelihood: log p(x | u) [K, B].
        log_joint: log p(x, u) [K, B].

    Args:
        sites: The sites of the model.
        x: Data [B, *E].
        latents: The latents at u, by site.
        log_det: log |dz / du| [K, B].
    """

    def __init__(self, sites: Any, x: Tensor, latents: Latents, log_det: Tensor) -> None:
        self.sites, self.x, self.latents = sites, x, latents
        terms = {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}
        log_prior = sum((terms.pop(name) for name in latents), log_det)
        self.log_prior = _nan_to_minus_inf(log_prior)
        self.log_likelihood = _nan_to_minus_inf(sum(terms.values(), torch.zeros_like(log_det)))
        self.log_joint = _nan_to_minus_inf(self.log_prior + self.log_likelihood)

    @unchecked
    def complete(self) -> Tensor:
        """Returns the data [K, B, *E] with missing entries drawn from p(x | u)."""
        return complete_data(self.sites, self.x, self.latents)

    @unchecked
    def entry_log_prob(self) -> Tensor:
        """Returns log p(x_e | u) of each entry [K, B, *E]."""
        return entry_log_prob(self.sites, self.x, self.latents)


def _nan_to_minus_inf(log_prob: Tensor) -> Tensor:
    return log_prob.double().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def gradients(
    density: Callable[[Tensor], tuple[Tensor, ...]], u: Tensor, draws_at_once: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Returns log densities [K, B] at `u` [K, B, D], and the gradient of each [K, B, D].

    Nothing is added to the `.grad` of a parameter.

    Args:
        density: Function from u to one or more log densities, whose rows are independent.
        u: Points.
        draws_at_once: Points of each datum that are evaluated together.
    """
    values, grads = [], []
    for part in u.split(draws_at_once):
        leaf = part.detach().requires_grad_()
        with torch.enable_grad():
            found = density(leaf)
            grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
            grads.append([grad(value.sum(), leaf)[0] for value in found])
        values.append([value.detach() for value in found])
    return tuple(map(torch.cat, zip(*values))), tuple(map(torch.cat, zip(*grads)))


class Compiler:
    """Calls functions of tensors, compiled for the shapes that come often.

    A function that cannot be compiled runs eagerly, after one warning that says why.

    Args:
        uses: Calls of a shape after which it is compiled.
    """

    def __init__(self, uses: int = CALLS_BEFORE_COMPILING) -> None:
        self.uses, self.most = uses, MOST_SHAPES
        self.calls: Counter[object] = Counter()
        self.traced: dict[object, Traced] = {}

    def __call__(self, function: Callable[..., Any], program: Program, *inputs: Tensor) -> Any:
        """Returns `function(*inputs)`; its name identifies it, `program` holds its weights."""
        key = (function.__name__, *((part.shape, part.dtype) for part in inputs))
        if key not in self.traced and len(self.traced) < self.most:
            self.calls[key] += 1
            if self.calls[key] >= self.uses:
                try:
                    module = _FunctionModule(function, program).eval()  # as all that runs here
                    self.traced[key] = compiled(module, *inputs)
                except CannotCompile as error:
                    warnings.warn(f"compile: the model runs eagerly, for {error}", stacklevel=2)
                    self.most = 0  # no further attempt
        return self.traced.get(key, function)(*inputs)


class _FunctionModule(nn.Module):
    """A function as a forward pass, and the module whose weights it reads, if any."""

    def __init__(self, function: Callable[..., Any], program: Program) -> None:
        super().__init__()
        owner = getattr(program, "__self__", program)
        self.owner = owner if isinstance(owner, nn.Module) else None
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


class _WithGradient(torch.autograd.Function):
    """A value [K, B] whose gradient with respect to u [K, B, D] is known."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return outer[0].unsqueeze(-1) * grad, None, None
