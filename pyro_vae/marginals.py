"""Densities of single latent dimensions, and of all pairs of a draw and a datum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, Normal

__all__ = ["marginals", "pair_log_prob", "pair_marginals"]


def marginals(q: Distribution) -> Normal:
    """Returns the q(z_d), batch [*S, D], of a q(z) of batch *S and event (D,).

    Args:
        q: A Normal, diagonal (`Independent(Normal)`) or full (`MultivariateNormal`).

    Raises:
        ValueError: If the densities of its dimensions are not known, as for a flow.
    """
    if isinstance(q, MultivariateNormal):
        return Normal(q.loc, q.variance.sqrt(), validate_args=False)
    base = q.base_dist if isinstance(q, Independent) else q
    if not isinstance(base, Normal):
        raise ValueError(
            f"the densities of single dimensions of {type(base).__name__} are not known: expected "
            "a Normal, diagonal or full; use the posterior DiagonalNormal or FullNormal"
        )
    shape = (*q.batch_shape, q.event_shape.numel())
    return Normal(base.loc.reshape(shape), base.scale.reshape(shape), validate_args=False)


def pair_marginals(q: Distribution, z: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Returns log q_n(z_md) [*S, M, N, D], in nats, of M draws under N distributions.

    Args:
        q: Batch [*S, N], event (D,), as in `marginals`.
        z: Draws [*S, M, D].
        dims: Dimensions to take; None for all.
    """
    each = marginals(q)
    loc, scale = (_select(part, dims).unsqueeze(-3) for part in (each.loc, each.scale))
    return Normal(loc, scale, validate_args=False).log_prob(_select(z, dims).unsqueeze(-2))


def pair_log_prob(q: Distribution, z: Tensor, dims: Sequence[int] | None = None) -> Tensor:
    """Returns log q_n(z_m) [*S, M, N], in nats, or that of the dimensions `dims` alone.

    Arguments are those of `pair_marginals`.
    """
    if not isinstance(q, MultivariateNormal):
        return pair_marginals(q, z, dims).sum(-1)
    tril = q.scale_tril
    if dims is not None:  # plain cholesky would make a GPU wait, to see whether there is a root
        tril = torch.linalg.cholesky_ex(_select(_select(q.covariance_matrix, dims).mT, dims)).L
    loc, tril = _select(q.loc, dims).unsqueeze(-3), tril.unsqueeze(-4)
    pairs = MultivariateNormal(loc, scale_tril=tril, validate_args=False)
    return pairs.log_prob(_select(z, dims).unsqueeze(-2))


def _select(tensor: Tensor, dims: Sequence[int] | None) -> Tensor:
    """Takes `dims` of the last dimension, without an index tensor, which makes a GPU wait."""
    return tensor if dims is None else torch.stack([tensor[..., dim] for dim in dims], -1)
