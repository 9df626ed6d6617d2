"""Variational autoencoders as Pyro programs: declared, trained by SVI, judged by log p(x)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pyro_vae import (
        data,
        distributions,
        estimators,
        hierarchy,
        likelihoods,
        metrics,
        networks,
        objectives,
        plots,
        posteriors,
        priors,
    )
    from pyro_vae.cli.explore import explore
    from pyro_vae.cli.score import Scorer
    from pyro_vae.config import build, load
    from pyro_vae.densities import scale_latents
    from pyro_vae.estimators import (
        Audit,
        Evidence,
        Imputation,
        annealed_importance_sampling,
        audit,
        bidirectional,
        class_probabilities,
        column_log_prob,
        importance_sampling,
        impute,
        log_conditional,
        log_evidence,
        refined_importance_sampling,
    )
    from pyro_vae.training import fit
    from pyro_vae.vae import VAE

_HOMES = {  # modules of the names that are not in estimators
    "VAE": "vae",
    "build": "config",
    "load": "config",
    "Scorer": "cli.score",
    "explore": "cli.explore",
    "fit": "training",
    "scale_latents": "densities",
}
_MODULES = {
    *("data", "distributions", "estimators", "hierarchy", "likelihoods", "metrics", "networks"),
    *("objectives", "plots", "posteriors", "priors"),
}

__all__ = [
    "VAE",
    "Audit",
    "Evidence",
    "Imputation",
    "Scorer",
    "annealed_importance_sampling",
    "audit",
    "bidirectional",
    "build",
    "class_probabilities",
    "column_log_prob",
    "data",
    "distributions",
    "estimators",
    "explore",
    "fit",
    "hierarchy",
    "importance_sampling",
    "impute",
    "likelihoods",
    "load",
    "log_conditional",
    "log_evidence",
    "metrics",
    "networks",
    "objectives",
    "plots",
    "posteriors",
    "priors",
    "refined_importance_sampling",
    "scale_latents",
]


def __getattr__(name: str) -> Any:
    # imports lazily, so that the command line can show its help without loading torch
    if name in _MODULES:
        return import_module(f"pyro_vae.{name}")
    if name in __all__:
        return getattr(import_module(f"pyro_vae.{_HOMES.get(name, 'estimators')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
