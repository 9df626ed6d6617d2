"""The one latent site that an objective of the aggregate posterior looks at."""

from __future__ import annotations

from torch import Tensor

from pyro_vae.densities import Densities, Site

__all__ = ["draws", "only_site"]


def only_site(d: Densities) -> Site:
    """The latent site of `d`.

    Raises:
        ValueError: If there are several: q(z) of a hierarchy is not a mixture of q(z | x_n)
            whose densities are known.
    """
    if len(d.sites) != 1:
        raise ValueError(
            "the aggregate posterior needs exactly one latent site; the model has "
            f"{sorted(d.sites)}: use ELBO or another objective of single data"
        )
    return next(iter(d.sites.values()))


def draws(d: Densities) -> Tensor:
    """The draws of the one latent site, flattened to [K, B, D]."""
    return only_site(d).value.reshape(d.num_particles, d.num_data, -1)
