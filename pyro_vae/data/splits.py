"""Data sets by name or path, split into training, validation and test part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.arguments import check_real, check_whole, closest
from pyro_vae.data.data import Data, Parts
from pyro_vae.data.readers import (
    NAMED,
    read_arrays,
    read_cells,
    read_csv,
    read_images,
    read_named,
)
from pyro_vae.data.schema import Schema, SchemaLike
from pyro_vae.data.tables import TABLES, is_mixed, read_rows_of_table
from pyro_vae.data.transforms import make_transform


@dataclass(frozen=True, eq=False)
class Splits:
    """The training, validation and test part of a data set, and how they were made.

    Args:
        train: The training part.
        validation: The validation part.
        test: The test part.
        name: The name of the data set, or the absolute path of its file or folder.
        transform: The name of the transform.
        validation_rows: The number of rows of the validation part before the limit.
        seed: The seed of the split and of the noise of the rows.
        conditional: Whether the parts carry y.
        limit: The largest number of rows of a part, or None.
        even: Whether these rows are spread over the part; its first ones if False.
    """

    train: Data
    validation: Data
    test: Data
    name: str
    transform: str = "none"
    validation_rows: int | None = None
    seed: int = 0
    conditional: bool = False
    limit: int | None = None
    even: bool = True

    def __repr__(self) -> str:
        rows = ", ".join(f"{len(part)} {name}" for name, part in self.parts.items())
        return f"Splits({self.name!r}, {rows} rows of {self.train.summary})"

    @property
    def parts(self) -> dict[str, Data]:
        """The parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def missing(self) -> bool:
        """Whether any value of any part is missing."""
        return any(part.missing for part in self.parts.values())

    def with_transform(self, name: str) -> Splits:
        """Returns the rows with the transform called ``name``, fitted to the training part."""
        fitted = make_transform(name, self.train.x, self.train.levels)
        parts: Any = {key: part.with_transform(fitted) for key, part in self.parts.items()}
        return replace(self, **parts, transform=name)

    def describe(self) -> dict[str, Any]:
        """Returns what ``load_data`` needs to make the parts again, and their digests, for JSON.

        The data root is left out: it may differ between machines.
        """
        return {
            "name": self.name,
            "transform": self.transform,
            "validation": self.validation_rows,
            "seed": self.seed,
            "conditional": self.conditional,
            "limit": self.limit,
            "even": self.even,
            "digests": {name: part.digest() for name, part in self.parts.items()},
        }

    def check(self, description: Mapping[str, Any]) -> None:
        """Checks that these are the data of a run.

        Args:
            description: The result of ``describe`` when the run was trained.

        Raises:
            ValueError: If the transform, the seed or a digest differs; the message names it.
        """
        now = self.describe()
        for key in ("transform", "seed"):
            if description[key] != now[key]:
                raise ValueError(
                    f"data changed since the run: {key} was {description[key]!r} and is "
                    f"{now[key]!r}; load the data with the {key} of the run"
                )
        for part, digest in now["digests"].items():
            if description["digests"][part] != digest:
                raise ValueError(
                    f"data changed since the run: the {part} part of {self.name!r} had digest "
                    f"{description['digests'][part][:12]}... and has {digest[:12]}...; "
                    "restore the files and options of the run"
                )


