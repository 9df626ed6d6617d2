"""The order of an epoch and its batches."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole


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
