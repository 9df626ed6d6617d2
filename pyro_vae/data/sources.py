"""Cells of tables by column, from text files, .parquet files and frames."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from pyro_vae.data.schema import Cells, as_number

__all__ = ["TABLES", "is_mixed", "table_cells"]

TABLES = (".csv", ".tsv", ".parquet")
EMPTY = {"", "na", "n/a", "nan", "null", "<na>"}
DELIMITERS = ",;\t"
LOOKED_AT = 1000  # lines, to see whether a file holds text
DECIMAL_COMMA = re.compile(r"-?\d+,\d+")


def table_cells(source: Any) -> tuple[Cells, dict[str, list[Any]]]:
    """The cells of a table by column, and the orders of those columns that declare one."""
    if not isinstance(source, str | Path):
        return _arrow_cells("table", source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"expected a file at {path}, got none; check the path")
    if path.suffix == ".parquet":
        return _arrow_cells(str(path), path)
    return text_cells(path), {}


def is_mixed(path: Path) -> bool:
    """Whether a file is a table that `read_table` alone can read: with a column of text."""
    if path.suffix != ".csv":
        return path.suffix in TABLES
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            names, *rows = islice(csv.reader(file), LOOKED_AT)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError):
        return False
    if "," not in first and any(delimiter in first for delimiter in DELIMITERS):
        return True
    columns = [[_text(cell, False) for cell in column] for column in zip(*rows)]
    texts = [[cell for cell in column if cell is not None] for column in columns]
    words = any(column and not any(map(is_number, column)) for column in texts)
    return words and not any(map(is_number, names))


def text_cells(path: Path) -> Cells:
    """The cells of a text file by column, None where they are empty."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            delimiter = max(DELIMITERS, key=first.count)
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(
            f"{path}: expected a table in UTF-8, of commas, semicolons or tabs, got: {error}; "
            "write it again"
        ) from error
    if len(rows) < 2:
        raise ValueError(
            f"{path}: expected a line of names and rows below it, got {len(rows)} lines"
        )
    names = [name.strip() for name in rows[0]]
    _check_names(str(path), names, is_text=True)
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(names):
            raise ValueError(
                f"{path}: expected {len(names)} columns as in the first line, got {len(row)} in "
                f"row {line} (from 1); give every row the same columns"
            )
    comma = delimiter == ";"
    return {
        name: [_text(cell, comma) for cell in column]
        for name, column in zip(names, zip(*rows[1:]))
    }


def _text(cell: str, comma: bool) -> str | None:
    cell = cell.strip()
    if cell.lower() in EMPTY:
        return None
    return cell.replace(",", ".") if comma and DECIMAL_COMMA.fullmatch(cell) else cell


def is_number(cell: Any) -> bool:
    return as_number(cell) is not None


def _check_names(source: str, names: Iterable[str], is_text: bool) -> None:
    """Refuses a first line that holds no names, as pandas writes its index, or one twice."""
    names = list(names)
    for column, name in enumerate(names, start=1):
        if not name or name.startswith("Unnamed:") or (is_text and as_number(name) is not None):
            raise ValueError(
                f"{source}: expected a line of names first, got {name!r} for column {column} "
                "(from 1): name the columns; if it is the index of a pandas frame, write the file "
                "with index=False"
            )
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"{source}: expected different names, got {twice[0]!r} twice; rename one")


def _arrow_cells(source: str, table: Any) -> tuple[Cells, dict[str, list[Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "frames and .parquet need pyarrow: pip install 'pyro-vae[tables]'"
        ) from error
    try:
        found = (
            pyarrow.parquet.read_table(table) if isinstance(table, Path) else pyarrow.table(table)
        )
    except (pyarrow.ArrowException, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{source}: expected a table with one kind of values in each column, got: "
            f"{' '.join(str(error).split())}"
        ) from error
    found = found.select([n for n in found.column_names if not n.startswith("__index_level_")])
    _check_names(source, found.column_names, is_text=False)
    types = pyarrow.types
    orders: dict[str, list[Any]] = {}
    for field in found.schema:
        if types.is_temporal(field.type):
            raise ValueError(
                f"{source}: column {field.name!r} holds dates: write them as numbers, of days or "
                "years"
            )
        if types.is_dictionary(field.type) and field.type.ordered:
            orders[field.name] = found[field.name].chunk(0).dictionary.to_pylist()
    cells = {
        name: [None if cell is None or cell != cell else cell for cell in column]
        for name, column in found.to_pydict().items()
    }
    return cells, orders
