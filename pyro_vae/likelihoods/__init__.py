"""Likelihoods: z -> p(x | z)."""

from pyro_vae.likelihoods.base import Likelihood
from pyro_vae.likelihoods.counts import NegativeBinomial, Poisson
from pyro_vae.likelihoods.levels import Categorical, DiscretizedLogistic, MixtureOfLogistics
from pyro_vae.likelihoods.real import Laplace, Normal, StudentT
from pyro_vae.likelihoods.unit import Bernoulli, Beta, ContinuousBernoulli

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Laplace",
    "Likelihood",
    "MixtureOfLogistics",
    "NegativeBinomial",
    "Normal",
    "Poisson",
    "StudentT",
]
