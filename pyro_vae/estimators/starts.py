"""What an annealed path starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pyro_vae.estimators.refined import Fit, fit_proposal
from pyro_vae.estimators.target import Target

__all__ = ["STARTS", "Start", "make_start"]

STARTS = ("prior", "guide", "refined")
GUIDE_DRAWS = 200  # behind the spread of the guide


class Start(Protocol):
    """A density to draw from and to score, beside that of the target."""

    @property
    def target(self) -> Target:
        """The posteriors of B data."""

    @property
    def scale_tril(self) -> Tensor:
        """The metric of the moves [B, D, D], a rough factor of the covariance."""

    def draw(self, num_draws: int) -> Tensor:
        """Draws [K, B, D]."""

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log density of the start and log p(x, u), each [K, B]."""


class Prior:
    """The model's prior."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.scale_tril = torch.diag_embed(torch.ones_like(target.scale))

    def draw(self, num_draws: int) -> Tensor:
        """Draws of the prior."""
        return self.target.draw_prior(num_draws)[0]

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x, u)."""
        log_prior, log_likelihood = self.target.log_prior(u)
        return log_prior, log_prior + log_likelihood


class Guide:
    """The guide."""

    def __init__(self, target: Target) -> None:
        self.target = target
        spread = target.draw_guide(GUIDE_DRAWS).std(0)
        usable = (spread > 0) & spread.isfinite()
        self.scale_tril = torch.diag_embed(torch.where(usable, spread, torch.ones_like(spread)))

    def draw(self, num_draws: int) -> Tensor:
        """Draws of the guide."""
        return self.target.draw_guide(num_draws)

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q(u | x) and log p(x, u)."""
        return self.target.log_guide(u), self.target.log_joint(u)


@dataclass(frozen=True, eq=False)
class Refined:
    """The proposals fitted to the posteriors."""

    fit: Fit

    @property
    def target(self) -> Target:
        """The posteriors."""
        return self.fit.target

    @property
    def scale_tril(self) -> Tensor:
        """Factor of the heaviest component."""
        return self.fit.proposal.scale_tril

    def draw(self, num_draws: int) -> Tensor:
        """Draws of the proposals."""
        return self.fit.proposal.draw(num_draws)

    def log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q(u) and log p(x, u)."""
        return self.fit.proposal.log_prob(u), self.target.log_joint(u)


def make_start(name: str, target: Target) -> Start:
    """The start of that name.

    Raises:
        ValueError: If the likelihood has no gradient, or the guide no density.
    """
    if name == "refined":
        return Refined(fit_proposal(target))
    target.check_gradient()
    if name == "guide" and not target.guide_is_density:
        raise ValueError("the guide is a Delta, which has no density: use start='refined'")
    return Prior(target) if name == "prior" else Guide(target)
