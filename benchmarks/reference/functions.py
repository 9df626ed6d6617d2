"""A model of the set as three functions of numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import biject_to

from benchmarks.reference.families import Family

__all__ = ["functions"]

DrawPrior = Callable[[int, int], np.ndarray]
LogDensities = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def functions(
    program: Family, x: Tensor
) -> tuple[DrawPrior, LogDensities, Callable[[np.ndarray], np.ndarray]]:
    """Three functions of one unconstrained vector u for each of the N data.

    Positive latents are exponentials of u, those of an interval its logistic function, shares
    its stick-breaking; the densities are those of u, float64.

    Returns:
        draw_prior(K, seed) -> u [K, N, D]: draws of the prior;
        log_densities(u) -> log p(u), log p(x | u), each [K, N];
        gradient(u) -> of their sum with respect to u, [K, N, D].
    """

    def draw_prior(num_draws: int, seed: int) -> np.ndarray:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            nodes = run(program.model, x, num_draws)
        parts = [
            biject_to(support).inv(nodes[name]["value"])
            for name, (_, support) in program.sites.items()
        ]
        return torch.cat(parts, -1).numpy()

    def log_densities(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            log_prior, log_likelihood = densities(program, x, torch.as_tensor(u))
        return log_prior.numpy(), log_likelihood.numpy()

    def gradient(u: np.ndarray) -> np.ndarray:
        leaf = torch.as_tensor(u, dtype=torch.float64).requires_grad_()
        total = sum(part.sum() for part in densities(program, x, leaf))
        return torch.autograd.grad(total, leaf)[0].numpy()

    return draw_prior, log_densities, gradient


def densities(program: Family, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """log p(u) and log p(x | u), each [K, N]."""
    latents, log_det = {}, torch.zeros(u.shape[:2], dtype=torch.float64)
    for (name, (_, support)), free in zip(program.sites.items(), u.split(program.sizes, -1)):
        transform = biject_to(support)
        value = transform(free)
        jacobian = transform.log_abs_det_jacobian(free, value)
        log_det = log_det + (jacobian if jacobian.ndim == 2 else jacobian.sum(-1))
        latents[name] = value
    nodes = run(poutine.condition(program.model, latents), x, len(u))
    terms = {name: nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in (*latents, "x")}
    log_likelihood = terms.pop("x")
    return sum(terms.values(), log_det), log_likelihood


def run(model: Callable[..., Any], x: Tensor, num_draws: int) -> Any:
    """The sites of K runs of a model, by name."""
    with pyro.validation_enabled(False), pyro.plate("particles", num_draws, dim=-2):
        return poutine.trace(model).get_trace(x).nodes
