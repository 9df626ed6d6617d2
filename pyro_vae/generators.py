"""torch's generators of random numbers, borrowed by one thread at a time, and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

import torch

__all__ = ["alone", "forked", "seed_generators"]

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
