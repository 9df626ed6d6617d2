"""Likelihoods: z -> p(x | z)."""

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.columns import Columns
from pyro_vae.likelihoods.real import (
    Bernoulli,
    Beta,
    ContinuousBernoulli,
    Laplace,
    LogNormal,
    Normal,
    StudentT,
)
from pyro_vae.likelihoods.whole import (
    Categorical,
    DiscretizedLogistic,
    MixtureOfLogistics,
    NegativeBinomial,
    Ordinal,
    Poisson,
)

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Laplace",
    "Likelihood",
    "LogNormal",
    "MixtureOfLogistics",
    "NegativeBinomial",
    "Normal",
    "Ordinal",
    "Poisson",
    "StudentT",
]
