"""Latent dimensions that the posterior uses."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_vae.arguments import check_real

__all__ = ["active_units"]


def active_units(posterior_means: Tensor, threshold: float = 0.01) -> Tensor:
    r"""Which dimensions are active [D]: :math:`\mathrm{Var}_x(E_q[z_d \mid x])` above `threshold`.

    Args:
        posterior_means: E_q[z | x] of N data [N, D].
        threshold: Least variance of an active dimension.

    References:
        Burda, Grosse and Salakhutdinov. Importance weighted autoencoders. 2016.
    """
    check_real(0, threshold=threshold)
    return torch.var(posterior_means, 0) > threshold
