"""A user's own rows beside those that a run was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.mapped import Mapped
from pyro_vae.data.schema import differing
from pyro_vae.data.transforms import Threshold, Transform

__all__ = ["alike", "kind_of"]

FACTOR = 10.0  # between the largest values, from which units look different


def kind_of(rows: Data) -> dict[str, Any]:
    """What rows of the same kind must agree with, for JSON."""
    return {
        "levels": rows.levels,
        "columns": None if rows.columns is None else list(rows.columns),
        **({} if rows.schema is None else {"schema": rows.schema.plain}),
        "dtype": str(rows.x.dtype).removeprefix("torch."),
        "range": list(_extremes(rows.x)),
    }


def alike(
    rows: Data, known: Mapping[str, Any], transform: Transform, data_shape: tuple[int, ...]
) -> Data:
    """The rows with columns in the order of the run, once grey levels and units are the run's.

    Args:
        rows: Rows of a user's file.
        known: What `kind_of` gave of the training rows; nothing for runs of version 0.1.
        transform: That of the run.
        data_shape: That of one datum of the run.

    Raises:
        ValueError: If columns are missing or others, the shape is, or values are on another
            scale.
    """
    rows = _ordered(rows, known.get("columns"))
    if tuple(rows.data_shape) != data_shape:
        raise ValueError(
            f"{rows.name} has rows of shape {tuple(rows.data_shape)}; the run was trained on "
            f"{data_shape}: give data of the same columns or image size"
        )
    levels = known["levels"] if "levels" in known else _levels(transform)
    if levels is not None and rows.levels != levels:
        rows = _grey(rows, levels)
    elif levels is None and rows.levels is not None and known:
        if known["dtype"].startswith("float"):
            low, high = known["range"]
            raise ValueError(
                f"{rows.name}: expected numbers in the units that the run was trained on, "
                f"from {low:g} to {high:g}; got grey values ({rows.x.dtype}): store them as "
                "floats in these units"
            )
        rows = rows.unchecked(levels=None)
    if levels is None and known and rows.schema is None:
        _check_units(rows, max(map(abs, known["range"])))
    return rows


def _ordered(rows: Data, columns: list[str] | None) -> Data:
    """The columns in the order of `columns`, where both have names."""
    if columns is None or rows.columns is None or list(rows.columns) == columns:
        return rows
    words = differing(columns, rows.columns)
    if words or len(set(columns)) < len(columns):
        raise ValueError(
            f"{rows.name}: expected the columns of the run, got others ({words or 'one twice'}): "
            "give the file the columns that the run was trained on"
        )
    order = torch.tensor([rows.columns.index(name) for name in columns])
    x = rows.x.columns(order) if isinstance(rows.x, Mapped) else rows.x[:, order]
    return rows.unchecked(x=x, columns=tuple(columns))


def _grey(rows: Data, levels: int) -> Data:
    """The rows as grey values of so many levels, if they are such."""
    low, high = _extremes(rows.x)
    whole = not rows.x.is_floating_point() and (rows.levels != 2 or levels == 2)
    if not whole or low < 0 or high > levels - 1:
        raise ValueError(
            f"{rows.name}: expected whole grey values from 0 to {levels - 1}, as those that the "
            f"run was trained on; got {rows.x.dtype} from {low:g} to {high:g}: store them as "
            "uint8, not divided"
        )
    return rows.unchecked(levels=levels)


def _check_units(rows: Data, known: float) -> None:
    """Warns of rows whose values are of another size than those of training."""
    most = max(map(abs, _extremes(rows.x)))
    other = most > FACTOR * known or FACTOR * most < known
    if other and rows.missing_share < 1:
        message = (
            f"{rows.name}: values reach {most:g}, those that the run was trained on {known:g}: "
            "are they in the same units?"
        )
        warnings.warn(message, UserWarning, stacklevel=2)


def _extremes(x: Tensor | Mapped) -> tuple[float, float]:
    """Lowest and highest value that is not missing; 0 of none."""
    if isinstance(x, Mapped):
        return x.extremes
    seen = x[~x.isnan()] if x.is_floating_point() else x
    return (seen.min().item(), seen.max().item()) if len(seen) else (0.0, 0.0)


def _levels(transform: Transform) -> int | None:
    """Grey levels of what a transform was made for."""
    if isinstance(transform, Threshold):
        return int(transform.top) + 1
    return getattr(transform, "levels", None)
