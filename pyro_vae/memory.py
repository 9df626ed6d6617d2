"""Memory of the CPU that stays at hand between operations."""

from __future__ import annotations

import torch

__all__ = ["keep_memory"]

LARGEST = 31 * 2**20  # bytes; glibc looks at blocks of up to 32 MiB


def keep_memory() -> None:
    """Has the C library keep up to 62 MB that were freed, for the operations to come.

    glibc gives freed memory back beyond twice the largest block that it has seen freed. Where
    temporaries take a few MB, each operation then waits for pages from the system: a third of
    the time of an evaluation. So let it see a large block freed, which is never touched. Where
    another library allocates, nothing happens.
    """
    torch.empty(LARGEST, dtype=torch.uint8)
