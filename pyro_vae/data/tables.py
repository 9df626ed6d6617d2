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

    The values become float32. A column of the name ``label`` holds the labels.

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
    return True


def _labels(path: Path, column: Tensor) -> Tensor:
    bad = (column != column.round()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got {column[row].item()} in row "
            f"{row} (from 0); number the classes"
        )
    return column.long()
