"""Tables as people have them: names, numbers, text and empty cells; and what their columns are."""

from __future__ import annotations

import csv
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.mapped import CHUNK, LARGE, Mapped, spooled
from pyro_vae.data.schema import (
    Cells,
    Schema,
    as_number,
    check_digits,
    ignored_in,
    inferred,
    number_or_text,
    real_column,
    with_levels,
)

__all__ = [
    "TABLES",
    "ending",
    "is_mixed",
    "label_cells",
    "read_csv",
    "read_numbers",
    "read_table",
]

TABLES = (".csv", ".tsv", ".parquet")
Known = Schema | Mapping[str, Any] | str | None  # of columns
EMPTY = {"", "na", "n/a", "nan", "null", "<na>"}
DELIMITERS = ",;\t"
LOOKED_AT = 1000  # lines, to see whether a file holds text
QUOTED = re.compile('"[^"]*"')
DECIMAL_COMMA = re.compile(r"[+-]?\d*,\d+(e[+-]?\d+)?", re.IGNORECASE)


def read_table(source: Any, schema: Known = None) -> tuple[Tensor, Schema]:
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
            mapping of what is known of some columns: a kind, or what `Column` takes. Categories
            that it leaves out are those of the cells. A kind alone is that of all columns.
            Columns of the kind "ignored", such as names or ids, are no part of the rows.

    Returns:
        Rows, float32 [N, C], and the schema, which prints as YAML.

    Raises:
        ValueError: If it is no table, or a column cannot be modelled; the message names it.
    """
    name = str(source) if isinstance(source, str | Path) else "table"
    return _table(name, *_cells(source, schema), schema)


def read_rows_of_table(path: Path, schema: Known) -> Data:
    """As `read_table`, for `load_data`; a column of the name ``label`` holds labels."""
    rows: Tensor | Mapped
    if ending(path) == ".parquet" and path.is_file() and path.stat().st_size > LARGE:
        labels, rows, found = _streamed(path, schema)
    else:
        cells, orders = _cells(path, schema)
        labels = _without_labels(str(path), cells, schema)
        rows, found = _table(str(path), cells, orders, schema)
    codes = [_labels(f"{path}: column {key!r}", column) for key, column in labels.items()]
    return Data(
        rows,
        labels=codes[0] if codes else None,
        name=str(path),
        columns=tuple(found.columns),
        schema=found,
    )


def label_cells(path: Path, schema: Schema) -> Cells:
    """The column of labels of a table under its name, as it stands there; nothing without one."""
    return _without_labels(str(path), _cells(path, schema)[0], schema)


def _without_labels(name: str, cells: Cells, schema: Known) -> Cells:
    """Takes the column of labels, if there is one beside others, out of the cells."""
    keys = [key for key in cells if key not in _ignored(schema)]
    keys = keys if len(keys) > 1 else []
    return {keys[d]: cells.pop(keys[d]) for d in _label_columns(name, keys)}


def _label_columns(name: str, names: Sequence[str]) -> list[int]:
    """The place of the column of labels, where there is one."""
    found = [d for d, key in enumerate(names) if key.lower() == "label"]
    if len(found) > 1:
        raise ValueError(
            f"{name}: expected one column 'label', got {len(found)}; rename the others"
        )
    return found


def _streamed(path: Path, schema: Known) -> tuple[Cells, Mapped, Schema]:
    """Labels, rows and schema of a large .parquet file: a column at a time, then parts of rows."""
    pyarrow = _pyarrow()
    with _arrow_errors(str(path)):
        file = pyarrow.parquet.ParquetFile(path)
        names = [n for n in file.schema_arrow.names if not n.startswith("__index_level_")]

    def column(key: str) -> tuple[list[Any], list[Any] | None]:
        with _arrow_errors(str(path)):
            cells, orders = _arrow_cells(str(path), file.read(columns=[key]))
        return cells[key], orders.get(key)

    def parts(found: Schema) -> Iterator[Tensor]:
        first = 0
        with _arrow_errors(str(path)):
            for batch in file.iter_batches(CHUNK, columns=list(found.columns)):
                cells, _ = _arrow_cells(str(path), pyarrow.Table.from_batches([batch]))
                yield found.encode(cells, str(path), first)
                first += len(batch)

    columns: Cells = {name: [] for name in names}
    labels = _without_labels(str(path), columns, schema)
    found = schema if isinstance(schema, Schema) else _schema(str(path), columns, column, schema)
    found.check(columns, str(path))
    rows = spooled(parts(found), file.metadata.num_rows, len(found.columns), str(path))
    return {key: column(key)[0] for key in labels}, rows, found


def _schema(
    name: str,
    columns: Iterable[str],
    cells: Callable[[str], tuple[Sequence[Any], Sequence[Any] | None]],
    known: Mapping[str, Any] | str | None,
) -> Schema:
    """What is known of columns, and what their cells and order say of the others."""
    whole = {
        key: with_levels(entry, partial(cells, key)) if key in columns else entry
        for key, entry in _of_each(columns, known).items()
    }
    given = _given(name, columns, whole)
    kept = [key for key in columns if key not in given.ignored]
    if not kept:
        raise ValueError(f"{name}: the schema ignores every column; give one of them another kind")
    found = {
        key: given.columns.get(key) or inferred(f"{name}: column {key!r}", *cells(key))
        for key in kept
    }
    return Schema(found, given.ignored)


def _of_each(columns: Iterable[str], known: Mapping[str, Any] | str | None) -> Mapping[str, Any]:
    """What is known of columns; a kind is that of all of them."""
    return dict.fromkeys(columns, known) if isinstance(known, str) else known or {}


def _given(name: str, columns: Iterable[str], known: Mapping[str, Any]) -> Schema:
    """What is known of some of the columns."""
    given = Schema.restore(known)
    if unknown := [key for key in (*given.columns, *given.ignored) if key not in columns]:
        raise ValueError(
            f"{name}: the schema names columns that are not there: {', '.join(unknown)}; there "
            f"are {', '.join(columns)}"
        )
    return given


def read_numbers(
    values: np.ndarray, schema: Mapping[str, Any] | str | None = None
) -> tuple[Tensor, Schema]:
    """As `read_table` of an array [N, C] whose columns "x0", "x1", ... are real unless given.

    Numbers that repeat get a resolution here too, and those of a constant column one of 1.
    """
    columns = {f"x{i}": column for i, column in enumerate(values.T)}
    for name, column in columns.items():
        check_digits(f"array: column {name!r}", column[np.isfinite(column)])
    given = _given("array", columns, _of_each(columns, schema))
    if given.ignored:
        raise ValueError("columns of an array cannot be ignored: leave them out of it")
    found = {
        name: given.columns.get(name) or real_column(column) for name, column in columns.items()
    }
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        return torch.from_numpy(values.astype(np.float32)), Schema(found)


def _table(
    name: str,
    cells: Cells,
    orders: Mapping[str, list[Any]],
    schema: Known,
) -> tuple[Tensor, Schema]:
    if isinstance(schema, Schema):
        return schema.encode(cells, name), schema
    found = _schema(name, cells, lambda key: (cells[key], orders.get(key)), schema)
    return found.encode(cells, name), found


def _labels(where: str, cells: Sequence[Any]) -> Tensor:
    """Classes of rows, numbered by their names in order; -1 where a cell is empty or -1."""
    some = {cell for cell in cells if cell is not None and as_number(cell) != -1}
    known = sorted(some, key=number_or_text)
    if not known:
        raise ValueError(f"{where} is empty: fill some cells, or leave the column out")
    codes = {name: code for code, name in enumerate(known)}
    return torch.tensor([codes.get(cell, -1) for cell in cells])


def _ignored(schema: Known) -> Sequence[str]:
    """The columns that a schema ignores."""
    if isinstance(schema, Schema):
        return schema.ignored
    return ignored_in(schema) if isinstance(schema, Mapping) else ()


def _cells(source: Any, schema: Known) -> tuple[Cells, dict[str, list[Any]]]:
    """The cells of a table by column, and the orders of those columns that declare one."""
    if not isinstance(source, str | Path):
        return _arrow_cells("table", source, _ignored(schema))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"expected a file at {path}, got none; check the path")
    if ending(path) == ".parquet":
        return _arrow_cells(str(path), path, _ignored(schema))
    return _text_cells(path), {}


def ending(path: Path) -> str:
    """How a file's name ends, in small letters: what kind of file it is."""
    return path.suffix.lower()


