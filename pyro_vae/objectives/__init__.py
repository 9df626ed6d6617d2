"""Objectives: what is maximised, one small class each, and the schedules of their weights."""

from pyro_vae.objectives.aggregate import (
    DIP,
    BetaTC,
    FactorVAE,
    HierarchicallyFactorized,
    InfoVAE,
)
from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.elbo import ELBO, Capacity, FreeBits, StickingTheLanding
from pyro_vae.objectives.importance_weighted import CIWAE, IWAE, MIWAE, PIWAE, DReG, Renyi
from pyro_vae.objectives.schedules import Constant, Cosine, Cyclical, Linear, Schedule

__all__ = [
    "BetaTC",
    "CIWAE",
    "Capacity",
    "Constant",
    "Cosine",
    "Cyclical",
    "DIP",
    "DReG",
    "ELBO",
    "FactorVAE",
    "FreeBits",
    "HierarchicallyFactorized",
    "IWAE",
    "InfoVAE",
    "Linear",
    "MIWAE",
    "Objective",
    "PIWAE",
    "Renyi",
    "Schedule",
    "StickingTheLanding",
]
