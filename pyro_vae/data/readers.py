"""Rows from files of arrays (.npz, .npy), of counts (.h5ad, .mtx) and from folders of images."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.data import Data, Parts
from pyro_vae.data.mapped import LARGE, mapped
from pyro_vae.files import damaged

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["read_arrays", "read_cells", "read_images"]

_PARTS = ("", "_validation", "_test")
_ARRAYS = ("x", "y", "labels")
_LEVELS = {"bool": 2, "uint8": 256}


def read_arrays(path: Path) -> Parts:
    """Reads an .npz file, or the one array ``x`` of an .npy file.

    The arrays are ``x`` [N, *E], ``labels`` [N] (classes, integers from 0, -1
    or NaN where unknown) and ``y`` [N, C] or
    [N] (numbers to condition on), the last two optional, and the same with ``_validation`` and
    ``_test`` for these parts. Integers or booleans [N] called ``y`` are classes, and so labels.
    Floating point becomes float32. uint8 is taken for grey values 0..255 and bool for 0 and 1,
    both as images: [N, H, W] becomes [N, 1, H, W]. Other integers stay integers.

    Rows of an .npy file of more than 64 MB stay there (`Mapped`).

    Raises:
        ValueError: If the file cannot be read, holds Python objects or lacks ``x``, or an array
            has another name, shape or dtype.
    """
    if path.suffix.lower() == ".npy" and path.stat().st_size > LARGE:
        rows = mapped(path, partial(_values, path), str(path))
        levels = _LEVELS.get(np.load(path, mmap_mode="r").dtype.name)
        return {"train": Data(rows, levels=levels, name=str(path))}
    what = "a file that numpy.savez or numpy.save wrote without Python objects"
    with damaged(path, what), path.open("rb") as file:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = {"x": loaded}
        else:
            arrays = {name: loaded[name] for name in loaded.files}
    known = {f"{name}{part}" for part in _PARTS if f"x{part}" in arrays for name in _ARRAYS}
    if "x" not in arrays or not known.issuperset(arrays):
        raise ValueError(
            f"{path}: expected an array 'x', optionally 'x_validation' and 'x_test', and with "
            "each of them optionally 'y' (numbers to condition on, or integers [N] that are "
            "classes) and 'labels' (such integers) of the same ending, got "
            f"{', '.join(sorted(arrays)) or 'none'}; rename or remove arrays"
        )
    names = ("train", "validation", "test")
    found = zip(names, _PARTS)
    return {name: _part(path, arrays, part) for name, part in found if f"x{part}" in arrays}


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
        y=None if y is None else _values(path, y).float(),
        labels=None if labels is None else _labels(path, labels),
        levels=_LEVELS.get(x.dtype.name),
        name=f"{path}{part and f' ({part[1:]})'}",
    )


def _values(path: Path, x: np.ndarray) -> Tensor:
    """A tensor [N, *E] of an array; [N] becomes [N, 1]."""
    grey = x.dtype.name in _LEVELS
    if grey and x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise ValueError(
            f"{path}: expected images [N, C, H, W], got shape {list(x.shape)}, which looks like "
            "[N, H, W, C]; store x.transpose(0, 3, 1, 2)"
        )
    x = x[:, None] if x.ndim == 1 or (grey and x.ndim == 3) else x
    if x.dtype.kind not in "fbiu":
        raise ValueError(f"{path}: expected arrays of real numbers, got dtype {x.dtype}")
    if x.dtype.kind == "f":
        # A value too large for float32 becomes infinite, and the check of Data names its row.
        with np.errstate(over="ignore"):
            return torch.from_numpy(x.astype(np.float32, copy=False))
    if x.dtype.kind == "u" and x.size and x.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: expected integers below 2**63, got {x.max()}; store floats")
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


def read_cells(path: Path) -> Data:
    """Reads counts, one row for each cell, from an .h5ad or a Matrix Market file.

    Of an .h5ad file they are X, or the layer "counts" where X is not whole. A column of `obs`
    called "labels", or the only one of categories, holds the labels; `var_names` are the columns.
    A Matrix Market file has its rows as data.

    Raises:
        ValueError: If the file cannot be read, anndata is not installed, or there are no counts
            in it: values below zero or not whole, such as normalised ones.
    """
    if path.suffix.lower() == ".h5ad":
        return _of_h5ad(path)
    import scipy.io

    with damaged(path, "a whole .mtx file"):
        matrix = scipy.io.mmread(path)
    return Data(_counts(path, [matrix]), name=str(path))


def _of_h5ad(path: Path) -> Data:
    try:
        from anndata import read_h5ad
    except ImportError:
        raise ValueError(
            f"{path}: .h5ad files need anndata, which is not installed: "
            "pip install 'pyro-vae[counts]'"
        ) from None
    with warnings.catch_warnings(), damaged(path, "a whole .h5ad file"):
        warnings.simplefilter("ignore")
        table = read_h5ad(path)
    return Data(
        _counts(path, [table.X, table.layers.get("counts")]),
        labels=_cell_labels(table.obs),
        name=str(path),
        columns=tuple(map(str, table.var_names)),
    )


def _counts(path: Path, matrices: list[Any]) -> Tensor:
    """The first of these matrices, dense, sparse or None, that holds counts."""
    came = "none"
    for matrix in (matrix for matrix in matrices if matrix is not None):
        sparse = hasattr(matrix, "tocsr")
        values = np.asarray(matrix.data if sparse else matrix)
        good = (values == np.round(values)) & (values >= 0) & (values < 2.0**63)
        if good.all():
            dense = matrix.toarray() if sparse else values
            return torch.from_numpy(np.ascontiguousarray(dense.astype(np.int64)))
        came = f"{int((~good).sum())} other value(s), such as {values[~good][0]:g}"
    raise ValueError(
        f"{path}: expected counts, whole numbers from 0, got {came}; if they are normalised, give "
        'the raw counts, as X or as the layer "counts"'
    )


def _cell_labels(obs: Any) -> Tensor | None:
    named = [name for name in obs.columns if str(name).lower() in ("label", "labels")]
    named = named or [name for name in obs.columns if str(obs[name].dtype) == "category"]
    if len(named) != 1:
        return None
    codes = obs[named[0]].astype("category").cat.codes.to_numpy()
    return torch.from_numpy(codes.astype(np.int64))  # -1 where it is not known


def read_images(folder: Path) -> Parts:
    """Reads the images below a folder, in the sorted order of their paths.

    The first sub-folder of a path is the class of its image, numbered in sorted order; images
    right in the folder have no labels. Folders ``train`` and ``test``, where both are present,
    hold these parts. Where all images are bilevel the values are 0 and 1 (white); where all are
    grey they are [N, 1, H, W]; otherwise all are read as colour, [N, 3, H, W]. Transparency is
    dropped.

    Raises:
        ValueError: If there is no image, one cannot be read, two differ in size, or only some
            lie in class folders.
    """
    parts = [folder / "train", folder / "test"]
    parts = parts if all(part.is_dir() for part in parts) else [folder]
    paths = [_paths(part) for part in parts]
    mode = _mode([path for part in paths for path in part])
    names = [_class_names(part, found) for part, found in zip(parts, paths)]
    classes = sorted({name for part in names for name in part})
    data = [_data(*part, classes, mode) for part in zip(parts, paths, names)]
    return dict(zip(("train", "test"), data))


def _paths(folder: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".")
    )
    if not found:
        raise ValueError(f"{folder}: expected images ({', '.join(IMG_EXTENSIONS)}), got none")
    return found


def _mode(paths: list[Path]) -> str:
    modes = {}
    for path in paths:
        with _opened(path) as image:
            modes[path] = image.mode
    deep = [path for path, mode in modes.items() if mode[0] in "IF"]
    if deep:
        raise ValueError(
            f"{deep[0]}: expected 8 bits per channel, got mode {modes[deep[0]]!r}; convert the "
            "image, or give an array with grey values as integers or floats"
        )
    found = set(modes.values())
    return "1" if found == {"1"} else "L" if found <= {"1", "L"} else "RGB"


@contextmanager
def _opened(path: Path) -> Iterator[PIL.Image.Image]:
    from PIL import Image

    if not path.is_file():
        raise ValueError(f"{path}: expected an image file, got a special file; remove it")
    with damaged(path, "a readable image", "repair or remove it"), Image.open(path) as image:
        yield image


def _class_names(folder: Path, paths: list[Path]) -> list[str]:
    inside = [path.relative_to(folder).parts for path in paths]
    names = [parts[0] for parts in inside if len(parts) > 1]
    if names and len(names) < len(paths):
        loose = next(path for path, parts in zip(paths, inside) if len(parts) == 1)
        raise ValueError(
            f"{folder}: expected all images in class folders or none, got {loose} beside "
            f"{len(names)} in folders; move it"
        )
    return names


def _data(
    folder: Path, paths: list[Path], names: list[str], classes: list[str], mode: str
) -> Data:
    images: list[Tensor] = []
    for path in paths:
        with _opened(path) as image:
            pixels = np.array(image.convert(mode), dtype=np.uint8)
        images.append(torch.from_numpy(np.atleast_3d(pixels)).permute(2, 0, 1))
        first, size = images[0].shape[1:], images[-1].shape[1:]
        if size != first:
            raise ValueError(
                f"expected images of one size, got {paths[0]} of {first[0]} x {first[1]} "
                f"(height x width) and {path} of {size[0]} x {size[1]}; resize them to one"
            )
    return Data(
        torch.stack(images),
        labels=torch.tensor([classes.index(name) for name in names]) if names else None,
        levels=2 if mode == "1" else 256,
        name=str(folder),
        classes=len(classes) or None,
    )
