"""From a Pyro model and guide to log p(x|z), log p(z), log q(z|x): the only place for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

__all__ = [
    "Densities",
    "OwnParameters",
    "Program",
    "Site",
    "densities",
    "draw_latents",
    "log_joint",
    "log_weights",
    "registered_densities",
    "scale_latents",
]

Program = Callable[..., Any]
Latents = dict[str, Tensor]


@dataclass(eq=False)
class Site:
    """One latent site of a model and its guide.

    Attributes:
        value: The draw [K, B, *event].
        guide: Its distribution in the guide, batch [K, B].
        model: Its distribution in the model, batch [K, B].
    """

    value: Tensor
    guide: Distribution
    model: Distribution

    @cached_property
    def log_prior(self) -> Tensor:
        """Log density under the model [K, B], in nats."""
        return self.model.log_prob(self.value)

    @cached_property
    def log_posterior(self) -> Tensor:
        """Log density under the guide [K, B], in nats."""
        return self.guide.log_prob(self.value)

    @cached_property
    def analytic_kl(self) -> Tensor | None:
        """KL(guide || model) [B] by the rule for the pair, averaged over particles, or None."""
        try:
            return kl_divergence(self.guide, self.model).mean(0)
        except NotImplementedError:
            return None


@dataclass(eq=False)
class Densities:
    """The log densities of K particles for each of B data, in nats, and the sites behind them.

    Everything is at weight one, whatever scales the programs carry, and computed when read.

    Attributes:
        sites: The latent sites, by name.
        observed: Distribution and value of the observed sites, by name.
        num_particles: K.
        num_data: B, the rows of the plate "data".
        scale: Rows that each of them stands for: the subsampling of the plate "data".
        site_scales: Site and factor on its log density, subsampling included, in both programs.
        same_order: Whether model and guide draw the sites in the same order, without which a
            site's conditional KL is not a term of the bound.
    """

    sites: dict[str, Site]
    observed: dict[str, tuple[Distribution, Tensor]]
    num_particles: int
    num_data: int
    scale: float
    site_scales: list[tuple[str, float | Tensor]]
    same_order: bool

    @cached_property
    def log_likelihood(self) -> Tensor:
        """log p(x | z) [K, B]."""
        return self._sum([fn.log_prob(value) for fn, value in self.observed.values()])

    @cached_property
    def log_prior(self) -> Tensor:
        """log p(z) [K, B]."""
        return self._sum([site.log_prior for site in self.sites.values()])

    @cached_property
    def log_posterior(self) -> Tensor:
        """log q(z | x) [K, B]."""
        return self._sum([site.log_posterior for site in self.sites.values()])

    @property
    def log_weights(self) -> Tensor:
        """Log importance weights log p(x, z) - log q(z | x) [K, B]."""
        return self.log_likelihood + self.log_prior - self.log_posterior

    @cached_property
    def log_posterior_detached(self) -> Tensor:
        """log q(z | x) [K, B], its gradient through z alone: none of the guide's parameters'.

        That of a draw of several sites is right too: a site's draw moves the distributions of
        later ones. Costs one more density of each site, and no run of the guide.

        Raises:
            ValueError: If a site's distribution cannot score a point that it did not draw.
        """
        if not torch.is_grad_enabled():
            return self.log_posterior
        again = self._sum([_score_again(name, site) for name, site in self.sites.items()])
        path = self.through_latents(again)
        return self.log_posterior.detach() + path - path.detach()

    def through_latents(self, log_density: Tensor) -> Tensor:
        r"""A number [K, B] with the gradient of `log_density` through the latents alone.

        .. math:: \sum_i z_i^\top \, \mathrm{stop}\Big(\frac{\partial f}{\partial z_i}\Big)

        where the derivative with respect to one site holds the others, and all parameters,
        fixed. `log_density` less it has the gradient with the draws held fixed. Its value means
        nothing.

        Args:
            log_density: f [K, B], an entry of which depends on the draws of that entry alone.
        """
        latents = {n: s.value for n, s in self.sites.items() if s.value.requires_grad}
        slopes = _slopes(log_density, latents)
        shape = (self.num_particles, self.num_data, -1)
        return self._sum([(g * latents[n]).reshape(shape).sum(-1) for n, g in slopes.items()])

    def kl(self, rule: str = "auto") -> dict[str, Tensor]:
        """KL(q || p) of each site [B].

        Args:
            rule: "analytic"; "sampled", the average of log q - log p over particles; or
                "auto", analytic where `kl_rules` says so.

        Raises:
            ValueError: If "analytic" is asked for a pair that has no rule, which it names.
        """
        if rule not in ("auto", "analytic", "sampled"):
            raise ValueError(f"kl must be 'auto', 'analytic' or 'sampled'; got {rule!r}")
        return {name: self._site_kl(name, site, rule) for name, site in self.sites.items()}

    def kl_by_dimension(self, rule: str = "auto") -> dict[str, Tensor]:
        """KL(q || p) of each dimension of each site [B, D], of distributions that factorise.

        Args:
            rule: As for `kl`.

        Raises:
            ValueError: As for `kl`, or if the dimensions of a site are not independent.
        """
        sites = {name: _by_dimension(name, site) for name, site in self.sites.items()}
        parts = {name: self._site_kl(name, site, rule) for name, site in sites.items()}
        return {name: kl.reshape(self.num_data, -1) for name, kl in parts.items()}

    @cached_property
    def kl_rules(self) -> dict[str, str]:
        """Which rule "auto" uses for each site, "analytic" or "sampled"."""
        return {
            name: "analytic" if self.same_order and site.analytic_kl is not None else "sampled"
            for name, site in self.sites.items()
        }

    def _site_kl(self, name: str, site: Site, rule: str) -> Tensor:
        if rule == "sampled" or (rule == "auto" and self.kl_rules[name] == "sampled"):
            return (site.log_posterior - site.log_prior).mean(0)
        if not self.same_order:
            raise ValueError(
                "kl='analytic' needs model and guide to draw their sites in the same order; "
                f"got {list(self.sites)} in the model: use kl='sampled'"
            )
        if site.analytic_kl is None:
            raise ValueError(
                f"no analytic KL from {_name(site.guide)} to {_name(site.model)} at site "
                f"{name!r}: use kl='auto' or 'sampled'"
            )
        return site.analytic_kl

    def _sum(self, terms: list[Tensor]) -> Tensor:
        total = sum(terms, torch.zeros(()))
        return total.expand(self.num_particles, self.num_data)  # type: ignore[union-attr]


def densities(
    model: Program, guide: Program, x: Tensor, y: Tensor | None = None, *, num_particles: int = 1
) -> Densities:
    """Runs the guide, replays the model against it, and gives the log densities of both.

    The programs run once each, whatever the number of particles: a plate "particles" outside
    "data" draws them together, so that an encoder runs once. Pyro's parameter store is left
    alone: parameters are those of the modules.

    Args:
        model: Pyro model of (x) or (x, y), all its sites inside one plate "data" at dim -1.
        guide: Pyro guide of the same arguments.
        x: Data [B, *E].
        y: What is conditioned on [B, C], or None.
        num_particles: Particles K.

    Raises:
        ValueError: If a site lies outside the plate "data" or inside another, is masked or a
            `pyro.factor`, or is latent in only one of the programs.
    """
    with OwnParameters():
        return registered_densities(model, guide, x, y, num_particles=num_particles)


def registered_densities(
    model: Program, guide: Program, x: Tensor, y: Tensor | None = None, *, num_particles: int = 1
) -> Densities:
    """As `densities`, for `pyro.infer.SVI`: parameters are registered as the programs ask."""
    with particle_plate(num_particles):
        guide_trace = poutine.trace(guide).get_trace(*_args(x, y))
        guide_sites = _sample_sites(guide_trace, "guide")
    with poutine.replay(trace=guide_trace), particle_plate(num_particles):
        model_sites = _sample_sites(poutine.trace(model).get_trace(*_args(x, y)), "model")
    latent = [name for name, site in model_sites.items() if not site["is_observed"]]
    _check_latents(latent, list(guide_sites))
    frames = {f.name: f for f in model_sites[latent[0]]["cond_indep_stack"]}
    return Densities(
        sites={
            name: Site(
                model_sites[name]["value"], guide_sites[name]["fn"], model_sites[name]["fn"]
            )
            for name in latent
        },
        observed={
            name: (site["fn"], site["value"])
            for name, site in model_sites.items()
            if site["is_observed"]
        },
        num_particles=num_particles,
        num_data=frames["data"].size,
        scale=(frames["data"].full_size or frames["data"].size) / frames["data"].size,
        site_scales=[
            (name, site["scale"])
            for sites in (model_sites, guide_sites)
            for name, site in sites.items()
        ],
        same_order=latent == list(guide_sites),
    )


def draw_latents(
    guide: Program, x: Tensor, y: Tensor | None = None, *, num_particles: int = 1
) -> tuple[Latents, Tensor]:
    """Draws of the guide by site, [K, B, *event], and their log density log q(z | x) [K, B]."""
    with particle_plate(num_particles):
        sites = _sample_sites(poutine.trace(guide).get_trace(*_args(x, y)), "guide")
    return {name: site["value"] for name, site in sites.items()}, _log_prob(sites, x)


def log_joint(model: Program, x: Tensor, y: Tensor | None, latents: Latents) -> Tensor:
    """log p(x, z) [K, B] of given latents, by site [K, B, *event]."""
    num_particles = [len(z) for z in latents.values()] or [1]
    with particle_plate(num_particles[0]):
        conditioned = poutine.condition(model, latents)
        sites = _sample_sites(poutine.trace(conditioned).get_trace(*_args(x, y)), "model")
    _check_latents([n for n, s in sites.items() if not s["is_observed"] or n in latents], latents)
    return _log_prob(sites, x)


def log_weights(
    model: Program,
    guide: Program | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_particles: int,
    chunk_size: int,
) -> Tensor:
    """Log importance weights log p(x, z) - log q(z | x) [K, B] of K fresh draws of z.

    The guide runs once; the model sees at most `chunk_size` draws of all data at a time.

    Args:
        model: As in `densities`.
        guide: The proposal, or None for the prior, whose weights are p(x | z).
        x: Data [B, *E].
        y: What is conditioned on [B, C], or None.
        num_particles: Draws K for each datum.
        chunk_size: Rows, draws times data, that the model sees at once.
    """
    step = max(1, chunk_size // len(x))
    if guide is None:
        return torch.cat(
            [
                _prior_weights(model, x, y, min(step, num_particles - start))
                for start in range(0, num_particles, step)
            ]
        )
    latents, log_q = draw_latents(guide, x, y, num_particles=num_particles)
    parts = []
    for start in range(0, num_particles, step):
        chunk = {name: z[start : start + step] for name, z in latents.items()}
        with nullcontext() if start == 0 else pyro.validation_enabled(False):
            parts.append(log_joint(model, x, y, chunk))  # the first has checked the data
    return torch.cat(parts) - log_q


def _prior_weights(model: Program, x: Tensor, y: Tensor | None, num_particles: int) -> Tensor:
    with particle_plate(num_particles):
        sites = _sample_sites(poutine.trace(model).get_trace(*_args(x, y)), "model")
    return _log_prob({name: site for name, site in sites.items() if site["is_observed"]}, x)


def _log_prob(sites: dict[str, dict[str, Any]], x: Tensor) -> Tensor:
    """Log density of all `sites` [K, B], one column for each row of `x`."""
    terms = [site["fn"].log_prob(site["value"]) for site in sites.values()]
    if any(term.shape[-1] != len(x) for term in terms):
        raise ValueError(
            f"the plate 'data' has {terms[0].shape[-1]} rows for {len(x)} data: an estimate for "
            "each datum needs all of them; remove the subsampling"
        )
    return sum(terms, torch.zeros(()))


class OwnParameters(Messenger):
    """Registers no module's parameters in Pyro's store: the site gets the module's own tensor.

    Registering them costs Python work per parameter, is needed by `pyro.infer.SVI` alone, and
    is global: a second module of the same names would be given the first one's tensors.
    """

    def _pyro_module(self, msg: dict[str, Any]) -> None:
        msg["value"], msg["done"], msg["stop"] = True, True, True

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        start = msg["args"][1] if len(msg["args"]) > 1 else None
        known = msg["name"] in pyro.get_param_store()  # so that there is nothing to register
        if isinstance(start, torch.nn.Parameter) and not known:
            msg["value"], msg["done"], msg["stop"] = start, True, True


def scale_latents(fn: Program, beta: float | Tensor) -> Program:
    """`fn` with the log density of every unobserved site multiplied by `beta`.

    `scale_latents(model, beta)` and `scale_latents(guide, beta)` under Pyro's own Trace_ELBO or
    TraceMeanField_ELBO are the beta-VAE; `objectives.ELBO(beta)` is the same bound. Both sides
    must be scaled. `poutine.scale` would scale the observed sites too, and refuses 0.

    A site counts as observed if it is so below this handler: `scale_latents(condition(model,
    data), beta)` leaves the data's site alone, `condition(scale_latents(model, beta), data)`
    scales it, for there the site is still latent when it passes.

    Args:
        fn: A model or guide.
        beta: The weight, 0 included; a float or a tensor.

    References:
        Higgins et al. beta-VAE: learning basic visual concepts with a constrained variational
        framework. 2017.
    """
    return ScaleLatents(beta)(fn)


class ScaleLatents(Messenger):
    """The handler behind `scale_latents`."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


