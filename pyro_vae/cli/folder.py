"""Run folders: writes and reads the files that `train` adds to those of `fit`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from torch import Tensor

from pyro_vae import config
from pyro_vae.cli.parsing import data_options
from pyro_vae.data import (
    Data,
    Schema,
    Splits,
    alike,
    declare,
    kind_of,
    load_data,
    read_rows,
    restore,
    spread,
)
from pyro_vae.data.schema import as_key
from pyro_vae.files import Types, check_types, reading, write
from pyro_vae.processes import uses_cuda
from pyro_vae.training import read_run
from pyro_vae.vae import VAE

RECORD_TYPES: Types = {  # entries of data.json, and their types
    "description": (dict,),
    "transform": (dict,),
    "conditional": (bool,),
    "classes": (int, NoneType),
    "seed": (int,),
}
ROWS_TYPES: Types = {  # entries of its "rows", which runs of version 0.1 lack
    "levels": (int, NoneType),
    "columns": (list, NoneType),
    "dtype": (str,),
    "range": (list,),
}
CHECKED_ROWS = 1000  # rows that are checked if a transform with noise makes their values


@contextmanager
def declared_run(folder: Path, declaration: dict[str, Any], splits: Splits) -> Iterator[None]:
    """Writes the options of a run, and what the commands need to know of its data.

    The files are removed if training does not start; a resumed run keeps its old ones until
    `fit` has accepted it.
    """
    data = {
        "description": splits.describe(),
        "transform": declare(splits.train.transform),
        "rows": kind_of(splits.train),
        "conditional": splits.conditional,
        "classes": splits.train.classes,
        "class_names": splits.train.class_names,
        "seed": splits.seed,
    }
    files = {
        folder / "config.yaml": yaml.safe_dump(declaration, sort_keys=False),
        folder / "data.json": json.dumps(data, indent=1),
    }
    run = folder / "run.json"
    before = run.stat().st_ino if run.exists() else None  # changes when `fit` writes the file
    try:
        for path, text in files.items() if before is None else ():
            write(path, text)
        yield
    finally:
        now = run.stat().st_ino if run.exists() else None
        for path, text in files.items():
            if now is None:
                path.unlink(missing_ok=True)
            elif now != before:
                write(path, text)


def load_run(run: str, data_root: str | None) -> tuple[VAE, Splits]:
    """Loads the VAE of a run and its data; raises ValueError if the data have changed.

    Named data sets are looked for in `data_root`; if None, where training found them.
    """
    folder = Path(run)
    vae, record = load_with_record(run)
    read_part(folder, "config.yaml")
    declared = data_options(folder / "config.yaml")
    root = data_root or (declared.data_root if Path(declared.data_root).is_dir() else "data")
    try:
        splits = load_splits(declared, record, root=root)
    except ValueError as error:
        raise ValueError(
            f"the data of {folder} cannot be loaded: {error} (if they have moved, write the new "
            f"place into {folder / 'config.yaml'}: its data or data_root)"
        ) from error
    with reading(folder / "data.json"):
        splits.check(record["description"])
    return vae, splits


def load_splits(declared: Namespace, record: dict[str, Any], **changed: Any) -> Splits:
    """Loads the data that options declare; `record` is that of a run which they are of, or {}."""
    same = ("transform", "validation", "conditional", "limit", "schema")
    options = {name: declared[name] for name in same}
    options |= {"root": declared.data_root, "seed": declared.split_seed}
    options["even"] = record.get("description", {"even": True}).get("even", False)
    return load_data(declared.data, **{**options, **changed})


def load_with_rows(options: Namespace) -> tuple[VAE, Data]:
    """Loads the VAE of a run and the rows of a user's file, on the device that was asked for."""
    vae, record = load_with_record(options.run)
    rows = as_trained(read_rows(options.file, record["schema"]), record, vae)
    return to_device(vae, rows, options.get("accelerator", "cpu"))


def load_with_record(run: str) -> tuple[VAE, dict[str, Any]]:
    """Loads the VAE of a run and the record of its data, as `read_record` returns it."""
    vae, record = config.load(run), read_record(run)
    names, columns = getattr(vae.likelihood, "names", []), record.get("rows", {}).get("columns")
    if columns and {*names} == {*columns} and names != columns:
        raise ValueError(
            f"{run}: run.json has the columns {', '.join(names)}, data.json {', '.join(columns)}: "
            "they must be in one order; restore both from copies"
        )
    return vae, record


def as_trained(rows: Data, record: dict[str, Any], vae: VAE) -> Data:
    """Checks a user's rows against `record`, the record of a run's data; transforms them alike."""
    if (schema := record["schema"]) is not None and rows.schema is None:
        if len(rows.data_shape) != 1 or any(c.categories for c in schema.columns.values()):
            raise ValueError(
                f"{rows.name}: expected a table, as the run was trained on, got an array, whose "
                "numbers may be codes or categories: give columns with their names"
            )
        rows = rows.unchecked(schema=schema, columns=rows.columns or tuple(schema.columns))
    rows = alike(rows, record.get("rows", {}), record["transform"], vae.likelihood.data_shape)
    rows = _renumber_labels(rows, record["class_names"], record["conditional"])
    if not record["conditional"]:
        rows = rows.unchecked(y=None)  # as in training
    elif rows.y is None:
        rows = replace(rows, classes=record["classes"]).one_hot()
    rows = rows.with_transform(record["transform"]).fixed(record["seed"])
    check_support(vae, rows)
    return rows


