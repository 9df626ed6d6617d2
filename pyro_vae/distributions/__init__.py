"""Densities that Pyro lacks, and KL rules between them: all on classes of our own."""

from pyro_vae.distributions.latents import (
    Draw,
    Flow,
    FullNormal,
    Joint,
    MixtureOfDiagonalNormals,
    flow_family,
    make_flow,
    mixture,
)
from pyro_vae.distributions.rows import Incomplete, OfTotal, Product, Rows
from pyro_vae.distributions.scalars import (
    Bernoulli,
    Beta,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Interval,
    Label,
    Levels,
    MixtureOfLogistics,
    NegativeBinomial,
    Poisson,
)

__all__ = [
    "Bernoulli",
    "Beta",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Draw",
    "Flow",
    "FullNormal",
    "Incomplete",
    "Interval",
    "Joint",
    "Label",
    "Levels",
    "MixtureOfDiagonalNormals",
    "MixtureOfLogistics",
    "NegativeBinomial",
    "OfTotal",
    "Poisson",
    "Product",
    "Rows",
    "flow_family",
    "make_flow",
    "mixture",
]
