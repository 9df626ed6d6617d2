"""Memory of the CPU: what stays at hand between operations, and what can never fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["check_fits", "keep_memory", "parameters_that_fit"]

LARGEST = 31 * 2**20  # bytes; glibc looks at blocks of up to 32 MiB


def keep_memory() -> None:
    """Has the C library keep up to 62 MB that were freed, for the operations to come.

    glibc gives freed memory back beyond twice the largest block that it has seen freed. Where
    temporaries take a few MB, each operation then waits for pages from the system: a third of
    the time of an evaluation. So let it see a large block freed, which is never touched. Where
    another library allocates, nothing happens.
    """
    torch.empty(LARGEST, dtype=torch.uint8)


def check_fits(num_bytes: int, what: str) -> None:
    """Refuses what takes more memory than this machine has."""
    if not hasattr(os, "sysconf"):  # not on Windows
        return
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > here:
        raise ValueError(
            f"{what} would take {num_bytes / 2**30:,.0f} GiB of memory; this machine has "
            f"{here / 2**30:,.0f}: ask for less"
        )


@contextmanager
def parameters_that_fit() -> Iterator[None]:
    """Refuses modules that are made inside if their parameters do not fit in memory."""
    taken = 0

    def add(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal taken
        taken += 0 if parameter is None else parameter.nbytes
        check_fits(taken, "the parameters")

    hook = register_module_parameter_registration_hook(add)
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("allocate", "overflow")):
            raise
        raise ValueError(
            "the parameters do not fit in memory: ask for fewer latents or narrower layers"
        ) from error
    finally:
        hook.remove()
