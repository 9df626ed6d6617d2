"""Tables as people have them: names, numbers, text and empty cells; and what their columns are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given
from pyro_vae.data.schema import Cells, Column, Schema, as_name, as_number, shortened
from pyro_vae.data.sources import table_cells

__all__ = ["read_given", "read_numbers", "read_table"]

MOST_LEVELS = 1000  # of a category: more are names or ids
FEW = 10  # whole numbers that are taken for levels
SKEWED = 0.7  # deviation of the logarithm from which positive numbers are taken for LogNormal
OFTEN = 0.9  # share of different numbers below which they are taken for rounded ones
DATE = re.compile(r"\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[/.]\d\d?[/.]\d{2,4}( .*)?|\d\d?:\d\d(:\d\d)?")


def read_table(
    source: Any, schema: Schema | Mapping[str, Any] | None = None
) -> tuple[Tensor, Schema]:
    """Rows of a table and its schema.

    Numbers are read as they are, categories as codes 0, 1, ..., empty cells (and NA, NaN, null)
    as NaN. Kinds that the schema does not give are inferred: two values are binary, text is a
    category, at most 10 whole numbers are ordinal, other whole numbers are counts if their
    variance is above their mean, positive numbers are positive if their logarithm deviates by
    0.7 or more, and the rest is real. Numbers that repeat get a resolution: the smallest
    distance between two of them.

    Args:
        source: A text file (UTF-8, a line of names, separated by commas, semicolons or tabs), a
            .parquet file, or a frame of pandas, polars or pyarrow.
        schema: A schema that these rows must fit, whatever the order of their columns; or a
            mapping of what is known of some columns: a kind, or what `Column` takes.

    Returns:
        Rows, float32 [N, C], and the schema, which prints as YAML.

    Raises:
        ValueError: If it is no table, or a column cannot be modelled; the message names it.
    """
    name = str(source) if isinstance(source, str | Path) else "table"
    return _table(name, *table_cells(source), schema)


def read_given(path: Path, schema: Schema | Mapping[str, Any] | None) -> Given:
    """As `read_table`, for `load_data`; a column of the name ``label`` holds labels."""
    cells, orders = table_cells(path)
    names = [key for key in cells if key.lower() == "label" and len(cells) > 1]
    labels = [_labels(f"{path}: column {key!r}", cells.pop(key)) for key in names[:1]]
    rows, found = _table(str(path), cells, orders, schema)
    return Given(
        Data(
            rows,
            labels=labels[0] if labels else None,
            name=str(path),
            columns=tuple(found.columns),
            schema=found,
        )
    )


def read_numbers(
    values: np.ndarray, schema: Mapping[str, Any] | None = None
) -> tuple[Tensor, Schema]:
    """As `read_table` of an array [N, C] whose columns "x0", "x1", ... are real unless given.

    Numbers that repeat get a resolution here too, and those of a constant column one of 1.
    """
    names = [f"x{i}" for i in range(values.shape[1])]
    given = Schema.restore(schema or {})
    if unknown := [key for key in given.columns if key not in names]:
        raise ValueError(
            f"the schema names columns that are not there: {', '.join(unknown)}; those of an "
            f"array are x0 to {names[-1]}"
        )
    columns = {
        name: given.columns.get(name) or _real(column) for name, column in zip(names, values.T)
    }
    return torch.from_numpy(values.astype(np.float32)), Schema(columns)


def _table(
    name: str,
    cells: Cells,
    orders: Mapping[str, list[Any]],
    schema: Schema | Mapping[str, Any] | None,
) -> tuple[Tensor, Schema]:
    if isinstance(schema, Schema):
        return schema.encode(cells, name), schema
    given = Schema.restore(schema or {})
    if unknown := [key for key in given.columns if key not in cells]:
        raise ValueError(
            f"{name}: the schema names columns that are not there: {', '.join(unknown)}; there "
            f"are {', '.join(cells)}"
        )
    columns = {
        key: given.columns.get(key) or inferred(f"{name}: column {key!r}", values, orders.get(key))
        for key, values in cells.items()
    }
    found = Schema(columns)
    return found.encode(cells, name), found


def inferred(where: str, cells: Sequence[Any], order: Sequence[Any] | None = None) -> Column:
    """What a column holds, by its cells; `order` is that of its categories, where one is known."""
    seen = [cell for cell in cells if cell is not None]
    if not seen:
        raise ValueError(f"{where} is empty in all rows: leave it out")
    numbers = [as_number(cell) for cell in seen]
    texts = [cell for cell, number in zip(seen, numbers) if number is None]
    if not texts and order is None:
        return _numeric(where, np.array(numbers, dtype=np.float64))
    if order is None and len(texts) < len(seen):
        raise ValueError(
            f"{where} holds {len(seen) - len(texts)} numbers beside text such as {texts[0]!r}: "
            "repair the cells, or give it the kind category in the schema"
        )
    return _textual(where, list(map(as_name, seen)), order)


def _labels(where: str, cells: Sequence[Any]) -> Tensor:
    """Classes of rows, numbered by their names in order; -1 where a cell is empty or -1."""
    known = sorted({cell for cell in cells if cell not in (None, -1)}, key=_order)
    if not known:
        raise ValueError(f"{where} is empty: fill some cells, or leave the column out")
    codes = {name: code for code, name in enumerate(known)}
    return torch.tensor([codes.get(cell, -1) for cell in cells])


def _textual(where: str, seen: list[str], order: Sequence[Any] | None) -> Column:
    if all(DATE.fullmatch(cell) for cell in seen):
        raise ValueError(
            f"{where} holds dates, such as {seen[0]!r}: write them as numbers, of days or years"
        )
    found = sorted(set(seen))
    if len(found) > MOST_LEVELS or len(found) == len(seen) > 2 * FEW:
        raise ValueError(
            f"{where} holds {len(found)} different texts in {len(seen)} rows, as names or ids: "
            f"leave it out, or join them to at most {MOST_LEVELS} categories"
        )
    categories = (
        found if order is None else [name for name in map(as_name, order) if name in found]
    )
    if len(categories) < 2:
        raise ValueError(f"{where} holds {seen[0]!r} in all rows: leave it out")
    kind = "binary" if len(categories) == 2 else "category" if order is None else "ordinal"
    return Column(kind, tuple(categories))


def _numeric(where: str, values: np.ndarray) -> Column:
    if not np.isfinite(values).all():
        raise ValueError(f"{where} holds infinite values: repair or empty these cells")
    different = np.unique(values)
    if len(different) < 2:
        raise ValueError(f"{where} holds {values[0]:g} in all rows: leave it out")
    whole = bool((values == values.round()).all())
    if len(different) == 2 or (whole and len(different) <= min(FEW, len(values) // 3)):
        kind = "binary" if len(different) == 2 else "ordinal"
        return Column(kind, tuple(map(shortened, np.unique(values).tolist())))
    if whole and values.min() >= 0 and values.var() >= values.mean():
        return Column("count")
    rounded = whole or len(different) < OFTEN * len(values)
    above = values[values > 0]
    spread = float(np.log(above).std()) if len(above) else 0.0
    zeros = 0.0 if rounded else math.nextafter(0.0, 1.0)
    positive = values.min() >= zeros and spread > SKEWED
    return Column("positive" if positive else "real", (), _gap(different) if rounded else None)


def _real(values: np.ndarray) -> Column:
    seen = values[~np.isnan(values)]
    different = np.unique(seen)
    if len(different) >= OFTEN * len(seen):
        return Column("real")
    return Column("real", (), _gap(different) if len(different) > 1 else 1.0)


def _gap(different: np.ndarray) -> float:
    """The smallest distance of two of these numbers that is no rounding error."""
    gaps = np.diff(different)
    least = 1e-6 * float(np.abs(different).max())
    return float(f"{gaps[gaps > least].min(initial=gaps.max()):.4g}")


def _order(cell: Any) -> tuple[float, str]:
    number = as_number(cell)
    return (math.inf if number is None else number, str(cell))
