"""Runs a model and a guide together: densities, draws, log weights, entries of a datum."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole, takes_vae
from pyro_vae.densities.particles import folds, run_program
from pyro_vae.densities.programs import (
    Latents,
    OwnParameters,
    Program,
    Sites,
    check_latents,
    is_random,
    sample_sites,
)
from pyro_vae.densities.result import Densities, densities_of, factors
from pyro_vae.densities.summed import summed_densities, summed_values

CLASS_SITE_KEYS = {"enumerate", "label_weight"}  # `infer` keys that mark sites of a class or label


class NotSimulated(ValueError):
    """Raised where data cannot be simulated from a model."""


@takes_vae
def densities(
    model: Program, guide: Program, x: Tensor, y: Tensor | None = None, *, num_particles: int = 1
) -> Densities:
    """Runs the guide, replays the model against it, and returns the log densities of both.

    The programs run once each, whatever the number of particles: a plate "particles" outside
    "data" draws them together, so that an encoder runs once. Pyro's parameter store is left
    alone: parameters are those of the modules.

    A discrete latent of the model with Pyro's `infer={"enumerate": "parallel"}` is summed out:
    the model runs on its C values as on C * K particles. The guide need not have the site. If
    it has, its distribution there is ignored, and it draws its other latents for each value.

    Args:
        model: Pyro model called with (x) or (x, y), all its sites inside one plate "data" at dim
            -1; or a VAE, which stands for its model and guide: densities(vae, x).
        guide: Pyro guide called with the same arguments.
        x: Data [B, *E].
        y: Condition of each datum [B, C], or None.
        num_particles: Particles K.

    Raises:
        ValueError: If a site lies outside the plate "data" or inside another, is masked or a
            `pyro.factor`, or is latent in only one of the programs; if more than 10,000 joint
            values would be summed.

    Example:
        >>> vae = build(3, latent_dim=2)
        >>> densities(vae, torch.ones(5, 3), num_particles=7).log_weights.shape
        torch.Size([7, 5])
    """
    check_whole(num_particles=num_particles)
    with OwnParameters():
        return registered_densities(model, guide, x, y, num_particles=num_particles)


def registered_densities(
    model: Program, guide: Program, x: Tensor, y: Tensor | None = None, *, num_particles: int = 1
) -> Densities:
    """Computes `densities` for `pyro.infer.SVI`, with parameters registered in Pyro's store."""
    values = summed_values(model, x, y)
    if values:
        return summed_densities(model, guide, x, y, num_particles, values)
    fold = [folds(program, x, y, num_particles) for program in (guide, model)]  # trial runs first
    guide_trace = run_program(guide, x, y, num_particles, fold=fold[0])
    q = sample_sites(guide_trace, "guide")
    replay = poutine.replay(trace=guide_trace)
    p = sample_sites(run_program(model, x, y, num_particles, replay, fold=fold[1]), "model")
    check_latents([name for name, site in p.items() if not site["is_observed"]], q)
    return densities_of(p, q, num_particles)