def is_mixed(path: Path) -> bool:
    """Whether a file is a table that `read_table` alone can read: with a column of text."""
    if ending(path) != ".csv":
        return ending(path) in TABLES
    with _lines(path, DELIMITERS) as (delimiter, lines):
        if delimiter != ",":
            return True
        _, names = next(lines, (1, []))
        try:
            columns = [*zip(*(row for _, row in islice(lines, LOOKED_AT)))]
        except ValueError:  # read_table says what is wrong
            return True
    texts = [[cell for cell in (_text(c, False) for c in column) if cell] for column in columns]
    numbers = [sum(as_number(cell) is not None for cell in column) for column in texts]
    words = any(2 * count < len(column) for count, column in zip(numbers, texts))
    return words and not any(as_number(name) is not None for name in names)


@contextmanager
def _lines(
    path: Path, delimiters: str = ","
) -> Iterator[tuple[str, Iterator[tuple[int, list[str]]]]]:
    """The delimiter that the first line of a file has most of; its lines, numbered, as cells.

    A line of another length than the first is refused.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            delimiter = max(delimiters, key=QUOTED.sub("", file.readline()).count)
            file.seek(0)
            yield delimiter, _of_one_width(path, csv.reader(file, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise ValueError(
            f"{path}: expected a table in UTF-8, of commas, semicolons or tabs, got: {error}; "
            "write it again"
        ) from error


def _of_one_width(path: Path, reader: Any) -> Iterator[tuple[int, list[str]]]:
    width = 0
    for row in filter(None, reader):
        width = width or len(row)
        if len(row) != width:
            raise ValueError(
                f"{path}: expected {width} columns as in the first line, got {len(row)} in line "
                f"{reader.line_num}; give every line the same columns"
            )
        yield reader.line_num, row


def _text_cells(path: Path) -> Cells:
    """The cells of a text file by column, None where they are empty."""
    with _lines(path, DELIMITERS) as (delimiter, lines):
        rows = [row for _, row in lines]
    if len(rows) < 2:
        raise ValueError(
            f"{path}: expected a line of names and rows below it, got {len(rows)} lines"
        )
    names = [name.strip() for name in rows[0]]
    _check_names(str(path), names, is_text=True)
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


def _check_names(source: str, names: Sequence[str], is_text: bool, once: bool = True) -> None:
    """Refuses columns without a name, as pandas writes its index, or of one name."""
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


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "frames and .parquet need pyarrow: pip install 'pyro-vae[tables]'"
        ) from error
    return pyarrow


@contextmanager
def _arrow_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (_pyarrow().ArrowException, TypeError, ValueError, OSError, OverflowError) as error:
        if str(error).startswith(f"{source}: "):
            raise  # ours
        raise ValueError(
            f"{source}: expected a table with one kind of values in each column, got: "
            f"{' '.join(str(error).split())}"
        ) from error


def _arrow_cells(
    source: str, table: Any, ignored: Sequence[str] = ()
) -> tuple[Cells, dict[str, list[Any]]]:
    """As `_cells`; what ignored columns hold is not looked at."""
    pyarrow = _pyarrow()
    with _arrow_errors(source):
        found = (
            pyarrow.parquet.read_table(table) if isinstance(table, Path) else pyarrow.table(table)
        )
    found = found.select([n for n in found.column_names if not n.startswith("__index_level_")])
    if not found.column_names:
        raise ValueError(f"{source}: expected columns, got none")
    _check_names(source, found.column_names, is_text=False)
    unread: Cells = {name: [] for name in found.column_names if name in ignored}
    found = found.drop_columns([*unread])
    types = pyarrow.types
    orders: dict[str, list[Any]] = {}
    for field in found.schema:
        refused = {
            "dates: write them as numbers, of days or years": types.is_temporal,
            "lists: give each of their parts a column": types.is_nested,
        }
        for what in (what for what, holds in refused.items() if holds(field.type)):
            raise ValueError(f"{source}: column {field.name!r} holds {what}")
        if types.is_dictionary(field.type) and field.type.ordered:
            orders[field.name] = found[field.name].chunk(0).dictionary.to_pylist()
    cells = {
        name: [None if cell is None or cell != cell or _blank(cell) else cell for cell in column]
        for name, column in found.to_pydict().items()
    }
    return cells | unread, orders


def _blank(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.strip()


def read_csv(path: Path) -> Data:
    """Reads a table of numbers, comma separated, with or without a line of column names.

    The values become float32; an empty cell is NaN, a missing value. A column of the name
    ``label`` holds the labels, an empty cell or -1 where unknown.

    Raises:
        ValueError: If the file is no table, or a cell is not a number; the message names the
            line and the column.
    """
    header, table = _numbers(path)
    names = [name.strip() for name in header]
    _check_names(str(path), names, is_text=True, once=False)
    labels = _label_columns(str(path), names)
    values = [d for d in range(table.shape[1]) if d not in labels]
    return Data(
        table[:, values].float(),
        labels=_label_numbers(path, table[:, labels[0]]) if labels else None,
        name=str(path),
        columns=tuple(names[d] for d in values) if names else None,
    )


def _numbers(path: Path) -> tuple[list[str], Tensor]:
    """The names of columns, none without a line of them, and the numbers below."""
    with _lines(path) as (_, rows):
        start, first = next(rows, (1, []))
        named = bool(first) and all(as_number(cell) is None for cell in first)
        values = array("d")
        for line, row in rows if named else chain([(start, first)], rows):
            for column, cell in enumerate(row, start=1):
                number = as_number(cell)
                if number is None and _text(cell, False) is not None:
                    raise ValueError(
                        f"{path}: expected numbers, got {cell!r} in line {line}, column {column} "
                        "(from 1); replace or remove it"
                    )
                values.append(math.nan if number is None else number)
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


def _counts_up(table: Tensor) -> Tensor:
    """Which rows are whole numbers at one distance above 0, as a header of years is."""
    steps = table.diff(dim=1)
    if not steps.numel():
        return torch.zeros(len(table), dtype=torch.bool)
    whole = (table == table.round()).all(1)
    return whole & (steps > 0).all(1) & (steps == steps[:, :1]).all(1)


def _label_numbers(path: Path, column: Tensor) -> Tensor:
    column = column.nan_to_num(nan=-1.0)  # an empty cell
    bad = (column != column.round()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got {column[row].item()} in row "
            f"{row} (from 0); number the classes"
        )
    return column.long()