def _renumber_labels(rows: Data, names: list[str], strict: bool) -> Data:
    """Gives the labels of rows that name their classes the run's numbers for these.

    Classes that the run lacks are numbered after its own; if `strict`, they raise ValueError.
    """
    if rows.labels is None or not rows.class_names or not names:  # as of runs of version 0.1
        return rows
    same = {as_key(name): name for name in names}  # a number may be written in another way
    file_names = [n if n in names else same.get(as_key(n), n) for n in rows.class_names]
    new_names = [name for name in file_names if name not in names]
    if new_names and strict:
        raise ValueError(
            f"{rows.name}: expected labels of the run's classes, {', '.join(names)}; got "
            f"{new_names[0]!r}: correct them, or leave them empty"
        )
    all_names = [*names, *new_names]
    codes = torch.tensor([*map(all_names.index, file_names), -1])
    changes: dict[str, Any] = {"labels": codes[rows.labels], "class_names": tuple(all_names)}
    return rows.unchecked(**changes, classes=len(all_names))


def class_names(names: Sequence[str] | None, number: int) -> list[str]:
    """Returns what to call each class: its name in the file, or its number if it has none."""
    names = list(names or ())[:number]
    others = map(str, range(len(names), number))
    return [*names, *(f"class_{other}" if other in names else other for other in others)]


def check_support(vae: VAE, data: Data) -> None:
    """Checks that rows lie in the likelihood's support; of rows with noise, only some.

    Raises:
        ValueError: If a value lies outside.
    """
    if data.transform.noisy and not data.applied:
        data = data.subset(spread(len(data), CHECKED_ROWS, 0)).fixed()
    for x, _ in batches(data, 10_000):
        vae.likelihood.check(x)


def read_record(run: str | Path) -> dict[str, Any]:
    """Reads data.json, which `declared_run` wrote, and makes its transform and its schema.

    Raises:
        ValueError: If the file is missing or damaged, or describes other data than run.json.
    """
    path = Path(run) / "data.json"
    with reading(Path(run) / "run.json"):
        trained: dict[str, Any] = dict(read_run(run)["data"]["train"].get("describe") or {})
    with reading(path):
        record = json.loads(read_part(run, path.name))
        check_types(record, RECORD_TYPES)
        if "rows" in record:
            check_types(record["rows"], ROWS_TYPES)
            if [type(value) in (int, float) for value in record["rows"]["range"]] != [True, True]:
                raise TypeError(f"range is {record['rows']['range']!r}")
        for name in trained.keys() & {"seed", "transform"}:
            if record[name] != trained[name]:
                raise TypeError(f"{name} is {record[name]!r}, in run.json {trained[name]!r}")
        record["schema"] = _schema(record["rows"]) if "rows" in record else None
        record["transform"] = restore(record["transform"])
        if (names := record.get("class_names", ())) is None:  # the classes are numbers
            names = range(record["classes"] or 0)
        record["class_names"] = [*map(str, names)]
    return record


def _schema(rows: dict[str, Any]) -> Schema | None:
    """Makes the schema of a record of rows, in the order of its columns; None if it has none."""
    if (schema := rows.get("schema")) is None:
        return None
    return Schema.restore(
        {name: schema[name] for name in dict.fromkeys([*rows["columns"], *schema])}
    )


def read_table(run: str | Path, name: str) -> list[dict[str, float | None]]:
    """Reads the rows of a run's .csv file: numbers by column, None where nothing was measured."""
    text = read_part(run, name)
    with reading(Path(run) / name):
        head, *lines = csv.reader(text.splitlines())
        rows = [
            {key: float(cell) if cell else None for key, cell in zip(head, line, strict=True)}
            for line in lines
        ]
        named = "epoch" in head and len(set(head)) == len(head)
        if not named or any(row["epoch"] is None for row in rows):
            raise TypeError("expected columns of different names, with an epoch in each row")
    return rows


def read_part(run: str | Path, name: str) -> str:
    """Reads the text of a file in a run folder."""
    try:
        return (Path(run) / name).read_text()
    except FileNotFoundError:
        raise ValueError(
            f"{run} has no {name}, which pyro-vae train writes: restore it from a copy, or give "
            "a run that pyro-vae train made"
        ) from None


def batches(data: Data, size: int = 1000) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yields batches (x, y) of the rows, in order."""
    for index in torch.arange(len(data)).split(size):
        yield data.batch(index)


def to_device(vae: VAE, data: Data, accelerator: str) -> tuple[VAE, Data]:
    """Moves a VAE and rows to the device asked for; "auto" is a GPU if there is one."""
    device = torch.device("cuda" if uses_cuda(accelerator) else "cpu")
    return vae.to(device), data.to(device)


def destination(
    out: str | None, default: Path | str, suffixes: tuple[str, ...], source: str | None = None
) -> Path:
    """Returns the file that a command will write, checked before the work begins.

    Args:
        out: The file that was asked for, or None.
        default: The file if `out` is None, or its ending in place of that of `source`.
        suffixes: Endings that the file may have.
        source: The file that the command reads.

    Raises:
        ValueError: If the ending is another, the folder is missing, or it is the source itself.
    """
    if isinstance(default, str):
        named = Path(source or "")
        default = (named if named.name.strip(".") else named.resolve()).with_suffix(default)
    path = default if out is None else Path(out)
    if path.suffix not in suffixes:
        raise ValueError(f"out must end in {' or '.join(suffixes)}; got {out!r}")
    if not path.parent.is_dir():
        raise ValueError(f"out must be in a folder that exists; there is no {path.parent}")
    if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(f"out must not be the input; {path} would be overwritten: name another")
    return path
