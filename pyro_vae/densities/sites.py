"""The sites of a traced program, refused where they have no log weight per datum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro.distributions as dist
import pyro.poutine as poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["Sites", "check_latents", "is_random", "program_args", "sample_sites"]

Sites = dict[str, dict[str, Any]]


def program_args(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """What a program is called with: (x) or (x, y)."""
    return (x,) if y is None else (x, y)


def is_random(site: Any) -> bool:
    """Whether a site of type "sample" has a density: neither a plate's rows nor deterministic."""
    return not (site_is_subsample(site) or (site["infer"] or {}).get("_deterministic", False))


def sample_sites(trace: poutine.Trace, program: str) -> Sites:
    """The sites of a trace that have a density, by name, each checked."""
    nodes: Any = trace.nodes
    sites = {n: s for n, s in nodes.items() if s["type"] == "sample" and is_random(s)}
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


def check_latents(model: list[str], guide: Iterable[str]) -> None:
    """Refuses programs whose latent sites differ, or that have none."""
    if missing := sorted(set(model) ^ set(guide)):
        raise ValueError(
            f"model and guide must have the same latent sites; {missing} is in one of them only"
        )
    if not model:
        raise ValueError("the model has no latent site")
