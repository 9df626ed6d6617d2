"""What the columns of a table hold, declared or inferred; cells as numbers, and back."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
import torch
import yaml
from torch import Tensor

from pyro_vae.arguments import check_real
from pyro_vae.files import as_csv

KINDS = {  # the likelihood of each kind of column
    "real": "Normal",
    "positive": "LogNormal",
    "count": "NegativeBinomial",
    "binary": "Bernoulli",
    "category": "Categorical",
    "ordinal": "Ordinal",
}
CENTRES = {"Bernoulli": "common", "Categorical": "common"} | dict.fromkeys(
    ("Ordinal", "NegativeBinomial", "Poisson", "DiscretizedLogistic", "MixtureOfLogistics"),
    "middle",
)  # how draws are summarised, by likelihood: by their mean for all others
CATEGORIES = {  # kinds of categories, with their least and greatest number, in words too
    "binary": (2, 2, "two different categories"),
    "category": (2, math.inf, "two different categories or more"),
    "ordinal": (2, math.inf, "two different categories or more, listed from the lowest"),
}
IGNORED = "ignored"  # the kind of a column that is not modelled, such as names or ids
MAX_CATEGORIES = 1000  # most categories of a column: a column with more holds names or ids
MAX_LEVELS = 10  # most different whole numbers that are taken for ordered levels
SKEWED_DEVIATION = 0.7  # of the logarithm of positive numbers: LogNormal above this
LARGEST = float(np.finfo(np.float32).max)
MIN_RANGE = 1e-5  # least range of a column, relative to its largest number
MOST_COUNTED = 2.0**40  # larger numbers are whole in floating point, whatever they measure
MAX_DISTINCT = 0.9  # numbers are taken for rounded if a smaller share of them is different
WRITTEN = {  # text that is refused as categories, and how to write it instead
    ("dates", "as numbers, of days or years"): re.compile(
        r"\d{4}-\d\d?-\d\d?([T ].*)?|\d\d?[/.]\d\d?[/.]\d{2,4}( .*)?|\d\d?:\d\d(:\d\d)?"
    ),
    ("numbers written as text", "with digits and a decimal point alone"): re.compile(
        r"[-+\u2212]?[$\u00a3\u20ac]?\s?[-+\u2212]?"
        r"(\d+([,'\s]\d+)*(\.\d+)?|\d+([.'\s]\d+)*,\d+)\s?[%$\u00a3\u20ac]?"
    ),
    ("numbers with their unit", "as numbers alone"): re.compile(
        r"[-+\u2212]?\d+([.,]\d+)*\s?[^\W\d]{1,5}"
    ),
}
MOSTLY = 0.9  # larger shares of such cells are refused; with units, of many different ones
Cells = dict[str, list[Any]]  # the cells of each column, by its name
SchemaLike = Union["Schema", Mapping[str, Any], str, None]  # what is known of columns
ReadColumn = Callable[[str], tuple[Sequence[Any], Sequence[Any] | None]]
"""A function from a column's name to its cells, and to the order of its categories or None."""