def load_data(
    name: str | Path,
    *,
    root: str | Path = "data",
    transform: str = "none",
    validation: int | float | None = None,
    seed: int = 0,
    conditional: bool = False,
    limit: int | None = None,
    even: bool = True,
    schema: Mapping[str, Any] | None = None,
) -> Splits:
    """Loads a data set in three parts.

    Sources that come in one part are split 80 / 10 / 10 per cent. Where the source has its own
    test part, a validation part of a sixth is taken from the training part: 10,000 of MNIST's
    60,000. Both choices of rows depend on the seed only. The id of a row is its position in the
    source, where the source's own validation and test part come after its training part.

    Args:
        name: "digits" (8 x 8, 17 levels, bundled with scikit-learn), "sprites" (32 x 32, binary,
            drawn: `Sprites(3, 3, 8, 8, 8, size=32)`), "MNIST", "FashionMNIST",
            "KMNIST", "EMNIST" (the balanced split, upright), "Omniglot" (105 x 105, ink is 1,
            no labels), "SVHN" or "CIFAR10", in any case; or the path of a table
            (.csv, .tsv, .parquet), an .npz or .npy file or a folder of images.
        root: The folder where torchvision finds or puts the named data sets.
        transform: "none", "threshold", "static", "dynamic", "dequantise", "rescale" or
            "standardise" (with the means and deviations of the training part).
        validation: The rows of the validation part, as a number or as a fraction of the rows
            that the source gives for training; for sources in one part, of all rows.
        seed: The seed of the split and of the noise of the rows, 0 or more.
        conditional: Whether the parts have a y: the source's own, otherwise one-hot labels.
        limit: Keeps at most this many rows of each part, for quick tries.
        even: Whether the limit keeps rows from all over a part, chosen by the seed; its first
            rows if False, as in version 0.1.
        schema: For tables, what is known of their columns, as in `read_table`; {} infers all of
            it. If None, a .csv file that holds only numbers is read as such, without kinds.

    Raises:
        ValueError: If the name is unknown, files are missing or cannot be used, or an argument
            does not fit the data.
    """
    check_whole(0, seed=seed)
    check_whole(optional=True, limit=limit)
    if not name:
        raise ValueError("expected the name of a data set or a path, got ''")
    if schema and Path(name).suffix.lower() not in TABLES:
        raise ValueError(f"a schema is of tables ({', '.join(TABLES)}); {name} is none")
    named = {key.lower(): key for key in NAMED}.get(name.lower() if isinstance(name, str) else "")
    name = os.path.abspath(name) if named is None and os.path.exists(name) else name
    source = _number_rows(_read(Path(name), schema) if named is None else read_named(named, root))
    split, parts = _split(source, validation, seed), dict[str, Any]()
    for key, (part, index) in split.items():
        kept = spread(len(index), limit, seed) if even else slice(limit)
        rows = part.subset(index[kept]).unchecked(seed=seed)
        rows = rows if conditional else rows.unchecked(y=None)
        parts[key] = rows.one_hot() if conditional and rows.y is None else rows
    splits = Splits(
        **parts,
        name=str(name),
        validation_rows=None if "validation" in source else len(split["validation"][1]),
        seed=seed,
        conditional=conditional,
        limit=limit,
        even=even,
    )
    return splits.with_transform(transform)


def read_rows(path: str | Path, schema: Schema | None = None) -> Data:
    """Reads all rows of a file or folder as one part, untransformed.

    Args:
        path: A file or folder, as in `load_data`; if it has parts, they follow one another.
        schema: The schema that the rows must fit; tables without one must hold numbers.

    Raises:
        ValueError: If there is no such file or folder, or it cannot be used.
    """
    parts = _read(Path(path), schema, "real")
    rows = parts["train"] if len(parts) == 1 else _join([*_number_rows(parts).values()])
    return rows.unchecked(schema=schema and rows.schema)


def _join(parts: list[Data]) -> Data:
    """Returns the rows of all parts as one part; labels are -1 in a part without them."""
    each = {name: [getattr(p, name) for p in parts] for name in ("x", "y", "labels", "rows")}
    if any(labels is not None for labels in each["labels"]):
        unknown = [torch.full((len(part),), -1) for part in parts]
        each["labels"] = [u if p.labels is None else p.labels for p, u in zip(parts, unknown)]
    return parts[0].unchecked(
        **{name: None if some[0] is None else torch.cat(some) for name, some in each.items()}
    )


