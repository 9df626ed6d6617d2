"""Tables of counts as single-cell programs write them: .h5ad and .mtx files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given

__all__ = ["read_cells"]


def read_cells(path: Path) -> Given:
    """Reads counts, one row for each cell, from an .h5ad or a Matrix Market file.

    Of an .h5ad file they are X, or the layer "counts" where X is not whole. A column of `obs`
    called "labels", or the only one of categories, holds the labels; `var_names` are the columns.
    A Matrix Market file has its rows as data.

    Raises:
        ValueError: If the file cannot be read, anndata is not installed, or there are no counts
            in it: values below zero or not whole, such as normalised ones.
    """
    if path.suffix == ".h5ad":
        return Given(_of_h5ad(path))
    import scipy.io

    return Given(Data(_counts(path, _read(path, scipy.io.mmread)), name=str(path)))


def _of_h5ad(path: Path) -> Data:
    try:
        from anndata import read_h5ad
    except ImportError:
        raise ValueError(
            f"{path}: .h5ad files need anndata, which is not installed: "
            "pip install 'pyro-vae[counts]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = _read(path, read_h5ad)
    raw = "counts" in table.layers and (table.X is None or not _whole(table.X))
    return Data(
        _counts(path, table.layers["counts"] if raw else table.X),
        labels=_labels(table.obs),
        name=str(path),
        columns=tuple(map(str, table.var_names)),
    )


def _read(path: Path, reader: Any) -> Any:
    try:
        return reader(path)
    except Exception as error:  # of many kinds on a damaged file
        line = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected a whole {path.suffix} file, got: {line}; write it again"
        ) from error


def _values(matrix: Any) -> np.ndarray:
    """What is stored of a dense or sparse matrix."""
    return np.asarray(matrix.data if hasattr(matrix, "tocsr") else matrix)


def _whole(matrix: Any) -> bool:
    values = _values(matrix)
    return bool((values == np.round(values)).all() and (values >= 0).all())


def _counts(path: Path, matrix: Any) -> Tensor:
    if not _whole(matrix):
        values = _values(matrix)
        raise ValueError(
            f"{path}: expected counts, whole numbers from 0, got values in [{values.min():g}, "
            f"{values.max():g}] that are not whole, as normalised ones are: give the raw counts, "
            'as X or as the layer "counts"'
        )
    dense = matrix.toarray() if hasattr(matrix, "tocsr") else np.asarray(matrix)
    return torch.from_numpy(np.ascontiguousarray(dense.astype(np.int64)))


def _labels(obs: Any) -> Tensor | None:
    named = [name for name in obs.columns if str(name).lower() in ("label", "labels")]
    named = named or [name for name in obs.columns if str(obs[name].dtype) == "category"]
    if len(named) != 1:
        return None
    codes = obs[named[0]].astype("category").cat.codes.to_numpy()
    return torch.from_numpy(codes.astype(np.int64))  # -1 where it is not known