@dataclass(frozen=True)
class Column:
    """What one column of a table holds.

    Args:
        kind: "real", "positive", "count", "binary", "category" or "ordinal", or the name of a
            scalar likelihood of numbers.
        categories: For the last three of these kinds, what the codes 0, 1, ... stand for.
        resolution: For numbers, the width of an interval around each, whose probability is
            modelled in place of a density; None for a density.

    Raises:
        ValueError: If the kind is unknown, categories are missing, repeated or superfluous, or
            the resolution is not positive.
    """

    kind: str
    categories: tuple[str | float, ...] = ()
    resolution: float | None = None

    def __post_init__(self) -> None:
        check_real(above=0, optional=True, resolution=self.resolution)
        if self.kind not in KINDS and not self.kind[:1].isupper():
            raise ValueError(
                f"kind must be one of {', '.join([*KINDS, IGNORED])}, or the name of a "
                f"likelihood; got {self.kind!r}"
            )
        least, most, wanted = CATEGORIES.get(self.kind, (0, 0, "no categories"))
        count = len(self.categories)
        if len(set(self.categories)) != count or not least <= count <= most:
            raise ValueError(f"kind {self.kind} needs {wanted}; got {list(self.categories)}")

    @property
    def family(self) -> str:
        """The name of its likelihood."""
        return KINDS.get(self.kind, self.kind)

    @property
    def likelihood(self) -> str | dict[str, Any]:
        """The declaration of its likelihood, for `likelihoods.Columns`."""
        levels = len(self.categories) if self.kind in ("category", "ordinal") else None
        values = {"levels": levels, "resolution": self.resolution}
        options = {name: value for name, value in values.items() if value is not None}
        return {"class_path": self.family, "init_args": options} if options else self.family

    def cell(self, value: float) -> str | float | None:
        """Returns the cell that a number stands for; None for NaN."""
        if math.isnan(value):
            return None
        if self.categories:
            return self.categories[min(max(round(value), 0), len(self.categories) - 1)]
        return shortened(float(str(np.float32(value))))  # fewest digits for this float32

    @property
    def plain(self) -> dict[str, Any]:
        """The column as a dict, for YAML and JSON."""
        codes = list(self.categories) or None
        values = {"kind": self.kind, "categories": codes, "resolution": self.resolution}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Schema:
    """The columns of a table by name, in order: what `read_table` inferred, or was told.

    Args:
        columns: A `Column` for each name.
        ignored: The names of further columns that a table may have, of the kind "ignored".
    """

    columns: Mapping[str, Column]
    ignored: tuple[str, ...] = ()

    @classmethod
    def restore(cls, plain: Mapping[str, Any], read: ReadColumn | None = None) -> Schema:
        """Makes the schema that `plain` describes.

        Args:
            plain: A dict like the property `plain`; a column may also be given by its kind alone.
            read: Function that reads a column of a table, for categories that `plain` leaves out.

        Raises:
            ValueError: If an entry is wrong; the message names the column.
        """
        ignored = ignored_columns(plain)
        kept = {str(name): entry for name, entry in plain.items() if str(name) not in ignored}
        return cls({name: _as_column(name, entry, read) for name, entry in kept.items()}, ignored)

    @property
    def plain(self) -> dict[str, Any]:
        """The schema as a dict, for JSON and for `read_table(..., schema=...)`."""
        columns = {name: column.plain for name, column in self.columns.items()}
        return columns | {name: {"kind": IGNORED} for name in self.ignored}

    @property
    def likelihood(self) -> dict[str, Any]:
        """The declaration of the likelihood for `build`."""
        columns = {name: column.likelihood for name, column in self.columns.items()}
        return {"class_path": "Columns", "init_args": {"columns": columns}}

    def __str__(self) -> str:
        return yaml.safe_dump(
            self.plain, sort_keys=False, default_flow_style=None, width=99, allow_unicode=True
        )

    def encode(
        self, cells: Mapping[str, Sequence[Any]], name: str = "table", first: int = 0
    ) -> Tensor:
        """Converts cells to rows, float32 [N, C]: categories to codes, empty cells to NaN.

        Args:
            cells: The cells of each column, by its name.
            name: What error messages call the table.
            first: The number of the first of these rows in the table, for error messages.

        Raises:
            ValueError: If columns are missing or unknown, or a cell does not fit its column.
        """
        self.check(cells, name)
        each = [_encode(name, key, c, cells[key], first) for key, c in self.columns.items()]
        return torch.from_numpy(np.stack(each, 1).astype(np.float32))

    def check(self, names: Iterable[str], name: str = "table") -> None:
        """Checks that a table has the columns of this schema, in any order.

        Raises:
            ValueError: If columns are missing or unknown.
        """
        if words := column_mismatch(self.columns, [n for n in names if n not in self.ignored]):
            raise ValueError(
                f"{name}: expected the columns of the schema, got others ({words}): give the "
                "table these columns"
            )

    def decode(self, rows: Tensor) -> Cells:
        """Converts rows [N, C] to cells by column: codes to categories, NaN to None."""
        pairs = zip(self.columns.items(), rows.double().T.tolist())
        return {name: list(map(column.cell, values)) for (name, column), values in pairs}

    def centre(self, draws: Tensor, mean: Tensor) -> Tensor:
        """Summarises R draws of each row [R, N, C] by one row [N, C].

        It holds the most frequent category, the median of counts and ordered levels, and for
        other numbers the given `mean` [N, C].
        """
        best = {"common": draws.mode(0).values, "middle": draws.median(0).values, "mean": mean}
        summaries = [CENTRES.get(column.family, "mean") for column in self.columns.values()]
        return torch.stack([best[name][:, c] for c, name in enumerate(summaries)], 1)

    def rounded(self, rows: Tensor) -> Tensor:
        """Rounds rows [*S, C] to multiples of each column's resolution, as in the table itself."""
        widths = [column.resolution or 0.0 for column in self.columns.values()]
        width, exact = torch.tensor(widths, dtype=torch.float64), rows.double()
        return torch.where(width > 0, (exact / width).round() * width, exact).to(rows)

    def csv(self, rows: Tensor) -> str:
        """Rows [N, C] as the text of a .csv file, in the table's own names and units."""
        cells = self.decode(rows)
        return as_csv([cells, *zip(*cells.values())])


