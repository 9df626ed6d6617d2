"""Uniform noise that belongs to a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole


def check_seed(seed: int) -> int:
    """Returns the seed, or raises a ValueError where it is none."""
    check_whole(0, seed=seed)
    return seed


def row_noise(rows: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Uniform noise in [0, 1) that depends on the seed and the row's id only.

    Each row has its own stream of the counter-based generator Philox, with (seed, id) for a key,
    so the order, the subset and the batch that a row comes in change nothing.

    Source: J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        rows: The ids of the rows, int64 [N].
        shape: The shape of one datum.
        seed: The seed, 0 or more.

    Returns:
        The noise, float32 [N, *shape], on the device of ``rows``.
    """
    noise = np.empty((len(rows), *shape), dtype=np.float32)
    for row, out in zip(rows.tolist(), noise):
        key = np.array([check_seed(seed), row], dtype=np.uint64)
        out[...] = np.random.Generator(np.random.Philox(key=key)).random(shape, np.float32)
    return torch.from_numpy(noise).to(rows.device)
