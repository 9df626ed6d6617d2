"""Measurements of what a model has learned."""

from pyro_vae.metrics.calibration import (
    Calibration,
    Difference,
    calibration,
    p_values,
    paired_difference,
)
from pyro_vae.metrics.decomposition import Decomposition, Term, active_units, elbo_decomposition
from pyro_vae.metrics.information import Score, factor_information, mig, mig_of_means, modularity
from pyro_vae.metrics.predictors import DCI, beta_vae_score, dci, factor_vae_score, sap

__all__ = [
    "Calibration",
    "DCI",
    "Decomposition",
    "Difference",
    "Score",
    "Term",
    "active_units",
    "beta_vae_score",
    "calibration",
    "dci",
    "elbo_decomposition",
    "factor_information",
    "factor_vae_score",
    "mig",
    "mig_of_means",
    "modularity",
    "p_values",
    "paired_difference",
    "sap",
]
