"""Datasets, as `fit` takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_vae.arguments import as_tensor, check_finite, digest_of, is_rows

__all__ = ["Dataset", "TensorDataset", "as_dataset", "describe", "fetch", "fetch_few"]


@runtime_checkable
class Dataset(Protocol):
    """N rows that are gathered by index; `describe()` and `digest()` are recorded if defined."""

    def __len__(self) -> int:
        """The number of rows N."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [B, *E] and y [B, C] or None of these rows, on the device where they lie.

        Noise that is drawn anew at each visit comes from torch's global generator.
        """

    def fixed(self, seed: int) -> Dataset:
        """The same rows with their noise drawn once, for evaluation."""

    def to(self, device: torch.device) -> Dataset:
        """The same rows on a device."""


@dataclass(frozen=True, eq=False)
class TensorDataset:
    """Tensors as they are; values that are not floating point become so in a batch.

    Attributes:
        x: Data [N, *E].
        y: What is conditioned on [N, C], or None.
    """

    x: Tensor
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows at `index` [B]."""
        x = self.x[index]
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return x, None if self.y is None else self.y[index]

    def fixed(self, seed: int) -> TensorDataset:
        """These rows: they carry no noise."""
        return self

    def to(self, device: torch.device) -> TensorDataset:
        """The same rows on a device."""
        return TensorDataset(self.x.to(device), None if self.y is None else self.y.to(device))

    def describe(self) -> dict[str, Any]:
        """Shapes and types."""
        parts = {"x": self.x, "y": self.y}
        return {
            name: None if part is None else f"{str(part.dtype)[6:]} {list(part.shape)}"
            for name, part in parts.items()
        }

    def digest(self) -> str:
        """The SHA-256 of types, shapes and bytes."""
        return digest_of(self.x, self.y)


def as_dataset(data: Any, name: str, missing: bool = False) -> Dataset:
    """`data` as a dataset; `missing` as in `check_finite`.

    Raises:
        ValueError: If they are of another kind, empty, unequal in length or not finite.
    """
    pair = (  # x and y, or x and None, and not the rows of x
        isinstance(data, tuple | list)
        and len(data) == 2
        and is_rows(data[0])
        and (data[1] is None or isinstance(data, tuple) or hasattr(data[1], "ndim"))
        and getattr(data[0], "ndim", 2) > 1
    )
    if not pair and not is_rows(data):
        if not isinstance(data, Dataset):
            raise ValueError(
                f"{name} must be rows [N, *E] (a tensor, array, frame or list), a pair (x, y) of "
                "them, or an object with __len__, batch, fixed and to, such as splits.train; got "
                f"{type(data).__name__}"
            )
        if len(data) < 1:
            raise ValueError(f"{name} must have at least one row; got none")
        return data
    x, y = data if pair else (data, None)
    x = as_tensor(name, x)
    if x.ndim < 2 or len(x) < 1:
        raise ValueError(
            f"{name} must be of shape [N, *E] with at least one row; got {list(x.shape)}"
        )
    check_finite(name, x, missing)
    if y is not None:
        y = as_tensor(f"y of {name}", y)
        y = y.unsqueeze(1) if y.ndim == 1 else y  # labels, or one number to condition on
        if y.ndim != 2 or len(y) != len(x):
            raise ValueError(
                f"y of {name} must be of shape [{len(x)}, C], a row for each of x; got "
                f"{list(y.shape)}"
            )
        remedy = ", or give -1 for a label that is unknown" if y.shape[1] == 1 else ""
        check_finite(f"y of {name}", y, remedy=remedy)
    return TensorDataset(x, y)


def describe(rows: Dataset) -> dict[str, Any]:
    """What a run records of its data: number of rows, and description and digest if defined."""
    record: dict[str, Any] = {"rows": len(rows)}
    for name in ("describe", "digest"):
        if hasattr(rows, name):
            record[name] = getattr(rows, name)()
    return record


def fetch(rows: Dataset, index: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """x, and y if there is one, of the rows at `index` [B], in type and place like a weight."""
    x, y = rows.batch(index)
    return (x.to(like),) if y is None else (x.to(like), y.to(like))


def fetch_few(rows: Dataset, at_most: int, like: Tensor) -> tuple[Tensor, ...]:
    """The like of at most `at_most` rows, evenly spaced."""
    index = torch.linspace(0, len(rows) - 1, min(len(rows), at_most), dtype=torch.float64)
    return fetch(rows, index.long().to(like.device), like)
