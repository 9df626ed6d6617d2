"""Arrays from .npz and .npy files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data
from pyro_vae.data.given import Given

_PARTS = ("", "_validation", "_test")
_ARRAYS = ("x", "y", "labels")
_LEVELS = {"bool": 2, "uint8": 256}


def read_arrays(path: Path) -> Given:
    """Reads an .npz file, or the one array ``x`` of an .npy file.

    The arrays are ``x`` [N, *E], ``labels`` [N] (classes, integers from 0, -1
    or NaN where unknown) and ``y`` [N, C] or
    [N] (numbers to condition on), the last two optional, and the same with ``_validation`` and
    ``_test`` for these parts. Integers or booleans [N] called ``y`` are classes, and so labels.
    Floating point becomes float32. uint8 is taken for grey values 0..255 and bool for 0 and 1,
    both as images: [N, H, W] becomes [N, 1, H, W]. Other integers stay integers.

    Raises:
        ValueError: If the file cannot be read, holds Python objects or lacks ``x``, or an array
            has another name, shape or dtype.
    """
    arrays = _load(path)
    known = {f"{name}{part}" for part in _PARTS if f"x{part}" in arrays for name in _ARRAYS}
    if "x" not in arrays or not known.issuperset(arrays):
        raise ValueError(
            f"{path}: expected an array 'x', optionally 'x_validation' and 'x_test', and with "
            "each of them optionally 'y' (numbers to condition on, or integers [N] that are "
            "classes) and 'labels' (such integers) of the same ending, got "
            f"{', '.join(sorted(arrays)) or 'none'}; rename or remove arrays"
        )
    return Given(
        _part(path, arrays, ""),
        _part(path, arrays, "_validation") if "x_validation" in arrays else None,
        _part(path, arrays, "_test") if "x_test" in arrays else None,
    )


def _load(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"x": loaded}
            return {name: loaded[name] for name in loaded.files}
    # On a damaged file the parsers below numpy.load raise errors of many kinds.
    except Exception as error:
        raise ValueError(
            f"{path}: expected a file that numpy.savez or numpy.save wrote without Python "
            f"objects, got: {error}; write it again"
        ) from error


def _part(path: Path, arrays: Mapping[str, np.ndarray], part: str) -> Data:
    x, y, labels = arrays[f"x{part}"], arrays.get(f"y{part}"), arrays.get(f"labels{part}")
    if y is not None and y.ndim == 1 and y.dtype.kind in "biu":
        if labels is not None:
            raise ValueError(
                f"{path}: expected classes once, got y of integers [N] and labels beside them; "
                "keep one, or store y as floating point to condition on it as a number"
            )
        labels, y = y.astype(np.int64), None
    return Data(
        _values(path, x),
        y=None if y is None else _columns(_numbers(path, y)).float(),
        labels=None if labels is None else _labels(path, labels),
        levels=_LEVELS.get(x.dtype.name),
        name=f"{path}{part and f' ({part[1:]})'}",
    )


def _values(path: Path, x: np.ndarray) -> Tensor:
    grey = x.dtype.name in _LEVELS
    if grey and x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"{path}: expected images [N, C, H, W], got shape {list(x.shape)}, which looks like "
            "[N, H, W, C]; store x.transpose(0, 3, 1, 2)"
        )
    values = _columns(_numbers(path, x))
    return values.unsqueeze(1) if grey and x.ndim == 3 else values


def _columns(x: Tensor) -> Tensor:
    return x.unsqueeze(1) if x.ndim == 1 else x


def _numbers(path: Path, x: np.ndarray) -> Tensor:
    if x.dtype.kind not in "fbiu":
        raise ValueError(f"{path}: expected arrays of real numbers, got dtype {x.dtype}")
    if x.dtype.kind == "f":
        # A value too large for float32 becomes infinite, and the check of Data names its row.
        with np.errstate(over="ignore"):
            return torch.from_numpy(x.astype(np.float32, copy=False))
    if x.dtype.kind == "u" and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: expected integers below 2**63, got {x.max()}; store floats")
    grey = x.dtype.name in _LEVELS
    return torch.from_numpy(x.astype(np.uint8 if grey else np.int64, copy=False))


def _labels(path: Path, labels: np.ndarray) -> Tensor:
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        labels = np.where(np.isnan(labels), -1, labels)
        labels = labels.astype(np.int64) if (labels == labels.round()).all() else labels
    if labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path}: expected labels that are integers from 0, got dtype {labels.dtype}"
        )
    return torch.from_numpy(labels.astype(np.int64))
