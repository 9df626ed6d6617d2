"""The processes that train together, and their collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn

__all__ = ["Group"]

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """Processes that share each step and hold the same weights after it; one by default.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        device: The device of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def local_rows(self, index: Tensor) -> tuple[Tensor, float]:
        """This rank's rows of a batch, in order, and their weight in the mean of the batch.

        Every rank takes a whole batch that has fewer than two rows for each.
        """
        if self.size == 1 or len(index) < 2 * self.size:
            return index, 1 / self.size
        rows = index.tensor_split(self.size)[self.rank]
        return rows, len(rows) / len(index)

    def local_items(self, items: Sequence[T]) -> Sequence[T]:
        """The items assigned to this rank."""
        return items[self.rank :: self.size]

    def seed(self, *numbers: int) -> int:
        """A seed that differs between ranks."""
        return int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)[0])

    def all_reduce_mean(
        self, weight: float, parameters: Sequence[nn.Parameter], *more: Tensor
    ) -> list[Tensor]:
        """Replaces gradients by their weighted sums over the ranks, in one all-reduce.

        A missing gradient counts as zero.

        Args:
            weight: The weight of this rank.
            parameters: The parameters whose gradients are replaced.
            more: Other tensors, whose weighted sums are returned.
        """
        if self.size == 1:
            return list(more)
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        tensors: list[Any] = [*(p.grad for p in parameters), *more]
        flat = torch.cat([t.detach().flatten() for t in tensors]) * weight
        distributed.all_reduce(flat)
        parts = flat.split([t.numel() for t in tensors])
        sums = [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors)]
        for p, gradient in zip(parameters, sums):
            p.grad = gradient
        return sums[len(parameters) :]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def broadcast(self, value: T) -> T:
        """The value of rank 0."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def broadcast_(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors, in place, with those of rank 0."""
        if self.size == 1:
            return
        theirs = self.broadcast({name: tensor.cpu() for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(theirs[name])
