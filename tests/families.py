"""Every class of each family, found by itself, and a VAE of any of them."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae import likelihoods, networks, objectives, posteriors, priors
from pyro_vae.config import build
from pyro_vae.distributions import Flow
from pyro_vae.hierarchy import Inference
from pyro_vae.vae import VAE


def final(base: type) -> list[type]:
    """Subclasses of `base` within pyro_vae that have no abstract method left, by name."""
    found, queue = [], [base]
    while queue:
        cls = queue.pop()
        queue += cls.__subclasses__()
        abstract = any(
            getattr(getattr(cls, name, None), "__isabstractmethod__", False) for name in dir(cls)
        )
        if cls.__module__.startswith("pyro_vae.") and not abstract:
            found.append(cls)
    return sorted(found, key=lambda cls: cls.__name__)


CONDITIONAL = [c for c in final(priors.Prior) if "network" in inspect.signature(c).parameters]
PRIORS = [cls for cls in final(priors.Prior) if cls not in CONDITIONAL]
LIKELIHOODS = final(likelihoods.Likelihood)
POSTERIORS = final(posteriors.Posterior)
NETWORKS = final(networks.Network)
OBJECTIVES = final(objectives.Objective)
ORDERS = final(Inference)


def each_once(*families: list[type]) -> list[Any]:
    """One class of each family, in so few cases that each class occurs; slow are all others."""
    found = []
    for classes in product(*families):
        places = [family.index(cls) for family, cls in zip(families, classes, strict=True)]
        once = all(i == max(places) % len(family) for i, family in zip(places, families))
        marks = () if once else pytest.mark.slow
        found.append(pytest.param(*classes, id="-".join(map(name, classes)), marks=marks))
    return found


def triples(first: list[type], second: list[type], third: list[type]) -> list[Any]:
    """A class of each family, the third the smallest; slow where its pairs occur elsewhere."""
    found = []
    for (i, a), (j, b), (k, c) in product(*map(enumerate, (first, second, third))):
        marks = () if k == (i + j) % len(third) else pytest.mark.slow
        found.append(pytest.param(a, b, c, id="-".join(map(name, (a, b, c))), marks=marks))
    return found


def name(cls: type) -> str:
    """Test id of a class."""
    return cls.__name__


def accepted(cls: type, **offered: Any) -> dict[str, Any]:
    """Those of `offered` that the constructor of `cls` takes."""
    return {k: v for k, v in offered.items() if k in inspect.signature(cls).parameters}


def make(
    prior: type = priors.StandardNormal,
    likelihood: type = likelihoods.Bernoulli,
    posterior: type = posteriors.DiagonalNormal,
    data_shape: tuple[int, ...] = (7,),
    latent_dim: int = 2,
    hidden: tuple[int, ...] = (5,),
    missing: bool = False,
    components: int = 11,
    **options: Any,
) -> VAE:
    """A VAE of three classes with few components; `options` are those of its dense networks."""
    channels, *rest = data_shape
    in_shape = likelihood.input_shape(data_shape, missing=missing)
    encoder = networks.MLP(in_shape, posterior.num_params(latent_dim), hidden, **options)
    out_shape = (likelihood.num_params() * channels, *rest)
    decoder = networks.MLP(latent_dim, out_shape, hidden, **options)
    q = posterior(encoder, latent_dim)
    given = {"latent_dim": latent_dim, "posterior": q, "data_shape": in_shape}
    p = prior(**accepted(prior, num_components=components, **given))
    return VAE(p, likelihood(decoder, data_shape), q, missing)


def layered(order: type, latent_dim: tuple[int, ...] = (2, 3), **declared: Any) -> VAE:
    """A VAE of several layers of latents, from data of length 7 if nothing else is declared."""
    small = {"class_path": "MLP", "init_args": {"hidden": [5]}}
    given = {"data_shape": 7, "encoder": small, "decoder": small, **declared}
    return build(latent_dim=latent_dim, hierarchy=order.__name__, **given)


def network(cls: type, **options: Any) -> networks.Network:
    """A network of `cls` from an image or to one, whichever it is for."""
    try:
        return cls((2, 7, 5), 11, **options)
    except ValueError:
        return cls(11, (2, 7, 5), **options)


def draw(vae: VAE, size: int, **given: Tensor) -> Tensor:
    """Data that fit the likelihood: draws of the model itself, off the ends of an interval."""
    with torch.no_grad():
        x = vae.sample(size, **given)
    support = vae.likelihood.support
    if isinstance(support, constraints.interval):
        return x.clamp(support.lower_bound, support.upper_bound)
    return x


def draws(distribution: Any) -> int:
    """As many as find a scale that is 2 % wrong, less for what is slow."""
    return 50_000 if isinstance(distribution, Flow) else 200_000


def sampling_error(distribution: Any, draws: Tensor) -> Tensor:
    """Standard error of the mean of `draws` less the distribution's own mean."""
    own = 1 / 1000 if isinstance(distribution, Flow) else 0.0  # as good as 1000 draws
    return draws.std(0) * (1 / len(draws) + own) ** 0.5


class Raw(nn.Module):
    """A decoder whose latents are the raw parameters."""

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return z
