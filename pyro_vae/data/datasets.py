"""Data sets by name or path, split into training, validation and test part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.arguments import check_real, check_whole, closest
from pyro_vae.data.arrays import read_arrays
from pyro_vae.data.batches import spread
from pyro_vae.data.cells import read_cells
from pyro_vae.data.data import Data
from pyro_vae.data.frames import read_given
from pyro_vae.data.given import Given
from pyro_vae.data.images import read_images
from pyro_vae.data.named import NAMED, read_named
from pyro_vae.data.noise import check_seed
from pyro_vae.data.schema import Schema
from pyro_vae.data.sources import TABLES, is_mixed
from pyro_vae.data.splits import Splits
from pyro_vae.data.tables import read_csv
from pyro_vae.data.transforms import make_transform


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
    60,000. Both are choices of rows that depend on the seed only. Rows from one source keep
    their ids, and the rows of a validation or test part of the source are numbered on.

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
        conditional: Whether the parts carry y: the source's own, otherwise one-hot labels.
        limit: Keeps at most this many rows of each part, for quick tries.
        even: Whether the limit keeps rows from all over a part, a seeded choice; its first rows
            if False, as in version 0.1.
        schema: For tables, what is known of their columns, as `read_table` takes; {} to have it
            all inferred. Without one a .csv file of numbers alone is read as numbers.

    Raises:
        ValueError: If the name is unknown, files are missing or cannot be used, or an argument
            does not fit the data.
    """
    check_seed(seed)
    check_whole(optional=True, limit=limit)
    given = _numbered(_read(name, root, schema))
    split = _split(given, validation, seed)
    parts = [
        part.subset(spread(len(part), limit, seed) if even else torch.arange(len(part))[:limit])
        for part in split
    ]
    made = make_transform(transform, parts[0].x, parts[0].levels)
    train, held, test = (
        _condition(replace(part, transform=made, seed=seed), conditional) for part in parts
    )
    rows = len(split[1]) if given.validation is None else None
    return Splits(train, held, test, str(name), transform, rows, seed, conditional, limit, even)


def read_rows(path: str | Path, schema: Schema | None = None) -> Data:
    """All rows of a file or folder as one part, untransformed.

    Args:
        path: A file or folder, as `load_data` takes.
        schema: That which the rows must fit, for tables that have one.

    Raises:
        ValueError: If there is none, or it cannot be used.
    """
    return _read(Path(path), ".", schema).train


def locate(name: str) -> str:
    """`name` itself if it is that of a data set, else the path made absolute, if there is one."""
    return os.path.abspath(name) if _named(name) is None and os.path.exists(name) else name


def _named(name: str | Path) -> str | None:
    known = {known.lower(): known for known in NAMED}
    return None if isinstance(name, Path) else known.get(name.lower())


def _read(
    name: str | Path, root: str | Path, schema: Schema | Mapping[str, Any] | None = None
) -> Given:
    named = _named(name)
    if named is not None:
        return read_named(named, root)
    path = Path(name)
    if path.is_dir():
        return read_images(path)
    if not path.suffix and not path.exists():
        raise ValueError(_unknown(str(name)))
    if not path.is_file():
        raise ValueError(f"expected a file or folder at {path}, got none; check the path")
    if path.suffix in TABLES and (schema is not None or is_mixed(path)):
        return read_given(path, schema)
    if path.suffix == ".csv":
        return read_csv(path)
    if path.suffix in (".h5ad", ".mtx"):
        return read_cells(path)
    if path.suffix in (".npz", ".npy"):
        return read_arrays(path)
    raise ValueError(
        f"expected an .npz, .npy, .csv, .tsv or .parquet file or a folder of images, got {path}"
    )


def _unknown(name: str) -> str:
    return (
        f"expected one of {', '.join(NAMED)}, or the path of a table, of an .npz or .npy file or "
        f"of a folder of images, got {name!r}{closest(name, NAMED)}"
    )


def _numbered(given: Given) -> Given:
    """Gives all parts one numbering of rows and one number of classes."""
    parts = [part for part in (given.train, given.validation, given.test) if part is not None]
    classes = max(part.classes or 0 for part in parts) or None
    start = 0
    for i, part in enumerate(parts):
        parts[i] = replace(part, rows=part.rows + start, classes=classes)
        start += len(part)
    numbered = iter(parts)
    return Given(
        next(numbered),
        None if given.validation is None else next(numbered),
        None if given.test is None else next(numbered),
    )


def _split(given: Given, validation: int | float | None, seed: int) -> tuple[Data, Data, Data]:
    rows = len(given.train)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))
    test = held = 0
    if given.test is None:
        test = max(1, round(rows / 10))
    if given.validation is None:
        held = _count(validation, rows, 1 / 10 if given.test is None else 1 / 6)
    elif validation is not None:
        raise ValueError(
            f"{given.train.name}: expected no validation size, since the source has a validation "
            f"part, got {validation}; leave it out"
        )
    if held + test >= rows:
        raise ValueError(
            f"{given.train.name}: expected rows left for training, got {rows} rows for {held} of "
            f"validation and {test} of test; choose a smaller validation part or give more rows"
        )
    return (
        given.train.subset(order[held + test :]),
        given.validation or given.train.subset(order[test : held + test]),
        given.test or given.train.subset(order[:test]),
    )


def _count(validation: int | float | None, rows: int, default: float) -> int:
    if validation is None:
        return max(1, round(rows * default))
    check_real(validation=validation)
    if validation <= 0 or (isinstance(validation, float) and validation >= 1):
        raise ValueError(
            "expected the validation part as a number of rows of at least 1 or as a fraction "
            f"between 0 and 1, got {validation}"
        )
    return validation if isinstance(validation, int) else max(1, round(rows * validation))


def _condition(part: Data, conditional: bool) -> Data:
    if not conditional:
        return replace(part, y=None)
    return part if part.y is not None else part.one_hot()
