"""torch's generators of random numbers, borrowed by one thread at a time, and put back; orders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_whole

__all__ = ["alone", "epoch_order", "forked", "seed_generators"]

# held by what borrows the state of a process, torch's generators and Pyro's handlers: fit and
# the estimators, so that of several threads the others wait
alone = RLock()


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Puts torch's generators for the CPU and `device` back afterwards; seeds them if asked.

    Inside, this thread is `alone`.
    Other devices are left alone: reading a CUDA generator's state initialises its device.
    """
    with alone, torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            seed_generators(device, seed)
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds torch's generators for the CPU and `device`, and no other."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def epoch_order(num_data: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits the rows, a permutation of 0, ..., N - 1, int64 [N].

    It depends on the three arguments only, so a resumed run needs no saved state.

    Raises:
        ValueError: If the seed or the epoch is negative.
    """
    check_whole(0, seed=seed, epoch=epoch)
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(num_data))
