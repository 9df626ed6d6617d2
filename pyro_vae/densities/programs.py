"""Programs: how they are called, what their handlers change, which sites are accepted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_vae.arguments import check_real

__all__ = [
    "OwnParameters",
    "ParticlePlate",
    "Program",
    "Sites",
    "check_latents",
    "is_random",
    "is_traced",
    "known_of",
    "program_args",
    "sample_sites",
    "scale_latents",
]

Program = Callable[..., Any]
Sites = dict[str, dict[str, Any]]
_known: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def known_of(program: Program) -> dict[Any, Any]:
    """What has been found out about a program, by a key of the finder's; kept while it lives.

    All that is found about a method is kept with its object. Where the object takes no weak
    references nothing is kept, and each question is answered anew.
    """
    owner, method = getattr(program, "__self__", program), getattr(program, "__func__", None)
    try:
        return _known.setdefault(owner, {}).setdefault(method, {})
    except TypeError:
        return {}


def is_traced(x: Tensor) -> bool:
    """Whether a tensor is that of a tracer, without numbers that could be tried."""
    return type(x) not in (Tensor, nn.Parameter)


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


def program_args(x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """What a program is called with: (x) or (x, y)."""
    return (x,) if y is None else (x, y)


def is_random(site: Any) -> bool:
    """Whether a site of type "sample" has a density: neither a plate's rows nor deterministic."""
    return not (site_is_subsample(site) or (site["infer"] or {}).get("_deterministic", False))


def sample_sites(trace: poutine.Trace, program: str) -> Sites:
    """The sites of a trace that have a density, by name; refuses what has none per datum."""
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


def check_latents(model: list[str], guide: Iterable[str]) -> None:
    """Refuses programs whose latent sites differ, or that have none."""
    if missing := sorted(set(model) ^ set(guide)):
        raise ValueError(
            f"model and guide must have the same latent sites; {missing} is in one of them only"
        )
    if not model:
        raise ValueError("the model has no latent site")
