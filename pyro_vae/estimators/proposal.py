"""A mixture of multivariate t for each posterior, to draw from and to score."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Proposal"]


@dataclass(frozen=True, eq=False)
class Proposal:
    r"""For each of B data a mixture of up to C multivariate t distributions.

    .. math:: q(u) = \sum_{c=1}^{C} \pi_c \, t_\nu(u; \mu_c, L_c L_c^\top)

    Attributes:
        log_weight: log pi [C, B]; minus infinity where a datum has fewer components.
        loc: Locations [C, B, D].
        tril: Cholesky factors of the scale matrices [C, B, D, D].
        df: Degrees of freedom nu.
    """

    log_weight: Tensor
    loc: Tensor
    tril: Tensor
    df: float = 20.0

    def rows(self, index: Tensor) -> Proposal:
        """The proposals of some of the data."""
        return Proposal(
            self.log_weight[:, index], self.loc[:, index], self.tril[:, index], self.df
        )

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of the heaviest component of each datum [B, D, D]."""
        heaviest = self.log_weight.argmax(0)
        return self.tril[heaviest, torch.arange(len(heaviest), device=heaviest.device)]

    def draw(self, num_draws: int) -> Tensor:
        """Draws [K, B, D]."""
        _, B, D = self.loc.shape
        noise = torch.randn_like(self.loc[:1].expand(num_draws, B, D))
        half = torch.full_like(noise[..., 0], self.df / 2)
        noise = noise * (half / torch._standard_gamma(half)).sqrt().unsqueeze(-1)
        component = torch.multinomial(self.log_weight.exp().T, num_draws, True).T
        draws = torch.zeros_like(noise)
        for c, (loc, tril) in enumerate(zip(self.loc, self.tril)):
            mine = loc + torch.einsum("bij,kbj->kbi", tril, noise)
            draws = torch.where((component == c).unsqueeze(-1), mine, draws)
        return draws

    def log_prob(self, u: Tensor) -> Tensor:
        """log q(u) [K, B] of u [K, B, D]."""
        D = u.shape[-1]
        terms = [
            log_weight
            - tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            - (self.df + D) / 2 * torch.log1p(_square(u - loc, tril) / self.df)
            for log_weight, loc, tril in zip(self.log_weight, self.loc, self.tril)
        ]
        constant = math.lgamma((self.df + D) / 2) - math.lgamma(self.df / 2)
        return (
            torch.logsumexp(torch.stack(terms), 0) + constant - D / 2 * math.log(self.df * math.pi)
        )


def _square(difference: Tensor, tril: Tensor) -> Tensor:
    """Squared length [K, B] of vectors [K, B, D] in units of the factor [B, D, D]."""
    white = torch.linalg.solve_triangular(tril, difference.permute(1, 2, 0), upper=False)
    return white.pow(2).sum(1).T
