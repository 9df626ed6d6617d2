"""Going through the data in batches that fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from pyro_vae.densities import Program
from pyro_vae.estimators.evaluating import evaluating
from pyro_vae.estimators.target import ROWS, Target

__all__ = ["map_targets", "track"]

T = TypeVar("T")
DRAWS_AT_ONCE = 8  # draws of each datum that make up the rows that the model sees at once
NUMBERS = 5_000_000  # coordinates of a thousand draws of a batch


def map_targets(
    estimate: Callable[[Target], T],
    model: Program,
    guide: Program,
    x: Tensor,
    y: Tensor | None,
    *,
    chunk_size: int | None,
    seed: int | None,
    progress: bool,
) -> list[T]:
    """What `estimate` gives for the posteriors of each batch of data, in order.

    Modes, random state, parameters and Pyro's store are afterwards as they were.

    Raises:
        ValueError: If there are no data, or `chunk_size` is below one.
    """
    rows = ROWS if chunk_size is None else chunk_size
    if rows < 1 or len(x) < 1:
        raise ValueError(f"chunk_size and data must be at least 1; got {rows} and {len(x)}")
    with evaluating(model, guide, seed=seed, device=x.device):
        first = Target(model, guide, x[:1], None if y is None else y[:1], chunk_size=rows)
        size = max(1, min(rows // DRAWS_AT_ONCE, NUMBERS // (1000 * first.dim)))
        batches = torch.arange(len(x), device=x.device).split(size)
        return [
            estimate(Target(model, guide, x[i], None if y is None else y[i], chunk_size=rows))
            for i in track(batches, "log p(x)", progress)
        ]


def track(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    """The items, with a progress bar if asked for."""
    if not show:
        return items
    from rich.progress import track as rich_track

    return rich_track(items, description)
