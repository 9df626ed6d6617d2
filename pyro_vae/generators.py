"""torch's generators of random numbers, borrowed and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["forked", "seed_generators"]


@contextmanager
def forked(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Puts torch's generators for the CPU and `device` back afterwards; seeds them if asked.

    Other devices are left alone: a generator that is only looked at takes memory of a GPU.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            seed_generators(device, seed)
        yield


def seed_generators(device: torch.device, seed: int) -> None:
    """Seeds torch's generators for the CPU and `device`, and no other."""
    torch.random.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
