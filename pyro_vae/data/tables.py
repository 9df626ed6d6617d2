"""Reads tables of numbers, text and empty cells, and infers what their columns hold."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.mapped import CHUNK, LARGE, Mapped, spooled
from pyro_vae.data.schema import (
    Column,
    ReadColumn,
    Schema,
    SchemaLike,
    as_name,
    as_number,
    as_written,
    check_digits,
    ignored_columns,
    infer_column,
    number_or_text,
    resolution,
)
from pyro_vae.files import parsing

TABLES = (".csv", ".tsv", ".parquet")
EMPTY = {"", "na", "n/a", "nan", "-nan", "null", "<na>"}  # empty cells, in lower case
DELIMITERS = ",;\t"
SCANNED_LINES = 1000  # lines that are read to see whether a file holds text
EXPECTED = "a table with one kind of values in each column"
QUOTED = re.compile('"[^"]*"')
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The names of a table's columns, and a function that reads one of them (see `ReadColumn`)."""

    name: str
    columns: Sequence[str]
    read: ReadColumn
    file: Any = None  # pyarrow's ParquetFile, if it is large: its rows stay on disk

    def encoded(self, schema: Schema) -> Tensor:
        """Returns all rows as numbers, float32 [N, C]."""
        return schema.encode({key: self.read(key)[0] for key in schema.columns}, self.name)

    def parts(self, schema: Schema) -> Iterator[Tensor]:
        """Yields the rows of a large file as numbers, in parts."""
        first = 0
        with parsing(self.name, EXPECTED):
            for batch in self.file.iter_batches(CHUNK, columns=list(schema.columns)):
                cells = {key: _column_cells(batch.column(key)) for key in schema.columns}
                yield schema.encode(cells, self.name, first)
                first += len(batch)


def read_table(source: Any, schema: SchemaLike = None) -> tuple[Tensor, Schema]:
    """Reads the rows of a table, and infers its schema.

    Numbers are read as they are, categories as codes 0, 1, ..., empty cells (and NA, NaN, null)
    as NaN. Kinds that the schema does not give are inferred from the cells of a column: two
    values are binary, text is a category, at most 10 different whole numbers are ordinal if none
    of them is in one row alone, other whole numbers from 0 are counts if their variance is at
    least their mean, positive numbers are positive if their logarithm has a standard deviation
    above 0.7, and the rest is real. Numbers that repeat get a resolution: the smallest distance
    between two of them.

    Args:
        source: A text file (UTF-8, a line of names, separated by commas, semicolons or tabs), a
            .parquet file, or a frame of pandas, polars or pyarrow.
        schema: A schema that these rows must fit, whatever the order of their columns; or a
            mapping from names of columns to a kind, or to the arguments of `Column`, whose
            categories are those of the cells if left out; or one kind for all columns.
            Columns of the kind "ignored", such as names or ids, are left out of the rows.

    Returns:
        Rows, float32 [N, C], and the schema, which prints as YAML.

    Raises:
        ValueError: If `source` is no table, or a column cannot be modelled; the message names it.
    """
    table = _open_table(source, schema)
    found = _schema(table, schema)
    return table.encoded(found), found


def read_rows_of_table(source: Any, schema: SchemaLike) -> Data:
    """Reads a table as `Data`, as in `read_table`; a column called ``label`` holds the labels."""
    table = _open_table(source, schema)
    label = label_column(table.name, table.columns, schema)
    labels = [_read_labels(table.read(key)[0]) for key in label]
    table = replace(table, columns=[key for key in table.columns if key not in label])
    found = _schema(table, schema)
    rows: Tensor | Mapped
    if table.file is None:
        rows = table.encoded(found)
    else:
        number = table.file.metadata.num_rows
        rows = spooled(table.parts(found), number, len(found.columns), table.name)
    codes, names = labels[0] if labels else (None, None)
    about: dict[str, Any] = {"columns": tuple(found.columns), "schema": found}
    return Data(rows, labels=codes, class_names=names, name=table.name, **about)


def own_cells(path: Path, schema: Schema | None, named: bool) -> tuple[list[str], list[Any]]:
    """The names of a table's columns, if it has them, and their cells, None where they are empty.

    The cells are as they stand in the file. The columns that are no part of the rows come last:
    labels, and those that the schema ignores, where these can be read.
    """
    if schema is None:
        lines = [line for _, line in read_lines(path)]
        names = [name.strip() for name in lines.pop(0)] if named else []
        columns = [list(map(as_cell, column)) for column in zip(*lines)]
        for d in map(names.index, label_column(str(path), names)):
            names, columns = [[*x[:d], *x[d + 1 :], x[d]] for x in (names, columns)]
        return names, columns
    table = _open_table(path, schema)
    cells = {name: table.read(name)[0] for name in schema.columns}
    for name in table.columns:
        if name not in cells:
            with suppress(ValueError):
                cells[name] = table.read(name)[0]
    return [*cells], [list(map(as_written, column)) for column in cells.values()]