def ignored_columns(known: SchemaLike) -> tuple[str, ...]:
    """Returns the names of columns to which a schema or a mapping gives the kind "ignored"."""
    if isinstance(known, Schema):
        return known.ignored
    each = known.items() if isinstance(known, Mapping) else ()
    return tuple(str(name) for name, entry in each if entry in (IGNORED, {"kind": IGNORED}))


def column_mismatch(known: Iterable[str], given: Iterable[str]) -> str:
    """Returns in words which columns are missing and which unknown; "" if they are the same."""
    missing, other = Counter([*known]), Counter([*given])
    parts = {"missing": missing - other, "unknown": other - missing}
    return "; ".join(f"{word}: {', '.join(sorted(n))}" for word, n in parts.items() if n)


def _as_column(name: str, entry: Any, read: ReadColumn | None) -> Column:
    given: Any = {"kind": entry} if isinstance(entry, str) else entry
    keys = set(given) if isinstance(given, Mapping) else set()
    if not {"kind"} <= keys <= {"kind", "categories", "resolution"}:
        raise ValueError(
            f"schema of column {name!r} must be a kind, or a mapping of kind, categories and "
            f"resolution; got {entry!r}"
        )
    kind, categories = str(given["kind"]), given.get("categories") or ()
    if not isinstance(categories, list | tuple):
        raise ValueError(f"schema of column {name!r}: categories must be a list")
    if kind in CATEGORIES and not categories and read is not None:
        categories = _categories(kind, *read(name))
    try:
        named = (as_name(c) if isinstance(c, bool) else shortened(c) for c in categories)
        return Column(kind, tuple(named), given.get("resolution"))
    except ValueError as error:
        raise ValueError(f"schema of column {name!r}: {error}") from None


def _encode(name: str, key: str, column: Column, cells: Sequence[Any], first: int) -> np.ndarray:
    """Returns the cells of one column as numbers, NaN where they are empty."""
    codes = {as_key(category): code for code, category in enumerate(column.categories)}
    codes |= {category: code for code, category in enumerate(column.categories)}
    values = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        if cell is None:
            continue
        known = codes.get(as_name(cell), codes.get(as_key(cell)))
        value = known if codes else as_number(cell)
        if value is None or not abs(value) <= LARGEST:
            named = ", ".join(map(str, column.categories[:5]))
            more = ", ..." if len(column.categories) > 5 else ""
            wanted = f"one of the categories {named}{more}" if codes else "a finite number"
            remedy = ", or train with a schema that has this category" if codes else ""
            raise ValueError(
                f"{name}: column {key!r}: expected {wanted}, got {cell!r} in row "
                f"{first + row} (from 0): correct the cell, or leave it empty{remedy}"
            )
        values[row] = value
    return values


def as_number(cell: Any) -> float | None:
    """Returns the number that a cell holds, or None."""
    if isinstance(cell, bool) or (isinstance(cell, str) and "_" in cell):
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return None


def as_name(cell: Any) -> str:
    """Returns the category that a cell names."""
    return cell if isinstance(cell, str) else str(shortened(cell))


def as_key(cell: Any) -> float | str:
    """What two cells of one category share: a number, however it is written, or the text."""
    number = as_number(cell)
    return as_name(cell) if number is None or number != number else number


