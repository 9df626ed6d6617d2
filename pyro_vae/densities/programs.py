"""The handlers under which programs run, and the checks of their sites."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_vae.arguments import check_real
from pyro_vae.runtime import fast_products, forked, without_autocast

Program = Callable[..., Any]
Sites = dict[str, dict[str, Any]]
Latents = dict[str, Tensor]


class OwnParameters(Messenger):
    """Keeps modules' parameters out of Pyro's store: each site gets the module's own tensor.

    Registering them costs Python work per parameter, is needed by `pyro.infer.SVI` alone, and
    is global: a second module of the same names would be given the first one's tensors.
    """

    def _pyro_module(self, msg: dict[str, Any]) -> None:
        msg["done"] = True

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        initial = msg["args"][1] if len(msg["args"]) > 1 else None
        registered = msg["name"] in pyro.get_param_store()  # then there is nothing to register
        if isinstance(initial, nn.Parameter) and not registered:
            msg["value"], msg["stop"] = initial, True


@contextmanager
def evaluating(*programs: Program, seed: int | None, device: torch.device) -> Iterator[None]:
    """Runs what is inside in eval mode, without gradients and without autocast, and restores all.

    The modules whose methods `programs` are get switched with all their submodules. Modules
    that plain functions call are found as they run, by a forward pre-hook, in this thread.

    Args:
        programs: The model and guide that will run.
        seed: Seed of the draws inside; None goes on from the current state.
        device: Device of the draws.
    """
    store, thread = pyro.get_param_store(), threading.get_ident()
    owners = [p if isinstance(p, nn.Module) else getattr(p, "__self__", None) for p in programs]
    modules = [owner for owner in owners if isinstance(owner, nn.Module)]
    switched: list[nn.Module] = []

    def switch(module: nn.Module, *_: Any) -> None:
        if module.training and threading.get_ident() == thread:
            switched.append(module)
            module.training = False

    with (
        forked(device, seed),
        torch.no_grad(),
        without_autocast(device),
        fast_products(p for module in modules for p in module.parameters()),
        store.scope(store.get_state()),
        OwnParameters(),
    ):
        for module in chain.from_iterable(owner.modules() for owner in modules):
            switch(module)
        hook = register_module_forward_pre_hook(switch)
        try:
            yield
        finally:
            hook.remove()
            for module in switched:
                module.training = True


def scale_latents(fn: Program, beta: float | Tensor) -> Program:
    """Returns `fn` with the log density of every unobserved site multiplied by `beta`.

    `scale_latents(model, beta)` and `scale_latents(guide, beta)` under Pyro's own Trace_ELBO or
    TraceMeanField_ELBO are the beta-VAE; `objectives.ELBO(beta)` is the same bound. Both sides
    must be scaled. `poutine.scale` would scale the observed sites too, and refuses 0.

    What counts is whether a site is observed inside this handler: `scale_latents(condition(model,
    data), beta)` leaves the data's site alone; `condition(scale_latents(model, beta), data)`
    scales it, for inside it is still latent.

    Args:
        fn: A model or guide.
        beta: The weight, 0 included; a float or a tensor.

    References:
        Higgins et al. beta-VAE: learning basic visual concepts with a constrained variational
        framework. 2017.
    """
    if not isinstance(beta, Tensor):
        check_real(0, beta=beta)
    return ScaleLatents(beta)(fn)


class ScaleLatents(Messenger):
    """The handler behind `scale_latents`."""

    def __init__(self, beta: float | Tensor) -> None:
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * self.beta


def is_random(site: Any) -> bool:
    """Returns whether a "sample" site has a density; a subsample or deterministic one has none."""
    return not (site_is_subsample(site) or (site["infer"] or {}).get("_deterministic", False))


def sample_sites(trace: poutine.Trace, program: str) -> Sites:
    """Returns sites that have a density, by name; raises a ValueError on unsupported ones."""
    nodes: Any = trace.nodes
    sites = {n: s for n, s in nodes.items() if s["type"] == "sample" and is_random(s)}
    for name, site in sites.items():
        what, fn = f"{program} site {name!r}", site["fn"]
        if isinstance(fn, dist.Unit):
            raise ValueError(
                f"{what} is a pyro.factor, so that the program is not a density: "
                "use a distribution with an observed value"
            )
        if site["mask"] is not None or isinstance(fn, dist.MaskedDistribution):
            raise ValueError(
                f"{what} is masked; densities need every site unmasked: remove the mask"
            )
        plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        if plates != {"data": -1, "particles": -2}:
            found = sorted(plates.keys() - {"particles"})
            raise ValueError(
                f"{what} must be inside the plate 'data' at dim -1 and no other; found plates "
                f"{found}: move it inside, and declare further dimensions with .to_event()"
            )
        if len(fn.batch_shape) > 2:
            raise ValueError(
                f"{what} has batch shape {tuple(fn.batch_shape)}, more than (particles, data): "
                "declare the dimensions of a datum with .to_event()"
            )
    return sites


def check_latents(model_latents: list[str], guide_latents: Iterable[str]) -> None:
    """Raises a ValueError if the latent sites of model and guide differ, or there are none."""
    if missing := sorted(set(model_latents) ^ set(guide_latents)):
        raise ValueError(
            f"model and guide must have the same latent sites; {missing} is in one of them only"
        )
    if not model_latents:
        raise ValueError("the model has no latent site")
