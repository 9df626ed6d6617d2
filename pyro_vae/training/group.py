"""The processes that train together."""

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
    """Processes that make each step together, and have the same weights after it; one by default.

    Attributes:
        rank: The number of this process; the first is 0.
        size: How many there are.
        device: Of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, index: Tensor) -> tuple[Tensor, float]:
        """This process's rows of a batch, in its order, and their weight in its mean.

        A batch with fewer than two rows for each process is run whole by all of them.
        """
        if self.size == 1 or len(index) < 2 * self.size:
            return index, 1 / self.size
        rows = index.tensor_split(self.size)[self.rank]
        return rows, len(rows) / len(index)

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part of things to do."""
        return items[self.rank :: self.size]

    def seed(self, *numbers: int) -> int:
        """A seed of this process's own."""
        return int(np.random.SeedSequence([*numbers, self.rank]).generate_state(1, np.uint64)[0])

    def average(
        self, weight: float, parameters: Sequence[nn.Parameter], *more: Tensor
    ) -> list[Tensor]:
        """Gradients and other tensors become their weighted sums over the processes, all at once.

        Where one got a gradient and another did not, none counts as zero.

        Args:
            weight: Of this process's.
            parameters: Whose gradients are replaced.
            more: Tensors of which the sums are returned.
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

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(tensor.device)

    def first(self, value: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """What each process has."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def agree(self, tensors: dict[str, Tensor]) -> None:
        """Overwrites tensors, in place, with those of the first process."""
        if self.size == 1:
            return
        theirs = self.first({name: tensor.cpu() for name, tensor in tensors.items()})
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(theirs[name])