def shortened(value: Any) -> Any:
    """Returns a whole float as an int, and other values as they are."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_written(cell: Any) -> Any:
    """A number in the fewest digits that give it again, of float32 if it is one of these."""
    if not isinstance(cell, float) or cell.is_integer():
        return shortened(cell)
    short = np.float32(cell)
    return float(str(short)) if float(short) == cell else cell


def _categories(kind: str, cells: Sequence[Any], order: Sequence[Any] | None) -> list[str]:
    """Returns the categories in cells; none if there are too many, or an order is not known."""
    names = {as_name(cell) for cell in cells if cell is not None}
    found = sorted(names, key=number_or_text) if order is None else list(map(as_name, order))
    ranked = order is not None or all(as_number(name) is not None for name in names)
    return [] if (kind == "ordinal" and not ranked) or len(found) > MAX_CATEGORIES else found


def infer_column(where: str, cells: Sequence[Any], order: Sequence[Any] | None = None) -> Column:
    """Infers what a column holds from its cells; `order` is that of its categories, if known."""
    filled = [cell for cell in cells if cell is not None]
    if not filled:
        raise ValueError(f"{where} is empty in all rows: give it the kind ignored, or drop it")
    numbers = [as_number(cell) for cell in filled]
    texts = [cell for cell, number in zip(filled, numbers) if number is None]
    if not texts and order is None:
        return _number_column(where, np.array(numbers, dtype=np.float64))
    if order is None and len(texts) < len(filled):
        raise ValueError(
            f"{where} holds {len(filled) - len(texts)} numbers beside text such as {texts[0]!r}: "
            "repair the cells, or give it the kind category in the schema"
        )
    return _text_column(where, list(map(as_name, filled)), order)


def _text_column(where: str, cells: list[str], order: Sequence[Any] | None) -> Column:
    for (what, how), pattern in WRITTEN.items():
        such = [cell for cell in cells if pattern.fullmatch(cell)]
        few = "unit" in what and len(set(such)) <= MAX_LEVELS  # such as 1st, 2nd, 3rd
        if order is None and len(such) > MOSTLY * len(cells) and not few:
            raise ValueError(
                f"{where} holds {what}, such as {such[0]!r}: write them {how}, or give the "
                "column the kind category"
            )
    found = sorted(set(cells))
    if len(found) > MAX_CATEGORIES or len(found) == len(cells) > 2 * MAX_LEVELS:
        raise ValueError(
            f"{where} holds {len(found)} different texts in {len(cells)} rows, as names or ids: "
            f"give it the kind ignored, or join them to at most {MAX_CATEGORIES} categories"
        )
    categories = (
        found if order is None else [name for name in map(as_name, order) if name in found]
    )
    if len(categories) < 2:
        raise ValueError(
            f"{where} holds {cells[0]!r} in all rows: give it the kind ignored, or drop it"
        )
    kind = "binary" if len(categories) == 2 else "category" if order is None else "ordinal"
    return Column(kind, tuple(categories))


def _number_column(where: str, values: np.ndarray) -> Column:
    if not (np.abs(values) <= LARGEST).all():
        raise ValueError(f"{where} holds infinite values: repair or empty these cells")
    different, times = np.unique(values, return_counts=True)
    if len(different) < 2:
        raise ValueError(
            f"{where} holds {values[0]:g} in all rows: give it the kind ignored, or drop it"
        )
    is_whole = bool((values == values.round()).all()) and np.abs(values).max() <= MOST_COUNTED
    few = len(different) <= min(MAX_LEVELS, len(values) // 3)
    # where a level is in one row alone, later rows may bring others
    if len(different) == 2 or (is_whole and few and times.min() > 1):
        kind = "binary" if len(different) == 2 else "ordinal"
        return Column(kind, tuple(map(shortened, different.tolist())))
    check_digits(where, values)
    if is_whole and values.min() >= 0 and values.var() >= values.mean():
        return Column("count")
    width, above = resolution(values, is_whole), values[values > 0]
    zeros = math.nextafter(0.0, 1.0) if width is None else 0.0
    skewed = len(above) > 0 and np.log(above).std() > SKEWED_DEVIATION
    return Column("positive" if skewed and values.min() >= zeros else "real", (), width)


def check_digits(where: str, values: np.ndarray) -> None:
    """Raises ValueError for numbers that differ, but too little for float32."""
    low, high = values.min(initial=0), values.max(initial=0)
    with np.errstate(over="ignore", invalid="ignore"):
        spread = np.ptp(values.astype(np.float32)) if len(values) else 0.0
    if spread <= MIN_RANGE * max(abs(low), abs(high)) and len(np.unique(values)) > 1:
        raise ValueError(
            f"{where} holds numbers from {values.min():.12g} to {values.max():.12g}, which "
            f"float32 does not tell apart: subtract {values.min():.12g}, or change their unit"
        )


def resolution(values: np.ndarray, rounded: bool = False) -> float | None:
    """Returns the smallest distance of two different numbers, ignoring rounding errors.

    It is 1 if all numbers are the same, and None if few of them repeat and they are not known to
    be `rounded`.
    """
    different = np.unique(values)
    if not rounded and len(different) >= MAX_DISTINCT * len(values):
        return None
    gaps, least = np.diff(different), 1e-6 * float(np.abs(different).max())
    return float(f"{gaps[gaps > least].min(initial=gaps.max()):.4g}") if len(gaps) else 1.0


def number_or_text(cell: Any) -> tuple[float, str]:
    """Returns the key that sorts cells: numbers in their order, then texts in theirs."""
    number = as_number(cell)
    return (math.inf if number is None else number, str(cell))
