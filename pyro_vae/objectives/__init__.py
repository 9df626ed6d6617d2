"""Objectives: what is maximised, one small class each."""

from pyro_vae.objectives.base import Objective
from pyro_vae.objectives.elbo import ELBO

__all__ = ["ELBO", "Objective"]
