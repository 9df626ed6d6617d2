"""Tables from .csv files."""

from __future__ import annotations

import csv
from array import array
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given


def read_csv(path: Path) -> Given:
    """Reads a table of numbers, comma separated, with or without a line of column names.

    The values become float32; an empty cell is NaN, a missing value. A column of the name
    ``label`` holds the labels, an empty cell or -1 where unknown.

    Raises:
        ValueError: If the file is no table, or a cell is not a number; the message names the
            line and the column.
    """
    try:
        header, table = _read(path)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(
            f"{path}: expected a comma-separated table in UTF-8, got: {error}; write it again"
        ) from error
    names = [name.strip() for name in header]
    _check_names(path, names)
    label = next((d for d, name in enumerate(names) if name.lower() == "label"), None)
    values = [d for d in range(table.shape[1]) if d != label]
    return Given(
        Data(
            table[:, values].float(),
            labels=None if label is None else _labels(path, table[:, label]),
            name=str(path),
            columns=tuple(names[d] for d in values) if names else None,
        )
    )


def _read(path: Path) -> tuple[list[str], Tensor]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        lines = ((reader.line_num, row) for row in reader if row)
        start, first = next(lines, (1, []))
        named = bool(first) and not any(map(_is_number, first))
        rows = lines if named else chain([(start, first)], lines)
        values = _values(path, rows, len(first))
    if not values:
        raise ValueError(f"{path}: expected at least one row of numbers, got none; fill the file")
    table = torch.from_numpy(np.array(values)).unflatten(0, (-1, len(first)))
    counts_up = _counts_up(table)
    if not named and counts_up[0] and counts_up.sum() == 1 and len(table) > 1:
        raise ValueError(
            f"{path}: expected names or data in the first line, got numbers that count up, "
            f"{', '.join(first[:3])}, as no other line does: if they are names, write them as "
            "text, such as y2019; if data, give the columns names in a line above"
        )
    return first if named else [], table


def _values(path: Path, rows: Iterator[tuple[int, list[str]]], width: int) -> array[float]:
    values = array("d")
    for line, row in rows:
        if len(row) != width:
            raise ValueError(
                f"{path}: expected {width} columns as in the first line, got {len(row)} in line "
                f"{line}; give every line the same columns"
            )
        for column, cell in enumerate(row, start=1):
            if not cell.strip():
                cell = "nan"
            if not _is_number(cell):
                raise ValueError(
                    f"{path}: expected numbers, got {cell!r} in line {line}, column {column} "
                    "(from 1); replace or remove it"
                )
            values.append(float(cell))
    return values


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def _counts_up(table: Tensor) -> Tensor:
    """Which rows are whole numbers at one distance above 0, as a header of years is."""
    steps = table.diff(dim=1)
    if not steps.numel():
        return torch.zeros(len(table), dtype=torch.bool)
    whole = (table == table.round()).all(1)
    return whole & (steps > 0).all(1) & (steps == steps[:, :1]).all(1)


def _check_names(path: Path, names: list[str]) -> None:
    """Refuses a column without a name, as pandas writes its index, and two of labels."""
    for column, name in enumerate(names, start=1):
        if not name or name.startswith("Unnamed:"):
            raise ValueError(
                f"{path}: expected a name for each column, got none for column {column} (from 1): "
                "if it is the index of a pandas frame, write the file with index=False; if it is "
                "data, name it"
            )
    if (count := sum(name.lower() == "label" for name in names)) > 1:
        raise ValueError(f"{path}: expected one column 'label', got {count}; rename the others")


def _labels(path: Path, column: Tensor) -> Tensor:
    column = column.nan_to_num(nan=-1.0)  # an empty cell
    bad = (column != column.round()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got {column[row].item()} in row "
            f"{row} (from 0); number the classes"
        )
    return column.long()