def _read(path: Path, schema: SchemaLike, unknown: str | None = None) -> Parts:
    """Reads the parts of a source; without a schema, columns are of the kind `unknown`."""
    if path.is_dir():
        return read_images(path)
    if not path.suffix and not path.exists():
        raise ValueError(
            f"expected one of {', '.join(NAMED)}, or the path of a table, of an .npz or .npy file "
            f"or of a folder of images, got {str(path)!r}{closest(str(path), NAMED)}"
        )
    if not path.is_file():
        raise ValueError(f"expected a file or folder at {path}, got none; check the path")
    kind = path.suffix.lower()
    if kind in TABLES:
        is_table = schema is not None or is_mixed(path)
        known = unknown if schema is None else schema
        return {"train": read_rows_of_table(path, known) if is_table else read_csv(path)}
    if kind in (".h5ad", ".mtx"):
        return {"train": read_cells(path)}
    if kind in (".npz", ".npy"):
        return read_arrays(path)
    raise ValueError(
        f"expected an .npz, .npy, .csv, .tsv or .parquet file or a folder of images, got {path}"
    )


def _number_rows(source: Parts) -> Parts:
    """Gives all parts one numbering of rows and one number of classes.

    Raises:
        ValueError: If the parts differ in the shape or grey levels of a datum or the width of y.
    """
    parts = [*source.values()]
    kinds = [
        f"data of shape {list(part.data_shape)}, {'no' if part.levels is None else part.levels} "
        f"grey levels and {'no' if part.y is None else part.y.shape[1]} columns of y"
        for part in parts
    ]
    for part, kind in zip(parts, kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"expected parts of one kind, got {parts[0].name} with {kinds[0]} and "
                f"{part.name} with {kind}; make them alike"
            )
    classes = max(part.classes or 0 for part in parts) or None
    starts = np.cumsum([0, *map(len, parts)]).tolist()
    return {
        name: part.unchecked(rows=part.rows + start, classes=classes)
        for (name, part), start in zip(source.items(), starts)
    }


def _split(
    source: Parts, validation: int | float | None, seed: int
) -> dict[str, tuple[Data, Tensor]]:
    """Returns data and row positions of each part; takes missing parts from the training part."""
    whole, rows = source["train"], len(source["train"])
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    test = 0 if "test" in source else max(1, round(rows / 10))
    held = 0
    if "validation" not in source:
        share = validation if validation is not None else 1 / 6 if "test" in source else 1 / 10
        check_real(validation=share)
        if share <= 0 or (share >= 1 and not isinstance(share, Integral)):
            raise ValueError(
                "expected the validation part as a number of rows of at least 1 or as a fraction "
                f"between 0 and 1, got {share}"
            )
        held = int(share) if isinstance(share, Integral) else max(1, round(rows * share))
    elif validation is not None:
        raise ValueError(
            f"{whole.name}: expected no validation size, since the source has a validation "
            f"part, got {validation}; leave it out"
        )
    if held + test >= rows:
        raise ValueError(
            f"{whole.name}: expected rows left for training, got {rows} rows for {held} of "
            f"validation and {test} of test; choose a smaller validation part or give more rows"
        )
    own = {name: (part, torch.arange(len(part))) for name, part in source.items()}
    held_out = {"validation": (whole, order[test : held + test]), "test": (whole, order[:test])}
    return held_out | own | {"train": (whole, order[held + test :])}


def spread(num_data: int, limit: int | None, seed: int) -> Tensor:
    """Draws rows from all over the data: one from each of `limit` stretches of equal length.

    Args:
        num_data: The number of rows N.
        limit: The largest number of rows; None for all.
        seed: Seed of the draws, 0 or more.

    Returns:
        Indices in order, int64 [min(N, limit)].

    Raises:
        ValueError: If the limit is below one.
    """
    check_whole(optional=True, limit=limit)
    if limit is None or limit >= num_data:
        return torch.arange(num_data)
    edges = np.linspace(0, num_data, limit + 1).round().astype(np.int64)
    return torch.from_numpy(np.random.default_rng(seed).integers(edges[:-1], edges[1:]))
