"""Prints the table of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(rows: Sequence[Mapping[str, Any]], title: str, width: int, digits: int = 2) -> None:
    """Prints rows, each a mapping from column to cell; floats with `digits` decimals."""
    if not rows:
        return
    table = Table(*rows[0], title=title)
    for row in rows:
        cells = (f"{v:.{digits}f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console(width=width).print(table)