def label_column(name: str, columns: Sequence[str], schema: SchemaLike = None) -> list[str]:
    """Returns the name of the column of labels, [] if there is none or it is the only column."""
    modelled = [key for key in columns if key not in ignored_columns(schema)]
    labels = [key for key in modelled if key.lower() == "label"]
    if len(labels) > 1:
        raise ValueError(
            f"{name}: expected one column 'label', got {len(labels)}; rename the others"
        )
    return labels if len(modelled) > 1 else []


def _schema(table: Table, known: SchemaLike) -> Schema:
    """Returns the schema of a table; columns not in `known` are inferred from their cells."""
    if isinstance(known, Schema):
        known.check(table.columns, table.name)
        return known
    given = _declared(table, known)
    modelled = [key for key in table.columns if key not in given.ignored]
    if not modelled:
        raise ValueError(
            f"{table.name}: the schema ignores every column; give one of them another kind"
        )
    found = {
        key: given.columns.get(key)
        or infer_column(f"{table.name}: column {key!r}", *table.read(key))
        for key in modelled
    }
    return Schema(found, given.ignored)


def _declared(table: Table, known: Mapping[str, Any] | str | None, coded: bool = False) -> Schema:
    """Returns the schema of the columns that are `known`: all of them if that is a kind.

    Categories that it leaves out are those of the cells, unless the cells are `coded` already.
    """
    each = dict.fromkeys(table.columns, known) if isinstance(known, str) else known or {}
    if unknown := [str(key) for key in each if str(key) not in table.columns]:
        raise ValueError(
            f"{table.name}: the schema names columns that are not there: {', '.join(unknown)}; "
            f"there are {', '.join(table.columns)}"
        )
    return Schema.restore(each, None if coded else table.read)


def read_numbers(
    values: np.ndarray, schema: Mapping[str, Any] | str | None = None
) -> tuple[Tensor, Schema]:
    """Does what `read_table` does, for an array [N, C]; columns are real unless `schema` differs.

    Columns are called "x0", "x1", .... Numbers that repeat get a resolution here too; it is 1
    for a constant column.
    """
    columns = {f"x{i}": column for i, column in enumerate(values.T)}
    for name, column in columns.items():
        check_digits(f"array: column {name!r}", column[np.isfinite(column)])
    table = Table("array", list(columns), lambda key: (columns[key], None))
    given = _declared(table, schema, coded=True)
    if given.ignored:
        raise ValueError("columns of an array cannot be ignored: leave them out of it")
    found = {
        name: given.columns.get(name) or Column("real", (), resolution(column[~np.isnan(column)]))
        for name, column in columns.items()
    }
    with np.errstate(over="ignore"):  # values that become infinite are refused later
        return torch.from_numpy(values.astype(np.float32)), Schema(found)


def _read_labels(cells: Sequence[Any]) -> tuple[Tensor, tuple[str, ...]]:
    """Returns the class of each row, -1 where its cell is empty or -1, and the class names."""
    some = {cell for cell in cells if cell is not None and as_number(cell) != -1}
    codes = {name: code for code, name in enumerate(sorted(some, key=number_or_text))}
    return torch.tensor([codes.get(cell, -1) for cell in cells]), tuple(map(as_name, codes))


def is_mixed(path: Path) -> bool:
    """Returns whether a table needs `read_table`: it has text, or is no .csv with commas."""
    if path.suffix.lower() != ".csv" or _delimiter(path) != ",":
        return True
    head, *rows = [row for _, row in islice(read_lines(path), 1 + SCANNED_LINES)] or [[]]
    texts = [list(filter(None, map(as_cell, column))) for column in zip(*rows)]
    numbers = [sum(as_number(cell) is not None for cell in column) for column in texts]
    words = any(2 * count < len(column) for count, column in zip(numbers, texts))
    return words and not any(as_number(name) is not None for name in head)


