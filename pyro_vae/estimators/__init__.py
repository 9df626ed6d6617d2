"""Estimators of log p(x), which take no gradients of parameters and change no state."""

from pyro_vae.estimators.annealed import Bracket, annealed_importance_sampling, bidirectional
from pyro_vae.estimators.conditional import (
    ClassProbabilities,
    class_probabilities,
    column_log_prob,
    log_conditional,
)
from pyro_vae.estimators.evidence import Evidence
from pyro_vae.estimators.importance import (
    Bound,
    convergence,
    evidence_lower_bound,
    importance_sampling,
    jackknife,
)
from pyro_vae.estimators.impute import Imputation, impute
from pyro_vae.estimators.log_evidence import Audit, audit, log_evidence
from pyro_vae.estimators.refined import refined_importance_sampling

__all__ = [
    "Audit",
    "Bound",
    "Bracket",
    "ClassProbabilities",
    "Evidence",
    "Imputation",
    "annealed_importance_sampling",
    "audit",
    "bidirectional",
    "class_probabilities",
    "column_log_prob",
    "convergence",
    "evidence_lower_bound",
    "importance_sampling",
    "impute",
    "jackknife",
    "log_conditional",
    "log_evidence",
    "refined_importance_sampling",
]
