"""Objectives: what is maximised, one small class each, and the schedules of their weights."""

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.beta_tc import BetaTC
from pyro_vae.objectives.capacity import Capacity
from pyro_vae.objectives.ciwae import CIWAE
from pyro_vae.objectives.dip import DIP
from pyro_vae.objectives.dreg import DReG
from pyro_vae.objectives.elbo import ELBO
from pyro_vae.objectives.factor_vae import FactorVAE
from pyro_vae.objectives.free_bits import FreeBits
from pyro_vae.objectives.hierarchically_factorized import HierarchicallyFactorized
from pyro_vae.objectives.info_vae import InfoVAE
from pyro_vae.objectives.iwae import IWAE
from pyro_vae.objectives.miwae import MIWAE
from pyro_vae.objectives.piwae import PIWAE
from pyro_vae.objectives.renyi import Renyi
from pyro_vae.objectives.schedules import Constant, Cosine, Cyclical, Linear, Schedule
from pyro_vae.objectives.sticking_the_landing import StickingTheLanding

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
