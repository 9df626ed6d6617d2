"""Estimators of log p(x): no gradients, nothing left behind."""

from pyro_vae.estimators.bound import Bound, evidence_lower_bound
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.importance import importance_sampling

__all__ = ["Bound", "Evidence", "evidence_lower_bound", "importance_sampling"]