def _by_dimension(name: str, site: Site) -> Site:
    """The site with its dimensions as batch dimensions, [K, B, *event]."""
    guide, model = _factors(site.guide), _factors(site.model)
    if guide.event_shape or model.event_shape:
        raise ValueError(
            f"the KL from {_name(site.guide)} to {_name(site.model)} at site {name!r} is not a "
            "sum over dimensions: use distributions with independent dimensions, or the KL of "
            "the whole site"
        )
    return Site(site.value, guide, model)


def _factors(fn: Distribution) -> Distribution:
    return _factors(fn.base_dist) if isinstance(fn, Independent) else fn


def _score_again(name: str, site: Site) -> Tensor:
    """Log density of a draw under the guide [K, B], as of a point from elsewhere.

    A flow keeps the density of its own draw, computed from the noise and not from z.
    """
    try:
        return site.guide.log_prob(site.value.view_as(site.value))
    except (KeyError, NotImplementedError) as error:
        raise ValueError(
            f"{_name(site.guide)} at site {name!r} cannot score a point that it did not just "
            "draw, which a gradient through the latents alone needs: use a posterior whose "
            "transforms can be inverted, or another objective"
        ) from error


def _slopes(log_density: Tensor, latents: Latents) -> Latents:
    """Derivative of the sum of `log_density` with respect to each of `latents`, others fixed."""
    slopes: Latents = {}

    def stop_at(name: str) -> Callable[[Tensor], Tensor]:
        def hook(slope: Tensor) -> Tensor:
            slopes[name] = slope
            return torch.zeros_like(slope)  # so that nothing reaches the sites before it

        return hook

    if not (latents and log_density.requires_grad):
        return slopes
    hooks = [z.register_hook(stop_at(name)) for name, z in latents.items()]
    try:
        given = list(latents.values())
        torch.autograd.grad(log_density.sum(), given, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return slopes


def _name(fn: Distribution) -> str:
    base = getattr(fn, "base_dist", None)
    return type(fn).__name__ if base is None else f"{type(fn).__name__}({_name(base)})"


class ParticlePlate(IndepMessenger):
    """The plate of particles, outside the plate "data": `pyro.plate` less its subsampling."""

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        BroadcastMessenger._pyro_sample(msg)


def particle_plate(num_particles: int) -> ParticlePlate:
    """A plate of `num_particles`, at dim -2."""
    if num_particles < 1:
        raise ValueError(f"the number of particles must be at least 1; got {num_particles}")
    return ParticlePlate("particles", num_particles, dim=-2)


def _args(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    return (x,) if y is None else (x, y)


def _sample_sites(trace: poutine.Trace, program: str) -> dict[str, dict[str, Any]]:
    sites: dict[str, Any] = {
        name: site
        for name, site in prune_subsample_sites(trace).nodes.items()
        if site["type"] == "sample" and not (site["infer"] or {}).get("_deterministic", False)
    }
    for name, site in sites.items():
        _check_site(f"{program} site {name!r}", site)
    return sites


def _check_site(what: str, site: dict[str, Any]) -> None:
    """Refuses what has no log weight per datum."""
    if isinstance(site["fn"], dist.Unit):
        raise ValueError(
            f"{what} is a pyro.factor, so that the program is not a density: "
            "use a distribution with an observed value"
        )
    if site["mask"] is not None or isinstance(site["fn"], dist.MaskedDistribution):
        raise ValueError(f"{what} is masked; densities need every site unmasked: remove the mask")
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    if plates != {"data": -1, "particles": -2}:
        found = sorted(plates.keys() - {"particles"})
        raise ValueError(
            f"{what} must be inside the plate 'data' at dim -1 and no other; found plates "
            f"{found}: move it inside, and declare further dimensions with .to_event()"
        )
    if len(site["fn"].batch_shape) > 2:
        raise ValueError(
            f"{what} has batch shape {tuple(site['fn'].batch_shape)}, more than (particles, "
            "data): declare the dimensions of a datum with .to_event()"
        )


def _check_latents(model: list[str], guide: Iterable[str]) -> None:
    if missing := sorted(set(model) ^ set(guide)):
        raise ValueError(
            f"model and guide must have the same latent sites; {missing} is in one of them only"
        )
    if not model:
        raise ValueError("the model has no latent site")