def draw_latents(
    guide: Program,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_particles: int = 1,
    chunk_size: int | None = None,
) -> tuple[Latents, Tensor]:
    """Returns draws of the guide by site [K, B, *event], and their log q(z | x) [K, B].

    A guide that does not broadcast sees at most `chunk_size` rows at a time.
    """
    if chunk_size and num_particles * len(x) > chunk_size and folds(guide, x, y, num_particles):
        counts = torch.ones(num_particles).split(max(1, chunk_size // len(x)))
        draws = [draw_latents(guide, x, y, num_particles=len(count)) for count in counts]
        parts, log_prob = zip(*draws)
        latents = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return latents, torch.cat(log_prob)
    sites = sample_sites(run_program(guide, x, y, num_particles), "guide")
    return {name: site["value"] for name, site in sites.items()}, _log_prob(sites, x)


def log_joint(model: Program, x: Tensor, y: Tensor | None, latents: Latents) -> Tensor:
    """Returns log p(x, z) [K, B] at given latents, by site [K, B, *event]."""
    return _log_prob(sites_at(model, x, y, latents), x)


def sites_at(model: Program, x: Tensor, y: Tensor | None, latents: Latents) -> Sites:
    """Returns the sites of a model at given latents, which must be all of its latents."""
    num_particles = next((len(z) for z in latents.values()), 1)
    trace = run_program(model, x, y, num_particles, poutine.condition(data=latents))
    sites = sample_sites(trace, "model")
    check_latents([n for n, s in sites.items() if not s["is_observed"] or n in latents], latents)
    return sites


def log_weights(
    model: Program,
    guide: Program | None,
    x: Tensor,
    y: Tensor | None = None,
    *,
    num_particles: int,
    chunk_size: int,
    joint: Callable[[Program, Tensor, Tensor | None, Latents], Tensor] = log_joint,
) -> Tensor:
    """Returns log importance weights log p(x, z) - log q(z | x) [K, B] of K fresh draws of z.

    The guide runs once; the model sees at most `chunk_size` draws of all data at a time.

    Args:
        model: As in `densities`.
        guide: The proposal, or None for the prior, whose weights are p(x | z).
        x: Data [B, *E].
        y: Condition of each datum [B, C], or None.
        num_particles: Draws K for each datum.
        chunk_size: Rows, draws times data, that the model sees at once.
        joint: Function that returns log p(x, z), such as a compiled `log_joint`.
    """
    step = max(1, chunk_size // len(x))
    parts = []
    if guide is None:
        for start in range(0, num_particles, step):
            trace = run_program(model, x, y, min(step, num_particles - start))
            sites = sample_sites(trace, "model")
            observed = {name: site for name, site in sites.items() if site["is_observed"]}
            parts.append(_log_prob(observed, x))
        return torch.cat(parts)
    latents, log_q = draw_latents(guide, x, y, num_particles=num_particles, chunk_size=chunk_size)
    for start in range(0, num_particles, step):
        chunk = {name: z[start : start + step] for name, z in latents.items()}
        with nullcontext() if start == 0 else pyro.validation_enabled(False):
            parts.append(joint(model, x, y, chunk))  # the first chunk has checked the data
    return torch.cat(parts) - log_q


def draw_data(model: Program, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Latents]:
    """Draws data [B, *E] from the model; returns them and their latents by site [1, B, *event].

    Args:
        model: Pyro model whose one observed site is x. Discrete sites that would be summed out
            if they were latent may be observed too: they keep their values.
        x: Data [B, *E], of which only shape, type and the places of NaN count: entries that are
            NaN are missing from the draws too.
        y: Condition of each datum [B, C], or None.

    Raises:
        NotSimulated: If the model observes anything but x, or its density is given a part of x.
    """
    args = [part for part in (x, y) if part is not None]
    with OwnParameters(), pyro.validation_enabled(False):
        first: Any = poutine.trace(model).get_trace(*args).nodes
        fixed = {  # observed sites that would be summed out were they latent
            name: site["value"]
            for name, site in first.items()
            if site["type"] == "sample"
            and site["is_observed"]
            and (site["infer"] or {}).get("enumerate") == "parallel"
        }
        unconditioned = poutine.condition(poutine.uncondition(model), data=fixed)
        nodes: Any = poutine.trace(unconditioned).get_trace(*args).nodes
    sites = {
        n: s for n, s in nodes.items() if s["type"] == "sample" and is_random(s) and n not in fixed
    }
    observed = [name for name, site in sites.items() if "obs" in site["infer"]]
    if len(observed) != 1 or not _is_same(sites[observed[0]]["infer"]["obs"], x):
        raise NotSimulated(
            "data are simulated for models whose one observed site is x itself; this one "
            f"observes {observed}"
        )
    if getattr(sites[observed[0]]["fn"], "given_value", False):
        raise NotSimulated("no data are simulated for a density that is given a part of x")
    drawn = sites.pop(observed[0])["value"].to(x.dtype)
    drawn = torch.where(x.isnan(), x, drawn)
    return drawn, {name: site["value"].unsqueeze(0) for name, site in sites.items()}


def complete_data(sites: Sites, x: Tensor, latents: Latents) -> Tensor:
    """Returns x [K, B, *E] with its missing entries (NaN) drawn from p(x | z).

    They are draws of the site of x in `sites`, as `sites_at` returns them at `latents`; or the
    values of a latent site of its name and "_missing", which models of missingness have.

    Raises:
        ValueError: If no site of the model observes x.
    """
    name = _site_of_data(sites, x, latents)
    values = latents.get(f"{name}_missing")
    draws = sites[name]["fn"].sample() if values is None else values
    return torch.where(x.isnan(), draws.to(x.dtype), x)


def entry_log_prob(sites: Sites, x: Tensor, latents: Latents) -> Tensor:
    """Returns log p(x_e | z) of each entry [K, B, *E] at given latents; 0 where it is missing.

    Raises:
        ValueError: If the model observes anything but x, or its entries are not independent.
    """
    name = _site_of_data(sites, x, latents)
    rest = {n: s["infer"] or {} for n, s in sites.items() if n not in (name, *latents)}
    if others := [n for n, infer in rest.items() if not infer.keys() & CLASS_SITE_KEYS]:
        raise ValueError(
            f"densities of single entries are of models whose one observed site is x itself; "
            f"this one observes {sorted(others)} too"
        )
    fn, value = sites[name]["fn"], sites[name]["value"]
    if hasattr(fn, "entry_log_prob"):
        return fn.entry_log_prob(value)
    fn = factors(fn)
    if fn.event_shape:
        raise ValueError(
            f"the entries of x are not independent under {type(fn).__name__}: densities of single "
            "entries need a likelihood that factorises"
        )
    return fn.log_prob(value)


def _site_of_data(sites: Sites, x: Tensor, latents: Latents) -> str:
    for name in sites.keys() - latents.keys():
        value = sites[name]["value"]
        if value.shape[-x.ndim :] == x.shape and _is_same(value.reshape(-1, *x.shape)[0], x):
            return name
    raise ValueError("the model must have a site that observes x itself: pyro.sample(.., obs=x)")


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors have the same numbers, and NaN in the same places."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


def _log_prob(sites: Sites, x: Tensor) -> Tensor:
    """Returns the sum of the sites' log densities [K, B]; B must be the number of rows of `x`."""
    terms = [site["fn"].log_prob(site["value"]) for site in sites.values()]
    if any(term.shape[-1] != len(x) for term in terms):
        raise ValueError(
            f"the plate 'data' has {terms[0].shape[-1]} rows for {len(x)} data: an estimate for "
            "each datum needs all of them; remove the subsampling"
        )
    return sum(terms, torch.zeros(()))
