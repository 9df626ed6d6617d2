"""Likelihoods: z -> p(x | z)."""

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.columns import Columns
from pyro_vae.likelihoods.counts import NegativeBinomial, Poisson
from pyro_vae.likelihoods.levels import (
    Categorical,
    DiscretizedLogistic,
    MixtureOfLogistics,
    Ordinal,
)
from pyro_vae.likelihoods.real import Laplace, LogNormal, Normal, StudentT
from pyro_vae.likelihoods.unit import Bernoulli, Beta, ContinuousBernoulli

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
