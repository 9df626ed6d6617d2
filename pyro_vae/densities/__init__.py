"""Turns (model, guide, x) into log p(x|z), log p(z), log q(z|x), and the sites behind them."""

from pyro_vae.densities.particles import folds, run_program
from pyro_vae.densities.programs import (
    Latents,
    OwnParameters,
    Program,
    evaluating,
    scale_latents,
)
from pyro_vae.densities.result import KL_RULES, Densities, Site, factors, log_mean_exp
from pyro_vae.densities.run import (
    NotSimulated,
    complete_data,
    densities,
    draw_data,
    draw_latents,
    entry_log_prob,
    log_joint,
    log_weights,
    registered_densities,
    sites_at,
)
from pyro_vae.densities.summed import check_values, summed_values

__all__ = [
    "Densities",
    "KL_RULES",
    "Latents",
    "NotSimulated",
    "OwnParameters",
    "Program",
    "Site",
    "check_values",
    "complete_data",
    "densities",
    "draw_latents",
    "entry_log_prob",
    "evaluating",
    "factors",
    "folds",
    "log_joint",
    "log_mean_exp",
    "log_weights",
    "registered_densities",
    "run_program",
    "scale_latents",
    "sites_at",
    "draw_data",
    "summed_values",
]
