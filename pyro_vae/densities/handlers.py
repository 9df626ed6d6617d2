"""Handlers of Pyro programs: whose parameters, which plate, what scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.arguments import check_real, check_whole

__all__ = ["OwnParameters", "Program", "ScaleLatents", "particle_plate", "scale_latents"]

Program = Callable[..., Any]


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


class ParticlePlate(IndepMessenger):
    """The plate of particles, outside the plate "data": `pyro.plate` less its subsampling."""

    def _process_message(self, msg: Any) -> None:
        super()._process_message(msg)
        fn = msg["fn"]
        if isinstance(fn, TorchDistributionMixin) and fn.batch_shape[:-1] != (self.size,):
            msg["infer"]["constant"] = fn  # it is the same for every particle
            BroadcastMessenger._pyro_sample(msg)


def particle_plate(num_particles: int) -> ParticlePlate:
    """A plate of `num_particles`, at dim -2."""
    check_whole(num_particles=num_particles)
    return ParticlePlate("particles", num_particles, dim=-2)
