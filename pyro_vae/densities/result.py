"""The log densities of draws and data, and the sites behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence

from pyro_vae.arguments import check_choice
from pyro_vae.densities.programs import Latents, Sites

KL_RULES = ("auto", "analytic", "sampled")


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
        """Analytic KL(guide || model) [B], averaged over particles; None if there is no rule."""
        try:
            return kl_divergence(self.guide, self.model).mean(0)
        except NotImplementedError:
            return None


@dataclass(eq=False)
class Densities:
    """The log densities of K particles for each of B data, in nats, and the sites behind them.

    Nothing is scaled, whatever scales the programs carry; all is computed when first read.

    Attributes:
        sites: The latent sites, by name.
        observed: Distribution and value of the observed sites, by name.
        num_particles: K.
        num_data: B, the rows of the plate "data".
        scale: Rows that each datum stands for, more than one if the plate "data" is subsampled.
        site_scales: For each site of both programs, its name and the factor on its log density,
            subsampling included.
        same_order: Whether model and guide draw the sites in the same order; if they do not, the
            conditional KL of a site is not a term of the bound.
        each: Where discrete latents are summed out and each of their values has draws of its own,
            the densities with every draw of every value as a particle; else None.
        label_term: What objectives add [B] for sites with infer={"label_weight": w}: the sum of
            w log p(label | x), or the term of a classifier in the guide; None without such sites.
    """

    sites: dict[str, Site]
    observed: dict[str, tuple[Distribution, Tensor]]
    num_particles: int
    num_data: int
    scale: float
    site_scales: list[tuple[str, float | Tensor]]
    same_order: bool
    each: Densities | None = None
    label_term: Tensor | None = None

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
        """log q(z | x) [K, B], whose gradient passes through z but not the guide's parameters.

        This holds for several sites too, where a draw moves the distributions of later sites. It
        costs one more density of each site, and no run of the guide.

        Raises:
            ValueError: If a site's distribution cannot score a point that it did not draw.
        """
        if not torch.is_grad_enabled():
            return self.log_posterior
        terms = []
        for name, site in self.sites.items():
            try:  # a view, for a flow would return the density that it kept for its own draw
                terms.append(site.guide.log_prob(site.value.view_as(site.value)))
            except (KeyError, NotImplementedError) as error:
                raise ValueError(
                    f"{_name(site.guide)} at site {name!r} cannot score a point that it did not "
                    "just draw, which a gradient through the latents alone needs: use a posterior "
                    "whose transforms can be inverted, or another objective"
                ) from error
        path = self.through_latents(self._sum(terms))
        return self.log_posterior.detach() + path - path.detach()

    def through_latents(self, log_density: Tensor) -> Tensor:
        r"""Returns a tensor [K, B] with the gradient of `log_density` through the latents alone.

        .. math:: \sum_i z_i^\top \, \mathrm{stop}\Big(\frac{\partial f}{\partial z_i}\Big)

        where the derivative with respect to one site holds the others, and all parameters,
        fixed. `log_density` minus this tensor has the gradient with the draws held fixed. The
        values of the tensor mean nothing.

        Args:
            log_density: f [K, B], each entry of which depends on the draws of that entry alone.

        Raises:
            ValueError: If each value of a summed latent has draws of its own (see `each`).
        """
        if self.each is not None:
            raise ValueError(
                "the guide draws latents for each value of a site that is summed out, whose "
                "gradients this objective cannot take apart: use DReG, IWAE or ELBO"
            )
        latents = {n: s.value for n, s in self.sites.items() if s.value.requires_grad}
        grads = _grads(log_density, latents)
        shape = (self.num_particles, self.num_data, -1)
        return self._sum([(grad * latents[n]).reshape(shape).sum(-1) for n, grad in grads.items()])

    def kl(self, rule: str = "auto") -> dict[str, Tensor]:
        """Returns KL(q || p) of each site [B].

        Args:
            rule: "analytic"; "sampled", the average of log q - log p over particles; or
                "auto", analytic where `kl_rules` says so.

        Raises:
            ValueError: If `rule` is "analytic", and a site has no rule or `same_order` is false.
        """
        check_choice(KL_RULES, kl=rule)
        return {name: self._site_kl(name, site, rule) for name, site in self.sites.items()}

    def kl_by_dimension(self, rule: str = "auto") -> dict[str, Tensor]:
        """Returns KL(q || p) of each dimension of each site [B, D].

        Args:
            rule: As for `kl`.

        Raises:
            ValueError: As for `kl`, or if the dimensions of a site are not independent.
        """
        parts = {}
        for name, site in self.sites.items():
            guide, model = factors(site.guide), factors(site.model)
            if guide.event_shape or model.event_shape:
                raise ValueError(
                    f"the KL from {_name(site.guide)} to {_name(site.model)} at site {name!r} is "
                    "not a sum over dimensions: use distributions with independent dimensions, "
                    "or the KL of the whole site"
                )
            kl = self._site_kl(name, Site(site.value, guide, model), rule)
            parts[name] = kl.reshape(self.num_data, -1)
        return parts

    @cached_property
    def kl_rules(self) -> dict[str, str]:
        """The rule that "auto" uses for each site, "analytic" or "sampled"."""
        return {
            name: "analytic" if self.same_order and site.analytic_kl is not None else "sampled"
            for name, site in self.sites.items()
        }

    def _site_kl(self, name: str, site: Site, rule: str) -> Tensor:
        analytic = site.analytic_kl if self.same_order else None
        if rule == "sampled" or (rule == "auto" and analytic is None):
            return (site.log_posterior - site.log_prior).mean(0)
        if not self.same_order:
            raise ValueError(
                "kl='analytic' needs model and guide to draw their sites in the same order; "
                f"got {list(self.sites)} in the model: use kl='sampled'"
            )
        if analytic is None:
            raise ValueError(
                f"no analytic KL from {_name(site.guide)} to {_name(site.model)} at site "
                f"{name!r}: use kl='auto' or 'sampled'"
            )
        return analytic

    def _sum(self, terms: list[Tensor]) -> Tensor:
        total = sum(terms[1:], terms[0]) if terms else torch.zeros(())
        shape = (self.num_particles, self.num_data)
        return total if total.shape == shape else total.expand(shape)


def densities_of(p: Sites, q: Sites, num_particles: int) -> Densities:
    """Returns the densities of both programs' sites; those of the model alone are observed."""
    (plate,) = (f for f in next(iter(p.values()))["cond_indep_stack"] if f.name == "data")
    return Densities(
        sites={n: Site(s["value"], q[n]["fn"], s["fn"]) for n, s in p.items() if n in q},
        observed={n: (s["fn"], s["value"]) for n, s in p.items() if n not in q},
        num_particles=num_particles,
        num_data=plate.size,
        scale=(plate.full_size or plate.size) / plate.size,
        site_scales=[(n, s["scale"]) for sites in (p, q) for n, s in sites.items()],
        same_order=[n for n in p if n in q] == list(q),
    )


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """Returns the log of the mean weight [B], of log weights [K, B]."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def factors(fn: Distribution) -> Distribution:
    """Returns the distribution of each entry: `fn` without its `Independent` wrappers."""
    return factors(fn.base_dist) if isinstance(fn, Independent) else fn


def _grads(log_density: Tensor, latents: Latents) -> Latents:
    """Returns the gradient of the sum of `log_density` in each of `latents`, others held fixed."""
    grads: Latents = {}
    if not (latents and log_density.requires_grad):
        return grads

    def stop(name: str, grad: Tensor) -> Tensor:
        grads[name] = grad
        return torch.zeros_like(grad)  # so that no gradient reaches the sites before it

    hooks = [z.register_hook(partial(stop, name)) for name, z in latents.items()]
    try:
        values = list(latents.values())
        torch.autograd.grad(log_density.sum(), values, retain_graph=True, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return grads


def _name(fn: Distribution) -> str:
    base = getattr(fn, "base_dist", None)
    return type(fn).__name__ if base is None else f"{type(fn).__name__}({_name(base)})"