def _delimiter(path: Path) -> str:
    """Returns the delimiter that is most frequent in the first line of a text file."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return max(DELIMITERS, key=QUOTED.sub("", file.readline()).count)


def read_lines(path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """Yields the number and the cells of each line of a text file; all must be of one length."""
    width = 0
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=delimiter)
            for row in filter(None, reader):
                width = width or len(row)
                if len(row) != width:
                    raise ValueError(
                        f"{path}: expected {width} columns as in the first line, got {len(row)} "
                        f"in line {reader.line_num}; give every line the same columns"
                    )
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(
            f"{path}: expected a table in UTF-8, of commas, semicolons or tabs, got: {error}; "
            "write it again"
        ) from error


def _open_table(source: Any, schema: SchemaLike) -> Table:
    """Opens a file or a frame as a table; categories of the schema, such as NA, are not empty."""
    if not isinstance(source, str | Path):
        return _of_arrow("table", source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"expected a file at {path}, got none; check the path")
    if path.suffix.lower() == ".parquet":
        return _of_arrow(str(path), path)
    known = schema.plain if isinstance(schema, Schema) else schema
    entries = known.items() if isinstance(known, Mapping) else ()
    given = {str(n): e.get("categories") for n, e in entries if isinstance(e, Mapping)}
    return _of_text(path, {n: some for n, some in given.items() if isinstance(some, list | tuple)})


def _of_text(path: Path, named: Mapping[str, Sequence[Any]]) -> Table:
    """Opens a text file, of which some columns have `named` categories."""
    delimiter = _delimiter(path)
    rows = [row for _, row in read_lines(path, delimiter)]
    if len(rows) < 2:
        raise ValueError(
            f"{path}: expected a line of names and rows below it, got {len(rows)} lines"
        )
    names = [name.strip() for name in rows[0]]
    check_names(str(path), names, is_text=True)
    comma = delimiter == ";"
    cells = {
        n: [as_cell(cell, comma, named.get(n, ())) for cell in column]
        for n, column in zip(names, zip(*rows[1:]))
    }
    return Table(str(path), names, lambda key: (cells[key], None))


def as_cell(cell: str, comma: bool = False, categories: Sequence[Any] = ()) -> str | None:
    """Returns a cell without outer blanks, None if empty, with a decimal `comma` as a point.

    A cell that is one of the known `categories`, such as "NA", is not empty.
    """
    cell = cell.strip()
    if cell.lower() in EMPTY and cell not in categories:
        return None
    return cell.replace(",", ".") if comma and DECIMAL_COMMA.fullmatch(cell) else cell


def check_names(source: str, names: Sequence[str], is_text: bool, once: bool = True) -> None:
    """Raises ValueError for a column without a name, such as a pandas index, or equal names."""
    for column, name in enumerate(names, start=1):
        number = is_text and as_number(name) is not None
        if not name or name.startswith("Unnamed:") or number:
            raise ValueError(
                f"{source}: expected a line of names first, got {repr(name) if number else 'none'}"
                f" for column {column} (from 1): name the columns; if it is the index of a pandas "
                "frame, write the file with index=False"
            )
    if once and (twice := [name for i, name in enumerate(names) if name in names[:i]]):
        raise ValueError(f"{source}: expected different names, got {twice[0]!r} twice; rename one")


def _of_arrow(name: str, source: Any) -> Table:
    """Opens a frame or a .parquet file as a table; a large file is read column by column."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "frames and .parquet need pyarrow: pip install 'pyro-vae[tables]'"
        ) from error
    is_file = isinstance(source, Path)
    with parsing(name, EXPECTED):
        table = pyarrow.parquet.ParquetFile(source) if is_file else pyarrow.table(source)
    whole = table.schema_arrow if is_file else table.schema
    index = (whole.pandas_metadata or {}).get("index_columns", ())  # of the frame that it was
    names = [n for n in whole.names if n not in index and not n.startswith("__index_level_")]
    if not names:
        raise ValueError(f"{name}: expected columns, got none")
    check_names(name, names, is_text=False)
    large = is_file and source.stat().st_size > LARGE

    @lru_cache(1 if large else None)
    def read(key: str) -> tuple[list[Any], list[Any] | None]:
        with parsing(name, EXPECTED):
            column = (table.read(columns=[key]) if is_file else table.select([key])).column(0)
        kind, types = column.type, pyarrow.types
        refused = {
            "dates: write them as numbers, of days or years": types.is_temporal,
            "lists: give each of their parts a column": types.is_nested,
            "objects such as intervals or periods: write them as text or numbers": lambda kind: (
                isinstance(getattr(kind, "value_type", kind), pyarrow.BaseExtensionType)
            ),
        }
        for what in (what for what, holds in refused.items() if holds(kind)):
            raise ValueError(f"{name}: column {key!r} holds {what}")
        ordered = types.is_dictionary(kind) and kind.ordered
        return _column_cells(column), column.chunk(0).dictionary.to_pylist() if ordered else None

    return Table(name, names, read, table if large else None)


def _column_cells(column: Any) -> list[Any]:
    """Returns the cells of a pyarrow column, None where they are empty."""
    return [
        None if cell != cell or (isinstance(cell, str) and not cell.strip()) else cell
        for cell in column.to_pylist()
    ]
