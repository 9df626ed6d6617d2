"""Measurements of what a model has learned."""

from pyro_vae.metrics.active_units import active_units
from pyro_vae.metrics.calibration import Calibration, calibration
from pyro_vae.metrics.dci import DCI, dci
from pyro_vae.metrics.decomposition import Decomposition, Term, elbo_decomposition
from pyro_vae.metrics.mig import factor_information, mig, mig_of_means
from pyro_vae.metrics.modularity import modularity
from pyro_vae.metrics.sap import sap
from pyro_vae.metrics.score import Score
from pyro_vae.metrics.votes import beta_vae_score, factor_vae_score

__all__ = [
    "Calibration",
    "DCI",
    "Decomposition",
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
    "sap",
]
