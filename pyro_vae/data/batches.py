"""The order of an epoch and its batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole
from pyro_vae.data.noise import check_seed


def epoch_order(num_data: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the rows.

    It depends on the three arguments only, so a resumed run needs no saved state.

    Args:
        num_data: The number of rows N.
        seed: The seed of the run, 0 or more.
        epoch: The number of the epoch, 0 or more.

    Returns:
        A permutation of 0, ..., N - 1, int64 [N].

    Raises:
        ValueError: If the seed or the epoch is negative.
    """
    if epoch < 0:
        raise ValueError(f"expected an epoch of 0 or more, got {epoch}")
    return torch.from_numpy(np.random.default_rng([check_seed(seed), epoch]).permutation(num_data))


def spread(num_data: int, limit: int | None, seed: int) -> Tensor:
    """Rows that stand for all: one drawn from each of `limit` stretches of equal length.

    Args:
        num_data: The number of rows N.
        limit: The most rows; None for all.
        seed: Of the draws, 0 or more.

    Returns:
        Indices in order, int64 [min(N, limit)].

    Raises:
        ValueError: If the limit is below one.
    """
    check_whole(optional=True, limit=limit)
    if limit is None or limit >= num_data:
        return torch.arange(num_data)
    edges = np.linspace(0, num_data, limit + 1).round().astype(np.int64)
    return torch.from_numpy(np.random.default_rng(seed).integers(edges[:-1], edges[1:]))


def batches(num: int, size: int) -> tuple[Tensor, ...]:
    """The indices 0, ..., num - 1 in chunks of ``size``, the last one shorter if need be.

    ``epoch_order(num, seed, epoch).split(size)`` gives the same chunks of a shuffled epoch.

    Raises:
        ValueError: If either number is below 1.
    """
    if num < 1 or size < 1:
        raise ValueError(f"expected at least 1 row and a batch size of 1, got {num} and {size}")
    return torch.arange(num).split(size)
